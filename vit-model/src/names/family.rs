//! A family of architectures: what its members have in common, and a row of sizes for each.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use crate::config::{Activation, BlockKind, Config, MlpKind, Pool, PoolSizes};

/// The architecture of a name: its configuration, and the values from which timm derives other fields if some are
/// overridden.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Architecture {
    /// The configuration, as timm's `create_model(name)` builds it.
    pub config: Config,
    /// `mlp_hidden` is this times `embed_dim`.
    pub mlp_ratio: f64,
    /// Whether the final norm runs after pooling. If it is not set, that depends on the kind of pooling.
    pub fc_norm: Option<bool>,
    /// What else its class derives fields from.
    pub(crate) class: Class,
}

/// The class in timm that has the architecture, with the arguments that are no fields of a [`Config`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Class {
    /// `VisionTransformer` and its subclasses.
    Vit,
    Eva(Eva),
    Beit {
        swiglu: bool,
    },
}

/// The arguments of timm's `Eva`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Eva {
    /// The MLP is gated.
    pub swiglu: bool,
    /// The width of a gated MLP is rounded up to a multiple of this, if it is not 0.
    pub align: usize,
    /// There is a norm before pooling. If it is not set, that depends on whether one follows the pooling.
    pub post_norm: Option<bool>,
    /// Heads and MLP ratio of attention pooling.
    pub pool: Option<(usize, f64)>,
}

/// A width times a ratio, rounded down, as Python's `int` does.
#[allow(clippy::as_conversions)]
fn scaled(width: usize, ratio: f64) -> usize {
    (width as f64 * ratio) as usize
}

impl Architecture {
    /// Sets the fields that follow from others, as timm's constructor does.
    #[must_use]
    pub fn derive(mut self) -> Self {
        let c = &mut self.config;
        c.mlp_hidden = scaled(c.embed_dim, self.mlp_ratio);
        c.patch_bias = !c.pre_norm;
        match self.class {
            Class::Vit => {
                let pooled = matches!(c.global_pool, Pool::Avg | Pool::Max | Pool::Avgmax);
                c.fc_norm = c.final_norm && self.fc_norm.unwrap_or(pooled);
            }
            Class::Beit { swiglu } => {
                c.fc_norm = self.fc_norm.unwrap_or(c.global_pool == Pool::Avg);
                if swiglu {
                    (c.mlp, c.act) = (MlpKind::Swiglu, Activation::Silu);
                }
                c.block_gammas = c.layer_scale;
            }
            Class::Eva(eva) => {
                c.fc_norm = self.fc_norm.unwrap_or(c.global_pool == Pool::Avg);
                c.final_norm = c.fc_norm || eva.post_norm.unwrap_or(true);
                let split = c.scale_mlp_norm || (eva.align > 0 && c.block != BlockKind::ResPost);
                (c.mlp, c.act) = match (eva.swiglu, split) {
                    (false, _) => (MlpKind::Mlp, Activation::Gelu),
                    (true, true) => (MlpKind::Swiglu, Activation::Silu),
                    (true, false) => (MlpKind::SwigluPacked, Activation::Silu),
                };
                match c.mlp {
                    MlpKind::Swiglu if eva.align > 0 => c.mlp_hidden = c.mlp_hidden.next_multiple_of(eva.align),
                    MlpKind::SwigluPacked => c.mlp_hidden = c.mlp_hidden.saturating_mul(2),
                    _ => {}
                }
                // timm ignores LayerScale in blocks with a norm after each branch
                c.layer_scale &= c.block != BlockKind::ResPost;
                c.block_gammas = c.layer_scale;
                c.attn_only_scale &= c.layer_scale;
                c.pool = None;
                if c.global_pool == Pool::Map {
                    let (heads, ratio) = eva.pool.unwrap_or((c.num_heads, self.mlp_ratio));
                    let sizes = PoolSizes::new(heads, scaled(c.embed_dim, ratio));
                    let plain = PoolSizes::new(c.num_heads, c.mlp_hidden);
                    c.pool = (sizes != plain).then_some(sizes);
                    // its attention pooling reads every token
                    c.pool_include_prefix = true;
                }
            }
        }
        self
    }
}

/// A name, `[embed_dim, depth, num_heads]`, MLP ratio, patch size, image size, classes.
pub(super) type Row = (&'static str, [usize; 3], f64, usize, usize, usize);

pub(super) struct Family {
    pub(super) class: Class,
    /// What its members have in common that differs from the original paper's ViT.
    pub(super) change: fn(&mut Config),
    /// See [`Architecture::fc_norm`].
    pub(super) fc_norm: Option<bool>,
    pub(super) rows: &'static [Row],
}

impl Family {
    pub(super) fn member(
        &self,
        &(_, [embed_dim, depth, num_heads], mlp_ratio, patch, img, num_classes): &Row,
    ) -> Architecture {
        let mut config = Config::vit([img, img], [patch, patch], embed_dim, depth, num_heads);
        config.num_classes = num_classes;
        (self.change)(&mut config);
        Architecture { config, mlp_ratio, fc_norm: self.fc_norm, class: self.class }.derive()
    }
}
