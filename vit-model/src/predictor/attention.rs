//! Attention as values: a map for each attention of each block, and their rollout.

use candle_core::{Device, Tensor};

use super::modules::{Modules, values};
use crate::vit::tap::{self, Tap};
use crate::{BlockKind, Config, Error, Result};

/// The attention of every block for one image.
#[derive(Clone, Debug)]
pub struct AttentionMaps {
    maps: Vec<AttentionMap>,
    config: Config,
}

/// The attention probabilities of one attention layer for one image, `[heads, N, N]`: row `i` of a head is how much token
/// `i` takes from each token. Class, distillation and register tokens come first, then patches row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionMap {
    name: String,
    block: usize,
    heads: usize,
    tokens: usize,
    values: Vec<f32>,
}

impl AttentionMap {
    /// The layer's name, as timm's tensors have it: `blocks.3.attn`, or `blocks.3.attns.1` in a block with two.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The block, counted from 0.
    pub fn block(&self) -> usize {
        self.block
    }

    /// `[heads, N, N]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.heads, self.tokens, self.tokens]
    }

    /// All values, `[heads, N, N]`, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// One head's values, `[N, N]`.
    pub fn head(&self, head: usize) -> Option<&[f32]> {
        self.values.chunks_exact(self.tokens * self.tokens).nth(head)
    }

    /// The mean over heads, `[N, N]`.
    ///
    /// # Errors
    /// A lack of memory.
    pub fn mean(&self) -> Result<Vec<f32>> {
        values(&self.tensor()?.mean(0)?)
    }

    /// `[heads, N, N]` as candle's tensor.
    ///
    /// # Errors
    /// A lack of memory.
    pub fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.values, self.shape().as_slice(), &Device::Cpu)?)
    }
}

impl AttentionMaps {
    /// The maps in the order of the blocks. A block with two attentions has two.
    pub fn iter(&self) -> std::slice::Iter<'_, AttentionMap> {
        self.maps.iter()
    }

    /// The map of a layer by its [name](AttentionMap::name).
    pub fn get(&self, name: &str) -> Option<&AttentionMap> {
        self.maps.iter().find(|map| map.name == name)
    }

    /// The map of the last block; its last, if it has two.
    pub fn last(&self) -> Option<&AttentionMap> {
        self.maps.last()
    }

    /// `[rows, columns]` of the grid of patches.
    pub fn grid(&self) -> [usize; 2] {
        self.config.grid()
    }

    /// A block's attention `[N, N]`: one head's, or the mean over heads. For a block with two attentions it is the mean of
    /// both.
    ///
    /// # Errors
    /// A block or a head that the model does not have.
    pub fn block(&self, block: usize, head: Option<usize>) -> Result<Vec<f32>> {
        values(&self.block_tensor(block, head)?)
    }

    /// Attention rollout (arXiv 2005.00928), `[N, N]`: the product over blocks of `(A + I) / 2`, in which `A` is a block's
    /// mean attention. Row `i` follows the attention, and the residual connections around it, from token `i` back to the
    /// tokens that entered the model.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for differential attention, whose rows do not sum to one.
    pub fn rollout(&self) -> Result<Vec<f32>> {
        if self.config.diff_attn || self.config.block == BlockKind::DiffParallelScaling {
            return Err(Error::unsupported("a rollout needs attention that sums to one; this model's is a difference"));
        }
        let blocks = (0..self.config.depth).map(|block| self.block_tensor(block, None));
        values(&tap::rollout(&blocks.collect::<Result<Vec<_>>>()?)?)
    }

    /// What the class token takes from each patch, of attention `[N, N]`: `[rows · columns]`. Without a class token, the mean
    /// over all tokens.
    ///
    /// # Errors
    /// Another number of values than `N · N`.
    pub fn per_patch(&self, attention: &[f32]) -> Result<Vec<f32>> {
        let tokens = self.config.num_tokens();
        if attention.len() != tokens * tokens {
            let found = attention.len();
            return Err(Error::Input(format!(
                "attention of {tokens} × {tokens} tokens is expected, found {found} values"
            )));
        }
        tap::per_patch(&Tensor::from_slice(attention, (tokens, tokens), &Device::Cpu)?, &self.config)
    }

    fn block_tensor(&self, block: usize, head: Option<usize>) -> Result<Tensor> {
        let attentions = self.maps.iter().filter(|map| map.block == block);
        let attentions = attentions.map(AttentionMap::tensor).collect::<Result<Vec<_>>>()?;
        if attentions.is_empty() {
            return Err(Error::Input(format!("block {block}, the model has {} (counted from 0)", self.config.depth)));
        }
        let all = Tensor::stack(&attentions, 0)?.mean(0)?; // [H, N, N]
        match head {
            None => Ok(all.mean(0)?),
            Some(head) if head < all.dim(0)? => Ok(all.get(head)?),
            Some(head) => {
                Err(Error::Input(format!("head {head}, the model has {} (counted from 0)", self.config.num_heads)))
            }
        }
    }

    /// Runs an image `[1, C, H, W]` and keeps the attention of every block.
    pub(super) fn of(modules: &Modules, config: &Config, x: &Tensor) -> Result<Self> {
        let mut kept = Kept { blocks: vec![Vec::new()] };
        modules.run(x, |vit, x| vit.forward_tapped(x, &mut kept).map(|_| ()))?;
        let mut maps = Vec::new();
        for (block, attentions) in kept.blocks.iter().enumerate() {
            for (i, attention) in attentions.iter().enumerate() {
                let (heads, tokens, _) = attention.dims3()?;
                let name = match attentions.len() {
                    1 => format!("blocks.{block}.attn"),
                    _ => format!("blocks.{block}.attns.{i}"),
                };
                maps.push(AttentionMap { name, block, heads, tokens, values: values(attention)? });
            }
        }
        Ok(Self { maps, config: config.clone() })
    }
}

impl<'a> IntoIterator for &'a AttentionMaps {
    type Item = &'a AttentionMap;
    type IntoIter = std::slice::Iter<'a, AttentionMap>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// The attention of every block, in the order in which a block computes it.
struct Kept {
    blocks: Vec<Vec<Tensor>>,
}

impl Tap for Kept {
    fn attention(&mut self, probabilities: &Tensor) -> candle_core::Result<()> {
        if let Some(block) = self.blocks.last_mut() {
            block.push(probabilities.to_device(&Device::Cpu)?.squeeze(0)?); // [H, N, N]
        }
        Ok(())
    }

    fn block(&mut self, _index: usize, _tokens: &Tensor) -> candle_core::Result<bool> {
        self.blocks.push(Vec::new());
        Ok(true)
    }
}
