//! The trunk: all blocks, which must agree in everything but their weights.

use vit_model::config::MlpKind;

use super::block::{Branch, Residual};
use super::finder::{Finder, Fit, Refusal, refuse};
use crate::import::expr::Id;

/// What every block must share.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    pub heads: usize,
    pub hidden: usize,
    pub mlp: MlpKind,
    pub qk_norm: bool,
    pub layer_scale: bool,
}

/// Which biases a block has, or any block has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Biases {
    /// Of q, k or v.
    pub qkv: bool,
    /// Of the projection or the MLP.
    pub proj: bool,
}

/// The blocks of a model.
#[derive(Debug)]
pub struct Trunk {
    pub depth: usize,
    pub facts: Facts,
    pub biases: Biases,
    /// The tokens that enter the first block.
    pub below: Id,
}

impl Finder<'_> {
    /// Takes the blocks down from `e`.
    pub fn trunk(&mut self, e: Id) -> Fit<Trunk> {
        let (residuals, below) = self.residuals(e);
        if residuals.is_empty() {
            return refuse(e, format!("this is not a pre-norm transformer block: {}", self.x.show(e, 3)));
        }
        let mut facts: Option<Facts> = None;
        let mut biases = Biases::default();
        for (k, pair) in residuals.chunks(2).enumerate() {
            let [first, second] = pair else {
                return refuse(pair[0].whole, format!("block {k} has one residual branch, two are expected"));
            };
            let (own, block) = self.block(k, first, second)?;
            biases = Biases { qkv: biases.qkv || block.qkv, proj: biases.proj || block.proj };
            match &facts {
                None => facts = Some(own),
                Some(facts) if *facts == own => {}
                Some(facts) => return refuse(first.whole, format!("the blocks differ: {facts:?} and {own:?}")),
            }
        }
        let facts = facts.ok_or(Refusal { at: None, why: "no blocks".into() })?;
        Ok(Trunk { depth: residuals.len() / 2, facts, biases, below })
    }

    /// Takes one block: attention, then an MLP.
    fn block(&mut self, k: usize, first: &Residual, second: &Residual) -> Fit<(Facts, Biases)> {
        let (Branch::Attention(attn), Branch::Mlp(mlp)) = (&first.branch, &second.branch) else {
            return refuse(first.whole, format!("block {k} is not attention and then an MLP"));
        };
        let p = format!("blocks.{k}");
        self.norm(first.norm, &format!("{p}.norm1"), false)?;
        let factor = self.scale(attn)?;
        let qkv = self.packed_qkv(attn, &format!("{p}.attn.qkv"), factor)?;
        self.linear(attn.proj, &format!("{p}.attn.proj"))?;
        self.own(attn.core, format!("{p}.attn"));
        let qk_norm = self.qk_norms(attn, &format!("{p}.attn"))?;
        for (residual, name) in [(first, "ls1"), (second, "ls2")] {
            self.layer_scale(residual, &format!("{p}.{name}"))?;
        }
        self.norm(second.norm, &format!("{p}.norm2"), false)?;
        let (kind, hidden) = self.mlp_tensors(mlp, &p)?;
        self.acts.push((mlp.act, mlp.act_at));
        if first.gamma.is_some() != second.gamma.is_some() {
            return refuse(second.whole, format!("only one branch of block {k} has a LayerScale"));
        }
        let width = self.width(first.whole);
        if attn.qkv.iter().any(|&e| self.width(e) != width) {
            let total = self.width(attn.qkv[0]);
            return refuse(attn.core, format!("heads of a total width of {total} in tokens of {width}"));
        }
        if k == 0 {
            self.evidence.push((format!("num_heads = {}", attn.heads), attn.core));
            self.evidence.push((format!("act = {:?}", mlp.act), mlp.act_at));
        }
        let mut after = mlp.fc1.iter().chain([&mlp.fc2, &attn.proj]);
        let biases = Biases { qkv, proj: after.any(|&e| self.has_bias(e)) };
        let layer_scale = first.gamma.is_some();
        Ok((Facts { heads: attn.heads, hidden, mlp: kind, qk_norm, layer_scale }, biases))
    }

    fn layer_scale(&mut self, residual: &Residual, module: &str) -> Fit {
        let Some(gamma) = &residual.gamma else { return Ok(()) };
        let n = self.width(residual.whole);
        let flat = gamma.reshape(&[gamma.len()]).and_then(|g| g.expand(&[n]));
        let flat = flat.ok_or(Refusal { at: Some(residual.whole), why: "a LayerScale".into() })?;
        self.put(residual.whole, module, "gamma", flat)
    }
}
