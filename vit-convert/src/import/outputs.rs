//! Which output of a graph is the model's answer, and what every other output is.
//!
//! The answer is the output of the highest [`Kind`]: class scores or a projected embedding, then a pooled vector, then
//! tokens. Every other output must be a part of that model, or a function of its answer. A graph with two answers, or with
//! an output that is not understood, is refused unless the caller names the output to convert.

use std::collections::{HashMap, HashSet};

use vit_model::Config;
use vit_model::config::Pool;

use super::{born, contradiction, explain_refusal, modules, obstacle};
use crate::import::eval::{Value, Walk};
use crate::import::expr::{Head, Id, Op};
use crate::import::recognise::{Parts, recognise};
use crate::import::spec::{Evidence, Module};
use crate::onnx::graph::{Attr, Node, ValueId};
use crate::{Error, Result};

/// The model in one output of a graph.
pub(super) struct Found {
    pub parts: Parts,
    pub output: String,
    /// The other outputs, and what they are.
    pub ignored: Vec<String>,
    /// The names of those that are parts of the model.
    pub outputs: Vec<String>,
    pub evidence: Vec<Evidence>,
    pub modules: Vec<Module>,
    pub approximate: Vec<String>,
}

/// How much of a model an output contains.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Tokens,
    Pooled,
    Head,
}

impl Kind {
    fn of(config: &Config) -> Self {
        match config {
            Config { num_classes: 1.., .. } => Self::Head,
            Config { global_pool: Pool::None, .. } => Self::Tokens,
            _ => Self::Pooled,
        }
    }
}

/// An answer in a few words, for a message.
fn describe(parts: &Parts) -> String {
    let config = &parts.config;
    let plain = match Kind::of(config) {
        Kind::Head if config.num_classes == 1 => "a head of one class".into(),
        Kind::Head if config.head_bias => format!("a head of {} classes", config.num_classes),
        Kind::Head => format!("a projection to {} values", config.num_classes),
        Kind::Pooled => "the pooled vector".into(),
        Kind::Tokens if config.final_norm => "the tokens".into(),
        Kind::Tokens => format!("the tokens after block {}", config.depth.saturating_sub(1)),
    };
    if parts.heads.contains(&Head::Unit) { format!("{plain}, of unit length") } else { plain }
}

/// The model's answer among the outputs of a graph, or the output that `wanted` names.
pub(super) fn best(walk: Walk<'_>, half: bool, wanted: Option<&str>) -> Result<Found> {
    let mut found: Vec<Result<Parts>> = Vec::new();
    for output in &walk.graph.outputs {
        found.push(match walk.value(output.id) {
            Value::View(v) => recognise(&walk, v, half).map_err(|r| explain_refusal(&walk, v, &r)),
            Value::Opaque(o) => Err(obstacle(&walk, *o)),
            _ => Err(Error::graph(format!("the output `{}` does not depend on the image", walk.graph.name(output.id)))),
        });
    }
    let name = |k: usize| walk.graph.outputs.get(k).map(|o| walk.graph.name(o.id)).unwrap_or_default();
    let chosen = match wanted {
        Some(wanted) => (0..found.len()).find(|&k| name(k) == wanted).ok_or_else(|| {
            let names: Vec<String> = (0..found.len()).map(|k| format!("`{}`", name(k))).collect();
            Error::graph(format!("--output {wanted}: the graph has no such output; it has {}", names.join(", ")))
        })?,
        None => match highest(&found) {
            Some(chosen) => chosen,
            None => return Err(first_refusal(found)),
        },
    };
    let Some(Ok(parts)) = found.get(chosen) else {
        return Err(found.swap_remove(chosen).err().unwrap_or_else(|| Error::graph("the graph has no output")));
    };
    contradiction(&walk, parts)?;
    let model = Model::new(&walk, parts);
    let (mut ignored, mut outputs) = (Vec::new(), Vec::new());
    for (k, other) in found.iter().enumerate().filter(|(k, _)| *k != chosen) {
        let id = walk.graph.outputs.get(k).map(|o| o.id).unwrap_or_default();
        let what = match other {
            Ok(other) => model.part(other),
            Err(_) => model.derived(id),
        };
        let what = match what {
            Some(what) => what,
            None if wanted.is_some() => "another answer, which is not converted".into(),
            None => return Err(several(name(chosen), parts, name(k), other)),
        };
        ignored.push(format!("output `{}`: {what}", name(k)));
        if other.is_ok() {
            outputs.push(name(k).to_string());
        }
    }
    let mut evidence = Vec::new();
    for (what, e) in &parts.evidence {
        if let Some(node) = born(&walk, *e) {
            evidence.push(Evidence { what: what.clone(), node: node.name.clone(), op: node.operator() });
        }
    }
    let (output, modules) = (name(chosen).to_string(), modules(&walk, parts));
    let parts = found.swap_remove(chosen)?;
    let mut approximate = walk.approximate;
    approximate.extend(parts.rounded.iter().cloned());
    Ok(Found { parts, output, ignored, outputs, evidence, modules, approximate })
}

/// The output of the highest kind; among equals the one with the most tensors, then with the most steps on top.
fn highest(found: &[Result<Parts>]) -> Option<usize> {
    let mut best: Option<(usize, (Kind, usize, usize))> = None;
    for (k, parts) in found.iter().enumerate().filter_map(|(k, found)| Some((k, found.as_ref().ok()?))) {
        let rank = (Kind::of(&parts.config), parts.tensors.len(), parts.heads.len());
        if best.is_none_or(|(_, other)| rank > other) {
            best = Some((k, rank));
        }
    }
    best.map(|(k, _)| k)
}

/// Of several refusals, the one that helps most: the first that names a node.
fn first_refusal(found: Vec<Result<Parts>>) -> Error {
    let mut refusals: Vec<Error> = found.into_iter().filter_map(Result::err).collect();
    if refusals.is_empty() {
        return Error::graph("the graph has no output");
    }
    let named = refusals.iter().position(|e| matches!(e, Error::Node { .. })).unwrap_or(0);
    refusals.swap_remove(named)
}

/// The refusal of a graph with two answers, or with an output that is not understood.
fn several(name: &str, parts: &Parts, other: &str, found: &Result<Parts>) -> Error {
    Error::graph(match found {
        Ok(found) => format!(
            "the graph has several answers, and a converted model has one: `{name}` is {}, `{other}` is {}; choose with --output {name} or \
             --output {other}",
            describe(parts),
            describe(found)
        ),
        Err(why) => format!(
            "the output `{other}` is not understood, and it may be the answer: {why}. `{name}` is {}; --output {name} converts \
             it without `{other}`",
            describe(parts)
        ),
    })
}

/// The expressions of the chosen answer, against which other outputs are compared.
struct Model<'w, 'g> {
    walk: &'w Walk<'g>,
    parts: &'w Parts,
    /// Everything that the answer is computed from, itself included; not the image.
    inside: HashSet<Id>,
}

impl<'w, 'g> Model<'w, 'g> {
    fn new(walk: &'w Walk<'g>, parts: &'w Parts) -> Self {
        let mut inside = HashSet::new();
        let mut todo = vec![parts.top];
        while let Some(e) = todo.pop() {
            if !matches!(walk.x.op(e), Op::Input | Op::Raw) && inside.insert(e) {
                todo.extend(&walk.x.get(e).args);
            }
        }
        Self { walk, parts, inside }
    }

    /// What another recognised output is, if it is a part of this model.
    fn part(&self, other: &Parts) -> Option<String> {
        if (other.core, other.sel) == (self.parts.core, self.parts.sel) {
            return Some("the same answer".into());
        }
        let below = Kind::of(&other.config) < Kind::of(&self.parts.config);
        let same = |(name, array)| self.parts.tensors.get(name) == Some(array);
        // of one expression, other tokens may be another answer: a head over each of them
        let inside = other.core != self.parts.core && self.inside.contains(&other.core);
        let part = inside || below && other.tensors.iter().all(same);
        part.then(|| describe(other))
    }

    /// Whether an expression is the softmax of scores that this model computes. Attention is one expression of queries, keys
    /// and values, so its softmax is none of the model's own.
    fn is_attention(&self, e: Id) -> bool {
        let x = &self.walk.x;
        let (softmax, _) = x.scaled(e);
        if *x.op(softmax) != Op::Softmax {
            return false;
        }
        let (scores, _) = x.scaled(x.arg(softmax, 0));
        let part = |e: &Id| self.inside.contains(&x.scaled(*e).0);
        matches!(x.op(scores), Op::Scores { .. }) && x.get(scores).args.iter().all(part)
    }

    /// What an output that is no model is, if it is a value inside of this model or a function of its answer.
    fn derived(&self, output: ValueId) -> Option<String> {
        let view = |id: ValueId| match self.walk.value(id) {
            Value::View(v) => Some(v.e),
            _ => None,
        };
        if matches!(self.walk.value(output), Value::Const(_)) {
            return Some("a constant".into());
        }
        if let Some(e) = view(output)
            && self.inside.contains(&self.walk.x.scaled(e).0)
        {
            let module = self.parts.owners.get(&e).map(|module| format!(" of `{module}`")).unwrap_or_default();
            return Some(format!("an intermediate value{module}"));
        }
        if view(output).is_some_and(|e| self.is_attention(e)) {
            return Some("the attention weights of a block".into());
        }
        let makers: HashMap<ValueId, &Node> =
            self.walk.visited.iter().flat_map(|node| node.outputs.iter().flatten().map(|&id| (id, *node))).collect();
        // the values of this model that the output is computed from
        let mut todo = vec![output];
        let mut seen: HashSet<ValueId> = HashSet::new();
        let mut from = HashSet::new();
        while let Some(id) = todo.pop() {
            if !seen.insert(id) {
                continue;
            }
            if let Some(e) = view(id)
                && self.inside.contains(&e)
            {
                from.insert(e);
                continue;
            }
            let branches = |node: &&Node| node.attrs.values().any(|attr| matches!(attr, Attr::Graph(_)));
            let node = makers.get(&id);
            if self.walk.graph.inputs.iter().any(|input| input.id == id) || node.is_some_and(branches) {
                return None;
            }
            todo.extend(node.iter().flat_map(|node| node.inputs.iter().flatten()));
        }
        let attention = |e: &Id| self.walk.x.shape(*e).len() == 4;
        if from.is_empty() {
            return None;
        } else if from.iter().all(|&e| e == self.parts.core || e == self.parts.top) {
            return Some("a function of the answer".into());
        }
        from.iter().all(attention).then(|| "a function of the attention weights".into())
    }
}
