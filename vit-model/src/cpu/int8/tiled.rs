//! Bytes in AMX tiles, with the layout and the blocking of bf16.

use std::arch::x86_64::__m512;
use std::ops::Range;

use super::super::amx::{self, Tiles};
use super::super::avx512::Dot;
use super::super::kernel::Integers;
use super::super::multiply::{Blocking, Entered, Multiply, Scales};
use super::super::product::Product;
use super::super::shape::{Elements, Shape};
use super::super::tiles::Acts;
use super::x86::{output, pack_fours, round_rows};

/// Tiles that multiply bytes.
#[derive(Debug)]
struct Bytes<T>(T);

impl<T: Tiles> Tiles for Bytes<T> {
    type Proof = T::BytesProof;
    type BytesProof = T::BytesProof;

    fn vectors(proof: T::BytesProof) -> Dot {
        T::vectors(T::floats(proof))
    }

    fn floats(proof: T::BytesProof) -> T::BytesProof {
        proof
    }

    fn enter(proof: T::BytesProof) -> Option<Entered> {
        T::enter(T::floats(proof))
    }

    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: a proof of `T` follows from the proof of bytes that the caller promises
        Self(unsafe { T::new() })
    }

    #[inline(always)]
    unsafe fn zero<const R: usize>(&mut self) {
        // SAFETY: the caller promises the same of `T`'s tiles
        unsafe { self.0.zero::<R>() }
    }

    #[inline(always)]
    unsafe fn load<const R: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the caller promises the same of `T`'s tiles
        unsafe { self.0.load::<R>(from, stride) }
    }

    #[inline(always)]
    unsafe fn load_once<const R: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the caller promises the same of `T`'s tiles
        unsafe { self.0.load_once::<R>(from, stride) }
    }

    #[inline(always)]
    unsafe fn store<const R: usize>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: the caller promises the same of `T`'s tiles
        unsafe { self.0.store::<R>(to, stride) }
    }

    #[inline(always)]
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the caller promises the same of `T`'s tiles
        unsafe { self.0.dot_bytes::<C, A, B>() }
    }

    #[inline(always)]
    unsafe fn dot_bytes<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the caller promises the same of `T`'s tiles
        unsafe { self.0.dot_bytes::<C, A, B>() }
    }

    #[inline(always)]
    unsafe fn will_write(p: *const u8) {
        // SAFETY: a proof of `T` follows from the proof of bytes that the caller promises
        unsafe { T::will_write(p) };
    }
}

/// Products of bytes in tiles.
#[derive(Debug)]
pub(crate) struct Tiled<T: Tiles>(T::BytesProof);

impl<T: Tiles> Tiled<T> {
    pub(crate) fn new(proof: T::BytesProof) -> Self {
        Self(proof)
    }
}

impl<T: Tiles> Clone for Tiled<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Tiles> Copy for Tiled<T> {}

impl<T: Tiles> Multiply for Tiled<T> {
    type S = Dot;
    type Attention = amx::Tiled<T, false>;
    const SHAPE: Shape = Shape { elements: Elements::Int8, ..Self::Attention::SHAPE };
    const DEPTH: usize = Self::Attention::DEPTH;
    const BLOCKING: Blocking = Self::Attention::BLOCKING;
    const QUERIES: usize = Self::Attention::QUERIES;
    const FOLLOWS: bool = Self::Attention::FOLLOWS;

    fn simd(self) -> Dot {
        self.attention().simd()
    }

    fn attention(self) -> Self::Attention {
        amx::Tiled::new(T::floats(self.0))
    }

    unsafe fn product(self, product: &Product<'_>) {
        // SAFETY: the caller promises the product; a chunk of either side has as many bytes as in bf16
        unsafe { amx::Tiled::<Bytes<T>, false>::new(self.0).product(product) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: `self` proves the features, and the caller promises the same of these pointers
        unsafe { pack_fours(from, stride, chunks, to) }
    }

    #[inline(always)]
    unsafe fn output(_: Dot, scales: Scales, row: usize, sum: *const f32, bias: *const f32) -> __m512 {
        // SAFETY: the first argument proves the features, and the caller promises the same of these pointers
        unsafe { output(scales, row, sum, bias) }
    }
}

impl<T: Tiles> Integers for Tiled<T> {
    fn shape(&self) -> Shape {
        Self::SHAPE
    }

    unsafe fn round(&self, from: Acts, to: Acts, rows: Range<usize>) {
        // SAFETY: `self` proves the features, and the caller excludes other threads
        unsafe { round_rows(from, to, rows) }
    }
}
