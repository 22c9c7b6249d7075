//! Looking on while a model runs: tokens after each block, attention maps.

use candle_core::{Result as CandleResult, Tensor};

use crate::{Config, Error, Result, VisionTransformer};

/// Something that looks on while a model runs. Every method does nothing unless it is overridden, and `()` is the tap
/// that looks at nothing.
pub trait Tap {
    /// The attention probabilities `[B, H, N, N]` of the block that runs; a block with two attentions calls twice.
    fn attention(&mut self, _probabilities: &Tensor) -> CandleResult<()> {
        Ok(())
    }

    /// The tokens `[B, N, D]` that left block `index`. `Ok(false)`: the rest is not needed, and the run stops here.
    fn block(&mut self, _index: usize, _tokens: &Tensor) -> CandleResult<bool> {
        Ok(true)
    }
}

impl Tap for () {}

/// Attention rollout (arXiv 2005.00928): each block's attention, mean over its heads, `[N, N]` → the product over blocks of
/// `(A + I) / 2`, `[N, N]`, which follows the attention and the residual paths around it from the tokens to the patches.
///
/// # Errors
/// No block; matrices that are not square or not of one size.
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

/// What the class token (without one, the mean token) takes from each patch: of attention `[N, N]`, `[rows · columns]`.
///
/// # Errors
/// Attention of another number of tokens than the model has, or not f32.
pub fn per_patch(attention: &Tensor, config: &Config) -> Result<Vec<f32>> {
    let row = if config.class_token { attention.get(0)? } else { attention.mean(0)? };
    Ok(row.narrow(0, config.num_prefix_tokens(), config.num_patches())?.to_vec1()?)
}

/// Which blocks to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks<'a> {
    /// All of them.
    All,
    /// The last few.
    Last(usize),
    /// These, counted from 0, or from −1 at the end. Answers come in the order of the blocks.
    At(&'a [isize]),
}

impl Blocks<'_> {
    /// Sorted indices of blocks, each once.
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
        if indices.is_empty() { Err(Error::Input("no block is asked for".into())) } else { Ok(indices) }
    }
}

/// The shape of intermediate patch tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// `[B, D, rows, columns]`, as a convolutional network's features.
    #[default]
    Nchw,
    /// `[B, patches, D]`.
    Nlc,
}

/// The tokens that left a block.
#[derive(Clone, Debug)]
pub struct Intermediate {
    /// The block, counted from 0.
    pub block: usize,
    /// Patch tokens, in the [`Layout`] that was asked for.
    pub patches: Tensor,
    /// Class, distillation and register tokens `[B, P, D]`, where the model has any.
    pub prefix: Option<Tensor>,
}

/// Keeps the tokens of some blocks.
struct Keep {
    wanted: Vec<usize>,
    kept: Vec<(usize, Tensor)>,
    /// Nothing after the last wanted block is needed.
    stop: bool,
}

impl Tap for Keep {
    fn block(&mut self, index: usize, tokens: &Tensor) -> CandleResult<bool> {
        if self.wanted.contains(&index) {
            self.kept.push((index, tokens.clone()));
        }
        Ok(!(self.stop && self.kept.len() == self.wanted.len()))
    }
}

/// Keeps attention maps.
#[derive(Default)]
struct Maps(Vec<Tensor>);

impl Tap for Maps {
    fn attention(&mut self, probabilities: &Tensor) -> CandleResult<()> {
        self.0.push(probabilities.contiguous()?);
        Ok(())
    }
}

impl VisionTransformer {
    /// The final tokens of [`forward_features`](Self::forward_features), and the tokens that left some blocks (timm's
    /// `forward_intermediates`). With `norm` the model's final norm is applied to each.
    ///
    /// # Errors
    /// Blocks that the model has not; what [`forward`](Self::forward) refuses.
    pub fn forward_intermediates(
        &self,
        x: &Tensor,
        blocks: Blocks<'_>,
        norm: bool,
        layout: Layout,
    ) -> Result<(Tensor, Vec<Intermediate>)> {
        self.intermediates(x, blocks, norm, layout, false)
    }

    /// As [`forward_intermediates`](Self::forward_intermediates) without the final tokens: blocks after the last one that is
    /// asked for do not run (timm's and DINO's `get_intermediate_layers`).
    ///
    /// # Errors
    /// As there.
    pub fn get_intermediate_layers(
        &self,
        x: &Tensor,
        blocks: Blocks<'_>,
        norm: bool,
        layout: Layout,
    ) -> Result<Vec<Intermediate>> {
        self.intermediates(x, blocks, norm, layout, true).map(|(_, intermediates)| intermediates)
    }

    fn intermediates(
        &self,
        x: &Tensor,
        blocks: Blocks<'_>,
        norm: bool,
        layout: Layout,
        stop: bool,
    ) -> Result<(Tensor, Vec<Intermediate>)> {
        let mut keep = Keep { wanted: blocks.indices(self.depth())?, kept: Vec::new(), stop };
        let last = self.forward_tapped(x, &mut keep)?;
        let (_, _, h, w) = x.dims4()?;
        let [rows, columns] = [h / self.config.patch_size[0], w / self.config.patch_size[1]];
        let prefix = self.config.num_prefix_tokens();
        let part = |(block, tokens): (usize, Tensor)| {
            let tokens = if norm { self.norm(&tokens)? } else { tokens };
            let (b, n, dim) = tokens.dims3()?;
            let patches = tokens.narrow(1, prefix, n - prefix)?.contiguous()?; // [B, rows·columns, D]
            let patches = match layout {
                Layout::Nlc => patches,
                Layout::Nchw => patches.reshape((b, rows, columns, dim))?.permute((0, 3, 1, 2))?.contiguous()?,
            };
            let prefix = (prefix > 0).then(|| tokens.narrow(1, 0, prefix)?.contiguous()).transpose()?;
            Ok(Intermediate { block, patches, prefix })
        };
        Ok((last, keep.kept.into_iter().map(part).collect::<Result<_>>()?))
    }

    /// The attention probabilities `[B, H, N, N]` of every block, prefix tokens first; row i is what token i looks at.
    ///
    /// A block with two attentions side by side gives two maps. A map of differential attention is the difference, whose
    /// rows do not sum to 1.
    ///
    /// # Errors
    /// What [`forward`](Self::forward) refuses.
    pub fn attention_maps(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut maps = Maps::default();
        self.forward_tapped(x, &mut maps)?;
        Ok(maps.0)
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
