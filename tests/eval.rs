//! `eval`: its figures are scikit-learn's, its folder can be read, and what it cannot measure it refuses.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use vit_model::image_crate::GrayImage;

use crate::digits::heldout;
use crate::support::run;

/// The held-out digits as pictures, a folder for each class; `name` gives a class its folder.
fn digits(root: &Path, name: impl Fn(usize) -> String) -> Vec<(PathBuf, usize)> {
    let (pixels, classes) = heldout();
    let mut files = Vec::new();
    for (i, (pixels, &class)) in pixels.chunks_exact(32 * 32).zip(&classes).enumerate() {
        let folder = root.join(name(class));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join(format!("{i:03}.png"));
        GrayImage::from_raw(32, 32, pixels.to_vec()).unwrap().save(&file).unwrap();
        files.push((file, class));
    }
    files
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&run(["eval"].iter().chain(args).chain(&["--json"])).good()).unwrap()
}

/// PyTorch's answers to the same images, measured by scikit-learn; `tests/fixtures/metrics/metrics.py` writes it.
fn scikit_learn() -> Value {
    serde_json::from_str(include_str!("fixtures/metrics/digits.json")).unwrap()
}

fn assert_near(found: &Value, want: &Value, tolerance: f64, what: &str) {
    let (found, want) = (found.as_f64().unwrap(), want.as_f64().unwrap());
    assert!((found - want).abs() <= tolerance, "{what}: {found}, expected {want}");
}

/// Accuracy, precision, recall and F1 to the last digit of an f64; probabilities are within 1e-4 of PyTorch's, so calibration
/// and log loss are within that.
#[test]
fn figures_are_those_of_scikit_learn() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("val");
    digits(&source, |class| class.to_string());
    let (found, want) = (json(&[source.to_str().unwrap()]), scikit_learn());
    assert_eq!(found["images"], 360);
    assert_eq!(found["failed"], 0);
    assert_near(&found["top1"], &want["top1"], 1e-12, "top1");
    assert_near(&found["top5"], &want["top5"], 1e-12, "top5");
    assert_near(&found["calibration_error"], &want["ece"], 1e-4, "ECE");
    assert_near(&found["log_loss"], &want["log_loss"], 1e-4, "log loss");
    let row = |found: &Value, want: &Value, what: &str| {
        assert_near(&found["precision"], &want["precision"], 1e-12, what);
        assert_near(&found["recall"], &want["recall"], 1e-12, what);
        assert_near(&found["f1"], &want["f1-score"], 1e-12, what);
        assert_near(&found["images"], &want["support"], 0.0, what);
    };
    for class in 0..10 {
        row(&found["classes"][class], &want["report"][class.to_string()], &class.to_string());
    }
    row(&found["macro_average"], &want["report"]["macro avg"], "macro average");
    row(&found["weighted_average"], &want["report"]["weighted avg"], "weighted average");
}

/// The printed table has the same digits as `classification_report(digits=4)`, and the folder holds what it promises.
#[test]
fn the_report_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (source, report) = (dir.path().join("val"), dir.path().join("report"));
    digits(&source, |class| class.to_string());
    let want = scikit_learn();
    let done = run(["eval", "--output", report.to_str().unwrap(), source.to_str().unwrap()]);
    assert!(done.stderr.contains("written: "), "{}", done.stderr);
    let text = done.good();
    for class in 0..10 {
        let scores = &want["report"][class.to_string()];
        let number = |name: &str| format!("{:.4}", scores[name].as_f64().unwrap());
        let row = [class.to_string(), number("precision"), number("recall"), number("f1-score"), "36".into()];
        let found = text.lines().any(|line| line.split_whitespace().eq(row.iter().map(String::as_str)));
        assert!(found, "{row:?} in\n{text}");
    }
    let read = |name: &str| fs::read_to_string(report.join(name)).unwrap();
    let confusion: Vec<Vec<u64>> = (read("confusion_matrix.csv").lines().skip(1))
        .map(|line| line.split(',').skip(1).map(|count| count.parse().unwrap()).collect())
        .collect();
    assert_eq!(serde_json::to_value(&confusion).unwrap(), want["confusion"]);
    let wrong: u64 = (0..10).map(|t| (0..10).filter(|&p| p != t).map(|p| confusion[t][p]).sum::<u64>()).sum();
    assert!(wrong > 0);
    assert_eq!(read("mistakes.csv").lines().count() as u64, wrong + 1);
    assert_eq!(read("mistakes.html").matches("<figure>").count() as u64, wrong);
    assert!(read("mistakes.html").matches("data:image/jpeg;base64,").count() as u64 == wrong);
    assert_eq!(read("classes.csv").lines().count(), 11);
    assert_eq!(serde_json::from_str::<Value>(&read("results.json")).unwrap()["images"], 360);
    for picture in ["confusion_matrix.png", "confusion_matrix_normalized.png", "reliability.png"] {
        let picture = vit_model::image_crate::open(report.join(picture)).unwrap().to_rgb8();
        assert!(picture.width() > 300 && picture.height() > 300);
        // something is drawn: there are many colours, not only the white page
        let colours: std::collections::BTreeSet<[u8; 3]> = picture.pixels().map(|p| p.0).collect();
        assert!(colours.len() > 20, "{} colours", colours.len());
    }
}

/// A table, whose paths begin at its own folder, means the same as folders; a file that cannot be read is counted and named.
#[test]
fn a_table_says_what_folders_say() {
    let dir = tempfile::tempdir().unwrap();
    let files = digits(&dir.path().join("all"), |_| "mixed".into());
    let mut table = "label,path\n".to_owned();
    for (file, class) in &files {
        table += &format!("{class},{}\n", file.strip_prefix(dir.path()).unwrap().display());
    }
    table += "3,all/none.png\n";
    let path = dir.path().join("labels.csv");
    fs::write(&path, table).unwrap();
    let done = run(["eval", "--json", path.to_str().unwrap()]);
    assert_eq!(done.code, Some(1));
    assert!(done.stderr.contains("none.png"), "{}", done.stderr);
    let found: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!((&found["images"], &found["failed"]), (&360.into(), &1.into()));
    assert_near(&found["top1"], &scikit_learn()["top1"], 1e-12, "top1");
}

/// The same model in another precision: the pairs are counted, and no image is right in one and lost in the other count.
#[test]
fn models_are_compared_in_pairs() {
    let dir = tempfile::tempdir().unwrap();
    digits(dir.path(), |class| class.to_string());
    let source = dir.path().to_str().unwrap();
    let found = json(&[source, "--compare-precision", "bf16"]);
    let compared = &found["compared"];
    assert_eq!(compared["name"], "bf16");
    let (first, second) = (found["top1"].as_f64().unwrap(), compared["top1"].as_f64().unwrap());
    let only = |name: &str| compared[name].as_f64().unwrap();
    assert!((second - first - (only("only_second") - only("only_first")) / 360.0).abs() < 1e-12);
    assert!((0.0..=1.0).contains(&compared["p_value"].as_f64().unwrap()));
    let text = run(["eval", source, "--compare", "digits"]).good();
    assert!(text.contains("these images do not show a difference"), "{text}");
}

#[test]
fn classes_that_cannot_be_assigned_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    digits(&dir.path().join("some"), |class| format!("digit {}", class % 3));
    run(["eval", dir.path().join("some").to_str().unwrap()]).bad(2, &["digit 0", "not among the 10 classes"]);
    // as many as the model has, in the order of their names: assumed, and said
    digits(&dir.path().join("all"), |class| format!("n{class:08}"));
    let done = run(["eval", "--json", dir.path().join("all").to_str().unwrap()]);
    assert!(done.stderr.contains("note: assumed: classes are numbered in the order of their names"), "{}", done.stderr);
    let found: Value = serde_json::from_str(&done.good()).unwrap();
    assert_near(&found["top1"], &scikit_learn()["top1"], 1e-12, "top1");
    fs::create_dir(dir.path().join("none")).unwrap();
    run(["eval", dir.path().join("none").to_str().unwrap()]).bad(2, &["a folder for each class is expected"]);
    let table = dir.path().join("bad.csv");
    fs::write(&table, "name,kind\na.png,1\n").unwrap();
    run(["eval", table.to_str().unwrap()]).bad(2, &["a column `file` and a column `label` are expected"]);
}
