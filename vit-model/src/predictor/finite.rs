//! Refuses answers with NaN or infinity, and says which module produced the first.

use candle_core::{DType, Device, Result as CandleResult, Tensor};

use super::loaded::{Loaded, Runner};
use super::modules::Modules;
use crate::cpu::Output;
use crate::vit::tap::Tap;
use crate::{Error, Result};

/// The first value that is not finite.
pub(super) fn bad(values: &[f32]) -> Option<f32> {
    values.iter().copied().find(|value| !value.is_finite())
}

/// Whether a tensor holds finite values alone, wherever it is. A product with zero is NaN for NaN and infinity.
pub(super) fn is_finite(x: &Tensor) -> CandleResult<bool> {
    let sum = x.to_dtype(DType::F32)?.affine(0.0, 0.0)?.flatten_all()?.sum_all()?;
    Ok(sum.to_scalar::<f32>()?.is_finite())
}

impl Loaded {
    /// Refuses the output for a batch if a value is not finite. `pixels` are the images, `[B, C, H, W]`.
    pub fn check(&self, pixels: &[f32], batch: usize, output: &Output) -> Result<()> {
        let parts = [output.logits.as_deref().unwrap_or_default(), &output.pre_logits, &output.features];
        for image in 0..batch {
            for part in parts {
                let row = part.len() / batch;
                let Some(found) = bad(&part[image * row..(image + 1) * row]) else { continue };
                let width = pixels.len() / batch;
                let of = if batch > 1 { format!(" for image {image} of the batch") } else { String::new() };
                let why = self.first_module(&pixels[image * width..(image + 1) * width]);
                return Err(Error::Output(format!("the model answers {found}{of}{why}")));
            }
        }
        Ok(())
    }

    /// The error with the module that is to blame, if the error is about an answer. `pixels` is the image.
    pub fn blamed(&self, error: Error, pixels: &[f32]) -> Error {
        match error {
            Error::Output(why) => Error::Output(why + &self.first_module(pixels)),
            error => error,
        }
    }

    /// Which module's output is the first with NaN or infinity for an image, in words.
    fn first_module(&self, pixels: &[f32]) -> String {
        let (config, [h, w]) = (self.config(), self.config().img_size);
        let found = self.modules().and_then(|modules| {
            let x = Tensor::from_slice(pixels, (1, config.in_chans, h, w), &Device::Cpu)?;
            modules.first_not_finite(&x)
        });
        match found {
            Ok(Some(module)) => format!("; the first module whose output is not finite is `{module}`"),
            Ok(None) if matches!(self.runner, Runner::Engine(_)) => {
                format!(
                    "; in f32 every module's output is finite, so the precision {} is to blame",
                    self.backend.precision
                )
            }
            // what the modules say is an addition: the answer is refused anyway
            _ => String::new(),
        }
    }
}

impl Modules {
    /// The first module whose output for images `[B, C, H, W]` is not finite.
    pub fn first_not_finite(&self, x: &Tensor) -> Result<Option<String>> {
        let mut watch = Watch { block: 0, first: None };
        self.run(x, |vit, x| {
            let tokens = vit.forward_tapped(x, &mut watch)?;
            for (name, values) in [
                ("norm", &tokens),
                ("the pooling", &vit.forward_pre_logits(&tokens)?),
                ("head", &vit.forward_head(&tokens)?),
            ] {
                watch.see(name, values)?;
            }
            Ok(())
        })?;
        Ok(watch.first)
    }
}

/// Notes the first module whose output is not finite.
struct Watch {
    block: usize,
    first: Option<String>,
}

impl Watch {
    fn see(&mut self, name: &str, values: &Tensor) -> CandleResult<()> {
        if self.first.is_none() && !is_finite(values)? {
            self.first = Some(name.into());
        }
        Ok(())
    }
}

impl Tap for Watch {
    fn embedded(&mut self, tokens: &Tensor) -> CandleResult<()> {
        self.see("patch_embed", tokens)
    }

    fn attention(&mut self, probabilities: &Tensor) -> CandleResult<()> {
        self.see(&format!("blocks.{}.attn", self.block), probabilities)
    }

    fn block(&mut self, index: usize, tokens: &Tensor) -> CandleResult<bool> {
        self.see(&format!("blocks.{index}"), tokens)?;
        self.block = index + 1;
        Ok(true)
    }
}
