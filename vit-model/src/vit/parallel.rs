//! Blocks whose attention and MLP are computed from the same input, and blocks with two of each.

use candle_core::{D, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::attention::{Attention, Differential, QkNorm, attention_probabilities, merge_heads, split_heads};
use super::linear::Linear;
use super::mlp::Mlp;
use super::norm::Norm;
use super::positions::Positions;
use super::scale::{LayerScale, scale_if_any};
use super::tap::Tap;
use crate::config::{Activation, Config};
use crate::layers;

/// What both kinds of parallel block share: one norm, and one projection to the MLP's hidden layer and q, k and v.
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
    fn read(layers: &layers::ParallelInput, config: &Config, vb: &VarBuilder<'_>) -> Result<Self> {
        let bias = |bias: &layers::Parameter| vb.get_with_hints(&bias.shape[..], &bias.name, Init::Const(0.0));
        Ok(Self {
            in_norm: Norm::read(&layers.in_norm, vb)?,
            in_proj: Linear::read(&layers.in_proj, vb)?,
            mlp_bias: layers.mlp_bias.as_ref().map(bias).transpose()?,
            qk_norm: QkNorm::read_if_any(layers.qk_norm.as_ref(), vb)?,
            act: config.act,
            sizes: [config.mlp_hidden, config.embed_dim],
        })
    }

    /// `[B, N, D]` → the MLP's hidden layer `[B, N, hidden]`; q and k in `qk_heads`, v in `v_heads` heads.
    fn forward(&self, x: &Tensor, qk_heads: usize, v_heads: usize) -> Result<(Tensor, [Tensor; 3])> {
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
pub(super) struct ParallelScalingBlock {
    input: ParallelIn,
    attn_out_proj: Linear,
    mlp_out_proj: Linear,
    ls: Option<LayerScale>,
    num_heads: usize,
}

impl ParallelScalingBlock {
    pub(super) fn read(layers: &layers::ParallelScalingBlock, config: &Config, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            input: ParallelIn::read(&layers.input, config, vb)?,
            attn_out_proj: Linear::read(&layers.attn_out_proj, vb)?,
            mlp_out_proj: Linear::read(&layers.mlp_out_proj, vb)?,
            ls: LayerScale::read_if_any(layers.ls.as_ref(), vb)?,
            num_heads: config.num_heads,
        })
    }

    /// `[B, N, D] → [B, N, D]`
    pub(super) fn forward(&self, x: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
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
pub(super) struct DiffParallelScalingBlock {
    input: ParallelIn,
    diff: Differential,
    out_proj: Linear,
    ls: Option<LayerScale>,
}

impl DiffParallelScalingBlock {
    pub(super) fn read(
        layers: &layers::DiffParallelScalingBlock,
        config: &Config,
        index: usize,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        Ok(Self {
            input: ParallelIn::read(&layers.input, config, vb)?,
            diff: Differential::read(&layers.diff, config, index, vb)?,
            out_proj: Linear::read(&layers.out_proj, vb)?,
            ls: LayerScale::read_if_any(layers.ls.as_ref(), vb)?,
        })
    }

    /// `[B, N, D] → [B, N, D]`
    pub(super) fn forward(&self, x: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let heads = self.diff.num_heads;
        let (mlp, [q, k, v]) = self.input.forward(x, 2 * heads, heads)?;
        let attended = self.diff.attend(&q, &k, &v, tap)?; // [B, N, D]
        let y = self.out_proj.forward(&Tensor::cat(&[attended, mlp], D::Minus1)?)?;
        x + scale_if_any(self.ls.as_ref(), y)?
    }
}

/// `ls(f(norm(x)))`: one of two residual branches that read the same input.
#[derive(Clone, Debug)]
struct Branch<F> {
    norm: Norm,
    f: F,
    ls: Option<LayerScale>,
}

impl<F> Branch<F> {
    fn read<L>(
        layers: &layers::Branch<L>,
        f: impl FnOnce(&L, &VarBuilder<'_>) -> Result<F>,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let norm = Norm::read(&layers.norm, vb)?;
        Ok(Self { norm, f: f(&layers.f, vb)?, ls: LayerScale::read_if_any(layers.ls.as_ref(), vb)? })
    }
}

/// Two attentions side by side, then two MLPs side by side.
#[derive(Clone, Debug)]
pub(super) struct ParallelThingsBlock {
    attns: [Branch<Attention>; 2],
    ffns: [Branch<Mlp>; 2],
}

impl ParallelThingsBlock {
    pub(super) fn read(
        layers: &layers::ParallelThingsBlock,
        config: &Config,
        index: usize,
        vb: &VarBuilder<'_>,
    ) -> Result<Self> {
        let attn = |branch| Branch::read(branch, |attn, vb| Attention::read(attn, config, index, vb), vb);
        let ffn = |branch| Branch::read(branch, |mlp, vb| Mlp::read(mlp, config.act, vb), vb);
        let ([a, b], [c, d]) = (&layers.attns, &layers.ffns);
        Ok(Self { attns: [attn(a)?, attn(b)?], ffns: [ffn(c)?, ffn(d)?] })
    }

    /// `[B, N, D] → [B, N, D]`
    pub(super) fn forward(&self, x: &Tensor, positions: &Positions, tap: &mut dyn Tap) -> Result<Tensor> {
        let mut attend = |a: &Branch<Attention>| {
            let y = a.f.forward(&a.norm.forward(x)?, positions, tap)?;
            scale_if_any(a.ls.as_ref(), y)
        };
        let x = (x + (attend(&self.attns[0])? + attend(&self.attns[1])?)?)?;
        let feed = |m: &Branch<Mlp>| scale_if_any(m.ls.as_ref(), m.f.forward(&m.norm.forward(&x)?)?);
        &x + (feed(&self.ffns[0])? + feed(&self.ffns[1])?)?
    }
}
