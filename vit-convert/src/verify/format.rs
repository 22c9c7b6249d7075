//! The number format of a file, and the difference that rounding to it can make.

use crate::onnx::graph::{Attr, DType, Graph, Node, SubGraph, Tensor};

/// Largest difference due to f32 rounding, relative to an output's largest magnitude. Summing in another order changes
/// an output by about 1e-6, for twelve blocks of a ViT-B as for two of a tiny model. Another activation changes it by
/// 1e-4, wrong wiring by 1e-2.
const F32: f64 = 2e-5;

/// Like [`F32`], for files in f16, whose constants (the attention scale, √2, ε) are rounded to 11 bits.
const F16: f64 = 2e-3;

/// Like [`F16`], with the 8 bits of bfloat16.
const BF16: f64 = 2e-2;

/// The coarsest number format that a file stores.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    F32,
    Integer,
    F16,
    Bf16,
}

impl Format {
    /// The format of a graph.
    pub fn of(graph: &Graph) -> Self {
        let kind = |t: &Tensor| match t.dtype {
            DType::Bf16 => Self::Bf16,
            DType::F16 => Self::F16,
            _ => Self::F32,
        };
        let of_node = |node: &Node| {
            let quantised = ["Quant", "QLinear", "QGemm", "QAttention", "MatMulInteger", "ConvInteger", "MatMulNBits"];
            let quantised = node.op.starts_with("Dequantize") || quantised.iter().any(|q| node.op.contains(q));
            let own = if quantised { Self::Integer } else { Self::F32 };
            let attrs = node.attrs.values().map(|a| match a {
                Attr::Tensor(t) => kind(t),
                // Cast's `to`
                Attr::Int(10) if node.op == "Cast" => Self::F16,
                Attr::Int(16) if node.op == "Cast" => Self::Bf16,
                _ => Self::F32,
            });
            attrs.max().unwrap_or(own).max(own)
        };
        let mut coarsest = graph.initializers.values().map(kind).max().unwrap_or(Self::F32);
        let mut bodies: Vec<&[Node]> = vec![&graph.nodes];
        while let Some(nodes) = bodies.pop() {
            for node in nodes {
                coarsest = coarsest.max(of_node(node));
                let inner = node.attrs.values().filter_map(|a| if let Attr::Graph(g) = a { Some(&**g) } else { None });
                bodies.extend(inner.map(|g: &SubGraph| g.nodes.as_slice()));
            }
        }
        coarsest
    }

    /// Largest difference due to rounding, relative to an output's largest magnitude.
    pub fn tolerance(self) -> f64 {
        match self {
            Self::F32 | Self::Integer => F32,
            Self::F16 => F16,
            Self::Bf16 => BF16,
        }
    }
}
