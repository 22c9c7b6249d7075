//! A plain ONNX evaluator: node by node over concrete values, as the operators' documentation says.
//!
//! It shares nothing with the importer but [`Graph`], so that a wrong rule there shows here. Only what the asked-for
//! outputs need is run, and a value is freed after its last use. Constants stay in the file's map until a node reads
//! them. f16 and bf16 are computed in f32 and rounded after every node, integers wrap as their type does.

mod arith;
mod attention;
mod contrib;
mod flow;
mod layout;
mod linear;
mod math;
mod quant;
mod reduce;
mod resize;
mod value;

use std::collections::{BTreeMap, HashMap, HashSet};

use value::Res;
pub use value::{Data, MAX_ELEMENTS, Value, count, is_float};

use crate::graph::{Attr, DType, Graph, Node, SubGraph, Tensor, ValueId};

/// Bytes that all values alive at once may hold.
pub const MAX_LIVE_BYTES: usize = 4 << 30;

/// Multiplications that one evaluation may do: 2⁴⁵, a ViT-g at 512 px several times over.
pub const MAX_WORK: u64 = 1 << 45;

/// Nested If and Loop bodies.
const MAX_DEPTH: usize = 16;

/// Why a graph could not be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A node that ONNX Runtime would refuse too, or an operator that has no rule here.
    #[error("node `{node}` ({op}): {why}")]
    Node {
        /// The node's name.
        node: String,
        /// Its operator, with the domain where that is not `ai.onnx`.
        op: String,
        /// What it needs and what it has.
        why: String,
    },
    /// A value that nothing makes, or that does not fit what is declared.
    #[error("value `{name}`: {why}")]
    Value {
        /// The value's name.
        name: String,
        /// What was expected and what was found.
        why: String,
    },
}

/// What a file's numbers stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// Rounded to every value's type, as a runtime does.
    #[default]
    AsStored,
    /// Not rounded: halves are computed as f32, and quantising keeps the fraction. What the file means, apart from the
    /// noise of its number format, so that a wrong wiring shows behind that noise.
    Ideal,
}

/// Runs a graph: its inputs in the order of [`Graph::inputs`], its outputs in the order of [`Graph::outputs`].
pub fn run(graph: &Graph, inputs: Vec<Value>) -> Result<Vec<Value>, Error> {
    run_watched(graph, inputs, Arithmetic::AsStored, &mut |_, _| {})
}

/// As [`run`], showing every value that a node of the main graph makes.
pub fn run_watched(
    graph: &Graph,
    inputs: Vec<Value>,
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
                    && shape.iter().zip(&value.dims).all(|(s, &d)| s.is_none_or(|s| s == d as u64))
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
    let outputs: Vec<_> = graph.outputs.iter().map(|o| o.id).collect();
    runner.body(&graph.nodes, &outputs, &mut scope)?;
    let results = graph.outputs.iter().map(|declared| {
        let fail = |why| Error::Value { name: name(declared.id), why };
        let value = scope.get(declared.id).map_err(fail)?;
        match declared.dtype {
            Some(d) if d != value.dtype && !ideal => {
                Err(fail(format!("declared as {d:?}, the graph makes {:?}", value.dtype)))
            }
            _ => Ok(value),
        }
    });
    results.collect()
}

/// Values by id, and the scope around an If's or Loop's body.
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
                "If" | "Loop" if node.domain.is_empty() => self.branch(node, scope, &fail)?,
                _ => {
                    let mut inputs = Vec::with_capacity(node.inputs.len());
                    for id in &node.inputs {
                        inputs.push(id.map(|id| scope.get(id).map_err(|e| fail(self.named(id, &e)))).transpose()?);
                    }
                    // a value used for the last time moves in, so that its buffer can be reused
                    for id in frees.get(&i).into_iter().flatten() {
                        live = live.saturating_sub(scope.values.remove(id).map_or(0, |v| v.bytes()));
                    }
                    let mut call = Call { node, inputs, opset: self.graph.opset, ideal: self.ideal, work: self.work };
                    let results = call.run().map_err(fail)?;
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
            // what only a body used
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

    /// If and Loop: their bodies see the values around them.
    fn branch(&mut self, node: &Node, scope: &Scope<'_>, fail: &dyn Fn(String) -> Error) -> Result<Vec<Value>, Error> {
        let input = |i: usize| match node.inputs.get(i).copied().flatten() {
            Some(id) => scope.get(id).map(Some).map_err(|e| fail(self.named(id, &e))),
            None => Ok(None),
        };
        let body = |name: &str| match node.attrs.get(name) {
            Some(Attr::Graph(g)) => Ok(&**g),
            _ => Err(fail(format!("has no body `{name}`"))),
        };
        if self.depth >= MAX_DEPTH {
            return Err(fail(format!("bodies are nested deeper than {MAX_DEPTH}")));
        }
        if node.op == "If" {
            let yes = input(0)?.ok_or_else(|| fail("has no condition".into()))?.one().map_err(fail)? != 0.0;
            let body = body(if yes { "then_branch" } else { "else_branch" })?;
            return self.call_body(body, vec![], scope, fail);
        }
        let trips = input(0)?.map_or(Ok(i64::MAX), |v| v.one_int()).map_err(fail)?;
        let mut go = input(1)?.map_or(Ok(1.0), |v| v.one()).map_err(fail)? != 0.0;
        let carried = node.inputs.len().saturating_sub(2);
        let mut state = (2..node.inputs.len())
            .map(|i| input(i)?.ok_or_else(|| fail("a carried value is missing".into())))
            .collect::<Result<Vec<_>, _>>()?;
        let body = body("body")?;
        let mut scans: Vec<Vec<Value>> = Vec::new();
        let mut trip = 0;
        while go && trip < trips {
            if trip >= 1 << 16 {
                return Err(fail("loops more than 65536 times".into()));
            }
            let mut inputs = vec![Value::int(DType::I64, vec![], vec![trip]), flow::bool_value(go)];
            inputs.append(&mut state);
            let mut results = self.call_body(body, inputs, scope, fail)?;
            if results.len() <= carried {
                return Err(fail("the body returns too few values".into()));
            }
            go = results[0].one().map_err(fail)? != 0.0;
            let more = results.split_off(carried + 1);
            state = results.split_off(1);
            scans.resize(more.len(), vec![]);
            for (scan, v) in scans.iter_mut().zip(more) {
                scan.push(v);
            }
            trip += 1;
        }
        for scan in scans {
            state.push(flow::stack(&scan, 0, true).map_err(fail)?);
        }
        Ok(state)
    }

    fn call_body(
        &mut self,
        body: &SubGraph,
        inputs: Vec<Value>,
        outer: &Scope<'_>,
        fail: &dyn Fn(String) -> Error,
    ) -> Result<Vec<Value>, Error> {
        if inputs.len() != body.inputs.len() {
            return Err(fail(format!("its body has {} inputs, {} are given", body.inputs.len(), inputs.len())));
        }
        let values = body.inputs.iter().copied().zip(inputs).collect();
        let mut scope = Scope { values, constants: &body.initializers, ideal: self.ideal, outer: Some(outer) };
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

/// One node with its inputs.
struct Call<'a> {
    node: &'a Node,
    inputs: Vec<Option<Value>>,
    opset: i64,
    ideal: bool,
    work: u64,
}

impl Call<'_> {
    /// The node's outputs, in order.
    fn run(&mut self) -> Res<Vec<Value>> {
        type Rule = fn(&mut Call<'_>) -> Option<Res<Vec<Value>>>;
        let rules: &[Rule] = match self.node.domain.as_str() {
            "" | "ai.onnx" => {
                &[layout::run, arith::run, linear::run, reduce::run, attention::run, quant::run, flow::run, resize::run]
            }
            "com.microsoft" => &[contrib::run, attention::run_contrib, quant::run_contrib],
            _ => &[],
        };
        match rules.iter().find_map(|rule| rule(self)) {
            Some(results) => results,
            None => Err("there is no rule for this operator".into()),
        }
    }

    /// A constant in an attribute.
    fn constant(&self, tensor: &Tensor) -> Res<Value> {
        Value::read(tensor).map(|v| if self.ideal { v.ideal() } else { v })
    }

    /// ONNX's number of an element type.
    fn dtype(&self, code: i64) -> Res<DType> {
        let dtype = arith::dtype_of(code)?;
        Ok(if self.ideal && matches!(dtype, DType::F16 | DType::Bf16) { DType::F32 } else { dtype })
    }

    /// An input that must be there.
    fn input(&self, i: usize) -> Res<&Value> {
        match self.inputs.get(i) {
            Some(Some(v)) if !matches!(v.data, Data::Sequence(_)) => Ok(v),
            Some(Some(_)) => Err(format!("input {i} is a sequence")),
            _ => Err(format!("input {i} is missing")),
        }
    }

    /// An input that may be absent.
    fn opt(&self, i: usize) -> Option<&Value> {
        self.inputs.get(i)?.as_ref()
    }

    /// Takes an input out, so that its buffer can be reused.
    fn take(&mut self, i: usize) -> Res<Value> {
        self.input(i)?;
        self.inputs[i].take().ok_or_else(|| format!("input {i} is missing"))
    }

    fn int(&self, name: &str, default: i64) -> Res<i64> {
        match self.node.attrs.get(name) {
            None => Ok(default),
            Some(Attr::Int(x)) => Ok(*x),
            Some(_) => Err(format!("attribute `{name}` is no integer")),
        }
    }

    fn float(&self, name: &str, default: f32) -> Res<f64> {
        Ok(self.opt_float(name)?.unwrap_or(default as f64))
    }

    fn opt_float(&self, name: &str) -> Res<Option<f64>> {
        match self.node.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Float(x)) => Ok(Some(*x as f64)),
            Some(_) => Err(format!("attribute `{name}` is no float")),
        }
    }

    fn ints(&self, name: &str) -> Res<Option<Vec<i64>>> {
        match self.node.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Ints(x)) => Ok(Some(x.clone())),
            Some(_) => Err(format!("attribute `{name}` is no list of integers")),
        }
    }

    fn str(&self, name: &str, default: &str) -> Res<String> {
        match self.node.attrs.get(name) {
            None => Ok(default.into()),
            Some(Attr::Str(x)) => Ok(String::from_utf8_lossy(x).into_owned()),
            Some(_) => Err(format!("attribute `{name}` is no string")),
        }
    }

    /// A list that is an attribute in old operator sets and an input in new ones.
    fn list(&self, name: &str, input: usize) -> Res<Option<Vec<i64>>> {
        match self.opt(input) {
            Some(v) => Ok(Some(v.as_ints()?.to_vec())),
            None => self.ints(name),
        }
    }

    /// Counts multiplications against the limit.
    fn spend(&mut self, factors: &[usize]) -> Res<()> {
        let n = factors.iter().try_fold(1u64, |n, &f| n.checked_mul(f as u64));
        self.work = n.and_then(|n| n.checked_add(self.work)).filter(|&n| n <= MAX_WORK).ok_or("too much work")?;
        Ok(())
    }
}

/// The one result of most operators, as a rule gives it.
#[allow(clippy::unnecessary_wraps)]
fn one(value: Res<Value>) -> Option<Res<Vec<Value>>> {
    Some(value.map(|v| vec![v]))
}

#[cfg(test)]
mod tests;
