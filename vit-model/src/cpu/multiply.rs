//! A way to multiply matrices: an instruction set, and the elements that it multiplies.

use super::panel::pack_panel;
use super::product::Product;
use super::shape::{CHUNK_BYTES, Elements, Shape};
use super::simd::Simd;
use super::tiles::{Acts, Strips};

/// A way to multiply: an instruction set and the elements it multiplies.
pub(crate) trait Multiply: Copy + Send + Sync + 'static {
    /// The instruction set of everything but the product.
    type S: Simd;
    /// How attention multiplies.
    type Attention: Multiply<S = Self::S>;
    /// The memory layout of both sides.
    const SHAPE: Shape;
    /// Chunks that a product takes at once.
    const DEPTH: usize;
    /// How a linear layer is cut into units.
    const BLOCKING: Blocking = Blocking::Chunks { rows: 216, panels: 4 };
    /// Queries that attention takes at once.
    const QUERIES: usize;
    /// Whether attention can read [`Strips`] directly.
    const STRIPS: bool = false;
    /// If set, the product runs the epilogue between its own steps: the sums are still in the L1 cache, and where products
    /// run in a unit of their own, the vector unit would otherwise be idle.
    const FOLLOWS: bool = false;

    fn simd(self) -> Self::S;
    fn attention(self) -> Self::Attention;
    /// Prepares the calling thread for products.
    fn enter(self) -> Option<Entered> {
        None
    }
    /// # Safety
    /// What [`Product`] asks for, in this shape; the thread is prepared by [`enter`](Self::enter).
    unsafe fn product(self, product: &Product<'_>);

    /// A vector of a layer's output before its activation, from the sums that the product wrote.
    ///
    /// # Safety
    /// `sum` is valid for reading a vector, `bias` for reading a vector of the layer's biases (in int8 also of its scales
    /// and sums), and `scales` has the row.
    #[inline(always)]
    unsafe fn output(s: Self::S, _: Scales, _row: usize, sum: *const f32, bias: *const f32) -> <Self::S as Simd>::F {
        // SAFETY: the caller's pointers are valid for a vector each
        unsafe { s.add(s.load(sum), s.load(bias)) }
    }

    /// Packs a panel whose columns are rows of a matrix in f32: weights, or Kᵀ.
    ///
    /// # Safety
    /// `from` is valid for reading a panel's columns as rows of `stride` values, `chunks` chunks of each, `to` for
    /// writing as many chunks of a panel.
    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: the caller's pointers are valid for a panel of this shape
        unsafe { pack_panel(Self::SHAPE, from, stride, chunks, to) }
    }

    /// Like [`pack_columns`](Self::pack_columns), from `rows` rows of strips that begin at `from`. The other columns become
    /// zero. Called only if [`STRIPS`](Self::STRIPS) is set.
    ///
    /// # Safety
    /// `from` is valid for reading `rows` rows of `chunks` strips, and of as many planes; otherwise as for `pack_columns`.
    #[inline(always)]
    unsafe fn pack_strip_columns(self, _: Strips, _from: *const u8, _rows: usize, _chunks: usize, _to: *mut u8) {
        unreachable!("this kernel's attention reads f32")
    }

    /// Like [`pack_rows`](Self::pack_rows), from `rows` rows of a strip. Called only if [`STRIPS`](Self::STRIPS) is set.
    ///
    /// # Safety
    /// `from` is valid for reading `rows` rows, and of as many planes; otherwise as for `pack_rows`.
    #[inline(always)]
    unsafe fn pack_strip_rows(self, _: Strips, _from: *const u8, _rows: usize, _to: *mut u8) {
        unreachable!("this kernel's attention reads f32")
    }

    /// Packs one chunk of a panel whose rows are rows of a matrix in f32: V. Rows from `rows` on become zero.
    ///
    /// # Safety
    /// `from` is valid for reading `rows` rows of `stride` values from which a panel's columns are taken, `to` for
    /// writing a chunk of a panel. The default implementation is for [`Elements::F32`].
    #[inline(always)]
    unsafe fn pack_rows(self, from: *const f32, stride: usize, rows: usize, to: *mut u8) {
        let (s, Shape { cols, run, .. }) = (self.simd(), Self::SHAPE);
        for row in 0..Self::SHAPE.elements.chunk() {
            for column in (0..cols).step_by(Self::S::LANES) {
                // SAFETY: `row` and `column` are inside the rows and the chunk that the caller's pointers are valid for
                unsafe {
                    let to = to.cast::<f32>().add((column / run * 16 + row) * run + column % run);
                    let x = if row < rows { s.load(from.add(row * stride + column)) } else { s.splat(0.0) };
                    s.store(to, x);
                }
            }
        }
    }
}

/// Where the scales of a product of bytes are stored.
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    /// The layer's input, with a scale for each row.
    pub(crate) from: Acts,
    /// Values from the bias of a column to its scale, and from there to its sum.
    pub(crate) padded: usize,
}

/// A thread's state for a pass, which is undone when dropped.
pub(crate) struct Entered(pub(crate) fn());

impl Drop for Entered {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// How a linear layer is cut, so that what is read repeatedly stays in a cache near the core.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Blocking {
    /// `DEPTH` chunks of some rows stay in the second-level cache while a few panels are multiplied with them, then the next
    /// chunks.
    Chunks { rows: usize, panels: usize },
    /// At most `most` rows with all their chunks stay in the second-level cache while panels are multiplied one by one. If
    /// so many rows are larger than `bytes`, the sums of many panels and at least `least` rows stay there instead.
    Rows { bytes: usize, least: usize, most: usize },
}

/// The most panels whose sums a unit keeps at once under [`Blocking::Rows`].
pub(crate) const SIDE_BY_SIDE: usize = 24;

impl Blocking {
    /// Rows of sums that a unit needs.
    pub(crate) const fn sums(self, tile: usize) -> usize {
        match self {
            Self::Chunks { rows, panels } => panels * (rows + 2 * tile + 32),
            Self::Rows { most, .. } => SIDE_BY_SIDE * (most + 32),
        }
    }
}

/// f32 on both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32<S>(pub(crate) S);

impl<S: Simd> Multiply for F32<S> {
    type S = S;
    type Attention = Self;
    const SHAPE: Shape = Shape { elements: Elements::F32, tile: S::TILE, cols: S::COLS, run: S::RUN };
    const DEPTH: usize = S::DEPTH;
    const QUERIES: usize = S::BLOCK;
    const BLOCKING: Blocking = Blocking::Chunks { rows: 216, panels: S::PANELS };
    const STRIPS: bool = S::STRIPS;
    const FOLLOWS: bool = S::FOLLOWS;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    fn attention(self) -> Self {
        self
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product<'_>) {
        // SAFETY: the caller promises the same of this product
        unsafe { self.0.product(product) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: the caller promises the same of these pointers
        unsafe { self.0.pack_columns(from, stride, chunks, to) }
    }

    #[inline(always)]
    unsafe fn pack_strip_columns(self, strips: Strips, from: *const u8, rows: usize, chunks: usize, to: *mut u8) {
        for chunk in 0..chunks {
            // SAFETY: the caller's strips have these rows, each of which is a chunk of a column; `to` has this chunk
            unsafe {
                let from = from.add(chunk * strips.strip).cast::<f32>();
                let to = to.add(chunk * S::COLS * CHUNK_BYTES);
                if rows < S::COLS {
                    let mut columns = [0f32; 16 * WIDEST];
                    from.copy_to_nonoverlapping(columns.as_mut_ptr(), rows * 16);
                    self.0.pack_columns(columns.as_ptr(), 16, 1, to);
                } else {
                    self.0.pack_columns(from, 16, 1, to);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn pack_strip_rows(self, strips: Strips, from: *const u8, rows: usize, to: *mut u8) {
        for column in (0..S::COLS).step_by(S::LANES) {
            let (run, strip) = (column / S::RUN * S::RUN * 16 + column % S::RUN, column / 16 * strips.strip);
            for row in 0..16 {
                // SAFETY: rows below `rows` are inside the caller's strips, and `to` has a chunk of a panel
                unsafe {
                    let from = from.wrapping_add(strip + row * CHUNK_BYTES).cast::<f32>().wrapping_add(column % 16);
                    let x = if row < rows { self.0.load(from) } else { self.0.splat(0.0) };
                    self.0.store(to.cast::<f32>().add(run + row * S::RUN), x);
                }
            }
        }
    }
}

/// The most columns of a panel of any instruction set.
const WIDEST: usize = 64;

/// Weights in bf16 that are widened right before each product, which halves their memory on CPUs without a dot product in
/// bf16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Widened<S>(pub(crate) S);

impl<S: Simd> Multiply for Widened<S> {
    type S = S;
    type Attention = F32<S>;
    const SHAPE: Shape = Shape { elements: Elements::Widened, ..F32::<S>::SHAPE };
    const DEPTH: usize = 12;
    const QUERIES: usize = S::BLOCK;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    fn attention(self) -> F32<S> {
        F32(self.0)
    }

    #[inline(always)]
    unsafe fn product(self, product: &Product<'_>) {
        // SAFETY: the caller promises the same of this product, whose panel the linear layer has widened to f32
        unsafe { self.0.product(product) }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        let mut wide = [0f32; 16 * WIDEST];
        let wide = &mut wide[..16 * S::COLS];
        for chunk in 0..chunks {
            // SAFETY: the caller's pointers are valid for this chunk, and `wide` holds a chunk of a panel in f32
            unsafe {
                self.0.pack_columns(from.add(chunk * 16), stride, 1, wide.as_mut_ptr().cast());
                let to = to.cast::<u16>().add(chunk * wide.len());
                for at in (0..wide.len()).step_by(S::LANES) {
                    self.0.store_bf16(to.add(at), self.0.load(wide.as_ptr().add(at)));
                }
            }
        }
    }
}
