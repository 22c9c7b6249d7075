//! A checkpoint as variables that an optimiser changes, and trained variables as a checkpoint.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;

use super::model::Checkpoint;
use crate::{
    Dtype, Error, ModelInfo, Result, TensorInfo, Weights, vit,
    weights::{candle_dtype, check_finite},
};

impl Checkpoint {
    /// The weights as variables under timm's names, for `VarBuilder::from_varmap` and an optimiser. Quantised weights are
    /// dequantised.
    ///
    /// For a head with other classes, take the variables `head.weight` and `head.bias` out before you build the model, which
    /// then makes new ones:
    ///
    /// ```
    /// use vit_model::{Checkpoint, VisionTransformer};
    /// use candle_core::{DType, Device};
    /// use candle_nn::VarBuilder;
    ///
    /// let digits = Checkpoint::resolve("digits")?;
    /// let vars = digits.var_map(DType::F32, &Device::Cpu)?;
    /// vars.data().lock().unwrap().retain(|name, _| !name.starts_with("head."));
    ///
    /// let mut info = digits.info.clone();
    /// info.model.num_classes = 3;
    /// info.labels = None;
    /// let model = VisionTransformer::new(&info.model, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    /// // … train `model`, then:
    /// let trained = Checkpoint::from_var_map(info, &vars)?;
    /// # assert_eq!(trained.weights.tensors()["head.weight"].shape[0], 3);
    /// # Ok::<(), vit_model::Error>(())
    /// ```
    ///
    /// # Errors
    /// A file that can no longer be read, weights that are not finite, a lack of memory.
    pub fn var_map(&self, dtype: DType, device: &Device) -> Result<VarMap> {
        let vars = VarMap::new();
        let mut data = vars.data().lock().map_err(|_| poisoned())?;
        for name in self.weights.tensors().keys() {
            let tensor = vit::weights::tensor(self.weights.as_ref(), name, dtype, device)?;
            data.insert(name.clone(), Var::from_tensor(&tensor)?);
        }
        drop(data);
        Ok(vars)
    }

    /// A checkpoint of the values that variables have now; later training does not change it. The variables' names are timm's.
    ///
    /// # Errors
    /// An impossible `info`; variables that are missing, left over, of another shape than `info.model` implies, of a type that
    /// weights cannot have, or not finite.
    pub fn from_var_map(info: ModelInfo, vars: &VarMap) -> Result<Self> {
        let mut values = Values { tensors: BTreeMap::new(), bytes: BTreeMap::new() };
        for (name, var) in vars.data().lock().map_err(|_| poisoned())?.iter() {
            let dtype = dtype(name, var.dtype())?;
            let bytes = bytes(dtype, var.as_tensor())?;
            check_finite(name, dtype, &bytes)?;
            values.tensors.insert(name.clone(), TensorInfo { dtype, shape: var.dims().to_vec() });
            values.bytes.insert(name.clone(), bytes);
        }
        Self::new(info, Arc::new(values))
    }
}

/// Tensors in memory.
struct Values {
    tensors: BTreeMap<String, TensorInfo>,
    bytes: BTreeMap<String, Vec<u8>>,
}

impl Weights for Values {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        self.bytes.get(name).cloned().ok_or_else(|| Error::missing(name))
    }
}

fn poisoned() -> Error {
    Error::Input("the variables are locked by a thread that panicked".into())
}

fn dtype(name: &str, found: DType) -> Result<Dtype> {
    let mut all = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F64].into_iter();
    all.find(|dtype| candle_dtype(*dtype) == found)
        .ok_or_else(|| Error::tensor(name, format!("is of type {}; weights are f32, f16, bf16 or f64", found.as_str())))
}

/// A tensor's elements, little-endian, row-major.
fn bytes(dtype: Dtype, tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    Ok(match dtype {
        Dtype::F32 => flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
        Dtype::F64 => flat.to_vec1::<f64>()?.into_iter().flat_map(f64::to_le_bytes).collect(),
        Dtype::F16 => flat.to_vec1::<half::f16>()?.into_iter().flat_map(half::f16::to_le_bytes).collect(),
        Dtype::Bf16 => flat.to_vec1::<half::bf16>()?.into_iter().flat_map(half::bf16::to_le_bytes).collect(),
    })
}

#[cfg(all(test, feature = "digits"))]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
    use candle_nn::VarBuilder;

    use super::*;
    use crate::{Format, TensorProblem, VisionTransformer};

    #[test]
    fn variables_hold_the_weights_and_become_them_again() {
        let digits = Checkpoint::resolve("digits").unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let vars = digits.var_map(dtype, &Device::Cpu).unwrap();
            let back = Checkpoint::from_var_map(digits.info.clone(), &vars).unwrap();
            for name in digits.weights.tensors().keys() {
                let tensor = vit::weights::tensor(digits.weights.as_ref(), name, dtype, &Device::Cpu).unwrap();
                let want = bytes(back.weights.tensors()[name].dtype, &tensor).unwrap();
                assert!(back.weights.read(name).unwrap() == want, "{name} in {dtype:?}");
            }
        }
    }

    #[test]
    fn another_head_is_trained_and_kept() {
        let digits = Checkpoint::resolve("digits").unwrap();
        let vars = digits.var_map(DType::F32, &Device::Cpu).unwrap();
        vars.data().lock().unwrap().retain(|name, _| !name.starts_with("head."));
        let mut info = digits.info.clone();
        (info.model.num_classes, info.labels) = (3, None);
        let missing = Checkpoint::from_var_map(info.clone(), &vars).unwrap_err();
        assert!(matches!(missing, Error::Tensor { problem: TensorProblem::Missing, .. }), "{missing}");

        let model =
            VisionTransformer::new(&info.model, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu)).unwrap();
        let trained = Checkpoint::from_var_map(info.clone(), &vars).unwrap();
        let [h, w] = info.model.img_size;
        let images = Tensor::rand(-1f32, 1.0, (2, info.model.in_chans, h, w), &Device::Cpu).unwrap();
        let logits = |model: &VisionTransformer| model.forward(&images).unwrap().to_vec2::<f32>().unwrap();
        let before = logits(&trained.model(DType::F32, &Device::Cpu).unwrap());
        assert_eq!(before[0].len(), 3);
        // over variables, candle's modules use operations that have a gradient and round differently
        let far = logits(&model).concat().iter().zip(before.concat()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-5, "{far}");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trained.safetensors");
        trained.save(&path, Format::Safetensors).unwrap();
        let opened = Checkpoint::open(&path).unwrap();
        assert_eq!(logits(&opened.model(DType::F32, &Device::Cpu).unwrap()), before);
        assert_eq!(opened.info, info);

        // what is trained later stays out
        let bias = vars.data().lock().unwrap()["head.bias"].clone();
        bias.set(&(bias.as_tensor() + 1.0).unwrap()).unwrap();
        assert_eq!(logits(&trained.model(DType::F32, &Device::Cpu).unwrap()), before);
        bias.set(&(bias.as_tensor() / 0.0).unwrap()).unwrap();
        let infinite = Checkpoint::from_var_map(info, &vars).unwrap_err();
        assert!(matches!(infinite, Error::Tensor { problem: TensorProblem::NotFinite, .. }), "{infinite}");
    }
}
