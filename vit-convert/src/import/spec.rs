//! An imported model: its configuration, and its tensors under timm's names, which are read from the file on demand.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::collections::BTreeMap;

use vit_model::weights::{Dtype, TensorInfo, Weights, check_finite};
use vit_model::{Config, PreprocessConfig};

use crate::import::array::{Array, Origin};
use crate::onnx::graph::{DType, Graph};

/// The weights of an imported model: views of the file's constants.
///
/// Nothing is read before [`Weights::read`], which needs the memory of one tensor and may run on many threads.
#[derive(Debug)]
pub struct Imports {
    infos: BTreeMap<String, TensorInfo>,
    arrays: BTreeMap<String, Array>,
}

impl Imports {
    /// Tensors by their names.
    pub fn new(arrays: BTreeMap<String, Array>) -> Self {
        let infos = arrays.iter().map(|(n, a)| (n.clone(), TensorInfo::new(dtype(a), a.shape()))).collect();
        Self { infos, arrays }
    }

    /// A tensor's place in the file.
    pub fn array(&self, name: &str) -> Option<&Array> {
        self.arrays.get(name)
    }
}

fn dtype(a: &Array) -> Dtype {
    match a.stored_dtype() {
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::Bf16,
        DType::F64 => Dtype::F64,
        _ => Dtype::F32,
    }
}

impl Weights for Imports {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.infos
    }

    fn read(&self, name: &str) -> vit_model::Result<Vec<u8>> {
        let (Some(info), Some(array)) = (self.infos.get(name), self.arrays.get(name)) else {
            return Err(vit_model::Error::missing(name));
        };
        let bytes = array.bytes();
        array.check().map_err(|error| vit_model::Error::tensor(name, error.to_string()))?;
        check_finite(name, info.dtype, &bytes)?;
        Ok(bytes)
    }
}

/// Where a tensor comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Provenance {
    /// The file's constants, by name.
    pub from: Vec<String>,
    /// What was done to them: `transposed`, `split`, `joined`, `permuted`, `dequantised`, `computed`, …
    pub by: Vec<&'static str>,
}

/// Where an array's elements come from, by the names of the file.
pub fn provenance(graph: &Graph, array: &Array) -> Provenance {
    let mut out = Provenance::default();
    let mut todo = vec![array];
    while let Some(a) = todo.pop() {
        let mut by = |what: &'static str| {
            if !out.by.contains(&what) {
                out.by.push(what);
            }
        };
        match a.origin() {
            Origin::Stored { value, tensor } => {
                let (offset, dims) = a.place();
                let strides: Vec<usize> = dims.iter().flatten().map(|d| d.stride).collect();
                if strides.is_sorted_by(|a, b| a >= b) {
                    if dims.iter().flatten().any(|d| d.stride == 0) {
                        by("repeated");
                    }
                } else {
                    by(if dims.iter().all(|d| d.len() <= 1) { "transposed" } else { "permuted" });
                }
                let all: usize = tensor.dims.iter().product();
                if offset != 0 || a.distinct().len() < all {
                    by("split");
                }
                let name = graph.name(*value).to_string();
                if !out.from.contains(&name) {
                    out.from.push(name);
                }
            }
            Origin::Computed(_) => by("computed"),
            Origin::Dequantised { codes, scale, .. } => {
                by("dequantised");
                todo.extend([scale, codes]);
            }
            Origin::Blocks(b) => {
                by("dequantised");
                todo.extend([&b.scales, &b.codes]);
            }
            Origin::Product(a, b) => {
                by("scaled");
                todo.extend([b, a]);
            }
            Origin::Sum(a, b) => {
                by("added");
                todo.extend([b, a]);
            }
            Origin::Concat(parts) => {
                by("joined");
                todo.extend(parts.iter().rev());
            }
            Origin::Shifted { weight, bias, .. } => {
                by("computed");
                todo.push(weight);
                todo.extend(bias.iter());
            }
        }
    }
    out
}

/// How an image enters the graph.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct InputSpec {
    /// The graph's name for it.
    pub name: String,
    /// Its dimensions, as the graph lays them out, for a batch of one.
    pub shape: [usize; 4],
    /// The channels are last: `[batch, height, width, channels]`.
    pub channels_last: bool,
    /// The graph takes pixels of 8 bits and applies `preprocess` (`/255`, mean, std) itself; the converted model does
    /// not.
    pub bytes: bool,
    /// The batch that the graph was exported with, if it is fixed.
    pub fixed_batch: Option<usize>,
}

/// Which output of the graph is the model's.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct OutputSpec {
    /// The graph's name for it.
    pub name: String,
    /// What the graph computes from the model's answer, in order: `softmax`, `log_softmax`, `sigmoid`, `argmax`,
    /// `top_k`, `l2_normalize`.
    pub activation: Vec<&'static str>,
}

/// A fact of the configuration and the node that tells it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Evidence {
    /// The fact.
    pub what: String,
    /// The node.
    pub node: String,
    /// Its operator.
    pub op: String,
}

/// A module and the nodes that it was exported as.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Module {
    /// timm's name.
    pub name: String,
    /// The graph's nodes, in order.
    pub nodes: Vec<String>,
}

/// A model, found in an ONNX graph.
#[derive(Debug)]
pub struct Imported {
    /// The architecture.
    pub config: Config,
    /// How a photo becomes the input: what the graph shows, and timm's defaults for the rest.
    pub preprocess: PreprocessConfig,
    /// The mean and std of `preprocess` come from the graph.
    pub preprocess_known: bool,
    /// The image, as the graph takes it.
    pub input: InputSpec,
    /// The answer, as the graph gives it.
    pub output: OutputSpec,
    /// The tensors, under timm's names.
    pub weights: std::sync::Arc<Imports>,
    /// Where each tensor comes from.
    pub provenance: BTreeMap<String, Provenance>,
    /// What was recovered from where.
    pub evidence: Vec<Evidence>,
    /// Which nodes became which module.
    pub modules: Vec<Module>,
    /// What the file does not say and had to be assumed.
    pub assumed: Vec<String>,
    /// Outputs that are not the model's answer, and what they are.
    pub ignored: Vec<String>,
    /// The names of those that are parts of the model, such as its tokens beside its class scores.
    pub parts: Vec<String>,
    /// Why the model only approximates the file; empty if it is exact.
    pub approximate: Vec<String>,
}
