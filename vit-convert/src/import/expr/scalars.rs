//! Numbers: factors, summands and powers, which the constructors move outward.

use super::op::{Func, Id, Number, Op};
use super::table::Exprs;

/// A relative difference that rounding to f32 a few times can make.
const ROUNDING: f64 = 2e-7;

impl Exprs {
    /// `s · e` → `(e, s)`.
    pub fn scaled(&self, id: Id) -> (Id, f64) {
        match *self.op(id) {
            Op::Scale(s) => (self.arg(id, 0), s.0),
            _ => (id, 1.0),
        }
    }

    /// `s · e`.
    pub fn scale(&mut self, e: Id, s: f64) -> Id {
        let (e, t) = self.scaled(e);
        let s = s * t;
        if (s - 1.0).abs() <= ROUNDING { e } else { self.same_shape(Op::Scale(Number(s)), e) }
    }

    /// `e + c`.
    pub fn add_s(&mut self, e: Id, c: f64) -> Id {
        if c == 0.0 {
            return e;
        }
        let (x, s) = self.scaled(e);
        let (x, c) = match *self.op(x) {
            Op::AddS(d) => (self.arg(x, 0), d.0 + c / s),
            _ => (x, c / s),
        };
        let sum = if c == 0.0 { x } else { self.same_shape(Op::AddS(Number(c)), x) };
        self.scale(sum, s)
    }

    /// `e ^ p`.
    pub fn pow(&mut self, e: Id, p: f64) -> Id {
        if p == 1.0 {
            return e;
        }
        let (x, s) = self.scaled(e);
        if let Op::AddS(one) = *self.op(x)
            && p == -1.0
            && s == 1.0
            && self.near(one.0, 1.0)
            && let f = self.arg(x, 0)
            && *self.op(f) == Op::Func(Func::Exp)
            && let (u, m) = self.scaled(self.arg(f, 0))
            && m < 0.0
        {
            let u = self.scale(u, -m); // 1 / (1 + exp(-u))
            return self.func(Func::Sigmoid, u);
        }
        let (x, q) = match *self.op(x) {
            Op::Pow(q) => (self.arg(x, 0), q.0 * p),
            _ => (x, p),
        };
        let factor = s.powf(p);
        let power = if q == 1.0 { x } else { self.same_shape(Op::Pow(Number(q)), x) };
        self.scale(power, factor)
    }

    pub(super) fn power(&self, id: Id) -> (Id, f64) {
        match *self.op(id) {
            Op::Pow(p) => (self.arg(id, 0), p.0),
            _ => (id, 1.0),
        }
    }
}
