//! A configuration as a tree of modules with shapes and parameters, in the order in which they run.
//!
//! Names are timm's. Modules that do nothing at inference (dropout, stochastic depth, the identity in place of an absent
//! norm) are there too and marked: PyTorch's tools list them.

use vit_model::{Activation, BlockKind, Config, MlpKind, NormKind, Pool};

/// A module: what it is called, what it puts out, what it owns, what it is made of.
#[derive(Clone, Debug)]
pub struct Module {
    /// timm's attribute name; empty for the model itself.
    pub name: String,
    /// PyTorch's class name.
    pub kind: &'static str,
    /// Shape of the output without the batch.
    pub output: Vec<usize>,
    /// Its own parameters and their shapes, in file order.
    pub params: Vec<(&'static str, Vec<usize>)>,
    /// Modules inside, in the order in which they run.
    pub children: Vec<Module>,
    /// Changes nothing at inference.
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

    fn own(mut self, name: &'static str, shape: &[usize]) -> Self {
        self.params.push((name, shape.to_vec()));
        self
    }

    fn own_if(self, there: bool, name: &'static str, shape: &[usize]) -> Self {
        if there { self.own(name, shape) } else { self }
    }

    fn with(mut self, children: impl IntoIterator<Item = Module>) -> Self {
        self.children.extend(children);
        self
    }

    /// Parameters of this module alone.
    pub fn own_parameters(&self) -> u128 {
        self.params.iter().map(|(_, shape)| elements(shape)).sum()
    }

    /// Parameters of this module and all inside. (Modules nest five deep at most.)
    pub fn parameters(&self) -> u128 {
        self.own_parameters() + self.children.iter().map(Module::parameters).sum::<u128>()
    }
}

/// Elements of a shape; 128 bits hold the product of any four sizes that a configuration may have.
pub fn elements(shape: &[usize]) -> u128 {
    shape.iter().map(|&n| n as u128).product()
}

/// The whole model.
pub fn of(config: &Config) -> Module {
    let tree = Tree { config, tokens: config.num_tokens(), dim: config.embed_dim };
    tree.model()
}

struct Tree<'a> {
    config: &'a Config,
    tokens: usize,
    dim: usize,
}

impl Tree<'_> {
    fn model(&self) -> Module {
        let (config, dim) = (self.config, self.dim);
        let all = [self.tokens, dim];
        let per_token = config.global_pool == Pool::None && !config.dist_token;
        let pooled = |width: usize| if per_token { vec![self.tokens, width] } else { vec![width] };
        let output = pooled(match (config.num_classes, &config.pre_logits) {
            (0, Some(pre)) => pre.size,
            (0, None) => config.pooled_dim(),
            (classes, _) => classes,
        });
        let mut model = Module::new("", "VisionTransformer", &output)
            .own_if(config.class_token, "cls_token", &[1, 1, dim])
            .own_if(config.dist_token, "dist_token", &[1, 1, dim])
            .own_if(config.reg_tokens > 0, "reg_token", &[1, config.reg_tokens, dim])
            .own_if(config.pos_embed, "pos_embed", &[1, self.pos_embed_rows(), dim])
            .with([self.patch_embed(), Module::inert("pos_drop", "Dropout", &all)]);
        if config.pre_norm {
            model.children.push(self.norm("norm_pre", &all));
        }
        let blocks = (0..config.depth).map(|i| self.block(&i.to_string()));
        model.children.push(Module::new("blocks", "Sequential", &all).with(blocks));
        if config.final_norm && !config.fc_norm {
            model.children.push(self.norm("norm", &all));
        }
        if config.global_pool == Pool::Map {
            model.children.push(self.attention_pool());
        }
        if config.final_norm && config.fc_norm && !config.dist_token {
            model.children.push(self.norm("fc_norm", &pooled(dim)));
        }
        let mut width = config.pooled_dim();
        if !config.dist_token {
            model.children.push(match &config.pre_logits {
                Some(pre) => {
                    width = pre.size;
                    let out = pooled(width);
                    let fc = linear("fc", config.pooled_dim(), width, true, &out[..out.len() - 1]);
                    Module::new("pre_logits", "Sequential", &out).with([fc, Module::new("act", "Tanh", &out)])
                }
                None => Module::inert("pre_logits", "Identity", &pooled(width)),
            });
        }
        for name in if config.dist_token { &["head", "head_dist"][..] } else { &["head"] } {
            let rows = if per_token { &all[..1] } else { &[] };
            model.children.push(match config.num_classes {
                0 => Module::inert(name, "Identity", &pooled(width)),
                classes => linear(name, width, classes, config.head_bias, rows),
            });
        }
        model
    }

    fn pos_embed_rows(&self) -> usize {
        if self.config.no_embed_class { self.config.num_patches() } else { self.tokens }
    }

    fn patch_embed(&self) -> Module {
        let (config, dim) = (self.config, self.dim);
        let ([rows, columns], [ph, pw], out) = (config.grid(), config.patch_size, [config.num_patches(), dim]);
        let proj = Module::new("proj", "Conv2d", &[dim, rows, columns])
            .own("weight", &[dim, config.in_chans, ph, pw])
            .own_if(config.patch_bias, "bias", &[dim]);
        let norm = if config.patch_norm { self.norm("norm", &out) } else { Module::inert("norm", "Identity", &out) };
        Module::new("patch_embed", "PatchEmbed", &out).with([proj, norm])
    }

    fn norm(&self, name: &str, output: &[usize]) -> Module {
        let width = output.last().copied().unwrap_or(0);
        let (kind, bias) = match self.config.norm {
            NormKind::LayerNorm => ("LayerNorm", true),
            NormKind::RmsNorm => ("RmsNorm", false),
        };
        Module::new(name, kind, output).own("weight", &[width]).own_if(bias, "bias", &[width])
    }

    fn act(&self, output: &[usize]) -> Module {
        let kind = match self.config.act {
            Activation::Gelu => "GELU",
            Activation::GeluTanh => "GELUTanh",
            Activation::QuickGelu => "QuickGELU",
            Activation::Relu => "ReLU",
            Activation::Silu => "SiLU",
        };
        Module::new("act", kind, output)
    }

    fn layer_scale(&self, name: &str) -> Option<Module> {
        let scale = || Module::new(name, "LayerScale", &[self.tokens, self.dim]).own("gamma", &[self.dim]);
        self.config.layer_scale.then(scale)
    }

    fn drop_path(&self) -> Module {
        Module::inert("drop_path", "Identity", &[self.tokens, self.dim])
    }

    fn block(&self, index: &str) -> Module {
        let (config, all) = (self.config, [self.tokens, self.dim]);
        let norm = |name| self.norm(name, &all);
        match config.block {
            BlockKind::Standard => Module::new(index, "Block", &all)
                .with([norm("norm1"), self.attention("attn")])
                .with(self.layer_scale("ls1"))
                .with([self.drop_path(), norm("norm2"), self.mlp("mlp", self.tokens)])
                .with(self.layer_scale("ls2"))
                .with([self.drop_path()]),
            BlockKind::ResPost => Module::new(index, "ResPostBlock", &all)
                .with([self.attention("attn"), norm("norm1"), self.drop_path()])
                .with([self.mlp("mlp", self.tokens), norm("norm2"), self.drop_path()]),
            BlockKind::ParallelThings => {
                let branch = |i: usize, body: Module| {
                    Module::new(i.to_string(), "Sequential", &all)
                        .with([norm("norm"), body])
                        .with(self.layer_scale("ls"))
                        .with([self.drop_path()])
                };
                let attns = (0..2).map(|i| branch(i, self.attention("attn")));
                let ffns = (0..2).map(|i| branch(i, self.mlp("mlp", self.tokens)));
                Module::new(index, "ParallelThingsBlock", &all).with([
                    Module::new("attns", "ModuleList", &all).with(attns),
                    Module::new("ffns", "ModuleList", &all).with(ffns),
                ])
            }
            BlockKind::ParallelScaling => {
                let hidden = [self.tokens, config.mlp_hidden];
                self.parallel_input(Module::new(index, "ParallelScalingBlock", &all), config.head_dim())
                    .with([linear("attn_out_proj", self.dim, self.dim, config.proj_bias, &all[..1])])
                    .with([Module::inert("mlp_drop", "Dropout", &hidden), self.act(&hidden)])
                    .with([linear("mlp_out_proj", config.mlp_hidden, self.dim, config.proj_bias, &all[..1])])
                    .with(self.layer_scale("ls"))
                    .with([self.drop_path()])
            }
            BlockKind::DiffParallelScaling => {
                let (half, hidden) = (config.head_dim() / 2, [self.tokens, config.mlp_hidden]);
                let block = self.lambdas(Module::new(index, "DiffParallelScalingBlock", &all));
                self.parallel_input(block, half)
                    .with([self.sub_norm()])
                    .with([Module::inert("mlp_drop", "Dropout", &hidden), self.act(&hidden)])
                    .with([linear("out_proj", self.dim + config.mlp_hidden, self.dim, config.proj_bias, &all[..1])])
                    .with(self.layer_scale("ls"))
                    .with([self.drop_path()])
            }
        }
    }

    /// The norm and the projection that the attention and the MLP of a parallel block share.
    fn parallel_input(&self, block: Module, head_dim: usize) -> Module {
        let (config, all) = (self.config, [self.tokens, self.dim]);
        let out = config.mlp_hidden + 3 * self.dim;
        block
            .own_if(!config.qkv_bias, "mlp_bias", &[config.mlp_hidden])
            .with([self.norm("in_norm", &all), linear("in_proj", self.dim, out, config.qkv_bias, &all[..1])])
            .with(self.qk_norms(head_dim))
            .with([Module::inert("attn_drop", "Dropout", &[self.dim / head_dim, self.tokens, self.tokens])])
    }

    fn qk_norms(&self, head_dim: usize) -> Vec<Module> {
        let out = [self.dim / head_dim, self.tokens, head_dim];
        let names = if self.config.qk_norm { &["q_norm", "k_norm"][..] } else { &[] };
        names.iter().map(|name| self.norm(name, &out)).collect()
    }

    /// What differential attention learns beside its projections.
    fn lambdas(&self, module: Module) -> Module {
        let names = ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"];
        names.into_iter().fold(module, |module, name| module.own(name, &[self.config.head_dim() / 2]))
    }

    fn sub_norm(&self) -> Module {
        let width = 2 * (self.config.head_dim() / 2);
        Module::new("sub_norm", "RmsNorm", &[self.config.num_heads, self.tokens, width]).own("weight", &[width])
    }

    fn attention(&self, name: &str) -> Module {
        let (config, all, dim) = (self.config, [self.tokens, self.dim], self.dim);
        let norm = config.scale_attn_norm.then(|| self.norm("norm", &all));
        let (attention, qk_dim) = if config.diff_attn {
            (self.lambdas(Module::new(name, "DiffAttention", &all)), config.head_dim() / 2)
        } else {
            (Module::new(name, "Attention", &all), config.head_dim())
        };
        attention
            .with([linear("qkv", dim, 3 * dim, config.qkv_bias, &all[..1])])
            .with(self.qk_norms(qk_dim))
            .with([Module::inert("attn_drop", "Dropout", &[dim / qk_dim, self.tokens, self.tokens])])
            .with(config.diff_attn.then(|| self.sub_norm()))
            .with(norm)
            .with([linear("proj", dim, dim, config.proj_bias, &all[..1])])
            .with([Module::inert("proj_drop", "Dropout", &all)])
    }

    fn mlp(&self, name: &str, rows: usize) -> Module {
        let (config, dim, bias) = (self.config, self.dim, self.config.proj_bias);
        let (kind, hidden) = match config.mlp {
            MlpKind::Mlp => ("Mlp", config.mlp_hidden),
            MlpKind::Swiglu => ("SwiGLU", config.mlp_hidden),
            MlpKind::SwigluPacked => ("GluMlp", config.mlp_hidden / 2),
        };
        let inner = [rows, hidden];
        let fc1 = |name| linear(name, dim, config.mlp_hidden, bias, &inner[..1]);
        let first = match config.mlp {
            MlpKind::Mlp | MlpKind::SwigluPacked => vec![fc1("fc1")],
            MlpKind::Swiglu => vec![fc1("fc1_g"), fc1("fc1_x")],
        };
        Module::new(name, kind, &[rows, dim])
            .with(first)
            .with([self.act(&inner), Module::inert("drop1", "Dropout", &inner)])
            .with(config.scale_mlp_norm.then(|| self.norm("norm", &inner)))
            .with([linear("fc2", hidden, dim, bias, &inner[..1]), Module::inert("drop2", "Dropout", &[rows, dim])])
    }

    /// Whatever the blocks have, the pooling has a plain MLP and all biases.
    fn attention_pool(&self) -> Module {
        let (config, dim) = (self.config, self.dim);
        let plain = Config { mlp: MlpKind::Mlp, proj_bias: true, scale_mlp_norm: false, ..config.clone() };
        let plain = Tree { config: &plain, ..*self };
        let patches = if config.pool_include_prefix { self.tokens } else { config.num_patches() };
        Module::new("attn_pool", "AttentionPoolLatent", &[dim]).own("latent", &[1, 1, dim]).with([
            linear("q", dim, dim, true, &[1]),
            linear("kv", dim, 2 * dim, true, &[patches]),
            linear("proj", dim, dim, true, &[1]),
            Module::inert("proj_drop", "Dropout", &[1, dim]),
            self.norm("norm", &[1, dim]),
            plain.mlp("mlp", 1),
        ])
    }
}

/// A linear layer over `rows` (none: over one vector).
fn linear(name: &str, from: usize, to: usize, bias: bool, rows: &[usize]) -> Module {
    let output = [rows, &[to]].concat();
    Module::new(name, "Linear", &output).own("weight", &[to, from]).own_if(bias, "bias", &[to])
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

    #[test]
    fn the_tree_of_every_architecture_holds_its_tensors_and_no_others() {
        for name in vit_model::names::all() {
            let config = vit_model::names::Architecture::of(name).expect(name).config;
            let mut found = BTreeMap::new();
            tensors(&of(&config), "", &mut found);
            assert_eq!(found, vit_model::load::parameters(&config).expect(name), "{name}");
        }
    }
}
