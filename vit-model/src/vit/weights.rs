//! Builds a model from [`Weights`], which are read one tensor at a time as candle asks for them.

use std::sync::Mutex;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

use super::VisionTransformer;
use super::linear::Q8_0;
use crate::config::Config;
use crate::weights::{Weights, candle_dtype};
use crate::{Error, Result, TensorProblem};

impl VisionTransformer {
    /// A model with weights from a file, an importer or a program.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape or not finite, or a lack of memory.
    pub fn from_weights(config: &Config, weights: &dyn Weights, dtype: DType, device: &Device) -> Result<Self> {
        build(weights, dtype, device, |vb| Self::new(config, vb))
    }
}

/// Builds something from a `VarBuilder` over [`Weights`].
pub(crate) fn build<T>(
    weights: &dyn Weights,
    dtype: DType,
    device: &Device,
    make: impl FnOnce(VarBuilder<'_>) -> Result<T>,
) -> Result<T> {
    // candle's errors are strings, so ours is passed around candle to keep its kind
    let failure = Mutex::new(None);
    let backend: Box<dyn SimpleBackend + '_> = Box::new(Reader { weights, failure: &failure });
    let made = make(VarBuilder::from_backend(backend, dtype, device.clone()));
    match failure.into_inner() {
        Ok(Some(error)) => Err(error),
        _ => made,
    }
}

/// One of the weights as a tensor of the type that is asked for.
pub(crate) fn tensor(weights: &dyn Weights, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
    let info = weights.tensors().get(name).ok_or_else(|| Error::missing(name))?;
    let stored = candle_dtype(info.dtype);
    let bytes = weights.read(name)?;
    // candle copies it, and a linear layer copies it once more to put its bias beside it; candle itself cannot report a lack
    crate::memory::check(bytes.len().saturating_mul(2), name)?;
    let tensor = if stored == dtype || device.is_cpu() {
        Tensor::from_raw_buffer(&bytes, stored, &info.shape, device)?
    } else {
        Tensor::from_raw_buffer(&bytes, stored, &info.shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?
    };
    Ok(tensor.to_dtype(dtype)?)
}

/// A `VarBuilder`'s view of [`Weights`].
struct Reader<'a> {
    weights: &'a dyn Weights,
    /// The first error. candle's interface would keep only its text.
    failure: &'a Mutex<Option<Error>>,
}

impl Reader<'_> {
    fn tensor(&self, name: &str, shape: Option<&Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let info = self.weights.tensors().get(name).ok_or_else(|| Error::missing(name))?;
        if let Some(shape) = shape.filter(|shape| shape.dims() != info.shape) {
            return Err(Error::problem(
                name,
                TensorProblem::Shape,
                format!("expected the shape {:?}, found {:?}", shape.dims(), info.shape),
            ));
        }
        tensor(self.weights, name, dtype, device)
    }

    /// The weights of a linear layer as they are stored in Q8_0: the bytes of each row.
    fn blocks(&self, name: &str) -> Result<Tensor> {
        let blocks = self.weights.read_q8_0(name)?;
        let rows = self.weights.tensors().get(name).and_then(|info| info.shape.first()).copied().unwrap_or(1);
        let row = blocks.len().checked_div(rows).unwrap_or(0);
        Ok(Tensor::from_vec(blocks, (rows, row), &Device::Cpu)?)
    }

    fn get(&self, name: &str, shape: Option<&Shape>, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.noted(self.tensor(name, shape, dtype, device))
    }

    /// Turns a result into candle's, and keeps the first error.
    fn noted<T>(&self, result: Result<T>) -> candle_core::Result<T> {
        result.map_err(|error| {
            let message = error.to_string();
            if let Ok(mut failure) = self.failure.lock() {
                failure.get_or_insert(error);
            }
            candle_core::Error::Msg(message)
        })
    }
}

impl SimpleBackend for Reader<'_> {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.get(name, Some(&s), dtype, dev)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        match name.strip_suffix(Q8_0) {
            Some(name) => self.noted(self.blocks(name)),
            None => self.get(name, None, dtype, dev),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match name.strip_suffix(Q8_0) {
            Some(name) => self.weights.is_q8_0(name),
            None => self.weights.tensors().contains_key(name),
        }
    }
}
