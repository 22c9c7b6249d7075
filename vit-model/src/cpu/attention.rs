//! Attention, one head of one image at a time. Scores, softmax and the weighted sum for a block of queries stay in the cache;
//! nothing of the size of all scores is ever written. Both products are the kernel's own if it says so, and in f32 otherwise;
//! the softmax is in f32.

use std::ops::Range;

use super::math::{exp2, exp2_for_bf16};
use super::multiply::Multiply;
use super::norm::Norm;
use super::product::Product;
use super::shape::CHUNK_BYTES;
use super::simd::{Op, Simd};
use super::tiles::{Acts, ActsRow, Rows, Strips};

/// The attention of one layer, for all heads and images.
pub(crate) struct AttentionJob<'a> {
    /// Queries, keys and values, each with the column of its first head.
    pub(crate) q: (AttentionFrom, usize),
    pub(crate) k: (AttentionFrom, usize),
    pub(crate) v: (AttentionFrom, usize),
    pub(crate) images: usize,
    /// Queries of an image, and the rows of `q` from an image to the next: zero if all images share their queries.
    pub(crate) queries: usize,
    pub(crate) query_rows: usize,
    /// Rows of an image in `k` and `v`, and the first of them that is a key. At least one is.
    pub(crate) tokens: usize,
    pub(crate) first_key: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    /// Norms on q and k.
    pub(crate) norms: Option<(&'a Norm, &'a Norm)>,
    pub(crate) to: AttentionTo,
}

/// Where queries, keys or values are read from.
#[derive(Clone, Copy)]
pub(crate) enum AttentionFrom {
    Rows(Rows),
    /// Heads are whole strips and panels.
    Strips(Strips),
}

impl AttentionFrom {
    fn contains(self, rows: usize, columns: usize) -> bool {
        match self {
            Self::Rows(view) => view.contains(rows, columns),
            Self::Strips(view) => view.contains(rows, columns),
        }
    }
}

/// Where attention writes its result.
#[derive(Clone, Copy)]
pub(crate) enum AttentionTo {
    Acts(Acts),
    Rows(Rows),
}

impl AttentionJob<'_> {
    /// Whether every view contains what the job accesses.
    fn is_inside(&self) -> bool {
        let (width, rows) = (self.heads * self.dim, self.images * self.queries);
        let reads = |(view, column): (AttentionFrom, usize), rows| view.contains(rows, column + width);
        let writes = match self.to {
            AttentionTo::Acts(acts) => acts.contains(rows, width),
            AttentionTo::Rows(to) => to.contains(rows, width),
        };
        let last_queries = (self.images - 1) * self.query_rows + self.queries;
        let tokens = self.images * self.tokens;
        writes
            && reads(self.q, last_queries)
            && reads(self.k, tokens)
            && reads(self.v, tokens)
            && self.first_key < self.tokens
    }

    /// Parts that a head's queries are cut into, if there are fewer heads than it takes to keep all threads busy.
    fn splits(&self, threads: usize) -> usize {
        if threads == 1 { 1 } else { (2 * threads).div_ceil(self.images * self.heads).min(self.queries.div_ceil(32)) }
    }

    /// Number of independent units.
    pub(crate) fn units(&self, threads: usize) -> usize {
        self.images * self.heads * self.splits(threads)
    }

    fn keys(&self) -> usize {
        self.tokens - self.first_key
    }
}

/// Where the parts of a thread's scratch begin, in bytes.
struct Scratch {
    /// Kᵀ in panels of keys, V in panels of its columns.
    keys: usize,
    values: usize,
    /// A block of queries in tiles, and the bytes from there to their rounding errors.
    queries: usize,
    queries_low: usize,
    /// Scores, `[panel of keys][query][key]`.
    scores: usize,
    /// Their softmax, in tiles.
    weights: usize,
    weights_low: usize,
    /// The result, `[panel of columns][query][column]`.
    sums: usize,
    /// A panel of keys, a chunk of values, or one query, in f32.
    rows: usize,
    end: usize,
}

impl Scratch {
    fn new<M: Multiply>(keys: usize, dim: usize) -> Self {
        let (shape, queries) = (M::SHAPE, M::QUERIES.next_multiple_of(M::SHAPE.tile));
        let elements = shape.elements;
        let panel = |chunks: usize| chunks * shape.cols * elements.column_bytes();
        let (dim_chunks, key_chunks) = (dim.div_ceil(elements.chunk()), keys.div_ceil(elements.chunk()));
        let (dim_panels, key_panels) = (dim.div_ceil(shape.cols), keys.div_ceil(shape.cols));
        let mut end = 0;
        let mut take = |bytes: usize| {
            let start = end;
            end += bytes.next_multiple_of(64);
            start
        };
        let (queries_low, weights_low) = (queries * dim_chunks * 64, queries * key_chunks * 64);
        let this = Self {
            keys: take(key_panels * panel(dim_chunks)),
            values: take(dim_panels * panel(key_chunks)),
            queries: take(queries_low * elements.planes()),
            queries_low,
            scores: take(key_panels * queries * shape.cols * 4),
            weights: take(weights_low * elements.planes()),
            weights_low,
            sums: take(dim_panels * queries * shape.cols * 4),
            rows: take(shape.cols.max(elements.chunk()) * dim.next_multiple_of(64) * 4),
            end: 0,
        };
        Self { end, ..this }
    }
}

/// Bytes of scratch that a thread needs.
pub(crate) fn scratch_bytes<M: Multiply>(keys: usize, dim: usize) -> usize {
    Scratch::new::<M>(keys, dim).end
}

/// One unit of a job.
///
/// # Safety of [`Op::call`]
/// `scratch` is valid for [`scratch_bytes`] bytes that only this thread uses, the thread has entered the kernel, and no other
/// thread writes the job's input or accesses the part of its output that belongs to this unit.
pub(crate) struct AttentionUnit<'a, M> {
    pub(crate) multiply: M,
    pub(crate) job: &'a AttentionJob<'a>,
    pub(crate) unit: usize,
    pub(crate) threads: usize,
    pub(crate) scratch: *mut f32,
}

impl<M: Multiply> Op<M::S> for AttentionUnit<'_, M> {
    #[inline(always)]
    unsafe fn call(self, s: M::S) {
        let Self { multiply, job, unit, threads, scratch } = self;
        assert!(job.is_inside(), "attention reads or writes outside its views");
        let splits = job.splits(threads);
        let (image, head, split) = (unit / splits / job.heads, unit / splits % job.heads, unit % splits);
        let part = |i: usize| (job.queries * i / splits).next_multiple_of(M::QUERIES).min(job.queries);
        let at = Scratch::new::<M>(job.keys(), job.dim);
        let head = Head { multiply, job, image, head, scratch: scratch.cast(), at };
        // SAFETY: the views contain what the job accesses, as was checked above; the caller's scratch has the room that
        // `Scratch` counts, and no other thread accesses this head's columns of these queries
        unsafe {
            head.pack_keys(s);
            head.pack_values(s);
            let (mut first, end) = (part(split), part(split + 1));
            while first < end {
                head.attend(s, first..end.min(first + M::QUERIES));
                first += M::QUERIES;
            }
        }
    }
}

struct Head<'a, M> {
    multiply: M,
    job: &'a AttentionJob<'a>,
    image: usize,
    head: usize,
    scratch: *mut u8,
    at: Scratch,
}

/// # Safety of every unsafe function
/// What [`AttentionUnit`] asks for, which its `call` has checked as far as views are concerned.
impl<M: Multiply> Head<'_, M> {
    /// Bytes of a panel of `chunks` chunks.
    fn panel(chunks: usize) -> usize {
        M::SHAPE.panel_bytes(chunks)
    }

    /// Chunks along a head's channels, and along the keys.
    fn chunks(&self) -> (usize, usize) {
        let chunk = M::SHAPE.elements.chunk();
        (self.job.dim.div_ceil(chunk), self.job.keys().div_ceil(chunk))
    }

    /// Values of a row in f32: room for whole chunks and whole panels.
    fn width(&self) -> usize {
        self.job.dim.next_multiple_of(64)
    }

    /// `norm(row)` of this head, with zeros up to the next row.
    #[inline(always)]
    unsafe fn row(
        &self,
        s: M::S,
        norm: Option<&Norm>,
        (from, first): (AttentionFrom, usize),
        row: usize,
        to: *mut f32,
    ) {
        let (dim, first) = (self.job.dim, first + self.head * self.job.dim);
        // SAFETY: the row is inside the view, whose rows end in padding for whole vectors; what these contain beyond the head
        // is cleared. `to` is a row of the scratch
        unsafe {
            match (from, norm) {
                (AttentionFrom::Rows(rows), Some(norm)) => {
                    norm.apply(s, rows.row(row).add(first), |column, x| s.store(to.add(column), x));
                }
                (AttentionFrom::Rows(rows), None) => {
                    let from = rows.row(row).add(first);
                    for column in (0..dim).step_by(M::S::LANES) {
                        s.store(to.add(column), s.load(from.add(column)));
                    }
                }
                (AttentionFrom::Strips(_), _) => unreachable!("strips are read as they are"),
            }
            for column in dim..self.width() {
                *to.add(column) = 0.0;
            }
        }
    }

    /// The strips, and the address of row `first` of this head and image in them, if the kernel reads strips directly.
    #[inline(always)]
    fn strips(&self, (from, column): (AttentionFrom, usize), first: usize) -> Option<(Strips, *const u8)> {
        match from {
            AttentionFrom::Strips(strips) if M::STRIPS => {
                let (row, column) = (self.image * self.job.tokens + first, column + self.head * self.job.dim);
                Some((strips, strips.at(row, column).cast_const()))
            }
            _ => None,
        }
    }

    /// Prefetches the query, key and value of a row of the next head. `q` is the address of this head's query.
    #[inline(always)]
    fn fetch_next(&self, s: M::S, strips: Strips, q: *const u8) {
        let (job, elements) = (self.job, M::SHAPE.elements);
        for column in [job.q.1, job.k.1, job.v.1] {
            for strip in 0..job.dim / elements.chunk() {
                let strip = (column - job.q.1 + job.dim) / elements.chunk() + strip;
                for plane in 0..elements.planes() {
                    s.fetch_far(q.wrapping_add(strip * strips.strip + plane * strips.plane));
                }
            }
        }
    }

    /// Kᵀ in panels of keys.
    #[inline(always)]
    unsafe fn pack_keys(&self, s: M::S) {
        let (job, cols, width, (chunks, _)) = (self.job, M::SHAPE.cols, self.width(), self.chunks());
        // SAFETY: keys are rows of the job's views, and the scratch has `keys` and `rows` of the sizes that `Scratch` counts
        unsafe {
            if let Some((strips, from)) = self.strips(job.k, job.first_key) {
                for first in (0..job.keys()).step_by(cols) {
                    let to = self.scratch.add(self.at.keys + first / cols * Self::panel(chunks));
                    let (from, rows) = (from.add(first * CHUNK_BYTES), cols.min(job.keys() - first));
                    self.multiply.pack_strip_columns(strips, from, rows, chunks, to);
                }
                return;
            }
            let rows = self.scratch.add(self.at.rows).cast::<f32>();
            for first in (0..job.keys()).step_by(cols) {
                for i in 0..cols {
                    let to = rows.add(i * width);
                    if first + i < job.keys() {
                        let key = self.image * job.tokens + job.first_key + first + i;
                        self.row(s, job.norms.map(|(_, k)| k), job.k, key, to);
                    } else {
                        to.write_bytes(0, width);
                    }
                }
                let to = self.scratch.add(self.at.keys + first / cols * Self::panel(chunks));
                self.multiply.pack_columns(rows, width, chunks, to);
            }
        }
    }

    /// V in panels of its columns.
    #[inline(always)]
    unsafe fn pack_values(&self, s: M::S) {
        let (job, shape, width, (_, chunks)) = (self.job, M::SHAPE, self.width(), self.chunks());
        let chunk = shape.elements.chunk();
        // SAFETY: values are rows of the job's views, and the scratch has `values` and `rows` of the sizes that `Scratch` counts
        unsafe {
            if let Some((strips, from)) = self.strips(job.v, job.first_key) {
                for (panel, i) in (0..job.dim / shape.cols).flat_map(|panel| (0..chunks).map(move |i| (panel, i))) {
                    let to = self.scratch.add(self.at.values + panel * Self::panel(chunks) + i * Self::panel(1));
                    let from = from.add(i * chunk * CHUNK_BYTES + panel * shape.cols / chunk * strips.strip);
                    self.multiply.pack_strip_rows(strips, from, chunk.min(job.keys() - i * chunk), to);
                }
                return;
            }
            let rows = self.scratch.add(self.at.rows).cast::<f32>();
            for i in 0..chunks {
                let count = chunk.min(job.keys() - i * chunk);
                for row in 0..count {
                    let key = self.image * job.tokens + job.first_key + i * chunk + row;
                    self.row(s, None, job.v, key, rows.add(row * width));
                }
                for panel in 0..job.dim.div_ceil(shape.cols) {
                    let to = self.scratch.add(self.at.values + panel * Self::panel(chunks) + i * Self::panel(1));
                    self.multiply.pack_rows(rows.add(panel * shape.cols), width, count, to);
                }
            }
        }
    }

    /// A block of queries in tiles.
    #[inline(always)]
    unsafe fn pack_queries(&self, s: M::S, queries: Range<usize>) {
        let (job, at, chunks) = (self.job, &self.at, self.chunks().0);
        let width = chunks * M::SHAPE.elements.chunk();
        // SAFETY: queries are rows of the job's views, and the scratch has a block of `queries` and one of `rows`
        unsafe {
            let row = self.scratch.add(at.rows).cast::<f32>();
            for i in 0..queries.len() {
                let query = self.image * job.query_rows + queries.start + i;
                self.row(s, job.norms.map(|(q, _)| q), job.q, query, row);
                let to = self.tiled(at.queries, chunks, at.queries_low, i);
                for column in (0..width).step_by(2 * M::S::LANES) {
                    if column + M::S::LANES < width {
                        to.put_pair(s, column, s.load(row.add(column)), s.load(row.add(column + M::S::LANES)));
                    } else {
                        to.put(s, column, s.load(row.add(column)));
                    }
                }
            }
        }
    }

    /// `softmax(q Kᵀ / √d) V` for a block of queries.
    #[inline(always)]
    unsafe fn attend(&self, s: M::S, queries: Range<usize>) {
        let Self { multiply, job, scratch, ref at, .. } = *self;
        let (shape, (dim_chunks, key_chunks)) = (M::SHAPE, self.chunks());
        let (rows, block) = (queries.len(), M::QUERIES * shape.cols);
        // SAFETY: both sides and the sums of each product are in the scratch, packed above for this head, or strips of the
        // job's views. It writes only this head's columns for these queries
        unsafe {
            let weights = scratch.add(at.weights);
            let (scores, sums) = (scratch.add(at.scores).cast::<f32>(), scratch.add(at.sums).cast::<f32>());
            let left = if let Some((strips, a)) = self.strips(job.q, queries.start) {
                let (a_tile, a_chunk) = (shape.tile * CHUNK_BYTES, strips.strip);
                Product { a_tile, a_chunk, ..product::<M>(a, dim_chunks, strips.plane, rows) }
            } else {
                self.pack_queries(s, queries.clone());
                product::<M>(scratch.add(at.queries), dim_chunks, at.queries_low, rows)
            };
            for panel in 0..job.keys().div_ceil(shape.cols) {
                let b = scratch.add(at.keys + panel * Self::panel(dim_chunks));
                multiply.product(&Product { b, c: scores.add(panel * block), ..left });
            }
            let mut inverse = [0f32; 64];
            let mut first = 0;
            while first < rows {
                // numbers of interleaved rows that divide a block of queries evenly
                first += match rows - first {
                    4.. if M::QUERIES.is_multiple_of(4) => self.softmax::<4>(s, queries.start, first, &mut inverse),
                    3.. if !M::QUERIES.is_multiple_of(4) => self.softmax::<3>(s, queries.start, first, &mut inverse),
                    _ => self.softmax::<1>(s, queries.start, first, &mut inverse),
                };
            }
            for panel in 0..job.dim.div_ceil(shape.cols) {
                let b = scratch.add(at.values + panel * Self::panel(key_chunks));
                let c = sums.add(panel * block);
                multiply.product(&Product { b, c, ..product::<M>(weights, key_chunks, at.weights_low, rows) });
                let width = shape.cols.min(job.dim - panel * shape.cols);
                if let (AttentionTo::Acts(acts), true) = (job.to, M::STRIPS && job.dim.is_multiple_of(shape.cols)) {
                    for (i, &inverse) in inverse.iter().enumerate().take(rows) {
                        let (row, inverse) = (c.add(i * shape.cols), s.splat(inverse));
                        let query = self.image * job.queries + queries.start + i;
                        let to = acts.row_of(shape.tile, acts.shape().elements, query);
                        let (x, y) = (s.load(row), s.load(row.add(M::S::LANES)));
                        let column = self.head * job.dim + panel * shape.cols;
                        to.put_pair(s, column, s.mul(x, inverse), s.mul(y, inverse));
                    }
                    continue;
                }
                for (i, &inverse) in inverse.iter().enumerate().take(rows) {
                    let (row, inverse) = (c.add(i * shape.cols), s.splat(inverse));
                    for column in (0..shape.cols).step_by(M::S::LANES) {
                        s.store(row.add(column), s.mul(s.load(row.add(column)), inverse));
                    }
                    let values = std::slice::from_raw_parts(row, width);
                    let query = self.image * job.queries + queries.start + i;
                    let column = self.head * job.dim + panel * shape.cols;
                    match job.to {
                        AttentionTo::Acts(acts) => acts.row(query).put_run(s, column, values),
                        AttentionTo::Rows(to) => to.row(query).add(column).copy_from_nonoverlapping(row, width),
                    }
                }
            }
        }
    }

    /// `2ˣ`, as exact as the elements that it is rounded to.
    #[inline(always)]
    fn exp2(&self, s: M::S, x: <M::S as Simd>::F) -> <M::S as Simd>::F {
        if M::SHAPE.elements.rounds() { exp2_for_bf16(s, x) } else { exp2(s, x) }
    }

    /// What is added to the last vector of scores: zero, and −∞ beyond the keys.
    #[inline(always)]
    fn padding(&self) -> [f32; 16] {
        let (keys, lanes) = (self.job.keys(), M::S::LANES);
        let last = keys.next_multiple_of(lanes) - lanes;
        std::array::from_fn(|i| if last + i < keys { 0.0 } else { f32::NEG_INFINITY })
    }

    /// Row `i` of a block in tiles.
    #[inline(always)]
    fn tiled(&self, start: usize, chunks: usize, low: usize, i: usize) -> ActsRow {
        let tile = M::SHAPE.tile;
        ActsRow::new(M::SHAPE, self.scratch.wrapping_add(start + i / tile * chunks * tile * CHUNK_BYTES), i % tile, low)
    }

    /// The scores of `N` rows of a block, from `first` on → `e^((score − largest) / √d)` in tiles, and one over their sums.
    /// Returns `N`. The rows are interleaved, because each is a chain of dependent operations. The scores are not
    /// overwritten, because reading a vector that was just written in parts stalls.
    #[inline(always)]
    unsafe fn softmax<const N: usize>(&self, s: M::S, query: usize, first: usize, inverse: &mut [f32; 64]) -> usize {
        let Self { job, scratch, ref at, .. } = *self;
        let (keys, shape, lanes, (_, key_chunks)) = (job.keys(), M::SHAPE, M::S::LANES, self.chunks());
        let place = |key: usize| key / shape.cols * M::QUERIES * shape.cols + key % shape.cols;
        // whole vectors of keys up to `last`, one that may have padding, then zeros up to `end`
        let (last, end) = (keys.next_multiple_of(lanes) - lanes, keys.next_multiple_of(shape.elements.chunk()));
        let scale = std::f32::consts::LOG2_E / (job.dim as f32).sqrt();
        // SAFETY: scores and weights of these rows are in the scratch, and a panel is whole vectors
        unsafe {
            if let Some((strips, from)) = self.strips(job.q, query + first) {
                (0..N).for_each(|row| self.fetch_next(s, strips, from.add(row * CHUNK_BYTES)));
            }
            let scores = scratch.add(at.scores).cast::<f32>().add(first * shape.cols);
            let score = |row: usize, key: usize| s.load(scores.add(row * shape.cols + place(key)));
            let padding = s.load(self.padding().as_ptr());
            let tails: [_; N] = std::array::from_fn(|row| s.add(score(row, last), padding));
            let mut largest = tails;
            for key in (0..last).step_by(lanes) {
                for (row, largest) in largest.iter_mut().enumerate() {
                    *largest = s.max(*largest, score(row, key));
                }
            }
            let (offsets, scale) = (largest.map(|x| s.splat(-s.largest(x) * scale)), s.splat(scale));
            let to: [_; N] = std::array::from_fn(|row| self.tiled(at.weights, key_chunks, at.weights_low, first + row));
            let mut sums = [s.splat(0.0); N];
            let mut key = 0;
            while key + 2 * lanes <= last {
                for (row, sum) in sums.iter_mut().enumerate() {
                    let x = self.exp2(s, s.fma(score(row, key), scale, offsets[row]));
                    let y = self.exp2(s, s.fma(score(row, key + lanes), scale, offsets[row]));
                    *sum = s.add(*sum, s.add(x, y));
                    to[row].put_pair(s, key, x, y);
                }
                key += 2 * lanes;
            }
            while key < end {
                for (row, sum) in sums.iter_mut().enumerate() {
                    let mut x = s.splat(0.0);
                    if key <= last {
                        let score = if key == last { tails[row] } else { score(row, key) };
                        x = self.exp2(s, s.fma(score, scale, offsets[row]));
                        *sum = s.add(*sum, x);
                    }
                    to[row].put(s, key, x);
                }
                key += lanes;
            }
            for (row, sum) in sums.into_iter().enumerate() {
                inverse[first + row] = 1.0 / s.sum(sum);
            }
        }
        N
    }
}

/// A product of tiles in scratch, whose panel and output the caller fills in.
fn product<M: Multiply>(a: *const u8, chunks: usize, a_low: usize, rows: usize) -> Product<'static> {
    let a_chunk = M::SHAPE.tile * CHUNK_BYTES;
    Product {
        a,
        a_tile: chunks * a_chunk,
        a_chunk,
        a_low,
        rows,
        b: std::ptr::null(),
        chunks,
        c: std::ptr::null_mut(),
        accumulate: false,
        next: std::ptr::null(),
        next_bytes: 0,
        follow: None,
    }
}
