//! Sums and products of two expressions, which recognise norms, softmax and activations.

use vit_model::config::Activation;

use super::op::{Constant, Func, Head, Id, Op};
use super::table::Exprs;

impl Exprs {
    /// `a + b`.
    pub fn add(&mut self, a: Id, b: Id) -> Id {
        let ((x, s), (y, t)) = (self.scaled(a), self.scaled(b));
        if s == t && s != 1.0 {
            let sum = self.add(x, y);
            return self.scale(sum, s);
        }
        if s == -t {
            for (x, y, s) in [(x, y, s), (y, x, t)] {
                if let Some(c) = self.centred(x, y) {
                    return self.scale(c, s);
                }
            }
        }
        // x·(r·γ) + (β - mean(x)·(r·γ)) is TensorFlow's batch_normalization
        for (x, y) in [(a, b), (b, a)] {
            if let Op::AddC(beta) = self.get(y).op.clone()
                && self.folded_mean(self.arg(y, 0)).is_some()
            {
                let inner = self.arg(y, 0);
                if let Some(sum) = self.batch_norm(x, inner)
                    && let Ok(done) = self.add_c(sum, &beta)
                {
                    return done;
                }
            }
            if let Some(sum) = self.batch_norm(x, y) {
                return sum;
            }
        }
        self.pair(Op::Add, a, b)
    }

    /// `a · b`.
    pub fn mul(&mut self, a: Id, b: Id) -> Id {
        let ((a, s), (b, t)) = (self.scaled(a), self.scaled(b));
        let factor = s * t;
        let (pa, pb) = (self.power(a), self.power(b));
        if pa.0 == pb.0 {
            let power = self.pow(pa.0, pa.1 + pb.1);
            return self.scale(power, factor);
        }
        for (x, (y, p)) in [(a, pb), (b, pa)] {
            if let Some((e, f)) = self.normalised(x, y, p) {
                return self.scale(e, factor * f);
            }
        }
        for (x, y) in [(a, b), (b, a)] {
            // (r · γ) · x = (r · x) · γ
            if let Op::MulC(c) = self.get(y).op.clone()
                && matches!(self.op(self.arg(y, 0)), Op::Pow(_))
            {
                let r = self.arg(y, 0);
                let product = self.mul(x, r);
                let done = self.mul_c(product, &c);
                return self.scale(done, factor);
            }
        }
        for (x, y) in [(a, b), (b, a)] {
            if let Some((e, f)) = self.activation(x, y) {
                return self.scale(e, factor * f);
            }
        }
        let product = self.pair(Op::Mul, a, b);
        self.scale(product, factor)
    }

    /// `x · y^p` as a norm, a softmax or a vector of unit length: the expression and a factor, if it is one.
    fn normalised(&mut self, x: Id, y: Id, p: f64) -> Option<(Id, f64)> {
        if let (Op::Centred { group }, Op::AddS(eps)) = (self.op(x), self.op(y))
            && p == -0.5
        {
            let (group, eps) = (*group, *eps);
            let (variance, k) = self.scaled(self.arg(y, 0));
            let square = self.pow(x, 2.0);
            let is_variance = *self.op(variance) == (Op::Mean { axis: 2, group }) && self.arg(variance, 0) == square;
            if is_variance && k == 1.0 {
                let u = self.arg(x, 0);
                return Some((self.same_shape(Op::Norm { eps, gain: None, bias: None, group }, u), 1.0));
            }
        }
        if let &Op::Mean { axis: 2, group } = self.op(y)
            && p == -0.5
            && self.shape(x).last() == Some(&group)
            && self.power(self.arg(y, 0)) == (x, 2.0)
        {
            // x / √mean(x²) = √n · x / |x|
            return Some((self.same_shape(Op::Out(Head::Unit), x), (group as f64).sqrt()));
        }
        if let (Op::Func(Func::Exp), &Op::Mean { axis, group }) = (self.op(x), self.op(y))
            && p == -1.0
            && self.arg(y, 0) == x
            && self.shape(x)[usize::from(axis)] == group
        {
            let mut u = self.arg(x, 0);
            if let &[a, b] = &self.get(u).args[..]
                && *self.op(u) == Op::Add
            {
                // exp(u - max u) gives the same softmax as exp(u)
                let largest = |m: Id, of: Id| {
                    let (m, s) = self.scaled(m);
                    s == -1.0 && *self.op(m) == (Op::Max { axis }) && self.arg(m, 0) == of
                };
                if largest(b, a) {
                    u = a;
                } else if largest(a, b) {
                    u = b;
                }
            }
            let n = group as f64;
            let (core, _) = self.scaled(u);
            return match (self.op(core), axis) {
                (Op::Scores { .. }, 3) => Some((self.same_shape(Op::Softmax, u), n)),
                (_, 2) if self.shape(u).len() == 3 => Some((self.same_shape(Op::Out(Head::Softmax), u), n)),
                _ => None,
            };
        }
        None
    }

    /// `x - m`, where `m` is the mean of `x`, or both are means that make a variance.
    fn centred(&mut self, x: Id, m: Id) -> Option<Id> {
        match (self.op(x), self.op(m)) {
            (_, &Op::Mean { axis: 2, group }) if self.arg(m, 0) == x => Some(self.same_shape(Op::Centred { group }, x)),
            // mean(x²) - mean(x)² = mean((x - mean(x))²)
            (&Op::Mean { axis: 2, group }, Op::Pow(two)) if two.0 == 2.0 => {
                let mean = self.arg(m, 0);
                let u = *self.get(mean).args.first()?;
                if *self.op(mean) != (Op::Mean { axis: 2, group }) || self.power(self.arg(x, 0)) != (u, 2.0) {
                    return None;
                }
                let c = self.same_shape(Op::Centred { group }, u);
                let square = self.pow(c, 2.0);
                Some(self.mean(square, 2, group))
            }
            _ => None,
        }
    }

    /// `-(mean(x) · r) · γ` → `(mean, r, γ)`: a piece of `tf.nn.batch_normalization`.
    fn folded_mean(&self, id: Id) -> Option<(Id, Id, Constant)> {
        let (e, s) = self.scaled(id);
        let Op::MulC(gain) = self.op(e) else { return None };
        let product = self.arg(e, 0);
        if s != -1.0 || *self.op(product) != Op::Mul {
            return None;
        }
        let (a, b) = (self.arg(product, 0), self.arg(product, 1));
        let is_mean = |id| matches!(self.op(id), Op::Mean { axis: 2, .. });
        let (mean, r) = if is_mean(a) { (a, b) } else { (b, a) };
        is_mean(mean).then(|| (mean, r, gain.clone()))
    }

    fn batch_norm(&mut self, x: Id, y: Id) -> Option<Id> {
        let (mean, r, gain) = self.folded_mean(y)?;
        let Op::MulC(c) = self.op(x) else { return None };
        let product = self.arg(x, 0);
        if *c != gain || *self.op(product) != Op::Mul {
            return None;
        }
        let (p, q) = (self.arg(product, 0), self.arg(product, 1));
        let u = if q == r { p } else { q };
        let Op::Mean { axis: 2, group } = *self.op(mean) else { return None };
        if (p != r && q != r) || self.arg(mean, 0) != u {
            return None;
        }
        let centred = self.same_shape(Op::Centred { group }, u);
        let normed = self.mul(centred, r);
        Some(self.mul_c(normed, &gain))
    }

    /// `x · y` as an activation of `x`, if `y` is its gate: the expression and a factor.
    fn activation(&mut self, x: Id, y: Id) -> Option<(Id, f64)> {
        use std::f64::consts::{FRAC_1_SQRT_2, PI};
        if let Op::Func(Func::Sigmoid) = self.op(y) {
            let (u, s) = self.scaled(self.arg(y, 0));
            if u == x && self.near(s, 1.0) {
                return Some((self.act(Activation::Silu, x), 1.0));
            }
            if u == x && self.near(s, 1.702) {
                return Some((self.act(Activation::QuickGelu, x), 1.0));
            }
        }
        let Op::AddS(one) = *self.op(y) else { return None };
        let f = self.arg(y, 0);
        if !self.near(one.0, 1.0) {
            return None;
        }
        let Op::Func(kind) = *self.op(f) else { return None };
        let (u, s) = self.scaled(self.arg(f, 0));
        if kind == Func::Erf && u == x && self.near(s, FRAC_1_SQRT_2) {
            return Some((self.act(Activation::Gelu, x), 2.0));
        }
        if kind != Func::Tanh {
            return None;
        }
        let (a, cube) = ((2.0 / PI).sqrt(), 0.044715);
        let args = self.get(u).args.clone();
        let found = match (self.op(u), &args[..]) {
            // a·(x + 0.044715 x³), also as (a·0.044715)·(x³ + x/0.044715)
            (Op::Add, &[p, q]) => {
                let ((p, j), (q, k)) = (self.scaled(p), self.scaled(q));
                let ((p, j), (q, k)) = if p == x { ((p, j), (q, k)) } else { ((q, k), (p, j)) };
                p == x && self.power(q) == (x, 3.0) && self.near(s * j, a) && self.near(s * k, a * cube)
            }
            // a·x·(1 + 0.044715 x²)
            (Op::Mul, &[p, q]) => {
                let q = if p == x { q } else { p };
                let both = args.contains(&x);
                if let Op::AddS(c) = *self.op(q) {
                    both && self.near(s, a * cube)
                        && self.near(c.0, 1.0 / cube)
                        && self.power(self.arg(q, 0)) == (x, 2.0)
                } else {
                    false
                }
            }
            _ => false,
        };
        found.then(|| (self.act(Activation::GeluTanh, x), 2.0))
    }

    /// An activation.
    pub fn act(&mut self, act: Activation, x: Id) -> Id {
        self.same_shape(Op::Act(act), x)
    }

    /// A function.
    pub fn func(&mut self, f: Func, x: Id) -> Id {
        if f == Func::Log && *self.op(x) == Op::Out(Head::Softmax) {
            let x = self.arg(x, 0);
            return self.same_shape(Op::Out(Head::LogSoftmax), x);
        }
        self.same_shape(Op::Func(f), x)
    }

    /// The mean of each group along an axis.
    pub fn mean(&mut self, x: Id, axis: u8, group: usize) -> Id {
        if group == 1 {
            return x;
        }
        let (x, s) = self.scaled(x);
        let mean = self.same_shape(Op::Mean { axis, group }, x);
        self.scale(mean, s)
    }
}
