//! The CPU engine: a plan for the whole model, weights packed once for this CPU, and nothing allocated in a pass.
//!
//! Top to bottom: [`Engine`] and what it answers, `Net` (the packed model), `Workspace` (the activations), `Pass` (one
//! forward pass, phase by phase, as every thread runs it). Below it, in their own files: `detect` chooses the kernel;
//! `kernel` lists what one must do; `linear`, `attention` and `norm` do it over `simd`, which `avx512`, `avx2` and
//! `portable` implement (`amx` multiplies in tiles, `int8` integers); `pack` says how everything lies in memory;
//! `threads` runs it.
//!
//! This folder has the crate's only unsafe code.

// generic code must be inlined into the function that switches the instruction set on, or it is compiled without it
#![allow(clippy::inline_always)]
// vector code names dozens of intrinsics
#![allow(clippy::wildcard_imports)]
// buffers are aligned to cache lines, and everything that is not a whole line is read and written unaligned
#![allow(clippy::cast_ptr_alignment)]
// a unit has the number of its unit, a head that of its head
#![allow(clippy::struct_field_names)]

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[doc(hidden)]
pub mod bench;
mod buffer;
mod detect;
#[cfg(target_arch = "x86_64")]
mod erf;
mod int8;
mod kernel;
mod linear;
mod net;
mod norm;
mod pack;
mod pass;
mod portable;
mod simd;
#[cfg(test)]
mod tests;
mod threads;

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

pub use detect::{Isa, available, physical_cores};
use kernel::Kernel;
use linear::{F32, Widened};
use net::{Block, Net};
use pass::{Pass, Workspace};
use threads::Pool;

use crate::{Config, Error, Result, Weights};

/// Blocks that a streamed pass holds: threads share the layers of two more evenly than those of one.
const BLOCKS_AT_ONCE: usize = 2;

/// Multiplications for an image under which f32 takes less than a millisecond, and tiles would be filled up with zeros.
const SMALL: usize = 100_000_000;

/// Multiplications of the blocks' linear layers for an image.
fn multiplications(config: &Config) -> usize {
    let block = config.embed_dim.saturating_mul((4 * config.embed_dim).saturating_add(2 * config.mlp_hidden));
    block.saturating_mul(config.depth).saturating_mul(config.num_tokens())
}

/// How exactly to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// The fastest that is as exact as f32 on this CPU; f32 itself where a model is so small that none is faster.
    #[default]
    Auto,
    /// IEEE single precision throughout.
    F32,
    /// Linear layers by three products of bf16, which together are as exact as f32; the rest in f32.
    Bf16x3,
    /// Linear layers in bf16, summed in f32; the rest in f32.
    Bf16,
    /// The blocks' linear layers in bytes, summed in 32 bits: weights with a scale for each output, activations with a scale
    /// and an offset for each token, found as they come. The rest as in [`Bf16`](Self::Bf16) with AMX; with VNNI
    /// in f32, but for the weights of patches and head. No other kernel has it.
    ///
    /// Logits of a ViT-B/16 with random weights move by 3e-2 of the largest, where bf16 moves them by 8e-3; of 192 random
    /// images 181 keep the class that f32 gives them, in bf16 189, as such a model's best two are close. A model whose
    /// tokens have a few channels far larger than the rest loses more: they share one scale.
    Int8,
}

impl Precision {
    /// Every one but [`Auto`](Self::Auto), roughest first.
    pub const ALL: [Self; 4] = [Self::Int8, Self::Bf16, Self::Bf16x3, Self::F32];

    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16x3 => "bf16x3",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        (std::iter::once(Self::Auto).chain(Self::ALL))
            .find(|p| p.name() == name)
            .ok_or_else(|| Error::Unsupported(format!("precision `{name}`: choose auto, f32, bf16x3, bf16 or int8")))
    }
}

/// How an engine is to run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Threads, the caller's included; the default is the physical cores. Never more than this process may use.
    pub threads: Option<usize>,
    /// How exactly to compute.
    pub precision: Precision,
    /// The kernels; the default is what `VIT_CPU` says, or else the fastest that this CPU has.
    pub isa: Option<Isa>,
}

/// What a model answers, row-major, f32.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// `[B, num_classes]`, where there is a head; with `Pool::None` `[B, N, num_classes]`.
    pub logits: Option<Vec<f32>>,
    /// The tokens after the last norm, `[B, N, D]`, as timm's `forward_features` means them.
    pub features: Vec<f32>,
    /// What the head reads: `[B, D]`, or as wide as `pre_logits`; with `Pool::None` `[B, N, D]`.
    pub pre_logits: Vec<f32>,
}

/// A model, packed for this CPU.
///
/// Any number of threads may call at once; passes take turns, as each uses every thread of the engine. Results are the
/// same, bit for bit, for any number of threads and, but for the portable kernel, however images are batched.
pub struct Engine {
    config: Config,
    isa: Isa,
    precision: Precision,
    kernel: Box<dyn Kernel>,
    net: Net,
    /// Where the blocks come from in every pass, if `net` has none.
    stream: Option<Arc<dyn Weights>>,
    pool: Pool,
    workspace: Mutex<Workspace>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("isa", &self.isa)
            .field("precision", &self.precision)
            .field("threads", &self.pool.count())
            .field("weight_bytes", &self.net.bytes())
            .finish_non_exhaustive()
    }
}

/// The kernel for an instruction set and a precision, and what it really is.
fn choose(isa: Isa, precision: Precision) -> Result<(Box<dyn Kernel>, Isa, Precision)> {
    let lost = || Error::Unsupported(format!("this CPU has no {isa}"));
    let no_bytes = || {
        Error::Unsupported(format!(
            "precision int8 needs a CPU that multiplies bytes, in AMX tiles or with AVX-512's VNNI; {isa} has none"
        ))
    };
    Ok(match isa {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Isa::Amx => {
            let amx = amx::Amx::detect().ok_or_else(lost)?;
            let avx512 = amx.avx512();
            match precision {
                Precision::F32 => return choose(Isa::Avx512, precision),
                Precision::Bf16 => (Box::new(amx::Tiled::<amx::Registers, false>::new(avx512)), isa, Precision::Bf16),
                Precision::Int8 if amx.has_bytes() => {
                    let floats = amx::Tiled::<amx::Registers, false>::new(avx512);
                    let integers = int8::Tiled::<amx::Registers>::new(avx512);
                    (Box::new(int8::Mixed { floats, integers }), isa, precision)
                }
                Precision::Int8 => return choose(Isa::Avx512, precision),
                Precision::Auto | Precision::Bf16x3 => {
                    (Box::new(amx::Tiled::<amx::Registers, true>::new(avx512)), isa, Precision::Bf16x3)
                }
            }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            let avx512 = avx512::Avx512::<false>::detect().ok_or_else(lost)?;
            if precision == Precision::Int8 {
                let integers = int8::Vnni::detect().ok_or_else(no_bytes)?;
                let kernel: Box<dyn Kernel> = match avx512::Dot::detect() {
                    Some(dot) => Box::new(int8::Mixed { floats: avx512::Bf16(dot), integers }),
                    None => Box::new(int8::Mixed { floats: Widened(avx512), integers }),
                };
                return Ok((kernel, isa, precision));
            }
            match (precision, avx512::Dot::detect()) {
                (Precision::Bf16, Some(dot)) => (Box::new(avx512::Bf16(dot)), isa, Precision::Bf16),
                (Precision::Bf16, None) => (Box::new(Widened(avx512)), isa, Precision::Bf16),
                (Precision::Bf16x3, Some(dot)) => (Box::new(avx512::Bf16x3(dot)), isa, Precision::Bf16x3),
                _ => (Box::new(F32(avx512)), isa, Precision::F32),
            }
        }
        _ if precision == Precision::Int8 => return Err(no_bytes()),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            let avx2 = avx2::Avx2::detect().ok_or_else(lost)?;
            match precision {
                Precision::Bf16 => (Box::new(Widened(avx2)), isa, Precision::Bf16),
                _ => (Box::new(F32(avx2)), isa, Precision::F32),
            }
        }
        Isa::Portable => match precision {
            Precision::Bf16 => (Box::new(Widened(portable::Portable)), isa, Precision::Bf16),
            _ => (Box::new(F32(portable::Portable)), isa, Precision::F32),
        },
        #[allow(unreachable_patterns)] // on x86-64 Linux all are named above
        _ => return Err(lost()),
    })
}

impl Engine {
    /// Reads and packs every weight, on all threads.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the engine lacks a switch of the configuration, or the CPU the kernel asked for;
    /// a tensor that is missing, of another shape, or not finite.
    pub fn new(config: &Config, weights: &dyn Weights, options: &Options) -> Result<Self> {
        let kernel = Self::plan(config, options)?;
        Self::with_kernel(config, weights, options.threads, kernel)
    }

    /// An engine that reads and packs the blocks anew in every pass, two at a time, instead of holding them all: for a
    /// model that answers once.
    ///
    /// # Errors
    /// As [`new`](Self::new), but what is wrong with a block's tensors is an error of the pass.
    pub fn streamed(config: &Config, weights: Arc<dyn Weights>, options: &Options) -> Result<Self> {
        let kernel = Self::plan(config, options)?;
        Self::stream_with_kernel(config, weights, options.threads, kernel)
    }

    /// What will run, if the engine has all that the configuration asks for.
    fn plan(config: &Config, options: &Options) -> Result<(Box<dyn Kernel>, Isa, Precision)> {
        config.validate()?;
        Net::supports(config)?;
        let isa = match options.isa {
            Some(isa) => isa.check()?,
            None => Isa::choose()?,
        };
        let precision = match options.precision {
            Precision::Auto if multiplications(config) < SMALL => Precision::F32,
            Precision::Int8 if config.embed_dim.max(Net::hidden(config)) > int8::WIDEST => {
                return Err(Error::Unsupported(format!("precision int8 in layers wider than {}", int8::WIDEST)));
            }
            precision => precision,
        };
        choose(isa, precision)
    }

    fn with_kernel(
        config: &Config,
        weights: &dyn Weights,
        threads: Option<usize>,
        (kernel, isa, precision): (Box<dyn Kernel>, Isa, Precision),
    ) -> Result<Self> {
        let pool = Pool::new(threads.unwrap_or_else(physical_cores).clamp(1, available()));
        let net = Net::read(config, weights, &*kernel, &pool)?;
        let workspace = Mutex::new(Workspace::default());
        Ok(Self { config: config.clone(), isa, precision, kernel, net, stream: None, pool, workspace })
    }

    fn stream_with_kernel(
        config: &Config,
        weights: Arc<dyn Weights>,
        threads: Option<usize>,
        kernel: (Box<dyn Kernel>, Isa, Precision),
    ) -> Result<Self> {
        let frame = Self::with_kernel(&Config { depth: 0, ..config.clone() }, &*weights, threads, kernel)?;
        Ok(Self { config: config.clone(), stream: Some(weights), ..frame })
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The kernels that run.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How the linear layers are computed: what `auto` came to, and `f32` where a CPU has nothing faster that is as
    /// exact as what was asked for.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Threads of a pass.
    pub fn threads(&self) -> usize {
        self.pool.count()
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.net.bytes()
    }

    /// Pixels `[B, C, H, W]`, normalised as the checkpoint says → everything the model answers.
    ///
    /// # Errors
    /// Pixels that are not `batch` images of the model's size.
    pub fn forward(&self, pixels: &[f32], batch: usize) -> Result<Output> {
        let mut output = Output::default();
        self.forward_into(pixels, batch, &mut output)?;
        Ok(output)
    }

    /// [`forward`](Self::forward) into vectors that are used again: after the first call for a batch size nothing is
    /// allocated.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_into(&self, pixels: &[f32], batch: usize, output: &mut Output) -> Result<()> {
        let Output { logits, features, pre_logits } = output;
        let logits = self.room_for_logits(logits);
        let (features, pre_logits) = (Some(features), Some(pre_logits));
        self.run(pixels, batch, Answers { logits, features, pre_logits, blocks: &mut [] })
    }

    /// As [`forward_into`](Self::forward_into) for who reads no tokens: [`Output::features`] stays empty. Where the head reads
    /// the class token, the last block computes no other; what it answers is the same, bit for bit (but for the portable
    /// kernel).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_head_into(&self, pixels: &[f32], batch: usize, output: &mut Output) -> Result<()> {
        let Output { logits, features, pre_logits } = output;
        features.clear();
        let logits = self.room_for_logits(logits);
        self.run(pixels, batch, Answers { logits, features: None, pre_logits: Some(pre_logits), blocks: &mut [] })
    }

    /// Where logits go, if the model has a head.
    fn room_for_logits<'a>(&self, logits: &'a mut Option<Vec<f32>>) -> Option<&'a mut Vec<f32>> {
        if self.config.num_classes == 0 {
            *logits = None;
            return None;
        }
        Some(logits.get_or_insert_default())
    }

    /// Pixels → logits alone, or what the head would read where there is none, into a vector that is used again; no more is
    /// computed than for [`forward_head_into`](Self::forward_head_into).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn logits_into(&self, pixels: &[f32], batch: usize, logits: &mut Vec<f32>) -> Result<()> {
        let (logits, pre_logits) =
            if self.config.num_classes > 0 { (Some(logits), None) } else { (None, Some(logits)) };
        self.run(pixels, batch, Answers { logits, features: None, pre_logits, blocks: &mut [] })
    }

    /// Pixels → tokens after the last norm, `[B, N, D]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_features(&self, pixels: &[f32], batch: usize) -> Result<Vec<f32>> {
        let mut features = Vec::new();
        let answers = Answers { logits: None, features: Some(&mut features), pre_logits: None, blocks: &mut [] };
        self.run(pixels, batch, answers)?;
        Ok(features)
    }

    /// Pixels → the tokens `[B, N, D]` that leave each of these blocks (counted from 0), before any norm.
    ///
    /// # Errors
    /// A block that the model has not; as [`forward`](Self::forward).
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
        let n = self.config.num_tokens();
        let at_once = (pass::ROWS_AT_ONCE / n).clamp(1, batch);
        answers.clear();
        // a panic in a pass leaves activations behind that the next pass writes anew
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        workspace.fit(&self.config, &*self.kernel, at_once, self.pool.count());
        for pixels in pixels.chunks(at_once * image) {
            let images = pixels.len() / image;
            answers.reserve_taps(images * n * self.config.embed_dim);
            let pass = Pass::new(self, &workspace, pixels, images, &mut answers);
            self.pass(&pass)?;
            pass.answer(&mut answers);
        }
        Ok(())
    }

    fn pass(&self, pass: &Pass<'_>) -> Result<()> {
        let Some(weights) = &self.stream else {
            self.pool.run(&|worker| pass.run(worker));
            return Ok(());
        };
        self.pool.run(&|worker| pass.begin(worker));
        let (mut blocks, depth) = (vec![], pass.depth());
        for first in (0..depth).step_by(BLOCKS_AT_ONCE) {
            let range = first..depth.min(first + BLOCKS_AT_ONCE);
            blocks = Block::read(&self.config, &**weights, range, blocks, &*self.kernel, &self.pool)?;
            self.pool.run(&|worker| pass.steps(worker, first, &blocks));
        }
        self.pool.run(&|worker| pass.end(worker));
        Ok(())
    }
}

/// What is wanted of a pass, and where it goes.
struct Answers<'a> {
    logits: Option<&'a mut Vec<f32>>,
    features: Option<&'a mut Vec<f32>>,
    pre_logits: Option<&'a mut Vec<f32>>,
    /// Tokens that leave these blocks.
    blocks: &'a mut [(usize, Vec<f32>)],
}

impl Answers<'_> {
    fn clear(&mut self) {
        let vectors = [&mut self.logits, &mut self.features, &mut self.pre_logits];
        vectors.into_iter().flatten().for_each(|vector| vector.clear());
        self.blocks.iter_mut().for_each(|(_, tokens)| tokens.clear());
    }

    /// Room for the tokens of the images that come next.
    fn reserve_taps(&mut self, len: usize) {
        self.blocks.iter_mut().for_each(|(_, tokens)| tokens.resize(tokens.len() + len, 0.0));
    }
}
