//! candle tensors in and out, on the engine and on a GPU alike.

use candle_core::{DType, Device, Tensor};

use super::finite::is_finite;
use super::loaded::{Loaded, Runner};
use super::modules::{Wanted, values};
use crate::cpu::Output;
use crate::{Error, Result};

/// Which of a model's tensors is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Logits,
    Features,
    PreLogits,
}

impl Loaded {
    /// What the model reads, `[B, C, H, W]` f32 and normalised, from a tensor of images.
    pub fn input(&self, x: &Tensor) -> Result<Tensor> {
        let (c, [h, w]) = (self.config().in_chans, self.config().img_size);
        let refuse = || Err(Error::Input(format!("the model reads [B, {c}, {h}, {w}], found {:?}", x.dims())));
        let dtype = x.dtype();
        if !matches!(dtype, DType::U8 | DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
            return Err(Error::Input(format!("expected floats or u8, found {}", dtype.as_str())));
        }
        let x = if x.rank() == 3 && dtype == DType::U8 { x.unsqueeze(0)? } else { x.clone() };
        let x = match *x.dims() {
            [b, d1, d2, d3] if b > 0 && [d1, d2, d3] == [c, h, w] => x,
            // TensorFlow's models and their exports have channels last
            [b, d1, d2, d3] if b > 0 && [d1, d2, d3] == [h, w, c] => x.permute((0, 3, 1, 2))?,
            _ => return refuse(),
        };
        if dtype == DType::U8 { self.normalise(&x) } else { Ok(x.to_dtype(DType::F32)?) }
    }

    /// 8-bit pixels as the model's own preprocessing normalises them: `(x / 255 − mean) / std`.
    fn normalise(&self, x: &Tensor) -> Result<Tensor> {
        let (channels, preprocess) = (self.config().in_chans, &self.checkpoint.info.preprocess);
        let per_channel = |values: &[f64]| -> Result<Tensor> {
            if values.len() != channels {
                return Err(Error::Input(format!(
                    "the model has {channels} channels, and {} values of mean or std",
                    values.len()
                )));
            }
            let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            Ok(Tensor::from_vec(values, (1, channels, 1, 1), x.device())?)
        };
        let (mean, std) = (per_channel(&preprocess.mean)?, per_channel(&preprocess.std)?);
        let x = (x.to_dtype(DType::F32)? / 255.0)?;
        Ok(x.broadcast_sub(&mean)?.broadcast_div(&std)?)
    }

    /// One of the model's tensors for a tensor of images, f32, on the device that runs the model.
    pub fn tensor(&self, x: &Tensor, answer: Answer) -> Result<Tensor> {
        let x = self.input(x)?;
        let found = self.unchecked(&x, answer)?;
        if is_finite(&found)? {
            return Ok(found);
        }
        // the first image whose answer is not finite
        for image in 0..x.dim(0)? {
            if !is_finite(&found.get(image)?)? {
                let error = Error::Output(format!("the model's answer for image {image} of the batch is not finite"));
                return Err(self.blamed(error, &values(&x.get(image)?)?));
            }
        }
        Ok(found)
    }

    fn unchecked(&self, x: &Tensor, answer: Answer) -> Result<Tensor> {
        let engine = match &self.runner {
            Runner::Engine(engine) => engine,
            Runner::Modules(modules) => {
                return modules.map(x, |vit, x| match answer {
                    Answer::Logits => vit.forward(x),
                    Answer::Features => vit.forward_features(x),
                    Answer::PreLogits => vit.forward_pre_logits(&vit.forward_features(x)?),
                });
            }
        };
        let (pixels, batch, shapes) = (values(x)?, x.dim(0)?, self.shapes(x.dim(0)?));
        let mut output = Output::default();
        let (values, shape) = match answer {
            Answer::Features => (engine.forward_features(&pixels, batch)?, shapes.features),
            Answer::Logits => {
                self.forward_into(&pixels, batch, Wanted::Logits, &mut output)?;
                match (output.logits, shapes.logits) {
                    (Some(logits), Some(shape)) => (logits, shape),
                    _ => (output.pre_logits, shapes.pre_logits),
                }
            }
            Answer::PreLogits => {
                self.forward_into(&pixels, batch, Wanted::Head, &mut output)?;
                (output.pre_logits, shapes.pre_logits)
            }
        };
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}
