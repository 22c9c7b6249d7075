//! The embedded model against PyTorch, on every held-out image.

use crate::support::{finish, max_diff, read_safetensors, root, run, vit_cli, write_safetensors, write_to};

/// 360 images of `[32, 32]` grey pixels, and their classes.
pub fn heldout() -> (Vec<u8>, Vec<usize>) {
    let held = read_safetensors(&root().join("weights/digits/heldout.safetensors"));
    let pixels = held["images"].values.iter().map(|&v| v as u8).collect();
    (pixels, held["labels"].values.iter().map(|&v| v as usize).collect())
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("a class")
}

/// The README's first command.
#[test]
fn names_all_ten_samples() {
    let samples: Vec<_> = (0..10).map(|d| root().join(format!("weights/digits/samples/{d}.png"))).collect();
    let lines = run(["predict".as_ref(), "--format".as_ref(), "csv".as_ref(), "--top".as_ref(), "1".as_ref()]
        .into_iter()
        .chain(samples.iter().map(|s| s.as_os_str())))
    .good();
    let rows: Vec<Vec<&str>> = lines.lines().skip(1).map(|l| l.split(',').collect()).collect();
    assert_eq!(rows.len(), 10);
    for (digit, row) in rows.iter().enumerate() {
        assert_eq!(row[3], digit.to_string(), "{row:?}");
    }
}

/// The same class as PyTorch on every image, probabilities within 1e-4, at least 97 % right: decoding, preprocessing, model,
/// softmax and labels together.
#[test]
fn answers_as_pytorch_does() {
    compare_with_pytorch(&[], None, 1e-4);
}

/// The same class on every image, too, where bf16 and bytes move probabilities: by up to 0.011, 0.018 with AMX and 0.016 with
/// VNNI, where PyTorch's two best classes of an image are at least 0.084 apart.
#[test]
fn rougher_precisions_keep_every_class() {
    use vit_model::Isa;
    compare_with_pytorch(&["--device", "cpu", "--precision", "bf16"], None, 0.02);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        let mut asks = vit_cli();
        asks.args(["bench", "digits", "--device", "cpu", "--precision", "int8", "--iters", "1"])
            .env("VIT_CPU", isa.name());
        match finish(&mut asks) {
            asked if asked.code == Some(0) => {
                compare_with_pytorch(&["--device", "cpu", "--precision", "int8"], Some(isa), 0.04);
            }
            refused => {
                refused.bad(2, &["precision int8 needs a CPU that multiplies bytes", isa.name()]);
            }
        }
    }
}

/// The answers with these arguments, of these kernels.
fn compare_with_pytorch(arguments: &[&str], isa: Option<vit_model::Isa>, tolerance: f32) {
    let (pixels, labels) = heldout();
    let want = &read_safetensors(&root().join("tests/fixtures/digits/pytorch.safetensors"))["probabilities"];
    let folder = tempfile::tempdir().unwrap();
    for (i, image) in pixels.chunks_exact(32 * 32).enumerate() {
        let pgm = [b"P5\n32 32\n255\n", image].concat();
        std::fs::write(folder.path().join(format!("{i:03}.pgm")), pgm).unwrap();
    }
    let mut predict = vit_cli();
    predict.args(["predict", "--format", "jsonl", "-k10"]).args(arguments).arg(folder.path());
    let out = finish(predict.envs(isa.map(|isa| ("VIT_CPU", isa.name())))).good();
    let mut right = 0;
    let (rows, classes) = (out.lines(), want.shape[1]);
    for (i, (line, want)) in rows.zip(want.values.chunks_exact(classes)).enumerate() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(record["file"].as_str().unwrap().ends_with(&format!("{i:03}.pgm")), "{line}");
        let mut got = vec![0.0; classes];
        for p in record["predictions"].as_array().unwrap() {
            got[p["class"].as_u64().unwrap() as usize] = p["probability"].as_f64().unwrap() as f32;
        }
        assert_eq!(record["predictions"][0]["class"].as_u64().unwrap() as usize, argmax(want), "image {i}");
        assert!(max_diff(&got, want) <= tolerance, "image {i}: {got:?}, PyTorch {want:?}");
        right += usize::from(argmax(&got) == labels[i]);
    }
    assert_eq!(out.lines().count(), labels.len());
    assert!(right * 100 >= labels.len() * 97, "{right} of {}", labels.len());
}

/// Logits of the bare tensors; f32 sums in another order than PyTorch's differ by some 1e-6 of the largest logit (10).
#[test]
fn logits_equal_pytorchs() {
    let (pixels, labels) = heldout();
    let folder = tempfile::tempdir().unwrap();
    let (x, y) = (folder.path().join("x.safetensors"), folder.path().join("y.safetensors"));
    // grey as three equal channels, u8: normalised by the program
    let rgb: Vec<u8> = pixels.chunks_exact(32 * 32).flat_map(|image| image.repeat(3)).collect();
    write_safetensors(&x, "x", safetensors::Dtype::U8, &[labels.len(), 3, 32, 32], &rgb);
    finish(vit_cli().args(["forward", "digits", "--input"]).arg(&x).arg("--output").arg(&y)).good();
    let got = read_safetensors(&y);
    let want = &read_safetensors(&root().join("tests/fixtures/digits/pytorch.safetensors"))["logits"];
    assert_eq!(got["logits"].shape, want.shape);
    let diff = max_diff(&got["logits"].values, &want.values);
    assert!(diff <= 1e-4 * want.values.iter().fold(1.0, |m: f32, v| m.max(v.abs())), "{diff}");
}

/// The embedded file is what vit-convert makes of `model.onnx` today: the same tensors, bit for bit, and the same document
/// but for the last digits of the proof, which depend on the machine's vector width.
#[test]
fn the_embedded_file_is_what_vit_convert_writes() {
    let folder = root().join("weights/digits");
    let embedded = vit_model::checkpoint::open(&folder.join("model.safetensors")).unwrap();
    let mut preprocess = embedded.info.preprocess.clone();
    preprocess.crop_pct = 1.0;
    let labels = std::fs::read_to_string(folder.join("labels.txt")).unwrap().lines().map(str::to_owned).collect();
    let options = vit_convert::Options::new().labels(labels).preprocess(preprocess);
    let converted = vit_convert::convert(folder.join("model.onnx"), &options).unwrap();

    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("model.safetensors");
    write_to(&path, &converted).unwrap();
    let written = vit_model::checkpoint::open(&path).unwrap();
    let document = |info: &vit_model::ModelInfo| {
        let mut document = serde_json::to_value(info).unwrap();
        document["verified"]["max_abs"].take();
        document["verified"]["max_rel"].take();
        document
    };
    assert_eq!(document(&written.info), document(&embedded.info));
    assert_eq!(written.weights.tensors(), embedded.weights.tensors());
    for name in written.weights.tensors().keys() {
        assert_eq!(written.weights.read(name).unwrap(), embedded.weights.read(name).unwrap(), "{name}");
    }
}
