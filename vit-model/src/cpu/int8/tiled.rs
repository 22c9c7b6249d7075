//! Bytes in AMX tiles, which lie and move as those of bf16 do.

use std::arch::x86_64::__m512;
use std::ops::Range;

use super::super::amx::{self, Tiles};
use super::super::avx512::Dot;
use super::super::kernel::{Entered, Integers};
use super::super::linear::{Blocking, Multiply, Scales};
use super::super::pack::{Acts, Elements, Product, Shape};
use super::x86::{output, pack_fours, round_rows};

/// Tiles that multiply bytes.
#[derive(Debug)]
struct Bytes<T>(T);

impl<T: Tiles> Tiles for Bytes<T> {
    fn enter() -> Option<Entered> {
        T::enter()
    }

    #[inline(always)]
    fn new() -> Self {
        Self(T::new())
    }

    #[inline(always)]
    unsafe fn zero<const R: usize>(&mut self) {
        // SAFETY: the caller's, here and below
        unsafe { self.0.zero::<R>() }
    }

    #[inline(always)]
    unsafe fn load<const R: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the caller's
        unsafe { self.0.load::<R>(from, stride) }
    }

    #[inline(always)]
    unsafe fn load_once<const R: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the caller's
        unsafe { self.0.load_once::<R>(from, stride) }
    }

    #[inline(always)]
    unsafe fn store<const R: usize>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: the caller's
        unsafe { self.0.store::<R>(to, stride) }
    }

    #[inline(always)]
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the caller's
        unsafe { self.0.dot_bytes::<C, A, B>() }
    }

    #[inline(always)]
    unsafe fn dot_bytes<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the caller's
        unsafe { self.0.dot_bytes::<C, A, B>() }
    }

    #[inline(always)]
    fn will_write(p: *const u8) {
        T::will_write(p);
    }
}

/// Products of bytes in tiles.
#[derive(Debug)]
pub(crate) struct Tiled<T> {
    floats: amx::Tiled<T, false>,
    bytes: amx::Tiled<Bytes<T>, false>,
}

impl<T> Tiled<T> {
    /// Over tiles that the caller knows this CPU to have.
    pub(crate) fn new(avx512: Dot) -> Self {
        Self { floats: amx::Tiled::new(avx512), bytes: amx::Tiled::new(avx512) }
    }
}

impl<T> Clone for Tiled<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Tiled<T> {}

impl<T: Tiles + 'static> Multiply for Tiled<T> {
    type S = Dot;
    type Attention = amx::Tiled<T, false>;
    const SHAPE: Shape = Shape { elements: Elements::Int8, ..Self::Attention::SHAPE };
    const DEPTH: usize = Self::Attention::DEPTH;
    const BLOCKING: Blocking = Self::Attention::BLOCKING;
    const QUERIES: usize = Self::Attention::QUERIES;
    const FOLLOWS: bool = Self::Attention::FOLLOWS;

    fn simd(self) -> Dot {
        self.floats.simd()
    }

    fn attention(self) -> Self::Attention {
        self.floats
    }

    unsafe fn product(self, product: &Product<'_>) {
        // SAFETY: the caller's; a chunk of either side is as large in bytes as in bf16
        unsafe { self.bytes.product(product) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: the caller's; `self` proves the features
        unsafe { pack_fours(from, stride, chunks, to) }
    }

    #[inline(always)]
    unsafe fn output(_: Dot, scales: Scales, row: usize, sum: *const f32, bias: *const f32) -> __m512 {
        // SAFETY: the caller's; a `Dot` proves the features
        unsafe { output(scales, row, sum, bias) }
    }
}

impl<T: Tiles + 'static> Integers for Tiled<T> {
    fn shape(&self) -> Shape {
        Self::SHAPE
    }

    fn round(&self, from: Acts, to: Acts, rows: Range<usize>) {
        // SAFETY: `Dot` proves the features; the plan has rows for both
        unsafe { round_rows(from, to, rows) }
    }
}
