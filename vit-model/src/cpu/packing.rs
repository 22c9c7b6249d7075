//! Reads a linear layer's weights and packs them for a kernel.

use std::ops::Range;

use super::kernel::Kernel;
use super::packed::{Form, PackedLinear};
use super::scale;
use super::shape::{Elements, Shape};
use super::tensors::{NOT_FINITE, count, expect, finite, vector};
use crate::layers;
use crate::weights::widen;
use crate::{Dtype, Error, Result, TensorProblem, Weights};

/// A linear layer as a checkpoint stores it.
#[derive(Clone, Debug)]
pub(crate) struct LinearSource {
    /// The name before `.weight` and `.bias`.
    pub(crate) name: String,
    /// A second layer whose outputs follow those of the first, for gates.
    pub(crate) second: Option<String>,
    /// The name of a factor per output.
    pub(crate) scale: Option<String>,
    /// Outputs, of both layers.
    pub(crate) n: usize,
    /// Inputs.
    pub(crate) k: usize,
    pub(crate) bias: bool,
    /// Whether the first half of the outputs gates the second.
    pub(crate) gated: bool,
}

impl From<layers::Linear> for LinearSource {
    fn from(linear: layers::Linear) -> Self {
        let layers::Linear { name, inputs, outputs, bias } = linear;
        Self { name, second: None, scale: None, n: outputs, k: inputs, bias, gated: false }
    }
}

impl LinearSource {
    /// Reads and packs the layer, into the memory of another layer if that has the same form.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or not finite.
    pub(crate) fn pack(
        &self,
        weights: &dyn Weights,
        kernel: &dyn Kernel,
        shape: Shape,
        into: Option<PackedLinear>,
    ) -> Result<PackedLinear> {
        let parts = 1 + usize::from(self.second.is_some());
        let rows = self.n / parts; // of each part
        let mut matrix = Vec::with_capacity(parts);
        let mut bias = Vec::with_capacity(self.n);
        for name in std::iter::once(&self.name).chain(&self.second) {
            let weight = format!("{name}.weight");
            let dtype = expect(weights, &weight, |shape| {
                shape.split_first().is_some_and(|(&n, rest)| n == rows && count(rest) == Some(self.k))
            })?;
            matrix.push((weights.stretches(&weight)?, dtype, weight));
            if self.bias {
                bias.extend(vector(weights, &format!("{name}.bias"), rows)?);
            }
        }
        let scale = self.scale.as_ref().map(|name| vector(weights, name, self.n)).transpose()?;
        bias.resize(self.n, 0.0);
        if let Some(scale) = &scale {
            bias.iter_mut().zip(scale).for_each(|(b, s)| *b *= s);
        }
        let mut bytes = Vec::new(); // of a few rows at a time, which stay in the cache until they are packed
        let form = Form { n: self.n, k: self.k, gated: self.gated, shape };
        pack_rows(form, kernel, &bias, rows, into, |run, out, stride| {
            let (read, dtype, name) = &matrix[run.start / rows];
            let width = self.k * dtype.size();
            let at = run.start % rows * width;
            if *dtype == Dtype::F32 && stride == self.k && cfg!(target_endian = "little") {
                // SAFETY: the bytes of `out`, which is borrowed mutably; every pattern of bytes is a valid f32
                read(at, unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), size_of_val(out)) })?;
            } else {
                bytes.resize(run.len() * width, 0);
                read(at, &mut bytes)?;
                for (out, bytes) in out.chunks_mut(stride).zip(bytes.chunks_exact(width)) {
                    out[..self.k].copy_from_slice(&widen(*dtype, bytes));
                }
            }
            for (row, out) in run.zip(out.chunks_mut(stride)) {
                let out = &mut out[..self.k];
                if !finite(out) {
                    return Err(Error::problem(name, TensorProblem::NotFinite, NOT_FINITE));
                }
                if let Some(scale) = &scale {
                    out.iter_mut().for_each(|x| *x *= scale[row]);
                }
            }
            Ok(())
        })
    }
}

/// Packs the rows that `read(rows, out, stride)` writes: consecutive rows of `k` values, `stride` values apart. No call asks
/// for rows on both sides of a multiple of `part`.
pub(crate) fn pack_rows(
    form: Form,
    kernel: &dyn Kernel,
    bias: &[f32],
    part: usize,
    into: Option<PackedLinear>,
    mut read: impl FnMut(Range<usize>, &mut [f32], usize) -> Result<()>,
) -> Result<PackedLinear> {
    assert_eq!(bias.len(), form.n);
    let (shape, packed) = (form.shape, PackedLinear::of_form(form, into));
    let (cols, chunks) = (shape.cols, packed.chunks());
    let width = chunks * shape.elements.chunk();
    let mut rows = vec![0f32; cols * width];
    for panel in 0..packed.count() {
        let mut column = 0;
        while column < cols {
            let output = |column| packed.output(panel * cols + column);
            let Some(first) = output(column) else {
                rows[column * width..][..width].fill(0.0);
                column += 1;
                continue;
            };
            let more = |n: &usize| output(column + n) == Some(first + n) && !(first + n).is_multiple_of(part);
            let run = first..first + 1 + (1..cols - column).take_while(more).count();
            for (i, row) in run.clone().enumerate() {
                // SAFETY: the buffer has a bias for every column of this panel, and nothing else refers to it yet
                unsafe { *packed.bias(panel).add(column + i) = bias[row] };
            }
            let next = column + run.len();
            read(run, &mut rows[column * width..next * width], width)?;
            column = next;
        }
        if shape.elements == Elements::Int8 {
            for (column, row) in rows.chunks_exact_mut(width).enumerate() {
                let (scale, sum) = scale::round(row);
                let at = packed.bias(panel).wrapping_add(column);
                // SAFETY: in int8 a scale and a sum for every column follow the biases; nothing else refers to them yet
                unsafe {
                    *at.add(packed.padded()) = scale;
                    *at.add(2 * packed.padded()) = sum;
                }
            }
        }
        // SAFETY: `rows` has `cols` rows of `chunks` chunks, and the buffer this panel; nothing else refers to it yet
        unsafe { kernel.pack(shape, rows.as_ptr(), width, chunks, packed.panel(panel, 0)) };
    }
    Ok(packed)
}
