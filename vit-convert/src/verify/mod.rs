//! Proof of a conversion: the ONNX graph, evaluated operator by operator, against the converted model, on the same
//! inputs.
//!
//! The importer understands a graph by algebra; none of that is used here. If the file's weights are f32, its answers
//! and the model's may differ only by f32 rounding. If the file's number format is coarser (halves, integers), the
//! graph is evaluated twice: *ideally*, without that rounding, which must agree nearly as well because it is the same
//! function; and *as stored*, which measures how far the file's own answers are from the model's.

mod answers;
mod blocks;
#[cfg(feature = "candle-onnx")]
pub mod candle;
mod difference;
mod effort;
pub mod error;
mod format;
mod inputs;
pub mod run;
mod verified;

use std::collections::BTreeMap;

use candle_core::{DType as CandleType, Device};
use vit_model::{Config, checkpoint::Checkpoint};

use answers::Answers;
use difference::Difference;
pub use effort::{exact, is_large};
pub use error::Error;
use format::Format;
pub use inputs::Reading;
use run::Arithmetic;
pub use verified::Verified;

use crate::onnx::graph::{Graph, ValueInfo};

/// Proves that a checkpoint computes what `graph` computes, in the way that the checkpoint will be run: by the CPU
/// engine, in f32.
///
/// `reading` says how the graph's input becomes the model's pixels, and which output was converted. That output must equal
/// the model's answer. Outputs that are parts of the model are compared if the model hands them out, too; nothing is run
/// that these do not need.
///
/// # Errors
/// An operator that has no rule, inputs or outputs that no Vision Transformer has, and a difference beyond rounding:
/// then the error names the first block whose tokens diverge.
pub fn verify(graph: &Graph, checkpoint: &Checkpoint, reading: &Reading) -> Result<Verified, Error> {
    let config = &checkpoint.info.model;
    let large = is_large(config);
    let model = &exact(large).checkpoint(checkpoint)?;
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
    let batch = graph.inputs.first().and_then(|input| *input.shape.as_ref()?.first()?);
    let judged = |output: &&ValueInfo| {
        let name = graph.name(output.id);
        let part = || reading.parts.iter().any(|part| part == name) && answers::possible(config, output, batch);
        name == reading.output || part()
    };
    let ids: Vec<_> = graph.outputs.iter().filter(judged).map(|output| output.id).collect();
    for input in inputs::plan(graph, config, reading, large)? {
        let arithmetic = if format == Format::F32 { Arithmetic::AsStored } else { Arithmetic::Ideal };
        // both run concurrently, so that neither leaves cores idle
        let (ours, theirs) = std::thread::scope(|scope| {
            let evaluate = || run::run_watched(graph, input.values.clone(), &ids, arithmetic, &mut |_, _| {});
            let theirs = std::thread::Builder::new().spawn_scoped(scope, evaluate);
            let ours = Answers::of(model, &input.pixels, input.batch, reading.unit);
            // one after the other if no thread can be started
            let theirs = theirs.map(|theirs| theirs.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            (ours, theirs.unwrap_or_else(|_| evaluate()))
        });
        let theirs = theirs.map_err(|error| match batch {
            Some(batch) if batch > inputs::MOST as u64 => Error::Graph(format!(
                "the graph declares batches of {batch} images, of which at most {} are run to verify it, and with {} it fails: \
                 {error}; export it with a batch of 1 or any, or leave the proof out with --no-verify",
                inputs::MOST,
                input.batch
            )),
            _ => error.into(),
        });
        let (ours, theirs) = (ours?, theirs?);
        proof.inputs += input.batch;
        let mut values = theirs.iter();
        for output in &graph.outputs {
            let name = graph.name(output.id).to_owned();
            let value = if ids.contains(&output.id) { values.next() } else { None };
            let close = value.and_then(|value| ours.closest(value, format.tolerance()));
            // a part such as the tokens of an earlier block may be no answer that the model hands out
            let compared = |(_, difference): &(String, Difference)| {
                name == reading.output || difference.within(format.tolerance())
            };
            let Some((answer, difference)) = close.filter(compared) else {
                if name == reading.output {
                    let why = "no output of the graph has the shape of an answer of the converted model";
                    return Err(Error::Graph(why.into()));
                }
                if !proof.not_compared.contains(&name) {
                    proof.not_compared.push(name);
                }
                continue;
            };
            if !difference.within(format.tolerance()) {
                let modules = checkpoint.model(CandleType::F32, &Device::Cpu)?;
                let place = blocks::locate(graph, &modules, &input, &ids, arithmetic, format.tolerance())?;
                return Err(Error::Differs { output: name, answer, difference, tolerance: format.tolerance(), place });
            }
            proof.max_abs = proof.max_abs.max(difference.abs);
            proof.max_rel = proof.max_rel.max(difference.rel);
            proof.outputs.insert(name, answer);
        }
        if format != Format::F32 {
            let stored = run::run_watched(graph, input.values, &ids, Arithmetic::AsStored, &mut |_, _| {})?;
            let chosen = ids.iter().zip(&stored).filter(|(id, _)| graph.name(**id) == reading.output);
            for (_, value) in chosen {
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

/// Images that a model is tried on without a graph: strong noise, and a faint image on a shifted ground; one that is
/// both if the model is large.
pub fn images(config: &Config) -> Result<(Vec<f32>, usize), Error> {
    inputs::images(config, if is_large(config) { 1 } else { 4 })
}
