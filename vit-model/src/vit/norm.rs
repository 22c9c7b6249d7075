//! LayerNorm and RMSNorm.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder, ops};

use crate::config::NormKind;
use crate::layers;

/// LayerNorm, or RMSNorm if there is no bias.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f32,
}

impl Norm {
    pub(crate) fn read(layer: &layers::Norm, vb: &VarBuilder<'_>) -> Result<Self> {
        let layers::Norm { name, width, kind, eps } = layer;
        let weight = vb.get_with_hints(*width, &format!("{name}.weight"), Init::Const(1.0))?;
        let bias = match kind {
            NormKind::LayerNorm => Some(vb.get_with_hints(*width, &format!("{name}.bias"), Init::Const(0.0))?),
            NormKind::RmsNorm => None,
        };
        Ok(Self { weight, bias, eps: *eps as f32 })
    }

    pub(super) fn read_if_any(layer: Option<&layers::Norm>, vb: &VarBuilder<'_>) -> Result<Option<Self>> {
        layer.map(|layer| Self::read(layer, vb)).transpose()
    }

    /// Uses candle's fused kernels, except for training and for f64, because they have no gradient and partly no f64.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let plain = x.track_op() || self.weight.track_op() || x.dtype() == DType::F64;
        match (&self.bias, plain) {
            (Some(bias), false) => ops::layer_norm(&x.contiguous()?, &self.weight, bias, self.eps),
            (Some(bias), true) => ops::layer_norm_slow(x, &self.weight, bias, self.eps),
            (None, false) => ops::rms_norm(&x.contiguous()?, &self.weight, self.eps),
            (None, true) => ops::rms_norm_slow(x, &self.weight, self.eps),
        }
    }
}

/// `norm(x)`, or `x` if there is no norm.
pub(super) fn norm_if_any(norm: Option<&Norm>, x: Tensor) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}
