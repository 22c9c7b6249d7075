//! `Predictor`: a checkpoint that answers. It picks what runs it (the CPU engine or candle's modules), preprocesses images as
//! the checkpoint says, and names the classes.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

pub use crate::cpu::Output;
#[cfg(feature = "image")]
use crate::image::Image;

use crate::cpu;
use crate::labels::{self, Prediction};
use crate::load::Checkpoint;
#[cfg(feature = "image")]
use crate::preprocess::Preprocess;
use crate::weights::Dequantised;
use crate::{Config, Error, ModelInfo, Pool, Result, VisionTransformer, Weights};

/// How precisely a model computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// The fastest that is f32-grade on this machine; candle's modules multiply quantised weights as they are stored.
    #[default]
    Auto,
    /// IEEE 754 single throughout.
    F32,
    /// Three bf16 products for one of f32 grade: logits within 1e-4 relative of f32 (CPU only).
    Bf16x3,
    /// bfloat16 products, f32 sums.
    Bf16,
    /// Products of bytes and 32-bit sums in the blocks' linear layers (CPUs with AMX for int8 or AVX-512 VNNI only); see
    /// [`cpu::Precision::Int8`].
    Int8,
    /// IEEE 754 half (GPU only).
    F16,
}

impl Precision {
    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16x3 => "bf16x3",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::F16 => "f16",
        }
    }
}

/// Where and how a [`Predictor`] runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// The device; on a CPU the engine runs where it covers the model.
    pub device: Device,
    /// How precisely.
    pub precision: Precision,
    /// CPU threads; `None`: the physical cores that this process may use.
    pub threads: Option<usize>,
    /// Use candle's modules on a CPU, too.
    pub modules: bool,
    /// Let the CPU engine read the blocks anew in every pass instead of holding them: for a model that answers once.
    pub streamed: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { device: Device::Cpu, precision: Precision::Auto, threads: None, modules: false, streamed: false }
    }
}

/// Which path runs a model, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The kernels: `amx`, `avx512`, `avx2`, `portable` of the CPU engine; `candle-cpu`, `candle-cuda`, `candle-metal`.
    pub kernel: String,
    /// `f32`, `bf16x3`, `bf16`, `int8` or `f16`; `q8_0` where linear layers multiply blocks of that, see
    /// [`quantised`](Self::quantised).
    pub precision: String,
    /// CPU threads.
    pub threads: usize,
    /// Why candle's modules run on a CPU, where they do.
    pub why: Option<String>,
    /// The checkpoint's matrices are stored in Q8_0. The CPU engine, and candle's modules where [`Precision::F32`] is
    /// asked for, compute with the values that these stand for.
    pub quantised: bool,
}

/// A checkpoint, ready to answer.
///
#[cfg_attr(feature = "image", doc = "```")]
#[cfg_attr(not(feature = "image"), doc = "```ignore")]
/// use vit_model::{Predictor, image::Image};
///
/// # fn main() -> vit_model::Result<()> {
/// let predictor = Predictor::open("../weights/digits/model.safetensors")?;
/// let image = Image::open("../weights/digits/samples/3.png".as_ref(), true)?;
/// let answers = predictor.predict(&[image])?;
/// for best in &answers[0][..3] {
///     println!("{:6.2} %  {}", best.probability * 100.0, best.label);
/// }
/// assert_eq!(answers[0][0].label, "3");
/// # Ok(())
/// # }
/// ```
///
/// It is `Send + Sync`: several threads may ask one predictor at once.
pub struct Predictor {
    info: ModelInfo,
    #[cfg(feature = "image")]
    preprocess: std::result::Result<Preprocess, String>,
    model: Model,
    backend: Backend,
}

enum Model {
    Engine(Box<cpu::Engine>),
    Modules(Box<Modules>),
}

/// candle's modules, and where they run.
struct Modules {
    vit: VisionTransformer,
    device: Device,
    dtype: DType,
    pool: Option<rayon::ThreadPool>,
    /// On a GPU passes take turns: candle gives each thread a stream of its own, and all of them one cuBLAS workspace.
    turn: Mutex<()>,
}

impl Predictor {
    /// A checkpoint's file or folder (see [`load::open`](crate::load::open)), on the CPU with the default options.
    ///
    /// # Errors
    /// As [`load::open`](crate::load::open) and [`new`](Self::new).
    pub fn open(path: impl AsRef<std::path::Path>) -> Result<Self> {
        Self::new(&crate::load::open(path.as_ref())?, &Options::default())
    }

    /// Loads the checkpoint's weights for what will run them.
    ///
    /// # Errors
    /// A configuration or tensors that do not fit, a precision that the device does not have, a lack of memory.
    pub fn new(checkpoint: &Checkpoint, options: &Options) -> Result<Self> {
        let info = checkpoint.info.clone();
        #[cfg(feature = "image")]
        // a model of four channels cannot read a picture, and answers tensors all the same
        let preprocess = Preprocess::new(&info.preprocess).map_err(|error| error.to_string());
        let (model, backend) = Model::new(checkpoint, options)?;
        Ok(Self {
            info,
            #[cfg(feature = "image")]
            preprocess,
            model,
            backend,
        })
    }

    /// The checkpoint's configuration, labels and origin.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.info.model
    }

    /// What runs the model.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// How images become the input.
    #[cfg(feature = "image")]
    ///
    /// # Errors
    /// A model that no picture fits: of two or four channels, say.
    pub fn preprocess(&self) -> Result<&Preprocess> {
        self.preprocess.as_ref().map_err(|why| Error::Image(why.clone()))
    }

    /// The classes of each image, the most probable first; all of them.
    ///
    /// # Errors
    /// An image that cannot be preprocessed, a model without a head, an answer that is not finite.
    #[cfg(feature = "image")]
    pub fn predict(&self, images: &[Image]) -> Result<Vec<Vec<Prediction>>> {
        use rayon::prelude::*;
        let preprocess = self.preprocess()?;
        let image = preprocess.output_shape().iter().product();
        let mut pixels = vec![0.0; images.len() * image];
        (pixels.par_chunks_exact_mut(image).zip(images))
            .try_for_each(|(pixels, image)| preprocess.apply_into(image, pixels))?;
        let mut output = Output::default();
        self.forward_head_into(&pixels, images.len(), &mut output)?;
        self.rows(&output, images.len())?.map(|row| self.classify(row, usize::MAX)).collect()
    }

    /// `pixels` `[B, C, H, W]`, normalised → what the model puts out.
    ///
    /// # Errors
    /// Another number of pixels than the model reads; a lack of memory.
    pub fn forward(&self, pixels: &[f32], batch: usize) -> Result<Output> {
        self.check(pixels, batch)?;
        match &self.model {
            Model::Engine(engine) => engine.forward(pixels, batch),
            Model::Modules(modules) => modules.forward(pixels, batch, true),
        }
    }

    /// [`forward`](Self::forward) into vectors that are used again.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_into(&self, pixels: &[f32], batch: usize, output: &mut Output) -> Result<()> {
        self.check(pixels, batch)?;
        match &self.model {
            Model::Engine(engine) => engine.forward_into(pixels, batch, output),
            Model::Modules(modules) => {
                *output = modules.forward(pixels, batch, true)?;
                Ok(())
            }
        }
    }

    /// As [`forward_into`](Self::forward_into) for who reads no tokens: [`Output::features`] stays empty. They are by far the
    /// most that would have to be fetched from a GPU, and the CPU engine's last block computes none that the head does not
    /// read.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_head_into(&self, pixels: &[f32], batch: usize, output: &mut Output) -> Result<()> {
        self.check(pixels, batch)?;
        match &self.model {
            Model::Engine(engine) => engine.forward_head_into(pixels, batch, output),
            Model::Modules(modules) => {
                *output = modules.forward(pixels, batch, false)?;
                Ok(())
            }
        }
    }

    /// `pixels` `[B, C, H, W]`, normalised → the logits alone (what the head would read where there is none), into a vector
    /// that is used again: on the CPU engine nothing is allocated after the first call.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn logits_into(&self, pixels: &[f32], batch: usize, logits: &mut Vec<f32>) -> Result<()> {
        self.check(pixels, batch)?;
        match &self.model {
            Model::Engine(engine) => engine.logits_into(pixels, batch, logits),
            Model::Modules(modules) => {
                *logits = modules.logits(pixels, batch)?;
                Ok(())
            }
        }
    }

    fn check(&self, pixels: &[f32], batch: usize) -> Result<()> {
        let config = self.config();
        let [h, w] = config.img_size;
        let image = config.in_chans * h * w;
        if batch == 0 || image.checked_mul(batch) != Some(pixels.len()) {
            let c = config.in_chans;
            return Err(Error::Input(format!(
                "the model reads [{batch}, {c}, {h}, {w}], found {} values",
                pixels.len()
            )));
        }
        Ok(())
    }

    /// The logits of each image of a batch.
    ///
    /// # Errors
    /// A model without a head, or whose head answers per token.
    pub fn rows<'a>(&self, output: &'a Output, batch: usize) -> Result<impl Iterator<Item = &'a [f32]> + use<'a>> {
        let config = self.config();
        let logits = output.logits.as_deref().ok_or_else(|| {
            Error::Unsupported(
                "this model has no head and names no classes; its features are what it has to give".into(),
            )
        })?;
        if logits.len() != batch * config.num_classes {
            return Err(Error::Unsupported("the head of this model answers per token, not per image".into()));
        }
        Ok(logits.chunks_exact(config.num_classes))
    }

    /// The `k` best classes of one image's logits.
    ///
    /// # Errors
    /// A logit that is not finite.
    pub fn classify(&self, logits: &[f32], k: usize) -> Result<Vec<Prediction>> {
        labels::predictions(logits, self.info.labels.as_deref(), k)
    }

    /// The shapes of [`Output::logits`], [`Output::features`] and [`Output::pre_logits`] for a batch.
    pub fn shapes(&self, batch: usize) -> [Vec<usize>; 3] {
        let config = self.config();
        let tokens = config.num_tokens();
        let per_token = config.global_pool == Pool::None && !config.dist_token;
        let shape = |width| if per_token { vec![batch, tokens, width] } else { vec![batch, width] };
        let width = match &config.pre_logits {
            Some(pre) if !config.dist_token => pre.size,
            _ => config.pooled_dim(),
        };
        [shape(config.num_classes), vec![batch, tokens, config.embed_dim], shape(width)]
    }
}

/// Whether any tensor is stored in Q8_0.
fn quantised(weights: &dyn Weights) -> bool {
    weights.tensors().keys().any(|name| weights.is_q8_0(name))
}

impl Model {
    /// The engine on a CPU; candle's modules on a GPU, on request, and where the engine lacks a switch of the model.
    fn new(checkpoint: &Checkpoint, options: &Options) -> Result<(Self, Backend)> {
        let precision = match options.precision {
            _ if !options.device.is_cpu() => return Self::modules(checkpoint, options, None),
            Precision::Auto => cpu::Precision::Auto,
            Precision::F32 => cpu::Precision::F32,
            Precision::Bf16x3 => cpu::Precision::Bf16x3,
            Precision::Bf16 => cpu::Precision::Bf16,
            Precision::Int8 => cpu::Precision::Int8,
            Precision::F16 => {
                return Err(Error::Unsupported("precision f16 on a CPU; it has f32, bf16x3, bf16 and int8".into()));
            }
        };
        if options.modules {
            return Self::modules(checkpoint, options, Some("asked for".into()));
        }
        // a kernel that was forced and is not there is an error, not a reason to run another
        let isa = Some(cpu::Isa::choose()?);
        let asked = cpu::Options { threads: options.threads, precision, isa };
        let (config, weights) = (&checkpoint.info.model, &checkpoint.weights);
        let engine = if options.streamed {
            cpu::Engine::streamed(config, weights.clone(), &asked)
        } else {
            cpu::Engine::new(config, &**weights, &asked)
        };
        match engine {
            Ok(engine) => {
                let backend = Backend {
                    kernel: engine.isa().name().into(),
                    precision: engine.precision().name().into(),
                    threads: engine.threads(),
                    why: None,
                    quantised: quantised(&**weights),
                };
                Ok((Self::Engine(Box::new(engine)), backend))
            }
            Err(Error::Unsupported(why)) => Self::modules(checkpoint, options, Some(why)),
            Err(error) => Err(error),
        }
    }

    /// candle's modules: every device, every switch of the family.
    fn modules(checkpoint: &Checkpoint, options: &Options, why: Option<String>) -> Result<(Self, Backend)> {
        let device = options.device.clone();
        let dtype = match (options.precision, device.is_cpu()) {
            (Precision::Auto | Precision::F32, _) => DType::F32,
            (Precision::Bf16, false) => DType::BF16,
            (Precision::F16, false) => DType::F16,
            (precision, on_cpu) => {
                let name = precision.name();
                let place =
                    if on_cpu { "candle's CPU modules; they have f32" } else { "a GPU; it has f32, f16 and bf16" };
                let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
                return Err(Error::Unsupported(format!("precision {name} on {place}{why}")));
            }
        };
        let (config, weights) = (&checkpoint.info.model, &*checkpoint.weights);
        let quantised = quantised(weights);
        let blocks = quantised && options.precision != Precision::F32;
        let plain = Dequantised(weights);
        let weights = if blocks { weights } else { &plain };
        let vit = VisionTransformer::from_weights(config, weights, dtype, &device)?;
        device.synchronize()?; // the weights are there for every thread's stream
        let pool = match options.threads {
            Some(threads) if device.is_cpu() => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .map_err(|e| Error::Unsupported(format!("{threads} threads: {e}")))?,
            ),
            _ => None,
        };
        let kernel = match device {
            Device::Cpu => "candle-cpu",
            Device::Cuda(_) => "candle-cuda",
            Device::Metal(_) => "candle-metal",
        };
        let precision = match dtype {
            _ if blocks => "q8_0",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            _ => "f32",
        };
        let threads = pool.as_ref().map_or_else(rayon::current_num_threads, rayon::ThreadPool::current_num_threads);
        let backend = Backend { kernel: kernel.into(), precision: precision.into(), threads, why, quantised };
        Ok((Self::Modules(Box::new(Modules { vit, device, dtype, pool, turn: Mutex::new(()) })), backend))
    }
}

impl Modules {
    /// The most images of one pass. Candle's GPU kernels count in 32 bits: no tensor of a pass may have more elements.
    fn most(config: &Config) -> usize {
        let (n, [h, w]) = (config.num_tokens(), config.img_size);
        let heads = config.num_heads * if config.diff_attn { 2 } else { 1 };
        let widest = 3 * config.embed_dim + config.mlp_hidden; // of a token, where one projection makes all
        let image = (heads * n * n).max(n * widest).max(config.in_chans * h * w);
        (i32::MAX as usize / image).max(1)
    }

    /// Runs `pass` over `[B, C, H, W]` on the device, in as many parts as it takes.
    fn run(
        &self,
        pixels: &[f32],
        batch: usize,
        mut pass: impl FnMut(&VisionTransformer, &Tensor) -> Result<()> + Send,
    ) -> Result<()> {
        let config = self.vit.config();
        let (c, [h, w]) = (config.in_chans, config.img_size);
        let most = if self.device.is_cpu() { batch } else { Self::most(config) };
        let mut run = || {
            let _turn = (!self.device.is_cpu()).then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner));
            for part in pixels.chunks(most * c * h * w) {
                let x = Tensor::from_slice(part, (part.len() / (c * h * w), c, h, w), &self.device)?;
                pass(&self.vit, &x.to_dtype(self.dtype)?)?;
            }
            Ok(())
        };
        match &self.pool {
            Some(pool) => pool.install(run),
            None => run(),
        }
    }

    /// Logits and what the head reads, and with `features` the tokens.
    fn forward(&self, pixels: &[f32], batch: usize, features: bool) -> Result<Output> {
        let mut output = Output::default();
        self.run(pixels, batch, |vit, x| {
            let tokens = vit.forward_features(x)?; // [B, N, D]
            if vit.config().num_classes > 0 {
                output.logits.get_or_insert_default().extend(values(&vit.forward_head(&tokens, false)?)?);
            }
            output.pre_logits.extend(values(&vit.forward_head(&tokens, true)?)?);
            if features {
                output.features.extend(values(&tokens)?);
            }
            Ok(())
        })?;
        Ok(output)
    }

    /// The logits alone; without a head what it would read.
    fn logits(&self, pixels: &[f32], batch: usize) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        self.run(pixels, batch, |vit, x| {
            logits.extend(values(&vit.forward(x)?)?);
            Ok(())
        })?;
        Ok(logits)
    }
}

/// A tensor's values, wherever it lies, in f32.
fn values(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::Modules;
    use crate::names::Architecture;

    #[test]
    fn no_tensor_of_a_pass_on_a_gpu_outgrows_32_bits() {
        // q, k, v and the hidden layer of 197 and of 50 tokens; the attention of 577 tokens with 16 heads
        for (name, most) in [
            ("vit_base_patch16_224", 2_147_483_647 / (197 * 7 * 768)),
            ("vit_large_patch16_384", 2_147_483_647 / (16 * 577 * 577)),
            ("vit_base_patch32_224", 2_147_483_647 / (50 * 7 * 768)),
        ] {
            assert_eq!(Modules::most(&Architecture::of(name).unwrap().config), most, "{name}");
        }
    }
}
