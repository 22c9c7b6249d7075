//! Tests that a model over variables can be trained. Gradients are compared with finite differences, in f64.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::{
    Activation, BlockKind, Config, MlpKind, NormKind, Pool, PoolSizes, PreLogits, RelPosBias, Rope, RopeKind,
    VisionTransformer, layers::parameters, names::Architecture,
};

/// A model small enough to differentiate by hand.
fn tiny() -> Config {
    let config = Architecture::of("vit_tiny_patch16_224").unwrap().config;
    let sizes = Config { img_size: [6, 4], patch_size: [2, 2], in_chans: 2, num_classes: 3, ..config };
    Config { embed_dim: 8, depth: 2, num_heads: 2, mlp_hidden: 6, ..sizes }
}

/// Every kind of block, MLP, activation, norm and pooling.
pub(crate) fn variants() -> Vec<(&'static str, Config)> {
    let (axial, centred) = (Rope::new(RopeKind::Axial, 100.0), Rope::new(RopeKind::Centred, 100.0));
    vec![
        ("standard", tiny()),
        ("layer scale, registers", Config { layer_scale: true, reg_tokens: 2, no_embed_class: true, ..tiny() }),
        ("res post", Config { block: BlockKind::ResPost, global_pool: Pool::Avg, fc_norm: true, ..tiny() }),
        ("parallel scaling", Config { block: BlockKind::ParallelScaling, qkv_bias: false, qk_norm: true, ..tiny() }),
        ("parallel things", Config { block: BlockKind::ParallelThings, layer_scale: true, ..tiny() }),
        ("differential", Config { block: BlockKind::DiffParallelScaling, act: Activation::GeluTanh, ..tiny() }),
        ("map", Config { global_pool: Pool::Map, pre_norm: true, act: Activation::QuickGelu, ..tiny() }),
        ("rms, swiglu", Config { norm: NormKind::RmsNorm, mlp: MlpKind::Swiglu, act: Activation::Silu, ..tiny() }),
        ("packed", Config { mlp: MlpKind::SwigluPacked, act: Activation::Silu, global_pool: Pool::Avgmax, ..tiny() }),
        ("scale norms", Config { scale_attn_norm: true, scale_mlp_norm: true, patch_norm: true, ..tiny() }),
        ("rotary", Config { rope: Some(Rope { column_first: true, ..axial }), no_k_bias: true, ..tiny() }),
        (
            "rotary halves",
            Config { rope: Some(Rope { rotate_half: true, ..centred }), block: BlockKind::ResPost, ..tiny() },
        ),
        (
            "learned frequencies",
            Config { rope: Some(Rope { kind: RopeKind::Mixed, ..axial }), reg_tokens: 1, ..tiny() },
        ),
        (
            "split, grouped",
            Config {
                split_qkv: true,
                no_k_bias: true,
                kv_heads: vec![2, 1],
                rope: Some(axial),
                qk_norm: true,
                ..tiny()
            },
        ),
        (
            "relative positions",
            Config {
                rel_pos_bias: RelPosBias::Blocks,
                layer_scale: true,
                block_gammas: true,
                no_k_bias: true,
                ..tiny()
            },
        ),
        ("shared relative positions", Config { rel_pos_bias: RelPosBias::Shared, pos_embed: false, ..tiny() }),
        (
            "pool of its own size",
            Config {
                global_pool: Pool::Map,
                pool: Some(PoolSizes::new(4, 5)),
                pool_include_prefix: true,
                layer_scale: true,
                attn_only_scale: true,
                ..tiny()
            },
        ),
        ("distilled", Config { dist_token: true, ..tiny() }),
        ("pre_logits", Config { pre_logits: Some(PreLogits::tanh(5)), ..tiny() }),
    ]
}

/// Values between −1 and 1, the same at every run.
pub(crate) fn noise(seed: u64, shape: &[usize]) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A model over variables, and the variables by name.
pub(crate) fn trainable(config: &Config) -> (VisionTransformer, Vec<(String, Var)>) {
    let map = VarMap::new();
    let vit = VisionTransformer::new(config, VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu)).unwrap();
    let mut vars: Vec<_> = map.data().lock().unwrap().iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    for (i, (_, var)) in vars.iter().enumerate() {
        var.set(&(noise(i as u64 + 1, var.dims()) * 0.7).unwrap()).unwrap();
    }
    (vit, vars)
}

pub(crate) fn loss(vit: &VisionTransformer, x: &Tensor) -> Tensor {
    let logits = vit.forward(x).unwrap();
    let weights = noise(99, logits.dims()).to_device(logits.device()).unwrap();
    (logits * weights).unwrap().sum_all().unwrap()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (name, config) in variants() {
        let (vit, vars) = trainable(&config);
        assert_eq!(vars.len(), parameters(&config).unwrap().len(), "{name}");
        let x = noise(7, &[2, 2, 6, 4]);
        let grads = loss(&vit, &x).backward().unwrap();
        for (i, (parameter, var)) in vars.iter().enumerate() {
            let grad = grads.get(var).unwrap_or_else(|| panic!("{name}: {parameter} has no gradient"));
            let direction = noise(1000 + i as u64, var.dims());
            let slope = (grad * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let (here, step) = (var.as_tensor().copy().unwrap(), 1e-5);
            let at = |h: f64| {
                var.set(&(&here + (&direction * h).unwrap()).unwrap()).unwrap();
                loss(&vit, &x).to_scalar::<f64>().unwrap()
            };
            let difference = (at(step) - at(-step)) / (2.0 * step);
            var.set(&here).unwrap();
            // the central difference is off by h² times the third derivative, and by 1e-16 / h
            let limit = 1e-6 * slope.abs().max(1.0);
            assert!((slope - difference).abs() < limit, "{name}: {parameter}: {slope} against {difference}");
        }
    }
}

/// For every kind of block, each of several short steps down the gradient lowers the squared distance from a target.
#[test]
fn the_loss_falls() {
    for (name, config) in variants() {
        let (vit, vars) = trainable(&config);
        let x = noise(7, &[2, 2, 6, 4]);
        let distance = || {
            let logits = vit.forward(&x).unwrap();
            (&logits - noise(98, logits.dims())).unwrap().sqr().unwrap().mean_all().unwrap()
        };
        let mut last = f64::INFINITY;
        for step in 0..5 {
            let now = distance();
            let value = now.to_scalar::<f64>().unwrap();
            assert!(value < last, "{name}: {value} after {step} steps, {last} before the last");
            last = value;
            let grads = now.backward().unwrap();
            let grads: Vec<_> = vars.iter().map(|(_, var)| (var, grads.get(var).unwrap())).collect();
            let squares = |grad: &Tensor| grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let norm = grads.iter().map(|(_, grad)| squares(grad)).sum::<f64>().sqrt();
            for (var, grad) in grads {
                var.set(&(var.as_tensor() - (grad * (1e-3 / norm)).unwrap()).unwrap()).unwrap();
            }
        }
    }
}

#[test]
fn training_and_inference_compute_the_same() {
    for (name, config) in variants() {
        let (vit, vars) = trainable(&config);
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().detach())).collect();
        let frozen =
            VisionTransformer::new(&config, VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu)).unwrap();
        let x = noise(7, &[2, 2, 6, 4]);
        let (plain, fused) = (vit.forward(&x).unwrap(), frozen.forward(&x).unwrap());
        assert!(plain.track_op() && !fused.track_op(), "{name}");
        let d = (plain.detach() - fused).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
        // candle's fused norms take ε as f32, and sum in another order
        assert!(d < 1e-9, "{name}: {d:.2e}");
    }
}
