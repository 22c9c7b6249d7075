//! Linear algebra: MatMul, Gemm and Einsum, each expressed as a contraction.

use super::call::Call;
use super::fold;
use super::product::Roles;
use super::value::{Rule, Value, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::import::axes::{self, Dim};
use crate::onnx::graph::DType;

impl Walk<'_> {
    pub(super) fn matmul(&mut self, a: &Value, b: &Value) -> Rule<Value> {
        let (s, t) = (a.shape()?, b.shape()?);
        let (n, m) = (s.len(), t.len());
        need!(n >= 1 && m >= 1, "a product with a scalar");
        // tokens times a weight: a projection of a learned query
        if let (Value::Const(x), Value::Const(y)) = (a, b)
            && !(n == 3 && m == 2 && x.array.dtype.is_float())
        {
            return constant_product(&x.array, &y.array).map(Value::from);
        }
        need!(n >= 2 && m >= 2, "a product with a vector");
        let roles = |rank: usize, sum: usize, free: Vec<usize>, batch: usize| Roles {
            batch: (0..batch).collect(),
            sum: vec![sum],
            free: free.into_iter().filter(|&k| k < rank).collect(),
        };
        if matches!(b, Value::Const(_)) && m == 2 {
            let p = self.contract(a, b, &roles(n, n - 1, (0..n - 1).collect(), 0), &roles(m, 0, vec![1], 0))?;
            let dims = [&p.a[..], &p.b[..]].concat();
            return Ok(p.view(dims).into());
        }
        if matches!(a, Value::Const(_)) && n == 2 {
            // the weight from the left: W · x, the free axis of W second to last
            let free: Vec<usize> = (0..m - 2).chain([m - 1]).collect();
            let p = self.contract(a, b, &roles(n, 1, vec![0], 0), &roles(m, m - 2, free, 0))?;
            let (outer, last) = p.b.split_at(m - 2);
            let dims = [outer, &p.a[..], last].concat();
            return Ok(p.view(dims).into());
        }
        // NumPy's rule: the shorter shape gets leading ones
        let rank = n.max(m);
        let padded = |v: &Value, rank: usize| -> Rule<Value> {
            Ok(match v {
                Value::View(v) => v.with(axes::pad(&v.dims, rank)).into(),
                Value::Const(c) => c.array.relaid(axes::pad(c.array.dims(), rank)).into(),
                _ => return Err("a product of sequences".into()),
            })
        };
        let (a, b) = (padded(a, rank)?, padded(b, rank)?);
        let outer = rank - 2;
        let p = self.contract(
            &a,
            &b,
            &roles(rank, rank - 1, vec![rank - 2], outer),
            &roles(rank, rank - 2, vec![rank - 1], outer),
        )?;
        let dims = [&p.batch[..], &p.a[..], &p.b[..]].concat();
        Ok(p.view(dims).into())
    }

    pub(super) fn gemm(&mut self, call: &Call<'_>) -> Rule<Value> {
        let (a, b) = (call.get(0), call.get(1));
        need!(a.shape()?.len() == 2 && b.shape()?.len() == 2, "Gemm of other tensors than matrices");
        need!(!matches!((a, b), (Value::Const(_), Value::Const(_))), "Gemm of two constants");
        let (ta, tb) = (usize::from(call.int("transA", 0)? != 0), usize::from(call.int("transB", 0)? != 0));
        let roles = |sum: usize| Roles { batch: Vec::new(), sum: vec![sum], free: vec![1 - sum] };
        let p = self.contract(a, b, &roles(1 - ta), &roles(tb))?;
        let dims = [&p.a[..], &p.b[..]].concat();
        let v = p.view(dims);
        let e = self.x.scale(v.e, call.float("alpha", 1.0)?);
        let product = Value::from(v.of(e));
        if !call.has(2) {
            return Ok(product);
        }
        let shape = product.shape()?;
        let bias = call.get(2).shape()?;
        need!(fold::broadcast_shape(&shape, &bias)? == shape, "a Gemm bias of shape {bias:?}");
        let beta = call.float("beta", 1.0)?;
        let bias = if beta == 1.0 {
            call.get(2).clone()
        } else {
            self.binary("Mul", call.get(2), &Array::floats(DType::F32, &[], &[beta]).into())?
        };
        self.binary("Add", &product, &bias)
    }

    pub(super) fn einsum(&mut self, call: &Call<'_>) -> Rule<Value> {
        let equation: String = call.text("equation", "")?.chars().filter(|c| !c.is_whitespace()).collect();
        need!(equation.is_ascii() && !equation.contains('.'), "Einsum `{equation}`");
        let (left, out) = equation.split_once("->").ok_or_else(|| format!("Einsum `{equation}` without a result"))?;
        let (la, lb) = left.split_once(',').ok_or_else(|| format!("Einsum `{equation}` of one operand"))?;
        need!(call.inputs.len() == 2 && !lb.contains(','), "Einsum `{equation}` of {} operands", call.inputs.len());
        let (la, lb, out): (Vec<char>, Vec<char>, Vec<char>) =
            (la.chars().collect(), lb.chars().collect(), out.chars().collect());
        for (letters, v) in [(&la, call.get(0)), (&lb, call.get(1))] {
            let twice = (0..letters.len()).any(|k| letters[..k].contains(&letters[k]));
            need!(!twice && letters.len() == v.shape()?.len(), "Einsum `{equation}`");
        }
        if let (Value::Const(a), Value::Const(b)) = (call.get(0), call.get(1)) {
            return constant_einsum(&a.array, &b.array, &la, &lb, &out).map(Value::from);
        }
        let batch: Vec<char> = la.iter().copied().filter(|c| lb.contains(c) && out.contains(c)).collect();
        let sum: Vec<char> = la.iter().copied().filter(|c| lb.contains(c) && !out.contains(c)).collect();
        let free = |x: &[char], y: &[char]| -> Vec<char> { x.iter().copied().filter(|c| !y.contains(c)).collect() };
        let (fa, fb) = (free(&la, &lb), free(&lb, &la));
        let all: Vec<char> = batch.iter().chain(&fa).chain(&fb).copied().collect();
        need!(
            out.len() == all.len() && all.iter().all(|c| out.contains(c)),
            "Einsum `{equation}` sums or repeats an axis of one operand"
        );
        let at = |letters: &[char], which: &[char]| -> Vec<usize> {
            which.iter().filter_map(|c| letters.iter().position(|l| l == c)).collect()
        };
        let roles = |letters: &[char], free: &[char]| Roles {
            batch: at(letters, &batch),
            sum: at(letters, &sum),
            free: at(letters, free),
        };
        let p = self.contract(call.get(0), call.get(1), &roles(&la, &fa), &roles(&lb, &fb))?;
        let dims: Vec<Dim> = [&p.batch[..], &p.a[..], &p.b[..]].concat();
        let dims = out.iter().filter_map(|c| all.iter().position(|a| a == c)).map(|k| dims[k].clone()).collect();
        Ok(p.view(dims).into())
    }
}

/// Products that folding one operator may take.
const WORK_LIMIT: usize = 1 << 26;

/// The product of two constants, by NumPy's rules for more than two dimensions, and for one.
fn constant_product(a: &Array, b: &Array) -> Rule<Array> {
    let misfit = || format!("a product of constants of shapes {:?} and {:?}", a.shape(), b.shape());
    need!(a.dtype.is_float() && a.dtype == b.dtype, "{} of other types than floats", misfit());
    let (vector_a, vector_b) = (a.rank() == 1, b.rank() == 1);
    let wide = |x: &Array, vector: bool, shape: [usize; 2]| if vector { x.reshape(&shape) } else { Some(x.clone()) };
    let left = wide(a, vector_a, [1, a.len()]).ok_or_else(misfit)?;
    let right = wide(b, vector_b, [b.len(), 1]).ok_or_else(misfit)?;
    let (s, t) = (left.shape(), right.shape());
    let (outer_a, outer_b) = (&s[..s.len() - 2], &t[..t.len() - 2]);
    let (n, k, m) = (s[s.len() - 2], s[s.len() - 1], t[t.len() - 1]);
    need!(k == t[t.len() - 2], "{}", misfit());
    let outer = fold::broadcast_shape(outer_a, outer_b)?;
    let count = outer.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).unwrap_or(usize::MAX);
    need!(
        count.saturating_mul(n).saturating_mul(k).saturating_mul(m) <= WORK_LIMIT,
        "{}, which is too large",
        misfit()
    );
    let over = |x: &Array, rows: usize, columns: usize| x.expand(&[&outer[..], &[rows, columns]].concat());
    let (x, y) = (over(&left, n, k).ok_or_else(misfit)?.f64s(), over(&right, k, m).ok_or_else(misfit)?.f64s());
    let mut out = vec![0.0; count * n * m];
    for g in 0..count {
        for i in 0..n {
            for l in 0..k {
                let v = x[(g * n + i) * k + l];
                let row = &y[(g * k + l) * m..][..m];
                out[(g * n + i) * m..][..m].iter_mut().zip(row).for_each(|(sum, w)| *sum += v * w);
            }
        }
    }
    let shape: Vec<usize> = outer.into_iter().chain((!vector_a).then_some(n)).chain((!vector_b).then_some(m)).collect();
    Ok(Array::floats(a.dtype, &shape, &out))
}

/// `Einsum` of two constants, whose axes have these letters.
fn constant_einsum(a: &Array, b: &Array, la: &[char], lb: &[char], out: &[char]) -> Rule<Array> {
    need!(a.dtype.is_float() && a.dtype == b.dtype, "Einsum of other types than floats");
    let mut letters: Vec<char> = out.to_vec();
    for c in la.iter().chain(lb) {
        if !letters.contains(c) {
            letters.push(*c);
        }
    }
    let size = |c: &char| {
        let of = |x: &Array, list: &[char]| list.iter().position(|l| l == c).map(|k| x.dim(k));
        match (of(a, la), of(b, lb)) {
            (Some(n), Some(m)) if n != m => Err(format!("Einsum of sizes {n} and {m}")),
            (Some(n), _) | (None, Some(n)) => Ok(n),
            (None, None) => Err("Einsum of an axis that no operand has".to_string()),
        }
    };
    let sizes = letters.iter().map(size).collect::<Rule<Vec<_>>>()?;
    let all = sizes.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).unwrap_or(usize::MAX);
    need!(all <= WORK_LIMIT, "Einsum of constants that are too large");
    let steps = |list: &[char]| -> Vec<usize> {
        let at = |c: &char| letters.iter().position(|l| l == c).unwrap_or(0);
        let mut out = vec![0; letters.len()];
        let mut step = 1;
        for c in list.iter().rev() {
            out[at(c)] = step;
            step *= sizes[at(c)];
        }
        out
    };
    let (sa, sb, so) = (steps(la), steps(lb), steps(out));
    let shape = sizes[..out.len()].to_vec();
    let (x, y) = (a.f64s(), b.f64s());
    let mut sums = vec![0.0; shape.iter().product()];
    for i in 0..all {
        let (mut rest, mut at) = (i, [0usize; 3]);
        for k in (0..sizes.len()).rev() {
            let place = rest % sizes[k];
            rest /= sizes[k];
            for (at, steps) in at.iter_mut().zip([&sa, &sb, &so]) {
                *at += place * steps[k];
            }
        }
        sums[at[2]] += x[at[0]] * y[at[1]];
    }
    Ok(Array::floats(a.dtype, &shape, &sums))
}
