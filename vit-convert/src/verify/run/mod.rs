//! A plain ONNX evaluator: node by node over concrete values, as the operators are documented.
//!
//! It shares only [`Graph`] with the importer, so that it reveals a wrong rule there. Only the nodes that the requested
//! outputs need are run, and a value is freed after its last use. A constant stays in its file until a node reads it.
//! f16 and bf16 are computed in f32 and rounded after every node, and integers wrap as their type does.

mod arith;
mod attention;
mod broadcast;
mod call;
mod contrib;
mod error;
mod indexed;
mod layout;
mod linear;
mod math;
mod quant;
mod reduce;
mod resize;
mod sequence;
mod shape;
mod value;

use std::collections::{BTreeMap, HashMap, HashSet};

use call::Call;
pub use error::Error;
use shape::Res;
pub use shape::count;
pub use value::{Value, is_float};

use crate::onnx::graph::{Attr, Graph, Node, SubGraph, Tensor, ValueId};

/// Bytes that all live values together may occupy.
pub const MAX_LIVE_BYTES: usize = 4 << 30;

/// Bodies of If within one another.
const MAX_DEPTH: usize = 16;

/// How numbers are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// Each value is rounded to its type, as a runtime does.
    #[default]
    AsStored,
    /// Not rounded: halves are computed as f32, and quantising keeps the fraction. This leaves out the noise of the
    /// file's number format, which could hide wrong wiring.
    Ideal,
}

/// Runs a graph as its values are stored: inputs in the order of [`Graph::inputs`], outputs in that of
/// [`Graph::outputs`].
#[cfg(test)]
pub fn run(graph: &Graph, inputs: Vec<Value>) -> Result<Vec<Value>, Error> {
    let outputs: Vec<ValueId> = graph.outputs.iter().map(|o| o.id).collect();
    run_watched(graph, inputs, &outputs, Arithmetic::AsStored, &mut |_, _| {})
}

/// Runs what some outputs of a graph need, and gives these outputs; `watch` sees every value that a node of the main
/// graph makes.
pub fn run_watched(
    graph: &Graph,
    inputs: Vec<Value>,
    outputs: &[ValueId],
    arithmetic: Arithmetic,
    watch: &mut dyn FnMut(ValueId, &Value),
) -> Result<Vec<Value>, Error> {
    let name = |id: ValueId| graph.names.get(id as usize).cloned().unwrap_or_else(|| format!("#{id}"));
    let mut values = HashMap::new();
    if inputs.len() != graph.inputs.len() {
        let why = format!("the graph has {} inputs, {} were given", graph.inputs.len(), inputs.len());
        return Err(Error::Value { name: "inputs".into(), why });
    }
    for (declared, mut value) in graph.inputs.iter().zip(inputs) {
        let fits = declared.dtype.is_none_or(|d| d == value.dtype)
            && declared.shape.as_ref().is_none_or(|shape| {
                shape.len() == value.rank()
                    // a proof runs a few images of a large batch
                    && shape.iter().zip(&value.dims).enumerate().all(|(axis, (s, &d))| {
                        s.is_none_or(|s| s == d as u64 || (axis == 0 && s > super::inputs::MOST as u64))
                    })
            });
        if !fits {
            let why =
                format!("declared {:?} {:?}, given {:?} {:?}", declared.dtype, declared.shape, value.dtype, value.dims);
            return Err(Error::Value { name: name(declared.id), why });
        }
        if arithmetic == Arithmetic::Ideal {
            value = value.ideal();
        }
        values.insert(declared.id, value);
    }
    let ideal = arithmetic == Arithmetic::Ideal;
    let mut runner = Runner { graph, ideal, work: 0, depth: 0, watch };
    let mut scope = Scope { values, constants: &graph.initializers, ideal, outer: None };
    runner.body(&graph.nodes, outputs, &mut scope)?;
    let results = outputs.iter().map(|&id| {
        let fail = |why| Error::Value { name: name(id), why };
        let value = scope.get(id).map_err(fail)?;
        let declared = graph.outputs.iter().find(|o| o.id == id).and_then(|o| o.dtype);
        match declared {
            Some(d) if d != value.dtype && !ideal => {
                Err(fail(format!("declared as {d:?}, the graph makes {:?}", value.dtype)))
            }
            _ => Ok(value),
        }
    });
    results.collect()
}

/// Values by id, and the scope around an If's body.
struct Scope<'a> {
    values: HashMap<ValueId, Value>,
    constants: &'a BTreeMap<ValueId, Tensor>,
    ideal: bool,
    outer: Option<&'a Scope<'a>>,
}

impl Scope<'_> {
    fn get(&self, id: ValueId) -> Res<Value> {
        let mut scope = Some(self);
        while let Some(s) = scope {
            if let Some(v) = s.values.get(&id) {
                return Ok(v.clone());
            }
            if let Some(t) = s.constants.get(&id) {
                return Value::read(t).map(|v| if s.ideal { v.ideal() } else { v });
            }
            scope = s.outer;
        }
        Err("nothing makes it".into())
    }
}

struct Runner<'g, 'w> {
    graph: &'g Graph,
    ideal: bool,
    work: u64,
    depth: usize,
    watch: &'w mut dyn FnMut(ValueId, &Value),
}

impl Runner<'_, '_> {
    /// Runs those of `nodes` that `outputs` need.
    fn body(&mut self, nodes: &[Node], outputs: &[ValueId], scope: &mut Scope<'_>) -> Result<(), Error> {
        // from the back: which nodes are needed, and by which node each value is used last
        let mut last: HashMap<ValueId, usize> = outputs.iter().map(|&o| (o, usize::MAX)).collect();
        let mut needed = vec![false; nodes.len()];
        for (i, node) in nodes.iter().enumerate().rev() {
            if node.outputs.iter().flatten().any(|o| last.contains_key(o)) {
                needed[i] = true;
                for id in uses(node) {
                    last.entry(id).or_insert(i);
                }
            }
        }
        let mut frees: HashMap<usize, Vec<ValueId>> = HashMap::new();
        for (&id, &i) in &last {
            frees.entry(i).or_default().push(id);
        }
        let mut live: usize = scope.values.values().map(Value::bytes).sum();
        for (i, node) in nodes.iter().enumerate().filter(|(i, _)| needed[*i]) {
            let fail = |why| {
                let op = if node.domain.is_empty() { node.op.clone() } else { format!("{}.{}", node.domain, node.op) };
                Error::Node { node: node.name.clone(), op, why }
            };
            let results = match node.op.as_str() {
                "If" if node.domain.is_empty() => self.branch(node, scope, &fail)?,
                _ => {
                    let mut inputs = Vec::with_capacity(node.inputs.len());
                    for id in &node.inputs {
                        inputs.push(id.map(|id| scope.get(id).map_err(|e| fail(self.named(id, &e)))).transpose()?);
                    }
                    // the last use of a value takes it, so that its buffer can be reused
                    for id in frees.get(&i).into_iter().flatten() {
                        live = live.saturating_sub(scope.values.remove(id).map_or(0, |v| v.bytes()));
                    }
                    let mut call = Call { node, inputs, opset: self.graph.opset, ideal: self.ideal, work: self.work };
                    let results = rule(&mut call).map_err(fail)?;
                    self.work = call.work;
                    results
                }
            };
            if results.len() < node.outputs.len() && node.outputs[results.len()..].iter().any(Option::is_some) {
                return Err(fail(format!("{} outputs asked for, {} made", node.outputs.len(), results.len())));
            }
            for (&id, value) in node.outputs.iter().zip(results) {
                if let Some(id) = id {
                    if self.depth == 0 {
                        (self.watch)(id, &value);
                    }
                    if last.contains_key(&id) {
                        live += value.bytes();
                        scope.values.insert(id, value);
                    }
                }
            }
            // values that only a body used
            for id in frees.get(&i).into_iter().flatten() {
                live = live.saturating_sub(scope.values.remove(id).map_or(0, |v| v.bytes()));
            }
            if live > MAX_LIVE_BYTES {
                return Err(fail(format!("the values alive hold {live} bytes, over the limit of {MAX_LIVE_BYTES}")));
            }
        }
        Ok(())
    }

    fn named(&self, id: ValueId, why: &str) -> String {
        let name = self.graph.names.get(id as usize).map_or("?", String::as_str);
        format!("its input `{name}`: {why}")
    }

    /// The branch of an If that its condition says; it sees the values around it.
    fn branch(&mut self, node: &Node, scope: &Scope<'_>, fail: &dyn Fn(String) -> Error) -> Result<Vec<Value>, Error> {
        if self.depth >= MAX_DEPTH {
            return Err(fail(format!("bodies are nested deeper than {MAX_DEPTH}")));
        }
        let condition = node.inputs.first().copied().flatten().ok_or_else(|| fail("has no condition".into()))?;
        let condition = scope.get(condition).map_err(|e| fail(self.named(condition, &e)))?;
        let name = if condition.one().map_err(fail)? == 0.0 { "else_branch" } else { "then_branch" };
        let body = match node.attrs.get(name) {
            Some(Attr::Graph(body)) if body.inputs.is_empty() => body,
            _ => return Err(fail(format!("has no body `{name}` without inputs"))),
        };
        let (values, constants) = (HashMap::new(), &body.initializers);
        let mut scope = Scope { values, constants, ideal: self.ideal, outer: Some(scope) };
        self.depth += 1;
        let done = self.body(&body.nodes, &body.outputs, &mut scope);
        self.depth -= 1;
        done?;
        body.outputs.iter().map(|&id| scope.get(id).map_err(|e| fail(self.named(id, &e)))).collect()
    }
}

/// Every value that a node reads, those that its bodies read included.
fn uses(node: &Node) -> HashSet<ValueId> {
    let mut found: HashSet<ValueId> = node.inputs.iter().flatten().copied().collect();
    let mut bodies: Vec<&SubGraph> = Vec::new();
    for a in node.attrs.values() {
        if let Attr::Graph(g) = a {
            bodies.push(g);
        }
    }
    while let Some(body) = bodies.pop() {
        found.extend(&body.outputs);
        for node in &body.nodes {
            found.extend(node.inputs.iter().flatten());
            for a in node.attrs.values() {
                if let Attr::Graph(g) = a {
                    bodies.push(g);
                }
            }
        }
    }
    found
}

/// The node's outputs, in order.
fn rule(call: &mut Call<'_>) -> Res<Vec<Value>> {
    type Rule = fn(&mut Call<'_>) -> Option<Res<Vec<Value>>>;
    let rules: &[Rule] = match call.node.domain.as_str() {
        "" | "ai.onnx" => &[
            layout::run,
            arith::run,
            linear::run,
            reduce::run,
            attention::run,
            quant::run,
            sequence::run,
            indexed::run,
        ],
        "com.microsoft" => &[contrib::run, attention::run_contrib, quant::run_contrib],
        _ => &[],
    };
    match rules.iter().find_map(|rule| rule(call)) {
        Some(results) => results,
        None => Err("there is no rule for this operator".into()),
    }
}

#[cfg(test)]
mod tests;
