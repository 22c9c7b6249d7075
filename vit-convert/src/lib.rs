//! Converts a Vision Transformer from any ONNX exporter to safetensors under timm's names.
//!
//! The graph is executed once over abstract values, so that every spelling of a module becomes the same expression; what
//! is recognised in the output's expression becomes a [`Config`](vit_model::Config) and named tensors, and the result is
//! proven by running the graph and the model on the same inputs.
//!
//! ```no_run
//! # fn main() -> vit_convert::Result<()> {
//! let model = vit_convert::convert("flowers.onnx".as_ref(), &vit_convert::Options::default())?;
//! println!("{} blocks", model.info.model.depth);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod array;
pub mod axes;
mod claims;
mod error;
pub mod eval;
pub mod explain;
pub mod expr;
pub mod graph;
pub mod import;
pub mod onnx;
pub mod preset;
pub mod quantise;
pub mod recognise;
pub mod relabel;
pub mod save;
pub mod spec;
pub mod stored;
pub mod timm_config;
pub mod to_hf;
pub mod verify;
pub mod write;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use serde_json::{Value, json};
use vit_model::{ModelInfo, PreprocessConfig, Weights, load::Checkpoint};

pub use error::{Error, Result};
pub use import::import;
pub use spec::Imported;
use stored::StoredFile;

/// What the user adds to what the file says.
#[derive(Clone, Debug)]
pub struct Options {
    /// Class names, one per class.
    pub labels: Option<Vec<String>>,
    /// How a photograph becomes the input; the image size is the model's.
    pub preprocess: Option<PreprocessConfig>,
    /// The image size, `[height, width]`, where the file leaves it open.
    pub img_size: Option<[usize; 2]>,
    /// Run the graph and the model on the same inputs and compare.
    pub verify: bool,
    /// Ask candle-onnx too.
    #[cfg(feature = "candle-onnx")]
    pub candle: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            labels: None,
            preprocess: None,
            img_size: None,
            verify: true,
            #[cfg(feature = "candle-onnx")]
            candle: false,
        }
    }
}

/// A converted model, in memory: its weights are read from the ONNX file when they are asked for.
pub struct Converted {
    /// The document that goes into the written file, but for what is [`pending`](Self::pending).
    pub info: ModelInfo,
    /// The tensors, under timm's names.
    pub weights: Arc<dyn Weights>,
    /// What was found where.
    pub imported: Imported,
    /// The proof, unless it was not wanted or is still pending.
    pub verified: Option<verify::Verified>,
    pending: Option<Pending>,
}

impl Converted {
    /// The document, complete.
    ///
    /// # Errors
    /// The proof fails, where it was still to be had; or the file has changed since it was opened.
    pub fn document(&mut self) -> Result<&ModelInfo> {
        if let Some(pending) = &self.pending {
            let found = pending.find(None)?;
            found.complete(&mut self.info);
            self.verified = found.verified.clone().or(self.verified.take());
            self.pending = None;
        }
        Ok(&self.info)
    }

    /// Quantises the matrices to Q8_0, and says by how much that moves the answers, unless the conversion is not to be
    /// proven at all. What was pending is found out: the proof is of the tensors before.
    ///
    /// # Errors
    /// As [`document`](Self::document); a matrix that does not fit into Q8_0; a model that cannot be run.
    pub fn quantise(&mut self) -> Result<Option<quantise::Moved>> {
        self.document()?;
        let own = self.weights.clone();
        self.weights = Arc::new(quantise::Quantised::new(own.clone()));
        if self.verified.is_none() {
            return Ok(None);
        }
        let moved = quantise::moved(&self.info, own, self.weights.clone())?;
        if let Some(Value::Object(proof)) = &mut self.info.verified {
            proof.insert("q8_0".into(), moved.to_json());
        }
        Ok(Some(moved))
    }

    /// What `info` lacks as yet: [`write::file`] finds it out while it writes.
    pub fn pending(&self) -> Option<&Pending> {
        self.pending.as_ref()
    }
}

/// What a document lacks until somebody asks for it: the SHA-256 of the ONNX file, and the proof where it was put off.
pub struct Pending {
    file: Arc<StoredFile>,
    proof: Option<Proof>,
    found: OnceLock<Found>,
}

struct Proof {
    path: PathBuf,
    graph: graph::Graph,
    checkpoint: Checkpoint,
    reading: verify::Reading,
}

/// What was [`Pending`].
pub struct Found {
    sha256: String,
    verified: Option<verify::Verified>,
}

impl Pending {
    /// Finds it out, once. `weights` may stand in for the tensors that are proven, and see them being read.
    pub(crate) fn find(&self, weights: Option<Arc<dyn Weights>>) -> Result<&Found> {
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        let found = match &self.proof {
            None => Found { sha256: self.file.sha256()?, verified: None },
            Some(proof) => std::thread::scope(|scope| -> Result<Found> {
                // one thread is enough for a digest, and the proof leaves it room
                let hash = scope.spawn(|| self.file.sha256());
                let verified = proof.run(weights)?;
                let sha256 = hash.join().unwrap_or_else(|_| self.file.sha256())?;
                Ok(Found { sha256, verified: Some(verified) })
            })?,
        };
        Ok(self.found.get_or_init(|| found))
    }

    /// The tensors that are to be proven.
    pub(crate) fn proves(&self) -> Option<&Arc<dyn Weights>> {
        self.proof.as_ref().map(|proof| &proof.checkpoint.weights)
    }
}

impl Proof {
    fn run(&self, weights: Option<Arc<dyn Weights>>) -> Result<verify::Verified> {
        let Self { path, graph, checkpoint, reading } = self;
        // a file that has changed is the reason of whatever else seems wrong
        let at = |error: Error| graph.check().err().unwrap_or(error).at(path);
        let checkpoint = match weights {
            Some(weights) => &Checkpoint { weights, ..checkpoint.clone() },
            None => checkpoint,
        };
        let verified = verify::verify(graph, checkpoint, reading).map_err(Error::from).map_err(at)?;
        graph.check()?;
        Ok(verified)
    }
}

impl Found {
    /// Completes a document.
    pub(crate) fn complete(&self, info: &mut ModelInfo) {
        info.source.insert("sha256".into(), self.sha256.as_str().into());
        if let Some(verified) = &self.verified {
            info.verified = Some(verified.to_json());
        }
    }
}

/// Reads, recognises and proves a model; [`write::file`] then writes it.
///
/// # Errors
/// A file that cannot be read, a graph that is no ViT of this family (with the node that does not fit), labels or a
/// preprocessing that do not fit the model, and a proof that fails.
pub fn convert(path: &Path, options: &Options) -> Result<Converted> {
    let mut converted = begin(path, options)?;
    if let Some(proof) = converted.pending.as_mut().and_then(|pending| pending.proof.take()) {
        let verified = proof.run(None)?;
        converted.info.verified = Some(verified.to_json());
        converted.verified = Some(verified);
    }
    Ok(converted)
}

/// As [`convert`], but the proof is left for later: [`write::file`] runs it beside the writing, which takes little more
/// time than the longer of the two, and [`Converted::document`] where nothing is written.
///
/// # Errors
/// As [`convert`], but those of the proof.
pub fn begin(path: &Path, options: &Options) -> Result<Converted> {
    let onnx::Model { graph, file } = onnx::open(path)?;
    // a file that has changed is the reason of whatever else seems wrong
    let at = |error: Error| graph.check().err().unwrap_or(error).at(path);
    let imported = import::sized(&graph, options.img_size).map_err(at)?;
    let mut info = document(&graph, &imported, options).map_err(at)?;
    if !options.verify {
        info.verified = Some(json!(false));
    }
    #[cfg(feature = "candle-onnx")]
    if options.candle {
        let said = second_opinion(&graph, &file, &imported, &info).map_err(at)?;
        info.source.insert("candle_onnx".into(), said);
    }
    graph.check()?;
    let weights: Arc<dyn Weights> = imported.weights.clone();
    let proof = if options.verify {
        let checkpoint = Checkpoint::new(info.clone(), weights.clone()).map_err(Error::from).map_err(at)?;
        Some(Proof { path: path.into(), graph, checkpoint, reading: reading(&imported) })
    } else {
        None
    };
    let pending = Some(Pending { file, proof, found: OnceLock::new() });
    Ok(Converted { info, weights, imported, verified: None, pending })
}

/// What candle-onnx's evaluator answers on the same graph.
#[cfg(feature = "candle-onnx")]
fn second_opinion(graph: &graph::Graph, file: &StoredFile, imported: &Imported, info: &ModelInfo) -> Result<Value> {
    let len = usize::try_from(file.len()).map_err(|_| Error::graph("is larger than this machine's memory"))?;
    let bytes = file.read(0, len);
    file.check()?;
    let checkpoint = Checkpoint::new(info.clone(), imported.weights.clone())?;
    Ok(match verify::second::opinion(graph, &bytes.into(), &checkpoint, &reading(imported))? {
        Ok(far) => json!({ "max_rel": format!("{far:.1e}").parse::<f64>().unwrap_or(far) }),
        Err(why) => json!({ "not_run": why }),
    })
}

/// The document: what was recovered, and what the user adds.
fn document(graph: &graph::Graph, imported: &Imported, options: &Options) -> Result<ModelInfo> {
    let model = imported.config.clone();
    let mut preprocess = options.preprocess.clone().unwrap_or_else(|| imported.preprocess.clone());
    let [h, w] = model.img_size;
    preprocess.input_size = [model.in_chans, h, w];
    if imported.preprocess_known {
        preprocess.mean.clone_from(&imported.preprocess.mean);
        preprocess.std.clone_from(&imported.preprocess.std);
    }
    let mut source: std::collections::BTreeMap<String, Value> =
        [("producer".into(), json!(graph.producer)), ("opset".into(), json!(graph.opset))].into();
    if !imported.output.activation.is_empty() {
        source.insert("output".into(), json!(imported.output.activation));
    }
    if !imported.approximate.is_empty() {
        source.insert("approximate".into(), json!(imported.approximate));
    }
    if !imported.assumed.is_empty() {
        source.insert("assumed".into(), json!(imported.assumed));
    }
    let info = ModelInfo { vit: 1, model, preprocess, labels: options.labels.clone(), source, verified: None };
    info.validate()?;
    Ok(info)
}

/// How the graph reads an image.
fn reading(imported: &Imported) -> verify::Reading {
    let mut reading = verify::Reading { nhwc: imported.input.channels_last, ..verify::Reading::default() };
    // over floats the graph's normalisation has been taken into the weights; over bytes the model's preprocessing does it
    if imported.input.bytes {
        let PreprocessConfig { mean, std, .. } = &imported.preprocess;
        reading.scale = std.iter().map(|std| 1.0 / (255.0 * std)).collect();
        reading.shift = mean.iter().zip(std).map(|(mean, std)| -mean / std).collect();
    }
    reading
}
