//! [`Checkpoint`]: a document and weights that fit each other.

use std::sync::Arc;

use candle_core::{DType, Device};

use super::text::TextSource;
use crate::{Config, Error, ModelInfo, Result, TensorProblem, VisionTransformer, layers::parameters, weights::Weights};

/// A document and the weights to build a model from, on any device, with candle's modules or the CPU engine.
#[derive(Clone)]
#[non_exhaustive]
pub struct Checkpoint {
    /// Architecture, preprocessing, labels and origin.
    pub info: ModelInfo,
    /// The tensors, with timm's names.
    pub weights: Arc<dyn Weights>,
    /// The text tower of a two-tower model.
    pub(super) text: Option<Arc<TextSource>>,
    /// What reading the file took, in sentences.
    remarks: Vec<String>,
    /// The size that the position embeddings were stored for, and the weights with them, if they were resampled: another size
    /// starts from these again.
    pub(super) stored: Option<([usize; 2], Arc<dyn Weights>)>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Combines a document with weights.
    ///
    /// # Errors
    /// If the document is not valid, or if a tensor is missing, left over or has another shape than the architecture implies.
    pub fn new(info: ModelInfo, weights: Arc<dyn Weights>) -> Result<Self> {
        info.validate()?;
        check(&info.model, weights.as_ref())?;
        Ok(Self { info, weights, text: None, remarks: Vec::new(), stored: None })
    }

    /// What reading the file took, for those who ask: which of several state dicts it is, prefixes that were taken off the
    /// names of tensors, parts that only matter in training and were left out.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// Adds [`remarks`](Self::remarks), and assumptions to those of the document.
    pub(super) fn with_notes(mut self, remarks: Vec<String>, assumed: Vec<String>) -> Self {
        self.remarks.extend(remarks);
        self.info = assumed.into_iter().fold(self.info, ModelInfo::assuming);
        self
    }

    /// Architecture, preprocessing, labels and origin.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.info.model
    }

    /// The tensors, with timm's names.
    pub fn weights(&self) -> &Arc<dyn Weights> {
        &self.weights
    }

    /// The text tower, if the model has one beside its image tower (CLIP, SigLIP).
    pub fn text(&self) -> Option<&Arc<TextSource>> {
        self.text.as_ref()
    }

    /// Whether images are embedded into a space that they share with texts (CLIP, SigLIP), so that the model alone names no
    /// classes.
    pub fn is_two_tower(&self) -> bool {
        self.text.is_some() || self.info.projection
    }

    /// The same with a text tower.
    pub(super) fn with_text(self, text: Option<TextSource>) -> Self {
        Self { text: text.map(Arc::new), ..self }
    }

    /// Builds the model from candle's modules.
    ///
    /// # Errors
    /// If the file can no longer be read, a weight is not finite, or there is not enough memory.
    pub fn model(&self, dtype: DType, device: &Device) -> Result<VisionTransformer> {
        VisionTransformer::from_weights(&self.info.model, self.weights.as_ref(), dtype, device)
    }
}

/// Compares the names and shapes of all tensors with those that an architecture implies.
///
/// # Errors
/// If a tensor has another shape, or if tensors are missing or left over. The message lists missing and left-over tensors
/// together.
pub fn check(config: &Config, weights: &dyn Weights) -> Result<()> {
    let expected = parameters(config)?;
    let found = weights.tensors();
    let list = |names: &[&str]| {
        let shown = names.iter().take(5).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        match names.len().saturating_sub(5) {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    };
    for (name, shape) in &expected {
        if let Some(info) = found.get(name).filter(|info| info.shape != *shape) {
            return Err(Error::problem(
                name,
                TensorProblem::Shape,
                format!("expected the shape {shape:?}, found {:?}", info.shape),
            ));
        }
    }
    let missing: Vec<_> = expected.keys().filter(|name| !found.contains_key(*name)).map(String::as_str).collect();
    let left: Vec<_> = found.keys().filter(|name| !expected.contains_key(*name)).map(String::as_str).collect();
    let why = match (missing.as_slice(), left.as_slice()) {
        ([], []) => return Ok(()),
        (missing, []) => format!("missing: {}", list(missing)),
        ([], left) => format!("left over: {}", list(left)),
        (missing, left) => format!("missing: {}; left over: {}", list(missing), list(left)),
    };
    let name = missing.first().or(left.first()).copied().unwrap_or_default();
    let problem = if missing.is_empty() { TensorProblem::LeftOver } else { TensorProblem::Missing };
    Err(Error::problem(name, problem, format!("the tensors are not those of the configured architecture; {why}")))
}
