//! A kernel that multiplies integers in the blocks' linear layers, and floats in everything else.

use super::super::attention::AttentionJob;
use super::super::copy::{CopyRows, Patches};
use super::super::kernel::{Integers, Kernel};
use super::super::linear::LinearJob;
use super::super::multiply::{Entered, Multiply};
use super::super::norm::NormRows;
use super::super::shape::Shape;

/// Two kernels of the same instruction set, of which one multiplies integers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mixed<F, I> {
    pub(crate) floats: F,
    pub(crate) integers: I,
}

impl<F: Multiply, I: Multiply + Integers> Kernel for Mixed<F, I> {
    fn shape(&self) -> Shape {
        F::SHAPE
    }

    fn integers(&self) -> Option<&dyn Integers> {
        Some(&self.integers)
    }

    fn linear_scratch(&self) -> usize {
        self.floats.linear_scratch().max(self.integers.linear_scratch())
    }

    fn attention_scratch(&self, keys: usize, dim: usize) -> usize {
        self.floats.attention_scratch(keys, dim)
    }

    fn strips(&self) -> Option<Shape> {
        self.floats.strips()
    }

    unsafe fn pack(&self, shape: Shape, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: the caller promises the same of these pointers
        unsafe {
            if shape == I::SHAPE {
                self.integers.pack(shape, from, stride, chunks, to);
            } else {
                self.floats.pack(shape, from, stride, chunks, to);
            }
        }
    }

    fn enter(&self) -> Option<Entered> {
        Kernel::enter(&self.floats)
    }

    fn linear_units(&self, job: &LinearJob<'_>, threads: usize) -> usize {
        if job.linear().shape() == I::SHAPE {
            self.integers.linear_units(job, threads)
        } else {
            self.floats.linear_units(job, threads)
        }
    }

    unsafe fn linear(&self, job: &LinearJob<'_>, unit: usize, threads: usize, scratch: *mut f32) {
        // SAFETY: the caller promises the same, with a scratch that is large enough for both kernels
        unsafe {
            if job.linear().shape() == I::SHAPE {
                self.integers.linear(job, unit, threads, scratch);
            } else {
                self.floats.linear(job, unit, threads, scratch);
            }
        }
    }

    unsafe fn attention(&self, job: &AttentionJob<'_>, unit: usize, threads: usize, scratch: *mut f32) {
        // SAFETY: the caller promises the same
        unsafe { Kernel::attention(&self.floats, job, unit, threads, scratch) }
    }

    unsafe fn norm(&self, rows: NormRows<'_>) {
        // SAFETY: the caller promises the same
        unsafe { self.floats.norm(rows) }
    }

    unsafe fn copy(&self, rows: CopyRows) {
        // SAFETY: the caller promises the same
        unsafe { self.floats.copy(rows) }
    }

    unsafe fn patches(&self, patches: Patches<'_>) {
        // SAFETY: the caller promises the same
        unsafe { self.floats.patches(patches) }
    }
}
