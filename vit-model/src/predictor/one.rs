//! Answers for one input, and what of a model's output an answer is.

use super::input::Input;
use super::loaded::Loaded;
use super::modules::Wanted;
use crate::cpu::Output;
use crate::text::normalized;
use crate::{Error, Result};

impl Loaded {
    /// An input as the model reads it, in memory of its own.
    pub fn read(&self, input: Input<'_>) -> Result<Vec<f32>> {
        let mut pixels = vec![0.0; self.image_len()];
        self.read_into(input, &mut pixels)?;
        Ok(pixels)
    }

    /// What the model answers to one input.
    pub fn answer(&self, input: Input<'_>, wanted: Wanted) -> Result<Output> {
        let mut output = Output::default();
        let pixels = self.read(input)?;
        self.forward_into(&pixels, 1, wanted, &mut output)?;
        self.check(&pixels, 1, &output)?;
        Ok(output)
    }

    /// The embedding of one input.
    pub fn embed(&self, input: Input<'_>) -> Result<Vec<f32>> {
        let wanted = self.embedding_wanted();
        let output = self.answer(input, wanted)?;
        embedding(answered(&output, wanted), false)
    }
}

/// What the head would read, divided by its length if asked for.
pub(super) fn embedding(features: &[f32], normalize: bool) -> Result<Vec<f32>> {
    if !features.iter().all(|f| f.is_finite()) {
        return Err(Error::Output("the model answers values that are not finite".into()));
    }
    Ok(if normalize { normalized(features) } else { features.to_vec() })
}

/// The values that were wanted, in rows.
pub(super) fn answered(output: &Output, wanted: Wanted) -> &[f32] {
    match wanted {
        Wanted::Logits => output.logits.as_deref().unwrap_or_default(),
        _ => &output.pre_logits,
    }
}
