//! `summary`, `inspect`, `embed`, `explain`, `bench`.

use crate::support::{finish, max_diff, read_safetensors, root, run, vit_cli};

/// Parameters of the digits model, counted from its file.
fn parameters() -> u64 {
    let tensors = read_safetensors(&root().join("weights/digits/model.safetensors"));
    tensors.values().map(|t| t.values.len() as u64).sum()
}

fn grouped(n: u64) -> String {
    format!("{},{:03}", n / 1000, n % 1000)
}

#[test]
fn summary_counts_every_parameter() {
    let total = grouped(parameters());
    assert!(run(["summary", "digits"]).good().lines().next().unwrap().ends_with(&total));
    let table = run(["summary", "digits", "--style", "torchsummary"]).good();
    assert!(table.lines().last().unwrap().contains(&format!("with them {total} parameters")), "{table}");
    let json: serde_json::Value = serde_json::from_str(&run(["summary", "--style", "json"]).good()).unwrap();
    assert_eq!(json["parameters"], parameters());
    // by name, without weights: ViT-B/16 with 1000 classes
    assert!(run(["summary", "vit_base_patch16_224"]).good().lines().next().unwrap().ends_with("86,567,656"));
    // the modules' tensors are the file's tensors
    let mut names = std::collections::BTreeSet::new();
    let mut queue = vec![&json["modules"]];
    while let Some(module) = queue.pop() {
        names.extend(module["tensors"].as_object().unwrap().keys().cloned());
        queue.extend(module["modules"].as_array().unwrap());
    }
    let file = read_safetensors(&root().join("weights/digits/model.safetensors"));
    assert_eq!(names, file.into_keys().collect());
}

#[test]
fn inspect_shows_config_tensors_and_source() {
    let text = run(["inspect", "digits"]).good();
    for part in ["embed_dim", "crop_mode", "blocks.3.attn.qkv.weight", "[192, 64]", "sha256", "labels (10)"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&run(["inspect", "--json"]).good()).unwrap();
    assert_eq!(json["config"]["model"]["depth"], 4);
    assert_eq!(json["parameters"], parameters());
}

#[test]
fn embed_gives_the_same_vectors_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let samples = root().join("weights/digits/samples");
    let embed =
        |format: &str, more: &[&str]| finish(vit_cli().args(["embed", "--format", format]).args(more).arg(&samples));
    let jsonl = embed("jsonl", &[]).good();
    let vectors: Vec<f32> = jsonl
        .lines()
        .flat_map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["embedding"].as_array().unwrap().clone())
        .map(|v| v.as_f64().unwrap() as f32)
        .collect();
    let file = at("e.safetensors");
    embed("safetensors", &["--output", file.to_str().unwrap()]).good();
    let embeddings = &read_safetensors(&file)["embeddings"];
    assert_eq!(embeddings.shape, [10, 64]);
    assert_eq!(embeddings.values, vectors);
    let csv = embed("csv", &[]).good();
    let from_csv: Vec<f32> =
        csv.lines().skip(1).flat_map(|l| l.split(',').skip(1)).map(|v| v.parse().unwrap()).collect();
    assert_eq!(from_csv, vectors);
    let json: serde_json::Value = serde_json::from_str(&embed("json", &[]).good()).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 10);
    // of length one
    embed("safetensors", &["--normalize", "--output", file.to_str().unwrap()]).good();
    for (unit, raw) in read_safetensors(&file)["embeddings"].values.chunks(64).zip(vectors.chunks(64)) {
        let length = raw.iter().map(|v| v * v).sum::<f32>().sqrt();
        let want: Vec<f32> = raw.iter().map(|v| v / length).collect();
        assert!(max_diff(unit, &want) < 1e-6); // f32 rounding of values below 1
    }
    embed("safetensors", &[]).bad(2, &["--output"]);
}

#[test]
fn explain_draws_the_picture_under_the_attention() {
    let folder = tempfile::tempdir().unwrap();
    let png = folder.path().join("a.png");
    let sample = root().join("weights/digits/samples/2.png");
    let explain = |more: &[&str]| {
        finish(vit_cli().arg("explain").arg(&sample).arg("--output").arg(&png).args(more)).good();
        let file = std::fs::read(&png).unwrap();
        assert!(file.starts_with(b"\x89PNG\r\n\x1a\n"));
        let size = |at: usize| u32::from_be_bytes(file[at..at + 4].try_into().unwrap());
        assert_eq!([size(16), size(20)], [224, 224]); // 32 pixels, seven times
        file
    };
    let pictures = [
        explain(&[]),
        explain(&["--bare"]),
        explain(&["--method", "map"]),
        explain(&["--method", "map", "--block", "0", "--head", "3"]),
    ];
    for (i, a) in pictures.iter().enumerate() {
        assert!(pictures[..i].iter().all(|b| a != b));
    }
    finish(vit_cli().arg("explain").arg(&sample).args(["--method", "map", "--block", "4", "-o"]).arg(&png))
        .bad(2, &["--block 4", "0 to 3"]);
    finish(vit_cli().arg("explain").arg(&sample).args(["--precision", "bf16", "-o"]).arg(&png))
        .bad(2, &["--precision", "f32"]);
}

#[test]
fn bench_ends_with_the_json_that_was_agreed() {
    let text =
        run(["bench", "digits", "--batch", "2", "--threads", "1", "--iters", "5", "--warmup", "1", "--json"]).good();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let times: Vec<f64> = last["times_ms"].as_array().unwrap().iter().map(|t| t.as_f64().unwrap()).collect();
    assert_eq!(times.len(), 5);
    let median = last["median_ms"].as_f64().unwrap();
    assert!(times.contains(&median), "{last}");
    // images/s of the unrounded median; both are rounded to 1e-4
    let rate = last["images_per_s"].as_f64().unwrap();
    assert!((rate * median / 2000.0 - 1.0).abs() < 1e-2, "{last}");
    assert!(last["kernel"].is_string() && last["precision"].is_string() && last["load_ms"].as_f64().unwrap() > 0.0);
    assert!(run(["bench", "digits", "--iters", "2"]).good().contains("images/s"));
}

#[test]
fn bench_compares_every_kernel_and_precision_of_the_machine() {
    let compare =
        ["bench", "digits", "--compare", "--device", "cpu", "--threads", "1", "--iters", "3", "--warmup", "0"];
    let text = run(compare.into_iter().chain(["--json"])).good();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let runs = last["runs"].as_array().unwrap();
    let names: Vec<_> =
        runs.iter().map(|run| (run["kernel"].as_str().unwrap(), run["precision"].as_str().unwrap())).collect();
    let kernels = vit_model::Isa::ALL.into_iter().filter(|isa| isa.available()).map(vit_model::Isa::name);
    for kernel in kernels.chain(["candle-cpu"]) {
        assert!(names.iter().any(|(name, _)| *name == kernel), "{kernel} in {names:?}");
    }
    assert!(names.contains(&("portable", "f32")) && names.contains(&("portable", "bf16")), "{names:?}");
    assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), names.len(), "{names:?}");
    assert_eq!(runs.iter().filter(|run| run["auto"] == true).count(), 1, "{last}");
    for run in runs {
        assert_eq!(run["times_ms"].as_array().unwrap().len(), 3, "{run}");
        assert!(run["median_ms"].as_f64().unwrap() > 0.0 && run["load_ms"].as_f64().unwrap() > 0.0, "{run}");
        assert!(run["images_per_s"].as_f64().unwrap() > 0.0 && run["threads"] == 1, "{run}");
    }
    let table = run(compare).good();
    assert_eq!(table.lines().count(), 2 + runs.len(), "{table}");
    assert!(table.contains("(auto)") && table.contains("candle-cpu"), "{table}");
    // the engine has no parallel blocks
    let parallel = root().join("tests/fixtures/parity/timm/vit_small_patch16_18x2_224");
    let done = finish(
        vit_cli().args(["bench", "--compare", "--device", "cpu", "--iters", "1", "--warmup", "0"]).arg(parallel),
    );
    assert!(done.stderr.contains("candle's modules alone run this model: the CPU engine has no"), "{done:?}");
    assert_eq!(done.good().lines().count(), 3);
}

/// What `doctor` says is true of this process, and it tells no secret.
#[test]
fn doctor_says_what_there_is() {
    let mut command = vit_cli();
    command.args(["doctor", "--offline", "--json"]).env("HF_TOKEN", "hf_secret").env("VIT_CPU", "portable");
    let found: serde_json::Value = serde_json::from_str(&finish(&mut command).good()).unwrap();
    assert!(!found.to_string().contains("hf_secret"));
    assert_eq!(found["environment"]["HF_TOKEN"], "(set)");
    assert_eq!(found["CPU"]["kernels portable"], "f32, bf16 (used)");
    let threads = found["CPU"]["threads"].as_str().unwrap();
    assert!(threads.starts_with(&format!("{} by default", vit_model::engine::physical_cores())), "{threads}");
    let features = found["build"]["features"].as_str().unwrap();
    assert_eq!(features.contains("serve"), cfg!(feature = "serve"));
    let text = run(["doctor", "--offline"]).good();
    assert!(text.lines().all(|line| line.chars().count() < 200), "{text}");
}
