//! A kernel: the handful of operations of a forward pass, compiled for one instruction set and one kind of elements.

use super::attention;
use super::linear::{self, Multiply};
use super::norm::NormRows;
use super::pack::{Acts, Rows, Shape};
use super::simd::{Op, Simd};

/// What the engine asks of a kernel. One unit of a job is one call; units run on any thread, in any order.
pub(crate) trait Kernel: Send + Sync {
    /// How both sides of the linear layers lie in memory.
    fn shape(&self) -> Shape;
    /// What the linear layers of the blocks multiply instead, if anything.
    fn integers(&self) -> Option<&dyn Integers> {
        None
    }
    /// Bytes of scratch that a thread needs for any linear layer.
    fn linear_scratch(&self) -> usize;
    /// Bytes of scratch that a thread needs for attention over `keys` in heads of `dim`.
    fn attention_scratch(&self, keys: usize, dim: usize) -> usize;
    /// How attention's products lie in memory, if it reads strips where heads are whole ones.
    fn strips(&self) -> Option<Shape>;
    /// Packs a panel of weights of this shape, whose columns are rows of a matrix in f32.
    ///
    /// # Safety
    /// `from` is valid for reading a panel's columns as rows of `stride` values, `chunks` chunks of each, `to` for
    /// writing as many chunks of a panel.
    unsafe fn pack(&self, shape: Shape, from: *const f32, stride: usize, chunks: usize, to: *mut u8);
    /// Prepares a thread for a pass; the answer undoes it when dropped.
    fn enter(&self) -> Option<Entered>;
    /// Independent parts of a linear job.
    fn linear_units(&self, job: &linear::Job<'_>, threads: usize) -> usize;
    fn linear(&self, job: &linear::Job<'_>, unit: usize, threads: usize, scratch: *mut f32);
    fn attention(&self, job: &attention::Job<'_>, unit: usize, threads: usize, scratch: *mut f32);
    fn norm(&self, rows: NormRows<'_>);
    fn copy(&self, rows: CopyRows);
    fn patches(&self, patches: Patches<'_>);
}

/// Integers, and how activations become such.
pub(crate) trait Integers: Sync {
    /// How both sides of a linear layer lie in memory.
    fn shape(&self) -> Shape;
    /// Rounds rows of activations as the other layers have them, each to its own scale; the first is a multiple of 8.
    fn round(&self, from: Acts, to: Acts, rows: std::ops::Range<usize>);
}

/// How the linear layers of the blocks lie in memory.
pub(crate) fn block_shape(kernel: &dyn Kernel) -> Shape {
    kernel.integers().map_or_else(|| kernel.shape(), Integers::shape)
}

/// A thread's state for a pass, given back when dropped.
pub(crate) struct Entered(pub(crate) fn());

impl Drop for Entered {
    fn drop(&mut self) {
        (self.0)();
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
        debug_assert_eq!(shape, M::SHAPE);
        self.simd().run(linear::Packing { multiply: *self, from, stride, chunks, to });
    }

    fn enter(&self) -> Option<Entered> {
        Multiply::enter(*self)
    }

    fn linear_units(&self, job: &linear::Job<'_>, threads: usize) -> usize {
        job.units::<M>(threads)
    }

    fn linear(&self, job: &linear::Job<'_>, unit: usize, threads: usize, scratch: *mut f32) {
        self.simd().run(linear::Unit { multiply: *self, job, unit, threads, scratch });
    }

    fn attention(&self, job: &attention::Job<'_>, unit: usize, threads: usize, scratch: *mut f32) {
        self.simd().run(attention::Unit { multiply: Multiply::attention(*self), job, unit, threads, scratch });
    }

    fn norm(&self, rows: NormRows<'_>) {
        self.simd().run(rows);
    }

    fn copy(&self, rows: CopyRows) {
        self.simd().run(rows);
    }

    fn patches(&self, patches: Patches<'_>) {
        self.simd().run(patches);
    }
}

/// f32 rows → tiles.
pub(crate) struct CopyRows {
    /// Row `i · step + first` goes to row `i`.
    pub(crate) from: Rows,
    pub(crate) step: usize,
    pub(crate) first: usize,
    pub(crate) rows: std::ops::Range<usize>,
    pub(crate) dim: usize,
    pub(crate) to: Acts,
}

impl<S: Simd> Op<S> for CopyRows {
    type Out = ();

    #[inline(always)]
    fn call(self, s: S) {
        for i in self.rows.clone() {
            // SAFETY: the plan's rows are inside their buffers, and each is one unit's
            unsafe {
                let from = std::slice::from_raw_parts(self.from.row(i * self.step + self.first), self.dim);
                self.to.row(i).put_run(s, 0, from);
            }
        }
    }
}

/// One row of patches of one image → as many rows of tiles: `[C, h, w] → [columns, C · ph · pw]`.
pub(crate) struct Patches<'a> {
    /// The image, channel by channel.
    pub(crate) pixels: &'a [f32],
    pub(crate) image_size: [usize; 2],
    pub(crate) patch_size: [usize; 2],
    /// Which row of patches.
    pub(crate) grid_row: usize,
    /// Its first row in `to`.
    pub(crate) first: usize,
    /// Scratch for one patch.
    pub(crate) patch: *mut f32,
    pub(crate) to: Acts,
}

impl<S: Simd> Op<S> for Patches<'_> {
    type Out = ();

    #[inline(always)]
    fn call(self, s: S) {
        let ([height, width], [ph, pw]) = (self.image_size, self.patch_size);
        let channels = self.pixels.len() / (height * width);
        // SAFETY: the scratch has room for a patch, and is this thread's own
        let patch = unsafe { std::slice::from_raw_parts_mut(self.patch, channels * ph * pw) };
        for column in 0..width / pw {
            for (i, run) in patch.chunks_exact_mut(pw).enumerate() {
                let (channel, y) = (i / ph, self.grid_row * ph + i % ph);
                run.copy_from_slice(&self.pixels[(channel * height + y) * width + column * pw..][..pw]);
            }
            // SAFETY: the plan has a row for every patch, and this row of patches is one unit's
            unsafe { self.to.row(self.first + column).put_run(s, 0, patch) };
        }
    }
}
