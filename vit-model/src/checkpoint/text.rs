//! [`TextSource`]: the text tower in a folder, opened when it is first asked for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use serde_json::Value;

use super::described::Described;
use super::transformers::text;
use crate::text::{TextModel, TextTransformer, Tokenizer};
use crate::{Error, Result, Weights};

/// The text tower of a model on disk. It is read by [`load`](Self::load), so that a model whose texts cannot be used can still
/// be used for images.
pub struct TextSource {
    folder: PathBuf,
    config: Value,
    weights: Arc<dyn Weights>,
}

impl std::fmt::Debug for TextSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextSource").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl TextSource {
    /// The text tower that transformers' config.json describes, if it describes one.
    pub(super) fn transformers(folder: &Path, config: &Value, weights: &Arc<dyn Weights>) -> Option<Self> {
        text::is(config, weights.tensors()).then(|| Self {
            folder: folder.into(),
            config: config.clone(),
            weights: weights.clone(),
        })
    }

    /// Reads the tokeniser and the tower, which runs in f32 on a device.
    ///
    /// # Errors
    /// [`Error::File`] if the folder has no tokeniser or one that cannot be used; [`Error::Config`] and [`Error::Tensor`] if
    /// the tower cannot be used; a lack of memory.
    pub fn load(&self, device: &Device) -> Result<TextModel> {
        let described = text::describe(&self.config, &self.weights).map_err(|error| error.within(&self.folder))?;
        let Described { config, weights, pad, alone } = described;
        let tokenizer = Tokenizer::open(&self.folder, config.context_length, pad)?;
        let number = |name: &str| -> Result<Option<f32>> {
            let Some(_) = self.weights.tensors().get(name) else { return Ok(None) };
            match self.weights.read_f32(name)?.as_slice() {
                [number] => Ok(Some(*number)),
                numbers => Err(Error::tensor(name, format!("expected one number, found {}", numbers.len()))),
            }
        };
        let logits = || {
            let scale = match number("logit_scale")? {
                Some(scale) => scale,
                None if alone => return Ok(None),
                None => return Err(Error::missing("logit_scale")),
            };
            Ok(Some((scale, number("logit_bias")?.unwrap_or(0.0))))
        };
        let tower = TextTransformer::from_weights(&config, &weights, device);
        let (tower, logits) =
            (tower.map_err(|e| e.within(&self.folder))?, logits().map_err(|e| e.within(&self.folder))?);
        Ok(TextModel::new(tokenizer, tower, logits))
    }
}
