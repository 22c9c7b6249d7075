//! Linear algebra: every product is a contraction, which is a linear, a patch embedding, attention scores or their mix.

use std::sync::Arc;

use super::{Call, Rule, Value, View, Walk, need};
use crate::array::Array;
use crate::axes::{self, BROADCAST, Digit, Dim, Pick};
use crate::expr::{Id, Layout, Number, Op};
use crate::graph::Attr;

/// Which dimensions of an operand play which part in a product.
#[derive(Clone, Debug, Default)]
pub(super) struct Roles {
    /// In both operands and the result.
    pub batch: Vec<usize>,
    /// In both operands, summed over.
    pub sum: Vec<usize>,
    /// In this operand and the result.
    pub free: Vec<usize>,
}

/// The result of a product: its base and the digits of its dimensions.
pub(super) struct Product {
    pub e: Id,
    pub sel: Option<(usize, usize)>,
    pub batch: Vec<Dim>,
    pub a: Vec<Dim>,
    pub b: Vec<Dim>,
}

impl Product {
    fn swapped(self) -> Self {
        Self { a: self.b, b: self.a, ..self }
    }

    fn view(self, dims: Vec<Dim>) -> View {
        View { e: self.e, dims, sel: self.sel }
    }
}

/// Digits of some dimensions, one after the other.
fn digits_of(dims: &[Dim], which: &[usize]) -> Dim {
    axes::digits(which.iter().filter_map(|&k| dims.get(k)))
}

/// Channel digits for the free dimensions of a weight, row-major.
fn channel_dims(sizes: &[usize]) -> Vec<Dim> {
    let mut stride: usize = sizes.iter().product();
    sizes
        .iter()
        .map(|&n| {
            stride /= n.max(1);
            axes::strided(2, stride, n)
        })
        .collect()
}

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
        // a batch of weights over one activation is one weight with more rows
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

    /// What was done to the pixels on the way to `e`, if that is the image: `(scale, shift)` for each channel, empty for
    /// nothing; and the image.
    fn pixels(&self, e: Id) -> Option<Id> {
        let mut at = e;
        for _ in 0..16 {
            match self.x.op(at) {
                Op::Input => return Some(at),
                Op::Scale(_) | Op::AddS(_) | Op::MulC(_) | Op::AddC(_) => at = self.x.arg(at, 0),
                _ => return None,
            }
        }
        None
    }

    /// The affine map between the image and `e`, for each channel.
    fn affine(&self, e: Id, layout: Layout) -> Rule<Vec<(Number, Number)>> {
        let channel = usize::from(layout.axes()[0]);
        let n = self.x.shape(e)[channel];
        let mut path = Vec::new();
        let mut at = e;
        while *self.x.op(at) != Op::Input {
            path.push(at);
            at = self.x.arg(at, 0);
        }
        if path.is_empty() {
            return Ok(Vec::new());
        }
        let per_channel = |c: &Array| -> Rule<Vec<f64>> {
            let others = (0..c.rank()).all(|k| k == channel || c.dim(k) == 1);
            need!(others, "the image is changed by a picture, not by a number for each channel");
            Ok(if c.len() == 1 { vec![c.f64s()[0]; n] } else { c.f64s() })
        };
        let mut map = vec![(1.0, 0.0); n];
        for id in path.into_iter().rev() {
            let (mul, add) = match self.x.op(id) {
                Op::Scale(s) => (vec![s.0; n], vec![0.0; n]),
                Op::AddS(s) => (vec![1.0; n], vec![s.0; n]),
                Op::MulC(c) => (per_channel(c)?, vec![0.0; n]),
                Op::AddC(c) => (vec![1.0; n], per_channel(c)?),
                _ => return Err("the image".into()),
            };
            for (m, (s, c)) in map.iter_mut().zip(mul.iter().zip(&add)) {
                *m = (m.0 * s, m.1 * s + c);
            }
        }
        Ok(map.into_iter().map(|(s, c)| (Number(s), Number(c))).collect())
    }

    /// A linear over cut-up pixels is a convolution whose stride is its kernel.
    fn patches(&mut self, v: &View, summed: &Dim, w: &Array, left: Vec<Dim>, free: Vec<Dim>) -> Rule<Product> {
        let shape = self.x.shape(v.e).to_vec();
        let rest: Dim = axes::digits(left.iter().chain(&free));
        let mut found = None;
        for layout in [Layout::Nchw, Layout::Nhwc] {
            let size = |axis: u8| {
                let mut mine: Dim = summed.iter().filter(|d| d.axis == axis).copied().collect();
                mine.sort_by_key(|d| std::cmp::Reverse(d.stride));
                match join_one(&mine) {
                    Some(n) if shape[usize::from(axis)].is_multiple_of(n) => Some(n),
                    _ => None,
                }
            };
            let [c, h, w] = layout.axes();
            let channels = shape[usize::from(c)];
            if let (Some(n), Some(p), Some(q)) = (size(c), size(h), size(w))
                && n == channels
                && rest.iter().all(|d| d.axis != c)
            {
                found = Some((layout, [n, p, q]));
                // three or fewer channels are more likely colours than a stripe of the image
                if layout == Layout::Nchw && channels <= 4 {
                    break;
                }
            }
        }
        let (layout, [c, p, q]) = found.ok_or("a linear over a part of the image that is no grid of patches")?;
        let [axis_c, axis_h, axis_w] = layout.axes();
        let (gh, gw) = (shape[usize::from(axis_h)] / p, shape[usize::from(axis_w)] / q);
        let covered: usize = rest.iter().filter(|d| d.axis == axis_h || d.axis == axis_w).map(|d| d.size).product();
        need!(covered == gh * gw, "patches that do not cover the image");
        let pixels = self.affine(v.e, layout)?;
        // the weight's columns in the order (channel, row, column)
        let mut order: Vec<usize> = (0..summed.len()).collect();
        let rank = |d: &Digit| {
            if d.axis == axis_c {
                0
            } else if d.axis == axis_h {
                1
            } else {
                2
            }
        };
        order.sort_by_key(|&k| (rank(&summed[k]), std::cmp::Reverse(summed[k].stride)));
        let perm: Vec<usize> = std::iter::once(0).chain(order.iter().map(|k| k + 1)).collect();
        let n = w.dim(0);
        let weight = w.transpose(&perm).reshape(&[n, c, p, q]).ok_or("a patch weight that cannot be re-cut")?;
        let image = self.pixels(v.e).ok_or("the image")?;
        let op = Op::Patch { weight: Arc::new(weight), bias: None, grid: [gh, gw], layout, pixels };
        let e = self.x.make(op, vec![image], vec![shape[0], gh * gw, n]);
        let renamed = |dims: Vec<Dim>| -> Rule<Vec<Dim>> {
            dims.into_iter()
                .map(|dim| {
                    let mut out = Dim::new();
                    for d in dim {
                        let (unit, stride) = if d.axis == axis_h {
                            (p, gw)
                        } else if d.axis == axis_w {
                            (q, 1)
                        } else {
                            (1, d.stride)
                        };
                        if d.axis == axis_h || d.axis == axis_w {
                            need!(d.stride % unit == 0, "patches that overlap");
                            out.push(Digit { axis: 1, stride: d.stride / unit * stride, size: d.size });
                        } else {
                            out.push(d);
                        }
                    }
                    Ok(axes::join(&out))
                })
                .collect()
        };
        Ok(Product { e, sel: None, batch: renamed(left)?, a: renamed(free)?, b: Vec::new() })
    }

    // ---------------------------------------------------------------------------------------------- attention

    /// Digits of the batch dimensions by what they are: of the batch (`b`), heads (`h`) or repeated (`*`).
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
        let whole = |free: &Dim, e: Id, x: &crate::expr::Exprs| axes::join(free) == axes::axis(1, x.shape(e)[1]);
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

    // ---------------------------------------------------------------------------------------------- operators

    pub(super) fn matmul(&mut self, a: &Value, b: &Value) -> Rule<Value> {
        let (s, t) = (a.shape()?, b.shape()?);
        let (n, m) = (s.len(), t.len());
        need!(n >= 1 && m >= 1, "a product with a scalar");
        if let (Value::Const(x), Value::Const(y)) = (a, b)
            && !(n == 3 && x.array.dtype.is_float())
        {
            return constant_product(&x.array, &y.array).map(Value::from);
        }
        need!(n >= 2 && m >= 2, "a product with a vector");
        let roles = |rank: usize, sum: usize, free: Vec<usize>, batch: usize| Roles {
            batch: (0..batch).collect(),
            sum: vec![sum],
            free: free.into_iter().filter(|&k| k < rank).collect(),
        };
        if matches!(b, Value::Const(_)) && m == 2 {
            let p = self.contract(a, b, &roles(n, n - 1, (0..n - 1).collect(), 0), &roles(m, 0, vec![1], 0))?;
            let dims = [&p.a[..], &p.b[..]].concat();
            return Ok(p.view(dims).into());
        }
        if matches!(a, Value::Const(_)) && n == 2 {
            // the weight from the left: W · x, the free axis of W second to last
            let free: Vec<usize> = (0..m - 2).chain([m - 1]).collect();
            let p = self.contract(a, b, &roles(n, 1, vec![0], 0), &roles(m, m - 2, free, 0))?;
            let (outer, last) = p.b.split_at(m - 2);
            let dims = [outer, &p.a[..], last].concat();
            return Ok(p.view(dims).into());
        }
        // equal ranks, the shorter one with leading ones
        let rank = n.max(m);
        let padded = |v: &Value, rank: usize| -> Rule<Value> {
            Ok(match v {
                Value::View(v) => v.with(axes::pad(&v.dims, rank)).into(),
                Value::Const(c) => c.array.relaid(axes::pad(c.array.dims(), rank)).into(),
                _ => return Err("a product of sequences".into()),
            })
        };
        let (a, b) = (padded(a, rank)?, padded(b, rank)?);
        let outer = rank - 2;
        let p = self.contract(
            &a,
            &b,
            &roles(rank, rank - 1, vec![rank - 2], outer),
            &roles(rank, rank - 2, vec![rank - 1], outer),
        )?;
        let dims = [&p.batch[..], &p.a[..], &p.b[..]].concat();
        Ok(p.view(dims).into())
    }

    pub(super) fn gemm(&mut self, call: &Call<'_>) -> Rule<Value> {
        let (a, b) = (call.get(0), call.get(1));
        need!(a.shape()?.len() == 2 && b.shape()?.len() == 2, "Gemm of other tensors than matrices");
        need!(!matches!((a, b), (Value::Const(_), Value::Const(_))), "Gemm of two constants");
        let (ta, tb) = (usize::from(call.int("transA", 0)? != 0), usize::from(call.int("transB", 0)? != 0));
        let roles = |sum: usize| Roles { batch: Vec::new(), sum: vec![sum], free: vec![1 - sum] };
        let p = self.contract(a, b, &roles(1 - ta), &roles(tb))?;
        let dims = [&p.a[..], &p.b[..]].concat();
        let v = p.view(dims);
        let e = self.x.scale(v.e, call.float("alpha", 1.0)?);
        let product = Value::from(v.of(e));
        if !call.has(2) {
            return Ok(product);
        }
        let shape = product.shape()?;
        let bias = call.get(2).shape()?;
        need!(super::fold::broadcast_shape(&shape, &bias)? == shape, "a Gemm bias of shape {bias:?}");
        let beta = call.float("beta", 1.0)?;
        let bias = if beta == 1.0 {
            call.get(2).clone()
        } else {
            self.binary("Mul", call.get(2), &Array::floats(crate::graph::DType::F32, &[], &[beta]).into())?
        };
        self.binary("Add", &product, &bias)
    }

    pub(super) fn einsum(&mut self, call: &Call<'_>) -> Rule<Value> {
        let equation: String = call.text("equation", "")?.chars().filter(|c| !c.is_whitespace()).collect();
        need!(equation.is_ascii() && !equation.contains('.'), "Einsum `{equation}`");
        let (left, out) = equation.split_once("->").ok_or_else(|| format!("Einsum `{equation}` without a result"))?;
        let (la, lb) = left.split_once(',').ok_or_else(|| format!("Einsum `{equation}` of one operand"))?;
        need!(call.inputs.len() == 2 && !lb.contains(','), "Einsum `{equation}` of {} operands", call.inputs.len());
        let (la, lb, out): (Vec<char>, Vec<char>, Vec<char>) =
            (la.chars().collect(), lb.chars().collect(), out.chars().collect());
        for (letters, v) in [(&la, call.get(0)), (&lb, call.get(1))] {
            let twice = (0..letters.len()).any(|k| letters[..k].contains(&letters[k]));
            need!(!twice && letters.len() == v.shape()?.len(), "Einsum `{equation}`");
        }
        let batch: Vec<char> = la.iter().copied().filter(|c| lb.contains(c) && out.contains(c)).collect();
        let sum: Vec<char> = la.iter().copied().filter(|c| lb.contains(c) && !out.contains(c)).collect();
        let free = |x: &[char], y: &[char]| -> Vec<char> { x.iter().copied().filter(|c| !y.contains(c)).collect() };
        let (fa, fb) = (free(&la, &lb), free(&lb, &la));
        let all: Vec<char> = batch.iter().chain(&fa).chain(&fb).copied().collect();
        need!(
            out.len() == all.len() && all.iter().all(|c| out.contains(c)),
            "Einsum `{equation}` sums or repeats an axis of one operand"
        );
        let at = |letters: &[char], which: &[char]| -> Vec<usize> {
            which.iter().filter_map(|c| letters.iter().position(|l| l == c)).collect()
        };
        let roles = |letters: &[char], free: &[char]| Roles {
            batch: at(letters, &batch),
            sum: at(letters, &sum),
            free: at(letters, free),
        };
        let p = self.contract(call.get(0), call.get(1), &roles(&la, &fa), &roles(&lb, &fb))?;
        let dims: Vec<Dim> = [&p.batch[..], &p.a[..], &p.b[..]].concat();
        let dims = out.iter().filter_map(|c| all.iter().position(|a| a == c)).map(|k| dims[k].clone()).collect();
        Ok(p.view(dims).into())
    }

    pub(super) fn conv(&mut self, call: &Call<'_>) -> Rule<Value> {
        let bias = if call.has(2) { Some(call.get(2).array("the bias of Conv")?.clone()) } else { None };
        let w = call.get(1).array("the weight of Conv")?.clone();
        let patch = self.patch_conv(call, call.get(0), &w)?;
        match bias {
            None => Ok(patch.into()),
            Some(b) => {
                need!(b.shape() == [w.dim(0)], "a bias of shape {:?} for {} channels", b.shape(), w.dim(0));
                let c = b.reshape(&[1, 1, b.len()]).ok_or("the bias of Conv")?;
                Ok(patch.of(self.x.add_c(patch.e, &c)?).into())
            }
        }
    }

    /// A convolution of the image whose stride is its kernel.
    pub(super) fn patch_conv(&mut self, call: &Call<'_>, image: &Value, w: &Array) -> Rule<View> {
        let v = image.view("the image")?.clone();
        let input = self
            .pixels(v.e)
            .ok_or("a convolution of something else than the image: a convolutional stem is no ViT of this family")?;
        need!(w.rank() == 4 && v.rank() == 4, "a convolution that is not two-dimensional");
        let shape = self.x.shape(v.e).to_vec();
        let layout = [Layout::Nchw, Layout::Nhwc].into_iter().find(|layout| {
            let [c, h, w] = layout.axes();
            v.dims.iter().zip([0, c, h, w]).all(|(d, k)| *d == axes::axis(k, shape[usize::from(k)]))
        });
        let layout = layout.ok_or("a convolution of a turned image")?;
        let [c, h, wd] = layout.axes().map(usize::from);
        let (n, kernel) = (w.dim(0), [w.dim(2), w.dim(3)]);
        let list = |name: &str, default: usize| -> Rule<Vec<usize>> {
            match call.ints(name)? {
                None => Ok(vec![default; 2]),
                Some(list) => {
                    list.iter().map(|&s| usize::try_from(s).map_err(|_| format!("{name} {list:?}"))).collect()
                }
            }
        };
        let strides = list("strides", 1)?;
        need!(strides == kernel, "a convolution with stride {strides:?} and kernel {kernel:?} is no patch embedding");
        need!(
            call.ints("pads")?.is_none_or(|p| p.iter().all(|&p| p == 0)),
            "a padded convolution is no patch embedding"
        );
        need!(
            list("dilations", 1)? == [1, 1] && call.int("group", 1)? == 1,
            "a dilated or grouped convolution is no patch embedding"
        );
        if let Some(Attr::Ints(k)) = call.node.attrs.get("kernel_shape") {
            let same = k.iter().map(|&k| usize::try_from(k).unwrap_or(0)).eq(kernel);
            need!(same, "kernel_shape {k:?} for a kernel of {kernel:?}");
        }
        let auto = call.text("auto_pad", "NOTSET")?;
        let divides = shape[h].is_multiple_of(kernel[0].max(1)) && shape[wd].is_multiple_of(kernel[1].max(1));
        need!(matches!(auto.as_str(), "NOTSET" | "VALID" | "") || divides, "a convolution padded {auto}");
        need!(w.dim(1) == shape[c], "a convolution of {} channels over {}", w.dim(1), shape[c]);
        need!(
            !w.is_empty() && kernel[0] <= shape[h] && kernel[1] <= shape[wd],
            "patches of {kernel:?} of an image of {}×{}",
            shape[h],
            shape[wd]
        );
        let grid = [shape[h] / kernel[0], shape[wd] / kernel[1]];
        let pixels = self.affine(v.e, layout)?;
        let op = Op::Patch { weight: Arc::new(w.clone()), bias: None, grid, layout, pixels };
        let e = self.x.make(op, vec![input], vec![shape[0], grid[0] * grid[1], n]);
        let dims =
            vec![axes::axis(0, shape[0]), axes::axis(2, n), axes::strided(1, grid[1], grid[0]), axes::axis(1, grid[1])];
        Ok(View { e, dims, sel: None })
    }
}

/// The size of digits that together count `0..n` of an axis; 1 for none.
fn join_one(digits: &[Digit]) -> Option<usize> {
    match axes::join(digits)[..] {
        [] => Some(1),
        [Digit { stride: 1, size, .. }] => Some(size),
        _ => None,
    }
}

/// A weight whose dimensions from `first` on are `digits` of the channels, with these in the channels' own order.
fn in_order(w: &Array, digits: &Dim, first: usize) -> Array {
    let mut order: Vec<usize> = (0..digits.len()).collect();
    order.sort_by_key(|&k| std::cmp::Reverse(digits[k].stride));
    let perm: Vec<usize> = (0..first).chain(order.into_iter().map(|k| k + first)).collect();
    w.transpose(&perm)
}

/// The product of two small matrices.
fn constant_product(a: &Array, b: &Array) -> Rule<Array> {
    need!(
        a.rank() == 2 && b.rank() == 2 && a.dim(1) == b.dim(0),
        "a product of constants of shapes {:?} and {:?}",
        a.shape(),
        b.shape()
    );
    let (n, k, m) = (a.dim(0), a.dim(1), b.dim(1));
    need!(
        n.saturating_mul(k).saturating_mul(m) <= 1 << 26 && a.dtype.is_float(),
        "a product of constants of {n}×{k}×{m}"
    );
    let (x, y) = (a.f64s(), b.f64s());
    let mut out = vec![0.0; n * m];
    for i in 0..n {
        for l in 0..k {
            let v = x[i * k + l];
            for j in 0..m {
                out[i * m + j] += v * y[l * m + j];
            }
        }
    }
    Ok(Array::floats(a.dtype, &[n, m], &out))
}
