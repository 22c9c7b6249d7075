//! Resampling of position embeddings: a grid of one size from a grid of another.

use candle_core::{DType, Device, Result as CandleResult, Tensor};

use crate::{Config, Error, ModelInfo, Result};

/// How a grid of position embeddings is resampled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Resample {
    /// Bicubic with antialias, a = −0.5: timm's, and transformers' for DINOv2 with registers.
    #[default]
    Bicubic,
    /// Bicubic on the four nearest values, a = −0.75: transformers' `interpolate_pos_encoding`.
    BicubicNearest,
    /// Bilinear on the two nearest values: timm's for FlexiViT and most RADIO models.
    Bilinear,
    /// Bilinear with the first and last values aligned instead of the edges: timm's for the other RADIO models.
    BilinearCorners,
}

impl Resample {
    /// What a checkpoint's own library uses when it loads the checkpoint for another image size.
    pub fn of(info: &ModelInfo) -> Self {
        let architecture = info.source.architecture().unwrap_or_default();
        if info.source.producer() == Some("transformers") {
            let antialias = architecture.starts_with("Dinov2WithRegisters");
            if antialias { Self::Bicubic } else { Self::BicubicNearest }
        } else if ["base_patch16_radio_v3", "huge_patch16_radio_v3"].iter().any(|name| architecture.contains(name)) {
            Self::BilinearCorners
        } else if architecture.contains("flexi") || architecture.contains("radio") {
            Self::Bilinear
        } else {
            Self::Bicubic
        }
    }

    /// The matrix `[to, from]`, row-major, that resamples a line of `from` values to `to`.
    pub(super) fn matrix(self, from: usize, to: usize) -> Vec<f32> {
        let mut matrix = vec![0.0; from * to];
        let scale = from as f64 / to as f64;
        for (i, row) in matrix.chunks_exact_mut(from).enumerate() {
            match self {
                Self::Bicubic => {
                    let stretch = scale.max(1.0); // the filter widens when the grid shrinks
                    let (centre, support) = (scale * (i as f64 + 0.5), 2.0 * stretch);
                    let first = (centre - support + 0.5).max(0.0) as usize;
                    let last = ((centre + support + 0.5) as usize).min(from);
                    let weight = |j: usize| cubic((j as f64 - centre + 0.5) / stretch, -0.5);
                    let total: f64 = (first..last).map(weight).sum();
                    for (j, w) in row.iter_mut().enumerate().take(last).skip(first) {
                        *w = (weight(j) / total) as f32;
                    }
                }
                Self::BicubicNearest => {
                    let at = scale * (i as f64 + 0.5) - 0.5;
                    for tap in -1..=2 {
                        let j = at.floor() + f64::from(tap);
                        // the border value repeats beyond the border
                        row[(j.max(0.0) as usize).min(from - 1)] += cubic(at - j, -0.75) as f32;
                    }
                }
                Self::Bilinear | Self::BilinearCorners => {
                    let at = match self {
                        Self::BilinearCorners if to == 1 => 0.0,
                        Self::BilinearCorners => i as f64 * (from as f64 - 1.0) / (to as f64 - 1.0),
                        _ => (scale * (i as f64 + 0.5) - 0.5).max(0.0),
                    };
                    let (j, t) = (at.floor() as usize, at.fract());
                    row[j.min(from - 1)] += (1.0 - t) as f32;
                    row[(j + 1).min(from - 1)] += t as f32;
                }
            }
        }
        matrix
    }
}

/// The cubic convolution kernel (Keys 1981).
pub(crate) fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

/// `[1, prefix + h·w, D] → [1, prefix + h'·w', D]`; the first `prefix` rows stay the same. It has a gradient, and is
/// computed in f32, or in f64 if the embedding is f64.
///
/// # Errors
/// An embedding that does not match the grid `from`, or an empty grid.
pub fn resample(pos_embed: &Tensor, prefix: usize, from: [usize; 2], to: [usize; 2], how: Resample) -> Result<Tensor> {
    let rows = from[0].checked_mul(from[1]).and_then(|n| n.checked_add(prefix));
    let dim = match *pos_embed.dims() {
        [1, n, dim] if rows == Some(n) && from[0] > 0 => dim,
        ref found => {
            let why = format!("expected [1, {prefix} + {} x {}, D], found {found:?}", from[0], from[1]);
            return Err(Error::tensor("pos_embed", why));
        }
    };
    if to[0] == 0 || to[1] == 0 || to[0].saturating_mul(to[1]) > Config::MAX_PATCHES {
        let max = Config::MAX_PATCHES;
        return Err(Error::Input(format!("a grid of {} x {} patches, from 1 to {max} are supported", to[0], to[1])));
    }
    if from == to {
        return Ok(pos_embed.clone());
    }
    let dtype = if pos_embed.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let matrix = |axis: usize| -> CandleResult<Tensor> {
        let matrix = Tensor::from_vec(how.matrix(from[axis], to[axis]), (to[axis], from[axis]), &Device::Cpu)?;
        matrix.to_dtype(dtype)?.to_device(pos_embed.device())
    };
    let grid = pos_embed.narrow(1, prefix, from[0] * from[1])?.to_dtype(dtype)?;
    let grid = matrix(0)?.matmul(&grid.reshape((from[0], from[1] * dim))?)?; // [h', w·D]
    let columns = matrix(1)?.unsqueeze(0)?.broadcast_as((to[0], to[1], from[1]))?.contiguous()?;
    let grid = columns.matmul(&grid.reshape((to[0], from[1], dim))?)?; // [h', w', D]
    let grid = grid.reshape((1, to[0] * to[1], dim))?.to_dtype(pos_embed.dtype())?;
    Ok(Tensor::cat(&[pos_embed.narrow(1, 0, prefix)?, grid], 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_a_matrix_sums_to_one() {
        for how in [Resample::Bicubic, Resample::BicubicNearest, Resample::Bilinear, Resample::BilinearCorners] {
            for (from, to) in [(1, 5), (4, 7), (7, 4), (14, 3), (5, 5), (2, 1)] {
                for row in how.matrix(from, to).chunks(from) {
                    let sum: f32 = row.iter().sum();
                    assert!((sum - 1.0).abs() < 1e-6, "{how:?} {from} {to}: {sum}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let table = Tensor::zeros((1, 5, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(resample(&table, 1, [2, 2], [3, 3], Resample::Bicubic).is_ok());
        assert!(resample(&table, 0, [2, 2], [3, 3], Resample::Bicubic).is_err());
        assert!(resample(&table, 1, [2, 2], [0, 3], Resample::Bicubic).is_err());
        assert!(resample(&table, 1, [2, 2], [usize::MAX, 3], Resample::Bicubic).is_err());
        assert!(resample(&table, 1, [usize::MAX, 2], [1, 1], Resample::Bicubic).is_err());
    }
}
