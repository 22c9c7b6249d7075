//! Operators over an axis: reductions, softmax, norms, global pooling, ArgMax, TopK.

use std::sync::Arc;

use rayon::prelude::*;

use super::call::{Call, one};
use super::shape::{Res, count};
use super::value::{Data, Value, is_float};
use super::{arith, math};
use crate::onnx::graph::DType;

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    let op = call.node.op.as_str();
    if let Some(kind) = op.strip_prefix("Reduce") {
        return one(reduce_node(call, kind));
    }
    one(match op {
        "GlobalAveragePool" | "GlobalMaxPool" => (|| {
            let v = call.input(0)?;
            if v.rank() < 3 {
                return Err(format!("needs spatial axes, found {:?}", v.dims));
            }
            let axes: Vec<usize> = (2..v.rank()).collect();
            reduce(v, &axes, if op == "GlobalMaxPool" { "Max" } else { "Mean" }, true)
        })(),
        "Softmax" | "LogSoftmax" => (|| {
            // before opset 13 all axes from `axis` on are one
            let old = call.opset < 13;
            let axis = call.int("axis", if old { 1 } else { -1 })?;
            let v = call.take(0)?;
            if !is_float(v.dtype) {
                return Err(format!("needs floats, found {:?}", v.dtype));
            }
            let dims = v.dims.clone();
            let at = if old && axis == v.rank() as i64 { v.rank() } else { v.axis(axis)? };
            if old {
                let (rows, n) = (count(&dims[..at])?, count(&dims[at..])?);
                return softmax(v.with_dims(vec![rows, n])?, op == "LogSoftmax")?.with_dims(dims);
            }
            over_last(&v, at, |v| softmax(v, op == "LogSoftmax"))
        })(),
        "LayerNormalization" => return Some(layer_norm(call)),
        "RMSNormalization" | "SimplifiedLayerNormalization" => rms_norm(call),
        "ArgMax" => arg_max(call),
        "TopK" => return Some(top_k(call)),
        _ => return None,
    })
}

fn reduce_node(call: &mut Call<'_>, kind: &str) -> Res<Value> {
    let axes = call.list("axes", 1)?;
    let keep = call.int("keepdims", 1)? != 0;
    let v = call.input(0)?;
    let axes = match axes {
        Some(axes) if !axes.is_empty() => axes.iter().map(|&a| v.axis(a)).collect::<Res<Vec<_>>>()?,
        _ if call.int("noop_with_empty_axes", 0)? != 0 => return Ok(v.clone()),
        _ => (0..v.rank()).collect(),
    };
    reduce(v, &axes, kind, keep)
}

/// Moves `axes` behind the others: `[rest…, axes…]` as a matrix.
fn rows_of(v: &Value, axes: &[usize]) -> Res<Value> {
    let mut perm: Vec<usize> = (0..v.rank()).filter(|a| !axes.contains(a)).collect();
    let rows = perm.iter().map(|&a| v.dims[a]).product();
    let mut sorted: Vec<usize> = axes.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.len() != axes.len() {
        return Err(format!("its axes {axes:?} repeat"));
    }
    let n = sorted.iter().map(|&a| v.dims[a]).product();
    perm.extend(sorted);
    let moved = if perm.is_sorted() { v.clone() } else { v.permute(&perm)? };
    moved.with_dims(vec![rows, n])
}

/// A reduction, by ONNX's name without `Reduce`. Sums are f64, so that their order does not matter.
pub(super) fn reduce(v: &Value, axes: &[usize], kind: &str, keep: bool) -> Res<Value> {
    let m = rows_of(v, axes)?;
    let n = m.dims[1];
    let dims = (0..v.rank())
        .filter(|a| keep || !axes.contains(a))
        .map(|a| if axes.contains(&a) { 1 } else { v.dims[a] })
        .collect();
    if let Data::Int(x) = &m.data {
        if n == 0 && !matches!(kind, "Sum" | "Prod") {
            return Err(format!("has nothing to reduce in {:?}", v.dims));
        }
        let f: fn(&[i64]) -> i64 = match kind {
            "Sum" => |r| r.iter().fold(0, |a, &b| a.wrapping_add(b)),
            "Prod" => |r| r.iter().fold(1, |a, &b| a.wrapping_mul(b)),
            "Max" => |r| r.iter().copied().max().unwrap_or(i64::MIN),
            "Min" => |r| r.iter().copied().min().unwrap_or(i64::MAX),
            "Mean" => |r| r.iter().fold(0i64, |a, &b| a.wrapping_add(b)) / r.len().max(1) as i64,
            _ => return Err(format!("there is no rule for Reduce{kind} of {:?}", v.dtype)),
        };
        let out = (0..m.dims[0]).map(|r| f(&x[r * n..(r + 1) * n])).collect();
        return Ok(Value::int(v.dtype, dims, out).rounded());
    }
    let f: fn(&mut dyn Iterator<Item = f64>, f64) -> f64 = match kind {
        "Sum" => |r, _| r.sum(),
        "Mean" => |r, n| r.sum::<f64>() / n,
        "Prod" => |r, _| r.product(),
        "Max" => |r, _| r.fold(f64::NEG_INFINITY, |a, b| if b.is_nan() || b > a { b } else { a }),
        "Min" => |r, _| r.fold(f64::INFINITY, |a, b| if b.is_nan() || b < a { b } else { a }),
        "L1" => |r, _| r.map(f64::abs).sum(),
        "L2" => |r, _| r.map(|x| x * x).sum::<f64>().sqrt(),
        "SumSquare" => |r, _| r.map(|x| x * x).sum(),
        _ => return Err(format!("there is no rule for Reduce{kind}")),
    };
    let out: Vec<f64> = match &m.data {
        Data::F32(x) if matches!(kind, "Sum" | "Mean") => {
            let by = if kind == "Mean" { n as f64 } else { 1.0 };
            by_row(x, m.dims[0], n, |row| math::wide(|| math::sum(row, |x| x)) / by)
        }
        Data::F32(x) => by_row(x, m.dims[0], n, |r| f(&mut r.iter().map(|&x| x as f64), n as f64)),
        Data::F64(x) => by_row(x, m.dims[0], n, |r| f(&mut r.iter().copied(), n as f64)),
        _ => return Err(format!("needs numbers, found {:?}", v.dtype)),
    };
    Ok(Value::reals(v.dtype, dims, out))
}

fn by_row<T: Sync>(x: &[T], rows: usize, n: usize, f: impl Fn(&[T]) -> f64 + Sync) -> Vec<f64> {
    (0..rows).into_par_iter().with_min_len(64).map(|r| f(&x[r * n..(r + 1) * n])).collect()
}

/// Applies `f`, which works on the last axis of a matrix, along an axis.
pub(super) fn over_last(v: &Value, axis: usize, f: impl FnOnce(Value) -> Res<Value>) -> Res<Value> {
    let n = v.dims[axis];
    let mut perm: Vec<usize> = (0..v.rank()).filter(|&a| a != axis).collect();
    perm.push(axis);
    let moved = if axis + 1 == v.rank() { v.clone() } else { v.permute(&perm)? };
    let dims = moved.dims.clone();
    let rows = count(&dims[..dims.len() - 1])?;
    let done = f(moved.with_dims(vec![rows, n])?)?.with_dims(dims)?;
    let mut back = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(i, &p)| back[p] = i);
    if axis + 1 == v.rank() { Ok(done) } else { done.permute(&back) }
}

/// Softmax of the rows of a matrix.
pub(super) fn softmax(v: Value, log: bool) -> Res<Value> {
    let n = v.dims.last().copied().unwrap_or(1).max(1);
    let Value { dtype, dims, data } = v;
    let data = match data {
        Data::F32(mut x) => {
            let rows = Arc::make_mut(&mut x).par_chunks_mut(n).with_min_len(8);
            rows.for_each(|row| math::wide(|| math::softmax(row, log)));
            Data::F32(x)
        }
        Data::F64(mut x) => {
            Arc::make_mut(&mut x).par_chunks_mut(n).with_min_len(8).for_each(|row| {
                let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = row.iter().map(|x| (x - top).exp()).sum();
                let shift = top + sum.ln();
                row.iter_mut().for_each(|x| *x = if log { *x - shift } else { (*x - top).exp() / sum });
            });
            Data::F64(x)
        }
        _ => return Err(format!("needs floats, found {dtype:?}")),
    };
    Ok(Value { dtype, dims, data }.rounded())
}

/// Normalises the rows of a value to mean 0 (if `centred`) and mean square 1; also returns 1/σ and the mean.
pub(super) fn norm_last(v: Value, eps: f64, centred: bool) -> Res<(Value, Vec<f64>, Vec<f64>)> {
    let n = v.dims.last().copied().ok_or("needs an axis")?;
    if v.is_empty() {
        return Err(format!("has nothing to norm in {:?}", v.dims));
    }
    let Value { dtype, dims, mut data } = v;
    // the mean is subtracted first, because a large mean would cancel the digits of the variance
    let stats = |sum: f64, squares: &dyn Fn(f64) -> f64| {
        let mean = if centred { sum / n as f64 } else { 0.0 };
        (1.0 / (squares(mean) / n as f64 + eps).sqrt(), mean)
    };
    let (inverse, means) = match &mut data {
        Data::F32(x) => {
            let rows = Arc::make_mut(x).par_chunks_mut(n).with_min_len(4);
            rows.map(|row| {
                math::wide(|| {
                    let (inverse, mean) =
                        stats(math::sum(row, |x| x), &|mean| math::sum(row, |x| (x - mean) * (x - mean)));
                    row.iter_mut().for_each(|x| *x = ((f64::from(*x) - mean) * inverse) as f32);
                    (inverse, mean)
                })
            })
            .unzip()
        }
        Data::F64(x) => {
            let rows = Arc::make_mut(x).par_chunks_mut(n).with_min_len(4);
            rows.map(|row| {
                let squares = |mean: f64| row.iter().map(|x| (x - mean) * (x - mean)).sum();
                let (inverse, mean) = stats(row.iter().sum(), &squares);
                row.iter_mut().for_each(|x| *x = (*x - mean) * inverse);
                (inverse, mean)
            })
            .unzip()
        }
        _ => return Err(format!("needs floats, found {dtype:?}")),
    };
    Ok((Value { dtype, dims, data }, inverse, means))
}

/// Scale and bias of a norm must be one-way broadcastable to what is normed.
fn affine(v: Value, scale: &Value, bias: Option<&Value>) -> Res<Value> {
    let v_dims = v.dims.clone();
    let out = plus(arith::combine(v, scale.clone(), "Mul")?, bias)?;
    if out.dims != v_dims {
        return Err(format!("scale of shape {:?} does not fit {v_dims:?}", scale.dims));
    }
    Ok(out)
}

fn layer_norm(call: &mut Call<'_>) -> Res<Vec<Value>> {
    let v = call.take(0)?;
    let axis = v.axis(call.int("axis", -1)?)?;
    let eps = call.float("epsilon", 1e-5)?;
    if eps < 0.0 {
        return Err(format!("epsilon is {eps}"));
    }
    let dims = v.dims.clone();
    let (rows, n) = (count(&dims[..axis])?, count(&dims[axis..])?);
    let scale = call.input(1)?;
    if scale.len() != n || call.opt(2).is_some_and(|b| b.len() != n) {
        return Err(format!("scale of shape {:?} over the axes {:?}", scale.dims, &dims[axis..]));
    }
    let (normed, inverse, means) = norm_last(v.with_dims(vec![rows, n])?, eps, true)?;
    let out = affine(normed.with_dims(dims.clone())?, scale, call.opt(2))?;
    let stat: Vec<usize> = dims.iter().enumerate().map(|(i, &d)| if i < axis { d } else { 1 }).collect();
    Ok(vec![out, Value::reals(DType::F32, stat.clone(), means), Value::reals(DType::F32, stat, inverse)])
}

fn rms_norm(call: &mut Call<'_>) -> Res<Value> {
    let v = call.take(0)?;
    let axis = v.axis(call.int("axis", -1)?)?;
    let eps = call.float("epsilon", 1e-5)?;
    let dims = v.dims.clone();
    let (rows, n) = (count(&dims[..axis])?, count(&dims[axis..])?);
    let normed = norm_last(v.with_dims(vec![rows, n])?, eps, false)?.0;
    affine(normed.with_dims(dims)?, call.input(1)?, None)
}

fn arg_max(call: &mut Call<'_>) -> Res<Value> {
    let v = call.input(0)?;
    let axis = v.axis(call.int("axis", 0)?)?;
    let (keep, last) = (call.int("keepdims", 1)? != 0, call.int("select_last_index", 0)? != 0);
    let m = rows_of(v, &[axis])?;
    let n = m.dims[1];
    if n == 0 {
        return Err("has nothing to choose from".into());
    }
    let x = m.to_f64()?;
    let best = |row: &[f64]| {
        let mut best = 0;
        for (i, &x) in row.iter().enumerate() {
            if x > row[best] || (last && x == row[best]) {
                best = i;
            }
        }
        best as i64
    };
    let mut dims = v.dims.clone();
    if keep {
        dims[axis] = 1;
    } else {
        dims.remove(axis);
    }
    Ok(Value::int(DType::I64, dims, x.chunks_exact(n).map(best).collect()))
}

fn top_k(call: &mut Call<'_>) -> Res<Vec<Value>> {
    let v = call.input(0)?;
    let axis = v.axis(call.int("axis", -1)?)?;
    let largest = call.int("largest", 1)? != 0;
    let k = match call.opt(1) {
        Some(k) => k.one_int()?,
        None => call.int("k", 0)?,
    };
    let n = v.dims[axis];
    let k = usize::try_from(k).ok().filter(|&k| k <= n).ok_or_else(|| format!("the top {k} of {n}"))?;
    let mut perm: Vec<usize> = (0..v.rank()).filter(|&a| a != axis).collect();
    perm.push(axis);
    let moved = v.permute(&perm)?;
    let x = moved.to_f64()?;
    let mut order = Vec::with_capacity(x.len());
    for row in x.chunks(n.max(1)) {
        let mut ids: Vec<usize> = (0..row.len()).collect();
        ids.sort_by(|&a, &b| if largest { row[b].total_cmp(&row[a]) } else { row[a].total_cmp(&row[b]) });
        order.extend(ids.into_iter().take(k));
    }
    let mut dims = moved.dims.clone();
    if let Some(d) = dims.last_mut() {
        *d = k;
    }
    let values = moved.pick(dims.clone(), &|i| i / k * n + order[i])?;
    let at = Value::int(DType::I64, dims, order.iter().map(|&i| i as i64).collect());
    let mut back = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(i, &p)| back[p] = i);
    Ok(vec![values.permute(&back)?, at.permute(&back)?])
}

/// `a + b`, or `a` if `b` is absent.
pub(super) fn plus(a: Value, b: Option<&Value>) -> Res<Value> {
    match b {
        Some(b) => arith::combine(a, b.clone(), "Add"),
        None => Ok(a),
    }
}
