//! Messages → graph: names become numbers by scope, functions are inlined, nodes are sorted.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;

use super::{external::Files, limits, proto, sort, tensor};
use crate::{
    Error, Result,
    onnx::graph::{Attr, DType, Graph, Node, SubGraph, Tensor, ValueId, ValueInfo},
};

/// Operators that a later opset redefined without changing their attributes. A function body written for an opset on
/// one side of that version cannot be read on the other.
const REDEFINED: [(&str, i64); 4] = [("Softmax", 13), ("LogSoftmax", 13), ("Hardmax", 13), ("GroupNormalization", 21)];

/// The graph of a model whose tensors are normalised.
pub fn build(model: &proto::ModelProto, opsets: &BTreeMap<String, i64>, files: &Files) -> Result<Graph> {
    let main = model.graph.as_ref().ok_or_else(|| Error::graph("holds no graph"))?;
    let mut builder = Builder { opsets: Some(opsets), files: files.clone(), ..Builder::default() };
    for function in &model.functions {
        let key = (domain(&function.domain), function.name.as_str(), function.overload.as_str());
        if builder.functions.insert(key, function).is_some() {
            return Err(Error::graph(format!("defines the function `{}` twice", function.name)));
        }
    }
    if main.output.is_empty() {
        return Err(Error::graph("has no output"));
    }
    let mut scope = Scope::default();
    let context = Context::default();
    let initializers = builder.initializers(&main.initializer, &mut scope, &context)?;
    let mut inputs = Vec::new();
    for value in &main.input {
        // before IR version 4, initializers were inputs too
        if scope.values.get(&value.name).is_some_and(|id| initializers.contains_key(id)) {
            continue;
        }
        let id = builder.define(&value.name, &mut scope, &context)?;
        inputs.push(info(id, value));
    }
    let nodes = builder.nodes(&main.node, &mut scope, &context)?;
    let mut outputs = Vec::new();
    for value in &main.output {
        let id = scope
            .find(&value.name)
            .ok_or_else(|| Error::graph(format!("no node makes the graph's output `{}`", value.name)))?;
        outputs.push(info(id, value));
    }
    let (names, records) = (builder.names, builder.records);
    Ok(Graph { names, initializers, inputs, outputs, nodes: sort::sort(nodes)?, records, ..Graph::default() })
}

/// A domain under its short name: ONNX's own is `""` as well as `ai.onnx`.
pub fn domain(name: &str) -> &str {
    if name == "ai.onnx" { "" } else { name }
}

/// A declared value.
fn info(id: ValueId, value: &proto::ValueInfoProto) -> ValueInfo {
    let tensor = value.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
    let size = |d: &proto::Dimension| d.dim_value.and_then(|n| u64::try_from(n).ok()).filter(|&n| n > 0);
    ValueInfo {
        id,
        dtype: tensor.and_then(|t| DType::from_onnx(t.elem_type)),
        shape: tensor.and_then(|t| t.shape.as_ref()).map(|shape| shape.dim.iter().map(size).collect()),
    }
}

/// Names visible at a place: its own, then those of the graphs around it (a function sees only its own).
#[derive(Default)]
struct Scope<'a> {
    values: HashMap<String, ValueId>,
    /// Inputs of a function that its caller leaves out.
    absent: HashSet<String>,
    /// Results of a function, until a node makes them.
    results: HashMap<String, ValueId>,
    around: Option<&'a Scope<'a>>,
}

impl Scope<'_> {
    fn find(&self, name: &str) -> Option<ValueId> {
        let mut scope = Some(self);
        while let Some(here) = scope {
            if let Some(&id) = here.values.get(name) {
                return Some(id);
            }
            scope = here.around;
        }
        None
    }

    /// Is a name an input that the caller of a function leaves out?
    fn absent(&self, name: &str) -> bool {
        let mut scope = Some(self);
        while let Some(here) = scope {
            if here.absent.contains(name) {
                return true;
            }
            scope = here.around;
        }
        false
    }
}

/// Where nodes are read: in the graph itself, in a body, in a function.
#[derive(Default)]
struct Context<'a> {
    /// A prefix for names, which keeps them unique and tells where they come from.
    prefix: String,
    /// Attributes of the call, within a function.
    attributes: Option<HashMap<&'a str, Attr>>,
    /// The functions that are being inlined, outermost first.
    calls: Vec<(&'a str, &'a str, &'a str)>,
    depth: usize,
    /// Version of ONNX's operators in the function that is being inlined.
    opset: Option<i64>,
}

#[derive(Default)]
struct Builder<'a> {
    opsets: Option<&'a BTreeMap<String, i64>>,
    /// Where large elements are.
    files: Files,
    functions: HashMap<(&'a str, &'a str, &'a str), &'a proto::FunctionProto>,
    names: Vec<String>,
    /// How often each name was requested.
    taken: HashMap<String, usize>,
    name_bytes: usize,
    records: BTreeMap<ValueId, String>,
    nodes: usize,
    parts: usize,
}

impl<'a> Builder<'a> {
    /// A new value under a name of the file, visible in `scope`.
    fn define(&mut self, name: &str, scope: &mut Scope<'_>, context: &Context<'_>) -> Result<ValueId> {
        if name.is_empty() {
            return Err(Error::graph("declares a value without a name"));
        }
        let id = self.value(&format!("{}{name}", context.prefix))?;
        if scope.values.insert(name.to_owned(), id).is_some() {
            return Err(Error::graph(format!("makes the value `{name}` twice")));
        }
        Ok(id)
    }

    /// A new value. If its name is taken, a number is appended.
    fn value(&mut self, wanted: &str) -> Result<ValueId> {
        let before = self.taken.entry(wanted.to_owned()).or_insert(0);
        let name = if *before == 0 { wanted.to_owned() } else { format!("{wanted}~{before}") };
        *before = before.saturating_add(1);
        self.name_bytes = self.name_bytes.saturating_add(name.len());
        if self.name_bytes > limits::NAME_BYTES {
            return Err(Error::graph(format!("has names of more than {} bytes in all", limits::NAME_BYTES)));
        }
        let id = ValueId::try_from(self.names.len()).map_err(|_| Error::graph("has too many values"))?;
        self.names.push(name);
        Ok(id)
    }

    fn initializers(
        &mut self,
        tensors: &[proto::TensorProto],
        scope: &mut Scope<'_>,
        context: &Context<'_>,
    ) -> Result<BTreeMap<ValueId, Tensor>> {
        let mut initializers = BTreeMap::new();
        for tensor in tensors {
            let id = self.define(&tensor.name, scope, context)?;
            initializers.insert(id, tensor::get(tensor, &self.files)?);
        }
        Ok(initializers)
    }

    /// The nodes of a graph, a body or a function, in any order: all names are known before one is looked up.
    fn nodes(
        &mut self,
        protos: &'a [proto::NodeProto],
        scope: &mut Scope<'_>,
        context: &Context<'a>,
    ) -> Result<Vec<Node>> {
        if context.depth > limits::NESTING {
            return Err(Error::graph(format!("nests bodies and functions more than {} deep", limits::NESTING)));
        }
        for name in protos.iter().flat_map(|node| &node.output).filter(|name| !name.is_empty()) {
            // the caller has already numbered a function's results
            match scope.results.remove(name) {
                Some(id) => drop(scope.values.insert(name.clone(), id)),
                None => drop(self.define(name, scope, context)?),
            }
        }
        let scope = &*scope;
        let mut nodes = Vec::with_capacity(protos.len());
        for (at, proto) in protos.iter().enumerate() {
            self.node(proto, at, scope, context, &mut nodes)?;
        }
        Ok(nodes)
    }

    /// One node, or the nodes of the function that it calls.
    fn node(
        &mut self,
        proto: &'a proto::NodeProto,
        at: usize,
        scope: &Scope<'_>,
        context: &Context<'a>,
        nodes: &mut Vec<Node>,
    ) -> Result<()> {
        let own = if proto.name.is_empty() { format!("{}#{at}", proto.op_type) } else { proto.name.clone() };
        let mut node = Node {
            name: format!("{}{own}", context.prefix),
            op: proto.op_type.clone(),
            domain: domain(&proto.domain).to_owned(),
            inputs: Vec::with_capacity(proto.input.len()),
            outputs: Vec::with_capacity(proto.output.len()),
            attrs: BTreeMap::new(),
        };
        self.count(proto)?;
        for name in &proto.input {
            let found = if name.is_empty() { None } else { scope.find(name) };
            if found.is_none() && !name.is_empty() && !scope.absent(name) {
                return Err(node.error(format!("reads `{name}`, which nothing makes")));
            }
            node.inputs.push(found);
        }
        node.outputs = proto.output.iter().map(|name| scope.find(name).filter(|_| !name.is_empty())).collect();
        if let (Some(Some(first)), Some(record)) = (node.outputs.first(), record(proto)) {
            self.name_bytes = self.name_bytes.saturating_add(record.len());
            self.records.insert(*first, record);
        }
        for attribute in &proto.attribute {
            let Some(attr) = self.attribute(attribute, scope, context, &node)? else { continue };
            if node.attrs.insert(attribute.name.clone(), attr).is_some() {
                return Err(node.error(format!("has the attribute `{}` twice", attribute.name)));
            }
        }
        let key = (domain(&proto.domain), proto.op_type.as_str(), proto.overload.as_str());
        if let Some(function) = self.functions.get(&key).copied() {
            return self.call(&node, key, function, context, nodes);
        }
        if !node.domain.is_empty() && self.opsets.is_some_and(|opsets| !opsets.contains_key(&node.domain)) {
            return Err(node.error(format!("is of the domain `{}`, which the model does not import", node.domain)));
        }
        if let Some((op, version)) = REDEFINED.iter().find(|(op, _)| node.domain.is_empty() && *op == node.op) {
            let model = self.opsets.and_then(|opsets| opsets.get("")).copied();
            if let (Some(model), Some(body)) = (model, context.opset)
                && (model < *version) != (body < *version)
            {
                return Err(node.error(format!(
                    "{op} changed its meaning in opset {version}; the function is of opset {body}, the model of {model}"
                )));
            }
        }
        if node.op == "Constant" && node.domain.is_empty() {
            constant(&mut node)?;
        }
        nodes.push(node);
        Ok(())
    }

    /// Counts what a node adds, before it is added.
    fn count(&mut self, proto: &proto::NodeProto) -> Result<()> {
        self.nodes = self.nodes.saturating_add(1);
        let elements = proto.attribute.iter().map(|a| a.ints.len().saturating_add(a.floats.len()).saturating_add(1));
        let parts = elements.fold(proto.input.len().saturating_add(proto.output.len()), usize::saturating_add);
        self.parts = self.parts.saturating_add(parts);
        if self.nodes > limits::NODES || self.parts > limits::NODE_PARTS {
            return Err(Error::graph(format!(
                "has more than {} nodes with its functions inlined: larger than any Vision Transformer",
                limits::NODES
            )));
        }
        Ok(())
    }

    /// Puts a function's nodes in the place of its call.
    fn call(
        &mut self,
        call: &Node,
        key: (&'a str, &'a str, &'a str),
        function: &'a proto::FunctionProto,
        context: &Context<'a>,
        nodes: &mut Vec<Node>,
    ) -> Result<()> {
        if context.calls.contains(&key) {
            return Err(call.error("is a function that calls itself"));
        }
        if call.inputs.len() > function.input.len() || call.outputs.len() > function.output.len() {
            return Err(call.error(format!(
                "gives {} inputs and takes {} outputs of a function that has {} and {}",
                call.inputs.len(),
                call.outputs.len(),
                function.input.len(),
                function.output.len()
            )));
        }
        let mut scope = Scope::default();
        for (at, name) in function.input.iter().enumerate() {
            let bound = match call.inputs.get(at).copied().flatten() {
                Some(id) => scope.values.insert(name.clone(), id).is_some(),
                None => !scope.absent.insert(name.clone()),
            };
            if bound {
                return Err(call.error(format!("is a function with two inputs `{name}`")));
            }
        }
        let mut passed = Vec::new();
        for (at, name) in function.output.iter().enumerate() {
            let Some(id) = call.outputs.get(at).copied().flatten() else { continue };
            match scope.values.get(name) {
                // the function returns an input unchanged
                Some(&input) => passed.push((input, id)),
                None if scope.results.insert(name.clone(), id).is_none() => {}
                None => return Err(call.error(format!("is a function with two outputs `{name}`"))),
            }
        }
        // attributes of the call take precedence over the function's defaults
        let mut attributes: HashMap<&'a str, Attr> = HashMap::new();
        let none = Context::default();
        for default in &function.attribute_proto {
            if let Some(attr) = self.attribute(default, &Scope::default(), &none, call)? {
                attributes.insert(default.name.as_str(), attr);
            }
        }
        for name in &function.attribute {
            if let Some(attr) = call.attrs.get(name) {
                attributes.insert(name.as_str(), attr.clone());
            }
        }
        for default in &function.attribute_proto {
            if let Some(attr) = call.attrs.get(&default.name) {
                attributes.insert(default.name.as_str(), attr.clone());
            }
        }
        let opset =
            function.opset_import.iter().find(|entry| domain(&entry.domain).is_empty()).map(|entry| entry.version);
        let inner = Context {
            prefix: format!("{}/", call.name),
            attributes: Some(attributes),
            calls: context.calls.iter().copied().chain([key]).collect(),
            depth: context.depth.saturating_add(1),
            opset: opset.or(context.opset),
        };
        let body = self.nodes(&function.node, &mut scope, &inner)?;
        if let Some(name) = scope.results.keys().next() {
            return Err(call.error(format!("is a function that does not make its output `{name}`")));
        }
        nodes.extend(body);
        nodes.extend(passed.into_iter().map(|(from, to)| Node {
            name: format!("{}/pass", call.name),
            op: "Identity".into(),
            domain: String::new(),
            inputs: vec![Some(from)],
            outputs: vec![Some(to)],
            attrs: BTreeMap::new(),
        }));
        Ok(())
    }

    /// An attribute's value; `None` if it refers to an attribute that the function's caller left out.
    fn attribute(
        &mut self,
        proto: &'a proto::AttributeProto,
        scope: &Scope<'_>,
        context: &Context<'a>,
        node: &Node,
    ) -> Result<Option<Attr>> {
        if !proto.ref_attr_name.is_empty() {
            let Some(attributes) = &context.attributes else {
                return Err(node.error(format!("refers to the attribute `{}` outside a function", proto.ref_attr_name)));
            };
            return Ok(attributes.get(proto.ref_attr_name.as_str()).cloned());
        }
        let missing = || node.error(format!("has the attribute `{}` without its value", proto.name));
        Ok(Some(match kind(proto) {
            1 => Attr::Float(proto.f.unwrap_or_default()),
            2 => Attr::Int(proto.i.unwrap_or_default()),
            3 => Attr::Str(proto.s.clone().unwrap_or_default()),
            4 => Attr::Tensor(tensor::get(proto.t.as_ref().ok_or_else(missing)?, &self.files)?),
            5 => Attr::Graph(Box::new(self.body(
                proto.g.as_ref().ok_or_else(missing)?,
                scope,
                context,
                node,
                &proto.name,
            )?)),
            6 => Attr::Floats(proto.floats.clone()),
            7 => Attr::Ints(proto.ints.clone()),
            8 => Attr::Strings,
            _ => Attr::Other,
        }))
    }

    /// A body of `If`, `Loop` or `Scan`: it sees its own names, then those around it.
    fn body(
        &mut self,
        graph: &'a proto::GraphProto,
        around: &Scope<'_>,
        context: &Context<'a>,
        node: &Node,
        attribute: &str,
    ) -> Result<SubGraph> {
        let mut scope = Scope { around: Some(around), ..Scope::default() };
        let inner = Context {
            prefix: format!("{}/{attribute}/", node.name),
            attributes: context.attributes.clone(),
            calls: context.calls.clone(),
            depth: context.depth.saturating_add(1),
            opset: context.opset,
        };
        let initializers = self.initializers(&graph.initializer, &mut scope, &inner)?;
        let mut inputs = Vec::with_capacity(graph.input.len());
        for value in &graph.input {
            inputs.push(self.define(&value.name, &mut scope, &inner)?);
        }
        let nodes = self.nodes(&graph.node, &mut scope, &inner)?;
        let mut outputs = Vec::with_capacity(graph.output.len());
        for value in &graph.output {
            let found = scope.find(&value.name);
            outputs.push(found.ok_or_else(|| {
                node.error(format!("nothing makes the output `{}` of its body `{attribute}`", value.name))
            })?);
        }
        Ok(SubGraph { inputs, outputs, initializers, nodes: sort::sort(nodes)? })
    }
}

/// The operation that the PyTorch exporter traced here: `torch.ops.aten.gelu.default`.
fn record(proto: &proto::NodeProto) -> Option<String> {
    let note = proto.metadata_props.iter().find(|note| note.key == "pkg.torch.onnx.fx_node")?;
    let text = String::from_utf8_lossy(note.value.get(..note.value.len().min(500))?).into_owned();
    let (_, rest) = text.split_once("target=")?;
    rest.split([']', '(', ',', ' ']).next().map(str::to_owned)
}

/// The kind of an attribute: as declared, or, in old files that leave it out, by the field that is filled.
fn kind(proto: &proto::AttributeProto) -> i32 {
    if proto.r#type != 0 {
        return proto.r#type;
    }
    let filled = [
        (proto.f.is_some(), 1),
        (proto.i.is_some(), 2),
        (proto.s.is_some(), 3),
        (proto.t.is_some(), 4),
        (proto.g.is_some(), 5),
        (!proto.floats.is_empty(), 6),
        (!proto.ints.is_empty(), 7),
        (!proto.strings.is_empty(), 8),
    ];
    filled.iter().find(|(there, _)| *there).map_or(0, |(_, kind)| *kind)
}

/// Brings the value of a `Constant` into its attribute `value`, whichever of the six attributes the file uses.
fn constant(node: &mut Node) -> Result<()> {
    let scalar = |dtype, bytes: &[u8]| Tensor { dtype, dims: Vec::new(), data: Bytes::copy_from_slice(bytes).into() };
    let list = |dtype, count, data: Vec<u8>| Tensor { dtype, dims: vec![count], data: data.into() };
    if node.attrs.len() != 1 {
        return Err(node.error(format!("needs exactly one attribute, found {}", node.attrs.len())));
    }
    let Some((name, attr)) = node.attrs.pop_first() else { return Ok(()) };
    let (name, attr) = match (name.as_str(), attr) {
        ("value", attr @ Attr::Tensor(_)) => ("value", attr),
        ("value_float", Attr::Float(v)) => ("value", Attr::Tensor(scalar(DType::F32, &v.to_le_bytes()))),
        ("value_int", Attr::Int(v)) => ("value", Attr::Tensor(scalar(DType::I64, &v.to_le_bytes()))),
        ("value_floats", Attr::Floats(v)) => {
            ("value", Attr::Tensor(list(DType::F32, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect())))
        }
        ("value_ints", Attr::Ints(v)) => {
            ("value", Attr::Tensor(list(DType::I64, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect())))
        }
        ("value_string", attr @ Attr::Str(_)) => ("value_string", attr),
        ("value_strings", attr @ Attr::Strings) => ("value_strings", attr),
        (other, _) => return Err(node.error(format!("has a value of a kind that cannot be read: `{other}`"))),
    };
    node.attrs.insert(name.to_owned(), attr);
    Ok(())
}
