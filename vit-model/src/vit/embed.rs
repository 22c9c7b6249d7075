//! The patch embedding: pixels → tokens.

use candle_core::{Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::linear::{Linear, WEIGHT};
use super::norm::{Norm, norm_if_any};
use crate::layers;

/// Projects each patch to a token. As its stride is its kernel, the convolution is a matrix product.
#[derive(Clone, Debug)]
pub(super) struct PatchEmbed {
    proj: Linear,
    norm: Option<Norm>,
    patch_size: [usize; 2],
}

impl PatchEmbed {
    pub(super) fn read(layer: &layers::PatchEmbed, vb: &VarBuilder<'_>) -> Result<Self> {
        let (layers::Linear { name, inputs, outputs, bias }, [_, _, height, width]) = (&layer.proj, layer.kernel);
        let weight = vb.get_with_hints(&layer.kernel[..], &format!("{name}.weight"), WEIGHT)?;
        let bias = bias.then(|| vb.get_with_hints(*outputs, &format!("{name}.bias"), Init::Const(0.0))).transpose()?;
        let norm = Norm::read_if_any(layer.norm.as_ref(), vb)?;
        let proj = Linear::new(weight.reshape((*outputs, *inputs))?, bias)?;
        Ok(Self { proj, norm, patch_size: [height, width] })
    }

    /// Where the weights are.
    pub(super) fn device(&self) -> &Device {
        self.proj.device()
    }

    /// `[B, C, h, w] → [B, N, D]`. Pixels to the right of and below the last whole patch are ignored.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let [ph, pw] = self.patch_size;
        let (rows, columns) = (h / ph, w / pw);
        let x = x.narrow(2, 0, rows * ph)?.narrow(3, 0, columns * pw)?;
        let x = x.reshape((b, c, rows, ph, columns, pw))?.permute((0, 2, 4, 1, 3, 5))?; // [B, rows, columns, C, ph, pw]
        let x = x.reshape((b, rows * columns, c * ph * pw))?; // [B, N, C·ph·pw]
        norm_if_any(self.norm.as_ref(), self.proj.forward(&x)?) // [B, N, D]
    }
}
