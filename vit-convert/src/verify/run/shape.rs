//! Shapes: how many elements, in which order, and which of a tensor's axes a number means.

/// Why a node cannot run: what it needs and what it has. The runner adds the node's name.
pub type Res<T> = Result<T, String>;

/// Elements that one value may have: 2²⁸, a gigabyte of f32.
pub const MAX_ELEMENTS: usize = 1 << 28;

/// The number of elements of a shape, if a value may have that many.
pub fn count(dims: &[usize]) -> Res<usize> {
    dims.iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= MAX_ELEMENTS)
        .ok_or_else(|| format!("a value of shape {dims:?} is over the limit of {MAX_ELEMENTS} elements"))
}

/// An axis attribute made a position among `rank` axes.
pub fn position(axis: i64, rank: usize) -> Res<usize> {
    let at = if axis < 0 { axis.checked_add(rank as i64).unwrap_or(-1) } else { axis };
    if (0..rank as i64).contains(&at) { Ok(at as usize) } else { Err(format!("axis {axis} of a value of rank {rank}")) }
}

/// Row-major strides.
pub fn strides(dims: &[usize]) -> Vec<isize> {
    let mut strides = vec![1isize; dims.len()];
    for i in (1..dims.len()).rev() {
        strides[i - 1] = strides[i] * dims[i].max(1) as isize;
    }
    strides
}
