//! What a kernel is asked to multiply: a block of rows times a panel of columns.

use std::ops::Range;

/// A block of rows times a panel of columns: `C = A · B`, or `C += A · B`.
///
/// The code that runs a product promises that `a` is valid for reading `rows` rows in tiles (whole tiles, if the kernel
/// reads whole tiles) of `chunks` chunks, `b` for reading `chunks` chunks of a panel, and `c` for reading and writing `rows`
/// rows of the panel's width, rounded up to whole tiles; that no other thread writes `a` or `b` or touches `c` meanwhile; and
/// that `follow` may run once for each of the rows.
pub(crate) struct Product<'a> {
    /// The first chunk of the first row; rows start at a tile.
    pub(crate) a: *const u8,
    /// Bytes from a tile to the next.
    pub(crate) a_tile: usize,
    /// Bytes from a chunk of a tile to the next. Differs from the chunk's own bytes only for kernels that read
    /// [`STRIPS`](super::multiply::Multiply::STRIPS).
    pub(crate) a_chunk: usize,
    /// Bytes from the values to their rounding errors.
    pub(crate) a_low: usize,
    pub(crate) rows: usize,
    pub(crate) b: *const u8,
    pub(crate) chunks: usize,
    /// Row-major, as wide as the panel.
    pub(crate) c: *mut f32,
    pub(crate) accumulate: bool,
    /// The bytes that will probably be read next, for prefetching.
    pub(crate) next: *const u8,
    pub(crate) next_bytes: usize,
    /// The epilogue, for kernels that [`FOLLOWS`](super::multiply::Multiply::FOLLOWS) says run it themselves.
    pub(crate) follow: Option<Epilogue<'a>>,
}

impl Product<'_> {
    /// Where the tile begins that contains `row`.
    ///
    /// # Safety
    /// `row` is a row of the product.
    #[cfg(target_arch = "x86_64")]
    pub(crate) unsafe fn a_tile(&self, row: usize, tile: usize) -> *const u8 {
        // SAFETY: the caller passes a row of the product, whose tiles `a` is valid for
        unsafe { self.a.add(row / tile * self.a_tile) }
    }
}

/// What is done with rows of a product as soon as they are complete.
#[derive(Clone, Copy)]
pub(crate) struct Epilogue<'a>(&'a dyn Fn(Range<usize>));

impl<'a> Epilogue<'a> {
    /// `finish` may rely on what [`run`](Self::run) asks of its caller.
    pub(crate) fn new(finish: &'a dyn Fn(Range<usize>)) -> Self {
        Self(finish)
    }

    /// # Safety
    /// `rows` are rows of the product, their sums are complete, and this is the only call for them.
    #[inline(always)]
    pub(crate) unsafe fn run(self, rows: Range<usize>) {
        (self.0)(rows);
    }
}
