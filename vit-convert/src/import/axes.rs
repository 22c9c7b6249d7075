//! Axes as mixed-radix digits. Reshape splits and merges digits, Transpose moves them, and no operator invents an axis.
//!
//! A dimension of a view is a list of digits, most significant first. A digit counts `0..size` along an axis of the
//! base with a stride. The same digits describe activations (over the base axes of an expression) and constants (over
//! the elements in memory, as axis 0).

/// The axis of a digit that reads the same element everywhere.
pub const BROADCAST: u8 = u8::MAX;

/// One digit of a dimension: position `i` in `0..size` reads `i * stride` along `axis` of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digit {
    /// The base's axis, or [`BROADCAST`].
    pub axis: u8,
    /// Distance of two neighbours along that axis; 0 for a broadcast digit.
    pub stride: usize,
    /// Positions; never 1.
    pub size: usize,
}

/// The digits of one dimension, most significant first; empty for a dimension of size 1.
pub type Dim = Vec<Digit>;

/// A whole axis of `n` positions as one dimension.
pub fn axis(axis: u8, n: usize) -> Dim {
    strided(axis, 1, n)
}

/// `n` positions along an axis, `stride` apart.
pub fn strided(axis: u8, stride: usize, n: usize) -> Dim {
    if n == 1 { Dim::new() } else { vec![Digit { axis, stride, size: n }] }
}

/// `n` positions that all read the same.
pub fn broadcast(n: usize) -> Dim {
    strided(BROADCAST, 0, n)
}

/// Positions of a dimension.
pub fn size(dim: &[Digit]) -> usize {
    dim.iter().map(|d| d.size).product()
}

/// Positions of every dimension.
pub fn shape(dims: &[Dim]) -> Vec<usize> {
    dims.iter().map(|d| size(d)).collect()
}

/// The digits of several dimensions, in order.
pub fn digits<'a>(dims: impl IntoIterator<Item = &'a Dim>) -> Dim {
    dims.into_iter().flatten().copied().collect()
}

/// Merges neighbours that continue each other: `(s·n, a)(s, n)` is `(s, a·n)`.
pub fn join(digits: &[Digit]) -> Dim {
    let mut out = Dim::with_capacity(digits.len());
    for &d in digits {
        match out.last_mut() {
            _ if d.size == 1 => {}
            Some(last)
                if last.axis == d.axis && (d.axis == BROADCAST || last.stride == d.stride.wrapping_mul(d.size)) =>
            {
                *last = Digit { size: last.size * d.size, ..d };
            }
            _ => out.push(d),
        }
    }
    out
}

/// Reshape: the digits of all dimensions, split and merged to the sizes of `target`. `None` if a digit would be split
/// unevenly.
pub fn regroup(dims: &[Dim], target: &[usize]) -> Option<Vec<Dim>> {
    let total = dims.iter().flatten().try_fold(1usize, |n, d| n.checked_mul(d.size))?;
    if target.iter().try_fold(1usize, |n, &t| n.checked_mul(t))? != total {
        return None;
    }
    if total == 0 {
        return Some(target.iter().map(|&n| broadcast(n)).collect());
    }
    let mut todo: Dim = dims.iter().rev().flat_map(|d| d.iter().rev()).copied().collect();
    let mut out = Vec::with_capacity(target.len());
    for &n in target {
        let mut cut = Dim::new();
        let mut need = n;
        while need > 1 {
            let d = todo.pop()?;
            if need % d.size == 0 {
                cut.push(d);
                need /= d.size;
            } else if d.size % need == 0 {
                let rest = d.size / need;
                cut.push(Digit { stride: d.stride.checked_mul(rest)?, size: need, ..d });
                todo.push(Digit { size: rest, ..d });
                need = 1;
            } else {
                return None;
            }
        }
        out.push(join(&cut));
    }
    todo.is_empty().then_some(out)
}

/// Dimensions with leading ones, as broadcasting adds them.
pub fn pad(dims: &[Dim], rank: usize) -> Vec<Dim> {
    let mut out = vec![Dim::new(); rank.saturating_sub(dims.len())];
    out.extend(dims.iter().cloned());
    out
}

/// Positions along an axis, in order: position `Σ iₖ·strideₖ + offset` for the digits' mixed-radix count.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pick {
    /// The first position.
    pub offset: usize,
    /// `(stride, size)`, most significant first.
    pub digits: Vec<(usize, usize)>,
}

impl Pick {
    /// `len` neighbours from `start`.
    pub fn range(start: usize, len: usize) -> Self {
        Self::steps(start, 1, len)
    }

    /// `len` positions from `start`, `step` apart.
    pub fn steps(start: usize, step: usize, len: usize) -> Self {
        Self { offset: start, digits: if len == 1 { Vec::new() } else { vec![(step, len)] } }
    }

    /// What the digits of a view enumerate.
    pub fn of(digits: &[Digit]) -> Self {
        Self { offset: 0, digits: join(digits).iter().map(|d| (d.stride, d.size)).collect() }
    }

    /// How many positions.
    pub fn len(&self) -> usize {
        self.digits.iter().map(|d| d.1).product()
    }

    /// No position at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every one of `n` positions in its place.
    pub fn is_identity(&self, n: usize) -> bool {
        self.offset == 0 && (if n == 1 { self.digits.is_empty() } else { self.digits == [(1, n)] })
    }

    /// Every one of `n` positions once, in some order.
    pub fn is_permutation(&self, n: usize) -> bool {
        if self.offset != 0 || self.len() != n {
            return false;
        }
        let mut sorted = self.digits.clone();
        sorted.sort_unstable();
        let mut next = 1;
        sorted.iter().all(|&(stride, size)| std::mem::replace(&mut next, stride.saturating_mul(size)) == stride)
    }

    /// Applies the pick to a dimension: its positions as an offset and digits. `None` if that needs an index list.
    pub fn through(&self, dim: &[Digit]) -> Option<(usize, Dim)> {
        // the weight of digit k in the dimension's own count
        let mut weight = vec![1usize; dim.len() + 1];
        for k in (0..dim.len()).rev() {
            weight[k] = weight[k + 1].checked_mul(dim[k].size)?;
        }
        let mut top: Vec<usize> = Vec::with_capacity(dim.len()); // the largest value that each digit takes
        let (mut at, mut rest) = (0usize, self.offset);
        for (k, d) in dim.iter().enumerate() {
            let digit = rest / weight[k + 1];
            rest %= weight[k + 1];
            at = at.checked_add(digit.checked_mul(d.stride)?)?;
            top.push(digit);
        }
        if rest != 0 {
            return None;
        }
        let mut out = Dim::new();
        for &(stride, size) in &self.digits {
            let from = out.len();
            let (mut stride, mut left) = (stride, size);
            while left > 1 {
                if stride == 0 {
                    out.insert(from, Digit { axis: BROADCAST, stride: 0, size: left });
                    break;
                }
                let k = (0..dim.len()).find(|&k| weight[k + 1] <= stride)?;
                let (d, unit) = (dim[k], weight[k + 1]);
                if stride % unit != 0 {
                    return None;
                }
                let step = stride / unit;
                let take = if step.checked_mul(left - 1)? < d.size {
                    left
                } else {
                    let lo = d.size / step;
                    if d.size % step != 0 || lo < 2 || left % lo != 0 {
                        return None;
                    }
                    lo
                };
                top[k] = top[k].checked_add(step.checked_mul(take - 1)?)?;
                let cut = if d.axis == BROADCAST {
                    Digit { axis: BROADCAST, stride: 0, size: take }
                } else {
                    Digit { axis: d.axis, stride: d.stride.checked_mul(step)?, size: take }
                };
                out.insert(from, cut);
                stride = stride.checked_mul(take)?;
                left /= take;
            }
        }
        let fits = top.iter().zip(dim).all(|(&t, d)| t < d.size);
        fits.then(|| (at, join(&out)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions(dim: &[Digit]) -> Vec<usize> {
        let mut out = vec![0];
        for d in dim {
            out = out.iter().flat_map(|p| (0..d.size).map(move |i| p + i * d.stride)).collect();
        }
        out
    }

    #[test]
    fn reshape_cuts_and_joins() {
        let dims = vec![axis(0, 1009), axis(1, 17), axis(2, 99)];
        let cut = regroup(&dims, &[1009, 17, 3, 3, 11]).unwrap();
        assert_eq!(cut[3], strided(2, 11, 3));
        assert_eq!(regroup(&cut, &[1009, 17, 99]).unwrap(), dims);
        assert_eq!(regroup(&dims, &[1009, 17, 2, 50]), None); // another number of elements
        assert_eq!(regroup(&[axis(2, 6)], &[4, 1]), None);
        assert_eq!(regroup(&[axis(2, 6), axis(1, 4)], &[4, 6]), None); // a digit cannot be cut unevenly
    }

    #[test]
    fn transpose_then_reshape_keeps_the_order() {
        let dims = vec![axis(2, 3), axis(1, 4)];
        let joined = regroup(&dims, &[12]).unwrap();
        assert_eq!(joined[0].len(), 2);
        assert_eq!(regroup(&joined, &[3, 4]).unwrap(), dims);
    }

    #[test]
    fn a_pick_goes_through_rows_of_several_digits() {
        // rows (heads 3, of q/k/v 3, head_dim 4) stored in another order
        let rows = vec![
            Digit { axis: 0, stride: 1, size: 3 },
            Digit { axis: 0, stride: 12, size: 3 },
            Digit { axis: 0, stride: 3, size: 4 },
        ];
        let all = positions(&rows);
        for pick in [
            Pick { offset: 4, digits: vec![(12, 3), (1, 4)] },
            Pick { offset: 0, digits: vec![(4, 9), (1, 4)] },
            Pick { offset: 12, digits: vec![(1, 12)] },
            Pick { offset: 1, digits: vec![(12, 3)] },
            Pick { offset: 0, digits: vec![(2, 18)] },
        ] {
            let want: Vec<usize> = {
                let digits: Vec<Digit> =
                    pick.digits.iter().map(|&(stride, size)| Digit { axis: 0, stride, size }).collect();
                positions(&digits).iter().map(|p| all[p + pick.offset]).collect()
            };
            let (at, dim) = pick.through(&rows).unwrap();
            assert_eq!(positions(&dim).iter().map(|p| p + at).collect::<Vec<_>>(), want, "{pick:?}");
        }
        assert_eq!(Pick { offset: 2, digits: vec![(1, 4)] }.through(&rows), None); // would carry into the next digit
        assert_eq!(Pick { offset: 0, digits: vec![(3, 12)] }.through(&rows), None);
    }

    #[test]
    fn permutations_are_told_from_selections() {
        assert!(Pick { offset: 0, digits: vec![(1, 3), (3, 4)] }.is_permutation(12));
        assert!(!Pick { offset: 0, digits: vec![(1, 3), (3, 4)] }.is_permutation(24));
        assert!(!Pick { offset: 0, digits: vec![(1, 3), (1, 4)] }.is_permutation(12));
        assert!(!Pick { offset: 1, digits: vec![(1, 12)] }.is_permutation(12));
        assert!(Pick::range(0, 12).is_identity(12) && Pick::range(0, 1).is_identity(1));
    }
}
