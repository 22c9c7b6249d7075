//! The 65 names of timm 1.0.31's `eva.py`: EVA, EVA-02, Perception Encoder, RoPE-ViT, DINOv3, LingBot-Vision and Sapiens2.

use super::family::{Class, Eva, Family};
use crate::config::{
    BlockKind::ResPost,
    Config,
    NormKind::RmsNorm,
    Pool::{Avg, Map},
    Rope,
    RopeKind::{self, Axial, Centred, Mixed},
};

/// A plain MLP, and the norms that follow from the pooling.
const PLAIN: Class = eva(false, 0, None, None);
/// The same with a gated MLP.
const SWIGLU: Class = eva(true, 0, None, None);

const fn eva(swiglu: bool, align: usize, post_norm: Option<bool>, pool: Option<(usize, f64)>) -> Class {
    Class::Eva(Eva { swiglu, align, post_norm, pool })
}

#[allow(clippy::unnecessary_wraps)] // it is a value of `Config::rope`
const fn rope(kind: RopeKind, temperature: f64, ref_grid: Option<[usize; 2]>) -> Option<Rope> {
    Some(Rope { ref_grid, ..Rope::new(kind, temperature) })
}

fn offset(config: &mut Config, offset: f64) {
    config.rope.iter_mut().for_each(|rope| rope.grid_offset = offset);
}

fn column_first(config: &mut Config) {
    config.rope.iter_mut().for_each(|rope| rope.column_first = true);
}

fn rotate_half(config: &mut Config) {
    config.rope.iter_mut().for_each(|rope| rope.rotate_half = true);
}

/// Half as many heads of k and v in all but the first and the last eight blocks.
fn grouped(config: &mut Config) {
    let (depth, heads) = (config.depth, config.num_heads);
    let middle = 8..depth.saturating_sub(8);
    config.kv_heads = (0..depth).map(|block| if middle.contains(&block) { heads / 2 } else { heads }).collect();
}

#[rustfmt::skip]
pub(super) const FAMILIES: &[Family] = &[
    Family { class: SWIGLU, change: |c| { c.global_pool = Avg; c.no_k_bias = true; c.split_qkv = true; c.scale_mlp_norm = true; c.rope = rope(Axial, 10000.0, Some([16, 16])); }, fc_norm: None, rows: &[
        ("eva02_base_patch14_224", [768, 12, 12], 2.6666666666666665, 14, 224, 0),
        ("eva02_base_patch14_448", [768, 12, 12], 2.6666666666666665, 14, 448, 1000),
        ("eva02_large_patch14_224", [1024, 24, 16], 2.6666666666666665, 14, 224, 0),
        ("eva02_large_patch14_448", [1024, 24, 16], 2.6666666666666665, 14, 448, 1000),
    ] },
    Family { class: SWIGLU, change: |c| { c.no_k_bias = true; c.split_qkv = true; c.scale_attn_norm = true; c.scale_mlp_norm = true; c.rope = rope(Axial, 10000.0, Some([16, 16])); }, fc_norm: None, rows: &[
        ("eva02_base_patch16_clip_224", [768, 12, 12], 2.6666666666666665, 16, 224, 512),
        ("eva02_large_patch14_clip_224", [1024, 24, 16], 2.6666666666666665, 14, 224, 768),
        ("eva02_large_patch14_clip_336", [1024, 24, 16], 2.6666666666666665, 14, 336, 768),
    ] },
    Family { class: PLAIN, change: |c| { c.no_k_bias = true; c.block = ResPost; }, fc_norm: None, rows: &[
        ("eva02_enormous_patch14_clip_224", [1792, 64, 16], 8.571428571428571, 14, 224, 1024),
    ] },
    Family { class: SWIGLU, change: |c| { c.global_pool = Avg; c.no_k_bias = true; c.rope = rope(Axial, 10000.0, Some([16, 16])); }, fc_norm: None, rows: &[
        ("eva02_small_patch14_224", [384, 12, 6], 2.6666666666666665, 14, 224, 0),
        ("eva02_small_patch14_336", [384, 12, 6], 2.6666666666666665, 14, 336, 1000),
        ("eva02_tiny_patch14_224", [192, 12, 3], 2.6666666666666665, 14, 224, 0),
        ("eva02_tiny_patch14_336", [192, 12, 3], 2.6666666666666665, 14, 336, 1000),
    ] },
    Family { class: PLAIN, change: |c| { c.global_pool = Avg; c.no_k_bias = true; }, fc_norm: None, rows: &[
        ("eva_giant_patch14_224", [1408, 40, 16], 4.363636363636363, 14, 224, 1000),
        ("eva_giant_patch14_336", [1408, 40, 16], 4.363636363636363, 14, 336, 1000),
        ("eva_giant_patch14_560", [1408, 40, 16], 4.363636363636363, 14, 560, 1000),
    ] },
    Family { class: PLAIN, change: |c| { c.no_k_bias = true; }, fc_norm: None, rows: &[
        ("eva_giant_patch14_clip_224", [1408, 40, 16], 4.363636363636363, 14, 224, 1024),
    ] },
    Family { class: SWIGLU, change: |c| { c.norm = RmsNorm; c.reg_tokens = 8; c.pos_embed = false; c.split_qkv = true; c.qk_norm = true; c.layer_scale = true; c.attn_only_scale = true; c.rope = rope(Centred, 100.0, None); rotate_half(c); grouped(c); c.img_size = [1024, 768]; }, fc_norm: None, rows: &[
        ("vit_5b_patch16_sapiens2", [2432, 56, 32], 4.0, 16, 1024, 0),
        ("vit_giant_patch16_sapiens2", [1536, 40, 24], 4.0, 16, 1024, 0),
        ("vit_huge_patch16_sapiens2", [1280, 32, 16], 4.0, 16, 1024, 0),
        ("vit_large_patch16_sapiens2", [1024, 24, 16], 4.0, 16, 1024, 0),
    ] },
    Family { class: eva(true, 64, None, None), change: |c| { c.ln_eps = 1e-5; c.reg_tokens = 4; c.pos_embed = false; c.global_pool = Avg; c.qkv_bias = false; c.layer_scale = true; c.rope = rope(Centred, 100.0, None); rotate_half(c); }, fc_norm: Some(false), rows: &[
        ("vit_7b_patch16_dinov3", [4096, 40, 32], 2.0, 16, 256, 0),
    ] },
    Family { class: PLAIN, change: |c| { c.ln_eps = 1e-5; c.reg_tokens = 4; c.pos_embed = false; c.global_pool = Avg; c.qkv_bias = false; c.layer_scale = true; c.rope = rope(Centred, 100.0, None); rotate_half(c); }, fc_norm: Some(false), rows: &[
        ("vit_base_patch16_dinov3", [768, 12, 12], 4.0, 16, 256, 0),
        ("vit_large_patch16_dinov3", [1024, 24, 16], 4.0, 16, 256, 0),
        ("vit_small_patch16_dinov3", [384, 12, 6], 4.0, 16, 256, 0),
    ] },
    Family { class: PLAIN, change: |c| { c.ln_eps = 1e-5; c.reg_tokens = 4; c.pos_embed = false; c.global_pool = Avg; c.no_k_bias = true; c.layer_scale = true; c.rope = rope(Centred, 100.0, None); rotate_half(c); }, fc_norm: Some(false), rows: &[
        ("vit_base_patch16_dinov3_qkvb", [768, 12, 12], 4.0, 16, 256, 0),
        ("vit_large_patch16_dinov3_qkvb", [1024, 24, 16], 4.0, 16, 256, 0),
        ("vit_small_patch16_dinov3_qkvb", [384, 12, 6], 4.0, 16, 256, 0),
        ("vit_tiny_patch16_dinov3_qkvb", [192, 12, 3], 4.0, 16, 256, 0),
    ] },
    Family { class: PLAIN, change: |c| { c.ln_eps = 1e-5; c.reg_tokens = 4; c.pos_embed = false; c.no_k_bias = true; c.layer_scale = true; c.rope = rope(Centred, 100.0, None); rotate_half(c); }, fc_norm: None, rows: &[
        ("vit_base_patch16_lingbot", [768, 12, 12], 4.0, 16, 512, 0),
        ("vit_large_patch16_lingbot", [1024, 24, 16], 4.0, 16, 512, 0),
        ("vit_small_patch16_lingbot", [384, 12, 6], 4.0, 16, 512, 0),
    ] },
    Family { class: PLAIN, change: |c| { c.pos_embed = false; c.layer_scale = true; c.rope = rope(Axial, 100.0, None); column_first(c); }, fc_norm: None, rows: &[
        ("vit_base_patch16_rope_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("vit_large_patch16_rope_224", [1024, 24, 16], 4.0, 16, 224, 1000),
        ("vit_small_patch16_rope_224", [384, 12, 6], 4.0, 16, 224, 1000),
    ] },
    Family { class: PLAIN, change: |c| { c.no_embed_class = true; c.layer_scale = true; c.rope = rope(Axial, 100.0, None); column_first(c); }, fc_norm: None, rows: &[
        ("vit_base_patch16_rope_ape_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("vit_large_patch16_rope_ape_224", [1024, 24, 16], 4.0, 16, 224, 1000),
        ("vit_small_patch16_rope_ape_224", [384, 12, 6], 4.0, 16, 224, 1000),
    ] },
    Family { class: PLAIN, change: |c| { c.pos_embed = false; c.layer_scale = true; c.rope = rope(Mixed, 10.0, None); column_first(c); }, fc_norm: None, rows: &[
        ("vit_base_patch16_rope_mixed_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("vit_large_patch16_rope_mixed_224", [1024, 24, 16], 4.0, 16, 224, 1000),
        ("vit_small_patch16_rope_mixed_224", [384, 12, 6], 4.0, 16, 224, 1000),
    ] },
    Family { class: PLAIN, change: |c| { c.no_embed_class = true; c.layer_scale = true; c.rope = rope(Mixed, 10.0, None); column_first(c); }, fc_norm: None, rows: &[
        ("vit_base_patch16_rope_mixed_ape_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("vit_large_patch16_rope_mixed_ape_224", [1024, 24, 16], 4.0, 16, 224, 1000),
        ("vit_small_patch16_rope_mixed_ape_224", [384, 12, 6], 4.0, 16, 224, 1000),
    ] },
    Family { class: PLAIN, change: |c| { c.class_token = false; c.reg_tokens = 1; c.pos_embed = false; c.global_pool = Avg; c.no_k_bias = true; c.layer_scale = true; c.rope = rope(Axial, 10000.0, Some([16, 16])); }, fc_norm: None, rows: &[
        ("vit_base_patch16_rope_reg1_gap_256", [768, 12, 12], 4.0, 16, 256, 1000),
        ("vit_medium_patch16_rope_reg1_gap_256", [512, 12, 8], 4.0, 16, 256, 1000),
    ] },
    Family { class: SWIGLU, change: |c| { c.norm = RmsNorm; c.reg_tokens = 8; c.pos_embed = false; c.split_qkv = true; c.qk_norm = true; c.layer_scale = true; c.attn_only_scale = true; c.rope = rope(Centred, 100.0, None); rotate_half(c); c.img_size = [1024, 768]; }, fc_norm: None, rows: &[
        ("vit_base_patch16_sapiens2", [768, 12, 12], 4.0, 16, 1024, 0),
    ] },
    Family { class: PLAIN, change: |c| { c.class_token = false; c.reg_tokens = 4; c.pos_embed = false; c.global_pool = Avg; c.no_k_bias = true; c.layer_scale = true; c.rope = rope(Axial, 10000.0, Some([16, 16])); }, fc_norm: None, rows: &[
        ("vit_betwixt_patch16_rope_reg4_gap_256", [640, 12, 10], 4.0, 16, 256, 1000),
    ] },
    Family { class: eva(true, 8, None, None), change: |c| { c.ln_eps = 1e-5; c.reg_tokens = 4; c.pos_embed = false; c.qkv_bias = false; c.layer_scale = true; c.rope = rope(Centred, 100.0, None); rotate_half(c); }, fc_norm: None, rows: &[
        ("vit_giant_patch16_lingbot", [1536, 40, 24], 2.6666666666666665, 16, 512, 0),
    ] },
    Family { class: eva(true, 8, None, None), change: |c| { c.ln_eps = 1e-5; c.reg_tokens = 4; c.pos_embed = false; c.global_pool = Avg; c.qkv_bias = false; c.layer_scale = true; c.rope = rope(Centred, 100.0, None); rotate_half(c); }, fc_norm: Some(false), rows: &[
        ("vit_huge_plus_patch16_dinov3", [1280, 32, 20], 4.0, 16, 256, 0),
        ("vit_small_plus_patch16_dinov3", [384, 12, 6], 4.0, 16, 256, 0),
    ] },
    Family { class: eva(true, 8, None, None), change: |c| { c.ln_eps = 1e-5; c.reg_tokens = 4; c.pos_embed = false; c.global_pool = Avg; c.no_k_bias = true; c.layer_scale = true; c.rope = rope(Centred, 100.0, None); rotate_half(c); }, fc_norm: Some(false), rows: &[
        ("vit_huge_plus_patch16_dinov3_qkvb", [1280, 32, 20], 4.0, 16, 256, 0),
        ("vit_small_plus_patch16_dinov3_qkvb", [384, 12, 6], 4.0, 16, 256, 0),
    ] },
    Family { class: PLAIN, change: |c| { c.class_token = false; c.reg_tokens = 1; c.pos_embed = false; c.global_pool = Avg; c.qkv_bias = false; c.layer_scale = true; c.rope = rope(Axial, 10000.0, Some([16, 16])); }, fc_norm: None, rows: &[
        ("vit_mediumd_patch16_rope_reg1_gap_256", [512, 20, 8], 4.0, 16, 256, 1000),
    ] },
    Family { class: eva(false, 0, None, Some((8, 4.0))), change: |c| { c.ln_eps = 1e-5; c.global_pool = Map; c.pre_norm = true; c.rope = rope(Axial, 10000.0, Some([14, 14])); offset(c, 1.0); column_first(c); c.pool_include_prefix = true; }, fc_norm: None, rows: &[
        ("vit_pe_core_base_patch16_224", [768, 12, 12], 4.0, 16, 224, 1024),
    ] },
    Family { class: eva(false, 0, None, Some((8, 4.0))), change: |c| { c.ln_eps = 1e-5; c.class_token = false; c.global_pool = Map; c.pre_norm = true; c.rope = rope(Axial, 10000.0, Some([32, 32])); column_first(c); c.pool_include_prefix = true; }, fc_norm: None, rows: &[
        ("vit_pe_core_gigantic_patch14_448", [1536, 50, 16], 5.833333333333333, 14, 448, 1280),
    ] },
    Family { class: eva(false, 0, None, Some((8, 4.0))), change: |c| { c.ln_eps = 1e-5; c.global_pool = Map; c.pre_norm = true; c.rope = rope(Axial, 10000.0, Some([24, 24])); offset(c, 1.0); column_first(c); c.pool_include_prefix = true; }, fc_norm: None, rows: &[
        ("vit_pe_core_large_patch14_336", [1024, 24, 16], 4.0, 14, 336, 1024),
        ("vit_pe_core_small_patch16_384", [384, 12, 6], 4.0, 16, 384, 512),
        ("vit_pe_core_tiny_patch16_384", [192, 12, 3], 4.0, 16, 384, 512),
    ] },
    Family { class: eva(false, 0, Some(false), None), change: |c| { c.ln_eps = 1e-5; c.class_token = false; c.global_pool = Avg; c.pre_norm = true; c.layer_scale = true; c.rope = rope(Axial, 10000.0, Some([32, 32])); column_first(c); }, fc_norm: Some(false), rows: &[
        ("vit_pe_lang_gigantic_patch14_448", [1536, 47, 16], 5.833333333333333, 14, 448, 0),
        ("vit_pe_spatial_gigantic_patch14_448", [1536, 50, 16], 5.833333333333333, 14, 448, 0),
    ] },
    Family { class: eva(false, 0, Some(false), None), change: |c| { c.ln_eps = 1e-5; c.global_pool = Avg; c.pre_norm = true; c.layer_scale = true; c.rope = rope(Axial, 10000.0, Some([32, 32])); offset(c, 1.0); column_first(c); }, fc_norm: Some(false), rows: &[
        ("vit_pe_lang_large_patch14_448", [1024, 23, 16], 4.0, 14, 448, 0),
    ] },
    Family { class: eva(false, 0, Some(false), None), change: |c| { c.ln_eps = 1e-5; c.global_pool = Avg; c.pre_norm = true; c.rope = rope(Axial, 10000.0, Some([32, 32])); offset(c, 1.0); column_first(c); }, fc_norm: Some(false), rows: &[
        ("vit_pe_spatial_base_patch16_512", [768, 12, 12], 4.0, 16, 512, 0),
        ("vit_pe_spatial_large_patch14_448", [1024, 24, 16], 4.0, 14, 448, 0),
        ("vit_pe_spatial_small_patch16_512", [384, 12, 6], 4.0, 16, 512, 0),
        ("vit_pe_spatial_tiny_patch16_512", [192, 12, 3], 4.0, 16, 512, 0),
    ] },
];
