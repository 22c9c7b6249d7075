//! Reads tensors and refuses those that are missing, of another shape or not finite.

use crate::{Dtype, Error, Result, TensorProblem, Weights};

pub(crate) const NOT_FINITE: &str = "holds NaN or infinity; the checkpoint is damaged";

pub(crate) fn finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    !values.iter().fold(false, |found, x| found | (x.to_bits() & EXPONENT == EXPONENT))
}

/// The element type of a tensor.
///
/// # Errors
/// A tensor that is missing, or whose shape is not `right`.
pub(crate) fn expect(weights: &dyn Weights, name: &str, right: impl Fn(&[usize]) -> bool) -> Result<Dtype> {
    let info = weights.tensors().get(name).ok_or_else(|| Error::missing(name))?;
    if !right(&info.shape) {
        return Err(Error::problem(
            name,
            TensorProblem::Shape,
            format!("has shape {:?}, which does not fit the configuration", info.shape),
        ));
    }
    Ok(info.dtype)
}

/// Elements of a shape, if the number fits `usize`.
pub(crate) fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim))
}

/// A tensor of `len` values in any shape.
///
/// # Errors
/// A tensor that is missing, has another number of values, or is not finite.
pub(crate) fn vector(weights: &dyn Weights, name: &str, len: usize) -> Result<Vec<f32>> {
    expect(weights, name, |shape| count(shape) == Some(len))?;
    let values = weights.read_f32(name)?;
    if values.len() != len {
        return Err(Error::problem(
            name,
            TensorProblem::Shape,
            format!("holds {} values, expected {len}", values.len()),
        ));
    }
    if !finite(&values) {
        return Err(Error::problem(name, TensorProblem::NotFinite, NOT_FINITE));
    }
    Ok(values)
}
