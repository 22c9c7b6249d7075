//! What runs a model: the choices, and the report of what was chosen.

use std::fmt;

use crate::cpu::Isa;
use crate::precision::Precision;

/// Which code runs a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// The CPU engine with AMX tiles.
    Amx,
    /// The CPU engine with AVX-512.
    Avx512,
    /// The CPU engine with AVX2 and FMA.
    Avx2,
    /// The CPU engine on any CPU.
    Portable,
    /// candle's modules on the CPU.
    CandleCpu,
    /// candle's modules on an NVIDIA GPU.
    CandleCuda,
    /// candle's modules on an Apple GPU.
    CandleMetal,
}

impl Kernel {
    /// The kernels of the CPU engine, fastest first.
    pub const CPU: [Self; 4] = [Self::Amx, Self::Avx512, Self::Avx2, Self::Portable];

    /// The name in reports; that of an engine's kernel is what the environment variable `VIT_CPU` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::CandleCpu => "candle-cpu",
            Self::CandleCuda => "candle-cuda",
            Self::CandleMetal => "candle-metal",
            engine => engine.isa().map_or("portable", Isa::name),
        }
    }

    /// The engine's name for it, if it is the engine's.
    pub(super) fn isa(self) -> Option<Isa> {
        match self {
            Self::Amx => Some(Isa::Amx),
            Self::Avx512 => Some(Isa::Avx512),
            Self::Avx2 => Some(Isa::Avx2),
            Self::Portable => Some(Isa::Portable),
            Self::CandleCpu | Self::CandleCuda | Self::CandleMetal => None,
        }
    }

    pub(super) fn of_isa(isa: Isa) -> Self {
        Self::CPU.into_iter().find(|kernel| kernel.isa() == Some(isa)).unwrap_or(Self::Portable)
    }

    pub(super) fn of_candle(device: &candle_core::Device) -> Self {
        match device {
            candle_core::Device::Cpu => Self::CandleCpu,
            candle_core::Device::Cuda(_) => Self::CandleCuda,
            candle_core::Device::Metal(_) => Self::CandleMetal,
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What is to run a model on a CPU. On a GPU candle's modules always do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Runtime {
    /// The CPU engine, or candle's modules if the engine lacks a switch of the architecture.
    #[default]
    Auto,
    /// The CPU engine; a model that it cannot run is an error.
    Engine,
    /// candle's modules.
    Modules,
}

/// What the CPU engine does with a model's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Loading {
    /// All weights are read, packed and held. Best for a model that answers more than once.
    #[default]
    Held,
    /// The blocks are read and packed anew in every pass, two at a time. Best for a model that answers once: the first
    /// answer comes sooner and takes less memory. A damaged tensor of a block is then an error of the pass.
    Streamed,
}

/// What runs a model, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Backend {
    /// The code that runs.
    pub kernel: Kernel,
    /// How exactly it computes; never [`Precision::Auto`].
    pub precision: Precision,
    /// CPU threads.
    pub threads: usize,
    /// Why candle's modules run on a CPU, if they do.
    pub why: Option<String>,
    /// Whether the checkpoint stores matrices in Q8_0. The CPU engine, and candle's modules if [`Precision::F32`] was asked
    /// for, dequantise them.
    pub quantised: bool,
    /// Why the CPU runs the model although [`Device::Auto`](crate::Device::Auto) was asked for and this build supports a
    /// GPU.
    pub no_gpu: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::Kernel;
    use crate::cpu::Isa;

    #[test]
    fn every_instruction_set_of_the_engine_is_a_kernel_of_its_name() {
        for isa in Isa::ALL {
            assert_eq!(Kernel::of_isa(isa).name(), isa.name());
        }
    }
}
