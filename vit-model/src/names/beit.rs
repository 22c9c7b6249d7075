//! The 7 names of timm 1.0.31's `beit.py`: BEiT and BEiT v2.

use super::family::{Class, Family};
use crate::config::{Pool::Avg, RelPosBias::Blocks};

#[rustfmt::skip]
pub(super) const FAMILIES: &[Family] = &[
    Family { class: Class::Beit { swiglu: false }, change: |c| { c.pos_embed = false; c.global_pool = Avg; c.no_k_bias = true; c.layer_scale = true; c.rel_pos_bias = Blocks; }, fc_norm: None, rows: &[
        ("beit_base_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("beit_base_patch16_384", [768, 12, 12], 4.0, 16, 384, 1000),
        ("beit_large_patch16_224", [1024, 24, 16], 4.0, 16, 224, 1000),
        ("beit_large_patch16_384", [1024, 24, 16], 4.0, 16, 384, 1000),
        ("beit_large_patch16_512", [1024, 24, 16], 4.0, 16, 512, 1000),
        ("beitv2_base_patch16_224", [768, 12, 12], 4.0, 16, 224, 1000),
        ("beitv2_large_patch16_224", [1024, 24, 16], 4.0, 16, 224, 1000),
    ] },
];
