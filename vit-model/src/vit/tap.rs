//! Observing a model while it runs: tokens after each block, attention maps, and what can be made of them.

use candle_core::{Result as CandleResult, Tensor};

use crate::{Config, Error, Result};

/// Observes a model while it runs. Every method does nothing unless it is overridden, and `()` observes nothing.
pub trait Tap {
    /// The tokens `[B, N, D]` that enter the first block.
    fn embedded(&mut self, _tokens: &Tensor) -> CandleResult<()> {
        Ok(())
    }

    /// The attention probabilities `[B, H, N, N]` of the current block. A block with two attentions calls it twice.
    fn attention(&mut self, _probabilities: &Tensor) -> CandleResult<()> {
        Ok(())
    }

    /// The output `[B, N, D]` of block `index`. Return `Ok(false)` to skip the remaining blocks.
    fn block(&mut self, _index: usize, _tokens: &Tensor) -> CandleResult<bool> {
        Ok(true)
    }
}

impl Tap for () {}

/// Attention rollout (arXiv 2005.00928): from each block's attention `A` `[N, N]`, averaged over heads, the product
/// over blocks of `(A + I) / 2`, `[N, N]`. It follows attention and the residual connections around it back to the
/// patches.
///
/// # Errors
/// No block, or matrices that are not square or differ in size.
pub fn rollout(blocks: &[Tensor]) -> Result<Tensor> {
    let mut product: Option<Tensor> = None;
    for attention in blocks {
        let identity = Tensor::eye(attention.dim(0)?, attention.dtype(), attention.device())?;
        let mixed = ((attention + identity)? * 0.5)?;
        product = Some(match product {
            Some(before) => mixed.matmul(&before)?,
            None => mixed,
        });
    }
    product.ok_or_else(|| Error::Input("a rollout over no blocks".into()))
}

/// How much the class token (or the mean over all tokens, if there is none) attends to each patch: attention `[N, N]` →
/// `[rows · columns]`.
///
/// # Errors
/// Attention over a number of tokens that the model does not have, or that is not f32.
pub fn per_patch(attention: &Tensor, config: &Config) -> Result<Vec<f32>> {
    let row = if config.class_token { attention.get(0)? } else { attention.mean(0)? };
    Ok(row.narrow(0, config.num_prefix_tokens(), config.num_patches())?.to_vec1()?)
}

/// A choice of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Blocks<'a> {
    /// All of them.
    All,
    /// The last few.
    Last(usize),
    /// These, counted from 0, or backwards from −1 for the last. Results are in the order of the blocks.
    At(&'a [isize]),
}

impl Blocks<'_> {
    /// The indices of the blocks, sorted and without duplicates.
    pub(crate) fn indices(self, depth: usize) -> Result<Vec<usize>> {
        let mut indices = match self {
            Self::All => (0..depth).collect(),
            Self::Last(n) if n > 0 && n <= depth => (depth - n..depth).collect(),
            Self::Last(n) => return Err(Error::Input(format!("the last {n} blocks of {depth}"))),
            Self::At(list) => {
                let absolute = |i: &isize| {
                    let index = if *i < 0 { depth.checked_add_signed(*i) } else { usize::try_from(*i).ok() };
                    let there = index.filter(|index| *index < depth);
                    there.ok_or_else(|| Error::Input(format!("block {i}, the model has {depth}")))
                };
                list.iter().map(absolute).collect::<Result<Vec<_>>>()?
            }
        };
        indices.sort_unstable();
        indices.dedup();
        if indices.is_empty() { Err(Error::Input("no block is requested".into())) } else { Ok(indices) }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::rollout;

    #[test]
    fn a_rollout_is_the_product_of_half_attention_half_identity() {
        let matrix = |rows: [[f32; 2]; 2]| Tensor::new(&rows, &Device::Cpu).unwrap();
        let blocks =
            [matrix([[0.0, 1.0], [0.5, 0.5]]), matrix([[1.0, 0.0], [0.0, 1.0]]), matrix([[0.0, 1.0], [1.0, 0.0]])];
        // by hand: the first is [[1/2, 1/2], [1/4, 3/4]], the second changes nothing, the third takes the mean of both rows
        let found = rollout(&blocks).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(found, [[0.375, 0.625], [0.375, 0.625]]);
        assert!(rollout(&[]).unwrap_err().to_string().contains("no blocks"));
    }
}
