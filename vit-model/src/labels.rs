//! Turns logits into predictions: probabilities, the most probable classes and their names.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, ProblemType, Result, inputs, limits};

/// One class of a prediction.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Prediction {
    /// Index of the class.
    pub class: usize,
    /// The class's name, or its index in decimal if the checkpoint has no names.
    pub label: String,
    /// The softmax over all classes, or the sigmoid of the logit if an image can have several labels, or if there is one
    /// class. NaN for a regression, whose answer is [`logit`](Self::logit).
    pub probability: f32,
    /// The logit of the class; for a regression, the predicted value.
    pub logit: f32,
}

/// Softmax over one row of logits. It subtracts the maximum and sums in f64, so that no finite logit overflows.
///
/// # Errors
/// [`Error::Output`] if a logit is NaN or infinite. The message names the class.
pub fn softmax(logits: &[f32]) -> Result<Vec<f32>> {
    finite(logits)?;
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let exp: Vec<f64> = logits.iter().map(|&l| (f64::from(l) - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    #[allow(clippy::as_conversions)] // rounding to f32 is intended
    let round = |p: f64| p as f32;
    Ok(exp.into_iter().map(|e| round(e / sum)).collect())
}

/// A sigmoid for each logit.
///
/// # Errors
/// As [`softmax`].
pub fn sigmoid(logits: &[f32]) -> Result<Vec<f32>> {
    finite(logits)?;
    #[allow(clippy::as_conversions)] // rounding to f32 is intended
    let sigmoid = |&l: &f32| (1.0 / (1.0 + (-f64::from(l)).exp())) as f32;
    Ok(logits.iter().map(sigmoid).collect())
}

/// Refuses logits from which no class can be named.
fn finite(logits: &[f32]) -> Result<()> {
    match logits.iter().enumerate().find(|(_, l)| !l.is_finite()) {
        Some((class, found)) => {
            Err(Error::Output(format!("the model answers {found} for class {class}, so no class can be named")))
        }
        None => Ok(()),
    }
}

/// Indices of the `k` largest values, largest first. Equal values are in index order. NaN counts as the smallest.
pub fn top_k(values: &[f32], k: usize) -> Vec<usize> {
    let by_value = |&a: &usize, &b: &usize| -> Ordering {
        let value = |i: usize| values.get(i).copied().unwrap_or(f32::NAN);
        let (x, y) = (value(a), value(b));
        x.is_nan().cmp(&y.is_nan()).then(y.partial_cmp(&x).unwrap_or(Ordering::Equal)).then(a.cmp(&b))
    };
    let mut best: Vec<usize> = (0..values.len()).collect();
    if k < best.len() {
        best.select_nth_unstable_by(k, by_value);
        best.truncate(k);
    }
    best.sort_unstable_by(by_value);
    best
}

/// The `k` most probable classes of one row of logits, the most probable first; of a regression, the first `k` values.
///
/// # Errors
/// As [`softmax`].
pub fn predictions(
    problem_type: ProblemType,
    logits: &[f32],
    labels: Option<&[String]>,
    k: usize,
) -> Result<Vec<Prediction>> {
    let probabilities = match (problem_type, logits.len()) {
        (ProblemType::Regression, count) => {
            finite(logits)?;
            vec![f32::NAN; count]
        }
        (ProblemType::MultiLabel, _) | (ProblemType::SingleLabel, 1) => sigmoid(logits)?,
        (ProblemType::SingleLabel, _) => softmax(logits)?,
    };
    let order = match problem_type {
        ProblemType::Regression => (0..logits.len()).take(k).collect(),
        _ => top_k(logits, k),
    };
    Ok(answers(order, logits, &probabilities, labels))
}

/// The classes in an order, with what the model says of them.
pub(crate) fn answers(
    order: Vec<usize>,
    logits: &[f32],
    probabilities: &[f32],
    labels: Option<&[String]>,
) -> Vec<Prediction> {
    let answer = |class| {
        let (&probability, &logit) = (probabilities.get(class)?, logits.get(class)?);
        Some(Prediction { class, label: name(labels, class), probability, logit })
    };
    order.into_iter().filter_map(answer).collect()
}

/// The name of a class, or its index in decimal if there is no name.
pub fn name(labels: Option<&[String]>, class: usize) -> String {
    labels.and_then(|l| l.get(class)).cloned().unwrap_or_else(|| class.to_string())
}

/// Reads class names, one per class in class order, in any of the formats that are common next to checkpoints:
///
/// - JSON `{"0": "daisy", …}` (`class_indices.json`) or `{"daisy": 0, …}` (`label2id`);
/// - JSON `["daisy", …]`;
/// - JSON that has one of those under `id2label`, `label2id`, `label_names` or `labels` (a `config.json`);
/// - text, one name per line.
///
/// # Errors
/// [`Error::Config`] if the format is another, an index is missing, or the text is longer than
/// `limits::LABELS_BYTES`.
pub fn parse(bytes: &[u8]) -> Result<Vec<String>> {
    let fail = |why: String| Error::config(format!("class names: {why}"));
    if bytes.len() > limits::LABELS_BYTES {
        return Err(fail(format!("{} bytes, but at most {} are read", bytes.len(), limits::LABELS_BYTES)));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| fail(format!("not UTF-8 ({e})")))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let names = if text.trim_start().starts_with(['{', '[']) {
        from_json(&serde_json::from_str(text).map_err(|e| fail(format!("not JSON ({e})")))?).map_err(fail)?
    } else {
        text.lines().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect()
    };
    if names.is_empty() {
        return Err(fail("the file contains none".into()));
    }
    Ok(names)
}

/// Reads class names from a file; see [`parse`].
///
/// # Errors
/// As [`parse`], with the file's name, and if it cannot be read.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<String>> {
    let path = path.as_ref();
    parse(&inputs::read(path, limits::LABELS_BYTES)?).map_err(|error| error.within(path))
}

fn from_json(value: &Value) -> Result<Vec<String>, String> {
    match value {
        Value::Array(names) => names.iter().map(as_name).collect(),
        Value::Object(map) => {
            for key in ["id2label", "label2id", "label_names", "labels"] {
                match map.get(key) {
                    Some(Value::Object(inner)) => return from_map(inner),
                    Some(Value::Array(names)) => return names.iter().map(as_name).collect(),
                    _ => {}
                }
            }
            from_map(map)
        }
        _ => Err("expected a list of names, or an object that maps indices to names or names to indices".into()),
    }
}

/// Reads `{"0": "daisy"}` or `{"daisy": 0}`. Every index from 0 on must occur.
fn from_map(map: &Map<String, Value>) -> Result<Vec<String>, String> {
    let by_index = map.values().all(Value::is_string);
    let mut pairs = Vec::with_capacity(map.len());
    for (key, value) in map {
        let pair = if by_index {
            (key.parse::<usize>().ok(), as_name(value)?)
        } else {
            (value.as_u64().and_then(|i| usize::try_from(i).ok()), key.clone())
        };
        match pair {
            (Some(index), name) => pairs.push((index, name)),
            (None, _) => return Err(format!("no index in `{key}`: {value}")),
        }
    }
    pairs.sort();
    let indices: BTreeSet<usize> = pairs.iter().map(|(i, _)| *i).collect();
    if let Some(hole) = (0..pairs.len()).find(|i| !indices.contains(i)) {
        return Err(format!("{} names, but none for class {hole}", pairs.len()));
    }
    Ok(pairs.into_iter().map(|(_, name)| name).collect())
}

fn as_name(value: &Value) -> Result<String, String> {
    value.as_str().map(str::to_owned).ok_or_else(|| format!("expected a name, found {value}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    #[test]
    fn softmax_survives_large_logits_and_sums_to_one() {
        let p = softmax(&[1000.0, 999.0, -1000.0]).unwrap();
        // e/(1+e) and 1/(1+e)
        assert_eq!(p, [0.731_058_6, 0.268_941_43, 0.0]);
        assert!(softmax(&[]).unwrap().is_empty());
    }

    #[test]
    fn no_class_is_named_from_nan_or_infinity() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = predictions(ProblemType::SingleLabel, &[0.0, bad], None, 1).unwrap_err().to_string();
            assert!(error.contains("class 1"), "{error}");
        }
    }

    #[test]
    fn ties_go_by_index() {
        assert_eq!(top_k(&[1.0, 3.0, 3.0, 2.0, 3.0], 2), [1, 2]);
        assert_eq!(top_k(&[0.0; 5], 3), [0, 1, 2]);
        assert_eq!(top_k(&[0.0, -0.0, 1.0], 9), [2, 0, 1]);
        assert_eq!(top_k(&[f32::NAN, 1.0, f32::NEG_INFINITY], 3), [1, 2, 0]);
        assert_eq!(top_k(&[1.0], 0), [0usize; 0]);
    }

    #[test]
    fn names_are_read_in_every_form() {
        let want = ["daisy", "rose"];
        for text in [
            r#"{"1": "rose", "0": "daisy"}"#,
            r#"{"rose": 1, "daisy": 0}"#,
            r#"["daisy", "rose"]"#,
            r#"{"id2label": {"0": "daisy", "1": "rose"}, "hidden_size": 8}"#,
            r#"{"label_names": ["daisy", "rose"]}"#,
            "\u{feff}daisy\r\nrose\r\n",
        ] {
            assert_eq!(parse(text.as_bytes()).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn names_with_holes_or_of_another_kind_are_refused() {
        for text in [
            "",
            "\n \n",
            r#"{"0": "daisy", "2": "rose"}"#,
            r#"{"daisy": 0, "rose": 0}"#,
            r#"{"a": "daisy"}"#,
            "[1, 2]",
            "{",
            r#"{"daisy": -1}"#,
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(parse(b"\xff\xfe").is_err());
    }

    #[test]
    fn probabilities_are_what_the_problem_asks_for() {
        let all = |problem, logits: &[f32]| predictions(problem, logits, None, 9).unwrap();
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let several = all(ProblemType::MultiLabel, &[-1.0, 2.0]);
        assert_eq!(several.iter().map(|p| p.class).collect::<Vec<_>>(), [1, 0]);
        assert!((several[0].probability - sigmoid(2.0)).abs() < 1e-6);
        assert!((several[1].probability - sigmoid(-1.0)).abs() < 1e-6);
        // the softmax of one logit is 1, whatever it is
        assert!((all(ProblemType::SingleLabel, &[0.5])[0].probability - sigmoid(0.5)).abs() < 1e-6);
        let values = all(ProblemType::Regression, &[-1.0, 2.0]);
        assert_eq!(values.iter().map(|p| p.logit).collect::<Vec<_>>(), [-1.0, 2.0]);
        assert!(values.iter().all(|p| p.probability.is_nan()));
    }
}
