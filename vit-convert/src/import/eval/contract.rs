//! Contractions: a product is a linear, a patch embedding, attention scores, or their mix.

use super::product::{Product, Roles, channel_dims, digits_of};
use super::value::{Rule, Value, View, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::import::axes::{self, BROADCAST, Digit, Dim, Pick};
use crate::import::expr::{Exprs, Id, Op};

impl Walk<'_> {
    /// The product of two tensors, summed over the dimensions of role `sum`.
    pub(super) fn contract(&mut self, a: &Value, b: &Value, ra: &Roles, rb: &Roles) -> Rule<Product> {
        let (s, t) = (a.shape()?, b.shape()?);
        need!(s.iter().chain(&t).all(|&n| n > 0), "a product of nothing");
        let fits = ra.sum.iter().zip(&rb.sum).all(|(&i, &j)| s[i] == t[j]);
        need!(fits && ra.sum.len() == rb.sum.len(), "a product of shapes {s:?} and {t:?}");
        let fits = ra.batch.iter().zip(&rb.batch).all(|(&i, &j)| s[i] == t[j] || s[i] == 1 || t[j] == 1);
        need!(fits, "a product of shapes {s:?} and {t:?}");
        match (a, b) {
            (Value::View(v), Value::Const(c)) => self.with_weight(v, &c.array, ra, rb),
            (Value::Const(c), Value::View(v)) => self.with_weight(v, &c.array, rb, ra).map(Product::swapped),
            (Value::Const(c), Value::Const(w)) => {
                let v = self.lift(c)?;
                self.with_weight(&v, &w.array, ra, rb)
            }
            (Value::View(v), Value::View(w)) => {
                let (p, q) = (*self.x.op(v.e) == Op::Softmax, *self.x.op(w.e) == Op::Softmax);
                match (p, q) {
                    (true, false) => self.mix(v, w, ra, rb),
                    (false, true) => self.mix(w, v, rb, ra).map(Product::swapped),
                    _ => self.scores(v, w, ra, rb),
                }
            }
            _ => Err("a product of sequences".into()),
        }
    }

    fn with_weight(&mut self, v: &View, w: &Array, rv: &Roles, rw: &Roles) -> Rule<Product> {
        need!(w.dtype.is_float(), "a product with integers");
        // several weights over one activation are one weight with more rows
        let vs = v.shape();
        let mut rows: Vec<usize> = Vec::new();
        for (&i, &j) in rv.batch.iter().zip(&rw.batch) {
            if w.dim(j) != 1 {
                need!(vs[i] == 1, "a weight for each image, or for each head");
                rows.push(j);
            }
        }
        let batch_rows = rows.len();
        rows.extend_from_slice(&rw.free);
        let sizes: Vec<usize> = rows.iter().map(|&k| w.dim(k)).collect();
        let ones: Vec<usize> = rw.batch.iter().copied().filter(|j| !rows.contains(j)).collect();
        let order: Vec<usize> = rows.iter().chain(&rw.sum).chain(&ones).copied().collect();
        let n: usize = sizes.iter().product();
        let summed = digits_of(&v.dims, &rv.sum);
        let (left, free): (Vec<Dim>, Vec<Dim>) = (
            rv.batch.iter().map(|&k| v.dims[k].clone()).collect(),
            rv.free.iter().map(|&k| v.dims[k].clone()).collect(),
        );
        let mut cut = vec![n];
        cut.extend(summed.iter().map(|d| d.size));
        let w = w.transpose(&order).reshape(&cut).ok_or("a weight that cannot be re-cut")?;
        let mut out = channel_dims(&sizes);
        let plain = out.split_off(batch_rows);
        let mut outer = out.into_iter();
        let mut product = if self.pixels(v.e).is_some() {
            self.patches(v, &summed, &w, left, free)?
        } else {
            let channels = *self.x.shape(v.e).last().unwrap_or(&0);
            need!(self.x.shape(v.e).len() == 3, "a linear over something else than tokens");
            need!(summed.iter().all(|d| d.axis == 2), "a linear over something else than channels");
            let pick = Pick { offset: 0, digits: summed.iter().map(|d| (d.stride, d.size)).collect() };
            need!(pick.is_permutation(channels), "a linear over a part of the channels");
            need!(left.iter().chain(&free).flatten().all(|d| d.axis != 2), "channels outside of a linear");
            let w = in_order(&w, &summed, 1);
            let w = w.reshape(&[n, channels]).ok_or("a weight that cannot be re-cut")?;
            Product { e: self.x.linear(v.e, w, None), sel: v.sel, batch: left, a: free, b: Vec::new() }
        };
        for (&j, dim) in rw.batch.iter().zip(product.batch.iter_mut()) {
            if rows[..batch_rows].contains(&j) {
                *dim = outer.next().unwrap_or_default();
            }
        }
        product.b = plain;
        Ok(product)
    }

    /// Checks that the batch dimensions of both operands enumerate the batch and the heads in the same order.
    fn check_batch(&self, a: &View, b: &View, ra: &Roles, rb: &Roles) -> Rule<()> {
        let kinds = |dim: &Dim| -> Vec<(char, usize)> {
            dim.iter()
                .map(|d| match d.axis {
                    0 => ('b', d.size),
                    BROADCAST => ('*', d.size),
                    _ => ('h', d.size),
                })
                .collect()
        };
        for (&i, &j) in ra.batch.iter().zip(&rb.batch) {
            let (p, q) = (kinds(&a.dims[i]), kinds(&b.dims[j]));
            if p.iter().chain(&q).all(|k| k.0 != 'h') && (p.is_empty() || q.is_empty()) {
                continue;
            }
            let same = p.len() == q.len()
                && p.iter().zip(&q).all(|(x, y)| x.1 == y.1 && (x.0 == y.0 || x.0 == '*' || y.0 == '*'));
            need!(same, "the batch and heads of the two operands are laid out differently");
        }
        Ok(())
    }

    fn scores(&mut self, a: &View, b: &View, ra: &Roles, rb: &Roles) -> Rule<Product> {
        self.check_batch(a, b, ra, rb)?;
        let (a, b) = (self.settle(a)?, self.settle(b)?);
        need!(
            self.x.shape(a.e).len() == 3 && self.x.shape(b.e).len() == 3,
            "a product of two activations that are no tokens"
        );
        let (ka, kb) = (digits_of(&a.dims, &ra.sum), digits_of(&b.dims, &rb.sum));
        need!(
            ka.iter().chain(&kb).all(|d| d.axis == 2),
            "a product of two activations over something else than channels"
        );
        let heads = |v: &View, roles: &Roles| -> Dim {
            digits_of(&v.dims, &roles.batch).into_iter().filter(|d| d.axis == 2).collect()
        };
        let (ha, hb) = (heads(&a, ra), heads(&b, rb));
        let h = axes::size(&ha);
        need!(h == axes::size(&hb), "queries and keys with different heads");
        let (fa, fb) = (digits_of(&a.dims, &ra.free), digits_of(&b.dims, &rb.free));
        let whole = |free: &Dim, e: Id, x: &Exprs| axes::join(free) == axes::axis(1, x.shape(e)[1]);
        need!(
            whole(&fa, a.e, &self.x) && whole(&fb, b.e, &self.x),
            "attention scores over something else than all tokens"
        );
        let pick = |h: &Dim, k: &Dim| Pick::of(&[&h[..], &k[..]].concat());
        let q = self.x.take(a.e, &pick(&ha, &ka)).ok_or("queries that no linear has made")?;
        let k = self.x.take(b.e, &pick(&hb, &kb)).ok_or("keys that no linear has made")?;
        let e = self.x.scores(q, k, h);
        // heads become axis 1, most significant first
        let mut stride = h;
        let mut batch = Vec::with_capacity(ra.batch.len());
        for (&i, &j) in ra.batch.iter().zip(&rb.batch) {
            let other = &b.dims[j];
            let mut dim = Dim::new();
            for (n, d) in a.dims[i].iter().enumerate() {
                dim.push(match d.axis {
                    2 => {
                        stride /= d.size;
                        Digit { axis: 1, stride, size: d.size }
                    }
                    BROADCAST if other.len() == a.dims[i].len() => other[n],
                    _ => *d,
                });
            }
            if a.dims[i].is_empty() {
                dim = other.iter().filter(|d| d.axis != 2).copied().collect();
            }
            batch.push(axes::join(&dim));
        }
        let on = |dims: &[Dim], which: &[usize], axis: u8| -> Vec<Dim> {
            which.iter().map(|&k| dims[k].iter().map(|d| Digit { axis, ..*d }).collect()).collect()
        };
        Ok(Product { e, sel: None, batch, a: on(&a.dims, &ra.free, 2), b: on(&b.dims, &rb.free, 3) })
    }

    fn mix(&mut self, a: &View, b: &View, ra: &Roles, rb: &Roles) -> Rule<Product> {
        self.check_batch(a, b, ra, rb)?;
        need!(a.sel.is_none(), "a part of the attention weights");
        let b = self.settle(b)?;
        let shape = self.x.shape(a.e).to_vec();
        need!(shape.len() == 4 && self.x.shape(b.e).len() == 3, "a mix of something else than tokens");
        let (heads, tokens) = (shape[1], shape[3]);
        let (ka, kb) = (axes::join(&digits_of(&a.dims, &ra.sum)), axes::join(&digits_of(&b.dims, &rb.sum)));
        need!(
            ka == axes::axis(3, tokens) && kb == axes::axis(1, tokens),
            "attention weights that mix something else than tokens"
        );
        need!(self.x.shape(b.e)[1] == tokens, "attention weights and values with different tokens");
        let free = digits_of(&b.dims, &rb.free);
        need!(free.iter().all(|d| d.axis == 2), "values with other axes than channels");
        let of = |v: &View, roles: &Roles, axis: u8| -> Dim {
            digits_of(&v.dims, &roles.batch).into_iter().filter(|d| d.axis == axis).collect()
        };
        let (hs, hv) = (of(a, ra, 1), of(&b, rb, 2));
        need!(
            axes::join(&hs) == axes::axis(1, heads) && axes::size(&hv) == heads,
            "attention weights and values with different heads"
        );
        let queries = digits_of(&a.dims, &ra.free);
        need!(axes::join(&queries) == axes::axis(2, shape[2]), "a part of the queries");
        let width = axes::size(&free);
        let v = self.x.take(b.e, &Pick::of(&[&hv[..], &free[..]].concat())).ok_or("values that no linear has made")?;
        let e = self.x.attention(a.e, v, heads).ok_or("a mix by something else than the softmax of scores")?;
        let renamed = |dim: &Dim| -> Dim {
            dim.iter()
                .map(|d| match d.axis {
                    1 => Digit { axis: 2, stride: d.stride * width, size: d.size },
                    2 => Digit { axis: 1, ..*d },
                    _ => *d,
                })
                .collect()
        };
        let sizes: Vec<usize> = rb.free.iter().map(|&k| axes::size(&b.dims[k])).collect();
        let batch = ra.batch.iter().zip(&rb.batch).map(|(&i, &j)| {
            let repeated = a.dims[i].is_empty() || a.dims[i].iter().all(|d| d.axis == BROADCAST);
            if repeated && b.dims[j].iter().all(|d| d.axis == 0) { b.dims[j].clone() } else { renamed(&a.dims[i]) }
        });
        Ok(Product {
            e,
            sel: None,
            batch: batch.collect(),
            a: ra.free.iter().map(|&k| renamed(&a.dims[k])).collect(),
            b: channel_dims(&sizes),
        })
    }
}

/// A weight whose dimensions from `first` on are `digits` of the channels, with these in the channels' own order.
fn in_order(w: &Array, digits: &Dim, first: usize) -> Array {
    let mut order: Vec<usize> = (0..digits.len()).collect();
    order.sort_by_key(|&k| std::cmp::Reverse(digits[k].stride));
    let perm: Vec<usize> = (0..first).chain(order.into_iter().map(|k| k + first)).collect();
    w.transpose(&perm)
}
