//! A family of architectures: what its members have in common, and a row of sizes for each.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use crate::config::{Config, Pool};

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
}

impl Architecture {
    /// Sets the fields that follow from others, as timm's constructor does.
    #[must_use]
    pub fn derive(mut self) -> Self {
        let c = &mut self.config;
        #[allow(clippy::as_conversions)] // rounded down, as Python's `int` does
        let hidden = (c.embed_dim as f64 * self.mlp_ratio) as usize;
        c.mlp_hidden = hidden;
        c.patch_bias = !c.pre_norm;
        let pooled = matches!(c.global_pool, Pool::Avg | Pool::Max | Pool::Avgmax);
        c.fc_norm = c.final_norm && self.fc_norm.unwrap_or(pooled);
        self
    }
}

/// A name, `[embed_dim, depth, num_heads]`, MLP ratio, patch size, image size, classes.
pub(super) type Row = (&'static str, [usize; 3], f64, usize, usize, usize);

pub(super) struct Family {
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
        Architecture { config, mlp_ratio, fc_norm: self.fc_norm }.derive()
    }
}
