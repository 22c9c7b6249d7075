//! Weights of which some tensors are computed when they are read, and the others are those of a file.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Tensor};

use crate::{
    Result,
    weights::{Dtype, ReadAt, TensorInfo, Weights, whole},
};

/// Computes a tensor's bytes from the file's weights.
type Compute = Box<dyn Fn(&dyn Weights) -> Result<Vec<u8>> + Send + Sync>;

/// The tensors of a file, some of them replaced.
pub(super) struct Computed {
    inner: Arc<dyn Weights>,
    tensors: BTreeMap<String, TensorInfo>,
    computed: BTreeMap<String, Compute>,
}

impl Computed {
    /// Every tensor as it is.
    pub(super) fn new(inner: Arc<dyn Weights>) -> Self {
        Self { tensors: inner.tensors().clone(), inner, computed: BTreeMap::new() }
    }

    /// Replaces a tensor by one of f32 that `compute` makes whenever it is read.
    pub(super) fn replace(
        &mut self,
        name: impl Into<String>,
        shape: Vec<usize>,
        compute: impl Fn(&dyn Weights) -> Result<Vec<u8>> + Send + Sync + 'static,
    ) {
        let name = name.into();
        self.tensors.insert(name.clone(), TensorInfo::new(Dtype::F32, shape));
        self.computed.insert(name, Box::new(compute));
    }

    /// Replaces a tensor by values that are there already, in f32.
    pub(super) fn put(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.replace(name, tensor.dims().to_vec(), move |_| Ok(bytes.clone()));
        Ok(())
    }

    /// Hides a tensor, which can still be computed from.
    pub(super) fn hide(&mut self, name: &str) {
        self.tensors.remove(name);
    }
}

impl Weights for Computed {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        match self.computed.get(name) {
            Some(compute) => compute(self.inner.as_ref()),
            None => self.inner.read(name),
        }
    }

    fn stretches(&self, name: &str) -> Result<ReadAt<'_>> {
        if self.computed.contains_key(name) { Ok(whole(name, self.read(name)?)) } else { self.inner.stretches(name) }
    }

    fn is_q8_0(&self, name: &str) -> bool {
        !self.computed.contains_key(name) && self.inner.is_q8_0(name)
    }

    fn read_q8_0(&self, name: &str) -> Result<Vec<u8>> {
        self.inner.read_q8_0(name)
    }
}
