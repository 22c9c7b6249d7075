//! Two values of different shapes element by element, by NumPy's rule: which elements meet, and in which order.

use std::sync::Arc;

use rayon::prelude::*;

use super::math;
use super::shape::{Res, count, strides};

/// The shape that both broadcast to, by NumPy's rule.
pub fn broadcast_dims(a: &[usize], b: &[usize]) -> Res<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |d: &[usize], i: usize| (i + d.len()).checked_sub(rank).map_or(1, |i| d[i]);
    let dims = (0..rank).map(|i| match (at(a, i), at(b, i)) {
        (x, y) if x == y => Ok(x),
        (1, y) => Ok(y),
        (x, 1) => Ok(x),
        _ => Err(format!("shapes {a:?} and {b:?} do not broadcast")),
    });
    let dims = dims.collect::<Res<Vec<_>>>()?;
    count(&dims)?;
    Ok(dims)
}

/// Strides that read a value of shape `from` as if it had shape `to`; 0 along repeated axes.
pub fn broadcast_strides(from: &[usize], to: &[usize]) -> Res<Vec<isize>> {
    let skip =
        to.len().checked_sub(from.len()).ok_or_else(|| format!("shape {from:?} does not broadcast to {to:?}"))?;
    let own = strides(from);
    let mut out = vec![0; to.len()];
    for (i, (&d, s)) in from.iter().zip(own).enumerate() {
        if d == to[skip + i] {
            out[skip + i] = if d == 1 { 0 } else { s };
        } else if d != 1 {
            return Err(format!("shape {from:?} does not broadcast to {to:?}"));
        }
    }
    Ok(out)
}

/// How two operands are traversed together: runs of elements, and where each run begins in both.
struct Pairing {
    /// Size, and steps in both operands; the last is the run.
    axes: Vec<(usize, isize, isize)>,
    run: (usize, isize, isize),
}

/// Elements that a thread takes at once.
const AT_ONCE: usize = 1 << 13;

impl Pairing {
    /// Over the shape that both broadcast to.
    fn new(a: &[usize], b: &[usize], dims: &[usize]) -> Res<Self> {
        // merge neighbouring axes that both operands traverse alike, so that runs are long
        let mut axes: Vec<(usize, isize, isize)> = Vec::new();
        for ((&d, x), y) in dims.iter().zip(broadcast_strides(a, dims)?).zip(broadcast_strides(b, dims)?) {
            if d == 1 {
                continue;
            }
            match axes.last_mut() {
                Some((n, lx, ly)) if *lx == x * d as isize && *ly == y * d as isize => (*n, *lx, *ly) = (*n * d, x, y),
                _ => axes.push((d, x, y)),
            }
        }
        let run = axes.pop().unwrap_or((1, 0, 0));
        Ok(Self { axes, run })
    }

    /// Where a run begins.
    #[inline]
    fn at(&self, mut row: usize) -> (usize, usize) {
        let (mut x, mut y) = (0, 0);
        for &(d, sx, sy) in self.axes.iter().rev() {
            x += (row % d) as isize * sx;
            y += (row % d) as isize * sy;
            row /= d;
        }
        (x as usize, y as usize)
    }

    /// Calls `fill(run of the result, its positions in the operands)` for every run, on all threads.
    fn each<C: Send>(&self, out: &mut [C], fill: impl Fn(&mut [C], usize, usize) + Sync) {
        let (n, ix, iy) = self.run;
        if out.is_empty() {
            return;
        }
        let rows = if self.axes.is_empty() { 0 } else { AT_ONCE.div_ceil(n) };
        out.par_chunks_mut(if rows == 0 { AT_ONCE } else { n * rows }).enumerate().for_each(|(c, out)| {
            math::wide(|| {
                // a single run is split between threads
                let parts = out.chunks_mut(if rows == 0 { AT_ONCE } else { n });
                for (r, part) in parts.enumerate() {
                    let (x, y) = match rows {
                        0 => (c * AT_ONCE * ix as usize, c * AT_ONCE * iy as usize),
                        _ => self.at(c * rows + r),
                    };
                    fill(part, x, y);
                }
            });
        });
    }
}

/// `f(a, b)` for every element of two values of one storage, broadcast; parallel, and the same for any thread count.
pub fn zip<A, B, C>(a: (&[A], &[usize]), b: (&[B], &[usize]), f: impl Fn(A, B) -> C + Sync) -> Res<(Vec<usize>, Vec<C>)>
where
    A: Copy + Sync,
    B: Copy + Sync,
    C: Copy + Send + Default,
{
    let dims = broadcast_dims(a.1, b.1)?;
    let pairing = Pairing::new(a.1, b.1, &dims)?;
    let (_, ix, iy) = pairing.run;
    let mut out = vec![C::default(); dims.iter().product()];
    pairing.each(&mut out, |out, x, y| {
        let n = out.len();
        match (ix, iy) {
            (1, 1) => out.iter_mut().zip(&a.0[x..x + n]).zip(&b.0[y..y + n]).for_each(|((o, &p), &q)| *o = f(p, q)),
            (1, 0) => out.iter_mut().zip(&a.0[x..x + n]).for_each(|(o, &p)| *o = f(p, b.0[y])),
            (0, 1) => out.iter_mut().zip(&b.0[y..y + n]).for_each(|(o, &q)| *o = f(a.0[x], q)),
            _ => {
                out.iter_mut()
                    .enumerate()
                    .for_each(|(i, o)| *o = f(a.0[x + i * ix as usize], b.0[y + i * iy as usize]));
            }
        }
    });
    Ok((dims, out))
}

/// Like [`zip`], but reuses the memory of an operand that has the result's shape and no other owner.
pub fn zip_into<T: Copy + Send + Sync + Default>(
    mut a: (Arc<Vec<T>>, &[usize]),
    mut b: (Arc<Vec<T>>, &[usize]),
    f: impl Fn(T, T) -> T + Sync,
) -> Res<(Vec<usize>, Arc<Vec<T>>)> {
    /// `out = f(out, b)`, `out` having the shape of the result.
    fn onto<T: Copy + Send + Sync>(
        (out, dims): (&mut [T], &[usize]),
        (b, b_dims): (&[T], &[usize]),
        f: impl Fn(T, T) -> T + Sync,
    ) -> Res<()> {
        let pairing = Pairing::new(dims, b_dims, dims)?;
        let (_, _, step) = pairing.run;
        pairing.each(out, |out, _, y| match step {
            1 => out.iter_mut().zip(&b[y..]).for_each(|(o, &q)| *o = f(*o, q)),
            0 => out.iter_mut().for_each(|o| *o = f(*o, b[y])),
            _ => out.iter_mut().zip(b[y..].iter().step_by(step as usize)).for_each(|(o, &q)| *o = f(*o, q)),
        });
        Ok(())
    }
    let dims = broadcast_dims(a.1, b.1)?;
    if a.1 == dims
        && let Some(out) = Arc::get_mut(&mut a.0)
    {
        onto((out, &dims), (&b.0, b.1), f)?;
        return Ok((dims, a.0));
    }
    if b.1 == dims
        && let Some(out) = Arc::get_mut(&mut b.0)
    {
        onto((out, &dims), (&a.0, a.1), |y, x| f(x, y))?;
        return Ok((dims, b.0));
    }
    let (dims, out) = zip((&a.0, a.1), (&b.0, b.1), f)?;
    Ok((dims, out.into()))
}
