//! An ONNX graph as plain data: values are numbered, functions are inlined, nodes are in topological order.
//!
//! A `Constant` node keeps its place among the nodes and has exactly one attribute, `value`, an [`Attr::Tensor`],
//! whichever of `value`, `value_float`, `value_floats`, `value_int`, `value_ints` the file has (only `value_string` and
//! `value_strings` stay, as [`Attr::Str`] and [`Attr::Strings`]).

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;

use crate::{
    Error, Result,
    onnx::stored::{Data, StoredFile},
};

/// Index of a value (a node's input or output, an initializer, a graph input) into [`Graph::names`].
pub type ValueId = u32;

/// A graph after reading: everything that a rule or an evaluator may look at.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Producer name and version, as the file says.
    pub producer: String,
    /// Version of the default operator set (`ai.onnx`).
    pub opset: i64,
    /// Versions of the other operator sets, by domain.
    pub opsets: BTreeMap<String, i64>,
    /// Name of every value; unique within the graph, subgraphs included.
    pub names: Vec<String>,
    /// Constants: initializers (`Constant` nodes stay nodes).
    pub initializers: BTreeMap<ValueId, Tensor>,
    /// Graph inputs that have no initializer, in order.
    pub inputs: Vec<ValueInfo>,
    /// Graph outputs, in order.
    pub outputs: Vec<ValueInfo>,
    /// Nodes, each after those that make its inputs (what the bodies of a node's attributes read included).
    pub nodes: Vec<Node>,
    /// `metadata_props` of the file.
    pub metadata: BTreeMap<String, String>,
    /// The operation that the PyTorch exporter notes at a node, such as `torch.ops.aten.gelu.default`, by the node's
    /// first output.
    pub records: BTreeMap<ValueId, String>,
    /// The files that constants are in.
    pub files: Vec<Arc<StoredFile>>,
}

impl Graph {
    /// Checks that no file has changed since it was opened.
    ///
    /// # Errors
    /// The first file that has changed.
    pub fn check(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.check())
    }

    /// Makes a value inside of the graph an output, unless an output has this name or no node makes such a value.
    pub fn cut(&mut self, name: &str) {
        if self.outputs.iter().any(|output| self.name(output.id) == name) {
            return;
        }
        let made = self.nodes.iter().flat_map(|node| node.outputs.iter().flatten().copied());
        if let Some(id) = { made }.find(|&id| self.name(id) == name) {
            self.outputs.push(ValueInfo { id, dtype: None, shape: None });
        }
    }

    /// The name of a value.
    pub fn name(&self, id: ValueId) -> &str {
        usize::try_from(id).ok().and_then(|at| self.names.get(at)).map_or("?", String::as_str)
    }
}

/// A declared input or output.
#[derive(Clone, Debug)]
pub struct ValueInfo {
    /// The value.
    pub id: ValueId,
    /// Element type, if declared.
    pub dtype: Option<DType>,
    /// Dimensions, if declared: a number, or `None` for a symbol.
    pub shape: Option<Vec<Option<u64>>>,
}

/// One operator.
#[derive(Clone, Debug)]
pub struct Node {
    /// The file's name for it, or `op#index` if it has none.
    pub name: String,
    /// Operator, e.g. `MatMul`.
    pub op: String,
    /// Operator domain; `""` for `ai.onnx`.
    pub domain: String,
    /// Inputs; `None` if an optional input is absent.
    pub inputs: Vec<Option<ValueId>>,
    /// Outputs; `None` if not requested.
    pub outputs: Vec<Option<ValueId>>,
    /// Attributes by name.
    pub attrs: BTreeMap<String, Attr>,
}

impl Node {
    /// The operator, with its domain unless that is ONNX's own: `MatMul`, `com.microsoft.Attention`.
    pub fn operator(&self) -> String {
        if self.domain.is_empty() { self.op.clone() } else { format!("{}.{}", self.domain, self.op) }
    }

    /// An error that names this node.
    pub fn error(&self, why: impl Into<String>) -> Error {
        Error::Node { node: self.name.clone(), op: self.operator(), why: why.into() }
    }
}

/// The value of an attribute.
#[derive(Clone, Debug)]
pub enum Attr {
    /// FLOAT
    Float(f32),
    /// INT
    Int(i64),
    /// STRING (bytes; mostly ASCII)
    Str(Bytes),
    /// TENSOR
    Tensor(Tensor),
    /// GRAPH: a body of If, Loop or Scan; its values are ids of the same table, outer values included.
    Graph(Box<SubGraph>),
    /// FLOATS
    Floats(Vec<f32>),
    /// INTS
    Ints(Vec<i64>),
    /// STRINGS
    Strings,
    /// A kind that no operator here reads (sparse tensors, types, …).
    Other,
}

/// A body of If, Loop or Scan.
#[derive(Clone, Debug, Default)]
pub struct SubGraph {
    /// Formal inputs.
    pub inputs: Vec<ValueId>,
    /// Results.
    pub outputs: Vec<ValueId>,
    /// Constants of the body.
    pub initializers: BTreeMap<ValueId, Tensor>,
    /// Nodes in topological order.
    pub nodes: Vec<Node>,
}

/// A constant: type, shape and little-endian, row-major elements (a range of the file if they are large).
///
/// `data.len()` always equals the product of `dims` times the element size (4-bit types: two elements a byte, rounded
/// up).
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Element type.
    pub dtype: DType,
    /// Shape; empty for a scalar.
    pub dims: Vec<usize>,
    /// Elements.
    pub data: Data,
}

/// ONNX element types that a graph of ours may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum DType {
    F32,
    U8,
    I8,
    U16,
    I16,
    I32,
    I64,
    Bool,
    F16,
    F64,
    U32,
    U64,
    Bf16,
    U4,
    I4,
}

impl DType {
    /// Bits of an element.
    pub fn bits(self) -> usize {
        match self {
            Self::U4 | Self::I4 => 4,
            Self::U8 | Self::I8 | Self::Bool => 8,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 16,
            Self::F32 | Self::I32 | Self::U32 => 32,
            Self::F64 | Self::I64 | Self::U64 => 64,
        }
    }

    /// Bytes of `count` elements; 4-bit types have two in a byte, rounded up. `None` if that overflows.
    pub fn bytes(self, count: usize) -> Option<usize> {
        match self {
            Self::U4 | Self::I4 => Some(count.div_ceil(2)),
            other => count.checked_mul(other.bits().div_ceil(8)),
        }
    }

    /// ONNX's number for it → the type.
    pub fn from_onnx(number: i32) -> Option<Self> {
        Some(match number {
            1 => Self::F32,
            2 => Self::U8,
            3 => Self::I8,
            4 => Self::U16,
            5 => Self::I16,
            6 => Self::I32,
            7 => Self::I64,
            9 => Self::Bool,
            10 => Self::F16,
            11 => Self::F64,
            12 => Self::U32,
            13 => Self::U64,
            16 => Self::Bf16,
            21 => Self::U4,
            22 => Self::I4,
            _ => return None,
        })
    }

    /// It is a floating-point type.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::F64 | Self::Bf16)
    }
}
