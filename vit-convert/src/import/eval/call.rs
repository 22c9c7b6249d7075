//! A node that is about to be evaluated: the values of its inputs, and its attributes by type.

use super::value::{Rule, Value};
use crate::onnx::graph::{Attr, Node};

const ABSENT: &Value = &Value::None;

/// A node with the values of its inputs.
pub(crate) struct Call<'a> {
    pub node: &'a Node,
    pub inputs: Vec<Value>,
}

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
