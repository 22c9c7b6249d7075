//! `ModelInfo`: the JSON document that our files contain.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result, config::Config, preprocessing::PreprocessConfig};

/// What a model is besides its weights: the JSON document that a safetensors file of ours has in `__metadata__.config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ModelInfo {
    /// Version of this document: 1.
    pub vit: u32,
    /// The architecture.
    pub model: Config,
    /// How an image becomes the input.
    pub preprocess: PreprocessConfig,
    /// Class names, one per class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<String>>,
    /// Whether the head is a projection into the space of a two-tower model's texts, and names no classes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub projection: bool,
    /// What the logits mean.
    #[serde(default, skip_serializing_if = "ProblemType::is_default")]
    pub problem_type: ProblemType,
    /// Where the weights come from.
    #[serde(default, skip_serializing_if = "Origin::is_empty")]
    pub source: Origin,
    /// How the conversion was verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verification>,
}

impl ModelInfo {
    /// A model of unknown origin, without class names.
    pub fn new(model: Config, preprocess: PreprocessConfig) -> Self {
        Self {
            vit: 1,
            model,
            preprocess,
            labels: None,
            projection: false,
            problem_type: ProblemType::default(),
            source: Origin::new(),
            verified: None,
        }
    }

    /// The same with another origin.
    #[must_use]
    pub fn from_source(self, source: Origin) -> Self {
        Self { source, ..self }
    }

    /// The same with class names, or without.
    #[must_use]
    pub fn with_labels(self, labels: Option<Vec<String>>) -> Self {
        Self { labels, ..self }
    }

    /// The same whose head is a projection, or is not.
    #[must_use]
    pub fn with_projection(self, projection: bool) -> Self {
        Self { projection, ..self }
    }

    /// The same with another meaning of the logits.
    #[must_use]
    pub fn with_problem_type(self, problem_type: ProblemType) -> Self {
        Self { problem_type, ..self }
    }

    /// The same with one more assumption in [`source`](Self::source).
    #[must_use]
    pub fn assuming(mut self, what: impl Into<String>) -> Self {
        let mut assumed: Vec<String> = self.source.assumed().into_iter().map(str::to_owned).collect();
        assumed.push(what.into());
        self.source = self.source.with_assumed(&assumed);
        self
    }

    /// As [`assuming`](Self::assuming), for preprocessing that nothing states: what is used, and why that.
    #[must_use]
    pub fn assuming_preprocess(self, why: &str) -> Self {
        let p = &self.preprocess;
        let size = match (p.resize, p.input_size) {
            (Some(resize), [_, h, w]) => format!("{resize}, crop {h}×{w}"),
            (None, _) => format!("crop {}", p.crop_pct),
        };
        let numbers = |values: &[f64]| match values {
            [first, rest @ ..] if rest.iter().all(|value| value == first) => first.to_string(),
            values => values.iter().map(f64::to_string).collect::<Vec<_>>().join(" "),
        };
        let (mean, std) = (numbers(&p.mean), numbers(&p.std));
        let said = format!("preprocess: mean {mean}, std {std}, {size}, {} ({why})", p.interpolation);
        self.assuming(said)
    }

    /// Refuses what no model can have.
    ///
    /// # Errors
    /// An impossible architecture; another number of labels than of classes.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        if let Some(labels) = self.labels.as_ref().filter(|labels| labels.len() != self.model.num_classes) {
            let classes = self.model.num_classes;
            return Err(Error::config(format!(
                "`labels` must be {classes} names, one per class, found {}",
                labels.len()
            )));
        }
        Ok(())
    }
}

/// What a model's logits mean, under the names of transformers' `problem_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ProblemType {
    /// An image has one of the classes: probabilities are the softmax of the logits. A head of one class cannot choose, so
    /// its probability is the sigmoid of its logit.
    #[default]
    #[serde(rename = "single_label_classification")]
    SingleLabel,
    /// An image has any number of the labels: probabilities are the sigmoids of the logits.
    #[serde(rename = "multi_label_classification")]
    MultiLabel,
    /// The logits are the predicted values.
    #[serde(rename = "regression")]
    Regression,
}

impl ProblemType {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Where weights come from. It keeps what it does not know, so that a file that is read and written again loses nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Origin(BTreeMap<String, Value>);

impl Origin {
    /// Nothing is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The library or exporter that wrote the weights: `timm`, `transformers`, `pytorch`, …
    pub fn producer(&self) -> Option<&str> {
        self.text("producer")
    }

    /// That library's name for the architecture.
    pub fn architecture(&self) -> Option<&str> {
        self.text("architecture")
    }

    /// The opset of the ONNX file.
    pub fn opset(&self) -> Option<i64> {
        self.0.get("opset").and_then(Value::as_i64)
    }

    /// The SHA-256 of the ONNX file, in hexadecimal.
    pub fn sha256(&self) -> Option<&str> {
        self.text("sha256")
    }

    /// What the ONNX graph applies to the logits, which the converted model does not: `softmax`, …
    pub fn output(&self) -> Vec<&str> {
        self.list("output")
    }

    /// What the checkpoint's files, or the ONNX file, do not say and was assumed.
    pub fn assumed(&self) -> Vec<&str> {
        self.list("assumed")
    }

    /// Where the converted model computes something else than the ONNX file, and why.
    pub fn approximate(&self) -> Vec<&str> {
        self.list("approximate")
    }

    /// How far candle-onnx's answers are from the converted model's, relative to the largest; or why it has none.
    pub fn candle_onnx(&self) -> Option<Result<f64, &str>> {
        let said = self.0.get("candle_onnx")?;
        match said.get("max_rel").and_then(Value::as_f64) {
            Some(far) => Some(Ok(far)),
            None => said.get("not_run").and_then(Value::as_str).map(Err),
        }
    }

    /// Sets [`producer`](Self::producer).
    #[must_use]
    pub fn with_producer(self, producer: &str) -> Self {
        self.with("producer", producer.into())
    }

    /// Sets [`architecture`](Self::architecture).
    #[must_use]
    pub fn with_architecture(self, architecture: &str) -> Self {
        self.with("architecture", architecture.into())
    }

    /// Sets [`opset`](Self::opset).
    #[must_use]
    pub fn with_opset(self, opset: i64) -> Self {
        self.with("opset", opset.into())
    }

    /// Sets [`sha256`](Self::sha256).
    #[must_use]
    pub fn with_sha256(self, sha256: &str) -> Self {
        self.with("sha256", sha256.into())
    }

    /// Sets [`output`](Self::output); an empty list is not written.
    #[must_use]
    pub fn with_output(self, output: &[impl AsRef<str>]) -> Self {
        self.with_list("output", output)
    }

    /// Sets [`assumed`](Self::assumed); an empty list is not written.
    #[must_use]
    pub fn with_assumed(self, assumed: &[impl AsRef<str>]) -> Self {
        self.with_list("assumed", assumed)
    }

    /// Sets [`approximate`](Self::approximate); an empty list is not written.
    #[must_use]
    pub fn with_approximate(self, approximate: &[impl AsRef<str>]) -> Self {
        self.with_list("approximate", approximate)
    }

    /// Sets [`candle_onnx`](Self::candle_onnx).
    #[must_use]
    pub fn with_candle_onnx(self, said: Result<f64, &str>) -> Self {
        self.with(
            "candle_onnx",
            match said {
                Ok(far) => json!({ "max_rel": two_digits(far) }),
                Err(why) => json!({ "not_run": why }),
            },
        )
    }

    fn with(mut self, key: &str, value: Value) -> Self {
        self.0.insert(key.into(), value);
        self
    }

    fn with_list(self, key: &str, list: &[impl AsRef<str>]) -> Self {
        if list.is_empty() {
            return self;
        }
        self.with(key, list.iter().map(AsRef::as_ref).collect())
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(Value::as_str)
    }

    fn list(&self, key: &str) -> Vec<&str> {
        let list = self.0.get(key).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).collect()
    }
}

/// Two significant digits, so that the bytes of a file do not depend on the order of a sum.
fn two_digits(x: f64) -> f64 {
    format!("{x:.1e}").parse().unwrap_or(x)
}

/// How far two models' answers are apart.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Distance {
    /// The largest absolute difference.
    pub max_abs: f64,
    /// The largest difference relative to the largest magnitude.
    pub max_rel: f64,
}

impl Distance {
    /// Both distances.
    pub fn new(max_abs: f64, max_rel: f64) -> Self {
        Self { max_abs, max_rel }
    }

    fn of(value: &Value) -> Option<Self> {
        let number = |key: &str| value.get(key).and_then(Value::as_f64);
        Some(Self { max_abs: number("max_abs")?, max_rel: number("max_rel")? })
    }

    fn json(self) -> Value {
        json!({ "max_abs": two_digits(self.max_abs), "max_rel": two_digits(self.max_rel) })
    }
}

/// How a conversion was verified: what the converted model answered next to the original, or that nobody asked. It keeps
/// what it does not know, as [`Origin`] does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Verification(Value);

impl Verification {
    /// The verification was not wanted.
    pub fn skipped() -> Self {
        Self(false.into())
    }

    /// Nothing is said yet; the other constructors add to it.
    pub fn new() -> Self {
        Self(json!({}))
    }

    /// Whether the verification was not wanted.
    pub fn is_skipped(&self) -> bool {
        self.0 == false
    }

    /// How far the converted model's answers are from the original's.
    pub fn distance(&self) -> Option<Distance> {
        Distance::of(&self.0)
    }

    /// What [`Distance::max_rel`] was allowed to be.
    pub fn tolerance(&self) -> Option<f64> {
        self.0.get("tolerance").and_then(Value::as_f64)
    }

    /// How many images were tried.
    pub fn inputs(&self) -> Option<u64> {
        self.0.get("inputs").and_then(Value::as_u64)
    }

    /// What evaluated the original.
    pub fn evaluator(&self) -> Option<&str> {
        self.0.get("evaluator").and_then(Value::as_str)
    }

    /// Where the original stores halves or integers: how far its own answers are from the converted model's.
    pub fn approximation(&self) -> Option<Distance> {
        Distance::of(self.0.get("approximation")?)
    }

    /// How far quantising the weights to Q8_0 moved the answers.
    pub fn q8_0(&self) -> Option<Distance> {
        Distance::of(self.0.get("q8_0")?)
    }

    /// Of how many images the best class stays when the weights are quantised to Q8_0, and how many were tried.
    pub fn q8_0_top1(&self) -> Option<(u64, u64)> {
        match self.0.get("q8_0")?.get("top1_equal")?.as_array()?.as_slice() {
            [same, of] => Some((same.as_u64()?, of.as_u64()?)),
            _ => None,
        }
    }

    /// A proof: the distance, what was allowed, how many images were tried, and what evaluated the original.
    #[must_use]
    pub fn with_proof(self, distance: Distance, tolerance: f64, inputs: usize, evaluator: &str) -> Self {
        let Distance { max_abs, max_rel } = distance;
        self.with("max_abs", two_digits(max_abs).into())
            .with("max_rel", two_digits(max_rel).into())
            .with("tolerance", tolerance.into())
            .with("inputs", inputs.into())
            .with("evaluator", evaluator.into())
    }

    /// Which output of the original equals which answer of the model, and which outputs were not compared.
    #[must_use]
    pub fn with_outputs(self, outputs: &BTreeMap<String, String>, not_compared: &[String]) -> Self {
        let this = self.with("outputs", json!(outputs));
        if not_compared.is_empty() { this } else { this.with("not_compared", json!(not_compared)) }
    }

    /// Sets [`approximation`](Self::approximation).
    #[must_use]
    pub fn with_approximation(self, distance: Distance) -> Self {
        self.with("approximation", distance.json())
    }

    /// Sets [`q8_0`](Self::q8_0), the number of images that were tried, and [`q8_0_top1`](Self::q8_0_top1) if there are classes.
    #[must_use]
    pub fn with_q8_0(self, distance: Distance, inputs: usize, top1: Option<(usize, usize)>) -> Self {
        let mut moved = distance.json();
        if let Some(moved) = moved.as_object_mut() {
            moved.insert("inputs".into(), inputs.into());
            moved.extend(top1.map(|(same, of)| ("top1_equal".to_owned(), json!([same, of]))));
        }
        self.with("q8_0", moved)
    }

    /// Adds a key; what is no object becomes one.
    fn with(mut self, key: &str, value: Value) -> Self {
        match &mut self.0 {
            Value::Object(proof) => drop(proof.insert(key.into(), value)),
            other => *other = json!({ key: value }),
        }
        self
    }
}

impl Default for Verification {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_origin_keeps_what_it_does_not_know_and_writes_keys_in_order() {
        let text = r#"{"architecture":"vit","assumed":["a","b"],"mine":{"x":[1]},"opset":17,"producer":"pytorch"}"#;
        let origin: Origin = serde_json::from_str(text).unwrap();
        assert_eq!((origin.producer(), origin.opset(), origin.sha256()), (Some("pytorch"), Some(17), None));
        assert_eq!(origin.assumed(), ["a", "b"]);
        assert_eq!(serde_json::to_string(&origin).unwrap(), text);

        let made =
            Origin::new().with_sha256("00").with_producer("timm").with_output(&["softmax"]).with_assumed(&[""; 0]);
        assert_eq!(serde_json::to_string(&made).unwrap(), r#"{"output":["softmax"],"producer":"timm","sha256":"00"}"#);
        let candle = |said| Origin::new().with_candle_onnx(said);
        assert_eq!(candle(Ok(1.234e-6)).candle_onnx(), Some(Ok(1.2e-6)));
        assert_eq!(candle(Err("no Erf")).candle_onnx(), Some(Err("no Erf")));
    }

    #[test]
    fn a_verification_is_false_or_a_proof() {
        assert_eq!(serde_json::to_string(&Verification::skipped()).unwrap(), "false");
        let far = Distance::new(1.26e-5, 2e-6);
        let proof = Verification::new().with_proof(far, 1e-3, 4, "ours").with_q8_0(far, 4, Some((3, 4)));
        let text = r#"{"evaluator":"ours","inputs":4,"max_abs":0.000013,"max_rel":2e-6,"q8_0":{"inputs":4,"max_abs":0.000013,"max_rel":2e-6,"top1_equal":[3,4]},"tolerance":0.001}"#;
        assert_eq!(serde_json::to_string(&proof).unwrap(), text);
        let read: Verification = serde_json::from_str(text).unwrap();
        assert_eq!(read, proof);
        assert_eq!((read.distance(), read.q8_0_top1()), (Some(Distance::new(1.3e-5, 2e-6)), Some((3, 4))));
        // quantised weights are measured even if the conversion was not verified
        let measured = Verification::skipped().with_q8_0(far, 4, None);
        assert!(!measured.is_skipped() && measured.q8_0().is_some() && measured.distance().is_none());
    }
}
