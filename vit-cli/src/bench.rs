//! `bench`: how long a model takes, on random inputs that change from run to run.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::args::BenchArgs;
use crate::output::{Stdout, json_line, show};
use crate::random::Random;
use crate::{complain, model};

/// Inputs that take turns, so that no run finds its own in the cache.
const INPUTS: usize = 4;

pub fn run(args: &BenchArgs, verbose: bool) -> anyhow::Result<()> {
    if args.compare {
        return compare(args);
    }
    let started = Instant::now();
    let predictor = model::predictor(&args.model, args.run, verbose)?;
    let load_ms = started.elapsed().as_secs_f64() * 1e3;

    let (config, batch) = (predictor.config(), usize::from(args.batch));
    let [h, w] = config.img_size;
    let mut random = Random::new(0);
    let inputs: Vec<Vec<f32>> = (0..INPUTS).map(|_| random.normal(batch * config.in_chans * h * w)).collect();
    let mut logits = Vec::new();
    let mut turn = inputs.iter().cycle();
    let mut time = || -> anyhow::Result<f64> {
        let input = turn.next().map_or(&[][..], Vec::as_slice);
        let started = Instant::now();
        predictor.logits_into(input, batch, &mut logits)?;
        let ms = started.elapsed().as_secs_f64() * 1e3;
        std::hint::black_box(&logits);
        Ok(ms)
    };
    for _ in 0..args.warmup {
        time()?;
    }
    let times = (0..args.iters).map(|_| time()).collect::<anyhow::Result<Vec<f64>>>()?;
    let median = median(&times);
    let (backend, rate) = (predictor.backend(), batch as f64 * 1e3 / median);

    let mut out = Stdout::new();
    if args.json {
        let round = |ms: f64| (ms * 1e4).round() / 1e4;
        out.line(&json_line(&json!({
            "model": args.model.to_string_lossy(), "batch": batch, "threads": backend.threads, "kernel": backend.kernel,
            "precision": backend.precision, "why": backend.why, "load_ms": round(load_ms), "median_ms": round(median),
            "min_ms": round(times.iter().copied().fold(f64::INFINITY, f64::min)), "images_per_s": round(rate),
            "times_ms": times.iter().map(|&t| round(t)).collect::<Vec<_>>(),
        }))?)?;
    } else {
        let (kernel, precision, threads) = (&backend.kernel, &backend.precision, backend.threads);
        out.line(&format!("{}: {kernel} {precision}, {threads} threads, batch {batch}", show(&args.model)))?;
        out.line(&format!("load    {load_ms:>10.2} ms"))?;
        out.line(&format!("median  {median:>10.2} ms of {} runs  {rate:.2} images/s", times.len()))?;
        if let Some(why) = &backend.why {
            out.line(&format!("candle's modules ran, not the CPU engine: {why}"))?;
        }
    }
    out.flush()
}

/// The middle of the times, or the mean of the two in the middle.
fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match (sorted.get(sorted.len().wrapping_sub(1) / 2), sorted.get(sorted.len() / 2)) {
        (Some(low), Some(high)) => (low + high) / 2.0,
        _ => f64::NAN,
    }
}

/// Every kernel and precision, each in a process of its own: a kernel is chosen once in a process's life.
fn compare(args: &BenchArgs) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("this program's own path")?;
    let mut out = Stdout::new();
    let mut rows = Vec::new();
    for (kernel, precisions) in [
        ("amx", &["bf16", "bf16x3"][..]),
        ("avx512", &["f32"]),
        ("avx2", &["f32"]),
        ("portable", &["f32"]),
        ("candle-cpu", &["f32"]),
    ] {
        for precision in precisions {
            let mut command = Command::new(&program);
            command.arg("bench").args(["--json", "--device", "cpu", "--precision", precision]);
            command.args(["--batch", &args.batch.to_string(), "--iters", &args.iters.to_string()]);
            command.args(["--warmup", &args.warmup.to_string()]);
            if let Some(threads) = args.run.threads {
                command.args(["--threads", &threads.to_string()]);
            }
            if kernel == "candle-cpu" {
                command.arg("--modules")
            } else {
                command.env("VIT_CPU", kernel)
            };
            command.arg("--").arg(&args.model).stdin(Stdio::null());
            let done = command.output().with_context(|| show(&program))?;
            let record = done.stdout.split(|&b| b == b'\n').rfind(|line| !line.is_empty());
            let record = record.and_then(|line| serde_json::from_slice::<Value>(line).ok());
            if let Some(record) = record.filter(|_| done.status.success()) {
                rows.push(record);
            } else {
                let why = String::from_utf8_lossy(&done.stderr);
                complain(&format!("{kernel} {precision}: {}", why.trim().trim_start_matches("vit-cli: ")));
            }
        }
    }
    anyhow::ensure!(!rows.is_empty(), "{}: nothing ran", show(&args.model));
    if args.json {
        out.line(&json_line(&rows)?)?;
        return out.flush();
    }
    out.line(&format!("{:<11} {:<9} {:>12} {:>12} {:>10}", "kernel", "precision", "median ms", "images/s", "load ms"))?;
    for row in &rows {
        let number = |key: &str| row[key].as_f64().map_or_else(String::new, |n| format!("{n:.2}"));
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let [median, rate, load] = ["median_ms", "images_per_s", "load_ms"].map(number);
        out.line(&format!("{:<11} {:<9} {median:>12} {rate:>12} {load:>10}", text("kernel"), text("precision")))?;
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }
}
