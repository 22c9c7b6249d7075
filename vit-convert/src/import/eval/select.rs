//! Operators that keep some positions of a dimension: Split, Slice and Gather.

use super::call::Call;
use super::index;
use super::value::{Rule, Value, View, axis_in, need};
use super::walk::Walk;
use crate::import::axes::{self, BROADCAST, Digit, Dim, Pick};
use crate::import::expr::Op;

impl Walk<'_> {
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
        // the kept channels in order: all channel digits by stride, with the selected one in its place
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
            if step < 0 {
                value = backwards(&value, axis, [starts[k], ends[k], step])?;
                continue;
            }
            need!(step > 0, "a slice with a step of 0");
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
            // every position once, as a matrix of windows (nn.Unfold), is a reshape
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
        let picked = if let Some(pick) = evenly(&list, n)? {
            self.restrict(call.get(0), axis, &pick)?
        } else {
            // an index list is supported for small constants only
            let Value::Const(c) = call.get(0) else {
                return Err("some elements of an activation are picked, in no even steps".into());
            };
            let at = list.iter().map(|&i| axis_index(i, n)).collect::<Rule<Vec<_>>>()?;
            index::gathered(&c.array, axis, &at)?.into()
        };
        Self::reshaped(&picked, &target)
    }
}

/// A slice with a negative step, of a constant.
fn backwards(value: &Value, axis: usize, [start, end, step]: [i64; 3]) -> Rule<Value> {
    let Value::Const(c) = value else {
        return Err("an activation is reversed (a slice with a negative step)".into());
    };
    let n = c.array.dim(axis) as i64;
    let wrap = |v: i64| (if v < 0 { v.saturating_add(n) } else { v }).clamp(-1, n - 1);
    let (mut at, end) = (wrap(start), wrap(end));
    let mut list = Vec::new();
    while at > end && at >= 0 {
        list.push(at as usize);
        at = at.saturating_add(step);
    }
    Ok(index::gathered(&c.array, axis, &list)?.into())
}

/// The positions in an index list as a pick, if they are evenly spaced.
fn evenly(list: &[i64], size: usize) -> Rule<Option<Pick>> {
    let at = list.iter().map(|&i| axis_index(i, size)).collect::<Rule<Vec<usize>>>()?;
    let [first, rest @ ..] = &at[..] else { return Ok(Some(Pick { offset: 0, digits: vec![(1, 0)] })) };
    let Some(second) = rest.first() else { return Ok(Some(Pick::range(*first, 1))) };
    let Some(step) = second.checked_sub(*first) else { return Ok(None) };
    let even = at.iter().enumerate().all(|(k, &p)| p == first + k * step);
    Ok((even && step > 0).then(|| Pick::steps(*first, step, at.len())))
}

/// A position that may count from the end.
pub(super) fn axis_index(i: i64, size: usize) -> Rule<usize> {
    let at = if i < 0 { i.saturating_add(size as i64) } else { i };
    usize::try_from(at).ok().filter(|&p| p < size).ok_or_else(|| format!("index {i} of {size}"))
}

/// One pick for each axis of an index table that contains each of `n` positions once, evenly spaced along each axis.
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
