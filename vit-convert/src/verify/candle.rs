//! candle-onnx's evaluator as an optional cross-check (feature `candle-onnx`). It has fewer operators and cannot run
//! every graph.

use std::{collections::HashMap, panic::AssertUnwindSafe};

use bytes::Bytes;
use candle_core::{Device, Tensor};
use candle_onnx::onnx::ModelProto;
use prost::Message as _;
use vit_model::{Predictor, checkpoint::Checkpoint};

use super::answers::Answers;
use super::effort::exact;
use super::error::Error;
use super::format::Format;
use super::inputs::{self, Reading};
use super::run::Value;
use crate::onnx::graph::{DType, Graph};

/// Runs the file in candle-onnx on the images of the proof and compares the answers with the model's. Returns the
/// largest relative difference, or candle-onnx's reason why it cannot run the graph.
///
/// # Errors
/// A difference beyond rounding.
pub fn opinion(
    graph: &Graph,
    file: &Bytes,
    checkpoint: &Checkpoint,
    reading: &Reading,
) -> Result<Result<f64, String>, Error> {
    match compare(graph, file, &exact(false).checkpoint(checkpoint)?, reading) {
        Ok(far) => Ok(Ok(far)),
        Err(Error::Graph(why)) => Ok(Err(why.chars().take(160).collect())),
        Err(other) => Err(other),
    }
}

fn compare(graph: &Graph, file: &Bytes, model: &Predictor, reading: &Reading) -> Result<f64, Error> {
    let unable = Error::Graph;
    let proto = ModelProto::decode(file.clone()).map_err(|e| unable(e.to_string()))?;
    let name = |id| graph.name(id).to_owned();
    let tolerance = Format::of(graph).tolerance();
    let mut worst = 0f64;
    let mut compared = false;
    for input in inputs::plan(graph, model.config(), reading, false)? {
        let mut values = HashMap::new();
        for (declared, value) in graph.inputs.iter().zip(&input.values) {
            if value.dtype != DType::F32 {
                return Err(unable(format!("an input of {:?}", value.dtype)));
            }
            let numbers: Vec<f32> = value.to_f64().map_err(Error::Graph)?.into_iter().map(|v| v as f32).collect();
            let tensor =
                Tensor::from_vec(numbers, value.dims.clone(), &Device::Cpu).map_err(|e| unable(e.to_string()))?;
            values.insert(name(declared.id), tensor);
        }
        // it panics on some graphs that it does not support; the message would only confuse
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let run = std::panic::catch_unwind(AssertUnwindSafe(|| candle_onnx::simple_eval(&proto, values)));
        std::panic::set_hook(hook);
        let outputs = run.map_err(|_| unable("it panicked".into()))?.map_err(|e| unable(e.to_string()))?;
        let ours = Answers::of(model, &input.pixels, input.batch, reading.unit)?;
        for declared in &graph.outputs {
            let Some(tensor) = outputs.get(&name(declared.id)) else { continue };
            let numbers = tensor.flatten_all().and_then(|t| t.to_dtype(candle_core::DType::F64)?.to_vec1::<f64>());
            let numbers = numbers.map_err(|e| unable(e.to_string()))?;
            let value = Value::reals(DType::F32, tensor.dims().to_vec(), numbers);
            let Some((answer, difference)) = ours.closest(&value, tolerance) else { continue };
            if !difference.within(tolerance) {
                let (output, place) = (name(declared.id), "candle-onnx's opinion".into());
                return Err(Error::Differs { output, answer, difference, tolerance, place });
            }
            (worst, compared) = (worst.max(difference.rel), true);
        }
    }
    if compared { Ok(worst) } else { Err(unable("none of its outputs is an answer of the model".into())) }
}
