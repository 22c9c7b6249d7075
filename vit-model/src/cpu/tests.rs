//! The engine against the candle modules in f64: every switch, kernel, precision and thread count.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use std::sync::Arc;

use super::choose::{Chosen, choose};
use super::isa::Isa;
use super::kernel::Integers;
use super::*;
use crate::{
    Activation, Config, Dtype, Error, MlpKind, NormKind, Pool, PreLogits, Precision, Result, TensorInfo,
    VisionTransformer, Weights,
};

/// Tensors in memory.
#[derive(Clone)]
struct Memory {
    infos: BTreeMap<String, TensorInfo>,
    values: BTreeMap<String, Vec<f32>>,
}

impl Weights for Memory {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.infos
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let values = self.values.get(name).ok_or_else(|| Error::missing(name))?;
        Ok(values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

/// Numbers in −1 to 1, the same on every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// A model with random weights, in f64 (its variables are tracked, so that candle takes the plain formulas) and as a
/// checkpoint.
fn model(config: &Config) -> (VisionTransformer, Memory) {
    let map = VarMap::new();
    let model = VisionTransformer::new(config, VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu)).unwrap();
    let mut numbers = Numbers(7);
    let (mut infos, mut values) = (BTreeMap::new(), BTreeMap::new());
    let vars: BTreeMap<String, Var> = map.data().lock().unwrap().clone().into_iter().collect();
    for (name, var) in vars {
        let shape = var.dims().to_vec();
        let n = var.elem_count();
        let k = if shape.len() > 1 { n / shape[0] } else { 1 };
        let (offset, scale) = match shape[..] {
            [_] if name.contains("norm") && name.ends_with("weight") => (1.0, 0.3),
            [_] if name.ends_with("gamma") => (0.0, 0.5),
            [_] => (0.0, 0.2),
            [1, ..] => (0.0, 0.5), // tokens and positions
            _ => (0.0, 2.0 / (k as f32).sqrt()),
        };
        let numbers: Vec<f32> = numbers.take(n).into_iter().map(|x| offset + scale * x).collect();
        let wide: Vec<f64> = numbers.iter().map(|&x| f64::from(x)).collect();
        var.set(&Tensor::from_vec(wide, shape.clone(), &Device::Cpu).unwrap()).unwrap();
        infos.insert(name.clone(), TensorInfo { dtype: Dtype::F32, shape });
        values.insert(name, numbers);
    }
    (model, Memory { infos, values })
}

fn base() -> Config {
    Config { num_classes: 11, mlp_hidden: 100, ..Config::vit([36, 28], [6, 5], 48, 2, 3) }
}

/// Every switch that a checkpoint has, and sizes that leave remainders everywhere.
fn configs() -> Vec<(&'static str, Config)> {
    let b = base;
    vec![
        ("plain", b()),
        ("quick_gelu, pre_norm", Config { act: Activation::QuickGelu, pre_norm: true, patch_bias: false, ..b() }),
        ("gelu_tanh, avg", Config { act: Activation::GeluTanh, global_pool: Pool::Avg, fc_norm: true, ..b() }),
        ("relu, max", Config { act: Activation::Relu, global_pool: Pool::Max, final_norm: false, ..b() }),
        (
            "silu, avgmax, prefix",
            Config { act: Activation::Silu, global_pool: Pool::Avgmax, pool_include_prefix: true, ..b() },
        ),
        ("class token and mean", Config { global_pool: Pool::TokenAvg, reg_tokens: 1, ..b() }),
        ("map", Config { global_pool: Pool::Map, class_token: false, ..b() }),
        ("map with prefix", Config { global_pool: Pool::Map, reg_tokens: 2, layer_scale: true, ..b() }),
        ("registers", Config { reg_tokens: 4, no_embed_class: true, layer_scale: true, ..b() }),
        ("distilled", Config { dist_token: true, ..b() }),
        ("qk_norm, head of 40", Config { qk_norm: true, embed_dim: 120, ..b() }),
        ("head of 80", Config { embed_dim: 160, num_heads: 2, ..b() }),
        ("swiglu", Config { mlp: MlpKind::Swiglu, act: Activation::Silu, mlp_hidden: 70, ..b() }),
        ("swiglu_packed", Config { mlp: MlpKind::SwigluPacked, act: Activation::Silu, mlp_hidden: 140, ..b() }),
        (
            "aimv2",
            Config {
                mlp: MlpKind::Swiglu,
                act: Activation::Silu,
                norm: NormKind::RmsNorm,
                patch_norm: true,
                qkv_bias: false,
                proj_bias: false,
                class_token: false,
                global_pool: Pool::Avg,
                fc_norm: true,
                ..b()
            },
        ),
        ("beit3", Config { scale_attn_norm: true, scale_mlp_norm: true, ..b() }),
        (
            "beit3, swiglu",
            Config { scale_attn_norm: true, scale_mlp_norm: true, mlp: MlpKind::Swiglu, mlp_hidden: 40, ..b() },
        ),
        ("pre_logits", Config { pre_logits: Some(PreLogits::tanh(37)), ..b() }),
        ("no pooling", Config { global_pool: Pool::None, num_classes: 5, ..b() }),
        ("no head, no positions", Config { num_classes: 0, pos_embed: false, ..b() }),
        ("one channel, one patch", Config { in_chans: 1, img_size: [6, 5], ..b() }),
        // heads that are whole strips, of images that end inside a tile
        ("heads of 64", Config { embed_dim: 128, num_heads: 2, img_size: [36, 45], ..b() }),
        ("many tokens", Config { img_size: [96, 105], embed_dim: 64, num_heads: 2, ..b() }),
    ]
}

fn engine(config: &Config, weights: &Memory, isa: Isa, precision: Precision, threads: usize) -> Engine {
    Engine::with_kernel(config, weights, Some(threads), kernel(isa, precision)).unwrap()
}

fn pixels(config: &Config, batch: usize) -> Vec<f32> {
    Numbers(3).take(batch * config.in_chans * config.img_size[0] * config.img_size[1])
}

/// What candle answers in f64: logits, features, pre_logits, and the tokens of every block.
fn expected(config: &Config, model: &VisionTransformer, batch: usize) -> [Vec<f64>; 3] {
    let wide: Vec<f64> = pixels(config, batch).into_iter().map(f64::from).collect();
    let shape = (batch, config.in_chans, config.img_size[0], config.img_size[1]);
    let x = Tensor::from_vec(wide, shape, &Device::Cpu).unwrap();
    let features = model.forward_features(&x).unwrap();
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (logits, pre_logits) = (model.forward_head(&features).unwrap(), model.forward_pre_logits(&features).unwrap());
    [flat(&logits), flat(&features), flat(&pre_logits)]
}

/// The largest difference, relative to the largest value.
fn error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
    let difference = |(f, e): (&f32, &f64)| (f64::from(*f) - e).abs();
    let worst = found.iter().zip(expected).map(difference).fold(0f64, |m, d| if d.is_nan() { d } else { m.max(d) });
    worst / largest.max(1e-30)
}

/// How far a pass may be from f64. f32 rounds to 6e-8 a step, and a few hundred steps add up in a random walk, on weights that
/// amplify; bf16 rounds to 4e-3, and bf16 x 3 drops a product of two such roundings, 1.5e-5; int8 rounds to 4e-3 of the
/// largest value of a row.
fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::Int8 => 0.15,
        Precision::Bf16 => 6e-2,
        Precision::Bf16x3 => 5e-5,
        _ => 1e-5,
    }
}

/// The kernel to test; AMX in emulation, where there is AVX-512 for the rest but no AMX, or where it is asked for: a
/// sanitizer sees what plain Rust reads and writes, but not what a tile does.
fn kernel(isa: Isa, precision: Precision) -> Chosen {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if isa == Isa::Amx && (!isa.available() || std::env::var_os("VIT_TEST_EMULATE_AMX").is_some()) {
        use amx::{Tiled, emulated::Emulated};
        let avx512 = avx512::Dot::detect().unwrap();
        return match precision {
            Precision::Bf16 => (Box::new(Tiled::<Emulated, false>::new(avx512)), isa, precision),
            Precision::Int8 => {
                let (floats, integers) =
                    (Tiled::<Emulated, false>::new(avx512), int8::tiled::Tiled::<Emulated>::new(avx512));
                (Box::new(int8::mixed::Mixed { floats, integers }), isa, precision)
            }
            Precision::F32 => choose(Isa::Avx512, precision).unwrap(),
            _ => (Box::new(Tiled::<Emulated, true>::new(avx512)), isa, Precision::Bf16x3),
        };
    }
    choose(isa, precision).unwrap()
}

/// Whether there is no AMX, but all that its emulation needs.
fn emulated() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return avx512::Dot::detect().is_some();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// Whether the kernels, or their emulation, multiply bytes.
fn has_int8(isa: Isa) -> bool {
    if isa.available() { choose(isa, Precision::Int8).is_ok() } else { isa == Isa::Amx }
}

fn kernels() -> Vec<(Isa, Precision)> {
    Isa::ALL
        .into_iter()
        .filter(|isa| isa.available() || *isa == Isa::Amx && emulated())
        .flat_map(|isa| Precision::CPU.map(|precision| (isa, precision)))
        .filter(|&(isa, precision)| precision != Precision::Int8 || has_int8(isa))
        .collect()
}

#[test]
fn every_switch_and_kernel_against_f64() {
    for (name, config) in configs() {
        let (reference, weights) = model(&config);
        let expected = expected(&config, &reference, 3);
        for (isa, precision) in kernels() {
            let engine = engine(&config, &weights, isa, precision, 2);
            let output = engine.forward(&pixels(&config, 3), 3).unwrap();
            let logits = output.logits.as_ref().unwrap_or(&output.pre_logits);
            let tolerance = tolerance(engine.precision());
            for (what, found, expected) in [
                ("logits", logits, &expected[0]),
                ("features", &output.features, &expected[1]),
                ("pre_logits", &output.pre_logits, &expected[2]),
            ] {
                let error = error(found, expected);
                assert!(error < tolerance, "{name}: {isa} {precision}: {what} differ by {error:e}");
            }
            // what is computed for the head alone is the same
            let (mut head, mut alone) = (Output::default(), vec![]);
            engine.forward_head_into(&pixels(&config, 3), 3, &mut head).unwrap();
            engine.logits_into(&pixels(&config, 3), 3, &mut alone).unwrap();
            assert!(head.features.is_empty());
            if isa == Isa::Portable {
                // `gemm` chooses its kernel by the number of rows
                assert!(error(&alone, &expected[0]) < tolerance, "{name}: {isa} {precision}: logits alone");
                assert!(error(&head.pre_logits, &expected[2]) < tolerance, "{name}: {isa} {precision}: pre_logits");
            } else {
                assert_eq!(&alone, logits, "{name}: {isa} {precision}: logits alone");
                assert_eq!(head, Output { features: vec![], ..output }, "{name}: {isa} {precision}: the head alone");
            }
        }
    }
}

#[test]
fn threads_and_batches_do_not_change_a_bit() {
    let config = Config { img_size: [96, 105], qk_norm: true, ..base() };
    let (_, weights) = model(&config);
    let pixels = pixels(&config, 7);
    for (isa, precision) in kernels() {
        let one = engine(&config, &weights, isa, precision, 1);
        let expected = one.forward(&pixels, 7).unwrap();
        for threads in [2, 3, 5] {
            let engine = engine(&config, &weights, isa, precision, threads);
            assert_eq!(engine.forward(&pixels, 7).unwrap(), expected, "{isa} {precision} on {threads} threads");
        }
        if isa == Isa::Portable {
            continue; // `gemm` chooses its kernel by the number of rows
        }
        for (i, image) in pixels.chunks(pixels.len() / 7).enumerate() {
            let alone = one.forward(image, 1).unwrap();
            let width = alone.features.len();
            assert_eq!(alone.features, expected.features[i * width..][..width], "{isa} {precision} image {i}");
        }
    }
}

/// fc2's rows are too long for all of them to stay in a cache: its sums stay there instead, in several blocks of rows and
/// groups of panels.
#[test]
fn layers_of_long_rows_against_f64() {
    let config = Config { embed_dim: 128, num_heads: 2, mlp_hidden: 3072, depth: 1, img_size: [66, 50], ..base() };
    let (reference, weights) = model(&config);
    let [_, expected, _] = expected(&config, &reference, 4);
    for (isa, precision) in kernels() {
        let [one, other] = [1, 3].map(|threads| {
            let engine = engine(&config, &weights, isa, precision, threads);
            (engine.precision(), engine.forward_features(&pixels(&config, 4), 4).unwrap())
        });
        assert_eq!(one, other, "{isa} {precision}");
        let error = error(&one.1, &expected);
        assert!(error < tolerance(one.0), "{isa} {precision}: features differ by {error:e}");
    }
}

#[test]
fn every_kernel_packs_as_the_layout_says() {
    for (isa, precision) in kernels() {
        let (kernel, ..) = kernel(isa, precision);
        let shapes = std::iter::once(kernel.shape()).chain(kernel.integers().map(Integers::shape));
        for (shape, chunks) in shapes.flat_map(|shape| [1, 2, 5].map(|chunks| (shape, chunks))) {
            let stride = chunks * shape.elements.chunk() + 3;
            let mut rows = Numbers(11).take(shape.cols * stride);
            if shape.elements == shape::Elements::Int8 {
                rows.iter_mut().for_each(|x| *x = (127.0 * *x).round());
            }
            let bytes = chunks * shape.cols * shape.elements.column_bytes();
            let [have, want] = [0; 2].map(|_| buffer::Buffer::new(bytes));
            // SAFETY: `rows` has a panel's columns as rows of `chunks` chunks, the buffers have room for the panel
            let [have, want] = unsafe {
                kernel.pack(shape, rows.as_ptr(), stride, chunks, have.ptr());
                panel::pack_panel(shape, rows.as_ptr(), stride, chunks, want.ptr());
                [&have, &want].map(|buffer| std::slice::from_raw_parts(buffer.ptr(), bytes))
            };
            assert!(have == want, "{isa} {precision}: {chunks} chunks of {shape:?}");
        }
    }
}

#[test]
fn a_streamed_model_answers_the_same_bits() {
    for (name, config) in configs() {
        for depth in [1, 2, 5] {
            let config = Config { depth, ..config.clone() };
            let (_, weights) = model(&config);
            let pixels = pixels(&config, 2);
            let weights = Arc::new(weights);
            for (isa, precision) in kernels() {
                let held = engine(&config, &weights, isa, precision, 2);
                let kernel = kernel(isa, precision);
                let streamed = Engine::streamed_with_kernel(&config, weights.clone(), Some(2), kernel).unwrap();
                assert!(streamed.weight_bytes() < held.weight_bytes());
                let answer = streamed.forward(&pixels, 2).unwrap();
                assert_eq!(answer, held.forward(&pixels, 2).unwrap(), "{name}: {isa} {precision}, {depth} deep");
                let [mut alone, mut want] = [vec![], vec![]];
                streamed.logits_into(&pixels, 2, &mut alone).unwrap();
                held.logits_into(&pixels, 2, &mut want).unwrap();
                assert_eq!(alone, want, "{name}: {isa} {precision}, {depth} deep: logits alone");
                let last = [depth - 1, 0];
                let tokens = streamed.intermediates(&pixels, 2, &last).unwrap();
                assert_eq!(tokens, held.intermediates(&pixels, 2, &last).unwrap(), "{name}: {isa} {precision}");
            }
        }
    }
}

#[test]
fn callers_at_once_get_their_own_answers() {
    let config = base();
    let (_, weights) = model(&config);
    let engine = engine(&config, &weights, Isa::choose().unwrap(), Precision::Auto, 2);
    let inputs: Vec<_> = (1..5).map(|i| Numbers(i).take(config.in_chans * 36 * 28 * (i as usize % 3 + 1))).collect();
    let batch = |input: &Vec<f32>| input.len() / (config.in_chans * 36 * 28);
    let expected: Vec<_> = inputs.iter().map(|input| engine.forward(input, batch(input)).unwrap()).collect();
    std::thread::scope(|scope| {
        for (input, expected) in inputs.iter().zip(&expected) {
            let engine = &engine;
            scope.spawn(move || {
                for _ in 0..20 {
                    assert_eq!(&engine.forward(input, batch(input)).unwrap(), expected);
                }
            });
        }
    });
}

#[test]
fn intermediates_are_the_blocks_tokens() {
    struct Tokens(Vec<Vec<f64>>);
    impl crate::vit::tap::Tap for Tokens {
        fn block(&mut self, _: usize, tokens: &Tensor) -> candle_core::Result<bool> {
            self.0.push(tokens.flatten_all()?.to_vec1()?);
            Ok(true)
        }
    }
    let config = Config { depth: 3, ..base() };
    let (reference, weights) = model(&config);
    let wide: Vec<f64> = pixels(&config, 2).into_iter().map(f64::from).collect();
    let x = Tensor::from_vec(wide, (2, 3, 36, 28), &Device::Cpu).unwrap();
    let mut tap = Tokens(Vec::new());
    reference.forward_tapped(&x, &mut tap).unwrap();
    let engine = engine(&config, &weights, Isa::choose().unwrap(), Precision::F32, 2);
    let found = engine.intermediates(&pixels(&config, 2), 2, &[2, 0]).unwrap();
    assert!(error(&found[0], &tap.0[2]) < 1e-5 && error(&found[1], &tap.0[0]) < 1e-5);
    let error = engine.intermediates(&pixels(&config, 2), 2, &[3]).unwrap_err().to_string();
    assert_eq!(error, "input: block 3 of a model of 3 blocks (counted from 0)");
}

#[test]
fn auto_is_f32_for_a_small_model_and_the_kernel_s_best_for_a_large_one() {
    let large = Config {
        img_size: [224, 224],
        patch_size: [16, 16],
        embed_dim: 768,
        num_heads: 12,
        mlp_hidden: 3072,
        depth: 12,
        ..base()
    };
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        let auto = |config: &Config| {
            Engine::plan(config, &EngineOptions { isa: Some(isa), ..EngineOptions::default() }).unwrap().2
        };
        assert_eq!(auto(&base()), Precision::F32);
        assert_eq!(auto(&large), if isa == Isa::Amx { Precision::Bf16x3 } else { Precision::F32 });
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let config = base();
    let (_, mut weights) = model(&config);
    let options = EngineOptions { threads: Some(1), ..EngineOptions::default() };
    let engine = Engine::new(&config, &weights, &options).unwrap();
    for (pixels, batch) in [(vec![0.0; 5], 1), (vec![], 0), (pixels(&config, 2), 1), (pixels(&config, 1), usize::MAX)] {
        assert!(matches!(engine.forward(&pixels, batch), Err(Error::Input(_))));
    }
    let parallel = Config { block: crate::BlockKind::ParallelThings, ..base() };
    assert!(
        matches!(Engine::new(&parallel, &weights, &options), Err(Error::Unsupported { why, .. }) if why.contains("Parallel"))
    );
    let name = "blocks.1.mlp.fc1.weight";
    weights.values.get_mut(name).unwrap()[77] = f32::NAN;
    let error = Engine::new(&config, &weights, &options).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("NaN"), "{error}");
    let streamed = Engine::streamed(&config, Arc::new(weights.clone()), &options).unwrap();
    assert_eq!(streamed.forward(&pixels(&config, 1), 1).unwrap_err().to_string(), error);
    weights.infos.remove(name);
    let error = Engine::new(&config, &weights, &options).unwrap_err().to_string();
    assert_eq!(error, format!("tensor `{name}`: missing"));
}

#[test]
fn int8_is_asked_for_or_refused_and_never_a_guess() {
    let config = base();
    let plan = |config: &Config, isa| {
        Engine::plan(config, &EngineOptions { isa: Some(isa), precision: Precision::Int8, ..EngineOptions::default() })
            .map(|(_, isa, precision)| (isa, precision))
    };
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        match plan(&config, isa) {
            Ok((ran, precision)) => {
                assert!(has_int8(isa) && matches!(ran, Isa::Amx | Isa::Avx512) && precision == Precision::Int8);
            }
            Err(error) => {
                assert!(matches!(&error, Error::Unsupported { why, .. } if why.contains("VNNI")), "{error}");
                assert!(!has_int8(isa));
            }
        }
        // 32 bits would not hold a sum of so many products of bytes
        let wide = Config { mlp_hidden: scale::WIDEST + 1, ..base() };
        assert!(matches!(plan(&wide, isa), Err(Error::Unsupported { why, .. }) if why.contains("65536")));
    }
}

#[test]
fn what_is_not_finite_does_not_become_a_number() {
    let config = base();
    let (_, weights) = model(&config);
    for (isa, precision) in kernels() {
        let engine = engine(&config, &weights, isa, precision, 2);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut pixels = pixels(&config, 2);
            pixels[1234] = bad;
            let logits = engine.forward(&pixels, 2).unwrap().logits.unwrap();
            let (first, second) = logits.split_at(config.num_classes);
            assert!(first.iter().all(|x| x.is_nan()), "{isa} {precision}: {bad} gives {first:?}");
            assert!(second.iter().all(|x| x.is_finite()), "{isa} {precision}: {second:?}");
        }
    }
}

/// Counts the allocations of each thread of the tests.
struct Counting;

thread_local! {
    static ALLOCATIONS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator unchanged
unsafe impl std::alloc::GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller promises the same of this layout
        unsafe { std::alloc::System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: std::alloc::Layout) {
        // SAFETY: the caller promises the same of this allocation
        unsafe { std::alloc::System.dealloc(p, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_pass_allocates_nothing_after_the_first() {
    for (name, config) in configs() {
        let (_, weights) = model(&config);
        for (isa, precision) in kernels() {
            if isa == Isa::Portable {
                continue; // `gemm` allocates its own packing buffers
            }
            // one thread, so that every allocation of the pass is counted on it
            let engine = engine(&config, &weights, isa, precision, 1);
            let pixels = pixels(&config, 3);
            let mut output = Output::default();
            engine.forward_into(&pixels, 3, &mut output).unwrap();
            let before = ALLOCATIONS.get();
            engine.forward_into(&pixels, 3, &mut output).unwrap();
            assert_eq!(ALLOCATIONS.get() - before, 0, "{name}: {isa} {precision}");
        }
    }
}

/// The largest relative error of an activation over a grid, where its value is not below `floor`.
fn worst<S: simd::Simd>(s: S, from: f32, to: f32, f: impl Fn(S, S::F) -> S::F, exact: impl Fn(f64) -> f64) -> f64 {
    let steps = 20_000;
    let mut worst = 0f64;
    for i in 0..steps {
        let x = from + (to - from) * i as f32 / steps as f32;
        let mut lanes = [0f32; 16];
        // SAFETY: no vector is longer
        unsafe { s.store(lanes.as_mut_ptr(), f(s, s.splat(x))) };
        let exact = exact(f64::from(x));
        worst = worst.max((f64::from(lanes[0]) - exact).abs() / exact.abs().max(1e-30));
    }
    worst
}

/// Φ(x) · 2 = erfc(−x/√2), by the continued fraction or the series, to 1e-15.
fn erfc(z: f64) -> f64 {
    if z < 0.0 {
        return 2.0 - erfc(-z);
    }
    let scale = 2.0 / std::f64::consts::PI.sqrt() * (-z * z).exp();
    if z < 2.5 {
        let (mut term, mut sum) = (z, z);
        for n in 1..200 {
            term *= 2.0 * z * z / f64::from(2 * n + 1);
            sum += term;
        }
        return 1.0 - scale * sum;
    }
    let mut fraction = 0.0;
    for n in (1..200).rev() {
        fraction = f64::from(n) / 2.0 / (z + fraction);
    }
    scale / 2.0 / (z + fraction)
}

/// The largest error of a GELU, as a part of what `of` makes of `x` and the right answer.
fn worst_gelu<S: simd::Simd>(s: S, gelu: fn(S, S::F) -> S::F, of: fn(f64, f64) -> f64) -> f64 {
    let phi = |x: f64| erfc(-x / 2f64.sqrt()) / 2.0;
    let mut worst = 0f64;
    for i in 0..400_000 {
        let x = -20.0 + 40.0 * i as f32 / 400_000.0;
        let mut lanes = [0f32; 16];
        // SAFETY: no vector is longer
        unsafe { s.store(lanes.as_mut_ptr(), gelu(s, s.splat(x))) };
        let (x, right) = (f64::from(x), f64::from(x) * phi(f64::from(x)));
        worst = worst.max((f64::from(lanes[0]) - right).abs() / of(x, right));
    }
    worst
}

fn activations_of<S: simd::Simd>(s: S) {
    // in f32 `1 + erf` cannot be more exact where x is negative, and is 6e-8 off by its rounding alone
    let error = worst_gelu(s, S::gelu, |x, _| x.abs().max(1e-30));
    assert!(error < 2.5e-7, "gelu is off by {error:e} of x");
    let error = worst_gelu(s, math::gelu_for_bf16::<S>, |_, right| right.abs() + 0.3);
    assert!(error < 3e-4, "gelu_for_bf16 is off by {error:e} of itself and 0.3");
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    // relative; in the tails the argument of `e` is rounded, which its size multiplies
    let cases = [
        ("exp", worst(s, -80.0, 80.0, math::exp::<S>, f64::exp), 2.5e-7),
        ("exp2", worst(s, -125.0, 0.0, math::exp2::<S>, f64::exp2), 2.5e-7),
        ("exp2_for_bf16", worst(s, -125.0, 0.0, math::exp2_for_bf16::<S>, f64::exp2), 7.5e-5),
        (
            "gelu_tanh",
            worst(s, -4.0, 8.0, math::gelu_tanh::<S>, |x| {
                x * sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x))
            }),
            4e-6,
        ),
        ("quick_gelu", worst(s, -20.0, 20.0, math::quick_gelu::<S>, |x| x * sigmoid(1.702 * x)), 4e-6),
        ("silu", worst(s, -20.0, 20.0, math::silu::<S>, |x| x * sigmoid(x)), 4e-6),
        ("relu", worst(s, -20.0, 20.0, math::relu::<S>, |x| x.max(0.0)), 1e-30),
    ];
    for (name, error, tolerance) in cases {
        assert!(error < tolerance, "{name} is off by {error:e}");
    }
    let gelus = [S::gelu, math::gelu_for_bf16::<S>, math::gelu_tanh::<S>, math::quick_gelu::<S>];
    for f in gelus.into_iter().chain([math::exp::<S>, math::silu::<S>, math::relu::<S>]) {
        let mut lanes = [0f32; 16];
        // SAFETY: no vector is longer
        unsafe { s.store(lanes.as_mut_ptr(), f(s, s.splat(f32::NAN))) };
        assert!(lanes[0].is_nan(), "NaN stays NaN");
    }
}

#[test]
fn activations_against_f64() {
    activations_of(portable::Portable);
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(avx2) = avx2::Avx2::detect() {
            activations_of(avx2);
        }
        if let Some(avx512) = avx512::Avx512::<false>::detect() {
            activations_of(avx512);
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 24, ..Default::default() })]

    /// Random shapes, so that every remainder of rows, columns, heads and depth turns up, on every kernel.
    #[test]
    fn random_shapes_against_f64(
        heads in 1usize..4,
        head_dim in 1usize..41,
        hidden in 1usize..150,
        patch in (1usize..7, 1usize..7),
        grid in (1usize..9, 1usize..9),
        classes in 1usize..70,
        threads in 1usize..4,
        batch in 1usize..3,
    ) {
        let config = Config {
            patch_size: [patch.0, patch.1],
            img_size: [patch.0 * grid.0, patch.1 * grid.1],
            embed_dim: heads * head_dim,
            num_heads: heads,
            mlp_hidden: hidden,
            num_classes: classes,
            depth: 1,
            // a row of two or three numbers may have next to no variance, and LayerNorm makes noise up to 1/√ε larger;
            // the fixed shapes have the usual ε
            ln_eps: 0.5,
            ..base()
        };
        let (reference, weights) = model(&config);
        let expected = expected(&config, &reference, batch);
        for (isa, precision) in kernels() {
            let engine = engine(&config, &weights, isa, precision, threads);
            let output = engine.forward(&pixels(&config, batch), batch).unwrap();
            let tolerance = match engine.precision() {
                Precision::Int8 => 0.25,
                Precision::Bf16 => 0.1,
                Precision::Bf16x3 => 2e-4,
                _ => 2e-5,
            };
            let error = error(&output.features, &expected[1]);
            proptest::prop_assert!(error < tolerance, "{} {}: {:e} for {:?}", isa, precision, error, config);
        }
    }
}
