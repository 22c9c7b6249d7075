//! Converts a Vision Transformer from any ONNX exporter to safetensors under timm's names.

pub mod array;
pub mod axes;
mod error;
pub mod eval;
pub mod explain;
pub mod expr;
pub mod graph;
pub mod import;
mod map;
pub mod onnx;
pub mod recognise;
pub mod save;
pub mod spec;
pub mod verify;
pub mod write;

pub use error::{Error, Result};
pub use import::import;
pub use spec::Imported;
