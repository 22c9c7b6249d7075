//! The linear layer: blocks of rows times panels of columns, and the epilogue fused behind each product.

use std::marker::PhantomData;
use std::ops::Range;

use super::math::{gelu_for_bf16, gelu_tanh, quick_gelu, relu, silu};
use super::multiply::{Blocking, Multiply, SIDE_BY_SIDE, Scales};
use super::packed::PackedLinear;
use super::product::{Epilogue, Product};
use super::shape::{CHUNK_BYTES, Elements, Shape};
use super::simd::{Op, Simd};
use super::tiles::{Acts, ActsRow, Rows, Strips};
use crate::Activation;

/// What is added to a result before it is written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Add {
    Nothing,
    /// The previous values of the rows that are written: the residual.
    Residual,
    /// Row `i % period` of these, if any. The result is written to row `i / period · stride + first + i % period`.
    Position {
        rows: Option<Rows>,
        period: usize,
        stride: usize,
        first: usize,
    },
}

/// Where a linear layer writes its result.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LinearTo {
    Rows(Rows, Add),
    /// For attention.
    Strips(Strips),
    /// For the next product.
    Acts(Acts),
}

/// `to = act(W a + b)`, in a gated layer `act(gate) · value`, plus what [`Add`] says.
pub(crate) struct LinearJob<'a> {
    linear: &'a PackedLinear,
    from: Acts,
    rows: usize,
    act: Option<Activation>,
    to: LinearTo,
}

/// How a job is cut into units, and how a unit runs.
struct Plan {
    /// Rows of a unit.
    block: usize,
    /// Panels of a unit.
    group: usize,
    /// Chunks that a panel multiplies before the unit moves on to the next panel.
    span: usize,
}

impl Plan {
    /// A plan for `rows` rows, `count` panels and `chunks` chunks of each.
    fn new<M: Multiply>(rows: usize, count: usize, chunks: usize, threads: usize) -> Self {
        let tile = M::SHAPE.tile;
        // whole tiles; `even` cuts as few blocks as `most` rows allow
        let rows_of = |blocks: usize| rows.div_ceil(blocks).next_multiple_of(tile);
        let even = |most: usize| rows_of(rows.div_ceil(most).max(1));
        match M::BLOCKING {
            Blocking::Chunks { rows: most, panels } => {
                let block = even(most);
                let blocks = rows.div_ceil(block).max(1);
                // fewer panels per unit if threads would otherwise be idle
                let group = (blocks * count / (2 * threads)).clamp(1, panels);
                Self { block, group, span: M::DEPTH }
            }
            Blocking::Rows { bytes, least, most } => {
                let row = chunks * CHUNK_BYTES * M::SHAPE.elements.planes();
                if rows.min(most) * row <= bytes {
                    return Self { block: even(most), group: 1, span: chunks };
                }
                // at least two units per thread, so that others can take over the work of a slow one; as many panels per
                // unit as possible, because a unit reads its rows once for all of them
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

impl<'a> LinearJob<'a> {
    /// # Panics
    /// If the layer reads or writes outside its views, or its epilogue is a combination for which there is no code.
    pub(crate) fn new(
        linear: &'a PackedLinear,
        from: Acts,
        rows: usize,
        act: Option<Activation>,
        to: LinearTo,
    ) -> Self {
        assert!(from.shape() == linear.shape() && from.contains(rows, linear.k()), "a layer reads outside its input");
        let width = linear.width();
        let inside = match to {
            LinearTo::Acts(acts) => acts.contains(rows, width) && acts.shape().is_written_by(linear.shape()),
            LinearTo::Strips(strips) => strips.contains(rows, width),
            LinearTo::Rows(to, Add::Nothing | Add::Residual) => to.contains(rows, width),
            LinearTo::Rows(to, Add::Position { rows: added, period, stride, first }) => {
                to.contains(rows.div_ceil(period).saturating_sub(1) * stride + first + period.min(rows), width)
                    && added.is_none_or(|added| added.contains(period.min(rows), width))
            }
        };
        assert!(inside, "a layer writes outside its output");
        let job = Self { linear, from, rows, act, to };
        assert!(
            !job.is_bare() || act.is_none() && !linear.gated(),
            "only a layer with neither activation nor gate adds to its result or writes strips"
        );
        job
    }

    /// Whether the job is one of those that have neither activation nor gate.
    fn is_bare(&self) -> bool {
        !matches!(self.to, LinearTo::Acts(_) | LinearTo::Rows(_, Add::Nothing))
    }

    pub(crate) fn linear(&self) -> &'a PackedLinear {
        self.linear
    }

    fn plan<M: Multiply>(&self, threads: usize) -> Plan {
        Plan::new::<M>(self.rows, self.linear.count(), self.linear.chunks(), threads)
    }

    /// Number of independent units. Each value is computed in one unit, in an order that does not depend on the number of
    /// units, so results are the same for any number of threads.
    pub(crate) fn units<M: Multiply>(&self, threads: usize) -> usize {
        let Plan { block, group, .. } = self.plan::<M>(threads);
        self.rows.div_ceil(block) * self.linear.count().div_ceil(group)
    }
}

/// Bytes of scratch that a thread needs for any job.
pub(crate) const fn scratch_bytes<M: Multiply>() -> usize {
    (M::BLOCKING.sums(M::SHAPE.tile) + 16 * M::DEPTH) * M::SHAPE.cols * size_of::<f32>()
}

/// One unit of a job.
///
/// # Safety of [`Op::call`]
/// `scratch` is valid for [`scratch_bytes`] bytes that only this thread uses, the thread has entered the kernel, and no other
/// thread writes the job's input or accesses the part of its output that belongs to this unit.
pub(crate) struct LinearUnit<'a, M> {
    pub(crate) multiply: M,
    pub(crate) job: &'a LinearJob<'a>,
    pub(crate) unit: usize,
    pub(crate) threads: usize,
    pub(crate) scratch: *mut f32,
}

impl<M: Multiply> Op<M::S> for LinearUnit<'_, M> {
    #[inline(always)]
    unsafe fn call(self, s: M::S) {
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
                // SAFETY: `Epilogue::run` is called for rows of this unit whose sums are complete, and the caller promises
                // that nothing else accesses where this unit writes
                let follow = |rows| unsafe { s.run(FinishRows { finish: &finish, rows }) };
                let epilogue = Epilogue::new(&follow);
                for chunk in (start..end).step_by(M::DEPTH) {
                    let chunks = M::DEPTH.min(end - chunk);
                    let (a, a_tile, a_low) = job.from.left(row, chunk);
                    let mut b = linear.panel(panel, chunk);
                    if shape.elements == Elements::Widened {
                        // SAFETY: the panel has these chunks, and the caller's scratch has room for `DEPTH` of them
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
                        follow: (M::FOLLOWS && chunk + chunks == all).then_some(epilogue),
                    };
                    // SAFETY: `LinearJob::new` has checked that `from` contains the rows, in whole tiles, and the chunks,
                    // as the panel does; the assertion above, that the sums fit the caller's scratch
                    unsafe { multiply.product(&product) };
                }
                if !M::FOLLOWS && end == all {
                    // SAFETY: all chunks of the unit's rows are multiplied, and no product has run the epilogue
                    unsafe { epilogue.run(0..rows) };
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
        // SAFETY: the caller's pointers are valid for `len` values, of which this is a whole vector
        unsafe { s.store(to.add(i), s.load_bf16(from.add(i))) };
    }
}

/// An activation. A type instead of a closure, because a closure that is called from several places is not inlined, and then
/// not compiled for the instruction set.
trait Act<S: Simd> {
    fn call(s: S, x: S::F) -> S::F;
}

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
    job: &'a LinearJob<'a>,
    panel: usize,
    /// The unit's first row.
    row: usize,
    sums: *const f32,
}

/// The end of a unit for some of its rows.
///
/// # Safety of [`Op::call`]
/// The sums of these rows are complete, and no other thread accesses where their results are written.
struct FinishRows<'a, M> {
    finish: &'a Finish<'a, M>,
    rows: Range<usize>,
}

impl<M: Multiply> Op<M::S> for FinishRows<'_, M> {
    #[inline(always)]
    unsafe fn call(self, s: M::S) {
        let Self { finish, rows } = self;
        // SAFETY: `run` asks for the same
        unsafe {
            match finish.job.act {
                None if finish.job.is_bare() => finish.run_bare(s, rows),
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

impl<M: Multiply> Finish<'_, M> {
    /// Row by row, everything that follows the product of a layer that adds nothing to its result.
    ///
    /// # Safety
    /// What [`FinishRows`] asks for.
    #[inline(always)]
    unsafe fn run<A: Act<M::S>>(&self, s: M::S, rows: Range<usize>) {
        let (Self { job, row, .. }, shape, lanes) = (*self, M::SHAPE, M::S::LANES);
        let (values, first) = self.values();
        // SAFETY: `LinearJob::new` has checked that `to` contains the job's rows and columns; the caller promises that the sums
        // are complete and that nothing else accesses these rows and columns
        unsafe {
            match (job.to, job.linear.gated()) {
                (LinearTo::Acts(acts), false) => {
                    for i in rows {
                        let to = Self::row_of(acts, row + i);
                        for j in (0..shape.cols).step_by(2 * lanes) {
                            let (x, y) = (values.at::<A, false>(s, i, j), values.at::<A, false>(s, i, j + lanes));
                            to.put_pair(s, first + j, x, y);
                        }
                    }
                }
                (LinearTo::Acts(acts), true) => {
                    for i in rows {
                        let to = Self::row_of(acts, row + i);
                        for j in (0..shape.cols / 2).step_by(lanes) {
                            to.put(s, first + j, values.at::<A, true>(s, i, j));
                        }
                    }
                }
                (LinearTo::Rows(to, _), false) => {
                    for i in rows {
                        let to = to.row(row + i).add(first);
                        for j in (0..shape.cols).step_by(lanes) {
                            s.store(to.add(j), values.at::<A, false>(s, i, j));
                        }
                    }
                }
                (LinearTo::Rows(to, _), true) => {
                    for i in rows {
                        let to = to.row(row + i).add(first);
                        for j in (0..shape.cols / 2).step_by(lanes) {
                            s.store(to.add(j), values.at::<A, true>(s, i, j));
                        }
                    }
                }
                (LinearTo::Strips(_), _) => unreachable!("strips are written by `run_bare`"),
            }
        }
    }

    /// Row by row, everything that follows the product of a layer with neither activation nor gate.
    ///
    /// # Safety
    /// What [`FinishRows`] asks for.
    #[inline(always)]
    unsafe fn run_bare(&self, s: M::S, rows: Range<usize>) {
        let (Self { job, row, .. }, shape, lanes) = (*self, M::SHAPE, M::S::LANES);
        let (values, first) = self.values();
        let columns = || (0..shape.cols).step_by(lanes);
        // SAFETY: `LinearJob::new` has checked that `to` contains the job's rows and columns; the caller promises that the sums
        // are complete and that nothing else accesses these rows and columns
        unsafe {
            match job.to {
                LinearTo::Strips(strips) => {
                    let top = strips.row_of(M::Attention::SHAPE.elements, row, first);
                    for i in rows {
                        let to = top.below(i);
                        for j in (0..shape.cols).step_by(2 * lanes) {
                            let x = values.at::<Identity, false>(s, i, j);
                            to.put_pair(s, j, x, values.at::<Identity, false>(s, i, j + lanes));
                        }
                    }
                }
                LinearTo::Rows(to, Add::Residual) => {
                    for i in rows {
                        let to = to.row(row + i).add(first);
                        for j in columns() {
                            let x = values.at::<Identity, false>(s, i, j);
                            s.store(to.add(j), s.add(x, s.load(to.add(j))));
                        }
                    }
                }
                LinearTo::Rows(to, Add::Position { rows: positions, period, stride, first: first_row }) => {
                    for i in rows {
                        let (image, at) = ((row + i) / period, (row + i) % period);
                        let to = to.row(image * stride + first_row + at).add(first);
                        let position = positions.map(|rows| rows.row(at).add(first));
                        for j in columns() {
                            let x = values.at::<Identity, false>(s, i, j);
                            s.store(to.add(j), position.map_or(x, |position| s.add(x, s.load(position.add(j)))));
                        }
                    }
                }
                LinearTo::Acts(_) | LinearTo::Rows(_, Add::Nothing) => unreachable!("these are written by `run`"),
            }
        }
    }

    /// A row that the job writes: of the kernel's own elements, unless these are integers.
    #[inline(always)]
    fn row_of(acts: Acts, row: usize) -> ActsRow {
        let Shape { tile, elements, .. } = M::SHAPE;
        acts.row_of(tile, if elements == Elements::Int8 { acts.shape().elements } else { elements }, row)
    }

    /// The values of the panel, and the first column that they are written to.
    #[inline(always)]
    fn values(&self) -> (Values<M>, usize) {
        let Self { job, panel, row, sums, .. } = *self;
        // copies, which the compiler knows that no store of a result changes, so they stay in registers
        let scales = Scales { from: job.from, padded: job.linear.padded() };
        let bias = job.linear.bias(panel).cast_const();
        let width = if job.linear.gated() { M::SHAPE.cols / 2 } else { M::SHAPE.cols };
        (Values { _multiply: PhantomData, sums, bias, scales, row }, panel * width)
    }
}

/// The values of a panel, before anything is added.
struct Values<M> {
    _multiply: PhantomData<M>,
    sums: *const f32,
    bias: *const f32,
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
    /// A vector of a row of `act(sum + bias)`, in a gated layer of `act(gate) · value`.
    ///
    /// # Safety
    /// The row's sums are complete, and the vector's columns are inside the panel.
    #[inline(always)]
    unsafe fn at<A: Act<M::S>, const GATED: bool>(self, s: M::S, i: usize, j: usize) -> <M::S as Simd>::F {
        // SAFETY: the caller promises that the row and the columns are inside the sums, and so inside the biases
        unsafe {
            let (sum, bias) = (self.sums.add(i * M::SHAPE.cols + j), self.bias.add(j));
            let x = A::call(s, M::output(s, self.scales, self.row + i, sum, bias));
            if !GATED {
                return x;
            }
            let width = M::SHAPE.cols / 2;
            s.mul(x, M::output(s, self.scales, self.row + i, sum.add(width), bias.add(width)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For many numbers of rows, and for layers from the smallest to those of ViT-giant.
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
        use super::super::multiply::F32;
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
            fits::<int8::tiled::Tiled<amx::Registers>>("amx, int8");
        }
    }
}
