//! What a proof says: how far the answers were apart, on how many images, and what was compared.

use std::collections::BTreeMap;

use vit_model::{Distance, Verification};

use super::difference::short;

/// How a conversion was proven.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Verified {
    /// Largest absolute difference over all outputs.
    pub max_abs: f64,
    /// Largest difference relative to an output's largest magnitude.
    pub max_rel: f64,
    /// What `max_rel` was allowed to be.
    pub tolerance: f64,
    /// Images tried.
    pub inputs: usize,
    /// What evaluated the graph.
    pub evaluator: String,
    /// Graph output → the model's answer that it equals.
    pub outputs: BTreeMap<String, String>,
    /// Graph outputs that are not answers of a Vision Transformer, such as attention maps.
    pub not_compared: Vec<String>,
    /// If the file stores halves or integers: how far its own answers are from the model's, absolute and relative.
    pub approximation: Option<(f64, f64)>,
}

impl Verified {
    /// The record for the written file.
    pub(crate) fn record(&self) -> Verification {
        let far = Distance::new(self.max_abs, self.max_rel);
        let proof = Verification::new()
            .with_proof(far, self.tolerance, self.inputs, &self.evaluator)
            .with_outputs(&self.outputs, &self.not_compared);
        match self.approximation {
            Some((abs, rel)) => proof.with_approximation(Distance::new(abs, rel)),
            None => proof,
        }
    }
}

impl std::fmt::Display for Verified {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (abs, rel) = (short(self.max_abs), short(self.max_rel));
        write!(f, "{} images: largest difference {abs}, relative {rel} (allowed {:e})", self.inputs, self.tolerance)?;
        if let Some((abs, rel)) = self.approximation {
            let (abs, rel) = (short(abs), short(rel));
            write!(f, "; the file's own rounding moves its answers by {abs}, relative {rel}")?;
        }
        if !self.not_compared.is_empty() {
            write!(f, "; not compared: {}", self.not_compared.join(", "))?;
        }
        Ok(())
    }
}
