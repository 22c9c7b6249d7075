//! Text towers: texts in, embeddings out, in the space that a two-tower model (CLIP, SigLIP) projects images into.
//!
//! From below: `config` is the architecture as data; `document` and, for a part of it, `charsmap` check a tokeniser's file
//! before a library builds anything from it; `tokenizer` turns texts into ids, `tower` turns ids into
//! embeddings, and `model` joins the two.

mod charsmap;
mod config;
mod document;
mod model;
mod tokenizer;
mod tower;

pub use config::{Similarity, TextConfig, TextPool};
pub use model::{DEFAULT_TEMPLATE, TextModel, normalized};
pub use tokenizer::Tokenizer;
pub use tower::TextTransformer;
