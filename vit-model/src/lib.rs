//! Vision Transformers in Rust: timm's whole family, with a fast CPU engine, candle modules for GPUs and training, exact
//! preprocessing, and checkpoints of timm, transformers and `vit-convert` loaded as they are.
//!
//! ```
//! use vit_model::Predictor;
//!
//! # #[cfg(all(feature = "image", feature = "digits"))]
//! # fn main() -> vit_model::Result<()> {
//! # let (image, images) = ("../weights/digits/samples/3.png", ["../weights/digits/samples/8.png"]);
//! let model = Predictor::open("digits")?; // or a file, a folder, a short name, an id on the Hub
//! for class in model.classify(image, 3)? {
//!     println!("{:6.2} %  {}", class.probability * 100.0, class.label);
//! }
//! for vector in model.embed_all(images).batch(32).normalize() {
//!     println!("{} features", vector?.len());
//! }
//! let attention = model.attention(image)?.rollout()?; // [N, N]
//! # assert_eq!(attention.len(), 65 * 65);
//! # Ok(())
//! # }
//! # #[cfg(not(all(feature = "image", feature = "digits")))]
//! # fn main() {}
//! ```
//!
//! - [`Predictor`] is the front door: images or tensors in, answers out. [`predictor`] has its options and results.
//! - [`Checkpoint`] is a model on disk: its [`ModelInfo`] and its [`Weights`]. [`checkpoint`] has the formats.
//! - [`VisionTransformer`] is the network in candle modules, to train ([`vit::finetune`]), to look into ([`vit::tap`]) and to
//!   run at other image sizes ([`vit::pos_embed`]).
//! - [`Config`] is an architecture as data; [`names`] knows timm's.
//! - [`text`] is the other half of a two-tower model (CLIP, SigLIP): texts in, embeddings out, for zero-shot classification.
//! - [`similar`] finds the nearest of many embeddings; [`metrics`] measures a classifier.
//! - [`mod@image`] reads images and turns them into a model's input; [`labels`] names classes.
//! - [`Error`] tells kinds of failure apart.
//!
//! [`candle`], [`candle_nn`] and [`image_crate`] are the crates whose types appear in this API, so that a program need not
//! depend on the same versions itself.

#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(feature = "document-features", doc = "\n# Features\n")]
#![cfg_attr(feature = "document-features", doc = document_features::document_features!())]

pub mod checkpoint;
#[doc(hidden)]
pub mod command_line;
pub mod config;
mod cpu;
mod device;
mod error;
mod files;
#[cfg(feature = "hub")]
pub mod hub;
#[cfg(feature = "image")]
pub mod image;
mod imagenet;
mod info;
#[doc(hidden)]
pub mod inputs;
mod json;
pub mod labels;
pub mod layers;
pub mod limits;
mod memory;
pub mod metrics;
pub mod names;
mod precision;
pub mod predictor;
mod preprocessing;
#[doc(hidden)]
pub mod printable;
#[doc(hidden)]
pub mod random;
pub mod resolve;
pub mod similar;
pub mod text;
mod vectorize;
pub mod vit;
pub mod weights;

#[cfg(feature = "image")]
pub use ::image as image_crate;
pub use candle_core as candle;
pub use candle_nn;

pub use checkpoint::{Checkpoint, Existing, Format, SaveOptions};
pub use config::{
    Activation, BlockKind, Config, MlpKind, NormKind, Pool, PoolSizes, PreLogits, PreLogitsActivation, RelPosBias,
    Rope, RopeKind,
};
pub use cpu::Isa;
pub use device::Device;
pub use error::{Error, Result, TensorProblem};
pub use info::{Distance, ModelInfo, Origin, ProblemType, Verification};
pub use precision::Precision;
pub use predictor::Predictor;
pub use preprocessing::{CropMode, Interpolation, PreprocessConfig, Resize};
pub use text::TextModel;
pub use vit::VisionTransformer;
pub use weights::{Dtype, TensorInfo, Weights};

/// The CPU engine itself, for this workspace's benchmarks and tests. [`Predictor`] is the API; this module can change in any
/// release.
#[doc(hidden)]
pub mod engine {
    pub use crate::cpu::{Engine, EngineOptions, bench, hardware_threads, physical_cores, precisions};
}
