//! A model's tensors under other names and cut otherwise, read only when they are asked for: what other libraries' files hold.

use std::{collections::BTreeMap, sync::Arc};

use vit_model::weights::{Dtype, TensorInfo, Weights, widen};

/// What stands in a tensor of the other library, from its first row on.
#[derive(Clone, Debug)]
pub enum Part {
    /// A tensor of ours.
    All(String),
    /// Rows of one: the first, how many, of how many.
    Rows(String, usize, usize, usize),
    /// So many zeros.
    Zeros(usize),
}

/// Tensors made of another's.
pub struct Relabelled {
    inner: Arc<dyn Weights>,
    parts: BTreeMap<String, Vec<Part>>,
    infos: BTreeMap<String, TensorInfo>,
}

impl Relabelled {
    /// No tensors yet.
    pub fn new(inner: Arc<dyn Weights>) -> Self {
        Self { inner, parts: BTreeMap::new(), infos: BTreeMap::new() }
    }

    /// Every tensor of the inner model, under its own name.
    pub fn all(inner: Arc<dyn Weights>) -> Self {
        let infos = inner.tensors().clone();
        let parts = infos.keys().map(|name| (name.clone(), vec![Part::All(name.clone())])).collect();
        Self { inner, parts, infos }
    }

    /// Adds a tensor; its parts lie one below the other. Parts of different types are widened to f32.
    pub fn add(&mut self, name: impl Into<String>, shape: Vec<usize>, parts: Vec<Part>) {
        let name = name.into();
        let mut types = parts.iter().filter_map(|part| self.stored(part));
        let dtype = types.next().map_or(Dtype::F32, |first| if types.all(|t| t == first) { first } else { Dtype::F32 });
        self.infos.insert(name.clone(), TensorInfo { dtype, shape });
        self.parts.insert(name, parts);
    }

    /// Takes a tensor away.
    pub fn remove(&mut self, name: &str) {
        self.infos.remove(name);
        self.parts.remove(name);
    }

    /// The shape of a tensor of the inner model.
    pub fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        self.inner.tensors().get(name).map(|info| info.shape.clone())
    }

    fn stored(&self, part: &Part) -> Option<Dtype> {
        match part {
            Part::All(name) | Part::Rows(name, ..) => self.inner.tensors().get(name).map(|info| info.dtype),
            Part::Zeros(_) => None,
        }
    }
}

impl Weights for Relabelled {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.infos
    }

    fn read(&self, name: &str) -> vit_model::Result<Vec<u8>> {
        let (Some(info), Some(parts)) = (self.infos.get(name), self.parts.get(name)) else {
            return Err(vit_model::Error::tensor(name, "missing"));
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
                Part::Zeros(count) => vec![0; count.saturating_mul(info.dtype.size())],
            };
            if let Some(dtype) = self.stored(part).filter(|dtype| *dtype != info.dtype) {
                bytes = widen(dtype, &bytes).iter().flat_map(|v| v.to_le_bytes()).collect();
            }
            out.append(&mut bytes);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Two(BTreeMap<String, TensorInfo>);

    impl Weights for Two {
        fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
            &self.0
        }

        fn read(&self, name: &str) -> vit_model::Result<Vec<u8>> {
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
        let mut to = Relabelled::new(Arc::new(inner));
        let parts = vec![Part::Rows("a".into(), 1, 2, 4), Part::Zeros(1), Part::All("b".into())];
        to.add("c", vec![4, 1], parts);
        assert_eq!(to.tensors()["c"].dtype, Dtype::F32);
        assert_eq!(widen(Dtype::F32, &to.read("c").unwrap()), [2.0, 3.0, 0.0, 5.0]);
        assert!(to.read("a").is_err());
    }
}
