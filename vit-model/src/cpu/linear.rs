//! The linear layer: blocks of rows times panels of columns, with everything that follows fused behind the product.

use super::kernel::Entered;
use super::pack::{Acts, CHUNK_BYTES, Elements, Linear, Product, Rows, Shape};
use super::simd::{Op, Simd, gelu, gelu_tanh, quick_gelu, relu, silu};
use crate::Activation;

/// Rows that are multiplied at once: their chunks stay in the second-level cache while panels pass by.
const BLOCK: usize = 216;
/// The most panels of a unit.
const GROUP: usize = 4;

/// A way to multiply: an instruction set and the elements it multiplies.
pub(crate) trait Multiply: Copy + Send + Sync + 'static {
    /// The instruction set of everything but the product.
    type S: Simd;
    /// How both sides lie in memory.
    const SHAPE: Shape;
    /// Chunks of a panel that stay in the first-level cache.
    const DEPTH: usize;
    /// Panels that are multiplied with a block of rows before the next chunks of both are fetched.
    const GROUP: usize = GROUP;

    fn simd(self) -> Self::S;
    /// Prepares the thread that calls.
    fn enter(self) -> Option<Entered> {
        None
    }
    /// # Safety
    /// As [`Product`] says, for this shape.
    unsafe fn product(self, product: &Product);
}

/// f32 on both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32<S>(pub(crate) S);

impl<S: Simd> Multiply for F32<S> {
    type S = S;
    const SHAPE: Shape = Shape { elements: Elements::F32, tile: S::TILE, cols: S::COLS, run: S::RUN };
    const DEPTH: usize = 16;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product) {
        // SAFETY: the caller's
        unsafe { self.0.product(product) }
    }
}

/// Weights in bf16, widened as they come, which halves their memory where there is no dot product in bf16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Widened<S>(pub(crate) S);

impl<S: Simd> Multiply for Widened<S> {
    type S = S;
    const SHAPE: Shape = Shape { elements: Elements::Widened, ..F32::<S>::SHAPE };
    const DEPTH: usize = 16;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product) {
        // SAFETY: the caller's; `linear` has widened the panel
        unsafe { self.0.product(product) }
    }
}

/// What follows a product, before anything is written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Add {
    /// Nothing.
    Nothing,
    /// What stands where the result goes: the residual.
    Residual,
    /// Row `i % period` of these, if any; the result goes to row `i / period · stride + first + i % period`.
    Position { rows: Option<Rows>, period: usize, stride: usize, first: usize },
}

/// Where a result goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum To {
    /// To f32 rows.
    Rows(Rows, Add),
    /// To tiles, for the next product.
    Acts(Acts),
}

/// `to = act(W a + b)`, of a gated layer `act(gate) · value`, and what [`Add`] says.
pub(crate) struct Job<'a> {
    pub(crate) linear: &'a Linear,
    pub(crate) from: Acts,
    pub(crate) rows: usize,
    pub(crate) act: Option<Activation>,
    pub(crate) to: To,
}

impl Job<'_> {
    fn block(&self, shape: Shape) -> usize {
        let blocks = self.rows.div_ceil(BLOCK);
        self.rows.div_ceil(blocks.max(1)).next_multiple_of(shape.tile)
    }

    /// Panels of a unit: fewer where threads would be left without work.
    fn group(&self, shape: Shape, most: usize, threads: usize) -> usize {
        let blocks = self.rows.div_ceil(self.block(shape)).max(1);
        (blocks * self.linear.count() / (2 * threads)).clamp(1, most)
    }

    /// Independent parts of the job. Each value is computed in one of them, in an order that does not depend on how many
    /// there are, so that results are the same for any number of threads.
    pub(crate) fn units<M: Multiply>(&self, threads: usize) -> usize {
        let (block, group) = (self.block(M::SHAPE), self.group(M::SHAPE, M::GROUP, threads));
        self.rows.div_ceil(block) * self.linear.count().div_ceil(group)
    }
}

/// Bytes of scratch that a thread needs for any job.
pub(crate) const fn scratch_bytes(shape: Shape) -> usize {
    (GROUP * (BLOCK + 2 * shape.tile + 32) + 32 * 16) * shape.cols * size_of::<f32>()
}

/// One unit of a job.
pub(crate) struct Unit<'a, M> {
    pub(crate) multiply: M,
    pub(crate) job: &'a Job<'a>,
    pub(crate) unit: usize,
    pub(crate) threads: usize,
    /// [`scratch_bytes`], this thread's own.
    pub(crate) scratch: *mut f32,
}

impl<M: Multiply> Op<M::S> for Unit<'_, M> {
    type Out = ();

    #[inline(always)]
    fn call(self, s: M::S) {
        let Self { multiply, job, unit, threads, scratch } = self;
        let (shape, linear) = (M::SHAPE, job.linear);
        let (block, group) = (job.block(shape), job.group(shape, M::GROUP, threads));
        let groups = linear.count().div_ceil(group);
        let row = unit / groups * block;
        let rows = block.min(job.rows - row);
        let first = unit % groups * group;
        let panels = first..linear.count().min(first + group);
        let sums = |panel: usize| scratch.wrapping_add((panel - first) * rows.next_multiple_of(32) * shape.cols);
        let wide = scratch.wrapping_add(GROUP * (BLOCK + 2 * shape.tile + 32) * shape.cols);

        for chunk in (0..linear.chunks()).step_by(M::DEPTH) {
            let chunks = M::DEPTH.min(linear.chunks() - chunk);
            let (a, a_tile, a_low) = job.from.left(row, chunk);
            for panel in panels.clone() {
                let mut b = linear.panel(panel, chunk);
                if shape.elements == Elements::Widened {
                    // SAFETY: the panel has these chunks, and the scratch room for DEPTH of them
                    unsafe { widen(s, b.cast(), wide, chunks * 16 * shape.cols) };
                    b = wide.cast();
                }
                let next = if panel + 1 < panels.end {
                    (panel + 1, chunk)
                } else if chunk + chunks < linear.chunks() {
                    (first, chunk + chunks)
                } else {
                    (panels.end, 0)
                };
                let product = Product {
                    a,
                    a_tile,
                    a_low,
                    rows,
                    b,
                    chunks,
                    c: sums(panel),
                    accumulate: chunk > 0,
                    next: linear.panel(next.0, next.1),
                };
                // SAFETY: `from` has the job's rows in whole tiles and K in whole chunks, so has the panel; the sums of
                // a group fit the scratch
                unsafe { multiply.product(&product) };
            }
        }
        for panel in panels {
            let finish = Finish { job, panel, row, rows, sums: sums(panel) };
            // SAFETY: the sums were just computed, and no other unit writes these rows and columns
            unsafe {
                match job.act {
                    None => finish.run(s, shape, |x| x),
                    Some(Activation::Gelu) => finish.run(s, shape, |x| gelu(s, x)),
                    Some(Activation::GeluTanh) => finish.run(s, shape, |x| gelu_tanh(s, x)),
                    Some(Activation::QuickGelu) => finish.run(s, shape, |x| quick_gelu(s, x)),
                    Some(Activation::Relu) => finish.run(s, shape, |x| relu(s, x)),
                    Some(Activation::Silu) => finish.run(s, shape, |x| silu(s, x)),
                }
            }
        }
    }
}

/// bf16 → f32.
///
/// # Safety
/// `from` and `to` are valid for `len` values, a multiple of the lanes.
#[inline(always)]
unsafe fn widen<S: Simd>(s: S, from: *const u16, to: *mut f32, len: usize) {
    for i in (0..len).step_by(S::LANES) {
        // SAFETY: the caller's
        unsafe { s.store(to.add(i), s.load_bf16(from.add(i))) };
    }
}

/// The end of a unit, for one panel.
struct Finish<'a> {
    job: &'a Job<'a>,
    panel: usize,
    row: usize,
    rows: usize,
    sums: *const f32,
}

impl Finish<'_> {
    /// Column of the sums at run `j`, lane 0.
    ///
    /// # Safety
    /// `sums` holds the product of these rows and this panel, and nothing else refers to where the results go.
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, s: S, shape: Shape, act: impl Fn(S::F) -> S::F) {
        let Self { job, panel, row, rows, sums } = *self;
        let cols = shape.cols;
        let width = if job.linear.gated { cols / 2 } else { cols };
        let bias = job.linear.bias(panel);
        for i in 0..rows {
            for j in (0..width).step_by(S::LANES) {
                // SAFETY: inside the panel's row of sums and its biases; the caller's for the result
                unsafe {
                    let sum = sums.add(i * cols + j);
                    let mut x = act(s.add(s.load(sum), s.load(bias.add(j))));
                    if job.linear.gated {
                        x = s.mul(x, s.add(s.load(sum.add(width)), s.load(bias.add(width + j))));
                    }
                    let column = panel * width + j;
                    match job.to {
                        To::Acts(acts) => acts.put(s, row + i, column, x),
                        To::Rows(rows, Add::Nothing) => s.store(rows.row(row + i).add(column), x),
                        To::Rows(rows, Add::Residual) => {
                            let to = rows.row(row + i).add(column);
                            s.store(to, s.add(s.load(to), x));
                        }
                        To::Rows(to, Add::Position { rows, period, stride, first }) => {
                            let (image, at) = ((row + i) / period, (row + i) % period);
                            let x = rows.map_or(x, |rows| s.add(x, s.load(rows.row(at).add(column))));
                            s.store(to.row(image * stride + first + at).add(column), x);
                        }
                    }
                }
            }
        }
    }
}

const _: () = assert!(CHUNK_BYTES == 64);
