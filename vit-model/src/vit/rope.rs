//! Rotary positions: the angles for a grid of patches, and the rotation of q and k.

use std::f64::consts::TAU;

use candle_core::{DType, Device, IndexOp, Result, Tensor};

use crate::config::{Config, Rope, RopeKind};

/// The first and second coordinate of every patch of a grid, row by row.
fn coordinates(rope: &Rope, grid: [usize; 2]) -> Vec<[f64; 2]> {
    let at = |axis: usize, i: usize| {
        let (i, side) = (i as f64, grid[axis] as f64);
        match (rope.kind, rope.ref_grid) {
            (RopeKind::Centred, _) => 2.0 * (i + 0.5 + rope.grid_offset) / side - 1.0,
            (RopeKind::Axial | RopeKind::Mixed, Some(reference)) => {
                (i + rope.grid_offset) / side * reference[axis] as f64
            }
            (RopeKind::Axial | RopeKind::Mixed, None) => i + rope.grid_offset,
        }
    };
    let patch = |row: usize, column: usize| {
        let [y, x] = [at(0, row), at(1, column)];
        if rope.column_first { [x, y] } else { [y, x] }
    };
    (0..grid[0]).flat_map(|row| (0..grid[1]).map(move |column| patch(row, column))).collect()
}

/// The angle of each pair of channels of a head for every patch, `[N, d/2]`, row-major: half of the pairs turn by the first
/// coordinate, the others by the second.
///
/// There are none for learned frequencies.
pub(crate) fn angles(rope: &Rope, head_dim: usize, grid: [usize; 2]) -> Vec<f64> {
    let bands = head_dim / 4;
    let circle = if rope.kind == RopeKind::Centred { TAU } else { 1.0 };
    let frequencies: Vec<f64> = (0..bands).map(|i| circle / rope.temperature.powf(i as f64 / bands as f64)).collect();
    let turn = |position: [f64; 2]| position.map(|at| frequencies.iter().map(move |f| at * f).collect::<Vec<_>>());
    coordinates(rope, grid).into_iter().flat_map(|position| turn(position).concat()).collect()
}

/// The type in which angles are computed: at least f32, because a rounded frequency is multiplied by the position.
fn precise(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

fn tensor(values: Vec<f64>, shape: (usize, usize), dtype: DType, device: &Device) -> Result<Tensor> {
    // in f32 before it is moved, because not every device has f64
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(precise(dtype))?.to_device(device)
}

/// The rotations of a grid of patches.
#[derive(Clone, Debug)]
pub(super) struct Rotation {
    /// Cosines and sines: `[1, 1, N, d/2]`, or `[depth, H, N, d/2]` for learned frequencies.
    cos: Tensor,
    sin: Tensor,
    /// Tokens before the patches, which are not rotated.
    prefix: usize,
    rotate_half: bool,
}

impl Rotation {
    /// `freqs` are the learned frequencies `[2, depth, H, d/2]`, if there are any.
    pub(super) fn new(
        config: &Config,
        rope: &Rope,
        grid: [usize; 2],
        freqs: Option<&Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let patches = grid[0] * grid[1];
        let angles = match freqs {
            None => {
                let values = angles(rope, config.head_dim(), grid);
                tensor(values, (patches, config.head_dim() / 2), dtype, device)?.unsqueeze(0)?.unsqueeze(0)?
            }
            Some(freqs) => {
                let freqs = freqs.to_dtype(precise(dtype))?;
                let positions = coordinates(rope, grid);
                let part = |axis: usize| {
                    let at = positions.iter().map(|position| position[axis]).collect();
                    let at = tensor(at, (patches, 1), dtype, device)?; // [N, 1]
                    freqs.i(axis)?.unsqueeze(2)?.broadcast_mul(&at) // [depth, H, N, d/2]
                };
                (part(0)? + part(1)?)?
            }
        };
        Ok(Self {
            cos: angles.cos()?.to_dtype(dtype)?,
            sin: angles.sin()?.to_dtype(dtype)?,
            prefix: config.num_prefix_tokens(),
            rotate_half: rope.rotate_half,
        })
    }

    /// Rotates q or k of a block, `[H, B, N, d] → [H, B, N, d]`.
    pub(super) fn apply(&self, x: &Tensor, block: usize) -> Result<Tensor> {
        let (_, _, n, d) = x.dims4()?;
        let of_block = |table: &Tensor| {
            let block = if table.dim(0)? == 1 { 0 } else { block };
            table.i(block)?.unsqueeze(1) // [H or 1, 1, N, d/2]
        };
        let (cos, sin) = (of_block(&self.cos)?, of_block(&self.sin)?);
        let patches = x.narrow(2, self.prefix, n - self.prefix)?.contiguous()?;
        let (a, b) = if self.rotate_half {
            (patches.narrow(3, 0, d / 2)?, patches.narrow(3, d / 2, d / 2)?)
        } else {
            let (h, images, rows, _) = patches.dims4()?;
            let pairs = patches.reshape((h, images, rows, d / 2, 2))?;
            (pairs.i((.., .., .., .., 0))?, pairs.i((.., .., .., .., 1))?)
        };
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let rotated = if self.rotate_half {
            Tensor::cat(&[first, second], 3)?
        } else {
            Tensor::stack(&[first, second], 4)?.flatten(3, 4)?
        };
        if self.prefix == 0 { Ok(rotated) } else { Tensor::cat(&[x.narrow(2, 0, self.prefix)?, rotated], 2) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of timm's `build_rotary_pos_embed` and `RotaryEmbeddingDinoV3`, by hand.
    #[test]
    fn angles_follow_the_coordinates() {
        let near = |found: &[f64], expected: &[f64]| {
            assert_eq!(found.len(), expected.len());
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?} {expected:?}");
        };
        let axial = Rope::new(RopeKind::Axial, 100.0);
        // two bands, 1 and 1/10; the second patch of the second row
        near(&angles(&axial, 8, [2, 3])[4 * 4..5 * 4], &[1.0, 0.1, 1.0, 0.1]);
        near(&angles(&axial, 8, [2, 3])[2 * 4..3 * 4], &[0.0, 0.0, 2.0, 0.2]);
        let columns = Rope { column_first: true, grid_offset: 1.0, ref_grid: Some([4, 6]), ..axial };
        // (2 + 1) / 3 · 6 columns and (0 + 1) / 2 · 4 rows
        near(&angles(&columns, 8, [2, 3])[2 * 4..3 * 4], &[6.0, 0.6, 2.0, 0.2]);
        let centred = Rope::new(RopeKind::Centred, 100.0);
        near(&angles(&centred, 4, [2, 1])[..2], &[-0.5 * TAU, 0.0]);
    }
}
