//! The 16 names of timm 1.0.31's `deit.py`.

use super::family::{Class, Family};

#[rustfmt::skip]
pub(super) const FAMILIES: &[Family] = &[
    Family { class: Class::Vit, change: |_| {}, fc_norm: None, rows: &[
        ("deit_base_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("deit_base_patch16_384", [768, 12, 12], 4.0, 16, 384, 1000),
        ("deit_small_patch16_224", [384, 12, 6], 4.0, 16, 224, 1000),
        ("deit_tiny_patch16_224", [192, 12, 3], 4.0, 16, 224, 1000),
    ] },
    Family { class: Class::Vit, change: |c| c.dist_token = true, fc_norm: None, rows: &[
        ("deit_base_distilled_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("deit_base_distilled_patch16_384", [768, 12, 12], 4.0, 16, 384, 1000),
        ("deit_small_distilled_patch16_224", [384, 12, 6], 4.0, 16, 224, 1000),
        ("deit_tiny_distilled_patch16_224", [192, 12, 3], 4.0, 16, 224, 1000),
    ] },
    Family { class: Class::Vit, change: |c| { c.no_embed_class = true; c.layer_scale = true; }, fc_norm: None, rows: &[
        ("deit3_base_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("deit3_base_patch16_384", [768, 12, 12], 4.0, 16, 384, 1000),
        ("deit3_huge_patch14_224", [1280, 32, 16], 4.0, 14, 224, 1000),
        ("deit3_large_patch16_224", [1024, 24, 16], 4.0, 16, 224, 1000),
        ("deit3_large_patch16_384", [1024, 24, 16], 4.0, 16, 384, 1000),
        ("deit3_medium_patch16_224", [512, 12, 8], 4.0, 16, 224, 1000),
        ("deit3_small_patch16_224", [384, 12, 6], 4.0, 16, 224, 1000),
        ("deit3_small_patch16_384", [384, 12, 6], 4.0, 16, 384, 1000),
    ] },
];
