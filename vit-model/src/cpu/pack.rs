//! How matrices lie in memory: weights in panels, activations in tiles, both in the order in which a product reads them.
//!
//! Everything is cut along K in *chunks* of 64 bytes a row: 16 values in f32, 32 in bf16, 64 in int8. The left side of a product is
//! cut in tiles of rows, `[tile][chunk][row][64 bytes]`; the right side in panels of columns,
//! `[panel][chunk][run][16][column of the run]`, in bf16 with pairs along K side by side as the dot-product
//! instructions want them, in int8 with fours. Padding is zero.

use std::ops::Range;

use super::buffer::Buffer;
use super::int8;
use super::kernel::Kernel;
use super::simd::Simd;
use crate::weights::widen;
use crate::{Error, Result, Weights};

/// Bytes of a row in a chunk.
pub(crate) const CHUNK_BYTES: usize = 64;

/// The elements of the two sides of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Elements {
    /// f32 on both sides.
    F32,
    /// Weights in bf16, which become f32 before the product; activations in f32.
    Widened,
    /// bf16 on both sides.
    Bf16,
    /// bf16 twice on both sides: the value, and what the rounding left over.
    Bf16x3,
    /// Bytes on both sides, with a scale for each row of activations and each column of weights.
    Int8,
}

impl Elements {
    /// Values of a row in a chunk of activations.
    pub(crate) const fn chunk(self) -> usize {
        match self {
            Self::F32 | Self::Widened => 16,
            Self::Bf16 | Self::Bf16x3 => 32,
            Self::Int8 => 64,
        }
    }

    /// Whether activations are rounded to bf16, or to less.
    pub(crate) const fn rounds(self) -> bool {
        matches!(self, Self::Bf16 | Self::Int8)
    }

    /// Copies of the activations: the value, and what the rounding left over.
    pub(crate) const fn planes(self) -> usize {
        if matches!(self, Self::Bf16x3) { 2 } else { 1 }
    }

    /// Bytes of one column of one chunk of weights.
    pub(crate) const fn column_bytes(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 | Self::Int8 => 64,
            Self::Widened => 32,
            Self::Bf16x3 => 128,
        }
    }
}

/// The shape of tiles and panels, as a kernel wants them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) elements: Elements,
    /// Rows of a tile of activations.
    pub(crate) tile: usize,
    /// Columns of a panel of weights.
    pub(crate) cols: usize,
    /// Columns side by side in a panel.
    pub(crate) run: usize,
}

/// A block of rows times a panel of columns: `C = A · B`, or `C += A · B`.
///
/// Whoever runs one promises: `a` is valid for reading `rows` rows in tiles (whole tiles, where the kernel takes whole
/// tiles) of `chunks` chunks, `b` for `chunks` chunks of a panel, `c` for writing `rows` rows of the panel's width,
/// rounded up to whole tiles.
pub(crate) struct Product<'a> {
    /// The first chunk of the first row; rows start at a tile.
    pub(crate) a: *const u8,
    /// Bytes from a tile to the next.
    pub(crate) a_tile: usize,
    /// Bytes from a chunk of a tile to the next, where it is not the chunk itself: of kernels that say that they read
    /// [`STRIPS`](super::linear::Multiply::STRIPS).
    pub(crate) a_chunk: usize,
    /// Bytes from the values to what the rounding left over.
    pub(crate) a_low: usize,
    pub(crate) rows: usize,
    pub(crate) b: *const u8,
    pub(crate) chunks: usize,
    /// Row-major, as wide as the panel.
    pub(crate) c: *mut f32,
    pub(crate) accumulate: bool,
    /// What will be read next, if that is known, and how many bytes of it; a hint.
    pub(crate) next: *const u8,
    pub(crate) next_bytes: usize,
    /// What is to be done with rows as soon as they are complete, in their order, by a kernel that says that it
    /// [`FOLLOWS`](super::linear::Multiply::FOLLOWS).
    pub(crate) follow: Option<&'a dyn Fn(std::ops::Range<usize>)>,
}

impl Product<'_> {
    /// Where the tile begins that has `row`.
    ///
    /// # Safety
    /// `row` is a row of the product.
    #[cfg(target_arch = "x86_64")]
    pub(crate) unsafe fn a_tile(&self, row: usize, tile: usize) -> *const u8 {
        // SAFETY: the caller's
        unsafe { self.a.add(row / tile * self.a_tile) }
    }
}

/// Activations in tiles: a view of a buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Acts {
    start: *mut u8,
    shape: Shape,
    /// Chunks of a row.
    chunks: usize,
    /// Bytes of one plane.
    plane: usize,
}

// SAFETY: a pointer to memory that the threads of a pass share; they write disjoint rows or columns
unsafe impl Send for Acts {}
// SAFETY: as above
unsafe impl Sync for Acts {}

impl Acts {
    /// Chunks that hold `columns` values.
    fn chunks_of(shape: Shape, columns: usize) -> usize {
        columns.div_ceil(shape.elements.chunk())
    }

    /// Bytes for `rows` rows of `columns` columns, room for whole panels included.
    pub(crate) fn bytes(shape: Shape, rows: usize, columns: usize) -> usize {
        let chunks = Self::chunks_of(shape, columns.next_multiple_of(shape.cols));
        let rows = rows.next_multiple_of(shape.tile);
        let scales = if shape.elements == Elements::Int8 { rows * size_of::<int8::Scale>() } else { 0 };
        rows * chunks * CHUNK_BYTES * shape.elements.planes() + scales
    }

    /// A view of zeroed memory of [`bytes`](Self::bytes) bytes.
    pub(crate) fn new(start: *mut u8, shape: Shape, rows: usize, columns: usize) -> Self {
        let chunks = Self::chunks_of(shape, columns.next_multiple_of(shape.cols));
        let plane = rows.next_multiple_of(shape.tile) * chunks * CHUNK_BYTES;
        Self { start, shape, chunks, plane }
    }

    /// A view of the same memory for no more rows and columns.
    pub(crate) fn of(&self, rows: usize, columns: usize) -> Self {
        Self::new(self.start, self.shape, rows, columns)
    }

    /// How they lie in memory.
    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// Chunks of a row.
    pub(crate) fn chunks(&self) -> usize {
        self.chunks
    }

    /// Where the scale of a row of bytes is, behind all of them.
    #[inline(always)]
    pub(crate) fn scale(&self, row: usize) -> *mut int8::Scale {
        self.start.wrapping_add(self.plane).cast::<int8::Scale>().wrapping_add(row)
    }

    /// The product's left side from `row` (the first of a tile) and `chunk` on: pointer, bytes a tile, bytes a plane.
    pub(crate) fn left(&self, row: usize, chunk: usize) -> (*const u8, usize, usize) {
        let tile = self.shape.tile * self.chunks * CHUNK_BYTES;
        // inside the buffer, as rows and chunks are
        let start = self.start.wrapping_add(row / self.shape.tile * tile + chunk * self.shape.tile * CHUNK_BYTES);
        (start, tile, self.plane)
    }

    /// A row, to be written.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> ActsRow {
        self.row_of(self.shape.tile, row)
    }

    /// A row, where the rows of a tile are known when the code is compiled.
    #[inline(always)]
    pub(crate) fn row_of(&self, tile: usize, row: usize) -> ActsRow {
        debug_assert_eq!(tile, self.shape.tile);
        let start = (row / tile * self.chunks * tile + row % tile) * CHUNK_BYTES;
        let (step, plane, elements) = (tile * CHUNK_BYTES, self.plane, self.shape.elements);
        ActsRow { start: self.start.wrapping_add(start), step, plane, elements }
    }
}

/// Why no value is written as a byte.
const BY_ROWS: &str = "bytes are rounded a whole row at a time";

/// One row of activations in tiles.
#[derive(Clone, Copy)]
pub(crate) struct ActsRow {
    start: *mut u8,
    /// Bytes from a chunk to the next.
    step: usize,
    /// Bytes from the values to what the rounding left over.
    plane: usize,
    elements: Elements,
}

/// # Safety of every function
/// The memory is alive and has the columns that are written; no other thread touches them.
impl ActsRow {
    /// A row in memory of one's own: `[chunk][row of the tile][64 bytes]`, and as many planes.
    #[inline(always)]
    pub(crate) fn new(shape: Shape, tile: *mut u8, row: usize, plane: usize) -> Self {
        let step = shape.tile * CHUNK_BYTES;
        Self { start: tile.wrapping_add(row * CHUNK_BYTES), step, plane, elements: shape.elements }
    }

    /// The row so far below, in the same tile or strip.
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

    /// Writes one vector; `column` is a multiple of `LANES`. Not for bytes, whose scale takes the whole row.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(&self, s: S, column: usize, x: S::F) {
        let p = self.at(column);
        // SAFETY: the caller's
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
        // SAFETY: the caller's
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
                // SAFETY: the caller's; the values were counted
                unsafe { self.put(s, column + at, s.load(values.as_ptr().add(at))) };
                at += S::LANES;
            }
        }
        for (i, &x) in values.iter().enumerate().skip(at) {
            let p = self.at(column + i);
            // SAFETY: the caller's
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

/// f32 rows, one after the other, each with room for whole panels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    start: *mut f32,
    /// Values from a row to the next.
    pub(crate) stride: usize,
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
        // a panel's width more: attention reads whole panels of a head that may be narrower
        (rows * Self::stride(columns) + 64) * size_of::<f32>()
    }

    /// A view of memory of [`bytes`](Self::bytes) bytes.
    pub(crate) fn new(start: *mut u8, columns: usize) -> Self {
        Self { start: start.cast(), stride: Self::stride(columns) }
    }

    /// A view of rows without room between them.
    pub(crate) fn packed(start: *mut f32, columns: usize) -> Self {
        Self { start, stride: columns }
    }

    /// Where a row begins; valid while the memory is alive and the row is inside.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> *mut f32 {
        self.start.wrapping_add(row * self.stride)
    }
}

/// Queries, keys and values as attention reads them, `[plane][strip of columns][row][64 bytes]`: some rows of a strip are a
/// tile wherever they begin, and what a panel of a product writes follows without a gap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strips {
    start: *mut u8,
    elements: Elements,
    /// Bytes from a strip to the next.
    pub(crate) strip: usize,
    /// Bytes from the values to what the rounding left over.
    pub(crate) plane: usize,
}

// SAFETY: as for `Acts`
unsafe impl Send for Strips {}
// SAFETY: as for `Acts`
unsafe impl Sync for Strips {}

impl Strips {
    /// Bytes for `rows` rows of `columns` columns, whole strips; the last tile may begin at the last row.
    pub(crate) fn bytes(elements: Elements, rows: usize, columns: usize) -> usize {
        (elements.planes() * (columns / elements.chunk()) * rows + 16) * CHUNK_BYTES
    }

    /// A view of memory of [`bytes`](Self::bytes) bytes.
    pub(crate) fn new(start: *mut u8, elements: Elements, rows: usize, columns: usize) -> Self {
        let strip = rows * CHUNK_BYTES;
        Self { start, elements, strip, plane: columns / elements.chunk() * strip }
    }

    /// Where a row begins in the strip that begins with a column.
    #[inline(always)]
    pub(crate) fn at(&self, row: usize, column: usize) -> *mut u8 {
        self.start.wrapping_add(column / self.elements.chunk() * self.strip + row * CHUNK_BYTES)
    }

    /// The columns of a row from a strip's first on, to be written, where the elements are known when the code is compiled.
    #[inline(always)]
    pub(crate) fn row_of(&self, elements: Elements, row: usize, column: usize) -> ActsRow {
        debug_assert_eq!(elements, self.elements);
        ActsRow { start: self.at(row, column), step: self.strip, plane: self.plane, elements }
    }
}

/// A linear layer, packed: `y = W x + b`.
#[derive(Debug)]
pub(crate) struct Linear {
    /// Outputs, and their columns of padding not counted.
    pub(crate) n: usize,
    /// Inputs.
    pub(crate) k: usize,
    /// Each panel's first half is a gate, its second the values that it gates.
    pub(crate) gated: bool,
    shape: Shape,
    panels: Buffer,
    /// A bias for every column; of bytes then a scale for every column, then the sum of every column.
    bias: Buffer,
}

/// Where a linear layer's rows come from.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// `.weight` and `.bias` follow.
    pub(crate) name: String,
    /// A second layer whose outputs follow; for gates.
    pub(crate) second: Option<String>,
    /// The name of a factor per output.
    pub(crate) scale: Option<String>,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) bias: bool,
    pub(crate) gated: bool,
}

impl Linear {
    /// Reads and packs, into the memory of another layer where that is of the same form.
    pub(crate) fn read(
        weights: &dyn Weights,
        source: &Source,
        kernel: &dyn Kernel,
        shape: Shape,
        into: Option<Self>,
    ) -> Result<Self> {
        let parts = 1 + usize::from(source.second.is_some());
        let names = || std::iter::once(&source.name).chain(&source.second);
        let rows = source.n / parts; // of each part
        let mut matrix = Vec::with_capacity(parts);
        let mut bias = Vec::with_capacity(source.n);
        for name in names() {
            let weight = format!("{name}.weight");
            let info = expect(weights, &weight, |shape| {
                shape.split_first().is_some_and(|(&n, rest)| n == rows && count(rest) == Some(source.k))
            })?;
            matrix.push((weights.stretches(&weight)?, info, weight));
            if source.bias {
                bias.extend(vector(weights, &format!("{name}.bias"), rows)?);
            }
        }
        let scale = source.scale.as_ref().map(|name| vector(weights, name, source.n)).transpose()?;
        bias.resize(source.n, 0.0);
        if let Some(scale) = &scale {
            bias.iter_mut().zip(scale).for_each(|(b, s)| *b *= s);
        }
        let mut bytes = Vec::new(); // of one run of rows: it stays in the cache until they are packed
        Self::pack(source, kernel, shape, &bias, into, |run, out, stride| {
            let (read, dtype, name) = &matrix[run.start / rows];
            let width = source.k * dtype.size();
            let at = run.start % rows * width;
            if *dtype == crate::Dtype::F32 && stride == source.k && cfg!(target_endian = "little") {
                // SAFETY: the same memory; whatever bytes stand there, they are numbers
                read(at, unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), size_of_val(out)) })?;
            } else {
                bytes.resize(run.len() * width, 0);
                read(at, &mut bytes)?;
                for (out, bytes) in out.chunks_mut(stride).zip(bytes.chunks_exact(width)) {
                    out[..source.k].copy_from_slice(&widen(*dtype, bytes));
                }
            }
            for (row, out) in run.zip(out.chunks_mut(stride)) {
                let out = &mut out[..source.k];
                if !finite(out) {
                    return Err(Error::tensor(name, NOT_FINITE));
                }
                if let Some(scale) = &scale {
                    out.iter_mut().for_each(|x| *x *= scale[row]);
                }
            }
            Ok(())
        })
    }

    /// Packs the rows that `read` writes: some that follow each other, of `k` values, each so far from the one before.
    pub(crate) fn pack(
        source: &Source,
        kernel: &dyn Kernel,
        shape: Shape,
        bias: &[f32],
        into: Option<Self>,
        mut read: impl FnMut(Range<usize>, &mut [f32], usize) -> Result<()>,
    ) -> Result<Self> {
        let (n, k, gated) = (source.n, source.k, source.gated);
        let part = n / (1 + usize::from(source.second.is_some())); // rows of each tensor
        let (cols, chunks) = (shape.cols, k.div_ceil(shape.elements.chunk()));
        let count = n.div_ceil(cols);
        let panel_bytes = chunks * cols * shape.elements.column_bytes();
        let same = |old: &Self| (old.n, old.k, old.gated, old.shape) == (n, k, gated, shape);
        // what is written below is the same places again; the rest stays zero
        let this = into.filter(same).unwrap_or_else(|| Self {
            n,
            k,
            gated,
            shape,
            panels: Buffer::new(count * panel_bytes),
            bias: Buffer::new(count * cols * size_of::<f32>() * if shape.elements == Elements::Int8 { 3 } else { 1 }),
        });
        let width = chunks * shape.elements.chunk();
        let mut rows = vec![0f32; cols * width];
        for panel in 0..count {
            let mut column = 0;
            while column < cols {
                let output = |column| this.output(panel * cols + column);
                let Some(first) = output(column) else {
                    rows[column * width..][..width].fill(0.0);
                    column += 1;
                    continue;
                };
                // no run goes past the layer that its first row is of
                let more = |n: &usize| output(column + n) == Some(first + n) && !(first + n).is_multiple_of(part);
                let run = first..first + 1 + (1..cols - column).take_while(more).count();
                for (i, row) in run.clone().enumerate() {
                    // SAFETY: the buffer has a bias for every column, and is ours alone
                    unsafe { *this.bias.ptr().cast::<f32>().add(panel * cols + column + i) = bias[row] };
                }
                let next = column + run.len();
                read(run, &mut rows[column * width..next * width], width)?;
                column = next;
            }
            if shape.elements == Elements::Int8 {
                for (column, row) in rows.chunks_exact_mut(width).enumerate() {
                    let (scale, sum) = int8::round(row);
                    let at = this.bias(panel).cast_mut().wrapping_add(column);
                    // SAFETY: the buffer has a scale and a sum for every column, and is ours alone
                    unsafe {
                        *at.add(this.padded()) = scale;
                        *at.add(2 * this.padded()) = sum;
                    }
                }
            }
            // SAFETY: `rows` has `cols` rows of `chunks` chunks, and the buffer this panel; it is ours alone
            unsafe {
                let to = this.panels.ptr().add(panel * panel_bytes);
                kernel.pack(shape, rows.as_ptr(), width, chunks, to);
            }
        }
        Ok(this)
    }

    /// The row of the weight that stands in a column, if one does.
    fn output(&self, column: usize) -> Option<usize> {
        if !self.gated {
            return (column < self.n).then_some(column);
        }
        let (half, outputs) = (self.shape.cols / 2, self.n / 2);
        let (panel, at) = (column / self.shape.cols, column % self.shape.cols);
        let output = panel * half + at % half;
        (output < outputs).then_some(if at < half { output } else { outputs + output })
    }

    /// How it lies in memory.
    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn count(&self) -> usize {
        self.n.div_ceil(self.shape.cols)
    }

    /// Chunks of a panel.
    pub(crate) fn chunks(&self) -> usize {
        self.k.div_ceil(self.shape.elements.chunk())
    }

    /// A panel from one of its chunks on. The memory lives as long as `self`.
    pub(crate) fn panel(&self, panel: usize, chunk: usize) -> *const u8 {
        let column = self.shape.elements.column_bytes();
        self.panels.ptr().wrapping_add((panel * self.chunks() + chunk) * self.shape.cols * column)
    }

    /// The biases of a panel's columns, zero where there are none.
    pub(crate) fn bias(&self, panel: usize) -> *const f32 {
        self.bias.ptr().cast::<f32>().wrapping_add(panel * self.shape.cols)
    }

    /// Outputs with the columns of padding: so far behind the bias of a column of bytes its scale is, and behind that its
    /// sum.
    #[inline(always)]
    pub(crate) fn padded(&self) -> usize {
        self.count() * self.shape.cols
    }

    /// Bytes of the packed copy.
    pub(crate) fn bytes(&self) -> usize {
        self.panels.len() + self.bias.len()
    }
}

/// Packs a panel, whose columns are rows of a row-major matrix with `stride` values a row: plainly, and so what kernels with
/// transposes of their own are tested against.
///
/// # Safety
/// `from` is valid for reading a panel's columns as rows of `chunks` chunks, `to` for writing a panel of as many.
#[inline(always)]
pub(crate) unsafe fn pack_panel(shape: Shape, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
    let Shape { elements, cols, run, .. } = shape;
    let (size, planes) = (elements.column_bytes(), elements.planes());
    for (chunk, first) in (0..chunks).flat_map(|chunk| (0..cols).step_by(run).map(move |first| (chunk, first))) {
        // written in order: what is written to memory counts, what is read is in the first-level cache
        for k in 0..16 {
            for lane in 0..run.min(cols - first) {
                // SAFETY: the caller's; every offset is inside a panel as the module's head describes it
                unsafe {
                    let from = from.add((first + lane) * stride + (chunk * 16 + k) * (elements.chunk() / 16));
                    let to = to.add(chunk * cols * size + first * size / planes);
                    let at = k * run + lane;
                    match elements {
                        Elements::F32 => *to.cast::<f32>().add(at) = *from,
                        Elements::Widened => *to.cast::<u16>().add(at) = bf16(*from),
                        Elements::Bf16 | Elements::Bf16x3 => {
                            let values: [f32; 2] = *from.cast();
                            *to.cast::<[u16; 2]>().add(at) = values.map(bf16);
                            if planes == 2 {
                                let low = values.map(|x| bf16(x - f32::from_bits(u32::from(bf16(x)) << 16)));
                                *to.cast::<[u16; 2]>().add(cols * 16 + at) = low;
                            }
                        }
                        Elements::Int8 => *to.cast::<[i8; 4]>().add(at) = (*from.cast::<[f32; 4]>()).map(|x| x as i8),
                    }
                }
            }
        }
    }
}

/// To bf16, to nearest, ties to even; for finite values.
#[inline(always)]
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

const NOT_FINITE: &str = "holds NaN or infinity; the checkpoint is damaged";

fn finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    !values.iter().fold(false, |found, x| found | (x.to_bits() & EXPONENT == EXPONENT))
}

/// The element type of a tensor, if its shape is as it should be.
fn expect(weights: &dyn Weights, name: &str, right: impl Fn(&[usize]) -> bool) -> Result<crate::Dtype> {
    let info = weights.tensors().get(name).ok_or_else(|| Error::tensor(name, "missing"))?;
    if !right(&info.shape) {
        return Err(Error::tensor(name, format!("has shape {:?}, which does not fit the configuration", info.shape)));
    }
    Ok(info.dtype)
}

/// Elements of a shape, if that many can be counted.
fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim))
}

/// A tensor of `len` values, whatever its shape.
pub(crate) fn vector(weights: &dyn Weights, name: &str, len: usize) -> Result<Vec<f32>> {
    expect(weights, name, |shape| count(shape) == Some(len))?;
    let values = weights.read_f32(name)?;
    if values.len() != len {
        return Err(Error::tensor(name, format!("holds {} values, expected {len}", values.len())));
    }
    if !finite(&values) {
        return Err(Error::tensor(name, NOT_FINITE));
    }
    Ok(values)
}
