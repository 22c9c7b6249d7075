//! One forward pass: its phases top to bottom, as every thread runs them.
//!
//! A phase cuts its work into units, and ends when all of them are done. What makes it sound that many threads write to the
//! same activations: [`Worker::each`] gives each unit to one thread, no thread enters the next phase before a phase is over,
//! and the units of a phase write different rows or columns.

use std::ops::Range;

use super::attention::{AttentionFrom, AttentionJob, AttentionTo};
use super::buffer::Buffer;
use super::copy::{CopyRows, Patches};
use super::kernel::{Integers, Kernel};
use super::linear::{Add, LinearJob, LinearTo};
use super::net::{AttnPool, Block, Mlp, Net};
use super::norm::{Norm, NormRows, NormTo};
use super::packed::PackedLinear;
use super::threads::Worker;
use super::tiles::{Acts, Rows};
use super::workspace::{Activations, Workspace, head_tokens, tail_rows};
use crate::{Activation, Config, Pool};

/// Rows of tokens that a pass takes at most (but at least one image). A larger batch runs as several passes, so that
/// activations stay small.
pub(super) const ROWS_AT_ONCE: usize = 1600;

/// Rows per unit in phases that treat each row independently.
const ROWS_PER_UNIT: usize = 16;

/// What the caller wants of a pass, and where it is appended.
pub(super) struct Answers<'a> {
    pub(super) logits: Option<&'a mut Vec<f32>>,
    pub(super) features: Option<&'a mut Vec<f32>>,
    pub(super) pre_logits: Option<&'a mut Vec<f32>>,
    /// The tokens that leave these blocks.
    pub(super) blocks: &'a mut [(usize, Vec<f32>)],
}

impl Answers<'_> {
    pub(super) fn clear(&mut self) {
        let vectors = [&mut self.logits, &mut self.features, &mut self.pre_logits];
        vectors.into_iter().flatten().for_each(|vector| vector.clear());
        self.blocks.iter_mut().for_each(|(_, tokens)| tokens.clear());
    }
}

/// What the passes of an engine have in common.
#[derive(Clone, Copy)]
pub(super) struct Model<'a> {
    pub(super) config: &'a Config,
    pub(super) kernel: &'a dyn Kernel,
    pub(super) net: &'a Net,
    pub(super) threads: usize,
}

/// A pass over some images.
pub(super) struct Pass<'a> {
    model: Model<'a>,
    scratch: &'a [Buffer],
    pixels: &'a [f32],
    images: usize,
    /// Whether only tokens are wanted, so that the head does not run.
    headless: bool,
    /// The number of first tokens of an image that the last block computes, if the others are not read.
    few: Option<usize>,
    /// Where the tokens that leave a block are copied.
    taps: Vec<(usize, Rows)>,
    pub(super) at: Activations,
}

impl<'a> Pass<'a> {
    /// A pass over `images` images, for which the workspace has room.
    ///
    /// # Safety
    /// The workspace was last fitted for this model and at least so many images. The vectors of `answers` are not changed
    /// before [`answer`](Self::answer).
    pub(super) unsafe fn new(
        model: Model<'a>,
        workspace: &'a mut Workspace,
        pixels: &'a [f32],
        images: usize,
        answers: &mut Answers<'_>,
    ) -> Self {
        let config = model.config;
        let headless = answers.logits.is_none() && answers.pre_logits.is_none();
        let unseen = !headless && answers.features.is_none() && answers.blocks.is_empty();
        let (rows, dim) = (images * config.num_tokens(), config.embed_dim);
        let tap = |(block, tokens): &mut (usize, Vec<f32>)| {
            let start = tokens.len();
            tokens.resize(start + rows * dim, 0.0);
            // SAFETY: the vector has just got these rows, and the caller leaves it alone until the pass is over
            (*block, unsafe { Rows::packed(tokens[start..].as_mut_ptr(), rows, dim) })
        };
        let taps = answers.blocks.iter_mut().map(tap).collect();
        // SAFETY: the caller has fitted the workspace for this configuration and kernel
        let (at, scratch) = unsafe { workspace.activations(config, model.kernel) };
        Self { model, scratch, pixels, images, headless, few: head_tokens(config).filter(|_| unseen), taps, at }
    }

    fn config(&self) -> &'a Config {
        self.model.config
    }

    fn kernel(&self) -> &'a dyn Kernel {
        self.model.kernel
    }

    /// The whole pass, on each thread.
    pub(super) fn run(&self, worker: &Worker<'_>, blocks: &[Block]) {
        self.begin(worker);
        self.steps(worker, 0, &blocks[..self.depth()]);
        self.end(worker);
    }

    /// The number of blocks that run.
    pub(super) fn depth(&self) -> usize {
        let last = self.taps.iter().map(|(block, _)| *block + 1).max();
        last.filter(|_| self.headless).unwrap_or(self.config().depth)
    }

    /// Up to the first block, on each thread.
    pub(super) fn begin(&self, worker: &Worker<'_>) {
        let _entered = self.kernel().enter();
        self.embed(worker, self.model.net);
    }

    /// Some blocks, of which `first` is the number of the first, on each thread.
    pub(super) fn steps(&self, worker: &Worker<'_>, first: usize, blocks: &[Block]) {
        let _entered = self.kernel().enter();
        for (i, block) in (first..).zip(blocks) {
            let few = self.few.filter(|_| i + 1 == self.config().depth);
            self.block(worker, block, few);
            for (_, tap) in self.taps.iter().filter(|(block, _)| *block == i) {
                self.copy_rows(worker, *tap);
            }
        }
    }

    /// What follows the last block, on each thread.
    pub(super) fn end(&self, worker: &Worker<'_>) {
        let net = self.model.net;
        let _entered = self.kernel().enter();
        if let Some(norm) = &net.norm
            && (self.taps.is_empty() || !self.headless)
        {
            let (rows, x) = self.few.map_or((self.rows(), self.at.x), |few| (self.images * few, self.at.pooled));
            self.norm(worker, norm, x, rows, NormTo::Rows(x));
        }
        if !self.headless {
            self.head(worker, net);
        }
    }

    /// Rows of tokens.
    pub(super) fn rows(&self) -> usize {
        self.images * self.config().num_tokens()
    }

    /// Images → tokens in `x`.
    fn embed(&self, worker: &Worker<'_>, net: &Net) {
        let config = self.config();
        let ([rows, columns], n, dim) = (config.grid(), config.num_tokens(), config.embed_dim);
        let (patches, prefix) = (config.num_patches(), config.num_prefix_tokens());
        let image = self.pixels.len() / self.images;
        worker.each(self.images * rows, |unit| {
            let (i, grid_row) = (unit / rows, unit % rows);
            let patches = Patches {
                pixels: &self.pixels[i * image..][..image],
                image_size: config.img_size,
                patch_size: config.patch_size,
                grid_row,
                first: unit * columns,
                patch: self.scratch(worker),
                to: self.at.patches,
            };
            // SAFETY: the scratch has room for a patch and is this thread's, and this row of patches is this unit's
            unsafe { self.kernel().patches(patches) };
            if grid_row == 0
                && let Some(table) = &net.prefix
            {
                for token in 0..table.count {
                    // SAFETY: both are rows of `dim` values, and the prefix of an image is written by one unit
                    unsafe { self.at.x.row(i * n + token).copy_from_nonoverlapping(table.rows.row(token), dim) };
                }
            }
        });
        let positions = net.positions.as_ref().map(|table| table.rows);
        let (count, period, stride, first) = (self.images * patches, patches, n, prefix);
        match &net.patch_norm {
            None => {
                let add = Add::Position { rows: positions, period, stride, first };
                self.linear(worker, &net.patch, self.at.patches, count, None, LinearTo::Rows(self.at.x, add));
            }
            Some(norm) => {
                let to = LinearTo::Rows(self.at.embedded, Add::Nothing);
                self.linear(worker, &net.patch, self.at.patches, count, None, to);
                let to = NormTo::Position { to: self.at.x, add: positions, period, stride, first };
                self.norm(worker, norm, self.at.embedded, count, to);
            }
        }
        if let Some(norm) = &net.norm_pre {
            self.norm(worker, norm, self.at.x, self.rows(), NormTo::Rows(self.at.x));
        }
    }

    /// `x += attn(norm1(x))`, then `x += mlp(norm2(x))`. With `few`, only for the first tokens of each image, which are written
    /// to `pooled`; of the other tokens only keys and values are computed.
    fn block(&self, worker: &Worker<'_>, block: &Block, few: Option<usize>) {
        let at = &self.at;
        let a = self.norm_for(worker, &block.qkv, &block.norm1, at.x, self.rows(), at.a);
        self.linear(worker, &block.qkv, a, self.rows(), None, at.between.0);
        let (queries, x, to, hidden) = match few {
            None => (self.config().num_tokens(), at.x, at.a, at.h),
            Some(few) => {
                worker.each(self.images, |image| self.pool(image));
                (few, at.pooled, at.tail, at.tail_h)
            }
        };
        let rows = self.images * queries;
        let attended = match &block.attn_norm {
            None => AttentionTo::Acts(to),
            Some(_) => AttentionTo::Rows(at.wide),
        };
        self.attend(worker, block, queries, attended);
        let a = match &block.attn_norm {
            None => to,
            Some(norm) => self.norm_for(worker, &block.proj, norm, at.wide, rows, to),
        };
        self.linear(worker, &block.proj, a, rows, None, LinearTo::Rows(x, Add::Residual));
        let a = self.norm_for(worker, &block.mlp.fc1, &block.norm2, x, rows, to);
        self.mlp(worker, &block.mlp, rows, [a, hidden], x);
    }

    /// The attention of a block, for the first `queries` tokens of each image.
    pub(super) fn attend(&self, worker: &Worker<'_>, block: &Block, queries: usize, to: AttentionTo) {
        let (config, from, tokens) = (self.config(), self.at.between.1, self.config().num_tokens());
        let job = AttentionJob {
            q: (from, 0),
            k: (from, config.embed_dim),
            v: (from, 2 * config.embed_dim),
            images: self.images,
            queries,
            query_rows: tokens,
            tokens,
            first_key: 0,
            heads: config.num_heads,
            dim: config.head_dim(),
            norms: block.qk_norm.as_ref().map(|(q, k)| (q, k)),
            to,
        };
        self.attention(worker, &job);
    }

    /// `to += fc2(norm(act(fc1(from))))`, with `hidden` in between.
    fn mlp(&self, worker: &Worker<'_>, mlp: &Mlp, rows: usize, [from, hidden]: [Acts; 2], to: Rows) {
        let act = Some(self.config().act);
        let hidden = match &mlp.norm {
            None => {
                self.linear(worker, &mlp.fc1, from, rows, act, LinearTo::Acts(hidden));
                hidden
            }
            Some(norm) => {
                self.linear(worker, &mlp.fc1, from, rows, act, LinearTo::Rows(self.at.wide, Add::Nothing));
                self.norm_for(worker, &mlp.fc2, norm, self.at.wide, rows, hidden)
            }
        };
        self.linear(worker, &mlp.fc2, hidden, rows, None, LinearTo::Rows(to, Add::Residual));
    }

    /// Tokens → what the head reads → logits.
    fn head(&self, worker: &Worker<'_>, net: &Net) {
        let (config, dim) = (self.config(), self.config().pooled_dim());
        let rows = tail_rows(config, self.images);
        if let Some(pool) = &net.attn_pool {
            self.attn_pool(worker, pool);
        } else if config.global_pool != Pool::None && self.few.is_none() {
            worker.each(self.images, |image| self.pool(image));
        }
        let pooled = self.pooled();
        if let Some(norm) = &net.fc_norm {
            self.norm(worker, norm, pooled, rows, NormTo::Rows(pooled));
        }
        let logits = |add| LinearTo::Rows(self.at.logits, add);
        if config.dist_token {
            for (i, head) in [&net.head, &net.head_dist].into_iter().enumerate() {
                if let Some(head) = head {
                    let add = if i == 0 { Add::Nothing } else { Add::Residual };
                    // the class tokens, then the distillation tokens
                    self.to_acts(worker, self.at.pooled, (2, i), rows, dim, self.at.tail);
                    self.linear(worker, head, self.at.tail, rows, None, logits(add));
                }
            }
            return;
        }
        self.to_acts(worker, pooled, (1, 0), rows, dim, self.at.tail);
        let mut tail = self.at.tail;
        if let Some(fc) = &net.pre_logits {
            self.linear(worker, fc, self.at.tail, rows, None, LinearTo::Rows(self.at.pre, Add::Nothing));
            worker.each(rows, |row| {
                for column in 0..fc.n() {
                    // SAFETY: the row has `n` values, and only this unit accesses it
                    unsafe {
                        let x = self.at.pre.row(row).add(column);
                        *x = (*x).tanh();
                    }
                }
            });
            self.to_acts(worker, self.at.pre, (1, 0), rows, fc.n(), self.at.tail_p);
            tail = self.at.tail_p;
        }
        if let Some(head) = &net.head {
            self.linear(worker, head, tail, rows, None, logits(Add::Nothing));
        }
    }

    /// What the head reads, before `pre_logits`.
    fn pooled(&self) -> Rows {
        if self.config().global_pool == Pool::None { self.at.x } else { self.at.pooled }
    }

    /// Tokens of one image → one row of `pooled`, or two in a distilled model.
    fn pool(&self, image: usize) {
        let (config, dim) = (self.config(), self.config().embed_dim);
        let n = config.num_tokens();
        let first = if config.pool_include_prefix { 0 } else { config.num_prefix_tokens() };
        let token = |i: usize| {
            // SAFETY: `x` has this row of `dim` values, and no unit of this phase writes it
            unsafe { std::slice::from_raw_parts(self.at.x.row(image * n + i), dim) }
        };
        let out = |row: usize| {
            // SAFETY: `pooled` has this row, which belongs to this image and so to this unit
            unsafe { std::slice::from_raw_parts_mut(self.at.pooled.row(row), config.pooled_dim()) }
        };
        if config.dist_token {
            out(2 * image).copy_from_slice(token(0));
            out(2 * image + 1).copy_from_slice(token(1));
            return;
        }
        let mut out = out(image);
        let (mean, max) = match config.global_pool {
            Pool::Avg => (1.0, 0.0),
            Pool::Max => (0.0, 1.0),
            Pool::Avgmax => (0.5, 0.5),
            Pool::TokenAvg => {
                let class;
                (class, out) = out.split_at_mut(dim);
                class.copy_from_slice(token(0));
                (1.0, 0.0)
            }
            Pool::Token | Pool::Map | Pool::None => {
                out.copy_from_slice(token(0));
                return;
            }
        };
        for (column, out) in out.iter_mut().enumerate() {
            let (mut sum, mut largest) = (0f64, f32::NEG_INFINITY);
            for i in first..n {
                let x = token(i)[column];
                sum += f64::from(x);
                largest = if x > largest || x.is_nan() { x } else { largest };
            }
            *out = match (mean > 0.0, max > 0.0) {
                (true, false) => (sum / (n - first) as f64) as f32,
                (false, _) => largest,
                (true, true) => mean * (sum / (n - first) as f64) as f32 + max * largest,
            };
        }
    }

    /// A learned query attends to the tokens, then an MLP with a residual.
    fn attn_pool(&self, worker: &Worker<'_>, pool: &AttnPool) {
        let (config, dim, rows) = (self.config(), self.config().embed_dim, self.rows());
        self.to_acts(worker, self.at.x, (1, 0), rows, dim, self.at.a);
        self.linear(worker, &pool.kv, self.at.a, rows, None, LinearTo::Rows(self.at.qkv, Add::Nothing));
        let job = AttentionJob {
            q: (AttentionFrom::Rows(pool.query.rows), 0),
            k: (AttentionFrom::Rows(self.at.qkv), 0),
            v: (AttentionFrom::Rows(self.at.qkv), dim),
            images: self.images,
            queries: 1,
            query_rows: 0,
            tokens: config.num_tokens(),
            first_key: if config.pool_include_prefix { 0 } else { config.num_prefix_tokens() },
            heads: config.num_heads,
            dim: config.head_dim(),
            norms: None,
            to: AttentionTo::Acts(self.at.tail),
        };
        self.attention(worker, &job);
        self.linear(worker, &pool.proj, self.at.tail, self.images, None, LinearTo::Rows(self.at.pooled, Add::Nothing));
        self.norm(worker, &pool.norm, self.at.pooled, self.images, NormTo::Acts(self.at.tail));
        self.mlp(worker, &pool.mlp, self.images, [self.at.tail, self.at.tail_h], self.at.pooled);
    }

    /// Appends what the caller wants, after the pass has run.
    pub(super) fn answer(self, answers: &mut Answers<'_>) {
        let config = self.config();
        let (dim, rows) = (config.pooled_dim(), tail_rows(config, self.images));
        let append = |to: &mut Vec<f32>, from: Rows, count: usize, width: usize| {
            to.reserve(count * width);
            for i in 0..count {
                // SAFETY: the workspace has these rows, and no thread writes them after the pass
                to.extend_from_slice(unsafe { std::slice::from_raw_parts(from.row(i), width) });
            }
        };
        if let Some(features) = &mut answers.features {
            append(features, self.at.x, self.rows(), config.embed_dim);
        }
        if let Some(pre_logits) = &mut answers.pre_logits {
            match &self.model.net.pre_logits {
                Some(fc) => append(pre_logits, self.at.pre, rows, fc.n()),
                None if config.dist_token => {
                    for image in 0..rows {
                        let token = |i| {
                            // SAFETY: `pooled` has two rows per image, and no thread writes them after the pass
                            unsafe { std::slice::from_raw_parts(self.at.pooled.row(2 * image + i), dim) }
                        };
                        pre_logits.extend(token(0).iter().zip(token(1)).map(|(class, dist)| (class + dist) * 0.5));
                    }
                }
                None => append(pre_logits, self.pooled(), rows, dim),
            }
        }
        if let Some(logits) = &mut answers.logits {
            let start = logits.len();
            append(logits, self.at.logits, rows, config.num_classes);
            if config.dist_token {
                logits[start..].iter_mut().for_each(|x| *x *= 0.5);
            }
        }
    }

    /// This thread's scratch.
    fn scratch(&self, worker: &Worker<'_>) -> *mut f32 {
        self.scratch[worker.index].ptr().cast()
    }

    /// A linear layer. Rounds its input first, if the layer reads integers and `from` has floats.
    pub(super) fn linear(
        &self,
        worker: &Worker<'_>,
        linear: &PackedLinear,
        from: Acts,
        rows: usize,
        act: Option<Activation>,
        to: LinearTo,
    ) {
        let from = match self.rounding(linear) {
            Some((integers, bytes)) if from.shape() != linear.shape() => {
                // SAFETY: each unit has its own rows, whose number is a multiple of eight except for the last
                by_rows(worker, rows, |rows| unsafe { integers.round(from, bytes, rows) });
                bytes
            }
            _ => from,
        };
        let (job, threads) = (LinearJob::new(linear, from, rows, act, to), self.model.threads);
        let units = self.kernel().linear_units(&job, threads);
        worker.each(units, |unit| {
            // SAFETY: `fit` has sized this thread's scratch, the thread has entered, and each unit runs once; no unit of this
            // phase writes what the layer reads, except that a residual is added to the rows and columns of the same unit
            unsafe { self.kernel().linear(&job, unit, threads, self.scratch(worker)) };
        });
    }

    fn attention(&self, worker: &Worker<'_>, job: &AttentionJob<'_>) {
        let threads = self.model.threads;
        worker.each(job.units(threads), |unit| {
            // SAFETY: `fit` has sized this thread's scratch, the thread has entered, and each unit runs once; no unit of this
            // phase writes queries, keys or values
            unsafe { self.kernel().attention(job, unit, threads, self.scratch(worker)) };
        });
    }

    fn norm(&self, worker: &Worker<'_>, norm: &Norm, from: Rows, rows: usize, to: NormTo) {
        by_rows(worker, rows, |rows| {
            // SAFETY: each unit reads and writes its own rows
            unsafe { self.kernel().norm(NormRows::new(norm, from, rows, to)) };
        });
    }

    /// Norms rows for a linear layer. Returns what the layer reads, which is `to`, or `to` rounded if it reads integers.
    pub(super) fn norm_for(
        &self,
        worker: &Worker<'_>,
        next: &PackedLinear,
        norm: &Norm,
        from: Rows,
        rows: usize,
        to: Acts,
    ) -> Acts {
        let rounding = self.rounding(next);
        by_rows(worker, rows, |rows| {
            // SAFETY: each unit reads and writes its own rows, whose number is a multiple of eight except for the last
            unsafe {
                self.kernel().norm(NormRows::new(norm, from, rows.clone(), NormTo::Acts(to)));
                if let Some((integers, bytes)) = rounding {
                    integers.round(to, bytes, rows);
                }
            }
        });
        self.normed(next, to)
    }

    /// What a linear layer reads after [`norm_for`](Self::norm_for) has written to `to`.
    pub(super) fn normed(&self, next: &PackedLinear, to: Acts) -> Acts {
        self.rounding(next).map_or(to, |(_, bytes)| bytes)
    }

    /// How activations are rounded and where they are then stored, if a layer multiplies integers.
    fn rounding(&self, linear: &PackedLinear) -> Option<(&'a dyn Integers, Acts)> {
        let integers = self.kernel().integers().filter(|integers| integers.shape() == linear.shape())?;
        Some((integers, self.at.bytes.resized(self.rows(), linear.k())))
    }

    /// Rows of f32 → tiles: rows `first`, `first + step`, …
    fn to_acts(&self, worker: &Worker<'_>, from: Rows, every: (usize, usize), rows: usize, dim: usize, to: Acts) {
        by_rows(worker, rows, |rows| {
            // SAFETY: each unit writes its own rows, and no unit of this phase writes to `from`
            unsafe { self.kernel().copy(CopyRows::new(from, every, rows, dim, to)) };
        });
    }

    /// Copies the tokens as they are now.
    fn copy_rows(&self, worker: &Worker<'_>, to: Rows) {
        let dim = self.config().embed_dim;
        by_rows(worker, self.rows(), |rows| {
            for i in rows {
                // SAFETY: `x` and the tap have these rows of `dim` values, and each unit has its own
                unsafe { to.row(i).copy_from_nonoverlapping(self.at.x.row(i), dim) };
            }
        });
    }
}

/// Units of a few rows each.
fn by_rows(worker: &Worker<'_>, rows: usize, f: impl Fn(Range<usize>)) {
    worker.each(rows.div_ceil(ROWS_PER_UNIT), |unit| {
        f(unit * ROWS_PER_UNIT..rows.min((unit + 1) * ROWS_PER_UNIT));
    });
}
