//! Looking on while a model runs: tokens after each block, attention maps.

use candle_core::{Result, Tensor};

/// Something that looks on while a model runs. Every method does nothing unless it is overridden, and `()` is the tap
/// that looks at nothing.
pub trait Tap {
    /// The attention probabilities `[B, H, N, N]` of the block that runs; a block with two attentions calls twice.
    fn attention(&mut self, _probabilities: &Tensor) -> Result<()> {
        Ok(())
    }

    /// The tokens `[B, N, D]` that left block `index`. `Ok(false)`: the rest is not needed, and the run stops here.
    fn block(&mut self, _index: usize, _tokens: &Tensor) -> Result<bool> {
        Ok(true)
    }
}

impl Tap for () {}
