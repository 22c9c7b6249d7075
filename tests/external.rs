//! External data that is not the model's: outside its folder, no regular file, of another length. Nothing is read, and the
//! error names the place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vit_convert::convert;

use crate::support::{root, unproven, write_to};

/// The file that holds one tensor, and the name of both.
const DATA: &str = "patch_embed.proj.weight";

/// A model with its data in files beside it.
fn model() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(root().join("tests/fixtures/zoo/post-external-manyfiles-timm-l11")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    (folder, model)
}

fn said(model: &Path) -> Result<vit_convert::Converted, String> {
    convert(model.join("model.onnx"), &unproven()).map_err(|e| e.to_string())
}

#[track_caller]
fn refused(model: &Path, parts: &[&str]) {
    let said = said(model).expect_err("refused");
    assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} in {said}");
}

#[test]
fn what_lies_where_the_data_should_be_is_looked_at_first() {
    let (folder, model) = model();
    let data = model.join(DATA);
    let whole = fs::read(&data).unwrap();
    let outside = folder.path().join("outside");
    fs::write(&outside, &whole).unwrap();
    assert!(said(&model).is_ok());

    let put = |change: &dyn Fn()| {
        fs::remove_file(&data).or_else(|_| fs::remove_dir(&data)).unwrap();
        change();
    };
    put(&|| std::os::unix::fs::symlink(&outside, &data).unwrap());
    refused(&model, &["model.onnx", DATA, "out of the model's folder"]);
    put(&|| std::os::unix::fs::symlink("../outside", &data).unwrap());
    refused(&model, &["model.onnx", DATA, "out of the model's folder"]);
    put(&|| std::os::unix::fs::symlink("/dev/zero", &data).unwrap());
    refused(&model, &["model.onnx", DATA, "out of the model's folder"]);
    put(&|| std::os::unix::fs::symlink(DATA, &data).unwrap());
    refused(&model, &[DATA, "symbolic links"]);
    put(&|| fs::hard_link(&outside, &data).unwrap());
    refused(&model, &["model.onnx", DATA, "hard link"]);
    put(&|| fs::create_dir(&data).unwrap());
    refused(&model, &["model.onnx", DATA, "not a regular file"]);
    put(&|| assert!(Command::new("mkfifo").arg(&data).status().unwrap().success()));
    refused(&model, &["model.onnx", DATA, "not a regular file"]);
    put(&|| fs::write(&data, &whole[..whole.len() - 1]).unwrap());
    refused(&model, &["model.onnx", DATA, "copied completely"]);
    put(&|| fs::write(&data, b"").unwrap());
    refused(&model, &["model.onnx", DATA, "0 bytes"]);

    // a link to a file within the folder is one to the model's own data
    put(&|| std::os::unix::fs::symlink("weight", &data).unwrap());
    refused(&model, &["model.onnx", DATA, "missing"]);
    fs::write(model.join("weight"), &whole).unwrap();
    let converted = said(&model).unwrap();
    write_to(&folder.path().join("m.safetensors"), &converted).unwrap();
}

#[test]
fn a_location_that_leads_elsewhere_is_refused() {
    let (folder, model) = model();
    let secret = folder.path().join("secret");
    fs::write(&secret, fs::read(model.join(DATA)).unwrap()).unwrap();
    let onnx = fs::read(model.join("model.onnx")).unwrap();
    for location in [
        "/dev/zero",
        "/proc/self/environ",
        "../secret",
        "./../secret",
        "x/../../secret",
        "..\\secret",
        "C:\\secret",
        "https://a.example/x",
        "model.onnx",
        ".",
        "no/such/file",
        "\0",
    ] {
        // as long as the name that it replaces, which is the tensor's too: more slashes lead to the same place
        let slashes = |n: usize| "/".repeat(n);
        let padded = match DATA.len() - location.len() {
            pad if location.starts_with('/') => slashes(pad) + location,
            _ if location == "\0" => DATA.replacen('.', location, 1),
            pad => format!(".{}{location}", slashes(pad - 1)),
        };
        assert_eq!(padded.len(), DATA.len());
        let mut bytes = onnx.clone();
        let mut replaced = 0;
        while let Some(at) = bytes.windows(DATA.len()).position(|part| part == DATA.as_bytes()) {
            bytes[at..at + DATA.len()].copy_from_slice(padded.as_bytes());
            replaced += 1;
        }
        assert!(replaced > 0);
        fs::write(model.join("model.onnx"), bytes).unwrap();
        refused(&model, &["model.onnx", "has its data in"]);
    }
}
