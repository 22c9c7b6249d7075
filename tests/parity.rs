//! Model folders as the Hub has them, against the answers of timm and transformers.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Result, Tensor};
use serde::Deserialize;
use vit_model::{VisionTransformer, load};

/// The part of a case's `meta.json` that is read here.
#[derive(Deserialize)]
struct Meta {
    /// `ok`, or `either`: a refusal is right too.
    expect: String,
    /// The tensors of `expect.safetensors` to compare.
    compare: Vec<String>,
    num_classes: Option<usize>,
}

fn cases(kind: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(kind);
    let mut cases: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(!cases.is_empty(), "{}", folder.display());
    cases
}

/// The largest difference, over the largest value where that is below 1: the pack's own measure.
fn difference(have: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(have.dims(), want.dims());
    let largest = |t: Tensor| -> Result<f32> { t.abs()?.flatten_all()?.max(0)?.to_scalar() };
    let scale = largest(want.clone()).unwrap().min(1.0);
    largest((have - want).unwrap()).unwrap() / scale
}

fn answers(model: &VisionTransformer, x: &Tensor) -> vit_model::Result<HashMap<&'static str, Tensor>> {
    let features = model.forward_features(x)?;
    let mut answers = HashMap::from([("pre_logits", model.forward_head(&features, true)?)]);
    if model.config().num_classes > 0 {
        answers.insert("logits", model.forward_head(&features, false)?);
    }
    answers.insert("features", features);
    Ok(answers)
}

/// Opens the folder, runs its input, compares what its `meta.json` names.
fn judge(case: &Path) -> std::result::Result<(), String> {
    let meta: Meta = serde_json::from_slice(&fs::read(case.join("meta.json")).unwrap()).unwrap();
    let expect = candle_core::safetensors::load(case.join("expect.safetensors"), &Device::Cpu).unwrap();
    let model = match load::open(case).and_then(|checkpoint| checkpoint.model(DType::F32, &Device::Cpu)) {
        Ok(model) => model,
        Err(_) if meta.expect == "either" => return Ok(()),
        Err(why) => return Err(why.to_string()),
    };
    let answers = answers(&model, &expect["x"]).map_err(|e| e.to_string())?;
    for name in &meta.compare {
        let Some(have) = answers.get(name.as_str()) else {
            if name == "logits" && meta.num_classes == Some(0) {
                continue;
            }
            return Err(format!("no `{name}`"));
        };
        // f32 sums in another order than PyTorch's differ by about 1e-6; a wrong ε by 1e-3, a tanh GELU by 2.8e-4
        let d = difference(have, &expect[name]);
        if d.is_nan() || d > 1e-4 {
            return Err(format!("`{name}` differs by {d:.2e}"));
        }
    }
    Ok(())
}

fn judge_all(kind: &str) {
    let failed: Vec<String> = cases(kind)
        .iter()
        .filter_map(|case| judge(case).err().map(|why| format!("{}: {why}", case.file_name().unwrap().display())))
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn timm_folders_give_timms_answers() {
    judge_all("timm");
    judge_all("timm_extra");
}

#[test]
fn transformers_folders_give_timms_meaning_of_transformers_answers() {
    judge_all("hf");
}
