//! Proof of a conversion: the ONNX graph, evaluated operator by operator, against the converted model, on the same inputs.
//!
//! The importer understands a graph by algebra; nothing of that is used here. What a file of f32 weights computes and
//! what the model computes may differ by the noise of f32 only. Where the file's own number format is coarser (halves,
//! integers), the graph is evaluated twice: *ideally*, without that rounding, which must agree nearly as well, since it
//! is the same function; and *as stored*, which says how far the file's own answers are from the model's.

mod answers;
mod blocks;
mod inputs;
pub mod run;
#[cfg(feature = "candle-onnx")]
pub mod second;

use std::collections::BTreeMap;

use candle_core::{DType as CandleType, Device};
use serde_json::json;
use vit_model::{Config, Predictor, load::Checkpoint, predictor};

use crate::graph::{Attr, DType, Graph, Node, SubGraph};
use answers::{Answers, Difference};
pub use inputs::Reading;
use run::{Arithmetic, Value};

/// Largest difference that f32 noise may make, relative to an output's largest magnitude. Sums of a few thousand products
/// in another order differ by 1e-6 after twelve blocks of a ViT-B as after two of a tiny one; an activation of another
/// kind moves an output by 1e-4, a wrong wiring by 1e-2.
const F32: f64 = 2e-5;

/// As [`F32`], where a file stores halves: its own constants (the scale of the attention, √2, ε) are rounded to 11 bits.
const F16: f64 = 2e-3;

/// As [`F16`], with the 8 bits of bfloat16.
const BF16: f64 = 2e-2;

/// Multiplications from which a model counts as large: then one image is tried, not three in two runs.
const LARGE: u64 = 4_000_000_000;

/// Why a conversion is not proven.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The graph could not be evaluated.
    #[error("the graph cannot be evaluated: {0}")]
    Run(#[from] run::Error),
    /// The graph takes or gives something that a Vision Transformer does not.
    #[error("{0}")]
    Graph(String),
    /// The converted model answers differently.
    #[error(
        "output `{output}` differs from the converted model's {answer} by {} ({} of its largest magnitude, at most {tolerance:e} \
         is rounding); {place}. This is a bug of the converter: please report it with the file; --no-verify skips this check",
        short(difference.abs), short(difference.rel)
    )]
    Differs {
        /// The graph's output.
        output: String,
        /// The closest of the model's answers.
        answer: String,
        /// How far they are apart.
        difference: Difference,
        /// What was allowed, relative.
        tolerance: f64,
        /// The first block whose tokens diverge, in words.
        place: String,
    },
    /// The converted model could not be run.
    #[error(transparent)]
    Model(#[from] vit_model::Error),
}

/// How a conversion was proven.
#[derive(Clone, Debug)]
pub struct Verified {
    /// Largest absolute difference over all outputs.
    pub max_abs: f64,
    /// Largest difference relative to an output's largest magnitude.
    pub max_rel: f64,
    /// What `max_rel` was allowed to be.
    pub tolerance: f64,
    /// Images tried.
    pub inputs: usize,
    /// What evaluated the graph.
    pub evaluator: String,
    /// Graph output → the model's answer that it equals.
    pub outputs: BTreeMap<String, String>,
    /// Graph outputs that are no answer of a Vision Transformer (attention maps, say).
    pub not_compared: Vec<String>,
    /// Where the file stores halves or integers: how far its own answers are from the model's, absolute and relative.
    pub approximation: Option<(f64, f64)>,
}

impl Verified {
    /// As the file's metadata keeps it. Two digits, so that the bytes do not depend on the order of a sum.
    pub fn to_json(&self) -> serde_json::Value {
        let round = |x: f64| short(x).parse::<f64>().unwrap_or(x);
        let mut doc = json!({
            "max_abs": round(self.max_abs),
            "max_rel": round(self.max_rel),
            "tolerance": self.tolerance,
            "inputs": self.inputs,
            "evaluator": self.evaluator,
            "outputs": self.outputs,
        });
        if !self.not_compared.is_empty() {
            doc["not_compared"] = json!(self.not_compared);
        }
        if let Some((abs, rel)) = self.approximation {
            doc["approximation"] = json!({ "max_abs": round(abs), "max_rel": round(rel) });
        }
        doc
    }
}

impl std::fmt::Display for Verified {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (abs, rel) = (short(self.max_abs), short(self.max_rel));
        write!(f, "{} images: largest difference {abs}, relative {rel} (allowed {:e})", self.inputs, self.tolerance)?;
        if let Some((abs, rel)) = self.approximation {
            let (abs, rel) = (short(abs), short(rel));
            write!(f, "; the file's own rounding moves its answers by {abs}, relative {rel}")?;
        }
        if !self.not_compared.is_empty() {
            write!(f, "; not compared: {}", self.not_compared.join(", "))?;
        }
        Ok(())
    }
}

/// Two digits: `2.4e-6`.
fn short(x: f64) -> String {
    format!("{x:.1e}")
}

/// Proves that a checkpoint computes what `graph` computes, in the way that the checkpoint will be run: by the CPU
/// engine, in f32.
///
/// `reading` says how the graph's input becomes the model's pixels, where the graph does part of the preprocessing.
///
/// # Errors
/// An operator that has no rule, inputs or outputs that no Vision Transformer has, and a difference beyond rounding: then
/// the error names the first block whose tokens diverge.
pub fn verify(graph: &Graph, checkpoint: &Checkpoint, reading: &Reading) -> Result<Verified, Error> {
    let config = &checkpoint.info.model;
    let large = is_large(config);
    let model = &Predictor::new(checkpoint, &exact(large))?;
    let format = Format::of(graph);
    let mut proof = Verified {
        max_abs: 0.0,
        max_rel: 0.0,
        tolerance: format.tolerance(),
        inputs: 0,
        evaluator: concat!("vit-convert ", env!("CARGO_PKG_VERSION"), ", node by node").into(),
        outputs: BTreeMap::new(),
        not_compared: vec![],
        approximation: None,
    };
    for input in inputs::plan(graph, config, reading, large)? {
        let arithmetic = if format == Format::F32 { Arithmetic::AsStored } else { Arithmetic::Ideal };
        // at once: what one of them leaves of the processor, waiting for its threads, the other takes
        let (ours, theirs) = std::thread::scope(|scope| {
            let values = input.values.clone();
            let theirs = scope.spawn(|| run::run_watched(graph, values, arithmetic, &mut |_, _| {}));
            let ours = Answers::of(model, &input.pixels, input.batch);
            (ours, theirs.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let (ours, theirs) = (ours?, theirs?);
        proof.inputs += input.batch;
        for (declared, value) in graph.outputs.iter().zip(&theirs) {
            let name = graph.names.get(declared.id as usize).cloned().unwrap_or_default();
            let Some((answer, difference)) = ours.closest(value, format.tolerance()) else {
                if !proof.not_compared.contains(&name) {
                    proof.not_compared.push(name);
                }
                continue;
            };
            if !difference.within(format.tolerance()) {
                let modules = checkpoint.model(CandleType::F32, &Device::Cpu)?;
                let place = blocks::locate(graph, &modules, &input, arithmetic, format.tolerance())?;
                return Err(Error::Differs { output: name, answer, difference, tolerance: format.tolerance(), place });
            }
            proof.max_abs = proof.max_abs.max(difference.abs);
            proof.max_rel = proof.max_rel.max(difference.rel);
            proof.outputs.insert(name, answer);
        }
        if format != Format::F32 {
            let stored = run::run(graph, input.values)?;
            for value in &stored {
                if let Some((_, d)) = ours.closest(value, f64::INFINITY) {
                    let (abs, rel) = proof.approximation.unwrap_or((0.0, 0.0));
                    proof.approximation = Some((abs.max(d.abs), rel.max(d.rel)));
                }
            }
        }
    }
    answers::enough(config, &proof.outputs).map_err(Error::Graph)?;
    Ok(proof)
}

/// Whether one run takes so long that one is enough.
pub(crate) fn is_large(config: &Config) -> bool {
    flops(config) > LARGE
}

/// Images that a model is tried on without a graph: strong noise, and a faint image on a shifted ground; one that is
/// both, where the model is large.
pub(crate) fn images(config: &Config) -> Result<(Vec<f32>, usize), Error> {
    inputs::images(config, if is_large(config) { 1 } else { 4 })
}

/// What is as exact on every CPU; streamed where there is one run only, for which a model need not be packed whole.
pub(crate) fn exact(streamed: bool) -> predictor::Options {
    predictor::Options { precision: predictor::Precision::F32, streamed, ..predictor::Options::default() }
}

/// Multiplications of one image, roughly.
fn flops(config: &Config) -> u64 {
    let (n, d, h) = (config.num_tokens() as u64, config.embed_dim as u64, config.mlp_hidden as u64);
    let block =
        (4 * d).saturating_mul(d).saturating_add((2 * d).saturating_mul(h)).saturating_add((2 * n).saturating_mul(d));
    block.saturating_mul(n).saturating_mul(config.depth as u64)
}

/// The coarsest number format that a file stores.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Format {
    F32,
    Integer,
    F16,
    Bf16,
}

impl Format {
    fn of(graph: &Graph) -> Self {
        let kind = |t: &crate::graph::Tensor| match t.dtype {
            DType::Bf16 => Self::Bf16,
            DType::F16 => Self::F16,
            _ => Self::F32,
        };
        let of_node = |node: &Node| {
            let quantised = ["Quant", "QLinear", "QGemm", "QAttention", "MatMulInteger", "ConvInteger", "MatMulNBits"];
            let quantised = node.op.starts_with("Dequantize") || quantised.iter().any(|q| node.op.contains(q));
            let own = if quantised { Self::Integer } else { Self::F32 };
            let attrs = node.attrs.values().map(|a| match a {
                Attr::Tensor(t) => kind(t),
                // Cast's `to`
                Attr::Int(10) if node.op == "Cast" => Self::F16,
                Attr::Int(16) if node.op == "Cast" => Self::Bf16,
                _ => Self::F32,
            });
            attrs.max().unwrap_or(own).max(own)
        };
        let mut coarsest = graph.initializers.values().map(kind).max().unwrap_or(Self::F32);
        let mut bodies: Vec<&[Node]> = vec![&graph.nodes];
        while let Some(nodes) = bodies.pop() {
            for node in nodes {
                coarsest = coarsest.max(of_node(node));
                let inner = node.attrs.values().filter_map(|a| if let Attr::Graph(g) = a { Some(&**g) } else { None });
                bodies.extend(inner.map(|g: &SubGraph| g.nodes.as_slice()));
            }
        }
        coarsest
    }

    fn tolerance(self) -> f64 {
        match self {
            Self::F32 | Self::Integer => F32,
            Self::F16 => F16,
            Self::Bf16 => BF16,
        }
    }
}

/// A tensor of the graph as f32 of the model's kind.
fn is_real(value: &Value) -> bool {
    run::is_float(value.dtype)
}
