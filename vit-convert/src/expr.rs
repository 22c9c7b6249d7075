//! The algebra: interned canonical expressions. Every constructor normalises, so that every spelling of a LayerNorm, an
//! activation or an attention becomes the same expression.
//!
//! Expressions of the trunk have the base axes (batch, tokens, channels); the image (batch and three more) and attention
//! scores (batch, heads, queries, keys) have four. Ids are topological: an argument's id is smaller than its user's.
//!
//! What the rules rely on:
//! - scalars float outward: `s·x + c` is `s·(x + c/s)`, and a factor never stands inside another expression that could
//!   pass it on;
//! - `Sqrt`, `Reciprocal` and `Div` are powers; `x·x` is `x²`;
//! - a reduction keeps its base axes (the value is constant along what was reduced), views drop the digits;
//! - a selection of channels is pushed into the rows of the linear that makes them; one of tokens stays in the view;
//! - a bias or gain attaches to a bare linear, patch embedding or norm; adding a constant distributes into a `Cat`.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::Arc;

use vit_model::config::Activation;

use crate::array::Array;
use crate::axes::Pick;

/// Index of an expression.
pub type Id = u32;

/// A constant inside of an expression.
pub type Constant = Arc<Array>;

/// A number inside of an expression, compared by its bits.
#[derive(Clone, Copy, Debug)]
pub struct Number(pub f64);

impl PartialEq for Number {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl Eq for Number {}

impl Hash for Number {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}

/// Where the channels of the image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[batch, channels, height, width]`
    Nchw,
    /// `[batch, height, width, channels]`
    Nhwc,
}

impl Layout {
    /// The base axes of channels, height and width.
    pub fn axes(self) -> [u8; 3] {
        match self {
            Self::Nchw => [1, 2, 3],
            Self::Nhwc => [3, 1, 2],
        }
    }
}

/// Functions that are no activation by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Func {
    Erf,
    Tanh,
    Sigmoid,
    Exp,
    Log,
}

/// What stands on top of the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Head {
    Softmax,
    LogSoftmax,
    Sigmoid,
    ArgMax,
    TopK,
}

/// How tokens are pooled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum PoolKind {
    Mean,
    Max,
}

/// What an expression computes from its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// The image, axes as in the file.
    Input,
    /// The image as integers, before the cast.
    Raw,
    /// `Conv(scale·x + shift)` with stride = kernel, as tokens: weight `[out, in, h, w]`, bias `[out]`.
    Patch {
        /// `[out, in, h, w]`
        weight: Constant,
        /// `[out]`
        bias: Option<Constant>,
        /// Rows and columns of patches.
        grid: [usize; 2],
        /// Where the image's channels are.
        layout: Layout,
        /// What is done to a pixel before: `(scale, shift)` for each channel; empty for nothing.
        pixels: Vec<(Number, Number)>,
    },
    /// A parameter as tokens: `[1 or batch, tokens, channels]`.
    Param(Constant),
    /// Tokens one behind the other.
    Cat,
    /// `shape[1]` tokens from `start`.
    Sel {
        /// The first token.
        start: usize,
    },
    /// `x Wᵀ + b`: weight `[out, in]`, bias `[out]`.
    Linear {
        /// `[out, in]`
        weight: Constant,
        /// `[out]`
        bias: Option<Constant>,
    },
    /// A linear over quantised channels, which still wants the factor of its input.
    IntLinear {
        /// Integers `[out, in]`.
        codes: Constant,
        /// What stands for 0.
        zero: Option<Constant>,
    },
    /// A patch embedding over quantised pixels, which still wants the factor of its input.
    IntPatch {
        /// Integers `[out, in, h, w]`.
        codes: Constant,
        /// What stands for 0.
        zero: Option<Constant>,
    },
    /// LayerNorm over each group of channels.
    Norm {
        /// Added to the variance.
        eps: Number,
        /// `[group]`
        gain: Option<Constant>,
        /// `[group]`
        bias: Option<Constant>,
        /// Channels that are normed together.
        group: usize,
    },
    /// `q kᵀ` per head, unscaled.
    Scores {
        /// The number of heads.
        heads: usize,
    },
    /// Softmax over the last axis.
    Softmax,
    /// `softmax(scale · q kᵀ) v` per head.
    Attn {
        /// The number of heads.
        heads: usize,
        /// The factor of the scores.
        scale: Number,
    },
    /// The sum of two.
    Add,
    /// The product of two.
    Mul,
    /// Plus a number.
    AddS(Number),
    /// Times a number.
    Scale(Number),
    /// To a power.
    Pow(Number),
    /// Plus a constant over the base axes (size 1 where it does not depend).
    AddC(Constant),
    /// Times a constant over the base axes (size 1 where it does not depend).
    MulC(Constant),
    /// The mean of each group along an axis, in every position of the group.
    Mean {
        /// The base axis.
        axis: u8,
        /// Positions of a group.
        group: usize,
    },
    /// The largest along a whole axis, in every position.
    Max {
        /// The base axis.
        axis: u8,
    },
    /// `x - mean(x)` over each group of channels.
    Centred {
        /// Channels of a group.
        group: usize,
    },
    /// One token from many.
    Pool {
        /// How.
        kind: PoolKind,
        /// The first token.
        lo: usize,
        /// How many.
        n: usize,
    },
    /// An activation of the family.
    Act(Activation),
    /// A function.
    Func(Func),
    /// Where the argument is not a number.
    IsNan,
    /// On top of logits.
    Out(Head),
}

/// An expression.
#[derive(Clone, Debug)]
pub struct Expr {
    /// What it computes.
    pub op: Op,
    /// From what.
    pub args: Vec<Id>,
    /// Sizes of the base axes.
    pub shape: Vec<usize>,
    /// The node that was being evaluated when it was made first.
    pub born: u32,
}

/// All expressions of a graph.
pub struct Exprs {
    list: Vec<Expr>,
    table: HashMap<u64, Vec<Id>>,
    hasher: RandomState,
    /// The node being evaluated, for [`Expr::born`].
    pub node: u32,
    /// How far a constant such as 1.702 may be off, relatively.
    pub tolerance: f64,
}

/// A relative difference that rounding to f32 a few times can make.
const ROUNDING: f64 = 2e-7;

/// A selection of channels goes through this many expressions at most.
const TAKE_DEPTH: usize = 64;

/// Parts of a `Cat`; more than any prefix has.
const CAT_LIMIT: usize = 256;

impl Exprs {
    /// None yet.
    pub fn new(tolerance: f64) -> Self {
        Self { list: Vec::new(), table: HashMap::new(), hasher: RandomState::new(), node: 0, tolerance }
    }

    /// An expression by its id.
    pub fn get(&self, id: Id) -> &Expr {
        &self.list[id as usize]
    }

    /// What an expression computes.
    pub fn op(&self, id: Id) -> &Op {
        &self.get(id).op
    }

    /// An argument.
    pub fn arg(&self, id: Id, k: usize) -> Id {
        self.get(id).args[k]
    }

    /// Sizes of the base axes.
    pub fn shape(&self, id: Id) -> &[usize] {
        &self.get(id).shape
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// None yet.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The expression, made or found.
    pub fn make(&mut self, op: Op, args: Vec<Id>, shape: Vec<usize>) -> Id {
        let hash = self.hasher.hash_one((&op, &args, &shape));
        let bucket = self.table.entry(hash).or_default();
        for &id in bucket.iter() {
            let e = &self.list[id as usize];
            if e.args == args && e.shape == shape && e.op == op {
                return id;
            }
        }
        let id = self.list.len() as Id;
        bucket.push(id);
        self.list.push(Expr { op, args, shape, born: self.node });
        id
    }

    fn same_shape(&mut self, op: Op, x: Id) -> Id {
        let shape = self.shape(x).to_vec();
        self.make(op, vec![x], shape)
    }

    fn pair(&mut self, op: Op, a: Id, b: Id) -> Id {
        let (a, b) = (a.min(b), a.max(b));
        let shape = self.shape(a).iter().zip(self.shape(b)).map(|(x, y)| *x.max(y)).collect();
        self.make(op, vec![a, b], shape)
    }

    /// `|a - b|` is within the tolerance of `b`.
    pub fn near(&self, a: f64, b: f64) -> bool {
        (a - b).abs() <= self.tolerance * b.abs()
    }

    // ---------------------------------------------------------------------------------------------- scalars

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

    fn power(&self, id: Id) -> (Id, f64) {
        match *self.op(id) {
            Op::Pow(p) => (self.arg(id, 0), p.0),
            _ => (id, 1.0),
        }
    }

    // ---------------------------------------------------------------------------------------------- constants

    /// The constant depends on the last axis alone.
    fn per_channel(&self, e: Id, c: &Array) -> bool {
        self.shape(e).len() == 3 && c.rank() == 3 && c.dim(0) == 1 && c.dim(1) == 1
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
        if let Some(c) = c.one() {
            return Ok(self.add_s(e, c));
        }
        let per_channel = self.per_channel(e, c);
        match self.get(e).op.clone() {
            Op::Linear { weight, bias: None } if per_channel => {
                let bias = self.channels(e, c).ok_or("the bias does not fit the linear")?;
                let (args, shape) = (self.get(e).args.clone(), self.shape(e).to_vec());
                return Ok(self.make(Op::Linear { weight, bias: Some(bias) }, args, shape));
            }
            Op::Patch { weight, bias: None, grid, layout, pixels } if per_channel => {
                let bias = self.channels(e, c).ok_or("the bias does not fit the patch embedding")?;
                let (args, shape) = (self.get(e).args.clone(), self.shape(e).to_vec());
                return Ok(self.make(Op::Patch { weight, bias: Some(bias), grid, layout, pixels }, args, shape));
            }
            Op::Norm { eps, gain: Some(gain), bias: None, group } if per_channel => {
                if let Some(bias) = self.period(e, c, group) {
                    let (args, shape) = (self.get(e).args.clone(), self.shape(e).to_vec());
                    return Ok(self.make(Op::Norm { eps, gain: Some(gain), bias: Some(bias), group }, args, shape));
                }
            }
            Op::Add if per_channel => {
                // a bias that a later skip has absorbed goes back to its linear
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
    pub fn mul_c(&mut self, e: Id, c: &Array) -> Result<Id, String> {
        if let Some(c) = c.one() {
            return Ok(self.scale(e, c));
        }
        let (x, s) = self.scaled(e);
        if self.per_channel(x, c)
            && let Op::Norm { eps, gain: None, bias: None, group } = self.get(x).op.clone()
            && s == 1.0
            && let Some(gain) = self.period(x, c, group)
        {
            let (args, shape) = (self.get(x).args.clone(), self.shape(x).to_vec());
            return Ok(self.make(Op::Norm { eps, gain: Some(gain), bias: None, group }, args, shape));
        }
        let shape = self.shape(x).iter().zip(c.shape()).map(|(&x, y)| x.max(y)).collect();
        let product = self.make(Op::MulC(Arc::new(c.clone())), vec![x], shape);
        Ok(self.scale(product, s))
    }

    // ---------------------------------------------------------------------------------------------- sums and products

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
        // x·(r·γ) + (β - mean(x)·(r·γ)): factored only where it cancels
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
        self.mul_c(normed, &gain).ok()
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
                if let Ok(done) = self.mul_c(product, &c) {
                    return self.scale(done, factor);
                }
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

    /// `x · y^p`, where that is a norm or a softmax → the expression and a factor.
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
        if let (Op::Func(Func::Exp), &Op::Mean { axis, group }) = (self.op(x), self.op(y))
            && p == -1.0
            && self.arg(y, 0) == x
            && self.shape(x)[usize::from(axis)] == group
        {
            let mut u = self.arg(x, 0);
            if let &[a, b] = &self.get(u).args[..]
                && *self.op(u) == Op::Add
            {
                // exp(u - max u): softmax does not see what is taken from all
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

    /// `x · y`, where `y` is the gate of a known activation of `x` → the expression and a factor.
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

    // ---------------------------------------------------------------------------------------------- tokens and channels

    /// Tokens one behind the other.
    pub fn cat(&mut self, parts: Vec<Id>) -> Result<Id, String> {
        let mut flat = Vec::with_capacity(parts.len());
        for p in parts {
            if *self.op(p) == Op::Cat { flat.extend_from_slice(&self.get(p).args) } else { flat.push(p) }
        }
        if flat.len() > CAT_LIMIT {
            return Err(format!("over {CAT_LIMIT} pieces are joined"));
        }
        let &[first, ..] = &flat[..] else { return Err("nothing to join".into()) };
        if flat.len() == 1 {
            return Ok(first);
        }
        let mut shape = vec![0, 0, 0];
        for &p in &flat {
            let &[b, t, c] = self.shape(p) else { return Err("pieces of odd rank are joined".into()) };
            shape = vec![shape[0].max(b), shape[1] + t, shape[2].max(c)];
        }
        Ok(self.make(Op::Cat, flat, shape))
    }

    /// `n` tokens from `start`.
    pub fn select(&mut self, e: Id, start: usize, n: usize) -> Result<Id, String> {
        if start == 0 && n == self.shape(e)[1] {
            return Ok(e);
        }
        let mut shape = self.shape(e).to_vec();
        shape[1] = n;
        match self.get(e).op.clone() {
            Op::Scale(s) => {
                let x = self.arg(e, 0);
                let x = self.select(x, start, n)?;
                Ok(self.scale(x, s.0))
            }
            Op::Cat => {
                let mut parts = Vec::new();
                let mut at = 0;
                for p in self.get(e).args.clone() {
                    let len = self.shape(p)[1];
                    let (lo, hi) = (start.max(at), (start + n).min(at + len));
                    if lo < hi {
                        parts.push(self.select(p, lo - at, hi - lo)?);
                    }
                    at += len;
                }
                self.cat(parts)
            }
            Op::Param(v) => {
                let v = v.pick(1, &Pick::range(start, n)).ok_or("tokens of a parameter")?;
                Ok(self.make(Op::Param(Arc::new(v)), Vec::new(), shape))
            }
            _ => Ok(self.make(Op::Sel { start }, vec![e], shape)),
        }
    }

    /// `x Wᵀ + b`.
    pub fn linear(&mut self, x: Id, weight: Array, bias: Option<Constant>) -> Id {
        let mut shape = self.shape(x).to_vec();
        if let Some(last) = shape.last_mut() {
            *last = weight.dim(0);
        }
        self.make(Op::Linear { weight: Arc::new(weight), bias }, vec![x], shape)
    }

    /// Some channels of `e`, pushed into the rows of the linear that makes them. `None` where that cannot be.
    pub fn take(&mut self, e: Id, pick: &Pick) -> Option<Id> {
        // down to what can be cut, then the same expressions again on top of it
        let mut path = Vec::new();
        let mut at = e;
        let (n, len) = (*self.shape(e).last()?, pick.len());
        if pick.is_identity(n) {
            return Some(e);
        }
        if self.shape(e).len() != 3 || len == 0 {
            return None;
        }
        while matches!(self.op(at), Op::Sel { .. } | Op::AddC(_) | Op::MulC(_) | Op::Scale(_) | Op::Norm { .. }) {
            path.push(at);
            at = self.arg(at, 0);
            if path.len() > TAKE_DEPTH {
                return None;
            }
        }
        let mut shape = self.shape(at).to_vec();
        shape[2] = len;
        let mut out = match self.get(at).op.clone() {
            Op::Linear { weight, bias } => {
                let weight = Arc::new(weight.pick(0, pick)?);
                let bias = match bias {
                    Some(b) => Some(Arc::new(b.pick(0, pick)?)),
                    None => None,
                };
                let args = self.get(at).args.clone();
                self.make(Op::Linear { weight, bias }, args, shape)
            }
            Op::Param(v) => {
                let v = v.pick(2, pick)?;
                self.make(Op::Param(Arc::new(v)), Vec::new(), shape)
            }
            _ => return None,
        };
        while let Some(id) = path.pop() {
            let channels = |c: &Array| if c.dim(2) == 1 { Some(c.clone()) } else { c.pick(2, pick) };
            out = match self.get(id).op.clone() {
                Op::Sel { start } => {
                    let n = self.shape(id)[1];
                    self.select(out, start, n).ok()?
                }
                Op::AddC(c) => self.add_c(out, &channels(&c)?).ok()?,
                Op::MulC(c) => self.mul_c(out, &channels(&c)?).ok()?,
                Op::Scale(s) => self.scale(out, s.0),
                // whole groups, each in its order
                Op::Norm { eps, gain, bias, group } if whole_groups(pick, group) => {
                    self.same_shape(Op::Norm { eps, gain, bias, group }, out)
                }
                _ => return None,
            };
        }
        Some(out)
    }

    /// Several expressions' channels side by side, where they are linears over one input or attentions over the same
    /// tokens: the rows of their weights, one below the other.
    pub fn beside(&mut self, parts: &[Id]) -> Option<Id> {
        let &[first, ..] = parts else { return None };
        let e = self.get(first).clone();
        let channels = parts.iter().try_fold(0usize, |n, &p| n.checked_add(*self.shape(p).last()?))?;
        let mut shape = e.shape.clone();
        *shape.last_mut()? = channels;
        for &p in parts {
            let (a, b) = (self.shape(p), &e.shape);
            if a.len() != 3 || a[..2] != b[..2] || self.get(p).args.len() != e.args.len() {
                return None;
            }
        }
        match &e.op {
            Op::Linear { bias, .. } => {
                let (mut weights, mut biases) = (Vec::new(), Vec::new());
                for &p in parts {
                    let Op::Linear { weight, bias: b } = self.op(p) else { return None };
                    if self.get(p).args != e.args || b.is_some() != bias.is_some() {
                        return None;
                    }
                    weights.push((**weight).clone());
                    biases.extend(b.as_deref().cloned());
                }
                let weight = Arc::new(Array::concat(&weights, 0).ok()?);
                let bias = match bias {
                    Some(_) => Some(Arc::new(Array::concat(&biases, 0).ok()?)),
                    None => None,
                };
                Some(self.make(Op::Linear { weight, bias }, e.args, shape))
            }
            Op::Sel { start } => {
                let start = *start;
                if parts.iter().any(|&p| *self.op(p) != (Op::Sel { start })) {
                    return None;
                }
                let inner: Vec<Id> = parts.iter().map(|&p| self.arg(p, 0)).collect();
                let whole = self.beside_leaf(&inner)?;
                self.select(whole, start, shape[1]).ok()
            }
            Op::Attn { scale, .. } => {
                let scale = *scale;
                let mut heads = 0usize;
                let mut operands = [Vec::new(), Vec::new(), Vec::new()];
                for &p in parts {
                    let Op::Attn { heads: h, scale: s } = *self.op(p) else { return None };
                    if !self.near(s.0, scale.0) {
                        return None;
                    }
                    heads = heads.checked_add(h)?;
                    for (list, &arg) in operands.iter_mut().zip(&self.get(p).args) {
                        list.push(arg);
                    }
                }
                let [q, k, v] = &operands;
                let args = vec![self.beside_leaf(q)?, self.beside_leaf(k)?, self.beside_leaf(v)?];
                let per_head = |n: usize| n.is_multiple_of(heads).then_some(n / heads);
                let (d, _) = (per_head(self.shape(args[0])[2])?, per_head(channels)?);
                // every part has the same head width, or heads would be cut elsewhere
                if parts.iter().any(
                    |&p| matches!(*self.op(p), Op::Attn { heads: h, .. } if self.shape(self.arg(p, 0))[2] != h * d),
                ) {
                    return None;
                }
                Some(self.make(Op::Attn { heads, scale }, args, shape))
            }
            _ => None,
        }
    }

    /// As [`Exprs::beside`], for operands: linears, or a selection of their tokens.
    fn beside_leaf(&mut self, parts: &[Id]) -> Option<Id> {
        let mut core = Vec::with_capacity(parts.len());
        let start = match *self.op(*parts.first()?) {
            Op::Sel { start } => Some((start, self.shape(parts[0])[1])),
            _ => None,
        };
        for &p in parts {
            match (self.op(p), start) {
                (Op::Linear { .. }, None) => core.push(p),
                (Op::Sel { start: at }, Some((s, n))) if *at == s && self.shape(p)[1] == n => {
                    let inner = self.arg(p, 0);
                    if !matches!(self.op(inner), Op::Linear { .. }) {
                        return None;
                    }
                    core.push(inner);
                }
                _ => return None,
            }
        }
        if core.iter().any(|&p| !matches!(self.op(p), Op::Linear { .. })) {
            return None;
        }
        let whole = self.beside(&core)?;
        match start {
            Some((s, n)) => self.select(whole, s, n).ok(),
            None => Some(whole),
        }
    }

    /// `softmax(scale · q kᵀ) v`, all operands `[batch, tokens, heads · head_dim]`.
    pub fn attention(&mut self, p: Id, v: Id, heads: usize) -> Option<Id> {
        if *self.op(p) != Op::Softmax {
            return None;
        }
        let (s, scale) = self.scaled(self.arg(p, 0));
        if *self.op(s) != (Op::Scores { heads }) {
            return None;
        }
        let (q, k) = (self.arg(s, 0), self.arg(s, 1));
        let (a, b) = (self.shape(q).to_vec(), self.shape(v).to_vec());
        let shape = vec![a[0].max(b[0]), a[1], b[2]];
        Some(self.make(Op::Attn { heads, scale: Number(scale) }, vec![q, k, v], shape))
    }

    /// `q kᵀ` per head, the scales of both outside.
    pub fn scores(&mut self, q: Id, k: Id, heads: usize) -> Id {
        let ((q, s), (k, t)) = (self.scaled(q), self.scaled(k));
        let (a, b) = (self.shape(q), self.shape(k));
        let shape = vec![a[0].max(b[0]), heads, a[1], b[1]];
        let scores = self.make(Op::Scores { heads }, vec![q, k], shape);
        self.scale(scores, s * t)
    }

    /// A canonical expression as text, a few levels deep, for a message.
    pub fn show(&self, id: Id, depth: usize) -> String {
        let e = self.get(id);
        let name = match &e.op {
            Op::Patch { weight, .. } => format!("Patch{:?}", weight.shape()),
            Op::Param(v) => format!("Param{:?}", v.shape()),
            Op::Linear { weight, bias } => {
                format!("Linear{:?}{}", weight.shape(), if bias.is_some() { "+b" } else { "" })
            }
            Op::AddC(c) => format!("AddC{:?}", c.shape()),
            Op::MulC(c) => format!("MulC{:?}", c.shape()),
            Op::Norm { eps, group, .. } => format!("Norm(eps {:.3e}, {group})", eps.0),
            Op::Scale(s) => format!("Scale({})", s.0),
            Op::AddS(s) => format!("AddS({})", s.0),
            Op::Pow(s) => format!("Pow({})", s.0),
            Op::IntLinear { .. } => "IntLinear".into(),
            Op::IntPatch { .. } => "IntPatch".into(),
            other => format!("{other:?}").replace("Number", ""),
        };
        if e.args.is_empty() {
            return name;
        }
        if depth == 0 {
            return format!("{name}(…)");
        }
        let args: Vec<String> = e.args.iter().map(|&a| self.show(a, depth - 1)).collect();
        format!("{name}({})", args.join(", "))
    }
}

/// The pick takes whole groups of neighbours, each in its own order.
fn whole_groups(pick: &Pick, group: usize) -> bool {
    let Some(&(stride, size)) = pick.digits.last() else { return group == 1 };
    let outer = &pick.digits[..pick.digits.len() - 1];
    pick.offset.is_multiple_of(group) && stride == 1 && size % group == 0 && outer.iter().all(|d| d.0 % group == 0)
        || group == 1
}
