//! LayerNorm and RMSNorm over rows.

use std::ops::Range;

use super::buffer::Buffer;
use super::simd::{Op, Simd};
use super::tensors::vector;
use super::tiles::{Acts, Rows};
use crate::{NormKind, Result, Weights, layers};

/// A norm's weight and bias.
#[derive(Debug)]
pub(crate) struct Norm {
    dim: usize,
    kind: NormKind,
    eps: f32,
    /// The weight, then the bias, each padded with zeros to whole vectors.
    values: Buffer,
}

const PAD: usize = 64;

impl Norm {
    /// # Errors
    /// A tensor that is missing, of another length, or not finite.
    pub(crate) fn read(layer: &layers::Norm, weights: &dyn Weights) -> Result<Self> {
        let layers::Norm { ref name, width: dim, kind, eps } = *layer;
        let values = Buffer::new(2 * dim.next_multiple_of(PAD) * size_of::<f32>());
        let set = |name: &str, at: usize| -> Result<()> {
            let from = vector(weights, name, dim)?;
            // SAFETY: the buffer has room for two padded vectors of `dim` values, and nothing else refers to it yet
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), values.ptr().cast::<f32>().add(at), dim) };
            Ok(())
        };
        set(&format!("{name}.weight"), 0)?;
        if kind == NormKind::LayerNorm {
            set(&format!("{name}.bias"), dim.next_multiple_of(PAD))?;
        }
        Ok(Self { dim, kind, eps: eps as f32, values })
    }

    /// Norms one row. `put(column, vector)` gets whole vectors, of which the last has zeros beyond the row.
    ///
    /// # Safety
    /// `row` is valid for reading `dim` values.
    #[inline(always)]
    pub(crate) unsafe fn apply<S: Simd>(&self, s: S, row: *const f32, mut put: impl FnMut(usize, S::F)) {
        let whole = self.dim - self.dim % S::LANES;
        let mut tail = [0f32; 16];
        // SAFETY: whole vectors are read inside the caller's row, and the rest from `tail`, which is as long as the longest
        // vector; `values` has the weight and the bias, each padded to whole vectors
        unsafe {
            for (i, x) in tail.iter_mut().enumerate().take(self.dim - whole) {
                *x = *row.add(whole + i);
            }
            let weight = self.values.ptr().cast::<f32>().cast_const();
            let bias = weight.add(self.dim.next_multiple_of(PAD));
            let n = self.dim as f32;
            let mut mean = 0.0;
            if self.kind == NormKind::LayerNorm {
                let (mut x, mut y) = (s.splat(0.0), s.splat(0.0));
                let mut i = 0;
                while i + 2 * S::LANES <= whole {
                    x = s.add(x, s.load(row.add(i)));
                    y = s.add(y, s.load(row.add(i + S::LANES)));
                    i += 2 * S::LANES;
                }
                if i < whole {
                    x = s.add(x, s.load(row.add(i)));
                }
                mean = s.sum(s.add(s.add(x, y), s.load(tail.as_ptr()))) / n;
            }
            let m = s.splat(mean);
            let (mut x, mut y) = (s.splat(0.0), s.splat(0.0));
            let mut i = 0;
            while i + 2 * S::LANES <= whole {
                let (a, b) = (s.sub(s.load(row.add(i)), m), s.sub(s.load(row.add(i + S::LANES)), m));
                (x, y) = (s.fma(a, a, x), s.fma(b, b, y));
                i += 2 * S::LANES;
            }
            if i < whole {
                let a = s.sub(s.load(row.add(i)), m);
                x = s.fma(a, a, x);
            }
            let mut squares = s.sum(s.add(x, y));
            for i in whole..self.dim {
                squares += (*row.add(i) - mean).powi(2);
            }
            let r = s.splat(1.0 / (squares / n + self.eps).sqrt());
            // one loop, because `put` is inlined only if it is called from one place
            let mut i = 0;
            while i < self.dim {
                // the weight and bias of the padding are zero, and so is the result
                let x = if i < whole { s.load(row.add(i)) } else { s.load(tail.as_ptr()) };
                let x = s.mul(s.sub(x, m), r);
                put(i, s.fma(x, s.load(weight.add(i)), s.load(bias.add(i))));
                i += S::LANES;
            }
        }
    }
}

/// Norms a range of rows.
///
/// # Safety of [`Op::call`]
/// No other thread writes the rows that are read or accesses the rows that are written.
pub(crate) struct NormRows<'a> {
    norm: &'a Norm,
    from: Rows,
    rows: Range<usize>,
    to: NormTo,
}

/// Where normed rows are written.
#[derive(Clone, Copy)]
pub(crate) enum NormTo {
    /// To tiles, for a product.
    Acts(Acts),
    /// To f32 rows, which may be the rows that are read.
    Rows(Rows),
    /// To the rows of `to` that hold patches, with a row of `add` added, as [`Add::Position`](super::linear::Add::Position)
    /// does.
    Position { to: Rows, add: Option<Rows>, period: usize, stride: usize, first: usize },
}

impl<'a> NormRows<'a> {
    /// # Panics
    /// If one of the views does not contain the rows.
    pub(crate) fn new(norm: &'a Norm, from: Rows, rows: Range<usize>, to: NormTo) -> Self {
        let (end, dim) = (rows.end, norm.dim.next_multiple_of(16));
        let inside = match to {
            NormTo::Acts(acts) => acts.contains(end, norm.dim),
            NormTo::Rows(to) => to.contains(end, dim),
            NormTo::Position { to, add, period, stride, first } => {
                to.contains(end.div_ceil(period).saturating_sub(1) * stride + first + period.min(end), dim)
                    && add.is_none_or(|add| add.contains(period.min(end), dim))
            }
        };
        assert!(inside && from.contains(end, norm.dim), "a norm reads or writes outside its views");
        Self { norm, from, rows, to }
    }
}

impl<S: Simd> Op<S> for NormRows<'_> {
    #[inline(always)]
    unsafe fn call(self, s: S) {
        for i in self.rows.clone() {
            let from = self.from.row(i);
            // SAFETY: `new` has checked that the views contain the rows, which have room for whole vectors; the caller
            // excludes other threads
            unsafe {
                match self.to {
                    NormTo::Acts(acts) => {
                        let to = acts.row(i);
                        self.norm.apply(s, from, |column, x| to.put(s, column, x));
                    }
                    NormTo::Rows(rows) => self.norm.apply(s, from, |column, x| s.store(rows.row(i).add(column), x)),
                    NormTo::Position { to, add, period, stride, first } => {
                        let to = to.row(i / period * stride + first + i % period);
                        self.norm.apply(s, from, |column, x| {
                            let x = add.map_or(x, |add| s.add(x, s.load(add.row(i % period).add(column))));
                            s.store(to.add(column), x);
                        });
                    }
                }
            }
        }
    }
}
