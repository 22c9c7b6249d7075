//! Resources that run out: threads that cannot be started, a small stack, memory, file descriptors, the disk. The answer is the
//! usual one, or an error; never a signal.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use vit_model::Config;

use crate::support::{Done, root};

/// Runs vit-cli in a shell that has set limits.
fn limited(limits: &str, args: &[&str], folder: &Path) -> Done {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{limits}; exec \"$@\""), "sh", env!("CARGO_BIN_EXE_vit-cli")]).args(args);
    for name in ["VIT_MODEL", "VIT_CPU", "RUST_BACKTRACE"] {
        command.env_remove(name);
    }
    command.env("HF_HUB_OFFLINE", "1").env("MALLOC_ARENA_MAX", "1");
    Done::from(command.current_dir(folder).stdin(Stdio::null()).output().unwrap())
}

const COMMANDS: [&[&str]; 5] = [
    &["predict", "-f", "csv", "0.png", "0.png", "0.png", "--batch", "1"],
    &["predict", "-f", "csv", "0.png", "-m", "model.onnx", "--modules"],
    &["embed", "0.png", "samples", "--batch", "2"],
    &["explain", "0.png", "-o", "out.png"],
    &["compare", "digits", "model.onnx"],
];

fn digits() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let weights = root().join("weights/digits");
    fs::copy(weights.join("model.onnx"), folder.path().join("model.onnx")).unwrap();
    fs::copy(weights.join("samples/0.png"), folder.path().join("0.png")).unwrap();
    fs::create_dir(folder.path().join("samples")).unwrap();
    for k in 1..6 {
        let name = format!("samples/{k}.png");
        fs::copy(weights.join(&name), folder.path().join(&name)).unwrap();
    }
    folder
}

/// A stack larger than the address space cannot be had, so no thread starts.
#[test]
fn without_threads_the_answers_are_the_same() {
    let folder = digits();
    for args in COMMANDS {
        let usual = limited("true", args, folder.path());
        for limits in [
            "ulimit -v 8000000; export RUST_MIN_STACK=9000000000",
            "ulimit -v 8000000; export RUST_MIN_STACK=9000000000 RAYON_NUM_THREADS=40",
        ] {
            let done = limited(limits, args, folder.path());
            assert_eq!(
                (done.stderr.as_str(), done.stdout.as_str()),
                (usual.stderr.as_str(), usual.stdout.as_str()),
                "{args:?}"
            );
            done.good();
        }
    }
}

#[test]
fn a_small_stack_is_enough() {
    let folder = digits();
    for args in COMMANDS {
        let usual = limited("true", args, folder.path()).good();
        for kilobytes in [1024, 128] {
            let done = limited(&format!("ulimit -s {kilobytes}"), args, folder.path());
            assert_eq!(done.good(), usual, "{args:?} with {kilobytes} kB");
        }
    }
}

#[test]
fn too_few_descriptors_are_an_error_with_the_file_in_it() {
    let folder = digits();
    let mut good = 0;
    for descriptors in 3..16 {
        let done =
            limited(&format!("ulimit -n {descriptors}"), &["predict", "0.png", "-m", "model.onnx"], folder.path());
        match done.code {
            Some(0) => good += 1,
            _ => assert!(
                matches!(done.code, Some(1 | 2 | 127)) && !done.stderr.contains("panicked"),
                "{descriptors}: {done:?}"
            ),
        }
    }
    assert!(good > 4, "{good}");
}

/// A model of zeros, which take no space on a disk: 57 million weights.
fn zeros(path: &Path) {
    let mut config = Config::vit([32, 32], [16, 16], 1024, 4, 16);
    config.num_classes = 4096;
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in vit_model::layers::parameters(&config).unwrap() {
        let end = at + 4 * shape.iter().product::<usize>();
        header.insert(name, json!({ "dtype": "F32", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let preprocess = vit_model::PreprocessConfig::new([3, 32, 32]);
    let document = json!({ "vit": 1, "model": config, "preprocess": preprocess }).to_string();
    header.insert("__metadata__".into(), json!({ "format": "pt", "config": document }));
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let start = [&(header.len() as u64).to_le_bytes(), header.as_slice()].concat();
    fs::write(path, &start).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_len((start.len() + at) as u64).unwrap();
}

#[test]
fn a_lack_of_memory_is_an_error_that_says_for_what() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(root().join("tests/fixtures/images/rgb.png"), folder.path().join("a.png")).unwrap();
    zeros(&folder.path().join("m.safetensors"));
    for (args, enough) in [
        (&["predict", "a.png", "-m", "m.safetensors", "--threads", "1"][..], 400_000),
        (&["predict", "a.png", "a.png", "-m", "m.safetensors", "--threads", "1"], 1_200_000),
        (&["embed", "a.png", "-m", "m.safetensors", "--threads", "1", "--modules"], 1_200_000),
    ] {
        let (mut said, mut good) = (0, 0);
        for kilobytes in (100_000..=enough).step_by(20_000) {
            let done = limited(&format!("export RAYON_NUM_THREADS=1; ulimit -v {kilobytes}"), args, folder.path());
            match done.code {
                Some(0) => good += 1,
                Some(2) if done.stderr.contains("not enough memory for") => said += 1,
                _ => panic!("{args:?} with {kilobytes} kB: {done:?}"),
            }
        }
        assert!(said > 0 && good > 0, "{args:?}: {said} errors, {good} answers");
    }
}
