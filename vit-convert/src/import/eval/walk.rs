//! The state of a walk: the expressions made so far, the value of every edge, and the obstacles.

use super::value::Value;
use crate::import::expr::{Exprs, Id};
use crate::onnx::graph::{Graph, Node, ValueId};

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
    /// The relative error that a constant such as 1.702 may have.
    pub tolerance: f64,
    /// The file leaves the size of the image open, and this one is tried.
    pub guessed: bool,
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
    /// Every node that was evaluated, in order: the index is [`crate::import::expr::Expr::born`] less one.
    pub visited: Vec<&'g Node>,
    /// Why the result only approximates the file, if it does.
    pub approximate: Vec<String>,
    pub(crate) batch: usize,
    pub(super) guessed: bool,
    pub(super) values: Vec<Value>,
}

impl Walk<'_> {
    /// The value of an edge.
    pub fn value(&self, id: ValueId) -> &Value {
        self.values.get(id as usize).unwrap_or(&Value::None)
    }

    pub(super) fn set(&mut self, id: ValueId, value: Value) {
        if let Some(slot) = self.values.get_mut(id as usize) {
            *slot = value;
        }
    }
}
