//! Vision Transformers in Rust: timm's whole family as candle modules, with a CPU engine, exact preprocessing, and
//! checkpoints of timm, transformers and `vit-convert` loaded as they are.
//!
//! ```no_run
//! use candle_core::{Device, Tensor};
//! use vit_model::{VisionTransformer, tap::{Blocks, Layout}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = VisionTransformer::load("vit_base_patch16_224".as_ref(), &Device::Cpu)?; // a folder from the Hub
//! let images = Tensor::randn(0f32, 1.0, (2, 3, 224, 224), &Device::Cpu)?; // [B, C, H, W]
//! let logits = model.forward(&images)?; // [B, num_classes]
//! let tokens = model.forward_features(&images)?; // [B, 197, 768]
//! let last = model.get_intermediate_layers(&images, Blocks::Last(4), true, Layout::Nchw)?; // 4 × [B, 768, 14, 14]
//! let maps = model.attention_maps(&images)?; // a block each: [B, 12, 197, 197]
//! # Ok(())
//! # }
//! ```
//!
//! - [`Predictor`]: photographs in, named classes out, on the fastest path that the machine has.
//! - [`VisionTransformer`]: the network, to run, look into ([`tap`]), resize ([`pos_embed`]) and train ([`finetune`]).
//! - [`Config`] and [`names`]: every architecture as data. [`load`]: files and folders → both.

pub mod checksum;
pub mod config;
pub mod cpu;
mod error;
pub mod finetune;
mod folder;
pub mod gguf;
#[cfg(all(test, feature = "cuda"))]
mod gpu;
#[cfg(test)]
mod gradients;
mod hf;
#[cfg(feature = "hub")]
pub mod hub;
#[cfg(feature = "image")]
pub mod image;
mod json;
pub mod labels;
pub mod limits;
pub mod load;
pub mod names;
pub mod pos_embed;
pub mod predictor;
#[cfg(feature = "image")]
pub mod preprocess;
mod preprocess_config;
#[cfg(feature = "image")]
mod resample;
pub mod safetensors;
pub mod tap;
mod timm;
mod torchvision;
pub mod vit;
pub mod weights;

pub use config::{
    Activation, BlockKind, Config, MlpKind, ModelInfo, NormKind, Pool, PreLogits, PreprocessConfig, Resize,
};
pub use error::{Error, Result};
pub use predictor::Predictor;
pub use vit::VisionTransformer;
pub use weights::{Dtype, TensorInfo, Weights};
