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
pub mod recognise;
pub mod relabel;
pub mod save;
pub mod spec;
pub mod stored;
pub mod timm_config;
pub mod to_hf;
pub mod verify;
pub mod write;

use std::{path::Path, sync::Arc};

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
    /// The document that goes into the written file.
    /// Its `source.sha256` comes last, see [`Converted::document`].
    pub info: ModelInfo,
    /// The tensors, under timm's names.
    pub weights: Arc<dyn Weights>,
    /// What was found where.
    pub imported: Imported,
    /// The proof, unless it was not wanted.
    pub verified: Option<verify::Verified>,
    /// The ONNX file, while its digest is still missing in `info`.
    unhashed: Option<Arc<StoredFile>>,
}

impl Converted {
    /// The document, complete: with the ONNX file's SHA-256 in `source`.
    ///
    /// # Errors
    /// The file has changed since it was opened.
    pub fn document(&mut self) -> Result<&ModelInfo> {
        if let Some(file) = self.unhashed.take() {
            self.info.source.insert("sha256".into(), file.sha256()?.into());
        }
        Ok(&self.info)
    }

    /// The ONNX file, where its SHA-256 is still missing in `info`: [`write::file`] computes it while it writes.
    pub fn unhashed(&self) -> Option<&StoredFile> {
        self.unhashed.as_deref()
    }
}

/// Reads, recognises and proves a model; [`write::file`] then writes it.
///
/// # Errors
/// A file that cannot be read, a graph that is no ViT of this family (with the node that does not fit), labels or a
/// preprocessing that do not fit the model, and a proof that fails.
pub fn convert(path: &Path, options: &Options) -> Result<Converted> {
    let onnx::Model { graph, file } = onnx::open(path)?;
    // a file that has changed is the reason of whatever else seems wrong
    let at = |error: Error| graph.check().err().unwrap_or(error).at(path);
    let imported = import::sized(&graph, options.img_size).map_err(at)?;
    let mut info = document(&graph, &imported, options).map_err(at)?;
    let verified = options.verify.then(|| prove(&graph, &imported, &info)).transpose().map_err(at)?;
    info.verified = Some(verified.as_ref().map_or_else(|| json!(false), verify::Verified::to_json));
    let weights = imported.weights.clone();
    #[cfg_attr(not(feature = "candle-onnx"), allow(unused_mut))]
    let mut converted = Converted { info, weights, imported, verified, unhashed: Some(file.clone()) };
    #[cfg(feature = "candle-onnx")]
    if options.candle {
        let said = second_opinion(&graph, &file, &converted.imported, &converted.info).map_err(at)?;
        converted.info.source.insert("candle_onnx".into(), said);
    }
    graph.check()?;
    Ok(converted)
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

/// Runs both and compares.
fn prove(graph: &graph::Graph, imported: &Imported, info: &ModelInfo) -> Result<verify::Verified> {
    let checkpoint = Checkpoint::new(info.clone(), imported.weights.clone())?;
    verify::verify(graph, &checkpoint, &reading(imported)).map_err(Error::from)
}

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
