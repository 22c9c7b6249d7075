//! A text tower as the configuration of a library describes it.

use super::views::Views;
use crate::text::TextConfig;

/// What the configuration of a library says about a text tower.
pub(super) struct Described {
    pub config: TextConfig,
    /// The tensors, under the names of [`TextConfig::parameters`].
    pub weights: Views,
    /// The id to pad with if the tokeniser's files do not say.
    pub pad: Option<u32>,
    /// Whether it is a text tower alone.
    pub alone: bool,
}
