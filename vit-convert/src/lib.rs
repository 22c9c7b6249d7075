//! Converts a Vision Transformer from any ONNX exporter to safetensors under timm's names.

pub mod axes;
pub mod eval;
pub mod explain;
pub mod expr;
pub mod graph;
pub mod onnx;
pub mod recognise;
pub mod spec;
pub mod verify;
pub mod write;
