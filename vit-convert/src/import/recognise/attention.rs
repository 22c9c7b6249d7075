//! Multi-head attention: three linears, the softmax of their scores, and the projection after it.

use super::finder::{Finder, Fit, Refusal, refuse};
use crate::import::array::Array;
use crate::import::expr::{Id, Op};
use crate::onnx::graph::DType;

pub struct Attention {
    pub proj: Id,
    pub core: Id,
    pub heads: usize,
    pub scale: f64,
    /// The linears of q, k and v.
    pub qkv: [Id; 3],
    /// The norms of q and k.
    pub norms: [Option<Id>; 2],
    /// `(first, count)`: the tokens that keys and values come from, if that is a part of them.
    pub sel: Option<(usize, usize)>,
    /// What the linears of keys and values read.
    pub source: Id,
    /// What the linear of queries reads.
    pub queries: Id,
}

impl Finder<'_> {
    /// `proj(softmax(scale · q kᵀ) v)`.
    pub fn attention(&self, e: Id) -> Option<Attention> {
        if !self.is_linear(e) {
            return None;
        }
        let core = self.arg(e);
        let &Op::Attn { heads, scale } = self.op(core) else { return None };
        let &[q, k, v] = self.args(core) else { return None };
        let under = |e: Id| if self.is_norm(e) { (self.arg(e), Some(e)) } else { (e, None) };
        let ((q, nq), (mut k, nk)) = (under(q), under(k));
        let mut v = v;
        let mut sel = None;
        if let (&Op::Sel { start }, &Op::Sel { start: other }) = (self.op(k), self.op(v))
            && start == other
            && self.tokens(k) == self.tokens(v)
        {
            sel = Some((start, self.tokens(k)));
            (k, v) = (self.arg(k), self.arg(v));
        }
        if ![q, k, v].iter().all(|&e| self.is_linear(e)) || self.arg(k) != self.arg(v) {
            return None;
        }
        let (queries, source) = (self.arg(q), self.arg(k));
        Some(Attention { proj: e, core, heads, scale: scale.0, qkv: [q, k, v], norms: [nq, nk], sel, source, queries })
    }

    /// The factor that q's weights take in: 1, or `√head_dim` if the graph has no scale at all, because then the
    /// exporter has folded `head_dim^-½` into them.
    pub fn scale(&self, attn: &Attention) -> Fit<f64> {
        let d = self.width(attn.qkv[0]) / attn.heads.max(1);
        let want = (d as f64).powf(-0.5);
        // two factors, each rounded to bfloat16's eight bits
        let tolerance = if self.half { 8e-3 } else { self.x.tolerance };
        if (attn.scale - want).abs() <= tolerance * want {
            return Ok(1.0);
        }
        if (attn.scale - 1.0).abs() <= 1e-6 && attn.norms[0].is_none() {
            return Ok(1.0 / want);
        }
        refuse(attn.core, format!("the attention scale is {:.6}, not head_dim^-0.5 = {want:.6}", attn.scale))
    }

    /// Takes q, k and v as one linear, q times a factor; says whether it has a bias.
    pub fn packed_qkv(&mut self, attn: &Attention, module: &str, factor: f64) -> Fit<bool> {
        let biased = self.pack(&attn.qkv, module)?;
        if factor != 1.0 {
            let n = self.width(attn.qkv[0]);
            let rows: usize = attn.qkv.iter().map(|&e| self.width(e)).sum();
            let factors: Vec<f64> = (0..rows).map(|k| if k < n { factor } else { 1.0 }).collect();
            for name in ["weight", "bias"] {
                let key = format!("{module}.{name}");
                if let Some(a) = self.tensors.get(&key) {
                    let dims = if a.rank() == 2 { vec![rows, 1] } else { vec![rows] };
                    let by = Array::floats(DType::F64, &dims, &factors);
                    let scaled = a.times(&by).map_err(|why| Refusal { at: Some(attn.core), why })?;
                    self.tensors.insert(key, scaled);
                }
            }
            self.rounded.push(format!("`{module}`: the attention scale was folded into q and is unfolded again"));
        }
        Ok(biased)
    }

    /// Takes the norms of q and k; says whether there are any.
    pub fn qk_norms(&mut self, attn: &Attention, module: &str) -> Fit<bool> {
        match attn.norms {
            [None, None] => Ok(false),
            [Some(q), Some(k)] => {
                for (norm, name) in [(q, "q_norm"), (k, "k_norm")] {
                    let d = self.width(norm) / attn.heads.max(1);
                    if !matches!(self.op(norm), Op::Norm { group, .. } if *group == d) {
                        return refuse(norm, "q and k are normed over all heads together");
                    }
                    self.norm(norm, &format!("{module}.{name}"), true)?;
                }
                Ok(true)
            }
            [Some(norm), None] | [None, Some(norm)] => refuse(norm, "only one of q and k is normed"),
        }
    }
}
