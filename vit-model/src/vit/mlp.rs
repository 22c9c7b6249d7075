//! The multilayer perceptron of a block, plain or gated, and its activations.

use candle_core::{D, Result, Tensor};
use candle_nn::{VarBuilder, ops};

use super::linear::Linear;
use super::norm::{Norm, norm_if_any};
use crate::config::Activation;
use crate::layers::{self, MlpInput};

impl Activation {
    pub(crate) fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
            Self::QuickGelu => x * ops::sigmoid(&(x * 1.702)?)?,
            Self::Relu => x.relu(),
            Self::Silu => x.silu(),
        }
    }
}

/// The first projection of an MLP, with its activation.
#[derive(Clone, Debug)]
enum Gate {
    /// `act(fc1(x))`
    None(Linear),
    /// `act(fc1_g(x)) · fc1_x(x)`
    Split(Linear, Linear),
    /// `act(a) · b` with `[a, b] = fc1(x)`
    Packed(Linear),
}

/// The multilayer perceptron of a block: a wider hidden layer and back.
#[derive(Clone, Debug)]
pub(super) struct Mlp {
    fc1: Gate,
    act: Activation,
    norm: Option<Norm>,
    fc2: Linear,
}

impl Mlp {
    pub(super) fn read(layers: &layers::Mlp, act: Activation, vb: &VarBuilder<'_>) -> Result<Self> {
        let fc1 = match &layers.fc1 {
            MlpInput::Plain(fc1) => Gate::None(Linear::read(fc1, vb)?),
            MlpInput::Split { gate, value } => Gate::Split(Linear::read(gate, vb)?, Linear::read(value, vb)?),
            MlpInput::Packed(fc1) => Gate::Packed(Linear::read(fc1, vb)?),
        };
        let norm = Norm::read_if_any(layers.norm.as_ref(), vb)?;
        Ok(Self { fc1, act, norm, fc2: Linear::read(&layers.fc2, vb)? })
    }

    /// `[B, N, D] → [B, N, D]`
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = match &self.fc1 {
            Gate::None(fc1) => self.act.forward(&fc1.forward(x)?)?,
            Gate::Split(gate, value) => (self.act.forward(&gate.forward(x)?)? * value.forward(x)?)?,
            Gate::Packed(fc1) => {
                let both = fc1.forward(x)?.chunk(2, D::Minus1)?;
                (self.act.forward(&both[0])? * &both[1])?
            }
        };
        self.fc2.forward(&norm_if_any(self.norm.as_ref(), hidden)?)
    }
}
