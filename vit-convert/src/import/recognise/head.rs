//! The top of a model: output activations, the head (or DeiT's two), and the `pre_logits` layer below it.

use super::finder::{Finder, Fit, Refusal, refuse};
use crate::import::array::Array;
use crate::import::axes::{self, BROADCAST, Dim, Pick};
use crate::import::eval::View;
use crate::import::expr::{Func, Head, Id, Op};

/// Output activations on top of each other; no exporter writes more than two.
const ACTIVATIONS: usize = 4;

/// The linears between the pooled tokens and the logits.
#[derive(Debug)]
pub struct Classifier {
    pub head: Option<Id>,
    /// DeiT's second head, over the distillation token.
    pub dist: Option<Id>,
    /// A number that the scores are multiplied by, such as a temperature.
    pub factor: f64,
    /// The linear under a tanh.
    pub pre_logits: Option<Id>,
    /// What they read.
    pub below: Id,
    /// `(first, count)`: the tokens of `below` that they read, if that is a part of them.
    pub sel: Option<(usize, usize)>,
}

impl Finder<'_> {
    /// The activations on top of an output, from below, and the logits (or tokens) under them.
    pub fn activations(&mut self, view: &View) -> Fit<(Vec<Head>, Id)> {
        let mut e = view.e;
        let mut found = Vec::new();
        loop {
            match self.op(e) {
                Op::Out(head) => found.push(*head),
                Op::Func(Func::Sigmoid) if self.is_linear(self.x.scaled(self.arg(e)).0) => found.push(Head::Sigmoid),
                Op::Scale(s) if *self.op(self.arg(e)) == Op::Out(Head::Unit) => {
                    let why = format!("the output is a vector of unit length (L2-normalised) times {}", s.0);
                    return refuse(e, format!("{why}: export the model without that factor"));
                }
                _ => break,
            }
            self.own(e, "output");
            e = self.arg(e);
            if found.len() > ACTIVATIONS {
                return refuse(e, "a pile of output activations");
            }
        }
        found.reverse();
        self.check_layout(view, e, &found)?;
        if found.contains(&Head::Unit) && view.sel.map_or(self.tokens(e), |sel| sel.1) != 1 {
            return refuse(
                e,
                "every token is scaled to unit length (L2-normalised), which is supported for one vector per image",
            );
        }
        if self.x.shape(e).len() != 3 {
            return refuse(e, format!("the output is no tokens: {}", self.x.show(e, 2)));
        }
        Ok((found, e))
    }

    /// The output must be laid out as (batch, tokens, classes); axes of size 1 may be missing.
    fn check_layout(&self, view: &View, e: Id, activations: &[Head]) -> Fit {
        let shape = self.x.shape(e);
        if shape.len() != 3 {
            return Ok(());
        }
        let tokens = view.sel.map_or(shape[1], |s| s.1);
        let full = [axes::axis(0, shape[0]), axes::axis(1, tokens), axes::axis(2, shape[2])];
        let index = activations.iter().any(|h| matches!(h, Head::ArgMax | Head::TopK));
        let want: Vec<Dim> = full.into_iter().take(if index { 2 } else { 3 }).filter(|d| !d.is_empty()).collect();
        let have: Vec<Dim> = view.dims.iter().filter(|d| d.iter().any(|g| g.axis != BROADCAST)).cloned().collect();
        if have == want {
            Ok(())
        } else {
            refuse(view.e, "the output is laid out otherwise than (batch, tokens, classes)")
        }
    }

    /// The heads over `e`, of which the tokens `sel` are read.
    pub fn classifier(&mut self, e: Id, sel: Option<(usize, usize)>) -> Fit<Classifier> {
        let (mut e, mut sel, mut head, mut dist, mut pre_logits) = (e, sel, None, None, None);
        if let Some([class, distilled]) = self.two_heads(e)? {
            (e, dist, sel) = (class, Some(distilled), Some((0, 1)));
        }
        let mut factor = 1.0;
        if let (linear, scale) = self.x.scaled(e)
            && scale != 1.0
            && self.is_linear(linear)
            && self.attention(linear).is_none()
            && self.mlp(linear).is_none()
        {
            self.own(e, "head");
            (e, factor) = (linear, scale);
        }
        // the last linear of a block is no head
        if self.is_linear(e) && self.attention(e).is_none() && self.mlp(e).is_none() {
            head = Some(e);
            e = self.arg(e);
        }
        if *self.op(e) == Op::Func(Func::Tanh) && self.is_linear(self.arg(e)) {
            self.own(e, "pre_logits");
            pre_logits = Some(self.arg(e));
            e = self.arg(self.arg(e));
        }
        Ok(Classifier { head, dist, factor, pre_logits, below: e, sel })
    }

    /// DeiT's answer, the mean of a head over the class token and one over the distillation token: both, in this order.
    fn two_heads(&mut self, e: Id) -> Fit<Option<[Id; 2]>> {
        let (core, half) = self.x.scaled(e);
        if half == 0.5
            && *self.op(core) == Op::Add
            && let &[a, b] = self.args(core)
            && let (&Op::Sel { start: i }, &Op::Sel { start: j }) = (self.op(a), self.op(b))
            && let (x, y) = (self.arg(a), self.arg(b))
            && self.is_linear(x)
            && self.is_linear(y)
            && self.arg(x) == self.arg(y)
        {
            let one = self.tokens(a) == 1 && self.tokens(b) == 1;
            self.own(core, "head");
            return match (i, j) {
                (0, 1) if one => Ok(Some([x, y])),
                (1, 0) if one => Ok(Some([y, x])),
                _ => refuse(core, "two heads over other tokens than the class and distillation tokens"),
            };
        }
        Ok(None)
    }

    /// Takes the heads' tensors. With `turned`, the graph joins the two halves of their input in the opposite order to timm.
    pub fn classifier_tensors(&mut self, found: &Classifier, turned: bool) -> Fit {
        if let Some(e) = found.pre_logits {
            self.linear(e, "pre_logits.fc")?;
        }
        if let Some(e) = found.head {
            self.linear(e, "head")?;
            self.scale_head(e, found.factor)?;
        }
        if turned {
            let first = found.pre_logits.or(found.head).unwrap_or(found.below);
            let name = if found.pre_logits.is_some() { "pre_logits.fc.weight" } else { "head.weight" };
            self.turn_halves(first, name)?;
        }
        if let Some(e) = found.dist {
            self.linear(e, "head_dist")?;
            if found.head.is_some_and(|h| self.width(h) != self.width(e)) {
                return refuse(e, "two heads of different sizes");
            }
        }
        Ok(())
    }

    /// Exchanges the two halves of a weight's columns.
    fn turn_halves(&mut self, e: Id, name: &str) -> Fit {
        let failed = |why: String| Refusal { at: Some(e), why };
        let weight = self.tensors.get(name).filter(|_| !self.is_norm(e));
        let weight =
            weight.ok_or_else(|| failed("the mean of the tokens before the class token, without a head".into()))?;
        let half = weight.dim(1) / 2;
        let part = |at: usize| weight.pick(1, &Pick::range(at, half)).ok_or_else(|| failed("the head".into()));
        let turned = Array::concat(&[part(half)?, part(0)?], 1).map_err(failed)?;
        self.tensors.insert(name.into(), turned);
        Ok(())
    }

    /// Multiplies the head by a number that the graph multiplies the scores by.
    fn scale_head(&mut self, e: Id, factor: f64) -> Fit {
        if factor == 1.0 {
            return Ok(());
        }
        for name in ["head.weight", "head.bias"] {
            let Some(tensor) = self.tensors.get(name) else { continue };
            let scaled = tensor.times(&Array::scalar(factor)).map_err(|why| Refusal { at: Some(e), why })?;
            self.tensors.insert(name.into(), scaled);
        }
        self.rounded.push(format!("`head`: takes in the factor {factor} of the scores"));
        Ok(())
    }
}
