//! Converts an ONNX file to a verified model that can be saved.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use vit_model::{
    Checkpoint, Format, ModelInfo, Origin, PreprocessConfig, ProblemType, SaveOptions, Verification, Weights,
};

use crate::{
    Error, Imported, Result,
    import::{self, Wanted},
    neighbours::{self, Neighbours},
    onnx::{self, stored::StoredFile},
    quantise, verify,
};

/// What the user adds to the information in the file.
///
/// ```
/// let options = vit_convert::Options::new().img_size([224, 224]).verify(vit_convert::Verify::Skip);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Options {
    labels: Option<Vec<String>>,
    preprocess: Option<PreprocessConfig>,
    img_size: Option<Wanted>,
    output: Option<String>,
    verify: Verify,
}

/// How to verify a conversion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verify {
    /// Run the graph and the model on the same inputs and compare their outputs.
    #[default]
    Run,
    /// Like `Run`, but also compare with candle-onnx's evaluator if it can run the graph.
    #[cfg(feature = "candle-onnx")]
    RunWithCandle,
    /// Run nothing. The written file records that.
    Skip,
}

impl Options {
    /// No labels, the preprocessing that the file specifies (timm's defaults for what it does not), and verification.
    pub fn new() -> Self {
        Self::default()
    }

    /// Class names, one per class.
    #[must_use]
    pub fn labels(mut self, labels: Vec<String>) -> Self {
        self.labels = Some(labels);
        self
    }

    /// How to preprocess images. The model's image size replaces `preprocess.input_size`.
    #[must_use]
    pub fn preprocess(mut self, preprocess: PreprocessConfig) -> Self {
        self.preprocess = Some(preprocess);
        self
    }

    /// The image size in pixels, `[height, width]`, if the file leaves it open.
    #[must_use]
    pub fn img_size(mut self, img_size: [usize; 2]) -> Self {
        self.img_size = Some(Wanted { size: img_size, required: true });
        self
    }

    /// As [`img_size`](Self::img_size), but a file with a size of its own keeps it; [`Checkpoint::resized`] changes that.
    #[must_use]
    pub fn img_size_if_open(mut self, img_size: [usize; 2]) -> Self {
        self.img_size = Some(Wanted { size: img_size, required: false });
        self
    }

    /// Which output of the graph to convert, by its name. By default it is class scores or a projected embedding if there are
    /// any, then a pooled vector, then tokens. It may also be a value inside of the graph, below a head that no Vision
    /// Transformer has.
    #[must_use]
    pub fn output(mut self, output: impl Into<String>) -> Self {
        self.output = Some(output.into());
        self
    }

    /// How to verify the conversion.
    #[must_use]
    pub fn verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }
}

/// A converted model. It reads weights from the ONNX file when it needs them, so that file must not change before the model
/// is saved.
#[derive(Debug)]
pub struct Converted {
    path: PathBuf,
    checkpoint: Checkpoint,
    imported: Imported,
    verified: Option<verify::Verified>,
}

impl Converted {
    /// The model: its document, and its tensors with timm's names.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The document that [`save`](Self::save) writes into the file.
    pub fn info(&self) -> &ModelInfo {
        self.checkpoint.info()
    }

    /// What was recovered from which part of the graph.
    pub fn imported(&self) -> &Imported {
        &self.imported
    }

    /// The result of the verification. `None` after [`Verify::Skip`].
    pub fn verified(&self) -> Option<&verify::Verified> {
        self.verified.as_ref()
    }

    /// Quantises the matrices to Q8_0. If the model was verified, returns how much that changes its outputs and records it in
    /// the document. [`verified`](Self::verified) still describes the tensors before quantisation.
    ///
    /// # Errors
    /// If a matrix cannot be stored in Q8_0, or the model cannot be run.
    pub fn quantise(&mut self) -> Result<Option<quantise::Moved>> {
        let (checkpoint, moved) = quantise::quantise(&self.checkpoint, self.verified.is_some())?;
        self.checkpoint = checkpoint;
        Ok(moved)
    }

    /// Writes the model. Returns notes on what the library that reads this format computes differently.
    ///
    /// # Errors
    /// As [`Checkpoint::save_with`], and if `path` is the ONNX file itself.
    pub fn save(&self, path: impl AsRef<Path>, format: Format) -> Result<Vec<String>> {
        self.save_with(path, format, SaveOptions::new())
    }

    /// Like [`save`](Self::save), with options.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_with(&self, path: impl AsRef<Path>, format: Format, options: SaveOptions<'_>) -> Result<Vec<String>> {
        Ok(self.checkpoint.save_with(path, format, &options.inputs([&self.path]))?)
    }
}

/// Reads an ONNX file, recognises the model in it and verifies the result. [`Converted::save`] then writes it. Saving reads
/// the tensors a second time, so that nothing is written before the verification succeeds; by then they are usually in the
/// page cache. A ViT-B/16 converts in 1.01 times the time of a program that wrote while it verified (median of four).
///
/// # Errors
/// If the file cannot be read, if the graph is not a ViT of the supported family (the error names the node that does not fit),
/// if labels or preprocessing do not fit the model, or if the verification fails.
pub fn convert(path: impl AsRef<Path>, options: &Options) -> Result<Converted> {
    let path = path.as_ref();
    let Read { graph, file, imported, mut checkpoint } = read(path, options)?;
    // if the file has changed, report that, because it explains any other error
    let at = |error: Error| graph.check().err().unwrap_or(error).at(path);
    #[cfg(feature = "candle-onnx")]
    if options.verify == Verify::RunWithCandle {
        let said = second_opinion(&graph, &file, &imported, &checkpoint).map_err(at)?;
        let source = std::mem::take(&mut checkpoint.info.source);
        checkpoint.info.source = source.with_candle_onnx(said.as_ref().map(|far| *far).map_err(String::as_str));
    }
    let (sha256, verified) = std::thread::scope(|scope| -> Result<_> {
        // one thread is enough for the digest, so it runs while the others verify
        let digest = std::thread::Builder::new().spawn_scoped(scope, || file.sha256());
        let prove = || verify::verify(&graph, &checkpoint, &reading(&imported)).map_err(Error::from).map_err(at);
        let verified = (options.verify != Verify::Skip).then(prove).transpose()?;
        let digest = digest.ok().and_then(|digest| digest.join().ok());
        Ok((digest.unwrap_or_else(|| file.sha256())?, verified))
    })?;
    graph.check()?;
    checkpoint.info.source = std::mem::take(&mut checkpoint.info.source).with_sha256(&sha256);
    checkpoint.info.verified = Some(verified.as_ref().map_or_else(Verification::skipped, verify::Verified::record));
    Ok(Converted { path: path.into(), checkpoint, imported, verified })
}

/// Opens an ONNX file as a checkpoint without running it. The document has everything that a conversion records except the
/// verification and the digest. The checkpoint reads weights from the file when it needs them.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use vit_model::Predictor;
///
/// let checkpoint = vit_convert::open("flowers.onnx")?;
/// # let _ = checkpoint;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`convert`], except for those of the verification.
pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
    open_with(path, &Options::default())
}

/// As [`open`], with options: the size of a graph that leaves it open, the output that is the answer, labels and preprocessing.
///
/// # Errors
/// As [`open`].
pub fn open_with(path: impl AsRef<Path>, options: &Options) -> Result<Checkpoint> {
    read(path.as_ref(), options).map(|read| read.checkpoint)
}

/// Like [`open`], but also returns what was recovered from which part of the graph.
///
/// # Errors
/// As [`open`].
pub fn inspect(path: impl AsRef<Path>) -> Result<(Checkpoint, Imported)> {
    read(path.as_ref(), &Options::default()).map(|read| (read.checkpoint, read.imported))
}

/// A file that was read, and the model that was recognised in it.
struct Read {
    graph: onnx::graph::Graph,
    file: Arc<StoredFile>,
    imported: Imported,
    checkpoint: Checkpoint,
}

fn read(path: &Path, options: &Options) -> Result<Read> {
    let onnx::Model { mut graph, file } = onnx::open(path)?;
    if let Some(output) = &options.output {
        graph.cut(output);
    }
    // if the file has changed, report that, because it explains any other error
    let at = |error: Error| graph.check().err().unwrap_or(error).at(path);
    let imported = import::import(&graph, options.img_size, options.output.as_deref()).map_err(at)?;
    let beside = neighbours::of(path, &imported.config).map_err(at)?;
    let info = document(&graph, &imported, options, beside).map_err(at)?;
    let weights: Arc<dyn Weights> = imported.weights.clone();
    let checkpoint = Checkpoint::new(info, weights).map_err(Error::from).map_err(at)?;
    graph.check()?;
    Ok(Read { graph, file, imported, checkpoint })
}

/// Compares the model with candle-onnx's evaluator on the same graph.
#[cfg(feature = "candle-onnx")]
fn second_opinion(
    graph: &onnx::graph::Graph,
    file: &StoredFile,
    imported: &Imported,
    checkpoint: &Checkpoint,
) -> Result<std::result::Result<f64, String>> {
    let len = usize::try_from(file.len()).map_err(|_| Error::graph("is larger than this machine's memory"))?;
    let bytes = file.read(0, len);
    file.check()?;
    Ok(verify::candle::opinion(graph, &bytes.into(), checkpoint, &reading(imported))?)
}

/// The document, from what was recovered, what the user adds, and what the files beside the graph say.
fn document(
    graph: &onnx::graph::Graph,
    imported: &Imported,
    options: &Options,
    beside: Neighbours,
) -> Result<ModelInfo> {
    let model = imported.config.clone();
    let stated = options.preprocess.clone().or(beside.preprocess);
    let assumed = stated.is_none();
    let mut preprocess = stated.unwrap_or_else(|| imported.preprocess.clone());
    let [h, w] = model.img_size;
    preprocess.input_size = [model.in_chans, h, w];
    if imported.preprocess_known {
        preprocess.mean.clone_from(&imported.preprocess.mean);
        preprocess.std.clone_from(&imported.preprocess.std);
    }
    let source = Origin::new()
        .with_producer(&graph.producer)
        .with_opset(graph.opset)
        .with_output(&imported.output.activation)
        .with_approximate(&imported.approximate)
        .with_assumed(&imported.assumed);
    let labels = options.labels.clone().or(beside.labels);
    let mut info = ModelInfo::new(model, preprocess).with_labels(labels).from_source(source);
    if imported.output.activation.contains(&"sigmoid") {
        info = info.with_problem_type(ProblemType::MultiLabel);
    }
    for used in beside.used {
        info = info.assuming(used);
    }
    if assumed {
        info = info
            .assuming_preprocess("the ONNX file does not say; for DeiT, DINOv2 or torchvision: --preprocess imagenet");
    }
    info.validate()?;
    Ok(info)
}

/// How the graph expects its input.
fn reading(imported: &Imported) -> verify::Reading {
    let mut reading = verify::Reading {
        output: imported.output.name.clone(),
        parts: imported.parts.clone(),
        unit: imported.output.activation.contains(&"l2_normalize"),
        nhwc: imported.input.channels_last,
        ..verify::Reading::default()
    };
    // if the graph reads floats, its normalisation is folded into the weights; if it reads bytes, the preprocessing does it
    if imported.input.bytes {
        let PreprocessConfig { mean, std, .. } = &imported.preprocess;
        reading.scale = std.iter().map(|std| 1.0 / (255.0 * std)).collect();
        reading.shift = mean.iter().zip(std).map(|(mean, std)| -mean / std).collect();
    }
    reading
}
