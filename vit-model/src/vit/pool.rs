//! Attention pooling.

use candle_core::{IndexOp, Result, Tensor};
use candle_nn::VarBuilder;

use super::attention::{attention_probabilities, merge_heads, split_heads};
use super::linear::{Linear, WEIGHT};
use super::mlp::Mlp;
use super::norm::Norm;
use crate::config::Config;
use crate::layers;

/// Attention pooling: a learned query attends to the tokens, then an MLP with a residual (arXiv 2106.04560).
#[derive(Clone, Debug)]
pub(super) struct AttentionPool {
    latent: Tensor,
    q: Linear,
    kv: Linear,
    proj: Linear,
    norm: Norm,
    mlp: Mlp,
    num_heads: usize,
}

impl AttentionPool {
    pub(super) fn read(layers: &layers::AttentionPool, config: &Config, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            latent: vb.get_with_hints(&layers.latent.shape[..], &layers.latent.name, WEIGHT)?,
            q: Linear::read(&layers.q, vb)?,
            kv: Linear::read(&layers.kv, vb)?,
            proj: Linear::read(&layers.proj, vb)?,
            norm: Norm::read(&layers.norm, vb)?,
            mlp: Mlp::read(&layers.mlp, config.act, vb)?,
            num_heads: layers.num_heads,
        })
    }

    /// `[B, N, D] → [B, D]`
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
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
