//! Self-attention: the usual one, with rotary positions or biases by relative position, and differential attention.

use candle_core::{D, IndexOp, Result, Tensor};
use candle_nn::{Init, VarBuilder, ops};

use super::linear::Linear;
use super::norm::{Norm, norm_if_any};
use super::positions::Positions;
use super::tap::Tap;
use crate::config::Config;
use crate::layers;

/// Softmax over the last dimension. Training uses the plain formula because candle's fused kernel has no gradient.
fn softmax(x: &Tensor) -> Result<Tensor> {
    if x.track_op() { ops::softmax(x, D::Minus1) } else { ops::softmax_last_dim(&x.contiguous()?) }
}

/// `[B, N, H·d] → [H, B, N, d]`, contiguous.
pub(crate) fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, _) = x.dims3()?;
    x.reshape((b * n, heads, ()))?.transpose(0, 1)?.contiguous()?.reshape((heads, b, n, ()))
}

/// `[H, B, N, d] → [B, N, H·d]`, contiguous.
pub(crate) fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (h, b, n, d) = x.dims4()?;
    x.reshape((h, b * n, d))?.transpose(0, 1)?.reshape((b, n, h * d))
}

/// `softmax(q kᵀ / √d)`: `[H, B, M, d]`, `[H, B, N, d]` → `[H, B, M, N]`.
pub(super) fn attention_probabilities(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    biased_probabilities(q, k, None)
}

/// `softmax(q kᵀ / √d + bias)`, the bias `[H, 1, M, N]`.
fn biased_probabilities(q: &Tensor, k: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (q * scale)?.matmul(&k.t()?)?;
    match bias {
        Some(bias) => softmax(&scores.broadcast_add(bias)?),
        None => softmax(&scores),
    }
}

/// The projections to q, k and v.
#[derive(Clone, Debug)]
enum Qkv {
    Joint(Linear),
    /// k has no bias. The biases of q and v are put together at each pass, because they may be trained.
    NoKeyBias {
        weight: Linear,
        q_bias: Tensor,
        v_bias: Tensor,
    },
    Split([Linear; 3]),
}

impl Qkv {
    fn read(layers: &layers::Qkv, vb: &VarBuilder<'_>) -> Result<Self> {
        let bias = |bias: &layers::Parameter| vb.get_with_hints(&bias.shape[..], &bias.name, Init::Const(0.0));
        Ok(match layers {
            layers::Qkv::Joint(qkv) => Self::Joint(Linear::read(qkv, vb)?),
            layers::Qkv::NoKeyBias { weight, q_bias, v_bias } => {
                Self::NoKeyBias { weight: Linear::read(weight, vb)?, q_bias: bias(q_bias)?, v_bias: bias(v_bias)? }
            }
            layers::Qkv::Split([q, k, v]) => {
                Self::Split([Linear::read(q, vb)?, Linear::read(k, vb)?, Linear::read(v, vb)?])
            }
        })
    }

    /// `[B, N, D] → q [H, B, N, d], k and v [KV, B, N, d]`
    fn forward(&self, x: &Tensor, heads: usize, kv_heads: usize) -> Result<[Tensor; 3]> {
        let joint = match self {
            Self::Split([q, k, v]) => {
                return Ok([
                    split_heads(&q.forward(x)?, heads)?,
                    split_heads(&k.forward(x)?, kv_heads)?,
                    split_heads(&v.forward(x)?, kv_heads)?,
                ]);
            }
            Self::Joint(qkv) => qkv.forward(x)?,
            Self::NoKeyBias { weight, q_bias, v_bias } => {
                weight.forward(x)?.broadcast_add(&Tensor::cat(&[q_bias, &q_bias.zeros_like()?, v_bias], 0)?)?
            }
        };
        let qkv = split_heads(&joint, 3 * heads)?; // [3 H, B, N, d]
        let part = |i: usize| qkv.narrow(0, i * heads, heads);
        Ok([part(0)?, part(1)?, part(2)?])
    }
}

/// Repeats each head of k or v for the heads of q that read it: `[KV, B, N, d] → [H, B, N, d]`.
fn repeat_heads(x: Tensor, heads: usize) -> Result<Tensor> {
    let (kv, b, n, d) = x.dims4()?;
    if kv == heads {
        return Ok(x);
    }
    let group = heads / kv.max(1);
    x.unsqueeze(1)?.broadcast_as((kv, group, b, n, d))?.contiguous()?.reshape((heads, b, n, d))
}

/// The norms on q and k, each over the width of a head.
#[derive(Clone, Debug)]
pub(super) struct QkNorm {
    q: Norm,
    k: Norm,
}

impl QkNorm {
    pub(super) fn read_if_any(layers: Option<&[layers::Norm; 2]>, vb: &VarBuilder<'_>) -> Result<Option<Self>> {
        layers.map(|[q, k]| Ok(Self { q: Norm::read(q, vb)?, k: Norm::read(k, vb)? })).transpose()
    }

    pub(super) fn apply(this: Option<&Self>, q: Tensor, k: Tensor) -> Result<(Tensor, Tensor)> {
        match this {
            Some(norm) => Ok((norm.q.forward(&q)?, norm.k.forward(&k)?)),
            None => Ok((q, k)),
        }
    }
}

/// Differential attention: each head subtracts a second attention, multiplied by a learned λ (arXiv 2410.05258).
#[derive(Clone, Debug)]
pub(super) struct Differential {
    lambda_q1: Tensor,
    lambda_k1: Tensor,
    lambda_q2: Tensor,
    lambda_k2: Tensor,
    lambda_init: f64,
    sub_norm: Norm,
    pub(super) num_heads: usize,
}

impl Differential {
    /// `index` is the block's, because λ starts larger in deeper blocks.
    pub(super) fn read(
        layers: &layers::Differential,
        config: &Config,
        index: usize,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.1 };
        let lambda = |i: usize| {
            let layers::Parameter { name, shape } = &layers.lambdas[i];
            vb.get_with_hints(&shape[..], name, init)
        };
        Ok(Self {
            lambda_q1: lambda(0)?,
            lambda_k1: lambda(1)?,
            lambda_q2: lambda(2)?,
            lambda_k2: lambda(3)?,
            lambda_init: 0.8 - 0.6 * (-0.3 * index as f64).exp(),
            sub_norm: Norm::read(&layers.sub_norm, vb)?,
            num_heads: config.num_heads,
        })
    }

    /// `exp(λq1·λk1) − exp(λq2·λk2) + λ_init`: `[1]`.
    fn lambda(&self) -> Result<Tensor> {
        let dot = |q: &Tensor, k: &Tensor| (q * k)?.sum_keepdim(0)?.exp();
        (dot(&self.lambda_q1, &self.lambda_k1)? - dot(&self.lambda_q2, &self.lambda_k2)?)? + self.lambda_init
    }

    /// q, k `[2 H, B, N, d/2]`, v `[H, B, N, d]` → `[B, N, D]`.
    pub(super) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let both = attention_probabilities(q, k)?; // [2 H, B, N, N], a head's two attentions are neighbours
        let (_, b, n, _) = both.dims4()?;
        let both = both.reshape((self.num_heads, 2, b, n, n))?;
        let difference = (both.i((.., 0))? - both.i((.., 1))?.broadcast_mul(&self.lambda()?)?)?; // [H, B, N, N]
        tap.attention(&difference.transpose(0, 1)?)?;
        let attended = self.sub_norm.forward(&difference.matmul(v)?)?; // [H, B, N, d]
        merge_heads(&(attended * (1.0 - self.lambda_init))?)
    }
}

/// Multi-head self-attention.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    qkv: Qkv,
    qk_norm: Option<QkNorm>,
    diff: Option<Differential>,
    /// The block's table of biases by relative position, `[distances, H]`.
    rel_pos_bias: Option<Tensor>,
    norm: Option<Norm>,
    proj: Linear,
    num_heads: usize,
    kv_heads: usize,
    /// The block's, because each has learned frequencies of its own.
    index: usize,
}

impl Attention {
    pub(super) fn read(layers: &layers::Attention, config: &Config, index: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let diff = layers.diff.as_ref().map(|diff| Differential::read(diff, config, index, vb)).transpose()?;
        let table = |table: &layers::Parameter| vb.get_with_hints(&table.shape[..], &table.name, Init::Const(0.0));
        Ok(Self {
            qkv: Qkv::read(&layers.qkv, vb)?,
            qk_norm: QkNorm::read_if_any(layers.qk_norm.as_ref(), vb)?,
            diff,
            rel_pos_bias: layers.rel_pos_bias.as_ref().map(table).transpose()?,
            norm: Norm::read_if_any(layers.norm.as_ref(), vb)?,
            proj: Linear::read(&layers.proj, vb)?,
            num_heads: config.num_heads,
            kv_heads: layers.kv_heads,
            index,
        })
    }

    /// Resamples the table of biases by relative position.
    pub(super) fn resize(&mut self, resample: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        if let Some(table) = &mut self.rel_pos_bias {
            *table = resample(table)?;
        }
        Ok(())
    }

    /// `[B, N, D] → [B, N, D]`
    pub(super) fn forward(&self, x: &Tensor, positions: &Positions, tap: &mut dyn Tap) -> Result<Tensor> {
        let h = self.num_heads;
        if let (Some(diff), Qkv::Joint(qkv)) = (&self.diff, &self.qkv) {
            let qkv = qkv.forward(x)?.chunk(3, D::Minus1)?; // [B, N, D] each
            let (q, k) = (split_heads(&qkv[0], 2 * h)?, split_heads(&qkv[1], 2 * h)?); // [2 H, B, N, d/2]
            let (q, k) = QkNorm::apply(self.qk_norm.as_ref(), q, k)?;
            let x = diff.attend(&q, &k, &split_heads(&qkv[2], h)?, tap)?; // [B, N, D]
            return self.proj.forward(&norm_if_any(self.norm.as_ref(), x)?);
        }
        let [q, k, v] = self.qkv.forward(x, h, self.kv_heads)?; // [H, B, N, d]
        let (mut q, mut k) = QkNorm::apply(self.qk_norm.as_ref(), q, k)?;
        if let Some(rotation) = &positions.rotation {
            (q, k) = (rotation.apply(&q, self.index)?, rotation.apply(&k, self.index)?);
        }
        let (k, v) = (repeat_heads(k, h)?, repeat_heads(v, h)?);
        let bias = positions.bias(self.rel_pos_bias.as_ref())?;
        let probabilities = biased_probabilities(&q, &k, bias.as_ref())?; // [H, B, N, N]
        tap.attention(&probabilities.transpose(0, 1)?)?;
        let x = merge_heads(&probabilities.matmul(&v)?)?; // [B, N, D]
        self.proj.forward(&norm_if_any(self.norm.as_ref(), x)?)
    }
}
