//! Tokens and channels: joining them and selecting some, pushed down to the parameters that make them.

use std::sync::Arc;

use super::op::{Constant, Id, Op};
use super::table::Exprs;
use crate::import::array::Array;
use crate::import::axes::Pick;

/// The largest number of expressions that a selection of channels is pushed through.
const TAKE_DEPTH: usize = 64;

/// The largest number of parts of a `Cat`.
const CAT_LIMIT: usize = 256;

impl Exprs {
    /// Concatenated tokens.
    pub fn cat(&mut self, parts: Vec<Id>) -> Result<Id, String> {
        let mut flat = Vec::with_capacity(parts.len());
        for p in parts {
            if *self.op(p) == Op::Cat { flat.extend_from_slice(&self.get(p).args) } else { flat.push(p) }
        }
        if flat.len() > CAT_LIMIT {
            return Err(format!("over {CAT_LIMIT} pieces are joined"));
        }
        let &[first, ..] = &flat[..] else { return Err("nothing to join".into()) };
        if flat.len() == 1 {
            return Ok(first);
        }
        let mut shape = vec![0, 0, 0];
        for &p in &flat {
            let &[b, t, c] = self.shape(p) else { return Err("pieces of odd rank are joined".into()) };
            shape = vec![shape[0].max(b), shape[1] + t, shape[2].max(c)];
        }
        Ok(self.make(Op::Cat, flat, shape))
    }

    /// `n` tokens from `start`.
    pub fn select(&mut self, e: Id, start: usize, n: usize) -> Result<Id, String> {
        if start == 0 && n == self.shape(e)[1] {
            return Ok(e);
        }
        let mut shape = self.shape(e).to_vec();
        shape[1] = n;
        match self.get(e).op.clone() {
            Op::Scale(s) => {
                let x = self.arg(e, 0);
                let x = self.select(x, start, n)?;
                Ok(self.scale(x, s.0))
            }
            Op::Cat => {
                let mut parts = Vec::new();
                let mut at = 0;
                for p in self.get(e).args.clone() {
                    let len = self.shape(p)[1];
                    let (lo, hi) = (start.max(at), (start + n).min(at + len));
                    if lo < hi {
                        parts.push(self.select(p, lo - at, hi - lo)?);
                    }
                    at += len;
                }
                self.cat(parts)
            }
            Op::Param(v) => {
                let v = v.pick(1, &Pick::range(start, n)).ok_or("tokens of a parameter")?;
                Ok(self.make(Op::Param(Arc::new(v)), Vec::new(), shape))
            }
            _ => Ok(self.make(Op::Sel { start }, vec![e], shape)),
        }
    }

    /// `x Wᵀ + b`.
    pub fn linear(&mut self, x: Id, weight: Array, bias: Option<Constant>) -> Id {
        let mut shape = self.shape(x).to_vec();
        if let Some(last) = shape.last_mut() {
            *last = weight.dim(0);
        }
        self.make(Op::Linear { weight: Arc::new(weight), bias }, vec![x], shape)
    }

    /// Some channels of `e`, as rows of the linear that makes them; `None` if no linear does.
    pub fn take(&mut self, e: Id, pick: &Pick) -> Option<Id> {
        // go down to the linear, cut it, and rebuild the expressions above it
        let mut path = Vec::new();
        let mut at = e;
        let (n, len) = (*self.shape(e).last()?, pick.len());
        if pick.is_identity(n) {
            return Some(e);
        }
        if self.shape(e).len() != 3 || len == 0 {
            return None;
        }
        while matches!(self.op(at), Op::Sel { .. } | Op::AddC(_) | Op::MulC(_) | Op::Scale(_) | Op::Norm { .. }) {
            path.push(at);
            at = self.arg(at, 0);
            if path.len() > TAKE_DEPTH {
                return None;
            }
        }
        let mut shape = self.shape(at).to_vec();
        shape[2] = len;
        let mut out = match self.get(at).op.clone() {
            Op::Linear { weight, bias } => {
                let weight = Arc::new(weight.pick(0, pick)?);
                let bias = match bias {
                    Some(b) => Some(Arc::new(b.pick(0, pick)?)),
                    None => None,
                };
                let args = self.get(at).args.clone();
                self.make(Op::Linear { weight, bias }, args, shape)
            }
            Op::Param(v) => {
                let v = v.pick(2, pick)?;
                self.make(Op::Param(Arc::new(v)), Vec::new(), shape)
            }
            _ => return None,
        };
        while let Some(id) = path.pop() {
            let channels = |c: &Array| if c.dim(2) == 1 { Some(c.clone()) } else { c.pick(2, pick) };
            out = match self.get(id).op.clone() {
                Op::Sel { start } => {
                    let n = self.shape(id)[1];
                    self.select(out, start, n).ok()?
                }
                Op::AddC(c) => self.add_c(out, &channels(&c)?).ok()?,
                Op::MulC(c) => self.mul_c(out, &channels(&c)?),
                Op::Scale(s) => self.scale(out, s.0),
                // whole groups, each in its order
                Op::Norm { eps, gain, bias, group } if whole_groups(pick, group) => {
                    self.same_shape(Op::Norm { eps, gain, bias, group }, out)
                }
                _ => return None,
            };
        }
        Some(out)
    }

    /// The channels of several expressions side by side, if they are linears over one input or attentions over the same
    /// tokens. The weights are joined row by row.
    pub fn beside(&mut self, parts: &[Id]) -> Option<Id> {
        let &[first, ..] = parts else { return None };
        let e = self.get(first).clone();
        let channels = parts.iter().try_fold(0usize, |n, &p| n.checked_add(*self.shape(p).last()?))?;
        let mut shape = e.shape.clone();
        *shape.last_mut()? = channels;
        for &p in parts {
            let (a, b) = (self.shape(p), &e.shape);
            if a.len() != 3 || a[..2] != b[..2] || self.get(p).args.len() != e.args.len() {
                return None;
            }
        }
        match &e.op {
            Op::Linear { bias, .. } => {
                let (mut weights, mut biases) = (Vec::new(), Vec::new());
                for &p in parts {
                    let Op::Linear { weight, bias: b } = self.op(p) else { return None };
                    if self.get(p).args != e.args || b.is_some() != bias.is_some() {
                        return None;
                    }
                    weights.push((**weight).clone());
                    biases.extend(b.as_deref().cloned());
                }
                let weight = Arc::new(Array::concat(&weights, 0).ok()?);
                let bias = match bias {
                    Some(_) => Some(Arc::new(Array::concat(&biases, 0).ok()?)),
                    None => None,
                };
                Some(self.make(Op::Linear { weight, bias }, e.args, shape))
            }
            Op::Sel { start } => {
                let start = *start;
                if parts.iter().any(|&p| *self.op(p) != (Op::Sel { start })) {
                    return None;
                }
                let inner: Vec<Id> = parts.iter().map(|&p| self.arg(p, 0)).collect();
                let whole = self.beside_leaf(&inner)?;
                self.select(whole, start, shape[1]).ok()
            }
            Op::Attn { scale, .. } => {
                let scale = *scale;
                let mut heads = 0usize;
                let mut operands = [Vec::new(), Vec::new(), Vec::new()];
                for &p in parts {
                    let Op::Attn { heads: h, scale: s } = *self.op(p) else { return None };
                    if !self.near(s.0, scale.0) {
                        return None;
                    }
                    heads = heads.checked_add(h)?;
                    for (list, &arg) in operands.iter_mut().zip(&self.get(p).args) {
                        list.push(arg);
                    }
                }
                let [q, k, v] = &operands;
                let args = vec![self.beside_leaf(q)?, self.beside_leaf(k)?, self.beside_leaf(v)?];
                let per_head = |n: usize| n.is_multiple_of(heads).then_some(n / heads);
                let (d, _) = (per_head(self.shape(args[0])[2])?, per_head(channels)?);
                // all parts must have the same head width, because the joined heads are split evenly
                if parts.iter().any(
                    |&p| matches!(*self.op(p), Op::Attn { heads: h, .. } if self.shape(self.arg(p, 0))[2] != h * d),
                ) {
                    return None;
                }
                Some(self.make(Op::Attn { heads, scale }, args, shape))
            }
            _ => None,
        }
    }

    /// Like [`Exprs::beside`], for operands: linears, or a selection of their tokens.
    fn beside_leaf(&mut self, parts: &[Id]) -> Option<Id> {
        let mut core = Vec::with_capacity(parts.len());
        let start = match *self.op(*parts.first()?) {
            Op::Sel { start } => Some((start, self.shape(parts[0])[1])),
            _ => None,
        };
        for &p in parts {
            match (self.op(p), start) {
                (Op::Linear { .. }, None) => core.push(p),
                (Op::Sel { start: at }, Some((s, n))) if *at == s && self.shape(p)[1] == n => {
                    let inner = self.arg(p, 0);
                    if !matches!(self.op(inner), Op::Linear { .. }) {
                        return None;
                    }
                    core.push(inner);
                }
                _ => return None,
            }
        }
        if core.iter().any(|&p| !matches!(self.op(p), Op::Linear { .. })) {
            return None;
        }
        let whole = self.beside(&core)?;
        match start {
            Some((s, n)) => self.select(whole, s, n).ok(),
            None => Some(whole),
        }
    }
}

/// Does the pick take whole groups of neighbours, each in order?
fn whole_groups(pick: &Pick, group: usize) -> bool {
    let Some(&(stride, size)) = pick.digits.last() else { return group == 1 };
    let outer = &pick.digits[..pick.digits.len() - 1];
    pick.offset.is_multiple_of(group) && stride == 1 && size % group == 0 && outer.iter().all(|d| d.0 % group == 0)
        || group == 1
}
