//! What has been found so far: tensors under timm's names, the module of each expression, and facts about the model.

use std::collections::{BTreeMap, HashMap};

use vit_model::config::{Activation, Config};

use crate::import::array::Array;
use crate::import::expr::{Constant, Exprs, Id, Op};
use crate::onnx::graph::DType;

/// Why an expression is not part of a ViT, and which expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The expression that does not fit.
    pub at: Option<Id>,
    /// Why.
    pub why: String,
}

/// A part, or why it does not fit.
pub type Fit<T = ()> = Result<T, Refusal>;

/// Refuses an expression.
pub fn refuse<T>(at: Id, why: impl Into<String>) -> Fit<T> {
    Err(Refusal { at: Some(at), why: why.into() })
}

/// Collects the parts of one model.
pub struct Finder<'a> {
    pub x: &'a Exprs,
    /// Tensors by their full names.
    pub tensors: BTreeMap<String, Array>,
    /// Expression → the module that it belongs to.
    pub owners: HashMap<Id, String>,
    /// What was read from where: what, and the expression.
    pub evidence: Vec<(String, Id)>,
    /// Why a tensor differs from what is stored.
    pub rounded: Vec<String>,
    /// The bits of every epsilon, and the norm that it was read from.
    pub eps: BTreeMap<u64, Id>,
    /// The activation of every MLP, and where it is.
    pub acts: Vec<(Activation, Id)>,
    /// The file holds numbers of 16 bits.
    pub half: bool,
}

impl<'a> Finder<'a> {
    /// Nothing yet.
    pub fn new(x: &'a Exprs, half: bool) -> Self {
        Self {
            x,
            tensors: BTreeMap::new(),
            owners: HashMap::new(),
            evidence: Vec::new(),
            rounded: Vec::new(),
            eps: BTreeMap::new(),
            acts: Vec::new(),
            half,
        }
    }

    pub fn op(&self, e: Id) -> &'a Op {
        self.x.op(e)
    }

    /// The first argument.
    pub fn arg(&self, e: Id) -> Id {
        self.x.arg(e, 0)
    }

    pub fn args(&self, e: Id) -> &'a [Id] {
        &self.x.get(e).args
    }

    pub fn tokens(&self, e: Id) -> usize {
        self.x.shape(e)[1]
    }

    pub fn width(&self, e: Id) -> usize {
        self.x.shape(e)[2]
    }

    pub fn is_linear(&self, e: Id) -> bool {
        matches!(self.op(e), Op::Linear { .. })
    }

    pub fn is_norm(&self, e: Id) -> bool {
        matches!(self.op(e), Op::Norm { .. })
    }

    pub fn has_bias(&self, e: Id) -> bool {
        matches!(self.op(e), Op::Linear { bias: Some(_), .. })
    }

    /// Notes that an expression is a part of a module.
    pub fn own(&mut self, e: Id, module: impl Into<String>) {
        self.owners.insert(e, module.into());
    }

    /// Takes a tensor of a module.
    pub fn put(&mut self, e: Id, module: &str, name: &str, array: Array) -> Fit {
        self.own(e, module);
        let full = format!("{module}{}{name}", if name.is_empty() || module.is_empty() { "" } else { "." });
        if !array.stored_dtype().is_float() {
            return refuse(e, format!("`{full}` is of type {:?}, floats are expected", array.stored_dtype()));
        }
        self.tensors.insert(full, array);
        Ok(())
    }

    /// Takes a linear.
    pub fn linear(&mut self, e: Id, module: &str) -> Fit {
        let Op::Linear { weight, bias } = self.op(e) else { return refuse(e, "a linear is expected") };
        self.put(e, module, "weight", (**weight).clone())?;
        if let Some(bias) = bias {
            self.put(e, module, "bias", (**bias).clone())?;
        }
        Ok(())
    }

    /// Gives every layer whose bias the graph leaves out, and timm's model of this configuration does not, a bias of zeros.
    /// timm has one switch for the biases of all blocks' projections and MLPs, and one for those of q, k and v.
    pub fn fill_biases(&mut self, config: &Config) -> vit_model::Result<()> {
        for (name, shape) in vit_model::layers::parameters(config)? {
            if name.rsplit('.').next() == Some("bias") && !self.tensors.contains_key(&name) {
                let zeros = Array::floats(DType::F32, &shape, &vec![0.0; shape.iter().product()]);
                self.tensors.insert(name, zeros);
            }
        }
        Ok(())
    }

    /// Takes a LayerNorm over all channels, or over the channels of each head.
    pub fn norm(&mut self, e: Id, module: &str, per_head: bool) -> Fit {
        let Op::Norm { eps, gain, bias, group } = self.op(e) else { return refuse(e, "a norm is expected") };
        let group = *group;
        if group != self.width(e) && !per_head {
            let why = format!("a norm over {group} of {} channels where one over all is expected", self.width(e));
            return refuse(e, why);
        }
        let eps = tidy(eps.0, self.half);
        if !(eps > 0.0 && eps < 1.0) {
            return refuse(e, format!("an epsilon of {eps:e}"));
        }
        if self.eps.insert(eps.to_bits(), e).is_none() {
            self.evidence.push((format!("ln_eps = {eps:e}"), e));
        }
        let constant = |c: &Option<Constant>, value: f64| match c {
            Some(c) => (**c).clone(),
            None => Array::floats(DType::F32, &[group], &vec![value; group]),
        };
        self.put(e, module, "weight", constant(gain, 1.0))?;
        self.put(e, module, "bias", constant(bias, 0.0))
    }

    /// Takes several linears as one, their rows one below the other; says whether one has a bias. A linear without a
    /// bias beside one with a bias gets zeros.
    pub fn pack(&mut self, list: &[Id], module: &str) -> Fit<bool> {
        let (mut weights, mut biases, mut any) = (Vec::new(), Vec::new(), false);
        for &e in list {
            let Op::Linear { weight, bias } = self.op(e) else { return refuse(e, "a linear is expected") };
            any |= bias.is_some();
            weights.push((**weight).clone());
            biases.push(bias.as_deref().cloned());
        }
        let first = list[0];
        let join = |parts: &[Array]| Array::concat(parts, 0).map_err(|why| Refusal { at: Some(first), why });
        let weight = join(&weights)?;
        self.put(first, module, "weight", weight)?;
        if any {
            let zeros = |n: usize| Array::floats(DType::F32, &[1], &[0.0]).reshape(&[]).and_then(|z| z.expand(&[n]));
            let parts: Option<Vec<Array>> =
                biases.into_iter().zip(&weights).map(|(b, w)| b.or_else(|| zeros(w.dim(0)))).collect();
            let bias = join(&parts.ok_or(Refusal { at: Some(first), why: "a bias".into() })?)?;
            self.put(first, module, "bias", bias)?;
        }
        for &e in list {
            self.own(e, module);
        }
        Ok(any)
    }
}

/// An epsilon as a person wrote it: the shortest decimal that rounding to f32 (or to 16 bits) explains.
fn tidy(eps: f64, half: bool) -> f64 {
    let tolerance = if half { 2e-2 } else { 1e-6 };
    for digits in 0..4 {
        let Ok(short) = format!("{eps:.digits$e}").parse::<f64>() else { return eps };
        if (short - eps).abs() <= tolerance * eps {
            return short;
        }
    }
    eps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epsilon_is_the_shortest_decimal_that_rounding_explains() {
        for (eps, half, want) in [
            (f64::from(1e-6f32), false, 1e-6),
            (f64::from(1e-12f32), false, 1e-12),
            (f64::from(1.25e-5f32), false, 1.25e-5),
            (1.0014e-5, false, 1.0014e-5),
            (f64::from(half::f16::from_f64(1e-5).to_f32()), true, 1e-5),
        ] {
            assert_eq!(tidy(eps, half), want, "{eps:e}");
        }
    }
}
