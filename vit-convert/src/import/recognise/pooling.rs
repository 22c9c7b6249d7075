//! How tokens become one: the class token, a mean or maximum, attention pooling; and the norms before and after it.

use vit_model::config::Pool;

use super::attention::Attention;
use super::finder::{Finder, Fit, refuse};
use super::head::Classifier;
use super::mlp::Mlp;
use super::trunk::Facts;
use crate::import::expr::{Id, Op, PoolKind};

/// Everything between the last block and the head.
pub struct Pooling {
    pub pool: Pool,
    /// `(first, count)`: the tokens that are pooled, unless it is all of them or the class token.
    pub range: Option<(usize, usize)>,
    /// Of a class token beside a mean, the mean comes first.
    pub turned: bool,
    /// Attention pooling.
    pub map: Option<MapHead>,
    /// The norm after the pooling.
    pub fc_norm: Option<Id>,
    /// The norm before the pooling.
    pub final_norm: Option<Id>,
    /// The tokens after the last block.
    pub below: Id,
}

/// Attention pooling (`AttentionPoolLatent`): a learned query attends to the tokens, and an MLP follows.
pub struct MapHead {
    attn: Attention,
    mlp: Mlp,
    norm: Id,
    latent: Id,
}

impl Finder<'_> {
    /// The pooling below a classifier.
    pub fn pooling(&mut self, top: &Classifier) -> Fit<Pooling> {
        let mut out = Pooling {
            pool: Pool::None,
            range: None,
            turned: false,
            map: None,
            fc_norm: None,
            final_norm: None,
            below: top.below,
        };
        let mut e = top.below;
        if self.is_norm(e) && self.pooled(self.arg(e)).is_some() {
            out.fc_norm = Some(e);
            e = self.arg(e);
        }
        if let Some((pool, first, count, below)) = self.pooled(e) {
            self.own(e, "pool");
            if top.sel.is_some() {
                return refuse(e, "tokens are selected after pooling");
            }
            out.turned = *self.op(e) == Op::Beside && matches!(self.op(self.arg(e)), Op::Pool { .. });
            (out.pool, out.range, e) = (pool, Some((first, count)), below);
        } else if top.sel == Some((0, 1)) {
            out.pool = Pool::Token;
        } else if let Some(map) = self.map_head(e) {
            if top.sel.is_some() {
                return refuse(e, "tokens are selected after pooling");
            }
            e = map.attn.source;
            out.range = Some(map.attn.sel.unwrap_or((0, self.tokens(e))));
            (out.pool, out.map) = (Pool::Map, Some(map));
        } else if let Some(sel) = top.sel {
            return refuse(top.head.unwrap_or(e), format!("the tokens {sel:?} are read, not the class token"));
        }
        // a norm over the tokens that leave a block; one over the embedding belongs to the embedding
        if self.is_norm(e) && !self.residuals(self.arg(e)).0.is_empty() {
            out.final_norm = Some(e);
            e = self.arg(e);
        }
        if let (true, Some(norm)) = (out.turned, out.fc_norm) {
            return refuse(norm, "a norm over the mean of the tokens beside the class token, in this order");
        }
        if let (Some(norm), Some(_)) = (out.fc_norm, out.final_norm) {
            return refuse(norm, "a norm before and one after the pooling");
        }
        out.below = e;
        Ok(out)
    }

    /// The mean, the maximum, or the mean of both, of neighbouring tokens, or the class token beside their mean:
    /// `(kind, first, count, of what)`.
    fn pooled(&self, e: Id) -> Option<(Pool, usize, usize, Id)> {
        if let &Op::Pool { kind, lo, n } = self.op(e) {
            return Some((if kind == PoolKind::Mean { Pool::Avg } else { Pool::Max }, lo, n, self.arg(e)));
        }
        if *self.op(e) == Op::Beside
            && let &[a, b] = self.args(e)
        {
            return [(a, b), (b, a)].into_iter().find_map(|(class, mean)| {
                let (&Op::Sel { start: 0 }, &Op::Pool { kind: PoolKind::Mean, lo, n }) =
                    (self.op(class), self.op(mean))
                else {
                    return None;
                };
                (self.arg(class) == self.arg(mean)).then(|| (Pool::TokenAvg, lo, n, self.arg(class)))
            });
        }
        let (core, half) = self.x.scaled(e);
        if half != 0.5 || *self.op(core) != Op::Add {
            return None;
        }
        let &[a, b] = self.args(core) else { return None };
        let (&Op::Pool { kind: k, lo, n }, &Op::Pool { kind: l, lo: lo2, n: n2 }) = (self.op(a), self.op(b)) else {
            return None;
        };
        let both = k != l && (lo, n) == (lo2, n2) && self.arg(a) == self.arg(b);
        both.then(|| (Pool::Avgmax, lo, n, self.arg(a)))
    }

    /// `y + mlp(norm(y))`, where `y` is the answer to a learned query.
    fn map_head(&self, e: Id) -> Option<MapHead> {
        if *self.op(e) != Op::Add || self.tokens(e) != 1 {
            return None;
        }
        let &[a, b] = self.args(e) else { return None };
        [(a, b), (b, a)].into_iter().find_map(|(y, branch)| {
            let (mlp, attn) = (self.mlp(branch)?, self.attention(y)?);
            let (norm, latent) = (mlp.source, attn.queries);
            let fits = mlp.fc1.len() == 1
                && self.is_norm(norm)
                && self.arg(norm) == y
                && matches!(self.op(latent), Op::Param(_))
                && attn.norms == [None, None];
            fits.then_some(MapHead { attn, mlp, norm, latent })
        })
    }

    /// Takes the tensors of attention pooling, which must have the blocks' heads and MLP.
    pub fn map_tensors(&mut self, map: &MapHead, facts: &Facts) -> Fit {
        let Op::Param(latent) = self.op(map.latent) else { return refuse(map.latent, "a query") };
        if latent.dim(0) != 1 {
            return refuse(map.latent, "a pooling query for each image");
        }
        let attn = &map.attn;
        if self.scale(attn)? != 1.0 {
            return refuse(attn.core, "attention pooling without a scale");
        }
        if attn.heads != facts.heads {
            return refuse(attn.core, format!("{} heads in the pooling, {} in the blocks", attn.heads, facts.heads));
        }
        self.put(map.latent, "attn_pool", "latent", (**latent).clone())?;
        let [q, k, v] = attn.qkv;
        self.linear(q, "attn_pool.q")?;
        self.pack(&[k, v], "attn_pool.kv")?;
        self.linear(attn.proj, "attn_pool.proj")?;
        self.own(attn.core, "attn_pool");
        self.norm(map.norm, "attn_pool.norm", false)?;
        let (fc1, fc2) = (map.mlp.fc1[0], map.mlp.fc2);
        self.linear(fc1, "attn_pool.mlp.fc1")?;
        self.linear(fc2, "attn_pool.mlp.fc2")?;
        for (e, want) in [(fc1, facts.hidden), (fc2, self.width(attn.proj))] {
            if self.width(e) != want {
                return refuse(e, format!("the pooling's MLP is {} wide, {want} is expected", self.width(e)));
            }
        }
        self.acts.push((map.mlp.act, map.mlp.act_at));
        Ok(())
    }
}
