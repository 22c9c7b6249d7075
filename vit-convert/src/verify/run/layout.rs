//! Operators that move elements: shapes, views, joining, cutting, picking.

use super::broadcast::broadcast_dims;
use super::call::{Call, one};
use super::shape::{Res, count, position, strides};
use super::value::{Data, Value};
use crate::onnx::graph::{Attr, DType};

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    one(match call.node.op.as_str() {
        "Identity" => {
            return Some(call.inputs.first_mut().and_then(Option::take).map(|v| vec![v]).ok_or("has no input".into()));
        }
        "Reshape" => reshape(call),
        "Flatten" => flatten(call),
        "Transpose" => transpose(call),
        "Squeeze" => squeeze(call),
        "Unsqueeze" => unsqueeze(call),
        "Concat" => (|| {
            let inputs = (0..call.inputs.len()).map(|i| call.input(i).cloned()).collect::<Res<Vec<_>>>()?;
            let Some(Attr::Int(axis)) = call.node.attrs.get("axis") else { return Err("has no axis".into()) };
            concat(&inputs, *axis)
        })(),
        "Split" => return Some(split(call)),
        "Slice" => slice(call),
        "Gather" => gather(call),
        "Expand" => (|| {
            let shape = sizes(call.input(1)?.as_ints()?)?;
            let v = call.input(0)?;
            v.broadcast(&broadcast_dims(&v.dims, &shape)?)
        })(),
        "Tile" => tile(call),
        "Pad" => pad(call),
        "Resize" | "Upsample" => super::resize::resize(call),
        "Shape" => shape(call),
        "Size" => (|| Ok(Value::int(DType::I64, vec![], vec![call.input(0)?.len() as i64])))(),
        "Range" => range(call),
        "ConstantOfShape" => (|| {
            let dims = sizes(call.input(0)?.as_ints()?)?;
            count(&dims)?;
            let fill = match call.node.attrs.get("value") {
                Some(Attr::Tensor(t)) => call.constant(t)?,
                _ => Value::f32(vec![1], vec![0.0]),
            };
            if fill.len() != 1 {
                return Err(format!("its value has shape {:?}, it must have one element", fill.dims));
            }
            fill.with_dims(vec![])?.broadcast(&dims)
        })(),
        "Trilu" => trilu(call),
        _ => return None,
    })
}

/// A list of sizes from a shape tensor.
pub(super) fn sizes(shape: &[i64]) -> Res<Vec<usize>> {
    shape.iter().map(|&d| usize::try_from(d).map_err(|_| format!("shape {shape:?} has a negative size"))).collect()
}

fn reshape(call: &mut Call<'_>) -> Res<Value> {
    let shape = call.list("shape", 1)?.ok_or("has no shape")?;
    let keep_zero = call.int("allowzero", 0)? != 0;
    let v = call.take(0)?;
    let mut dims = Vec::with_capacity(shape.len());
    let mut free = None;
    for (i, &d) in shape.iter().enumerate() {
        dims.push(match d {
            -1 if free.is_none() => {
                free = Some(i);
                1
            }
            0 if !keep_zero => {
                *v.dims.get(i).ok_or_else(|| format!("shape {shape:?} copies axis {i} of {:?}", v.dims))?
            }
            d => usize::try_from(d).map_err(|_| format!("shape {shape:?}"))?,
        });
    }
    if let Some(i) = free {
        let rest = count(&dims)?;
        if rest == 0 || v.len() % rest != 0 {
            return Err(format!("{:?} cannot be reshaped to {shape:?}", v.dims));
        }
        dims[i] = v.len() / rest;
    }
    v.with_dims(dims)
}

fn flatten(call: &mut Call<'_>) -> Res<Value> {
    let axis = call.int("axis", 1)?;
    let v = call.take(0)?;
    let axis = if axis == v.rank() as i64 { v.rank() } else { v.axis(axis)? };
    let dims = vec![count(&v.dims[..axis])?, count(&v.dims[axis..])?];
    v.with_dims(dims)
}

fn transpose(call: &mut Call<'_>) -> Res<Value> {
    let v = call.input(0)?;
    match call.ints("perm")? {
        None => v.permute(&(0..v.rank()).rev().collect::<Vec<_>>()),
        Some(perm) => {
            let at = |&p: &i64| usize::try_from(p).map_err(|_| format!("{perm:?} is no permutation"));
            v.permute(&perm.iter().map(at).collect::<Res<Vec<_>>>()?)
        }
    }
}

fn squeeze(call: &mut Call<'_>) -> Res<Value> {
    let axes = call.list("axes", 1)?;
    let v = call.take(0)?;
    let drop = match axes {
        None => (0..v.rank()).filter(|&i| v.dims[i] == 1).collect(),
        Some(axes) => axes.iter().map(|&a| v.axis(a)).collect::<Res<Vec<_>>>()?,
    };
    if let Some(i) = drop.iter().find(|&&i| v.dims[i] != 1) {
        return Err(format!("axis {i} of {:?} is not 1", v.dims));
    }
    let dims = (0..v.rank()).filter(|i| !drop.contains(i)).map(|i| v.dims[i]).collect();
    v.with_dims(dims)
}

fn unsqueeze(call: &mut Call<'_>) -> Res<Value> {
    let axes = call.list("axes", 1)?.ok_or("has no axes")?;
    let v = call.take(0)?;
    let rank = v.rank() + axes.len();
    let mut new = vec![false; rank];
    for &a in &axes {
        let i = position(a, rank)?;
        if std::mem::replace(&mut new[i], true) {
            return Err(format!("its axes {axes:?} repeat"));
        }
    }
    let mut old = v.dims.iter();
    let dims = new.iter().map(|&n| if n { 1 } else { old.next().copied().unwrap_or(1) }).collect();
    v.with_dims(dims)
}

/// Tensors of one type joined along an axis.
pub(super) fn concat(inputs: &[Value], axis: i64) -> Res<Value> {
    let first = inputs.first().ok_or("has nothing to join")?;
    let wide = inputs.iter().find(|v| matches!(v.data, Data::F64(_))).unwrap_or(first);
    let inputs: Vec<Value> = inputs.iter().map(|v| v.clone().like(wide)).collect();
    let first = &inputs[0];
    let axis = first.axis(axis)?;
    let mut dims = first.dims.clone();
    dims[axis] = 0;
    for v in &inputs {
        let same = v.rank() == dims.len() && (0..dims.len()).all(|i| i == axis || v.dims[i] == dims[i]);
        if !same || v.dtype != first.dtype {
            let (a, b) = (&first.dims, &v.dims);
            return Err(format!("{:?} {a:?} and {:?} {b:?} do not join along axis {axis}", first.dtype, v.dtype));
        }
        dims[axis] += v.dims[axis];
    }
    let n = count(&dims)?;
    let outer: usize = dims[..axis].iter().product();
    fn join<'a, T: Copy + 'a>(parts: &[&'a [T]], outer: usize, n: usize) -> Vec<T> {
        let mut out = Vec::with_capacity(n);
        for o in 0..outer {
            for p in parts {
                let step = p.len() / outer;
                out.extend_from_slice(&p[o * step..(o + 1) * step]);
            }
        }
        out
    }
    macro_rules! parts {
        ($kind:ident) => {
            inputs
                .iter()
                .filter_map(|v| if let Data::$kind(x) = &v.data { Some(x.as_slice()) } else { None })
                .collect::<Vec<_>>()
        };
    }
    let data = match &first.data {
        Data::F32(_) => Data::F32(join(&parts!(F32), outer, n).into()),
        Data::F64(_) => Data::F64(join(&parts!(F64), outer, n).into()),
        Data::Int(_) => Data::Int(join(&parts!(Int), outer, n).into()),
        Data::Sequence(_) => return Err("needs tensors".into()),
    };
    Ok(Value { dtype: first.dtype, dims, data })
}

/// `len` places of an axis from `start`.
pub(super) fn narrow(v: &Value, axis: usize, start: usize, len: usize) -> Res<Value> {
    let all = strides(&v.dims);
    if start.checked_add(len).is_none_or(|end| end > v.dims[axis]) {
        return Err(format!("takes {len} places from {start} of axis {axis} of {:?}", v.dims));
    }
    let mut dims = v.dims.clone();
    dims[axis] = len;
    v.strided(dims, &all, start * all[axis] as usize)
}

fn split(call: &mut Call<'_>) -> Res<Vec<Value>> {
    let v = call.input(0)?;
    let axis = v.axis(call.int("axis", 0)?)?;
    let n = v.dims[axis];
    let lens = if let Some(split) = call.list("split", 1)? {
        sizes(&split)?
    } else {
        let parts = match call.int("num_outputs", 0)? {
            0 => call.node.outputs.len(),
            k => usize::try_from(k).map_err(|_| "num_outputs is negative")?,
        };
        if parts == 0 || parts > n.max(1) || (n % parts != 0 && !call.node.attrs.contains_key("num_outputs")) {
            return Err(format!("axis {axis} of {:?} does not split into {parts}", v.dims));
        }
        let step = n.div_ceil(parts);
        (0..parts).map(|i| step.min(n.saturating_sub(i * step))).collect()
    };
    if lens.iter().try_fold(0usize, |s, &l| s.checked_add(l)) != Some(n) || lens.len() != call.node.outputs.len() {
        return Err(format!(
            "axis {axis} of {:?} does not split into {lens:?} for {} outputs",
            v.dims,
            call.node.outputs.len()
        ));
    }
    let mut at = 0;
    let part = |&len: &usize| {
        at += len;
        narrow(v, axis, at - len, len)
    };
    lens.iter().map(part).collect()
}

fn slice(call: &mut Call<'_>) -> Res<Value> {
    let starts = call.list("starts", 1)?.ok_or("has no starts")?;
    let ends = call.list("ends", 2)?.ok_or("has no ends")?;
    let axes = call.list("axes", 3)?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps =
        call.opt(4).map(|v| v.as_ints().map(<[i64]>::to_vec)).transpose()?.unwrap_or_else(|| vec![1; starts.len()]);
    if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
        return Err(format!("starts {starts:?}, ends {ends:?}, axes {axes:?} and steps {steps:?} differ in length"));
    }
    let v = call.input(0)?;
    let (mut dims, mut step_of, mut offset) = (v.dims.clone(), strides(&v.dims), 0);
    let mut seen = vec![false; dims.len()];
    for i in 0..starts.len() {
        let axis = v.axis(axes[i])?;
        if std::mem::replace(&mut seen[axis], true) {
            return Err(format!("its axes {axes:?} repeat"));
        }
        let (n, step) = (dims[axis] as i64, steps[i]);
        if step == 0 || step == i64::MIN {
            return Err(format!("its steps are {steps:?}"));
        }
        let wrap = |x: i64| if x < 0 { x.saturating_add(n) } else { x };
        let (start, len) = if step > 0 {
            let (s, e) = (wrap(starts[i]).clamp(0, n), wrap(ends[i]).clamp(0, n));
            (s, if e > s { (e - s - 1) / step + 1 } else { 0 })
        } else {
            let (s, e) = (wrap(starts[i]).clamp(-1, n - 1), wrap(ends[i]).clamp(-1, n - 1));
            (s, if s > e { (s - e - 1) / -step + 1 } else { 0 })
        };
        dims[axis] = len as usize;
        if len > 0 {
            offset += start as usize * step_of[axis] as usize;
        }
        step_of[axis] = if len > 1 { step_of[axis] * step as isize } else { 0 };
    }
    v.strided(dims, &step_of, offset)
}

/// Indices checked and made positive.
fn indices(v: &Value, n: usize) -> Res<Vec<usize>> {
    if !matches!(v.dtype, DType::I32 | DType::I64) {
        return Err(format!("its indices are {:?}, they must be int32 or int64", v.dtype));
    }
    v.as_ints()?.iter().map(|&i| position(i, n).map_err(|_| format!("index {i} of {n} places"))).collect()
}

fn gather(call: &mut Call<'_>) -> Res<Value> {
    let (v, at) = (call.input(0)?, call.input(1)?);
    let axis = v.axis(call.int("axis", 0)?)?;
    let picked = indices(at, v.dims[axis])?;
    let inner: usize = v.dims[axis + 1..].iter().product();
    let n = v.dims[axis];
    let dims = [&v.dims[..axis], &at.dims, &v.dims[axis + 1..]].concat();
    let k = picked.len();
    if count(&dims)? == 0 {
        return v.pick(dims, &|_| 0);
    }
    v.pick(dims, &|i| (i / inner / k * n + picked[i / inner % k]) * inner + i % inner)
}

fn tile(call: &mut Call<'_>) -> Res<Value> {
    let v = call.input(0)?;
    let repeats = sizes(call.input(1)?.as_ints()?)?;
    if repeats.len() != v.rank() {
        return Err(format!("repeats {repeats:?} of {:?}", v.dims));
    }
    let dims: Vec<usize> = v.dims.iter().zip(&repeats).map(|(d, r)| d.saturating_mul(*r)).collect();
    count(&dims)?;
    let (from, to) = (strides(&v.dims), strides(&dims));
    v.pick(dims.clone(), &|i| {
        (0..dims.len()).map(|a| i / to[a] as usize % dims[a] % v.dims[a] * from[a] as usize).sum()
    })
}

fn pad(call: &mut Call<'_>) -> Res<Value> {
    let pads = call.list("pads", 1)?.ok_or("has no pads")?;
    if pads.iter().any(|&p| p != 0) {
        return Err(format!("there is no rule for padding by {pads:?}"));
    }
    call.take(0)
}

fn shape(call: &mut Call<'_>) -> Res<Value> {
    let v = call.input(0)?;
    let rank = v.rank() as i64;
    let at = |x: i64| (if x < 0 { x.saturating_add(rank) } else { x }).clamp(0, rank) as usize;
    let (start, end) = (at(call.int("start", 0)?), at(call.int("end", i64::MAX)?));
    Ok(Value::ints(v.dims[start..end.max(start)].iter().map(|&d| d as i64).collect()))
}

fn range(call: &mut Call<'_>) -> Res<Value> {
    let (start, limit, delta) = (call.input(0)?, call.input(1)?, call.input(2)?);
    if start.dtype != limit.dtype || start.dtype != delta.dtype {
        return Err("its inputs must be of one type".into());
    }
    let (s, d) = (start.one()?, delta.one()?);
    let n = ((limit.one()? - s) / d).ceil().max(0.0);
    if !n.is_finite() {
        return Err("never ends".into());
    }
    let n = n as usize;
    count(&[n])?;
    Ok(Value::reals(start.dtype, vec![n], (0..n).map(|i| s + i as f64 * d).collect()))
}

fn trilu(call: &mut Call<'_>) -> Res<Value> {
    let upper = call.int("upper", 1)? != 0;
    let k = call.opt(1).map_or(Ok(0), Value::one_int)?;
    let v = call.input(0)?;
    let &[.., rows, cols] = v.dims.as_slice() else { return Err("needs matrices".into()) };
    let outside = v.len();
    let flat = concat(&[v.clone().with_dims(vec![v.len()])?, Value::reals(v.dtype, vec![1], vec![0.0])], 0)?;
    flat.pick(v.dims.clone(), &|i| {
        let (r, c) = ((i / cols % rows) as i64, (i % cols) as i64);
        let keep = if upper { c >= r.saturating_add(k) } else { c <= r.saturating_add(k) };
        if keep { i } else { outside }
    })
}
