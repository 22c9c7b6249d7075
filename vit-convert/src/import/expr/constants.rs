//! Constants: a bias or gain is merged into the linear, patch embedding or norm that it belongs to.

use std::sync::Arc;

use super::op::{Constant, Id, Op};
use super::table::Exprs;
use crate::import::array::Array;
use crate::import::axes::Pick;

impl Exprs {
    /// The constant depends on the last axis alone.
    fn per_channel(&self, e: Id, c: &Array) -> bool {
        self.shape(e).len() == 3 && c.rank() == 3 && c.dim(0) == 1 && c.dim(1) == 1
    }

    /// A linear without a bias.
    pub fn bare(&self, e: Id) -> bool {
        matches!(self.op(e), Op::Linear { bias: None, .. })
    }

    /// A constant per channel as a vector over all channels.
    fn channels(&self, e: Id, c: &Array) -> Option<Constant> {
        let n = *self.shape(e).last()?;
        Some(Arc::new(c.reshape(&[c.len()])?.expand(&[n])?))
    }

    /// A constant per channel that repeats in every group → one period.
    fn period(&self, e: Id, c: &Array, group: usize) -> Option<Constant> {
        let n = *self.shape(e).last()?;
        let rows = self.channels(e, c)?.reshape(&[n / group, group])?;
        Some(Arc::new(rows.collapse(0)?.reshape(&[group])?))
    }

    /// `e + c`, the constant over the base axes of `e`.
    pub fn add_c(&mut self, e: Id, c: &Array) -> Result<Id, String> {
        if matches!(self.op(e), Op::Scores { .. } | Op::Scale(_)) && c.uniform() == Some(0.0) {
            return Ok(e); // a mask of zeros
        }
        if let Some(c) = c.one()
            && !(self.shape(e).last() == Some(&1) && self.bare(e))
        {
            return Ok(self.add_s(e, c));
        }
        let per_channel = self.per_channel(e, c);
        match self.get(e).op.clone() {
            Op::Linear { weight, bias: None } if per_channel => {
                let bias = self.channels(e, c).ok_or("the bias does not fit the linear")?;
                let (args, shape) = (self.get(e).args.clone(), self.shape(e).to_vec());
                return Ok(self.make(Op::Linear { weight, bias: Some(bias) }, args, shape));
            }
            Op::Patch { weight, bias: None, grid, channels, pixels } if per_channel => {
                let bias = self.channels(e, c).ok_or("the bias does not fit the patch embedding")?;
                let (args, shape) = (self.get(e).args.clone(), self.shape(e).to_vec());
                return Ok(self.make(Op::Patch { weight, bias: Some(bias), grid, channels, pixels }, args, shape));
            }
            Op::Norm { eps, gain, bias: None, group } if per_channel => {
                if let Some(bias) = self.period(e, c, group) {
                    let (args, shape) = (self.get(e).args.clone(), self.shape(e).to_vec());
                    return Ok(self.make(Op::Norm { eps, gain, bias: Some(bias), group }, args, shape));
                }
            }
            Op::Add if per_channel => {
                // the exporter added the skip before the bias: the bias belongs to the bare linear
                let args = self.get(e).args.clone();
                let bare = |id: Id| matches!(self.op(id), Op::Linear { bias: None, .. });
                if let [a, b] = args[..]
                    && bare(a) != bare(b)
                {
                    let (linear, other) = if bare(a) { (a, b) } else { (b, a) };
                    let linear = self.add_c(linear, c)?;
                    return Ok(self.add(linear, other));
                }
            }
            Op::Cat => {
                let mut parts = Vec::new();
                let mut at = 0;
                for p in self.get(e).args.clone() {
                    let n = self.shape(p)[1];
                    let part = if c.dim(1) == 1 {
                        c.clone()
                    } else {
                        c.pick(1, &Pick::range(at, n)).ok_or("tokens of a constant")?
                    };
                    parts.push(self.add_c(p, &part)?);
                    at += n;
                }
                return self.cat(parts);
            }
            _ => {}
        }
        let shape = self.shape(e).iter().zip(c.shape()).map(|(&x, y)| x.max(y)).collect();
        Ok(self.make(Op::AddC(Arc::new(c.clone())), vec![e], shape))
    }

    /// `e · c`, the constant over the base axes of `e`.
    pub fn mul_c(&mut self, e: Id, c: &Array) -> Id {
        if let Some(c) = c.one() {
            return self.scale(e, c);
        }
        let (x, s) = self.scaled(e);
        if self.per_channel(x, c)
            && let Op::Norm { eps, gain: None, bias: None, group } = self.get(x).op.clone()
            && s == 1.0
            && let Some(gain) = self.period(x, c, group)
        {
            let (args, shape) = (self.get(x).args.clone(), self.shape(x).to_vec());
            return self.make(Op::Norm { eps, gain: Some(gain), bias: None, group }, args, shape);
        }
        let shape = self.shape(x).iter().zip(c.shape()).map(|(&x, y)| x.max(y)).collect();
        let product = self.make(Op::MulC(Arc::new(c.clone())), vec![x], shape);
        self.scale(product, s)
    }
}
