//! Views of activations in memory: in tiles, in rows, and in the strips that attention reads.

use super::scale::Scale;
use super::shape::{CHUNK_BYTES, Elements, Shape};
use super::simd::Simd;

/// Activations in tiles: a view of a buffer.
///
/// A view is a pointer with its extents. The code that constructs it promises that the memory outlives every use of the view;
/// the code that reads or writes through it promises the absence of races.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acts {
    start: *mut u8,
    shape: Shape,
    rows: usize,
    /// Chunks of a row.
    chunks: usize,
    /// Bytes of a plane.
    plane: usize,
}

// SAFETY: a pointer to plain bytes; every access is unsafe and promises that no other thread writes what it touches
unsafe impl Send for Acts {}
// SAFETY: as for `Send`
unsafe impl Sync for Acts {}

impl Acts {
    /// Bytes for `rows` rows of `columns` columns, including the padding to whole tiles and panels.
    pub(crate) fn bytes(shape: Shape, rows: usize, columns: usize) -> usize {
        // SAFETY: no memory is accessed through this view
        unsafe { Self::new(std::ptr::null_mut(), shape, rows, columns) }.len()
    }

    /// # Safety
    /// `start` is valid for reading and writing [`bytes`](Self::bytes) bytes, which were zeroed, as long as the view and its
    /// copies are used.
    pub(crate) unsafe fn new(start: *mut u8, shape: Shape, rows: usize, columns: usize) -> Self {
        let chunks = columns.next_multiple_of(shape.cols).div_ceil(shape.elements.chunk());
        let rows = rows.next_multiple_of(shape.tile);
        Self { start, shape, rows, chunks, plane: rows * chunks * CHUNK_BYTES }
    }

    /// A view of the same memory with other extents.
    ///
    /// # Panics
    /// If they need more memory.
    pub(crate) fn resized(&self, rows: usize, columns: usize) -> Self {
        assert!(Self::bytes(self.shape, rows, columns) <= self.len(), "a view outgrows its memory");
        // SAFETY: the new view is inside the memory that this one is valid for
        unsafe { Self::new(self.start, self.shape, rows, columns) }
    }

    fn len(&self) -> usize {
        let scales = if self.shape.elements == Elements::Int8 { self.rows * size_of::<Scale>() } else { 0 };
        self.plane * self.shape.elements.planes() + scales
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// Chunks of a row.
    pub(crate) fn chunks(&self) -> usize {
        self.chunks
    }

    /// Whether the view contains that many rows and columns.
    pub(crate) fn contains(&self, rows: usize, columns: usize) -> bool {
        rows <= self.rows && columns <= self.chunks * self.shape.elements.chunk()
    }

    /// The address of the scale of a row of bytes; the scales follow the last row.
    #[inline(always)]
    pub(crate) fn scale(&self, row: usize) -> *mut Scale {
        self.start.wrapping_add(self.plane).cast::<Scale>().wrapping_add(row)
    }

    /// The left side of a product from `row` (the first of a tile) and `chunk` on: its address, the bytes of a tile, and
    /// the bytes of a plane.
    pub(crate) fn left(&self, row: usize, chunk: usize) -> (*const u8, usize, usize) {
        let tile = self.shape.tile * self.chunks * CHUNK_BYTES;
        let start = self.start.wrapping_add(row / self.shape.tile * tile + chunk * self.shape.tile * CHUNK_BYTES);
        (start, tile, self.plane)
    }

    /// A row, for writing.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> ActsRow {
        self.row_of(self.shape.tile, self.shape.elements, row)
    }

    /// A row, for writing, if the rows of a tile and the elements are constants where it is called.
    #[inline(always)]
    pub(crate) fn row_of(&self, tile: usize, elements: Elements, row: usize) -> ActsRow {
        debug_assert_eq!((tile, elements), (self.shape.tile, self.shape.elements));
        let start = (row / tile * self.chunks * tile + row % tile) * CHUNK_BYTES;
        let (step, plane) = (tile * CHUNK_BYTES, self.plane);
        ActsRow { start: self.start.wrapping_add(start), step, plane, elements }
    }
}

/// The reason why single values are never written as bytes.
const BY_ROWS: &str = "bytes are rounded a whole row at a time";

/// One row of activations in tiles.
#[derive(Clone, Copy)]
pub(crate) struct ActsRow {
    start: *mut u8,
    /// Bytes from a chunk to the next.
    step: usize,
    /// Bytes from the values to their rounding errors.
    plane: usize,
    elements: Elements,
}

/// # Safety of every unsafe function
/// The row's memory is alive and contains the columns that are written, and no other thread accesses them meanwhile.
impl ActsRow {
    /// A row of a single tile in scratch memory: `[chunk][row of the tile][64 bytes]`, and as many planes.
    #[inline(always)]
    pub(crate) fn new(shape: Shape, tile: *mut u8, row: usize, plane: usize) -> Self {
        let step = shape.tile * CHUNK_BYTES;
        Self { start: tile.wrapping_add(row * CHUNK_BYTES), step, plane, elements: shape.elements }
    }

    /// The row `rows` below, in the same tile or strip.
    #[inline(always)]
    pub(crate) fn below(self, rows: usize) -> Self {
        Self { start: self.start.wrapping_add(rows * CHUNK_BYTES), ..self }
    }

    #[inline(always)]
    fn at(&self, column: usize) -> *mut u8 {
        let offset = match self.elements {
            Elements::F32 | Elements::Widened => column / 16 * self.step + column % 16 * 4,
            Elements::Bf16 | Elements::Bf16x3 => column / 32 * self.step + column % 32 * 2,
            Elements::Int8 => column / 64 * self.step + column % 64,
        };
        self.start.wrapping_add(offset)
    }

    /// Writes one vector; `column` is a multiple of `LANES`. Not for bytes, whose scale depends on the whole row.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(&self, s: S, column: usize, x: S::F) {
        let p = self.at(column);
        // SAFETY: the caller promises these columns, which are inside one chunk of each plane
        unsafe {
            match self.elements {
                Elements::F32 | Elements::Widened => s.store(p.cast(), x),
                Elements::Bf16 => s.store_bf16(p.cast(), x),
                Elements::Bf16x3 => {
                    s.store_bf16(p.cast(), x);
                    s.store_bf16(p.add(self.plane).cast(), s.sub(x, s.load_bf16(p.cast())));
                }
                Elements::Int8 => unreachable!("{BY_ROWS}"),
            }
        }
    }

    /// Writes two vectors; `column` is a multiple of `2 · LANES`.
    #[inline(always)]
    pub(crate) unsafe fn put_pair<S: Simd>(&self, s: S, column: usize, x: S::F, y: S::F) {
        let p: *mut u16 = self.at(column).cast();
        // SAFETY: the caller promises these columns, which are inside one chunk of each plane
        unsafe {
            match self.elements {
                Elements::F32 | Elements::Widened => {
                    self.put(s, column, x);
                    self.put(s, column + S::LANES, y);
                }
                Elements::Bf16 => s.store_bf16_pair(p, x, y),
                Elements::Bf16x3 => {
                    s.store_bf16_pair(p, x, y);
                    let (x, y) = (s.sub(x, s.load_bf16(p)), s.sub(y, s.load_bf16(p.add(S::LANES))));
                    s.store_bf16_pair(p.byte_add(self.plane), x, y);
                }
                Elements::Int8 => unreachable!("{BY_ROWS}"),
            }
        }
    }

    /// Writes a run of values that begins at any column.
    #[inline(always)]
    pub(crate) unsafe fn put_run<S: Simd>(&self, s: S, column: usize, values: &[f32]) {
        let mut at = 0;
        if column.is_multiple_of(S::LANES) {
            while at + S::LANES <= values.len() {
                // SAFETY: the caller promises these columns, and `values` contains a whole vector from `at`
                unsafe { self.put(s, column + at, s.load(values.as_ptr().add(at))) };
                at += S::LANES;
            }
        }
        for (i, &x) in values.iter().enumerate().skip(at) {
            let p = self.at(column + i);
            // SAFETY: the caller promises this column
            unsafe {
                match self.elements {
                    Elements::F32 | Elements::Widened => *p.cast::<f32>() = x,
                    Elements::Bf16 => *p.cast() = half::bf16::from_f32(x),
                    Elements::Bf16x3 => {
                        let high = half::bf16::from_f32(x);
                        *p.cast() = high;
                        *p.add(self.plane).cast() = half::bf16::from_f32(x - high.to_f32());
                    }
                    Elements::Int8 => unreachable!("{BY_ROWS}"),
                }
            }
        }
    }
}

/// Rows of f32: a view of a buffer, as [`Acts`] is. Each row has room for whole panels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    start: *mut f32,
    rows: usize,
    /// Values from a row to the next.
    stride: usize,
}

// SAFETY: as for `Acts`
unsafe impl Send for Rows {}
// SAFETY: as for `Acts`
unsafe impl Sync for Rows {}

impl Rows {
    /// Values from a row to the next: a multiple of a cache line, but not of a page, whose rows would share cache sets.
    fn stride(columns: usize) -> usize {
        columns.next_multiple_of(64) + 16
    }

    /// Bytes for `rows` rows of `columns` columns.
    pub(crate) fn bytes(rows: usize, columns: usize) -> usize {
        // a panel's width more, because attention reads whole panels of a head that may be narrower
        (rows * Self::stride(columns) + 64) * size_of::<f32>()
    }

    /// # Safety
    /// `start` is valid for reading and writing [`bytes`](Self::bytes) bytes as long as the view and its copies are used.
    pub(crate) unsafe fn new(start: *mut u8, rows: usize, columns: usize) -> Self {
        Self { start: start.cast(), rows, stride: Self::stride(columns) }
    }

    /// A view of rows without padding.
    ///
    /// # Safety
    /// `start` is valid for reading and writing `rows * columns` values as long as the view and its copies are used.
    pub(crate) unsafe fn packed(start: *mut f32, rows: usize, columns: usize) -> Self {
        Self { start, rows, stride: columns }
    }

    /// Whether the view contains that many rows and columns.
    pub(crate) fn contains(&self, rows: usize, columns: usize) -> bool {
        rows <= self.rows && columns <= self.stride
    }

    /// The address of a row, which is valid if the row is inside the view.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> *mut f32 {
        debug_assert!(row < self.rows);
        self.start.wrapping_add(row * self.stride)
    }
}

/// Queries, keys and values as attention reads them, `[plane][strip of columns][row][64 bytes]`: a view of a buffer, as
/// [`Acts`] is. Any sixteen rows of a strip are a tile, and a product writes each of its panels without gaps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strips {
    start: *mut u8,
    elements: Elements,
    rows: usize,
    columns: usize,
    /// Bytes from a strip to the next.
    pub(crate) strip: usize,
    /// Bytes from the values to their rounding errors.
    pub(crate) plane: usize,
}

// SAFETY: as for `Acts`
unsafe impl Send for Strips {}
// SAFETY: as for `Acts`
unsafe impl Sync for Strips {}

impl Strips {
    /// Bytes for `rows` rows of `columns` columns in whole strips, and for a tile that begins at the last row.
    pub(crate) fn bytes(elements: Elements, rows: usize, columns: usize) -> usize {
        (elements.planes() * (columns / elements.chunk()) * rows + 16) * CHUNK_BYTES
    }

    /// # Safety
    /// `start` is valid for reading and writing [`bytes`](Self::bytes) bytes as long as the view and its copies are used.
    pub(crate) unsafe fn new(start: *mut u8, elements: Elements, rows: usize, columns: usize) -> Self {
        let strip = rows * CHUNK_BYTES;
        Self { start, elements, rows, columns, strip, plane: columns / elements.chunk() * strip }
    }

    /// Whether the view contains that many rows and columns.
    pub(crate) fn contains(&self, rows: usize, columns: usize) -> bool {
        rows <= self.rows && columns <= self.columns
    }

    /// Where a row begins in the strip that begins with a column.
    #[inline(always)]
    pub(crate) fn at(&self, row: usize, column: usize) -> *mut u8 {
        self.start.wrapping_add(column / self.elements.chunk() * self.strip + row * CHUNK_BYTES)
    }

    /// The columns of a row from the first of a strip on, for writing, if the elements are a constant where it is called.
    #[inline(always)]
    pub(crate) fn row_of(&self, elements: Elements, row: usize, column: usize) -> ActsRow {
        debug_assert_eq!(elements, self.elements);
        ActsRow { start: self.at(row, column), step: self.strip, plane: self.plane, elements }
    }
}
