//! Any CPU: arrays that the compiler turns into vectors, and matrix products by the `gemm` crate.

use super::math;
use super::product::Product;
use super::simd::{Op, Simd};

/// The portable instruction set, which every CPU has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

const LANES: usize = 8;

/// `f` on every lane.
#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type F = [f32; LANES];
    const LANES: usize = LANES;
    // a tile of one row and a panel of one run make both sides plain row-major matrices, which `gemm` reads
    const TILE: usize = 1;
    const BLOCK: usize = 32;
    const COLS: usize = 64;
    const RUN: usize = 64;

    #[inline(always)]
    unsafe fn run<T: Op<Self>>(self, op: T) {
        // a function of its own, as for the other instruction sets, so that an epilogue is not compiled once per call
        #[inline(never)]
        unsafe fn go<T: Op<Portable>>(op: T) {
            // SAFETY: the caller of `run` promises what `op` asks for
            unsafe { op.call(Portable) }
        }
        // SAFETY: the caller promises what `op` asks for
        unsafe { go(op) }
    }

    #[inline(always)]
    unsafe fn product(self, p: &Product<'_>) {
        let (k, cols) = (p.chunks * 16, Self::COLS as isize);
        // SAFETY: `Product` promises `rows` × `k` and `k` × `COLS` values to read, and `rows` × `COLS` to write
        unsafe {
            if cfg!(miri) {
                return plain(p.rows, k, p);
            }
            gemm::gemm(
                p.rows,
                Self::COLS,
                k,
                p.c,
                1,
                cols,
                p.accumulate,
                p.a.cast::<f32>(),
                1,
                (p.a_tile / size_of::<f32>()) as isize,
                p.b.cast::<f32>(),
                1,
                cols,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's pointer is valid for a vector
        unsafe { p.cast::<Self::F>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F) {
        // SAFETY: the caller's pointer is valid for a vector
        unsafe { p.cast::<Self::F>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller's pointer is valid for a vector
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, x: Self::F) {
        let bits = x.map(|x| half::bf16::from_f32(x).to_bits());
        // SAFETY: the caller's pointer is valid for a vector
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] / b[i])
    }

    /// Rounds twice, because a fused operation is a library call on a CPU without the instruction.
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        lanes(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // adding and subtracting 1.5 · 2²³ leaves no fraction bits; |a| is far below 2²² here
        a.map(|a| (a + 12582912.0) - 12582912.0)
    }

    #[inline(always)]
    fn scale(self, p: Self::F, n: Self::F) -> Self::F {
        lanes(|i| f32::from_bits(p[i].to_bits().wrapping_add(((n[i] as i32) << 23) as u32)))
    }

    #[inline(always)]
    fn gelu(self, x: Self::F) -> Self::F {
        math::gelu(self, x)
    }

    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }

    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// The product without `gemm`, whose kernels an interpreter cannot run.
///
/// # Safety
/// What [`Product`] asks for.
unsafe fn plain(rows: usize, k: usize, p: &Product<'_>) {
    // SAFETY: `row`, `col` and `k` are inside what the caller's product is valid for
    unsafe {
        for row in 0..rows {
            let a = p.a.add(row * p.a_tile).cast::<f32>();
            for col in 0..Portable::COLS {
                let c = p.c.add(row * Portable::COLS + col);
                let start = if p.accumulate { *c } else { 0.0 };
                *c = (0..k).fold(start, |sum, k| sum + *a.add(k) * *p.b.cast::<f32>().add(k * Portable::COLS + col));
            }
        }
    }
}
