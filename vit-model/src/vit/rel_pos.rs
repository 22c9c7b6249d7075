//! Biases by relative position (BEiT): which row of the table belongs to a pair of tokens, and tables for other grids.

use candle_core::{DType, Device, Result, Tensor};

use super::pos_embed::Resample;

/// Rows of a table after those of two patches: class to patch, patch to class, class to class.
const CLASS_ROWS: usize = 3;

/// The table's row for every query and key, `[N, N]`, row-major. The class token is the first.
pub(crate) fn index([h, w]: [usize; 2]) -> Vec<u32> {
    let wide = (2 * w).saturating_sub(1);
    let distances = (2 * h).saturating_sub(1) * wide;
    let n = h * w + 1;
    let row = |query: usize, key: usize| match (query, key) {
        (0, 0) => distances + 2,
        (0, _) => distances,
        (_, 0) => distances + 1,
        (query, key) => {
            let ([y, x], [v, u]) = ([(query - 1) / w, (query - 1) % w], [(key - 1) / w, (key - 1) % w]);
            (y + h - 1 - v) * wide + (x + w - 1 - u)
        }
    };
    (0..n * n).map(|i| u32::try_from(row(i / n, i % n)).unwrap_or(u32::MAX)).collect()
}

/// The biases of a table `[distances, H]` as `[H, 1, N, N]`, for the rows `index` `[N·N]`.
pub(super) fn biases(table: &Tensor, index: &Tensor) -> Result<Tensor> {
    let n = index.dim(0)?.isqrt();
    let heads = table.dim(1)?;
    table.contiguous()?.index_select(index, 0)?.t()?.contiguous()?.reshape((heads, 1, n, n))
}

/// The positions that timm gives the distances of a table of `from` rows when it resamples it to `to` rows: a geometric
/// progression from the middle, whose ratio makes the ends meet (from the unilm repository).
fn progression(from: usize, to: usize) -> Vec<f64> {
    let (half, reach) = (from / 2, (to / 2) as f64);
    let (mut left, mut right, mut ratio) = (1.01, 1.5, 1.01);
    while right - left > 1e-6 {
        ratio = f64::midpoint(left, right);
        let sum = (1.0 - f64::powi(ratio, half as i32)) / (1.0 - ratio);
        if sum > reach { right = ratio } else { left = ratio }
    }
    let mut positive = Vec::with_capacity(half);
    let mut at = 1.0;
    for i in 0..half {
        positive.push(at);
        at += f64::powi(ratio, i as i32 + 1);
    }
    positive.iter().rev().map(|p| -p).chain([0.0]).chain(positive.iter().copied()).collect()
}

/// The matrix `[to, from]`, row-major, that interpolates linearly between values at the positions of [`progression`].
fn progressive(from: usize, to: usize) -> Vec<f32> {
    let positions = progression(from, to);
    let mut matrix = vec![0.0; from * to];
    for (i, row) in matrix.chunks_exact_mut(from.max(1)).enumerate() {
        let at = i as f64 - (to / 2) as f64;
        // beyond the ends, where no ratio makes them meet, timm repeats the last value
        let right = positions.partition_point(|p| *p < at).clamp(1, positions.len().max(2) - 1);
        match (positions.get(right - 1), positions.get(right)) {
            (Some(a), Some(b)) => {
                let part = ((at - a) / (b - a)).clamp(0.0, 1.0);
                (row[right - 1], row[right]) = ((1.0 - part) as f32, part as f32);
            }
            _ => row[0] = 1.0,
        }
    }
    matrix
}

/// A table for another grid of patches, as a library makes it that resamples position embeddings by `how`: timm
/// interpolates linearly over a geometric progression, transformers bilinearly.
pub(crate) fn resample(table: &Tensor, from: [usize; 2], to: [usize; 2], how: Resample) -> Result<Tensor> {
    if from == to {
        return Ok(table.clone());
    }
    let sides = |grid: [usize; 2]| grid.map(|side| (2 * side).saturating_sub(1));
    let ([fh, fw], [th, tw], heads) = (sides(from), sides(to), table.dim(1)?);
    let dtype = if table.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let matrix = |from: usize, to: usize| {
        let values = match how {
            Resample::BicubicNearest => Resample::Bilinear.matrix(from, to),
            _ if from == to => (0..from * to).map(|i| if i / from == i % from { 1.0 } else { 0.0 }).collect(),
            _ => progressive(from, to),
        };
        Tensor::from_vec(values, (to, from), &Device::Cpu)?.to_dtype(dtype)?.to_device(table.device())
    };
    let grid = table.narrow(0, 0, fh * fw)?.to_dtype(dtype)?;
    let rows = matrix(fh, th)?.matmul(&grid.reshape((fh, fw * heads))?)?; // [h', w·H]
    let columns = matrix(fw, tw)?.unsqueeze(0)?.broadcast_as((th, tw, fw))?.contiguous()?;
    let grid = columns.matmul(&rows.reshape((th, fw, heads))?)?.reshape((th * tw, heads))?;
    Tensor::cat(&[grid.to_dtype(table.dtype())?, table.narrow(0, fh * fw, CLASS_ROWS)?], 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_of_timms_index() {
        // `gen_relative_position_index((1, 2))` of timm's beit.py
        assert_eq!(index([1, 2]), [5, 3, 3, 4, 1, 0, 4, 2, 1]);
    }

    #[test]
    fn the_ends_of_a_progression_meet() {
        for (from, to) in [(27, 47), (47, 63)] {
            let positions = progression(from, to);
            assert_eq!(positions.len(), from);
            assert!((positions[from - 1] - (to / 2) as f64).abs() < 1e-3, "{positions:?}");
            for row in progressive(from, to).chunks(from) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            }
        }
        assert_eq!(progressive(1, 3), [1.0; 3]);
        // a ratio of at most 1.5 does not reach 3 in two steps, so the ends are repeated
        assert_eq!(progressive(5, 7)[..5], [1.0, 0.0, 0.0, 0.0, 0.0]);
    }
}
