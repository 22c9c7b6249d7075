//! What kernels of integers share: the other layers' floats, rounding, and what follows a product.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::attention;
use super::super::avx512::{RUN_BYTES, store_transposed};
use super::super::kernel::{CopyRows, Entered, Integers, Kernel, Patches};
use super::super::linear::{self, Multiply, Scales};
use super::super::norm::NormRows;
use super::super::pack::{Acts, CHUNK_BYTES, Elements, Shape};
use super::{MAGIC, Scale};

/// A kernel that multiplies integers in the blocks' linear layers.
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
        // SAFETY: the caller's
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

    fn linear_units(&self, job: &linear::Job<'_>, threads: usize) -> usize {
        if job.linear.shape() == I::SHAPE {
            self.integers.linear_units(job, threads)
        } else {
            self.floats.linear_units(job, threads)
        }
    }

    fn linear(&self, job: &linear::Job<'_>, unit: usize, threads: usize, scratch: *mut f32) {
        if job.linear.shape() == I::SHAPE {
            self.integers.linear(job, unit, threads, scratch);
        } else {
            self.floats.linear(job, unit, threads, scratch);
        }
    }

    fn attention(&self, job: &attention::Job<'_>, unit: usize, threads: usize, scratch: *mut f32) {
        Kernel::attention(&self.floats, job, unit, threads, scratch);
    }

    fn norm(&self, rows: NormRows<'_>) {
        self.floats.norm(rows);
    }

    fn copy(&self, rows: CopyRows) {
        self.floats.copy(rows);
    }

    fn patches(&self, patches: Patches<'_>) {
        self.floats.patches(patches);
    }
}

/// What a product in integers left at `sum` → the layer's output.
///
/// # Safety
/// As [`Multiply::output`] says; the CPU has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn output(scales: Scales, row: usize, sum: *const f32, bias: *const f32) -> __m512 {
    // SAFETY: the caller's
    unsafe {
        let (Scale { step, least }, padded) = (*scales.from.scale(row), scales.padded);
        let steps = _mm512_loadu_ps(bias.add(padded));
        let weights = _mm512_loadu_ps(bias.add(2 * padded));
        let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sum.cast())), steps);
        let bias = _mm512_fmadd_ps(weights, _mm512_set1_ps(least), _mm512_loadu_ps(bias));
        _mm512_fmadd_ps(sum, _mm512_set1_ps(step), bias)
    }
}

/// Packs a panel of two runs in bytes, of integers in f32.
///
/// # Safety
/// As for [`Multiply::pack_columns`]; inlined where AVX-512 F is switched on.
#[inline(always)]
pub(super) unsafe fn pack_fours(from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
    for (chunk, run) in (0..chunks).flat_map(|chunk| [(chunk, 0), (chunk, 1)]) {
        // SAFETY: the caller's
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
/// # Safety
/// The CPU has the features; both sides have the rows, in tiles of as many, and as many columns. No other thread touches
/// the eights of rows that these are in, where tiles are whole eights, else the fours.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn round_rows(from: Acts, to: Acts, rows: Range<usize>) {
    debug_assert!(from.shape().tile == to.shape().tile && to.shape().elements == Elements::Int8);
    let bf16 = from.shape().elements == Elements::Bf16;
    let eights = bf16 && to.shape().tile.is_multiple_of(8);
    let at_once = if eights { 8 } else { 4 };
    debug_assert!(rows.start.is_multiple_of(at_once) && to.shape().tile.is_multiple_of(at_once));
    for first in rows.step_by(at_once) {
        let (from, scales, to) = (Group::new(from, first), to.scale(first), Group::new(to, first));
        // SAFETY: the caller's; a tile is whole in memory, even where it has fewer rows
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

/// Rows beside each other in a tile. Several are read at once, as they come in memory: the chunks of one alone are as far
/// apart as would be put in a few sets of the cache.
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

    /// A chunk of a row; zeros behind the last.
    ///
    /// # Safety
    /// The CPU has AVX-512 F; the row is alive.
    #[inline(always)]
    unsafe fn chunk(self, i: usize, row: usize) -> __m512i {
        // SAFETY: the caller's
        unsafe {
            if i < self.chunks {
                _mm512_loadu_si512(self.start.add(i * self.step + row * CHUNK_BYTES).cast())
            } else {
                _mm512_setzero_si512()
            }
        }
    }
}

/// Rows of bf16. Their bits, but for the sign, are in their order, infinity and NaN above all: the largest bits are, read
/// with a sign, the largest number's, and without one the smallest's, where there is one above or below zero.
///
/// # Safety
/// As [`round_rows`] says.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn round_bf16<const N: usize>(from: Group, to: Group, scales: &mut [Scale; N]) {
    // SAFETY: the caller's
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
        // bits of `a` where the mask has them, else of `b`
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

/// Rows of f32, as [`round_bf16`] does it.
///
/// # Safety
/// As [`round_rows`] says.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn round_f32(from: Group, to: Group, scales: &mut [Scale; 4]) {
    // SAFETY: the caller's
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

/// Of the bits of the smallest number, if that is negative, and of the largest.
fn scale(low: u32, high: u32) -> (Scale, f32, i32) {
    Scale::new(if low >> 31 == 1 { f32::from_bits(low) } else { 0.0 }, f32::from_bits(high))
}
