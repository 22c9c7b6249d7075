//! The network of a [`Config`] as data: which layers it has, their names and sizes, in the order in which they run.
//!
//! Everything that needs to know the layers derives it from here: the list of tensors that a checkpoint must hold
//! ([`parameters`]), candle's modules, the CPU engine's plan, and the tree that `vit-cli summary` prints ([`layers`]).
//! Names are timm's (`timm/models/vision_transformer.py`), so that its checkpoints load as they are.

use std::{
    collections::BTreeMap,
    fmt::{Display, Write},
};

use crate::{
    Result,
    config::{BlockKind, Config, MlpKind, NormKind, Pool, PoolSizes, RelPosBias, RopeKind},
};

/// Every parameter of an architecture: name → shape. No memory is allocated for the tensors.
///
/// # Errors
/// A configuration that [`Config::validate`] refuses.
pub fn parameters(config: &Config) -> Result<BTreeMap<String, Vec<usize>>> {
    let tensors = layers(config)?.into_iter().flat_map(|layer| layer.parameters);
    Ok(tensors.map(|parameter| (parameter.name, parameter.shape)).collect())
}

/// Every layer of an architecture that has parameters, in the order in which they run.
///
/// # Errors
/// A configuration that [`Config::validate`] refuses.
pub fn layers(config: &Config) -> Result<Vec<Layer>> {
    config.validate()?;
    let mut to = Builder::new(config);
    Network::describe(config, &mut to);
    Ok(to.layers)
}

/// A layer and its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Layer {
    /// timm's path, such as `blocks.0.attn.qkv`.
    pub name: String,
    /// What it computes.
    pub kind: LayerKind,
    /// Its tensors.
    pub parameters: Vec<Parameter>,
}

/// What a layer computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LayerKind {
    /// `x Wᵀ + b`, `weight` is `[outputs, inputs]`.
    Linear,
    /// A convolution whose stride is its kernel, `weight` is `[outputs, channels, height, width]`.
    Conv2d,
    /// LayerNorm with `weight` and `bias`.
    LayerNorm,
    /// RMSNorm with `weight`.
    RmsNorm,
    /// A factor `gamma` per channel (arXiv 2103.17239).
    LayerScale,
    /// A single tensor that belongs to the enclosing module: a token, the position embedding, a λ, a query.
    Parameter,
}

/// A tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parameter {
    /// timm's name, such as `blocks.0.attn.qkv.weight`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// `x Wᵀ + b`: `[inputs] → [outputs]`.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    pub name: String,
    pub inputs: usize,
    pub outputs: usize,
    pub bias: bool,
}

/// A norm over the last `width` channels.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    pub name: String,
    pub width: usize,
    pub kind: NormKind,
    pub eps: f64,
}

/// The patch embedding: a linear layer over the pixels of a patch.
#[derive(Clone, Debug)]
pub(crate) struct PatchEmbed {
    pub proj: Linear,
    /// The stored shape of its weight, `[outputs, channels, height, width]`.
    pub kernel: [usize; 4],
    pub norm: Option<Norm>,
}

/// The projections to q, k and v.
#[derive(Clone, Debug)]
pub(crate) enum Qkv {
    /// One layer, with a bias for all or none.
    Joint(Linear),
    /// One layer with biases for q and v, which are parameters of the attention.
    NoKeyBias { weight: Linear, q_bias: Parameter, v_bias: Parameter },
    /// A layer for each.
    Split([Linear; 3]),
}

/// Multi-head self-attention.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pub qkv: Qkv,
    /// Heads of k and v.
    pub kv_heads: usize,
    /// The table of biases by relative position, `[distances, H]`.
    pub rel_pos_bias: Option<Parameter>,
    pub qk_norm: Option<[Norm; 2]>,
    pub diff: Option<Differential>,
    pub norm: Option<Norm>,
    pub proj: Linear,
}

/// What differential attention learns beside its projections (arXiv 2410.05258).
#[derive(Clone, Debug)]
pub(crate) struct Differential {
    /// λq1, λk1, λq2, λk2.
    pub lambdas: [Parameter; 4],
    pub sub_norm: Norm,
}

/// The first projection of an MLP.
#[derive(Clone, Debug)]
pub(crate) enum MlpInput {
    /// `act(fc1(x))`
    Plain(Linear),
    /// `act(gate(x)) · value(x)`
    Split { gate: Linear, value: Linear },
    /// `act(a) · b` with `[a, b] = fc1(x)`
    Packed(Linear),
}

/// The multilayer perceptron of a block.
#[derive(Clone, Debug)]
pub(crate) struct Mlp {
    pub fc1: MlpInput,
    pub norm: Option<Norm>,
    pub fc2: Linear,
}

/// One block, wired as its kind says.
// a model has at most 1024 of them, so that boxes would save nothing
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
pub(crate) enum Block {
    Standard(StandardBlock),
    ResPost(ResPostBlock),
    ParallelScaling(ParallelScalingBlock),
    ParallelThings(ParallelThingsBlock),
    DiffParallelScaling(DiffParallelScalingBlock),
}

/// `x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`.
#[derive(Clone, Debug)]
pub(crate) struct StandardBlock {
    pub norm1: Norm,
    pub attn: Attention,
    pub ls1: Option<Parameter>,
    pub norm2: Norm,
    pub mlp: Mlp,
    pub ls2: Option<Parameter>,
}

/// `x + norm1(attn(x))`, then `x + norm2(mlp(x))`.
#[derive(Clone, Debug)]
pub(crate) struct ResPostBlock {
    pub attn: Attention,
    pub norm1: Norm,
    pub mlp: Mlp,
    pub norm2: Norm,
}

/// The norm and the projection that attention and MLP share in a parallel block.
#[derive(Clone, Debug)]
pub(crate) struct ParallelInput {
    /// Without a bias in `in_proj`, the MLP's half still has one.
    pub mlp_bias: Option<Parameter>,
    pub in_norm: Norm,
    pub in_proj: Linear,
    pub qk_norm: Option<[Norm; 2]>,
}

/// `x + ls(attention(x) + mlp(x))`.
#[derive(Clone, Debug)]
pub(crate) struct ParallelScalingBlock {
    pub input: ParallelInput,
    pub attn_out_proj: Linear,
    pub mlp_out_proj: Linear,
    pub ls: Option<Parameter>,
}

/// `ParallelScalingBlock` with differential attention.
#[derive(Clone, Debug)]
pub(crate) struct DiffParallelScalingBlock {
    pub input: ParallelInput,
    pub diff: Differential,
    pub out_proj: Linear,
    pub ls: Option<Parameter>,
}

/// `ls(f(norm(x)))`, one of two residual branches that run side by side.
#[derive(Clone, Debug)]
pub(crate) struct Branch<F> {
    pub norm: Norm,
    pub f: F,
    pub ls: Option<Parameter>,
}

/// Two attentions side by side, then two MLPs side by side.
#[derive(Clone, Debug)]
pub(crate) struct ParallelThingsBlock {
    pub attns: [Branch<Attention>; 2],
    pub ffns: [Branch<Mlp>; 2],
}

/// Attention pooling with a learned query (arXiv 2106.04560).
#[derive(Clone, Debug)]
pub(crate) struct AttentionPool {
    pub latent: Parameter,
    pub q: Linear,
    pub kv: Linear,
    pub proj: Linear,
    pub norm: Norm,
    pub mlp: Mlp,
    pub num_heads: usize,
}

/// The linear layers that read the pooled vector: the head, and DeiT's head on the distillation token.
#[derive(Clone, Debug)]
pub(crate) struct Heads {
    pub head: Option<Linear>,
    pub head_dist: Option<Linear>,
}

/// The whole network.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    pub cls_token: Option<Parameter>,
    pub dist_token: Option<Parameter>,
    pub reg_token: Option<Parameter>,
    pub pos_embed: Option<Parameter>,
    /// The learned frequencies of rotary positions, `[2, depth, H, d/2]`.
    pub rope_freqs: Option<Parameter>,
    /// The table of biases by relative position that all blocks share, `[distances, H]`.
    pub rel_pos_bias: Option<Parameter>,
    pub patch_embed: PatchEmbed,
    pub norm_pre: Option<Norm>,
    pub blocks: Vec<Block>,
    pub norm: Option<Norm>,
    pub attn_pool: Option<AttentionPool>,
    pub fc_norm: Option<Norm>,
    pub pre_logits: Option<Linear>,
    pub heads: Heads,
}

impl Network {
    /// The layers of a configuration that [`Config::validate`] accepts, which also bounds every size below.
    pub(crate) fn of(config: &Config) -> Self {
        Self::describe(config, &mut Builder::new(config))
    }

    fn describe(config: &Config, to: &mut Builder<'_>) -> Self {
        let dim = config.embed_dim;
        Self {
            cls_token: to.token(usize::from(config.class_token), "cls_token"),
            dist_token: to.token(usize::from(config.dist_token), "dist_token"),
            reg_token: to.token(config.reg_tokens, "reg_token"),
            pos_embed: to.token(if config.pos_embed { config.pos_embed_len() } else { 0 }, "pos_embed"),
            rope_freqs: config
                .rope
                .is_some_and(|rope| rope.kind == RopeKind::Mixed)
                .then(|| to.parameter("rope.freqs", &[2, config.depth, config.num_heads, config.head_dim() / 2])),
            rel_pos_bias: (config.rel_pos_bias == RelPosBias::Shared)
                .then(|| to.inside("rel_pos_bias", Builder::rel_pos_bias)),
            patch_embed: to.inside("patch_embed", PatchEmbed::describe),
            norm_pre: to.norm_if(config.pre_norm, "norm_pre", dim),
            blocks: (0..config.depth).map(|index| Block::describe(config, index, to)).collect(),
            norm: to.norm_if(config.final_norm && !config.fc_norm, "norm", dim),
            attn_pool: (config.global_pool == Pool::Map).then(|| to.inside("attn_pool", AttentionPool::describe)),
            fc_norm: to.norm_if(config.final_norm && config.fc_norm, "fc_norm", config.pooled_dim()),
            pre_logits: config
                .pre_logits
                .as_ref()
                .map(|pre| to.linear("pre_logits.fc", config.pooled_dim(), pre.size, true)),
            heads: Heads::describe(config, to),
        }
    }
}

impl Heads {
    /// The heads alone, for a model that gets others.
    pub(crate) fn of(config: &Config) -> Self {
        Self::describe(config, &mut Builder::new(config))
    }

    fn describe(config: &Config, to: &mut Builder<'_>) -> Self {
        let width = config.pre_logits.as_ref().map_or(config.pooled_dim(), |pre| pre.size);
        let mut head = |there: bool, name| {
            (there && config.num_classes > 0).then(|| to.linear(name, width, config.num_classes, config.head_bias))
        };
        Self { head: head(true, "head"), head_dist: head(config.dist_token, "head_dist") }
    }
}

impl PatchEmbed {
    fn describe(to: &mut Builder<'_>) -> Self {
        let Config { embed_dim, in_chans, patch_size: [height, width], patch_bias, patch_norm, .. } = *to.config;
        let kernel = [embed_dim, in_chans, height, width];
        let proj =
            Linear { name: to.path("proj"), inputs: in_chans * height * width, outputs: embed_dim, bias: patch_bias };
        to.add("proj", LayerKind::Conv2d, [("weight", &kernel[..])], patch_bias.then_some(embed_dim));
        Self { proj, kernel, norm: to.norm_if(patch_norm, "norm", embed_dim) }
    }
}

impl Block {
    /// The layers of one block.
    pub(crate) fn of(config: &Config, index: usize) -> Self {
        Self::describe(config, index, &mut Builder::new(config))
    }

    fn describe(config: &Config, index: usize, to: &mut Builder<'_>) -> Self {
        to.inside(format_args!("blocks.{index}"), |to| match config.block {
            BlockKind::Standard => Self::Standard(StandardBlock::describe(index, to)),
            BlockKind::ResPost => Self::ResPost(ResPostBlock::describe(index, to)),
            BlockKind::ParallelScaling => Self::ParallelScaling(ParallelScalingBlock::describe(to)),
            BlockKind::ParallelThings => Self::ParallelThings(ParallelThingsBlock::describe(index, to)),
            BlockKind::DiffParallelScaling => Self::DiffParallelScaling(DiffParallelScalingBlock::describe(to)),
        })
    }
}

impl StandardBlock {
    fn describe(index: usize, to: &mut Builder<'_>) -> Self {
        let dim = to.config.embed_dim;
        let [first, second] = if to.config.block_gammas { ["gamma_1", "gamma_2"] } else { ["ls1", "ls2"] };
        Self {
            norm1: to.norm("norm1", dim),
            attn: to.inside("attn", |to| Attention::describe(index, to)),
            ls1: to.layer_scale(first),
            norm2: to.norm("norm2", dim),
            mlp: to.inside("mlp", Mlp::describe),
            ls2: if to.config.attn_only_scale { None } else { to.layer_scale(second) },
        }
    }
}

impl ResPostBlock {
    fn describe(index: usize, to: &mut Builder<'_>) -> Self {
        let dim = to.config.embed_dim;
        Self {
            attn: to.inside("attn", |to| Attention::describe(index, to)),
            norm1: to.norm("norm1", dim),
            mlp: to.inside("mlp", Mlp::describe),
            norm2: to.norm("norm2", dim),
        }
    }
}

impl ParallelInput {
    fn describe(to: &mut Builder<'_>, head_dim: usize) -> Self {
        let Config { embed_dim, mlp_hidden, qkv_bias, .. } = *to.config;
        Self {
            mlp_bias: (!qkv_bias).then(|| to.parameter("mlp_bias", &[mlp_hidden])),
            in_norm: to.norm("in_norm", embed_dim),
            in_proj: to.linear("in_proj", embed_dim, mlp_hidden + 3 * embed_dim, qkv_bias),
            qk_norm: to.qk_norm(head_dim),
        }
    }
}

impl ParallelScalingBlock {
    fn describe(to: &mut Builder<'_>) -> Self {
        let Config { embed_dim, mlp_hidden, proj_bias, .. } = *to.config;
        Self {
            input: ParallelInput::describe(to, to.config.head_dim()),
            attn_out_proj: to.linear("attn_out_proj", embed_dim, embed_dim, proj_bias),
            mlp_out_proj: to.linear("mlp_out_proj", mlp_hidden, embed_dim, proj_bias),
            ls: to.layer_scale("ls"),
        }
    }
}

impl DiffParallelScalingBlock {
    fn describe(to: &mut Builder<'_>) -> Self {
        let Config { embed_dim, mlp_hidden, proj_bias, .. } = *to.config;
        let lambdas = to.lambdas();
        Self {
            input: ParallelInput::describe(to, to.config.head_dim() / 2),
            diff: Differential { lambdas, sub_norm: to.sub_norm() },
            out_proj: to.linear("out_proj", embed_dim + mlp_hidden, embed_dim, proj_bias),
            ls: to.layer_scale("ls"),
        }
    }
}

impl ParallelThingsBlock {
    fn describe(index: usize, to: &mut Builder<'_>) -> Self {
        let attn = |to: &mut Builder<'_>| Branch::describe(to, "attn", |to| Attention::describe(index, to));
        Self {
            attns: [0, 1].map(|i| to.inside(format_args!("attns.{i}"), attn)),
            ffns: [0, 1].map(|i| to.inside(format_args!("ffns.{i}"), |to| Branch::describe(to, "mlp", Mlp::describe))),
        }
    }
}

impl<F> Branch<F> {
    fn describe(to: &mut Builder<'_>, name: &str, f: impl FnOnce(&mut Builder<'_>) -> F) -> Self {
        Self { norm: to.norm("norm", to.config.embed_dim), f: to.inside(name, f), ls: to.layer_scale("ls") }
    }
}

impl Attention {
    fn describe(index: usize, to: &mut Builder<'_>) -> Self {
        let Config { embed_dim: dim, proj_bias, diff_attn, scale_attn_norm, .. } = *to.config;
        let head_dim = to.config.head_dim();
        let lambdas = diff_attn.then(|| to.lambdas());
        Self {
            qkv: Qkv::describe(index, to),
            kv_heads: to.config.num_kv_heads(index),
            rel_pos_bias: (to.config.rel_pos_bias == RelPosBias::Blocks).then(|| to.rel_pos_bias()),
            qk_norm: to.qk_norm(if diff_attn { head_dim / 2 } else { head_dim }),
            diff: lambdas.map(|lambdas| Differential { lambdas, sub_norm: to.sub_norm() }),
            norm: to.norm_if(scale_attn_norm, "norm", dim),
            proj: to.linear("proj", dim, dim, proj_bias),
        }
    }
}

impl Qkv {
    fn describe(index: usize, to: &mut Builder<'_>) -> Self {
        let Config { embed_dim: dim, qkv_bias, split_qkv, no_k_bias, .. } = *to.config;
        if split_qkv {
            let kv = to.config.num_kv_heads(index) * to.config.head_dim();
            return Self::Split([
                to.linear("q_proj", dim, dim, qkv_bias),
                to.linear("k_proj", dim, kv, qkv_bias && !no_k_bias),
                to.linear("v_proj", dim, kv, qkv_bias),
            ]);
        }
        let weight = to.linear("qkv", dim, 3 * dim, qkv_bias && !no_k_bias);
        if qkv_bias && no_k_bias {
            let [q_bias, v_bias] = ["q_bias", "v_bias"].map(|name| to.parameter(name, &[dim]));
            Self::NoKeyBias { weight, q_bias, v_bias }
        } else {
            Self::Joint(weight)
        }
    }
}

impl Mlp {
    fn describe(to: &mut Builder<'_>) -> Self {
        let config = to.config;
        let (dim, rows, bias) = (config.embed_dim, config.mlp_hidden, config.proj_bias);
        let mut fc1 = |name| to.linear(name, dim, rows, bias);
        let (hidden, fc1) = match config.mlp {
            MlpKind::Mlp => (rows, MlpInput::Plain(fc1("fc1"))),
            MlpKind::Swiglu => (rows, MlpInput::Split { gate: fc1("fc1_g"), value: fc1("fc1_x") }),
            MlpKind::SwigluPacked => (rows / 2, MlpInput::Packed(fc1("fc1"))),
        };
        let norm = to.norm_if(config.scale_mlp_norm, "norm", hidden);
        Self { fc1, norm, fc2: to.linear("fc2", hidden, dim, bias) }
    }
}

impl AttentionPool {
    /// Whatever the blocks have, the pooling has a plain MLP and all biases.
    fn describe(to: &mut Builder<'_>) -> Self {
        let dim = to.config.embed_dim;
        let PoolSizes { num_heads, mlp_hidden: hidden } = to.config.pool_sizes();
        Self {
            latent: to.parameter("latent", &[1, 1, dim]),
            q: to.linear("q", dim, dim, true),
            kv: to.linear("kv", dim, 2 * dim, true),
            proj: to.linear("proj", dim, dim, true),
            norm: to.norm("norm", dim),
            mlp: to.inside("mlp", |to| Mlp {
                fc1: MlpInput::Plain(to.linear("fc1", dim, hidden, true)),
                norm: None,
                fc2: to.linear("fc2", hidden, dim, true),
            }),
            num_heads,
        }
    }
}

/// Makes the parts of a [`Network`] and lists them as they are made.
struct Builder<'a> {
    config: &'a Config,
    /// The path of the module that is being described, with a dot at its end.
    prefix: String,
    layers: Vec<Layer>,
}

impl<'a> Builder<'a> {
    fn new(config: &'a Config) -> Self {
        Self { config, prefix: String::new(), layers: Vec::new() }
    }

    /// Describes a module whose layers' names begin with its own.
    fn inside<T>(&mut self, name: impl Display, describe: impl FnOnce(&mut Self) -> T) -> T {
        let length = self.prefix.len();
        // writing to a String cannot fail
        let _ = write!(self.prefix, "{name}.");
        let described = describe(self);
        self.prefix.truncate(length);
        described
    }

    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn add<'p>(
        &mut self,
        name: &str,
        kind: LayerKind,
        tensors: impl IntoIterator<Item = (&'p str, &'p [usize])>,
        bias: Option<usize>,
    ) {
        let name = self.path(name);
        let parameter =
            |(end, shape): (&str, &[usize])| Parameter { name: format!("{name}.{end}"), shape: shape.into() };
        let mut parameters: Vec<_> = tensors.into_iter().map(parameter).collect();
        parameters.extend(bias.map(|width| parameter(("bias", &[width]))));
        self.layers.push(Layer { name, kind, parameters });
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize, bias: bool) -> Linear {
        self.add(name, LayerKind::Linear, [("weight", &[outputs, inputs][..])], bias.then_some(outputs));
        Linear { name: self.path(name), inputs, outputs, bias }
    }

    fn norm_of(&mut self, name: &str, width: usize, kind: NormKind, eps: f64) -> Norm {
        let (layer, bias) = match kind {
            NormKind::LayerNorm => (LayerKind::LayerNorm, Some(width)),
            NormKind::RmsNorm => (LayerKind::RmsNorm, None),
        };
        self.add(name, layer, [("weight", &[width][..])], bias);
        Norm { name: self.path(name), width, kind, eps }
    }

    /// A norm of the model's kind.
    fn norm(&mut self, name: &str, width: usize) -> Norm {
        self.norm_of(name, width, self.config.norm, self.config.ln_eps)
    }

    fn norm_if(&mut self, there: bool, name: &str, width: usize) -> Option<Norm> {
        there.then(|| self.norm(name, width))
    }

    /// The norms of q and k, each over the width of a head.
    fn qk_norm(&mut self, head_dim: usize) -> Option<[Norm; 2]> {
        self.config.qk_norm.then(|| ["q_norm", "k_norm"].map(|name| self.norm(name, head_dim)))
    }

    fn lambdas(&mut self) -> [Parameter; 4] {
        let half = self.config.head_dim() / 2;
        ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"].map(|name| self.parameter(name, &[half]))
    }

    /// The norm of differential attention: RMSNorm with ε 1e-5 in every model, over both halves of a head.
    fn sub_norm(&mut self) -> Norm {
        self.norm_of("sub_norm", 2 * (self.config.head_dim() / 2), NormKind::RmsNorm, 1e-5)
    }

    /// A factor per channel: `gamma` of the module `name`, or the block's own parameter `name`.
    fn layer_scale(&mut self, name: &str) -> Option<Parameter> {
        let width = self.config.embed_dim;
        self.config.layer_scale.then(|| {
            if self.config.block_gammas {
                let parameter = Parameter { name: self.path(name), shape: vec![width] };
                let (name, parameters) = (parameter.name.clone(), vec![parameter.clone()]);
                self.layers.push(Layer { name, kind: LayerKind::LayerScale, parameters });
                return parameter;
            }
            self.add(name, LayerKind::LayerScale, [("gamma", &[width][..])], None);
            Parameter { name: self.path(name) + ".gamma", shape: vec![width] }
        })
    }

    /// A table of biases by relative position.
    fn rel_pos_bias(&mut self) -> Parameter {
        self.parameter("relative_position_bias_table", &[self.config.rel_pos_len(), self.config.num_heads])
    }

    fn parameter(&mut self, name: &str, shape: &[usize]) -> Parameter {
        let parameter = Parameter { name: self.path(name), shape: shape.into() };
        let layer =
            Layer { name: parameter.name.clone(), kind: LayerKind::Parameter, parameters: vec![parameter.clone()] };
        self.layers.push(layer);
        parameter
    }

    /// Learned tokens `[1, count, embed_dim]`, unless there are none.
    fn token(&mut self, count: usize, name: &str) -> Option<Parameter> {
        let shape = [1, count, self.config.embed_dim];
        (count > 0).then(|| self.parameter(name, &shape))
    }
}
