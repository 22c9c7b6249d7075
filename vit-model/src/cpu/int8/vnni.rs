//! Bytes in AVX-512 vectors, whose `vpdpbusd` adds four products to each sum.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::avx512::Avx512;
use super::super::kernel::Integers;
use super::super::multiply::{F32, Multiply, Scales};
use super::super::product::Product;
use super::super::registers::{Ahead, for_each_column, register_tiles};
use super::super::shape::{Elements, Shape};
use super::super::simd::Simd;
use super::super::tiles::Acts;
use super::x86::{output, pack_fours, round_rows};

/// Rows of a register tile.
const TILE: usize = Avx512::<false>::TILE;
/// Columns of one: two vectors.
const COLS: usize = Avx512::<false>::COLS;

/// Proof that the CPU has AVX-512 with VNNI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vnni(Avx512);

impl Vnni {
    /// The proof, if the CPU has them.
    pub(crate) fn detect() -> Option<Self> {
        let avx512 = Avx512::detect()?;
        is_x86_feature_detected!("avx512vnni").then_some(Self(avx512))
    }
}

/// A register tile of `ROWS` rows.
///
/// # Safety
/// The CPU has the features, and the product `ROWS` rows from `first`; otherwise what [`Product`] asks for.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn rows<const ROWS: usize>(p: &Product<'_>, first: usize, ahead: &mut Ahead) {
    // SAFETY: the caller promises the features and the product, whose chunks are 16 fours of each row, and of two runs of 16
    // columns
    unsafe {
        let mut a = p.a_tile(first, TILE).cast::<i32>();
        let mut b = p.b.cast::<__m512i>();
        let c = p.c.add(first * COLS).cast::<i32>();
        let mut sum = [[_mm512_setzero_si512(); 2]; ROWS];
        if p.accumulate {
            for (i, [x, y]) in sum.iter_mut().enumerate() {
                *x = _mm512_loadu_si512(c.add(i * COLS).cast());
                *y = _mm512_loadu_si512(c.add(i * COLS + 16).cast());
            }
        }
        for _ in 0..p.chunks {
            ahead.step();
            for_each_column!(FOUR {
                let (left, right) = (_mm512_loadu_si512(b.add(FOUR).cast()), _mm512_loadu_si512(b.add(16 + FOUR).cast()));
                for (i, [x, y]) in sum.iter_mut().enumerate() {
                    let v = _mm512_set1_epi32(*a.add(i * 16 + FOUR));
                    *x = _mm512_dpbusd_epi32(*x, v, left);
                    *y = _mm512_dpbusd_epi32(*y, v, right);
                }
            });
            a = a.add(TILE * 16);
            b = b.add(32);
        }
        for (i, [x, y]) in sum.iter().enumerate() {
            _mm512_storeu_si512(c.add(i * COLS).cast(), *x);
            _mm512_storeu_si512(c.add(i * COLS + 16).cast(), *y);
        }
    }
}

impl Multiply for Vnni {
    type S = Avx512;
    type Attention = F32<Avx512>;
    const SHAPE: Shape = Shape { elements: Elements::Int8, ..Self::Attention::SHAPE };
    const DEPTH: usize = 12;
    const QUERIES: usize = Self::Attention::QUERIES;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }

    fn attention(self) -> F32<Avx512> {
        F32(self.0)
    }

    #[inline(always)]
    unsafe fn product(self, p: &Product<'_>) {
        // SAFETY: `self` proves the features, and the caller promises the product
        unsafe { register_tiles!(rows[], p, steps: p.chunks, fewer: [1 2 3 4 5 6 7 8 9 10 11], whole: 12) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: `self` proves the features, and the caller promises the same of these pointers
        unsafe { pack_fours(from, stride, chunks, to) }
    }

    #[inline(always)]
    unsafe fn output(_: Avx512, scales: Scales, row: usize, sum: *const f32, bias: *const f32) -> __m512 {
        // SAFETY: the first argument proves the features, and the caller promises the same of these pointers
        unsafe { output(scales, row, sum, bias) }
    }
}

impl Integers for Vnni {
    fn shape(&self) -> Shape {
        Self::SHAPE
    }

    unsafe fn round(&self, from: Acts, to: Acts, rows: Range<usize>) {
        // SAFETY: `self` proves the features, and the caller excludes other threads
        unsafe { round_rows(from, to, rows) }
    }
}
