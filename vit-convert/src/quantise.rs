//! `--dtype q8`: a model's matrices in ggml's Q8_0, and how far that moves its answers.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use serde_json::{Value, json};
use vit_model::{ModelInfo, Predictor, TensorInfo, Weights, gguf, load::Checkpoint, weights::Dtype};

use crate::{Error, Result, verify};

/// Weights whose matrices are in blocks of Q8_0, made from others when they are read.
///
/// A matrix has two dimensions, the inner one a multiple of 32: every linear of a usual ViT. The patch projection, norms,
/// biases, tokens and position embeddings are not, and stay as they are.
pub struct Quantised {
    inner: Arc<dyn Weights>,
    infos: BTreeMap<String, TensorInfo>,
}

impl Quantised {
    /// The weights that are to be quantised.
    pub fn new(inner: Arc<dyn Weights>) -> Self {
        let dtype = |info: &TensorInfo| if is_matrix(info) { Dtype::F32 } else { info.dtype };
        let info = |info: &TensorInfo| TensorInfo { dtype: dtype(info), shape: info.shape.clone() };
        let infos = inner.tensors().iter().map(|(name, i)| (name.clone(), info(i))).collect();
        Self { inner, infos }
    }
}

fn is_matrix(info: &TensorInfo) -> bool {
    matches!(*info.shape, [_, row] if row.is_multiple_of(gguf::BLOCK))
}

impl Weights for Quantised {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.infos
    }

    fn read(&self, name: &str) -> vit_model::Result<Vec<u8>> {
        if !self.is_q8_0(name) {
            return self.inner.read(name);
        }
        Ok(gguf::dequantise(&self.read_q8_0(name)?).flat_map(f32::to_le_bytes).collect())
    }

    fn is_q8_0(&self, name: &str) -> bool {
        self.infos.get(name).is_some_and(is_matrix)
    }

    fn read_q8_0(&self, name: &str) -> vit_model::Result<Vec<u8>> {
        let values = self.inner.read_f32(name)?;
        let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        let len = values.len();
        let blocks = QTensor::quantize(&Tensor::from_vec(values, len, &Device::Cpu)?, GgmlDType::Q8_0)?;
        let blocks = blocks.data()?.into_owned();
        let too_large =
            |_| vit_model::Error::tensor(name, format!("its largest value {largest} does not fit into Q8_0"));
        gguf::check_scales(name, &blocks).map_err(too_large)?;
        Ok(blocks)
    }
}

/// How far quantised weights move a model's answers.
#[derive(Clone, Debug)]
pub struct Moved {
    /// Largest difference of a logit (of what the head would read, where there is none).
    pub max_abs: f64,
    /// The same, relative to the largest magnitude.
    pub max_rel: f64,
    /// Images whose best class stays, and images tried; none where there are no classes.
    pub top1: Option<(usize, usize)>,
    /// Images tried.
    pub inputs: usize,
}

impl Moved {
    /// As the file's metadata keeps it. Two digits, so that the bytes do not depend on the order of a sum.
    pub fn to_json(&self) -> Value {
        let round = |x: f64| format!("{x:.1e}").parse::<f64>().unwrap_or(x);
        let mut doc = json!({ "max_abs": round(self.max_abs), "max_rel": round(self.max_rel), "inputs": self.inputs });
        if let Some((same, of)) = self.top1 {
            doc["top1_equal"] = json!([same, of]);
        }
        doc
    }
}

impl std::fmt::Display for Moved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} inputs, answers move by at most {:.1e}, {:.1e} relative",
            self.inputs, self.max_abs, self.max_rel
        )?;
        match self.top1 {
            Some((same, of)) => write!(f, "; the best class stays on {same} of {of}"),
            None => Ok(()),
        }
    }
}

/// Runs a model with its own and with quantised weights, one after the other, in f32.
///
/// # Errors
/// Weights that cannot be read or run, answers that are not finite.
pub fn moved(info: &ModelInfo, own: Arc<dyn Weights>, quantised: Arc<dyn Weights>) -> Result<Moved> {
    let (pixels, inputs) = verify::images(&info.model)?;
    let answers = |weights: Arc<dyn Weights>| -> Result<Vec<f32>> {
        let checkpoint = Checkpoint::new(info.clone(), weights)?;
        let model = Predictor::new(&checkpoint, &verify::exact(verify::is_large(&info.model)))?;
        let mut answers = Vec::new();
        model.logits_into(&pixels, inputs, &mut answers)?;
        Ok(answers)
    };
    let (own, quantised) = (answers(own)?, answers(quantised)?);
    if let Some(bad) = own.iter().chain(&quantised).find(|v| !v.is_finite()) {
        return Err(Error::graph(format!("the model answers {bad}")));
    }
    let far = |a: &f32, b: &f32| f64::from((a - b).abs());
    let max_abs = own.iter().zip(&quantised).map(|(a, b)| far(a, b)).fold(0.0, f64::max);
    let scale = own.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(f64::from(v.abs())));
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(class, _)| class);
    let top1 = (info.model.num_classes > 1).then(|| {
        let rows = own.chunks(info.model.num_classes).zip(quantised.chunks(info.model.num_classes));
        let of = rows.len();
        (rows.filter(|(a, b)| best(a) == best(b)).count(), of)
    });
    Ok(Moved { max_abs, max_rel: max_abs / scale, top1, inputs })
}
