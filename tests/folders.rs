//! Folders that are written for timm and for transformers: opened by this library, they are the model that was converted.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use vit_convert::convert;
use vit_model::{Checkpoint, Existing, Format, SaveOptions};

use crate::support::{self, unproven};

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let model = checkpoint.model(DType::F32, &Device::Cpu).unwrap();
    let c = model.config();
    let [h, w] = c.img_size;
    let n = 2 * c.in_chans * h * w;
    let pixels: Vec<f32> = (0..n).map(|k| (k as f32 * 0.7).sin() + (k as f32 * 0.013).cos()).collect();
    let x = Tensor::from_vec(pixels, (2, c.in_chans, h, w), &Device::Cpu).unwrap();
    model.forward(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn save(model: &Checkpoint, format: Format, path: &Path) -> vit_model::Result<Checkpoint> {
    model.save(path, format)?;
    assert!(model.save(path, format).is_err(), "a model is not replaced without being told to");
    model.save_with(path, format, &SaveOptions::new().existing(Existing::Replace))?;
    Checkpoint::open(path)
}

/// Takes our own document out of a folder's weights: then `config.json` must say all of it.
fn without_document(folder: &Path) {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    std::fs::write(&path, safetensors::serialize(file.tensors(), None).unwrap()).unwrap();
}

/// The largest difference, relative to the largest magnitude.
fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let top = a.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs())) / top
}

#[test]
fn folders_open_again_with_the_same_answers() {
    let (mut timm, mut hf, mut refused) = (0, 0, 0);
    for case in std::fs::read_dir(support::root().join("tests/fixtures/zoo")).unwrap() {
        let case = case.unwrap().path();
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let Ok(converted) = convert(case.join("model.onnx"), &unproven()) else { continue };
        let model = converted.checkpoint();
        let own = logits(model);
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("timm");
        match save(model, Format::Timm, &path) {
            Ok(back) => {
                let spelled = &back.info.model;
                // a bias of zeros is added, and two linears are one: the sums are the same but for their order
                assert!(far(&own, &logits(&back)) <= 2e-6, "{name}: timm's folder answers differently");
                without_document(&path);
                let mut read = Checkpoint::open(&path).unwrap_or_else(|e| panic!("{name}, by config.json: {e}"));
                let told = (read.info.model.ln_eps / spelled.ln_eps - 1.0).abs() < 0.05;
                assert!(told || spelled.ln_eps < 1e-6, "{name}: ε {}", read.info.model.ln_eps);
                read.info.model.ln_eps = spelled.ln_eps;
                if spelled.num_classes == 0 {
                    // of a head that is not there
                    read.info.model.head_bias = spelled.head_bias;
                }
                assert_eq!(&read.info.model, spelled, "{name}, by config.json");
                timm += 1;
            }
            Err(error) => {
                assert!(error.to_string().contains("timm has no Vision Transformer"), "{name}: {error}");
                refused += 1;
            }
        }
        match save(model, Format::Transformers, &out.path().join("hf")) {
            Ok(back) => {
                assert!(far(&own, &logits(&back)) <= 2e-6, "{name}: transformers' folder answers differently");
                hf += 1;
            }
            Err(error) => {
                assert!(error.to_string().contains("--to hf"), "{name}: {error}");
                refused += 1;
            }
        }
    }
    assert!(timm >= 25 && hf >= 20 && refused > 0, "timm {timm}, hf {hf}, refused {refused}");
}
