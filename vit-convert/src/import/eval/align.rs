//! Aligns the operands of an operator: the digits of two activations, or a constant with the base axes of an
//! activation.

use super::value::{Rule, need};
use crate::import::array::Array;
use crate::import::axes::{self, BROADCAST, Digit, Dim};

/// The dimensions of the result of an operator over two views of equally laid out bases.
pub(super) fn align(a: &[Dim], b: &[Dim]) -> Rule<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let real = |d: &Dim| -> Dim { d.iter().filter(|g| g.axis != BROADCAST).copied().collect() };
    let mut out = Vec::with_capacity(rank);
    for (x, y) in axes::pad(a, rank).into_iter().zip(axes::pad(b, rank)) {
        let (n, m) = (axes::size(&x), axes::size(&y));
        need!(n == m || n == 1 || m == 1, "sizes {n} and {m} do not broadcast");
        let (p, q) = (real(&x), real(&y));
        out.push(if p == q {
            if n >= m { x } else { y }
        } else if p.is_empty() {
            y
        } else if q.is_empty() {
            x
        } else {
            return Err("the operands are laid out differently".into());
        });
    }
    Ok(out)
}

/// A constant that broadcasts against a view, in terms of the base axes, with size 1 along axes that it does not depend
/// on.
pub(super) fn over_base(c: &Array, dims: &[Dim], sel: Option<(usize, usize)>, base: &[usize]) -> Rule<Array> {
    let misfit =
        || format!("a constant of shape {:?} does not fit an activation of shape {:?}", c.shape(), axes::shape(dims));
    need!(c.rank() <= dims.len(), "{}", misfit());
    let missing = dims.len() - c.rank();
    let mut cuts = Vec::new(); // the constant's size at every digit
    let mut places: Vec<Digit> = Vec::new();
    for (k, dim) in dims.iter().enumerate() {
        let n = if k < missing { 1 } else { c.dim(k - missing) };
        need!(n == 1 || n == axes::size(dim), "{}", misfit());
        for d in dim {
            cuts.push(if n == 1 { 1 } else { d.size });
            places.push(*d);
        }
    }
    let cut = c.reshape(&cuts).ok_or_else(misfit)?;
    let mut parts: Vec<(Digit, Dim)> = Vec::new();
    let mut cut = cut;
    for (k, d) in places.iter().enumerate() {
        if d.axis == BROADCAST {
            cut = cut.collapse(k).ok_or("a constant that differs where the activation repeats")?;
        }
    }
    for (d, own) in places.iter().zip(cut.dims()) {
        if d.axis != BROADCAST {
            parts.push((*d, if own.is_empty() { axes::broadcast(d.size) } else { own.clone() }));
        }
    }
    parts.sort_by_key(|(d, _)| (d.axis, std::cmp::Reverse(d.stride)));
    let mut out = Vec::with_capacity(base.len());
    for (k, &n) in base.iter().enumerate() {
        let selected = k == 1 && sel.is_some();
        let want = if let (true, Some((_, len))) = (selected, sel) { len } else { n };
        let mine: Vec<&(Digit, Dim)> = parts.iter().filter(|(d, _)| usize::from(d.axis) == k).collect();
        let constant = |own: &Dim| own.iter().all(|g| g.axis == BROADCAST);
        if mine.iter().all(|(_, own)| constant(own)) {
            out.push(Dim::new());
            continue;
        }
        need!(!selected || want == n, "a constant over selected tokens");
        let mut dim = Dim::new();
        let mut left = want;
        for (d, own) in mine {
            let span = d.stride.checked_mul(d.size).ok_or_else(misfit)?;
            need!(span > 0 && left % span == 0, "{}", misfit());
            dim.extend(axes::broadcast(left / span));
            dim.extend_from_slice(own);
            left = d.stride;
        }
        dim.extend(axes::broadcast(left));
        out.push(axes::join(&dim));
    }
    let over = cut.relaid(out);
    if over.dim(0) > 1 {
        let n = over.dim(0);
        return over.collapse(0).ok_or_else(|| format!("a constant that differs over the {n} images of the batch"));
    }
    Ok(over)
}
