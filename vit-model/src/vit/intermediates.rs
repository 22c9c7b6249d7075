//! Tokens that leave the blocks of a model, and their attention maps.

use candle_core::{Result as CandleResult, Tensor};

use super::VisionTransformer;
use super::tap::{Blocks, Tap};
use crate::Result;

/// The shape of intermediate patch tokens (timm's `output_fmt`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FeatureFormat {
    /// `[B, D, rows, columns]`, as a convolutional network's features.
    #[default]
    Nchw,
    /// `[B, patches, D]`.
    Nlc,
}

/// What happens to intermediate tokens before they are returned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FinalNorm {
    /// They are returned as they left the block.
    #[default]
    Skip,
    /// The model's final norm is applied to them (timm's `norm=True`).
    Apply,
}

/// Which blocks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    All,
    /// None after the last one that is requested.
    ToLastWanted,
}

/// The tokens that left a block.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Intermediate {
    /// The block's index, counted from 0.
    pub block: usize,
    /// Patch tokens, in the [`FeatureFormat`] that was requested.
    pub patches: Tensor,
    /// Class, distillation and register tokens `[B, P, D]`, if the model has any.
    pub prefix: Option<Tensor>,
}

/// Keeps the tokens of some blocks.
struct Keep {
    wanted: Vec<usize>,
    kept: Vec<(usize, Tensor)>,
    /// Whether to stop after the last wanted block.
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
    /// `forward_intermediates`).
    ///
    /// # Errors
    /// A block that the model does not have, or an input that [`forward`](Self::forward) refuses.
    pub fn forward_intermediates(
        &self,
        x: &Tensor,
        blocks: Blocks<'_>,
        norm: FinalNorm,
        format: FeatureFormat,
    ) -> Result<(Tensor, Vec<Intermediate>)> {
        self.intermediates(x, blocks, norm, format, Run::All)
    }

    /// Like [`forward_intermediates`](Self::forward_intermediates), without the final tokens, so that blocks after the
    /// last requested one do not run (`get_intermediate_layers` in timm and DINO).
    ///
    /// # Errors
    /// As [`forward_intermediates`](Self::forward_intermediates).
    pub fn get_intermediate_layers(
        &self,
        x: &Tensor,
        blocks: Blocks<'_>,
        norm: FinalNorm,
        format: FeatureFormat,
    ) -> Result<Vec<Intermediate>> {
        self.intermediates(x, blocks, norm, format, Run::ToLastWanted).map(|(_, intermediates)| intermediates)
    }

    fn intermediates(
        &self,
        x: &Tensor,
        blocks: Blocks<'_>,
        norm: FinalNorm,
        format: FeatureFormat,
        run: Run,
    ) -> Result<(Tensor, Vec<Intermediate>)> {
        let mut keep = Keep { wanted: blocks.indices(self.depth())?, kept: Vec::new(), stop: run == Run::ToLastWanted };
        let last = self.forward_tapped(x, &mut keep)?;
        let (_, _, h, w) = x.dims4()?;
        let [rows, columns] = [h / self.config.patch_size[0], w / self.config.patch_size[1]];
        let prefix = self.config.num_prefix_tokens();
        let part = |(block, tokens): (usize, Tensor)| {
            let tokens = if norm == FinalNorm::Apply { self.norm(&tokens)? } else { tokens };
            let (b, n, dim) = tokens.dims3()?;
            let patches = tokens.narrow(1, prefix, n - prefix)?.contiguous()?; // [B, rows·columns, D]
            let patches = match format {
                FeatureFormat::Nlc => patches,
                FeatureFormat::Nchw => patches.reshape((b, rows, columns, dim))?.permute((0, 3, 1, 2))?.contiguous()?,
            };
            let prefix = (prefix > 0).then(|| tokens.narrow(1, 0, prefix)?.contiguous()).transpose()?;
            Ok(Intermediate { block, patches, prefix })
        };
        Ok((last, keep.kept.into_iter().map(part).collect::<Result<_>>()?))
    }

    /// The attention probabilities `[B, H, N, N]` of every block, prefix tokens first. Row i is the distribution over
    /// the tokens that token i attends to.
    ///
    /// A block with two attentions returns two maps. For differential attention a map is the difference of both
    /// attentions, so its rows do not sum to 1.
    ///
    /// # Errors
    /// An input that [`forward`](Self::forward) refuses.
    pub fn attention_maps(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut maps = Maps::default();
        self.forward_tapped(x, &mut maps)?;
        Ok(maps.0)
    }
}
