//! What a kernel needs from an instruction set: a vector of f32, and on top of it the functions of a ViT.
//!
//! A value of a type that implements [`Simd`] is the proof that the CPU has the instructions: only `detect` makes one.
//! Generic code is written once over `Simd`, forced inline into [`Simd::run`], and compiled there with the instruction
//! set switched on.

// constants stand as they were published
#![allow(clippy::excessive_precision)]

use super::pack::{Elements, Product, Shape, pack_panel};

/// A computation that is to be compiled for an instruction set.
pub(crate) trait Op<S: Simd> {
    /// What it answers.
    type Out;
    /// Runs it; implementations are `#[inline(always)]`.
    fn call(self, s: S) -> Self::Out;
}

/// An instruction set: a vector of f32, and the product of a block of rows with a panel of columns.
///
/// Pointers that are loaded from and stored to need no alignment, but must be valid for the whole vector.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// A vector of f32.
    type F: Copy;
    /// Its length.
    const LANES: usize;
    /// Rows that the product holds in registers, and so the rows of a tile of its left side in memory.
    const TILE: usize;
    /// Rows that attention takes at once.
    const BLOCK: usize;
    /// Columns of a panel.
    const COLS: usize;
    /// Columns of a panel that stand side by side in memory; the next run follows 16 rows later.
    const RUN: usize;
    /// Chunks that a register tile of the product in f32 takes at once.
    const DEPTH: usize = 12;
    /// Panels that the product in f32 goes through before it comes to the next chunks.
    const PANELS: usize = 4;
    /// Whether the product calls what follows it, after each register tile, whose sums are then near.
    const FOLLOWS: bool = false;
    /// Whether the product finds its left side in strips, too.
    const STRIPS: bool = false;

    /// Runs `op` with the instruction set switched on.
    fn run<T: Op<Self>>(self, op: T) -> T::Out;
    /// The product in f32.
    ///
    /// # Safety
    /// As [`Product`] says.
    unsafe fn product(self, product: &Product<'_>);

    /// Packs a panel whose columns are rows of a matrix in f32.
    ///
    /// # Safety
    /// As for [`Multiply::pack_columns`](super::linear::Multiply::pack_columns), of a panel in f32 of this instruction set.
    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        let shape = Shape { elements: Elements::F32, tile: Self::TILE, cols: Self::COLS, run: Self::RUN };
        // SAFETY: the caller's
        unsafe { pack_panel(shape, from, stride, chunks, to) }
    }

    fn splat(self, x: f32) -> Self::F;
    /// # Safety
    /// `p` is valid for `LANES` reads.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// # Safety
    /// `p` is valid for `LANES` writes.
    unsafe fn store(self, p: *mut f32, x: Self::F);
    /// # Safety
    /// `p` is valid for `LANES` reads.
    unsafe fn load_bf16(self, p: *const u16) -> Self::F;
    /// Rounds to nearest, ties to even.
    ///
    /// # Safety
    /// `p` is valid for `LANES` writes.
    unsafe fn store_bf16(self, p: *mut u16, x: Self::F);
    /// Two vectors, one behind the other.
    ///
    /// # Safety
    /// `p` is valid for `2 · LANES` writes.
    #[inline(always)]
    unsafe fn store_bf16_pair(self, p: *mut u16, x: Self::F, y: Self::F) {
        // SAFETY: the caller's
        unsafe {
            self.store_bf16(p, x);
            self.store_bf16(p.add(Self::LANES), y);
        }
    }
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `b` where either is not a number.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `b` where either is not a number.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a`, but between `−most` and `most`; any of them for what is not a number.
    #[inline(always)]
    fn limit(self, a: Self::F, most: Self::F) -> Self::F {
        self.max(self.sub(self.splat(0.0), most), self.min(a, most))
    }
    /// To the nearest integer.
    fn round(self, a: Self::F) -> Self::F;
    /// `p · 2ⁿ` for integers −126 to 127 and `½ < p < 2`; some number under 2⁻¹²⁶ where that is one.
    fn scale(self, p: Self::F, n: Self::F) -> Self::F;
    /// `1 / a` for `a ≥ 1`, within 1.2e-7 relative.
    #[inline(always)]
    fn reciprocal(self, a: Self::F) -> Self::F {
        self.div(self.splat(1.0), a)
    }
    /// `x/2 · (1 + erf(x/√2))`.
    #[inline(always)]
    fn gelu(self, x: Self::F) -> Self::F {
        gelu(self, x)
    }
    /// The sum over the lanes, always in the same order.
    fn sum(self, a: Self::F) -> f32;
    /// The largest lane.
    fn largest(self, a: Self::F) -> f32;
    /// A hint that the cache line will be read, but not yet.
    fn fetch_far(self, _p: *const u8) {}
}

/// Runs `rows::<N>` for each register tile of a product, where N is how many rows the tile has, and then what follows. The
/// next panel is fetched meanwhile, in as many `steps` as `rows` takes in each tile. Not a function, as N is a constant in
/// each arm. As unsafe as `rows`.
#[cfg(target_arch = "x86_64")]
macro_rules! register_tiles {
    (
        $rows:ident $also:tt, $product:expr, steps: $steps:expr,
        fewer: [$($fewer:literal)*], whole: $whole:literal
    ) => {{
        let p = $product;
        let mut ahead = $crate::cpu::simd::Ahead::new(p, p.rows.div_ceil($whole) * $steps);
        for first in (0..p.rows).step_by($whole) {
            match p.rows - first {
                $($fewer => register_tiles!(@of $fewer $rows $also(p, first, &mut ahead)),)*
                _ => register_tiles!(@of $whole $rows $also(p, first, &mut ahead)),
            }
            if let Some(follow) = p.follow {
                follow(first..p.rows.min(first + $whole));
            }
        }
    }};
    (@of $n:literal $rows:ident [$($also:ident)?]($($argument:expr),*)) => { $rows::<$n $(, $also)?>($($argument),*) };
}

#[cfg(target_arch = "x86_64")]
pub(crate) use register_tiles;

/// Writes out what is done for each of the sixteen columns of a chunk: a loop's own instructions would take turns from the
/// products. The compiler moves nothing from one to the next, as loads that come early push sums out of the registers.
#[cfg(target_arch = "x86_64")]
macro_rules! for_each_column {
    ($k:ident $body:block) => { for_each_column!(@ $k $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    (@ $k:ident $body:block $($number:literal)*) => {$(
        {
            const $k: usize = $number;
            $body
            std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
        }
    )*};
}

#[cfg(target_arch = "x86_64")]
pub(crate) use for_each_column;

/// `eˣ` within 1.2e-7 relative; below −87.3 the smallest normal number, above 88 `e⁸⁸`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(88.0), s.max(s.splat(-87.3), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first of few bits, so that n · part is exact
    let r = s.fma(n, s.splat(-0.693359375), x);
    let r = s.fma(n, s.splat(2.12194440e-4), r);
    // the minimax polynomial of Cephes' expf on |r| ≤ ln 2 / 2
    let lower = [1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1];
    let p = polynomial(s, r, 1.9875691500e-4, lower);
    let p = s.add(s.fma(s.mul(p, r), r, r), s.splat(1.0));
    s.scale(p, n)
}

/// `2ˣ` for `x ≤ 0`, within 2.2e-7 relative; below −126 some number under 1.2e-38.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    // the polynomial of degree 5 with the least relative error on |r| ≤ 1/2, 7.5e-8
    exp2_by(s, x, 0.0013276472, [0.0096755413, 0.055507133, 0.240221197, 0.693146967, 1.0])
}

/// `2ˣ` for `x ≤ 0`, within 7.5e-5 relative, for what is rounded to bf16, whose last bit is 100 times that.
#[inline(always)]
pub(crate) fn exp2_for_bf16<S: Simd>(s: S, x: S::F) -> S::F {
    exp2_by(s, x, 0.05517166907, [0.2426111222, 0.6932609855, 0.9999280735])
}

/// A polynomial by Horner's scheme, the highest power first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F, highest: f32, lower: [f32; N]) -> S::F {
    let mut p = s.splat(highest);
    for c in lower {
        p = s.fma(p, x, s.splat(c));
    }
    p
}

/// `2ˣ` by a polynomial for `|x| ≤ 1/2`, the highest power first.
#[inline(always)]
fn exp2_by<S: Simd, const N: usize>(s: S, x: S::F, highest: f32, lower: [f32; N]) -> S::F {
    let x = s.max(s.splat(-126.0), x);
    let n = s.round(x);
    s.scale(polynomial(s, s.sub(x, n), highest, lower), n)
}

/// `1 / (1 + e⁻ˣ)`
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.reciprocal(s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// `x/2 · (1 + erf(x/√2))`, within 2e-7 of `x`. `Φ(x) − ½` is odd, so it is `x` times a function of `x²`: the quotient of two
/// polynomials of degree 5 that is nearest on `|x| ≤ 5.5`, off by 8e-9 at most. Beyond, `Φ` is 0 or 1 in f32.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    let near = s.limit(x, s.splat(5.5));
    let square = s.mul(near, near);
    let lower = [6.3521332e-6, 1.68827299e-4, 4.67727057e-3, 3.38528016e-2, 3.98942235e-1];
    let p = polynomial(s, square, 2.27493121e-8, lower);
    let q = polynomial(s, square, 1.1975035e-6, [7.3648045e-5, 1.88445401e-3, 2.86459614e-2, 2.51522308e-1, 1.0]);
    s.fma(x, s.div(s.mul(near, p), q), s.mul(x, s.splat(0.5)))
}

/// [`gelu`] for what is rounded to bf16: within 1.2e-4, less than a tenth of what the rounding of results as large as
/// a model's adds. `Φ(x) − ½` is odd, so it is `x` times a polynomial of `x²`, the one of degree 7 with the least error
/// relative to `|gelu(x)| + 0.3` on `|x| ≤ 4.25` that ends in ½; beyond, `Φ` is 0 or 1.
#[inline(always)]
pub(crate) fn gelu_for_bf16<S: Simd>(s: S, x: S::F) -> S::F {
    let near = s.limit(x, s.splat(4.25));
    let square = s.mul(near, near);
    let lower = [
        7.218663711e-8,
        -2.832573955e-6,
        6.385621236e-5,
        -9.258881328e-4,
        9.189257398e-3,
        -6.529832631e-2,
        3.982994854e-1,
    ];
    let p = polynomial(s, square, -7.985266892e-10, lower);
    s.mul(x, s.fma(near, p, s.splat(0.5)))
}

/// `x/2 · (1 + tanh(u))` is `x · sigmoid(2u)`, `u = √(2/π) (x + 0.044715 x³)`.
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let cubic = s.fma(s.mul(x, x), s.splat(0.044715), s.splat(1.0));
    s.mul(x, sigmoid(s, s.mul(s.mul(x, s.splat(1.595_769_1)), cubic)))
}

/// `x · sigmoid(1.702 x)`
#[inline(always)]
pub(crate) fn quick_gelu<S: Simd>(s: S, x: S::F) -> S::F {
    s.mul(x, sigmoid(s, s.mul(x, s.splat(1.702))))
}

/// `x · sigmoid(x)`
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    s.mul(x, sigmoid(s, x))
}

/// `max(x, 0)`
#[inline(always)]
pub(crate) fn relu<S: Simd>(s: S, x: S::F) -> S::F {
    s.max(s.splat(0.0), x)
}

/// The product of the register tile that begins at row `first`, `ROWS` × 2 vectors, in f32 with fused multiply-add; a step
/// ahead with each chunk.
///
/// # Safety
/// As [`Product`] says; the panel has two runs of `LANES` columns.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const ROWS: usize>(
    s: S,
    p: &Product<'_>,
    first: usize,
    mut ahead: Option<&mut Ahead>,
) {
    // SAFETY: the caller vouches for the extents: `chunks` chunks of 16 on both sides, `ROWS` rows of C
    unsafe {
        let mut a = p.a_tile(first, S::TILE).cast::<f32>();
        let mut b = p.b.cast::<f32>();
        let c = p.c.add(first * S::COLS);
        let mut sum = [[s.splat(0.0); 2]; ROWS];
        if p.accumulate {
            for (i, [x, y]) in sum.iter_mut().enumerate() {
                *x = s.load(c.add(i * 2 * S::LANES));
                *y = s.load(c.add((i * 2 + 1) * S::LANES));
            }
        }
        for _ in 0..p.chunks {
            if let Some(ahead) = &mut ahead {
                ahead.step();
            }
            for_each_column!(K {
                let (left, right) = (s.load(b.add(K * S::LANES)), s.load(b.add((16 + K) * S::LANES)));
                for (i, [x, y]) in sum.iter_mut().enumerate() {
                    let v = s.splat(*a.add(i * 16 + K));
                    *x = s.fma(v, left, *x);
                    *y = s.fma(v, right, *y);
                }
            });
            a = a.byte_add(p.a_chunk);
            b = b.add(2 * 16 * S::LANES);
        }
        for (i, [x, y]) in sum.iter().enumerate() {
            s.store(c.add(i * 2 * S::LANES), *x);
            s.store(c.add((i * 2 + 1) * S::LANES), *y);
        }
    }
}

/// Fetches the next panel into the second-level cache, a few lines a step: many at once would fill the buffers that the
/// misses of the product itself need.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Ahead {
    next: *const u8,
    /// Lines that are left.
    left: usize,
    /// Lines of a step.
    lines: usize,
}

#[cfg(target_arch = "x86_64")]
impl Ahead {
    /// What a product will read next, in so many steps.
    #[inline(always)]
    pub(crate) fn new(p: &Product<'_>, steps: usize) -> Self {
        let left = if p.next.is_null() { 0 } else { p.next_bytes.div_ceil(64) };
        Self { next: p.next, left, lines: left.div_ceil(steps.max(1)) }
    }

    #[inline(always)]
    pub(crate) fn step(&mut self) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let lines = self.lines.min(self.left);
        self.left -= lines;
        for _ in 0..lines {
            // SAFETY: a hint, which no address can make fail
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.next.cast()) };
            self.next = self.next.wrapping_add(64);
        }
    }
}

/// Methods of [`Simd`] that are a few intrinsics on whole vectors.
#[cfg(target_arch = "x86_64")]
macro_rules! lanewise {
    ($f:ty: $($name:ident($($arg:ident: $type:ty),*) -> $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $type),*) -> $f {
            // SAFETY: `self` proves that the CPU has the instructions
            unsafe { $body }
        }
    )*};
}
#[cfg(target_arch = "x86_64")]
pub(crate) use lanewise;
