//! Layout: operators that only move, cut or join, over constants and views alike.

use std::rc::Rc;

use super::{Call, Const, Rule, Value, View, Walk, axis_in, fold, need};
use crate::array::Array;
use crate::axes::{self, BROADCAST, Digit, Dim, Pick};
use crate::expr::Op;
use crate::graph::DType;

/// Sequences are short: the outputs of a split.
const SEQUENCE_LIMIT: usize = 1024;

impl Walk<'_> {
    fn relaid(value: &Value, f: impl FnOnce(&[Dim]) -> Rule<Vec<Dim>>) -> Rule<Value> {
        match value {
            Value::View(v) => Ok(v.with(f(&v.dims)?).into()),
            Value::Const(c) => {
                Ok(Value::Const(Const { array: c.array.relaid(f(c.array.dims())?), terms: c.terms.clone() }))
            }
            Value::Factor(_) => Ok(value.clone()),
            _ => Err("a sequence where a tensor belongs".into()),
        }
    }

    /// A value with other sizes over the same elements.
    pub(super) fn reshaped(value: &Value, target: &[usize]) -> Rule<Value> {
        let misfit = |from: &[Dim]| format!("a reshape from {:?} to {target:?} mixes axes", axes::shape(from));
        match value {
            Value::Const(c) => Ok(c.array.reshape(target).ok_or_else(|| misfit(c.array.dims()))?.into()),
            _ => Self::relaid(value, |dims| axes::regroup(dims, target).ok_or_else(|| misfit(dims))),
        }
    }

    pub(super) fn reshape(&mut self, call: &Call<'_>) -> Rule<Value> {
        let target = call.list("shape", 1)?.ok_or("the shape is missing")?;
        need!(target.len() <= 16, "a reshape to rank {}", target.len());
        let from = call.get(0).shape()?;
        let zero = call.int("allowzero", 0)? != 0;
        let total = from.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).ok_or("a tensor too large")?;
        let mut sizes = Vec::with_capacity(target.len());
        let mut open = None;
        for (k, &n) in target.iter().enumerate() {
            sizes.push(match n {
                0 if !zero => *from.get(k).ok_or("a reshape keeps an axis that is not there")?,
                -1 => {
                    need!(open.replace(k).is_none(), "a reshape with two open sizes");
                    1
                }
                n => usize::try_from(n).map_err(|_| format!("a reshape to size {n}"))?,
            });
        }
        if let Some(k) = open {
            let known = sizes.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).ok_or("a reshape too large")?;
            need!(known > 0 && total % known == 0, "a reshape from {from:?} to {target:?}");
            sizes[k] = total / known;
        }
        Self::reshaped(call.get(0), &sizes)
    }

    pub(super) fn flatten(&mut self, call: &Call<'_>) -> Rule<Value> {
        let from = call.get(0).shape()?;
        let rank = from.len() as i64;
        let axis = call.int("axis", 1)?;
        let at = if axis < 0 { axis + rank } else { axis };
        need!((0..=rank).contains(&at), "Flatten at axis {axis} of rank {rank}");
        let (a, b) = from.split_at(at as usize);
        Self::reshaped(call.get(0), &[a.iter().product(), b.iter().product()])
    }

    pub(super) fn transpose(&mut self, call: &Call<'_>) -> Rule<Value> {
        let rank = call.get(0).shape()?.len();
        let perm: Vec<usize> = match call.ints("perm")? {
            None => (0..rank).rev().collect(),
            Some(perm) => {
                perm.iter().map(|&p| usize::try_from(p).map_err(|_| format!("perm {perm:?}"))).collect::<Rule<_>>()?
            }
        };
        let mut sorted = perm.clone();
        sorted.sort_unstable();
        need!(sorted.iter().copied().eq(0..rank), "perm {perm:?} for a tensor of rank {rank}");
        match call.get(0) {
            Value::Const(c) => Ok(c.array.transpose(&perm).into()),
            v => Self::relaid(v, |dims| Ok(perm.iter().map(|&p| dims[p].clone()).collect())),
        }
    }

    pub(super) fn squeeze(&mut self, call: &Call<'_>) -> Rule<Value> {
        let from = call.get(0).shape()?;
        let axes = match call.list("axes", 1)? {
            Some(list) => list.into_iter().map(|a| axis_in(a, from.len())).collect::<Rule<Vec<_>>>()?,
            None => (0..from.len()).filter(|&k| from[k] == 1).collect(),
        };
        need!(axes.iter().all(|&a| from[a] == 1), "Squeeze of an axis that is not 1 in {from:?}");
        Self::relaid(call.get(0), |dims| {
            Ok(dims.iter().enumerate().filter(|(k, _)| !axes.contains(k)).map(|(_, d)| d.clone()).collect())
        })
    }

    pub(super) fn unsqueeze(&mut self, call: &Call<'_>) -> Rule<Value> {
        let list = call.list("axes", 1)?.ok_or("the axes are missing")?;
        let rank = call.get(0).shape()?.len() + list.len();
        need!(rank <= 16, "a tensor of rank {rank}");
        let axes = list.into_iter().map(|a| axis_in(a, rank)).collect::<Rule<Vec<_>>>()?;
        let distinct = (0..axes.len()).all(|k| !axes[..k].contains(&axes[k]));
        need!(distinct, "Unsqueeze names an axis twice");
        Self::relaid(call.get(0), |dims| {
            let mut rest = dims.iter().cloned();
            Ok((0..rank)
                .map(|k| if axes.contains(&k) { Dim::new() } else { rest.next().unwrap_or_default() })
                .collect())
        })
    }

    pub(super) fn expand(&mut self, call: &Call<'_>) -> Rule<Value> {
        let target = call.get(1).ints("the shape")?;
        let target = target
            .iter()
            .map(|&n| usize::try_from(n).map_err(|_| format!("Expand to size {n}")))
            .collect::<Rule<Vec<_>>>()?;
        self.broadcast(call.get(0), &target)
    }

    fn broadcast(&mut self, value: &Value, target: &[usize]) -> Rule<Value> {
        need!(target.len() <= 16, "a tensor of rank {}", target.len());
        let shape = fold::broadcast_shape(&value.shape()?, target)?;
        need!(shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).is_some(), "a tensor of shape {shape:?}");
        Self::relaid(value, |dims| {
            let mut dims = axes::pad(dims, shape.len());
            for (dim, &n) in dims.iter_mut().zip(&shape) {
                if axes::size(dim) != n {
                    *dim = axes::broadcast(n);
                }
            }
            Ok(dims)
        })
    }

    pub(super) fn tile(&mut self, call: &Call<'_>) -> Rule<Value> {
        let repeats = call.get(1).ints("the repeats")?;
        let from = call.get(0).shape()?;
        need!(repeats.len() == from.len(), "Tile of rank {} by {} numbers", from.len(), repeats.len());
        if let Value::Const(c) = call.get(0)
            && !c.array.dtype.is_float()
        {
            // shapes are tiled now and then
            let mut array = c.array.clone();
            for (k, &n) in repeats.iter().enumerate() {
                need!((0..=1024).contains(&n), "Tile by {n}");
                let parts = vec![array.clone(); n as usize];
                array = if n == 1 { array } else { Array::concat(&parts, k)? };
            }
            return Ok(array.into());
        }
        let fits = repeats.iter().zip(&from).all(|(&r, &n)| r == 1 || (r > 0 && n == 1));
        need!(fits, "Tile of {from:?} by {repeats:?}");
        let target: Vec<usize> =
            repeats.iter().zip(&from).map(|(&r, &n)| if r == 1 { n } else { r as usize }).collect();
        self.broadcast(call.get(0), &target)
    }

    // ---------------------------------------------------------------------------------------------- selection

    /// Some positions of a dimension.
    pub(super) fn restrict(&mut self, value: &Value, dim: usize, pick: &Pick) -> Rule<Value> {
        match value {
            Value::Const(c) => {
                Ok(c.array.pick(dim, pick).ok_or("a selection from a constant that takes an index list")?.into())
            }
            Value::View(v) => self.restrict_view(v, dim, pick).map(Value::from),
            _ => Err("a selection from a sequence".into()),
        }
    }

    fn restrict_view(&mut self, v: &View, dim: usize, pick: &Pick) -> Rule<View> {
        let d = v.dims.get(dim).ok_or("a selection along an axis that is not there")?;
        let n = axes::size(d);
        if pick.is_identity(n) {
            return Ok(v.clone());
        }
        let len = pick.len();
        need!(len > 0, "an empty selection");
        let last = pick.offset + pick.digits.iter().map(|&(s, k)| s * (k - 1)).sum::<usize>();
        need!(last < n, "a selection outside of the tensor");
        let mut dims = v.dims.clone();
        if d.iter().all(|g| g.axis == BROADCAST) {
            dims[dim] = axes::broadcast(len);
            return Ok(v.with(dims));
        }
        let base = self.x.shape(v.e).to_vec();
        let tokens = v.sel.map_or(base.get(1).copied().unwrap_or(1), |s| s.1);
        if base.len() == 3 && *d == axes::axis(1, tokens) {
            let run = len == 1 || pick.digits == [(1, len)];
            need!(run, "tokens that are not neighbours are selected");
            let start = pick.offset + v.sel.map_or(0, |s| s.0);
            dims[dim] = axes::axis(1, len);
            if *self.x.op(v.e) == Op::Cat {
                let e = self.x.select(v.e, start, len)?;
                if !matches!(self.x.op(e), Op::Sel { .. }) {
                    return Ok(View { e, dims, sel: None });
                }
            }
            return Ok(View { e: v.e, dims, sel: Some((start, len)) });
        }
        let &[own] = &d[..] else { return Err("a selection from an axis that is made of several".into()) };
        need!(own.axis == 2 && base.len() == 3, "a selection of {len} of {n} along an axis that is no channel axis");
        // the kept channels in their order: all digits of the axis by their stride, this one in its place
        let mut all: Vec<Digit> = (v.dims.iter().enumerate())
            .flat_map(|(k, dim_k)| dim_k.iter().filter(move |g| g.axis == 2 && k != dim))
            .copied()
            .collect();
        all.push(own);
        all.sort_by_key(|g| std::cmp::Reverse(g.stride));
        let mut digits = Vec::new();
        let mut moved: Vec<(usize, usize)> = Vec::new(); // old stride → new stride, to be filled from the end
        for g in &all {
            if g.stride == own.stride {
                digits.extend(pick.digits.iter().map(|&(s, k)| (s * own.stride, k)));
                moved.push((g.stride, len));
            } else {
                digits.push((g.stride, g.size));
                moved.push((g.stride, g.size));
            }
        }
        let mut stride = 1;
        for (_, size) in moved.iter_mut().rev() {
            let n = std::mem::replace(size, stride);
            stride *= n;
        }
        let renamed = |old: usize| moved.iter().find(|m| m.0 == old).map_or(0, |m| m.1);
        let channels = Pick { offset: pick.offset * own.stride, digits };
        let e = self.x.take(v.e, &channels).ok_or("a selection of channels that no linear has made")?;
        for (k, dim_k) in dims.iter_mut().enumerate() {
            *dim_k = if k == dim {
                axes::strided(2, renamed(own.stride), len)
            } else {
                let moved =
                    dim_k.iter().map(|g| if g.axis == 2 { Digit { stride: renamed(g.stride), ..*g } } else { *g });
                axes::join(&moved.collect::<Dim>())
            };
        }
        Ok(View { e, dims, sel: v.sel })
    }

    pub(super) fn split(&mut self, call: &Call<'_>) -> Rule {
        let shape = call.get(0).shape()?;
        let axis = axis_in(call.int("axis", 0)?, shape.len())?;
        let n = shape[axis];
        let count = call.node.outputs.len();
        let sizes: Vec<usize> = if let Some(list) = call.list("split", 1)? {
            list.iter().map(|&s| usize::try_from(s).map_err(|_| format!("a split of {s}"))).collect::<Rule<_>>()?
        } else {
            need!(count > 0, "a split into nothing");
            let said = call.int("num_outputs", count as i64)?;
            need!(usize::try_from(said) == Ok(count), "num_outputs = {said}, with {count} outputs");
            let each = n.div_ceil(count);
            (0..count).map(|k| each.min(n.saturating_sub(k * each))).collect()
        };
        need!(sizes.iter().try_fold(0usize, |a, &b| a.checked_add(b)) == Some(n), "a split of {n} into {sizes:?}");
        need!(sizes.len() >= count, "a split into {} with {count} outputs", sizes.len());
        let mut at = 0;
        let mut out = Vec::with_capacity(sizes.len());
        for s in sizes {
            out.push(self.restrict(call.get(0), axis, &Pick::range(at, s))?);
            at += s;
        }
        Ok(out)
    }

    pub(super) fn slice(&mut self, call: &Call<'_>) -> Rule<Value> {
        let list = |name: &str, k: usize| {
            if call.inputs.len() > 1 { call.get(k).ints(name).map(Some) } else { call.ints(name) }
        };
        let (starts, ends) =
            (list("starts", 1)?.ok_or("starts is missing")?, list("ends", 2)?.ok_or("ends is missing")?);
        let axes = if call.inputs.len() > 1 && !call.has(3) { None } else { list("axes", 3)? };
        let steps = if call.has(4) { Some(call.get(4).ints("steps")?) } else { None };
        let count = starts.len();
        need!(
            ends.len() == count && axes.as_ref().is_none_or(|a| a.len() == count),
            "Slice with lists of different lengths"
        );
        need!(steps.as_ref().is_none_or(|a| a.len() == count), "Slice with lists of different lengths");
        let mut value = call.get(0).clone();
        let rank = value.shape()?.len();
        for k in 0..count {
            let axis = axis_in(axes.as_ref().map_or(k as i64, |a| a[k]), rank)?;
            let step = steps.as_ref().map_or(1, |s| s[k]);
            let n = value.shape()?[axis];
            need!(step > 0, "a slice backwards");
            let clamp = |v: i64| (if v < 0 { v.saturating_add(n as i64) } else { v }).clamp(0, n as i64) as usize;
            let (lo, hi) = (clamp(starts[k]), clamp(ends[k]));
            let step = usize::try_from(step).unwrap_or(usize::MAX);
            let len = hi.saturating_sub(lo).div_ceil(step);
            let pick = if len == 0 { Pick { offset: 0, digits: vec![(1, 0)] } } else { Pick::steps(lo, step, len) };
            value = self.restrict(&value, axis, &pick)?;
        }
        Ok(value)
    }

    pub(super) fn gather(&mut self, call: &Call<'_>) -> Rule<Value> {
        let shape = call.get(0).shape()?;
        let axis = axis_in(call.int("axis", 0)?, shape.len())?;
        let index = call.get(1).array("the index")?;
        need!(!index.dtype.is_float() && index.len() <= 1 << 20, "Gather by {} indices", index.len());
        let (list, to) = (index.i64s(), index.shape());
        let n = shape[axis];
        let mut target = shape.clone();
        target.splice(axis..=axis, to.iter().copied());
        if let Value::View(v) = call.get(0)
            && to.len() > 1
            && let Some(cut) = windows(&list, &to, n)
        {
            // every position once, as a matrix of windows (nn.Unfold): the digits are re-cut
            let dim = &v.dims[axis];
            let new = cut
                .iter()
                .map(|pick| pick.through(dim))
                .collect::<Option<Vec<_>>>()
                .ok_or("windows over an axis of several")?;
            let mut dims = v.dims.clone();
            dims.splice(axis..=axis, new.into_iter().map(|(_, d)| d));
            return Ok(v.with(dims).into());
        }
        let picked = if let Some(pick) = fold::evenly(&list, n)? {
            self.restrict(call.get(0), axis, &pick)?
        } else {
            // an index list: small constants alone
            let Value::Const(c) = call.get(0) else {
                return Err("Gather with indices that are not evenly spaced".into());
            };
            let total = list.len().checked_mul(c.array.len() / n.max(1)).ok_or("Gather too large")?;
            need!(
                total <= crate::array::FOLD_LIMIT && list.len() <= 1 << 14,
                "Gather of {total} elements of a constant"
            );
            let rows = list
                .iter()
                .map(|&i| {
                    c.array.pick(axis, &Pick::range(fold::axis_index(i, n)?, 1)).ok_or_else(|| "Gather".to_string())
                })
                .collect::<Rule<Vec<_>>>()?;
            Array::concat(&rows, axis)?.into()
        };
        Self::reshaped(&picked, &target)
    }

    // ---------------------------------------------------------------------------------------------- joining

    /// Values one behind the other.
    pub(super) fn concat(&mut self, values: &[Value], axis: i64) -> Rule<Value> {
        let first = values.first().ok_or("nothing to join")?;
        let axis = axis_in(axis, first.shape()?.len())?;
        if let [one] = values {
            return Ok(one.clone());
        }
        if values.iter().all(|v| matches!(v, Value::Const(_))) {
            let parts: Vec<Array> = values.iter().map(|v| v.array("a part").cloned()).collect::<Rule<_>>()?;
            need!(parts.iter().all(|p| p.dtype == parts[0].dtype), "constants of different types are joined");
            let total: usize = parts.iter().map(Array::len).sum();
            if parts[0].dtype.is_float() || total > 1 << 12 {
                return Ok(Array::concat(&parts, axis)?.into());
            }
            let joined = Array::concat(&parts, axis)?;
            return Ok(Array::ints(joined.dtype, &joined.shape(), &joined.i64s()).into());
        }
        // the part that is laid out most fully says where the axes are
        let full = |v: &View| v.dims.iter().flatten().filter(|g| g.axis != BROADCAST).count();
        let views: Vec<&View> =
            values.iter().filter_map(|v| if let Value::View(v) = v { Some(v) } else { None }).collect();
        let reference =
            (*views.iter().max_by_key(|v| (self.x.shape(v.e)[0], full(v))).ok_or("nothing to join")?).clone();
        let base = self.x.shape(reference.e).to_vec();
        need!(base.len() == 3, "a concatenation of something else than tokens or channels");
        need!(views.iter().all(|v| v.rank() == reference.rank()), "parts of different ranks are joined");
        let mut along: Vec<u8> =
            views.iter().flat_map(|v| &v.dims[axis]).map(|g| g.axis).filter(|&a| a != BROADCAST).collect();
        along.sort_unstable();
        along.dedup();
        let elsewhere =
            |k: u8| (0..reference.rank()).any(|i| i != axis && reference.dims[i].iter().any(|g| g.axis == k));
        let tokens = match along[..] {
            [1] => true,
            [] => !elsewhere(1) && elsewhere(2),
            _ => false,
        };
        if tokens {
            self.join_tokens(values, axis, &reference, &base)
        } else {
            self.join_channels(&views, values.len(), axis)
        }
    }

    fn join_tokens(&mut self, values: &[Value], axis: usize, reference: &View, base: &[usize]) -> Rule<Value> {
        let mut parts = Vec::with_capacity(values.len());
        let mut layout = reference.dims.clone();
        let mut best = 0;
        for value in values {
            match value {
                Value::Const(c) => {
                    let n = c.array.dim(axis);
                    need!(
                        c.array.rank() == reference.rank() && c.array.dtype.is_float(),
                        "a parameter of shape {:?} is joined to tokens",
                        c.array.shape()
                    );
                    let mut dims = reference.dims.clone();
                    dims[axis] = axes::axis(1, n);
                    for (k, d) in dims.iter().enumerate() {
                        need!(
                            c.array.dim(k) == axes::size(d),
                            "a parameter of shape {:?} is joined to tokens",
                            c.array.shape()
                        );
                    }
                    let over = super::arith::over_base(&c.array, &dims, None, &[base[0], n, base[2]])?;
                    let over = over.expand(&[over.dim(0), n, base[2]]).ok_or("a parameter beside tokens")?;
                    parts.push(self.param(&over, c)?);
                }
                Value::View(v) => {
                    let v = self.settle(v)?;
                    let n = self.x.shape(v.e).get(1).copied().unwrap_or(0);
                    need!(
                        self.x.shape(v.e).len() == 3 && v.dims[axis] == axes::axis(1, n),
                        "a part that is no run of tokens"
                    );
                    let without = |dims: &[Dim]| -> Vec<Dim> {
                        dims.iter().enumerate().filter(|(k, _)| *k != axis).map(|(_, d)| d.clone()).collect()
                    };
                    super::arith::align(&without(&v.dims), &without(&reference.dims))?;
                    need!(
                        without(&v.dims)
                            .iter()
                            .zip(without(&reference.dims))
                            .all(|(a, b)| axes::size(a) == axes::size(&b)),
                        "parts of different sizes are joined"
                    );
                    let full = v.dims.iter().flatten().filter(|g| g.axis != BROADCAST).count();
                    if full > best {
                        best = full;
                        layout.clone_from(&v.dims);
                    }
                    parts.push(v.e);
                }
                _ => return Err("a sequence is joined to tokens".into()),
            }
        }
        let e = self.x.cat(parts)?;
        layout[axis] = axes::axis(1, self.x.shape(e)[1]);
        Ok(View { e, dims: layout, sel: None }.into())
    }

    fn join_channels(&mut self, views: &[&View], count: usize, axis: usize) -> Rule<Value> {
        let &[first, ..] = views else { return Err("nothing to join".into()) };
        need!(views.len() == count, "a constant is joined to channels");
        let mut positions = 0;
        let mut stride = None;
        for v in views {
            let channels = self.x.shape(v.e)[2];
            need!(v.sel == first.sel, "channels of different tokens are joined");
            let others = (0..v.rank()).all(|k| k == axis || v.dims[k] == first.dims[k]);
            need!(others, "channels of differently laid out activations are joined");
            let (n, below) = match v.dims[axis][..] {
                [] => (1, channels),
                [Digit { axis: 2, stride, size }] if stride * size == channels => (size, stride),
                _ => return Err("a concatenation along an axis that is neither tokens nor channels".into()),
            };
            need!(*stride.get_or_insert(below) == below, "channels of different widths are joined");
            positions += n;
        }
        let ids: Vec<_> = views.iter().map(|v| v.e).collect();
        let e = self.x.beside(&ids).ok_or("channels of different modules are joined")?;
        let mut dims = first.dims.clone();
        dims[axis] = axes::strided(2, stride.unwrap_or(1), positions);
        Ok(View { e, dims, sel: first.sel }.into())
    }

    /// Padding by nothing.
    pub(super) fn padding(&mut self, call: &Call<'_>) -> Rule<Value> {
        let pads = call.list("pads", 1)?.ok_or("the pads are missing")?;
        need!(pads.iter().all(|&p| p == 0), "padding by {pads:?}");
        Ok(call.get(0).clone())
    }

    /// A resize to the same size, where that leaves every pixel in its place.
    pub(super) fn resize(&mut self, call: &Call<'_>) -> Rule<Value> {
        let from = call.get(0).shape()?;
        let given = |k: usize| -> Rule<Option<Vec<f64>>> {
            if !call.has(k) {
                return Ok(None);
            }
            let a = call.get(k).array("the size")?;
            need!(a.len() <= 16, "Resize with {} sizes", a.len());
            Ok((!a.is_empty()).then(|| a.f64s()))
        };
        let axes = match call.ints("axes")? {
            Some(list) => list.into_iter().map(|a| axis_in(a, from.len())).collect::<Rule<Vec<_>>>()?,
            None => (0..from.len()).collect(),
        };
        let mode = call.text("coordinate_transformation_mode", "half_pixel")?;
        need!(mode != "tf_crop_and_resize", "a resize that crops");
        let last = if call.inputs.len() == 2 { 1 } else { 2 };
        match (given(last)?, given(3)?) {
            (_, Some(sizes)) => {
                let same = sizes.len() == axes.len() && axes.iter().zip(&sizes).all(|(&a, &s)| from[a] as f64 == s);
                need!(
                    same,
                    "a resize of {from:?} to {sizes:?}: fix the image size when exporting, or convert at the size of the position table"
                );
            }
            (Some(scales), None) => {
                let same = scales.len() == axes.len() && scales.iter().all(|s| (s - 1.0).abs() < 1e-6);
                need!(same, "a resize of {from:?} by {scales:?}");
            }
            (None, None) => return Err("a resize without a size".into()),
        }
        Ok(call.get(0).clone())
    }

    // ---------------------------------------------------------------------------------------------- sequences

    pub(super) fn sequence_construct(&mut self, call: &Call<'_>) -> Rule<Value> {
        need!(call.inputs.len() <= SEQUENCE_LIMIT, "a sequence of {}", call.inputs.len());
        need!(!call.inputs.iter().any(|v| matches!(v, Value::Seq(_))), "a sequence of sequences");
        Ok(Value::Seq(Rc::new(call.inputs.clone())))
    }

    fn items(value: &Value) -> Rule<Rc<Vec<Value>>> {
        if let Value::Seq(items) = value { Ok(items.clone()) } else { Err("a tensor where a sequence belongs".into()) }
    }

    pub(super) fn sequence_insert(&mut self, call: &Call<'_>) -> Rule<Value> {
        let mut items = Self::items(call.get(0))?.to_vec();
        need!(items.len() < SEQUENCE_LIMIT && !matches!(call.get(1), Value::Seq(_)), "a long or nested sequence");
        let at = if call.has(2) {
            call.get(2).array("the position")?.one().ok_or("the position")? as i64
        } else {
            items.len() as i64
        };
        let at = if at < 0 { at + items.len() as i64 } else { at };
        let at = usize::try_from(at).ok().filter(|&k| k <= items.len()).ok_or("a position outside of the sequence")?;
        items.insert(at, call.get(1).clone());
        Ok(Value::Seq(Rc::new(items)))
    }

    pub(super) fn sequence_at(&mut self, call: &Call<'_>) -> Rule<Value> {
        let items = Self::items(call.get(0))?;
        let at = call.get(1).array("the position")?.one().ok_or("the position")? as i64;
        Ok(items[fold::axis_index(at, items.len())?].clone())
    }

    pub(super) fn sequence_length(&mut self, call: &Call<'_>) -> Rule<Value> {
        Ok(Array::ints(DType::I64, &[], &[Self::items(call.get(0))?.len() as i64]).into())
    }

    pub(super) fn concat_from_sequence(&mut self, call: &Call<'_>) -> Rule<Value> {
        need!(call.int("new_axis", 0)? == 0, "a sequence is stacked along a new axis");
        let items = Self::items(call.get(0))?;
        self.concat(&items, call.int("axis", 0)?)
    }

    pub(super) fn split_to_sequence(&mut self, call: &Call<'_>) -> Rule<Value> {
        let shape = call.get(0).shape()?;
        let axis = axis_in(call.int("axis", 0)?, shape.len())?;
        let keep = call.int("keepdims", 1)? != 0 || call.has(1);
        let n = shape[axis];
        let sizes: Vec<usize> = if call.has(1) {
            let split = call.get(1).array("split")?;
            let list = call.get(1).ints("split")?;
            let size = |s: i64| usize::try_from(s).ok().filter(|&s| s > 0).ok_or_else(|| format!("a split of {s}"));
            if split.rank() == 0 {
                let each = size(list[0])?;
                need!(n.div_ceil(each) <= SEQUENCE_LIMIT, "a long sequence");
                (0..n.div_ceil(each)).map(|k| each.min(n - k * each)).collect()
            } else {
                list.into_iter().map(size).collect::<Rule<_>>()?
            }
        } else {
            need!(n <= SEQUENCE_LIMIT, "a long sequence");
            vec![1; n]
        };
        need!(
            sizes.len() <= SEQUENCE_LIMIT && sizes.iter().try_fold(0usize, |a, &b| a.checked_add(b)) == Some(n),
            "a split of {n} into {sizes:?}"
        );
        let mut items = Vec::with_capacity(sizes.len());
        let mut at = 0;
        for s in sizes {
            let part = self.restrict(call.get(0), axis, &Pick::range(at, s))?;
            at += s;
            items.push(if keep {
                part
            } else {
                Self::relaid(&part, |dims| {
                    Ok(dims.iter().enumerate().filter(|(k, _)| *k != axis).map(|(_, d)| d.clone()).collect())
                })?
            });
        }
        Ok(Value::Seq(Rc::new(items)))
    }
}

/// Index tables that name every one of `n` positions once, as strides along the table's axes: one pick for each.
fn windows(list: &[i64], shape: &[usize], n: usize) -> Option<Vec<Pick>> {
    if list.len() != n || list.first() != Some(&0) {
        return None;
    }
    let mut picks = Vec::with_capacity(shape.len());
    let mut below = n;
    for &size in shape {
        below = below.checked_div(size)?;
        let stride = if size > 1 { usize::try_from(*list.get(below)?).ok()? } else { 0 };
        picks.push(Pick { offset: 0, digits: if size > 1 { vec![(stride, size)] } else { Vec::new() } });
    }
    let mut want = vec![0usize];
    for p in &picks {
        let (stride, size) = p.digits.first().copied().unwrap_or((0, 1));
        want = want.iter().flat_map(|w| (0..size).map(move |i| w + i * stride)).collect();
    }
    let same = list.iter().zip(&want).all(|(&a, &b)| usize::try_from(a) == Ok(b));
    let all = Pick { offset: 0, digits: picks.iter().flat_map(|p| p.digits.clone()).collect() };
    (same && all.is_permutation(n)).then_some(picks)
}
