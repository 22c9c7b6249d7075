//! Models with a text tower beside the image tower: texts, and classes that are words. The expected values are transformers'
//! (`fixtures/two_tower/make.py`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use vit_model::checkpoint::TextSource;
use vit_model::text::{Similarity, TextPool};
use vit_model::{Checkpoint, Error, Format, Predictor};

use crate::support::{finish, max_diff, root, vit_cli};

/// Sums of a few dozen products in f32, in another order than PyTorch's.
const NEAR: f32 = 2e-5;

fn folder(name: &str) -> PathBuf {
    root().join("tests/fixtures/two_tower").join(name)
}

fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn expected(name: &str) -> HashMap<String, Tensor> {
    tensors(&folder(name).join("expect.safetensors"))
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn near(found: &[f32], wanted: &Tensor, what: &str) {
    let wanted = values(wanted);
    let scale = wanted.iter().fold(1.0, |m: f32, v| m.max(v.abs()));
    let far = max_diff(found, &wanted);
    assert!(far <= NEAR * scale, "{what}: {far}");
}

fn words(key: &str) -> Vec<String> {
    let text = std::fs::read_to_string(folder("clip").join("texts.json")).unwrap();
    let texts: serde_json::Value = serde_json::from_str(&text).unwrap();
    texts[key].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

fn ids(found: &[Vec<u32>]) -> Vec<i64> {
    found.iter().flatten().map(|&id| id.into()).collect()
}

#[test]
fn ids_embeddings_and_logits_are_those_of_transformers() {
    for name in ["clip", "siglip"] {
        let (model, wanted, texts) = (Predictor::open(folder(name)).unwrap(), expected(name), words("texts"));
        let text = model.text().unwrap();
        let found = text.tokenizer().encode(&texts).unwrap();
        assert_eq!(ids(&found), wanted["input_ids"].flatten_all().unwrap().to_vec1::<i64>().unwrap(), "{name}");
        let embedded = model.embed_text(&texts).unwrap();
        near(&embedded.concat(), &wanted["text_embeds"], name);
        let images = if model.info().projection { model.forward(&wanted["x"]) } else { model.pre_logits(&wanted["x"]) };
        let images = images.unwrap();
        near(&values(&images), &wanted["image_embeds"], name);
        let logits = text.logits(&images.to_vec2().unwrap(), &embedded).unwrap();
        near(&logits.concat(), &wanted["logits_per_image"], name);
    }
    let clip = Predictor::open(folder("clip")).unwrap().text().unwrap();
    assert_eq!((clip.config().pool, clip.similarity()), (TextPool::LargestId, Similarity::Softmax));
    let siglip = Predictor::open(folder("siglip")).unwrap().text().unwrap();
    assert_eq!((siglip.config().pool, siglip.similarity()), (TextPool::Last, Similarity::Sigmoid));
}

#[test]
fn texts_do_not_depend_on_what_is_embedded_beside_them() {
    for name in ["clip", "siglip"] {
        let (model, texts) = (Predictor::open(folder(name)).unwrap(), words("texts"));
        let together = model.embed_text(&texts).unwrap();
        for (text, together) in texts.iter().zip(&together) {
            let alone = model.embed_text(&[text]).unwrap();
            assert!(max_diff(&alone[0], together) <= NEAR, "{name}: {text:?}");
        }
        assert!(model.embed_text(&[""; 0]).unwrap().is_empty());
    }
}

#[test]
fn a_text_tower_alone_is_opened_without_images() {
    let wanted = expected("texts");
    let text = TextSource::open(folder("texts")).unwrap().load(&Device::Cpu).unwrap();
    let found = text.tokenizer().encode(&words("texts")).unwrap();
    // `!` is the token that it pads with, so a text is split there, as in transformers
    assert_eq!(ids(&found), wanted["input_ids"].flatten_all().unwrap().to_vec1::<i64>().unwrap());
    near(&text.embed_ids(&found).unwrap().concat(), &wanted["text_embeds"], "texts");
    assert!(matches!(text.scale_and_bias(), Err(Error::Unsupported { .. })));
    assert!(Predictor::open(folder("texts")).is_err());
}

#[test]
fn zero_shot_probabilities_are_those_of_transformers() {
    for name in ["clip", "siglip"] {
        let (model, wanted) = (Predictor::open(folder(name)).unwrap(), values(&expected(name)["probs"]));
        let (labels, templates) = (words("labels"), words("templates"));
        let classes = model.zero_shot(&labels, &templates).unwrap();
        let answer = classes.classify(folder(name).join("image.png"), 9).unwrap();
        assert_eq!(answer.len(), labels.len());
        assert!(answer.is_sorted_by(|a, b| a.logit >= b.logit));
        for class in &answer {
            assert_eq!(class.label, labels[class.class]);
            assert!((class.probability - wanted[class.class]).abs() <= NEAR, "{name}: {class:?}");
        }
        let all: Vec<_> = classes.classify_all([folder(name).join("image.png"), folder("none.png")], 9).collect();
        assert!(all[0].as_ref().unwrap() == &answer && all[1].is_err());
        // the command line gives the same numbers
        let said = finish(
            vit_cli()
                .args(["predict", "--format", "json", "--model"])
                .arg(folder(name))
                .args(["--labels", &labels.join(", "), "--template", &templates[0], "--template", &templates[1]])
                .arg(folder(name).join("image.png")),
        );
        let said: serde_json::Value = serde_json::from_str(&said.good()).unwrap();
        for class in said[0]["predictions"].as_array().unwrap() {
            let at = labels.iter().position(|label| class["label"] == label.as_str()).unwrap();
            assert!((class["probability"].as_f64().unwrap() as f32 - wanted[at]).abs() <= NEAR, "{name}: {class}");
        }
    }
}

#[test]
fn prompts_that_make_no_sense_are_refused() {
    let model = Predictor::open(folder("clip")).unwrap();
    let refused = |labels: &[&str], templates: &[&str]| model.zero_shot(labels, templates).unwrap_err().to_string();
    assert!(refused(&[], &[]).contains("at least one label"));
    assert!(refused(&["cat", " "], &[]).contains("label 2 is empty"));
    assert!(refused(&["cat"], &["a photo"]).contains("has no {}"));
    assert!(refused(&[&"cat ".repeat(1 << 15)], &[]).contains("bytes"));
    let said = model.classify(folder("clip").join("image.png"), 1).unwrap_err().to_string();
    assert!(said.contains("--labels"), "{said}");
}

#[test]
fn predict_without_words_says_what_is_missing() {
    let image = folder("clip").join("image.png");
    let predict =
        |model: &Path, more: &[&str]| finish(vit_cli().args(["predict", "-m"]).arg(model).args(more).arg(&image));
    predict(&folder("clip"), &[]).bad(2, &["compares images with texts", "--labels"]);
    predict(&folder("siglip"), &[]).bad(2, &["compares images with texts", "--labels"]);
    predict(&folder("clip"), &["--template", "a {}"]).bad(2, &["--template needs --labels"]);
    predict(Path::new("digits"), &["--labels", "a,b"]).bad(2, &["no text tower"]);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "cat\ndog\n").unwrap();
    let done = predict(&folder("clip"), &["--labels-file", file.path().to_str().unwrap()]);
    assert!(done.stderr.contains("\"This is a photo of {}.\" is used"), "{}", done.stderr);
    let text = done.good();
    assert!(text.contains("cat") && text.contains("dog"), "{text}");
}

#[test]
fn forward_writes_ids_embeddings_and_logits() {
    let out = tempfile::tempdir().unwrap();
    let y = out.path().join("y.safetensors");
    let texts: Vec<String> = words("texts").into_iter().flat_map(|text| ["--text".into(), text]).collect();
    for name in ["clip", "siglip", "texts"] {
        let wanted = expected(name);
        finish(vit_cli().arg("forward").arg(folder(name)).args(&texts).arg("--output").arg(&y)).good();
        let found = tensors(&y);
        assert_eq!(found.len(), 2);
        assert_eq!(found["input_ids"].dtype(), DType::I64);
        assert_eq!(found["input_ids"].to_vec2::<i64>().unwrap(), wanted["input_ids"].to_vec2::<i64>().unwrap());
        near(&values(&found["text_embeds"]), &wanted["text_embeds"], name);
    }
    for name in ["clip", "siglip"] {
        let wanted = expected(name);
        let input = folder(name).join("expect.safetensors");
        finish(vit_cli().arg("forward").arg(folder(name)).arg("--input").arg(input).args(&texts).arg("-o").arg(&y))
            .good();
        let found = tensors(&y);
        for key in ["text_embeds", "logits_per_image", if name == "clip" { "image_embeds" } else { "text_embeds" }] {
            assert_eq!(found[key].dims(), wanted[key].dims(), "{name}: {key}");
            near(&values(&found[key]), &wanted[key], key);
        }
    }
    finish(vit_cli().args(["forward", "digits", "--text", "x", "-o"]).arg(&y)).bad(2, &["no text tower"]);
    finish(vit_cli().args(["forward", "digits", "-o"]).arg(&y)).bad(2, &["--input"]);
}

#[test]
fn embed_projects_images_and_takes_texts() {
    let wanted = expected("clip");
    let record = |args: &[&str]| -> serde_json::Value {
        let text = finish(vit_cli().args(["embed", "-m"]).arg(folder("clip")).args(args)).good();
        serde_json::from_str(text.lines().next().unwrap()).unwrap()
    };
    let vector = |record: &serde_json::Value| -> Vec<f32> {
        record["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
    };
    let text = record(&["--text", "a photo of a cat"]);
    assert_eq!(text["text"], "a photo of a cat");
    near(&vector(&text), &wanted["text_embeds"].get(0).unwrap(), "text");
    let unit = vector(&record(&["--text", "a photo of a cat", "--normalize"]));
    assert!((unit.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() <= 1e-5);
    let image = folder("clip").join("image.png");
    let image = image.to_str().unwrap();
    assert_eq!(vector(&record(&[image])).len(), 6); // projected
    assert_eq!(vector(&record(&[image, "--layer", "pooled"])).len(), 12);
    finish(vit_cli().args(["embed", "-m"]).arg(folder("clip"))).bad(2, &["FILES"]);
}

#[test]
fn images_are_embedded_even_if_texts_cannot_be_read() {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(folder("siglip")).unwrap() {
        let file = file.unwrap();
        if file.file_name() != "tokenizer.json" {
            std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
        }
    }
    let model = Predictor::open(copy.path()).unwrap();
    model.embed(folder("siglip").join("image.png")).unwrap();
    let said = model.embed_text(&["a cat"]).unwrap_err().to_string();
    assert!(said.contains("has no tokenizer") && said.contains("tokenizer.json"), "{said}");
    std::fs::write(copy.path().join("spiece.model"), "").unwrap();
    let said = model.embed_text(&["a cat"]).unwrap_err().to_string();
    assert!(said.contains("spiece.model alone"), "{said}");
}

/// The head of a baked model gives the two towers' logits but for the length of the image's embedding, by which a linear head
/// cannot divide.
#[test]
fn words_become_an_ordinary_head() {
    let out = tempfile::tempdir().unwrap();
    for name in ["clip", "siglip"] {
        let (labels, templates) = (words("labels"), words("templates"));
        let towers = Predictor::open(folder(name)).unwrap();
        let classes = towers.zero_shot(&labels, &templates).unwrap();
        let (_, bias) = towers.text().unwrap().scale_and_bias().unwrap();
        let path = out.path().join(format!("{name}.safetensors"));
        let baked = Checkpoint::open(folder(name)).unwrap().with_classes(&labels, &templates).unwrap();
        assert!(!baked.info().source.approximate().is_empty());
        baked.save(&path, Format::Safetensors).unwrap();
        let baked = Predictor::open(&path).unwrap();
        assert_eq!(baked.labels().unwrap(), labels);
        assert!(!baked.is_two_tower());

        let x = &expected(name)["x"];
        let images = if towers.info().projection { towers.forward(x) } else { towers.pre_logits(x) };
        let found = baked.forward(x).unwrap().to_vec2::<f32>().unwrap();
        let mut factors = Vec::new();
        for (image, found) in images.unwrap().to_vec2::<f32>().unwrap().iter().zip(&found) {
            let length = image.iter().map(|v| v * v).sum::<f32>().sqrt();
            for (found, wanted) in found.iter().zip(classes.logits(image).unwrap()) {
                factors.push((found - bias) / ((wanted - bias) * length));
            }
        }
        let first = factors[0];
        assert!(first > 0.0 && factors.iter().all(|f| (f / first - 1.0).abs() <= 1e-3), "{name}: {factors:?}");
        let best = baked.classify(folder(name).join("image.png"), 3).unwrap();
        let wanted = classes.classify(folder(name).join("image.png"), 3).unwrap();
        let order = |all: &[vit_model::labels::Prediction]| all.iter().map(|p| p.class).collect::<Vec<_>>();
        assert_eq!(order(&best), order(&wanted), "{name}");
    }
    let said = Checkpoint::resolve("digits").unwrap().with_classes(&["a"], &["{}"]).unwrap_err().to_string();
    assert!(said.contains("text tower"), "{said}");
}
