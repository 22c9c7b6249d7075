//! LayerNorm and RMSNorm over rows.

use super::buffer::Buffer;
use super::pack::{Acts, Rows, vector};
use super::simd::{Op, Simd};
use crate::{Config, NormKind, Result, Weights};

/// A norm's weight and bias.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) dim: usize,
    kind: NormKind,
    eps: f32,
    /// The weight, then the bias, each padded with zeros to whole vectors.
    values: Buffer,
}

const PAD: usize = 64;

impl Norm {
    pub(crate) fn read(config: &Config, weights: &dyn Weights, name: &str, dim: usize) -> Result<Self> {
        let values = Buffer::new(2 * dim.next_multiple_of(PAD) * size_of::<f32>());
        let set = |name: &str, at: usize| -> Result<()> {
            let from = vector(weights, name, dim)?;
            // SAFETY: the buffer has room for two padded vectors, and is ours alone
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), values.ptr().cast::<f32>().add(at), dim) };
            Ok(())
        };
        set(&format!("{name}.weight"), 0)?;
        if config.norm == NormKind::LayerNorm {
            set(&format!("{name}.bias"), dim.next_multiple_of(PAD))?;
        }
        Ok(Self { dim, kind: config.norm, eps: config.ln_eps as f32, values })
    }

    /// Norms one row; `put(column, vector)` gets whole vectors, the last with zeros beyond the row.
    ///
    /// # Safety
    /// `row` is valid for reading `dim` values, and for whole vectors where `padded`.
    #[inline(always)]
    pub(crate) unsafe fn apply<S: Simd>(&self, s: S, row: *const f32, mut put: impl FnMut(usize, S::F)) {
        let whole = self.dim - self.dim % S::LANES;
        let mut tail = [0f32; 16];
        // SAFETY: the caller's; `tail` is as long as the longest vector
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
            // one loop, so that `put` stands in one place and is inlined
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
pub(crate) struct NormRows<'a> {
    pub(crate) norm: &'a Norm,
    pub(crate) from: Rows,
    pub(crate) rows: std::ops::Range<usize>,
    pub(crate) to: NormTo,
}

/// Where normed rows go.
#[derive(Clone, Copy)]
pub(crate) enum NormTo {
    /// To tiles, for a product.
    Acts(Acts),
    /// To f32 rows, the same ones allowed.
    Rows(Rows),
    /// To the rows of `0` that hold patches, and a row of `1` added: (period, stride, first) as in `linear::Add`.
    Position(Rows, Option<Rows>, [usize; 3]),
}

impl<S: Simd> Op<S> for NormRows<'_> {
    type Out = ();

    #[inline(always)]
    fn call(self, s: S) {
        for i in self.rows.clone() {
            let from = self.from.row(i);
            // SAFETY: the plan's rows are inside their buffers, each is one unit's, and rows have room for whole vectors
            unsafe {
                match self.to {
                    NormTo::Acts(acts) => {
                        let to = acts.row(i);
                        self.norm.apply(s, from, |column, x| to.put(s, column, x));
                    }
                    NormTo::Rows(rows) => self.norm.apply(s, from, |column, x| s.store(rows.row(i).add(column), x)),
                    NormTo::Position(rows, add, [period, stride, first]) => {
                        let to = rows.row(i / period * stride + first + i % period);
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
