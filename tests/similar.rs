//! `similar`: the nearest vectors of an index, its duplicates, and what it says of an index that does not fit.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{root, run};

/// The ten sample digits, one of them twice, as an index.
fn index(dir: &Path) -> PathBuf {
    let photos = dir.join("photos");
    fs::create_dir(&photos).unwrap();
    for digit in 0..10 {
        let name = format!("{digit}.png");
        fs::copy(root().join("weights/digits/samples").join(&name), photos.join(&name)).unwrap();
    }
    fs::copy(photos.join("7.png"), photos.join("seven again.png")).unwrap();
    let index = dir.join("photos.safetensors");
    let (photos, output) = (photos.to_str().unwrap(), index.to_str().unwrap());
    run(["embed", photos, "--format", "safetensors", "--output", output]).good();
    index
}

fn records(args: &[&str]) -> Vec<Value> {
    let text = run(["similar"].iter().chain(args)).good();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn name(record: &Value, key: &str) -> String {
    Path::new(record[key].as_str().unwrap()).file_name().unwrap().to_str().unwrap().to_owned()
}

/// The model is the index's own; the order is that of the cosines of `embed`'s vectors, computed here in f64.
#[test]
fn the_nearest_come_first() {
    let dir = tempfile::tempdir().unwrap();
    let index = index(dir.path());
    let query = root().join("weights/digits/samples/7.png");
    let (query, index) = (query.to_str().unwrap(), index.to_str().unwrap());
    let found = records(&[query, index, "--format", "jsonl", "--top", "11"]);
    let vectors = run(["embed", query, dir.path().join("photos").to_str().unwrap()]).good();
    let vectors: Vec<(String, Vec<f64>)> = (vectors.lines())
        .map(|line| {
            let record: Value = serde_json::from_str(line).unwrap();
            let values = record["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            (record["file"].as_str().unwrap().to_owned(), values)
        })
        .collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let of = |v: &[f64]| dot(&vectors[0].1, v) / (dot(&vectors[0].1, &vectors[0].1) * dot(v, v)).sqrt();
    let mut want: Vec<(&str, f64)> = vectors[1..].iter().map(|(file, v)| (file.as_str(), of(v))).collect();
    want.sort_by(|a, b| b.1.total_cmp(&a.1));
    assert_eq!(found.len(), 11);
    for (found, (file, cosine)) in found.iter().zip(want) {
        assert_eq!(found["file"], file);
        assert!((found["similarity"].as_f64().unwrap() - cosine).abs() < 1e-6, "{found}, expected {cosine}");
    }
    assert_eq!([name(&found[0], "file"), name(&found[1], "file")], ["7.png", "seven again.png"]);
    let near = records(&[query, index, "--format", "jsonl", "--threshold", "0.999"]);
    assert_eq!(near.len(), 2);
}

#[test]
fn duplicates_are_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let index = index(dir.path());
    let found = records(&["--duplicates", index.to_str().unwrap(), "--threshold", "0.9999", "--format", "jsonl"]);
    assert_eq!(found.len(), 1);
    assert_eq!([name(&found[0], "file"), name(&found[0], "other")], ["7.png", "seven again.png"]);
    assert!((found[0]["similarity"].as_f64().unwrap() - 1.0).abs() < 1e-6);
}

#[test]
fn a_contact_sheet_shows_what_was_found() {
    let dir = tempfile::tempdir().unwrap();
    let (index, page) = (index(dir.path()), dir.path().join("sheet.html"));
    let query = root().join("weights/digits/samples/3.png");
    let args = ["similar", query.to_str().unwrap(), index.to_str().unwrap(), "--top", "4", "--html"];
    let done = run(args.iter().chain(&[page.to_str().unwrap()]));
    assert!(done.stderr.contains("written: "), "{}", done.stderr);
    assert_eq!(done.good().lines().count(), 4);
    let html = fs::read_to_string(page).unwrap();
    assert_eq!(html.matches("<figure>").count(), 4);
    assert_eq!(html.matches("data:image/jpeg;base64,").count(), 4);
    // the page may replace neither the index nor the query
    let onto = [index.to_str().unwrap()];
    run(args.iter().chain(&onto)).bad(2, &["photos.safetensors"]);
    assert!(!records(&["--duplicates", index.to_str().unwrap(), "--format", "jsonl"]).is_empty());
}

#[test]
fn an_index_that_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (index, photo) = (index(dir.path()), root().join("weights/digits/samples/3.png"));
    let (index, photo) = (index.to_str().unwrap(), photo.to_str().unwrap());
    let other = root().join("tests/fixtures/parity/timm/deit3_small_patch16_224");
    run(["similar", photo, index, "--model", other.to_str().unwrap()]).bad(2, &["vectors of 64 values, but"]);
    run(["similar", photo, photo]).bad(2, &["3.png"]);
    run(["similar", "--text", "a cat", index]).bad(2, &["digits"]);
    run(["similar", index]).bad(2, &["QUERY"]);
}
