//! What fine-tuning needs beside the model: another head, fewer blocks, groups of parameters.

use std::collections::BTreeMap;

use candle_nn::VarBuilder;

use crate::{Config, Error, Pool, Result, VisionTransformer, load, tap::Blocks};

/// Tokens and embeddings that weight decay leaves alone, as timm's `no_weight_decay`.
const NO_WEIGHT_DECAY: [&str; 4] = ["pos_embed", "cls_token", "reg_token", "dist_token"];

impl VisionTransformer {
    /// Another head, with parameters `head.*` (and `head_dist.*`) from `vb`, and another pooling where `pool` says so. 0
    /// classes: no head. The norm stays where it is, before or after the pooling (timm's `reset_classifier`).
    ///
    /// # Errors
    /// Attention pooling for a model without it; token pooling without a class token; what `vb` lacks.
    pub fn reset_classifier(&mut self, num_classes: usize, pool: Option<Pool>, vb: &VarBuilder<'_>) -> Result<()> {
        let mut config = Config { num_classes, ..self.config.clone() };
        if let Some(pool) = pool {
            if pool == Pool::Map && config.global_pool != Pool::Map {
                return Err(Error::Config("attention pooling cannot be added to a model".into()));
            }
            if config.dist_token && !matches!(pool, Pool::Token | Pool::None) {
                return Err(Error::Config("the distilled heads read the class and the distillation token".into()));
            }
            if !config.dist_token {
                config.global_pool = pool;
            }
        }
        config.validate()?;
        self.replace_head(config, vb)
    }

    /// Drops the blocks after the last one of `blocks`; with `norm` the final norm too, and with `head` all that follows
    /// it. Answers with the blocks asked for, counted from 0 (timm's `prune_intermediate_layers`).
    ///
    /// # Errors
    /// Blocks that the model has not.
    pub fn prune_intermediate_layers(&mut self, blocks: Blocks<'_>, norm: bool, head: bool) -> Result<Vec<usize>> {
        let indices = blocks.indices(self.depth())?;
        self.truncate(indices.last().map_or(0, |last| last + 1), norm, head);
        Ok(indices)
    }
}

/// Whether weight decay leaves a parameter alone: biases, norms and scales (one dimension), tokens, position embeddings.
pub fn no_weight_decay(name: &str, shape: &[usize]) -> bool {
    shape.len() <= 1 || NO_WEIGHT_DECAY.contains(&name)
}

/// Parameter → its group for a learning rate that decays with depth: 0 the embedding, 1 to `depth` the blocks, the
/// last with the final norm, then the pooling and the head (timm's `group_matcher` as its `param_groups_layer_decay` uses
/// it).
///
/// # Errors
/// An impossible configuration.
pub fn layer_groups(config: &Config) -> Result<BTreeMap<String, usize>> {
    let group = |name: &str| {
        let first = name.split('.').next().unwrap_or_default();
        match first {
            "cls_token" | "reg_token" | "dist_token" | "pos_embed" | "patch_embed" | "norm_pre" => 0,
            "blocks" => name.split('.').nth(1).and_then(|i| i.parse::<usize>().ok()).map_or(0, |i| i + 1),
            "norm" => config.depth,
            _ => config.depth + 1,
        }
    };
    Ok(load::parameters(config)?.into_keys().map(|name| (name.clone(), group(&name))).collect())
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
