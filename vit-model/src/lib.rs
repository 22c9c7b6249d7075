//! Vision Transformers in Rust.

pub mod config;
pub mod cpu;
mod error;
pub mod finetune;
mod folder;
mod hf;
#[cfg(feature = "hub")]
pub mod hub;
#[cfg(feature = "image")]
pub mod image;
mod json;
pub mod labels;
pub mod load;
pub mod names;
pub mod pos_embed;
pub mod predictor;
#[cfg(feature = "image")]
pub mod preprocess;
mod preprocess_config;
pub mod safetensors;
pub mod tap;
mod timm;
pub mod vit;
pub mod weights;

pub use config::{
    Activation, BlockKind, Config, MlpKind, ModelInfo, NormKind, Pool, PreLogits, PreprocessConfig, Resize,
};
pub use error::{Error, Result};
pub use predictor::Predictor;
pub use vit::VisionTransformer;
pub use weights::{Dtype, TensorInfo, Weights};
