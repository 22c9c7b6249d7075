//! timm's architecture names → [`Config`]: a table, for a Hub config.json names the architecture and leaves its switches out.
//!
//! The names and sizes are those of timm 1.0.31, `vision_transformer.py` (163) and `deit.py` (16). A family is what its
//! members have in common; a row is a member's size.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use crate::config::{
    Activation::{self, GeluTanh, QuickGelu, Silu},
    BlockKind::{self, DiffParallelScaling, ParallelScaling, ParallelThings, ResPost},
    Config,
    MlpKind::{self, Swiglu, SwigluPacked},
    NormKind::{self, RmsNorm},
    Pool::{self, Avg, Map},
};

/// What a name stands for: a configuration, and what timm derives its other fields from when some are overridden.
#[derive(Clone, Debug)]
pub struct Architecture {
    /// The configuration, as timm's `create_model(name)` builds it.
    pub config: Config,
    /// `mlp_hidden` is this times `embed_dim`.
    pub mlp_ratio: f64,
    /// Whether the last norm stands after the pooling; where not set, that depends on the pooling.
    pub fc_norm: Option<bool>,
}

impl Architecture {
    /// The architecture of a name, with or without a tag (`vit_base_patch16_224.augreg_in1k`).
    pub fn of(name: &str) -> Option<Self> {
        let name = name.split_once('.').map_or(name, |(name, _)| name);
        FAMILIES.iter().find_map(|family| {
            let row = family.rows.iter().find(|row| row.0 == name)?;
            Some(family.member(row))
        })
    }

    /// Fills in what follows from other fields, as timm's constructor does.
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

/// Every name, sorted.
pub fn all() -> Vec<&'static str> {
    let mut names: Vec<_> = FAMILIES.iter().flat_map(|family| family.rows).map(|row| row.0).collect();
    names.sort_unstable();
    names
}

/// The name that shares the longest beginning with one that is not known.
pub(crate) fn nearest(name: &str) -> Option<&'static str> {
    let shared = |known: &str| known.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    all().into_iter().max_by_key(|known| shared(known)).filter(|known| shared(known) >= 8)
}

/// A name, `[embed_dim, depth, num_heads]`, MLP ratio, patch size, image size, classes.
type Row = (&'static str, [usize; 3], f64, usize, usize, usize);

struct Family {
    /// What its members have in common, beside a ViT of the original paper.
    change: fn(&mut Config),
    fc_norm: Option<bool>,
    rows: &'static [Row],
}

impl Family {
    fn member(&self, &(_, [embed_dim, depth, num_heads], mlp_ratio, patch, img, num_classes): &Row) -> Architecture {
        let mut config = Config {
            img_size: [img, img],
            patch_size: [patch, patch],
            in_chans: 3,
            num_classes,
            embed_dim,
            depth,
            num_heads,
            mlp_hidden: 0,
            mlp: MlpKind::Mlp,
            act: Activation::Gelu,
            ln_eps: 1e-6,
            patch_bias: true,
            qkv_bias: true,
            proj_bias: true,
            qk_norm: false,
            class_token: true,
            dist_token: false,
            reg_tokens: 0,
            no_embed_class: false,
            pos_embed: true,
            pre_norm: false,
            final_norm: true,
            fc_norm: false,
            layer_scale: false,
            global_pool: Pool::Token,
            pre_logits: None,
            head_bias: true,
            norm: NormKind::LayerNorm,
            patch_norm: false,
            scale_attn_norm: false,
            scale_mlp_norm: false,
            block: BlockKind::Standard,
            diff_attn: false,
            pool_include_prefix: false,
        };
        (self.change)(&mut config);
        Architecture { config, mlp_ratio, fc_norm: self.fc_norm }.derive()
    }
}

#[rustfmt::skip]
const FAMILIES: &[Family] = &[
    Family { change: |_| {}, fc_norm: None, rows: &[
        ("deit_base_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("deit_base_patch16_384", [768, 12, 12], 4.0, 16, 384, 1000),
        ("deit_small_patch16_224", [384, 12, 6], 4.0, 16, 224, 1000),
        ("deit_tiny_patch16_224", [192, 12, 3], 4.0, 16, 224, 1000),
        ("test_vit", [64, 6, 2], 3.0, 16, 160, 1000),
        ("vit_base_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("vit_base_patch16_384", [768, 12, 12], 4.0, 16, 384, 1000),
        ("vit_base_patch32_224", [768, 12, 12], 4.0, 32, 224, 1000),
        ("vit_base_patch32_384", [768, 12, 12], 4.0, 32, 384, 1000),
        ("vit_base_patch8_224", [768, 12, 12], 4.0, 8, 224, 1000),
        ("vit_giant_patch14_224", [1408, 40, 16], 4.363636363636363, 14, 224, 1000),
        ("vit_gigantic_patch14_224", [1664, 48, 16], 4.923076923076923, 14, 224, 1000),
        ("vit_huge_patch14_224", [1280, 32, 16], 4.0, 14, 224, 0),
        ("vit_large_patch14_224", [1024, 24, 16], 4.0, 14, 224, 1000),
        ("vit_large_patch16_224", [1024, 24, 16], 4.0, 16, 224, 1000),
        ("vit_large_patch16_384", [1024, 24, 16], 4.0, 16, 384, 1000),
        ("vit_large_patch32_224", [1024, 24, 16], 4.0, 32, 224, 0),
        ("vit_large_patch32_384", [1024, 24, 16], 4.0, 32, 384, 1000),
        ("vit_small_patch16_224", [384, 12, 6], 4.0, 16, 224, 1000),
        ("vit_small_patch16_384", [384, 12, 6], 4.0, 16, 384, 1000),
        ("vit_small_patch32_224", [384, 12, 6], 4.0, 32, 224, 1000),
        ("vit_small_patch32_384", [384, 12, 6], 4.0, 32, 384, 1000),
        ("vit_small_patch8_224", [384, 12, 6], 4.0, 8, 224, 0),
        ("vit_tiny_patch16_224", [192, 12, 3], 4.0, 16, 224, 1000),
        ("vit_tiny_patch16_384", [192, 12, 3], 4.0, 16, 384, 1000),
    ] },
    Family { change: |c| c.layer_scale = true, fc_norm: None, rows: &[
        ("vit_base_patch14_dinov2", [768, 12, 12], 4.0, 14, 518, 0),
        ("vit_base_patch16_plus_240", [896, 12, 14], 4.0, 16, 240, 1000),
        ("vit_base_patch32_plus_256", [896, 12, 14], 4.0, 32, 256, 1000),
        ("vit_large_patch14_dinov2", [1024, 24, 16], 4.0, 14, 518, 0),
        ("vit_small_patch14_dinov2", [384, 12, 6], 4.0, 14, 518, 0),
        ("vit_small_patch16_36x1_224", [384, 36, 6], 4.0, 16, 224, 1000),
    ] },
    Family { change: |c| c.dist_token = true, fc_norm: None, rows: &[
        ("deit_base_distilled_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("deit_base_distilled_patch16_384", [768, 12, 12], 4.0, 16, 384, 1000),
        ("deit_small_distilled_patch16_224", [384, 12, 6], 4.0, 16, 224, 1000),
        ("deit_tiny_distilled_patch16_224", [192, 12, 3], 4.0, 16, 224, 1000),
    ] },
    Family { change: |c| c.no_embed_class = true, fc_norm: None, rows: &[
        ("flexivit_base", [768, 12, 12], 4.0, 16, 240, 1000),
        ("flexivit_large", [1024, 24, 16], 4.0, 16, 240, 1000),
        ("flexivit_small", [384, 12, 6], 4.0, 16, 240, 1000),
    ] },
    Family { change: |c| c.global_pool = Avg, fc_norm: None, rows: &[
        ("eva_large_patch14_196", [1024, 24, 16], 4.0, 14, 196, 1000),
        ("eva_large_patch14_336", [1024, 24, 16], 4.0, 14, 336, 1000),
    ] },
    Family { change: |c| c.qkv_bias = false, fc_norm: None, rows: &[
        ("vit_base_patch16_224_miil", [768, 12, 12], 4.0, 16, 224, 11221),
    ] },
    Family { change: |c| { c.pre_norm = true; c.ln_eps = 1e-5; }, fc_norm: None, rows: &[
        ("vit_base_patch16_clip_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("vit_base_patch16_clip_384", [768, 12, 12], 4.0, 16, 384, 1000),
        ("vit_base_patch16_plus_clip_240", [896, 12, 14], 4.0, 16, 240, 640),
        ("vit_base_patch32_clip_224", [768, 12, 12], 4.0, 32, 224, 1000),
        ("vit_base_patch32_clip_256", [768, 12, 12], 4.0, 32, 256, 512),
        ("vit_base_patch32_clip_384", [768, 12, 12], 4.0, 32, 384, 1000),
        ("vit_base_patch32_clip_448", [768, 12, 12], 4.0, 32, 448, 1000),
        ("vit_betwixt_patch32_clip_224", [640, 12, 10], 4.0, 32, 224, 512),
        ("vit_giant_patch14_clip_224", [1408, 40, 16], 4.363636363636363, 14, 224, 1024),
        ("vit_gigantic_patch14_clip_224", [1664, 48, 16], 4.923076923076923, 14, 224, 1280),
        ("vit_gigantic_patch14_clip_378", [1664, 48, 16], 4.923076923076923, 14, 378, 1280),
        ("vit_huge_patch14_clip_224", [1280, 32, 16], 4.0, 14, 224, 1000),
        ("vit_huge_patch14_clip_336", [1280, 32, 16], 4.0, 14, 336, 1000),
        ("vit_huge_patch14_clip_378", [1280, 32, 16], 4.0, 14, 378, 1024),
        ("vit_large_patch14_clip_224", [1024, 24, 16], 4.0, 14, 224, 1000),
        ("vit_large_patch14_clip_336", [1024, 24, 16], 4.0, 14, 336, 1000),
        ("vit_medium_patch16_clip_224", [512, 12, 8], 4.0, 16, 224, 512),
        ("vit_medium_patch32_clip_224", [512, 12, 8], 4.0, 32, 224, 512),
        ("vit_xsmall_patch16_clip_224", [256, 10, 4], 4.0, 16, 224, 512),
    ] },
    Family { change: |c| { c.class_token = false; c.global_pool = Avg; }, fc_norm: Some(false), rows: &[
        ("vit_base_patch16_gap_224", [768, 12, 16], 4.0, 16, 224, 1000),
        ("vit_base_patch16_siglip_gap_224", [768, 12, 12], 4.0, 16, 224, 0),
        ("vit_base_patch16_siglip_gap_256", [768, 12, 12], 4.0, 16, 256, 0),
        ("vit_base_patch16_siglip_gap_384", [768, 12, 12], 4.0, 16, 384, 0),
        ("vit_base_patch16_siglip_gap_512", [768, 12, 12], 4.0, 16, 512, 0),
        ("vit_giant_patch16_gap_224", [1408, 40, 16], 4.363636363636363, 16, 224, 0),
        ("vit_huge_patch14_gap_224", [1280, 32, 16], 4.0, 14, 224, 0),
        ("vit_huge_patch16_gap_448", [1280, 32, 16], 4.0, 16, 448, 0),
        ("vit_large_patch16_siglip_gap_256", [1024, 24, 16], 4.0, 16, 256, 0),
        ("vit_large_patch16_siglip_gap_384", [1024, 24, 16], 4.0, 16, 384, 0),
        ("vit_so400m_patch14_siglip_gap_224", [1152, 27, 16], 3.7362, 14, 224, 0),
        ("vit_so400m_patch14_siglip_gap_378", [1152, 27, 16], 3.7362, 14, 378, 0),
        ("vit_so400m_patch14_siglip_gap_384", [1152, 27, 16], 3.7362, 14, 384, 0),
        ("vit_so400m_patch14_siglip_gap_448", [1152, 27, 16], 3.7362, 14, 448, 0),
        ("vit_so400m_patch14_siglip_gap_896", [1152, 27, 16], 3.7362, 14, 896, 0),
    ] },
    Family { change: |c| { c.class_token = false; c.global_pool = Map; }, fc_norm: None, rows: &[
        ("vit_base_patch16_siglip_224", [768, 12, 12], 4.0, 16, 224, 0),
        ("vit_base_patch16_siglip_256", [768, 12, 12], 4.0, 16, 256, 0),
        ("vit_base_patch16_siglip_384", [768, 12, 12], 4.0, 16, 384, 0),
        ("vit_base_patch16_siglip_512", [768, 12, 12], 4.0, 16, 512, 0),
        ("vit_large_patch16_siglip_256", [1024, 24, 16], 4.0, 16, 256, 0),
        ("vit_large_patch16_siglip_384", [1024, 24, 16], 4.0, 16, 384, 0),
        ("vit_so400m_patch14_siglip_224", [1152, 27, 16], 3.7362, 14, 224, 0),
        ("vit_so400m_patch14_siglip_378", [1152, 27, 16], 3.7362, 14, 378, 0),
        ("vit_so400m_patch14_siglip_384", [1152, 27, 16], 3.7362, 14, 384, 0),
    ] },
    Family { change: |c| { c.no_embed_class = true; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("deit3_base_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("deit3_base_patch16_384", [768, 12, 12], 4.0, 16, 384, 1000),
        ("deit3_huge_patch14_224", [1280, 32, 16], 4.0, 14, 224, 1000),
        ("deit3_large_patch16_224", [1024, 24, 16], 4.0, 16, 224, 1000),
        ("deit3_large_patch16_384", [1024, 24, 16], 4.0, 16, 384, 1000),
        ("deit3_medium_patch16_224", [512, 12, 8], 4.0, 16, 224, 1000),
        ("deit3_small_patch16_224", [384, 12, 6], 4.0, 16, 224, 1000),
        ("deit3_small_patch16_384", [384, 12, 6], 4.0, 16, 384, 1000),
    ] },
    Family { change: |c| { c.block = ParallelThings; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_base_patch16_18x2_224", [768, 18, 12], 4.0, 16, 224, 1000),
        ("vit_small_patch16_18x2_224", [384, 18, 6], 4.0, 16, 224, 1000),
    ] },
    Family { change: |c| { c.final_norm = false; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_intern300m_patch14_448", [1024, 24, 16], 4.0, 14, 448, 0),
    ] },
    Family { change: |c| { c.act = GeluTanh; c.class_token = false; c.global_pool = Avg; }, fc_norm: Some(false), rows: &[
        ("vit_base_patch32_siglip_gap_256", [768, 12, 12], 4.0, 32, 256, 0),
        ("vit_giantopt_patch16_siglip_gap_256", [1536, 40, 16], 4.0, 16, 256, 0),
        ("vit_giantopt_patch16_siglip_gap_384", [1536, 40, 16], 4.0, 16, 384, 0),
        ("vit_large_patch16_siglip_gap_512", [1024, 24, 16], 4.0, 16, 512, 0),
        ("vit_so400m_patch16_siglip_gap_256", [1152, 27, 16], 3.7362, 16, 256, 0),
        ("vit_so400m_patch16_siglip_gap_384", [1152, 27, 16], 3.7362, 16, 384, 0),
        ("vit_so400m_patch16_siglip_gap_512", [1152, 27, 16], 3.7362, 16, 512, 0),
    ] },
    Family { change: |c| { c.act = GeluTanh; c.class_token = false; c.global_pool = Map; }, fc_norm: None, rows: &[
        ("vit_base_patch32_siglip_256", [768, 12, 12], 4.0, 32, 256, 0),
        ("vit_giantopt_patch16_siglip_256", [1536, 40, 16], 4.0, 16, 256, 0),
        ("vit_giantopt_patch16_siglip_384", [1536, 40, 16], 4.0, 16, 384, 0),
        ("vit_large_patch16_siglip_512", [1024, 24, 16], 4.0, 16, 512, 0),
        ("vit_so400m_patch16_siglip_256", [1152, 27, 16], 3.7362, 16, 256, 0),
        ("vit_so400m_patch16_siglip_384", [1152, 27, 16], 3.7362, 16, 384, 0),
        ("vit_so400m_patch16_siglip_512", [1152, 27, 16], 3.7362, 16, 512, 0),
    ] },
    Family { change: |c| { c.act = QuickGelu; c.pre_norm = true; c.ln_eps = 1e-5; }, fc_norm: None, rows: &[
        ("vit_base_patch16_clip_quickgelu_224", [768, 12, 12], 4.0, 16, 224, 512),
        ("vit_base_patch32_clip_quickgelu_224", [768, 12, 12], 4.0, 32, 224, 512),
        ("vit_gigantic_patch14_clip_quickgelu_224", [1664, 48, 16], 4.923076923076923, 14, 224, 1280),
        ("vit_huge_patch14_clip_quickgelu_224", [1280, 32, 16], 4.0, 14, 224, 1024),
        ("vit_huge_patch14_clip_quickgelu_378", [1280, 32, 16], 4.0, 14, 378, 1024),
        ("vit_large_patch14_clip_quickgelu_224", [1024, 24, 16], 4.0, 14, 224, 768),
        ("vit_large_patch14_clip_quickgelu_336", [1024, 24, 16], 4.0, 14, 336, 768),
    ] },
    Family { change: |c| { c.reg_tokens = 1; c.no_embed_class = true; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_base_patch14_reg1_tipsv2", [768, 12, 12], 4.0, 14, 448, 0),
        ("vit_large_patch14_reg1_tipsv2", [1024, 24, 16], 4.0, 14, 448, 0),
        ("vit_so400m_patch14_reg1_tipsv2", [1152, 27, 16], 3.736111111111111, 14, 448, 0),
    ] },
    Family { change: |c| { c.reg_tokens = 4; c.no_embed_class = true; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_base_patch14_reg4_dinov2", [768, 12, 12], 4.0, 14, 518, 0),
        ("vit_large_patch14_reg4_dinov2", [1024, 24, 16], 4.0, 14, 518, 0),
        ("vit_small_patch14_reg4_dinov2", [384, 12, 6], 4.0, 14, 518, 0),
    ] },
    Family { change: |c| { c.class_token = false; c.reg_tokens = 4; c.global_pool = Avg; }, fc_norm: Some(false), rows: &[
        ("vit_so150m_patch16_reg4_gap_256", [896, 18, 14], 2.572, 16, 256, 1000),
        ("vit_so150m_patch16_reg4_gap_384", [896, 18, 14], 2.572, 16, 384, 1000),
    ] },
    Family { change: |c| { c.reg_tokens = 7; c.no_embed_class = true; c.final_norm = false; }, fc_norm: None, rows: &[
        ("vit_giant_patch16_radio_v3", [1536, 40, 24], 4.0, 16, 512, 0),
        ("vit_huge_patch16_radio_v3", [1280, 32, 16], 4.0, 16, 512, 0),
    ] },
    Family { change: |c| { c.reg_tokens = 9; c.no_embed_class = true; c.final_norm = false; }, fc_norm: None, rows: &[
        ("vit_huge_patch16_radio_v4", [1280, 32, 16], 4.0, 16, 512, 0),
        ("vit_so400m_patch16_radio_v4", [1152, 27, 16], 3.736111111111111, 16, 512, 0),
    ] },
    Family { change: |c| { c.act = Silu; c.mlp = SwigluPacked; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_giant_patch14_dinov2", [1536, 40, 24], 5.33334, 14, 518, 0),
    ] },
    Family { change: |c| { c.class_token = false; c.reg_tokens = 4; c.global_pool = Map; }, fc_norm: None, rows: &[
        ("vit_so150m_patch16_reg4_map_256", [896, 18, 14], 2.572, 16, 256, 1000),
    ] },
    Family { change: |c| { c.class_token = false; c.global_pool = Avg; c.layer_scale = true; c.qkv_bias = false; }, fc_norm: Some(false), rows: &[
        ("vit_betwixt_patch16_gap_256", [640, 12, 10], 4.0, 16, 256, 1000),
        ("vit_medium_patch16_gap_240", [512, 12, 8], 4.0, 16, 240, 11821),
        ("vit_medium_patch16_gap_256", [512, 12, 8], 4.0, 16, 256, 1000),
        ("vit_medium_patch16_gap_384", [512, 12, 8], 4.0, 16, 384, 1000),
    ] },
    Family { change: |c| { c.global_pool = Avg; c.ln_eps = 1e-5; c.scale_attn_norm = true; c.scale_mlp_norm = true; }, fc_norm: None, rows: &[
        ("beit3_base_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("beit3_giant_patch14_224", [1408, 40, 16], 4.3637, 14, 224, 1000),
        ("beit3_giant_patch14_336", [1408, 40, 16], 4.3637, 14, 336, 1000),
        ("beit3_large_patch16_224", [1024, 24, 16], 4.0, 16, 224, 1000),
    ] },
    Family { change: |c| { c.reg_tokens = 7; c.no_embed_class = true; c.final_norm = false; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_base_patch16_radio_v3", [768, 12, 12], 4.0, 16, 512, 0),
        ("vit_large_patch16_radio_v3", [1024, 24, 16], 4.0, 16, 512, 0),
    ] },
    Family { change: |c| { c.class_token = false; c.reg_tokens = 1; c.global_pool = Avg; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("test_vit2", [64, 8, 2], 3.0, 16, 160, 1000),
    ] },
    Family { change: |c| { c.class_token = false; c.reg_tokens = 4; c.no_embed_class = true; c.global_pool = Avg; }, fc_norm: None, rows: &[
        ("vit_base_patch16_reg4_gap_256", [768, 12, 12], 4.0, 16, 256, 1000),
    ] },
    Family { change: |c| { c.class_token = false; c.reg_tokens = 1; c.no_embed_class = true; c.global_pool = Avg; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_betwixt_patch16_reg1_gap_256", [640, 12, 10], 4.0, 16, 256, 1000),
        ("vit_little_patch16_reg1_gap_256", [320, 14, 5], 5.6, 16, 256, 1000),
        ("vit_medium_patch16_reg1_gap_256", [512, 12, 8], 4.0, 16, 256, 1000),
        ("vit_wee_patch16_reg1_gap_256", [256, 14, 4], 5.0, 16, 256, 1000),
    ] },
    Family { change: |c| { c.class_token = false; c.reg_tokens = 4; c.no_embed_class = true; c.global_pool = Avg; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_betwixt_patch16_reg4_gap_256", [640, 12, 10], 4.0, 16, 256, 1000),
        ("vit_betwixt_patch16_reg4_gap_384", [640, 12, 10], 4.0, 16, 384, 1000),
        ("vit_little_patch16_reg4_gap_256", [320, 14, 5], 5.6, 16, 256, 1000),
        ("vit_medium_patch16_reg4_gap_256", [512, 12, 8], 4.0, 16, 256, 1000),
        ("vit_mediumd_patch16_reg4_gap_256", [512, 20, 8], 4.0, 16, 256, 1000),
        ("vit_mediumd_patch16_reg4_gap_384", [512, 20, 8], 4.0, 16, 384, 1000),
    ] },
    Family { change: |c| { c.class_token = false; c.reg_tokens = 1; c.global_pool = Avg; c.layer_scale = true; c.qkv_bias = false; }, fc_norm: None, rows: &[
        ("vit_so150m2_patch16_reg1_gap_256", [832, 21, 13], 2.6153846153846154, 16, 256, 1000),
        ("vit_so150m2_patch16_reg1_gap_384", [832, 21, 13], 2.6153846153846154, 16, 384, 1000),
        ("vit_so150m2_patch16_reg1_gap_448", [832, 21, 13], 2.6153846153846154, 16, 448, 1000),
    ] },
    Family { change: |c| { c.act = Silu; c.mlp = SwigluPacked; c.reg_tokens = 1; c.no_embed_class = true; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_giant_patch14_reg1_tipsv2", [1536, 40, 24], 5.33334, 14, 448, 0),
    ] },
    Family { change: |c| { c.act = Silu; c.mlp = SwigluPacked; c.reg_tokens = 4; c.no_embed_class = true; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_giant_patch14_reg4_dinov2", [1536, 40, 24], 5.33334, 14, 518, 0),
    ] },
    Family { change: |c| { c.block = ResPost; c.class_token = false; c.global_pool = Avg; c.layer_scale = true; c.qkv_bias = false; }, fc_norm: None, rows: &[
        ("vit_base_patch16_rpn_224", [768, 12, 12], 4.0, 16, 224, 1000),
    ] },
    Family { change: |c| { c.class_token = false; c.reg_tokens = 1; c.global_pool = Avg; c.norm = RmsNorm; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("test_vit4", [96, 9, 3], 3.0, 16, 160, 1000),
    ] },
    Family { change: |c| { c.class_token = false; c.reg_tokens = 1; c.global_pool = Map; c.pool_include_prefix = true; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("test_vit3", [96, 9, 3], 2.0, 16, 160, 1000),
    ] },
    Family { change: |c| { c.block = ParallelScaling; c.no_embed_class = true; c.pre_norm = true; c.norm = RmsNorm; c.qkv_bias = false; c.qk_norm = true; }, fc_norm: None, rows: &[
        ("vit_base_patch16_xp_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("vit_huge_patch14_xp_224", [1280, 32, 16], 4.0, 14, 224, 1000),
        ("vit_large_patch14_xp_224", [1024, 24, 16], 4.0, 14, 224, 1000),
    ] },
    Family { change: |c| { c.block = DiffParallelScaling; c.class_token = false; c.reg_tokens = 1; c.no_embed_class = true; c.global_pool = Avg; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_dpwee_patch16_reg1_gap_256", [256, 16, 4], 5.0, 16, 256, 1000),
    ] },
    Family { change: |c| { c.block = ParallelScaling; c.class_token = false; c.reg_tokens = 1; c.no_embed_class = true; c.global_pool = Avg; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_pwee_patch16_reg1_gap_256", [256, 16, 4], 5.0, 16, 256, 1000),
    ] },
    Family { change: |c| { c.act = Silu; c.mlp = Swiglu; c.class_token = false; c.global_pool = Avg; c.norm = RmsNorm; c.ln_eps = 1e-5; c.patch_norm = true; c.qkv_bias = false; c.proj_bias = false; }, fc_norm: Some(false), rows: &[
        ("aimv2_1b_patch14_224", [2048, 24, 16], 2.75, 14, 224, 0),
        ("aimv2_1b_patch14_336", [2048, 24, 16], 2.75, 14, 336, 0),
        ("aimv2_1b_patch14_448", [2048, 24, 16], 2.75, 14, 448, 0),
        ("aimv2_3b_patch14_224", [3072, 24, 24], 2.6667, 14, 224, 0),
        ("aimv2_3b_patch14_336", [3072, 24, 24], 2.6667, 14, 336, 0),
        ("aimv2_3b_patch14_448", [3072, 24, 24], 2.6667, 14, 448, 0),
        ("aimv2_huge_patch14_224", [1536, 24, 12], 2.6667, 14, 224, 0),
        ("aimv2_huge_patch14_336", [1536, 24, 12], 2.6667, 14, 336, 0),
        ("aimv2_huge_patch14_448", [1536, 24, 12], 2.6667, 14, 448, 0),
        ("aimv2_large_patch14_224", [1024, 24, 8], 2.75, 14, 224, 0),
        ("aimv2_large_patch14_336", [1024, 24, 8], 2.75, 14, 336, 0),
        ("aimv2_large_patch14_448", [1024, 24, 8], 2.75, 14, 448, 0),
    ] },    Family { change: |c| { c.diff_attn = true; c.class_token = false; c.reg_tokens = 1; c.no_embed_class = true; c.global_pool = Avg; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("vit_dlittle_patch16_reg1_gap_256", [320, 14, 5], 5.6, 16, 256, 1000),
        ("vit_dwee_patch16_reg1_gap_256", [256, 14, 4], 5.0, 16, 256, 1000),
    ] },
];

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::{Architecture, all};
    use crate::load::parameters;

    #[test]
    fn every_name_has_timms_parameters() {
        let table = include_str!("../tests/fixtures/timm_names.tsv");
        let mut names = Vec::new();
        for line in table.lines().filter(|line| !line.starts_with('#')) {
            let [name, count, tensors] = line.split('\t').collect::<Vec<_>>().try_into().unwrap();
            let shapes = parameters(&Architecture::of(name).expect(name).config).expect(name);
            let found: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
            assert_eq!((found, shapes.len()), (count.parse().unwrap(), tensors.parse().unwrap()), "{name}");
            names.push(name);
        }
        assert_eq!(names, all());
    }

    #[test]
    fn a_tag_is_no_part_of_the_name() {
        let tagged = Architecture::of("vit_tiny_patch16_224.augreg_in21k_ft_in1k").unwrap();
        assert_eq!(tagged.config, Architecture::of("vit_tiny_patch16_224").unwrap().config);
        assert!(Architecture::of("vit_tiny_patch16_225").is_none());
    }
}
