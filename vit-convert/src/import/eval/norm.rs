//! Reductions, norms and softmax.

use std::sync::Arc;

use super::call::Call;
use super::fold;
use super::value::{Rule, Value, View, axis_in, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::import::axes::{self, Dim};
use crate::import::expr::{Head, Id, Number, Op, PoolKind};

impl Walk<'_> {
    pub(super) fn reduction(&mut self, call: &Call<'_>) -> Rule<Value> {
        let v = call.get(0).view("the operand")?.clone();
        let list = call.list("axes", 1)?.filter(|l| !l.is_empty());
        if list.is_none() && call.int("noop_with_empty_axes", 0)? != 0 {
            return Ok(v.into());
        }
        let which = match list {
            Some(list) => list.into_iter().map(|a| axis_in(a, v.rank())).collect::<Rule<Vec<_>>>()?,
            None => (0..v.rank()).collect(),
        };
        let keep = call.int("keepdims", 1)? != 0;
        let square = |walk: &mut Self, v: &View| v.of(walk.x.pow(v.e, 2.0));
        match call.node.op.as_str() {
            "ReduceMean" => self.reduce(&v, &which, keep, Reduce::Mean),
            "ReduceSum" => self.reduce(&v, &which, keep, Reduce::Sum),
            "ReduceMax" => self.reduce(&v, &which, keep, Reduce::Max),
            "ReduceSumSquare" => {
                let v = square(self, &v);
                self.reduce(&v, &which, keep, Reduce::Sum)
            }
            _ => {
                let v = square(self, &v);
                let sum = self.reduce(&v, &which, keep, Reduce::Sum)?;
                Ok(sum.of(self.x.pow(sum.e, 0.5)))
            }
        }
        .map(Value::from)
    }

    /// A reduction over whole groups of one axis.
    pub(super) fn reduce(&mut self, v: &View, which: &[usize], keep: bool, how: Reduce) -> Rule<View> {
        need!(!matches!(self.x.op(v.e), Op::Raw | Op::Out(_)), "a reduction of the pixels or of the answers");
        let mut order = which.to_vec();
        order.sort_unstable();
        order.dedup();
        let mut over: Dim = axes::digits(order.iter().map(|&k| &v.dims[k]));
        over.sort_by_key(|d| (d.axis, std::cmp::Reverse(d.stride)));
        let over = axes::join(&over);
        let dims: Vec<Dim> = (v.dims.iter().enumerate())
            .filter(|(k, _)| keep || !order.contains(k))
            .map(|(k, d)| if order.contains(&k) { Dim::new() } else { d.clone() })
            .collect();
        let shape = self.x.shape(v.e).to_vec();
        let [d] = over[..] else {
            need!(over.is_empty(), "a reduction over several axes at once");
            return Ok(v.with(dims)); // over axes of size 1
        };
        let axis = usize::from(d.axis);
        let channels = shape.len() == 3 && d.axis == 2 && d.stride == 1 && shape[2].is_multiple_of(d.size);
        let keys = shape.len() == 4 && d.axis == 3 && d.stride == 1 && shape[3] == d.size && self.of_scores(v.e);
        if channels || keys {
            let e = match how {
                Reduce::Mean => self.x.mean(v.e, d.axis, d.size),
                Reduce::Sum => {
                    let mean = self.x.mean(v.e, d.axis, d.size);
                    self.x.scale(mean, d.size as f64)
                }
                Reduce::Max => {
                    need!(d.size == shape[axis], "the maximum of a part of the channels");
                    self.x.make(Op::Max { axis: d.axis }, vec![v.e], shape)
                }
            };
            return Ok(View { e, dims, sel: v.sel });
        }
        let (lo, n) = v.sel.unwrap_or((0, shape.get(1).copied().unwrap_or(0)));
        need!(shape.len() == 3 && over == axes::axis(1, n), "a reduction over something else than tokens or channels");
        let (kind, factor) = match how {
            Reduce::Mean => (PoolKind::Mean, 1.0),
            Reduce::Sum => (PoolKind::Mean, n as f64),
            Reduce::Max => (PoolKind::Max, 1.0),
        };
        // a factor can be taken out of a mean, but only a positive one out of a maximum
        let (core, s) = self.x.scaled(v.e);
        need!(how != Reduce::Max || s > 0.0, "the maximum of negated tokens");
        let pool = self.x.make(Op::Pool { kind, lo, n }, vec![core], vec![shape[0], 1, shape[2]]);
        let e = self.x.scale(pool, s * factor);
        Ok(View { e, dims, sel: None })
    }

    pub(super) fn global_pool(&mut self, call: &Call<'_>) -> Rule<Value> {
        let v = call.get(0).view("the operand")?.clone();
        need!(v.rank() >= 3, "{} of rank {}", call.node.op, v.rank());
        let which: Vec<usize> = (2..v.rank()).collect();
        let how = if call.node.op == "GlobalMaxPool" { Reduce::Max } else { Reduce::Mean };
        self.reduce(&v, &which, true, how).map(Value::from)
    }

    /// A LayerNorm over the last dimensions.
    pub(super) fn normed(
        &mut self,
        v: &View,
        which: &[usize],
        eps: f64,
        gain: Option<&Array>,
        bias: Option<&Array>,
    ) -> Rule<View> {
        let over = axes::join(&axes::digits(which.iter().map(|&k| &v.dims[k])));
        let shape = self.x.shape(v.e).to_vec();
        need!(shape.len() == 3, "a norm over something else than tokens");
        let group = match over[..] {
            [d] if d.axis == 2 && d.stride == 1 && shape[2].is_multiple_of(d.size) => d.size,
            [] if shape[2] == 1 || v.dims.iter().flatten().any(|d| d.axis == 2 && d.stride == 1) => 1,
            _ => return Err("a norm over something else than channels".into()),
        };
        for c in gain.iter().chain(bias.iter()) {
            need!(
                c.len() == group && c.dtype.is_float(),
                "a norm over {group} channels with weights of shape {:?}",
                c.shape()
            );
        }
        let flat = |c: Option<&Array>| c.and_then(|c| c.reshape(&[group])).map(Arc::new);
        let (gain, bias) = (flat(gain), flat(bias));
        let op = Op::Norm { eps: Number(eps), gain, bias, group };
        Ok(v.of(self.x.make(op, vec![v.e], shape)))
    }

    pub(super) fn layer_norm(&mut self, call: &Call<'_>) -> Rule {
        let v = call.get(0).view("the operand")?.clone();
        let axis = axis_in(call.int("axis", -1)?, v.rank())?;
        need!(call.int("stash_type", 1)? == 1, "LayerNormalization with stash_type {}", call.int("stash_type", 1)?);
        let gain = call.get(1).array("the scale")?;
        let bias = if call.has(2) { Some(call.get(2).array("the bias")?) } else { None };
        let which: Vec<usize> = (axis..v.rank()).collect();
        Ok(vec![self.normed(&v, &which, call.float("epsilon", 1e-5)?, Some(gain), bias)?.into()])
    }

    pub(super) fn softmax(&mut self, call: &Call<'_>) -> Rule<Value> {
        if let Value::Const(c) = call.get(0) {
            return self.constant_softmax(call, &c.array).map(Value::from);
        }
        let v = call.get(0).view("the operand")?.clone();
        let old = self.graph.opset < 13;
        let axis = axis_in(call.int("axis", if old { 1 } else { -1 })?, v.rank())?;
        need!(
            !old || axis + 1 == v.rank() || v.shape()[axis + 1..].iter().all(|&n| n == 1),
            "a softmax over several axes"
        );
        let head = if call.node.op == "LogSoftmax" { Head::LogSoftmax } else { Head::Softmax };
        self.soft(&v, axis, head).map(Value::from)
    }

    fn constant_softmax(&self, call: &Call<'_>, x: &Array) -> Rule<Array> {
        let rank = x.rank();
        let axis = axis_in(call.int("axis", -1)?, rank)?;
        need!(self.graph.opset >= 13 || axis + 1 == rank, "a softmax of a constant over several axes");
        fold::small(x.len())?;
        let mut order: Vec<usize> = (0..rank).filter(|&k| k != axis).collect();
        order.push(axis);
        let turned = x.transpose(&order);
        let mut values = turned.f64s();
        for row in values.chunks_mut(x.dim(axis).max(1)) {
            let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|v| (v - top).exp()).sum();
            let log = call.node.op == "LogSoftmax";
            row.iter_mut().for_each(|v| *v = if log { *v - top - sum.ln() } else { (*v - top).exp() / sum });
        }
        let back: Vec<usize> = (0..rank).map(|k| order.iter().position(|&o| o == k).unwrap_or(k)).collect();
        Ok(Array::floats(x.dtype, &turned.shape(), &values).transpose(&back))
    }

    pub(super) fn soft(&mut self, v: &View, axis: usize, head: Head) -> Rule<View> {
        let mut v = v.clone();
        let (core, scale) = self.x.scaled(v.e);
        let shape = self.x.shape(v.e).to_vec();
        if let Op::Scores { heads } = *self.x.op(core) {
            need!(head == Head::Softmax, "LogSoftmax over attention scores");
            if v.dims[axis] == axes::axis(2, shape[2]) && v.dims[axis] != axes::axis(3, shape[3]) {
                // a softmax over the first of the two axes means that these are the scores of k and q
                let (q, k) = (self.x.arg(core, 0), self.x.arg(core, 1));
                let turned = self.x.scores(k, q, heads);
                let e = self.x.scale(turned, scale);
                let dims = v.dims.iter().map(|dim| {
                    dim.iter()
                        .map(|d| axes::Digit {
                            axis: if d.axis == 2 || d.axis == 3 { 5 - d.axis } else { d.axis },
                            ..*d
                        })
                        .collect()
                });
                v = View { e, dims: dims.collect(), sel: None };
            }
            let shape = self.x.shape(v.e).to_vec();
            need!(
                v.dims[axis] == axes::axis(3, shape[3]) && v.sel.is_none(),
                "a softmax of attention scores along another axis than the keys"
            );
            return Ok(v.of(self.x.make(Op::Softmax, vec![v.e], shape)));
        }
        need!(
            shape.len() == 3 && v.dims[axis] == axes::axis(2, shape[2]),
            "a softmax of something else than scores: an attention mask, or a bias of the scores, is not supported"
        );
        Ok(v.of(self.x.make(Op::Out(head), vec![v.e], shape)))
    }

    // ---------------------------------------------------------------------------------------------- answers

    pub(super) fn arg_max(&mut self, call: &Call<'_>) -> Rule<Value> {
        let v = call.get(0).view("the operand")?.clone();
        let axis = axis_in(call.int("axis", 0)?, v.rank())?;
        let shape = self.x.shape(v.e).to_vec();
        need!(
            shape.len() == 3 && v.dims[axis] == axes::axis(2, shape[2]),
            "ArgMax along another axis than the classes"
        );
        let mut dims = v.dims.clone();
        if call.int("keepdims", 1)? != 0 {
            dims[axis] = Dim::new();
        } else {
            drop(dims.remove(axis));
        }
        let e = self.x.make(Op::Out(Head::ArgMax), vec![v.e], shape);
        Ok(View { e, dims, sel: v.sel }.into())
    }

    pub(super) fn top_k(&mut self, call: &Call<'_>) -> Rule {
        let v = call.get(0).view("the operand")?.clone();
        let axis = axis_in(call.int("axis", -1)?, v.rank())?;
        let shape = self.x.shape(v.e).to_vec();
        need!(shape.len() == 3 && v.dims[axis] == axes::axis(2, shape[2]), "TopK along another axis than the classes");
        need!(call.int("largest", 1)? != 0, "the smallest answers");
        let mut dims = v.dims.clone();
        dims[axis] = Dim::new();
        let e = self.x.make(Op::Out(Head::TopK), vec![v.e], shape);
        let out = Value::from(View { e, dims, sel: v.sel });
        Ok(vec![out.clone(), out])
    }
}

/// What a reduction computes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reduce {
    Mean,
    Sum,
    Max,
}

impl Walk<'_> {
    /// The expression is made of attention scores, not of the image (both have four axes).
    fn of_scores(&self, e: Id) -> bool {
        let mut at = e;
        for _ in 0..16 {
            match self.x.op(at) {
                Op::Scores { .. } | Op::Softmax => return true,
                _ => match self.x.get(at).args.first() {
                    Some(&arg) => at = arg,
                    None => return false,
                },
            }
        }
        false
    }
}
