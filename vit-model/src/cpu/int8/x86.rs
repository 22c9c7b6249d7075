//! The operations that kernels of integers share: packing, rounding, and the output of a product.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::avx512::{RUN_BYTES, store_transposed};
use super::super::multiply::Scales;
use super::super::scale::{MAGIC, Scale};
use super::super::shape::{CHUNK_BYTES, Elements};
use super::super::tiles::Acts;

/// A vector of a layer's output from the integer sums of its product.
///
/// # Safety
/// The CPU has AVX-512 F; otherwise what [`Multiply::output`](super::super::multiply::Multiply::output) asks for.
#[inline(always)]
pub(super) unsafe fn output(scales: Scales, row: usize, sum: *const f32, bias: *const f32) -> __m512 {
    // SAFETY: the caller promises the features, the row's scale, and a vector of sums, biases, scales and column sums
    unsafe {
        let (Scale { step, least }, padded) = (*scales.from.scale(row), scales.padded);
        let steps = _mm512_loadu_ps(bias.add(padded));
        let weights = _mm512_loadu_ps(bias.add(2 * padded));
        let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sum.cast())), steps);
        let bias = _mm512_fmadd_ps(weights, _mm512_set1_ps(least), _mm512_loadu_ps(bias));
        _mm512_fmadd_ps(sum, _mm512_set1_ps(step), bias)
    }
}

/// Packs a panel of two runs in bytes, from integers in f32.
///
/// # Safety
/// The CPU has AVX-512 F; otherwise what [`Multiply::pack_columns`](super::super::multiply::Multiply::pack_columns) asks for.
#[inline(always)]
pub(super) unsafe fn pack_fours(from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
    for (chunk, run) in (0..chunks).flat_map(|chunk| [(chunk, 0), (chunk, 1)]) {
        // SAFETY: the caller promises the features; run and chunk are inside what its pointers are valid for
        unsafe {
            let from = from.add(run * 16 * stride + chunk * 64);
            let fours = |row: usize, at: usize| {
                _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_loadu_ps(from.add(row * stride + at * 16))))
            };
            let mut rows = [_mm512_setzero_si512(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_castsi128_si512(fours(i, 0));
                *row = _mm512_inserti32x4::<1>(*row, fours(i, 1));
                *row = _mm512_inserti32x4::<2>(*row, fours(i, 2));
                *row = _mm512_inserti32x4::<3>(*row, fours(i, 3));
            }
            store_transposed(rows, to.add((chunk * 2 + run) * RUN_BYTES));
        }
    }
}

/// Rows of floats → rows of bytes, and their scales.
///
/// # Panics
/// If one of the views does not contain the rows.
///
/// # Safety
/// The CPU has the features. No other thread accesses the groups of eight rows of `to` that these rows are in, or writes those
/// of `from`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn round_rows(from: Acts, to: Acts, rows: Range<usize>) {
    debug_assert!(from.shape().tile == to.shape().tile && to.shape().elements == Elements::Int8);
    let bf16 = from.shape().elements == Elements::Bf16;
    let eights = bf16 && to.shape().tile.is_multiple_of(8);
    let at_once = if eights { 8 } else { 4 };
    assert!(from.contains(rows.end, 0) && to.contains(rows.end, 0), "rows are rounded outside their views");
    debug_assert!(rows.start.is_multiple_of(at_once) && to.shape().tile.is_multiple_of(at_once));
    for first in rows.step_by(at_once) {
        let (from, scales, to) = (Group::new(from, first), to.scale(first), Group::new(to, first));
        // SAFETY: the caller promises the features and excludes other threads; the views contain the rows, as was checked above,
        // in whole tiles, so in whole groups
        unsafe {
            if eights {
                round_bf16::<8>(from, to, &mut *scales.cast());
            } else if bf16 {
                round_bf16::<4>(from, to, &mut *scales.cast());
            } else {
                round_f32(from, to, &mut *scales.cast());
            }
        }
    }
}

/// Adjacent rows of a tile. Several are read at once in the order of memory, because the chunks of one row are so far apart
/// that they would share a few sets of the cache.
#[derive(Clone, Copy)]
struct Group {
    start: *mut u8,
    /// Bytes from a chunk to the next.
    step: usize,
    chunks: usize,
}

impl Group {
    fn new(acts: Acts, first: usize) -> Self {
        let tile = acts.shape().tile;
        let start = acts.left(first, 0).0.cast_mut().wrapping_add(first % tile * CHUNK_BYTES);
        Self { start, step: tile * CHUNK_BYTES, chunks: acts.chunks() }
    }

    /// A chunk of a row; zeros after the last.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, and the row is in memory that is valid for reading.
    #[inline(always)]
    unsafe fn chunk(self, i: usize, row: usize) -> __m512i {
        // SAFETY: the caller promises the features and the row, which has `chunks` chunks
        unsafe {
            if i < self.chunks {
                _mm512_loadu_si512(self.start.add(i * self.step + row * CHUNK_BYTES).cast())
            } else {
                _mm512_setzero_si512()
            }
        }
    }
}

/// Rounds rows of bf16. Apart from the sign, the bits of floats are ordered as their values, with infinity and NaN at the end.
/// So the largest bits as signed integers are those of the largest number, if any is positive, and the largest as unsigned
/// integers those of the smallest, if any is negative.
///
/// # Safety
/// What [`round_rows`] asks for, of these groups of `N` rows.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn round_bf16<const N: usize>(from: Group, to: Group, scales: &mut [Scale; N]) {
    // SAFETY: the caller promises the features and both groups of rows, whose chunks are counted by `chunks`
    unsafe {
        let mut ends = [[_mm512_setzero_si512(); 2]; N];
        for i in 0..from.chunks {
            for (row, [low, high]) in ends.iter_mut().enumerate() {
                let x = from.chunk(i, row);
                (*low, *high) = (_mm512_max_epu16(*low, x), _mm512_max_epi16(*high, x));
            }
        }
        let mut factors = [(0f32, 0i8); N];
        for ((factor, to), [low, high]) in factors.iter_mut().zip(scales).zip(ends) {
            let low = _mm512_reduce_max_epu32(_mm512_max_epu16(low, _mm512_slli_epi32::<16>(low)));
            let high = _mm512_reduce_max_epi32(_mm512_max_epi16(high, _mm512_slli_epi32::<16>(high)));
            let (scale, inverse, off) = scale(low & 0xffff_0000, high as u32 & 0xffff_0000);
            (*to, *factor) = (scale, (inverse, off as i8));
        }
        let magic = _mm512_set1_ps(MAGIC);
        let (byte, word) = (_mm512_set1_epi32(0xff), _mm512_set1_epi32(0xffff));
        let order = std::array::from_fn::<u16, 32, _>(|i| (i % 16 * 2 + i / 16) as u16);
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        // bits of `a` where the mask has ones, and of `b` elsewhere
        let select = |mask, a, b| _mm512_ternarylogic_epi32::<0xca>(mask, a, b);
        for i in 0..to.chunks {
            for (row, &(inverse, off)) in factors.iter().enumerate() {
                let inverse = _mm512_set1_ps(inverse);
                let round = |x| _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(x), inverse, magic));
                let pairs = |x| {
                    let (even, odd) = (round(_mm512_slli_epi32::<16>(x)), round(_mm512_andnot_si512(word, x)));
                    select(byte, even, _mm512_slli_epi32::<8>(odd))
                };
                let (low, high) = (pairs(from.chunk(2 * i, row)), pairs(from.chunk(2 * i + 1, row)));
                let mixed = select(word, low, _mm512_slli_epi32::<16>(high));
                let bytes = _mm512_sub_epi8(_mm512_permutexvar_epi16(order, mixed), _mm512_set1_epi8(off));
                _mm512_storeu_si512(to.start.add(i * to.step + row * CHUNK_BYTES).cast(), bytes);
            }
        }
    }
}

/// Rounds rows of f32 as [`round_bf16`] does.
///
/// # Safety
/// What [`round_rows`] asks for, of these groups of four rows.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn round_f32(from: Group, to: Group, scales: &mut [Scale; 4]) {
    // SAFETY: the caller promises the features and both groups of rows, whose chunks are counted by `chunks`
    unsafe {
        let mut ends = [[_mm512_setzero_si512(); 2]; 4];
        for i in 0..from.chunks {
            for (row, [low, high]) in ends.iter_mut().enumerate() {
                let x = from.chunk(i, row);
                (*low, *high) = (_mm512_max_epu32(*low, x), _mm512_max_epi32(*high, x));
            }
        }
        let mut factors = [(0f32, 0i32); 4];
        for ((factor, to), [low, high]) in factors.iter_mut().zip(scales).zip(ends) {
            let (scale, inverse, off) = scale(_mm512_reduce_max_epu32(low), _mm512_reduce_max_epi32(high) as u32);
            (*to, *factor) = (scale, (inverse, off));
        }
        let magic = _mm512_set1_ps(MAGIC);
        for i in 0..4 * to.chunks {
            for (row, &(inverse, off)) in factors.iter().enumerate() {
                let x = _mm512_castsi512_ps(from.chunk(i, row));
                let bytes = _mm512_castps_si512(_mm512_fmadd_ps(x, _mm512_set1_ps(inverse), magic));
                let bytes = _mm512_cvtepi32_epi8(_mm512_sub_epi32(bytes, _mm512_set1_epi32(off)));
                _mm_storeu_si128(to.start.add(i / 4 * to.step + row * CHUNK_BYTES + i % 4 * 16).cast(), bytes);
            }
        }
    }
}

/// The scale for the bits of the smallest number, if it is negative, and of the largest.
fn scale(low: u32, high: u32) -> (Scale, f32, i32) {
    Scale::new(if low >> 31 == 1 { f32::from_bits(low) } else { 0.0 }, f32::from_bits(high))
}
