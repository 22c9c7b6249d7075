//! The guide's table of exporters and what is recovered from each: measured on the fixtures, not written by hand.
//!
//! The test fails if the guide says something else; with `VIT_BLESS=1` it writes what it found.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use vit_convert::{Options, convert};

use crate::support;

/// Cases by the way that they were made, in the table's order.
const ROWS: [(&str, &str, &str); 21] = [
    ("timm", "torch-legacy", "timm, TorchScript exporter"),
    ("timm", "torch-dynamo", "timm, dynamo exporter"),
    ("hf", "torch-legacy", "transformers, TorchScript exporter"),
    ("hf", "torch-dynamo", "transformers, dynamo exporter"),
    ("tv", "torch-legacy", "torchvision, TorchScript exporter"),
    ("wz", "torch-legacy", "a plain PyTorch ViT, TorchScript exporter"),
    ("arch", "torch-legacy", "other spellings of attention and blocks"),
    ("hand", "onnx.helper", "fused operators: ai.onnx Attention, com.microsoft"),
    ("keras", "tf2onnx", "Keras, tf2onnx"),
    ("post", "torch-dynamo+onnxslim", "after onnxslim"),
    ("post", "torch-legacy+ort-extended", "after ONNX Runtime, extended"),
    ("post", "torch-legacy+ort-transformers", "after ONNX Runtime's transformer optimiser"),
    ("post", "torch-legacy+rewrite", "anonymous names, shuffled nodes"),
    ("post", "torch-legacy+functions", "local functions"),
    ("post", "torch-legacy+external", "external data in many files"),
    ("post", "torch-legacy", "with softmax, with byte input, in bf16"),
    ("post", "torch-legacy+ort-fp16", "fp16"),
    ("post", "torch-legacy+quantize_dynamic", "int8, dynamic"),
    ("post", "torch-legacy+quantize_static-QOperator", "int8, QOperator"),
    ("post", "torch-legacy+quantize_static-QDQ", "int8, QDQ"),
    ("post", "torch-legacy+MatMulNBits", "int4, MatMulNBits"),
];

#[derive(Default)]
struct Row {
    files: usize,
    converted: usize,
    opsets: BTreeSet<i64>,
    /// Fact → the operators that told it.
    from: BTreeMap<&'static str, BTreeSet<String>>,
    /// Tensors equal to the truth bit for bit, and all that have a truth.
    equal: usize,
    all: usize,
    /// How the rest were obtained.
    rest: BTreeSet<&'static str>,
    worst: f64,
}

/// Converts one case and notes what was found.
fn note(case: &Path, config: &serde_json::Value, row: &mut Row) {
    row.files += 1;
    row.opsets.extend(config["opset"].as_i64());
    let name = case.display();
    let converted = match convert(case.join("model.onnx"), &Options::default()) {
        Ok(converted) => converted,
        Err(error) => return assert_eq!(config["expect"], "either", "{name}: {error}"),
    };
    row.converted += 1;
    row.worst = row.worst.max(converted.verified().map_or(f64::INFINITY, |v| v.max_rel));
    for evidence in &converted.imported().evidence {
        let facts = [("num_heads", "heads"), ("ln_eps", "ε"), ("act", "activation")];
        if let Some((_, fact)) = facts.iter().find(|(start, _)| evidence.what.starts_with(start)) {
            let op = match (*fact, evidence.op.as_str()) {
                ("activation", "Mul") | ("ε", "Add") => "spelled out",
                (_, op) => op.trim_start_matches("com.microsoft."),
            };
            row.from.entry(fact).or_default().insert(op.into());
        }
    }
    let Ok(truth) = std::fs::read(case.join("truth.json")) else {
        let steps = converted.imported().provenance.values().flat_map(|p| &p.by);
        let dequantised = steps.clone().any(|s| *s == "dequantised");
        row.rest.insert(if dequantised { "dequantised" } else { "as stored" });
        return;
    };
    let truth: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&truth).unwrap();
    // by contents: a norm after one token, and gate and value, have two names each
    let mut held: BTreeMap<String, usize> = BTreeMap::new();
    let mut hold = |values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let digest = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        *held.entry(digest).or_default() += 1;
    };
    for tensor in converted.checkpoint().weights().tensors().keys() {
        let mut values = converted.checkpoint().weights().read_f32(tensor).unwrap();
        hold(&values);
        if tensor.contains(".fc1_g.") {
            values.extend(converted.checkpoint().weights().read_f32(&tensor.replace("fc1_g", "fc1_x")).unwrap());
            hold(&values);
        }
    }
    for tensor in truth.values() {
        row.all += 1;
        if let Some(left) = held.get_mut(tensor["sha256"].as_str().unwrap()).filter(|left| **left > 0) {
            *left -= 1;
            row.equal += 1;
        }
    }
}

fn table() -> String {
    let mut rows: Vec<Row> = ROWS.iter().map(|_| Row::default()).collect();
    for case in std::fs::read_dir(support::root().join("tests/fixtures/zoo")).unwrap() {
        let case = case.unwrap().path();
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(case.join("config.json")).unwrap()).unwrap();
        if config["expect"] == "refuse" {
            continue;
        }
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let family = name.split('-').next().unwrap_or_default();
        let at = ROWS.iter().position(|(f, exporter, _)| *f == family && config["exporter"] == *exporter);
        note(&case, &config, &mut rows[at.unwrap_or_else(|| panic!("{name} has no row"))]);
    }
    let mut text = String::from(
        "| from | opsets | converted | heads read from | ε | activation | tensors bit-identical | graph against model |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for ((_, _, label), row) in ROWS.iter().zip(&rows).filter(|(_, row)| row.files > 0) {
        let opsets: Vec<String> = row.opsets.iter().map(ToString::to_string).collect();
        let from =
            |fact| row.from.get(fact).map_or("–".into(), |ops| ops.iter().cloned().collect::<Vec<_>>().join(", "));
        let mut tensors: Vec<String> = row.rest.iter().map(ToString::to_string).collect();
        if row.all > 0 {
            tensors.insert(0, format!("{} of {}", row.equal, row.all));
        }
        // one digit of the difference would depend on the machine
        let proof = if row.converted == 0 { "refused".into() } else { bound(row.worst) };
        let (converted, files) = (row.converted, row.files);
        writeln!(
            text,
            "| {label} | {} | {converted} of {files} | {} | {} | {} | {} | {proof} |",
            opsets.join(", "),
            from("heads"),
            from("ε"),
            from("activation"),
            if tensors.is_empty() { "–".into() } else { tensors.join(", ") },
        )
        .unwrap();
    }
    text
}

/// The power of ten that a difference is below.
fn bound(worst: f64) -> String {
    let power = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1].into_iter().find(|power| worst < *power);
    power.map_or_else(|| format!("{worst:.0e}"), |power| format!("< {power:e}"))
}

#[test]
fn the_guide_says_what_is_recovered() {
    support::guide_block("converter.md", "exporters", &table());
}
