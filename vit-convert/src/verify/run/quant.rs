//! Quantised operators: real number = (integer − zero point) · scale, rounded half to even and saturated.

use super::call::{Call, one};
use super::shape::{Res, count, strides};
use super::value::{Data, Value, is_float, range};
use super::{arith, layout, linear, reduce};
use crate::onnx::graph::DType;

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    one(match call.node.op.as_str() {
        "QuantizeLinear" => quantize_node(call),
        "DequantizeLinear" => dequantize_node(call),
        "DynamicQuantizeLinear" => return Some(dynamic(call)),
        "MatMulInteger" => (|| {
            let (a, b) = (minus(call.input(0)?, call.opt(2), -2)?, minus(call.input(1)?, call.opt(3), -1)?);
            Ok(as_i32(linear::matmul(call, a, b)?))
        })(),
        "ConvInteger" => (|| {
            let (x, w) = (minus(call.input(0)?, call.opt(2), 1)?, minus(call.input(1)?, call.opt(3), 0)?);
            Ok(as_i32(linear::conv(call, &x, &w, None)?))
        })(),
        "QLinearMatMul" => (|| {
            let (a, b) = (side(call, 0, -2)?, side(call, 3, -1)?);
            let out = linear::matmul(call, a, b)?;
            quantize(call, &out, call.input(6)?, call.opt(7), -1, None)
        })(),
        "QLinearConv" => (|| {
            let (x, w) = (side(call, 0, 1)?, side(call, 3, 0)?);
            let out = linear::conv(call, &x, &w, None)?;
            let out = match call.opt(8) {
                // the bias is int32 in steps of x_scale · w_scale
                Some(b) => {
                    let steps = arith::binary(&scale64(call.input(1)?)?, &scale64(call.input(4)?)?, "Mul")?;
                    let b = arith::binary(&arith::cast(b.clone(), DType::F64)?, &steps, "Mul")?;
                    let mut dims = vec![1; out.rank()];
                    dims[1] = b.len();
                    arith::binary(&out, &b.with_dims(dims)?, "Add")?
                }
                None => out,
            };
            quantize(call, &out, call.input(6)?, call.opt(7), 1, None)
        })(),
        _ => return None,
    })
}

pub(super) fn run_contrib(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    one(match call.node.op.as_str() {
        "QuantizeLinear" => quantize_node(call),
        "DequantizeLinear" => dequantize_node(call),
        op @ ("QLinearAdd" | "QLinearMul") => (|| {
            let (a, b) = (side(call, 0, -1)?, side(call, 3, -1)?);
            let out = arith::binary(&a, &b, if op == "QLinearAdd" { "Add" } else { "Mul" })?;
            quantize(call, &out, call.input(6)?, call.opt(7), -1, None)
        })(),
        "QLinearConcat" => (|| {
            let axis = call.int("axis", 0)?;
            let parts = (2..call.inputs.len()).step_by(3).map(|i| side(call, i, -1)).collect::<Res<Vec<_>>>()?;
            quantize(call, &layout::concat(&parts, axis)?, call.input(0)?, call.opt(1), -1, None)
        })(),
        "QLinearSoftmax" => (|| {
            let x = side(call, 0, -1)?;
            let axis = x.axis(call.int("axis", -1)?)?;
            let out = reduce::over_last(&x, axis, |v| reduce::softmax(v, false))?;
            quantize(call, &out, call.input(3)?, call.opt(4), -1, None)
        })(),
        "QLinearSigmoid" => (|| {
            let out = arith::sigmoid(side(call, 0, -1)?)?;
            quantize(call, &out, call.input(3)?, call.opt(4), -1, None)
        })(),
        "QLinearReduceMean" | "QLinearGlobalAveragePool" => (|| {
            if call.int("channels_last", 0)? != 0 {
                return Err("channels_last has no rule".into());
            }
            let x = side(call, 0, -1)?;
            let axes = match (call.ints("axes")?, call.node.op.as_str()) {
                (Some(axes), _) => axes.iter().map(|&a| x.axis(a)).collect::<Res<Vec<_>>>()?,
                (None, "QLinearReduceMean") => (0..x.rank()).collect(),
                (None, _) => (2..x.rank()).collect(),
            };
            let keep = call.node.op != "QLinearReduceMean" || call.int("keepdims", 1)? != 0;
            quantize(call, &reduce::reduce(&x, &axes, "Mean", keep)?, call.input(3)?, call.opt(4), -1, None)
        })(),
        "QGemm" => q_gemm(call),
        "MatMulIntegerToFloat" => (|| {
            let dtype = call.input(2)?.dtype;
            let a = dequantize(call.input(0)?, call.input(2)?, call.opt(4), -2)?;
            let b = dequantize(call.input(1)?, call.input(3)?, call.opt(5), -1)?;
            reduce::plus(arith::cast(linear::matmul(call, a, b)?, dtype)?, call.opt(6))
        })(),
        "DynamicQuantizeMatMul" => (|| {
            let x = call.take(0)?;
            let (q, scale, zero) = dynamic_parts(&x, call.ideal)?;
            let a = dequantize(&q, &scale, Some(&zero), -1)?;
            let b = dequantize(call.input(1)?, call.input(2)?, call.opt(3), -1)?;
            reduce::plus(linear::matmul(call, a, b)?, call.opt(4))
        })(),
        "MatMulNBits" => n_bits(call),
        _ => return None,
    })
}

fn as_i32(v: Value) -> Value {
    Value { dtype: DType::I32, ..v }.rounded()
}

/// A scale or zero point, shaped so that it broadcasts over a value along `axis`.
fn along(p: &Value, v: &Value, axis: i64) -> Res<Value> {
    if p.len() == 1 {
        return p.clone().with_dims(vec![]);
    }
    let axis = v.axis(axis)?;
    if p.rank() == v.rank() {
        return Ok(p.clone()); // shaped to broadcast already, as MatMulInteger has it per row
    }
    if p.rank() != 1 || p.len() != v.dims[axis] {
        return Err(format!("a scale or zero point of shape {:?} along axis {axis} of {:?}", p.dims, v.dims));
    }
    let mut dims = vec![1; v.rank()];
    dims[axis] = p.len();
    p.clone().with_dims(dims)
}

/// `v − zero`, as i32.
fn minus(v: &Value, zero: Option<&Value>, axis: i64) -> Res<Value> {
    range(v.dtype)?;
    let wide = arith::cast(v.clone(), DType::I32)?;
    match zero {
        Some(z) if z.dtype != v.dtype => Err(format!("zero point of {:?} for {:?}", z.dtype, v.dtype)),
        Some(z) => arith::binary(&wide, &arith::cast(along(z, v, axis)?, DType::I32)?, "Sub"),
        None => Ok(wide),
    }
}

fn scale64(v: &Value) -> Res<Value> {
    if is_float(v.dtype) { arith::cast(v.clone(), DType::F64) } else { Err(format!("a scale of {:?}", v.dtype)) }
}

/// Value, scale and zero point from three inputs in a row, as doubles: sums of the fused operators are exact in ORT
/// too.
fn side(call: &Call<'_>, i: usize, axis: i64) -> Res<Value> {
    let v = minus(call.input(i)?, call.opt(i + 2), axis)?;
    let scale = along(&scale64(call.input(i + 1)?)?, &v, axis)?;
    arith::binary(&arith::cast(v, DType::F64)?, &scale, "Mul")
}

/// `(v − zero) · scale` in the scale's type.
pub(super) fn dequantize(v: &Value, scale: &Value, zero: Option<&Value>, axis: i64) -> Res<Value> {
    let whole = minus(v, zero, axis)?;
    arith::binary(&arith::cast(whole, scale.dtype)?, &along(scale, v, axis)?, "Mul")
}

/// `saturate(round(v / scale) + zero)`; the type is the zero point's, or `dtype`, or u8.
fn quantize(
    call: &Call<'_>,
    v: &Value,
    scale: &Value,
    zero: Option<&Value>,
    axis: i64,
    dtype: Option<DType>,
) -> Res<Value> {
    let dtype = zero.map(|z| z.dtype).or(dtype).unwrap_or(DType::U8);
    let (low, high) = range(dtype)?;
    let scale = along(scale, v, axis)?;
    if !is_float(scale.dtype) {
        return Err(format!("a scale of {:?}", scale.dtype));
    }
    let scale = arith::cast(scale, v.dtype)?;
    let steps = arith::cast(arith::binary(v, &scale, "Div")?, DType::F64)?;
    let whole = if call.ideal { steps } else { arith::map(steps, f32::round_ties_even, f64::round_ties_even)? };
    let whole = match zero {
        Some(z) => arith::binary(&whole, &arith::cast(along(z, v, axis)?, DType::F64)?, "Add")?,
        None => whole,
    };
    if call.ideal {
        return Ok(Value { dtype, ..whole });
    }
    let Data::F64(x) = &whole.data else { return Err("needs floats".into()) };
    Ok(Value::int(dtype, whole.dims.clone(), x.iter().map(|x| x.clamp(low, high) as i64).collect()))
}

/// A scale or zero point per block of an axis, repeated to the value's shape.
fn unblock(p: &Value, v: &Value, axis: i64, block: i64) -> Res<Value> {
    let axis = v.axis(axis)?;
    let block = usize::try_from(block).map_err(|_| "block_size is negative")?;
    if p.rank() != v.rank()
        || (0..v.rank()).any(|i| p.dims[i] != if i == axis { v.dims[i].div_ceil(block) } else { v.dims[i] })
    {
        return Err(format!("blocks of {block} along axis {axis} of {:?} have scales of shape {:?}", v.dims, p.dims));
    }
    let (from, to) = (strides(&p.dims), strides(&v.dims));
    p.pick(v.dims.clone(), &|i| {
        let place = |a: usize| i / to[a] as usize % v.dims[a] / if a == axis { block } else { 1 };
        (0..v.rank()).map(|a| place(a) * from[a] as usize).sum()
    })
}

fn quantize_node(call: &mut Call<'_>) -> Res<Value> {
    let (axis, block) = (call.int("axis", 1)?, call.int("block_size", 0)?);
    let dtype = match call.int("output_dtype", 0)? {
        0 => None,
        code => Some(call.dtype(code)?),
    };
    let v = call.input(0)?;
    if block == 0 {
        return quantize(call, v, call.input(1)?, call.opt(2), axis, dtype);
    }
    let scale = unblock(call.input(1)?, v, axis, block)?;
    let zero = call.opt(2).map(|z| unblock(z, v, axis, block)).transpose()?;
    quantize(call, v, &scale, zero.as_ref(), axis, dtype)
}

fn dequantize_node(call: &mut Call<'_>) -> Res<Value> {
    let (axis, block) = (call.int("axis", 1)?, call.int("block_size", 0)?);
    let (v, scale) = (call.input(0)?, call.input(1)?);
    if block == 0 {
        return dequantize(v, scale, call.opt(2), axis);
    }
    let zero = call.opt(2).map(|z| unblock(z, v, axis, block)).transpose()?;
    dequantize(v, &unblock(scale, v, axis, block)?, zero.as_ref(), axis)
}

/// u8 values, their scale and zero point, chosen from the range that `x` covers.
fn dynamic_parts(x: &Value, ideal: bool) -> Res<(Value, Value, Value)> {
    let data = x.to_f32()?;
    let low = data.iter().copied().fold(0f32, f32::min);
    let high = data.iter().copied().fold(0f32, f32::max);
    let scale = if high == low { 1.0 } else { (high - low) / 255.0 };
    let zero = (-low / scale).round_ties_even().clamp(0.0, 255.0);
    let steps = |x: &f32| *x as f64 / scale as f64 + zero as f64;
    let exact = Value { dtype: DType::U8, ..Value::f64(x.dims.clone(), data.iter().map(steps).collect()) };
    let q = data.iter().map(|x| ((x / scale).round_ties_even() + zero).clamp(0.0, 255.0) as i64).collect();
    Ok((
        if ideal { exact } else { Value::int(DType::U8, x.dims.clone(), q) },
        Value::f32(vec![], vec![scale]),
        Value::int(DType::U8, vec![], vec![zero as i64]),
    ))
}

fn dynamic(call: &mut Call<'_>) -> Res<Vec<Value>> {
    let x = call.input(0)?;
    if x.dtype != DType::F32 {
        return Err(format!("needs float32, found {:?}", x.dtype));
    }
    let (q, scale, zero) = dynamic_parts(x, call.ideal)?;
    Ok(vec![q, scale, zero])
}

/// `a, a_scale, a_zero, b, b_scale, b_zero, c, y_scale, y_zero`; without the last two the result is real.
fn q_gemm(call: &mut Call<'_>) -> Res<Value> {
    let alpha = call.float("alpha", 1.0)?;
    let turned = call.int("transB", 0)? != 0;
    let mut a = side(call, 0, 0)?;
    if call.int("transA", 0)? != 0 {
        a = linear::swap(&a, 0, 1)?;
    }
    let b = side(call, 3, i64::from(!turned))?;
    let out = if turned { linear::matmul_turned(call, a, b)? } else { linear::matmul(call, a, b)? };
    let times = |v: &Value, by: &Value| arith::binary(v, by, "Mul");
    let mut out = times(&out, &Value::scalar(DType::F64, alpha))?;
    if let Some(c) = call.opt(6) {
        let steps = times(&scale64(call.input(1)?)?, &scale64(call.input(4)?)?)?;
        let steps = times(&steps, &Value::scalar(DType::F64, alpha))?;
        out = arith::binary(&out, &times(&arith::cast(c.clone(), DType::F64)?, &steps)?, "Add")?;
    }
    match call.opt(7) {
        Some(scale) => quantize(call, &out, scale, call.opt(8), -1, None),
        None => arith::cast(out, DType::F32),
    }
}

/// ORT's MatMulNBits: `B [N, blocks, bytes]` holds K numbers a row in `bits` bits each, low bits first.
fn n_bits(call: &mut Call<'_>) -> Res<Value> {
    let size = |name: &str| {
        usize::try_from(call.int(name, 0)?)
            .ok()
            .filter(|&x| x > 0 && x < 1 << 24)
            .ok_or_else(|| format!("`{name}` must be positive"))
    };
    let (k, n, block) = (size("K")?, size("N")?, size("block_size")?);
    let bits =
        usize::try_from(call.int("bits", 4)?).ok().filter(|b| [2, 4, 8].contains(b)).ok_or("bits must be 2, 4 or 8")?;
    if call.opt(4).is_some() {
        return Err("g_idx has no rule".into());
    }
    let (a, b, scales) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let blocks = k.div_ceil(block);
    let bytes = (block * bits).div_ceil(8);
    count(&[n, k])?;
    if b.len() != n * blocks * bytes || b.dtype != DType::U8 || scales.len() != n * blocks {
        return Err(format!(
            "B of shape {:?} and scales of shape {:?} for K {k}, N {n}, blocks of {block}",
            b.dims, scales.dims
        ));
    }
    let (q, s) = (b.as_ints()?, scales.to_f64()?);
    let number = |bytes: &[i64], i: usize| (bytes[i * bits / 8] >> (i * bits % 8)) & ((1 << bits) - 1);
    let row = (blocks * bits).div_ceil(8);
    let zeros: Vec<f64> = match call.opt(3) {
        None => vec![(1i64 << (bits - 1)) as f64; n * blocks],
        Some(z) if z.dtype == DType::U8 && z.len() == n * row => {
            let z = z.as_ints()?;
            (0..n * blocks).map(|i| number(&z[i / blocks * row..(i / blocks + 1) * row], i % blocks) as f64).collect()
        }
        Some(z) if is_float(z.dtype) && z.len() == n * blocks => z.to_f64()?,
        Some(z) => return Err(format!("zero points {:?} {:?}", z.dtype, z.dims)),
    };
    let mut w = Vec::with_capacity(n * k);
    for r in 0..n {
        for i in 0..k {
            let at = r * blocks + i / block;
            w.push((number(&q[at * bytes..(at + 1) * bytes], i % block) as f64 - zeros[at]) * s[at]);
        }
    }
    let rows = a.len().checked_div(k).unwrap_or(0);
    let dims = [&a.dims[..a.rank().saturating_sub(1)], &[n]].concat();
    if a.dims.last() != Some(&k) {
        return Err(format!("A of shape {:?} for K {k}", a.dims));
    }
    let (a, w) = (a.clone().with_dims(vec![rows, k])?, Value::reals(a.dtype, vec![n, k], w));
    let out = linear::matmul_turned(call, a, w)?.with_dims(dims)?;
    reduce::plus(out, call.opt(5))
}
