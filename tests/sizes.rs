//! `--img-size`: every command runs a model at another size as the library does, whose tables are compared with timm's elsewhere.

use std::path::Path;

use serde_json::Value;
use vit_model::candle::{Device, Tensor};
use vit_model::{Checkpoint, Predictor};

use crate::support::{bytes, max_diff, read_safetensors, root, run, write_safetensors};

fn sample() -> String {
    root().join("weights/digits/samples/8.png").to_str().unwrap().to_owned()
}

/// `forward` of random pixels at that size.
fn logits(dir: &Path, model: &str, size: [usize; 2], pixels: &[f32]) -> Vec<f32> {
    let (input, output) = (dir.join("x.safetensors"), dir.join("y.safetensors"));
    let [h, w] = size;
    write_safetensors(&input, "x", safetensors::Dtype::F32, &[1, 3, h, w], &bytes(pixels));
    let size = format!("{h}x{w}");
    let (input, out) = (input.to_str().unwrap(), output.to_str().unwrap());
    let all = ["forward", model, "--img-size", &size, "--input", input, "--output", out, "--precision", "f32"];
    run(all).good();
    read_safetensors(&output)["logits"].values.clone()
}

#[test]
fn forward_answers_as_the_library_does_at_that_size() {
    let dir = tempfile::tempdir().unwrap();
    let size = [48, 40];
    let pixels = crate::support::Random(3).normal(3 * 48 * 40);
    let resized = Checkpoint::resolve("digits").unwrap().resized(size).unwrap();
    let model = Predictor::builder().precision(vit_model::Precision::F32).checkpoint(&resized).unwrap();
    let x = Tensor::from_slice(&pixels, (1, 3, 48, 40), &Device::Cpu).unwrap();
    let want = model.forward(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let found = logits(dir.path(), "digits", size, &pixels);
    assert_eq!(found, want);
    // the graph of the same model, whose size is fixed: its weights went through a conversion, which keeps every value
    let onnx = root().join("weights/digits/model.onnx");
    let found = logits(dir.path(), onnx.to_str().unwrap(), size, &pixels);
    assert!(max_diff(&found, &want) < 1e-5, "{found:?}, expected {want:?}");
}

#[test]
fn every_command_takes_a_size() {
    let dir = tempfile::tempdir().unwrap();
    let sample = sample();
    let out = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    run(["preprocess", "digits", &sample, "--img-size", "48x40", "--output", &out("p.safetensors")]).good();
    assert_eq!(read_safetensors(Path::new(&out("p.safetensors")))["pixel_values"].shape, [1, 3, 48, 40]);
    let at = |size: &str| {
        let text = run(["predict", &sample, "--format", "json", "--img-size", size]).good();
        let record: Value = serde_json::from_str(&text).unwrap();
        record[0]["predictions"][0]["label"].as_str().unwrap().to_owned()
    };
    assert_eq!([at("32"), at("40")], ["8", "8"]);
    let length = |size: &str| {
        let text = run(["embed", &sample, "--img-size", size]).good();
        serde_json::from_str::<Value>(&text).unwrap()["embedding"].as_array().unwrap().len()
    };
    assert_eq!([length("32"), length("64")], [64, 64]);
    run(["explain", &sample, "--img-size", "64", "--output", &out("e.png")]).good();
    assert!(run(["summary", "digits", "--img-size", "64"]).good().contains("64"));
    let tokens = |size: &str| run(["summary", "vit_tiny_patch16_224", "--style", "json", "--img-size", size]).good();
    assert!(tokens("384").contains("577") && tokens("224").contains("197"));
    run(["bench", "digits", "--img-size", "64", "--iters", "1", "--json"]).good();
}

#[test]
fn a_size_that_no_model_can_have_is_refused() {
    for bad in ["0", "x", "224x", "99999"] {
        run(["predict", &sample(), "--img-size", bad]).bad(2, &["--img-size"]);
    }
    // smaller than a patch
    run(["predict", &sample(), "--img-size", "3"]).bad(2, &["3"]);
}
