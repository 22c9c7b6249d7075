//! The algebra against numbers: whatever a constructor builds must have the value that its name promises.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use vit_model::config::Activation;

use super::*;
use crate::import::array::Array;
use crate::import::axes::Pick;
use crate::onnx::graph::DType;

const TOKENS: usize = 5;
const CHANNELS: usize = 6;

/// Numbers of a shape `[batch, tokens, channels]` (or `[batch, heads, queries, keys]`), row-major.
#[derive(Clone, Debug)]
struct Numbers {
    shape: Vec<usize>,
    data: Vec<f64>,
}

impl Numbers {
    fn new(shape: &[usize], f: impl Fn(usize) -> f64) -> Self {
        Self { shape: shape.to_vec(), data: (0..shape.iter().product()).map(f).collect() }
    }

    fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { shape: self.shape.clone(), data: self.data.iter().map(|&v| f(v)).collect() }
    }

    /// The positions of an element along every axis.
    fn at(&self, mut i: usize) -> Vec<usize> {
        let mut out = vec![0; self.shape.len()];
        for (k, &n) in self.shape.iter().enumerate().rev() {
            (out[k], i) = (i % n, i / n);
        }
        out
    }

    /// The element at some positions, where an axis of size 1 repeats.
    fn get(&self, at: &[usize]) -> f64 {
        let i = self.shape.iter().zip(at).fold(0, |i, (&n, &p)| i * n + if n == 1 { 0 } else { p });
        self.data[i]
    }

    fn zip(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        let shape: Vec<usize> = self.shape.iter().zip(&other.shape).map(|(&a, &b)| a.max(b)).collect();
        let whole = Self::new(&shape, |_| 0.0);
        Self::new(&shape, |i| f(self.get(&whole.at(i)), other.get(&whole.at(i))))
    }

    /// `f` of the group of positions along `axis` that each element belongs to.
    fn grouped(&self, axis: usize, group: usize, f: impl Fn(&[f64]) -> f64) -> Self {
        Self::new(&self.shape, |i| {
            let mut at = self.at(i);
            let start = at[axis] / group * group;
            let values: Vec<f64> = (start..start + group)
                .map(|p| {
                    at[axis] = p;
                    self.get(&at)
                })
                .collect();
            f(&values)
        })
    }

    /// Some positions of an axis.
    fn pick(&self, axis: usize, which: &[usize]) -> Self {
        let mut shape = self.shape.clone();
        shape[axis] = which.len();
        let picked = Self::new(&shape, |_| 0.0);
        Self::new(&shape, |i| {
            let mut at = picked.at(i);
            at[axis] = which[at[axis]];
            self.get(&at)
        })
    }

    fn softmax(&self) -> Self {
        let exp = self.map(f64::exp);
        exp.zip(&exp.grouped(self.shape.len() - 1, *self.shape.last().unwrap(), |v| v.iter().sum()), |a, b| a / b)
    }

    fn norm(&self, group: usize, eps: f64) -> Self {
        let centred = self.zip(&self.grouped(2, group, mean), |x, m| x - m);
        let variance = centred.map(|x| x * x).grouped(2, group, mean);
        centred.zip(&variance, |x, v| x / (v + eps).sqrt())
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Abramowitz and Stegun 7.1.26 is too coarse here: the series of erf, which converges for every argument that occurs.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / PI.sqrt()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn activation(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Gelu => 0.5 * x * (1.0 + erf(x * FRAC_1_SQRT_2)),
        Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Silu => x * sigmoid(x),
        Activation::Relu => x.max(0.0),
        other => panic!("no formula for {other:?}"),
    }
}

/// The value of the one input: positive numbers without a pattern.
fn image() -> Numbers {
    Numbers::new(&[1, TOKENS, CHANNELS], |i| 0.2 + (i as f64 * 0.7123).fract())
}

/// What an expression computes, by the definition of each operation.
fn value(x: &Exprs, id: Id) -> Numbers {
    let e = x.get(id);
    let arg = |k: usize| value(x, e.args[k]);
    let constant = |c: &Array| Numbers { shape: c.shape(), data: c.f64s() };
    let over_channels = |c: &Option<Constant>, default: f64| match c {
        Some(c) => Numbers { shape: vec![1, 1, c.len()], data: c.f64s() },
        None => Numbers::new(&[1, 1, 1], |_| default),
    };
    match &e.op {
        Op::Input => image(),
        Op::Param(c) => constant(c),
        Op::Cat => {
            let parts: Vec<Numbers> = (0..e.args.len()).map(arg).collect();
            Numbers { shape: e.shape.clone(), data: parts.into_iter().flat_map(|p| p.data).collect() }
        }
        Op::Sel { start } => arg(0).pick(1, &(*start..start + e.shape[1]).collect::<Vec<_>>()),
        Op::Linear { weight, bias } => {
            let (input, weight, k) = (arg(0), weight.f64s(), weight.dim(1));
            let product = Numbers::new(&e.shape, |i| {
                let (row, out) = (i / e.shape[2], i % e.shape[2]);
                (0..k).map(|c| input.data[row * k + c] * weight[out * k + c]).sum()
            });
            product.zip(&over_channels(bias, 0.0), |a, b| a + b)
        }
        Op::Norm { eps, gain, bias, group } => {
            let repeat = |c: &Option<Constant>, default: f64| {
                Numbers::new(&[1, 1, e.shape[2]], |i| c.as_ref().map_or(default, |c| c.f64s()[i % group]))
            };
            let normed = arg(0).norm(*group, eps.0).zip(&repeat(gain, 1.0), |a, b| a * b);
            normed.zip(&repeat(bias, 0.0), |a, b| a + b)
        }
        Op::Scores { heads } => {
            let (q, k) = (arg(0), arg(1));
            let d = q.shape[2] / heads;
            let out = Numbers::new(&e.shape, |_| 0.0);
            Numbers::new(&e.shape, |i| {
                let at = out.at(i);
                (0..d).map(|c| q.get(&[0, at[2], at[1] * d + c]) * k.get(&[0, at[3], at[1] * d + c])).sum()
            })
        }
        Op::Softmax | Op::Out(Head::Softmax) => arg(0).softmax(),
        Op::Out(Head::LogSoftmax) => arg(0).softmax().map(f64::ln),
        Op::Attn { heads, scale } => {
            let (q, k, v) = (arg(0), arg(1), arg(2));
            let (d, w, n) = (q.shape[2] / heads, v.shape[2] / heads, k.shape[1]);
            Numbers::new(&e.shape, |i| {
                let (token, channel) = (i / e.shape[2], i % e.shape[2]);
                let head = channel / w;
                let dot = |key: usize| -> f64 {
                    (0..d).map(|c| q.get(&[0, token, head * d + c]) * k.get(&[0, key, head * d + c])).sum()
                };
                let weights: Vec<f64> = (0..n).map(|key| (scale.0 * dot(key)).exp()).collect();
                let mixed: f64 = (0..n).map(|key| weights[key] * v.get(&[0, key, channel])).sum();
                mixed / weights.iter().sum::<f64>()
            })
        }
        Op::Add => arg(0).zip(&arg(1), |a, b| a + b),
        Op::Mul => arg(0).zip(&arg(1), |a, b| a * b),
        Op::AddS(s) => arg(0).map(|v| v + s.0),
        Op::Scale(s) => arg(0).map(|v| v * s.0),
        Op::Pow(p) => arg(0).map(|v| v.powf(p.0)),
        Op::AddC(c) => arg(0).zip(&constant(c), |a, b| a + b),
        Op::MulC(c) => arg(0).zip(&constant(c), |a, b| a * b),
        Op::Mean { axis, group } => arg(0).grouped(usize::from(*axis), *group, mean),
        Op::Max { axis } => {
            let axis = usize::from(*axis);
            arg(0).grouped(axis, e.shape[axis], |v| v.iter().copied().fold(f64::MIN, f64::max))
        }
        Op::Centred { group } => {
            let of = arg(0);
            of.zip(&of.grouped(2, *group, mean), |x, m| x - m)
        }
        Op::Act(act) => arg(0).map(|v| activation(*act, v)),
        Op::Func(Func::Erf) => arg(0).map(erf),
        Op::Func(Func::Tanh) => arg(0).map(f64::tanh),
        Op::Func(Func::Sigmoid) => arg(0).map(sigmoid),
        Op::Func(Func::Exp) => arg(0).map(f64::exp),
        Op::Func(Func::Log) => arg(0).map(f64::ln),
        other => panic!("no value for {other:?}"),
    }
}

fn assert_equal(x: &Exprs, id: Id, want: &Numbers, what: &str) {
    let got = value(x, id);
    // what a reduction has made constant may be stored once or repeated
    let whole = got.zip(want, |a, b| (a - b).abs() / (1e-3 + b.abs()));
    let worst = whole.data.iter().copied().fold(0.0, f64::max);
    assert!(worst < 1e-6, "{what}: off by {worst:e}: {}", x.show(id, 6));
}

fn table() -> (Exprs, Id) {
    let mut x = Exprs::new(1e-5);
    let leaf = x.make(Op::Input, vec![], vec![1, TOKENS, CHANNELS]);
    (x, leaf)
}

fn floats(dims: &[usize], f: impl Fn(usize) -> f64) -> Array {
    let n = dims.iter().product::<usize>();
    Array::floats(DType::F64, dims, &(0..n).map(f).collect::<Vec<_>>())
}

/// A matrix, or a vector, without a pattern.
fn weight(dims: &[usize]) -> Array {
    floats(dims, |i| (i as f64 * 0.618).fract() - 0.4)
}

fn per_channel(n: usize, f: impl Fn(usize) -> f64) -> Array {
    floats(&[1, 1, n], f)
}

/// Steps drawn at random, each beside the plain arithmetic that it must agree with.
#[test]
fn random_arithmetic_has_the_value_of_the_plain_formula() {
    for seed in 1..400u64 {
        let mut state = seed;
        let mut draw = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        let (mut x, leaf) = table();
        let gain = per_channel(CHANNELS, |i| 0.5 + i as f64 * 0.1);
        let rows = floats(&[1, TOKENS, CHANNELS], |i| 0.3 + (i as f64 * 0.31).fract());
        let numbers = |c: &Array| Numbers { shape: c.shape(), data: c.f64s() };
        let mut made = vec![(leaf, image())];
        for _ in 0..8 {
            let (a, va) = made[draw(made.len())].clone();
            let (b, vb) = made[draw(made.len())].clone();
            let s = [0.5, -1.0, 2.0, 3.0, -0.25][draw(5)];
            let step = match draw(9) {
                0 => (x.add(a, b), va.zip(&vb, |p, q| p + q)),
                1 => (x.mul(a, b), va.zip(&vb, |p, q| p * q)),
                2 => (x.scale(a, s), va.map(|v| v * s)),
                3 => (x.add_s(a, s), va.map(|v| v + s)),
                4 => (x.add_c(a, &gain).unwrap(), va.zip(&numbers(&gain), |p, q| p + q)),
                5 => (x.mul_c(a, &rows), va.zip(&numbers(&rows), |p, q| p * q)),
                6 => (x.mean(a, 2, 3), va.grouped(2, 3, mean)),
                7 => (x.pow(a, 2.0), va.map(|v| v * v)),
                _ => (x.func(Func::Tanh, a), va.map(f64::tanh)),
            };
            // sums of large terms that cancel say nothing
            if step.1.data.iter().all(|v| v.is_finite() && v.abs() < 1e4) {
                assert_equal(&x, step.0, &step.1, &format!("seed {seed}"));
                made.push(step);
            }
        }
    }
}

#[test]
fn roots_and_quotients_are_powers() {
    let (mut x, a) = table();
    let root = x.pow(a, 0.5);
    let back = x.pow(root, 2.0);
    assert_eq!(back, a);
    let (inverse, scaled) = (x.pow(a, -1.0), x.scale(a, 4.0));
    assert_eq!(x.mul(a, a), x.pow(a, 2.0));
    let one = x.mul(a, inverse);
    assert_equal(&x, one, &image().map(|_| 1.0), "a · 1/a");
    let half = x.pow(scaled, 0.5);
    assert_eq!(x.scaled(half), (root, 2.0));
    // a factor close to 1 is rounding, one further away is not
    assert_eq!(x.scale(a, 1.0 + 1e-7), a);
    assert_ne!(x.scale(a, 1.0 + 1e-6), a);
}

/// Every spelling of a LayerNorm that exporters write, and expressions that only look like one.
#[test]
fn every_spelling_of_a_layer_norm_is_one_expression() {
    let (gain, bias) = (per_channel(CHANNELS, |i| 1.0 + i as f64), per_channel(CHANNELS, |i| i as f64 - 2.0));
    let group = CHANNELS;
    let square_of_difference = |x: &mut Exprs, a: Id, eps: f64| {
        let m = x.mean(a, 2, group);
        let minus = x.scale(m, -1.0);
        let centred = x.add(a, minus);
        let square = x.pow(centred, 2.0);
        let variance = x.mean(square, 2, group);
        let sum = x.add_s(variance, eps);
        (centred, x.pow(sum, -0.5))
    };
    type Spelling<'a> = (&'a str, Box<dyn Fn(&mut Exprs, Id) -> Id + 'a>);
    let spellings: Vec<Spelling<'_>> = vec![
        (
            "(x - mean) · (variance + ε)^-½ · γ + β",
            Box::new(|x, a| {
                let (centred, r) = square_of_difference(x, a, 1e-3);
                let normed = x.mul(centred, r);
                let scaled = x.mul_c(normed, &gain);
                x.add_c(scaled, &bias).unwrap()
            }),
        ),
        (
            "the variance as mean(x²) - mean(x)²",
            Box::new(|x, a| {
                let (square, m) = (x.pow(a, 2.0), x.mean(a, 2, group));
                let (of_squares, of_mean) = (x.mean(square, 2, group), x.pow(m, 2.0));
                let minus = x.scale(of_mean, -1.0);
                let variance = x.add(of_squares, minus);
                let sum = x.add_s(variance, 1e-3);
                let r = x.pow(sum, -0.5);
                let negative = x.scale(m, -1.0);
                let centred = x.add(a, negative);
                let normed = x.mul(centred, r);
                let scaled = x.mul_c(normed, &gain);
                x.add_c(scaled, &bias).unwrap()
            }),
        ),
        (
            "x·(r·γ) + (β - mean·(r·γ)), as TensorFlow's batch_normalization",
            Box::new(|x, a| {
                let (_, r) = square_of_difference(x, a, 1e-3);
                let m = x.mean(a, 2, group);
                let by = x.mul_c(r, &gain);
                let (left, right) = (x.mul(a, by), x.mul(m, by));
                let minus = x.scale(right, -1.0);
                let right = x.add_c(minus, &bias).unwrap();
                x.add(left, right)
            }),
        ),
        (
            "the centred values from a factor outside",
            Box::new(|x, a| {
                // 2(x - mean) / √(4·variance + 4ε)
                let double = x.scale(a, 2.0);
                let (centred, r) = square_of_difference(x, double, 4e-3);
                let normed = x.mul(centred, r);
                let scaled = x.mul_c(normed, &gain);
                x.add_c(scaled, &bias).unwrap()
            }),
        ),
    ];
    let want = image().norm(group, 1e-3).zip(&Numbers { shape: gain.shape(), data: gain.f64s() }, |a, b| a * b);
    let want = want.zip(&Numbers { shape: bias.shape(), data: bias.f64s() }, |a, b| a + b);
    for (name, spell) in &spellings {
        let (mut x, a) = table();
        let found = spell(&mut x, a);
        assert_equal(&x, found, &want, name);
        let Op::Norm { eps, gain: Some(_), bias: Some(_), group: 6 } = x.op(found) else {
            panic!("{name}: {}", x.show(found, 6))
        };
        assert!((eps.0 - 1e-3).abs() < 1e-12 && x.arg(found, 0) == a, "{name}");
    }
}

#[test]
fn what_only_looks_like_a_layer_norm_stays_as_it_is() {
    type Spelling = fn(&mut Exprs, Id) -> Id;
    let near_misses: [(&str, Spelling); 5] = [
        ("another exponent", |x, a| almost(x, a, [6, 6, 6], 1e-3, -1.0)),
        ("no ε", |x, a| almost(x, a, [6, 6, 6], 0.0, -0.5)),
        ("a mean over other groups", |x, a| almost(x, a, [3, 6, 6], 1e-3, -0.5)),
        ("a variance over other groups", |x, a| almost(x, a, [6, 6, 3], 1e-3, -0.5)),
        ("the variance of other values", |x, a| almost(x, a, [6, 3, 6], 1e-3, -0.5)),
    ];
    for (name, spell) in near_misses {
        let (mut x, a) = table();
        let found = spell(&mut x, a);
        assert!(!matches!(x.op(found), Op::Norm { .. }), "{name}: {}", x.show(found, 6));
    }
}

/// `(x - mean(x)) · (mean((x - mean(x))²) + ε)^p`, each mean over groups of its own.
fn almost(x: &mut Exprs, a: Id, groups: [usize; 3], eps: f64, p: f64) -> Id {
    let mut centred = groups.map(|group| {
        let m = x.mean(a, 2, group);
        let minus = x.scale(m, -1.0);
        x.add(a, minus)
    });
    centred[2] = centred[1];
    let square = x.pow(centred[1], 2.0);
    let variance = x.mean(square, 2, groups[2]);
    let sum = x.add_s(variance, eps);
    let r = x.pow(sum, p);
    x.mul(centred[0], r)
}

#[test]
fn activations_are_told_from_their_spelling_and_near_misses_are_not() {
    type Spelling = Box<dyn Fn(&mut Exprs, Id) -> Id>;
    fn gated(f: Func, factor: f64, outside: f64) -> Spelling {
        Box::new(move |x, a| {
            let u = x.scale(a, factor);
            let gate = x.func(f, u);
            let one = if f == Func::Sigmoid { gate } else { x.add_s(gate, 1.0) };
            let product = x.mul(a, one);
            x.scale(product, outside)
        })
    }
    fn tanh(cube: f64, factor: f64) -> Spelling {
        Box::new(move |x, a| {
            let third = x.pow(a, 3.0);
            let third = x.scale(third, cube);
            let sum = x.add(a, third);
            let u = x.scale(sum, factor);
            let t = x.func(Func::Tanh, u);
            let one = x.add_s(t, 1.0);
            let half = x.scale(a, 0.5);
            x.mul(half, one)
        })
    }
    let factored: Spelling = Box::new(|x, a| {
        // √(2/π)·x·(1 + 0.044715·x²), as Keras writes it
        let square = x.pow(a, 2.0);
        let square = x.scale(square, 0.044715);
        let one = x.add_s(square, 1.0);
        let product = x.mul(a, one);
        let u = x.scale(product, (2.0 / PI).sqrt());
        let t = x.func(Func::Tanh, u);
        let gate = x.add_s(t, 1.0);
        let product = x.mul(a, gate);
        x.scale(product, 0.5)
    });
    let silu_by_exp: Spelling = Box::new(|x, a| {
        let minus = x.scale(a, -1.0);
        let exp = x.func(Func::Exp, minus);
        let sum = x.add_s(exp, 1.0);
        let gate = x.pow(sum, -1.0);
        x.mul(a, gate)
    });
    let c = (2.0 / PI).sqrt();
    let cases: Vec<(&str, Spelling, Option<Activation>)> = vec![
        ("erf", gated(Func::Erf, FRAC_1_SQRT_2, 0.5), Some(Activation::Gelu)),
        ("erf with √2 rounded to f32", gated(Func::Erf, f64::from(0.707_106_77f32), 0.5), Some(Activation::Gelu)),
        ("tanh", tanh(0.044715, c), Some(Activation::GeluTanh)),
        ("tanh, factored", factored, Some(Activation::GeluTanh)),
        ("sigmoid 1.702", gated(Func::Sigmoid, 1.702, 1.0), Some(Activation::QuickGelu)),
        ("sigmoid", gated(Func::Sigmoid, 1.0, 1.0), Some(Activation::Silu)),
        ("1/(1+exp(-x))", silu_by_exp, Some(Activation::Silu)),
        ("erf of x", gated(Func::Erf, 1.0, 0.5), None),
        ("erf, one digit off", gated(Func::Erf, 0.7072, 0.5), None),
        ("tanh with another cube", tanh(0.04475, c), None),
        ("tanh with another factor", tanh(0.044715, 0.8), None),
        ("sigmoid 1.7", gated(Func::Sigmoid, 1.7, 1.0), None),
        ("tanh gate", gated(Func::Tanh, 1.0, 0.5), None),
    ];
    for (name, spell, want) in cases {
        let (mut x, a) = table();
        let found = spell(&mut x, a);
        let is = if let Op::Act(act) = x.op(found) { Some(*act) } else { None };
        assert_eq!(is, want, "{name}: {}", x.show(found, 6));
        if let Some(act) = want {
            assert_equal(&x, found, &image().map(|v| activation(act, v)), name);
        }
    }
}

#[test]
fn a_softmax_may_take_the_maximum_away_first() {
    let softmax = |x: &mut Exprs, a: Id, shift: Option<Id>| {
        let u = match shift {
            Some(m) => {
                let minus = x.scale(m, -1.0);
                x.add(a, minus)
            }
            None => a,
        };
        let exp = x.func(Func::Exp, u);
        let m = x.mean(exp, 2, CHANNELS);
        let sum = x.scale(m, CHANNELS as f64);
        let inverse = x.pow(sum, -1.0);
        x.mul(exp, inverse)
    };
    let (mut x, a) = table();
    let plain = softmax(&mut x, a, None);
    assert_eq!(*x.op(plain), Op::Out(Head::Softmax));
    assert_equal(&x, plain, &image().softmax(), "softmax");
    let largest = x.make(Op::Max { axis: 2 }, vec![a], vec![1, TOKENS, CHANNELS]);
    assert_eq!(softmax(&mut x, a, Some(largest)), plain);
    let log = x.func(Func::Log, plain);
    assert_eq!(*x.op(log), Op::Out(Head::LogSoftmax));
    // exp(x) over the mean of a part of the channels is no softmax
    let exp = x.func(Func::Exp, a);
    let part = x.mean(exp, 2, 3);
    let inverse = x.pow(part, -1.0);
    let ratio = x.mul(exp, inverse);
    assert_eq!(*x.op(ratio), Op::Mul);
}

#[test]
fn a_selection_of_channels_becomes_rows_of_the_linear() {
    let picks: [(&str, Pick, Vec<usize>); 4] = [
        ("a range", Pick::range(2, 4), vec![2, 3, 4, 5]),
        ("every second", Pick::steps(1, 2, 4), vec![1, 3, 5, 7]),
        ("two groups of two", Pick { offset: 4, digits: vec![(4, 2), (1, 2)] }, vec![4, 5, 8, 9]),
        ("turned", Pick { offset: 0, digits: vec![(1, 3), (4, 2)] }, vec![0, 4, 1, 5, 2, 6]),
    ];
    let (mut x, a) = table();
    let linear = x.linear(a, weight(&[12, CHANNELS]), Some(weight(&[12]).into()));
    let biased = x.add_c(linear, &per_channel(12, |i| i as f64)).unwrap();
    let scaled = x.mul_c(biased, &per_channel(12, |i| 1.0 + i as f64));
    let token = x.select(scaled, 1, 2).unwrap();
    for (name, pick, which) in picks {
        for e in [linear, biased, scaled, token] {
            let found = x.take(e, &pick).unwrap_or_else(|| panic!("{name}"));
            assert_equal(&x, found, &value(&x, e).pick(2, &which), name);
        }
    }
    assert_eq!(x.take(linear, &Pick::range(0, 12)), Some(linear));
    // whole groups of a norm can be taken, parts of them cannot
    let norm = Op::Norm { eps: Number(1e-3), gain: None, bias: None, group: 4 };
    let norm = x.make(norm, vec![linear], vec![1, TOKENS, 12]);
    let group = x.take(norm, &Pick::range(4, 4)).unwrap();
    assert_equal(&x, group, &value(&x, norm).pick(2, &[4, 5, 6, 7]), "a group of a norm");
    let sum = x.add(linear, norm);
    for (name, e, pick) in [
        ("a part of a group", norm, Pick::range(2, 4)),
        ("a sum of two", sum, Pick::range(0, 4)),
        ("nothing", linear, Pick { offset: 0, digits: vec![(1, 0)] }),
    ] {
        assert_eq!(x.take(e, &pick), None, "{name}");
    }
}

#[test]
fn channels_side_by_side_are_one_linear_or_one_attention() {
    let (mut x, a) = table();
    let bias = |k: usize| floats(&[4], move |i| (i + k) as f64 * 0.1);
    let parts: Vec<Id> = (0..6)
        .map(|k| {
            let rows = floats(&[4, CHANNELS], |i| ((i + 7 * k) as f64 * 0.37).fract() - 0.5);
            x.linear(a, rows, Some(bias(k).into()))
        })
        .collect();
    let beside = |list: &[Numbers]| {
        let all: usize = list.iter().map(|n| n.shape[2]).sum();
        Numbers::new(&[1, TOKENS, all], |i| {
            let (token, mut c) = (i / all, i % all);
            let part = list.iter().find(|n| {
                let here = c < n.shape[2];
                c -= if here { 0 } else { n.shape[2] };
                here
            });
            part.unwrap().get(&[0, token, c])
        })
    };
    let whole = x.beside(&parts[..3]).unwrap();
    let want = beside(&[value(&x, parts[0]), value(&x, parts[1]), value(&x, parts[2])]);
    assert!(matches!(x.op(whole), Op::Linear { .. }));
    assert_equal(&x, whole, &want, "linears");
    // heads one by one are one attention with all heads
    let head = |x: &mut Exprs, [q, k, v]: [Id; 3]| {
        let scores = x.scores(q, k, 1);
        let scaled = x.scale(scores, 0.5);
        let shape = x.shape(scaled).to_vec();
        let soft = x.make(Op::Softmax, vec![scaled], shape);
        x.attention(soft, v, 1).unwrap()
    };
    let heads = [head(&mut x, [parts[0], parts[1], parts[2]]), head(&mut x, [parts[3], parts[4], parts[5]])];
    let joined = x.beside(&heads).unwrap();
    assert!(matches!(x.op(joined), Op::Attn { heads: 2, .. }));
    assert_equal(&x, joined, &beside(&[value(&x, heads[0]), value(&x, heads[1])]), "heads");
    // linears over different inputs, and with and without a bias, stay apart
    let other = x.linear(parts[0], weight(&[4, 4]), None);
    let bare = x.linear(a, weight(&[4, CHANNELS]), None);
    assert_eq!(x.beside(&[parts[0], other]), None);
    assert_eq!(x.beside(&[parts[0], bare]), None);
}

#[test]
fn tokens_are_joined_and_cut_again() {
    let (mut x, a) = table();
    let class = x.make(Op::Param(floats(&[1, 2, CHANNELS], |i| i as f64).into()), vec![], vec![1, 2, CHANNELS]);
    let all = x.cat(vec![class, a]).unwrap();
    assert_eq!(x.shape(all), [1, 2 + TOKENS, CHANNELS]);
    for (start, n) in [(0, 1), (0, 2), (1, 3), (2, TOKENS), (4, 3)] {
        let part = x.select(all, start, n).unwrap();
        let want = value(&x, all).pick(1, &(start..start + n).collect::<Vec<_>>());
        assert_equal(&x, part, &want, &format!("{n} tokens from {start}"));
    }
    assert_eq!(x.select(all, 2, TOKENS), Ok(a));
    // a position embedding over all tokens is one for each part
    let table = floats(&[1, 2 + TOKENS, CHANNELS], |i| i as f64 * 0.01);
    let sum = x.add_c(all, &table).unwrap();
    assert_eq!(*x.op(sum), Op::Cat);
    let want = value(&x, all).zip(&Numbers { shape: table.shape(), data: table.f64s() }, |a, b| a + b);
    assert_equal(&x, sum, &want, "positions");
    assert!(x.cat(vec![a; 300]).unwrap_err().contains("256"));
    assert!(x.cat(vec![]).is_err());
}

#[test]
fn a_bias_goes_to_the_linear_that_it_belongs_to() {
    let (mut x, a) = table();
    let linear = x.linear(a, weight(&[CHANNELS, CHANNELS]), None);
    let bias = per_channel(CHANNELS, |i| i as f64);
    let biased = x.add_c(linear, &bias).unwrap();
    assert!(matches!(x.op(biased), Op::Linear { bias: Some(_), .. }));
    // the skip was added before the bias
    let sum = x.add(a, linear);
    let late = x.add_c(sum, &bias).unwrap();
    assert_eq!(late, x.add(a, biased));
    // a second bias, and one that differs between tokens, stay what they are
    let twice = x.add_c(biased, &bias).unwrap();
    let positions = x.add_c(linear, &floats(&[1, TOKENS, CHANNELS], |i| i as f64)).unwrap();
    for e in [twice, positions] {
        assert!(matches!(x.op(e), Op::AddC(_)), "{}", x.show(e, 3));
    }
    let want = value(&x, biased).zip(&Numbers { shape: bias.shape(), data: bias.f64s() }, |a, b| a + b);
    assert_equal(&x, twice, &want, "two biases");
}
