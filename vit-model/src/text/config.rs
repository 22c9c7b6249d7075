//! `TextConfig`: the architecture of a text tower as data.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::collections::BTreeMap;

use crate::{Activation, Error, Result};

/// The architecture of a text tower: a Transformer over token ids, whose output at one position is projected into the space
/// that images are projected into.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TextConfig {
    /// Rows of the table of token embeddings.
    pub vocab_size: usize,
    /// Tokens of a text, including those that mark its beginning and end. Longer texts are cut, shorter ones padded.
    pub context_length: usize,
    /// Width of a token.
    pub embed_dim: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Heads of each block's attention.
    pub num_heads: usize,
    /// Width of the hidden layer of each block's MLP.
    pub mlp_hidden: usize,
    /// The MLP's activation.
    pub act: Activation,
    /// ε of the norms.
    pub ln_eps: f64,
    /// Whether a token attends only to itself and to those before it (CLIP), or to all of them, padding included (SigLIP).
    pub causal: bool,
    /// The token whose output, after the final norm, is the embedding of the whole text.
    pub pool: TextPool,
    /// Width of the embedding; `None` if the pooled token is the embedding.
    pub projection: Option<usize>,
    /// Whether the projection has a bias.
    pub projection_bias: bool,
    /// How a text and an image are compared.
    pub similarity: Similarity,
}

/// How the token that is pooled is found among a text's ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TextPool {
    /// The first position of the largest id, which in CLIP's own vocabulary marks the end of a text.
    LargestId,
    /// The first position of this id, and position 0 if a text has none.
    FirstOf(u32),
    /// The first position.
    First,
    /// The last position, which is padding if a text is short.
    Last,
}

/// What becomes of the cosine similarities of an image and several texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Similarity {
    /// CLIP: softmax over the texts. The logit is `exp(logit_scale) · cos`.
    Softmax,
    /// SigLIP: a sigmoid for each text. The logit is `exp(logit_scale) · cos + logit_bias`.
    Sigmoid,
}

impl TextConfig {
    /// Refuses what no text tower can have.
    ///
    /// # Errors
    /// [`Error::Config`] with the field and its value.
    pub fn validate(&self) -> Result<()> {
        let bounds = [
            ("vocab_size", self.vocab_size, 1 << 22),
            ("context_length", self.context_length, 1 << 13),
            ("embed_dim", self.embed_dim, 1 << 16),
            ("depth", self.depth, 1 << 10),
            ("num_heads", self.num_heads, 1 << 12),
            ("mlp_hidden", self.mlp_hidden, 1 << 18),
            ("projection", self.projection.unwrap_or(1), 1 << 16),
        ];
        for (name, found, most) in bounds {
            if !(1..=most).contains(&found) {
                return Err(Error::config(format!("text tower: `{name}` must be from 1 to {most}, found {found}")));
            }
        }
        if !self.embed_dim.is_multiple_of(self.num_heads) {
            return Err(Error::config(format!(
                "text tower: {} heads do not divide a width of {}",
                self.num_heads, self.embed_dim
            )));
        }
        Ok(())
    }

    /// The shape of every tensor, by name. The blocks have timm's names; `token_embed`, `pos_embed`, `norm` and `head` are
    /// around them.
    pub fn parameters(&self) -> BTreeMap<String, Vec<usize>> {
        let (d, hidden) = (self.embed_dim, self.mlp_hidden);
        let mut all = BTreeMap::new();
        let mut add = |name: String, shape: &[usize]| all.insert(name, shape.to_vec());
        add("token_embed.weight".into(), &[self.vocab_size, d]);
        add("pos_embed".into(), &[self.context_length, d]);
        for i in 0..self.depth {
            for norm in ["norm1", "norm2"] {
                add(format!("blocks.{i}.{norm}.weight"), &[d]);
                add(format!("blocks.{i}.{norm}.bias"), &[d]);
            }
            for (name, outputs, inputs) in [
                ("attn.qkv", d.saturating_mul(3), d),
                ("attn.proj", d, d),
                ("mlp.fc1", hidden, d),
                ("mlp.fc2", d, hidden),
            ] {
                add(format!("blocks.{i}.{name}.weight"), &[outputs, inputs]);
                add(format!("blocks.{i}.{name}.bias"), &[outputs]);
            }
        }
        add("norm.weight".into(), &[d]);
        add("norm.bias".into(), &[d]);
        if let Some(width) = self.projection {
            add("head.weight".into(), &[width, d]);
            if self.projection_bias {
                add("head.bias".into(), &[width]);
            }
        }
        all
    }

    /// The width of an embedding.
    pub fn output_dim(&self) -> usize {
        self.projection.unwrap_or(self.embed_dim)
    }

    /// The index of the token that is pooled.
    pub(super) fn position(&self, ids: &[u32]) -> usize {
        match self.pool {
            TextPool::LargestId => {
                let largest = ids.iter().max();
                ids.iter().position(|id| Some(id) == largest).unwrap_or(0)
            }
            TextPool::FirstOf(wanted) => ids.iter().position(|&id| id == wanted).unwrap_or(0),
            TextPool::First => 0,
            TextPool::Last => ids.len().saturating_sub(1),
        }
    }
}
