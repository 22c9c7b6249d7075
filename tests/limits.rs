//! Numbers of a file that are far too large, or negative: an error or the usual answer, at once and in little memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Done, Parts, root};

/// What each number is replaced by.
const NUMBERS: [i64; 4] = [1 << 31, 1 << 32, -1, 1_000_000];

/// Address space of a run in kB, with one thread: what the program takes for a small model, and 200 MB.
const MEMORY: usize = 400_000;

/// A release build answers in a tenth of a second. This is a debug build, on a machine that others use.
const TIME: Duration = Duration::from_secs(10);

/// A document with one number replaced, and which one.
fn mutations(document: &Value, absent: &[&str]) -> Vec<(String, Value)> {
    let mut document = document.clone();
    if let Some(map) = document.as_object_mut() {
        // keys that the file leaves to their defaults
        for key in absent {
            map.entry(*key).or_insert(json!(1));
        }
    }
    let mut paths = Vec::new();
    walk(&document, &mut String::new(), &mut paths);
    let mut found = Vec::new();
    for path in paths {
        let mut numbers: Vec<Value> = NUMBERS.map(Value::from).to_vec();
        numbers.extend([json!(1u64 << 63), json!(1e300)]);
        for number in numbers {
            let mut changed = document.clone();
            *changed.pointer_mut(&path).unwrap() = number.clone();
            found.push((format!("{path} = {number}"), changed));
        }
    }
    found
}

/// The places of all numbers; of a long list or object only the first, since the others are alike.
fn walk(value: &Value, path: &mut String, found: &mut Vec<String>) {
    let end = path.len();
    match value {
        Value::Number(_) => found.push(path.clone()),
        Value::Array(list) => {
            for (i, value) in list.iter().enumerate().take(2) {
                path.push_str(&format!("/{i}"));
                walk(value, path, found);
                path.truncate(end);
            }
        }
        Value::Object(map) => {
            let few = if map.len() > 60 { 2 } else { 60 };
            for (key, value) in map.iter().take(few) {
                path.push_str(&format!("/{}", key.replace('~', "~0").replace('/', "~1")));
                walk(value, path, found);
                path.truncate(end);
            }
        }
        _ => {}
    }
}

/// Runs vit-cli with one thread in little memory.
fn bounded(args: &[&str], folder: &Path) -> Done {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -v {MEMORY}; exec \"$@\""), "sh", env!("CARGO_BIN_EXE_vit-cli")]);
    command.args(args).current_dir(folder).stdin(Stdio::null());
    for name in ["VIT_MODEL", "VIT_CPU", "RUST_BACKTRACE"] {
        command.env_remove(name);
    }
    command.env("HF_HUB_OFFLINE", "1").env("RAYON_NUM_THREADS", "1").env("CANDLE_NUM_THREADS", "1");
    Done::from(command.env("MALLOC_ARENA_MAX", "1").output().unwrap())
}

struct Case {
    /// A folder of fixtures, copied; or one file.
    from: &'static str,
    file: &'static str,
    args: &'static [&'static str],
    /// Keys that are read and that the fixture lacks.
    absent: &'static [&'static str],
}

const HF: &[&str] = &[
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "mlp_ratio",
    "image_size",
    "patch_size",
    "num_channels",
    "num_register_tokens",
    "layer_norm_eps",
    "layerscale_value",
    "projection_dim",
    "num_labels",
    "encoder_stride",
    "pooler_output_size",
];
const PROCESSOR: &[&str] =
    &["size", "crop_size", "crop_pct", "resample", "rescale_factor", "image_mean", "image_std", "size_divisor"];

fn cases() -> Vec<Case> {
    let predict = &["predict", "--threads", "1", "-m", "model", "image.png"];
    let embed = &["embed", "--threads", "1", "-m", "model", "image.png"];
    let words = &["predict", "--threads", "1", "-m", "model", "image.png", "--labels", "cat,dog"];
    let case = |from, file, args, absent| Case { from, file, args, absent };
    let mut cases = vec![
        case("parity/hf/vit_cls", "config.json", &predict[..], HF),
        case("parity/hf/dinov2_cls", "config.json", predict, HF),
        case("parity/hf/siglip_vision", "config.json", embed, HF),
        case("parity/hf/vit_cls", "preprocessor_config.json", predict, PROCESSOR),
        case("parity/hf/dinov2_cls", "preprocessor_config.json", predict, PROCESSOR),
        case("parity/timm/vit_base_patch16_224", "config.json", predict, &["num_features", "crop_pct", "input_size"]),
        case("parity/timm/test_vit4", "config.json", predict, &[]),
        case("parity/timm/flexivit_small", "config.json", predict, &[]),
    ];
    let open_clip = &["vision_cfg", "quick_gelu"];
    cases.push(case("containers/open_clip", "open_clip_config.json", embed, open_clip));
    for two_tower in ["two_tower/clip", "two_tower/siglip"] {
        for file in ["config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json"]
        {
            let absent: &[&str] = if file == "tokenizer_config.json" { &["model_max_length"] } else { &[] };
            cases.push(case(two_tower, file, words, absent));
        }
    }
    cases
}

#[test]
fn numbers_in_configurations_are_bounded_before_they_are_used() {
    let fixtures = root().join("tests/fixtures");
    let mut runs = 0;
    for case in cases() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        copy(&fixtures.join(case.from), &model, folder.path());
        let file = model.join(case.file);
        let Ok(bytes) = fs::read(&file) else { continue };
        bounded(case.args, folder.path()).good();
        let mut document: Value = serde_json::from_slice(&bytes).unwrap();
        if case.from.contains("timm/") {
            arguments(&mut document);
        }
        for (what, document) in mutations(&document, case.absent) {
            fs::write(&file, document.to_string()).unwrap();
            check(&format!("{} {}: {what}", case.from, case.file), case.args, folder.path());
            runs += 1;
        }
    }
    assert!(runs > 500, "{runs}");
}

/// Every number that timm's `model_args` can set.
fn arguments(document: &mut Value) {
    let args = document.as_object_mut().unwrap().entry("model_args").or_insert_with(|| json!({}));
    for key in ["img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "reg_tokens"] {
        args[key] = 1.into();
    }
    for key in ["mlp_ratio", "init_values", "drop_rate", "unknown"] {
        args[key] = 1.0.into();
    }
}

/// The document in our own files, and open_clip's.
#[test]
fn numbers_in_documents_are_bounded_before_they_are_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    fs::copy(root().join("weights/digits/samples/0.png"), folder.path().join("image.png")).unwrap();
    let args = ["predict", "--threads", "1", "-m", "model", "image.png"];
    let mut parts = Parts::of(&fs::read(root().join("weights/digits/model.safetensors")).unwrap());
    parts.without_checksums();
    parts.document["model"]["reg_tokens"] = 0.into();
    parts.document["model"]["pre_logits"] = json!({ "size": 1, "act": "tanh" });
    parts.document["preprocess"]["resize"] = json!({ "exact": [1, 1] });
    for (what, document) in mutations(&parts.document, &[]) {
        parts.document = document;
        fs::write(&path, parts.bytes()).unwrap();
        check(&format!("document: {what}"), &args, folder.path());
    }
}

#[track_caller]
fn check(what: &str, args: &[&str], folder: &Path) {
    let start = Instant::now();
    let done = bounded(args, folder);
    let time = start.elapsed();
    assert!(matches!(done.code, Some(0..=2)) && !done.stderr.contains("panicked"), "{what}: {done:?}");
    assert!(time < TIME, "{what} takes {time:?}");
}

/// Copies the files of a fixture, and an image beside it.
fn copy(from: &Path, to: &Path, beside: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    fs::copy(root().join("tests/fixtures/images/rgb.png"), beside.join("image.png")).unwrap();
}

/// A small graph can declare any batch; the proof runs a few images of it.
#[test]
fn a_large_batch_is_not_run_to_verify_a_graph() {
    let graph = fs::read(root().join("tests/fixtures/zoo/timm-base-l17-script/model.onnx")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    // the dimension's name becomes a number of as many bytes
    let (name, mut found) = (b"\x12\x05batch", 0);
    for (batch, most) in [(64_u64, 64), (100_000, 3), (1 << 20, 3), (1 << 34, 0)] {
        let mut number = vec![0x08];
        number.extend((0..6).map(|k| ((batch >> (7 * k)) & 0x7f) as u8 | if k < 5 { 0x80 } else { 0 }));
        let mut bytes = graph.clone();
        while let Some(at) = bytes.windows(name.len()).position(|window| window == name) {
            bytes[at..at + name.len()].copy_from_slice(&number);
            found += 1;
        }
        fs::write(&path, bytes).unwrap();
        let start = Instant::now();
        let converted = vit_convert::convert(&path, &vit_convert::Options::new());
        assert!(start.elapsed() < TIME, "{batch}: {:?}", start.elapsed());
        match converted {
            Ok(converted) => assert_eq!(converted.verified().unwrap().inputs, most),
            Err(error) => assert!(most == 0 && error.to_string().contains("an input of shape"), "{batch}: {error}"),
        }
    }
    assert!(found >= 8, "{found}");
}
