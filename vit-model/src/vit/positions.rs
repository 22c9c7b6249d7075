//! What attention reads about where tokens are: rotations, and biases by relative position.

use candle_core::{DType, Device, Result, Tensor};

use super::pos_embed::Resample;
use super::rel_pos;
use super::rope::Rotation;
use crate::config::{Config, RelPosBias};

/// The positions of the tokens of an image, as attention uses them.
#[derive(Clone, Debug, Default)]
pub(super) struct Positions {
    pub(super) rotation: Option<Rotation>,
    relative: Option<Relative>,
    /// The biases of the table that all blocks share, `[H, 1, N, N]`.
    shared: Option<Tensor>,
}

/// How a table of biases is read.
#[derive(Clone, Debug)]
struct Relative {
    /// The table's row for each pair of tokens, `[N·N]`.
    index: Tensor,
    from: [usize; 2],
    to: [usize; 2],
    how: Resample,
}

impl Positions {
    /// For images of a grid of patches, from a model's learned frequencies and its shared table. `how` says how tables for
    /// the model's own grid are resampled.
    pub(super) fn new(
        config: &Config,
        grid: [usize; 2],
        how: Resample,
        learned: [Option<&Tensor>; 2],
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let [freqs, table] = learned;
        let rotation = config.rope.as_ref().map(|rope| Rotation::new(config, rope, grid, freqs, dtype, device));
        let relative = match config.rel_pos_bias {
            RelPosBias::None => None,
            RelPosBias::Blocks | RelPosBias::Shared => {
                let index = rel_pos::index(grid);
                let index = Tensor::from_vec(index.clone(), index.len(), device)?;
                Some(Relative { index, from: config.grid(), to: grid, how })
            }
        };
        let mut positions = Self { rotation: rotation.transpose()?, relative, shared: None };
        positions.shared = positions.bias(table)?;
        Ok(positions)
    }

    /// The biases of a block `[H, 1, N, N]`: of its own table, or of the shared one.
    pub(super) fn bias(&self, table: Option<&Tensor>) -> Result<Option<Tensor>> {
        match (table, &self.relative) {
            (Some(table), Some(Relative { index, from, to, how })) => {
                Ok(Some(rel_pos::biases(&rel_pos::resample(table, *from, *to, *how)?, index)?))
            }
            _ => Ok(self.shared.clone()),
        }
    }
}
