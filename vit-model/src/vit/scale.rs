//! LayerScale.

use candle_core::{D, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::layers;

/// The initial factor of a model that is trained from scratch.
const LAYER_SCALE: Init = Init::Const(1e-5);

/// A learned factor per channel on a residual branch (arXiv 2103.17239).
#[derive(Clone, Debug)]
pub(super) struct LayerScale {
    gamma: Tensor,
}

impl LayerScale {
    pub(super) fn read_if_any(layer: Option<&layers::Parameter>, vb: &VarBuilder<'_>) -> Result<Option<Self>> {
        layer
            .map(|gamma| Ok(Self { gamma: vb.get_with_hints(&gamma.shape[..], &gamma.name, LAYER_SCALE)? }))
            .transpose()
    }
}

/// `x · gamma`, or `x` if the model has no LayerScale.
pub(super) fn scale_if_any(scale: Option<&LayerScale>, x: Tensor) -> Result<Tensor> {
    match scale {
        Some(scale) => x.flatten_to(D::Minus2)?.broadcast_mul(&scale.gamma)?.reshape(x.shape()),
        None => Ok(x),
    }
}
