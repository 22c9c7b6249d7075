//! ONNX Runtime's fused operators (`com.microsoft`), but for attention and quantisation.

use super::call::{Call, one};
use super::shape::{Res, count};
use super::value::Value;
use super::{arith, linear, reduce};
use crate::onnx::graph::DType;

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    one(match call.node.op.as_str() {
        "SkipLayerNormalization" => return Some(skip_norm(call, true)),
        "SkipSimplifiedLayerNormalization" => return Some(skip_norm(call, false)),
        "Gelu" => call.take(0).and_then(arith::gelu),
        "BiasGelu" => (|| arith::gelu(arith::combine(call.take(0)?, call.take(1)?, "Add")?))(),
        "FastGelu" => (|| arith::gelu_tanh(reduce::plus(call.take(0)?, call.opt(1))?))(),
        "QuickGelu" => (|| {
            let alpha = call.float("alpha", 1.702)?;
            arith::quick_gelu(call.take(0)?, alpha)
        })(),
        "BiasAdd" => {
            (|| arith::binary(&arith::binary(call.input(0)?, call.input(1)?, "Add")?, call.input(2)?, "Add"))()
        }
        "FusedMatMul" | "TransposeMatMul" => fused_matmul(call),
        "FusedGemm" => linear::gemm(call).and_then(|v| activate(call, v)),
        _ => return None,
    })
}

/// The activation that a fused operator names.
fn activate(call: &Call<'_>, v: Value) -> Res<Value> {
    match call.str("activation", "")?.as_str() {
        "" => Ok(v),
        "Relu" => arith::binary(&v, &Value::scalar(v.dtype, 0.0), "Max"),
        other => Err(format!("activation `{other}` has no rule")),
    }
}

/// `norm(input + skip + bias)`, and the sum as the fourth output.
fn skip_norm(call: &mut Call<'_>, centred: bool) -> Res<Vec<Value>> {
    let eps = call.float("epsilon", if centred { 1e-12 } else { 1e-5 })?;
    let (x, skip, gamma) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let (beta, bias) = if centred { (call.opt(3), call.opt(4)) } else { (None, call.opt(3)) };
    let sum = reduce::plus(arith::binary(x, skip, "Add")?, bias)?;
    if sum.dims != x.dims {
        return Err(format!("skip of shape {:?} does not fit {:?}", skip.dims, x.dims));
    }
    let n = x.dims.last().copied().unwrap_or(0);
    if gamma.dims != [n] || beta.is_some_and(|b| b.dims != [n]) {
        return Err(format!("gamma of shape {:?} over {n} channels", gamma.dims));
    }
    let (normed, inverse, means) = reduce::norm_last(sum.clone(), eps, centred)?;
    let out = reduce::plus(arith::combine(normed, gamma.clone(), "Mul")?, beta)?;
    let mut stat = x.dims.clone();
    stat.pop();
    stat.push(1);
    count(&stat)?;
    Ok(vec![out, Value::reals(DType::F32, stat.clone(), means), Value::reals(DType::F32, stat, inverse), sum])
}

fn fused_matmul(call: &mut Call<'_>) -> Res<Value> {
    let mut sides = [call.take(0)?, call.take(1)?];
    for (v, (turn, batch)) in sides.iter_mut().zip([("transA", "transBatchA"), ("transB", "transBatchB")]) {
        if call.int(batch, 0)? != 0 {
            // [M, batch…, K] → [batch…, M, K]
            let mut perm: Vec<usize> = (1..v.rank().saturating_sub(1)).collect();
            perm.extend([0, v.rank().saturating_sub(1)]);
            *v = v.permute(&perm)?;
        }
        if call.int(turn, 0)? != 0 && v.rank() > 1 {
            *v = linear::swap(v, -2, -1)?;
        }
    }
    let alpha = call.float("alpha", 1.0)?;
    let [a, b] = sides;
    let out = linear::matmul(call, a, b)?;
    arith::binary(&out, &Value::scalar(out.dtype, alpha), "Mul")
}
