//! Operators that gather or scatter elements by index, and those that count or mark positions.

use super::call::{Call, one};
use super::layout::concat;
use super::shape::{Res, count, position, strides};
use super::value::Value;
use crate::onnx::graph::DType;

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    one(match call.node.op.as_str() {
        "GatherElements" => (|| {
            let (v, index) = (call.input(0)?, call.input(1)?);
            let axis = v.axis(call.int("axis", 0)?)?;
            let places = element_places(v, index, axis)?;
            v.pick(index.dims.clone(), &|i| places[i])
        })(),
        "ScatterElements" => (|| {
            if call.str("reduction", "none")? != "none" {
                return Err("there is no rule for a reduction".into());
            }
            let (v, index) = (call.input(0)?, call.input(1)?);
            let places = element_places(v, index, v.axis(call.int("axis", 0)?)?)?;
            scatter(v, call.input(2)?, &places)
        })(),
        "GatherND" => (|| {
            let (v, index) = (call.input(0)?, call.input(1)?);
            let batch = usize::try_from(call.int("batch_dims", 0)?).map_err(|_| "batch_dims is negative")?;
            let (places, dims) = tuple_places(v, index, batch)?;
            v.pick(dims, &|i| places[i])
        })(),
        "ScatterND" => (|| {
            if call.str("reduction", "none")? != "none" {
                return Err("there is no rule for a reduction".into());
            }
            let (v, index) = (call.input(0)?, call.input(1)?);
            let (places, dims) = tuple_places(v, index, 0)?;
            if dims != call.input(2)?.dims {
                return Err(format!("updates of shape {:?}, {dims:?} are expected", call.input(2)?.dims));
            }
            scatter(v, call.input(2)?, &places)
        })(),
        "NonZero" => (|| {
            let v = call.input(0)?;
            let steps = strides(&v.dims);
            let data = v.to_f64()?;
            let found: Vec<usize> = (0..data.len()).filter(|&i| data[i] != 0.0).collect();
            let mut out = Vec::with_capacity(found.len() * v.rank());
            for (axis, &step) in steps.iter().enumerate() {
                out.extend(found.iter().map(|&i| (i / step as usize % v.dims[axis]) as i64));
            }
            Ok(Value::int(DType::I64, vec![v.rank(), found.len()], out))
        })(),
        "CumSum" => (|| {
            let v = call.input(0)?;
            let axis = v.axis(call.input(1)?.one_int()?)?;
            let (exclusive, reverse) = (call.int("exclusive", 0)? != 0, call.int("reverse", 0)? != 0);
            let (n, inner) = (v.dims[axis], v.dims[axis + 1..].iter().product::<usize>());
            let data = v.to_f64()?;
            let sum = |i: usize| -> f64 {
                let (outer, at, rest) = (i / inner / n, i / inner % n, i % inner);
                let counted = (0..n).filter(|&k| match (reverse, exclusive) {
                    (false, false) => k <= at,
                    (false, true) => k < at,
                    (true, false) => k >= at,
                    (true, true) => k > at,
                });
                counted.map(|k| data[(outer * n + k) * inner + rest]).sum()
            };
            call_limit(data.len(), n)?;
            Ok(Value::reals(v.dtype, v.dims.clone(), (0..data.len()).map(sum).collect()))
        })(),
        "OneHot" => (|| {
            let (v, pair) = (call.input(0)?, call.input(2)?);
            let depth = usize::try_from(call.input(1)?.one()? as i64).map_err(|_| "its depth is negative")?;
            let axis = position(call.int("axis", -1)?, v.rank() + 1)?;
            let dims = [&v.dims[..axis], &[depth], &v.dims[axis..]].concat();
            count(&dims)?;
            let inner: usize = v.dims[axis..].iter().product();
            let hot = v.to_f64()?;
            if pair.len() != 2 {
                return Err(format!("its values have shape {:?}", pair.dims));
            }
            pair.pick(dims, &|i| {
                let (outer, at, rest) = (i / inner / depth, i / inner % depth, i % inner);
                let wanted = hot[outer * inner + rest];
                usize::from(at as f64 == if wanted < 0.0 { wanted + depth as f64 } else { wanted })
            })
        })(),
        "EyeLike" => (|| {
            let v = call.input(0)?;
            let &[_, columns] = v.dims.as_slice() else { return Err(format!("of a shape {:?}", v.dims)) };
            let k = call.int("k", 0)?;
            let dtype = match call.int("dtype", 0)? {
                0 => v.dtype,
                code => call.dtype(code)?,
            };
            let on = |i: usize| (i / columns) as i64 + k == (i % columns) as i64;
            Ok(Value::reals(dtype, v.dims.clone(), (0..v.len()).map(|i| f64::from(u8::from(on(i)))).collect()))
        })(),
        _ => return None,
    })
}

/// A quadratic sum over a long axis would take too long.
fn call_limit(len: usize, n: usize) -> Res<()> {
    if len.saturating_mul(n) <= 1 << 28 { Ok(()) } else { Err("sums over too long an axis".into()) }
}

/// Places that an index of a value's rank names along an axis.
fn element_places(v: &Value, index: &Value, axis: usize) -> Res<Vec<usize>> {
    if index.rank() != v.rank() || (0..v.rank()).any(|k| k != axis && index.dims[k] > v.dims[k]) {
        return Err(format!("indices of shape {:?} into {:?}", index.dims, v.dims));
    }
    let (from, own) = (strides(&v.dims), strides(&index.dims));
    let mut places = Vec::with_capacity(index.len());
    for (i, &at) in index.as_ints()?.iter().enumerate() {
        let mut place = position(at, v.dims[axis]).map_err(|_| format!("index {at} of {} places", v.dims[axis]))?
            * from[axis] as usize;
        for k in (0..v.rank()).filter(|&k| k != axis) {
            place += i / own[k] as usize % index.dims[k] * from[k] as usize;
        }
        places.push(place);
    }
    Ok(places)
}

/// Places that tuples of indices name, and the shape of what is there.
fn tuple_places(v: &Value, index: &Value, batch: usize) -> Res<(Vec<usize>, Vec<usize>)> {
    let Some((&depth, rows)) = index.dims.split_last() else { return Err("has an index without tuples".into()) };
    if depth == 0 || batch > rows.len() || batch + depth > v.rank() || v.dims[..batch] != rows[..batch] {
        return Err(format!("indices of shape {:?} into {:?}", index.dims, v.dims));
    }
    let dims = [rows, &v.dims[batch + depth..]].concat();
    let all = count(&dims)?;
    let inner: usize = v.dims[batch + depth..].iter().product();
    let (steps, tuples) = (strides(&v.dims), index.as_ints()?);
    let each: usize = rows[batch..].iter().product();
    let whole: usize = v.dims[batch..].iter().product();
    let mut places = Vec::with_capacity(all);
    for (row, tuple) in tuples.chunks(depth).enumerate() {
        let mut place = row / each.max(1) * whole;
        for (k, &at) in tuple.iter().enumerate() {
            let n = v.dims[batch + k];
            place += position(at, n).map_err(|_| format!("index {at} of {n} places"))? * steps[batch + k] as usize;
        }
        places.extend((0..inner).map(|i| place + i));
    }
    Ok((places, dims))
}

/// A value with updates in some places; of two updates of one place, the later counts.
fn scatter(v: &Value, updates: &Value, places: &[usize]) -> Res<Value> {
    if updates.len() != places.len() {
        return Err(format!("updates of shape {:?} for {} places", updates.dims, places.len()));
    }
    let mut from: Vec<usize> = (0..v.len()).collect();
    for (k, &place) in places.iter().enumerate() {
        from[place] = v.len() + k;
    }
    let flat = |v: &Value| v.clone().with_dims(vec![v.len()]);
    concat(&[flat(v)?, flat(updates)?], 0)?.pick(v.dims.clone(), &|i| from[i])
}
