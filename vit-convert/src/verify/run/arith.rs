//! Elementwise operators: functions of one value, of two, comparisons, logic, casts.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};
use std::sync::Arc;

use candle_core::cpu::erf::erf_f64;
use rayon::prelude::*;

use super::broadcast::{broadcast_dims, zip, zip_into};
use super::call::{Call, one};
use super::math;
use super::shape::Res;
use super::value::{Data, Value, is_float, wrap};
use crate::onnx::graph::{Attr, DType};

/// Applies a function to every element of a float in its own width: an f32 graph is computed in f32, like the model
/// that it is compared with.
pub(super) fn map(value: Value, f: impl Fn(f32) -> f32 + Sync, g: impl Fn(f64) -> f64 + Sync) -> Res<Value> {
    fn each<T: Copy + Send + Sync>(x: &mut Arc<Vec<T>>, f: impl Fn(T) -> T + Sync) {
        let parts = Arc::make_mut(x).par_chunks_mut(1 << 13);
        parts.for_each(|part| math::wide(|| part.iter_mut().for_each(|x| *x = f(*x))));
    }
    let Value { dtype, dims, mut data } = value;
    match &mut data {
        Data::F32(x) => each(x, f),
        Data::F64(x) => each(x, g),
        _ => return Err(format!("needs floats, found {dtype:?}")),
    }
    Ok(Value { dtype, dims, data }.rounded())
}

/// [`map`] of one formula in both widths.
macro_rules! real {
    ($value:expr, |$x:ident| $body:expr) => {
        map($value, |$x: f32| $body, |$x: f64| $body)
    };
}

/// [`map`] of a function of doubles: a vectorisable approximation for f32 values, and the library's function for f64
/// values.
macro_rules! double {
    ($value:expr, |$x:ident| $body:expr, $exact:expr) => {
        map(
            $value,
            |x: f32| {
                let $x = f64::from(x);
                $body as f32
            },
            $exact,
        )
    };
}

/// GELU with the exact erf.
pub(super) fn gelu(v: Value) -> Res<Value> {
    double!(v, |x| 0.5 * x * (1.0 + math::erf(x * FRAC_1_SQRT_2)), |x| 0.5 * x * (1.0 + erf_f64(x * FRAC_1_SQRT_2)))
}

/// GELU by tanh; √(2/π) is 2/√π · 1/√2.
pub(super) fn gelu_tanh(v: Value) -> Res<Value> {
    const C: f64 = FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
    let inner = |x: f64| C * (x + 0.044715 * x * x * x);
    double!(v, |x| 0.5 * x * (1.0 + math::tanh(inner(x))), |x| 0.5 * x * (1.0 + inner(x).tanh()))
}

/// `x · sigmoid(αx)`
pub(super) fn quick_gelu(v: Value, alpha: f64) -> Res<Value> {
    double!(v, |x| x / (1.0 + math::exp(-alpha * x)), |x| x / (1.0 + (-alpha * x).exp()))
}

/// tanh
pub(super) fn tanh(v: Value) -> Res<Value> {
    double!(v, |x| math::tanh(x), f64::tanh)
}

/// `1 / (1 + e⁻ˣ)`
pub(super) fn sigmoid(v: Value) -> Res<Value> {
    double!(v, |x| 1.0 / (1.0 + math::exp(-x)), |x| 1.0 / (1.0 + (-x).exp()))
}

/// Functions of one real number.
fn unary(call: &mut Call<'_>) -> Option<Res<Value>> {
    let op = call.node.op.as_str();
    let f: fn(Value) -> Res<Value> = match op {
        "Sqrt" => |v| real!(v, |x| x.sqrt()),
        "Exp" => |v| double!(v, |x| math::exp(x), f64::exp),
        "Log" => |v| real!(v, |x| x.ln()),
        "Tanh" => tanh,
        "Sin" => |v| real!(v, |x| x.sin()),
        "Cos" => |v| real!(v, |x| x.cos()),
        "Tan" => |v| real!(v, |x| x.tan()),
        "Asin" => |v| real!(v, |x| x.asin()),
        "Acos" => |v| real!(v, |x| x.acos()),
        "Atan" => |v| real!(v, |x| x.atan()),
        "Sinh" => |v| real!(v, |x| x.sinh()),
        "Cosh" => |v| real!(v, |x| x.cosh()),
        "Softplus" => |v| double!(v, |x| x.exp().ln_1p(), |x| x.exp().ln_1p()),
        "Floor" => |v| real!(v, |x| x.floor()),
        "Ceil" => |v| real!(v, |x| x.ceil()),
        "Round" => |v| real!(v, |x| x.round_ties_even()),
        "Reciprocal" => |v| real!(v, |x| 1.0 / x),
        "Sigmoid" => sigmoid,
        "Erf" => |v| double!(v, |x| math::erf(x), erf_f64),
        "Gelu" => match call.str("approximate", "none") {
            Ok(a) if a == "none" => gelu,
            Ok(a) if a == "tanh" => gelu_tanh,
            Ok(a) => return Some(Err(format!("`approximate` is `{a}`"))),
            Err(e) => return Some(Err(e)),
        },
        "Swish" => return Some(call.float("alpha", 1.0).and_then(|alpha| quick_gelu(call.take(0)?, alpha))),
        _ => return None,
    };
    Some(call.take(0).and_then(f))
}

/// `f(a, b)` for two values of one type.
pub(super) fn binary(a: &Value, b: &Value, op: &str) -> Res<Value> {
    combine(a.clone(), b.clone(), op)
}

/// Like [`binary`], but reuses the memory of an operand that has no other owner.
pub(super) fn combine(a: Value, b: Value, op: &str) -> Res<Value> {
    if a.dtype != b.dtype {
        return Err(format!("its operands are {:?} and {:?}, they must be of one type", a.dtype, b.dtype));
    }
    let a = a.like(&b);
    let b = b.like(&a);
    let none = || format!("{op} has no rule for {:?}", a.dtype);
    let (dims, data) = match (a.data, b.data) {
        (Data::F32(x), Data::F32(y)) => {
            let (x, y) = ((x, &a.dims[..]), (y, &b.dims[..]));
            let (dims, out) = match op {
                // separate loops for the common operators
                "Add" => zip_into(x, y, |x, y| x + y),
                "Sub" => zip_into(x, y, |x, y| x - y),
                "Mul" => zip_into(x, y, |x, y| x * y),
                "Div" => zip_into(x, y, |x, y| x / y),
                "Pow" if y.0.len() == 1 && y.0[0] == 2.0 => zip_into(x, y, |x, _| x * x),
                _ => zip_into(x, y, float_op(op).ok_or_else(none)?.0),
            }?;
            (dims, Data::F32(out))
        }
        (Data::F64(x), Data::F64(y)) => {
            let (dims, out) = zip_into((x, &a.dims), (y, &b.dims), float_op(op).ok_or_else(none)?.1)?;
            (dims, Data::F64(out))
        }
        (Data::Int(x), Data::Int(y)) => {
            let f: fn(i64, i64) -> i64 = match op {
                "Add" => i64::wrapping_add,
                "Sub" => i64::wrapping_sub,
                "Mul" => i64::wrapping_mul,
                "Max" => i64::max,
                "Min" => i64::min,
                "Div" | "Mod" | "FMod" if y.contains(&0) => return Err("divides an integer by zero".into()),
                "Div" => i64::wrapping_div,
                // the sign of the divisor, as Python's %
                "Mod" => |x, y| {
                    let r = x.wrapping_rem(y);
                    if r != 0 && (r < 0) != (y < 0) { r + y } else { r }
                },
                "FMod" => i64::wrapping_rem,
                "Pow" => |x, y| match u32::try_from(y) {
                    Ok(y) => x.wrapping_pow(y),
                    Err(_) => (x as f64).powf(y as f64) as i64,
                },
                _ => return Err(none()),
            };
            if a.dtype == DType::Bool {
                return Err(none());
            }
            let (dims, out) = zip_into((x, &a.dims), (y, &b.dims), f)?;
            (dims, Data::Int(out))
        }
        _ => return Err(none()),
    };
    Ok(Value { dtype: a.dtype, dims, data }.rounded())
}

type Pair = (fn(f32, f32) -> f32, fn(f64, f64) -> f64);

fn float_op(op: &str) -> Option<Pair> {
    macro_rules! both {
        (|$x:ident, $y:ident| $body:expr) => {
            Some((|$x, $y| $body, |$x, $y| $body))
        };
    }
    match op {
        "Add" => both!(|x, y| x + y),
        "Sub" => both!(|x, y| x - y),
        "Mul" => both!(|x, y| x * y),
        "Div" => both!(|x, y| x / y),
        "Max" => both!(|x, y| if x.is_nan() || x > y { x } else { y }),
        "Min" => both!(|x, y| if x.is_nan() || x < y { x } else { y }),
        "FMod" => both!(|x, y| x % y),
        "Pow" => Some((
            |x, y| {
                if y == 2.0 {
                    x * x
                } else if y == 3.0 {
                    x * x * x
                } else if y == 0.5 {
                    x.sqrt()
                } else {
                    x.powf(y)
                }
            },
            |x, y| if y == 2.0 { x * x } else { x.powf(y) },
        )),
        _ => None,
    }
}

/// A comparison, over doubles (which hold every f32 and every integer that a graph compares).
fn compare(a: &Value, b: &Value, f: fn(f64, f64) -> bool) -> Res<Value> {
    if a.dtype != b.dtype {
        return Err(format!("its operands are {:?} and {:?}, they must be of one type", a.dtype, b.dtype));
    }
    let (dims, out) = zip((&a.to_f64()?, &a.dims), (&b.to_f64()?, &b.dims), |x, y| i64::from(f(x, y)))?;
    Ok(Value::int(DType::Bool, dims, out))
}

/// A value as another type: floats to integers truncate, anything to bool asks whether it is 0.
pub(super) fn cast(value: Value, to: DType) -> Res<Value> {
    if value.dtype == to {
        return Ok(value);
    }
    let whole = !is_float(value.dtype);
    let Value { dims, data, .. } = value;
    let data = match (data, to) {
        // in ideal arithmetic an integer keeps its fraction
        (Data::F64(x), to) if whole && !is_float(to) => Data::F64(x),
        (Data::F64(x), DType::F64) => Data::F64(x),
        (Data::Int(x), DType::F64) => Data::F64(Arc::new(x.iter().map(|&x| x as f64).collect())),
        (Data::Int(x), to) if is_float(to) => Data::F32(Arc::new(x.iter().map(|&x| x as f32).collect())),
        (Data::Int(x), to) => Data::Int(Arc::new(x.iter().map(|&x| wrap(to, x)).collect())),
        (Data::F32(x), DType::F64) => Data::F64(Arc::new(x.iter().map(|&x| x as f64).collect())),
        (Data::F32(x), to) if is_float(to) => Data::F32(x),
        (Data::F32(x), DType::Bool) => Data::Int(Arc::new(x.iter().map(|&x| i64::from(x != 0.0)).collect())),
        (Data::F32(x), to) => Data::Int(Arc::new(x.iter().map(|&x| wrap(to, x as i64)).collect())),
        (Data::F64(x), to) if is_float(to) => Data::F32(Arc::new(x.iter().map(|&x| x as f32).collect())),
        (Data::F64(x), DType::Bool) => Data::Int(Arc::new(x.iter().map(|&x| i64::from(x != 0.0)).collect())),
        (Data::F64(x), to) => Data::Int(Arc::new(x.iter().map(|&x| wrap(to, x as i64)).collect())),
        (Data::Sequence(_), _) => return Err("needs a tensor, found a sequence".into()),
    };
    Ok(Value { dtype: to, dims, data }.rounded())
}

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    if let Some(result) = unary(call) {
        return one(result);
    }
    let result = match call.node.op.as_str() {
        op @ ("Add" | "Sub" | "Mul" | "Div") => {
            if call.inputs.len() == 2 {
                (|| {
                    let (a, b) = (call.take(0)?, call.take(1)?);
                    combine(a, b, op)
                })()
            } else {
                Err("needs two inputs".into())
            }
        }
        "Pow" => (|| {
            // the exponent may be of another type than the base
            let (a, b) = (call.take(0)?, call.take(1)?);
            if matches!((&a.data, &b.data), (Data::Int(_), Data::F32(_) | Data::F64(_))) {
                let whole = a.dtype;
                return cast(combine(cast(a, DType::F64)?, cast(b, DType::F64)?, "Pow")?, whole);
            }
            let b = cast(b, a.dtype)?;
            combine(a, b, "Pow")
        })(),
        "Mod" => (|| {
            let fmod = call.int("fmod", 0)? != 0;
            if !fmod && is_float(call.input(0)?.dtype) {
                return Err("of floats needs fmod = 1".into());
            }
            binary(call.input(0)?, call.input(1)?, if fmod { "FMod" } else { "Mod" })
        })(),
        op @ ("Max" | "Min" | "Sum" | "Mean") => (|| {
            let mut all = call.input(0)?.clone();
            for i in 1..call.inputs.len() {
                all = binary(&all, call.input(i)?, if op == "Max" || op == "Min" { op } else { "Add" })?;
            }
            if op == "Mean" {
                let count = Value::reals(all.dtype, Vec::new(), vec![call.inputs.len() as f64]);
                return binary(&all, &count, "Div");
            }
            Ok(all)
        })(),
        "Neg" | "Abs" | "Sign" => (|| {
            let v = call.take(0)?;
            let op = call.node.op.as_str();
            if let Data::Int(x) = &v.data {
                let f = match op {
                    "Neg" => i64::wrapping_neg,
                    "Abs" => i64::wrapping_abs,
                    _ => i64::signum,
                };
                return Ok(Value::int(v.dtype, v.dims.clone(), x.iter().map(|&x| f(x)).collect()).rounded());
            }
            match op {
                "Neg" => real!(v, |x| -x),
                "Abs" => real!(v, |x| x.abs()),
                _ => real!(v, |x| if x > 0.0 {
                    1.0
                } else if x < 0.0 {
                    -1.0
                } else {
                    x
                }),
            }
        })(),
        "Relu" => (|| {
            let v = call.take(0)?;
            let zero = Value::scalar(v.dtype, 0.0);
            combine(v, zero, "Max")
        })(),
        "Clip" => (|| {
            let mut v = call.take(0)?;
            for (i, name, op) in [(1, "min", "Max"), (2, "max", "Min")] {
                let attr = call.opt_float(name)?.map(|x| Value::scalar(v.dtype, x));
                if let Some(bound) = call.opt(i).cloned().or(attr) {
                    if bound.len() != 1 {
                        return Err(format!("its {name} must be a scalar, found shape {:?}", bound.dims));
                    }
                    v = combine(v, bound.with_dims(vec![])?, op)?;
                }
            }
            Ok(v)
        })(),
        op @ ("Equal" | "Greater" | "Less" | "GreaterOrEqual" | "LessOrEqual") => (|| {
            compare(
                call.input(0)?,
                call.input(1)?,
                match op {
                    "Equal" => |x, y| x == y,
                    "Greater" => |x, y| x > y,
                    "Less" => |x, y| x < y,
                    "GreaterOrEqual" => |x, y| x >= y,
                    _ => |x, y| x <= y,
                },
            )
        })(),
        op @ ("And" | "Or" | "Xor") => (|| {
            let (a, b) = (call.input(0)?, call.input(1)?);
            if (a.dtype, b.dtype) != (DType::Bool, DType::Bool) {
                return Err(format!("needs booleans, found {:?} and {:?}", a.dtype, b.dtype));
            }
            compare(
                a,
                b,
                match op {
                    "And" => |x, y| x != 0.0 && y != 0.0,
                    "Or" => |x, y| x != 0.0 || y != 0.0,
                    _ => |x, y| x != y,
                },
            )
        })(),
        "Not" => (|| {
            let v = call.input(0)?;
            if v.dtype != DType::Bool {
                return Err(format!("needs booleans, found {:?}", v.dtype));
            }
            Ok(Value::int(DType::Bool, v.dims.clone(), v.as_ints()?.iter().map(|&x| 1 - x).collect()))
        })(),
        "IsNaN" => (|| {
            let v = call.input(0)?;
            if !is_float(v.dtype) {
                return Err(format!("needs floats, found {:?}", v.dtype));
            }
            let is = v.to_f64()?.into_iter().map(|x| i64::from(x.is_nan()));
            Ok(Value::int(DType::Bool, v.dims.clone(), is.collect()))
        })(),
        "Where" => (|| {
            let (c, a, b) = (call.input(0)?, call.input(1)?, call.input(2)?);
            if c.dtype != DType::Bool || a.dtype != b.dtype {
                return Err(format!(
                    "needs bool and two of one type, found {:?}, {:?}, {:?}",
                    c.dtype, a.dtype, b.dtype
                ));
            }
            select(c, a, b)
        })(),
        "Cast" => (|| {
            let to = call.dtype(call.int("to", 0)?)?;
            cast(call.take(0)?, to)
        })(),
        "CastLike" => (|| {
            let to = call.input(1)?.dtype;
            cast(call.take(0)?, to)
        })(),
        "Constant" => match call.node.attrs.get("value") {
            Some(Attr::Tensor(t)) => call.constant(t),
            _ => Err("a constant without numbers".into()),
        },
        _ => return None,
    };
    one(result)
}

/// `c ? a : b`, broadcast.
pub(super) fn select(c: &Value, a: &Value, b: &Value) -> Res<Value> {
    let dims = broadcast_dims(&broadcast_dims(&c.dims, &a.dims)?, &b.dims)?;
    let (c, a, b) = (c.broadcast(&dims)?, a.broadcast(&dims)?, b.broadcast(&dims)?);
    let c = c.as_ints()?;
    fn choose<T: Copy>(c: &[i64], a: &[T], b: &[T]) -> Arc<Vec<T>> {
        Arc::new(c.iter().zip(a).zip(b).map(|((&c, &a), &b)| if c != 0 { a } else { b }).collect())
    }
    let data = match (&a.data, &b.data) {
        (Data::F32(x), Data::F32(y)) => Data::F32(choose(c, x, y)),
        (Data::F64(x), Data::F64(y)) => Data::F64(choose(c, x, y)),
        (Data::Int(x), Data::Int(y)) => Data::Int(choose(c, x, y)),
        _ => return Err("needs tensors of one type".into()),
    };
    Ok(Value { dtype: a.dtype, dims, data })
}
