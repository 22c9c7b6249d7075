//! A model's matrices in ggml's Q8_0, quantised when they are read.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};

use super::gguf;
use crate::{Dtype, Error, Result, TensorInfo, Weights};

/// Weights whose matrices are in blocks of Q8_0, made from others when they are read.
///
/// A matrix has two dimensions, the inner one a multiple of 32: every linear of a usual ViT. The patch projection, norms,
/// biases, tokens and position embeddings are not, and stay as they are.
pub(super) struct Quantised {
    inner: Arc<dyn Weights>,
    infos: BTreeMap<String, TensorInfo>,
}

impl Quantised {
    /// The weights that are to be quantised.
    pub(super) fn new(inner: Arc<dyn Weights>) -> Self {
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

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        if !self.is_q8_0(name) {
            return self.inner.read(name);
        }
        Ok(gguf::dequantise(&self.read_q8_0(name)?).flat_map(f32::to_le_bytes).collect())
    }

    fn is_q8_0(&self, name: &str) -> bool {
        self.infos.get(name).is_some_and(is_matrix)
    }

    fn read_q8_0(&self, name: &str) -> Result<Vec<u8>> {
        let values = self.inner.read_f32(name)?;
        let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        let len = values.len();
        let blocks = QTensor::quantize(&Tensor::from_vec(values, len, &Device::Cpu)?, GgmlDType::Q8_0)?;
        let blocks = blocks.data()?.into_owned();
        let too_large = |_| Error::tensor(name, format!("its largest value {largest} does not fit into Q8_0"));
        gguf::check_scales(name, &blocks).map_err(too_large)?;
        Ok(blocks)
    }
}
