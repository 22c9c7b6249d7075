//! How much a proof spends: a large model answers once, and its weights are not kept packed.

use vit_model::predictor::{Builder, Loading};
use vit_model::{Config, Device, Precision, Predictor};

/// Multiplications above which a model is large, and tried on one image instead of three in two runs.
const LARGE: u64 = 4_000_000_000;

/// Does one run take so long that there is only one?
pub fn is_large(config: &Config) -> bool {
    flops(config) > LARGE
}

/// Options that give the same answers on every CPU. `streamed` saves packing the whole model, which pays off for one
/// run.
pub fn exact(streamed: bool) -> Builder {
    let loading = if streamed { Loading::Streamed } else { Loading::Held };
    Predictor::builder().device(Device::Cpu).precision(Precision::F32).loading(loading)
}

/// Multiplications of one image, roughly.
fn flops(config: &Config) -> u64 {
    let (n, d, h) = (config.num_tokens() as u64, config.embed_dim as u64, config.mlp_hidden as u64);
    let block =
        (4 * d).saturating_mul(d).saturating_add((2 * d).saturating_mul(h)).saturating_add((2 * n).saturating_mul(d));
    block.saturating_mul(n).saturating_mul(config.depth as u64)
}
