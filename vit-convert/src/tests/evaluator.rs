//! The evaluator that proves conversions, over every fixture of the zoo, against ONNX Runtime's and PyTorch's answers.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::case;
use crate::onnx;
use crate::onnx::graph::{DType, Tensor};
use crate::verify::run::{Value, run};

/// A tensor of `io.safetensors` in ONNX's terms.
fn value(tensor: &safetensors::tensor::TensorView<'_>) -> Value {
    let dtype = match tensor.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::F64 => DType::F64,
        Dtype::U8 => DType::U8,
        Dtype::I64 => DType::I64,
        other => panic!("no fixture holds {other:?}"),
    };
    Value::read(&Tensor { dtype, dims: tensor.shape().to_vec(), data: tensor.data().to_vec().into() }).unwrap()
}

/// The largest difference of one case's outputs from what is stored, and the tolerance; `None` where nothing is stored.
fn judge(folder: &Path) -> Option<(f64, f64)> {
    let io = std::fs::read(folder.join("io.safetensors")).ok()?;
    let io = SafeTensors::deserialize(&io).unwrap();
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let graph = onnx::open(&folder.join("model.onnx")).unwrap().graph;
    let mut x = value(&io.tensor("x").unwrap());
    // a bf16 graph's input is stored as f32
    if let Some(dtype) = graph.inputs[0].dtype.filter(|d| *d != x.dtype) {
        x = Value::reals(dtype, x.dims.clone(), x.to_f64().unwrap());
    }
    let outputs = run(&graph, vec![x]).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut stored: BTreeMap<String, Value> = io.iter().map(|(k, t)| (k.to_string(), value(&t))).collect();
    stored.remove("x");
    let mut worst: Option<f64> = None;
    for (declared, output) in graph.outputs.iter().zip(&outputs) {
        let name = graph.name(declared.id);
        let own = [format!("ort.{name}"), format!("out.{name}")];
        let logits =
            (graph.outputs.len() == 1 && !own.iter().any(|k| stored.contains_key(k))).then(|| "logits".to_string());
        for wanted in own.into_iter().chain(logits).filter_map(|k| stored.get(&k)) {
            assert_eq!(wanted.dims, output.dims, "{} {name}", folder.display());
            let mut wanted = wanted.to_f64().unwrap();
            if config["output"]["kind"] == "softmax" {
                // what is stored are the logits below it
                for row in wanted.chunks_mut(*output.dims.last().unwrap()) {
                    let sum: f64 = row.iter().map(|v| v.exp()).sum();
                    row.iter_mut().for_each(|v| *v = v.exp() / sum);
                }
            }
            let pairs = wanted.into_iter().zip(output.to_f64().unwrap());
            let far =
                pairs.map(|(a, b)| if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() }).fold(0.0, f64::max);
            worst = Some(worst.map_or(far, |w| w.max(far)));
        }
    }
    // The fixture's own tolerance is 1e-4 for f32, which covers another order of summation, and what half precision
    // makes of it. Answers of a quantised file are far from those of its source, which are stored; how far ONNX Runtime's
    // are is noted, and ours must be as far, up to values on the edge between two steps that may round either way.
    let tolerance = config["tolerance"].as_f64().unwrap_or(1e-4);
    match config["checks"]["ort_max_abs_diff"].as_f64().filter(|_| tolerance > 1.0) {
        Some(theirs) => worst.map(|w| ((w - theirs).abs(), 1e-2)),
        None => worst.map(|w| (w, tolerance)),
    }
}

#[test]
fn every_fixture_evaluates_to_the_answers_of_its_source() {
    let mut compared = 0;
    let mut wrong = Vec::new();
    for case in std::fs::read_dir(case("")).unwrap() {
        let folder = case.unwrap().path();
        let Some((far, tolerance)) = judge(&folder) else { continue };
        compared += 1;
        if far > tolerance {
            wrong.push(format!("{}: {far:e} > {tolerance:e}", folder.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(compared >= 40, "only {compared} fixtures have answers to compare with");
}
