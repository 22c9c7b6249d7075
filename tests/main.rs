//! The built programs over the fixtures, a file per topic.

mod checkpoints;
mod commands;
mod digits;
mod evaluator;
mod exporters;
#[cfg(unix)]
mod external;
mod families;
mod folders;
mod forward;
#[cfg(feature = "hub")]
mod hub;
mod integrity;
mod library;
mod mutation;
mod onnx;
mod parity;
mod predict;
mod process;
mod quantised;
mod robustness;
mod support;
