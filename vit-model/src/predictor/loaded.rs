//! A checkpoint that is loaded for what runs it: pixels in the host's memory in, values out.

use std::sync::{Arc, Mutex, PoisonError};

use super::backend::{Backend, Kernel, Loading, Runtime};
use super::builder::Builder;
use super::modules::{Modules, Wanted, quantised};
use crate::checkpoint::Checkpoint;
use crate::cpu::{self, Output};
#[cfg(feature = "image")]
use crate::image::{ImageOptions, Preprocess};
use crate::labels::{self, Prediction};
use crate::precision::Precision;
use crate::text::TextModel;
use crate::{Config, Error, Pool, Result, memory};

/// The checkpoint, what runs it, and how images become its input.
pub(super) struct Loaded {
    pub checkpoint: Checkpoint,
    pub runner: Runner,
    pub backend: Backend,
    pub threads: Option<usize>,
    #[cfg(feature = "image")]
    pub preprocess: std::result::Result<Preprocess, String>,
    #[cfg(feature = "image")]
    pub image_options: ImageOptions,
    /// The text tower, loaded when it is first asked for.
    text: Mutex<Option<Arc<TextModel>>>,
    /// Modules beside the engine, which keeps no attention: loaded when attention is first asked for.
    beside: Mutex<Option<Arc<Modules>>>,
}

/// What runs the model.
pub(super) enum Runner {
    Engine(Box<cpu::Engine>),
    Modules(Arc<Modules>),
}

impl Loaded {
    pub fn new(checkpoint: &Checkpoint, options: &Builder) -> Result<Self> {
        // a model of four channels cannot read a picture, but it can still run tensors
        #[cfg(feature = "image")]
        let preprocess = Preprocess::new(&checkpoint.info.preprocess).map_err(|error| error.to_string());
        let (runner, backend) = Runner::new(checkpoint, options)?;
        Ok(Self {
            checkpoint: checkpoint.clone(),
            runner,
            backend,
            threads: options.threads,
            #[cfg(feature = "image")]
            preprocess,
            #[cfg(feature = "image")]
            image_options: ImageOptions::new().orientation(options.orientation),
            text: Mutex::new(None),
            beside: Mutex::new(None),
        })
    }

    pub fn config(&self) -> &Config {
        &self.checkpoint.info.model
    }

    /// The names of the classes, if the checkpoint has them.
    pub fn labels(&self) -> Option<&[String]> {
        self.checkpoint.info.labels.as_deref()
    }

    /// The `k` most probable classes of one row of logits.
    pub fn predictions(&self, logits: &[f32], k: usize) -> Result<Vec<Prediction>> {
        labels::predictions(self.checkpoint.info.problem_type, logits, self.labels(), k)
    }

    /// Values of an image of the input.
    pub fn image_len(&self) -> usize {
        let (config, [h, w]) = (self.config(), self.config().img_size);
        config.in_chans * h * w
    }

    /// Runs `pixels` `[B, C, H, W]`, normalised.
    pub fn forward_into(&self, pixels: &[f32], batch: usize, wanted: Wanted, output: &mut Output) -> Result<()> {
        if batch == 0 || self.image_len().checked_mul(batch) != Some(pixels.len()) {
            let (c, [h, w]) = (self.config().in_chans, self.config().img_size);
            return Err(Error::Input(format!(
                "the model reads [{batch}, {c}, {h}, {w}], found {} values",
                pixels.len()
            )));
        }
        let engine = match &self.runner {
            Runner::Engine(engine) => engine,
            Runner::Modules(modules) => return modules.forward_into(pixels, batch, wanted, output),
        };
        memory::guarded("the activations", || match wanted {
            Wanted::All => engine.forward_into(pixels, batch, output),
            Wanted::Head => engine.forward_head_into(pixels, batch, output),
            Wanted::Logits => {
                output.features.clear();
                if self.config().num_classes > 0 {
                    output.pre_logits.clear();
                    engine.logits_into(pixels, batch, output.logits.get_or_insert_default())
                } else {
                    output.logits = None;
                    engine.logits_into(pixels, batch, &mut output.pre_logits)
                }
            }
        })
    }

    /// The shapes of a batch's [`Output`].
    pub fn shapes(&self, batch: usize) -> Shapes {
        let config = self.config();
        let tokens = config.num_tokens();
        let per_token = config.global_pool == Pool::None && !config.dist_token;
        let shape = |width| if per_token { vec![batch, tokens, width] } else { vec![batch, width] };
        let width = match &config.pre_logits {
            Some(pre) if !config.dist_token => pre.size,
            _ => config.pooled_dim(),
        };
        Shapes {
            logits: (config.num_classes > 0).then(|| shape(config.num_classes)),
            features: vec![batch, tokens, config.embed_dim],
            pre_logits: shape(width),
        }
    }

    /// Values of an image's embedding: what the head reads, or what it answers if it is the projection of a two-tower model.
    pub fn embedding_len(&self) -> usize {
        let shapes = self.shapes(1);
        match (shapes.logits, self.checkpoint.info.projection) {
            (Some(logits), true) => logits.iter().product(),
            _ => shapes.pre_logits.iter().product(),
        }
    }

    /// Which answer is an image's embedding.
    #[cfg(feature = "image")]
    pub fn embedding_wanted(&self) -> Wanted {
        if self.checkpoint.info.projection { Wanted::Logits } else { Wanted::Head }
    }

    /// The text tower, on the device that runs the images.
    pub fn text(&self) -> Result<Arc<TextModel>> {
        let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = &*text {
            return Ok(text.clone());
        }
        let source = self.checkpoint.text().ok_or_else(|| {
            Error::unsupported("this model has no text tower; the folders of CLIP and SigLIP have one")
        })?;
        let device = match &self.runner {
            Runner::Engine(_) => &candle_core::Device::Cpu,
            Runner::Modules(modules) => modules.device(),
        };
        Ok(text.insert(Arc::new(source.load(device)?)).clone())
    }

    /// The logits of each image, if the model has one row of them for an image.
    #[cfg(feature = "image")]
    pub fn check_head(&self) -> Result<()> {
        match self.shapes(1).logits.as_deref() {
            _ if self.checkpoint.is_two_tower() => Err(Error::unsupported(
                "this is a two-tower model, whose classes are words: name them (`Predictor::zero_shot`, --labels)",
            )),
            Some([_, _]) => Ok(()),
            Some(_) => Err(Error::unsupported("the head of this model answers per token, not per image")),
            None => Err(Error::unsupported(
                "this model has no head and names no classes; its features are what it has to give",
            )),
        }
    }

    /// Modules to look into: those that run the model, or in f32 on the CPU beside the engine.
    pub fn modules(&self) -> Result<Arc<Modules>> {
        if let Runner::Modules(modules) = &self.runner {
            return Ok(modules.clone());
        }
        let mut beside = self.beside.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(modules) = &*beside {
            return Ok(modules.clone());
        }
        let (config, weights) = (self.config(), &*self.checkpoint.weights);
        let (modules, _) = Modules::new(config, weights, candle_core::Device::Cpu, Precision::F32, self.threads, None)?;
        Ok(beside.insert(Arc::new(modules)).clone())
    }
}

/// The shapes of a model's [`Output`] for a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shapes {
    /// `[B, classes]`, or `[B, N, classes]` for a model without pooling; `None` for a model without a head.
    pub logits: Option<Vec<usize>>,
    /// `[B, N, D]`.
    pub features: Vec<usize>,
    /// `[B, D]`, or `[B, N, D]` for a model without pooling.
    pub pre_logits: Vec<usize>,
}

impl Runner {
    /// The engine on a CPU; candle's modules on a GPU, on request, and if the engine lacks a switch of the model.
    fn new(checkpoint: &Checkpoint, options: &Builder) -> Result<(Self, Backend)> {
        let (device, no_gpu) = options.device.probe()?;
        let (config, weights) = (&checkpoint.info.model, &checkpoint.weights);
        let modules = |why| {
            let (modules, backend) =
                Modules::new(config, &**weights, device.clone(), options.precision, options.threads, why)?;
            Ok((Self::Modules(Arc::new(modules)), Backend { no_gpu: no_gpu.clone(), ..backend }))
        };
        if !device.is_cpu() {
            return modules(None);
        }
        if options.runtime == Runtime::Modules {
            return modules(Some("asked for".into()));
        }
        let precision = options.precision;
        if matches!(precision, Precision::F16 | Precision::Q8_0) {
            return Err(Error::unsupported(format!(
                "precision {precision} on a CPU; it has f32, bf16x3, bf16 and int8"
            )));
        }
        // a kernel that was asked for and is not there is an error, not a reason to run another
        let isa = match options.kernel {
            None => cpu::Isa::choose()?,
            Some(kernel) => {
                kernel.isa().ok_or_else(|| Error::unsupported(format!("{kernel} is no kernel of the CPU engine")))?
            }
        };
        let asked = cpu::EngineOptions { threads: options.threads, precision, isa: Some(isa) };
        let engine = memory::guarded("the weights", || match options.loading {
            Loading::Streamed => cpu::Engine::streamed(config, weights.clone(), &asked),
            Loading::Held => cpu::Engine::new(config, &**weights, &asked),
        });
        match engine {
            Ok(engine) => {
                let backend = Backend {
                    kernel: Kernel::of_isa(engine.isa()),
                    precision: engine.precision(),
                    threads: engine.threads(),
                    why: None,
                    quantised: quantised(&**weights),
                    no_gpu: no_gpu.clone(),
                };
                Ok((Self::Engine(Box::new(engine)), backend))
            }
            Err(Error::Unsupported { why, .. }) if options.runtime == Runtime::Auto && options.kernel.is_none() => {
                modules(Some(why))
            }
            Err(error) => Err(error),
        }
    }
}
