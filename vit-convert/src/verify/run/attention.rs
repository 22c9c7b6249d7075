//! Fused attention: ONNX's own (opset 23), ONNX Runtime's Attention and MultiHeadAttention.

use super::call::{Call, one};
use super::shape::Res;
use super::value::Value;
use super::{arith, layout, linear, reduce};
use crate::onnx::graph::DType;

/// The form that every spelling is reduced to: q `[B, H, S, D]`, k `[B, H, T, D]`, v `[B, H, T, E]`.
struct Heads {
    q: Value,
    k: Value,
    v: Value,
    scale: f64,
    /// Added to the scores, broadcast to `[B, H, S, T]`.
    bias: Option<Value>,
}

impl Heads {
    fn run(self, call: &mut Call<'_>) -> Res<Value> {
        let kt = linear::swap(&self.k, 2, 3)?;
        let times = |v: Value, by: f64| {
            let by = Value::scalar(v.dtype, by);
            arith::combine(v, by, "Mul")
        };
        let mut scores = times(linear::matmul(call, self.q, kt)?, self.scale)?;
        if let Some(bias) = &self.bias {
            let dims = scores.dims.clone();
            scores = arith::combine(scores, bias.clone(), "Add")?;
            if scores.dims != dims {
                return Err(format!("a mask of shape {:?} over scores of shape {dims:?}", bias.dims));
            }
        }
        let dims = scores.dims.clone();
        let (rows, n) = (dims[..3].iter().product(), dims[3]);
        let masked = self.bias.is_some().then(|| scores.to_f64()).transpose()?;
        let mut weights = reduce::softmax(scores.with_dims(vec![rows, n])?, false)?;
        // a query whose keys are all masked gets zeros, not NaN
        if let Some(all) = masked.filter(|_| n > 0) {
            let sees: Vec<i64> =
                all.chunks(n).map(|row| i64::from(row.iter().any(|&x| x != f64::NEG_INFINITY))).collect();
            let sees = Value::int(DType::Bool, vec![rows, 1], sees);
            weights = arith::select(&sees, &weights, &Value::scalar(weights.dtype, 0.0))?;
        }
        let weights = weights.with_dims(dims)?;
        linear::matmul(call, weights, self.v)
    }
}

/// `[B, S, H·D] → [B, H, S, D]`
fn to_heads(v: &Value, heads: usize) -> Res<Value> {
    let &[b, s, d] = v.dims.as_slice() else { return Err(format!("needs rank 3, found {:?}", v.dims)) };
    if heads == 0 || d % heads != 0 {
        return Err(format!("{heads} heads of width {d}"));
    }
    v.clone().with_dims(vec![b, s, heads, d / heads])?.permute(&[0, 2, 1, 3])
}

/// `[B, H, S, D] → [B, S, H·D]`
fn from_heads(v: &Value) -> Res<Value> {
    let &[b, h, s, d] = v.dims.as_slice() else { return Err(format!("needs rank 4, found {:?}", v.dims)) };
    v.permute(&[0, 2, 1, 3])?.with_dims(vec![b, s, h * d])
}

fn heads_attr(call: &Call<'_>, name: &str) -> Res<usize> {
    usize::try_from(call.int(name, 0)?).ok().filter(|&h| h > 0).ok_or_else(|| format!("`{name}` must be positive"))
}

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    (call.node.op == "Attention").then(|| attention(call))
}

fn attention(call: &mut Call<'_>) -> Res<Vec<Value>> {
    const KNOWN: [&str; 7] =
        ["is_causal", "q_num_heads", "kv_num_heads", "scale", "softcap", "softmax_precision", "qk_matmul_output_mode"];
    if let Some(name) = call.node.attrs.keys().find(|k| !KNOWN.contains(&k.as_str())) {
        return Err(format!("attribute `{name}` has no rule"));
    }
    let flat = call.input(0)?.rank() == 3;
    let side = |i: usize, heads: &str| -> Res<Value> {
        let v = call.input(i)?;
        match (v.rank(), flat) {
            (4, false) => Ok(v.clone()),
            (3, true) => to_heads(v, heads_attr(call, heads)?),
            _ => Err(format!("input {i} has shape {:?}", v.dims)),
        }
    };
    let (q, mut k, mut v) = (side(0, "q_num_heads")?, side(1, "kv_num_heads")?, side(2, "kv_num_heads")?);
    if q.dtype != k.dtype {
        return Err(format!("q is {:?}, k {:?}", q.dtype, k.dtype));
    }
    let cached = (4..7).any(|i| call.opt(i).is_some()) || call.node.outputs.iter().skip(1).any(Option::is_some);
    if cached || call.int("is_causal", 0)? != 0 || call.float("softcap", 0.0)? != 0.0 {
        return Err("there is no rule for a cache of keys and values, a causal mask or a softcap".into());
    }
    let (&[b, h, _, d], &[_, hk, t, _]) = (q.dims.as_slice(), k.dims.as_slice()) else {
        return Err("needs rank 4".into());
    };
    if hk != h {
        if hk == 0 || h % hk != 0 {
            return Err(format!("{h} heads of queries for {hk} of keys"));
        }
        let repeat = |x: &Value| {
            let e = x.dims[3];
            x.clone().with_dims(vec![b, hk, 1, t, e])?.broadcast(&[b, hk, h / hk, t, e])?.with_dims(vec![b, h, t, e])
        };
        (k, v) = (repeat(&k)?, repeat(&v)?);
    }
    let bias = match call.opt(3) {
        Some(m) if m.dtype == DType::Bool => {
            let (zero, never) = (Value::scalar(q.dtype, 0.0), Value::scalar(q.dtype, f64::NEG_INFINITY));
            Some(arith::select(m, &zero, &never)?)
        }
        Some(m) => Some(m.clone()),
        None => None,
    };
    let scale = call.opt_float("scale")?.unwrap_or_else(|| 1.0 / (d as f64).sqrt());
    let out = Heads { q, k, v, scale, bias }.run(call)?;
    Ok(vec![if flat { from_heads(&out)? } else { out }])
}

pub(super) fn run_contrib(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    one(match call.node.op.as_str() {
        "Attention" => (|| {
            let (x, w) = (call.take(0)?, call.take(1)?);
            packed_attention(call, x, w)
        })(),
        "MultiHeadAttention" => multi_head(call),
        _ => return None,
    })
}

/// ORT's Attention: q, k and v by one product of `x [B, S, C]` with `w [C, 3·H·D]`.
fn packed_attention(call: &mut Call<'_>, x: Value, w: Value) -> Res<Value> {
    let heads = heads_attr(call, "num_heads")?;
    if (3..call.inputs.len()).any(|i| call.opt(i).is_some()) || call.int("do_rotary", 0)? != 0 {
        return Err("there is no rule for a mask, a cache, a bias of the scores or rotary positions".into());
    }
    let projected = reduce::plus(linear::matmul(call, x, w)?, call.opt(2))?;
    let &[_, _, all] = projected.dims.as_slice() else {
        return Err(format!("needs rank 3, found {:?}", projected.dims));
    };
    let sizes = match call.ints("qkv_hidden_sizes")? {
        Some(sizes) => layout::sizes(&sizes)?,
        None => vec![all / 3; 3],
    };
    let &[dq, dk, dv] = sizes.as_slice() else { return Err(format!("qkv_hidden_sizes {sizes:?}")) };
    if dq.saturating_add(dk).saturating_add(dv) != all {
        return Err(format!("{sizes:?} of {all} columns"));
    }
    let part = |at: usize, n: usize| to_heads(&layout::narrow(&projected, 2, at, n)?, heads);
    let (q, k, v) = (part(0, dq)?, part(dq, dk)?, part(dq + dk, dv)?);
    finish(call, q, k, v)
}

fn finish(call: &mut Call<'_>, q: Value, k: Value, v: Value) -> Res<Value> {
    if call.int("unidirectional", 0)? != 0 {
        return Err("there is no rule for a causal mask".into());
    }
    let d = q.dims.get(3).copied().unwrap_or(1).max(1);
    let scale = match call.float("scale", 0.0)? {
        0.0 => 1.0 / (d as f64).sqrt(),
        scale => scale,
    };
    from_heads(&Heads { q, k, v, scale, bias: None }.run(call)?)
}

/// ORT's MultiHeadAttention: q, k and v given, or packed as `[B, S, H, 3, D]`.
fn multi_head(call: &mut Call<'_>) -> Res<Value> {
    let heads = heads_attr(call, "num_heads")?;
    if (4..call.inputs.len()).any(|i| call.opt(i).is_some()) {
        return Err("there is no rule for a mask, a cache or a bias of the scores".into());
    }
    let query = call.input(0)?.clone();
    // [B, S, H, P, D] → P values [B, H, S, D]
    let unpack = |v: &Value, parts: usize| -> Res<Vec<Value>> {
        let &[b, s, h, p, d] = v.dims.as_slice() else { return Err(format!("needs rank 5, found {:?}", v.dims)) };
        if (h, p) != (heads, parts) {
            return Err(format!("packed as {:?} for {heads} heads", v.dims));
        }
        (0..p).map(|i| layout::narrow(v, 3, i, 1)?.with_dims(vec![b, s, h, d])?.permute(&[0, 2, 1, 3])).collect()
    };
    let mut qkv = if query.rank() == 5 {
        unpack(&query, 3)?
    } else {
        let q = to_heads(&query, heads)?;
        let key = call.input(1)?;
        match key.rank() {
            4 => vec![q, key.clone(), call.input(2)?.clone()],
            _ => vec![q, to_heads(key, heads)?, to_heads(call.input(2)?, heads)?],
        }
    };
    if let Some(bias) = call.opt(3).cloned() {
        let mut at = 0;
        for v in &mut qkv {
            let d = v.dims[3];
            let part = layout::narrow(&bias, 0, at, heads * d)?.with_dims(vec![1, heads, 1, d])?;
            at += heads * d;
            *v = arith::binary(v, &part, "Add")?;
        }
        if bias.dims != [at] {
            return Err(format!("a bias of shape {:?} for {at} columns", bias.dims));
        }
    }
    let (Some(v), Some(k), Some(q)) = (qkv.pop(), qkv.pop(), qkv.pop()) else { return Err("needs q, k and v".into()) };
    finish(call, q, k, v)
}
