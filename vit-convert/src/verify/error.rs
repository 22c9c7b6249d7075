//! Why a conversion is not proven.

use super::difference::{Difference, short};
use super::run::Error as RunError;

/// Why a conversion is not proven.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The graph could not be evaluated.
    #[error("the graph cannot be evaluated: {0}")]
    Run(#[from] RunError),
    /// The graph takes or gives something that a Vision Transformer does not.
    #[error("{0}")]
    Graph(String),
    /// The converted model answers differently.
    #[error(
        "output `{output}` differs from the converted model's {answer} by {} ({} of its largest magnitude, at most {tolerance:e} \
         is rounding); {place}. This is a bug of the converter: please report it with the file; --no-verify skips this check",
        short(difference.abs), short(difference.rel)
    )]
    Differs {
        /// The graph's output.
        output: String,
        /// The closest of the model's answers.
        answer: String,
        /// How far they are apart.
        difference: Difference,
        /// What was allowed, relative.
        tolerance: f64,
        /// The first block whose tokens diverge, in words.
        place: String,
    },
    /// The converted model could not be run.
    #[error(transparent)]
    Model(#[from] vit_model::Error),
}
