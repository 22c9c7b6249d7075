//! A product of two tensors as data: the role of each dimension, and the result.

use super::value::View;
use crate::import::axes::{self, Dim};
use crate::import::expr::Id;

/// The roles of an operand's dimensions in a product.
#[derive(Clone, Debug, Default)]
pub(super) struct Roles {
    /// In both operands and the result.
    pub batch: Vec<usize>,
    /// In both operands, summed over.
    pub sum: Vec<usize>,
    /// In this operand and the result.
    pub free: Vec<usize>,
}

/// The result of a product: its base and the digits of its dimensions.
pub(super) struct Product {
    pub e: Id,
    pub sel: Option<(usize, usize)>,
    pub batch: Vec<Dim>,
    pub a: Vec<Dim>,
    pub b: Vec<Dim>,
}

impl Product {
    pub fn swapped(self) -> Self {
        Self { a: self.b, b: self.a, ..self }
    }

    pub fn view(self, dims: Vec<Dim>) -> View {
        View { e: self.e, dims, sel: self.sel }
    }
}

/// Digits of some dimensions, one after the other.
pub(super) fn digits_of(dims: &[Dim], which: &[usize]) -> Dim {
    axes::digits(which.iter().filter_map(|&k| dims.get(k)))
}

/// Channel digits for the free dimensions of a weight, row-major.
pub(super) fn channel_dims(sizes: &[usize]) -> Vec<Dim> {
    let mut stride: usize = sizes.iter().product();
    sizes
        .iter()
        .map(|&n| {
            stride /= n.max(1);
            axes::strided(2, stride, n)
        })
        .collect()
}
