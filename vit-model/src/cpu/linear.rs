//! The linear layer: blocks of rows times panels of columns, with everything that follows fused behind the product.

use std::marker::PhantomData;

use super::kernel::Entered;
use super::pack::{Acts, CHUNK_BYTES, Elements, Linear, Product, Rows, Shape, Strips, pack_panel};
use super::simd::{Op, Simd, gelu_for_bf16, gelu_tanh, quick_gelu, relu, silu};
use crate::Activation;

/// A way to multiply: an instruction set and the elements it multiplies.
pub(crate) trait Multiply: Copy + Send + Sync + 'static {
    /// The instruction set of everything but the product.
    type S: Simd;
    /// How attention multiplies.
    type Attention: Multiply<S = Self::S>;
    /// How both sides lie in memory.
    const SHAPE: Shape;
    /// Chunks that a product takes at once.
    const DEPTH: usize;
    /// How a job is cut.
    const BLOCKING: Blocking = Blocking::Chunks { rows: 216, panels: 4 };
    /// Queries that attention takes at once.
    const QUERIES: usize;
    /// Whether attention reads [`Strips`], whose rows are those of a chunk.
    const STRIPS: bool = false;
    /// Whether the product calls what follows it, between its own steps: sums are still near, and where it runs in a unit of
    /// its own, the vector unit would otherwise wait meanwhile.
    const FOLLOWS: bool = false;

    fn simd(self) -> Self::S;
    fn attention(self) -> Self::Attention;
    /// Prepares the thread that calls.
    fn enter(self) -> Option<Entered> {
        None
    }
    /// # Safety
    /// As [`Product`] says, for this shape.
    unsafe fn product(self, product: &Product<'_>);

    /// What the product left at `sum` in a row of the job → the layer's output, before its activation, a vector.
    ///
    /// # Safety
    /// `sum` is valid for reading a vector, `bias` for one of the layer's biases; the job has the row.
    #[inline(always)]
    unsafe fn output(s: Self::S, _: Scales, _row: usize, sum: *const f32, bias: *const f32) -> <Self::S as Simd>::F {
        // SAFETY: the caller's
        unsafe { s.add(s.load(sum), s.load(bias)) }
    }

    /// Packs a panel whose columns are rows of a matrix in f32: of weights, and Kᵀ.
    ///
    /// # Safety
    /// `from` is valid for reading a panel's columns as rows of `stride` values, `chunks` chunks of each, `to` for
    /// writing as many chunks of a panel.
    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: the caller's
        unsafe { pack_panel(Self::SHAPE, from, stride, chunks, to) }
    }

    /// As [`pack_columns`](Self::pack_columns), from `rows` rows of strips that begin at `from`; the columns behind are
    /// zero. Of kernels that read [`STRIPS`](Self::STRIPS).
    ///
    /// # Safety
    /// `from` is valid for reading `rows` rows of `chunks` strips, and of as many planes; otherwise as for `pack_columns`.
    #[inline(always)]
    unsafe fn pack_strip_columns(self, _: Strips, _from: *const u8, _rows: usize, _chunks: usize, _to: *mut u8) {
        unreachable!("this kernel's attention reads f32")
    }

    /// As [`pack_rows`](Self::pack_rows), from `rows` rows of a strip. Of kernels that read [`STRIPS`](Self::STRIPS).
    ///
    /// # Safety
    /// `from` is valid for reading `rows` rows, and of as many planes; otherwise as for `pack_rows`.
    #[inline(always)]
    unsafe fn pack_strip_rows(self, _: Strips, _from: *const u8, _rows: usize, _to: *mut u8) {
        unreachable!("this kernel's attention reads f32")
    }

    /// Packs one chunk of a panel whose rows are rows of a matrix in f32: V. Rows from `rows` on are zero.
    ///
    /// # Safety
    /// `from` is valid for reading `rows` rows of `stride` values from which a panel's columns are taken, `to` for
    /// writing a chunk of a panel. The default is for [`Elements::F32`].
    #[inline(always)]
    unsafe fn pack_rows(self, from: *const f32, stride: usize, rows: usize, to: *mut u8) {
        let (s, Shape { cols, run, .. }) = (self.simd(), Self::SHAPE);
        for row in 0..Self::SHAPE.elements.chunk() {
            for column in (0..cols).step_by(Self::S::LANES) {
                // SAFETY: the caller's
                unsafe {
                    let to = to.cast::<f32>().add((column / run * 16 + row) * run + column % run);
                    let x = if row < rows { s.load(from.add(row * stride + column)) } else { s.splat(0.0) };
                    s.store(to, x);
                }
            }
        }
    }
}

/// Where the scales of a product of bytes are.
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    /// What the layer reads, with a scale for each row.
    pub(crate) from: Acts,
    /// See [`Linear::padded`].
    pub(crate) padded: usize,
}

/// How a job of a linear layer is cut, so that what is read again stays in a cache near the core.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Blocking {
    /// `DEPTH` chunks of some rows stay in the second-level cache while a few panels pass by, then the next ones.
    Chunks { rows: usize, panels: usize },
    /// Rows of all their chunks stay there, at most `most`, while panels pass by one by one. Where so many are larger than
    /// `bytes`, the sums of many panels stay there instead, of `least` rows at least, while chunks pass by.
    Rows { bytes: usize, least: usize, most: usize },
}

/// The most panels whose sums lie beside each other, under [`Blocking::Rows`].
const SIDE_BY_SIDE: usize = 24;

impl Blocking {
    /// Rows of sums that a unit needs.
    const fn sums(self, tile: usize) -> usize {
        match self {
            Self::Chunks { rows, panels } => panels * (rows + 2 * tile + 32),
            Self::Rows { most, .. } => SIDE_BY_SIDE * (most + 32),
        }
    }
}

/// f32 on both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32<S>(pub(crate) S);

impl<S: Simd> Multiply for F32<S> {
    type S = S;
    type Attention = Self;
    const SHAPE: Shape = Shape { elements: Elements::F32, tile: S::TILE, cols: S::COLS, run: S::RUN };
    const DEPTH: usize = S::DEPTH;
    const QUERIES: usize = S::BLOCK;
    const BLOCKING: Blocking = Blocking::Chunks { rows: 216, panels: S::PANELS };
    const STRIPS: bool = S::STRIPS;
    const FOLLOWS: bool = S::FOLLOWS;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    fn attention(self) -> Self {
        self
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product<'_>) {
        // SAFETY: the caller's
        unsafe { self.0.product(product) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: the caller's
        unsafe { self.0.pack_columns(from, stride, chunks, to) }
    }

    #[inline(always)]
    unsafe fn pack_strip_columns(self, strips: Strips, from: *const u8, rows: usize, chunks: usize, to: *mut u8) {
        for chunk in 0..chunks {
            // SAFETY: the caller's; a row of a strip is a chunk of a column
            unsafe {
                let from = from.add(chunk * strips.strip).cast::<f32>();
                let to = to.add(chunk * S::COLS * CHUNK_BYTES);
                if rows < S::COLS {
                    let mut columns = [0f32; 16 * WIDEST];
                    from.copy_to_nonoverlapping(columns.as_mut_ptr(), rows * 16);
                    self.0.pack_columns(columns.as_ptr(), 16, 1, to);
                } else {
                    self.0.pack_columns(from, 16, 1, to);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn pack_strip_rows(self, strips: Strips, from: *const u8, rows: usize, to: *mut u8) {
        for column in (0..S::COLS).step_by(S::LANES) {
            let (run, strip) = (column / S::RUN * S::RUN * 16 + column % S::RUN, column / 16 * strips.strip);
            for row in 0..16 {
                // SAFETY: the caller's
                unsafe {
                    let from = from.wrapping_add(strip + row * CHUNK_BYTES).cast::<f32>().wrapping_add(column % 16);
                    let x = if row < rows { self.0.load(from) } else { self.0.splat(0.0) };
                    self.0.store(to.cast::<f32>().add(run + row * S::RUN), x);
                }
            }
        }
    }
}

/// The most columns of a panel.
const WIDEST: usize = 64;

/// Weights in bf16, widened as they come, which halves their memory where there is no dot product in bf16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Widened<S>(pub(crate) S);

impl<S: Simd> Multiply for Widened<S> {
    type S = S;
    type Attention = F32<S>;
    const SHAPE: Shape = Shape { elements: Elements::Widened, ..F32::<S>::SHAPE };
    const DEPTH: usize = 12;
    const QUERIES: usize = S::BLOCK;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    fn attention(self) -> F32<S> {
        F32(self.0)
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product<'_>) {
        // SAFETY: the caller's; `linear` has widened the panel
        unsafe { self.0.product(product) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        let mut wide = [0f32; 16 * WIDEST];
        let wide = &mut wide[..16 * S::COLS];
        for chunk in 0..chunks {
            // SAFETY: the caller's; `wide` is a chunk of a panel in f32
            unsafe {
                self.0.pack_columns(from.add(chunk * 16), stride, 1, wide.as_mut_ptr().cast());
                let to = to.cast::<u16>().add(chunk * wide.len());
                for at in (0..wide.len()).step_by(S::LANES) {
                    self.0.store_bf16(to.add(at), self.0.load(wide.as_ptr().add(at)));
                }
            }
        }
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
    /// To strips, for attention.
    Strips(Strips),
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

/// How a job is cut in units, and how a unit runs.
struct Plan {
    /// Rows of a unit.
    block: usize,
    /// Panels of a unit.
    group: usize,
    /// Chunks after which the next panel's turn comes.
    span: usize,
}

impl Plan {
    /// For so many rows, `count` panels and `chunks` chunks of each.
    fn new<M: Multiply>(rows: usize, count: usize, chunks: usize, threads: usize) -> Self {
        let tile = M::SHAPE.tile;
        // the rows of each of so many blocks, whole tiles; or of as few blocks as `most` rows allow
        let rows_of = |blocks: usize| rows.div_ceil(blocks).next_multiple_of(tile);
        let even = |most: usize| rows_of(rows.div_ceil(most).max(1));
        match M::BLOCKING {
            Blocking::Chunks { rows: most, panels } => {
                let block = even(most);
                let blocks = rows.div_ceil(block).max(1);
                // fewer panels where threads would be left without work
                let group = (blocks * count / (2 * threads)).clamp(1, panels);
                Self { block, group, span: M::DEPTH }
            }
            Blocking::Rows { bytes, least, most } => {
                let row = chunks * CHUNK_BYTES * M::SHAPE.elements.planes();
                if rows.min(most) * row <= bytes {
                    return Self { block: even(most), group: 1, span: chunks };
                }
                // two units a thread at least, so that one that is slowed leaves some to the others: of all panels beside
                // each other, if that can be, as rows are then read once
                let blocks = (2 * threads).clamp(rows.div_ceil(most), rows.div_ceil(least));
                let block = rows_of(blocks);
                let group = (rows.div_ceil(block) * count).div_ceil(2 * threads).clamp(1, SIDE_BY_SIDE);
                Self { block, group: count.div_ceil(count.div_ceil(group)), span: M::DEPTH }
            }
        }
    }

    /// Rows of sums of a unit.
    fn sums(&self) -> usize {
        self.group * Self::sums_of(self.block)
    }

    /// Rows of sums of a panel: products write whole tiles, and two of them at once.
    const fn sums_of(rows: usize) -> usize {
        rows.next_multiple_of(32)
    }
}

impl Job<'_> {
    fn plan<M: Multiply>(&self, threads: usize) -> Plan {
        Plan::new::<M>(self.rows, self.linear.count(), self.linear.chunks(), threads)
    }

    /// Independent parts of the job. Each value is computed in one of them, in an order that does not depend on how many
    /// there are, so that results are the same for any number of threads.
    pub(crate) fn units<M: Multiply>(&self, threads: usize) -> usize {
        let Plan { block, group, .. } = self.plan::<M>(threads);
        self.rows.div_ceil(block) * self.linear.count().div_ceil(group)
    }
}

/// Bytes of scratch that a thread needs for any job.
pub(crate) const fn scratch_bytes<M: Multiply>() -> usize {
    (M::BLOCKING.sums(M::SHAPE.tile) + 16 * M::DEPTH) * M::SHAPE.cols * size_of::<f32>()
}

/// A panel of weights to be packed, as [`Kernel::pack`](super::kernel::Kernel::pack) says.
pub(crate) struct Packing<M> {
    pub(crate) multiply: M,
    pub(crate) from: *const f32,
    pub(crate) stride: usize,
    pub(crate) chunks: usize,
    pub(crate) to: *mut u8,
}

impl<M: Multiply> Op<M::S> for Packing<M> {
    type Out = ();

    #[inline(always)]
    fn call(self, _: M::S) {
        // SAFETY: as whoever made it has promised
        unsafe { self.multiply.pack_columns(self.from, self.stride, self.chunks, self.to) }
    }
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
        let plan = job.plan::<M>(threads);
        assert!(plan.sums() <= M::BLOCKING.sums(shape.tile), "the sums of a unit outgrow its scratch");
        let Plan { block, group, span } = plan;
        let (groups, all) = (linear.count().div_ceil(group), linear.chunks());
        let row = unit / groups * block;
        let rows = block.min(job.rows - row);
        let first = unit % groups * group;
        let panels = first..linear.count().min(first + group);
        let sums = |panel: usize| scratch.wrapping_add((panel - first) * Plan::sums_of(rows) * shape.cols);
        let wide = scratch.wrapping_add(M::BLOCKING.sums(shape.tile) * shape.cols);

        for start in (0..all).step_by(span) {
            let end = all.min(start + span);
            for panel in panels.clone() {
                let finish: Finish<'_, M> = Finish { _multiply: PhantomData, job, panel, row, sums: sums(panel) };
                // SAFETY: what is finished is complete, and no other unit writes these rows and columns
                let follow = |rows| s.run(FinishRows { finish: &finish, rows });
                for chunk in (start..end).step_by(M::DEPTH) {
                    let chunks = M::DEPTH.min(end - chunk);
                    let (a, a_tile, a_low) = job.from.left(row, chunk);
                    let mut b = linear.panel(panel, chunk);
                    if shape.elements == Elements::Widened {
                        // SAFETY: the panel has these chunks, and the scratch room for DEPTH of them
                        unsafe { widen(s, b.cast(), wide, chunks * 16 * shape.cols) };
                        b = wide.cast();
                    }
                    let next = if chunk + chunks < end {
                        (panel, chunk + chunks)
                    } else if panel + 1 < panels.end {
                        (panel + 1, start)
                    } else if end < all {
                        (first, end)
                    } else {
                        (panels.end, 0)
                    };
                    let product = Product {
                        a,
                        a_tile,
                        a_chunk: shape.tile * CHUNK_BYTES,
                        a_low,
                        rows,
                        b,
                        chunks,
                        c: sums(panel),
                        accumulate: chunk > 0,
                        next: linear.panel(next.0, next.1),
                        next_bytes: chunks * shape.cols * shape.elements.column_bytes(),
                        follow: if M::FOLLOWS && chunk + chunks == all { Some(&follow) } else { None },
                    };
                    // SAFETY: `from` has the job's rows in whole tiles and K in whole chunks, so has the panel; the sums
                    // of a group fit the scratch
                    unsafe { multiply.product(&product) };
                }
                if !M::FOLLOWS && end == all {
                    follow(0..rows);
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

/// An activation. Not a closure, as those that stand in several places are not inlined, and then not compiled for the
/// instruction set.
trait Act<S: Simd> {
    fn call(s: S, x: S::F) -> S::F;
}

/// Types for the activations.
macro_rules! acts {
    ($($name:ident: |$s:ident, $x:ident| $body:expr;)*) => {$(
        struct $name;

        impl<S: Simd> Act<S> for $name {
            #[inline(always)]
            fn call($s: S, $x: S::F) -> S::F {
                $body
            }
        }
    )*};
}

acts! {
    Identity: |_s, x| x;
    Gelu: |s, x| s.gelu(x);
    GeluForBf16: |s, x| gelu_for_bf16(s, x);
    GeluTanh: |s, x| gelu_tanh(s, x);
    QuickGelu: |s, x| quick_gelu(s, x);
    Relu: |s, x| relu(s, x);
    Silu: |s, x| silu(s, x);
}

/// The end of a unit, for one panel.
#[derive(Clone, Copy)]
struct Finish<'a, M> {
    _multiply: PhantomData<M>,
    job: &'a Job<'a>,
    panel: usize,
    /// The unit's first row.
    row: usize,
    sums: *const f32,
}

/// The end of some of its rows. They hold their product, and nothing else refers to where the results go.
struct FinishRows<'a, M> {
    finish: &'a Finish<'a, M>,
    rows: std::ops::Range<usize>,
}

impl<M: Multiply> Op<M::S> for FinishRows<'_, M> {
    type Out = ();

    #[inline(always)]
    fn call(self, s: M::S) {
        let Self { finish, rows } = self;
        // SAFETY: as `FinishRows` says
        unsafe {
            match finish.job.act {
                None => finish.run::<Identity>(s, rows),
                Some(Activation::Gelu) if M::SHAPE.elements.rounds() => finish.run::<GeluForBf16>(s, rows),
                Some(Activation::Gelu) => finish.run::<Gelu>(s, rows),
                Some(Activation::GeluTanh) => finish.run::<GeluTanh>(s, rows),
                Some(Activation::QuickGelu) => finish.run::<QuickGelu>(s, rows),
                Some(Activation::Relu) => finish.run::<Relu>(s, rows),
                Some(Activation::Silu) => finish.run::<Silu>(s, rows),
            }
        }
    }
}

/// # Safety of every function
/// As [`FinishRows`] says.
impl<M: Multiply> Finish<'_, M> {
    /// Row by row, everything that follows the product.
    #[inline(always)]
    unsafe fn run<A: Act<M::S>>(&self, s: M::S, rows: std::ops::Range<usize>) {
        let (Self { job, panel, row, sums, .. }, shape) = (*self, M::SHAPE);
        // copies, which no store of a result can change: they stay in registers
        let Job { linear, from, to, .. } = *job;
        let scales = Scales { from, padded: linear.padded() };
        let (bias, gated) = (linear.bias(panel), linear.gated);
        let values = Values::<M> { _multiply: PhantomData, sums, bias, gated, scales, row };
        let width = if linear.gated { shape.cols / 2 } else { shape.cols };
        let (first, lanes) = (panel * width, M::S::LANES);
        // SAFETY: the caller's
        unsafe {
            match to {
                To::Acts(acts) if width.is_multiple_of(2 * lanes) => {
                    for i in rows {
                        let to = acts.row_of(shape.tile, row + i);
                        for j in (0..width).step_by(2 * lanes) {
                            let (x, y) = (values.at::<A>(s, i, j), values.at::<A>(s, i, j + lanes));
                            to.put_pair(s, first + j, x, y);
                        }
                    }
                }
                To::Acts(acts) => {
                    for i in rows {
                        let to = acts.row_of(shape.tile, row + i);
                        for j in (0..width).step_by(lanes) {
                            to.put(s, first + j, values.at::<A>(s, i, j));
                        }
                    }
                }
                To::Strips(strips) => {
                    let top = strips.row_of(M::Attention::SHAPE.elements, row, first);
                    for i in rows {
                        let to = top.below(i);
                        for j in (0..width).step_by(2 * lanes) {
                            to.put_pair(s, j, values.at::<A>(s, i, j), values.at::<A>(s, i, j + lanes));
                        }
                    }
                }
                To::Rows(to, Add::Nothing) => {
                    for i in rows {
                        let to = to.row(row + i).add(first);
                        for j in (0..width).step_by(lanes) {
                            s.store(to.add(j), values.at::<A>(s, i, j));
                        }
                    }
                }
                To::Rows(to, Add::Residual) => {
                    for i in rows {
                        let to = to.row(row + i).add(first);
                        for j in (0..width).step_by(lanes) {
                            s.store(to.add(j), s.add(values.at::<A>(s, i, j), s.load(to.add(j))));
                        }
                    }
                }
                To::Rows(to, Add::Position { rows: positions, period, stride, first: first_row }) => {
                    for i in rows {
                        let (image, at) = ((row + i) / period, (row + i) % period);
                        let to = to.row(image * stride + first_row + at).add(first);
                        let position = positions.map(|rows| rows.row(at).add(first));
                        for j in (0..width).step_by(lanes) {
                            let x = values.at::<A>(s, i, j);
                            s.store(to.add(j), position.map_or(x, |position| s.add(x, s.load(position.add(j)))));
                        }
                    }
                }
            }
        }
    }
}

/// The values of a panel, before anything is added.
struct Values<M> {
    _multiply: PhantomData<M>,
    sums: *const f32,
    bias: *const f32,
    gated: bool,
    scales: Scales,
    /// The unit's first row.
    row: usize,
}

impl<M> Clone for Values<M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Values<M> {}

impl<M: Multiply> Values<M> {
    /// `act(sum + bias)`, of a gated layer `act(gate) · value`: a vector of one row.
    ///
    /// # Safety
    /// The row's sums are complete, the columns inside the panel.
    #[inline(always)]
    unsafe fn at<A: Act<M::S>>(self, s: M::S, i: usize, j: usize) -> <M::S as Simd>::F {
        // SAFETY: the caller's
        unsafe {
            let (sum, bias) = (self.sums.add(i * M::SHAPE.cols + j), self.bias.add(j));
            let x = A::call(s, M::output(s, self.scales, self.row + i, sum, bias));
            if !self.gated {
                return x;
            }
            let width = M::SHAPE.cols / 2;
            s.mul(x, M::output(s, self.scales, self.row + i, sum.add(width), bias.add(width)))
        }
    }
}

const _: () = assert!(CHUNK_BYTES == 64);

#[cfg(test)]
mod tests {
    use super::*;

    /// Over the rows of batches, and layers from the smallest to those of giants.
    fn fits<M: Multiply>(name: &str) {
        let chunk = M::SHAPE.elements.chunk();
        for rows in (1..600).chain((600..6000).step_by(37)).chain([2056]) {
            for k in [16usize, 192, 384, 768, 1024, 1152, 1280, 1408, 1536, 3072, 4096, 4304, 5120, 6144, 8192] {
                for (n, threads) in [(48usize, 1), (768, 2), (3072, 64), (8192, 1)] {
                    let plan = Plan::new::<M>(rows, n.div_ceil(M::SHAPE.cols), k.div_ceil(chunk), threads);
                    let room = M::BLOCKING.sums(M::SHAPE.tile);
                    assert!(plan.sums() <= room, "{name}: {rows} rows of {k}, {n} outputs, {threads} threads");
                    assert!(plan.block.is_multiple_of(M::SHAPE.tile), "{name}: a block of {} rows", plan.block);
                    assert!(plan.group > 0 && plan.span > 0);
                }
            }
        }
    }

    #[test]
    fn no_unit_outgrows_its_scratch() {
        use super::super::portable::Portable;
        fits::<F32<Portable>>("portable");
        #[cfg(target_arch = "x86_64")]
        {
            use super::super::{avx2::Avx2, avx512};
            fits::<F32<Avx2>>("avx2");
            fits::<F32<avx512::Avx512>>("avx512");
            fits::<avx512::Bf16x3>("avx512, bf16x3");
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        {
            use super::super::{amx, int8};
            fits::<amx::Tiled<amx::Registers, false>>("amx, bf16");
            fits::<amx::Tiled<amx::Registers, true>>("amx, bf16x3");
            fits::<int8::Tiled<amx::Registers>>("amx, int8");
        }
    }
}
