//! What a model answers, in every form that a graph's output may take, and how far an output is from it.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use vit_model::{Config, Predictor, cpu::Output};

use super::is_real;
use super::run::Value;

/// How far an output is from an answer.
#[derive(Clone, Copy, Debug)]
pub struct Difference {
    /// Largest absolute difference.
    pub abs: f64,
    /// The same, divided by the output's largest magnitude.
    pub rel: f64,
}

impl Difference {
    /// NaN is never within.
    pub(super) fn within(self, tolerance: f64) -> bool {
        self.rel <= tolerance
    }

    fn between(graph: &[f64], model: &[f64]) -> Self {
        let scale = graph.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
        let abs = graph.iter().zip(model).fold(0.0, |m: f64, (a, b)| {
            let d = (a - b).abs();
            if m.is_nan() || d.is_nan() { f64::NAN } else { m.max(d) }
        });
        Self { abs, rel: abs / scale }
    }
}

/// One form of the model's answer.
struct Answer {
    name: String,
    /// With the batch first.
    dims: Vec<usize>,
    data: Vec<f64>,
    /// How both sides are seen before they are compared.
    lens: fn(f64) -> f64,
}

/// Every form of the model's answers to some images.
pub(super) struct Answers {
    forms: Vec<Answer>,
    /// The classes' scores `[B, K]`, for outputs that pick some of them.
    scores: Option<(usize, Vec<f64>)>,
}

/// A name that tells a head's answer from the tokens' forms.
const LOGITS: &str = "logits";

/// Probabilities as the logits see them: small ones by their logarithm, so that a wrong logit shows behind a softmax.
/// Continuous at ½, with the same slope.
fn log_below_half(p: f64) -> f64 {
    if p < 0.5 { p.max(1e-30).ln() } else { 0.5f64.ln() + 2.0 * (p - 0.5) }
}

/// A log-probability is compared as it is; what no f32 probability could hold is cut.
fn same(x: f64) -> f64 {
    x
}

impl Answers {
    /// All forms, from what the model answers to `batch` images.
    pub(super) fn of(model: &Predictor, pixels: &[f32], batch: usize) -> vit_model::Result<Self> {
        let config = model.config();
        let Output { logits, features, pre_logits } = model.forward(pixels, batch)?;
        let [logits_shape, tokens_shape, pooled_shape] = model.shapes(batch);
        let pooled = Tensor::from_vec(pre_logits, pooled_shape, &Device::Cpu)?;
        let logits = logits.map(|z| Tensor::from_vec(z, logits_shape, &Device::Cpu)).transpose()?;
        let tokens = Tensor::from_vec(features, tokens_shape, &Device::Cpu)?;
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

    /// The form that an output is closest to, and how close; `None` where the model has no answer of its shape.
    pub(super) fn closest(&self, value: &Value, tolerance: f64) -> Option<(String, Difference)> {
        let shape = |dims: &[usize]| dims.iter().copied().filter(|&d| d != 1).collect::<Vec<_>>();
        let found = value.to_f64().ok()?;
        if !is_real(value) {
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
            // where nothing fits, the difference to the plainest form says most
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

    /// Indices of classes: the model must score those classes as high as its own best, up to rounding.
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
        // a tie within rounding is no difference
        let difference = Difference { abs: worst, rel: worst / scale };
        let none = Difference { abs: 0.0, rel: 0.0 };
        let name = if picked == 1 { "best class".into() } else { format!("best {picked} classes") };
        Some((name, if difference.within(tolerance.min(1.0)) { none } else { difference }))
    }
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

/// A tensor's shape and elements.
pub(super) fn read(t: &Tensor) -> vit_model::Result<(Vec<usize>, Vec<f64>)> {
    let data: Vec<f32> = t.flatten_all()?.to_vec1()?;
    Ok((t.dims().to_vec(), data.into_iter().map(f64::from).collect()))
}

/// Do the matched outputs say enough about the model? One that has a head must have shown it.
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
