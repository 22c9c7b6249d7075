//! `inspect`: shows the contents of a model file, and for an ONNX file also what was recovered from its graph.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Map, Value, json};
use vit_model::resolve::Location;
use vit_model::{Checkpoint, ModelInfo, TensorInfo, Weights, checkpoint::gguf};

use crate::args::InspectArgs;
use crate::model;
use crate::output::{Stdout, escape, json_pretty, show, thousands};

pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let text = if let Location::Onnx(path) = model::find(&args.model)? {
        onnx(args, &path)?
    } else {
        let checkpoint = model::checkpoint(&args.model)?;
        let (info, weights) = (&checkpoint.info, &*checkpoint.weights);
        if args.json { json_pretty(&json_report(info, weights))? + "\n" } else { text(args, info, weights)? }
    };
    let mut out = Stdout::new();
    out.write(&text)?;
    out.flush()
}

fn parameters(weights: &dyn Weights) -> u128 {
    weights.tensors().values().map(|t| crate::modules::elements(&t.shape)).sum()
}

/// The name of a tensor's stored type, and its size in bytes.
fn stored(weights: &dyn Weights, name: &str, tensor: &TensorInfo) -> (&'static str, u128) {
    let elements = crate::modules::elements(&tensor.shape);
    if weights.is_q8_0(name) {
        ("Q8_0", elements / gguf::BLOCK as u128 * gguf::BLOCK_BYTES as u128)
    } else {
        (tensor.dtype.name(), elements * tensor.dtype.size() as u128)
    }
}

fn json_report(info: &ModelInfo, weights: &dyn Weights) -> Value {
    let tensors: Map<String, Value> = weights
        .tensors()
        .iter()
        .map(|(name, t)| (name.clone(), json!({ "dtype": stored(weights, name, t).0, "shape": t.shape })))
        .collect();
    json!({ "config": info, "parameters": u64::try_from(parameters(weights)).ok(), "tensors": tensors })
}

/// Reports how `vit-convert` would convert the file, and why.
fn onnx(args: &InspectArgs, path: &Path) -> anyhow::Result<String> {
    let (Checkpoint { info, weights, .. }, imported) = vit_convert::inspect(path)?;
    if args.json {
        let mut report = json_report(&info, &*weights);
        report["onnx"] = json!({
            "input": imported.input, "output": imported.output, "modules": imported.modules,
            "provenance": imported.provenance, "evidence": imported.evidence, "assumed": imported.assumed,
            "ignored": imported.ignored, "approximate": imported.approximate,
        });
        return Ok(json_pretty(&report)? + "\n");
    }
    let mut text = text(args, &info, &*weights)?;
    section(&mut text, "input", &serde_json::to_value(&imported.input)?)?;
    section(&mut text, "output", &serde_json::to_value(&imported.output)?)?;
    let list = |names: &[String]| names.iter().map(|n| escape(n)).collect::<Vec<_>>().join(" ");
    writeln!(text, "\nmodules and the nodes that they were")?;
    for module in &imported.modules {
        writeln!(text, "  {}: {}", escape(&module.name), list(&module.nodes))?;
    }
    writeln!(text, "\ntensors and where they come from")?;
    for (name, provenance) in &imported.provenance {
        let by = if provenance.by.is_empty() { String::new() } else { format!(" ({})", provenance.by.join(", ")) };
        writeln!(text, "  {} from {}{by}", escape(name), list(&provenance.from))?;
    }
    writeln!(text, "\nrecovered from")?;
    for evidence in &imported.evidence {
        writeln!(text, "  {} from {} ({})", escape(&evidence.what), escape(&evidence.node), escape(&evidence.op))?;
    }
    let notes =
        [("assumed", &imported.assumed), ("ignored", &imported.ignored), ("approximate", &imported.approximate)];
    for (title, notes) in notes.into_iter().filter(|(_, notes)| !notes.is_empty()) {
        writeln!(text, "\n{title}")?;
        notes.iter().try_for_each(|note| writeln!(text, "  {}", escape(note)))?;
    }
    Ok(text)
}

fn text(args: &InspectArgs, info: &ModelInfo, weights: &dyn Weights) -> anyhow::Result<String> {
    let tensors = weights.tensors();
    let mut text = String::new();
    let bytes: u128 = tensors.iter().map(|(name, t)| stored(weights, name, t).1).sum();
    writeln!(
        text,
        "{}: {} tensors, {} parameters, {:.1} MB",
        show(&args.model),
        tensors.len(),
        thousands(parameters(weights)),
        bytes as f64 / 1e6
    )?;
    section(&mut text, "model", &serde_json::to_value(&info.model)?)?;
    section(&mut text, "preprocess", &serde_json::to_value(&info.preprocess)?)?;
    if let Some(labels) = &info.labels {
        let shown: Vec<String> = labels.iter().take(10).map(|l| escape(l)).collect();
        let more = if labels.len() > shown.len() { ", …" } else { "" };
        writeln!(text, "\nlabels ({})\n  {}{more}", labels.len(), shown.join(", "))?;
    }
    if !info.source.is_empty() {
        section(&mut text, "source", &serde_json::to_value(&info.source)?)?;
    }
    if let Some(verified) = &info.verified {
        section(&mut text, "verified", &serde_json::to_value(verified)?)?;
    }
    writeln!(text, "\ntensors")?;
    let width = tensors.keys().map(|name| escape(name).chars().count()).max().unwrap_or(0);
    for (name, tensor) in tensors {
        let shown = escape(name);
        let pad = " ".repeat(width - shown.chars().count());
        writeln!(text, "  {shown}{pad}  {:<4}  {:?}", stored(weights, name, tensor).0, tensor.shape)?;
    }
    Ok(text)
}

/// Writes a JSON object as `key  value` lines under a heading, or any other value on one line.
fn section(text: &mut String, title: &str, value: &Value) -> std::fmt::Result {
    writeln!(text, "\n{title}")?;
    let Value::Object(map) = value else {
        return writeln!(text, "  {}", escape(&value.to_string()));
    };
    let width = map.keys().map(|key| key.chars().count()).max().unwrap_or(0);
    for (key, value) in map {
        let pad = " ".repeat(width - key.chars().count());
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        writeln!(text, "  {}{pad}  {}", escape(key), escape(&value))?;
    }
    Ok(())
}
