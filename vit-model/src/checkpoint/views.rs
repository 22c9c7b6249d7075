//! Tensors made of other tensors, and read only when they are needed: what a file of another library contains, under our names,
//! and what we write for that library, under its names.

use std::{collections::BTreeMap, sync::Arc};

use crate::weights::{Dtype, ReadAt, TensorInfo, Weights, whole, widen};

/// What a tensor is made of. Several parts are put one below the other.
#[derive(Clone, Debug)]
pub(super) enum Part {
    /// A whole tensor.
    All(String),
    /// Rows of one: the first, how many, of how many.
    Rows(String, usize, usize, usize),
    /// A matrix with its rows as columns: its rows and columns in the file.
    Transposed(String, usize, usize),
    /// So many zeros.
    Zeros(usize),
    /// The class token plus its position, as f32: timm's positions may cover the patches only.
    ClassPlusPosition { class: String, positions: String },
}

impl Part {
    /// The tensors that it is made of.
    pub(super) fn names(&self) -> Vec<&String> {
        match self {
            Self::All(name) | Self::Rows(name, ..) | Self::Transposed(name, ..) => vec![name],
            Self::Zeros(_) => Vec::new(),
            Self::ClassPlusPosition { class, positions } => vec![class, positions],
        }
    }
}

/// Tensors made of the tensors of other weights.
pub(super) struct Views {
    inner: Arc<dyn Weights>,
    parts: BTreeMap<String, Vec<Part>>,
    infos: BTreeMap<String, TensorInfo>,
}

impl Views {
    /// No tensors yet.
    pub(super) fn new(inner: Arc<dyn Weights>) -> Self {
        Self { inner, parts: BTreeMap::new(), infos: BTreeMap::new() }
    }

    /// Every tensor of the inner model, under its own name.
    pub(super) fn all(inner: Arc<dyn Weights>) -> Self {
        let infos = inner.tensors().clone();
        let parts = infos.keys().map(|name| (name.clone(), vec![Part::All(name.clone())])).collect();
        Self { inner, parts, infos }
    }

    /// Adds a tensor; its parts lie one below the other. Parts of different types are widened to f32.
    pub(super) fn add(&mut self, name: impl Into<String>, shape: Vec<usize>, parts: Vec<Part>) {
        let name = name.into();
        let mut types = parts.iter().filter_map(|part| self.stored(part));
        let dtype = types.next().map_or(Dtype::F32, |first| if types.all(|t| t == first) { first } else { Dtype::F32 });
        self.infos.insert(name.clone(), TensorInfo { dtype, shape });
        self.parts.insert(name, parts);
    }

    /// Takes a tensor away.
    pub(super) fn remove(&mut self, name: &str) {
        self.infos.remove(name);
        self.parts.remove(name);
    }

    /// Whether there is a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.infos.contains_key(name)
    }

    /// The shape of a tensor of the inner model.
    pub(super) fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        self.inner.tensors().get(name).map(|info| info.shape.clone())
    }

    fn stored(&self, part: &Part) -> Option<Dtype> {
        match part {
            Part::All(name) | Part::Rows(name, ..) | Part::Transposed(name, ..) => {
                self.inner.tensors().get(name).map(|info| info.dtype)
            }
            Part::Zeros(_) => None,
            Part::ClassPlusPosition { .. } => Some(Dtype::F32),
        }
    }
}

impl Weights for Views {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.infos
    }

    fn read(&self, name: &str) -> crate::Result<Vec<u8>> {
        let (Some(info), Some(parts)) = (self.infos.get(name), self.parts.get(name)) else {
            return Err(crate::Error::missing(name));
        };
        if let [Part::All(ours)] = parts.as_slice() {
            return self.inner.read(ours);
        }
        let mut out = Vec::new();
        for part in parts {
            let mut bytes = match part {
                Part::All(ours) => self.inner.read(ours)?,
                Part::Rows(ours, from, rows, all) => {
                    let mut bytes = self.inner.read(ours)?;
                    let row = bytes.len().checked_div(*all).unwrap_or(0);
                    let end = from.saturating_add(*rows).saturating_mul(row).min(bytes.len());
                    bytes.truncate(end);
                    bytes.split_off(from.saturating_mul(row).min(end))
                }
                Part::Transposed(ours, rows, columns) => {
                    let size = self.stored(part).map_or(0, Dtype::size);
                    transposed(&self.inner.read(ours)?, size, *rows, *columns)
                }
                Part::Zeros(count) => vec![0; count.saturating_mul(info.dtype.size())],
                Part::ClassPlusPosition { class, positions } => {
                    let (class, positions) = (self.inner.read_f32(class)?, self.inner.read_f32(positions)?);
                    class.iter().zip(&positions).flat_map(|(c, p)| (c + p).to_le_bytes()).collect()
                }
            };
            if let Some(dtype) = self.stored(part).filter(|dtype| *dtype != info.dtype) {
                bytes = widen(dtype, &bytes).iter().flat_map(|v| v.to_le_bytes()).collect();
            }
            out.append(&mut bytes);
        }
        Ok(out)
    }

    fn stretches(&self, name: &str) -> crate::Result<ReadAt<'_>> {
        match self.parts.get(name).map(Vec::as_slice) {
            Some([Part::All(ours)]) => self.inner.stretches(ours),
            _ => Ok(whole(name, self.read(name)?)),
        }
    }
}

/// The transpose of a matrix of elements of `size` bytes.
fn transposed(bytes: &[u8], size: usize, rows: usize, columns: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            let at = row.saturating_mul(columns).saturating_add(column).saturating_mul(size);
            out.extend_from_slice(bytes.get(at..at.saturating_add(size)).unwrap_or_default());
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    struct Two(BTreeMap<String, TensorInfo>);

    impl Weights for Two {
        fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
            &self.0
        }

        fn read(&self, name: &str) -> crate::Result<Vec<u8>> {
            let numbers: &[f32] = if name == "a" { &[1.0, 2.0, 3.0, 4.0] } else { &[5.0] };
            Ok(match self.0[name].dtype {
                Dtype::F16 => numbers.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
                _ => numbers.iter().flat_map(|v| v.to_le_bytes()).collect(),
            })
        }
    }

    #[test]
    fn rows_zeros_and_other_types_are_put_one_below_the_other() {
        let info = |dtype, shape: &[usize]| TensorInfo { dtype, shape: shape.to_vec() };
        let inner = Two([("a".into(), info(Dtype::F32, &[4, 1])), ("b".into(), info(Dtype::F16, &[1, 1]))]
            .into_iter()
            .collect());
        let mut to = Views::new(Arc::new(inner));
        let parts = vec![Part::Rows("a".into(), 1, 2, 4), Part::Zeros(1), Part::All("b".into())];
        to.add("c", vec![4, 1], parts);
        assert_eq!(to.tensors()["c"].dtype, Dtype::F32);
        assert_eq!(widen(Dtype::F32, &to.read("c").unwrap()), [2.0, 3.0, 0.0, 5.0]);
        assert!(to.read("a").is_err());
    }
}
