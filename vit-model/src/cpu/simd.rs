//! What a kernel needs from an instruction set: a vector of f32, and a product in f32.
//!
//! A value of a type that implements [`Simd`] proves that the CPU has the instructions, because only the type's `detect`
//! constructs one. Generic code is written once over `Simd`, forced inline into [`Simd::run`], and compiled there with the
//! instruction set enabled.

use super::panel::pack_panel;
use super::product::Product;
use super::shape::{Elements, Shape};

/// A computation that is compiled for an instruction set.
pub(crate) trait Op<S: Simd> {
    /// Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// What the type's documentation asks for.
    unsafe fn call(self, s: S);
}

/// An instruction set: a vector of f32, and the product of a block of rows with a panel of columns.
///
/// Loads and stores need no alignment, but their pointers must be valid for the whole vector.
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
    /// Columns of a panel that are adjacent in memory; the next run follows 16 rows later.
    const RUN: usize;
    /// Chunks that a register tile of the product in f32 takes at once.
    const DEPTH: usize = 12;
    /// Panels that the product in f32 passes through before it moves to the next chunks.
    const PANELS: usize = 4;
    /// If set, the product in f32 runs the epilogue after each register tile, while its sums are still in the L1 cache.
    const FOLLOWS: bool = false;
    /// Whether the product in f32 can read its left side from strips.
    const STRIPS: bool = false;

    /// Runs `op` with the instruction set enabled.
    ///
    /// # Safety
    /// What the documentation of `T` asks for.
    unsafe fn run<T: Op<Self>>(self, op: T);
    /// The product in f32.
    ///
    /// # Safety
    /// What [`Product`] asks for.
    unsafe fn product(self, product: &Product<'_>);

    /// Packs a panel whose columns are rows of a matrix in f32.
    ///
    /// # Safety
    /// `from` is valid for reading a panel's columns as rows of `stride` values, `chunks` chunks of each, `to` for writing
    /// as many chunks of a panel in f32.
    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        let shape = Shape { elements: Elements::F32, tile: Self::TILE, cols: Self::COLS, run: Self::RUN };
        // SAFETY: the caller's pointers are valid for a panel of this shape
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
        // SAFETY: the caller's pointer is valid for both vectors
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
    /// `b` if either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `b` if either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a`, limited to `−most` to `most`; an arbitrary number in that range for NaN.
    #[inline(always)]
    fn limit(self, a: Self::F, most: Self::F) -> Self::F {
        self.max(self.sub(self.splat(0.0), most), self.min(a, most))
    }
    /// To the nearest integer.
    fn round(self, a: Self::F) -> Self::F;
    /// `p · 2ⁿ` for integers −126 to 127 and `½ < p < 2`; if that is under 2⁻¹²⁶, some number under 2⁻¹²⁶.
    fn scale(self, p: Self::F, n: Self::F) -> Self::F;
    /// `1 / a` for `a ≥ 1`, within 1.2e-7 relative.
    #[inline(always)]
    fn reciprocal(self, a: Self::F) -> Self::F {
        self.div(self.splat(1.0), a)
    }
    /// `x/2 · (1 + erf(x/√2))`.
    fn gelu(self, x: Self::F) -> Self::F;
    /// The sum over the lanes, always in the same order.
    fn sum(self, a: Self::F) -> f32;
    /// The largest lane.
    fn largest(self, a: Self::F) -> f32;
    /// Prefetches a cache line into the second-level cache.
    fn fetch_far(self, _p: *const u8) {}
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
