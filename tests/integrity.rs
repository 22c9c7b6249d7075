//! A file of ours that holds other tensors, or another architecture, than were written: an error that names the first of them.

use std::fs;

use candle_core::{DType, Device};
use serde_json::Value;
use vit_convert::convert;
use vit_model::{checkpoint, engine};

use crate::support::{Parts, finish, root, unproven, vit_cli, write_to};

fn digits() -> Parts {
    Parts::of(&fs::read(root().join("weights/digits/model.safetensors")).unwrap())
}

/// What each reader says: the tensors one by one, the candle modules, the engine that packs in parallel, the program.
fn complaints(file: &Parts) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    fs::write(&path, file.bytes()).unwrap();
    let checkpoint = match checkpoint::open(&path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return vec![error.to_string()],
    };
    let (config, weights) = (&checkpoint.info.model, &*checkpoint.weights);
    let mut said: Vec<String> = weights
        .tensors()
        .keys()
        .filter_map(|name| weights.read(name).err())
        .chain(checkpoint.model(DType::F32, &Device::Cpu).err())
        .chain(engine::Engine::new(config, weights, &engine::EngineOptions::default()).err())
        .map(|error| error.to_string())
        .collect();
    let sample = root().join("weights/digits/samples/3.png");
    let done = finish(vit_cli().args(["predict", "--model"]).arg(&path).arg(sample));
    assert_eq!((done.code == Some(2), done.stdout.is_empty()), (!said.is_empty(), !said.is_empty()), "{done:?}");
    said.push(done.stderr);
    said.retain(|said| !said.is_empty());
    said
}

/// `parts` are in every complaint; there is one of each reader, and of `tensors` tensors.
#[track_caller]
fn refused(file: &Parts, tensors: usize, parts: &[&str]) {
    let said = complaints(file);
    assert_eq!(said.len(), if tensors == 0 { 1 } else { tensors + 3 }, "{said:#?}");
    for part in parts {
        assert!(said.iter().all(|said| said.contains(part)), "`{part}` in {said:#?}");
    }
}

#[test]
fn a_file_as_it_was_written_is_good() {
    assert_eq!(complaints(&digits()), Vec::<String>::new());
}

#[test]
fn one_wrong_bit_is_found_in_any_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let good = digits();
    let names = good.names();
    assert!(names.len() > 50);
    for name in &names {
        let mut file = good.clone();
        let at = file.range(name).start;
        // the lowest bit of a mantissa: a finite number still, that no look at the values would find
        file.data[at] ^= 1;
        fs::write(&path, file.bytes()).unwrap();
        let weights = checkpoint::open(&path).unwrap().weights;
        for other in &names {
            match weights.read(other) {
                Ok(_) => assert_ne!(other, name),
                Err(error) => {
                    let said = error.to_string();
                    assert!(other == name && said.contains(&format!("`{name}` is not what was written")), "{said}");
                }
            }
        }
    }
    let mut file = good.clone();
    let last = file.data.len() - 4;
    let name = names.iter().max_by_key(|name| good.range(name).start).unwrap();
    file.data[last] ^= 1;
    refused(&file, 1, &["m.safetensors", name, "checksum"]);
}

#[test]
fn tensors_of_equal_shape_under_each_others_names_are_found() {
    for (a, b) in [
        ("blocks.0.norm1.weight", "blocks.0.norm2.weight"),
        ("blocks.1.attn.proj.weight", "blocks.2.attn.proj.weight"),
        ("blocks.0.mlp.fc1.weight", "blocks.3.mlp.fc1.weight"),
    ] {
        let mut file = digits();
        let (first, second) = (file.header[a].clone(), file.header[b].clone());
        (file.header[a], file.header[b]) = (second, first);
        refused(&file, 2, &["m.safetensors", "is not what was written", "checksum"]);
    }
}

#[test]
fn another_shape_is_found() {
    let name = "blocks.0.mlp.fc1.weight";
    let mut file = digits();
    file.header[name]["shape"].as_array_mut().unwrap().reverse();
    refused(&file, 0, &["m.safetensors", name, "expected the shape [256, 64], found [64, 256]"]);

    // as many patches, in another grid
    let mut file = digits();
    file.document["model"]["img_size"] = serde_json::json!([16, 64]);
    refused(&file, 0, &["m.safetensors", "another `model` than was written"]);
}

#[test]
fn the_weights_of_another_model_are_found() {
    let mut file = digits();
    // every weight but the zeros is another
    for value in file.data.as_chunks_mut::<4>().0 {
        *value = (f32::from_le_bytes(*value) * 0.5).to_le_bytes();
    }
    let tensors = file.names().len();
    refused(&file, tensors, &["m.safetensors", "is not what was written"]);
}

#[test]
fn another_architecture_over_the_same_tensors_is_found() {
    for (key, value) in
        [("num_heads", 8.into()), ("act", "relu".into()), ("ln_eps", 1e-5.into()), ("global_pool", "avg".into())]
    {
        let mut file = digits();
        assert_ne!(file.document["model"][key], value);
        file.document["model"][key] = value;
        refused(&file, 0, &["m.safetensors", "`model`", "checksum", "xxh3"]);
        // without checksums it is a model like any other
        file.without_checksums();
        assert_eq!(complaints(&file), Vec::<String>::new(), "{key}");
    }
}

/// Names of classes and what is done to a photograph may be edited; checksums that are incomplete or none may not.
#[test]
fn checksums_cover_what_they_say_and_are_whole() {
    let mut file = digits();
    file.document["labels"][0] = "nought".into();
    file.document["preprocess"]["crop_pct"] = 0.9.into();
    assert_eq!(complaints(&file), Vec::<String>::new());

    let mut file = digits();
    file.document["xxh3"]["tensors"].as_object_mut().unwrap().remove("head.bias").unwrap();
    refused(&file, 1, &["head.bias", "no checksum"]);
    for bad in [Value::Null, 7.into(), "0".repeat(16).into(), serde_json::json!({ "model": "0123456789abcdef" })] {
        let mut file = digits();
        file.document["xxh3"] = bad;
        refused(&file, 0, &["m.safetensors", "cannot be understood"]);
    }
}

/// What was written before there were checksums is read as it was.
#[test]
fn a_file_without_checksums_is_good() {
    let onnx = root().join("tests/fixtures/zoo/hf-siglip-cls-l17-sdpa/model.onnx");
    let new = convert(&onnx, &unproven()).unwrap();
    let new_model = new.checkpoint();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.safetensors");
    write_to(&path, &new).unwrap();
    let mut file = Parts::of(&fs::read(&path).unwrap());
    file.without_checksums();
    fs::write(&path, file.bytes()).unwrap();
    let old = checkpoint::open(&path).unwrap();
    assert_eq!((&old.info.model, old.weights.tensors()), (&new_model.info.model, new_model.weights.tensors()));
    for name in old.weights.tensors().keys() {
        assert_eq!(old.weights.read(name).unwrap(), new_model.weights.read(name).unwrap(), "{name}");
    }
}
