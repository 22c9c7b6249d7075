//! The MLP of a block: two linears around an activation, plain or gated.

use vit_model::config::{Activation, MlpKind};

use super::finder::{Finder, Fit, refuse};
use crate::import::expr::{Id, Op};

pub struct Mlp {
    pub fc2: Id,
    /// `fc1`, or gate and value.
    pub fc1: Vec<Id>,
    pub act: Activation,
    pub act_at: Id,
    /// What `fc1` reads.
    pub source: Id,
}

impl Finder<'_> {
    /// `fc2(act(fc1(x)))`, or `fc2(act(gate(x)) · value(x))`.
    pub fn mlp(&self, e: Id) -> Option<Mlp> {
        if !self.is_linear(e) {
            return None;
        }
        let h = self.arg(e);
        match self.op(h) {
            Op::Act(act) if self.is_linear(self.arg(h)) => {
                let fc1 = self.arg(h);
                Some(Mlp { fc2: e, fc1: vec![fc1], act: *act, act_at: h, source: self.arg(fc1) })
            }
            Op::Mul => {
                let &[a, b] = self.args(h) else { return None };
                [(a, b), (b, a)].into_iter().find_map(|(gate, value)| {
                    let Op::Act(act) = self.op(gate) else { return None };
                    let linear = self.arg(gate);
                    let fits = self.is_linear(linear) && self.is_linear(value) && self.arg(linear) == self.arg(value);
                    let source = fits.then(|| self.arg(value))?;
                    Some(Mlp { fc2: e, fc1: vec![linear, value], act: *act, act_at: gate, source })
                })
            }
            _ => None,
        }
    }

    /// Takes an MLP's tensors; its kind, and the rows of `fc1`.
    pub fn mlp_tensors(&mut self, mlp: &Mlp, block: &str) -> Fit<(MlpKind, usize)> {
        self.linear(mlp.fc2, &format!("{block}.mlp.fc2"))?;
        match mlp.fc1[..] {
            [fc1] => {
                self.linear(fc1, &format!("{block}.mlp.fc1"))?;
                Ok((MlpKind::Mlp, self.width(fc1)))
            }
            [gate, value] => {
                // timm has both spellings; adjacent weights in the file show that the model was packed
                let together = match (self.op(gate), self.op(value)) {
                    (Op::Linear { weight: g, .. }, Op::Linear { weight: v, .. }) => g.is_followed_by(v),
                    _ => false,
                };
                if together {
                    self.pack(&[gate, value], &format!("{block}.mlp.fc1"))?;
                    return Ok((MlpKind::SwigluPacked, self.width(gate) + self.width(value)));
                }
                self.linear(gate, &format!("{block}.mlp.fc1_g"))?;
                self.linear(value, &format!("{block}.mlp.fc1_x"))?;
                Ok((MlpKind::Swiglu, self.width(gate)))
            }
            _ => refuse(mlp.fc2, "an MLP of odd shape"),
        }
    }
}
