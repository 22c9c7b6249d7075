//! Files that change while they are read, and files broken at random: an error, never a panic, a hang or a wrong answer.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use vit_convert::{Converted, Options, convert, write};
use vit_model::{Weights as _, safetensors::Safetensors};

use crate::support::root;

fn zoo(case: &str) -> std::path::PathBuf {
    root().join("tests/fixtures/zoo").join(case).join("model.onnx")
}

fn write_to(output: &Path, converted: &Converted) -> vit_convert::Result<()> {
    let options =
        write::Options { dtype: None, threads: 2, unhashed: converted.unhashed(), inputs: &[], progress: &|_, _| () };
    write::file(output, &converted.info, converted.weights.as_ref(), &options)
}

#[test]
fn a_model_that_changes_between_reading_and_writing_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("m.onnx"), folder.path().join("m.safetensors"));
    let whole = fs::read(zoo("timm-base-d18-fused")).unwrap();
    for verify in [false, true] {
        for change in ["none", "shorter", "empty", "longer", "written", "replaced"] {
            fs::write(&input, &whole).unwrap();
            let converted = convert(&input, &Options { verify, ..Options::default() }).unwrap();
            let open = || File::options().write(true).open(&input).unwrap();
            match change {
                "shorter" => open().set_len(whole.len() as u64 / 2).unwrap(),
                "empty" => open().set_len(0).unwrap(),
                "longer" => open().set_len(whole.len() as u64 + 1).unwrap(),
                "written" => open().set_modified(SystemTime::now() + Duration::from_secs(2)).unwrap(),
                // the file that was opened is still there, whole
                "replaced" => {
                    fs::write(folder.path().join("other"), b"another file").unwrap();
                    fs::rename(folder.path().join("other"), &input).unwrap();
                }
                _ => (),
            }
            let good = matches!(change, "none" | "replaced");
            match write_to(&output, &converted) {
                Ok(()) => assert!(good && vit_model::load::open(&output).is_ok(), "{change}"),
                Err(error) => {
                    let said = error.to_string();
                    assert!(!good && said.contains("m.onnx") && said.contains("convert it again"), "{change}: {said}");
                }
            }
            assert_eq!(output.exists(), good, "{change}");
            let _ = fs::remove_file(&output);
        }
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "a temporary is left");
}

#[test]
fn a_checkpoint_that_becomes_shorter_while_it_is_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    fs::copy(root().join("weights/digits/model.safetensors"), &path).unwrap();
    let file = Safetensors::open(&path).unwrap();
    let names: Vec<String> = file.tensors().keys().cloned().collect();
    assert!(names.iter().all(|name| file.read(name).is_ok()));
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let failed = names.iter().filter_map(|name| file.read(name).err()).map(|error| error.to_string());
    let failed: Vec<String> = failed.collect();
    assert!(failed.len() >= names.len() - 1 && failed.iter().all(|said| said.contains("m.safetensors")), "{failed:?}");
}
