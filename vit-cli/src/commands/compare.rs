//! `compare`: two models on the same inputs, and how far their answers are apart.

use anyhow::bail;
use serde_json::{Value, json};
use vit_model::Config;
use vit_model::labels::top_k;
use vit_model::random::SplitMix64;

use super::forward::{forward, read_input};
use crate::args::CompareArgs;
use crate::output::{Stdout, json_line, name, show};
use crate::{Outcome, open};

pub fn run(args: &CompareArgs, verbose: bool) -> anyhow::Result<Outcome> {
    if !(args.tolerance >= 0.0 && args.tolerance.is_finite()) {
        bail!("--tolerance must be a number from 0 up, found {}", args.tolerance);
    }
    let input_shape = |config: &Config| [config.in_chans, config.img_size[0], config.img_size[1]];
    let a = open::predictor(&args.a, open::builder(args.run), verbose)?;
    let (shape, classes) = (input_shape(a.config()), a.config().num_classes);
    let (pixels, batch) = if let Some(path) = &args.input {
        read_input(path, args.tensor.as_deref(), &a)?
    } else {
        let batch = usize::from(args.inputs);
        (SplitMix64(args.seed).normal(batch * shape.iter().product::<usize>()), batch)
    };
    let (out_a, shapes_a) = (forward(&a, &pixels, batch)?, a.shapes(batch));
    drop(a); // one model in memory at a time
    let b = open::predictor(&args.b, open::builder(args.run), verbose)?;
    if input_shape(b.config()) != shape {
        let (a, b, found) = (show(&args.a), show(&args.b), input_shape(b.config()));
        bail!("the models read different inputs: {a} [C, H, W] = {shape:?}, {b} {found:?}");
    }
    let (out_b, shapes_b) = (forward(&b, &pixels, batch)?, b.shapes(batch));

    let mut rows = Vec::new();
    match (&out_a.logits, &out_b.logits) {
        (Some(x), Some(y)) => rows.push(Row::new("logits", shapes_a.logits, x, shapes_b.logits, y)),
        (None, None) => {}
        (x, _) => {
            let (with, without) = if x.is_some() { (&args.a, &args.b) } else { (&args.b, &args.a) };
            bail!("{} has a head, {} has none", show(with), show(without));
        }
    }
    let (features_a, features_b) = (&out_a.features, &out_b.features);
    rows.push(Row::new("features", Some(shapes_a.features), features_a, Some(shapes_b.features), features_b));
    let (pre_a, pre_b) = (&out_a.pre_logits, &out_b.pre_logits);
    rows.push(Row::new("pre_logits", Some(shapes_a.pre_logits), pre_a, Some(shapes_b.pre_logits), pre_b));
    let top1 = match (&out_a.logits, &out_b.logits) {
        (Some(x), Some(y)) if x.len() == y.len() && classes > 0 => Some(agreement(x, y, classes)),
        _ => None,
    };
    let holds = rows.iter().all(|row| row.holds(args.tolerance));
    print(args, batch, &rows, top1, holds)?;
    Ok(if holds { Outcome::Good } else { Outcome::Failed })
}

/// How far two tensors are apart.
struct Row {
    name: &'static str,
    shapes: [Vec<usize>; 2],
    /// `max |a − b|`; none where the shapes differ.
    difference: Option<f64>,
    /// `max |a|`
    scale: f64,
}

impl Row {
    fn new(name: &'static str, shape_a: Option<Vec<usize>>, a: &[f32], shape_b: Option<Vec<usize>>, b: &[f32]) -> Self {
        // a NaN is as far away as can be; `f64::max` would pass over it
        let max = |values: &mut dyn Iterator<Item = f64>| {
            values.fold(0.0, |m: f64, v| if v.is_nan() { f64::INFINITY } else { m.max(v) })
        };
        let difference =
            (shape_a == shape_b).then(|| max(&mut a.iter().zip(b).map(|(&x, &y)| (f64::from(x) - f64::from(y)).abs())));
        let scale = max(&mut a.iter().map(|&x| f64::from(x).abs()));
        Self { name, shapes: [shape_a, shape_b].map(Option::unwrap_or_default), difference, scale }
    }

    /// The difference relative to the largest value, which counts as 1 where it is smaller.
    fn relative(&self) -> Option<f64> {
        self.difference.map(|d| d / self.scale.max(1.0))
    }

    fn holds(&self, tolerance: f64) -> bool {
        self.relative().is_some_and(|d| d <= tolerance)
    }
}

/// Rows whose largest logit is of the same class.
fn agreement(a: &[f32], b: &[f32], classes: usize) -> [usize; 2] {
    let pairs = || a.chunks_exact(classes).zip(b.chunks_exact(classes));
    [pairs().filter(|(x, y)| top_k(x, 1) == top_k(y, 1)).count(), pairs().count()]
}

fn print(args: &CompareArgs, batch: usize, rows: &[Row], top1: Option<[usize; 2]>, holds: bool) -> anyhow::Result<()> {
    let mut out = Stdout::new();
    if args.json {
        let tensors: serde_json::Map<String, Value> = rows
            .iter()
            .map(|r| {
                let record = json!({
                    "shapes": r.shapes, "max_abs_diff": r.difference, "max_abs": r.scale, "relative": r.relative(),
                    "holds": r.holds(args.tolerance),
                });
                (r.name.to_owned(), record)
            })
            .collect();
        out.line(&json_line(&json!({
            "a": name(&args.a), "b": name(&args.b), "inputs": batch, "tolerance": args.tolerance,
            "holds": holds, "top1_equal": top1.map(|[equal, of]| json!({ "equal": equal, "of": of })), "tensors": tensors,
        }))?)?;
        return out.flush();
    }
    for row in rows {
        let verdict = if row.holds(args.tolerance) { "ok" } else { "DIFFERS" };
        out.line(&match (row.difference, row.relative()) {
            (Some(d), Some(relative)) => {
                format!(
                    "{:<11} max |a - b| {d:<9.3e} relative {relative:<9.3e} {:?}  {verdict}",
                    row.name, row.shapes[0]
                )
            }
            _ => format!("{:<11} {:?} and {:?}  {verdict}", row.name, row.shapes[0], row.shapes[1]),
        })?;
    }
    if let Some([equal, of]) = top1 {
        out.line(&format!("{:<11} {equal} of {of} inputs have the same best class", "top-1"))?;
    }
    let verdict = if holds { "holds" } else { "does not hold" };
    out.line(&format!("tolerance {:e} {verdict} over {batch} inputs", args.tolerance))?;
    out.flush()
}
