//! A file for each subcommand.

pub mod bench;
pub mod compare;
pub mod doctor;
pub mod embed;
pub mod eval;
pub mod explain;
pub mod forward;
pub mod inspect;
#[cfg(feature = "hub")]
pub mod models;
pub mod predict;
pub mod preprocess;
#[cfg(feature = "hub")]
pub mod pull;
pub mod similar;
pub mod summary;
