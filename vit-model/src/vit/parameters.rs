//! Tests: candle's modules ask for exactly the parameters that [`layers`](crate::layers) lists.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

use super::VisionTransformer;
use super::gradients::variants;
use super::linear::Q8_0;
use crate::layers::parameters;
use crate::names::{self, Architecture};

/// Notes what a model asks for, and answers with a zero that is broadcast: no memory, whatever the size.
struct Lister(Arc<Mutex<BTreeMap<String, Vec<usize>>>>);

impl SimpleBackend for Lister {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        if let Ok(mut list) = self.0.lock() {
            list.insert(name.to_owned(), s.dims().to_vec());
        }
        Tensor::zeros((), dtype, dev)?.broadcast_as(s)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("`{name}` is asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        !name.ends_with(Q8_0)
    }
}

#[test]
fn the_network_asks_for_the_parameters_that_are_listed() {
    let names = names::all().into_iter().map(|name| (name, Architecture::of(name).unwrap().config));
    for (name, config) in names.chain(variants()) {
        let asked = Arc::new(Mutex::new(BTreeMap::new()));
        let backend: Box<dyn SimpleBackend> = Box::new(Lister(asked.clone()));
        VisionTransformer::new(&config, VarBuilder::from_backend(backend, DType::F32, Device::Cpu)).unwrap();
        assert_eq!(*asked.lock().unwrap(), parameters(&config).unwrap(), "{name}");
    }
}
