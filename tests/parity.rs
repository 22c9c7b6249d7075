//! Model folders as the Hub has them, against the answers of timm and transformers.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Result, Tensor};
use serde::Deserialize;
use vit_model::{VisionTransformer, checkpoint};

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
    let mut answers = HashMap::from([("pre_logits", model.forward_pre_logits(&features)?)]);
    if model.config().num_classes > 0 {
        answers.insert("logits", model.forward_head(&features)?);
    }
    answers.insert("features", features);
    Ok(answers)
}

/// Opens the folder, runs its input, compares what its `meta.json` names.
fn judge(case: &Path) -> std::result::Result<(), String> {
    let meta: Meta = serde_json::from_slice(&fs::read(case.join("meta.json")).unwrap()).unwrap();
    let expect = candle_core::safetensors::load(case.join("expect.safetensors"), &Device::Cpu).unwrap();
    let model = match checkpoint::open(case).and_then(|checkpoint| checkpoint.model(DType::F32, &Device::Cpu)) {
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

#[test]
fn a_state_dict_of_torchvisions_gives_its_answers() {
    let heads = 3;
    for case in cases("torchvision") {
        let file = case.join("model.safetensors");
        let expect = candle_core::safetensors::load(case.join("expect.safetensors"), &Device::Cpu).unwrap();
        let model = checkpoint::torchvision(&file, heads).unwrap().model(DType::F32, &Device::Cpu).unwrap();
        let answers = answers(&model, &expect["x"]).unwrap();
        for name in ["features", "logits"] {
            let d = difference(&answers[name], &expect[name]);
            assert!(d <= 1e-4, "{}: `{name}` differs by {d:.2e}", case.display());
        }
        // 12 channels are none of torchvision's own models': their heads are not guessed
        let said = checkpoint::open(&file).unwrap_err().to_string();
        assert!(said.contains("heads") && said.contains("--num-heads"), "{said}");
        let said = checkpoint::torchvision(&file, 5).unwrap_err().to_string();
        assert!(said.contains("num_heads") && said.contains("model.safetensors"), "{said}");
    }
}

/// The same model in doubles, and in two files under an index.
#[test]
fn doubles_and_shards_give_the_same_answers() {
    for case in ["timm/vit_base_patch16_224", "hf/vit_cls"] {
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(case);
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "preprocessor_config.json", "meta.json", "expect.safetensors"] {
            let _ = fs::copy(case.join(name), folder.path().join(name)); // timm has no processor
        }
        let tensors = candle_core::safetensors::load(case.join("model.safetensors"), &Device::Cpu).unwrap();
        let mut doubles: Vec<(String, Tensor)> =
            tensors.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F64).unwrap())).collect();
        doubles.sort_by(|a, b| a.0.cmp(&b.0));
        let save = |name: &str, part: &[(String, Tensor)]| {
            let part: HashMap<String, Tensor> = part.iter().cloned().collect();
            candle_core::safetensors::save(&part, folder.path().join(name)).unwrap();
        };
        save("model.safetensors", &doubles);
        judge(folder.path()).unwrap();

        fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let (a, b) = doubles.split_at(doubles.len() / 2);
        save("a.safetensors", a);
        save("b.safetensors", b);
        let index = |b_is: &str| {
            let place = |(i, (name, _)): (usize, &(String, Tensor))| {
                (name.clone(), if i < a.len() { "a.safetensors" } else { b_is })
            };
            let map: HashMap<String, &str> = doubles.iter().enumerate().map(place).collect();
            let index = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
            fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        };
        index("b.safetensors");
        judge(folder.path()).unwrap();
        // a file that is not there, not of this folder, or does not hold what is said
        for (wrong, said) in [
            ("c.safetensors", "c.safetensors"),
            ("../b.safetensors", "no file of this folder"),
            ("a.safetensors", "does not hold"),
        ] {
            index(wrong);
            let error = checkpoint::open(folder.path()).unwrap_err().to_string();
            assert!(error.contains(said), "{wrong}: {error}");
        }
    }
}

#[test]
fn what_is_outside_the_family_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (config, said) in [
        (r#"{"model_type": "siglip2_vision_model"}"#, "NaFlex"),
        (r#"{"model_type": "eva02"}"#, "eva02"),
        (r#"{"model_type": "swin"}"#, "swin"),
        (r#"{"architecture": "eva02_base_patch14_225"}"#, "did you mean eva02_base_patch14_2"),
        (r#"{"architecture": "resnet50"}"#, "only timm's vision_transformer.py"),
    ] {
        fs::write(folder.path().join("config.json"), config).unwrap();
        let error = checkpoint::info(folder.path()).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains("config.json"), "{config}: {error}");
    }
}
