//! How exactly a model computes: the one list of precisions that the engine, candle's modules and the command line share.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// How exactly a model computes.
///
/// A CPU has `f32`, `bf16x3`, `bf16` and `int8`; a GPU has `f32`, `f16` and `bf16`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Precision {
    /// The fastest precision that is as exact as f32 on this machine. For a model so small that nothing is faster than
    /// f32, this is f32. On a checkpoint with weights in Q8_0, candle's modules use [`Q8_0`](Self::Q8_0).
    #[default]
    Auto,
    /// IEEE 754 single precision throughout.
    F32,
    /// Each f32 product of a linear layer is computed as three bf16 products; everything else is f32. Logits are within
    /// 1e-4 of f32, relative to the largest. CPU only.
    Bf16x3,
    /// Linear layers multiply bfloat16 and sum in f32; everything else is f32.
    Bf16,
    /// Linear layers of the blocks multiply 8-bit integers: weights have one scale per output channel, activations one
    /// scale and one zero point per token, which are computed as the model runs. Everything else is as in
    /// [`Bf16`](Self::Bf16) with AMX; with AVX-512 VNNI it is f32, except for the weights of the patch embedding and the
    /// head. No other CPU kernel has int8, and no GPU.
    ///
    /// The logits of a ViT-B/16 with random weights change by 3e-2 of the largest (with bf16 by 8e-3). On 192 random
    /// images, 181 predictions are the same as in f32 (189 with bf16); the others change because the two best classes of
    /// such a model are close. A model whose tokens have a few channels far larger than the others loses more, because all channels of a
    /// token share one scale.
    Int8,
    /// IEEE 754 half precision. GPU only.
    F16,
    /// Linear layers multiply the Q8_0 blocks that the checkpoint stores. [`Auto`](Self::Auto) selects it when candle's
    /// modules run such a checkpoint; the CPU engine dequantises the blocks instead.
    Q8_0,
}

impl Precision {
    /// The precisions of the CPU engine, least exact first.
    pub const CPU: [Self; 4] = [Self::Int8, Self::Bf16, Self::Bf16x3, Self::F32];

    const ALL: [Self; 7] = [Self::Auto, Self::F32, Self::Bf16x3, Self::Bf16, Self::Int8, Self::F16, Self::Q8_0];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16x3 => "bf16x3",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|precision| precision.name() == name);
        found.ok_or_else(|| Error::unsupported(format!("precision `{name}`: choose one of {known}")))
    }
}

#[cfg(test)]
mod tests {
    use super::Precision;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for precision in Precision::ALL {
            assert_eq!(precision.to_string().parse::<Precision>().unwrap(), precision);
        }
        let error = "fp8".parse::<Precision>().unwrap_err().to_string();
        assert!(error.contains("`fp8`") && error.contains("bf16x3"), "{error}");
    }
}
