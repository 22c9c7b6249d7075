//! Converts a Vision Transformer from any ONNX exporter to safetensors under timm's names.
//!
//! The graph is executed once over abstract values, so that every spelling of a module becomes the same expression; what
//! is recognised in the output's expression becomes a [`Config`](vit_model::Config) and named tensors, and the result is
//! proven by running the graph and the model on the same inputs.
//!
//! ```no_run
//! # fn main() -> vit_convert::Result<()> {
//! let model = vit_convert::convert("flowers.onnx", &vit_convert::Options::default())?;
//! println!("{} blocks", model.info().model.depth);
//! model.save("flowers.safetensors", vit_model::Format::Safetensors)?;
//! # Ok(())
//! # }
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(feature = "document-features", doc = "\n# Features\n")]
#![cfg_attr(feature = "document-features", doc = document_features::document_features!())]
#![forbid(unsafe_code)]

mod convert;
mod error;
mod explain;
mod import;
mod neighbours;
mod onnx;
mod preset;
pub mod process;
#[doc(hidden)]
pub mod program;
mod quantise;
pub mod signals;
#[cfg(test)]
mod tests;
mod verify;

pub use convert::{Converted, Options, Verify, convert, inspect, open, open_with};
pub use error::{Error, Result};
pub use import::spec::{Evidence, Imported, InputSpec, Module, OutputSpec, Provenance};
pub use preset::parse as preprocess;
pub use quantise::Moved;
pub use verify::{Error as VerifyError, Verified};
