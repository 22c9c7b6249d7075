//! Operators that only move elements: reshapes, transpositions and broadcasts, over constants and views alike.

use super::call::Call;
use super::fold;
use super::index;
use super::value::{Const, Rule, Value, axis_in, need};
use super::walk::Walk;
use crate::import::axes::{self, Dim};

impl Walk<'_> {
    pub(super) fn relaid(value: &Value, f: impl FnOnce(&[Dim]) -> Rule<Vec<Dim>>) -> Rule<Value> {
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
        let fits = repeats.iter().zip(&from).all(|(&r, &n)| r == 1 || (r > 0 && n == 1));
        if let (false, Value::Const(c)) = (fits, call.get(0)) {
            let repeats = repeats.iter().map(|&n| usize::try_from(n).map_err(|_| format!("Tile by {n}")));
            return Ok(index::tiled(&c.array, &repeats.collect::<Rule<Vec<_>>>()?)?.into());
        }
        need!(fits, "an activation is repeated (Tile of {from:?} by {repeats:?})");
        let target: Vec<usize> =
            repeats.iter().zip(&from).map(|(&r, &n)| if r == 1 { n } else { r as usize }).collect();
        self.broadcast(call.get(0), &target)
    }

    /// Padding by nothing.
    pub(super) fn padding(&mut self, call: &Call<'_>) -> Rule<Value> {
        let pads = call.list("pads", 1)?.ok_or("the pads are missing")?;
        need!(pads.iter().all(|&p| p == 0), "padding by {pads:?}");
        Ok(call.get(0).clone())
    }
}
