//! Single operators over constants, as the importer folds them and as the verifier runs them, against ONNX Runtime.

use std::path::PathBuf;

use crate::import::eval::{Setting, Value, Walk};
use crate::onnx::graph::{Attr, DType, Graph, Node, Tensor, ValueId, ValueInfo};
use crate::verify::run;

#[derive(serde::Deserialize)]
struct Stored {
    dtype: String,
    dims: Vec<usize>,
    data: Vec<f64>,
}

#[derive(serde::Deserialize)]
struct Case {
    op: String,
    opset: i64,
    attrs: serde_json::Map<String, serde_json::Value>,
    inputs: Vec<Option<Stored>>,
    output: Stored,
}

impl Stored {
    fn tensor(&self) -> Tensor {
        let (dtype, data): (_, Vec<u8>) = match self.dtype.as_str() {
            "f32" => (DType::F32, self.data.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect()),
            "i64" => (DType::I64, self.data.iter().flat_map(|&v| (v as i64).to_le_bytes()).collect()),
            "bool" => (DType::Bool, self.data.iter().map(|&v| u8::from(v != 0.0)).collect()),
            other => panic!("no case holds {other}"),
        };
        Tensor { dtype, dims: self.dims.clone(), data: data.into() }
    }
}

fn attribute(value: &serde_json::Value) -> Attr {
    match value {
        serde_json::Value::Number(n) if n.is_i64() => Attr::Int(n.as_i64().unwrap()),
        serde_json::Value::Number(n) => Attr::Float(n.as_f64().unwrap() as f32),
        serde_json::Value::String(s) => Attr::Str(s.clone().into_bytes().into()),
        other => panic!("no case holds {other}"),
    }
}

impl Case {
    /// The operator over initializers; value 0 is an image that it does not read.
    fn graph(&self) -> Graph {
        let out = self.inputs.len() as ValueId + 1;
        let id = |k: usize| k as ValueId + 1;
        let info = |id| ValueInfo { id, dtype: None, shape: None };
        Graph {
            opset: self.opset,
            names: (0..=out).map(|i| format!("v{i}")).collect(),
            inputs: vec![info(0)],
            outputs: vec![info(out)],
            initializers: (self.inputs.iter().enumerate())
                .filter_map(|(k, stored)| Some((id(k), stored.as_ref()?.tensor())))
                .collect(),
            nodes: vec![Node {
                name: self.op.clone(),
                op: self.op.clone(),
                domain: String::new(),
                inputs: self.inputs.iter().enumerate().map(|(k, x)| x.as_ref().map(|_| id(k))).collect(),
                outputs: vec![Some(out)],
                attrs: self.attrs.iter().map(|(k, v)| (k.clone(), attribute(v))).collect(),
            }],
            ..Graph::default()
        }
    }

    /// What is wrong with a result, if anything is. The answers are rounded to six digits, and f32 positions of a resize
    /// are off by some 1e-6 of a pixel.
    fn wrong(&self, dims: &[usize], data: &[f64]) -> Option<String> {
        let far = data.iter().zip(&self.output.data).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f64::max);
        let same = dims == self.output.dims && data.len() == self.output.data.len() && far < 1e-5;
        (!same).then(|| format!("{:?}, {far:e} from {:?}", dims, self.output.dims))
    }
}

#[test]
fn operators_over_constants_give_the_answers_of_onnx_runtime() {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/operators/operators.json");
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert!(cases.len() > 100, "{}", cases.len());
    let mut wrong = Vec::new();
    for (k, case) in cases.iter().enumerate() {
        let graph = case.graph();
        let name = format!("{k}: {} {:?}", case.op, case.attrs);
        let walk = Walk::run(&graph, Setting { image: [1009, 3, 8, 8], tolerance: 1e-5, guessed: false }).unwrap();
        match walk.value(graph.outputs[0].id) {
            Value::Const(c) => {
                wrong.extend(case.wrong(&c.array.shape(), &c.array.f64s()).map(|why| format!("import: {name}: {why}")));
            }
            _ => wrong.push(format!("import: {name}: {:?}", walk.obstacles)),
        }
        let image = run::Value::f32(vec![1], vec![0.0]);
        match run::run(&graph, vec![image]) {
            Ok(out) => {
                wrong.extend(
                    case.wrong(&out[0].dims, &out[0].to_f64().unwrap()).map(|why| format!("verify: {name}: {why}")),
                );
            }
            Err(why) => wrong.push(format!("verify: {name}: {why}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
