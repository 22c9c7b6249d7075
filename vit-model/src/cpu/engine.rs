//! The engine: a packed model, and the passes over it.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::choose::{Chosen, choose};
use super::cores::{available, physical_cores};
use super::isa::Isa;
use super::kernel::Kernel;
use super::net::{Block, Blocks, Net, hidden};
use super::pass::{Answers, Model, Pass, ROWS_AT_ONCE};
use super::scale;
use super::threads::Threads;
use super::workspace::Workspace;
use crate::{Config, Error, Precision, Result, Weights};

/// Blocks that a streamed pass holds at once: threads share the layers of two more evenly than those of one.
const BLOCKS_AT_ONCE: usize = 2;

/// Below so many multiplications per image, f32 takes less than a millisecond, and tiles would mostly hold padding.
const SMALL: usize = 100_000_000;

/// Multiplications of the blocks' linear layers for an image.
fn multiplications(config: &Config) -> usize {
    let block = config.embed_dim.saturating_mul((4 * config.embed_dim).saturating_add(2 * config.mlp_hidden));
    block.saturating_mul(config.depth).saturating_mul(config.num_tokens())
}

/// How an engine runs.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// Threads, including the caller's. The default is the number of physical cores. Limited to the hardware threads that
    /// this process may use.
    pub threads: Option<usize>,
    /// How exactly to compute.
    pub precision: Precision,
    /// The kernels. The default is what `VIT_CPU` names, or the fastest that this CPU has.
    pub isa: Option<Isa>,
}

/// What a model computes for a batch of images, row-major, f32.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Output {
    /// `[B, num_classes]`, if the model has a head; with `Pool::None` `[B, N, num_classes]`.
    pub logits: Option<Vec<f32>>,
    /// The tokens after the last norm, `[B, N, D]`: timm's `forward_features`.
    pub features: Vec<f32>,
    /// What the head reads: `[B, D]`, or as wide as `pre_logits`; with `Pool::None` `[B, N, D]`.
    pub pre_logits: Vec<f32>,
}

/// A model, packed for this CPU.
///
/// Any number of threads may call it at once. Passes run one after the other, because each uses every thread of the engine.
/// Results are bit-identical for any number of threads and, except with the portable kernel, for any batch that an image is
/// part of.
pub struct Engine {
    config: Config,
    isa: Isa,
    precision: Precision,
    kernel: Box<dyn Kernel>,
    net: Net,
    blocks: Blocks,
    weight_bytes: usize,
    threads: Threads,
    workspace: Mutex<Workspace>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("isa", &self.isa)
            .field("precision", &self.precision)
            .field("threads", &self.threads.count())
            .field("weight_bytes", &self.weight_bytes)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Reads and packs every weight, on all threads.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the engine lacks a switch of the configuration, or the CPU the kernel that is asked for; a
    /// tensor that is missing, of another shape, or not finite.
    pub fn new(config: &Config, weights: &dyn Weights, options: &EngineOptions) -> Result<Self> {
        let kernel = Self::plan(config, options)?;
        Self::with_kernel(config, weights, options.threads, kernel)
    }

    /// An engine that reads and packs the blocks again in every pass, two at a time, instead of holding them all: for a
    /// model that runs once.
    ///
    /// # Errors
    /// The same as [`new`](Self::new), except that a damaged tensor of a block is an error of the pass.
    pub fn streamed(config: &Config, weights: Arc<dyn Weights>, options: &EngineOptions) -> Result<Self> {
        let kernel = Self::plan(config, options)?;
        Self::streamed_with_kernel(config, weights, options.threads, kernel)
    }

    /// The kernel for a model, if the engine has everything that the configuration asks for.
    pub(super) fn plan(config: &Config, options: &EngineOptions) -> Result<Chosen> {
        config.validate()?;
        Net::supports(config)?;
        let isa = match options.isa {
            Some(isa) => isa.check()?,
            None => Isa::choose()?,
        };
        let precision = match options.precision {
            Precision::Auto if multiplications(config) < SMALL => Precision::F32,
            Precision::Int8 if config.embed_dim.max(hidden(config)) > scale::WIDEST => {
                return Err(Error::unsupported(format!("precision int8 in layers wider than {}", scale::WIDEST)));
            }
            precision => precision,
        };
        choose(isa, precision)
    }

    pub(super) fn with_kernel(
        config: &Config,
        weights: &dyn Weights,
        threads: Option<usize>,
        chosen: Chosen,
    ) -> Result<Self> {
        let threads = Self::threads_for(threads);
        let (net, blocks, bytes) = Net::read(config, weights, 0..config.depth, &*chosen.0, &threads)?;
        Ok(Self::assemble(config, chosen, net, Blocks::Held(blocks), bytes, threads))
    }

    pub(super) fn streamed_with_kernel(
        config: &Config,
        weights: Arc<dyn Weights>,
        threads: Option<usize>,
        chosen: Chosen,
    ) -> Result<Self> {
        let threads = Self::threads_for(threads);
        let (net, _, bytes) = Net::read(config, &*weights, 0..0, &*chosen.0, &threads)?;
        Ok(Self::assemble(config, chosen, net, Blocks::Streamed(weights), bytes, threads))
    }

    fn threads_for(asked: Option<usize>) -> Threads {
        Threads::new(asked.unwrap_or_else(physical_cores).clamp(1, available()))
    }

    fn assemble(
        config: &Config,
        (kernel, isa, precision): Chosen,
        net: Net,
        blocks: Blocks,
        weight_bytes: usize,
        threads: Threads,
    ) -> Self {
        let workspace = Mutex::new(Workspace::default());
        Self { config: config.clone(), isa, precision, kernel, net, blocks, weight_bytes, threads, workspace }
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The kernels that run.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How the linear layers are computed: what `auto` chose, or `f32` if a CPU has nothing faster that is as exact as what
    /// was asked for.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Threads of a pass.
    pub fn threads(&self) -> usize {
        self.threads.count()
    }

    /// Bytes of the packed weights that the engine holds.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Pixels `[B, C, H, W]`, normalised as the checkpoint asks for → everything that the model computes.
    ///
    /// # Errors
    /// `pixels` are not `batch` images of the model's size.
    pub fn forward(&self, pixels: &[f32], batch: usize) -> Result<Output> {
        let mut output = Output::default();
        self.forward_into(pixels, batch, &mut output)?;
        Ok(output)
    }

    /// Like [`forward`](Self::forward), into vectors that are reused: after the first call for a batch size nothing is
    /// allocated.
    ///
    /// # Errors
    /// The same as [`forward`](Self::forward).
    pub fn forward_into(&self, pixels: &[f32], batch: usize, output: &mut Output) -> Result<()> {
        let Output { logits, features, pre_logits } = output;
        let logits = self.room_for_logits(logits);
        let (features, pre_logits) = (Some(features), Some(pre_logits));
        self.run(pixels, batch, Answers { logits, features, pre_logits, blocks: &mut [] })
    }

    /// Like [`forward_into`](Self::forward_into), but leaves [`Output::features`] empty. If the head reads only the class
    /// token, the last block computes no other. The rest of the output is bit-identical, except with the portable kernel.
    ///
    /// # Errors
    /// The same as [`forward`](Self::forward).
    pub fn forward_head_into(&self, pixels: &[f32], batch: usize, output: &mut Output) -> Result<()> {
        let Output { logits, features, pre_logits } = output;
        features.clear();
        let logits = self.room_for_logits(logits);
        self.run(pixels, batch, Answers { logits, features: None, pre_logits: Some(pre_logits), blocks: &mut [] })
    }

    /// Where logits are appended, if the model has a head.
    fn room_for_logits<'a>(&self, logits: &'a mut Option<Vec<f32>>) -> Option<&'a mut Vec<f32>> {
        if self.config.num_classes == 0 {
            *logits = None;
            return None;
        }
        Some(logits.get_or_insert_default())
    }

    /// Pixels → only the logits, or what the head would read if the model has none, into a vector that is reused. Computes no
    /// more than [`forward_head_into`](Self::forward_head_into).
    ///
    /// # Errors
    /// The same as [`forward`](Self::forward).
    pub fn logits_into(&self, pixels: &[f32], batch: usize, logits: &mut Vec<f32>) -> Result<()> {
        let (logits, pre_logits) =
            if self.config.num_classes > 0 { (Some(logits), None) } else { (None, Some(logits)) };
        self.run(pixels, batch, Answers { logits, features: None, pre_logits, blocks: &mut [] })
    }

    /// Pixels → the tokens after the last norm, `[B, N, D]`.
    ///
    /// # Errors
    /// The same as [`forward`](Self::forward).
    pub fn forward_features(&self, pixels: &[f32], batch: usize) -> Result<Vec<f32>> {
        let mut features = Vec::new();
        let answers = Answers { logits: None, features: Some(&mut features), pre_logits: None, blocks: &mut [] };
        self.run(pixels, batch, answers)?;
        Ok(features)
    }

    /// Pixels → the tokens `[B, N, D]` that leave each of these blocks (counted from 0), before any norm.
    ///
    /// # Errors
    /// A block that the model does not have; the same as [`forward`](Self::forward).
    pub fn intermediates(&self, pixels: &[f32], batch: usize, blocks: &[usize]) -> Result<Vec<Vec<f32>>> {
        if let Some(block) = blocks.iter().find(|&&block| block >= self.config.depth) {
            let depth = self.config.depth;
            return Err(Error::Input(format!("block {block} of a model of {depth} blocks (counted from 0)")));
        }
        let mut taps: Vec<_> = blocks.iter().map(|&block| (block, Vec::new())).collect();
        let answers = Answers { logits: None, features: None, pre_logits: None, blocks: &mut taps };
        self.run(pixels, batch, answers)?;
        Ok(taps.into_iter().map(|(_, tokens)| tokens).collect())
    }

    fn run(&self, pixels: &[f32], batch: usize, mut answers: Answers<'_>) -> Result<()> {
        let (c, [h, w]) = (self.config.in_chans, self.config.img_size);
        let image = c * h * w;
        if batch == 0 || batch.checked_mul(image) != Some(pixels.len()) {
            let found = pixels.len();
            return Err(Error::Input(format!("{batch} images of [{c}, {h}, {w}] are expected, found {found} values")));
        }
        let at_once = (ROWS_AT_ONCE / self.config.num_tokens()).clamp(1, batch);
        answers.clear();
        // poisoned or not: every pass overwrites the activations that it reads
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        workspace.fit(&self.config, &*self.kernel, at_once, self.threads.count());
        let model =
            Model { config: &self.config, kernel: &*self.kernel, net: &self.net, threads: self.threads.count() };
        for pixels in pixels.chunks(at_once * image) {
            // SAFETY: the workspace was fitted above for `at_once` images of this model; `pass` ends before `answers` change
            let pass = unsafe { Pass::new(model, &mut workspace, pixels, pixels.len() / image, &mut answers) };
            self.pass(&pass)?;
            pass.answer(&mut answers);
        }
        Ok(())
    }

    fn pass(&self, pass: &Pass<'_>) -> Result<()> {
        let weights = match &self.blocks {
            Blocks::Held(blocks) => {
                self.threads.run(&|worker| pass.run(worker, blocks));
                return Ok(());
            }
            Blocks::Streamed(weights) => weights,
        };
        self.threads.run(&|worker| pass.begin(worker));
        let (mut blocks, depth) = (vec![], pass.depth());
        for first in (0..depth).step_by(BLOCKS_AT_ONCE) {
            let range = first..depth.min(first + BLOCKS_AT_ONCE);
            blocks = Block::read(&self.config, &**weights, range, blocks, &*self.kernel, &self.threads)?;
            self.threads.run(&|worker| pass.steps(worker, first, &blocks));
        }
        self.threads.run(&|worker| pass.end(worker));
        Ok(())
    }
}
