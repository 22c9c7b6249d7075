//! The built programs over the fixtures, a file per topic.

mod checkpoints;
mod commands;
mod containers;
mod digits;
mod eval;
mod exporters;
#[cfg(unix)]
mod external;
mod families;
mod folders;
mod forward;
mod guide;
#[cfg(feature = "hub")]
mod hub;
mod integrity;
mod library;
#[cfg(unix)]
mod limits;
mod onnx;
mod outputs;
mod parity;
mod pictures;
mod predict;
mod predictor;
mod process;
mod quantised;
mod readings;
#[cfg(target_os = "linux")]
mod resources;
mod robustness;
#[cfg(feature = "serve")]
mod serve;
mod similar;
mod sizes;
mod support;
mod two_tower;
