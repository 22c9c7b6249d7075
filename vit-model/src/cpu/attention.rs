//! Attention, one head of one image at a time: scores, softmax and the weighted sum for a block of queries stay in the
//! cache; nothing of the size of all scores is ever written. In f32, whatever the linear layers are computed in.

use std::ops::Range;

use super::norm::Norm;
use super::pack::{Acts, Elements, Product, Rows, Shape, pack_panel};
use super::simd::{Op, Simd, exp};

/// The attentions of one layer.
pub(crate) struct Job<'a> {
    /// Queries, keys and values, each with the column of its first head.
    pub(crate) q: (Rows, usize),
    pub(crate) k: (Rows, usize),
    pub(crate) v: (Rows, usize),
    pub(crate) images: usize,
    /// Queries of an image; with one alone, all images share it.
    pub(crate) queries: usize,
    /// Rows of an image in `k` and `v`, and the first of them that is a key.
    pub(crate) tokens: usize,
    pub(crate) first_key: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    /// Norms on q and k.
    pub(crate) norms: Option<(&'a Norm, &'a Norm)>,
    pub(crate) to: To,
}

/// Where attention goes.
#[derive(Clone, Copy)]
pub(crate) enum To {
    Acts(Acts),
    Rows(Rows),
}

impl Job<'_> {
    /// Parts that a head's queries are cut in, where there are fewer heads than threads to keep busy.
    fn splits(&self, threads: usize) -> usize {
        if threads == 1 { 1 } else { (2 * threads).div_ceil(self.images * self.heads).min(self.queries.div_ceil(32)) }
    }

    /// Independent parts of the job.
    pub(crate) fn units(&self, threads: usize) -> usize {
        self.images * self.heads * self.splits(threads)
    }

    fn keys(&self) -> usize {
        self.tokens - self.first_key
    }
}

/// Where the parts of a thread's scratch begin, in f32 values.
struct Scratch {
    keys: usize,
    values: usize,
    queries: usize,
    scores: usize,
    weights: usize,
    sums: usize,
    rows: usize,
    end: usize,
}

impl Scratch {
    fn new<S: Simd>(keys: usize, dim: usize) -> Self {
        let (dim_chunks, key_chunks) = (dim.div_ceil(16), keys.div_ceil(16));
        let (dim_panels, key_panels) = (dim.div_ceil(S::COLS), keys.div_ceil(S::COLS));
        let mut end = 0;
        let mut take = |len: usize| {
            let start = end;
            end += len.next_multiple_of(16);
            start
        };
        let this = Self {
            keys: take(key_panels * S::COLS * dim_chunks * 16),
            values: take(dim_panels * S::COLS * key_chunks * 16),
            queries: take(S::BLOCK * dim_chunks * 16),
            scores: take(key_panels * S::BLOCK * S::COLS),
            weights: take(S::BLOCK * key_chunks * 16),
            sums: take(dim_panels * S::BLOCK * S::COLS),
            rows: take(S::COLS * dim_chunks * 16),
            end: 0,
        };
        Self { end, ..this }
    }
}

/// Bytes of scratch that a thread needs.
pub(crate) fn scratch_bytes<S: Simd>(keys: usize, dim: usize) -> usize {
    Scratch::new::<S>(keys, dim).end * size_of::<f32>()
}

/// One unit of a job.
pub(crate) struct Unit<'a> {
    pub(crate) job: &'a Job<'a>,
    pub(crate) unit: usize,
    pub(crate) threads: usize,
    /// [`scratch_bytes`], this thread's own.
    pub(crate) scratch: *mut f32,
}

impl<S: Simd> Op<S> for Unit<'_> {
    type Out = ();

    #[inline(always)]
    fn call(self, s: S) {
        let Self { job, unit, threads, scratch } = self;
        let splits = job.splits(threads);
        let (image, head, split) = (unit / splits / job.heads, unit / splits % job.heads, unit % splits);
        let part = |i: usize| (job.queries * i / splits).next_multiple_of(S::BLOCK).min(job.queries);
        let head = Head { job, image, head, scratch, at: Scratch::new::<S>(job.keys(), job.dim) };
        // SAFETY: `job` describes rows inside its buffers, the scratch has the room `Scratch` counted, and no other unit
        // writes this head's columns of these queries
        unsafe {
            head.pack_keys(s);
            head.pack_values(s);
            let (mut first, end) = (part(split), part(split + 1));
            while first < end {
                head.attend(s, first..end.min(first + S::BLOCK));
                first += S::BLOCK;
            }
        }
    }
}

struct Head<'a> {
    job: &'a Job<'a>,
    image: usize,
    head: usize,
    scratch: *mut f32,
    at: Scratch,
}

/// # Safety of every function
/// As in [`Unit::call`].
impl Head<'_> {
    fn shape<S: Simd>() -> Shape {
        Shape { elements: Elements::F32, tile: S::TILE, cols: S::COLS, run: S::RUN }
    }

    /// `scale · norm(row)`, with zeros up to whole chunks.
    #[inline(always)]
    unsafe fn row<S: Simd>(&self, s: S, norm: Option<&Norm>, scale: f32, from: *const f32, to: *mut f32) {
        let (dim, scale) = (self.job.dim, s.splat(scale));
        // SAFETY: the caller's; both norms and rows end in whole vectors of zeros or of other heads, which are cleared
        unsafe {
            match norm {
                Some(norm) => norm.apply(s, from, |column, x| s.store(to.add(column), s.mul(x, scale))),
                None => {
                    for column in (0..dim).step_by(S::LANES) {
                        s.store(to.add(column), s.mul(s.load(from.add(column)), scale));
                    }
                }
            }
            for column in dim..dim.next_multiple_of(16) {
                *to.add(column) = 0.0;
            }
        }
    }

    /// Kᵀ in panels of keys, with 1/√d.
    #[inline(always)]
    unsafe fn pack_keys<S: Simd>(&self, s: S) {
        let (job, width) = (self.job, self.job.dim.next_multiple_of(16));
        let scale = 1.0 / (job.dim as f32).sqrt();
        // SAFETY: the caller's
        unsafe {
            let rows = self.scratch.add(self.at.rows);
            for first in (0..job.keys()).step_by(S::COLS) {
                for i in 0..S::COLS {
                    let to = rows.add(i * width);
                    if first + i < job.keys() {
                        let key = self.image * job.tokens + job.first_key + first + i;
                        let from = job.k.0.row(key).add(job.k.1 + self.head * job.dim);
                        self.row(s, job.norms.map(|(_, k)| k), scale, from, to);
                    } else {
                        to.write_bytes(0, width);
                    }
                }
                let to = self.scratch.add(self.at.keys + first * width);
                pack_panel(Self::shape::<S>(), rows, width, S::COLS, width / 16, to.cast());
            }
        }
    }

    /// V in panels of its columns.
    #[inline(always)]
    unsafe fn pack_values<S: Simd>(&self, s: S) {
        let job = self.job;
        let chunks = job.keys().div_ceil(16);
        for panel in 0..job.dim.div_ceil(S::COLS) {
            for key in 0..chunks * 16 {
                for run in (0..S::COLS).step_by(S::RUN) {
                    let at = (key / 16 * (S::COLS / S::RUN) + run / S::RUN) * 16 + key % 16;
                    // SAFETY: the caller's; a row has room for a panel's width more than it holds
                    unsafe {
                        let to = self.scratch.add(self.at.values + panel * S::COLS * chunks * 16 + at * S::RUN);
                        let row = self.image * job.tokens + job.first_key + key;
                        let from = job.v.0.row(row).wrapping_add(job.v.1 + self.head * job.dim + panel * S::COLS + run);
                        for column in (0..S::RUN).step_by(S::LANES) {
                            let x = if key < job.keys() { s.load(from.add(column)) } else { s.splat(0.0) };
                            s.store(to.add(column), x);
                        }
                    }
                }
            }
        }
    }

    /// `softmax(q Kᵀ / √d) V` for a block of queries.
    #[inline(always)]
    unsafe fn attend<S: Simd>(&self, s: S, queries: Range<usize>) {
        let Self { job, scratch, ref at, .. } = *self;
        let (dim_chunks, key_chunks) = (job.dim.div_ceil(16), job.keys().div_ceil(16));
        let rows = queries.len();
        // SAFETY: the caller's
        unsafe {
            let (q, scores) = (scratch.add(at.queries), scratch.add(at.scores));
            let (weights, sums, row) = (scratch.add(at.weights), scratch.add(at.sums), scratch.add(at.rows));
            for i in 0..rows {
                let query = if job.queries == 1 { 0 } else { self.image * job.queries + queries.start + i };
                let from = job.q.0.row(query).add(job.q.1 + self.head * job.dim);
                self.row(s, job.norms.map(|(q, _)| q), 1.0, from, row);
                for chunk in 0..dim_chunks {
                    let to = q.add(((i / S::TILE * dim_chunks + chunk) * S::TILE + i % S::TILE) * 16);
                    for column in (0..16).step_by(S::LANES) {
                        s.store(to.add(column), s.load(row.add(chunk * 16 + column)));
                    }
                }
            }
            for panel in 0..job.keys().div_ceil(S::COLS) {
                let b = scratch.add(at.keys + panel * S::COLS * dim_chunks * 16);
                let c = scores.add(panel * S::BLOCK * S::COLS);
                s.product(&product::<S>(q, dim_chunks, rows, b, c));
            }
            let mut inverse = [0f32; 64];
            for (i, inverse) in inverse.iter_mut().enumerate().take(rows) {
                let to = weights.add((i / S::TILE * key_chunks * S::TILE + i % S::TILE) * 16);
                *inverse = 1.0 / self.softmax(s, scores.add(i * S::COLS), to);
            }
            for panel in 0..job.dim.div_ceil(S::COLS) {
                let b = scratch.add(at.values + panel * S::COLS * key_chunks * 16);
                let c = sums.add(panel * S::BLOCK * S::COLS);
                s.product(&product::<S>(weights, key_chunks, rows, b, c));
                let width = S::COLS.min(job.dim - panel * S::COLS);
                for (i, &inverse) in inverse.iter().enumerate().take(rows) {
                    let (row, inverse) = (c.add(i * S::COLS), s.splat(inverse));
                    for column in (0..S::COLS).step_by(S::LANES) {
                        s.store(row.add(column), s.mul(s.load(row.add(column)), inverse));
                    }
                    let values = std::slice::from_raw_parts(row, width);
                    let query = self.image * job.queries + queries.start + i;
                    let column = self.head * job.dim + panel * S::COLS;
                    match job.to {
                        To::Acts(acts) => acts.put_row(s, query, column, values),
                        To::Rows(to) => to.row(query).add(column).copy_from_nonoverlapping(row, width),
                    }
                }
            }
        }
    }

    /// Scores of one query, a panel every `BLOCK · COLS` values → `e^(score − largest)` in chunks; answers their sum.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, s: S, scores: *mut f32, to: *mut f32) -> f32 {
        let keys = self.job.keys();
        let place = |key: usize| key / S::COLS * S::BLOCK * S::COLS + key % S::COLS;
        let padded = keys.next_multiple_of(S::LANES);
        // SAFETY: the caller's; a panel is whole vectors
        unsafe {
            for key in keys..padded {
                *scores.add(place(key)) = f32::NEG_INFINITY;
            }
            let mut largest = s.splat(f32::NEG_INFINITY);
            for key in (0..padded).step_by(S::LANES) {
                largest = s.max(largest, s.load(scores.add(place(key))));
            }
            let largest = s.splat(s.largest(largest));
            let mut sum = s.splat(0.0);
            for key in (0..keys.next_multiple_of(16)).step_by(S::LANES) {
                let mut x = s.splat(0.0);
                if key < padded {
                    x = exp(s, s.sub(s.load(scores.add(place(key))), largest));
                    sum = s.add(sum, x);
                }
                s.store(to.add(key / 16 * S::TILE * 16 + key % 16), x);
            }
            s.sum(sum)
        }
    }
}

/// A product of tiles and a panel that both lie in scratch.
fn product<S: Simd>(a: *const f32, chunks: usize, rows: usize, b: *const f32, c: *mut f32) -> Product {
    let a_tile = S::TILE * chunks * 64;
    Product { a: a.cast(), a_tile, a_low: 0, rows, b: b.cast(), chunks, c, accumulate: false, next: b.cast() }
}
