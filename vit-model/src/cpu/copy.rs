//! Copies rows and patches into tiles.

use std::ops::Range;

use super::simd::{Op, Simd};
use super::tiles::{Acts, Rows};

/// f32 rows → tiles.
///
/// # Safety of [`Op::call`]
/// No other thread writes the rows that are read or accesses the rows that are written.
pub(crate) struct CopyRows {
    from: Rows,
    /// Row `i · step + first` of `from` is copied to row `i`.
    step: usize,
    first: usize,
    rows: Range<usize>,
    dim: usize,
    to: Acts,
}

impl CopyRows {
    /// Copies `dim` values of rows `i · step + first` to rows `i`, for `i` in `rows`.
    ///
    /// # Panics
    /// If one of the views does not contain the rows.
    pub(crate) fn new(from: Rows, (step, first): (usize, usize), rows: Range<usize>, dim: usize, to: Acts) -> Self {
        let last = rows.end.saturating_sub(1) * step + first;
        assert!(from.contains(last + 1, dim) && to.contains(rows.end, dim), "rows are copied outside their views");
        Self { from, step, first, rows, dim, to }
    }
}

impl<S: Simd> Op<S> for CopyRows {
    #[inline(always)]
    unsafe fn call(self, s: S) {
        for i in self.rows.clone() {
            // SAFETY: `new` has checked that both views contain the rows; the caller excludes other threads
            unsafe {
                let from = std::slice::from_raw_parts(self.from.row(i * self.step + self.first), self.dim);
                self.to.row(i).put_run(s, 0, from);
            }
        }
    }
}

/// One row of patches of one image → as many rows of tiles: `[C, h, w] → [columns, C · ph · pw]`.
///
/// # Safety of [`Op::call`]
/// `patch` is valid for the values of one patch, and used by this thread alone. No other thread accesses the rows that are
/// written.
pub(crate) struct Patches<'a> {
    /// The image, channel by channel.
    pub(crate) pixels: &'a [f32],
    pub(crate) image_size: [usize; 2],
    pub(crate) patch_size: [usize; 2],
    /// The row of patches.
    pub(crate) grid_row: usize,
    /// Its first row in `to`.
    pub(crate) first: usize,
    /// Scratch for one patch.
    pub(crate) patch: *mut f32,
    pub(crate) to: Acts,
}

impl<S: Simd> Op<S> for Patches<'_> {
    #[inline(always)]
    unsafe fn call(self, s: S) {
        let ([height, width], [ph, pw]) = (self.image_size, self.patch_size);
        let channels = self.pixels.len() / (height * width);
        assert!(
            self.to.contains(self.first + width / pw, channels * ph * pw),
            "patches are written outside their view"
        );
        // SAFETY: the caller's scratch has room for a patch, and belongs to this thread
        let patch = unsafe { std::slice::from_raw_parts_mut(self.patch, channels * ph * pw) };
        for column in 0..width / pw {
            for (i, run) in patch.chunks_exact_mut(pw).enumerate() {
                let (channel, y) = (i / ph, self.grid_row * ph + i % ph);
                run.copy_from_slice(&self.pixels[(channel * height + y) * width + column * pw..][..pw]);
            }
            // SAFETY: `to` contains the row, as was checked above; the caller excludes other threads
            unsafe { self.to.row(self.first + column).put_run(s, 0, patch) };
        }
    }
}
