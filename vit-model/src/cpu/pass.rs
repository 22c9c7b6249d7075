//! One forward pass: the workspace it needs, and its phases top to bottom, as every thread runs them.

use super::buffer::Buffer;
use super::kernel::{CopyRows, Integers, Kernel, Patches, block_shape};
use super::linear::{self, Add, To};
use super::net::{AttnPool, Block, Mlp, Net};
use super::norm::{Norm, NormRows, NormTo};
use super::pack::{Acts, Linear, Rows};
use super::threads::Worker;
use super::{Answers, Engine, attention};
use crate::{Activation, Config, Pool};

/// Rows of tokens that a pass takes at most (but one image at least): a larger batch runs as several passes, so that
/// activations stay small.
pub(super) const ROWS_AT_ONCE: usize = 1600;

/// Rows of a unit where every row is computed for itself.
const ROWS_A_UNIT: usize = 16;

/// The activations of a pass, for up to so many images.
#[derive(Default)]
pub(super) struct Workspace {
    images: usize,
    memory: Option<Buffer>,
    scratch: Vec<Buffer>,
}

/// Where each activation begins in the workspace.
struct Layout {
    patches: usize,
    embedded: usize,
    x: usize,
    a: usize,
    qkv: usize,
    wide: usize,
    h: usize,
    bytes: usize,
    pooled: usize,
    tail: usize,
    tail_h: usize,
    tail_p: usize,
    pre: usize,
    logits: usize,
    end: usize,
}

impl Layout {
    fn new(config: &Config, kernel: &dyn Kernel, images: usize) -> Self {
        let (shape, dim, hidden) = (kernel.shape(), config.embed_dim, Net::hidden(config));
        let (patches, rows) = (images * config.num_patches(), images * config.num_tokens());
        let (tail, few) = (tail_rows(config, images), few_rows(config, images));
        let wide = if config.scale_attn_norm { dim } else { 0 }.max(if config.scale_mlp_norm { hidden } else { 0 });
        let pre = config.pre_logits.as_ref().map_or(0, |pre| pre.size);
        let mut end = 0;
        let mut take = |there: bool, bytes: usize| {
            let start = end;
            end += if there { bytes.next_multiple_of(256) } else { 0 };
            start
        };
        let this = Self {
            patches: take(true, Acts::bytes(shape, patches, Net::patch_len(config))),
            embedded: take(config.patch_norm, Rows::bytes(patches, dim)),
            x: take(true, Rows::bytes(rows, dim)),
            a: take(true, Acts::bytes(shape, rows, dim)),
            qkv: take(true, attention::between_bytes(kernel, rows, dim)),
            wide: take(wide > 0, Rows::bytes(rows, wide)),
            h: take(true, Acts::bytes(shape, rows, hidden)),
            bytes: take(kernel.integers().is_some(), Acts::bytes(block_shape(kernel), rows, dim.max(hidden))),
            pooled: take(config.global_pool != Pool::None, Rows::bytes(2 * images, config.pooled_dim())),
            tail: take(true, Acts::bytes(shape, tail.max(few), config.pooled_dim())),
            tail_h: take(tail_hidden(config) > 0, Acts::bytes(shape, few, tail_hidden(config))),
            tail_p: take(pre > 0, Acts::bytes(shape, tail, pre)),
            pre: take(pre > 0, Rows::bytes(tail, pre)),
            logits: take(config.num_classes > 0, Rows::bytes(tail, config.num_classes)),
            end: 0,
        };
        Self { end, ..this }
    }
}

/// Tokens of an image that the head reads, its first, where those are all that is asked of the last block.
fn head_tokens(config: &Config) -> Option<usize> {
    let first = config.global_pool == Pool::Token && config.depth > 0;
    first.then_some(if config.dist_token { 2 } else { 1 })
}

/// Rows of an MLP over what the head reads: of attention pooling, or of the last block.
fn few_rows(config: &Config, images: usize) -> usize {
    images * head_tokens(config).unwrap_or(1)
}

/// Its hidden values.
fn tail_hidden(config: &Config) -> usize {
    if config.global_pool == Pool::Map {
        config.mlp_hidden
    } else {
        head_tokens(config).map_or(0, |_| Net::hidden(config))
    }
}

/// Rows that the head reads.
fn tail_rows(config: &Config, images: usize) -> usize {
    if config.global_pool == Pool::None { images * config.num_tokens() } else { images }
}

impl Workspace {
    /// Makes room for `images` images, where there is not yet.
    pub(super) fn fit(&mut self, config: &Config, kernel: &dyn Kernel, images: usize, threads: usize) {
        if self.scratch.is_empty() {
            let keys = config.num_tokens();
            let bytes = (kernel.linear_scratch())
                .max(kernel.attention_scratch(keys, config.head_dim()))
                .max(Net::patch_len(config) * size_of::<f32>());
            self.scratch = (0..threads).map(|_| Buffer::new(bytes)).collect();
        }
        if self.images != images {
            // smaller ones too: padding must be zero, and lies elsewhere for another number of images
            let bytes = Layout::new(config, kernel, images).end;
            match &self.memory {
                Some(memory) if memory.len() >= bytes => memory.clear(),
                _ => self.memory = Some(Buffer::new(bytes)),
            }
            self.images = images;
        }
    }

    fn start(&self) -> *mut u8 {
        self.memory.as_ref().map_or(std::ptr::null_mut(), Buffer::ptr)
    }
}

/// A pass over some images.
pub(super) struct Pass<'a> {
    engine: &'a Engine,
    scratch: &'a [Buffer],
    pixels: &'a [f32],
    images: usize,
    threads: usize,
    /// Whether tokens alone are wanted, and the head is not.
    headless: bool,
    /// Tokens of an image that the last block is to compute, where nobody sees the others.
    few: Option<usize>,
    /// Copies of the tokens that leave a block: where the tap of that block begins.
    taps: Vec<(usize, Rows)>,
    patches: Acts,
    embedded: Rows,
    x: Rows,
    a: Acts,
    qkv: Rows,
    /// The same memory, as a block's linear layer writes it and its attention reads it.
    between: (To, attention::From),
    wide: Rows,
    h: Acts,
    /// What a linear layer in integers reads, whichever it is.
    bytes: Acts,
    pooled: Rows,
    tail: Acts,
    tail_h: Acts,
    tail_p: Acts,
    pre: Rows,
    logits: Rows,
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        engine: &'a Engine,
        workspace: &'a Workspace,
        pixels: &'a [f32],
        images: usize,
        answers: &mut Answers<'_>,
    ) -> Self {
        let (config, kernel) = (&engine.config, &*engine.kernel);
        let (shape, dim, hidden) = (kernel.shape(), config.embed_dim, Net::hidden(config));
        // laid out for as many images as the workspace has, so that padding stays where it is
        let room = workspace.images;
        let layout = Layout::new(config, kernel, room);
        let (patches, rows, tail) = (room * config.num_patches(), room * config.num_tokens(), tail_rows(config, room));
        let headless = answers.logits.is_none() && answers.pre_logits.is_none();
        let unseen = !headless && answers.features.is_none() && answers.blocks.is_empty();
        let few = few_rows(config, room);
        let at = |offset| workspace.start().wrapping_add(offset);
        let pre = config.pre_logits.as_ref().map_or(0, |pre| pre.size);
        let tokens = images * config.num_tokens() * dim;
        let taps = (answers.blocks.iter_mut())
            .map(|(block, values)| {
                let start = values.len() - tokens;
                (*block, Rows::packed(values[start..].as_mut_ptr(), dim))
            })
            .collect();
        Self {
            engine,
            scratch: &workspace.scratch,
            pixels,
            images,
            threads: engine.pool.count(),
            headless,
            few: head_tokens(config).filter(|_| unseen),
            taps,
            patches: Acts::new(at(layout.patches), shape, patches, Net::patch_len(config)),
            embedded: Rows::new(at(layout.embedded), dim),
            x: Rows::new(at(layout.x), dim),
            a: Acts::new(at(layout.a), shape, rows, dim),
            qkv: Rows::new(at(layout.qkv), 3 * dim),
            between: attention::between(kernel, at(layout.qkv), rows, [dim, config.head_dim()], !config.qk_norm),
            wide: Rows::new(at(layout.wide), if config.scale_mlp_norm { hidden.max(dim) } else { dim }),
            h: Acts::new(at(layout.h), shape, rows, hidden),
            bytes: Acts::new(at(layout.bytes), block_shape(kernel), rows, dim.max(hidden)),
            pooled: Rows::new(at(layout.pooled), config.pooled_dim()),
            tail: Acts::new(at(layout.tail), shape, tail.max(few), config.pooled_dim()),
            tail_h: Acts::new(at(layout.tail_h), shape, few, tail_hidden(config)),
            tail_p: Acts::new(at(layout.tail_p), shape, tail, pre),
            pre: Rows::new(at(layout.pre), pre),
            logits: Rows::new(at(layout.logits), config.num_classes),
        }
    }

    fn config(&self) -> &'a Config {
        &self.engine.config
    }

    fn kernel(&self) -> &'a dyn Kernel {
        &*self.engine.kernel
    }

    /// The whole pass, on each thread.
    pub(super) fn run(&self, worker: &Worker<'_>) {
        self.begin(worker);
        self.steps(worker, 0, &self.engine.net.blocks[..self.depth()]);
        self.end(worker);
    }

    /// Blocks that are to run.
    pub(super) fn depth(&self) -> usize {
        let last = self.taps.iter().map(|(block, _)| *block + 1).max();
        last.filter(|_| self.headless).unwrap_or(self.config().depth)
    }

    /// Up to the first block, on each thread.
    pub(super) fn begin(&self, worker: &Worker<'_>) {
        let _entered = self.kernel().enter();
        self.embed(worker, &self.engine.net);
    }

    /// Some blocks, of which the first has this number, on each thread.
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

    /// From the last block on, on each thread.
    pub(super) fn end(&self, worker: &Worker<'_>) {
        let net = &self.engine.net;
        let _entered = self.kernel().enter();
        if let Some(norm) = &net.norm
            && (self.taps.is_empty() || !self.headless)
        {
            let (rows, x) = self.few.map_or((self.rows(), self.x), |few| (self.images * few, self.pooled));
            self.norm(worker, norm, x, rows, NormTo::Rows(x));
        }
        if !self.headless {
            self.head(worker, net);
        }
    }

    fn rows(&self) -> usize {
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
            self.kernel().patches(Patches {
                pixels: &self.pixels[i * image..][..image],
                image_size: config.img_size,
                patch_size: config.patch_size,
                grid_row,
                first: unit * columns,
                patch: self.scratch(worker),
                to: self.patches,
            });
            if grid_row == 0
                && let Some(table) = &net.prefix
            {
                for token in 0..table.count {
                    // SAFETY: both are rows of `dim` values, and these rows are this unit's
                    unsafe { self.x.row(i * n + token).copy_from_nonoverlapping(table.rows.row(token), dim) };
                }
            }
        });
        let positions = net.positions.as_ref().map(|table| table.rows);
        let (count, place) = (self.images * patches, [patches, n, prefix]);
        let [period, stride, first] = place;
        match &net.patch_norm {
            None => {
                let add = Add::Position { rows: positions, period, stride, first };
                self.linear(worker, &net.patch, self.patches, count, None, To::Rows(self.x, add));
            }
            Some(norm) => {
                let to = To::Rows(self.embedded, Add::Nothing);
                self.linear(worker, &net.patch, self.patches, count, None, to);
                self.norm(worker, norm, self.embedded, count, NormTo::Position(self.x, positions, place));
            }
        }
        if let Some(norm) = &net.norm_pre {
            self.norm(worker, norm, self.x, self.rows(), NormTo::Rows(self.x));
        }
    }

    /// `x += attn(norm1(x))`, then `x += mlp(norm2(x))`; of the `few` first tokens of each image alone, it goes to `pooled`:
    /// the others are their keys and values, and no more.
    fn block(&self, worker: &Worker<'_>, block: &Block, few: Option<usize>) {
        let (config, tokens) = (self.config(), self.config().num_tokens());
        let a = self.norm_for(worker, &block.qkv, &block.norm1, self.x, self.rows(), self.a);
        let (to, from) = self.between;
        self.linear(worker, &block.qkv, a, self.rows(), None, to);
        let (queries, x, to, hidden) = match few {
            None => (tokens, self.x, self.a, self.h),
            Some(few) => {
                worker.each(self.images, |image| self.pool(image));
                (few, self.pooled, self.tail, self.tail_h)
            }
        };
        let rows = self.images * queries;
        let job = attention::Job {
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
            to: match block.attn_norm {
                None => attention::To::Acts(to),
                Some(_) => attention::To::Rows(self.wide),
            },
        };
        self.attention(worker, &job);
        let a = match &block.attn_norm {
            None => to,
            Some(norm) => self.norm_for(worker, &block.proj, norm, self.wide, rows, to),
        };
        self.linear(worker, &block.proj, a, rows, None, To::Rows(x, Add::Residual));
        let a = self.norm_for(worker, &block.mlp.fc1, &block.norm2, x, rows, to);
        self.mlp(worker, &block.mlp, rows, [a, hidden], x);
    }

    /// `to += fc2(norm(act(fc1(from))))`, by way of `hidden`.
    fn mlp(&self, worker: &Worker<'_>, mlp: &Mlp, rows: usize, [from, hidden]: [Acts; 2], to: Rows) {
        let act = Some(self.config().act);
        let hidden = match &mlp.norm {
            None => {
                self.linear(worker, &mlp.fc1, from, rows, act, To::Acts(hidden));
                hidden
            }
            Some(norm) => {
                self.linear(worker, &mlp.fc1, from, rows, act, To::Rows(self.wide, Add::Nothing));
                self.norm_for(worker, &mlp.fc2, norm, self.wide, rows, hidden)
            }
        };
        self.linear(worker, &mlp.fc2, hidden, rows, None, To::Rows(to, Add::Residual));
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
        let logits = |add| To::Rows(self.logits, add);
        if config.dist_token {
            for (i, head) in [&net.head, &net.head_dist].into_iter().enumerate() {
                if let Some(head) = head {
                    let add = if i == 0 { Add::Nothing } else { Add::Residual };
                    // the class tokens, then the distillation tokens
                    self.to_acts(worker, self.pooled, (2, i), rows, dim, self.tail);
                    self.linear(worker, head, self.tail, rows, None, logits(add));
                }
            }
            return;
        }
        self.to_acts(worker, pooled, (1, 0), rows, dim, self.tail);
        let mut tail = self.tail;
        if let Some(fc) = &net.pre_logits {
            self.linear(worker, fc, self.tail, rows, None, To::Rows(self.pre, Add::Nothing));
            worker.each(rows, |row| {
                for column in 0..fc.n {
                    // SAFETY: the row has `n` values and is this unit's
                    unsafe {
                        let x = self.pre.row(row).add(column);
                        *x = (*x).tanh();
                    }
                }
            });
            self.to_acts(worker, self.pre, (1, 0), rows, fc.n, self.tail_p);
            tail = self.tail_p;
        }
        if let Some(head) = &net.head {
            self.linear(worker, head, tail, rows, None, logits(Add::Nothing));
        }
    }

    /// What the head reads, before `pre_logits`.
    fn pooled(&self) -> Rows {
        if self.config().global_pool == Pool::None { self.x } else { self.pooled }
    }

    /// Tokens of one image → one row of `pooled`; of a distilled model two.
    fn pool(&self, image: usize) {
        let (config, dim) = (self.config(), self.config().embed_dim);
        let n = config.num_tokens();
        let first = if config.pool_include_prefix { 0 } else { config.num_prefix_tokens() };
        let token = |i: usize| {
            // SAFETY: a row of `x`, which nobody writes in this phase
            unsafe { std::slice::from_raw_parts(self.x.row(image * n + i), dim) }
        };
        let out = |row: usize| {
            // SAFETY: a row of `pooled`, this unit's alone
            unsafe { std::slice::from_raw_parts_mut(self.pooled.row(row), config.pooled_dim()) }
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
        self.to_acts(worker, self.x, (1, 0), rows, dim, self.a);
        self.linear(worker, &pool.kv, self.a, rows, None, To::Rows(self.qkv, Add::Nothing));
        let job = attention::Job {
            q: (attention::From::Rows(pool.query.rows), 0),
            k: (attention::From::Rows(self.qkv), 0),
            v: (attention::From::Rows(self.qkv), dim),
            images: self.images,
            queries: 1,
            query_rows: 0,
            tokens: config.num_tokens(),
            first_key: if config.pool_include_prefix { 0 } else { config.num_prefix_tokens() },
            heads: config.num_heads,
            dim: config.head_dim(),
            norms: None,
            to: attention::To::Acts(self.tail),
        };
        self.attention(worker, &job);
        self.linear(worker, &pool.proj, self.tail, self.images, None, To::Rows(self.pooled, Add::Nothing));
        self.norm(worker, &pool.norm, self.pooled, self.images, NormTo::Acts(self.tail));
        self.mlp(worker, &pool.mlp, self.images, [self.tail, self.tail_h], self.pooled);
    }

    /// Appends what was asked for; the pass has run.
    pub(super) fn answer(&self, answers: &mut Answers<'_>) {
        let config = self.config();
        let (dim, rows) = (config.pooled_dim(), tail_rows(config, self.images));
        let append = |to: &mut Vec<f32>, from: Rows, count: usize, width: usize| {
            to.reserve(count * width);
            for i in 0..count {
                // SAFETY: rows of the workspace, which nobody writes any more
                to.extend_from_slice(unsafe { std::slice::from_raw_parts(from.row(i), width) });
            }
        };
        if let Some(features) = &mut answers.features {
            append(features, self.x, self.rows(), config.embed_dim);
        }
        if let Some(pre_logits) = &mut answers.pre_logits {
            match &self.engine.net.pre_logits {
                Some(fc) => append(pre_logits, self.pre, rows, fc.n),
                None if config.dist_token => {
                    for image in 0..rows {
                        let token = |i| {
                            // SAFETY: as above
                            unsafe { std::slice::from_raw_parts(self.pooled.row(2 * image + i), dim) }
                        };
                        pre_logits.extend(token(0).iter().zip(token(1)).map(|(class, dist)| (class + dist) * 0.5));
                    }
                }
                None => append(pre_logits, self.pooled(), rows, dim),
            }
        }
        if let Some(logits) = &mut answers.logits {
            let start = logits.len();
            append(logits, self.logits, rows, config.num_classes);
            if config.dist_token {
                logits[start..].iter_mut().for_each(|x| *x *= 0.5);
            }
        }
    }

    /// This thread's scratch.
    fn scratch(&self, worker: &Worker<'_>) -> *mut f32 {
        self.scratch[worker.index].ptr().cast()
    }

    fn linear(&self, worker: &Worker<'_>, linear: &Linear, from: Acts, rows: usize, act: Option<Activation>, to: To) {
        let from = match self.rounding(linear) {
            Some((integers, bytes)) if from.shape() != linear.shape() => {
                by_rows(worker, rows, |rows| integers.round(from, bytes, rows));
                bytes
            }
            _ => from,
        };
        let job = linear::Job { linear, from, rows, act, to };
        let units = self.kernel().linear_units(&job, self.threads);
        worker.each(units, |unit| self.kernel().linear(&job, unit, self.threads, self.scratch(worker)));
    }

    fn attention(&self, worker: &Worker<'_>, job: &attention::Job<'_>) {
        let units = job.units(self.threads);
        worker.each(units, |unit| self.kernel().attention(job, unit, self.threads, self.scratch(worker)));
    }

    fn norm(&self, worker: &Worker<'_>, norm: &Norm, from: Rows, rows: usize, to: NormTo) {
        by_rows(worker, rows, |rows| self.kernel().norm(NormRows { norm, from, rows, to }));
    }

    /// Norms rows for a linear layer; answers what that is to read, by way of `to` where it reads integers.
    fn norm_for(&self, worker: &Worker<'_>, next: &Linear, norm: &Norm, from: Rows, rows: usize, to: Acts) -> Acts {
        let rounding = self.rounding(next);
        by_rows(worker, rows, |rows| {
            self.kernel().norm(NormRows { norm, from, rows: rows.clone(), to: NormTo::Acts(to) });
            if let Some((integers, bytes)) = rounding {
                integers.round(to, bytes, rows);
            }
        });
        rounding.map_or(to, |(_, bytes)| bytes)
    }

    /// How activations become integers and where, for a layer that multiplies such.
    fn rounding(&self, linear: &Linear) -> Option<(&'a dyn Integers, Acts)> {
        let integers = self.kernel().integers().filter(|integers| integers.shape() == linear.shape())?;
        Some((integers, self.bytes.of(self.rows(), linear.k)))
    }

    /// Rows of f32 → tiles: rows `first`, `first + step`, …
    fn to_acts(&self, worker: &Worker<'_>, from: Rows, every: (usize, usize), rows: usize, dim: usize, to: Acts) {
        let (step, first) = every;
        by_rows(worker, rows, |rows| self.kernel().copy(CopyRows { from, step, first, rows, dim, to }));
    }

    /// The tokens as they are now.
    fn copy_rows(&self, worker: &Worker<'_>, to: Rows) {
        let dim = self.config().embed_dim;
        by_rows(worker, self.rows(), |rows| {
            for i in rows {
                // SAFETY: a row of `x` and one of the tap, each `dim` values, this unit's alone
                unsafe { to.row(i).copy_from_nonoverlapping(self.x.row(i), dim) };
            }
        });
    }
}

/// Units of a few rows each.
fn by_rows(worker: &Worker<'_>, rows: usize, f: impl Fn(std::ops::Range<usize>)) {
    worker.each(rows.div_ceil(ROWS_A_UNIT), |unit| {
        f(unit * ROWS_A_UNIT..rows.min((unit + 1) * ROWS_A_UNIT));
    });
}
