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
        if let (Value::Const(x), Value::Const(y)) = (a, b)
            && !(n == 3 && x.array.dtype.is_float())
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

/// The product of two small matrices.
fn constant_product(a: &Array, b: &Array) -> Rule<Array> {
    need!(
        a.rank() == 2 && b.rank() == 2 && a.dim(1) == b.dim(0),
        "a product of constants of shapes {:?} and {:?}",
        a.shape(),
        b.shape()
    );
    let (n, k, m) = (a.dim(0), a.dim(1), b.dim(1));
    need!(
        n.saturating_mul(k).saturating_mul(m) <= 1 << 26 && a.dtype.is_float(),
        "a product of constants of {n}×{k}×{m}"
    );
    let (x, y) = (a.f64s(), b.f64s());
    let mut out = vec![0.0; n * m];
    for i in 0..n {
        for l in 0..k {
            let v = x[i * k + l];
            for j in 0..m {
                out[i * m + j] += v * y[l * m + j];
            }
        }
    }
    Ok(Array::floats(a.dtype, &[n, m], &out))
}
