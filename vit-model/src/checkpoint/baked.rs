//! Words as an ordinary head: a two-tower model becomes a classifier without texts.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{computed::Computed, model::Checkpoint};
use crate::text::Similarity;
use crate::{Error, Result, random::SplitMix64};

/// Images of noise whose embeddings are measured.
const SAMPLES: u8 = 8;

impl Checkpoint {
    /// Bakes classes that are words into a linear head, so that the model is an ordinary classifier: `head(x) = s · T (P x) + b`,
    /// in which `P` is the projection and `T` holds a vector of length 1 for each label ([`TextModel::classes`](crate::TextModel::classes)).
    ///
    /// A linear head cannot divide by the length of an image's embedding, as the two towers do. `s` is the model's scale divided
    /// by the mean length over images of noise. The order of a CLIP's classes is exact; its probabilities are as sharp as those
    /// of an image whose embedding has that length. The document says so under `approximate`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model without a text tower; as [`TextModel::classes`](crate::TextModel::classes) and [`Self::model`].
    pub fn with_classes(&self, labels: &[impl AsRef<str>], templates: &[impl AsRef<str>]) -> Result<Self> {
        let source = self.text().ok_or_else(|| {
            Error::unsupported("words become classes only with a text tower; the folders of CLIP and SigLIP have one")
        })?;
        let text = source.load(&Device::Cpu)?;
        let (scale, bias) = text.scale_and_bias()?;
        let classes = text.classes(labels, templates)?;
        let (count, width) = (classes.len(), text.config().output_dim());
        let classes = Tensor::from_vec(classes.concat(), (count, width), &Device::Cpu)?;

        let length = self.length()?;
        let factor = f64::from(scale) / length;
        let read = |name: &str| -> Result<Option<Tensor>> {
            let Some(info) = self.weights.tensors().get(name) else { return Ok(None) };
            Ok(Some(Tensor::from_vec(self.weights.read_f32(name)?, info.shape.as_slice(), &Device::Cpu)?))
        };
        let head = if self.info.projection { read("head.weight")? } else { None };
        let (weight, shift) = match head {
            Some(projection) => {
                let shift = match read("head.bias")? {
                    Some(shift) => Some(classes.matmul(&shift.unsqueeze(1)?)?.squeeze(1)?),
                    None => None,
                };
                (classes.matmul(&projection)?, shift) // [L, D] [D, E]
            }
            None => (classes, None),
        };
        let weight = weight.affine(factor, 0.0)?;
        let shift = match shift {
            Some(shift) => shift.affine(factor, f64::from(bias))?,
            None => Tensor::full(bias, count, &Device::Cpu)?,
        };

        let mut info = self.info.clone();
        info.model.num_classes = count;
        info.model.head_bias = true;
        info.projection = false;
        info.labels = Some(labels.iter().map(|label| label.as_ref().to_owned()).collect());
        let mut notes: Vec<String> = info.source.approximate().into_iter().map(str::to_owned).collect();
        notes.push(format!(
            "the head holds {count} labels in words; logits are those of an image whose embedding has the length {length:.3}"
        ));
        if text.similarity() == Similarity::Sigmoid {
            notes.push("the two towers end in a sigmoid for each class".into());
        }
        info.source = info.source.with_approximate(&notes);
        let mut weights = Computed::new(self.weights.clone());
        weights.put("head.weight", &weight)?;
        weights.put("head.bias", &shift)?;
        Self::new(info, Arc::new(weights))
    }

    /// The mean length of the embeddings of images of noise.
    fn length(&self) -> Result<f64> {
        let c = &self.info.model;
        let model = self.model(DType::F32, &Device::Cpu)?;
        let [h, w] = c.img_size;
        let shape = [usize::from(SAMPLES), c.in_chans, h, w];
        let x = Tensor::from_vec(SplitMix64(0).normal(shape.iter().product()), shape.as_slice(), &Device::Cpu)?;
        let rows = model.forward(&x)?.to_vec2::<f32>()?; // without a head, what the head would read
        let norm = |row: &Vec<f32>| row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
        let mean = rows.iter().map(norm).sum::<f64>() / f64::from(SAMPLES);
        if mean.is_finite() && mean > 0.0 {
            return Ok(mean);
        }
        Err(Error::Output(format!("the embeddings of images have the length {mean}")))
    }
}
