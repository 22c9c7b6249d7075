//! Folders in forms that people have, read as timm and transformers read them (`tests/fixtures/readings`).

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use vit_model::{Checkpoint, ProblemType};

use crate::support::{root, run};

fn folder(name: &str) -> PathBuf {
    root().join("tests/fixtures/readings").join(name)
}

/// A copy of a folder whose config.json has other values under some keys.
fn changed(name: &str, keys: &[(&str, Value)]) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(folder(name)).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let path = copy.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in keys {
        config[key] = value.clone();
    }
    std::fs::write(&path, config.to_string()).unwrap();
    copy
}

fn expected(folder: &Path, name: &str) -> Tensor {
    let file = candle_core::safetensors::load(folder.join("expect.safetensors"), &Device::Cpu).unwrap();
    file[name].clone()
}

/// The largest difference, relative to the largest magnitude.
fn far(a: &Tensor, b: &Tensor) -> f32 {
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len());
    let top = b.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    a.iter().zip(&b).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs())) / top
}

// f32 sums in another order differ by 1e-6; another resampling of the positions by 1e-2
const TOLERANCE: f32 = 2e-5;

#[test]
fn answers_are_those_of_the_library() {
    for name in ["dinov2", "dinov2_registers", "clip_classify", "timm_wrapper", "timm_positions"] {
        let folder = folder(name);
        let model = Checkpoint::open(&folder).unwrap().model(DType::F32, &Device::Cpu).unwrap();
        let x = expected(&folder, "x");
        let difference = if name.starts_with("dinov2") {
            far(&model.forward_features(&x).unwrap(), &expected(&folder, "features"))
        } else {
            far(&model.forward(&x).unwrap(), &expected(&folder, "logits"))
        };
        assert!(difference < TOLERANCE, "{name}: {difference}");
    }
}

#[test]
fn another_size_starts_from_the_stored_positions() {
    // to the size of config.json and to that of the processor again: the same table, not one that was resampled twice
    let there = Checkpoint::open(folder("dinov2")).unwrap();
    assert_eq!((there.config().img_size, there.stored_img_size()), ([32, 32], [56, 56]));
    let positions = |checkpoint: &Checkpoint| checkpoint.weights().read_f32("pos_embed").unwrap();
    let first = positions(&there);
    let back = there.resized([56, 56]).unwrap();
    assert_eq!(back.config().num_patches(), 49);
    assert_eq!(positions(&back.resized([32, 32]).unwrap()), first);
}

#[test]
fn logits_mean_what_the_configuration_says() {
    let image = root().join("tests/fixtures/images/rgb.png");
    let ask = |folder: &Path| {
        let answer = run(["predict", "-f", "json", image.to_str().unwrap(), "-m", folder.to_str().unwrap()]);
        let said = answer.stderr.clone();
        let answer: Value = serde_json::from_str(&answer.good()).unwrap();
        (answer[0]["predictions"].as_array().unwrap().clone(), said)
    };
    let (softmax, said) = ask(&folder("clip_classify"));
    // the folder has no processor's file
    assert!(said.contains("note: assumed: preprocess: mean"), "{said}");
    let sum: f64 = softmax.iter().map(|p| p["probability"].as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-5);
    let several = changed("clip_classify", &[("problem_type", json!("multi_label_classification"))]);
    for p in ask(several.path()).0 {
        let sigmoid = 1.0 / (1.0 + (-p["logit"].as_f64().unwrap()).exp());
        assert!((p["probability"].as_f64().unwrap() - sigmoid).abs() < 1e-6);
    }
    let values = changed("clip_classify", &[("problem_type", json!("regression"))]);
    let (values, _) = ask(values.path());
    assert!(values.iter().all(|p| p["value"].is_number() && p["probability"].is_null()), "{values:?}");
    let unknown = changed("clip_classify", &[("problem_type", json!("guessing"))]);
    assert!(Checkpoint::open(unknown.path()).unwrap_err().to_string().contains("problem_type"));
    assert_eq!(Checkpoint::open(several.path()).unwrap().info.problem_type, ProblemType::MultiLabel);
}

#[test]
fn label_names_that_do_not_fit_are_said_and_stop_nothing() {
    let names = |labels: Value| {
        let copy = changed("timm_wrapper", &[("label_names", labels)]);
        let info = Checkpoint::open(copy.path()).unwrap().info;
        let assumed = info.source.assumed().join(" ");
        (info.labels.unwrap_or_default(), assumed)
    };
    assert_eq!(names(json!(["a", "b", "c"])), (vec!["a".into(), "b".into(), "c".into()], String::new()));
    assert_eq!(names(json!({"2": "c", "0": "a", "1": "b"})).0, ["a", "b", "c"]);
    let (labels, assumed) = names(json!(["a"]));
    assert_eq!(labels, ["a", "1", "2"]);
    assert!(assumed.contains("label"), "{assumed}");
}

/// timm's own repositories name no classes, but their tag says which subset of ImageNet they know. A head of one's own on such a
/// model is not named after it.
#[test]
fn imagenet_is_named_where_the_tag_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let read = |classes: usize, tag: &str| {
        let config = serde_json::json!({
            "architecture": "vit_tiny_patch16_224", "num_classes": classes,
            "pretrained_cfg": { "tag": tag, "input_size": [3, 224, 224], "num_classes": classes },
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        vit_model::checkpoint::info(dir.path()).unwrap()
    };
    let info = read(1000, "augreg_in21k_ft_in1k");
    // timm.data.ImageNetInfo().index_to_description(281) is "tabby, tabby cat"
    assert_eq!(info.labels.as_ref().unwrap()[281], "tabby");
    let assumed = info.source.assumed();
    assert!(
        assumed.iter().any(|note| note.contains("ImageNet-1k") && note.contains("augreg_in21k_ft_in1k")),
        "{assumed:?}"
    );
    assert_eq!(read(21843, "augreg_in21k").labels.unwrap()[0], "organism");
    for (classes, tag) in [(5, "augreg_in21k_ft_in1k"), (1000, "mine"), (0, "dino")] {
        assert!(read(classes, tag).labels.is_none(), "{classes} {tag}");
    }
}

/// Keys that timm writes and ignores, or that replace more than they name.
#[test]
fn keys_of_timm_mean_what_they_mean_to_timm() {
    let folder = tempfile::tempdir().unwrap();
    let read = |architecture: &str, more: serde_json::Value| {
        let mut config = serde_json::json!({ "architecture": architecture, "pretrained_cfg": {} });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        vit_model::checkpoint::info(folder.path())
    };
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    // timm builds the pooling from the architecture and model_args
    let plain = read("vit_base_patch16_224", json("{}")).unwrap();
    let told = read("vit_base_patch16_224", json(r#"{"global_pool": "avg"}"#)).unwrap();
    assert_eq!(plain.model, told.model);
    assert!(told.source.assumed().iter().any(|said| said.starts_with("global_pool")), "{told:?}");
    let same = read("vit_base_patch16_224", json(r#"{"global_pool": "token"}"#)).unwrap();
    assert!(same.source.assumed().is_empty(), "{same:?}");
    let set = read("vit_base_patch16_224", json(r#"{"global_pool": "token", "model_args": {"global_pool": "avg"}}"#));
    assert_eq!(set.unwrap().model.global_pool, vit_model::Pool::Avg);
    // the norm of model_args replaces the architecture's with its epsilon of 1e-5
    let clip = "vit_base_patch32_clip_224";
    assert_eq!(read(clip, json("{}")).unwrap().model.ln_eps, 1e-5);
    for norm in [r#""layernorm""#, r#""LayerNorm""#, r#""layer_norm""#, r#""""#, "null"] {
        let args = json(&format!(r#"{{"model_args": {{"norm_layer": {norm}}}}}"#));
        let model = read(clip, args).unwrap().model;
        assert_eq!((model.norm, model.ln_eps), (vit_model::NormKind::LayerNorm, 1e-6), "{norm}");
    }
    let quick = "vit_base_patch32_clip_quickgelu_224";
    let model = read(quick, json(r#"{"model_args": {"act_layer": null}}"#)).unwrap().model;
    assert_eq!(model.act, vit_model::Activation::Gelu);
    for bad in ["batchnorm", "simplenorm"] {
        let said =
            read(clip, json(&format!(r#"{{"model_args": {{"norm_layer": "{bad}"}}}}"#))).unwrap_err().to_string();
        assert!(said.contains("norm_layer") && said.contains(bad), "{said}");
    }
}

/// An activation of the pooler that is not read is refused where the pooler is used.
#[test]
fn the_poolers_activation_is_read_or_refused() {
    let from = root().join("tests/fixtures/parity/hf/vit_cls");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let dim = config["hidden_size"].as_u64().unwrap() as usize;
    let zeros = vec![0; dim * dim * 4];
    let view = |shape: &[usize]| {
        let len = 4 * shape.iter().product::<usize>();
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &zeros[..len]).unwrap()
    };
    let poolers = [("vit.pooler.dense.weight", view(&[dim, dim])), ("vit.pooler.dense.bias", view(&[dim]))];
    for head in [true, false] {
        // a classifier does not use its pooler
        let own = file.iter().filter(|(name, _)| head || !name.starts_with("classifier"));
        let tensors = safetensors::serialize(own.chain(poolers.clone()), None).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), tensors).unwrap();
        for (key, value, good) in [
            ("pooler_act", json!("tanh"), true),
            ("pooler_act", json!("relu"), false),
            ("pooler_output_size", json!(dim), true),
            ("pooler_output_size", json!(dim + 1), false),
        ] {
            let mut config = config.clone();
            config[key] = value;
            std::fs::write(&path, config.to_string()).unwrap();
            match vit_model::checkpoint::open(folder.path()) {
                Ok(model) => assert!((head || good) && model.config().pre_logits.is_some() != head, "{key}"),
                Err(error) => assert!(!head && !good && error.to_string().contains(key), "{key}: {error}"),
            }
        }
    }
}
