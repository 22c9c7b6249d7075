//! Weights in Q8_0: written as GGUF, read back by candle's own reader and by ours, and what they do to answers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, quantized::gguf_file};
use vit_convert::{Converted, Options, convert};
use vit_model::{Format, Predictor, SaveOptions, VisionTransformer, Weights, checkpoint, predictor::Runtime};

use crate::support::{Random, finish, max_diff, read_safetensors, root, unproven, vit_cli, write_safetensors};

fn quantised(onnx: &Path, options: &Options) -> Converted {
    let mut converted = convert(onnx, options).unwrap();
    converted.quantise().unwrap().expect("it was proven");
    converted
}

fn save(path: &Path, converted: &Converted, threads: usize) {
    converted.save_with(path, Format::Gguf, SaveOptions::new().threads(threads)).unwrap();
}

/// The digits model, with the labels and the preprocessing of the embedded one.
fn digits(folder: &Path) -> PathBuf {
    let path = folder.join("digits.gguf");
    let info = checkpoint::info(&root().join("weights/digits/model.safetensors")).unwrap();
    let options = Options::new().labels(info.labels.unwrap()).preprocess(info.preprocess);
    save(&path, &quantised(&root().join("weights/digits/model.onnx"), &options), 2);
    path
}

#[test]
fn the_same_bytes_which_candle_and_we_read_alike() {
    let folder = tempfile::tempdir().unwrap();
    for case in ["zoo/timm-base-d18-fused", "zoo/hf-dinov2-swiglu-l17-sdpa", "zoo/post-fp16-full-timm-l17", "digits"] {
        let fixtures = root().join(if case == "digits" { "weights" } else { "tests/fixtures" });
        let converted = quantised(&fixtures.join(case).join("model.onnx"), &Options::default());
        let case = case.trim_start_matches("zoo/");
        let path = folder.path().join(format!("{case}.gguf"));
        save(&path, &converted, 1);
        let bytes = std::fs::read(&path).unwrap();
        save(&path, &converted, 3);
        assert!(bytes == std::fs::read(&path).unwrap(), "{case}: another file with other threads");

        let ours = checkpoint::open(&path).unwrap();
        assert_eq!(ours.info.model, converted.info().model, "{case}");
        assert!(ours.info.source.sha256().unwrap().len() == 64 && ours.info.verified.unwrap().q8_0().is_some());
        let mut file = std::fs::File::open(&path).unwrap();
        let theirs = gguf_file::Content::read(&mut file).unwrap();
        assert_eq!(theirs.tensor_infos.len(), ours.weights.tensors().len(), "{case}");
        for (name, info) in ours.weights.tensors() {
            let tensor = theirs.tensor(&mut file, name, &Device::Cpu).unwrap();
            assert_eq!(tensor.shape().dims(), info.shape, "{case}: {name}");
            let values = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(ours.weights.read_f32(name).unwrap(), values, "{case}: {name}");
            assert_eq!(converted.checkpoint().weights().read_f32(name).unwrap(), values, "{case}: {name}");
            let matrix = info.shape.len() == 2 && info.shape[1].is_multiple_of(32);
            assert_eq!(ours.weights.is_q8_0(name), matrix, "{case}: {name}");
        }
    }
}

/// A bit of a block, of a scale and of a bias; the file is as good as before where nothing is wrong.
#[test]
fn a_damaged_tensor_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = digits(folder.path());
    let whole = std::fs::read(&path).unwrap();
    let file = checkpoint::open(&path).unwrap();
    // the whole file stays as it is, because one that is written to while it is open is refused
    let broken = folder.path().join("broken.gguf");
    for name in ["blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "head.bias"] {
        let q8_0 = file.weights.is_q8_0(name);
        let bytes = if q8_0 { file.weights.read_q8_0(name) } else { file.weights.read(name) }.unwrap();
        let at = whole.windows(bytes.len()).position(|part| part == bytes).unwrap();
        for byte in [0, bytes.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at + byte] ^= 1;
            std::fs::write(&broken, damaged).unwrap();
            let weights = checkpoint::open(&broken).unwrap().weights;
            let error = weights.read(name).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("its checksum is"), "{error}");
            assert!(!q8_0 || weights.read_q8_0(name).is_err(), "{name}");
            weights.read("norm.weight").unwrap();
        }
    }
}

/// A block's values lie within half a step of a 127th of its largest one; the step is stored in 11 bits, in fewer where it is
/// below 6e-5.
#[test]
fn no_value_moves_by_more_than_half_a_step() {
    let converted = convert(root().join("weights/digits/model.onnx"), &unproven());
    let own = converted.unwrap().checkpoint().clone();
    let (own, quantised) = (own.weights.clone(), own.quantised().weights);
    let mut matrices = 0;
    for name in own.tensors().keys() {
        let (a, b) = (own.read_f32(name).unwrap(), quantised.read_f32(name).unwrap());
        if !quantised.is_q8_0(name) {
            assert_eq!(a, b, "{name}");
            continue;
        }
        matrices += 1;
        for (a, b) in a.chunks(32).zip(b.chunks(32)) {
            let largest = a.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            assert!(max_diff(a, b) <= largest * (0.5 / 127.0 + 1.0 / 2048.0) + 4e-6, "{name}: {a:?} {b:?}");
        }
    }
    assert!(matrices > 4 * 4, "{matrices}");
}

/// Every held-out image of the digits: by the engine and by candle's modules, the class that the f32 model names.
#[test]
fn the_digits_stay_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = digits(folder.path());
    let whole = root().join("weights/digits/model.safetensors");
    assert!(std::fs::metadata(&gguf).unwrap().len() * 3 < std::fs::metadata(&whole).unwrap().len());
    let held = read_safetensors(&root().join("weights/digits/heldout.safetensors"));
    let images: Vec<u8> = held["images"].values.iter().map(|&v| v as u8).collect();
    let rgb: Vec<u8> = images.chunks_exact(32 * 32).flat_map(|image| image.repeat(3)).collect();
    let x = folder.path().join("x.safetensors");
    write_safetensors(&x, "x", safetensors::Dtype::U8, &[images.len() / 1024, 3, 32, 32], &rgb);
    let logits = |model: &Path, more: &[&str]| {
        let y = folder.path().join("y.safetensors");
        let mut command = vit_cli();
        command.arg("forward").arg(model).arg("--input").arg(&x).arg("--output").arg(&y).args(more);
        finish(&mut command).good();
        read_safetensors(&y).remove("logits").unwrap().values
    };
    let want = logits(&whole, &["--precision", "f32"]);
    let largest = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let best = |logits: &[f32]| -> Vec<Option<usize>> {
        let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        logits.chunks_exact(10).map(best).collect()
    };
    // weights off by 0.4 % of their block's largest at most, at random: the logits move by as much; modules round x too
    for (more, limit) in [(&["--precision", "f32"][..], 1e-2), (&["--modules"], 2e-2)] {
        let have = logits(&gguf, more);
        let moved = max_diff(&have, &want) / largest;
        println!("{more:?}: logits move by {moved:.1e} of the largest");
        assert!(moved > 1e-5 && moved < limit, "{more:?}: {moved}");
        assert_eq!(best(&have), best(&want), "{more:?}");
    }
    // f32 is asked for, and the modules compute with the values that the engine computes with
    let exact = max_diff(&logits(&gguf, &["--modules", "--precision", "f32"]), &logits(&gguf, &["--precision", "f32"]));
    assert!(exact <= 1e-5 * largest, "{exact}");
}

#[test]
fn every_command_takes_it_and_says_what_ran() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = digits(folder.path());
    let cli = |args: &[&str]| finish(vit_cli().current_dir(&folder).args(args));
    let sample = root().join("weights/digits/samples/7.png").display().to_string();
    for modules in [&[][..], &["--modules"]] {
        let args = ["-v", "predict", "-m", "digits.gguf", "-k1", "--format", "csv", &sample];
        let done = cli(&[&args[..], modules].concat());
        let said = if modules.is_empty() { "from weights in q8_0" } else { "candle-cpu in q8_0" };
        assert!(done.stderr.contains(said), "{done:?}");
        assert_eq!(done.good().lines().nth(1).unwrap().split(',').nth(3), Some("7"));
    }
    let bench = |more: &[&str]| -> serde_json::Value {
        let args = ["bench", "digits.gguf", "--json", "--iters", "1"];
        serde_json::from_str(&cli(&[&args[..], more].concat()).good()).unwrap()
    };
    assert_eq!(bench(&["--modules"])["precision"], "q8_0");
    assert_eq!(bench(&["--modules", "--precision", "f32"])["precision"], "f32");
    assert_eq!(bench(&[])["quantised"], true);
    let inspect = cli(&["inspect", "digits.gguf"]).good();
    assert!(inspect.contains("Q8_0") && inspect.contains("top1_equal"), "{inspect}");
    cli(&["summary", "digits.gguf"]).good();
    cli(&["compare", "digits.gguf", "digits", "--tolerance", "0.05"]).good();
    cli(&["compare", "digits.gguf", "digits", "--tolerance", "1e-6"]).bad(1, &[]);
    cli(&["explain", &sample, "-m", "digits.gguf", "-o", "map.png"]).good();
    cli(&["embed", "-m", "digits.gguf", &sample]).good();
    cli(&["preprocess", "digits.gguf", &sample, "-o", "x.safetensors"]).good();
    cli(&["forward", "digits.gguf", "-i", "x.safetensors", "-o", "y.safetensors"]).good();
    // the library, on both paths
    let checkpoint = checkpoint::open(&gguf).unwrap();
    let backend = |runtime| {
        let builder = Predictor::builder().device(vit_model::Device::Cpu).runtime(runtime);
        builder.checkpoint(&checkpoint).unwrap().backend().clone()
    };
    assert!(backend(Runtime::Engine).quantised);
    assert_eq!(backend(Runtime::Modules).precision, vit_model::Precision::Q8_0);
}

/// Blocks of a weight whose shape is another than the architecture's.
#[test]
fn blocks_that_do_not_fit_are_refused() {
    struct Turned(Arc<dyn Weights>, std::collections::BTreeMap<String, vit_model::TensorInfo>);
    impl Weights for Turned {
        fn tensors(&self) -> &std::collections::BTreeMap<String, vit_model::TensorInfo> {
            &self.1
        }
        fn read(&self, name: &str) -> vit_model::Result<Vec<u8>> {
            self.0.read(name)
        }
        fn is_q8_0(&self, name: &str) -> bool {
            self.0.is_q8_0(name)
        }
        fn read_q8_0(&self, name: &str) -> vit_model::Result<Vec<u8>> {
            self.0.read_q8_0(name)
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint::open(&digits(folder.path())).unwrap();
    let mut infos = checkpoint.weights.tensors().clone();
    infos.get_mut("blocks.0.mlp.fc1.weight").unwrap().shape.reverse();
    let turned = Turned(checkpoint.weights.clone(), infos);
    let model = VisionTransformer::from_weights(&checkpoint.info.model, &turned, candle_core::DType::F32, &Device::Cpu);
    assert!(model.unwrap_err().to_string().contains("fc1"));
}

/// The header's parts, to be put together wrongly.
struct Header {
    version: u32,
    tensors: u64,
    keys: Vec<Vec<u8>>,
    entry: Vec<u8>,
    align: usize,
    data: usize,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [text(name), kind.to_le_bytes().into(), value.into()].concat()
}

fn entry(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let dims: Vec<u8> =
        [(dims.len() as u32).to_le_bytes().to_vec(), dims.iter().flat_map(|d| d.to_le_bytes()).collect()].concat();
    [text(name), dims, kind.to_le_bytes().into(), offset.to_le_bytes().into()].concat()
}

impl Header {
    fn new() -> Self {
        Self {
            version: 3,
            tensors: 1,
            keys: vec![key("config", 8, &text("{}"))],
            entry: entry("a", &[32, 2], 8, 0),
            align: 32,
            data: 68,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes =
            [b"GGUF".to_vec(), self.version.to_le_bytes().into(), self.tensors.to_le_bytes().into()].concat();
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        bytes.extend(self.keys.concat());
        bytes.extend(&self.entry);
        bytes.resize(bytes.len().next_multiple_of(self.align) + self.data, 0);
        bytes
    }
}

#[test]
fn a_header_that_lies_is_refused_before_anything_is_allocated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        vit_model::checkpoint::gguf::Gguf::open(&path).map_err(|error| error.to_string())
    };
    let good = Header::new();
    let file = open(&good.bytes()).unwrap();
    assert_eq!(file.read_f32("a").unwrap(), [0.0; 64]);
    assert_eq!(file.metadata()["config"], "{}");
    open(&Header { keys: vec![], ..Header::new() }.bytes()).unwrap();
    let array = |kind: u32, count: u64| [kind.to_le_bytes().to_vec(), count.to_le_bytes().into()].concat();
    let alignment = |n: u32| vec![key("general.alignment", 4, &n.to_le_bytes())];
    let skipped = vec![
        key("u8", 0, &[1]),
        key("f64", 12, &[0; 8]),
        key("bytes", 9, &[array(0, 3), vec![0; 3]].concat()),
        key("words", 9, &[array(8, 2), text("a"), text("b")].concat()),
    ];
    open(&Header { keys: skipped, ..Header::new() }.bytes()).unwrap();
    open(&Header { keys: alignment(8), align: 8, ..Header::new() }.bytes()).unwrap();
    let huge = u64::MAX / 2;
    for (header, said) in [
        (Header { version: 1, ..Header::new() }, "version 1"),
        (Header { version: 3 << 24, ..Header::new() }, "version 50331648"),
        (Header { tensors: huge, ..Header::new() }, "tensors are announced"),
        (Header { tensors: 2, ..Header::new() }, "damaged"),
        (Header { keys: vec![key("config", 8, &huge.to_le_bytes())], ..Header::new() }, "are announced"),
        (Header { keys: vec![key("x", 9, &array(8, huge))], ..Header::new() }, "texts are announced"),
        (Header { keys: vec![key("x", 9, &array(12, huge))], ..Header::new() }, "values are announced"),
        (Header { keys: vec![key("x", 9, &array(9, 1))], ..Header::new() }, "unknown type 9"),
        (Header { keys: vec![key("x", 77, &[])], ..Header::new() }, "unknown type 77"),
        (Header { keys: vec![key("x", 0, &[1]); 2], ..Header::new() }, "stands twice"),
        (Header { keys: alignment(0), ..Header::new() }, "power of two"),
        (Header { keys: alignment(1 << 31), ..Header::new() }, "power of two"),
        (Header { entry: entry("a", &[32, 2, 1, 1, 1], 8, 0), ..Header::new() }, "5 dimensions"),
        (Header { entry: entry("a", &[32, 2], 12, 0), ..Header::new() }, "type 12"),
        (Header { entry: entry("a", &[2, 32], 8, 0), ..Header::new() }, "cannot have the shape [32, 2]"),
        (Header { entry: entry("a", &[huge, huge], 0, 0), ..Header::new() }, "cannot have the shape"),
        (Header { entry: entry("a", &[huge, 0], 0, 0), ..Header::new() }, "copied completely"),
        (Header { entry: entry("a", &[32, 1 << 40], 8, 0), ..Header::new() }, "holds 68 bytes of data"),
        (Header { entry: entry("a", &[32, 2], 8, 32), ..Header::new() }, "is at byte 32"),
        (Header { entry: entry("a", &[32, 2], 8, huge), ..Header::new() }, "is at byte"),
        (Header { data: 67, ..Header::new() }, "copied completely"),
        (Header { data: 69, ..Header::new() }, "copied completely"),
        (
            Header {
                tensors: 2,
                entry: [entry("a", &[32, 2], 8, 0), entry("a", &[1], 0, 96)].concat(),
                data: 100,
                ..Header::new()
            },
            "stands twice",
        ),
    ] {
        let error = open(&header.bytes()).map(drop).unwrap_err();
        assert!(error.contains(said) && error.contains("m.gguf"), "{said}: {error}");
    }
    let whole = good.bytes();
    for len in 0..whole.len() {
        assert!(open(&whole[..len]).is_err(), "{len} bytes");
    }
    // an infinite scale, on the way in and out
    let mut bytes = whole.clone();
    let at = bytes.len() - 34;
    bytes[at..at + 2].copy_from_slice(&[0x00, 0x7c]);
    let file = open(&bytes).unwrap();
    assert!(file.read("a").unwrap_err().to_string().contains("not a finite number") && file.read_q8_0("a").is_err());
}

/// Shapes and values at random, quantised by candle and read by us.
#[test]
fn blocks_mean_what_candle_means() {
    let mut random = Random(5);
    for _ in 0..50 {
        let len = 32 * (1 + random.below(8));
        let scale = 10f32.powi(random.below(12) as i32 - 7);
        let values: Vec<f32> = (0..len).map(|_| (random.below(2001) as f32 / 1000.0 - 1.0) * scale).collect();
        let tensor = candle_core::Tensor::from_vec(values, len, &Device::Cpu).unwrap();
        let blocks =
            candle_core::quantized::QTensor::quantize(&tensor, candle_core::quantized::GgmlDType::Q8_0).unwrap();
        let want = blocks.dequantize(&Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(vit_model::checkpoint::gguf::dequantise(&blocks.data().unwrap()).collect::<Vec<_>>(), want);
    }
}
