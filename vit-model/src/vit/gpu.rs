//! Tests for the feature `cuda` on an NVIDIA GPU: candle's modules return what they return on the CPU, they can be
//! trained, and many threads can use one predictor.

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use super::gradients::{loss, noise, trainable, variants};
use super::intermediates::{FeatureFormat, FinalNorm};
use super::tap::Blocks;
use crate::{
    Config, Precision, Predictor, VisionTransformer, checkpoint, predictor, predictor::Wanted, vit::pos_embed::Resample,
};

fn gpu() -> Device {
    Device::new_cuda(0).expect("the tests of the feature `cuda` need an NVIDIA GPU")
}

/// The largest difference over the largest value that is expected. `want` lies on the CPU, in f64.
fn difference(have: &Tensor, want: &Tensor) -> f64 {
    let have = have.to_dtype(DType::F64).unwrap().to_device(&Device::Cpu).unwrap();
    assert_eq!(have.dims(), want.dims());
    largest(&(have - want).unwrap()) / largest(want)
}

fn largest(x: &Tensor) -> f64 {
    x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// The model with the values of `vars`, without gradients, in another type or place.
fn frozen(config: &Config, vars: &[(String, candle_core::Var)], dtype: DType, device: &Device) -> VisionTransformer {
    let there = |x: &Tensor| x.detach().to_dtype(dtype).unwrap().to_device(device).unwrap();
    let tensors = vars.iter().map(|(name, var)| (name.clone(), there(var.as_tensor()))).collect();
    VisionTransformer::new(config, VarBuilder::from_tensors(tensors, dtype, device)).unwrap()
}

#[test]
fn answers_are_those_of_the_cpu() {
    let device = gpu();
    // sums in another order, as often as a number is rounded on its way through the network
    let limits = [(DType::F64, 1e-12), (DType::F32, 1e-5), (DType::F16, 2e-2), (DType::BF16, 1e-1)];
    for (name, config) in variants() {
        let (_, vars) = trainable(&config);
        let x = noise(7, &[2, 2, 6, 4]);
        let want = frozen(&config, &vars, DType::F64, &Device::Cpu).forward(&x).unwrap();
        for (dtype, limit) in limits {
            let vit = frozen(&config, &vars, dtype, &device);
            let x = x.to_dtype(dtype).unwrap().to_device(&device).unwrap();
            let d = difference(&vit.forward(&x).unwrap(), &want);
            assert!(d <= limit, "{name} in {dtype:?}: {d:.2e}");
        }
    }
}

#[test]
fn what_is_seen_on_the_way_is_what_the_cpu_sees() {
    let device = gpu();
    for (name, config) in variants() {
        let (_, vars) = trainable(&config);
        let [here, there] = [&Device::Cpu, &device].map(|device| {
            let mut vit = frozen(&config, &vars, DType::F64, device);
            vit.set_dynamic_size(Some(Resample::Bicubic));
            // of another size than the model's own: its position embeddings are resampled, in f64
            let x = noise(8, &[2, 2, 8, 6]).to_device(device).unwrap();
            let (last, steps) =
                vit.forward_intermediates(&x, Blocks::All, FinalNorm::Apply, FeatureFormat::Nchw).unwrap();
            let mut seen = vit.attention_maps(&x).unwrap();
            seen.push(last);
            seen.extend(steps.into_iter().flat_map(|step| [Some(step.patches), step.prefix]).flatten());
            seen
        });
        assert!(here.len() == there.len() && here.len() >= 5, "{name}: {} and {}", here.len(), there.len());
        for (have, want) in there.iter().zip(&here) {
            let d = difference(have, want);
            assert!(d <= 1e-12, "{name}: {d:.2e}");
        }
    }
}

#[test]
fn gradients_are_those_of_the_cpu() {
    let device = gpu();
    for (name, config) in variants() {
        let (here, vars) = trainable(&config);
        let map = VarMap::new();
        let there = VisionTransformer::new(&config, VarBuilder::from_varmap(&map, DType::F64, &device)).unwrap();
        let moved = map.data().lock().unwrap().clone();
        for (parameter, var) in &vars {
            moved[parameter].set(&var.to_device(&device).unwrap()).unwrap();
        }
        let x = noise(7, &[2, 2, 6, 4]);
        let want = loss(&here, &x).backward().unwrap();
        let have = loss(&there, &x.to_device(&device).unwrap()).backward().unwrap();
        for (parameter, var) in &vars {
            let (have, want) = (have.get(&moved[parameter]).unwrap(), want.get(var).unwrap());
            // the bias of k has none but for rounding: the softmax does not see it
            let d = difference(have, want) * largest(want).min(1.0);
            assert!(d <= 1e-10, "{name}: {parameter}: {d:.2e}");
        }
    }
}

#[test]
fn many_threads_may_ask_one_predictor() {
    let digits =
        checkpoint::Checkpoint::from_bytes("digits", include_bytes!("../../digits/model.safetensors")).unwrap();
    let ask = |device| Predictor::builder().device(device).precision(Precision::F32).checkpoint(&digits).unwrap();
    let (here, there) = (ask(crate::Device::Cpu), ask(crate::Device::Cuda(0)));
    assert_eq!(there.backend().kernel, predictor::Kernel::CandleCuda);
    let [h, w] = here.config().img_size;
    let batch = 5;
    let pixels =
        noise(3, &[batch * here.config().in_chans * h * w]).to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
    let forward = |model: &Predictor, wanted| {
        let mut output = predictor::Output::default();
        model.forward_into(&pixels, batch, wanted, &mut output).unwrap();
        output
    };
    let (want, have) = (forward(&here, Wanted::All), forward(&there, Wanted::All));
    for (have, want) in [(&have.features, &want.features), (&have.pre_logits, &want.pre_logits)] {
        let d = have.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(have.len() == want.len() && d < 1e-4, "{d:.2e}");
    }
    let head = forward(&there, Wanted::Head);
    assert_eq!((&head.logits, &head.pre_logits, head.features.len()), (&have.logits, &have.pre_logits, 0));
    // each thread has a stream of its own; an answer that another thread touched would differ
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert_eq!(forward(&there, Wanted::Logits).logits, have.logits);
                }
            });
        }
    });
}
