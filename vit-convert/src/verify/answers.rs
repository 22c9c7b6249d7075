//! The model's answers in every form that a graph's output may have, and the distance of an output from them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use vit_model::predictor::{Output, Wanted};
use vit_model::{Config, Predictor};

use super::difference::Difference;
use super::inputs;
use super::run::Value;
use crate::onnx::graph::ValueInfo;

/// One form of the model's answer.
struct Answer {
    name: String,
    /// With the batch first.
    dims: Vec<usize>,
    data: Vec<f64>,
    /// Applied to both sides before they are compared.
    lens: fn(f64) -> f64,
}

/// Every form of the model's answers to some images.
pub(super) struct Answers {
    forms: Vec<Answer>,
    /// The classes' scores `[B, K]`, for outputs that pick some of them.
    scores: Option<(usize, Vec<f64>)>,
}

/// Part of the name of every form that comes from the head.
const LOGITS: &str = "logits";

/// Small probabilities are compared by their logarithm, so that a wrong logit shows behind a softmax. Continuous at ½,
/// with the same slope.
fn log_below_half(p: f64) -> f64 {
    if p < 0.5 { p.max(1e-30).ln() } else { 0.5f64.ln() + 2.0 * (p - 0.5) }
}

/// A value that is compared as it is.
fn same(x: f64) -> f64 {
    x
}

impl Answers {
    /// All forms, from what the model answers to `batch` images. `unit`: the graph divides its answer by its length.
    pub(super) fn of(model: &Predictor, pixels: &[f32], batch: usize, unit: bool) -> vit_model::Result<Self> {
        let config = model.config();
        let mut output = Output::default();
        model.forward_into(pixels, batch, Wanted::All, &mut output)?;
        let Output { logits, features, pre_logits, .. } = output;
        let shapes = model.shapes(batch);
        let pooled = Tensor::from_vec(pre_logits, shapes.pre_logits, &Device::Cpu)?;
        let logits =
            logits.zip(shapes.logits).map(|(z, shape)| Tensor::from_vec(z, shape, &Device::Cpu)).transpose()?;
        let tokens = Tensor::from_vec(features, shapes.features, &Device::Cpu)?;
        let mut forms = Vec::new();
        let mut scores = None;
        if let Some(logits) = logits {
            let (dims, z) = read(&logits)?;
            let k = config.num_classes;
            let rows = || z.chunks(k);
            let log_softmax: Vec<f64> = rows().flat_map(log_softmax).collect();
            let softmax = log_softmax.iter().map(|x| x.exp()).collect();
            let sigmoid = z.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
            let mut form =
                |name: &str, data, lens| forms.push(Answer { name: name.into(), dims: dims.clone(), data, lens });
            form(LOGITS, z.clone(), same);
            if unit {
                form("logits of unit length", unit_length(&z, k), same);
            }
            form("softmax(logits)", softmax, log_below_half);
            form("log_softmax(logits)", log_softmax, same);
            form("sigmoid(logits)", sigmoid, log_below_half);
            scores = (dims.len() == 2).then_some((k, z));
        }
        let mut form = |name: String, t: &Tensor| -> vit_model::Result<()> {
            let (dims, data) = read(t)?;
            forms.push(Answer { name, dims, data, lens: same });
            Ok(())
        };
        form(if config.num_classes > 0 { "pre_logits".into() } else { "pooled features".into() }, &pooled)?;
        if unit {
            let (dims, data) = read(&pooled)?;
            let data = unit_length(&data, dims.last().copied().unwrap_or(1));
            forms.push(Answer { name: "pooled features of unit length".into(), dims, data, lens: same });
        }
        let mut form = |name: String, t: &Tensor| -> vit_model::Result<()> {
            let (dims, data) = read(t)?;
            forms.push(Answer { name, dims, data, lens: same });
            Ok(())
        };
        form("tokens".into(), &tokens)?;
        let prefix = config.num_prefix_tokens();
        for i in 0..prefix.min(2) {
            form(format!("token {i}"), &tokens.narrow(1, i, 1)?.squeeze(1)?)?;
        }
        let patches = tokens.narrow(1, prefix, config.num_patches())?;
        let [gh, gw] = config.grid();
        form("map of patch tokens".into(), &patches.transpose(1, 2)?.reshape((batch, config.embed_dim, gh, gw))?)?;
        form("patch tokens".into(), &patches)?;
        Ok(Self { forms, scores })
    }

    /// The form that an output is closest to, and the difference; `None` if the model has no answer of its shape.
    pub(super) fn closest(&self, value: &Value, tolerance: f64) -> Option<(String, Difference)> {
        let shape = |dims: &[usize]| dims.iter().copied().filter(|&d| d != 1).collect::<Vec<_>>();
        let found = value.to_f64().ok()?;
        if !value.is_real() {
            return self.picked_classes(&found, tolerance);
        }
        let wanted = shape(&value.dims);
        // NaN sorts last
        let best = |a: &(String, Difference), b: &(String, Difference)| a.1.rel.abs().total_cmp(&b.1.rel.abs());
        let through = |name: &str, data: &[f64], lens: fn(f64) -> f64| {
            let see = |x: &[f64]| x.iter().map(|&x| lens(x)).collect::<Vec<_>>();
            (name.to_string(), Difference::between(&see(&found), &see(data)))
        };
        let fitting = self.forms.iter().filter(|a| a.data.len() == found.len() && shape(&a.dims) == wanted);
        let all: Vec<_> = fitting.map(|a| through(&a.name, &a.data, a.lens)).collect();
        if let Some(hit) = all.iter().min_by(|a, b| best(a, b)) {
            // if no form is close, the difference from the plainest form is the most helpful
            return Some(if hit.1.within(tolerance) { hit.clone() } else { all[0].clone() });
        }
        // the largest few of the classes' scores
        let (k, _) = self.scores.as_ref()?;
        let batch = self.forms.first()?.data.len() / k;
        let picked = found.len().checked_div(batch).filter(|&p| p > 0 && p < *k && p * batch == found.len())?;
        let of_head = self.forms.iter().filter(|a| a.name.contains(LOGITS) && a.name != "pre_logits");
        let top = of_head.map(|a| {
            let top: Vec<f64> = a.data.chunks(*k).flat_map(|row| sorted(row).into_iter().take(picked)).collect();
            through(&format!("top {picked} of {}", a.name), &top, a.lens)
        });
        top.min_by(best)
    }

    /// Class numbers. The model must score those classes as high as its own best, up to rounding.
    fn picked_classes(&self, found: &[f64], tolerance: f64) -> Option<(String, Difference)> {
        let (k, z) = self.scores.as_ref()?;
        let batch = z.len() / k;
        let picked = found.len().checked_div(batch).filter(|&p| p > 0 && p <= *k && p * batch == found.len())?;
        let scale = z.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
        let mut worst = 0f64;
        for (row, ids) in z.chunks(*k).zip(found.chunks(picked)) {
            for (best, &id) in sorted(row).into_iter().zip(ids) {
                let score = row.get(id as usize).filter(|_| id >= 0.0).copied().unwrap_or(f64::INFINITY);
                worst = worst.max((best - score).abs());
            }
        }
        // a tie within rounding is not a difference
        let difference = Difference { abs: worst, rel: worst / scale };
        let none = Difference { abs: 0.0, rel: 0.0 };
        let name = if picked == 1 { "best class".into() } else { format!("best {picked} classes") };
        Some((name, if difference.within(tolerance.min(1.0)) { none } else { difference }))
    }
}

/// Each row divided by its Euclidean length.
fn unit_length(rows: &[f64], width: usize) -> Vec<f64> {
    let unit = |row: &[f64]| {
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter().map(|x| x / length).collect::<Vec<_>>()
    };
    rows.chunks(width.max(1)).flat_map(unit).collect()
}

fn sorted(row: &[f64]) -> Vec<f64> {
    let mut row = row.to_vec();
    row.sort_by(|a, b| b.total_cmp(a));
    row
}

fn log_softmax(row: &[f64]) -> Vec<f64> {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum = row.iter().map(|x| (x - top).exp()).sum::<f64>().ln();
    row.iter().map(|x| x - top - sum).collect()
}

/// Could a declared output be an answer of the model? It is no answer if its declared shape is that of no form of an
/// answer, and if it has more elements than classes could be picked. `batch`: the batch that the graph is fixed to.
pub(super) fn possible(config: &Config, output: &ValueInfo, batch: Option<u64>) -> bool {
    /// No form of an answer has as many axes.
    const RANK: usize = 16;
    let Some(shape) = output.shape.as_ref().filter(|shape| shape.len() <= RANK) else { return true };
    let [gh, gw] = config.grid();
    let (tokens, patches, width) = (config.num_tokens(), config.num_patches(), config.embed_dim);
    let mut forms = vec![vec![width], vec![tokens, width], vec![patches, width], vec![width, gh, gw]];
    if config.num_classes > 0 {
        forms.push(vec![config.num_classes]);
        let fixed = shape.iter().flatten().fold(1u64, |n, &d| n.saturating_mul(d));
        if fixed / batch.unwrap_or(1).max(1) <= config.num_classes as u64 {
            return true;
        }
    }
    // axes of length 1 say nothing, so only the longer ones are compared
    let declared: Vec<Option<u64>> = shape.iter().copied().filter(|&d| d != Some(1)).collect();
    let batches = batch.map_or_else(|| inputs::BATCHES.map(|b| b as u64).to_vec(), |b| vec![b]);
    batches.into_iter().any(|batch| {
        forms.iter().any(|form| {
            let whole = std::iter::once(batch).chain(form.iter().map(|&n| n as u64));
            fits(&declared, &whole.filter(|&n| n != 1).collect::<Vec<_>>())
        })
    })
}

/// Could a declared shape be this one? An undeclared size (`None`) can be any, including 1.
fn fits(declared: &[Option<u64>], shape: &[u64]) -> bool {
    match (declared.split_first(), shape.split_first()) {
        (None, None) => true,
        (Some((None, rest)), _) if fits(rest, shape) => true,
        (Some((d, rest)), Some((n, other))) => d.is_none_or(|d| d == *n) && fits(rest, other),
        _ => false,
    }
}

/// A tensor's shape and elements.
pub(super) fn read(t: &Tensor) -> vit_model::Result<(Vec<usize>, Vec<f64>)> {
    let data: Vec<f32> = t.flatten_all()?.to_vec1()?;
    Ok((t.dims().to_vec(), data.into_iter().map(f64::from).collect()))
}

/// Do the matched outputs cover the model? If it has a head, one of them must come from it.
pub(super) fn enough(config: &Config, outputs: &BTreeMap<String, String>) -> Result<(), String> {
    let head = outputs.values().any(|a| a.contains("class") || a.contains(LOGITS) && a != "pre_logits");
    if outputs.is_empty() {
        return Err("no output of the graph has the shape of an answer of the converted model".into());
    }
    if config.num_classes > 0 && !head {
        let found: Vec<_> = outputs.values().map(String::as_str).collect();
        return Err(format!("the converted model has a head, but the graph's outputs are only {}", found.join(", ")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_no_answer_only_if_its_declared_shape_rules_that_out() {
        // 9 patches and a class token, 20 wide, 3 heads, 7 classes
        let mut config = Config::vit([12, 12], [4, 4], 20, 1, 1);
        config.num_classes = 7;
        let output = |shape: Option<&[u64]>| {
            let shape = shape.map(|s| s.iter().map(|&d| (d > 0).then_some(d)).collect());
            ValueInfo { id: 0, dtype: None, shape }
        };
        // 0 means that the size is not declared
        for (shape, batch, want) in [
            (None, None, true),
            (Some(&[0, 7][..]), None, true),
            (Some(&[0, 20]), None, true),
            (Some(&[0, 10, 20]), None, true),
            (Some(&[0, 9, 20]), None, true),
            (Some(&[0, 20, 3, 3]), None, true),
            (Some(&[4, 10, 20]), Some(4), true),
            (Some(&[1, 1, 20]), Some(1), true),
            (Some(&[0, 0, 0]), None, true),
            (Some(&[0, 0, 20]), None, true),
            // the best class, the best three, and what is small enough to be taken for them
            (Some(&[0]), None, true),
            (Some(&[0, 3]), None, true),
            (Some(&[4, 7]), Some(4), true),
            (Some(&[0, 2, 3]), None, true),
            // attention maps, keys by head, tokens of another width
            (Some(&[0, 3, 10, 10]), None, false),
            (Some(&[1, 3, 10, 10]), Some(1), false),
            (Some(&[0, 3, 10, 7]), None, false),
            (Some(&[0, 10, 21]), None, false),
            (Some(&[0, 8, 20]), None, false),
            (Some(&[0, 8]), None, false),
            (Some(&[3, 10, 20]), Some(4), false),
        ] {
            assert_eq!(possible(&config, &output(shape), batch), want, "{shape:?}");
        }
    }
}
