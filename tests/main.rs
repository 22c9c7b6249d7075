//! The built programs over the fixtures, a file per topic.

mod commands;
mod digits;
mod evaluator;
mod forward;
mod library;
mod onnx;
mod parity;
mod predict;
mod process;
mod support;
