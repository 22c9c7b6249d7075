//! The walk evaluates every node of the graph once, over abstract values. There is one rule per operator and no pattern
//! for any exporter.
//!
//! A value is a constant, a view of a canonical expression, or opaque. If an operator has no rule, or its rule does not
//! apply, its outputs become opaque and the walk continues. A refusal names the first such obstacle on the way to an
//! output.

mod align;
mod arith;
mod attention;
mod call;
mod contract;
mod contrib;
mod fold;
mod index;
mod join;
mod layout;
mod linear;
mod norm;
mod patch;
mod product;
mod quant;
mod resize;
mod select;
mod sequence;
#[cfg(test)]
mod tests;
mod value;
mod walk;

use std::rc::Rc;

use call::Call;
use value::Rule;
pub use value::{Value, View};
use walk::Obstacle;
pub use walk::{Setting, Walk};

use crate::import::array::Array;
use crate::import::axes;
use crate::import::expr::{Exprs, Op};
use crate::onnx::graph::{Attr, Graph, Node, SubGraph};
use crate::{Error, Result};

/// Nodes that are evaluated, including those in bodies of `If`. The reader limits what it inlines separately.
const NODE_LIMIT: usize = 1 << 20;

enum Step<'g> {
    Nodes { nodes: &'g [Node], at: usize },
    Results { from: &'g SubGraph, to: &'g Node },
}

impl<'g> Walk<'g> {
    /// Walks a graph.
    pub fn run(graph: &'g Graph, setting: Setting) -> Result<Self> {
        let mut x = Exprs::new(setting.tolerance);
        let input = graph.inputs.first().ok_or_else(|| Error::graph("the graph has no input"))?;
        let integer = input.dtype.is_some_and(|t| !t.is_float());
        let image = x.make(if integer { Op::Raw } else { Op::Input }, Vec::new(), setting.image.to_vec());
        let mut walk = Self {
            graph,
            x,
            image,
            obstacles: Vec::new(),
            visited: Vec::new(),
            approximate: Vec::new(),
            batch: setting.image[0],
            guessed: setting.guessed,
            values: vec![Value::None; graph.names.len()],
        };
        for (&id, tensor) in &graph.initializers {
            walk.set(id, Array::stored(id, tensor.clone()).into());
        }
        let dims = setting.image.iter().enumerate().map(|(k, &n)| axes::axis(k as u8, n)).collect();
        walk.set(input.id, View { e: image, dims, sel: None }.into());
        walk.go()?;
        Ok(walk)
    }

    fn go(&mut self) -> Result<()> {
        let mut stack = vec![Step::Nodes { nodes: &self.graph.nodes, at: 0 }];
        while let Some(top) = stack.last_mut() {
            match top {
                Step::Nodes { nodes, at } => {
                    let Some(node) = nodes.get(*at) else {
                        stack.pop();
                        continue;
                    };
                    *at += 1;
                    if self.visited.len() >= NODE_LIMIT {
                        return Err(Error::graph(format!("over {NODE_LIMIT} nodes")));
                    }
                    if node.outputs.is_empty() {
                        return Err(node.error("a node without outputs: the file is broken"));
                    }
                    self.visited.push(node);
                    self.x.node = self.visited.len() as u32;
                    if let Some(body) = self.node(node) {
                        stack.push(Step::Results { from: body, to: node });
                        for (&id, tensor) in &body.initializers {
                            self.set(id, Array::stored(id, tensor.clone()).into());
                        }
                        stack.push(Step::Nodes { nodes: &body.nodes, at: 0 });
                    }
                }
                Step::Results { from, to } => {
                    for (inner, outer) in from.outputs.iter().zip(&to.outputs) {
                        if let Some(outer) = outer {
                            let value = self.value(*inner).clone();
                            self.set(*outer, value);
                        }
                    }
                    stack.pop();
                }
            }
        }
        Ok(())
    }

    /// Evaluates a node, or returns the body of it that the walk continues with.
    fn node(&mut self, node: &'g Node) -> Option<&'g SubGraph> {
        let inputs: Vec<Value> = node.inputs.iter().map(|i| i.map_or(Value::None, |i| self.value(i).clone())).collect();
        let blocked = inputs.iter().filter_map(|v| if let Value::Opaque(k) = v { Some(*k) } else { None }).min();
        let call = Call { node, inputs };
        let outcome = match blocked {
            Some(k) => Ok(vec![Value::Opaque(k); node.outputs.len()]),
            None if node.op == "If" && node.domain.is_empty() => match branch(&call) {
                Ok(body) => return Some(body),
                Err(why) => Err(why),
            },
            None => self.rule(&call),
        };
        let values = outcome.unwrap_or_else(|why| {
            let k = self.obstacles.len() as u32;
            self.obstacles.push(Obstacle { node: self.x.node - 1, why });
            vec![Value::Opaque(k); node.outputs.len()]
        });
        for (k, out) in node.outputs.iter().enumerate() {
            let Some(out) = out else { continue };
            let value = match values.get(k) {
                None | Some(Value::None) => {
                    let number = self.obstacles.len() as u32;
                    self.obstacles
                        .push(Obstacle { node: self.x.node - 1, why: format!("its output {} is used", k + 1) });
                    Value::Opaque(number)
                }
                Some(value) => value.clone(),
            };
            self.set(*out, value);
        }
        None
    }

    fn rule(&mut self, call: &Call<'_>) -> Rule {
        let node = call.node;
        match node.domain.as_str() {
            "" | "ai.onnx" => {
                known_attributes(node)?;
                self.onnx(call)
            }
            "com.microsoft" => self.microsoft(call),
            other => Err(format!("operators of the domain `{other}` are not known here; export without them")),
        }
    }

    fn onnx(&mut self, call: &Call<'_>) -> Rule {
        let one = |v: Rule<Value>| v.map(|v| vec![v]);
        match call.node.op.as_str() {
            // sources and what is known of shapes
            "Constant" => one(self.constant(call)),
            "Shape" => one(self.shape_of(call)),
            "Size" => one(self.size_of(call)),
            "ConstantOfShape" => one(self.constant_of_shape(call)),
            "Identity" => one(Ok(call.get(0).clone())),
            "Dropout" => one(self.dropout(call)),
            "Cast" => one(self.cast(call)),
            "CastLike" => one(self.cast_like(call)),
            // arithmetic
            "Add" | "Sub" | "Mul" | "Div" | "Pow" => one(self.binary(&call.node.op, call.get(0), call.get(1))),
            "Sum" => one(self.sum(call)),
            "Sqrt" | "Reciprocal" | "Neg" | "Relu" | "Erf" | "Tanh" | "Sigmoid" | "Exp" | "Log"
                if !all_constant(call) =>
            {
                one(self.unary(call))
            }
            "Gelu" => one(self.gelu(call)),
            "Swish" => one(self.swish(call)),
            "Clip" | "Max" if !all_constant(call) => one(self.bounded(call)),
            "LpNormalization" if !all_constant(call) => one(self.unit_length(call)),
            "IsNaN" if !all_constant(call) => one(self.is_nan(call)),
            "Where" if !all_constant(call) => one(self.where_(call)),
            // layout
            "Reshape" => one(self.reshape(call)),
            "Flatten" => one(self.flatten(call)),
            "Transpose" => one(self.transpose(call)),
            "Squeeze" => one(self.squeeze(call)),
            "Unsqueeze" => one(self.unsqueeze(call)),
            "Expand" => one(self.expand(call)),
            "Tile" => one(self.tile(call)),
            "Split" => self.split(call),
            "Slice" => one(self.slice(call)),
            "Gather" => one(self.gather(call)),
            "Concat" => one(self.concat(&call.inputs, call.int("axis", 0)?)),
            "Pad" => one(self.padding(call)),
            "Resize" | "Upsample" => one(self.resize(call)),
            "SequenceConstruct" => one(self.sequence_construct(call)),
            "SequenceEmpty" => one(Ok(Value::Seq(Rc::default()))),
            "SequenceInsert" => one(self.sequence_insert(call)),
            "SequenceAt" => one(self.sequence_at(call)),
            "SequenceLength" => one(self.sequence_length(call)),
            "ConcatFromSequence" => one(self.concat_from_sequence(call)),
            "SplitToSequence" => one(self.split_to_sequence(call)),
            // linear algebra
            "Conv" => one(self.conv(call)),
            "MatMul" => one(self.matmul(call.get(0), call.get(1))),
            "Gemm" => one(self.gemm(call)),
            "Einsum" => one(self.einsum(call)),
            // reductions, norms, attention
            "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceSumSquare" | "ReduceL2" if !all_constant(call) => {
                one(self.reduction(call))
            }
            "GlobalAveragePool" | "GlobalMaxPool" => one(self.global_pool(call)),
            "LayerNormalization" => self.layer_norm(call),
            "RMSNormalization" | "SimplifiedLayerNormalization" => {
                Err("RMSNorm in place of LayerNorm: not a ViT of the family that is converted".into())
            }
            "Softmax" | "LogSoftmax" => one(self.softmax(call)),
            "ArgMax" => one(self.arg_max(call)),
            "TopK" => self.top_k(call),
            "Attention" => one(self.onnx_attention(call)),
            // quantised
            "QuantizeLinear" => one(self.quantize(call)),
            "DequantizeLinear" => one(self.dequantize(call)),
            "DynamicQuantizeLinear" => self.dynamic_quantize(call),
            "MatMulInteger" => one(self.matmul_integer(call)),
            "ConvInteger" => one(self.conv_integer(call)),
            "QLinearMatMul" => one(self.qlinear_matmul(call)),
            "QLinearConv" => one(self.qlinear_conv(call)),
            _ if all_constant(call) => self.fold(call),
            "RandomUniformLike" | "RandomUniform" | "RandomNormal" | "RandomNormalLike" | "Bernoulli" => {
                Err("the graph draws random numbers: export the model in evaluation mode".into())
            }
            "Loop" | "Scan" => Err("a loop: export the model without data-dependent control flow".into()),
            op => Err(format!("a ViT has no {op} here")),
        }
    }
}

fn all_constant(call: &Call<'_>) -> bool {
    call.inputs.iter().all(|v| matches!(v, Value::Const(_) | Value::None))
}

/// Refuses an attribute that the operator does not have, because the file may mean something else.
fn known_attributes(node: &Node) -> Rule<()> {
    let known: &[&str] = match node.op.as_str() {
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Sqrt" | "Reciprocal" | "Neg" | "Relu" | "Erf" | "Tanh" | "Sigmoid"
        | "Exp" | "Log" | "MatMul" | "Where" | "Expand" | "Identity" | "IsNaN" => &[],
        "Gelu" => &["approximate"],
        "Softmax" | "LogSoftmax" | "Gather" => &["axis"],
        "LayerNormalization" => &["axis", "epsilon", "stash_type"],
        "Transpose" => &["perm"],
        "Gemm" => &["alpha", "beta", "transA", "transB"],
        _ => return Ok(()),
    };
    match node.attrs.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(format!("{} has no attribute `{name}`: the file is broken", node.op)),
        None => Ok(()),
    }
}

/// The branch of an `If` that is taken.
fn branch<'g>(call: &Call<'g>) -> Rule<&'g SubGraph> {
    let cond = call.get(0).array("the condition of If")?.one().ok_or("the condition of If is not one value")?;
    let name = if cond == 0.0 { "else_branch" } else { "then_branch" };
    match call.node.attrs.get(name) {
        Some(Attr::Graph(body)) => Ok(body),
        _ => Err(format!("If has no `{name}`")),
    }
}
