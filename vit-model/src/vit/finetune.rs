//! For fine-tuning: replacing the head, dropping blocks, grouping parameters.

use std::collections::BTreeMap;

use candle_nn::VarBuilder;

use super::{Prune, VisionTransformer, tap::Blocks};
use crate::{Config, Error, Pool, Result, layers};

/// Tokens and embeddings that weight decay excludes, as in timm's `no_weight_decay`.
const NO_WEIGHT_DECAY: [&str; 5] = ["pos_embed", "cls_token", "reg_token", "dist_token", "rope.freqs"];

impl VisionTransformer {
    /// Replaces the head by one with parameters `head.*` (and `head_dist.*`) of `vb`, and the pooling if `pool` is set.
    /// With 0 classes the model has no head. The final norm keeps its place before or after pooling (timm's
    /// `reset_classifier`).
    ///
    /// # Errors
    /// Attention pooling for a model without it, token pooling without a class token, or a parameter that `vb` does not
    /// have.
    pub fn reset_classifier(&mut self, num_classes: usize, pool: Option<Pool>, vb: &VarBuilder<'_>) -> Result<()> {
        let mut config = Config { num_classes, ..self.config.clone() };
        if let Some(pool) = pool {
            if pool == Pool::Map && config.global_pool != Pool::Map {
                return Err(Error::config("attention pooling cannot be added to a model"));
            }
            if config.dist_token && !matches!(pool, Pool::Token | Pool::None) {
                return Err(Error::config("the distilled heads read the class and the distillation token"));
            }
            if !config.dist_token {
                config.global_pool = pool;
            }
        }
        config.validate()?;
        self.replace_head(config, vb)
    }

    /// Drops the blocks after the last one of `blocks`, and what `prune` names. Returns the blocks that were asked for,
    /// counted from 0 (timm's `prune_intermediate_layers`).
    ///
    /// # Errors
    /// A block that the model does not have.
    pub fn prune_intermediate_layers(&mut self, blocks: Blocks<'_>, prune: Prune) -> Result<Vec<usize>> {
        let indices = blocks.indices(self.depth())?;
        self.truncate(indices.last().map_or(0, |last| last + 1), prune);
        Ok(indices)
    }
}

/// Whether weight decay excludes a parameter: biases, norms and scales (one dimension), tokens, position embeddings.
pub fn no_weight_decay(name: &str, shape: &[usize]) -> bool {
    shape.len() <= 1 || NO_WEIGHT_DECAY.contains(&name) || name.ends_with("relative_position_bias_table")
}

/// The group of each parameter for a learning rate that decays with depth: 0 for the embedding, 1 to `depth` for the
/// blocks, where the last includes the final norm, and `depth + 1` for pooling and head (timm's `group_matcher`, as its
/// `param_groups_layer_decay` uses it).
///
/// # Errors
/// A configuration that [`Config::validate`] refuses.
pub fn layer_groups(config: &Config) -> Result<BTreeMap<String, usize>> {
    let group = |name: &str| {
        let first = name.split('.').next().unwrap_or_default();
        match first {
            "cls_token" | "reg_token" | "dist_token" | "pos_embed" | "patch_embed" | "norm_pre" | "rel_pos_bias" => 0,
            "blocks" => name.split('.').nth(1).and_then(|i| i.parse::<usize>().ok()).map_or(0, |i| i + 1),
            "norm" => config.depth,
            _ => config.depth + 1,
        }
    };
    Ok(layers::parameters(config)?.into_keys().map(|name| (name.clone(), group(&name))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Architecture;

    /// The groups that timm 1.0.31's `param_groups_layer_decay` makes of a model of depth 2.
    #[test]
    fn groups_are_those_of_timm() {
        let mut config = Architecture::of("vit_xsmall_patch16_clip_224").unwrap().config;
        config.depth = 2;
        let groups = layer_groups(&config).unwrap();
        for (name, group) in [
            ("cls_token", 0),
            ("norm_pre.bias", 0),
            ("patch_embed.proj.weight", 0),
            ("blocks.0.norm1.weight", 1),
            ("blocks.1.mlp.fc1.weight", 2),
            ("norm.weight", 2),
            ("head.bias", 3),
        ] {
            assert_eq!(groups[name], group, "{name}");
        }
        assert!(no_weight_decay("pos_embed", &[1, 197, 256]) && no_weight_decay("norm.bias", &[256]));
        assert!(!no_weight_decay("head.weight", &[512, 256]));
    }
}
