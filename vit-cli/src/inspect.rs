//! `inspect`: what a model file holds.

use std::fmt::Write as _;

use serde_json::{Value, json};
use vit_model::load::Checkpoint;

use crate::args::InspectArgs;
use crate::model;
use crate::output::{Stdout, escape, json_pretty, show, thousands};

pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let checkpoint = model::checkpoint(&args.model)?;
    let mut out = Stdout::new();
    out.write(&if args.json { json_pretty(&json_report(&checkpoint))? + "\n" } else { text(args, &checkpoint)? })?;
    out.flush()
}

fn parameters(checkpoint: &Checkpoint) -> u128 {
    checkpoint.weights.tensors().values().map(|t| crate::modules::elements(&t.shape)).sum()
}

fn json_report(checkpoint: &Checkpoint) -> Value {
    let tensors: serde_json::Map<String, Value> = checkpoint
        .weights
        .tensors()
        .iter()
        .map(|(name, t)| (name.clone(), json!({ "dtype": t.dtype.name(), "shape": t.shape })))
        .collect();
    json!({
        "config": checkpoint.info,
        "parameters": u64::try_from(parameters(checkpoint)).ok(),
        "tensors": tensors,
    })
}

fn text(args: &InspectArgs, checkpoint: &Checkpoint) -> anyhow::Result<String> {
    let (info, tensors) = (&checkpoint.info, checkpoint.weights.tensors());
    let mut text = String::new();
    let bytes: u128 = tensors.values().map(|t| crate::modules::elements(&t.shape) * t.dtype.size() as u128).sum();
    writeln!(
        text,
        "{}: {} tensors, {} parameters, {:.1} MB",
        show(&args.model),
        tensors.len(),
        thousands(parameters(checkpoint)),
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
        section(&mut text, "verified", verified)?;
    }
    writeln!(text, "\ntensors")?;
    let names: Vec<String> = tensors.keys().map(|name| escape(name)).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    for (name, tensor) in names.iter().zip(tensors.values()) {
        let pad = " ".repeat(width - name.chars().count());
        writeln!(text, "  {name}{pad}  {:<4}  {:?}", tensor.dtype.name(), tensor.shape)?;
    }
    Ok(text)
}

/// A JSON object as `key  value` lines under a heading; any other value on one line.
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
