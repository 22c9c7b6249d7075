//! The front door: open a model, then classify, embed, look at attention, or run tensors.
//!
//! From below: `backend` and `builder` say what is to run, `modules` runs candle's modules, `loaded` picks between those and
//! the CPU engine, `tensors` takes candle tensors in and out, `input` takes images in, `one` answers for one of them and
//! `ahead` for many, `attention` looks inside.

#[cfg(feature = "image")]
mod ahead;
mod attention;
mod backend;
mod builder;
mod finite;
#[cfg(feature = "image")]
mod input;
mod loaded;
mod modules;
#[cfg(feature = "image")]
mod one;
mod tensors;
mod zero_shot;

use std::ffi::OsStr;
use std::sync::Arc;

use candle_core::Tensor;

#[cfg(feature = "image")]
pub use ahead::{ClassifyAll, EmbedAll};
pub use attention::{AttentionMap, AttentionMaps};
pub use backend::{Backend, Kernel, Loading, Runtime};
pub use builder::Builder;
#[cfg(feature = "image")]
pub use input::Input;
pub use loaded::Shapes;
pub use modules::Wanted;
pub use zero_shot::ZeroShot;
#[cfg(feature = "image")]
pub use zero_shot::ZeroShotAll;

pub use crate::cpu::Output;

use crate::checkpoint::Checkpoint;
#[cfg(feature = "image")]
use crate::image::Preprocess;
use crate::labels::Prediction;
use crate::text::TextModel;
use crate::{Config, Error, ModelInfo, Result};
use loaded::{Loaded, Runner};
use tensors::Answer;

/// A model that answers: it preprocesses images as the checkpoint says, runs the model on the fastest code that this machine
/// has, and names the classes.
///
#[cfg_attr(feature = "image", doc = "```")]
#[cfg_attr(not(feature = "image"), doc = "```ignore")]
/// use vit_model::Predictor;
///
/// # fn main() -> vit_model::Result<()> {
/// # let image = "../weights/digits/samples/3.png";
/// let model = Predictor::open("../weights/digits/model.safetensors")?;
/// let best = model.classify(image, 3)?;
/// for class in &best {
///     println!("{:6.2} %  {}", class.probability * 100.0, class.label);
/// }
/// assert_eq!(best[0].label, "3");
/// # Ok(())
/// # }
/// ```
///
/// It is `Send + Sync`: several threads may ask one predictor at once. Passes take turns, because each uses all threads of
/// the model.
pub struct Predictor {
    loaded: Loaded,
}

impl std::fmt::Debug for Predictor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Predictor").field("backend", self.backend()).finish_non_exhaustive()
    }
}

// checked when this is compiled, because users share one predictor among threads
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Predictor>();
    shared::<Error>();
};

impl Predictor {
    /// Opens a model with the default options. `model` is what the command line takes as MODEL: a file, a folder, `digits`, a
    /// short name, or a repository on the Hub; see [`Checkpoint::resolve`]. A checkpoint from elsewhere, such as an ONNX file
    /// that `vit_convert::open` has read, is loaded by [`from_checkpoint`](Self::from_checkpoint).
    ///
    /// # Errors
    /// What is there and why it cannot be used.
    pub fn open(model: impl AsRef<OsStr>) -> Result<Self> {
        Self::builder().open(model)
    }

    /// Opens a repository on the Hub (`timm/…`, `google/vit-base-patch16-224`, `…@revision`) with the default options: from
    /// the cache, or fetched.
    ///
    /// # Errors
    /// [`Error::Hub`] if it cannot be fetched; what is in it and why it cannot be used.
    #[cfg(feature = "hub")]
    pub fn from_pretrained(repository: &str) -> Result<Self> {
        Self::builder().pretrained(repository)
    }

    /// Loads a checkpoint with the default options.
    ///
    /// # Errors
    /// A tensor that cannot be read or is not finite, a lack of memory.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        Self::builder().checkpoint(checkpoint)
    }

    /// Options to open a model with: device, precision, threads.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The checkpoint's configuration, preprocessing, labels and origin.
    pub fn info(&self) -> &ModelInfo {
        &self.loaded.checkpoint.info
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        self.loaded.config()
    }

    /// The names of the classes, if the checkpoint has them.
    pub fn labels(&self) -> Option<&[String]> {
        self.loaded.labels()
    }

    /// The `k` most probable classes of one row of logits, such as [`forward`](Self::forward) gives: softmax or sigmoid as
    /// the checkpoint's [`problem_type`](ModelInfo::problem_type) says, with the names of the classes.
    ///
    /// # Errors
    /// [`Error::Output`] if a logit is not finite; [`Error::Input`] for another number of logits than the model has classes.
    pub fn predictions(&self, logits: &[f32], k: usize) -> Result<Vec<Prediction>> {
        if logits.len() != self.config().num_classes {
            let (classes, found) = (self.config().num_classes, logits.len());
            return Err(Error::Input(format!("the model has {classes} classes, found {found} logits")));
        }
        self.loaded.predictions(logits, k)
    }

    /// What runs the model.
    pub fn backend(&self) -> &Backend {
        &self.loaded.backend
    }

    /// The device that runs the model, on which [`forward`](Self::forward) and [`features`](Self::features) leave their
    /// answers.
    pub fn device(&self) -> &candle_core::Device {
        match &self.loaded.runner {
            Runner::Engine(_) => &candle_core::Device::Cpu,
            Runner::Modules(modules) => modules.device(),
        }
    }

    /// The logits of images: `[B, classes]` f32 on [`device`](Self::device). A model without a head gives what the head
    /// would read.
    ///
    /// `images` is `[B, C, H, W]` (or `[B, H, W, C]`) on any device: floats that are normalised as the checkpoint says, or
    /// 8-bit pixels at the model's own size, which are normalised here. A single 8-bit image may be `[H, W, C]`.
    ///
    /// # Errors
    /// [`Error::Input`] if the shape or the element type does not fit.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        self.loaded.tensor(images, Answer::Logits)
    }

    /// The tokens after the final norm, `[B, N, D]` f32 (timm's `forward_features`), for images as
    /// [`forward`](Self::forward) takes them.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        self.loaded.tensor(images, Answer::Features)
    }

    /// What the head reads, `[B, D]` f32 (timm's `forward_head(pre_logits=True)`), for images as [`forward`](Self::forward)
    /// takes them.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn pre_logits(&self, images: &Tensor) -> Result<Tensor> {
        self.loaded.tensor(images, Answer::PreLogits)
    }

    /// Images as [`forward`](Self::forward) takes them → `[B, C, H, W]` f32, normalised.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn input(&self, images: &Tensor) -> Result<Tensor> {
        self.loaded.input(images)
    }

    /// The low-level pass, for programs that keep their own buffers: `pixels` `[B, C, H, W]`, normalised, into vectors that
    /// are used again. On the CPU engine nothing is allocated after the first call for a batch size.
    ///
    /// # Errors
    /// [`Error::Input`] for another number of pixels than `batch` images have; [`Error::Output`] if a value is not finite, with
    /// the first module that produced one; with [`Loading::Streamed`] a tensor that cannot be read.
    pub fn forward_into(&self, pixels: &[f32], batch: usize, wanted: Wanted, output: &mut Output) -> Result<()> {
        self.loaded.forward_into(pixels, batch, wanted, output)?;
        self.loaded.check(pixels, batch, output)
    }

    /// The shapes of what [`forward_into`](Self::forward_into) writes.
    pub fn shapes(&self, batch: usize) -> Shapes {
        self.loaded.shapes(batch)
    }

    /// Values of an embedding, as [`embed`](Self::embed) gives it.
    pub fn embedding_len(&self) -> usize {
        self.loaded.embedding_len()
    }

    /// Whether images are embedded into a space that they share with texts (CLIP, SigLIP). Such a model names no classes by
    /// itself; [`zero_shot`](Self::zero_shot) does, if it has its text tower.
    pub fn is_two_tower(&self) -> bool {
        self.loaded.checkpoint.is_two_tower()
    }

    /// The text tower of a two-tower model, which is loaded at the first call. It runs in f32 on [`device`](Self::device).
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the model has none; what is wrong with its tokeniser or its weights.
    pub fn text(&self) -> Result<Arc<TextModel>> {
        self.loaded.text()
    }

    /// The embedding of each text, in the space of a two-tower model's image embeddings: `[D]` each, not normalised.
    ///
    /// # Errors
    /// As [`text`](Self::text); [`Error::Input`] for a text that cannot be tokenised.
    pub fn embed_text(&self, texts: &[impl AsRef<str>]) -> Result<Vec<Vec<f32>>> {
        self.text()?.embed(texts)
    }

    /// A classifier whose classes are words, from a model with a text tower (CLIP, SigLIP). Every label is put in the place of
    /// `{}` in every template, and the embeddings of what results are averaged. Without templates, it is
    /// [`DEFAULT_TEMPLATE`](crate::text::DEFAULT_TEMPLATE).
    ///
    /// ```no_run
    /// # #[cfg(feature = "image")]
    /// # fn main() -> vit_model::Result<()> {
    /// let model = vit_model::Predictor::open("clip-vit-base-patch32")?;
    /// let animals = model.zero_shot(&["cat", "dog"], &["a photo of a {}", "a drawing of a {}"])?;
    /// println!("{}", animals.classify("pet.jpg", 1)?[0].label);
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "image"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    /// As [`embed_text`](Self::embed_text); no label; a template without `{}`.
    pub fn zero_shot(&self, labels: &[impl AsRef<str>], templates: &[impl AsRef<str>]) -> Result<ZeroShot<'_>> {
        ZeroShot::new(&self.loaded, labels, templates)
    }

    /// As [`attention`](Self::attention), for one image as a tensor: `[1, C, H, W]`, or what else [`input`](Self::input) takes.
    ///
    /// # Errors
    /// [`Error::Input`] for another shape or more than one image; a lack of memory.
    pub fn tensor_attention(&self, x: &Tensor) -> Result<AttentionMaps> {
        let x = self.loaded.input(x)?;
        if x.dim(0)? != 1 {
            return Err(Error::Input(format!("attention is of one image, found {}", x.dim(0)?)));
        }
        let maps = AttentionMaps::of(&*self.loaded.modules()?, self.config(), &x)?;
        match maps.iter().find_map(|map| finite::bad(map.values())) {
            Some(found) => {
                let error = Error::Output(format!("the model's attention is {found}"));
                Err(self.loaded.blamed(error, &modules::values(&x)?))
            }
            None => Ok(maps),
        }
    }
}

#[cfg(feature = "image")]
impl Predictor {
    /// How images become the model's input.
    ///
    /// # Errors
    /// A model that no image fits: with two or four channels, for example.
    pub fn preprocess(&self) -> Result<&Preprocess> {
        self.loaded.preprocess()
    }

    /// The `k` most probable classes of an image, the most probable first.
    ///
    /// # Errors
    /// [`Error::Image`] if the image cannot be read; [`Error::Unsupported`] if the model has no head; [`Error::Output`] if
    /// a logit is not finite.
    pub fn classify<'a>(&self, input: impl Into<Input<'a>>, k: usize) -> Result<Vec<Prediction>> {
        self.loaded.check_head()?;
        let output = self.loaded.answer(input.into(), Wanted::Logits)?;
        self.loaded.predictions(output.logits.as_deref().unwrap_or_default(), k)
    }

    /// The embedding of an image, `[D]`, not normalised: what the model's head reads, or of a two-tower model the projection
    /// into the space that images share with texts.
    ///
    /// # Errors
    /// [`Error::Image`] if the image cannot be read; [`Error::Output`] if a value is not finite.
    pub fn embed<'a>(&self, input: impl Into<Input<'a>>) -> Result<Vec<f32>> {
        self.loaded.embed(input.into())
    }

    /// The `k` most probable classes of every input, in order.
    ///
    /// While the model runs a batch, the next one is read, decoded and preprocessed on all threads; memory does not depend
    /// on the number of inputs. An input that cannot be read gives its error in its place, and the rest go on. If the model
    /// itself fails, that error is the last item. Set the batch size with [`ClassifyAll::batch`].
    pub fn classify_all<'a, I>(&self, inputs: I, k: usize) -> ClassifyAll<'_, I::IntoIter>
    where
        I: IntoIterator<Item: Into<Input<'a>>>,
    {
        ClassifyAll::new(&self.loaded, inputs.into_iter(), k)
    }

    /// The embedding of every input, in order; see [`classify_all`](Self::classify_all) for how, [`EmbedAll::batch`] and
    /// [`EmbedAll::normalize`] for options.
    ///
    /// ```
    /// # fn main() -> vit_model::Result<()> {
    /// # let model = vit_model::Predictor::open("../weights/digits/model.safetensors")?;
    /// let paths = ["../weights/digits/samples/8.png", "no such file", "../weights/digits/samples/9.png"];
    /// let answers: Vec<_> = model.embed_all(paths).batch(2).normalize().collect();
    /// assert!(answers[0].is_ok() && answers[1].is_err() && answers[2].is_ok());
    /// # Ok(())
    /// # }
    /// ```
    pub fn embed_all<'a, I>(&self, inputs: I) -> EmbedAll<'_, I::IntoIter>
    where
        I: IntoIterator<Item: Into<Input<'a>>>,
    {
        EmbedAll::new(&self.loaded, inputs.into_iter())
    }

    /// The attention of every block for an image.
    ///
    /// The CPU engine keeps no attention, so candle's modules compute it. A predictor that runs the engine loads them in f32
    /// at the first call.
    ///
    /// # Errors
    /// [`Error::Image`] if the image cannot be read; a lack of memory.
    pub fn attention<'a>(&self, input: impl Into<Input<'a>>) -> Result<AttentionMaps> {
        let (config, pixels) = (self.config(), self.loaded.read(input.into())?);
        let [h, w] = config.img_size;
        let x = Tensor::from_vec(pixels, (1, config.in_chans, h, w), &candle_core::Device::Cpu)?;
        self.tensor_attention(&x)
    }
}

impl Builder {
    /// Opens a model; see [`Predictor::open`].
    ///
    /// # Errors
    /// What is there and why it cannot be used; [`Error::Device`] and [`Error::Unsupported`] if this machine cannot run it
    /// as asked.
    pub fn open(self, model: impl AsRef<OsStr>) -> Result<Predictor> {
        self.checkpoint(&Checkpoint::resolve(model)?)
    }

    /// Opens a repository on the Hub; see [`Predictor::from_pretrained`].
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`Error::Hub`] if it cannot be fetched.
    #[cfg(feature = "hub")]
    pub fn pretrained(self, repository: &str) -> Result<Predictor> {
        self.checkpoint(&Checkpoint::from_pretrained(repository)?)
    }

    /// Loads a checkpoint.
    ///
    /// # Errors
    /// A tensor that cannot be read or is not finite; [`Error::Device`] and [`Error::Unsupported`] if this machine cannot run
    /// it as asked; a lack of memory.
    pub fn checkpoint(self, checkpoint: &Checkpoint) -> Result<Predictor> {
        Ok(Predictor { loaded: Loaded::new(checkpoint, &self)? })
    }
}
