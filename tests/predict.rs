//! `predict`: formats, order, and what happens to bad inputs.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;

use crate::support::{finish, root, run, vit_cli};

fn sample(digit: u32) -> PathBuf {
    root().join(format!("weights/digits/samples/{digit}.png"))
}

fn predict(format: &str, files: &[PathBuf]) -> crate::support::Done {
    finish(vit_cli().args(["predict", "--format", format, "--top", "2"]).args(files))
}

#[test]
fn json_is_an_array_of_records_in_input_order() {
    let text = predict("json", &[sample(7), sample(1), sample(7)]).good();
    let records: serde_json::Value = serde_json::from_str(&text).unwrap();
    let labels: Vec<_> = records.as_array().unwrap().iter().map(|r| r["predictions"][0]["label"].as_str()).collect();
    assert_eq!(labels, [Some("7"), Some("1"), Some("7")]);
    assert_eq!(records[0], records[2]);
    assert_eq!(records[0]["predictions"].as_array().unwrap().len(), 2);
    assert_eq!(records[0]["file"].as_str(), sample(7).to_str());
}

#[test]
fn text_names_the_file_and_the_best_classes() {
    let text = predict("text", &[sample(3)]).good();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(Some(lines[0]), sample(3).to_str());
    assert!(lines[1].ends_with(" %  3"), "{text}");
}

/// A line per class in class order, as the seed's Python prints it.
#[test]
fn seed_prints_every_class_in_class_order() {
    let text = predict("seed", &[sample(4)]).good();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 10, "{text}");
    for (class, line) in lines.iter().enumerate() {
        assert!(line.starts_with(&format!("class: {class:<10}   prob: ")), "{line}");
        let (_, probability) = line.rsplit_once(' ').unwrap();
        let probability: f64 = probability.parse().unwrap();
        assert_eq!(probability > 0.5, class == 4, "{line}");
    }
}

#[test]
fn one_bad_image_costs_one_record_and_exit_status_1() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("text.png"), "no picture").unwrap();
    std::fs::write(at("empty.jpg"), "").unwrap();
    let half = std::fs::read(sample(5)).unwrap();
    std::fs::write(at("half.png"), &half[..half.len() / 2]).unwrap();
    let files = [sample(0), at("text.png"), at("missing.png"), sample(1), at("empty.jpg"), at("half.png"), sample(2)];

    let done = predict("jsonl", &files).bad(1, &["text.png", "missing.png", "empty.jpg", "half.png"]);
    let records: Vec<serde_json::Value> = done.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let good: Vec<bool> = records.iter().map(|r| r["predictions"].is_array() && r["error"].is_null()).collect();
    assert_eq!(good, [true, false, false, true, false, false, true]);
    for (record, file) in records.iter().zip(&files) {
        assert_eq!(record["file"].as_str(), file.to_str());
    }
    // csv: a header, two rows per good image, one per bad one
    let csv = predict("csv", &files).bad(1, &[]);
    assert_eq!(csv.stdout.lines().count(), 1 + 3 * 2 + 4);
    // text: bad images on stderr alone
    let text = predict("text", &files).bad(1, &["text.png"]);
    assert!(!text.stdout.contains("text.png"));
    // all bad
    assert!(predict("text", &files[1..3]).bad(1, &["missing.png"]).stdout.is_empty());
}

#[test]
fn stdin_is_an_image() {
    let mut child = vit_cli()
        .args(["predict", "--format", "csv", "--top", "1", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&std::fs::read(sample(6)).unwrap()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    assert!(String::from_utf8(out.stdout).unwrap().lines().nth(1).unwrap().starts_with("-,1,6,6,"));
}

#[test]
fn folders_are_searched_in_order() {
    let text =
        finish(vit_cli().args(["predict", "-k1", "-f", "csv"]).arg(root().join("weights/digits/samples"))).good();
    let classes: Vec<&str> = text.lines().skip(1).map(|l| l.split(',').nth(3).unwrap()).collect();
    assert_eq!(classes, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);
    let empty = tempfile::tempdir().unwrap();
    finish(vit_cli().arg("predict").arg(empty.path())).bad(1, &["no image in this folder"]);
}

#[cfg(unix)]
#[test]
fn hostile_names_work_and_are_escaped() {
    use std::os::unix::ffi::OsStrExt as _;
    let folder = tempfile::tempdir().unwrap();
    for name in [&b"-x.png"[..], b"new\nline.png", b"\xff\xfe.png", b"\x1b[31mred.png", " sp ☃.png".as_bytes()] {
        let path = folder.path().join(std::ffi::OsStr::from_bytes(name));
        std::fs::copy(sample(8), &path).unwrap();
        for format in ["text", "csv", "jsonl", "seed"] {
            let file = std::ffi::OsStr::from_bytes(name);
            let done = finish(vit_cli().current_dir(&folder).args(["predict", "-k1", "-f", format, "--"]).arg(file));
            let text = done.good();
            assert!(!text.contains('\u{1b}') && text.contains('8'), "{text:?}");
        }
        std::fs::write(&path, "no picture").unwrap();
        let done = finish(vit_cli().arg("predict").arg(&path)).bad(1, &[".png"]);
        assert_eq!(done.stderr.lines().count(), 1, "{done:?}");
        assert!(!done.stderr.contains('\u{1b}'), "{done:?}");
    }
}

#[test]
fn unknown_models_say_what_a_model_is() {
    let image = sample(0);
    let with = |model: &str| finish(vit_cli().args(["predict", "--model", model]).arg(&image));
    with("./nowhere.safetensors").bad(2, &["nowhere.safetensors", "no such file"]);
    with("nowhere").bad(2, &["nowhere", "digits", ".onnx"]);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("m.pth"), "x").unwrap();
    with(folder.path().join("m.pth").to_str().unwrap()).bad(2, &["m.pth", "safetensors"]);
    std::fs::write(folder.path().join("m.onnx"), "x").unwrap();
    with(folder.path().join("m.safetensors").to_str().unwrap()).bad(2, &["did you mean", "m.onnx"]);
}

#[test]
fn the_answer_does_not_depend_on_threads_or_batch() {
    let all = |args: &[&str]| {
        let samples = root().join("weights/digits/samples");
        finish(vit_cli().args(["predict", "-f", "jsonl"]).args(args).arg(samples)).good()
    };
    let one = all(&["--threads", "1"]);
    assert_eq!(one, all(&["--threads", "2"]));
    assert_eq!(one, all(&["--threads", "4"]));
    // another batch may sum in another order
    let (records, others) = (one.lines(), all(&["--batch", "3"]));
    for (a, b) in records.zip(others.lines()) {
        let [a, b]: [serde_json::Value; 2] = [a, b].map(|l| serde_json::from_str(l).unwrap());
        let p = |v: &serde_json::Value| v["predictions"][0]["probability"].as_f64().unwrap();
        assert!((p(&a) - p(&b)).abs() < 1e-5, "{a} {b}");
    }
}

/// Alone, an image is answered by an engine that holds no weights.
#[test]
fn an_image_alone_gets_the_answer_that_it_gets_among_others() {
    let folder = root().join("weights/digits/samples");
    for precision in ["f32", "bf16"] {
        let ask = |file: &PathBuf| {
            let args = ["predict", "-f", "jsonl", "-k", "10", "--device", "cpu", "--precision", precision];
            finish(vit_cli().args(args).arg(file)).good()
        };
        let all = ask(&folder);
        assert_eq!(all.lines().count(), 10);
        for digit in [0, 7] {
            let alone = ask(&sample(digit));
            assert!(all.lines().any(|line| line == alone.trim_end()), "{alone}");
        }
    }
}

#[test]
fn no_gpu_is_an_error_only_where_one_was_asked_for() {
    if cfg!(feature = "cuda") {
        return; // this machine may have one
    }
    let image = sample(0);
    let image = image.to_str().unwrap();
    run(["predict", "--device", "cuda", image]).bad(2, &["cuda"]);
    run(["predict", "--device", "auto", image]).good();
}
