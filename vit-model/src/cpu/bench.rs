//! The steps of one block, each by itself, for `benches/kernels.rs`. No part of the interface.

use std::collections::BTreeMap;

use super::buffer::Buffer;
use super::kernel::{Kernel, block_shape};
use super::linear::{self, Add, To};
use super::net::{Block, Net};
use super::norm::{NormRows, NormTo};
use super::pack::{Acts, Linear, Rows};
use super::threads::{Pool, Worker};
use super::{Isa, Precision, attention, choose};
use crate::{Activation, Config, Dtype, Error, Result, TensorInfo, Weights, load};

/// A step of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// LayerNorm, f32 rows to the activations of a product.
    Norm,
    /// The linear layer of queries, keys and values.
    Qkv,
    /// Attention of all heads.
    Attention,
    /// The projection behind attention, with the residual.
    Proj,
    /// The first layer of the MLP without its activation: GELU is what [`Fc1`](Self::Fc1) takes longer.
    Fc1Bare,
    /// The first layer of the MLP.
    Fc1,
    /// The second layer of the MLP, with the residual.
    Fc2,
}

impl Step {
    /// In the order in which they run.
    pub const ALL: [Self; 7] =
        [Self::Norm, Self::Qkv, Self::Attention, Self::Proj, Self::Fc1Bare, Self::Fc1, Self::Fc2];
}

/// A block with random weights and activations, for one kernel.
#[allow(missing_debug_implementations)]
pub struct Steps {
    config: Config,
    images: usize,
    kernel: Box<dyn Kernel>,
    pool: Pool,
    block: Block,
    scratch: Vec<Buffer>,
    x: Rows,
    a: Acts,
    /// Queries, keys and values as the kernel's attention reads them: where they go, and where they come from.
    qkv: (To, attention::From),
    h: Acts,
    /// `a` and `h` as integers, where the linear layers multiply those.
    bytes: [Acts; 2],
    _memory: Vec<Buffer>,
}

impl Steps {
    /// The block of an architecture, for so many images; nothing where the kernel has not this precision itself.
    ///
    /// # Errors
    /// A kernel that this CPU lacks, a name that timm has not.
    pub fn new(name: &str, images: usize, isa: Isa, precision: Precision, threads: usize) -> Result<Option<Self>> {
        let (kernel, real_isa, real_precision) = match choose(isa.check()?, precision) {
            Err(Error::Unsupported(_)) if precision == Precision::Int8 => return Ok(None),
            chosen => chosen?,
        };
        if (real_isa, real_precision) != (isa, precision) {
            return Ok(None);
        }
        let named = crate::names::Architecture::of(name);
        let config = named.ok_or_else(|| Error::Unsupported(format!("`{name}`: no architecture of timm's")))?.config;
        let config = Config { depth: 1, ..config };
        let (pool, weights) = (Pool::new(threads), Random::new(&config)?);
        let mut blocks = Block::read(&config, &weights, 0..1, vec![], &*kernel, &pool)?;
        let block = blocks.pop().ok_or_else(|| Error::Config("a block is missing".into()))?;

        let (shape, dim, tokens) = (kernel.shape(), config.embed_dim, config.num_tokens());
        let (rows, hidden) = (images * tokens, Net::hidden(&config));
        let mut memory = Vec::new();
        let mut room = |bytes| {
            memory.push(Buffer::new(bytes));
            memory[memory.len() - 1].ptr()
        };
        let x = Rows::new(room(Rows::bytes(rows, dim)), dim);
        let a = Acts::new(room(Acts::bytes(shape, rows, dim)), shape, rows, dim);
        let qkv = room(attention::between_bytes(&*kernel, rows, dim));
        let qkv = attention::between(&*kernel, qkv, rows, [dim, config.head_dim()], true);
        let h = Acts::new(room(Acts::bytes(shape, rows, hidden)), shape, rows, hidden);
        let whole = block_shape(&*kernel);
        let bytes = [dim, hidden].map(|width| Acts::new(room(Acts::bytes(whole, rows, width)), whole, rows, width));
        let scratch_bytes = kernel.linear_scratch().max(kernel.attention_scratch(tokens, config.head_dim()));
        let scratch = (0..pool.count()).map(|_| Buffer::new(scratch_bytes)).collect();
        let this = Self { config, images, kernel, pool, block, scratch, x, a, qkv, h, bytes, _memory: memory };

        // zeros would be multiplied faster than what a model has
        let mut numbers = Numbers(1);
        for row in 0..rows {
            // SAFETY: `x` has these rows of `dim` values, and nobody else uses it yet
            (0..dim).for_each(|i| unsafe { *this.x.row(row).add(i) = numbers.next() });
        }
        [Step::Norm, Step::Qkv, Step::Fc1].into_iter().for_each(|step| this.run(step));
        Ok(Some(this))
    }

    /// Multiplications and additions of a step.
    pub fn flops(&self, step: Step) -> u64 {
        let rows = self.rows() as u64;
        let of = |linear: &Linear| 2 * rows * (linear.n * linear.k) as u64;
        match step {
            Step::Norm => 8 * rows * self.config.embed_dim as u64,
            Step::Qkv => of(&self.block.qkv),
            Step::Attention => 4 * rows * (self.config.num_tokens() * self.config.embed_dim) as u64,
            Step::Proj => of(&self.block.proj),
            Step::Fc1Bare | Step::Fc1 => of(&self.block.mlp.fc1),
            Step::Fc2 => of(&self.block.mlp.fc2),
        }
    }

    /// Rows of tokens.
    pub fn rows(&self) -> usize {
        self.images * self.config.num_tokens()
    }

    /// Runs a step on all threads, over what the steps before left; residuals add up.
    pub fn run(&self, step: Step) {
        self.pool.run(&|worker| {
            let _entered = self.kernel.enter();
            let (block, residual) = (&self.block, To::Rows(self.x, Add::Residual));
            let normed = if self.kernel.integers().is_some() { self.bytes[0] } else { self.a };
            match step {
                Step::Norm => worker.each(self.rows().div_ceil(16), |unit| {
                    let rows = unit * 16..self.rows().min(unit * 16 + 16);
                    let to = NormTo::Acts(self.a);
                    self.kernel.norm(NormRows { norm: &block.norm1, from: self.x, rows: rows.clone(), to });
                    if let Some(integers) = self.kernel.integers() {
                        integers.round(self.a, self.bytes[0], rows);
                    }
                }),
                Step::Qkv => self.linear(worker, &block.qkv, normed, None, self.qkv.0),
                Step::Attention => self.attention(worker),
                Step::Proj => self.linear(worker, &block.proj, self.rounded(worker, self.a, 0), None, residual),
                Step::Fc1Bare => self.linear(worker, &block.mlp.fc1, normed, None, To::Acts(self.h)),
                Step::Fc1 => self.linear(worker, &block.mlp.fc1, normed, Some(self.config.act), To::Acts(self.h)),
                Step::Fc2 => self.linear(worker, &block.mlp.fc2, self.rounded(worker, self.h, 1), None, residual),
            }
        });
    }

    /// What a linear layer behind no norm reads.
    fn rounded(&self, worker: &Worker<'_>, from: Acts, which: usize) -> Acts {
        let Some(integers) = self.kernel.integers() else { return from };
        worker.each(self.rows().div_ceil(16), |unit| {
            integers.round(from, self.bytes[which], unit * 16..self.rows().min(unit * 16 + 16));
        });
        self.bytes[which]
    }

    fn linear(&self, worker: &Worker<'_>, linear: &Linear, from: Acts, act: Option<Activation>, to: To) {
        let (job, threads) = (linear::Job { linear, from, rows: self.rows(), act, to }, self.pool.count());
        let units = self.kernel.linear_units(&job, threads);
        worker.each(units, |unit| self.kernel.linear(&job, unit, threads, self.scratch(worker)));
    }

    fn attention(&self, worker: &Worker<'_>) {
        let (config, threads, from) = (&self.config, self.pool.count(), self.qkv.1);
        let job = attention::Job {
            q: (from, 0),
            k: (from, config.embed_dim),
            v: (from, 2 * config.embed_dim),
            images: self.images,
            queries: config.num_tokens(),
            query_rows: config.num_tokens(),
            tokens: config.num_tokens(),
            first_key: 0,
            heads: config.num_heads,
            dim: config.head_dim(),
            norms: None,
            to: attention::To::Acts(self.a),
        };
        worker.each(job.units(threads), |unit| self.kernel.attention(&job, unit, threads, self.scratch(worker)));
    }

    fn scratch(&self, worker: &Worker<'_>) -> *mut f32 {
        self.scratch[worker.index].ptr().cast()
    }
}

/// Random tensors under the names of an architecture.
struct Random(BTreeMap<String, TensorInfo>);

impl Random {
    fn new(config: &Config) -> Result<Self> {
        let tensors = load::parameters(config)?.into_iter();
        Ok(Self(tensors.map(|(name, shape)| (name, TensorInfo { dtype: Dtype::F32, shape })).collect()))
    }
}

impl Weights for Random {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.0
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let shape = &self.0.get(name).ok_or_else(|| Error::tensor(name, "missing"))?.shape;
        let (count, inputs) = (shape.iter().product(), shape.iter().skip(1).product::<usize>());
        let (mut numbers, scale) = (Numbers(name.len() as u64), (inputs as f32).sqrt().recip());
        Ok((0..count).flat_map(|_| (scale * numbers.next()).to_le_bytes()).collect())
    }
}

/// Numbers in −1 to 1, the same on every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
