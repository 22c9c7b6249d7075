//! Constants in, constants out: the integers that exporters compute shapes with, and small float constants.

use candle_core::cpu::erf::erf_f64;

use super::call::Call;
use super::value::{Rule, Value, axis_in, need};
use super::walk::Walk;
use crate::import::array::{Array, FOLD_LIMIT, round};
use crate::import::axes::{self, BROADCAST, Dim};
use crate::onnx::graph::{Attr, DType};

/// The shape that two broadcast to.
pub(super) fn broadcast_shape(a: &[usize], b: &[usize]) -> Rule<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], k: usize| if k + s.len() < rank { 1 } else { s[k + s.len() - rank] };
    (0..rank)
        .map(|k| match (at(a, k), at(b, k)) {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            (x, y) => Err(format!("sizes {x} and {y} do not broadcast")),
        })
        .collect()
}

pub(super) fn small(n: usize) -> Rule<()> {
    need!(n <= FOLD_LIMIT, "a constant of {n} elements would have to be computed, at most {FOLD_LIMIT} are");
    Ok(())
}

/// Computes over what is stored once, and repeats the result as the operands repeat.
fn compact<const N: usize>(operands: [&Array; N], shape: &[usize]) -> Rule<([Array; N], Vec<usize>)> {
    let rank = shape.len();
    let padded = operands.map(|a| a.relaid(axes::pad(a.dims(), rank)));
    let repeats = |d: &Dim| d.iter().all(|g| g.axis == BROADCAST);
    let free: Vec<bool> = (0..rank).map(|k| shape[k] > 0 && padded.iter().all(|a| repeats(&a.dims()[k]))).collect();
    let cut: Vec<usize> = shape.iter().zip(&free).map(|(&n, &f)| if f { 1 } else { n }).collect();
    small(cut.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).unwrap_or(usize::MAX))?;
    let out = padded.map(|a| {
        let dims = a.dims().iter().zip(&free).map(|(d, &f)| if f { Dim::new() } else { d.clone() }).collect();
        a.relaid(dims).expand(&cut)
    });
    let mut done = Vec::with_capacity(N);
    for a in out {
        done.push(a.ok_or("constants that do not broadcast")?);
    }
    let done: [Array; N] = done.try_into().map_err(|_| "operands".to_string())?;
    Ok((done, cut))
}

fn finish(array: &Array, shape: &[usize]) -> Rule<Array> {
    array.expand(shape).ok_or_else(|| "constants that do not broadcast".into())
}

/// The wider of two float types, as exporters mix them only by mistake.
fn common(a: &Array, b: &Array) -> Rule<DType> {
    need!(a.dtype.is_float() == b.dtype.is_float(), "constants of types {:?} and {:?}", a.dtype, b.dtype);
    Ok(if a.dtype == DType::F64 || b.dtype == DType::F64 { a.dtype.max(b.dtype) } else { a.dtype })
}

/// An arithmetic operator over two constants.
pub(super) fn binary(op: &str, a: &Array, b: &Array) -> Rule<Array> {
    let shape = broadcast_shape(&a.shape(), &b.shape())?;
    if op == "Pow" && a.dtype.is_float() && !b.dtype.is_float() {
        return binary(op, a, &map(b, DType::F64, |v| v, |v| v)?);
    }
    let mut dtype = common(a, b)?;
    if op == "Pow" {
        dtype = a.dtype;
    }
    let ([x, y], cut) = compact([a, b], &shape)?;
    let out = if dtype.is_float() {
        let f: fn(f64, f64) -> f64 = match op {
            "Add" => |x, y| x + y,
            "Sub" => |x, y| x - y,
            "Mul" => |x, y| x * y,
            "Div" => |x, y| x / y,
            "Pow" => f64::powf,
            "Min" => f64::min,
            "Max" => f64::max,
            "Mod" => |x, y| x % y,
            other => return Err(format!("{other} of constants")),
        };
        Array::floats(
            dtype,
            &cut,
            &x.f64s().into_iter().zip(y.f64s()).map(|(x, y)| rounded(dtype, f(x, y))).collect::<Vec<_>>(),
        )
    } else {
        let f: fn(i64, i64) -> Option<i64> = match op {
            "Add" => i64::checked_add,
            "Sub" => i64::checked_sub,
            "Mul" => i64::checked_mul,
            "Div" => i64::checked_div,
            "Pow" => |x, y| u32::try_from(y).ok().and_then(|y| x.checked_pow(y)),
            "Min" => |x, y| Some(x.min(y)),
            "Max" => |x, y| Some(x.max(y)),
            "Mod" => |x, y| x.checked_rem(y).map(|r| if r != 0 && (r < 0) != (y < 0) { r + y } else { r }),
            other => return Err(format!("{other} of integers")),
        };
        let values: Option<Vec<i64>> = x.i64s().into_iter().zip(y.i64s()).map(|(x, y)| f(x, y)).collect();
        Array::ints(dtype, &cut, &values.ok_or_else(|| format!("{op} of integers overflows, or divides by 0"))?)
    };
    finish(&out, &shape)
}

fn compare(op: &str, a: &Array, b: &Array) -> Rule<Array> {
    let shape = broadcast_shape(&a.shape(), &b.shape())?;
    common(a, b)?;
    let ([x, y], cut) = compact([a, b], &shape)?;
    let f: fn(std::cmp::Ordering) -> bool = match op {
        "Equal" => std::cmp::Ordering::is_eq,
        "Less" => std::cmp::Ordering::is_lt,
        "LessOrEqual" => std::cmp::Ordering::is_le,
        "Greater" => std::cmp::Ordering::is_gt,
        _ => std::cmp::Ordering::is_ge,
    };
    let values: Vec<i64> = if a.dtype.is_float() {
        x.f64s().iter().zip(&y.f64s()).map(|(x, y)| i64::from(x.partial_cmp(y).is_some_and(f))).collect()
    } else {
        x.i64s().iter().zip(&y.i64s()).map(|(x, y)| i64::from(f(x.cmp(y)))).collect()
    };
    finish(&Array::ints(DType::Bool, &cut, &values), &shape)
}

fn logic(op: &str, a: &Array, b: &Array) -> Rule<Array> {
    let shape = broadcast_shape(&a.shape(), &b.shape())?;
    let ([x, y], cut) = compact([a, b], &shape)?;
    let values: Vec<i64> = (x.i64s().iter().zip(&y.i64s()))
        .map(|(&x, &y)| {
            let (x, y) = (x != 0, y != 0);
            i64::from(match op {
                "And" => x && y,
                "Or" => x || y,
                _ => x != y,
            })
        })
        .collect();
    finish(&Array::ints(DType::Bool, &cut, &values), &shape)
}

/// Numbers as a rule reads them: rounded as the element type does.
fn rounded(dtype: DType, v: f64) -> f64 {
    if dtype == DType::F64 { v } else { f64::from(round(dtype, v)) }
}

/// One value after the other, to another type.
pub(super) fn map(a: &Array, to: DType, ints: impl Fn(i64) -> i64, floats: impl Fn(f64) -> f64) -> Rule<Array> {
    let shape = a.shape();
    let ([x], cut) = compact([a], &shape)?;
    let out = match (a.dtype.is_float(), to.is_float()) {
        (true, true) => {
            Array::floats(to, &cut, &x.f64s().into_iter().map(|v| rounded(to, floats(v))).collect::<Vec<_>>())
        }
        (true, false) if to == DType::Bool => {
            Array::ints(to, &cut, &x.f64s().into_iter().map(|v| i64::from(floats(v) != 0.0)).collect::<Vec<_>>())
        }
        (true, false) => Array::ints(to, &cut, &x.f64s().into_iter().map(|v| floats(v) as i64).collect::<Vec<_>>()),
        (false, true) => {
            Array::floats(to, &cut, &x.i64s().into_iter().map(|v| rounded(to, ints(v) as f64)).collect::<Vec<_>>())
        }
        (false, false) if to == DType::Bool => {
            Array::ints(to, &cut, &x.i64s().into_iter().map(|v| i64::from(ints(v) != 0)).collect::<Vec<_>>())
        }
        (false, false) => Array::ints(to, &cut, &x.i64s().into_iter().map(ints).collect::<Vec<_>>()),
    };
    finish(&out, &shape)
}

/// `-a`.
pub(super) fn negate(a: &Array) -> Rule<Array> {
    map(a, a.dtype, i64::wrapping_neg, |v| -v)
}

/// A function of one constant.
pub(super) fn unary(op: &str, a: &Array) -> Rule<Array> {
    let f: fn(f64) -> f64 = match op {
        "Neg" => |v| -v,
        "Abs" => f64::abs,
        "Sign" => |v| if v == 0.0 { 0.0 } else { v.signum() },
        "Sqrt" => f64::sqrt,
        "Reciprocal" => |v| 1.0 / v,
        "Exp" => f64::exp,
        "Log" => f64::ln,
        "Floor" => f64::floor,
        "Ceil" => f64::ceil,
        "Round" => f64::round_ties_even,
        "Sin" => f64::sin,
        "Cos" => f64::cos,
        "Tan" => f64::tan,
        "Asin" => f64::asin,
        "Acos" => f64::acos,
        "Atan" => f64::atan,
        "Sinh" => f64::sinh,
        "Cosh" => f64::cosh,
        "Softplus" => |v| v.exp().ln_1p(),
        "Erf" => erf_f64,
        "Tanh" => f64::tanh,
        "Sigmoid" => |v| 1.0 / (1.0 + (-v).exp()),
        "Relu" => |v| v.max(0.0),
        other => return Err(format!("{other} of a constant")),
    };
    let i: fn(i64) -> i64 = match op {
        "Neg" => i64::wrapping_neg,
        "Abs" => i64::wrapping_abs,
        "Sign" => i64::signum,
        "Relu" => |v| v.max(0),
        _ if a.dtype.is_float() => |v| v,
        other => return Err(format!("{other} of integers")),
    };
    map(a, a.dtype, i, f)
}

/// A size as a number of elements.
fn extent(v: i64) -> Rule<usize> {
    usize::try_from(v).ok().filter(|&n| n <= 1 << 40).ok_or_else(|| format!("a dimension of size {v}"))
}

impl Walk<'_> {
    pub(super) fn shape_of(&mut self, call: &Call<'_>) -> Rule<Value> {
        let shape: Vec<i64> = call.get(0).shape()?.iter().map(|&n| n as i64).collect();
        let rank = shape.len() as i64;
        let clamp = |v: i64| (if v < 0 { v + rank } else { v }).clamp(0, rank) as usize;
        let (start, end) = (clamp(call.int("start", 0)?), clamp(call.int("end", i64::MAX)?));
        let part = shape.get(start..end).unwrap_or(&[]);
        Ok(Array::ints(DType::I64, &[part.len()], part).into())
    }

    pub(super) fn size_of(&mut self, call: &Call<'_>) -> Rule<Value> {
        let n = call.get(0).shape()?.iter().try_fold(1i64, |n, &m| n.checked_mul(m as i64)).ok_or("too large")?;
        Ok(Array::ints(DType::I64, &[], &[n]).into())
    }

    pub(super) fn constant_of_shape(&mut self, call: &Call<'_>) -> Rule<Value> {
        let shape = call.get(0).ints("the shape")?.into_iter().map(extent).collect::<Rule<Vec<_>>>()?;
        need!(shape.len() <= 16, "a constant of rank {}", shape.len());
        need!(shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).is_some(), "a constant of shape {shape:?}");
        let value = match call.node.attrs.get("value") {
            None => Array::floats(DType::F32, &[1], &[0.0]),
            Some(Attr::Tensor(t)) => {
                let a = Array::stored(0, t.clone());
                need!(a.len() == 1, "the value of ConstantOfShape has {} elements", a.len());
                if a.dtype.is_float() {
                    Array::floats(a.dtype, &[1], &a.f64s())
                } else {
                    Array::ints(a.dtype, &[1], &a.i64s())
                }
            }
            Some(_) => return Err("the value of ConstantOfShape is no tensor".into()),
        };
        let scalar = value.reshape(&[]).ok_or("the value of ConstantOfShape")?;
        Ok(scalar.expand(&shape).ok_or("the value of ConstantOfShape")?.into())
    }

    /// An operator whose operands are all known.
    pub(super) fn fold(&mut self, call: &Call<'_>) -> Rule {
        let op = call.node.op.as_str();
        let a = |k: usize| call.get(k).array("an operand");
        let out = match op {
            "Min" | "Max" => {
                let mut out = a(0)?.clone();
                for k in 1..call.inputs.len() {
                    out = binary(op, &out, a(k)?)?;
                }
                out
            }
            "Mod" => {
                need!(call.int("fmod", 0)? == 0 || a(0)?.dtype.is_float(), "fmod of integers");
                binary(op, a(0)?, a(1)?)?
            }
            "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" => compare(op, a(0)?, a(1)?)?,
            "And" | "Or" | "Xor" => logic(op, a(0)?, a(1)?)?,
            "Not" => map(a(0)?, DType::Bool, |v| i64::from(v == 0), |v| v)?,
            "IsNaN" => {
                let x = a(0)?;
                small(x.len())?;
                Array::ints(
                    DType::Bool,
                    &x.shape(),
                    &x.f64s().iter().map(|v| i64::from(v.is_nan())).collect::<Vec<_>>(),
                )
            }
            "Where" => {
                let (c, x, y) = (a(0)?, a(1)?, a(2)?);
                let dtype = common(x, y)?;
                let shape = broadcast_shape(&broadcast_shape(&c.shape(), &x.shape())?, &y.shape())?;
                let ([c, x, y], cut) = compact([c, x, y], &shape)?;
                let c = c.i64s();
                let out = if dtype.is_float() {
                    let picked: Vec<f64> = c
                        .iter()
                        .zip(x.f64s().iter().zip(&y.f64s()))
                        .map(|(c, (x, y))| if *c != 0 { *x } else { *y })
                        .collect();
                    Array::floats(dtype, &cut, &picked)
                } else {
                    let picked: Vec<i64> = c
                        .iter()
                        .zip(x.i64s().iter().zip(&y.i64s()))
                        .map(|(c, (x, y))| if *c != 0 { *x } else { *y })
                        .collect();
                    Array::ints(dtype, &cut, &picked)
                };
                finish(&out, &shape)?
            }
            "Range" => {
                let [start, limit, delta] =
                    [0, 1, 2].map(|k| a(k).and_then(|a| a.one().ok_or_else(|| "Range of lists".into())));
                let (start, limit, delta) = (start?, limit?, delta?);
                let dtype = a(0)?.dtype;
                let count = ((limit - start) / delta).ceil().max(0.0);
                need!(delta != 0.0 && count.is_finite(), "Range from {start} to {limit} by {delta}");
                let count = count as usize;
                small(count)?;
                let values = (0..count).map(|i| start + i as f64 * delta);
                if dtype.is_float() {
                    Array::floats(dtype, &[count], &values.collect::<Vec<_>>())
                } else {
                    Array::ints(dtype, &[count], &values.map(|v| v as i64).collect::<Vec<_>>())
                }
            }
            "Clip" => {
                let mut out = a(0)?.clone();
                for (k, name, op) in [(1, "min", "Max"), (2, "max", "Min")] {
                    let bound = if call.has(k) {
                        Some(a(k)?.clone())
                    } else if let Some(Attr::Float(v)) = call.node.attrs.get(name) {
                        Some(Array::floats(DType::F32, &[], &[f64::from(*v)]))
                    } else {
                        None
                    };
                    if let Some(bound) = bound {
                        out = binary(op, &out, &bound)?;
                    }
                }
                out
            }
            "Trilu" => {
                let x = a(0)?;
                let shift = if call.has(1) { a(1)?.one().unwrap_or(0.0) as i64 } else { 0 };
                let upper = call.int("upper", 1)? != 0;
                let shape = x.shape();
                need!(shape.len() >= 2, "Trilu of rank {}", shape.len());
                small(x.len())?;
                let (rows, cols) = (shape[shape.len() - 2].max(1), shape[shape.len() - 1].max(1));
                let keep = |i: usize| {
                    let (r, c) = ((i / cols % rows) as i64, (i % cols) as i64);
                    let on = r.saturating_add(shift);
                    if upper { c >= on } else { c <= on }
                };
                if x.dtype.is_float() {
                    let v: Vec<f64> =
                        x.f64s().into_iter().enumerate().map(|(i, v)| if keep(i) { v } else { 0.0 }).collect();
                    Array::floats(x.dtype, &shape, &v)
                } else {
                    let v: Vec<i64> =
                        x.i64s().into_iter().enumerate().map(|(i, v)| if keep(i) { v } else { 0 }).collect();
                    Array::ints(x.dtype, &shape, &v)
                }
            }
            "ReduceProd" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceMean" | "ReduceSumSquare" | "ReduceL2" => {
                reduce(call, op, a(0)?)?
            }
            "GatherND" | "GatherElements" | "ScatterND" | "ScatterElements" | "NonZero" | "CumSum" | "OneHot"
            | "EyeLike" => {
                return self.fold_index(call).map(|v| vec![v]);
            }
            other => unary(other, a(0)?)?,
        };
        Ok(vec![out.into()])
    }
}

fn reduce(call: &Call<'_>, op: &str, x: &Array) -> Rule<Array> {
    let rank = x.rank();
    small(x.len())?;
    let list = call.list("axes", 1)?.filter(|l| !l.is_empty());
    if list.is_none() && call.int("noop_with_empty_axes", 0)? != 0 {
        return Ok(x.clone());
    }
    let mut axes = match list {
        Some(list) => list.into_iter().map(|k| axis_in(k, rank)).collect::<Rule<Vec<_>>>()?,
        None => (0..rank).collect(),
    };
    axes.sort_unstable();
    axes.dedup();
    let keep = call.int("keepdims", 1)? != 0;
    // reduced axes last, so that each result is one run
    let order: Vec<usize> = (0..rank).filter(|k| !axes.contains(k)).chain(axes.iter().copied()).collect();
    let turned = x.transpose(&order);
    let run: usize = axes.iter().map(|&k| x.dim(k)).product();
    need!(run > 0, "{op} of nothing");
    let shape: Vec<usize> =
        (0..rank).filter(|k| keep || !axes.contains(k)).map(|k| if axes.contains(&k) { 1 } else { x.dim(k) }).collect();
    if x.dtype.is_float() {
        let values: Vec<f64> = turned
            .f64s()
            .chunks(run)
            .map(|c| match op {
                "ReduceProd" => c.iter().product(),
                "ReduceSum" => c.iter().sum(),
                "ReduceMax" => c.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                "ReduceMin" => c.iter().copied().fold(f64::INFINITY, f64::min),
                "ReduceMean" => c.iter().sum::<f64>() / run as f64,
                "ReduceL2" => c.iter().map(|v| v * v).sum::<f64>().sqrt(),
                _ => c.iter().map(|v| v * v).sum(),
            })
            .collect();
        return Ok(Array::floats(x.dtype, &shape, &values));
    }
    let values: Option<Vec<i64>> = turned
        .i64s()
        .chunks(run)
        .map(|c| match op {
            "ReduceProd" => c.iter().try_fold(1i64, |n, &v| n.checked_mul(v)),
            "ReduceSum" => c.iter().try_fold(0i64, |n, &v| n.checked_add(v)),
            "ReduceMax" => c.iter().copied().max(),
            "ReduceMin" => c.iter().copied().min(),
            _ => None,
        })
        .collect();
    Ok(Array::ints(x.dtype, &shape, &values.ok_or_else(|| format!("{op} of integers"))?))
}
