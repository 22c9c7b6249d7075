//! The walk: every node of the graph, once, over abstract values. One rule per operator, and no pattern of any exporter.
//!
//! A value is a constant, a view of a canonical expression, or opaque. An operator without a rule, or whose rule does not
//! fit, makes its outputs opaque and the walk goes on; the first obstacle on the way to an output is what a refusal names.

mod arith;
mod attention;
mod contrib;
mod fold;
mod layout;
mod linear;
mod norm;
mod quant;
#[cfg(test)]
mod tests;

use std::rc::Rc;

use crate::array::Array;
use crate::axes::{self, Dim};
use crate::expr::{Exprs, Id, Op};
use crate::graph::{Attr, Graph, Node, SubGraph, ValueId};
use crate::{Error, Result};

pub use quant::Factor;

/// The result of a rule, or why it does not fit.
pub(crate) type Rule<T = Vec<Value>> = std::result::Result<T, String>;

/// Fails a rule, with a reason, unless a condition holds.
macro_rules! need {
    ($cond:expr, $($why:tt)+) => {
        if !$cond {
            return Err(format!($($why)+));
        }
    };
}
pub(crate) use need;

/// Nodes that are evaluated, bodies of `If` included; the reader has its own limits on what it inlines.
const NODE_LIMIT: usize = 1 << 20;

/// A view of an expression: for each dimension of the tensor its digits over the base axes.
#[derive(Clone, Debug)]
pub struct View {
    /// The base.
    pub e: Id,
    /// Digits over its axes.
    pub dims: Vec<Dim>,
    /// `(start, len)`: these tokens of the base alone; digits of axis 1 count inside of them.
    pub sel: Option<(usize, usize)>,
}

impl View {
    /// The sizes of the dimensions.
    pub fn shape(&self) -> Vec<usize> {
        axes::shape(&self.dims)
    }

    /// The same, laid out otherwise.
    pub fn with(&self, dims: Vec<Dim>) -> Self {
        Self { e: self.e, dims, sel: self.sel }
    }

    /// Another expression of the same layout.
    pub fn of(&self, e: Id) -> Self {
        Self { e, dims: self.dims.clone(), sel: self.sel }
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }
}

/// A constant.
#[derive(Clone, Debug)]
pub struct Const {
    /// Its elements.
    pub array: Array,
    /// The two parameters that it is the sum of, where that is how the graph makes it.
    pub terms: Option<Rc<(Array, Array)>>,
}

/// What an edge of the graph carries.
#[derive(Clone, Debug, Default)]
pub enum Value {
    /// An optional input or output that is absent.
    #[default]
    None,
    /// Known elements.
    Const(Const),
    /// A canonical expression, laid out.
    View(View),
    /// A sequence.
    Seq(Rc<Vec<Value>>),
    /// The run-time factor or zero point of a quantised activation.
    Factor(Factor),
    /// Not understood; the number of the obstacle.
    Opaque(u32),
}

impl From<Array> for Value {
    fn from(array: Array) -> Self {
        Self::Const(Const { array, terms: None })
    }
}

impl From<View> for Value {
    fn from(view: View) -> Self {
        Self::View(view)
    }
}

impl Value {
    /// The sizes of the dimensions.
    pub(crate) fn shape(&self) -> Rule<Vec<usize>> {
        match self {
            Self::Const(c) => Ok(c.array.shape()),
            Self::View(v) => Ok(v.shape()),
            Self::Factor(f) => Ok(f.shape()),
            Self::None => Err("an input is missing".into()),
            Self::Seq(_) => Err("a sequence where a tensor belongs".into()),
            Self::Opaque(_) => Err("an operand that is not understood".into()),
        }
    }

    /// A constant.
    pub(crate) fn array(&self, what: &str) -> Rule<&Array> {
        match self {
            Self::Const(c) => Ok(&c.array),
            Self::None => Err(format!("{what} is missing")),
            _ => Err(format!("{what} is computed from the image")),
        }
    }

    /// An activation.
    pub(crate) fn view(&self, what: &str) -> Rule<&View> {
        match self {
            Self::View(v) => Ok(v),
            Self::None => Err(format!("{what} is missing")),
            _ => Err(format!("{what} does not depend on the image")),
        }
    }

    /// A short list of integers.
    pub(crate) fn ints(&self, what: &str) -> Rule<Vec<i64>> {
        let a = self.array(what)?;
        need!(!a.dtype.is_float(), "{what} is not a list of integers");
        need!(a.len() <= 1 << 16, "{what} has {} elements", a.len());
        Ok(a.i64s())
    }

    pub(crate) fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

/// A node with the values of its inputs.
pub(crate) struct Call<'a> {
    pub node: &'a Node,
    pub inputs: Vec<Value>,
}

const ABSENT: &Value = &Value::None;

impl Call<'_> {
    pub fn get(&self, k: usize) -> &Value {
        self.inputs.get(k).unwrap_or(ABSENT)
    }

    pub fn has(&self, k: usize) -> bool {
        !self.get(k).is_none()
    }

    pub fn int(&self, name: &str, default: i64) -> Rule<i64> {
        match self.node.attrs.get(name) {
            None => Ok(default),
            Some(Attr::Int(v)) => Ok(*v),
            Some(_) => Err(format!("attribute `{name}` is not an integer")),
        }
    }

    pub fn float(&self, name: &str, default: f32) -> Rule<f64> {
        match self.node.attrs.get(name) {
            None => Ok(f64::from(default)),
            Some(Attr::Float(v)) => Ok(f64::from(*v)),
            Some(_) => Err(format!("attribute `{name}` is not a float")),
        }
    }

    pub fn text(&self, name: &str, default: &str) -> Rule<String> {
        match self.node.attrs.get(name) {
            None => Ok(default.into()),
            Some(Attr::Str(v)) => Ok(String::from_utf8_lossy(v).into_owned()),
            Some(_) => Err(format!("attribute `{name}` is not a string")),
        }
    }

    pub fn ints(&self, name: &str) -> Rule<Option<Vec<i64>>> {
        match self.node.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Ints(v)) => Ok(Some(v.clone())),
            Some(_) => Err(format!("attribute `{name}` is not a list of integers")),
        }
    }

    /// A list that is an attribute up to some opset and an input from there on.
    pub fn list(&self, name: &str, input: usize) -> Rule<Option<Vec<i64>>> {
        if self.has(input) { self.get(input).ints(name).map(Some) } else { self.ints(name) }
    }
}

/// An axis that may be negative, within a rank.
pub(crate) fn axis_in(axis: i64, rank: usize) -> Rule<usize> {
    let at = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(at).ok().filter(|&a| a < rank).ok_or_else(|| format!("axis {axis} of a tensor of rank {rank}"))
}

/// A node that has no rule, or whose rule does not fit.
#[derive(Clone, Debug)]
pub struct Obstacle {
    /// Index into [`Walk::visited`].
    pub node: u32,
    /// Why.
    pub why: String,
}

/// What is assumed while walking.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Sizes of the image input, as the file lays it out; a dynamic batch is a large prime.
    pub image: [usize; 4],
    /// How far a constant such as 1.702 may be off, relatively.
    pub tolerance: f64,
}

/// A graph being walked.
pub struct Walk<'g> {
    /// The graph.
    pub graph: &'g Graph,
    /// The expressions found.
    pub x: Exprs,
    /// The image input's base expression.
    pub image: Id,
    /// What no rule fitted.
    pub obstacles: Vec<Obstacle>,
    /// Every node that was evaluated, in order: the index is [`crate::expr::Expr::born`] less one.
    pub visited: Vec<&'g Node>,
    /// Why the result only approximates the file, if it does.
    pub approximate: Vec<String>,
    /// Where something that decides the configuration was read.
    pub evidence: Vec<(u32, String)>,
    pub(crate) batch: usize,
    values: Vec<Value>,
}

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
            evidence: Vec::new(),
            batch: setting.image[0],
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

    /// The value of an edge.
    pub fn value(&self, id: ValueId) -> &Value {
        self.values.get(id as usize).unwrap_or(ABSENT)
    }

    fn set(&mut self, id: ValueId, value: Value) {
        if let Some(slot) = self.values.get_mut(id as usize) {
            *slot = value;
        }
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
                        return Err(Error::node(node, "a node without outputs: the file is broken"));
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

    /// Evaluates a node, or says which body of it is to be walked.
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
            "Sqrt" | "Reciprocal" | "Neg" | "Relu" | "Erf" | "Tanh" | "Sigmoid" | "Exp" | "Log" => {
                one(self.unary(call))
            }
            "Gelu" => one(self.gelu(call)),
            "Swish" => one(self.swish(call)),
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
            "Resize" => one(self.resize(call)),
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

/// An attribute that an operator does not have means that the file is not what it says.
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
