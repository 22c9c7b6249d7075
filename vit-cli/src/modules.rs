//! A model as a tree of modules with shapes and parameters, in the order in which they run.
//!
//! The parameters and their names come from [`vit_model::layers`]. A table says what PyTorch calls the modules that
//! hold them, and where its tools list modules that do nothing at inference (dropout, stochastic depth, the identity in
//! place of an absent norm).

use vit_model::layers::{Layer, LayerKind, layers};
use vit_model::{Activation, BlockKind, Config, MlpKind, Pool, Result};

/// A module: its name, output, parameters and children.
#[derive(Clone, Debug)]
pub struct Module {
    /// timm's attribute name; empty for the model itself.
    pub name: String,
    /// PyTorch's class name.
    pub kind: &'static str,
    /// Shape of the output without the batch.
    pub output: Vec<usize>,
    /// Its own parameters and their shapes, in file order.
    pub params: Vec<(String, Vec<usize>)>,
    /// Modules inside, in the order in which they run.
    pub children: Vec<Module>,
    /// Whether the module changes nothing at inference.
    pub inert: bool,
}

impl Module {
    fn new(name: impl Into<String>, kind: &'static str, output: &[usize]) -> Self {
        let (params, children) = (Vec::new(), Vec::new());
        Self { name: name.into(), kind, output: output.to_vec(), params, children, inert: false }
    }

    fn inert(name: &str, kind: &'static str, output: &[usize]) -> Self {
        Self { inert: true, ..Self::new(name, kind, output) }
    }

    /// Parameters of this module and all inside. (Modules nest five deep at most.)
    pub fn parameters(&self) -> u128 {
        let own: u128 = self.params.iter().map(|(_, shape)| elements(shape)).sum();
        own + self.children.iter().map(Module::parameters).sum::<u128>()
    }

    /// The child with this name, which is added if there is none yet.
    fn child(&mut self, name: &str) -> &mut Module {
        let at = self.children.iter().position(|child| child.name == name).unwrap_or_else(|| {
            self.children.push(Module::new(name, "", &[]));
            self.children.len() - 1
        });
        &mut self.children[at]
    }

    /// Adds modules after the last of the named ones, or first if there is none of them.
    fn insert_after(&mut self, names: &[&str], modules: impl IntoIterator<Item = Module>) {
        let at = self.children.iter().rposition(|child| names.contains(&child.name.as_str())).map_or(0, |at| at + 1);
        self.children.splice(at..at, modules);
    }
}

/// The number of elements of a shape. 128 bits are enough for the product of any four sizes that a configuration allows.
pub fn elements(shape: &[usize]) -> u128 {
    shape.iter().map(|&n| n as u128).product()
}

/// Builds the tree of the whole model.
///
/// # Errors
/// A configuration that [`Config::validate`] refuses.
pub fn of(config: &Config) -> Result<Module> {
    let tree = Tree { config, tokens: config.num_tokens(), dim: config.embed_dim };
    let mut model = Module::new("", "", &[]);
    for layer in layers(config)? {
        place(&mut model, layer);
    }
    tree.complete(&mut model);
    Ok(model)
}

/// Adds a layer at the path of its name.
fn place(model: &mut Module, layer: Layer) {
    // such a parameter belongs to the enclosing module; so do BEiT's factors per channel
    let bare = layer.kind == LayerKind::Parameter || layer.parameters.iter().any(|p| p.name == layer.name);
    let owner = if bare { layer.name.rsplit_once('.').map_or("", |(owner, _)| owner) } else { &layer.name };
    let module = owner.split('.').filter(|name| !name.is_empty()).fold(model, Module::child);
    module.kind = match layer.kind {
        _ if bare => module.kind,
        LayerKind::Linear => "Linear",
        LayerKind::Conv2d => "Conv2d",
        LayerKind::LayerNorm => "LayerNorm",
        LayerKind::RmsNorm => "RmsNorm",
        LayerKind::LayerScale => "LayerScale",
        _ => module.kind,
    };
    let name = |name: String| name.rsplit_once('.').map_or(name.clone(), |(_, name)| name.to_owned());
    module.params.extend(layer.parameters.into_iter().map(|parameter| (name(parameter.name), parameter.shape)));
}

struct Tree<'a> {
    config: &'a Config,
    tokens: usize,
    dim: usize,
}

impl Tree<'_> {
    /// Adds what the description of layers lacks: the kinds of containers, the outputs, and modules without parameters.
    fn complete(&self, model: &mut Module) {
        let (config, all) = (self.config, [self.tokens, self.dim]);
        let width = match (config.num_classes, &config.pre_logits) {
            (0, Some(pre)) => pre.size,
            (0, None) => config.pooled_dim(),
            (classes, _) => classes,
        };
        (model.kind, model.output) = ("VisionTransformer", self.pooled(width));
        for child in &mut model.children {
            match child.name.as_str() {
                "patch_embed" => self.patch_embed(child),
                "blocks" => {
                    (child.kind, child.output) = ("Sequential", all.to_vec());
                    child.children.iter_mut().for_each(|block| self.block(block));
                }
                "attn_pool" => self.attention_pool(child),
                "pre_logits" => {
                    child.children.iter_mut().for_each(|fc| fc.output = self.pooled(width_of(fc)));
                    (child.kind, child.output) = ("Sequential", self.pooled(child.children.iter().map(width_of).sum()));
                    child.children.push(Module::new("act", "Tanh", &child.output));
                }
                "fc_norm" | "head" | "head_dist" => child.output = self.pooled(width_of(child)),
                "rope" => (child.kind, child.output) = ("RotaryEmbeddingMixed", all.to_vec()),
                "rel_pos_bias" => (child.kind, child.output) = ("RelativePositionBias", all.to_vec()),
                _ => child.output = all.to_vec(),
            }
        }
        model.insert_after(&["patch_embed"], [Module::inert("pos_drop", "Dropout", &all)]);
        if config.pre_logits.is_none() && !config.dist_token {
            let identity = Module::inert("pre_logits", "Identity", &self.pooled(config.pooled_dim()));
            model.insert_after(&["blocks", "norm", "attn_pool", "fc_norm"], [identity]);
        }
        if config.num_classes == 0 {
            let names = if config.dist_token { &["head", "head_dist"][..] } else { &["head"] };
            let output = &model.output;
            let identities: Vec<_> = names.iter().map(|name| Module::inert(name, "Identity", output)).collect();
            model.children.extend(identities);
        }
    }

    /// The shape of an output of the given width, after pooling if the model pools.
    fn pooled(&self, width: usize) -> Vec<usize> {
        let per_token = self.config.global_pool == Pool::None && !self.config.dist_token;
        if per_token { vec![self.tokens, width] } else { vec![width] }
    }

    fn patch_embed(&self, module: &mut Module) {
        let ([rows, columns], out) = (self.config.grid(), [self.config.num_patches(), self.dim]);
        (module.kind, module.output) = ("PatchEmbed", out.to_vec());
        outputs(module, out[0]);
        module.child("proj").output = vec![self.dim, rows, columns];
        if !self.config.patch_norm {
            module.children.push(Module::inert("norm", "Identity", &out));
        }
    }

    fn block(&self, module: &mut Module) {
        let drop_path = || Module::inert("drop_path", "Identity", &[self.tokens, self.dim]);
        module.output = vec![self.tokens, self.dim];
        self.branch(module);
        module.kind = match self.config.block {
            BlockKind::Standard => {
                module.insert_after(&["attn", "ls1"], [drop_path()]);
                "Block"
            }
            BlockKind::ResPost => {
                module.insert_after(&["norm1"], [drop_path()]);
                "ResPostBlock"
            }
            BlockKind::ParallelThings => {
                for list in &mut module.children {
                    (list.kind, list.output) = ("ModuleList", module.output.clone());
                    for branch in &mut list.children {
                        (branch.kind, branch.output) = ("Sequential", module.output.clone());
                        self.branch(branch);
                        branch.children.push(drop_path());
                    }
                }
                return module.kind = "ParallelThingsBlock";
            }
            BlockKind::ParallelScaling => {
                self.parallel(module, self.config.head_dim(), "attn_out_proj");
                "ParallelScalingBlock"
            }
            BlockKind::DiffParallelScaling => {
                self.parallel(module, self.config.head_dim() / 2, "sub_norm");
                "DiffParallelScalingBlock"
            }
            _ => "Block",
        };
        module.children.push(drop_path());
    }

    /// The children of a block, or of a branch of one.
    fn branch(&self, module: &mut Module) {
        outputs(module, self.tokens);
        for child in &mut module.children {
            match child.name.as_str() {
                "attn" => self.attention(child),
                "mlp" => self.mlp(child, self.tokens, self.config.mlp),
                _ => self.per_head(child),
            }
        }
    }

    /// Sets the output of a norm over the width of a head, which has an output for each head.
    fn per_head(&self, module: &mut Module) {
        if matches!(module.name.as_str(), "q_norm" | "k_norm" | "sub_norm") {
            let width = width_of(module);
            module.output = vec![self.dim / width, self.tokens, width];
        }
    }

    fn attn_drop(&self, head_dim: usize) -> Module {
        Module::inert("attn_drop", "Dropout", &[self.dim / head_dim, self.tokens, self.tokens])
    }

    /// Adds the modules without parameters to a block whose attention and MLP share an input. Those of the MLP follow
    /// `attended`.
    fn parallel(&self, module: &mut Module, head_dim: usize, attended: &str) {
        let hidden = [self.tokens, self.config.mlp_hidden];
        module.insert_after(&["in_proj", "q_norm", "k_norm"], [self.attn_drop(head_dim)]);
        module.insert_after(&[attended], [Module::inert("mlp_drop", "Dropout", &hidden), self.act(&hidden)]);
    }

    fn attention(&self, module: &mut Module) {
        let all = [self.tokens, self.dim];
        let (kind, head_dim) = if self.config.diff_attn {
            ("DiffAttention", self.config.head_dim() / 2)
        } else {
            ("Attention", self.config.head_dim())
        };
        (module.kind, module.output) = (kind, all.to_vec());
        outputs(module, self.tokens);
        module.children.iter_mut().for_each(|child| self.per_head(child));
        module.insert_after(&["qkv", "q_norm", "k_norm"], [self.attn_drop(head_dim)]);
        module.children.push(Module::inert("proj_drop", "Dropout", &all));
    }

    fn mlp(&self, module: &mut Module, rows: usize, mlp: MlpKind) {
        let kind = match mlp {
            MlpKind::Swiglu => "SwiGLU",
            MlpKind::SwigluPacked => "GluMlp",
            _ => "Mlp",
        };
        (module.kind, module.output) = (kind, vec![rows, self.dim]);
        outputs(module, rows);
        let inputs = |fc2: &Module| fc2.params.first().and_then(|(_, shape)| shape.last().copied());
        let hidden = [rows, module.children.last().and_then(inputs).unwrap_or(0)];
        let inner = [self.act(&hidden), Module::inert("drop1", "Dropout", &hidden)];
        module.insert_after(&["fc1", "fc1_g", "fc1_x"], inner);
        module.children.push(Module::inert("drop2", "Dropout", &[rows, self.dim]));
    }

    fn act(&self, output: &[usize]) -> Module {
        let kind = match self.config.act {
            Activation::Gelu => "GELU",
            Activation::GeluTanh => "GELUTanh",
            Activation::QuickGelu => "QuickGELU",
            Activation::Relu => "ReLU",
            Activation::Silu => "SiLU",
            _ => "Activation",
        };
        Module::new("act", kind, output)
    }

    fn attention_pool(&self, module: &mut Module) {
        let patches = if self.config.pool_include_prefix { self.tokens } else { self.config.num_patches() };
        (module.kind, module.output) = ("AttentionPoolLatent", vec![self.dim]);
        outputs(module, 1);
        module.child("kv").output[0] = patches;
        // the pooling always has a plain MLP, even if the blocks do not
        self.mlp(module.child("mlp"), 1, MlpKind::Mlp);
        module.insert_after(&["proj"], [Module::inert("proj_drop", "Dropout", &[1, self.dim])]);
    }
}

/// Output channels of a layer: the first dimension of each of its tensors.
fn width_of(layer: &Module) -> usize {
    layer.params.first().and_then(|(_, shape)| shape.first().copied()).unwrap_or(0)
}

/// Sets the outputs of the layers in a module, which run on this many tokens.
fn outputs(module: &mut Module, tokens: usize) {
    for layer in module.children.iter_mut().filter(|child| child.children.is_empty()) {
        layer.output = vec![tokens, width_of(layer)];
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Name → shape of every tensor below a module.
    fn tensors(module: &Module, prefix: &str, found: &mut BTreeMap<String, Vec<usize>>) {
        let path = |name: &str| if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
        found.extend(module.params.iter().map(|(name, shape)| (path(name), shape.clone())));
        module.children.iter().for_each(|child| tensors(child, &path(&child.name), found));
    }

    /// Every module has a kind and an output.
    fn is_complete(module: &Module) -> bool {
        !module.kind.is_empty() && !module.output.is_empty() && module.children.iter().all(is_complete)
    }

    #[test]
    fn the_tree_of_every_architecture_is_complete_and_holds_all_tensors() {
        for name in vit_model::names::all() {
            let config = vit_model::names::Architecture::of(name).expect(name).config;
            let (tree, mut found) = (of(&config).expect(name), BTreeMap::new());
            tensors(&tree, "", &mut found);
            assert!(is_complete(&tree), "{name}");
            assert_eq!(found, vit_model::layers::parameters(&config).expect(name), "{name}");
        }
    }
}
