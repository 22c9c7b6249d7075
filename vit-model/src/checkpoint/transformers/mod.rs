//! transformers' folders, read and written with one table of names.

mod names;
mod read;
#[cfg(test)]
mod tests;
pub(super) mod text;

mod write;

pub(super) use read::{Names, info};
#[cfg(feature = "hub")]
pub(crate) use text::may_have_texts;
pub(super) use write::folder;
