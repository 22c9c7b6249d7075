//! Fused attention: `ai.onnx` Attention, and what it shares with the operators of ONNX Runtime.

use super::call::Call;
use super::product::Roles;
use super::value::{Rule, Value, View, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::import::axes::{self, Pick};
use crate::import::expr::Head;

/// Roles in a product of `[batch, heads, rows, columns]`, summed over `sum`.
fn per_head(sum: usize, free: usize) -> Roles {
    Roles { batch: vec![0, 1], sum: vec![sum], free: vec![free] }
}

impl Walk<'_> {
    /// `softmax(scale · q kᵀ) v` over `[batch, heads, tokens, head_dim]`.
    pub(super) fn sdpa(&mut self, q: &Value, k: &Value, v: &Value, scale: f64) -> Rule<View> {
        for operand in [q, k, v] {
            let s = operand.shape()?;
            need!(s.len() == 4, "attention over an operand of shape {s:?}");
        }
        let p = self.contract(q, k, &per_head(3, 2), &per_head(3, 2))?;
        let e = self.x.scale(p.e, scale);
        let scores = View { e, dims: [p.batch, p.a, p.b].concat(), sel: None };
        let weights = self.soft(&scores, 3, Head::Softmax)?;
        let p = self.contract(&weights.into(), v, &per_head(3, 2), &per_head(2, 3))?;
        Ok(View { e: p.e, dims: [p.batch, p.a, p.b].concat(), sel: None })
    }

    /// `[batch, tokens, heads · head_dim]` → `[batch, heads, tokens, head_dim]`.
    pub(super) fn heads_apart(&mut self, value: &Value, heads: usize) -> Rule<Value> {
        let s = value.shape()?;
        need!(s.len() == 3 && heads > 0 && s[2] % heads == 0, "{heads} heads of an activation of shape {s:?}");
        let v = match value {
            Value::Const(c) => self.lift(c)?,
            other => other.view("an operand of attention")?.clone(),
        };
        let dims = axes::regroup(&v.dims, &[s[0], s[1], heads, s[2] / heads]).ok_or("heads across axes")?;
        Ok(v.with([0, 2, 1, 3].map(|k: usize| dims[k].clone()).to_vec()).into())
    }

    /// `[batch, heads, tokens, head_dim]` → `[batch, tokens, heads · head_dim]`.
    pub(super) fn heads_together(&mut self, v: &View) -> Rule<View> {
        let dims: Vec<_> = [0, 2, 1, 3].map(|k: usize| v.dims[k].clone()).to_vec();
        let s = axes::shape(&dims);
        Ok(v.with(axes::regroup(&dims, &[s[0], s[1], s[2] * s[3]]).ok_or("heads across axes")?))
    }

    /// A positive number of heads.
    pub(super) fn head_count(call: &Call<'_>, name: &str) -> Rule<usize> {
        let h = call.int(name, 0)?;
        usize::try_from(h).ok().filter(|h| (1..=1 << 16).contains(h)).ok_or_else(|| format!("{name} = {h}"))
    }

    pub(super) fn onnx_attention(&mut self, call: &Call<'_>) -> Rule<Value> {
        need!(call.int("is_causal", 0)? == 0, "exported with opset 23 Attention and is_causal=1: not a ViT encoder");
        need!(call.float("softcap", 0.0)? == 0.0, "Attention with a softcap is no ViT");
        need!((4..8).all(|k| !call.has(k)), "Attention with a cache of keys and values is no ViT encoder");
        need!(call.int("softmax_precision", 1)? != 0, "Attention with softmax_precision 0");
        if call.has(3) {
            let mask = call.get(3).array("the mask of Attention")?;
            let all = mask.uniform();
            let open = if mask.dtype.is_float() { all == Some(0.0) } else { all.is_some_and(|v| v != 0.0) };
            need!(open, "an attention mask, or a bias of the attention scores, is not supported");
        }
        let (q, k, v) = (call.get(0), call.get(1), call.get(2));
        let flat = q.shape()?.len() == 3;
        let (q, k, v) = if flat {
            let heads = Self::head_count(call, "q_num_heads")?;
            need!(
                heads == Self::head_count(call, "kv_num_heads")?,
                "Attention with fewer heads of keys than of queries"
            );
            (self.heads_apart(q, heads)?, self.heads_apart(k, heads)?, self.heads_apart(v, heads)?)
        } else {
            (q.clone(), k.clone(), v.clone())
        };
        let s = q.shape()?;
        need!(s.len() == 4 && s[3] > 0, "Attention over shape {s:?}");
        let default = (s[3] as f64).powf(-0.5);
        let scale = if call.node.attrs.contains_key("scale") { call.float("scale", 0.0)? } else { default };
        let out = self.sdpa(&q, &k, &v, scale)?;
        Ok(if flat { self.heads_together(&out)? } else { out }.into())
    }

    /// `com.microsoft.Attention`: the projection of q, k and v included.
    pub(super) fn ms_attention(&mut self, call: &Call<'_>) -> Rule<Value> {
        need!(call.int("unidirectional", 0)? == 0, "attention with unidirectional=1: not a ViT encoder");
        need!(call.int("do_rotary", 0)? == 0, "attention with rotary positions");
        need!((3..8).all(|k| !call.has(k)), "attention with a mask, a cache or a bias of the scores is not supported");
        let heads = Self::head_count(call, "num_heads")?;
        let product = self.matmul(call.get(0), call.get(1))?;
        let y = if call.has(2) { self.binary("Add", &product, call.get(2))? } else { product };
        let n = *y.shape()?.last().ok_or("attention over a scalar")?;
        let sizes = match call.ints("qkv_hidden_sizes")? {
            Some(list) => list
                .iter()
                .map(|&s| usize::try_from(s).map_err(|_| format!("qkv_hidden_sizes {list:?}")))
                .collect::<Rule<Vec<_>>>()?,
            None => vec![n / 3; 3],
        };
        need!(
            sizes.len() == 3 && sizes.iter().try_fold(0usize, |a, &b| a.checked_add(b)) == Some(n),
            "q, k and v of sizes {sizes:?}"
        );
        let mut at = 0;
        let mut parts = Vec::with_capacity(3);
        for s in sizes {
            let part = self.restrict(&y, 2, &Pick::range(at, s))?;
            parts.push(self.heads_apart(&part, heads)?);
            at += s;
        }
        let scale = self.fused_scale(call, &parts[0])?;
        let out = self.sdpa(&parts[0], &parts[1], &parts[2], scale)?;
        Ok(self.heads_together(&out)?.into())
    }

    /// The `scale` attribute; 0 or absent means `head_dim^-½`.
    fn fused_scale(&self, call: &Call<'_>, q: &Value) -> Rule<f64> {
        let s = call.float("scale", 0.0)?;
        let d = *q.shape()?.last().ok_or("attention over a scalar")?;
        Ok(if s == 0.0 { (d as f64).powf(-0.5) } else { s })
    }

    /// `com.microsoft.MultiHeadAttention`: separate q, k and v, or packed as `[batch, tokens, heads, 3, head_dim]`.
    pub(super) fn multi_head(&mut self, call: &Call<'_>) -> Rule<Value> {
        need!(call.int("unidirectional", 0)? == 0, "attention with unidirectional=1: not a ViT encoder");
        need!((4..10).all(|k| !call.has(k)), "attention with a mask, a cache or a bias of the scores is not supported");
        let heads = Self::head_count(call, "num_heads")?;
        let mut parts = Vec::with_capacity(3);
        if call.has(1) {
            need!(call.has(2), "packed keys and values");
            let bias = if call.has(3) { Some(call.get(3).array("the bias")?.clone()) } else { None };
            let mut at = 0;
            for k in 0..3 {
                let mut v = call.get(k).clone();
                if let Some(bias) = &bias {
                    let n = *v.shape()?.last().ok_or("attention over a scalar")?;
                    need!(v.shape()?.len() == 3, "a bias of keys that are laid out by heads");
                    need!(at + n <= bias.len() && bias.rank() == 1, "a bias of shape {:?}", bias.shape());
                    let part: Array = bias.pick(0, &Pick::range(at, n)).ok_or("the bias")?;
                    v = self.binary("Add", &v, &part.into())?;
                    at += n;
                }
                parts.push(if v.shape()?.len() == 3 { self.heads_apart(&v, heads)? } else { v });
            }
        } else {
            let s = call.get(0).shape()?;
            need!(s.len() == 5 && s[2] == heads && s[3] == 3 && !call.has(3), "packed q, k and v of shape {s:?}");
            for k in 0..3 {
                let part = self.restrict(call.get(0), 3, &Pick::range(k, 1))?;
                let v = part.view("packed q, k and v")?;
                parts.push(v.with([0, 2, 1, 4].map(|k: usize| v.dims[k].clone()).to_vec()).into());
            }
        }
        let scale = self.fused_scale(call, &parts[0])?;
        let out = self.sdpa(&parts[0], &parts[1], &parts[2], scale)?;
        Ok(self.heads_together(&out)?.into())
    }
}
