//! Sequences of tensors, and Dropout.

use super::call::{Call, one};
use super::layout;
use super::shape::{Res, position};
use super::value::{Data, Value};
use crate::onnx::graph::{Attr, DType};

fn items<'a>(call: &'a Call<'_>, i: usize) -> Res<&'a [Value]> {
    match call.opt(i).map(|v| &v.data) {
        Some(Data::Sequence(items)) => Ok(items),
        _ => Err(format!("input {i} is no sequence")),
    }
}

/// A position in a sequence; one past the last too if `end` is true.
fn place(at: &Value, len: usize, end: bool) -> Res<usize> {
    let i = at.one_int()?;
    if end && i == len as i64 { Ok(len) } else { position(i, len) }
}

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    one(match call.node.op.as_str() {
        "Dropout" => {
            return Some((|| {
                if call.opt(2).map_or(Ok(0.0), Value::one)? != 0.0 {
                    return Err("is in training mode".into());
                }
                let v = call.take(0)?;
                let mask = Value::int(DType::Bool, v.dims.clone(), vec![1; v.len()]);
                Ok(vec![v, mask])
            })());
        }
        "SequenceEmpty" => Ok(Value::sequence(vec![])),
        "SequenceConstruct" => {
            (0..call.inputs.len()).map(|i| call.input(i).cloned()).collect::<Res<Vec<_>>>().map(Value::sequence)
        }
        "SequenceLength" => items(call, 0).map(|s| Value::int(DType::I64, vec![], vec![s.len() as i64])),
        "SequenceAt" => (|| {
            let s = items(call, 0)?;
            Ok(s[place(call.input(1)?, s.len(), false)?].clone())
        })(),
        "SequenceInsert" => (|| {
            let mut s = items(call, 0)?.to_vec();
            let at = call.opt(2).map_or(Ok(s.len()), |v| place(v, s.len(), true))?;
            s.insert(at, call.input(1)?.clone());
            Ok(Value::sequence(s))
        })(),
        "ConcatFromSequence" => (|| {
            if call.int("new_axis", 0)? != 0 {
                return Err("there is no rule for a new axis".into());
            }
            layout::concat(items(call, 0)?, call.int("axis", 0)?)
        })(),
        "SplitToSequence" => split(call),
        _ => return None,
    })
}

fn split(call: &Call<'_>) -> Res<Value> {
    let v = call.input(0)?;
    let axis = v.axis(call.int("axis", 0)?)?;
    let n = v.dims[axis];
    let keep = !matches!(call.node.attrs.get("keepdims"), Some(Attr::Int(0)));
    let lens = match call.opt(1) {
        None => vec![1; n],
        Some(s) if s.rank() == 0 => {
            let step = usize::try_from(s.one_int()?).ok().filter(|&s| s > 0).ok_or("splits into nothing")?;
            (0..n).step_by(step).map(|i| step.min(n - i)).collect()
        }
        Some(s) => layout::sizes(s.as_ints()?)?,
    };
    let mut at = 0usize;
    let mut parts = Vec::with_capacity(lens.len());
    for len in lens {
        let mut part = layout::narrow(v, axis, at, len)?;
        at += len;
        if call.opt(1).is_none() && !keep {
            let mut dims = part.dims.clone();
            dims.remove(axis);
            part = part.with_dims(dims)?;
        }
        parts.push(part);
    }
    if at != n {
        return Err(format!("the parts hold {at} of {n} places"));
    }
    Ok(Value::sequence(parts))
}
