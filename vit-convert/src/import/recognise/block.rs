//! Residual branches: a norm, attention or an MLP, a LayerScale, and the sum with what the branch read.

use super::attention::Attention;
use super::finder::Finder;
use super::mlp::Mlp;
use crate::import::expr::{Constant, Id, Op};

pub enum Branch {
    Attention(Attention),
    Mlp(Mlp),
}

/// One residual branch: half a block.
pub struct Residual {
    pub branch: Branch,
    /// LayerScale.
    pub gamma: Option<Constant>,
    pub norm: Id,
    /// The branch as a whole, LayerScale included.
    pub whole: Id,
}

impl Finder<'_> {
    /// `γ · f(norm(below))`.
    fn residual(&self, e: Id, below: Id) -> Option<Residual> {
        let whole = e;
        let (mut e, mut gamma) = (e, None);
        if let Op::MulC(c) = self.op(e)
            && c.dim(0) == 1
            && c.dim(1) == 1
        {
            gamma = Some(c.clone());
            e = self.arg(e);
        }
        let over = |norm: Id| self.is_norm(norm) && self.arg(norm) == below;
        if let Some(mlp) = self.mlp(e)
            && over(mlp.source)
        {
            return Some(Residual { norm: mlp.source, branch: Branch::Mlp(mlp), gamma, whole });
        }
        let attn = self.attention(e)?;
        let own = attn.sel.is_none() && attn.queries == attn.source && over(attn.source);
        own.then_some(Residual { norm: attn.source, branch: Branch::Attention(attn), gamma, whole })
    }

    /// The residual branches down from `e`, first to last, and the expression below them.
    pub fn residuals(&self, e: Id) -> (Vec<Residual>, Id) {
        let (mut at, mut out) = (e, Vec::new());
        while *self.op(at) == Op::Add {
            let &[a, b] = self.args(at) else { break };
            let found = [(b, a), (a, b)].into_iter().find_map(|(e, below)| Some((self.residual(e, below)?, below)));
            let Some((residual, below)) = found else { break };
            out.push(residual);
            at = below;
        }
        out.reverse();
        (out, at)
    }
}
