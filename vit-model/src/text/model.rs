//! A text tower with its tokeniser and the scale of its similarities.

use candle_core::Device;

use super::config::{Similarity, TextConfig};
use super::tokenizer::Tokenizer;
use super::tower::TextTransformer;
use crate::{Error, Result, limits};

/// Texts of one run of the tower.
const BATCH: usize = 16;

/// The placeholder for the label in a template.
const SLOT: &str = "{}";

/// The template of a prompt if none is given: the one of transformers' zero-shot pipeline.
pub const DEFAULT_TEMPLATE: &str = "This is a photo of {}.";

/// Texts in, embeddings out.
#[derive(Debug)]
pub struct TextModel {
    tokenizer: Tokenizer,
    tower: TextTransformer,
    /// What cosine similarities are multiplied by and what is added then; a text tower alone has neither.
    scale: Option<(f32, f32)>,
}

impl TextModel {
    /// Joins the parts. `logits` are `logit_scale`, the logarithm of what similarities are multiplied by, and `logit_bias`.
    pub(crate) fn new(tokenizer: Tokenizer, tower: TextTransformer, logits: Option<(f32, f32)>) -> Self {
        Self { tokenizer, tower, scale: logits.map(|(scale, bias)| (scale.exp(), bias)) }
    }

    /// The architecture.
    pub fn config(&self) -> &TextConfig {
        self.tower.config()
    }

    /// The tokeniser.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The embedding of each text, `[T, D]`, not normalised.
    ///
    /// # Errors
    /// [`Error::Input`] for a text that cannot be tokenised; a lack of memory.
    pub fn embed(&self, texts: &[impl AsRef<str>]) -> Result<Vec<Vec<f32>>> {
        self.embed_ids(&self.tokenizer.encode(texts)?)
    }

    /// As [`embed`](Self::embed), of texts that were tokenised.
    ///
    /// # Errors
    /// As [`TextTransformer::forward`].
    pub fn embed_ids(&self, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::with_capacity(ids.len());
        for ids in ids.chunks(BATCH) {
            all.extend(self.tower.forward(ids)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?);
        }
        if let Some(bad) = all.iter().flatten().find(|value| !value.is_finite()) {
            return Err(Error::Output(format!("the text tower answers {bad}")));
        }
        Ok(all)
    }

    /// The logits of images and texts by their embeddings: `[B, D]` and `[T, D]` → `[B, T]`.
    ///
    /// # Errors
    /// Vectors of different lengths.
    pub fn logits(&self, images: &[Vec<f32>], texts: &[Vec<f32>]) -> Result<Vec<Vec<f32>>> {
        let texts: Vec<Vec<f32>> = texts.iter().map(|text| normalized(text)).collect();
        images.iter().map(|image| self.logits_of(image, &texts)).collect()
    }

    /// The logits of one image and of texts whose embeddings have length 1.
    pub(crate) fn logits_of(&self, image: &[f32], texts: &[Vec<f32>]) -> Result<Vec<f32>> {
        let image = normalized(image);
        let (scale, bias) = self.scale_and_bias()?;
        let logit = |text: &Vec<f32>| {
            if text.len() != image.len() {
                return Err(Error::Input(format!(
                    "an image's embedding has {} values, a text's {}",
                    image.len(),
                    text.len()
                )));
            }
            let cosine: f64 = image.iter().zip(text).map(|(&i, &t)| f64::from(i) * f64::from(t)).sum();
            Ok((cosine * f64::from(scale) + f64::from(bias)) as f32)
        };
        texts.iter().map(logit).collect()
    }

    /// What becomes of the logits.
    pub fn similarity(&self) -> Similarity {
        self.config().similarity
    }

    /// What similarities are multiplied by, and what is added to them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a text tower without an image tower, which has neither.
    pub fn scale_and_bias(&self) -> Result<(f32, f32)> {
        self.scale.ok_or_else(|| {
            Error::unsupported("this is a text tower alone, without the scale that compares texts with images")
        })
    }

    /// One vector of length 1 for each label: the mean of the normalised embeddings of its prompts, which are the templates
    /// with the label in place of `{}`, normalised again (the CLIP paper's prompt ensemble, section 3.1.4 of
    /// arXiv 2103.00020).
    ///
    /// # Errors
    /// No label or an empty one; a template without `{}`; as [`embed`](Self::embed).
    pub fn classes(&self, labels: &[impl AsRef<str>], templates: &[impl AsRef<str>]) -> Result<Vec<Vec<f32>>> {
        if labels.is_empty() {
            return Err(Error::Input("zero-shot classification needs at least one label".into()));
        }
        if let Some(at) = labels.iter().position(|label| label.as_ref().trim().is_empty()) {
            return Err(Error::Input(format!("label {} is empty", at + 1)));
        }
        let templates: Vec<&str> = match templates {
            [] => vec![DEFAULT_TEMPLATE],
            given => given.iter().map(AsRef::as_ref).collect(),
        };
        if let Some(template) = templates.iter().find(|template| !template.contains(SLOT)) {
            return Err(Error::Input(format!("the template {template:?} has no {SLOT}, where the label belongs")));
        }
        if labels.len().saturating_mul(templates.len()) > limits::PROMPTS {
            return Err(Error::Input(format!(
                "{} labels with {} templates are more than {} texts",
                labels.len(),
                templates.len(),
                limits::PROMPTS
            )));
        }
        let mut classes = Vec::with_capacity(labels.len());
        // a few labels at a time, so that memory depends on the labels alone
        for labels in labels.chunks(BATCH.div_ceil(templates.len())) {
            let prompts: Vec<String> = labels
                .iter()
                .flat_map(|label| templates.iter().map(move |template| template.replace(SLOT, label.as_ref())))
                .collect();
            for prompts in self.embed(&prompts)?.chunks(templates.len()) {
                classes.push(mean(prompts));
            }
        }
        Ok(classes)
    }
}

/// A vector divided by its length.
pub fn normalized(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    if length > 0.0 { vector.iter().map(|&v| (f64::from(v) / length) as f32).collect() } else { vector.to_vec() }
}

/// The mean of vectors of length 1, of length 1 itself.
fn mean(vectors: &[Vec<f32>]) -> Vec<f32> {
    if let [only] = vectors {
        return normalized(only);
    }
    let mut sum = vec![0.0_f64; vectors.first().map_or(0, Vec::len)];
    for vector in vectors {
        for (sum, v) in sum.iter_mut().zip(normalized(vector)) {
            *sum += f64::from(v);
        }
    }
    normalized(&sum.iter().map(|&v| (v / vectors.len() as f64) as f32).collect::<Vec<_>>())
}
