//! The models that are served, by name.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use anyhow::bail;
use axum::http::StatusCode;
use serde_json::{Value, json};
use vit_model::labels::Prediction;
use vit_model::{Predictor, image::Image};

use super::batch::{Answer, Queue};
use super::fault::Fault;
use super::metrics::Metrics;
use crate::args::ServeArgs;
use crate::open;

/// A loaded model.
pub struct Model {
    pub name: String,
    pub predictor: Arc<Predictor>,
    pub queue: Queue,
}

impl Model {
    /// The `k` most probable classes.
    pub fn predictions(&self, answer: &Answer, k: usize) -> Result<Vec<Prediction>, Fault> {
        let Some(logits) = answer.logits.as_deref().filter(|logits| logits.len() == self.classes()) else {
            return Err(Fault::input(format!(
                "the model `{}` names no classes; /embed and /v1/embeddings give its features",
                self.name
            )));
        };
        Ok(self.predictor.predictions(logits, k)?)
    }

    /// The embedding that a user of the model expects: in the space that images share with texts, if the model has one.
    pub fn embedding(&self, answer: &Answer) -> Result<Vec<f32>, Fault> {
        let projected = answer.logits.as_ref().filter(|_| self.predictor.info().projection);
        let vector = projected.unwrap_or(&answer.pre_logits);
        if vector.iter().all(|value| value.is_finite()) {
            Ok(vector.clone())
        } else {
            Err(Fault::internal("the model answers values that are not finite"))
        }
    }

    /// How many classes it tells apart by itself.
    pub fn classes(&self) -> usize {
        if self.predictor.is_two_tower() { 0 } else { self.predictor.config().num_classes }
    }

    /// How likely each of some labels is for a picture, the most likely first.
    pub fn zero_shot(&self, image: &Image, labels: &[String], templates: &[String]) -> Result<Vec<Prediction>, Fault> {
        let classes = self.predictor.zero_shot(labels, templates).map_err(|error| Fault::input(&error))?;
        Ok(classes.classify(image, labels.len())?)
    }

    /// `[C, H, W]` of the input.
    pub fn input(&self) -> [usize; 3] {
        let config = self.predictor.config();
        let [h, w] = config.img_size;
        [config.in_chans, h, w]
    }

    /// A picture as the model reads it.
    pub fn pixels(&self, image: &Image) -> Result<Vec<f32>, Fault> {
        Ok(self.predictor.preprocess()?.apply(image)?)
    }

    /// What a client may want to know.
    pub fn info(&self) -> Value {
        let (info, backend) = (self.predictor.info(), self.predictor.backend());
        let [channels, height, width] = self.input();
        json!({
            "id": self.name,
            "architecture": info.source.architecture(),
            "input": [channels, height, width],
            "classes": self.classes(),
            "labels": self.predictor.labels().is_some(),
            "embedding": self.predictor.embedding_len(),
            "zero_shot": self.predictor.is_two_tower(),
            "blocks": info.model.depth,
            "heads": info.model.num_heads,
            "kernel": backend.kernel.to_string(),
            "precision": backend.precision.to_string(),
            "threads": backend.threads,
        })
    }
}

/// Every model, in the order of the command line.
pub struct Models(Vec<Arc<Model>>);

impl Models {
    pub fn load(args: &ServeArgs, verbose: bool, metrics: &Arc<Metrics>) -> anyhow::Result<Self> {
        let mut models: Vec<Arc<Model>> = Vec::new();
        for given in &args.model {
            let (name, model) = named(given);
            if models.iter().any(|other| other.name == name) {
                bail!("two models are called `{name}`: name them, as in `--model one={}`", crate::output::show(model));
            }
            let predictor = Arc::new(open::predictor(&model, open::builder(args.run), verbose)?);
            open::state_assumptions(predictor.info());
            let waiting = usize::from(args.max_batch).saturating_mul(2);
            let queue = Queue::new(predictor.clone(), waiting, args.max_batch.into(), metrics.clone())?;
            models.push(Arc::new(Model { name, predictor, queue }));
        }
        Ok(Self(models))
    }

    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|model| model.name.clone()).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.0.iter()
    }

    /// A model by name; the first one if no name is given.
    pub fn get(&self, name: Option<&str>) -> Result<&Arc<Model>, Fault> {
        let found = match name {
            None | Some("") => self.0.first(),
            Some(name) => self.0.iter().find(|model| model.name == name),
        };
        found.ok_or_else(|| {
            let (name, known) = (name.unwrap_or_default(), self.names().join("`, `"));
            Fault::new(StatusCode::NOT_FOUND, format!("there is no model `{name}`; this server has `{known}`"))
        })
    }
}

/// `name=MODEL`, or a MODEL, which is then called as its file or repository is.
fn named(given: &OsStr) -> (String, OsString) {
    if let Some((name, model)) = given.to_str().and_then(|text| text.split_once('='))
        && !name.is_empty()
        && !name.contains(['/', '\\', '.'])
        && !Path::new(given).exists()
    {
        return (name.to_owned(), model.into());
    }
    let path = Path::new(given);
    let name = if path.is_file() {
        path.file_stem()
    } else if path.is_dir() {
        path.file_name()
    } else {
        Some(given)
    };
    (name.unwrap_or(given).to_string_lossy().into_owned(), given.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_called_as_they_are_named_or_as_their_file_is() {
        for (given, name, model) in [
            ("digits", "digits", "digits"),
            ("flowers=timm/vit_tiny_patch16_224", "flowers", "timm/vit_tiny_patch16_224"),
            ("timm/vit_tiny_patch16_224", "timm/vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"),
            ("./a=b.safetensors", "./a=b.safetensors", "./a=b.safetensors"),
        ] {
            assert_eq!(named(given.as_ref()), (name.into(), model.into()), "{given}");
        }
    }
}
