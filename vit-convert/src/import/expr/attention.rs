//! Attention: scores of queries and keys, and the mix of values by their softmax.

use super::op::{Id, Number, Op};
use super::table::Exprs;

impl Exprs {
    /// `q kᵀ` per head, the scales of both outside.
    pub fn scores(&mut self, q: Id, k: Id, heads: usize) -> Id {
        let ((q, s), (k, t)) = (self.scaled(q), self.scaled(k));
        let (a, b) = (self.shape(q), self.shape(k));
        let shape = vec![a[0].max(b[0]), heads, a[1], b[1]];
        let scores = self.make(Op::Scores { heads }, vec![q, k], shape);
        self.scale(scores, s * t)
    }

    /// `softmax(scale · q kᵀ) v`, all operands `[batch, tokens, heads · head_dim]`.
    pub fn attention(&mut self, p: Id, v: Id, heads: usize) -> Option<Id> {
        if *self.op(p) != Op::Softmax {
            return None;
        }
        let (s, scale) = self.scaled(self.arg(p, 0));
        if *self.op(s) != (Op::Scores { heads }) {
            return None;
        }
        let (q, k) = (self.arg(s, 0), self.arg(s, 1));
        let (a, b) = (self.shape(q).to_vec(), self.shape(v).to_vec());
        let shape = vec![a[0].max(b[0]), a[1], b[2]];
        Some(self.make(Op::Attn { heads, scale: Number(scale) }, vec![q, k, v], shape))
    }
}
