//! The whole model, top to bottom: parts, blocks, `VisionTransformer`. No device in it: tensors live where the
//! `VarBuilder` puts them.
//!
//! Shapes: `B` images of `C` channels, `N` tokens of width `D`, `H` heads of width `d = D / H`. Heads stand before images,
//! so that tokens become heads and heads tokens by moving one dimension. Parameter names are timm's
//! (`timm/models/vision_transformer.py`), so that its checkpoints load as they are.

// a `VarBuilder` is a path that is handed down by value, as in all of candle
#![allow(clippy::needless_pass_by_value)]

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{D, DType, IndexOp, Module, Result as CandleResult, Tensor};
use candle_nn::{Init, VarBuilder, ops};

use crate::gguf::{BLOCK, BLOCK_BYTES};
use crate::pos_embed::{self, Resample};
use crate::tap::Tap;
use crate::{Activation, BlockKind, Config, Error, MlpKind, NormKind, Pool, Result};

/// Initial values of a model that is trained from scratch; a checkpoint's values replace them.
const WEIGHT: Init = Init::Randn { mean: 0.0, stdev: 0.02 };
const TOKEN: Init = Init::Randn { mean: 0.0, stdev: 1e-6 };
const LAYER_SCALE: Init = Init::Const(1e-5);

/// What follows the name of a linear's weights, where a `VarBuilder` has them in blocks of Q8_0: `blocks.0.attn.proj.weight.q8_0`.
pub(crate) const Q8_0: &str = ".q8_0";

/// `x Wᵀ + b`
#[derive(Clone, Debug)]
enum Linear {
    /// While training, and where there is no bias.
    Plain(Tensor, Option<Tensor>),
    /// `[x 1] [W b]ᵀ`: the bias is a column of the weights, followed by zeros to a multiple of eight. To add it to a product
    /// takes candle's GPU kernels longer than the product itself.
    Joined(Tensor),
    /// W in blocks of Q8_0, x rounded to such blocks row by row: no gradient.
    Quantised(QMatMul, Option<Tensor>),
}

impl Linear {
    fn new(weight: Tensor, bias: Option<Tensor>) -> CandleResult<Self> {
        match bias {
            // one number spread to a shape holds no memory, and shall not (`load::parameters`)
            Some(bias) if !weight.track_op() && !bias.track_op() && weight.is_contiguous() => {
                let columns = 8 - weight.dim(1)? % 8;
                let bias = bias.unsqueeze(1)?.pad_with_zeros(1, 0, columns - 1)?;
                Ok(Self::Joined(Tensor::cat(&[weight, bias], 1)?))
            }
            bias => Ok(Self::Plain(weight, bias)),
        }
    }

    /// `[…, K] → […, O]`
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let rows = x.flatten_to(D::Minus2)?; // [R, K]
        let y = match self {
            Self::Plain(weight, None) => rows.matmul(&weight.t()?)?,
            Self::Plain(weight, Some(bias)) => rows.matmul(&weight.t()?)?.broadcast_add(bias)?,
            Self::Joined(weight) => {
                let (r, k) = rows.dims2()?;
                let ones = Tensor::ones((r, weight.dim(1)?.saturating_sub(k)), rows.dtype(), rows.device())?;
                Tensor::cat(&[&rows, &ones], 1)?.matmul(&weight.t()?)?
            }
            Self::Quantised(weight, bias) => {
                let y = weight.forward(&rows.to_dtype(DType::F32)?.contiguous()?)?.to_dtype(x.dtype())?;
                if let Some(bias) = bias { y.broadcast_add(bias)? } else { y }
            }
        };
        y.reshape([&x.dims()[..x.rank() - 1], &y.dims()[1..]].concat()) // [R, O]
    }
}

fn linear(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder<'_>) -> CandleResult<Linear> {
    let bias = if bias { Some(vb.get_with_hints(out_dim, "bias", Init::Const(0.0))?) } else { None };
    let blocks = format!("weight{Q8_0}");
    // some backends say that they have everything
    if vb.contains_tensor(&blocks)
        && let Ok(blocks) = vb.get_unchecked_dtype(&blocks, DType::U8)
    {
        if !in_dim.is_multiple_of(BLOCK) || blocks.dims() != [out_dim, in_dim / BLOCK * BLOCK_BYTES] {
            candle_core::bail!(
                "{}: {:?} bytes of blocks for a weight of [{out_dim}, {in_dim}]",
                vb.prefix(),
                blocks.dims()
            );
        }
        let storage = QStorage::from_data(blocks.flatten_all()?.to_vec1()?.into(), vb.device(), GgmlDType::Q8_0)?;
        return Ok(Linear::Quantised(QMatMul::from_qtensor(QTensor::new(storage, (out_dim, in_dim))?)?, bias));
    }
    Linear::new(vb.get_with_hints((out_dim, in_dim), "weight", WEIGHT)?, bias)
}

/// Softmax over the last dimension. Candle's fused kernel has no gradient: while training, the plain formula.
fn softmax(x: &Tensor) -> CandleResult<Tensor> {
    if x.track_op() { ops::softmax(x, D::Minus1) } else { ops::softmax_last_dim(&x.contiguous()?) }
}

/// LayerNorm, or RMSNorm where there is no bias.
#[derive(Clone, Debug)]
struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f32,
}

impl Norm {
    fn new(dim: usize, kind: NormKind, eps: f64, vb: VarBuilder<'_>) -> CandleResult<Self> {
        let weight = vb.get_with_hints(dim, "weight", Init::Const(1.0))?;
        let bias = match kind {
            NormKind::LayerNorm => Some(vb.get_with_hints(dim, "bias", Init::Const(0.0))?),
            NormKind::RmsNorm => None,
        };
        Ok(Self { weight, bias, eps: eps as f32 })
    }

    fn of(config: &Config, dim: usize, vb: VarBuilder<'_>) -> CandleResult<Self> {
        Self::new(dim, config.norm, config.ln_eps, vb)
    }

    /// Candle's fused kernels have no gradient, and not all of them f64: there, the plain formulas.
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let plain = x.track_op() || self.weight.track_op() || x.dtype() == DType::F64;
        match (&self.bias, plain) {
            (Some(bias), false) => ops::layer_norm(&x.contiguous()?, &self.weight, bias, self.eps),
            (Some(bias), true) => ops::layer_norm_slow(x, &self.weight, bias, self.eps),
            (None, false) => ops::rms_norm(&x.contiguous()?, &self.weight, self.eps),
            (None, true) => ops::rms_norm_slow(x, &self.weight, self.eps),
        }
    }
}

/// `norm(x)`, or `x` where the model has no such norm.
fn norm_if_any(norm: Option<&Norm>, x: Tensor) -> CandleResult<Tensor> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}

/// A learned factor per channel on a residual branch (arXiv 2103.17239).
#[derive(Clone, Debug)]
struct LayerScale {
    gamma: Tensor,
}

impl LayerScale {
    fn of(config: &Config, vb: VarBuilder<'_>) -> CandleResult<Option<Self>> {
        let new = || CandleResult::Ok(Self { gamma: vb.get_with_hints(config.embed_dim, "gamma", LAYER_SCALE)? });
        config.layer_scale.then(new).transpose()
    }
}

fn scale_if_any(scale: Option<&LayerScale>, x: Tensor) -> CandleResult<Tensor> {
    match scale {
        Some(scale) => x.flatten_to(D::Minus2)?.broadcast_mul(&scale.gamma)?.reshape(x.shape()),
        None => Ok(x),
    }
}

impl Activation {
    fn forward(self, x: &Tensor) -> CandleResult<Tensor> {
        match self {
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
            Self::QuickGelu => x * ops::sigmoid(&(x * 1.702)?)?,
            Self::Relu => x.relu(),
            Self::Silu => x.silu(),
        }
    }
}

/// Cuts the image into patches and projects each to a token: a convolution whose stride is its kernel, as a product.
#[derive(Clone, Debug)]
struct PatchEmbed {
    proj: Linear,
    norm: Option<Norm>,
    patch_size: [usize; 2],
}

impl PatchEmbed {
    fn new(config: &Config, vb: VarBuilder<'_>) -> CandleResult<Self> {
        let (dim, [ph, pw]) = (config.embed_dim, config.patch_size);
        let weight = vb.pp("proj").get_with_hints((dim, config.in_chans, ph, pw), "weight", WEIGHT)?;
        let bias =
            if config.patch_bias { Some(vb.pp("proj").get_with_hints(dim, "bias", Init::Const(0.0))?) } else { None };
        let norm = config.patch_norm.then(|| Norm::of(config, dim, vb.pp("norm"))).transpose()?;
        let proj = Linear::new(weight.reshape((dim, config.in_chans * ph * pw))?, bias)?;
        Ok(Self { proj, norm, patch_size: config.patch_size })
    }

    /// `[B, C, h, w] → [B, N, D]`; pixels right of and below the last whole patch are not read.
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let [ph, pw] = self.patch_size;
        let (rows, columns) = (h / ph, w / pw);
        let x = x.narrow(2, 0, rows * ph)?.narrow(3, 0, columns * pw)?;
        let x = x.reshape((b, c, rows, ph, columns, pw))?.permute((0, 2, 4, 1, 3, 5))?; // [B, rows, columns, C, ph, pw]
        let x = x.reshape((b, rows * columns, c * ph * pw))?; // [B, N, C·ph·pw]
        norm_if_any(self.norm.as_ref(), self.proj.forward(&x)?) // [B, N, D]
    }
}

/// `[B, N, H·d] → [H, B, N, d]`, contiguous.
fn split_heads(x: &Tensor, heads: usize) -> CandleResult<Tensor> {
    let (b, n, _) = x.dims3()?;
    x.reshape((b * n, heads, ()))?.transpose(0, 1)?.contiguous()?.reshape((heads, b, n, ()))
}

/// `[H, B, N, d] → [B, N, H·d]`, contiguous.
fn merge_heads(x: &Tensor) -> CandleResult<Tensor> {
    let (h, b, n, d) = x.dims4()?;
    x.reshape((h, b * n, d))?.transpose(0, 1)?.reshape((b, n, h * d))
}

/// `softmax(q kᵀ / √d)`: `[H, B, M, d]`, `[H, B, N, d]` → `[H, B, M, N]`.
fn attention_probabilities(q: &Tensor, k: &Tensor) -> CandleResult<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    softmax(&(q * scale)?.matmul(&k.t()?)?)
}

/// The norms on q and k, each over the width of a head.
#[derive(Clone, Debug)]
struct QkNorm {
    q: Norm,
    k: Norm,
}

impl QkNorm {
    fn of(config: &Config, head_dim: usize, vb: &VarBuilder<'_>) -> CandleResult<Option<Self>> {
        let norm = |name| Norm::of(config, head_dim, vb.pp(name));
        config.qk_norm.then(|| CandleResult::Ok(Self { q: norm("q_norm")?, k: norm("k_norm")? })).transpose()
    }

    fn apply(this: Option<&Self>, q: Tensor, k: Tensor) -> CandleResult<(Tensor, Tensor)> {
        match this {
            Some(norm) => Ok((norm.q.forward(&q)?, norm.k.forward(&k)?)),
            None => Ok((q, k)),
        }
    }
}

/// Differential attention: each head subtracts a second attention, times a learned λ (arXiv 2410.05258).
#[derive(Clone, Debug)]
struct Differential {
    lambda_q1: Tensor,
    lambda_k1: Tensor,
    lambda_q2: Tensor,
    lambda_k2: Tensor,
    lambda_init: f64,
    sub_norm: Norm,
    num_heads: usize,
}

impl Differential {
    /// The part of block `index`: λ begins larger in deeper blocks.
    fn new(config: &Config, index: usize, vb: &VarBuilder<'_>) -> CandleResult<Self> {
        let half = config.head_dim() / 2;
        let lambda = |name| vb.get_with_hints(half, name, Init::Randn { mean: 0.0, stdev: 0.1 });
        Ok(Self {
            lambda_q1: lambda("lambda_q1")?,
            lambda_k1: lambda("lambda_k1")?,
            lambda_q2: lambda("lambda_q2")?,
            lambda_k2: lambda("lambda_k2")?,
            lambda_init: 0.8 - 0.6 * (-0.3 * index as f64).exp(),
            sub_norm: Norm::new(2 * half, NormKind::RmsNorm, 1e-5, vb.pp("sub_norm"))?,
            num_heads: config.num_heads,
        })
    }

    /// `exp(λq1·λk1) − exp(λq2·λk2) + λ_init`: `[1]`.
    fn lambda(&self) -> CandleResult<Tensor> {
        let dot = |q: &Tensor, k: &Tensor| (q * k)?.sum_keepdim(0)?.exp();
        (dot(&self.lambda_q1, &self.lambda_k1)? - dot(&self.lambda_q2, &self.lambda_k2)?)? + self.lambda_init
    }

    /// q, k `[2 H, B, N, d/2]`, v `[H, B, N, d]` → `[B, N, D]`.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, tap: &mut dyn Tap) -> CandleResult<Tensor> {
        let both = attention_probabilities(q, k)?; // [2 H, B, N, N]: a head's two attentions follow each other
        let (_, b, n, _) = both.dims4()?;
        let both = both.reshape((self.num_heads, 2, b, n, n))?;
        let difference = (both.i((.., 0))? - both.i((.., 1))?.broadcast_mul(&self.lambda()?)?)?; // [H, B, N, N]
        tap.attention(&difference.transpose(0, 1)?)?;
        let attended = self.sub_norm.forward(&difference.matmul(v)?)?; // [H, B, N, d]
        merge_heads(&(attended * (1.0 - self.lambda_init))?)
    }
}

/// Multi-head self-attention with q, k and v in one projection.
#[derive(Clone, Debug)]
struct Attention {
    qkv: Linear,
    qk_norm: Option<QkNorm>,
    diff: Option<Differential>,
    norm: Option<Norm>,
    proj: Linear,
    num_heads: usize,
}

impl Attention {
    fn new(config: &Config, index: usize, vb: VarBuilder<'_>) -> CandleResult<Self> {
        let dim = config.embed_dim;
        let qk_dim = if config.diff_attn { config.head_dim() / 2 } else { config.head_dim() };
        Ok(Self {
            qkv: linear(dim, 3 * dim, config.qkv_bias, vb.pp("qkv"))?,
            qk_norm: QkNorm::of(config, qk_dim, &vb)?,
            diff: config.diff_attn.then(|| Differential::new(config, index, &vb)).transpose()?,
            norm: config.scale_attn_norm.then(|| Norm::of(config, dim, vb.pp("norm"))).transpose()?,
            proj: linear(dim, dim, config.proj_bias, vb.pp("proj"))?,
            num_heads: config.num_heads,
        })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor, tap: &mut dyn Tap) -> CandleResult<Tensor> {
        let h = self.num_heads;
        if let Some(diff) = &self.diff {
            let qkv = self.qkv.forward(x)?.chunk(3, D::Minus1)?; // [B, N, D] each
            let (q, k) = (split_heads(&qkv[0], 2 * h)?, split_heads(&qkv[1], 2 * h)?); // [2 H, B, N, d/2]
            let (q, k) = QkNorm::apply(self.qk_norm.as_ref(), q, k)?;
            let x = diff.attend(&q, &k, &split_heads(&qkv[2], h)?, tap)?; // [B, N, D]
            return self.proj.forward(&norm_if_any(self.norm.as_ref(), x)?);
        }
        let qkv = split_heads(&self.qkv.forward(x)?, 3 * h)?; // [3 H, B, N, d]
        let part = |i: usize| qkv.narrow(0, i * h, h); // [H, B, N, d]
        let (q, k) = QkNorm::apply(self.qk_norm.as_ref(), part(0)?, part(1)?)?;
        let probabilities = attention_probabilities(&q, &k)?; // [H, B, N, N]
        tap.attention(&probabilities.transpose(0, 1)?)?;
        let x = merge_heads(&probabilities.matmul(&part(2)?)?)?; // [B, N, D]
        self.proj.forward(&norm_if_any(self.norm.as_ref(), x)?)
    }
}

/// The first projection of an MLP, with its activation.
#[derive(Clone, Debug)]
enum Gate {
    /// `act(fc1(x))`
    None(Linear),
    /// `act(fc1_g(x)) · fc1_x(x)`
    Split(Linear, Linear),
    /// `act(a) · b` with `[a, b] = fc1(x)`
    Packed(Linear),
}

/// The perceptron of a block: out to a wider hidden layer and back.
#[derive(Clone, Debug)]
struct Mlp {
    fc1: Gate,
    act: Activation,
    norm: Option<Norm>,
    fc2: Linear,
}

impl Mlp {
    fn new(config: &Config, vb: VarBuilder<'_>) -> CandleResult<Self> {
        let (dim, rows, bias) = (config.embed_dim, config.mlp_hidden, config.proj_bias);
        let fc1 = |name| linear(dim, rows, bias, vb.pp(name));
        let (hidden, fc1) = match config.mlp {
            MlpKind::Mlp => (rows, Gate::None(fc1("fc1")?)),
            MlpKind::Swiglu => (rows, Gate::Split(fc1("fc1_g")?, fc1("fc1_x")?)),
            MlpKind::SwigluPacked => (rows / 2, Gate::Packed(fc1("fc1")?)),
        };
        let norm = config.scale_mlp_norm.then(|| Norm::of(config, hidden, vb.pp("norm"))).transpose()?;
        Ok(Self { fc1, act: config.act, norm, fc2: linear(hidden, dim, bias, vb.pp("fc2"))? })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let hidden = match &self.fc1 {
            Gate::None(fc1) => self.act.forward(&fc1.forward(x)?)?,
            Gate::Split(gate, value) => (self.act.forward(&gate.forward(x)?)? * value.forward(x)?)?,
            Gate::Packed(fc1) => {
                let both = fc1.forward(x)?.chunk(2, D::Minus1)?;
                (self.act.forward(&both[0])? * &both[1])?
            }
        };
        self.fc2.forward(&norm_if_any(self.norm.as_ref(), hidden)?)
    }
}

/// `x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`.
#[derive(Clone, Debug)]
struct StandardBlock {
    norm1: Norm,
    attn: Attention,
    ls1: Option<LayerScale>,
    norm2: Norm,
    mlp: Mlp,
    ls2: Option<LayerScale>,
}

impl StandardBlock {
    fn new(config: &Config, index: usize, vb: VarBuilder<'_>) -> CandleResult<Self> {
        Ok(Self {
            norm1: Norm::of(config, config.embed_dim, vb.pp("norm1"))?,
            attn: Attention::new(config, index, vb.pp("attn"))?,
            ls1: LayerScale::of(config, vb.pp("ls1"))?,
            norm2: Norm::of(config, config.embed_dim, vb.pp("norm2"))?,
            mlp: Mlp::new(config, vb.pp("mlp"))?,
            ls2: LayerScale::of(config, vb.pp("ls2"))?,
        })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor, tap: &mut dyn Tap) -> CandleResult<Tensor> {
        let attended = self.attn.forward(&self.norm1.forward(x)?, tap)?;
        let x = (x + scale_if_any(self.ls1.as_ref(), attended)?)?;
        let hidden = self.mlp.forward(&self.norm2.forward(&x)?)?;
        &x + scale_if_any(self.ls2.as_ref(), hidden)?
    }
}

/// `x + norm1(attn(x))`, then `x + norm2(mlp(x))`: norms at the end of the branches.
#[derive(Clone, Debug)]
struct ResPostBlock {
    attn: Attention,
    norm1: Norm,
    mlp: Mlp,
    norm2: Norm,
}

impl ResPostBlock {
    fn new(config: &Config, index: usize, vb: VarBuilder<'_>) -> CandleResult<Self> {
        Ok(Self {
            attn: Attention::new(config, index, vb.pp("attn"))?,
            norm1: Norm::of(config, config.embed_dim, vb.pp("norm1"))?,
            mlp: Mlp::new(config, vb.pp("mlp"))?,
            norm2: Norm::of(config, config.embed_dim, vb.pp("norm2"))?,
        })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor, tap: &mut dyn Tap) -> CandleResult<Tensor> {
        let x = (x + self.norm1.forward(&self.attn.forward(x, tap)?)?)?;
        &x + self.norm2.forward(&self.mlp.forward(&x)?)?
    }
}

/// What the two parallel blocks share: one norm and one projection, to the MLP's hidden layer and q, k, v.
#[derive(Clone, Debug)]
struct ParallelIn {
    in_norm: Norm,
    in_proj: Linear,
    mlp_bias: Option<Tensor>,
    qk_norm: Option<QkNorm>,
    act: Activation,
    sizes: [usize; 2],
}

impl ParallelIn {
    fn new(config: &Config, head_dim: usize, vb: &VarBuilder<'_>) -> CandleResult<Self> {
        let (dim, hidden) = (config.embed_dim, config.mlp_hidden);
        let mlp_bias =
            if config.qkv_bias { None } else { Some(vb.get_with_hints(hidden, "mlp_bias", Init::Const(0.0))?) };
        Ok(Self {
            in_norm: Norm::of(config, dim, vb.pp("in_norm"))?,
            in_proj: linear(dim, hidden + 3 * dim, config.qkv_bias, vb.pp("in_proj"))?,
            mlp_bias,
            qk_norm: QkNorm::of(config, head_dim, vb)?,
            act: config.act,
            sizes: [hidden, dim],
        })
    }

    /// `[B, N, D]` → the MLP's hidden layer `[B, N, hidden]`; q and k in `qk_heads`, v in `v_heads` heads.
    fn forward(&self, x: &Tensor, qk_heads: usize, v_heads: usize) -> CandleResult<(Tensor, [Tensor; 3])> {
        let [hidden, dim] = self.sizes;
        let y = self.in_proj.forward(&self.in_norm.forward(x)?)?; // [B, N, hidden + 3 D]
        let mlp = y.narrow(2, 0, hidden)?;
        let mlp = match &self.mlp_bias {
            Some(bias) => mlp.broadcast_add(bias)?,
            None => mlp,
        };
        let part = |i: usize, heads| split_heads(&y.narrow(2, hidden + i * dim, dim)?, heads);
        let (q, k) = QkNorm::apply(self.qk_norm.as_ref(), part(0, qk_heads)?, part(1, qk_heads)?)?;
        Ok((self.act.forward(&mlp)?, [q, k, part(2, v_heads)?]))
    }
}

/// `x + ls(attention(x) + mlp(x))`, both from one norm and projection.
#[derive(Clone, Debug)]
struct ParallelScalingBlock {
    input: ParallelIn,
    attn_out_proj: Linear,
    mlp_out_proj: Linear,
    ls: Option<LayerScale>,
    num_heads: usize,
}

impl ParallelScalingBlock {
    fn new(config: &Config, vb: VarBuilder<'_>) -> CandleResult<Self> {
        let (dim, hidden) = (config.embed_dim, config.mlp_hidden);
        Ok(Self {
            input: ParallelIn::new(config, config.head_dim(), &vb)?,
            attn_out_proj: linear(dim, dim, config.proj_bias, vb.pp("attn_out_proj"))?,
            mlp_out_proj: linear(hidden, dim, config.proj_bias, vb.pp("mlp_out_proj"))?,
            ls: LayerScale::of(config, vb.pp("ls"))?,
            num_heads: config.num_heads,
        })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor, tap: &mut dyn Tap) -> CandleResult<Tensor> {
        let (mlp, [q, k, v]) = self.input.forward(x, self.num_heads, self.num_heads)?;
        let probabilities = attention_probabilities(&q, &k)?; // [H, B, N, N]
        tap.attention(&probabilities.transpose(0, 1)?)?;
        let attended = merge_heads(&probabilities.matmul(&v)?)?; // [B, N, D]
        let y = (self.attn_out_proj.forward(&attended)? + self.mlp_out_proj.forward(&mlp)?)?;
        x + scale_if_any(self.ls.as_ref(), y)?
    }
}

/// `ParallelScalingBlock` with differential attention.
#[derive(Clone, Debug)]
struct DiffParallelScalingBlock {
    input: ParallelIn,
    diff: Differential,
    out_proj: Linear,
    ls: Option<LayerScale>,
}

impl DiffParallelScalingBlock {
    fn new(config: &Config, index: usize, vb: VarBuilder<'_>) -> CandleResult<Self> {
        let dim = config.embed_dim;
        Ok(Self {
            input: ParallelIn::new(config, config.head_dim() / 2, &vb)?,
            diff: Differential::new(config, index, &vb)?,
            out_proj: linear(dim + config.mlp_hidden, dim, config.proj_bias, vb.pp("out_proj"))?,
            ls: LayerScale::of(config, vb.pp("ls"))?,
        })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor, tap: &mut dyn Tap) -> CandleResult<Tensor> {
        let heads = self.diff.num_heads;
        let (mlp, [q, k, v]) = self.input.forward(x, 2 * heads, heads)?;
        let attended = self.diff.attend(&q, &k, &v, tap)?; // [B, N, D]
        let y = self.out_proj.forward(&Tensor::cat(&[attended, mlp], D::Minus1)?)?;
        x + scale_if_any(self.ls.as_ref(), y)?
    }
}

/// `x + ls(f(norm(x)))` without the residual: one of the branches that stand side by side.
#[derive(Clone, Debug)]
struct Branch<F> {
    norm: Norm,
    f: F,
    ls: Option<LayerScale>,
}

impl<F> Branch<F> {
    fn new(config: &Config, f: F, vb: &VarBuilder<'_>) -> CandleResult<Self> {
        let norm = Norm::of(config, config.embed_dim, vb.pp("norm"))?;
        Ok(Self { norm, f, ls: LayerScale::of(config, vb.pp("ls"))? })
    }
}

/// Two attentions side by side, then two MLPs side by side.
#[derive(Clone, Debug)]
struct ParallelThingsBlock {
    attns: [Branch<Attention>; 2],
    ffns: [Branch<Mlp>; 2],
}

impl ParallelThingsBlock {
    fn new(config: &Config, index: usize, vb: VarBuilder<'_>) -> CandleResult<Self> {
        let attn = |i: usize| {
            let vb = vb.pp("attns").pp(i);
            Branch::new(config, Attention::new(config, index, vb.pp("attn"))?, &vb)
        };
        let ffn = |i: usize| {
            let vb = vb.pp("ffns").pp(i);
            Branch::new(config, Mlp::new(config, vb.pp("mlp"))?, &vb)
        };
        Ok(Self { attns: [attn(0)?, attn(1)?], ffns: [ffn(0)?, ffn(1)?] })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor, tap: &mut dyn Tap) -> CandleResult<Tensor> {
        let mut attend = |a: &Branch<Attention>| {
            let y = a.f.forward(&a.norm.forward(x)?, tap)?;
            scale_if_any(a.ls.as_ref(), y)
        };
        let x = (x + (attend(&self.attns[0])? + attend(&self.attns[1])?)?)?;
        let feed = |m: &Branch<Mlp>| scale_if_any(m.ls.as_ref(), m.f.forward(&m.norm.forward(&x)?)?);
        &x + (feed(&self.ffns[0])? + feed(&self.ffns[1])?)?
    }
}

/// A block of the model's kind.
#[derive(Clone, Debug)]
// a model has few blocks, and all of one kind
#[allow(clippy::large_enum_variant)]
enum Block {
    Standard(StandardBlock),
    ResPost(ResPostBlock),
    ParallelScaling(ParallelScalingBlock),
    ParallelThings(ParallelThingsBlock),
    DiffParallelScaling(DiffParallelScalingBlock),
}

impl Block {
    fn new(config: &Config, index: usize, vb: VarBuilder<'_>) -> CandleResult<Self> {
        Ok(match config.block {
            BlockKind::Standard => Self::Standard(StandardBlock::new(config, index, vb)?),
            BlockKind::ResPost => Self::ResPost(ResPostBlock::new(config, index, vb)?),
            BlockKind::ParallelScaling => Self::ParallelScaling(ParallelScalingBlock::new(config, vb)?),
            BlockKind::ParallelThings => Self::ParallelThings(ParallelThingsBlock::new(config, index, vb)?),
            BlockKind::DiffParallelScaling => {
                Self::DiffParallelScaling(DiffParallelScalingBlock::new(config, index, vb)?)
            }
        })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor, tap: &mut dyn Tap) -> CandleResult<Tensor> {
        match self {
            Self::Standard(block) => block.forward(x, tap),
            Self::ResPost(block) => block.forward(x, tap),
            Self::ParallelScaling(block) => block.forward(x, tap),
            Self::ParallelThings(block) => block.forward(x, tap),
            Self::DiffParallelScaling(block) => block.forward(x, tap),
        }
    }
}

/// Attention pooling: a learned query attends to the tokens, then an MLP with a residual (arXiv 2106.04560).
#[derive(Clone, Debug)]
struct AttentionPool {
    latent: Tensor,
    q: Linear,
    kv: Linear,
    proj: Linear,
    norm: Norm,
    mlp: Mlp,
    num_heads: usize,
}

impl AttentionPool {
    fn new(config: &Config, vb: VarBuilder<'_>) -> CandleResult<Self> {
        let dim = config.embed_dim;
        // whatever the blocks have, the pooling has a plain MLP and all biases
        let plain = Config { mlp: MlpKind::Mlp, proj_bias: true, scale_mlp_norm: false, ..config.clone() };
        Ok(Self {
            latent: vb.get_with_hints((1, 1, dim), "latent", WEIGHT)?,
            q: linear(dim, dim, true, vb.pp("q"))?,
            kv: linear(dim, 2 * dim, true, vb.pp("kv"))?,
            proj: linear(dim, dim, true, vb.pp("proj"))?,
            norm: Norm::of(config, dim, vb.pp("norm"))?,
            mlp: Mlp::new(&plain, vb.pp("mlp"))?,
            num_heads: config.num_heads,
        })
    }

    /// `[B, N, D] → [B, D]`
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let ((b, _, dim), h) = (x.dims3()?, self.num_heads);
        let q = split_heads(&self.q.forward(&self.latent.broadcast_as((b, 1, dim))?)?, h)?; // [H, B, 1, d]
        let kv = split_heads(&self.kv.forward(x)?, 2 * h)?; // [2 H, B, N, d]
        let probabilities = attention_probabilities(&q, &kv.narrow(0, 0, h)?)?; // [H, B, 1, N]
        let x = merge_heads(&probabilities.matmul(&kv.narrow(0, h, h)?)?)?; // [B, 1, D]
        let x = self.proj.forward(&x)?;
        let x = (&x + self.mlp.forward(&self.norm.forward(&x)?)?)?;
        x.i((.., 0))
    }
}

/// A Vision Transformer: any architecture that a [`Config`] describes.
///
/// It runs on the device and in the type of its weights. Built over a `VarMap` it trains: every path that has no
/// gradient in candle gives way to a plain formula as soon as a tensor is tracked.
#[derive(Clone, Debug)]
pub struct VisionTransformer {
    pub(crate) config: Config,
    patch_embed: PatchEmbed,
    cls_token: Option<Tensor>,
    dist_token: Option<Tensor>,
    reg_token: Option<Tensor>,
    pub(crate) pos_embed: Option<Tensor>,
    norm_pre: Option<Norm>,
    blocks: Vec<Block>,
    norm: Option<Norm>,
    attn_pool: Option<AttentionPool>,
    fc_norm: Option<Norm>,
    pre_logits: Option<Linear>,
    head: Option<Linear>,
    head_dist: Option<Linear>,
    /// How position embeddings are resampled for images of another size; `None`: they are refused.
    pub(crate) dynamic: Option<Resample>,
}

impl VisionTransformer {
    /// A model whose parameters come from `vb`, under timm's names.
    ///
    /// # Errors
    /// A configuration that [`Config::validate`] refuses; a parameter that `vb` lacks or has in another shape.
    pub fn new(config: &Config, vb: VarBuilder<'_>) -> Result<Self> {
        config.validate()?;
        let dim = config.embed_dim;
        let norm = |there: bool, name| there.then(|| Norm::of(config, dim, vb.pp(name))).transpose();
        let token =
            |count: usize, name| (count > 0).then(|| vb.get_with_hints((1, count, dim), name, TOKEN)).transpose();
        let pos_embed = (config.pos_embed)
            .then(|| vb.get_with_hints((1, config.pos_embed_len(), dim), "pos_embed", WEIGHT))
            .transpose()?;
        let blocks = vb.pp("blocks");
        let blocks = (0..config.depth).map(|i| Block::new(config, i, blocks.pp(i))).collect::<CandleResult<_>>()?;
        let attn_pool =
            (config.global_pool == Pool::Map).then(|| AttentionPool::new(config, vb.pp("attn_pool"))).transpose()?;
        let pre_logits = config.pre_logits.as_ref();
        let pre_logits = pre_logits.map(|pre| linear(dim, pre.size, true, vb.pp("pre_logits.fc"))).transpose()?;
        let [head, head_dist] = Self::heads(config, &vb)?;
        Ok(Self {
            config: config.clone(),
            patch_embed: PatchEmbed::new(config, vb.pp("patch_embed"))?,
            cls_token: token(config.class_token.into(), "cls_token")?,
            dist_token: token(config.dist_token.into(), "dist_token")?,
            reg_token: token(config.reg_tokens, "reg_token")?,
            pos_embed,
            norm_pre: norm(config.pre_norm, "norm_pre")?,
            blocks,
            norm: norm(config.final_norm && !config.fc_norm, "norm")?,
            attn_pool,
            fc_norm: norm(config.final_norm && config.fc_norm, "fc_norm")?,
            pre_logits,
            head,
            head_dist,
            dynamic: None,
        })
    }

    /// The head, and the one on the distillation token.
    fn heads(config: &Config, vb: &VarBuilder<'_>) -> CandleResult<[Option<Linear>; 2]> {
        let width = config.pre_logits.as_ref().map_or(config.pooled_dim(), |pre| pre.size);
        let head = |there: bool, name| {
            (there && config.num_classes > 0)
                .then(|| linear(width, config.num_classes, config.head_bias, vb.pp(name)))
                .transpose()
        };
        Ok([head(true, "head")?, head(config.dist_token, "head_dist")?])
    }

    /// Another head for another configuration of it; attention pooling goes where the configuration has none.
    pub(crate) fn replace_head(&mut self, config: Config, vb: &VarBuilder<'_>) -> Result<()> {
        [self.head, self.head_dist] = Self::heads(&config, vb)?;
        if config.global_pool != Pool::Map {
            self.attn_pool = None;
        }
        self.config = config;
        Ok(())
    }

    /// Keeps the first `depth` blocks; drops the final norm, and all that follows it.
    pub(crate) fn truncate(&mut self, depth: usize, norm: bool, head: bool) {
        self.blocks.truncate(depth);
        self.config.depth = self.blocks.len();
        if norm {
            self.norm = None;
        }
        if head {
            [self.head, self.head_dist, self.pre_logits] = [None, None, None];
            (self.attn_pool, self.fc_norm) = (None, None);
            (self.config.num_classes, self.config.pre_logits) = (0, None);
            self.config.global_pool = Pool::None;
        }
        self.config.final_norm = self.norm.is_some() || self.fc_norm.is_some();
        self.config.fc_norm = self.fc_norm.is_some();
    }

    /// Blocks.
    pub(crate) fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// The final norm, where one stands before the pooling.
    pub(crate) fn norm(&self, x: &Tensor) -> CandleResult<Tensor> {
        norm_if_any(self.norm.as_ref(), x.clone())
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// `[B, C, h, w]` → logits `[B, num_classes]`; without a head the pooled features `[B, D]`.
    ///
    /// # Errors
    /// An input of another rank, channel count or size than the model's; a lack of memory.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_head(&self.forward_features(x)?, false)
    }

    /// `[B, C, h, w]` → tokens `[B, N, D]` after the final norm (if it stands before the pooling), as timm means it.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_features(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_tapped(x, &mut ())
    }

    /// [`forward_features`](Self::forward_features) while `tap` looks on.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and what the tap returns.
    pub fn forward_tapped(&self, x: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let mut x = self.embed(x)?; // [B, N, D]
        for (index, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, tap)?;
            if !tap.block(index, &x)? {
                break;
            }
        }
        Ok(self.norm(&x)?)
    }

    /// Tokens `[B, N, D]` of [`forward_features`](Self::forward_features) → logits `[B, num_classes]`; with `pre_logits`,
    /// or without a head, what the head would read: `[B, D]`. With `Pool::None` both keep the tokens' dimension.
    ///
    /// A distilled model answers with the mean of its two heads.
    ///
    /// # Errors
    /// An input that is not such tokens; a lack of memory.
    pub fn forward_head(&self, x: &Tensor, pre_logits: bool) -> Result<Tensor> {
        let prefix = self.config.num_prefix_tokens();
        match *x.dims() {
            [_, n, dim] if dim == self.config.embed_dim && n > prefix => {}
            _ => {
                let (found, dim) = (x.dims(), self.config.embed_dim);
                return Err(Error::Input(format!("tokens must be [B, N, {dim}] with N > {prefix}, found {found:?}")));
            }
        }
        if self.config.dist_token {
            return Ok(self.forward_distilled_head(x, pre_logits)?);
        }
        let x = norm_if_any(self.fc_norm.as_ref(), self.pool(x)?)?;
        let x = match &self.pre_logits {
            Some(fc) => fc.forward(&x)?.tanh()?,
            None => x,
        };
        match &self.head {
            Some(head) if !pre_logits => Ok(head.forward(&x)?),
            _ => Ok(x),
        }
    }

    /// DeiT's two heads, on the class and the distillation token (arXiv 2012.12877).
    fn forward_distilled_head(&self, x: &Tensor, pre_logits: bool) -> CandleResult<Tensor> {
        let (class, dist) = (x.i((.., 0))?.contiguous()?, x.i((.., 1))?.contiguous()?); // [B, D] each
        match (&self.head, &self.head_dist) {
            (Some(head), Some(head_dist)) if !pre_logits => (head.forward(&class)? + head_dist.forward(&dist)?)? * 0.5,
            _ => (class + dist)? * 0.5,
        }
    }

    /// `[B, C, h, w]` → tokens `[B, N, D]` as the first block reads them.
    fn embed(&self, x: &Tensor) -> Result<Tensor> {
        let pos_embed = self.pos_embed_for(x)?;
        let x = self.patch_embed.forward(x)?;
        let tokens = [&self.cls_token, &self.dist_token, &self.reg_token];
        let prefix = |x: Tensor| {
            let (b, _, dim) = x.dims3()?;
            let mut parts = Vec::with_capacity(tokens.len() + 1);
            for token in tokens.into_iter().flatten() {
                parts.push(token.broadcast_as((b, token.dim(1)?, dim))?);
            }
            parts.push(x);
            if parts.len() == 1 { Ok(parts.swap_remove(0)) } else { Tensor::cat(&parts, 1) }
        };
        let x = match &pos_embed {
            None => prefix(x)?,
            Some(pos_embed) if self.config.no_embed_class => prefix(x.broadcast_add(pos_embed)?)?,
            Some(pos_embed) => prefix(x)?.broadcast_add(pos_embed)?,
        };
        Ok(norm_if_any(self.norm_pre.as_ref(), x)?)
    }

    /// The position embeddings for the size of the images `x`; what the model cannot read is refused.
    fn pos_embed_for(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let (c, [h, w], [ph, pw]) = (self.config.in_chans, self.config.img_size, self.config.patch_size);
        match (x.dims(), self.dynamic) {
            (&[b, channels, height, width], _) if b > 0 && channels == c && height == h && width == w => {
                Ok(self.pos_embed.clone())
            }
            (&[b, channels, height, width], Some(how))
                if b > 0 && channels == c && height % ph == 0 && width % pw == 0 =>
            {
                let (from, to) = (self.config.grid(), [height / ph, width / pw]);
                let prefix = self.config.pos_embed_prefix();
                let resample = |table| pos_embed::resample(table, prefix, from, to, how);
                self.pos_embed.as_ref().map(resample).transpose()
            }
            (found, Some(_)) => Err(Error::Input(format!(
                "the model reads [B, {c}, h, w] with h a multiple of {ph} and w of {pw}, found {found:?}"
            ))),
            (found, None) => Err(Error::Input(format!("the model reads [B, {c}, {h}, {w}], found {found:?}"))),
        }
    }

    /// `[B, N, D] → [B, D]`, as the configuration's `global_pool` says.
    fn pool(&self, x: &Tensor) -> CandleResult<Tensor> {
        let from = if self.config.pool_include_prefix { 0 } else { self.config.num_prefix_tokens() };
        let patches = || x.narrow(1, from, x.dim(1)? - from)?.contiguous();
        match self.config.global_pool {
            Pool::None => Ok(x.clone()),
            Pool::Token => x.i((.., 0))?.contiguous(),
            Pool::Avg => patches()?.mean(1),
            Pool::Max => patches()?.max(1),
            Pool::Avgmax => {
                let x = patches()?;
                (x.max(1)? + x.mean(1)?)? * 0.5
            }
            Pool::TokenAvg => Tensor::cat(&[x.i((.., 0))?, patches()?.mean(1)?], 1), // [B, 2 D]
            Pool::Map => match &self.attn_pool {
                Some(attn_pool) => attn_pool.forward(&patches()?),
                None => candle_core::bail!("`global_pool` map without attn_pool"),
            },
        }
    }
}
