//! The blocks of a model, wired as its [`BlockKind`](crate::BlockKind) says.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::attention::Attention;
use super::mlp::Mlp;
use super::norm::Norm;
use super::parallel::{DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock};
use super::positions::Positions;
use super::scale::{LayerScale, scale_if_any};
use super::tap::Tap;
use crate::config::Config;
use crate::layers;

/// `x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`.
#[derive(Clone, Debug)]
pub(super) struct StandardBlock {
    norm1: Norm,
    attn: Attention,
    ls1: Option<LayerScale>,
    norm2: Norm,
    mlp: Mlp,
    ls2: Option<LayerScale>,
}

impl StandardBlock {
    fn read(layers: &layers::StandardBlock, config: &Config, index: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            norm1: Norm::read(&layers.norm1, vb)?,
            attn: Attention::read(&layers.attn, config, index, vb)?,
            ls1: LayerScale::read_if_any(layers.ls1.as_ref(), vb)?,
            norm2: Norm::read(&layers.norm2, vb)?,
            mlp: Mlp::read(&layers.mlp, config.act, vb)?,
            ls2: LayerScale::read_if_any(layers.ls2.as_ref(), vb)?,
        })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor, positions: &Positions, tap: &mut dyn Tap) -> Result<Tensor> {
        let attended = self.attn.forward(&self.norm1.forward(x)?, positions, tap)?;
        let x = (x + scale_if_any(self.ls1.as_ref(), attended)?)?;
        let hidden = self.mlp.forward(&self.norm2.forward(&x)?)?;
        &x + scale_if_any(self.ls2.as_ref(), hidden)?
    }
}

/// `x + norm1(attn(x))`, then `x + norm2(mlp(x))`.
#[derive(Clone, Debug)]
pub(super) struct ResPostBlock {
    attn: Attention,
    norm1: Norm,
    mlp: Mlp,
    norm2: Norm,
}

impl ResPostBlock {
    fn read(layers: &layers::ResPostBlock, config: &Config, index: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            attn: Attention::read(&layers.attn, config, index, vb)?,
            norm1: Norm::read(&layers.norm1, vb)?,
            mlp: Mlp::read(&layers.mlp, config.act, vb)?,
            norm2: Norm::read(&layers.norm2, vb)?,
        })
    }

    /// `[B, N, D] → [B, N, D]`
    fn forward(&self, x: &Tensor, positions: &Positions, tap: &mut dyn Tap) -> Result<Tensor> {
        let x = (x + self.norm1.forward(&self.attn.forward(x, positions, tap)?)?)?;
        &x + self.norm2.forward(&self.mlp.forward(&x)?)?
    }
}

/// A block of the model's kind.
#[derive(Clone, Debug)]
// a model has few blocks, all of the same kind, so padding the smaller kinds costs nothing
#[allow(clippy::large_enum_variant)]
pub(super) enum Block {
    Standard(StandardBlock),
    ResPost(ResPostBlock),
    ParallelScaling(ParallelScalingBlock),
    ParallelThings(ParallelThingsBlock),
    DiffParallelScaling(DiffParallelScalingBlock),
}

impl Block {
    /// Block `index` of a model.
    pub(super) fn read(block: &layers::Block, config: &Config, index: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        use layers::Block;
        Ok(match block {
            Block::Standard(block) => Self::Standard(StandardBlock::read(block, config, index, vb)?),
            Block::ResPost(block) => Self::ResPost(ResPostBlock::read(block, config, index, vb)?),
            Block::ParallelScaling(block) => Self::ParallelScaling(ParallelScalingBlock::read(block, config, vb)?),
            Block::ParallelThings(block) => Self::ParallelThings(ParallelThingsBlock::read(block, config, index, vb)?),
            Block::DiffParallelScaling(block) => {
                Self::DiffParallelScaling(DiffParallelScalingBlock::read(block, config, index, vb)?)
            }
        })
    }

    /// `[B, N, D] → [B, N, D]`
    pub(super) fn forward(&self, x: &Tensor, positions: &Positions, tap: &mut dyn Tap) -> Result<Tensor> {
        match self {
            Self::Standard(block) => block.forward(x, positions, tap),
            Self::ResPost(block) => block.forward(x, positions, tap),
            Self::ParallelScaling(block) => block.forward(x, tap),
            Self::ParallelThings(block) => block.forward(x, positions, tap),
            Self::DiffParallelScaling(block) => block.forward(x, tap),
        }
    }

    /// Resamples the block's table of biases by relative position, if it has one.
    pub(super) fn resize(&mut self, resample: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        match self {
            Self::Standard(block) => block.attn.resize(resample),
            Self::ResPost(block) => block.attn.resize(resample),
            Self::ParallelScaling(_) | Self::ParallelThings(_) | Self::DiffParallelScaling(_) => Ok(()),
        }
    }
}
