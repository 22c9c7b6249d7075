//! AVX-512: sixteen lanes, register tiles of 12 × 32 in f32 and, where the CPU has `vdpbf16ps`, in bf16.

use std::arch::x86_64::*;

use super::erf;
use super::multiply::{F32, Multiply};
use super::product::Product;
use super::registers::{Ahead, for_each_column, register_tiles, tile};
use super::shape::{CHUNK_BYTES, Elements, Shape};
use super::simd::{Op, Simd, lanewise};

/// Rows of a register tile.
const TILE: usize = 12;
/// Columns of one: two vectors.
const COLS: usize = 32;
/// Bytes of a run of columns in a chunk of a panel: sixteen vectors.
pub(crate) const RUN_BYTES: usize = 16 * CHUNK_BYTES;
/// Chunks that a register tile takes at once in bf16. Those of a panel do not fit the first-level cache, but with 12 products
/// per vector the second-level cache is fast enough, and the sums are loaded and stored half as often.
const BF16_DEPTH: usize = 24;

/// Proof that the CPU has AVX-512 F, BW, DQ and VL, and with `DOT` also AVX-512 BF16, which multiplies pairs and rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const DOT: bool = false>(());

/// Proof that the CPU has AVX-512 with BF16.
pub(crate) type Dot = Avx512<true>;

impl<const DOT: bool> Avx512<DOT> {
    /// The proof, if the CPU has them.
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
            && (!DOT || is_x86_feature_detected!("avx512bf16"));
        all.then_some(Self(()))
    }

    /// The proof that includes BF16, if this one does.
    #[inline(always)]
    fn dot(self) -> Option<Dot> {
        if DOT { Some(Avx512(())) } else { None }
    }
}

impl Dot {
    /// Two vectors as bf16, one after the other.
    #[inline(always)]
    pub(crate) fn pair(self, x: __m512, y: __m512) -> __m512i {
        // SAFETY: `self` proves AVX-512 BF16
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(y, x)) }
    }

    /// Two vectors as bf16, one after the other, and with `SPLIT` their rounding errors.
    #[inline(always)]
    pub(crate) fn split<const SPLIT: bool>(self, x: __m512, y: __m512) -> (__m512i, __m512i) {
        let high = self.pair(x, y);
        if !SPLIT {
            return (high, high);
        }
        // SAFETY: `self` proves the features
        unsafe {
            let wide = |half| _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
            let x = _mm512_sub_ps(x, wide(_mm512_castsi512_si256(high)));
            let y = _mm512_sub_ps(y, wide(_mm512_extracti64x4_epi64(high, 1)));
            (high, self.pair(x, y))
        }
    }

    /// Packs a panel of two runs in bf16, or with `SPLIT` in bf16 twice.
    ///
    /// # Safety
    /// What [`Multiply::pack_columns`] asks for.
    #[inline(always)]
    pub(crate) unsafe fn pack_pairs<const SPLIT: bool>(
        self,
        from: *const f32,
        stride: usize,
        chunks: usize,
        to: *mut u8,
    ) {
        for (chunk, run) in (0..chunks).flat_map(|chunk| [(chunk, 0), (chunk, 1)]) {
            // SAFETY: `self` proves the features; run and chunk are inside what the caller's pointers are valid for
            unsafe {
                let from = from.add(run * 16 * stride + chunk * 32);
                let to = to.add((chunk * 2 * if SPLIT { 2 } else { 1 } + run) * RUN_BYTES);
                let (mut high, mut low) = ([_mm512_setzero_si512(); 16], [_mm512_setzero_si512(); 16]);
                for (i, (high, low)) in high.iter_mut().zip(&mut low).enumerate() {
                    let row = from.add(i * stride);
                    (*high, *low) = self.split::<SPLIT>(_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(16)));
                }
                store_transposed(high, to);
                if SPLIT {
                    store_transposed(low, to.add(2 * RUN_BYTES));
                }
            }
        }
    }

    /// Packs a chunk of a panel of two runs, whose rows are rows of a matrix, in bf16 or with `SPLIT` in bf16 twice.
    ///
    /// # Safety
    /// What [`Multiply::pack_rows`] asks for.
    #[inline(always)]
    pub(crate) unsafe fn pack_pairs_of_rows<const SPLIT: bool>(
        self,
        from: *const f32,
        stride: usize,
        rows: usize,
        to: *mut u8,
    ) {
        // SAFETY: `self` proves the features; row, run and pair are inside what the caller's pointers are valid for
        unsafe {
            let pairs = _mm512_loadu_si512(PAIRS.as_ptr().cast());
            for (pair, run) in (0..16).flat_map(|pair| [(pair, 0), (pair, 1)]) {
                let row = |i: usize| {
                    if i < rows { _mm512_loadu_ps(from.add(i * stride + run * 16)) } else { _mm512_setzero_ps() }
                };
                let (high, low) = self.split::<SPLIT>(row(2 * pair), row(2 * pair + 1));
                let to = to.add(run * RUN_BYTES + pair * CHUNK_BYTES);
                _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(pairs, high));
                if SPLIT {
                    _mm512_storeu_si512(to.add(2 * RUN_BYTES).cast(), _mm512_permutexvar_epi16(pairs, low));
                }
            }
        }
    }
}

/// The order that interleaves the values of two rows.
pub(crate) static PAIRS: [u16; 32] = {
    let mut pairs = [0; 32];
    let mut i = 0;
    while i < 32 {
        pairs[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    pairs
};

/// A register tile of `ROWS` rows.
///
/// # Safety
/// The CPU has the features, and the product `ROWS` rows from `first`; otherwise what [`Product`] asks for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn rows<const ROWS: usize>(p: &Product<'_>, first: usize, ahead: &mut Ahead) {
    // SAFETY: the caller guarantees that the CPU has these features, which is all that a value of `Avx512` proves, and that
    // the product is valid
    unsafe { tile::<Avx512, ROWS>(Avx512(()), p, first, Some(ahead)) }
}

/// 16 rows of 16 numbers of 32 bits → its transpose, in memory.
///
/// # Safety
/// The CPU has AVX-512 F; `to` is valid for writing [`RUN_BYTES`].
#[inline(always)]
pub(crate) unsafe fn store_transposed(mut rows: [__m512i; 16], to: *mut u8) {
    // SAFETY: the caller promises AVX-512 F and room for sixteen vectors
    unsafe {
        transpose(&mut rows);
        rows.iter().enumerate().for_each(|(i, &row)| _mm512_storeu_si512(to.add(i * 64).cast(), row));
    }
}

/// 16 rows of 16 numbers of 32 bits → its transpose.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn transpose(rows: &mut [__m512i; 16]) {
    // SAFETY: the caller promises AVX-512 F
    unsafe {
        let mut t = *rows;
        // pairs of rows, then fours, then the quarters of the registers, twice
        for i in (0..16).step_by(2) {
            t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        for i in (0..16).step_by(4) {
            rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for i in 0..4 {
            for half in [0, 8] {
                t[half + i] = _mm512_shuffle_i32x4::<0x88>(rows[half + i], rows[half + i + 4]);
                t[half + i + 4] = _mm512_shuffle_i32x4::<0xdd>(rows[half + i], rows[half + i + 4]);
            }
        }
        for i in 0..8 {
            rows[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]);
            rows[i + 8] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[i + 8]);
        }
    }
}

impl<const DOT: bool> Simd for Avx512<DOT> {
    type F = __m512;
    const LANES: usize = 16;
    const TILE: usize = TILE;
    const BLOCK: usize = 12;
    const COLS: usize = COLS;
    const RUN: usize = 16;
    // as many values of a row as in bf16, so that sums of the usual widths are loaded and stored at most once
    const DEPTH: usize = 2 * BF16_DEPTH;
    const PANELS: usize = 2;
    const STRIPS: bool = true;
    const FOLLOWS: bool = true;

    #[inline(always)]
    unsafe fn run<T: Op<Self>>(self, op: T) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        unsafe fn go<S: Simd, T: Op<S>>(s: S, op: T) {
            // SAFETY: the caller of `run` promises what `op` asks for
            unsafe { op.call(s) }
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
        unsafe fn go_dot<S: Simd, T: Op<S>>(s: S, op: T) {
            // SAFETY: the caller of `run` promises what `op` asks for
            unsafe { op.call(s) }
        }
        // SAFETY: `self` proves the features; the caller promises what `op` asks for
        unsafe { if DOT { go_dot(self, op) } else { go(self, op) } }
    }

    #[inline(always)]
    unsafe fn product(self, p: &Product<'_>) {
        // SAFETY: `self` proves the features, and the caller promises the product
        unsafe { register_tiles!(rows[], p, steps: p.chunks, fewer: [1 2 3 4 5 6 7 8 9 10 11], whole: 12) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        for (chunk, run) in (0..chunks).flat_map(|chunk| [(chunk, 0), (chunk, 1)]) {
            // SAFETY: `self` proves the features; run and chunk are inside what the caller's pointers are valid for
            unsafe {
                let from = from.add(run * 16 * stride + chunk * 16);
                let mut rows = [_mm512_setzero_si512(); 16];
                rows.iter_mut().enumerate().for_each(|(i, row)| *row = _mm512_loadu_si512(from.add(i * stride).cast()));
                store_transposed(rows, to.add((chunk * 2 + run) * RUN_BYTES));
            }
        }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: `self` proves the features, and the caller's pointer is valid for a vector
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m512) {
        // SAFETY: `self` proves the features, and the caller's pointer is valid for a vector
        unsafe { _mm512_storeu_ps(p, x) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        // SAFETY: `self` proves the features, and the caller's pointer is valid for a vector
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())), 16)) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, x: __m512) {
        // SAFETY: `self` proves the features, and the caller's pointer is valid for a vector
        unsafe {
            if DOT {
                let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x));
                return _mm256_storeu_si256(p.cast(), rounded);
            }
            let bits = _mm512_castps_si512(x);
            let odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
        }
    }

    #[inline(always)]
    unsafe fn store_bf16_pair(self, p: *mut u16, x: __m512, y: __m512) {
        // SAFETY: `self` proves the features, and the caller's pointer is valid for both vectors
        unsafe {
            if let Some(dot) = self.dot() {
                _mm512_storeu_si512(p.cast(), dot.pair(x, y));
            } else {
                self.store_bf16(p, x);
                self.store_bf16(p.add(16), y);
            }
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
        // the smaller magnitude, with the sign of the first
        limit(a: __m512, most: __m512) -> _mm512_range_ps::<0b0010>(a, most);
        round(a: __m512) -> _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        scale(p: __m512, n: __m512) -> {
            // not `vscalefps`, which takes ten times as long on some CPUs
            let exponent = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent))
        };
        reciprocal(a: __m512) -> {
            // 14 bits, which one step of Newton's method doubles
            let r = _mm512_rcp14_ps(a);
            _mm512_fmadd_ps(r, _mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0)), r)
        };
        gelu(x: __m512) -> {
            // x/2 + |x| · E(|x|); the last piece is constant, so larger values are moved to its middle
            let size = _mm512_abs_ps(x);
            let at = _mm512_mul_ps(size, _mm512_set1_ps(1.0 / erf::WIDTH));
            let at = _mm512_min_ps(at, _mm512_set1_ps(erf::PIECES as f32 - 0.5));
            let (piece, u) = (_mm512_cvttps_epi32(at), _mm512_reduce_ps::<_MM_FROUND_TO_ZERO>(at));
            let [c0, c1, c2, c3, c4, c5] = &erf::TABLE;
            let mut p = _mm512_permutexvar_ps(piece, _mm512_loadu_ps(c5.as_ptr()));
            for c in [c4, c3, c2, c1, c0] {
                p = _mm512_fmadd_ps(p, u, _mm512_permutexvar_ps(piece, _mm512_loadu_ps(c.as_ptr())));
            }
            _mm512_fmadd_ps(size, p, _mm512_mul_ps(x, _mm512_set1_ps(0.5)))
        };
    }

    #[inline(always)]
    fn fetch_far(self, p: *const u8) {
        // SAFETY: a prefetch is a hint that is valid for every address
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
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

/// bf16 on both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16(pub(crate) Dot);

/// bf16 twice on both sides: three products that together are as exact as f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16x3(pub(crate) Dot);

/// The product of one register tile in bf16: once, or with `SPLIT` high · high + high · low + low · high.
///
/// # Safety
/// The CPU has the features, and the product `ROWS` rows from `first`; otherwise what [`Product`] asks for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn dot_rows<const ROWS: usize, const SPLIT: bool>(p: &Product<'_>, first: usize, ahead: &mut Ahead) {
    // SAFETY: the caller promises the features and the product, whose chunks are 16 pairs of each row, and of two runs of 16
    // columns, once or with `SPLIT` twice
    unsafe {
        let mut a = p.a_tile(first, TILE).cast::<i32>();
        let mut b = p.b.cast::<__m512bh>();
        let c = p.c.add(first * COLS);
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
            ahead.step();
            for_each_column!(PAIR {
                let (left, right) = (load(b.add(PAIR)), load(b.add(16 + PAIR)));
                for (i, [x, y]) in sum.iter_mut().enumerate() {
                    let v = pair(a.add(i * 16 + PAIR));
                    *x = _mm512_dpbf16_ps(*x, v, left);
                    *y = _mm512_dpbf16_ps(*y, v, right);
                }
                if SPLIT {
                    for (i, [x, y]) in sum.iter_mut().enumerate() {
                        let low = pair(a.byte_add(p.a_low).add(i * 16 + PAIR));
                        *x = _mm512_dpbf16_ps(*x, low, left);
                        *y = _mm512_dpbf16_ps(*y, low, right);
                    }
                    let (left, right) = (load(b.add(32 + PAIR)), load(b.add(48 + PAIR)));
                    for (i, [x, y]) in sum.iter_mut().enumerate() {
                        let v = pair(a.add(i * 16 + PAIR));
                        *x = _mm512_dpbf16_ps(*x, v, left);
                        *y = _mm512_dpbf16_ps(*y, v, right);
                    }
                }
            });
            a = a.add(TILE * 16);
            b = b.add(if SPLIT { 64 } else { 32 });
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
/// The CPU has the features of [`Dot`]; otherwise what [`Product`] asks for.
#[inline(always)]
unsafe fn dot<const SPLIT: bool>(p: &Product<'_>) {
    // SAFETY: the caller promises the features and the product
    unsafe { register_tiles!(dot_rows[SPLIT], p, steps: p.chunks, fewer: [1 2 3 4 5 6 7 8 9 10 11], whole: 12) }
}

impl Multiply for Bf16 {
    type S = Dot;
    type Attention = Self;
    const SHAPE: Shape = Shape { elements: Elements::Bf16, tile: TILE, cols: COLS, run: 16 };
    const DEPTH: usize = BF16_DEPTH;
    const QUERIES: usize = TILE;

    #[inline(always)]
    fn simd(self) -> Dot {
        self.0
    }

    fn attention(self) -> Self {
        self
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product<'_>) {
        // SAFETY: `self` proves the features, and the caller promises the product
        unsafe { dot::<false>(product) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: the caller promises the same of these pointers
        unsafe { self.0.pack_pairs::<false>(from, stride, chunks, to) }
    }
    #[inline(always)]
    unsafe fn pack_rows(self, from: *const f32, stride: usize, rows: usize, to: *mut u8) {
        // SAFETY: the caller promises the same of these pointers
        unsafe { self.0.pack_pairs_of_rows::<false>(from, stride, rows, to) }
    }
}

impl Multiply for Bf16x3 {
    type S = Dot;
    type Attention = F32<Dot>;
    const SHAPE: Shape = Shape { elements: Elements::Bf16x3, ..Bf16::SHAPE };
    const DEPTH: usize = BF16_DEPTH;
    const QUERIES: usize = <F32<Dot> as Multiply>::QUERIES;

    #[inline(always)]
    fn simd(self) -> Dot {
        self.0
    }

    fn attention(self) -> F32<Dot> {
        F32(self.0)
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product<'_>) {
        // SAFETY: `self` proves the features, and the caller promises the product
        unsafe { dot::<true>(product) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: the caller promises the same of these pointers
        unsafe { self.0.pack_pairs::<true>(from, stride, chunks, to) }
    }
}
