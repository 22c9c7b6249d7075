//! Safetensors files whose header lies, and weights or answers that are no numbers: an error each, before anything is allocated
//! on their word and before anything is printed.

use std::fs;
use std::path::Path;

use vit_model::{Dtype, Weights as _, checkpoint::safetensors::Safetensors, weights::check_finite};

use crate::support::{Parts, finish, root, vit_cli};

fn file(length: u64, header: &[u8], data: usize) -> Vec<u8> {
    [&length.to_le_bytes(), header, &vec![0; data]].concat()
}

fn refused(path: &Path, bytes: &[u8], why: &str) {
    fs::write(path, bytes).unwrap();
    let said = Safetensors::open(path).err().unwrap_or_else(|| panic!("accepted, expected: {why}")).to_string();
    assert!(said.contains("m.safetensors") && said.contains(why) && said.len() < 1000, "`{why}` in {said}");
}

#[test]
fn a_header_that_lies_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let good = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[],"data_offsets":[8,10]}}"#;
    fs::write(&path, file(good.len() as u64, good.as_bytes(), 10)).unwrap();
    assert_eq!(Safetensors::open(&path).unwrap().tensors().len(), 2);

    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    for (header, data, why) in [
        ("", 8, "zeros"),
        ("[]", 0, "damaged header"),
        ("{", 0, "damaged header"),
        (&deep, 0, "damaged header"),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} x"#, 8, "damaged header"),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 7, "describes 8"),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 9, "describes 8"),
        (r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8, "`a` is F32 [3]"),
        (r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,8]}}"#, 8, "`a` is F16 [2]"),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8, "`a` is at bytes 8 to 0"),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8, "`a` is at bytes 4 to 8"),
        (r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#, 8, "unknown type"),
        (r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8, "damaged header"),
        (r#"{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}"#, 8, "damaged header"),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}}"#, 8, "damaged header"),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}"#, 8, "damaged header"),
        (r#"{"a":{"shape":[2],"data_offsets":[0,8]}}"#, 8, "damaged header"),
        (
            r#"{"a":{"dtype":"F32","shape":[4611686018427387904,2],"data_offsets":[0,8]}}"#,
            8,
            "does not fit its 8 bytes",
        ),
        (r#"{"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]}}"#, 8, "damaged header"),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}"#, 4, "does not fit"),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#,
            16,
            "stands twice",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            12,
            "`b` is at",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}"#,
            20,
            "`b` is at",
        ),
        (r#"{"__metadata__":{"k":1}}"#, 0, "damaged header"),
        (r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0, "stands twice"),
    ] {
        refused(&path, &file(header.len() as u64, header.as_bytes(), data), why);
    }
    let rank = format!(r#"{{"a":{{"dtype":"F32","shape":[{}1],"data_offsets":[0,4]}}}}"#, "1,".repeat(32));
    refused(&path, &file(rank.len() as u64, rank.as_bytes(), 4), "33 dimensions");
    for length in [3, 100_000_001, 1 << 32, u64::MAX] {
        refused(&path, &file(length, b"{}", 0), if length == 3 { "within its header" } else { "announces a header" });
    }
    for (bytes, why) in [
        (b"".as_slice(), "empty file"),
        (b"1234567", "too few"),
        (b"PK\x03\x04............", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (&[0; 100], "zeros"),
    ] {
        refused(&path, bytes, why);
    }
}

#[test]
fn every_type_has_numbers_that_are_none() {
    type Bytes = fn(f32) -> Vec<u8>;
    let types: [(Dtype, Bytes); 4] = [
        (Dtype::F32, |v| v.to_le_bytes().to_vec()),
        (Dtype::F16, |v| half::f16::from_f32(v).to_le_bytes().to_vec()),
        (Dtype::Bf16, |v| half::bf16::from_f32(v).to_le_bytes().to_vec()),
        (Dtype::F64, |v| f64::from(v).to_le_bytes().to_vec()),
    ];
    for (dtype, bytes) in types {
        // in the first and the last block, and behind the last whole one
        for at in [0, 255, 256, 700, 1023, 1024] {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 65504.0, -0.0, 1e-7] {
                let mut all: Vec<u8> = (0..1025).flat_map(|_| bytes(1.0)).collect();
                let size = dtype.size();
                all[at * size..(at + 1) * size].copy_from_slice(&bytes(bad));
                match check_finite("w", dtype, &all) {
                    Ok(()) => assert!(bad.is_finite(), "{dtype:?} {bad} at {at}"),
                    Err(error) => {
                        let said = error.to_string();
                        assert!(!bad.is_finite() && said.contains(&format!("`w`: element {at} ")), "{dtype:?}: {said}");
                    }
                }
            }
        }
    }
}

/// Finite weights of an answer that is not: no class is named, no vector is written, by no command.
#[test]
fn an_answer_that_is_no_number_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let mut good = Parts::of(&fs::read(root().join("weights/digits/model.safetensors")).unwrap());
    good.without_checksums();
    let sample = root().join("weights/digits/samples/7.png");
    for tensor in ["norm.weight", "blocks.3.mlp.fc2.bias", "head.weight"] {
        let mut file = good.clone();
        let range = file.range(tensor);
        for value in file.data[range].as_chunks_mut::<4>().0 {
            *value = if f32::from_le_bytes(*value) < 0.0 { f32::MIN } else { f32::MAX }.to_le_bytes();
        }
        fs::write(&path, file.bytes()).unwrap();
        for args in [
            ["predict", "--format", "seed"],
            ["predict", "--format", "csv"],
            ["predict", "--format", "json"],
            ["predict", "--format", "jsonl"],
            ["predict", "--format", "text"],
            ["predict", "--precision", "f32"],
            ["predict", "--device", "cpu"],
        ] {
            let done = finish(vit_cli().args(args).arg("--model").arg(&path).arg(&sample));
            assert!(
                done.code == Some(1) && done.stderr.contains("no class can be named"),
                "{tensor} {args:?}: {done:?}"
            );
            // a record of the error where the format has records, and nothing that could be read as an answer
            let answers = ["predictions", "prob:", "%"].iter().any(|word| done.stdout.contains(word));
            let rows = done
                .stdout
                .lines()
                .filter(|line| line.contains("7.png"))
                .all(|line| line.contains("error") || line.contains(",,,,,"));
            assert!(!answers && rows, "{tensor} {args:?}: {done:?}");
        }
        if tensor != "head.weight" {
            let done = finish(vit_cli().args(["embed", "--model"]).arg(&path).arg(&sample));
            assert!(matches!(done.code, Some(1 | 2)) && done.stderr.contains("finite"), "{tensor}: {done:?}");
        }
        let done = finish(vit_cli().args(["bench", "--iters", "1", "--device", "cpu"]).arg(&path));
        assert!(done.code == Some(2) && done.stderr.contains("the model answers"), "{tensor}: {done:?}");
    }
}
