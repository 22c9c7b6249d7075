//! The library's front door: kinds of input, many inputs, kinds of errors, tensors, attention.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vit_model::candle::{self, DType, Tensor};
use vit_model::image::{Image, ImageOptions, Orientation};
use vit_model::labels::Prediction;
use vit_model::predictor::{Input, Loading, Output, Runtime, Wanted};
use vit_model::{
    BlockKind, Checkpoint, Config, Device, Error, Precision, Predictor, TensorInfo, TensorProblem, Weights, image_crate,
};

use crate::support::{Parts, Random, bytes, max_diff, root};

fn digits() -> PathBuf {
    root().join("weights/digits/model.safetensors")
}

fn sample(digit: usize) -> PathBuf {
    root().join(format!("weights/digits/samples/{digit}.png"))
}

fn model() -> Predictor {
    Predictor::builder().device(Device::Cpu).open(digits()).unwrap()
}

/// A model of this architecture with small random weights, and norms that change nothing.
fn random(config: Config) -> Checkpoint {
    struct Noise(BTreeMap<String, TensorInfo>);
    impl Weights for Noise {
        fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
            &self.0
        }

        fn read(&self, name: &str) -> vit_model::Result<Vec<u8>> {
            let mut random = Random(name.len() as u64);
            let norm = name.contains("norm") && name.ends_with("weight");
            let value = |_| if norm { 1.0 } else { random.below(1000) as f32 / 5000.0 - 0.1 };
            Ok(bytes(&(0..self.0[name].shape.iter().product()).map(value).collect::<Vec<_>>()))
        }
    }
    let info = |shape| TensorInfo::new(vit_model::Dtype::F32, shape);
    let tensors = vit_model::layers::parameters(&config).unwrap().into_iter().map(|(name, shape)| (name, info(shape)));
    let weights = Arc::new(Noise(tensors.collect()));
    let known = Checkpoint::open(digits()).unwrap();
    let mut info = known.info;
    (info.model, info.labels) = (config, None);
    Checkpoint::new(info, weights).unwrap()
}

#[test]
fn every_kind_of_input_gives_the_same_answer() {
    let (model, path) = (model(), sample(7));
    let want = model.classify(&path, 10).unwrap();
    let embedding = model.embed(&path).unwrap();
    assert_eq!((want[0].label.as_str(), want.len(), embedding.len()), ("7", 10, model.config().embed_dim));

    let file = std::fs::read(&path).unwrap();
    let picture = image_crate::open(&path).unwrap();
    let rgb = picture.to_rgb8();
    let image = Image::open(&path).unwrap();
    let [w, h] = [rgb.width() as usize, rgb.height() as usize];
    let text = path.to_str().unwrap();
    let inputs: Vec<(&str, Input<'_>)> = vec![
        ("&Path", path.as_path().into()),
        ("PathBuf", path.clone().into()),
        ("&str", text.into()),
        ("String", text.to_owned().into()),
        ("&OsStr", path.as_os_str().into()),
        ("&[u8]", file.as_slice().into()),
        ("Vec<u8>", file.clone().into()),
        ("&DynamicImage", (&picture).into()),
        ("DynamicImage", picture.clone().into()),
        ("&RgbImage", (&rgb).into()),
        ("RgbImage", rgb.clone().into()),
        ("&Image", (&image).into()),
        ("Image", image.clone().into()),
        ("[H, W, C]", Image::from_pixels([h, w, 3], rgb.as_raw()).unwrap().into()),
        ("Ok(path)", Ok::<_, Error>(path.clone()).into()),
    ];
    let names: Vec<_> = inputs.iter().map(|(name, _)| *name).collect();
    let answers = model.classify_all(inputs.into_iter().map(|(_, input)| input), 10);
    for (name, answer) in names.iter().zip(answers) {
        assert_eq!(answer.unwrap(), want, "{name}");
    }
    assert_eq!(model.embed(&rgb).unwrap(), embedding);
    assert_eq!(model.embed(&file).unwrap(), embedding);
}

#[test]
fn an_error_in_the_middle_keeps_its_place_and_the_rest_go_on() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.png");
    std::fs::write(&text, "no picture").unwrap();
    let missing = folder.path().join("missing.png");
    let walker = || -> vit_model::Result<PathBuf> { Err(Error::image("from the iterator")) };
    let inputs = || {
        let good = (0..10).map(|digit| Ok(sample(digit)));
        let bad = [Ok(text.clone()), Ok(missing.clone()), walker()];
        bad.into_iter().chain(good).chain([Ok(text.clone())])
    };
    let alone: Vec<Vec<f32>> = (0..10).map(|digit| model.embed(sample(digit)).unwrap()).collect();
    for batch in [1, 2, 3, 7, 8, 100] {
        let classes: Vec<_> = model.classify_all(inputs(), 1).batch(batch).collect();
        let vectors: Vec<_> = model.embed_all(inputs()).batch(batch).collect();
        assert_eq!((classes.len(), vectors.len()), (14, 14));
        for (digit, (class, vector)) in classes[3..13].iter().zip(&vectors[3..13]).enumerate() {
            assert_eq!(class.as_ref().unwrap()[0].label, digit.to_string());
            // the portable kernel may sum in another order in another batch: a few ulp of values up to 10
            assert!(max_diff(vector.as_ref().unwrap(), &alone[digit]) < 1e-4, "{digit} in batches of {batch}");
        }
        for answer in [&classes[0], &classes[13]] {
            assert!(matches!(answer, Err(Error::Image { path: Some(path), source: None, .. }) if *path == text));
        }
        assert!(matches!(&classes[1], Err(Error::Image { path: Some(path), source: Some(error), .. })
            if *path == missing && error.kind() == std::io::ErrorKind::NotFound));
        assert!(matches!(&vectors[2], Err(Error::Image { path: None, why, .. }) if why == "from the iterator"));
    }
    assert_eq!(model.embed_all([] as [&str; 0]).count(), 0);
    let lengths = model.embed_all(inputs()).normalize().flatten();
    for length in lengths.map(|v| v.iter().map(|x| x * x).sum::<f32>()) {
        assert!((length - 1.0).abs() < 1e-5, "{length}"); // rounding of 64 squares
    }
}

#[test]
fn inputs_are_asked_for_two_batches_ahead_at_most() {
    let (model, pulled) = (model(), Cell::new(0));
    let endless = (0..).map(|i| {
        pulled.set(i + 1);
        sample(i % 10)
    });
    let mut answers = model.classify_all(endless, 1).batch(3);
    assert_eq!(pulled.get(), 0);
    for answered in 1..=30 {
        let best: Vec<Prediction> = answers.next().unwrap().unwrap();
        assert_eq!(best[0].class, (answered - 1) % 10);
        assert!(pulled.get() <= answered + 6, "{} for {answered}", pulled.get());
    }
}

#[test]
fn eight_threads_share_a_model() {
    let model = model();
    let want: Vec<_> = (0..10).map(|digit| model.classify(sample(digit), 3).unwrap()).collect();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for (digit, want) in want.iter().enumerate() {
                    assert_eq!(model.classify(sample(digit), 3).unwrap(), *want);
                }
            });
        }
    });
}

#[test]
fn kinds_of_errors_are_told_apart_and_carry_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let open = |path: &Path| Predictor::builder().device(Device::Cpu).open(path).unwrap_err();

    let missing = at("missing.safetensors");
    assert!(matches!(open(&missing), Error::Io { path, .. } if path == missing));
    let damaged = at("damaged.safetensors");
    std::fs::write(&damaged, "no tensors").unwrap();
    assert!(matches!(open(&damaged), Error::File { path, .. } if path == damaged));
    let onnx = at("model.onnx");
    std::fs::write(&onnx, "no graph").unwrap();
    let error = open(&onnx);
    assert!(matches!(&error, Error::File { path, .. } if *path == onnx));
    assert!(error.to_string().contains("`vit_convert::open(path)`"), "{error}");

    // a file of ours with something wrong with its tensors
    let changed = at("changed.safetensors");
    let problem = |change: fn(&mut Parts)| {
        let mut file = Parts::of(&std::fs::read(digits()).unwrap());
        file.without_checksums();
        change(&mut file);
        std::fs::write(&changed, file.bytes()).unwrap();
        match open(&changed) {
            Error::Tensor { path, name, problem, .. } => (path, name, problem),
            other => panic!("{other:?}"),
        }
    };
    let (path, name, kind) = problem(|file| {
        let entry = file.header.remove("head.bias").unwrap();
        file.header.insert("tail.bias".into(), entry);
    });
    assert_eq!((path, name.as_str(), kind), (Some(changed.clone()), "head.bias", TensorProblem::Missing));
    let (_, name, kind) = problem(|file| {
        file.header["head.bias"]["shape"] = serde_json::json!([2, 5]);
    });
    assert_eq!((name.as_str(), kind), ("head.bias", TensorProblem::Shape));
    let (_, name, kind) = problem(|file| {
        let start = file.range("head.bias").start;
        file.data[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert_eq!((name.as_str(), kind), ("head.bias", TensorProblem::NotFinite));

    if !cfg!(feature = "cuda") {
        let error = Predictor::builder().device(Device::Cuda(0)).open(digits()).unwrap_err();
        assert!(matches!(&error, Error::Device { device, .. } if device == "cuda"), "{error}");
    }
    let error = Predictor::builder().device(Device::Cpu).precision(Precision::F16).open(digits()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");

    let model = model();
    let x = Tensor::zeros((1, 3, 16, 16), DType::F32, &candle::Device::Cpu).unwrap();
    assert!(matches!(model.forward(&x), Err(Error::Input(_))));
    assert!(matches!(model.classify(&b"no picture"[..], 1), Err(Error::Image { path: None, .. })));
    let mut headless = model.config().clone();
    headless.num_classes = 0;
    let headless = random(headless);
    let headless = Predictor::builder().device(Device::Cpu).checkpoint(&headless).unwrap();
    assert!(matches!(headless.classify(sample(0), 1), Err(Error::Unsupported { .. })));
    // a question that the model cannot answer at all is answered once
    let answers: Vec<_> = headless.classify_all([sample(0), sample(1)], 1).collect();
    assert!(matches!(answers.as_slice(), [Err(Error::Unsupported { .. })]));
    assert!(headless.embed(sample(0)).is_ok());
}

#[test]
fn a_streamed_model_that_is_damaged_says_so_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.safetensors");
    let mut file = Parts::of(&std::fs::read(digits()).unwrap());
    file.without_checksums();
    let start = file.range("blocks.1.mlp.fc1.weight").start;
    file.data[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, file.bytes()).unwrap();
    let model = Predictor::builder().device(Device::Cpu).loading(Loading::Streamed).open(&path).unwrap();
    let answers: Vec<_> = model.embed_all((0..10).map(sample)).batch(2).collect();
    let [Err(Error::Tensor { name, problem: TensorProblem::NotFinite, .. })] = answers.as_slice() else {
        panic!("{answers:?}")
    };
    assert_eq!(name, "blocks.1.mlp.fc1.weight");
}

#[test]
fn tensors_give_the_same_on_the_engine_and_on_candles_modules() {
    let open = |runtime| {
        let builder = Predictor::builder().device(Device::Cpu).precision(Precision::F32).runtime(runtime);
        builder.open(digits()).unwrap()
    };
    let (engine, modules) = (open(Runtime::Engine), open(Runtime::Modules));
    let x = Tensor::rand(-1f32, 1.0, (3, 3, 32, 32), &candle::Device::Cpu).unwrap();
    let values = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (name, shape, a, b) in [
        ("features", &[3, 65, 64][..], engine.features(&x), modules.features(&x)),
        ("pre_logits", &[3, 64], engine.pre_logits(&x), modules.pre_logits(&x)),
        ("logits", &[3, 10], engine.forward(&x), modules.forward(&x)),
    ] {
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!((a.dims(), b.dims()), (shape, shape), "{name}");
        let (a, b) = (values(a), values(b));
        // the two sum f32 products in different orders: at most 1e-4 of the largest value after two blocks
        let scale = b.iter().fold(1.0, |m: f32, v| m.max(v.abs()));
        assert!(max_diff(&a, &b) <= 1e-4 * scale, "{name}: {}", max_diff(&a, &b));
    }
    // the low-level pass gives the same bits
    let mut output = Output::default();
    engine.forward_into(&values(x.clone()), 3, Wanted::All, &mut output).unwrap();
    assert_eq!(output.features, values(engine.features(&x).unwrap()));
    assert_eq!(output.logits.unwrap(), values(engine.forward(&x).unwrap()));
}

#[test]
fn raw_pixels_are_normalised_as_the_checkpoint_says() {
    let model = model();
    let path = sample(4);
    let image = Image::open(&path).unwrap();
    // what the model sees of it, as 8-bit pixels of the model's own size
    let pixels = model.preprocess().unwrap().resize_and_crop(&image).unwrap();
    let hwc = Tensor::from_vec(pixels, (32, 32, 3), &candle::Device::Cpu).unwrap();
    let nchw = hwc.permute((2, 0, 1)).unwrap().unsqueeze(0).unwrap().repeat((2, 1, 1, 1)).unwrap();
    let floats = model.preprocess().unwrap().apply(&image).unwrap();
    let floats = Tensor::from_vec(floats, (1, 3, 32, 32), &candle::Device::Cpu).unwrap();
    let logits = |x: &Tensor| model.forward(x).unwrap().to_vec2::<f32>().unwrap();
    let want = logits(&floats);
    // (x / 255 − mean) / std is rounded alike in both, or by one ulp of the input
    for (have, rows) in [(logits(&hwc), 1), (logits(&nchw), 2), (logits(&nchw.permute((0, 2, 3, 1)).unwrap()), 2)] {
        assert_eq!(have.len(), rows);
        for row in &have {
            assert!(max_diff(row, &want[0]) < 1e-4, "{row:?} {want:?}");
        }
    }
    let batch = Image::from_batch([2, 3, 32, 32], &nchw.flatten_all().unwrap().to_vec1().unwrap()).unwrap();
    for best in model.classify_all(&batch, 1) {
        assert_eq!(best.unwrap()[0].label, "4");
    }
}

#[test]
fn attention_has_names_shapes_and_rows_that_sum_to_one() {
    let model = model();
    let maps = model.attention(sample(8)).unwrap();
    let config = model.config();
    let names: Vec<_> = maps.iter().map(|map| map.name().to_owned()).collect();
    assert_eq!(names, (0..config.depth).map(|i| format!("blocks.{i}.attn")).collect::<Vec<_>>());
    for map in &maps {
        assert_eq!(map.shape(), [config.num_heads, 65, 65]);
        assert_eq!(map.values().len(), config.num_heads * 65 * 65);
        assert_eq!(map.head(1).unwrap(), &map.values()[65 * 65..2 * 65 * 65]);
        assert!(map.head(config.num_heads).is_none());
        for row in map.values().chunks(65) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5); // rounding of 65 terms
        }
    }
    assert_eq!(maps.last().unwrap().name(), names[config.depth - 1]);
    assert_eq!(maps.block(1, Some(0)).unwrap(), maps.get("blocks.1.attn").unwrap().head(0).unwrap());
    assert!(maps.block(config.depth, None).is_err() && maps.block(0, Some(config.num_heads)).is_err());
    let rollout = maps.rollout().unwrap();
    assert!(rollout.chunks(65).all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-5));
    assert_eq!(maps.per_patch(&rollout).unwrap(), rollout[1..65]);
    assert!(maps.per_patch(&rollout[1..]).is_err());
    // the same values as the network itself gives
    let checkpoint = Checkpoint::open(digits()).unwrap();
    let pixels = model.preprocess().unwrap().apply(&Image::open(sample(8)).unwrap()).unwrap();
    let x = Tensor::from_vec(pixels, (1, 3, 32, 32), &candle::Device::Cpu).unwrap();
    let direct = checkpoint.model(DType::F32, &candle::Device::Cpu).unwrap().attention_maps(&x).unwrap();
    for (map, direct) in maps.iter().zip(direct) {
        assert_eq!(map.values(), direct.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
}

#[test]
fn blocks_with_two_attentions_have_two_names() {
    let digits = Checkpoint::open(digits()).unwrap();
    let config = |block| {
        let mut config = digits.info.model.clone();
        (config.block, config.depth) = (block, 2);
        config
    };
    let open = |config| Predictor::builder().device(Device::Cpu).checkpoint(&random(config)).unwrap();
    let maps = open(config(BlockKind::ParallelThings)).attention(sample(1)).unwrap();
    let names: Vec<_> = maps.iter().map(|map| (map.name(), map.block())).collect();
    let expected = [("blocks.0.attns.0", 0), ("blocks.0.attns.1", 0), ("blocks.1.attns.0", 1), ("blocks.1.attns.1", 1)];
    assert_eq!(names, expected);
    let (first, second) = (maps.get("blocks.1.attns.0").unwrap(), maps.get("blocks.1.attns.1").unwrap());
    let mean = |i: usize| first.values()[i].midpoint(second.values()[i]);
    let both = maps.block(1, Some(0)).unwrap();
    assert!(both.iter().enumerate().all(|(i, v)| (v - mean(i)).abs() < 1e-6));
    assert!(maps.rollout().is_ok());
    // the rows of a difference of two attentions do not sum to one
    let maps = open(config(BlockKind::DiffParallelScaling)).attention(sample(1)).unwrap();
    assert!(matches!(maps.rollout(), Err(Error::Unsupported { .. })));
}

#[test]
fn exif_turns_images_unless_told_otherwise() {
    // its EXIF says that it is to be turned by 90 degrees
    let file = std::fs::read(root().join("tests/fixtures/images/baseline.jpg")).unwrap();
    let upright = Image::decode(&file).unwrap();
    let stored = Image::decode_with(&file, &ImageOptions::new().orientation(Orientation::Stored)).unwrap();
    assert_eq!((upright.width(), upright.height()), (stored.height(), stored.width()));
    assert_ne!(upright, stored);
    let model = |orientation| Predictor::builder().device(Device::Cpu).orientation(orientation).open(digits()).unwrap();
    let [turned, left] = [Orientation::Exif, Orientation::Stored].map(|o| model(o).embed(&file).unwrap());
    assert_eq!(turned, model(Orientation::Stored).embed(&upright).unwrap());
    assert_eq!(left, model(Orientation::Exif).embed(&stored).unwrap());
}
