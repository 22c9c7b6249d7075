//! A kernel: the operations of a forward pass, compiled for one instruction set and one kind of elements.

use std::ops::Range;

use super::attention::{self, AttentionJob, AttentionUnit};
use super::copy::{CopyRows, Patches};
use super::linear::{self, LinearJob, LinearUnit};
use super::multiply::{Entered, Multiply};
use super::norm::NormRows;
use super::shape::Shape;
use super::simd::{Op, Simd};
use super::tiles::Acts;

/// What the engine asks of a kernel. One call runs one unit of a job; units run on any thread, in any order.
pub(crate) trait Kernel: Send + Sync {
    /// The shape of both sides of the linear layers.
    fn shape(&self) -> Shape;
    /// What the linear layers of the blocks multiply instead, if the kernel has integers.
    fn integers(&self) -> Option<&dyn Integers> {
        None
    }
    /// The shape of both sides of the linear layers of the blocks.
    fn block_shape(&self) -> Shape {
        self.integers().map_or_else(|| self.shape(), Integers::shape)
    }
    /// Bytes of scratch that a thread needs for any linear layer.
    fn linear_scratch(&self) -> usize;
    /// Bytes of scratch that a thread needs for attention over `keys` in heads of `dim`.
    fn attention_scratch(&self, keys: usize, dim: usize) -> usize;
    /// The shape of attention's products, if it can read strips.
    fn strips(&self) -> Option<Shape>;
    /// Packs a panel of weights of this shape, whose columns are rows of a matrix in f32.
    ///
    /// # Safety
    /// `from` is valid for reading a panel's columns as rows of `stride` values, `chunks` chunks of each, `to` for
    /// writing as many chunks of a panel.
    unsafe fn pack(&self, shape: Shape, from: *const f32, stride: usize, chunks: usize, to: *mut u8);
    /// Prepares a thread for a pass, until the result is dropped.
    fn enter(&self) -> Option<Entered>;
    /// Number of independent units of a job.
    fn linear_units(&self, job: &LinearJob<'_>, threads: usize) -> usize;
    /// # Safety
    /// What [`LinearUnit`] asks for, with a scratch of [`linear_scratch`](Self::linear_scratch) bytes.
    unsafe fn linear(&self, job: &LinearJob<'_>, unit: usize, threads: usize, scratch: *mut f32);
    /// # Safety
    /// What [`AttentionUnit`] asks for, with a scratch of [`attention_scratch`](Self::attention_scratch) bytes.
    unsafe fn attention(&self, job: &AttentionJob<'_>, unit: usize, threads: usize, scratch: *mut f32);
    /// # Safety
    /// What [`NormRows`] asks for.
    unsafe fn norm(&self, rows: NormRows<'_>);
    /// # Safety
    /// What [`CopyRows`] asks for.
    unsafe fn copy(&self, rows: CopyRows);
    /// # Safety
    /// What [`Patches`] asks for.
    unsafe fn patches(&self, patches: Patches<'_>);
}

/// Integers, and how activations are rounded to them.
pub(crate) trait Integers: Sync {
    /// The shape of both sides of a linear layer.
    fn shape(&self) -> Shape;
    /// Rounds rows of activations from the shape of the other layers, each to its own scale. The first row is a multiple
    /// of 8.
    ///
    /// # Panics
    /// If one of the views does not contain the rows.
    ///
    /// # Safety
    /// No other thread writes the rows that are read or accesses the rows that are written, both rounded up to eights.
    unsafe fn round(&self, from: Acts, to: Acts, rows: Range<usize>);
}

/// A panel of weights that is packed.
///
/// # Safety of [`Op::call`]
/// What [`Kernel::pack`] asks for.
struct PackPanel<M> {
    multiply: M,
    from: *const f32,
    stride: usize,
    chunks: usize,
    to: *mut u8,
}

impl<M: Multiply> Op<M::S> for PackPanel<M> {
    #[inline(always)]
    unsafe fn call(self, _: M::S) {
        // SAFETY: the caller promises the same of these pointers
        unsafe { self.multiply.pack_columns(self.from, self.stride, self.chunks, self.to) }
    }
}

impl<M: Multiply> Kernel for M {
    fn shape(&self) -> Shape {
        M::SHAPE
    }

    fn linear_scratch(&self) -> usize {
        linear::scratch_bytes::<M>()
    }

    fn attention_scratch(&self, keys: usize, dim: usize) -> usize {
        attention::scratch_bytes::<M::Attention>(keys, dim)
    }

    fn strips(&self) -> Option<Shape> {
        M::Attention::STRIPS.then_some(M::Attention::SHAPE)
    }

    unsafe fn pack(&self, shape: Shape, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        assert_eq!(shape, M::SHAPE);
        // SAFETY: the caller promises what `PackPanel` asks for
        unsafe { self.simd().run(PackPanel { multiply: *self, from, stride, chunks, to }) }
    }

    fn enter(&self) -> Option<Entered> {
        Multiply::enter(*self)
    }

    fn linear_units(&self, job: &LinearJob<'_>, threads: usize) -> usize {
        job.units::<M>(threads)
    }

    unsafe fn linear(&self, job: &LinearJob<'_>, unit: usize, threads: usize, scratch: *mut f32) {
        // SAFETY: the caller promises what `LinearUnit` asks for
        unsafe { self.simd().run(LinearUnit { multiply: *self, job, unit, threads, scratch }) }
    }

    unsafe fn attention(&self, job: &AttentionJob<'_>, unit: usize, threads: usize, scratch: *mut f32) {
        let multiply = Multiply::attention(*self);
        // SAFETY: the caller promises what `AttentionUnit` asks for
        unsafe { self.simd().run(AttentionUnit { multiply, job, unit, threads, scratch }) }
    }

    unsafe fn norm(&self, rows: NormRows<'_>) {
        // SAFETY: the caller promises what `NormRows` asks for
        unsafe { self.simd().run(rows) }
    }

    unsafe fn copy(&self, rows: CopyRows) {
        // SAFETY: the caller promises what `CopyRows` asks for
        unsafe { self.simd().run(rows) }
    }

    unsafe fn patches(&self, patches: Patches<'_>) {
        // SAFETY: the caller promises what `Patches` asks for
        unsafe { self.simd().run(patches) }
    }
}
