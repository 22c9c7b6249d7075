//! candle's modules as a runner: every device, every switch of the family.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::backend::{Backend, Kernel};
use crate::cpu::Output;
use crate::precision::Precision;
use crate::weights::Dequantised;
use crate::{Config, Error, Result, VisionTransformer, Weights};

/// What of a model's [`Output`] is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Wanted {
    /// The logits alone; for a model without a head, `pre_logits` alone. The CPU engine's last block computes no token that
    /// the head does not read.
    Logits,
    /// Logits, if there is a head, and `pre_logits`. `features` stays empty, which avoids copying every token back from a
    /// GPU.
    Head,
    /// Everything.
    #[default]
    All,
}

/// candle's modules, and where they run.
pub(super) struct Modules {
    vit: VisionTransformer,
    device: Device,
    dtype: DType,
    pool: Option<rayon::ThreadPool>,
    /// On a GPU passes take turns: candle gives each thread a stream of its own, and all of them one cuBLAS workspace.
    turn: Mutex<()>,
}

/// Whether any tensor is stored in Q8_0.
pub(super) fn quantised(weights: &dyn Weights) -> bool {
    weights.tensors().keys().any(|name| weights.is_q8_0(name))
}

impl Modules {
    /// Loads the weights to a device. `why` says why a CPU runs modules and not the engine.
    pub fn new(
        config: &Config,
        weights: &dyn Weights,
        device: Device,
        precision: Precision,
        threads: Option<usize>,
        why: Option<String>,
    ) -> Result<(Self, Backend)> {
        let quantised = quantised(weights);
        let blocks = quantised && precision != Precision::F32;
        let dtype = match (precision, device.is_cpu()) {
            (Precision::Auto | Precision::F32, _) => DType::F32,
            (Precision::Q8_0, _) if quantised => DType::F32,
            (Precision::Bf16, false) => DType::BF16,
            (Precision::F16, false) => DType::F16,
            (precision, on_cpu) => {
                let place =
                    if on_cpu { "candle's CPU modules; they have f32" } else { "a GPU; it has f32, f16 and bf16" };
                let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
                return Err(Error::unsupported(format!("precision {precision} on {place}{why}")));
            }
        };
        let plain = Dequantised(weights);
        let weights = if blocks { weights } else { &plain };
        let vit = VisionTransformer::from_weights(config, weights, dtype, &device)?;
        device.synchronize()?; // other threads have other streams, which must not run before the weights are there
        let pool = match threads {
            Some(threads) if device.is_cpu() => Some(thread_pool(threads)?),
            _ => None,
        };
        let backend = Backend {
            kernel: Kernel::of_candle(&device),
            precision: match dtype {
                _ if blocks => Precision::Q8_0,
                DType::BF16 => Precision::Bf16,
                DType::F16 => Precision::F16,
                _ => Precision::F32,
            },
            threads: pool.as_ref().map_or_else(rayon::current_num_threads, rayon::ThreadPool::current_num_threads),
            why,
            quantised,
            no_gpu: None,
        };
        Ok((Self { vit, device, dtype, pool, turn: Mutex::new(()) }, backend))
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The most images of one pass on a GPU. candle's GPU kernels count elements in 32 bits, so no tensor of a pass may have
    /// more.
    fn most(config: &Config) -> usize {
        let (n, [h, w]) = (config.num_tokens(), config.img_size);
        let heads = config.num_heads * if config.diff_attn { 2 } else { 1 };
        let widest = 3 * config.embed_dim + config.mlp_hidden; // of a token, if one projection makes q, k, v and the MLP's input
        let image = (heads * n * n).max(n * widest).max(config.in_chans * h * w);
        (i32::MAX as usize / image).max(1)
    }

    /// Runs `pass` over `[B, C, H, W]` f32, wherever that is stored, in as many parts as the device needs.
    pub fn run(
        &self,
        x: &Tensor,
        mut pass: impl FnMut(&VisionTransformer, &Tensor) -> Result<()> + Send,
    ) -> Result<()> {
        let batch = x.dim(0)?;
        let most = if self.device.is_cpu() { batch } else { Self::most(self.vit.config()) };
        let mut run = || {
            let _turn = (!self.device.is_cpu()).then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner));
            for first in (0..batch).step_by(most.max(1)) {
                let part = x.narrow(0, first, most.min(batch - first))?;
                pass(&self.vit, &part.to_device(&self.device)?.to_dtype(self.dtype)?)?;
            }
            Ok(())
        };
        match &self.pool {
            Some(pool) => pool.install(run),
            None => run(),
        }
    }

    /// Runs a batch of the host's memory.
    pub fn forward_into(&self, pixels: &[f32], batch: usize, wanted: Wanted, output: &mut Output) -> Result<()> {
        let config = self.vit.config();
        let [h, w] = config.img_size;
        let x = Tensor::from_slice(pixels, (batch, config.in_chans, h, w), &Device::Cpu)?;
        let head = config.num_classes > 0;
        *output = Output::default();
        self.run(&x, |vit, x| {
            if wanted == Wanted::Logits {
                let answer = values(&vit.forward(x)?)?;
                if head {
                    output.logits.get_or_insert_default().extend(answer);
                } else {
                    output.pre_logits.extend(answer);
                }
                return Ok(());
            }
            let tokens = vit.forward_features(x)?; // [B, N, D]
            if head {
                output.logits.get_or_insert_default().extend(values(&vit.forward_head(&tokens)?)?);
            }
            output.pre_logits.extend(values(&vit.forward_pre_logits(&tokens)?)?);
            if wanted == Wanted::All {
                output.features.extend(values(&tokens)?);
            }
            Ok(())
        })
    }

    /// A tensor for a tensor: `pass` over all images, on the device, in f32.
    pub fn map(
        &self,
        x: &Tensor,
        pass: impl Fn(&VisionTransformer, &Tensor) -> Result<Tensor> + Send + Sync,
    ) -> Result<Tensor> {
        let mut parts = Vec::new();
        self.run(x, |vit, x| {
            parts.push(pass(vit, x)?.to_dtype(DType::F32)?);
            Ok(())
        })?;
        Ok(if let [only] = parts.as_slice() { only.clone() } else { Tensor::cat(&parts, 0)? })
    }
}

/// A pool of so many threads.
pub(super) fn thread_pool(threads: usize) -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|error| Error::unsupported(format!("{threads} threads: {error}")))
}

/// A tensor's values in the host's memory, in f32.
pub(super) fn values(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::Modules;
    use crate::names::Architecture;

    #[test]
    fn no_tensor_of_a_pass_on_a_gpu_outgrows_32_bits() {
        // q, k, v and the hidden layer of 197 and of 50 tokens; the attention of 577 tokens with 16 heads
        for (name, most) in [
            ("vit_base_patch16_224", 2_147_483_647 / (197 * 7 * 768)),
            ("vit_large_patch16_384", 2_147_483_647 / (16 * 577 * 577)),
            ("vit_base_patch32_224", 2_147_483_647 / (50 * 7 * 768)),
        ] {
            assert_eq!(Modules::most(&Architecture::of(name).unwrap().config), most, "{name}");
        }
    }
}
