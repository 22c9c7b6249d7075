//! AVX2 with FMA: eight lanes, register tiles of 6 × 16.

use std::arch::x86_64::*;

use super::math;
use super::product::Product;
use super::registers::{Ahead, register_tiles, tile};
use super::simd::{Op, Simd, lanewise};

/// Proof that the CPU has AVX2 and FMA.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof, if the CPU has them.
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }
}

/// A register tile of `ROWS` rows.
///
/// # Safety
/// The CPU has AVX2 and FMA, and the product `ROWS` rows from `first`; otherwise what [`Product`] asks for.
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const ROWS: usize>(p: &Product<'_>, first: usize, ahead: &mut Ahead) {
    // SAFETY: the caller guarantees that the CPU has AVX2 and FMA, which is all that a value of `Avx2` proves, and that the
    // product is valid
    unsafe {
        // once per tile, which is short; prefetching with every chunk would cost more than it saves
        ahead.step();
        tile::<Avx2, ROWS>(Avx2(()), p, first, None);
    }
}

/// Eight rows of eight → its transpose.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn transpose(rows: &mut [__m256; 8]) {
    // SAFETY: the caller promises AVX2
    unsafe {
        let mut t = *rows;
        // pairs of rows, then fours, then the halves of the registers
        for i in (0..8).step_by(2) {
            t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        }
        for i in (0..8).step_by(4) {
            rows[i] = _mm256_shuffle_ps::<0x44>(t[i], t[i + 2]);
            rows[i + 1] = _mm256_shuffle_ps::<0xee>(t[i], t[i + 2]);
            rows[i + 2] = _mm256_shuffle_ps::<0x44>(t[i + 1], t[i + 3]);
            rows[i + 3] = _mm256_shuffle_ps::<0xee>(t[i + 1], t[i + 3]);
        }
        for i in 0..4 {
            let (top, bottom) = (rows[i], rows[i + 4]);
            rows[i] = _mm256_permute2f128_ps::<0x20>(top, bottom);
            rows[i + 4] = _mm256_permute2f128_ps::<0x31>(top, bottom);
        }
    }
}

impl Simd for Avx2 {
    type F = __m256;
    const LANES: usize = 8;
    const TILE: usize = 6;
    const BLOCK: usize = 6;
    const COLS: usize = 16;
    const RUN: usize = 8;
    const STRIPS: bool = true;

    #[inline(always)]
    unsafe fn run<T: Op<Self>>(self, op: T) {
        #[target_feature(enable = "avx2,fma")]
        unsafe fn go<T: Op<Avx2>>(s: Avx2, op: T) {
            // SAFETY: the caller of `run` promises what `op` asks for
            unsafe { op.call(s) }
        }
        // SAFETY: `self` proves the features; the caller promises what `op` asks for
        unsafe { go(self, op) }
    }

    #[inline(always)]
    unsafe fn product(self, p: &Product<'_>) {
        // SAFETY: `self` proves the features, and the caller promises the product
        unsafe { register_tiles!(rows[], p, steps: 1, fewer: [1 2 3 4 5], whole: 6) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // both halves of a chunk's values, for both runs of eight columns
        for (chunk, run, half) in
            (0..chunks).flat_map(|chunk| [(chunk, 0, 0), (chunk, 0, 1), (chunk, 1, 0), (chunk, 1, 1)])
        {
            // SAFETY: `self` proves the features; run, chunk and half are inside what the caller's pointers are valid for
            unsafe {
                let from = from.add(run * 8 * stride + chunk * 16 + half * 8);
                let mut rows = [_mm256_setzero_ps(); 8];
                rows.iter_mut().enumerate().for_each(|(i, row)| *row = _mm256_loadu_ps(from.add(i * stride)));
                transpose(&mut rows);
                let to = to.cast::<f32>().add(((chunk * 2 + run) * 2 + half) * 64);
                rows.iter().enumerate().for_each(|(i, &row)| _mm256_storeu_ps(to.add(i * 8), row));
            }
        }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: `self` proves the features, and the caller's pointer is valid for a vector
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m256) {
        // SAFETY: `self` proves the features, and the caller's pointer is valid for a vector
        unsafe { _mm256_storeu_ps(p, x) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m256 {
        // SAFETY: `self` proves the features, and the caller's pointer is valid for a vector
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())), 16)) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, x: __m256) {
        // SAFETY: `self` proves the features, and the caller's pointer is valid for a vector
        unsafe {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            let high = _mm256_srli_epi32(rounded, 16);
            let packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000);
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed));
        }
    }

    lanewise! { __m256:
        splat(x: f32) -> _mm256_set1_ps(x);
        add(a: __m256, b: __m256) -> _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> _mm256_div_ps(a, b);
        fma(a: __m256, b: __m256, c: __m256) -> _mm256_fmadd_ps(a, b, c);
        max(a: __m256, b: __m256) -> _mm256_max_ps(a, b);
        min(a: __m256, b: __m256) -> _mm256_min_ps(a, b);
        round(a: __m256) -> _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        scale(p: __m256, n: __m256) -> {
            let exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent))
        };
    }

    #[inline(always)]
    fn gelu(self, x: __m256) -> __m256 {
        math::gelu(self, x)
    }

    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        // SAFETY: `self` proves the features
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)))
        }
    }

    #[inline(always)]
    fn largest(self, a: __m256) -> f32 {
        // SAFETY: `self` proves the features
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)))
        }
    }
}
