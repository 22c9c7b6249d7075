//! The product of a register tile in f32, and what all register tiles share.

use super::product::Product;
use super::simd::Simd;

/// Runs `rows::<N>` for each register tile of a product, where N is the number of rows of the tile, and then the epilogue.
/// The next panel is prefetched meanwhile, in as many `steps` as `rows` makes in each tile. A macro, because N is a constant
/// in each arm. As unsafe as `rows`.
macro_rules! register_tiles {
    (
        $rows:ident $also:tt, $product:expr, steps: $steps:expr,
        fewer: [$($fewer:literal)*], whole: $whole:literal
    ) => {{
        let p = $product;
        let mut ahead = $crate::cpu::registers::Ahead::new(p, p.rows.div_ceil($whole) * $steps);
        for first in (0..p.rows).step_by($whole) {
            match p.rows - first {
                $($fewer => register_tiles!(@of $fewer $rows $also(p, first, &mut ahead)),)*
                _ => register_tiles!(@of $whole $rows $also(p, first, &mut ahead)),
            }
            if let Some(follow) = p.follow {
                follow.run(first..p.rows.min(first + $whole));
            }
        }
    }};
    (@of $n:literal $rows:ident [$($also:ident)?]($($argument:expr),*)) => { $rows::<$n $(, $also)?>($($argument),*) };
}

pub(crate) use register_tiles;

/// Unrolls what is done for each of the sixteen columns of a chunk, because a loop's own instructions would take issue slots
/// from the products. The fences keep the compiler from hoisting loads across columns, which would spill sums.
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

pub(crate) use for_each_column;

/// The product of the register tile that begins at row `first`, `ROWS` × 2 vectors, in f32 with fused multiply-add. With
/// `ahead`, each chunk prefetches a step of the next panel.
///
/// # Safety
/// What [`Product`] asks for; the product has `ROWS` rows from `first`, and the panel two runs of `LANES` columns.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const ROWS: usize>(
    s: S,
    p: &Product<'_>,
    first: usize,
    mut ahead: Option<&mut Ahead>,
) {
    // SAFETY: the caller's product has `chunks` chunks of 16 on both sides and `ROWS` rows of C
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

/// Prefetches the next panel into the second-level cache, a few lines per step, because many at once would fill the buffers
/// that the misses of the product itself need.
pub(crate) struct Ahead {
    next: *const u8,
    /// Lines that remain.
    left: usize,
    /// Lines per step.
    lines: usize,
}

impl Ahead {
    /// Prefetches what a product will read next, in `steps` steps.
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
            // SAFETY: a prefetch is a hint that is valid for every address
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.next.cast()) };
            self.next = self.next.wrapping_add(64);
        }
    }
}
