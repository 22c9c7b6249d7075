//! Opens a file or folder as a [`Checkpoint`]: a document, and weights with timm's names. Every name and shape is checked.

// the files of this module parse untrusted input
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

pub mod atomic;
mod baked;
mod bare;
pub mod checksum;
mod class_names;
mod computed;
mod described;
mod document;
mod element;
pub(crate) mod folder;
pub mod gguf;
mod model;
mod open;
mod open_clip;
mod original;
mod peft;
mod pickle;
mod prefix;
pub(crate) mod preprocess_config;
mod quantised;
mod resized;
pub mod safetensors;
mod save;
mod scaled;
mod stored;
mod text;
mod timm;
mod torchvision;
mod trainable;
mod transformers;
mod views;
mod writer;
mod written;

#[cfg(feature = "digits")]
pub use open::DIGITS;
#[cfg(feature = "hub")]
pub(crate) use {folder::is_text_tower, transformers::may_have_texts};
pub use {
    model::{Checkpoint, check},
    open::{OpenOptions, info, open, torchvision},
    save::{Format, SaveOptions, Values, save_tensors},
    text::TextSource,
    written::Existing,
};
