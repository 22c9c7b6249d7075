//! `forward`, `preprocess` and `compare`: tensors in and out.

use std::path::Path;

use safetensors::Dtype;

use crate::support::{Parts, bytes, finish, max_diff, read_safetensors, root, run, vit_cli, write_safetensors};

fn forward(input: &Path, output: &Path, more: &[&str]) -> crate::support::Done {
    finish(vit_cli().args(["forward", "digits", "--input"]).arg(input).arg("--output").arg(output).args(more))
}

#[test]
fn writes_logits_features_and_pre_logits() {
    let folder = tempfile::tempdir().unwrap();
    let (x, y) = (folder.path().join("x.safetensors"), folder.path().join("y.safetensors"));
    let values: Vec<f32> = (0..2 * 3 * 32 * 32).map(|i| (i as f32 * 0.37).sin()).collect();
    write_safetensors(&x, "image", Dtype::F32, &[2, 3, 32, 32], &bytes(&values));
    forward(&x, &y, &[]).good();
    let out = read_safetensors(&y);
    let shapes: Vec<_> = out.iter().map(|(name, t)| (name.as_str(), t.shape.as_slice())).collect();
    assert_eq!(shapes, [("features", &[2, 65, 64][..]), ("logits", &[2, 10]), ("pre_logits", &[2, 64])]);
    // the class token after the final norm is what the head reads
    let (features, pre_logits) = (&out["features"].values, &out["pre_logits"].values);
    assert_eq!(features[..64], pre_logits[..64]);
    assert_eq!(features[65 * 64..65 * 64 + 64], pre_logits[64..]);
    // candle's modules give the same answer; the default path is f32-grade: 1e-4 of the largest value
    let modules = folder.path().join("modules.safetensors");
    forward(&x, &modules, &["--modules"]).good();
    for (name, tensor) in &read_safetensors(&modules) {
        let scale = tensor.values.iter().fold(1.0, |m: f32, v| m.max(v.abs()));
        let diff = max_diff(&tensor.values, &out[name].values);
        assert!(diff <= 1e-4 * scale, "{name}: {diff}");
    }
}

#[test]
fn wrong_inputs_are_named_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (x, y) = (folder.path().join("x.safetensors"), folder.path().join("y.safetensors"));
    let refuse = |name: &str, dtype, shape: &[usize], bytes: &[u8], more: &[&str], parts: &[&str]| {
        write_safetensors(&x, name, dtype, shape, bytes);
        forward(&x, &y, more).bad(2, parts);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    };
    let image = bytes(&[0.5; 3 * 32 * 32]);
    refuse("x", Dtype::F32, &[3, 32, 32], &image, &[], &["x.safetensors", "[B, 3, 32, 32]", "[3, 32, 32]"]);
    refuse("x", Dtype::F32, &[1, 3, 16, 64], &image, &[], &["[1, 3, 16, 64]"]);
    refuse("x", Dtype::I32, &[1, 3, 32, 32], &image, &[], &["expected floats or u8"]);
    refuse("x", Dtype::F32, &[0, 3, 32, 32], &[], &[], &["[0, 3, 32, 32]"]);
    refuse("x", Dtype::F32, &[1, 3, 32, 32], &image, &["--tensor", "y"], &["no tensor `y`", "x"]);
    let nan: Vec<u8> = bytes(&[f32::NAN]).into_iter().chain(image[4..].iter().copied()).collect();
    refuse("x", Dtype::F32, &[1, 3, 32, 32], &nan, &[], &["NaN"]);
    std::fs::write(&x, "no tensors").unwrap();
    forward(&x, &y, &[]).bad(2, &["x.safetensors", "safetensors"]);
    forward(folder.path(), &y, &[]).bad(2, &["not a regular file"]);
}

#[test]
fn outputs_never_replace_an_input_a_folder_or_a_device() {
    let folder = tempfile::tempdir().unwrap();
    let x = folder.path().join("x.safetensors");
    write_safetensors(&x, "x", Dtype::F32, &[1, 3, 32, 32], &bytes(&[0.5; 3 * 32 * 32]));
    let before = std::fs::read(&x).unwrap();
    forward(&x, &x, &[]).bad(2, &["is the input"]);
    forward(&x, folder.path(), &[]).bad(2, &["folder"]);
    #[cfg(unix)]
    {
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&x, &link).unwrap();
        forward(&x, &link, &[]).bad(2, &["is the input"]);
        forward(&x, Path::new("/dev/null"), &[]).bad(2, &["/dev/null", "not a regular file"]);
    }
    assert_eq!(std::fs::read(&x).unwrap(), before);
    forward(&x, &folder.path().join("missing/y.safetensors"), &[]).bad(2, &["y.safetensors"]);
}

#[test]
fn preprocess_writes_what_predict_reads() {
    let folder = tempfile::tempdir().unwrap();
    let (x, y) = (folder.path().join("x.safetensors"), folder.path().join("y.safetensors"));
    let image = root().join("weights/digits/samples/9.png");
    finish(vit_cli().args(["preprocess", "digits"]).arg(&image).arg("--output").arg(&x)).good();
    let pixels = &read_safetensors(&x)["pixel_values"];
    assert_eq!(pixels.shape, [1, 3, 32, 32]);
    // mean and std 0.5: between -1 and 1, three equal channels of a grey picture
    assert!(pixels.values.iter().all(|v| v.abs() <= 1.0));
    assert_eq!(pixels.values[..1024], pixels.values[2048..]);
    forward(&x, &y, &[]).good();
    let logits = &read_safetensors(&y)["logits"].values;
    assert!((0..10).all(|class| class == 9 || logits[class] < logits[9]), "{logits:?}");
}

#[test]
fn compare_finds_a_model_equal_to_itself_and_different_from_another() {
    let text = run(["compare", "digits", "digits", "--json"]).good();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["tensors"]["logits"]["max_abs_diff"], 0.0);
    assert_eq!(report["top1_equal"]["equal"], report["top1_equal"]["of"]);

    // one weight of the head moved by 1
    let folder = tempfile::tempdir().unwrap();
    let moved = folder.path().join("moved.safetensors");
    let mut file = Parts::of(&std::fs::read(root().join("weights/digits/model.safetensors")).unwrap());
    file.without_checksums();
    let at = file.range("head.bias").start;
    let value = f32::from_le_bytes(file.data[at..at + 4].try_into().unwrap()) + 1.0;
    file.data[at..at + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(&moved, file.bytes()).unwrap();
    let done = finish(vit_cli().args(["compare", "digits"]).arg(&moved)).bad(1, &[]);
    assert!(done.stdout.contains("DIFFERS") && done.stdout.contains("does not hold"), "{done:?}");
    finish(vit_cli().args(["compare", "digits"]).arg(&moved).args(["--tolerance", "2"])).good();
}
