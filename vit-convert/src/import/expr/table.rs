//! The table of all expressions: each is stored once, so that equal expressions have equal ids.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use super::op::{Expr, Id, Op};

/// All expressions of a graph.
pub struct Exprs {
    list: Vec<Expr>,
    table: HashMap<u64, Vec<Id>>,
    hasher: RandomState,
    /// The node being evaluated, for [`Expr::born`].
    pub node: u32,
    /// The relative error that a constant such as 1.702 may have.
    pub tolerance: f64,
}

impl Exprs {
    /// None yet.
    pub fn new(tolerance: f64) -> Self {
        Self { list: Vec::new(), table: HashMap::new(), hasher: RandomState::new(), node: 0, tolerance }
    }

    /// An expression by its id.
    pub fn get(&self, id: Id) -> &Expr {
        &self.list[id as usize]
    }

    /// What an expression computes.
    pub fn op(&self, id: Id) -> &Op {
        &self.get(id).op
    }

    /// An argument.
    pub fn arg(&self, id: Id, k: usize) -> Id {
        self.get(id).args[k]
    }

    /// Sizes of the base axes.
    pub fn shape(&self, id: Id) -> &[usize] {
        &self.get(id).shape
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// The expression, made or found.
    pub fn make(&mut self, op: Op, args: Vec<Id>, shape: Vec<usize>) -> Id {
        let hash = self.hasher.hash_one((&op, &args, &shape));
        let bucket = self.table.entry(hash).or_default();
        for &id in bucket.iter() {
            let e = &self.list[id as usize];
            if e.args == args && e.shape == shape && e.op == op {
                return id;
            }
        }
        let id = self.list.len() as Id;
        bucket.push(id);
        self.list.push(Expr { op, args, shape, born: self.node });
        id
    }

    pub(super) fn same_shape(&mut self, op: Op, x: Id) -> Id {
        let shape = self.shape(x).to_vec();
        self.make(op, vec![x], shape)
    }

    pub(super) fn pair(&mut self, op: Op, a: Id, b: Id) -> Id {
        let (a, b) = (a.min(b), a.max(b));
        let shape = self.shape(a).iter().zip(self.shape(b)).map(|(x, y)| *x.max(y)).collect();
        self.make(op, vec![a, b], shape)
    }

    /// `|a - b|` is within the tolerance of `b`.
    pub fn near(&self, a: f64, b: f64) -> bool {
        (a - b).abs() <= self.tolerance * b.abs()
    }
}
