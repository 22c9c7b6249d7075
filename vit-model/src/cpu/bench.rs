//! The steps of one block, each by itself, for `benches/kernels.rs`. Not part of the API.

use std::collections::BTreeMap;

use super::attention::AttentionTo;
use super::choose::choose;
use super::isa::Isa;
use super::kernel::Kernel;
use super::linear::{Add, LinearTo};
use super::net::{Block, Net};
use super::packed::PackedLinear;
use super::pass::{Answers, Model, Pass};
use super::threads::{Threads, Worker};
use super::workspace::Workspace;
use crate::{Config, Dtype, Error, Precision, Result, TensorInfo, Weights, layers};

/// A step of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// LayerNorm, f32 rows to the activations of a product.
    Norm,
    /// The linear layer of queries, keys and values.
    Qkv,
    /// Attention of all heads.
    Attention,
    /// The projection after attention, with the residual.
    Proj,
    /// The first layer of the MLP without its activation. The difference to [`Fc1`](Self::Fc1) is the time of GELU.
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
    pixels: Vec<f32>,
    kernel: Box<dyn Kernel>,
    threads: Threads,
    net: Net,
    block: Block,
    workspace: Workspace,
}

impl Steps {
    /// The block of an architecture for `images` images, or `None` if the kernel does not have this precision itself.
    ///
    /// # Errors
    /// The CPU lacks the kernel, or timm has no architecture of this name.
    pub fn new(name: &str, images: usize, isa: Isa, precision: Precision, threads: usize) -> Result<Option<Self>> {
        let (kernel, real_isa, real_precision) = match choose(isa.check()?, precision) {
            Err(Error::Unsupported { .. }) if precision == Precision::Int8 => return Ok(None),
            chosen => chosen?,
        };
        if (real_isa, real_precision) != (isa, precision) {
            return Ok(None);
        }
        let named = crate::names::Architecture::of(name);
        let config = named.ok_or_else(|| Error::unsupported(format!("`{name}`: no architecture of timm's")))?.config;
        let config = Config { depth: 1, ..config };
        let (threads, weights) = (Threads::new(threads), Random::new(&config)?);
        let (net, mut blocks, _) = Net::read(&config, &weights, 0..1, &*kernel, &threads)?;
        let block = blocks.pop().ok_or_else(|| Error::config("a block is missing"))?;
        let mut workspace = Workspace::default();
        workspace.fit(&config, &*kernel, images, threads.count());
        let [h, w] = config.img_size;
        let mut numbers = Numbers(1);
        let pixels = (0..images * config.in_chans * h * w).map(|_| numbers.next()).collect();
        let mut this = Self { config, images, pixels, kernel, threads, net, block, workspace };
        // real tokens and activations, because zeros would be multiplied faster
        this.with_pass(|pass, worker, _| pass.begin(worker));
        [Step::Norm, Step::Qkv, Step::Attention, Step::Fc1].into_iter().for_each(|step| this.run(step));
        Ok(Some(this))
    }

    /// Multiplications and additions of a step.
    pub fn flops(&self, step: Step) -> u64 {
        let rows = self.rows() as u64;
        let of = |linear: &PackedLinear| 2 * rows * (linear.n() * linear.k()) as u64;
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

    /// Runs a step on all threads, over what the steps before it left. Residuals add up.
    pub fn run(&mut self, step: Step) {
        let act = Some(self.config.act);
        let tokens = self.config.num_tokens();
        self.with_pass(|pass, worker, block| {
            let (at, rows) = (&pass.at, pass.rows());
            let residual = LinearTo::Rows(at.x, Add::Residual);
            let (fc1, to_h) = (&block.mlp.fc1, LinearTo::Acts(at.h));
            match step {
                Step::Norm => {
                    pass.norm_for(worker, &block.qkv, &block.norm1, at.x, rows, at.a);
                }
                Step::Qkv => {
                    pass.linear(worker, &block.qkv, pass.normed(&block.qkv, at.a), rows, None, at.between.0);
                }
                Step::Attention => pass.attend(worker, block, tokens, AttentionTo::Acts(at.a)),
                Step::Proj => pass.linear(worker, &block.proj, at.a, rows, None, residual),
                Step::Fc1Bare => pass.linear(worker, fc1, pass.normed(fc1, at.a), rows, None, to_h),
                Step::Fc1 => pass.linear(worker, fc1, pass.normed(fc1, at.a), rows, act, to_h),
                Step::Fc2 => pass.linear(worker, &block.mlp.fc2, at.h, rows, None, residual),
            }
        });
    }

    fn with_pass(&mut self, f: impl Fn(&Pass<'_>, &Worker<'_>, &Block) + Sync) {
        let Self { config, images, pixels, kernel, threads, net, block, workspace } = self;
        let model = Model { config, kernel: &**kernel, net, threads: threads.count() };
        let mut answers = Answers { logits: None, features: None, pre_logits: None, blocks: &mut [] };
        // SAFETY: `new` has fitted the workspace for these images and this model, and there are no answers to change
        let pass = unsafe { Pass::new(model, workspace, pixels, *images, &mut answers) };
        threads.run(&|worker| {
            let _entered = kernel.enter();
            f(&pass, worker, block);
        });
    }
}

/// Random tensors under the names of an architecture.
struct Random(BTreeMap<String, TensorInfo>);

impl Random {
    fn new(config: &Config) -> Result<Self> {
        let tensors = layers::parameters(config)?.into_iter();
        Ok(Self(tensors.map(|(name, shape)| (name, TensorInfo { dtype: Dtype::F32, shape })).collect()))
    }
}

impl Weights for Random {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.0
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let shape = &self.0.get(name).ok_or_else(|| Error::missing(name))?.shape;
        let (count, inputs) = (shape.iter().product(), shape.iter().skip(1).product::<usize>());
        let (mut numbers, scale) = (Numbers(name.len() as u64), (inputs as f32).sqrt().recip());
        Ok((0..count).flat_map(|_| (scale * numbers.next()).to_le_bytes()).collect())
    }
}

/// Numbers from −1 to 1, the same on every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
