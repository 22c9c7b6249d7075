//! Topological order of nodes. The sort is stable, so an ordered list does not change.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap},
};

use crate::{
    Result,
    onnx::graph::{Attr, Node, SubGraph, ValueId},
};

/// Orders nodes by Kahn's algorithm; a cycle is an error that names a node on it.
pub fn sort(nodes: Vec<Node>) -> Result<Vec<Node>> {
    let mut maker: HashMap<ValueId, usize> = HashMap::new();
    for (at, node) in nodes.iter().enumerate() {
        maker.extend(node.outputs.iter().flatten().map(|&id| (id, at)));
    }
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut waiting: Vec<usize> = Vec::with_capacity(nodes.len());
    for (at, node) in nodes.iter().enumerate() {
        let makers: BTreeSet<usize> = reads(node).iter().filter_map(|id| maker.get(id)).copied().collect();
        for &from in &makers {
            if let Some(list) = readers.get_mut(from) {
                list.push(at);
            }
        }
        waiting.push(makers.len());
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        waiting.iter().enumerate().filter(|(_, n)| **n == 0).map(|(at, _)| Reverse(at)).collect();
    let mut slots: Vec<Option<Node>> = nodes.into_iter().map(Some).collect();
    let mut sorted = Vec::with_capacity(slots.len());
    while let Some(Reverse(at)) = ready.pop() {
        sorted.extend(slots.get_mut(at).and_then(Option::take));
        for &reader in readers.get(at).into_iter().flatten() {
            if let Some(count) = waiting.get_mut(reader) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    ready.push(Reverse(reader));
                }
            }
        }
    }
    match on_cycle(&slots, &maker) {
        Some(node) => Err(node.error("stands in a cycle: it needs its own result")),
        None => Ok(sorted),
    }
}

/// One node on a cycle, among the nodes that could not be ordered: following inputs upwards long enough ends on a
/// cycle.
fn on_cycle<'a>(left: &'a [Option<Node>], maker: &HashMap<ValueId, usize>) -> Option<&'a Node> {
    let mut at = left.iter().position(Option::is_some)?;
    for _ in 0..left.len() {
        let node = left.get(at)?.as_ref()?;
        let back = reads(node)
            .into_iter()
            .find_map(|id| maker.get(&id).filter(|&&m| left.get(m).is_some_and(Option::is_some)));
        at = *back?;
    }
    left.get(at)?.as_ref()
}

/// Everything that a node reads, the bodies in its attributes included.
fn reads(node: &Node) -> BTreeSet<ValueId> {
    let mut all: BTreeSet<ValueId> = node.inputs.iter().flatten().copied().collect();
    let mut bodies: Vec<&SubGraph> = Vec::new();
    fn body(attr: &Attr) -> Option<&SubGraph> {
        if let Attr::Graph(body) = attr { Some(body) } else { None }
    }
    bodies.extend(node.attrs.values().filter_map(body));
    while let Some(sub) = bodies.pop() {
        all.extend(&sub.outputs);
        for node in &sub.nodes {
            all.extend(node.inputs.iter().flatten());
            bodies.extend(node.attrs.values().filter_map(body));
        }
    }
    all
}
