//! Constants by index: gathering and scattering elements, counting and marking positions.

use super::call::Call;
use super::fold;
use super::select::axis_index;
use super::value::{Rule, Value, axis_in, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::onnx::graph::{Attr, DType};

/// The elements of a constant at these row-major positions.
fn at_positions(x: &Array, positions: &[usize], shape: &[usize]) -> Array {
    if x.dtype.is_float() {
        let values = x.f64s();
        Array::floats(x.dtype, shape, &positions.iter().map(|&p| values[p]).collect::<Vec<_>>())
    } else {
        let values = x.i64s();
        Array::ints(x.dtype, shape, &positions.iter().map(|&p| values[p]).collect::<Vec<_>>())
    }
}

fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for k in (1..shape.len()).rev() {
        out[k - 1] = out[k] * shape[k];
    }
    out
}

/// Elements of a shape, if that is few enough to compute.
fn count(shape: &[usize]) -> Rule<usize> {
    let n = shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).unwrap_or(usize::MAX);
    fold::small(n)?;
    Ok(n)
}

/// Some positions of a dimension, in any order.
pub(super) fn gathered(x: &Array, axis: usize, list: &[usize]) -> Rule<Array> {
    let mut shape = x.shape();
    let n = std::mem::replace(&mut shape[axis], list.len());
    let all = count(&shape)?;
    fold::small(x.len())?;
    let inner: usize = shape[axis + 1..].iter().product();
    let position = |i: usize| {
        let (rest, within) = (i / inner.max(1), i % inner.max(1));
        (rest / list.len() * n + list[rest % list.len()]) * inner + within
    };
    Ok(at_positions(x, &(0..all).map(position).collect::<Vec<_>>(), &shape))
}

/// A constant repeated along its dimensions.
pub(super) fn tiled(x: &Array, repeats: &[usize]) -> Rule<Array> {
    let from = x.shape();
    let shape: Vec<usize> = from.iter().zip(repeats).map(|(&n, &r)| n.saturating_mul(r)).collect();
    let all = count(&shape)?;
    let (inner, outer) = (strides(&from), strides(&shape));
    let position =
        |i: usize| (0..shape.len()).map(|k| i / outer[k] % shape[k] % from[k].max(1) * inner[k]).sum::<usize>();
    Ok(at_positions(x, &(0..all).map(position).collect::<Vec<_>>(), &shape))
}

impl Walk<'_> {
    /// Operators over known elements that pick, place, count or mark some of them.
    pub(super) fn fold_index(&mut self, call: &Call<'_>) -> Rule<Value> {
        let a = |k: usize| call.get(k).array("an operand");
        let x = a(0)?;
        fold::small(x.len())?;
        let shape = x.shape();
        let out = match call.node.op.as_str() {
            "GatherElements" => {
                let index = a(1)?;
                let axis = axis_in(call.int("axis", 0)?, shape.len())?;
                let to = index.shape();
                need!(to.len() == shape.len(), "GatherElements of ranks {} and {}", shape.len(), to.len());
                count(&to)?;
                at_positions(x, &along(&shape, &to, axis, &index.i64s())?, &to)
            }
            "ScatterElements" => {
                let (index, updates) = (a(1)?, a(2)?);
                need!(call.text("reduction", "none")? == "none", "ScatterElements that reduces");
                let axis = axis_in(call.int("axis", 0)?, shape.len())?;
                need!(index.shape() == updates.shape() && index.rank() == shape.len(), "ScatterElements");
                count(&index.shape())?;
                placed(x, updates, &along(&shape, &index.shape(), axis, &index.i64s())?)?
            }
            "GatherND" | "ScatterND" => {
                let index = a(1)?;
                let to = index.shape();
                let depth = to.last().copied().unwrap_or(0);
                let batch = usize::try_from(call.int("batch_dims", 0)?).map_err(|_| "batch_dims")?;
                need!(
                    depth >= 1 && batch < to.len() && batch + depth <= shape.len() && shape[..batch] == to[..batch],
                    "indices of shape {to:?} into {shape:?}"
                );
                let inner: usize = shape[batch + depth..].iter().product();
                let result: Vec<usize> = [&to[..to.len() - 1], &shape[batch + depth..]].concat();
                count(&result)?;
                let steps = strides(&shape);
                let rows: usize = to[..to.len() - 1].iter().product();
                let per_batch = rows / to[..batch].iter().product::<usize>().max(1);
                let whole: usize = shape[batch..].iter().product();
                let mut positions = Vec::with_capacity(rows * inner);
                for (row, list) in index.i64s().chunks(depth).enumerate() {
                    let mut at = row / per_batch.max(1) * whole;
                    for (k, &i) in list.iter().enumerate() {
                        at += axis_index(i, shape[batch + k])? * steps[batch + k];
                    }
                    positions.extend(at..at + inner);
                }
                if call.node.op == "GatherND" {
                    at_positions(x, &positions, &result)
                } else {
                    let updates = a(2)?;
                    need!(call.text("reduction", "none")? == "none", "ScatterND that reduces");
                    need!(batch == 0 && updates.shape() == result, "updates of shape {:?}", updates.shape());
                    placed(x, updates, &positions)?
                }
            }
            "NonZero" => {
                let values = x.f64s();
                let steps = strides(&shape);
                let found: Vec<usize> = (0..values.len()).filter(|&i| values[i] != 0.0).collect();
                let rank = shape.len();
                let rows = (0..rank).flat_map(|k| found.iter().map(move |i| (i, k)));
                let rows: Vec<i64> = rows.map(|(i, k)| (i / steps[k] % shape[k]) as i64).collect();
                Array::ints(DType::I64, &[rank, found.len()], &rows)
            }
            "CumSum" => {
                let axis = axis_in(a(1)?.one().ok_or("the axis of CumSum is not one number")? as i64, shape.len())?;
                let (exclusive, reverse) = (call.int("exclusive", 0)? != 0, call.int("reverse", 0)? != 0);
                let mut values = x.f64s();
                let step = strides(&shape)[axis];
                let n = shape[axis];
                for start in (0..values.len()).filter(|i| (i / step).is_multiple_of(n.max(1))) {
                    let mut sum = 0.0;
                    for k in 0..n {
                        let i = start + step * if reverse { n - 1 - k } else { k };
                        let own = values[i];
                        values[i] = if exclusive { sum } else { sum + own };
                        sum += own;
                    }
                }
                numbers(x.dtype, &shape, &values)
            }
            "OneHot" => {
                let (depth, pair) = (a(1)?.one().ok_or("the depth of OneHot is not one number")?, a(2)?);
                need!((1.0..=65536.0).contains(&depth) && pair.len() == 2, "OneHot of depth {depth}");
                let depth = depth as usize;
                let axis = axis_in(call.int("axis", -1)?, shape.len() + 1)?;
                let mut to = shape.clone();
                to.insert(axis, depth);
                let all = count(&to)?;
                let inner: usize = shape[axis..].iter().product();
                let (index, pair_values) = (x.i64s(), pair.f64s());
                let value = |i: usize| {
                    let at = index[i / inner / depth * inner + i % inner];
                    let wanted = if at < 0 { at.saturating_add(depth as i64) } else { at };
                    pair_values[usize::from(wanted == (i / inner % depth) as i64)]
                };
                numbers(pair.dtype, &to, &(0..all).map(value).collect::<Vec<_>>())
            }
            "EyeLike" => {
                let &[rows, columns] = &shape[..] else { return Err(format!("EyeLike of rank {}", shape.len())) };
                let k = call.int("k", 0)?;
                let dtype = match call.node.attrs.get("dtype") {
                    Some(Attr::Int(code)) => {
                        i32::try_from(*code).ok().and_then(DType::from_onnx).ok_or("EyeLike of another type")?
                    }
                    _ => x.dtype,
                };
                let on = |i: usize| (i % columns) as i64 == ((i / columns) as i64).saturating_add(k);
                numbers(dtype, &shape, &(0..rows * columns).map(|i| f64::from(u8::from(on(i)))).collect::<Vec<_>>())
            }
            other => return Err(format!("{other} of constants")),
        };
        Ok(out.into())
    }
}

fn numbers(dtype: DType, shape: &[usize], values: &[f64]) -> Array {
    if dtype.is_float() {
        Array::floats(dtype, shape, values)
    } else {
        Array::ints(dtype, shape, &values.iter().map(|&v| v as i64).collect::<Vec<_>>())
    }
}

/// The positions that the indices of `GatherElements` name: those of the index, but for one axis.
fn along(shape: &[usize], to: &[usize], axis: usize, index: &[i64]) -> Rule<Vec<usize>> {
    let fits = (0..shape.len()).all(|k| k == axis || to[k] <= shape[k]);
    need!(fits, "indices of shape {to:?} into {shape:?}");
    let (from, own) = (strides(shape), strides(to));
    let place = |(i, &at): (usize, &i64)| {
        let rest = (0..shape.len()).filter(|&k| k != axis).map(|k| i / own[k] % to[k] * from[k]).sum::<usize>();
        Ok(rest + axis_index(at, shape[axis])? * from[axis])
    };
    index.iter().enumerate().map(place).collect()
}

/// A constant with other elements at some positions.
fn placed(x: &Array, updates: &Array, positions: &[usize]) -> Rule<Array> {
    need!(x.dtype == updates.dtype && positions.len() == updates.len(), "updates of another type or number");
    let shape = x.shape();
    Ok(if x.dtype.is_float() {
        let mut values = x.f64s();
        positions.iter().zip(updates.f64s()).for_each(|(&p, v)| values[p] = v);
        Array::floats(x.dtype, &shape, &values)
    } else {
        let mut values = x.i64s();
        positions.iter().zip(updates.i64s()).for_each(|(&p, v)| values[p] = v);
        Array::ints(x.dtype, &shape, &values)
    })
}
