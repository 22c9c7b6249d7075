//! A linear layer, in the form that suits training, inference on a GPU, or quantised weights.

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::layers;
use crate::weights::{Q8_0_BLOCK, Q8_0_BLOCK_BYTES};

/// Initial values of the weights of a model that is trained from scratch; a checkpoint's values replace them.
pub(super) const WEIGHT: Init = Init::Randn { mean: 0.0, stdev: 0.02 };

/// The suffix under which a `VarBuilder` offers weights as blocks of Q8_0: `blocks.0.attn.proj.weight.q8_0`.
pub(super) const Q8_0: &str = ".q8_0";

/// `x Wᵀ + b`
#[derive(Clone, Debug)]
pub(crate) enum Linear {
    /// For training, and for layers without a bias.
    Plain(Tensor, Option<Tensor>),
    /// `[x 1] [W b]ᵀ`: the bias is a column of the weights, followed by zeros up to a multiple of eight, because
    /// candle's GPU kernels take longer to add a bias than to multiply.
    Joined(Tensor),
    /// Weights in blocks of Q8_0. candle quantises `x` row by row in the same way. There is no gradient.
    Quantised(QMatMul, Option<Tensor>),
}

impl Linear {
    /// Reads a layer from `vb`, in blocks of Q8_0 if `vb` has it so.
    pub(crate) fn read(layer: &layers::Linear, vb: &VarBuilder<'_>) -> Result<Self> {
        let layers::Linear { name, inputs, outputs, bias } = layer;
        let bias = bias.then(|| vb.get_with_hints(*outputs, &format!("{name}.bias"), Init::Const(0.0))).transpose()?;
        let weight = format!("{name}.weight");
        let blocks = format!("{weight}{Q8_0}");
        // some backends claim to have every tensor
        if vb.contains_tensor(&blocks)
            && let Ok(blocks) = vb.get_unchecked_dtype(&blocks, DType::U8)
        {
            let row = inputs / Q8_0_BLOCK * Q8_0_BLOCK_BYTES;
            if !inputs.is_multiple_of(Q8_0_BLOCK) || blocks.dims() != [*outputs, row] {
                let found = blocks.dims();
                candle_core::bail!("{name}: {found:?} bytes of blocks for a weight of [{outputs}, {inputs}]");
            }
            let storage = QStorage::from_data(blocks.flatten_all()?.to_vec1()?.into(), vb.device(), GgmlDType::Q8_0)?;
            let weight = QTensor::new(storage, (*outputs, *inputs))?;
            return Ok(Self::Quantised(QMatMul::from_qtensor(weight)?, bias));
        }
        Self::new(vb.get_with_hints((*outputs, *inputs), &weight, WEIGHT)?, bias)
    }

    pub(super) fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        match bias {
            // a copy of a broadcast weight would take memory that the weight itself does not
            Some(bias) if !weight.track_op() && !bias.track_op() && weight.is_contiguous() => {
                let columns = 8 - weight.dim(1)? % 8;
                let bias = bias.unsqueeze(1)?.pad_with_zeros(1, 0, columns - 1)?;
                Ok(Self::Joined(Tensor::cat(&[weight, bias], 1)?))
            }
            bias => Ok(Self::Plain(weight, bias)),
        }
    }

    /// Where the weights are.
    pub(super) fn device(&self) -> &Device {
        match self {
            Self::Plain(weight, _) | Self::Joined(weight) => weight.device(),
            Self::Quantised(_, Some(bias)) => bias.device(),
            Self::Quantised(_, None) => &Device::Cpu,
        }
    }

    /// `[…, K] → […, O]`
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.flatten_to(D::Minus2)?; // [R, K]
        let y = match self {
            Self::Plain(weight, None) => rows.matmul(&weight.t()?)?,
            Self::Plain(weight, Some(bias)) => rows.matmul(&weight.t()?)?.broadcast_add(bias)?,
            Self::Joined(weight) => {
                let (r, k) = rows.dims2()?;
                let ones = Tensor::ones((r, weight.dim(1)?.saturating_sub(k)), rows.dtype(), rows.device())?;
                Tensor::cat(&[&rows, &ones], 1)?.matmul(&weight.t()?)?
            }
            Self::Quantised(weight, bias) => {
                let y = weight.forward(&rows.to_dtype(DType::F32)?.contiguous()?)?.to_dtype(x.dtype())?;
                if let Some(bias) = bias { y.broadcast_add(bias)? } else { y }
            }
        };
        y.reshape([&x.dims()[..x.rank() - 1], &y.dims()[1..]].concat()) // [R, O]
    }
}
