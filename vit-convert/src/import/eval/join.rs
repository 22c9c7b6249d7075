//! Concat: tokens one after the other, or channels side by side.

use super::align::{align, over_base};
use super::value::{Rule, Value, View, axis_in, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::import::axes::{self, BROADCAST, Digit, Dim};
use crate::import::expr::Op;

impl Walk<'_> {
    /// Values one behind the other.
    pub(super) fn concat(&mut self, values: &[Value], axis: i64) -> Rule<Value> {
        let first = values.first().ok_or("nothing to join")?;
        let axis = axis_in(axis, first.shape()?.len())?;
        if let [one] = values {
            return Ok(one.clone());
        }
        if values.iter().all(|v| matches!(v, Value::Const(_))) {
            let parts: Vec<Array> = values.iter().map(|v| v.array("a part").cloned()).collect::<Rule<_>>()?;
            need!(parts.iter().all(|p| p.dtype == parts[0].dtype), "constants of different types are joined");
            let total: usize = parts.iter().map(Array::len).sum();
            if parts[0].dtype.is_float() || total > 1 << 12 {
                return Ok(Array::concat(&parts, axis)?.into());
            }
            let joined = Array::concat(&parts, axis)?;
            return Ok(Array::ints(joined.dtype, &joined.shape(), &joined.i64s()).into());
        }
        // the part with the fewest broadcast digits shows the order of the axes
        let full = |v: &View| v.dims.iter().flatten().filter(|g| g.axis != BROADCAST).count();
        let views: Vec<&View> =
            values.iter().filter_map(|v| if let Value::View(v) = v { Some(v) } else { None }).collect();
        let reference =
            (*views.iter().max_by_key(|v| (self.x.shape(v.e)[0], full(v))).ok_or("nothing to join")?).clone();
        let base = self.x.shape(reference.e).to_vec();
        need!(base.len() == 3, "a concatenation of something else than tokens or channels");
        need!(views.iter().all(|v| v.rank() == reference.rank()), "parts of different ranks are joined");
        let mut along: Vec<u8> =
            views.iter().flat_map(|v| &v.dims[axis]).map(|g| g.axis).filter(|&a| a != BROADCAST).collect();
        along.sort_unstable();
        along.dedup();
        let elsewhere =
            |k: u8| (0..reference.rank()).any(|i| i != axis && reference.dims[i].iter().any(|g| g.axis == k));
        let tokens = match along[..] {
            [1] => true,
            [] => !elsewhere(1) && elsewhere(2),
            _ => false,
        };
        if tokens {
            self.join_tokens(values, axis, &reference, &base)
        } else {
            self.join_channels(&views, values.len(), axis)
        }
    }

    fn join_tokens(&mut self, values: &[Value], axis: usize, reference: &View, base: &[usize]) -> Rule<Value> {
        let mut parts = Vec::with_capacity(values.len());
        let mut layout = reference.dims.clone();
        let mut best = 0;
        for value in values {
            match value {
                Value::Const(c) => {
                    let n = c.array.dim(axis);
                    need!(
                        c.array.rank() == reference.rank() && c.array.dtype.is_float(),
                        "a parameter of shape {:?} is joined to tokens",
                        c.array.shape()
                    );
                    let mut dims = reference.dims.clone();
                    dims[axis] = axes::axis(1, n);
                    for (k, d) in dims.iter().enumerate() {
                        need!(
                            c.array.dim(k) == axes::size(d),
                            "a parameter of shape {:?} is joined to tokens",
                            c.array.shape()
                        );
                    }
                    let over = over_base(&c.array, &dims, None, &[base[0], n, base[2]])?;
                    let over = over.expand(&[over.dim(0), n, base[2]]).ok_or("a parameter beside tokens")?;
                    parts.push(self.param(&over, c)?);
                }
                Value::View(v) => {
                    let v = self.settle(v)?;
                    let n = self.x.shape(v.e).get(1).copied().unwrap_or(0);
                    need!(
                        self.x.shape(v.e).len() == 3 && v.dims[axis] == axes::axis(1, n),
                        "a part that is no run of tokens"
                    );
                    let without = |dims: &[Dim]| -> Vec<Dim> {
                        dims.iter().enumerate().filter(|(k, _)| *k != axis).map(|(_, d)| d.clone()).collect()
                    };
                    align(&without(&v.dims), &without(&reference.dims))?;
                    need!(
                        without(&v.dims)
                            .iter()
                            .zip(without(&reference.dims))
                            .all(|(a, b)| axes::size(a) == axes::size(&b)),
                        "parts of different sizes are joined"
                    );
                    let full = v.dims.iter().flatten().filter(|g| g.axis != BROADCAST).count();
                    if full > best {
                        best = full;
                        layout.clone_from(&v.dims);
                    }
                    parts.push(v.e);
                }
                _ => return Err("a sequence is joined to tokens".into()),
            }
        }
        let e = self.x.cat(parts)?;
        layout[axis] = axes::axis(1, self.x.shape(e)[1]);
        Ok(View { e, dims: layout, sel: None }.into())
    }

    fn join_channels(&mut self, views: &[&View], count: usize, axis: usize) -> Rule<Value> {
        let &[first, ..] = views else { return Err("nothing to join".into()) };
        need!(views.len() == count, "a constant is joined to channels");
        if let Some(joined) = self.join_vectors(views, axis)? {
            return Ok(joined.into());
        }
        let mut positions = 0;
        let mut stride = None;
        for v in views {
            let channels = self.x.shape(v.e)[2];
            need!(v.sel == first.sel, "channels of different tokens are joined");
            let others = (0..v.rank()).all(|k| k == axis || v.dims[k] == first.dims[k]);
            need!(others, "channels of differently laid out activations are joined");
            let (n, below) = match v.dims[axis][..] {
                [] => (1, channels),
                [Digit { axis: 2, stride, size }] if stride * size == channels => (size, stride),
                _ => return Err("a concatenation along an axis that is neither tokens nor channels".into()),
            };
            need!(*stride.get_or_insert(below) == below, "channels of different widths are joined");
            positions += n;
        }
        let ids: Vec<_> = views.iter().map(|v| v.e).collect();
        let e = self.x.beside(&ids).ok_or("channels of different modules are joined")?;
        let mut dims = first.dims.clone();
        dims[axis] = axes::strided(2, stride.unwrap_or(1), positions);
        Ok(View { e, dims, sel: first.sel }.into())
    }

    /// Vectors for each image that different modules made, such as a class token and a mean of tokens.
    fn join_vectors(&mut self, views: &[&View], axis: usize) -> Rule<Option<View>> {
        let mut ids = Vec::with_capacity(views.len());
        let mut whole = 0usize;
        for v in views {
            let tokens = v.sel.map_or(self.x.shape(v.e).get(1).copied(), |sel| Some(sel.1));
            let &[_, _, channels] = self.x.shape(v.e) else { return Ok(None) };
            if tokens != Some(1) || v.dims[axis] != axes::axis(2, channels) {
                return Ok(None);
            }
            ids.push(self.settle(v)?.e);
            whole = whole.checked_add(channels).ok_or("channels")?;
        }
        let (Some(first), Some(&id)) = (views.first(), ids.first()) else { return Ok(None) };
        let others = |v: &View| (0..v.rank()).all(|k| k == axis || v.dims[k] == first.dims[k]);
        if !views.iter().all(|v| others(v)) || self.x.beside(&ids).is_some() {
            return Ok(None);
        }
        let batch = self.x.shape(id)[0];
        let mut dims = first.dims.clone();
        dims[axis] = axes::axis(2, whole);
        Ok(Some(View { e: self.x.make(Op::Beside, ids, vec![batch, 1, whole]), dims, sel: None }))
    }
}
