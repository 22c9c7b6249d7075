//! The whole model, top to bottom.

/// A Vision Transformer.
#[derive(Clone, Debug)]
pub struct VisionTransformer;
