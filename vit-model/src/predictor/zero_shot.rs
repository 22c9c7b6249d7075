//! Zero-shot classification: classes that are words, and images that are compared with them.

use std::sync::Arc;

#[cfg(feature = "image")]
use super::ahead::EmbedAll;
#[cfg(feature = "image")]
use super::input::Input;
use super::loaded::Loaded;
#[cfg(feature = "image")]
use crate::labels::{Prediction, answers, top_k};
use crate::text::{Similarity, TextModel};
use crate::{Error, Result};

/// A classifier whose classes are words; made by [`Predictor::zero_shot`](super::Predictor::zero_shot).
pub struct ZeroShot<'p> {
    #[cfg_attr(not(feature = "image"), allow(dead_code))]
    model: &'p Loaded,
    text: Arc<TextModel>,
    labels: Vec<String>,
    /// A vector of length 1 for each label.
    classes: Vec<Vec<f32>>,
}

impl std::fmt::Debug for ZeroShot<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ZeroShot").field("labels", &self.labels).finish_non_exhaustive()
    }
}

impl<'p> ZeroShot<'p> {
    pub(super) fn new(model: &'p Loaded, labels: &[impl AsRef<str>], templates: &[impl AsRef<str>]) -> Result<Self> {
        let text = model.text()?;
        let width = model.embedding_len();
        if text.config().output_dim() != width {
            let found = text.config().output_dim();
            return Err(Error::unsupported(format!("texts have embeddings of {found} values, images of {width}")));
        }
        text.scale_and_bias()?;
        let classes = text.classes(labels, templates)?;
        Ok(Self { model, text, labels: labels.iter().map(|label| label.as_ref().to_owned()).collect(), classes })
    }

    /// The names of the classes.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// A vector of length 1 for each class: what images are compared with.
    pub fn classes(&self) -> &[Vec<f32>] {
        &self.classes
    }

    /// What becomes of the logits: a softmax (CLIP) or a sigmoid for each class (SigLIP).
    pub fn similarity(&self) -> Similarity {
        self.text.similarity()
    }

    /// The logits of an image by its embedding, as [`Predictor::embed`](super::Predictor::embed) gives it.
    ///
    /// # Errors
    /// [`Error::Input`] for another number of values.
    pub fn logits(&self, embedding: &[f32]) -> Result<Vec<f32>> {
        self.text.logits_of(embedding, &self.classes)
    }
}

#[cfg(feature = "image")]
impl ZeroShot<'_> {
    /// The `k` most probable classes of an image, the most probable first.
    ///
    /// # Errors
    /// As [`Predictor::embed`](super::Predictor::embed).
    pub fn classify<'a>(&self, input: impl Into<Input<'a>>, k: usize) -> Result<Vec<Prediction>> {
        self.predictions(&self.model.embed(input.into())?, k)
    }

    /// The `k` most probable classes of every input, in order, as [`Predictor::classify_all`](super::Predictor::classify_all)
    /// answers.
    pub fn classify_all<'a, I>(&self, inputs: I, k: usize) -> ZeroShotAll<'_, I::IntoIter>
    where
        I: IntoIterator<Item: Into<Input<'a>>>,
    {
        ZeroShotAll { classifier: self, embeddings: EmbedAll::new(self.model, inputs.into_iter()), k }
    }

    fn predictions(&self, embedding: &[f32], k: usize) -> Result<Vec<Prediction>> {
        let logits = self.logits(embedding)?;
        let probabilities = match self.similarity() {
            Similarity::Softmax => crate::labels::softmax(&logits)?,
            Similarity::Sigmoid => crate::labels::sigmoid(&logits)?,
        };
        Ok(answers(top_k(&logits, k), &logits, &probabilities, Some(&self.labels)))
    }
}

/// The classes of each input; made by [`ZeroShot::classify_all`].
#[cfg(feature = "image")]
#[must_use = "iterators do nothing until they are asked for an item"]
pub struct ZeroShotAll<'z, I> {
    classifier: &'z ZeroShot<'z>,
    embeddings: EmbedAll<'z, I>,
    k: usize,
}

#[cfg(feature = "image")]
impl<I: Iterator> ZeroShotAll<'_, I> {
    /// How many images the model runs at once. Twice as many are in memory as tensors.
    pub fn batch(mut self, images: usize) -> Self {
        self.embeddings = self.embeddings.batch(images);
        self
    }
}

#[cfg(feature = "image")]
impl<'a, I: Iterator<Item: Into<Input<'a>>>> Iterator for ZeroShotAll<'_, I> {
    type Item = Result<Vec<Prediction>>;

    fn next(&mut self) -> Option<Self::Item> {
        let embedding = self.embeddings.next()?;
        Some(embedding.and_then(|embedding| self.classifier.predictions(&embedding, self.k)))
    }
}

#[cfg(feature = "image")]
impl<'a, I: Iterator<Item: Into<Input<'a>>>> std::iter::FusedIterator for ZeroShotAll<'_, I> {}
