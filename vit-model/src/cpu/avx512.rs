//! AVX-512: sixteen lanes, register tiles of 12 × 32 in f32 and, where the CPU has `vdpbf16ps`, in bf16.

use std::arch::x86_64::*;

use super::linear::Multiply;
use super::pack::{Elements, Product, Shape};
use super::simd::{Op, Simd, lanewise, tile};

/// Proof that the CPU has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The proof, where it holds.
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma");
        all.then_some(Self(()))
    }
}

/// A register tile of `ROWS` rows.
///
/// # Safety
/// The CPU has the features; otherwise as [`Product`] says.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn rows<const ROWS: usize>(p: &Product, first: usize) {
    // SAFETY: as the caller says
    unsafe {
        let (a, c) = (p.a_tile(first, Avx512::TILE), p.c.add(first * Avx512::COLS));
        tile::<Avx512, ROWS>(Avx512(()), a.cast(), Avx512::TILE * 16, p.b.cast(), p.chunks, c, p.accumulate);
    }
}

impl Simd for Avx512 {
    type F = __m512;
    const LANES: usize = 16;
    const TILE: usize = 12;
    const BLOCK: usize = 12;
    const COLS: usize = 32;
    const RUN: usize = 16;

    #[inline(always)]
    fn run<T: Op<Self>>(self, op: T) -> T::Out {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        fn go<T: Op<Avx512>>(s: Avx512, op: T) -> T::Out {
            op.call(s)
        }
        // SAFETY: `self` proves the features
        unsafe { go(self, op) }
    }

    #[inline(always)]
    unsafe fn product(self, p: &Product) {
        for first in (0..p.rows).step_by(Self::TILE) {
            // SAFETY: `self` proves the features; the rest is the caller's
            unsafe {
                match p.rows - first {
                    1 => rows::<1>(p, first),
                    2 => rows::<2>(p, first),
                    3 => rows::<3>(p, first),
                    4 => rows::<4>(p, first),
                    5 => rows::<5>(p, first),
                    6 => rows::<6>(p, first),
                    7 => rows::<7>(p, first),
                    8 => rows::<8>(p, first),
                    9 => rows::<9>(p, first),
                    10 => rows::<10>(p, first),
                    11 => rows::<11>(p, first),
                    _ => rows::<12>(p, first),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: `self` proves the features, the caller the pointer
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m512) {
        // SAFETY: as for `load`
        unsafe { _mm512_storeu_ps(p, x) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        // SAFETY: as for `load`
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())), 16)) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, x: __m512) {
        // SAFETY: as for `load`
        unsafe {
            let bits = _mm512_castps_si512(x);
            let odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
        }
    }

    lanewise! { __m512:
        splat(x: f32) -> _mm512_set1_ps(x);
        add(a: __m512, b: __m512) -> _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> _mm512_div_ps(a, b);
        fma(a: __m512, b: __m512, c: __m512) -> _mm512_fmadd_ps(a, b, c);
        max(a: __m512, b: __m512) -> _mm512_max_ps(a, b);
        min(a: __m512, b: __m512) -> _mm512_min_ps(a, b);
        abs(a: __m512) -> _mm512_abs_ps(a);
        round(a: __m512) -> _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        pow2(n: __m512) -> {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))
        };
        if_positive(x: __m512, a: __m512, b: __m512) -> {
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_setzero_ps()), b, a)
        };
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: `self` proves the features
        unsafe { _mm512_reduce_add_ps(a) }
    }

    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        // SAFETY: `self` proves the features
        unsafe { _mm512_reduce_max_ps(a) }
    }
}

/// Proof that the CPU has AVX-512 and its dot products of bf16 pairs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dot(Avx512);

impl Dot {
    /// The proof, where it holds.
    pub(crate) fn detect() -> Option<Self> {
        if is_x86_feature_detected!("avx512bf16") { Avx512::detect().map(Self) } else { None }
    }
}

/// bf16 on both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16(pub(crate) Dot);

/// bf16 twice on both sides: three products, which together are as exact as f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16x3(pub(crate) Dot);

/// The product of one register tile in bf16: once, or (`SPLIT`) high · high + high · low + low · high.
///
/// # Safety
/// The CPU has the features; otherwise as [`Product`] says.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn dot_rows<const ROWS: usize, const SPLIT: bool>(p: &Product, first: usize) {
    // SAFETY: the caller's; a chunk is 16 pairs of each row, and of two runs of 16 columns, once or twice
    unsafe {
        let mut a = p.a_tile(first, Avx512::TILE).cast::<i32>();
        let mut b = p.b.cast::<__m512bh>();
        let c = p.c.add(first * Avx512::COLS);
        let mut sum = [[_mm512_setzero_ps(); 2]; ROWS];
        if p.accumulate {
            for (i, [x, y]) in sum.iter_mut().enumerate() {
                *x = _mm512_loadu_ps(c.add(i * 32));
                *y = _mm512_loadu_ps(c.add(i * 32 + 16));
            }
        }
        let load = |p: *const __m512bh| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.cast()));
        let pair = |p: *const i32| std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*p));
        for _ in 0..p.chunks {
            let mut row = a;
            // one pair a turn: unrolled further, the loads come early and push sums out of the registers
            for _ in 0..16 {
                let (left, right) = (load(b), load(b.add(16)));
                for (i, [x, y]) in sum.iter_mut().enumerate() {
                    let v = pair(row.add(i * 16));
                    *x = _mm512_dpbf16_ps(*x, v, left);
                    *y = _mm512_dpbf16_ps(*y, v, right);
                }
                if SPLIT {
                    for (i, [x, y]) in sum.iter_mut().enumerate() {
                        let low = pair(row.byte_add(p.a_low).add(i * 16));
                        *x = _mm512_dpbf16_ps(*x, low, left);
                        *y = _mm512_dpbf16_ps(*y, low, right);
                    }
                    let (left, right) = (load(b.add(32)), load(b.add(48)));
                    for (i, [x, y]) in sum.iter_mut().enumerate() {
                        let v = pair(row.add(i * 16));
                        *x = _mm512_dpbf16_ps(*x, v, left);
                        *y = _mm512_dpbf16_ps(*y, v, right);
                    }
                }
                row = row.add(1);
                b = b.add(1);
            }
            a = a.add(Avx512::TILE * 16);
            b = b.add(if SPLIT { 48 } else { 16 });
        }
        for (i, [x, y]) in sum.iter().enumerate() {
            _mm512_storeu_ps(c.add(i * 32), *x);
            _mm512_storeu_ps(c.add(i * 32 + 16), *y);
        }
    }
}

/// Every register tile of a product.
///
/// # Safety
/// As for [`dot_rows`].
#[inline(always)]
unsafe fn dot<const SPLIT: bool>(p: &Product) {
    for first in (0..p.rows).step_by(Avx512::TILE) {
        // SAFETY: the caller's
        unsafe {
            match p.rows - first {
                1 => dot_rows::<1, SPLIT>(p, first),
                2 => dot_rows::<2, SPLIT>(p, first),
                3 => dot_rows::<3, SPLIT>(p, first),
                4 => dot_rows::<4, SPLIT>(p, first),
                5 => dot_rows::<5, SPLIT>(p, first),
                6 => dot_rows::<6, SPLIT>(p, first),
                7 => dot_rows::<7, SPLIT>(p, first),
                8 => dot_rows::<8, SPLIT>(p, first),
                9 => dot_rows::<9, SPLIT>(p, first),
                10 => dot_rows::<10, SPLIT>(p, first),
                11 => dot_rows::<11, SPLIT>(p, first),
                _ => dot_rows::<12, SPLIT>(p, first),
            }
        }
    }
}

impl Multiply for Bf16 {
    type S = Avx512;
    const SHAPE: Shape = Shape { elements: Elements::Bf16, tile: Avx512::TILE, cols: Avx512::COLS, run: Avx512::RUN };
    const DEPTH: usize = 12;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0.0
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product) {
        // SAFETY: `self` proves the features; the rest is the caller's
        unsafe { dot::<false>(product) }
    }
}

impl Multiply for Bf16x3 {
    type S = Avx512;
    const SHAPE: Shape = Shape { elements: Elements::Bf16x3, ..Bf16::SHAPE };
    const DEPTH: usize = 6;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0.0
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product) {
        // SAFETY: `self` proves the features; the rest is the caller's
        unsafe { dot::<true>(product) }
    }
}
