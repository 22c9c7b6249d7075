//! The text tower in candle modules, top to bottom.

use candle_core::{D, DType, Device, Result as CandleResult, Tensor};
use candle_nn::{VarBuilder, ops};

use super::config::TextConfig;
use crate::layers::{Linear as LinearLayer, Norm as NormLayer};
use crate::vit::attention::{merge_heads, split_heads};
use crate::vit::linear::Linear;
use crate::vit::norm::Norm;
use crate::vit::weights::build;
use crate::{NormKind, Result, Weights};

/// A text tower: token ids in, one embedding for each text out.
#[derive(Clone, Debug)]
pub struct TextTransformer {
    tokens: Tensor,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    head: Option<Linear>,
    config: TextConfig,
    device: Device,
}

/// Pre-norm block with two residual branches: `[B, N, D] → [B, N, D]`.
#[derive(Clone, Debug)]
struct Block {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
}

impl TextTransformer {
    /// A text tower in f32 with weights from a file, under the names of [`TextConfig::parameters`].
    ///
    /// # Errors
    /// A tensor that is missing, of another shape or not finite, or a lack of memory.
    pub fn from_weights(config: &TextConfig, weights: &dyn Weights, device: &Device) -> Result<Self> {
        config.validate()?;
        build(weights, DType::F32, device, |vb| Ok(Self::read(config, &vb, device)?))
    }

    fn read(config: &TextConfig, vb: &VarBuilder<'_>, device: &Device) -> CandleResult<Self> {
        let (d, hidden) = (config.embed_dim, config.mlp_hidden);
        let linear =
            |name: String, inputs, outputs, bias| Linear::read(&LinearLayer { name, inputs, outputs, bias }, vb);
        let norm =
            |name: String| Norm::read(&NormLayer { name, width: d, kind: NormKind::LayerNorm, eps: config.ln_eps }, vb);
        let block = |i: usize| {
            Ok(Block {
                norm1: norm(format!("blocks.{i}.norm1"))?,
                qkv: linear(format!("blocks.{i}.attn.qkv"), d, 3 * d, true)?,
                proj: linear(format!("blocks.{i}.attn.proj"), d, d, true)?,
                norm2: norm(format!("blocks.{i}.norm2"))?,
                fc1: linear(format!("blocks.{i}.mlp.fc1"), d, hidden, true)?,
                fc2: linear(format!("blocks.{i}.mlp.fc2"), hidden, d, true)?,
            })
        };
        Ok(Self {
            tokens: vb.get((config.vocab_size, d), "token_embed.weight")?,
            positions: vb.get((config.context_length, d), "pos_embed")?,
            blocks: (0..config.depth).map(block).collect::<CandleResult<_>>()?,
            norm: norm("norm".into())?,
            head: config.projection.map(|out| linear("head".into(), d, out, config.projection_bias)).transpose()?,
            config: config.clone(),
            device: device.clone(),
        })
    }

    /// The architecture.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// Embeds texts, `[T, D]`, not normalised. All have one length, at most [`TextConfig::context_length`], and ids below
    /// [`TextConfig::vocab_size`].
    ///
    /// # Errors
    /// Another number of ids, an id without an embedding, or a lack of memory.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let c = &self.config;
        let length = ids.first().map_or(0, Vec::len);
        if ids.is_empty() {
            return Ok(Tensor::zeros((0, c.output_dim()), DType::F32, &self.device)?);
        }
        for text in ids {
            let (found, most) = (text.len(), c.context_length);
            if found != length || !(1..=most).contains(&found) {
                return Err(crate::Error::Input(format!(
                    "the text tower reads texts of one length of at most {most} ids, found {found}"
                )));
            }
            if let Some(id) = text.iter().find(|&&id| id as usize >= c.vocab_size) {
                return Err(crate::Error::Input(format!(
                    "token {id} has no embedding: the text tower has {} of them",
                    c.vocab_size
                )));
            }
        }
        let at: Vec<usize> = ids.iter().map(|text| c.position(text)).collect();
        // with a causal mask no token reads those after it, so nothing after the last position that is pooled is computed
        let n = if c.causal { at.iter().max().map_or(1, |&last| last + 1) } else { length };
        let flat: Vec<u32> = ids.iter().flat_map(|text| &text[..n]).copied().collect();
        Ok(self.embed(&flat, &at, n)?)
    }

    /// `[T · N]` ids → `[T, D]`.
    fn embed(&self, ids: &[u32], at: &[usize], n: usize) -> CandleResult<Tensor> {
        let (b, d) = (at.len(), self.config.embed_dim);
        let x = self.tokens.index_select(&Tensor::new(ids, &self.device)?, 0)?.reshape((b, n, d))?; // [B, N, D]
        let mut x = x.broadcast_add(&self.positions.narrow(0, 0, n)?)?;
        let mask = self.config.causal.then(|| causal_mask(n, &self.device)).transpose()?;
        for block in &self.blocks {
            x = block.forward(&x, &self.config, mask.as_ref())?;
        }
        let rows: Vec<u32> = at.iter().enumerate().map(|(text, at)| (text * n + at) as u32).collect();
        let x = x.reshape((b * n, d))?.index_select(&Tensor::new(rows, &self.device)?, 0)?; // [B, D]
        let x = self.norm.forward(&x)?;
        match &self.head {
            Some(head) => head.forward(&x),
            None => Ok(x),
        }
    }
}

impl Block {
    fn forward(&self, x: &Tensor, config: &TextConfig, mask: Option<&Tensor>) -> CandleResult<Tensor> {
        let x = (x + self.attend(&self.norm1.forward(x)?, config.num_heads, mask)?)?;
        let hidden = config.act.forward(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        &x + self.fc2.forward(&hidden)?
    }

    fn attend(&self, x: &Tensor, heads: usize, mask: Option<&Tensor>) -> CandleResult<Tensor> {
        let qkv = split_heads(&self.qkv.forward(x)?, 3 * heads)?; // [3 H, B, N, d]
        let part = |i: usize| qkv.narrow(0, i * heads, heads); // [H, B, N, d]
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
        let scores = (q * scale)?.matmul(&k.t()?)?; // [H, B, N, N]
        let scores = match mask {
            Some(mask) => scores.broadcast_add(mask)?,
            None => scores,
        };
        self.proj.forward(&merge_heads(&ops::softmax_last_dim(&scores.contiguous()?)?.matmul(&v)?)?)
    }
}

/// `[N, N]`: 0 up to the diagonal, −∞ above it.
fn causal_mask(n: usize, device: &Device) -> CandleResult<Tensor> {
    let values: Vec<f32> =
        (0..n).flat_map(|row| (0..n).map(move |column| if column > row { f32::NEG_INFINITY } else { 0.0 })).collect();
    Tensor::from_vec(values, (n, n), device)
}
