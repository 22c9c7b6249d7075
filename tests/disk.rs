//! Full disks, signals, crowds and odd outputs: what `vit-convert` leaves behind is a whole file, or what was there before.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{fixture, run, vit_convert};

const CASE: &str = "timm-base-d18-fused";

/// What the conversion should give.
fn expected() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("m.safetensors");
    assert_eq!(run(vit_convert().arg(fixture(CASE)).arg(&output)).0, Some(0));
    fs::read(output).unwrap()
}

fn start(output: &Path) -> Child {
    let mut command = vit_convert();
    command.arg(fixture(CASE)).arg(output).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("the program starts")
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The limit on a file's size stands for a full disk.
#[test]
fn a_file_that_cannot_be_written_whole_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("m.safetensors");
    let blocks = expected().len() / 512;
    for old in [None, Some(b"what was there before".as_slice())] {
        if let Some(old) = old {
            fs::write(&output, old).unwrap();
        }
        for limit in [0, 1, 8, blocks / 2, blocks - 1] {
            // a shell of a user's, and one of a parent that ignores the signal, as Python does
            let ignore = if limit % 2 == 0 { "trap '' XFSZ; " } else { "" };
            let script = format!("ulimit -f {limit}; {ignore}exec \"$@\"");
            let mut command = Command::new("sh");
            command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_vit-convert")]).arg(fixture(CASE)).arg(&output);
            let (code, said) = run(&mut command);
            assert!(code == Some(2) && said.contains("m.safetensors") && said.contains("large"), "{limit}: {said}");
            assert_eq!(fs::read(&output).ok().as_deref(), old, "{limit} blocks");
            assert_eq!(names(folder.path()).len(), usize::from(old.is_some()), "{limit} blocks");
        }
    }
}

#[test]
fn a_signal_at_any_moment_leaves_a_whole_file_or_none() {
    let expected = expected();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("m.safetensors");
    let begun = Instant::now();
    start(&output).wait().unwrap();
    let whole = begun.elapsed();
    fs::remove_file(&output).unwrap();
    let mut finished = 0;
    for step in 0..24 {
        for signal in ["INT", "TERM", "KILL"] {
            let mut child = start(&output);
            std::thread::sleep(whole * step / 20);
            // a child that has ended is still there to be signalled, until it is waited for
            let sent = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap();
            assert!(sent.success());
            let status = child.wait().unwrap();
            match fs::read(&output) {
                Ok(bytes) => {
                    assert!(bytes == expected, "{signal} at step {step}: {} bytes", bytes.len());
                    finished += 1;
                    fs::remove_file(&output).unwrap();
                }
                Err(_) => assert!(!status.success(), "{signal} at step {step}"),
            }
            for left in names(folder.path()) {
                // only what cannot be caught may leave a temporary
                assert!(signal == "KILL" && left.starts_with('.'), "{signal} at step {step} leaves {left}");
                fs::remove_file(folder.path().join(left)).unwrap();
            }
        }
    }
    assert!(finished < 24 * 3, "no signal came in time");
}

#[test]
fn readers_see_whole_files_while_several_convert() {
    let expected = expected();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("m.safetensors");
    let mut children: Vec<Child> = (0..8).map(|_| start(&output)).collect();
    let mut seen = 0;
    while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        if let Ok(bytes) = fs::read(&output) {
            assert!(bytes == expected, "{} bytes", bytes.len());
            seen += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()) && seen > 0);
    assert_eq!(names(folder.path()), ["m.safetensors"]);
    assert_eq!(fs::read(&output).unwrap(), expected);
}

#[test]
fn an_output_is_never_the_input_a_folder_or_a_pipe_and_a_link_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let whole = fs::read(fixture(CASE)).unwrap();
    fs::write(at("m.onnx"), &whole).unwrap();
    symlink("m.onnx", at("link")).unwrap();
    fs::hard_link(at("m.onnx"), at("hard")).unwrap();
    symlink("loop", at("loop")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    let before = names(folder.path());
    let convert = |output: &OsStr| run(vit_convert().arg("m.onnx").arg(output).current_dir(folder.path()));
    for (output, why) in [
        ("m.onnx", "input"),
        ("./folder/../m.onnx", "input"),
        ("link", "input"),
        ("hard", "input"),
        ("loop", "loop"),
        ("dangling", "dangling"),
        ("pipe", "not a regular file"),
        ("missing/m.safetensors", "missing"),
        ("m.onnx/m.safetensors", "m.onnx"),
    ] {
        let (code, said) = convert(output.as_ref());
        assert!(code == Some(2) && said.contains(why) && said.len() < 1000, "{output}: {said}");
        assert_eq!(fs::read(at("m.onnx")).unwrap(), whole, "{output}");
        assert_eq!(names(folder.path()), before, "{output}");
    }
    assert!(fs::metadata(at("pipe")).unwrap().file_type().is_fifo() && fs::read_link(at("dangling")).is_ok());

    fs::write(at("target"), b"old").unwrap();
    symlink("target", at("out")).unwrap();
    assert_eq!(convert("out".as_ref()), (Some(0), String::new()));
    assert!(at("out").is_symlink() && fs::read(at("target")).unwrap() == expected());
}

#[test]
fn the_umask_gives_the_mode() {
    for (umask, mode) in [("022", 0o644), ("077", 0o600), ("000", 0o666)] {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("m.safetensors");
        let script = format!("umask {umask}; exec \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_vit-convert")]).arg(fixture(CASE)).arg(&output);
        assert_eq!(run(&mut command).0, Some(0));
        assert_eq!(fs::metadata(&output).unwrap().permissions().mode() & 0o777, mode, "umask {umask}");
    }
}

/// Whatever a conversion reads or writes: the graph, its external data, the labels, and its other outputs.
#[test]
fn no_output_replaces_a_file_that_the_conversion_reads_or_writes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for entry in fs::read_dir(fixture("post-external-manyfiles-timm-l11").parent().unwrap()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, at(path.file_name().unwrap().to_str().unwrap())).unwrap();
    }
    let labels: Vec<String> = (0..1000).map(|class| format!("class {class}")).collect();
    fs::write(at("labels.txt"), labels.join("\n")).unwrap();
    fs::create_dir(at("out")).unwrap();
    let content = || names(folder.path()).into_iter().map(|name| fs::read(at(&name)).ok()).collect::<Vec<_>>();
    let before = content();
    let data = "patch_embed.proj.weight";
    for args in [
        &["model.onnx"][..],
        &[data],
        &["out/../patch_embed.proj.weight"],
        &["labels.txt", "--labels", "labels.txt"],
        &["m.safetensors", "--labels", "labels.txt", "--report", "labels.txt"],
        &["m.safetensors", "--report", "model.onnx"],
        &["m.safetensors", "--report", data],
        &["m.safetensors", "--report", "m.safetensors"],
        &["m.safetensors", "--report", "out/../m.safetensors"],
        &["out/", "--report", "out/config.json", "--force"],
        &["--dry-run", "--report", data],
    ] {
        let (code, said) = run(vit_convert().arg("model.onnx").args(args).current_dir(folder.path()));
        assert!(code == Some(2) && (said.contains("is the input") || said.contains("twice")), "{args:?}: {said}");
        assert!(content() == before && fs::read_dir(at("out")).unwrap().count() == 0, "{args:?}");
    }
    // a link to an output is that output
    fs::write(at("m.safetensors"), b"old").unwrap();
    symlink("m.safetensors", at("link")).unwrap();
    let args = ["model.onnx", "m.safetensors", "--report", "link"];
    let (code, said) = run(vit_convert().args(args).current_dir(folder.path()));
    assert!(code == Some(2) && said.contains("twice"), "{said}");
    // a third name is written
    let args = ["model.onnx", "m.safetensors", "--report", "r.json"];
    let (code, said) = run(vit_convert().args(args).current_dir(folder.path()));
    assert!(code == Some(0) && at("r.json").is_file(), "{said}");
}
