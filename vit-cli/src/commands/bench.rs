//! `bench`: how long a model takes, on random inputs that change from run to run.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use vit_model::Checkpoint;
use vit_model::predictor::{Builder, Kernel, Loading, Output, Runtime, Wanted};
use vit_model::{Device, Error, Precision, Predictor, candle};

use crate::args::BenchArgs;
use crate::output::{Stdout, json_line, name, show};
use crate::{complain, model, open};
use vit_model::random::SplitMix64;

/// Inputs that take turns, so that no run finds its own in the cache.
const INPUTS: usize = 4;

/// Rounds of a comparison: all take part in each, so that a machine whose speed drifts slows all alike.
const ROUNDS: u32 = 5;

pub fn run(args: &BenchArgs, verbose: bool) -> anyhow::Result<()> {
    if args.compare {
        return compare(args, verbose);
    }
    let started = Instant::now();
    let predictor = open::predictor(&args.model, open::builder(args.run), verbose)?;
    let load_ms = started.elapsed().as_secs_f64() * 1e3;

    let (config, batch) = (predictor.config(), usize::from(args.batch));
    let [h, w] = config.img_size;
    let mut random = SplitMix64(0);
    let inputs: Vec<Vec<f32>> = (0..INPUTS).map(|_| random.normal(batch * config.in_chans * h * w)).collect();
    let mut output = Output::default();
    let mut turn = inputs.iter().cycle();
    let mut time = || -> anyhow::Result<f64> {
        let input = turn.next().map_or(&[][..], Vec::as_slice);
        let started = Instant::now();
        predictor.forward_into(input, batch, Wanted::Logits, &mut output)?;
        let ms = started.elapsed().as_secs_f64() * 1e3;
        // numbers that are not numbers may take another time; and who measures wants to know
        let answer = output.logits.as_ref().unwrap_or(&output.pre_logits);
        if let Some(bad) = answer.iter().find(|x| !x.is_finite()) {
            bail!("{}: the model answers {bad} in {}", show(&args.model), predictor.backend().precision);
        }
        Ok(ms)
    };
    for _ in 0..args.warmup {
        time()?;
    }
    let times = (0..args.iters).map(|_| time()).collect::<anyhow::Result<Vec<f64>>>()?;
    let backend = predictor.backend();
    let what = json!({
        "model": name(&args.model), "batch": batch, "threads": backend.threads, "kernel": backend.kernel.name(),
        "precision": backend.precision.name(), "quantised": backend.quantised, "why": backend.why,
    });
    let record = record(what, batch, &[load_ms], &times);

    let mut out = Stdout::new();
    if args.json {
        out.line(&json_line(&record)?)?;
    } else {
        let (kernel, precision, threads) = (backend.kernel, backend.precision, backend.threads);
        let number = |key: &str| record[key].as_f64().unwrap_or(f64::NAN);
        let (median, rate) = (number("median_ms"), number("images_per_s"));
        out.line(&format!("{}: {kernel} {precision}, {threads} threads, batch {batch}", show(&args.model)))?;
        out.line(&format!("load    {load_ms:>10.2} ms"))?;
        out.line(&format!("median  {median:>10.2} ms of {} runs  {rate:.2} images/s", times.len()))?;
        if backend.quantised && backend.precision != Precision::Q8_0 {
            out.line("weights are stored in q8_0, and multiplied as the values that these stand for")?;
        }
        if let Some(why) = &backend.why {
            out.line(&format!("candle's modules ran, not the CPU engine: {why}"))?;
        }
    }
    out.flush()
}

/// What was timed, and the figures of it.
fn record(mut what: Value, batch: usize, loads: &[f64], times: &[f64]) -> Value {
    let round = |ms: f64| (ms * 1e4).round() / 1e4;
    let median_ms = median(times);
    what["load_ms"] = round(median(loads)).into();
    what["median_ms"] = round(median_ms).into();
    what["min_ms"] = round(times.iter().copied().fold(f64::INFINITY, f64::min)).into();
    what["images_per_s"] = round(batch as f64 * 1e3 / median_ms).into();
    what["times_ms"] = times.iter().map(|&t| round(t)).collect::<Vec<_>>().into();
    what
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

/// Something that runs the model.
struct Contender {
    kernel: Kernel,
    precision: Precision,
    /// It is what `--precision auto` comes to.
    auto: bool,
    loads: Vec<f64>,
    times: Vec<f64>,
    /// Threads, as it reports them.
    threads: Value,
}

impl Contender {
    fn new(kernel: Kernel, precision: Precision) -> Self {
        Self { kernel, precision, auto: false, loads: Vec::new(), times: Vec::new(), threads: Value::Null }
    }

    /// Times some runs in a process of its own: memory is needed once, and a kernel is chosen where users choose it.
    fn run(&mut self, args: &BenchArgs, iters: u32) -> anyhow::Result<()> {
        let program = std::env::current_exe().context("this program's own path")?;
        let mut command = Command::new(&program);
        // blocks of weights are not asked for by name: they are what candle's modules choose
        let precision = if self.precision == Precision::Q8_0 { Precision::Auto } else { self.precision };
        command.arg("bench").args(["--json", "--precision", precision.name(), "--iters", &iters.to_string()]);
        command.args(["--batch", &args.batch.to_string(), "--warmup", &args.warmup.to_string()]);
        if let Some(threads) = args.run.threads {
            command.args(["--threads", &threads.to_string()]);
        }
        match self.kernel {
            Kernel::CandleCpu => command.args(["--device", "cpu", "--modules"]),
            Kernel::CandleCuda => command.args(["--device", "cuda"]),
            Kernel::CandleMetal => command.args(["--device", "metal"]),
            kernel => command.args(["--device", "cpu"]).env("VIT_CPU", kernel.name()),
        };
        let done = command.arg("--").arg(&args.model).stdin(Stdio::null()).output().with_context(|| show(&program))?;
        if !done.status.success() {
            let why = String::from_utf8_lossy(&done.stderr);
            let why = why.trim();
            bail!("{}", why.strip_prefix("vit-cli: ").unwrap_or(why));
        }
        let last = done.stdout.split(|&b| b == b'\n').rfind(|line| !line.is_empty()).unwrap_or_default();
        let record: Value = serde_json::from_slice(last).context("what it printed")?;
        let ran = [&record["kernel"], &record["precision"]];
        if ran != [self.kernel.name(), self.precision.name()] {
            bail!("{} {} ran instead", ran[0], ran[1]);
        }
        self.loads.extend(record["load_ms"].as_f64());
        self.times.extend(record["times_ms"].as_array().into_iter().flatten().filter_map(Value::as_f64));
        self.threads = record["threads"].clone();
        Ok(())
    }
}

/// Every kernel and precision that this machine has for the model.
fn contenders(checkpoint: &Checkpoint, device: Device) -> anyhow::Result<Vec<Contender>> {
    let mut all = Vec::new();
    // a streamed engine reads little more than the head, and says what it would run
    let probe = |builder: Builder| -> vit_model::Result<Predictor> {
        builder
            .device(Device::Cpu)
            .loading(Loading::Streamed)
            .threads(1)
            .runtime(Runtime::Engine)
            .checkpoint(checkpoint)
    };
    match probe(Predictor::builder()) {
        Ok(auto) => {
            let ran = |predictor: &Predictor| (predictor.backend().kernel, predictor.backend().precision);
            for (kernel, precision) in Kernel::CPU.into_iter().flat_map(|k| Precision::CPU.map(|p| (k, p))) {
                // what a kernel or this CPU does not have is run by another, or refused
                match probe(Predictor::builder().kernel(kernel).precision(precision)) {
                    Ok(predictor) if ran(&predictor) == (kernel, precision) => {
                        let auto = ran(&auto) == (kernel, precision);
                        all.push(Contender { auto, ..Contender::new(kernel, precision) });
                    }
                    Ok(_) | Err(Error::Unsupported { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Err(Error::Unsupported { why, .. }) => complain(&format!("candle's modules alone run this model: {why}")),
        Err(error) => return Err(error.into()),
    }
    let weights = &checkpoint.weights;
    let quantised = weights.tensors().keys().any(|name| weights.is_q8_0(name));
    all.push(Contender::new(Kernel::CandleCpu, Precision::F32));
    if quantised {
        all.push(Contender::new(Kernel::CandleCpu, Precision::Q8_0));
    }
    let gpu = match device.to_candle()? {
        candle::Device::Cpu => return Ok(all),
        candle::Device::Cuda(_) => Kernel::CandleCuda,
        candle::Device::Metal(_) => Kernel::CandleMetal,
    };
    let precisions = [Precision::F32, Precision::F16, Precision::Bf16];
    let precisions = if quantised { &[Precision::F32, Precision::Q8_0][..] } else { &precisions };
    all.extend(precisions.iter().map(|&precision| Contender::new(gpu, precision)));
    Ok(all)
}

/// Times every kernel and precision, in rounds.
fn compare(args: &BenchArgs, verbose: bool) -> anyhow::Result<()> {
    let mut all =
        contenders(&model::checkpoint(&args.model)?, args.run.device).map_err(|e| e.context(show(&args.model)))?;
    let rounds = ROUNDS.min(args.iters);
    for round in 0..rounds {
        let iters = args.iters / rounds + u32::from(round < args.iters % rounds);
        all.retain_mut(|contender| {
            if verbose {
                complain(&format!("round {}: {} {}", round + 1, contender.kernel, contender.precision));
            }
            let result = contender.run(args, iters);
            if let Err(why) = &result {
                complain(&format!("{} {} is left out: {why:#}", contender.kernel, contender.precision));
            }
            result.is_ok()
        });
    }
    anyhow::ensure!(!all.is_empty(), "{}: nothing ran", show(&args.model));
    all.sort_by(|a, b| median(&a.times).total_cmp(&median(&b.times)));

    let (mut out, batch) = (Stdout::new(), usize::from(args.batch));
    let runs: Vec<Value> = (all.iter())
        .map(|c| {
            let what = json!({ "kernel": c.kernel.name(), "precision": c.precision.name(), "auto": c.auto, "threads": c.threads });
            record(what, batch, &c.loads, &c.times)
        })
        .collect();
    if args.json {
        let model = name(&args.model);
        out.line(&json_line(&json!({ "model": model, "batch": batch, "rounds": rounds, "runs": runs }))?)?;
        return out.flush();
    }
    out.line(&format!("{}: batch {batch}, {rounds} rounds, {} runs each", show(&args.model), args.iters))?;
    let head = ["kernel", "precision", "threads", "median ms", "fastest ms", "images/s", "load ms"];
    let line = |cells: [&str; 7]| {
        let [kernel, precision, threads, figures @ ..] = cells;
        let figures = figures.map(|figure| format!("{figure:>11}")).join(" ");
        format!("{kernel:<12} {precision:<12} {threads:>7} {figures}")
    };
    out.line(&line(head))?;
    for (contender, run) in all.iter().zip(&runs) {
        let precision = contender.precision.name().to_owned() + if contender.auto { " (auto)" } else { "" };
        let figures = ["median_ms", "min_ms", "images_per_s", "load_ms"];
        let [median, fastest, rate, load] = figures.map(|key| format!("{:.2}", run[key].as_f64().unwrap_or(f64::NAN)));
        let threads = contender.threads.to_string();
        out.line(&line([contender.kernel.name(), &precision, &threads, &median, &fastest, &rate, &load]))?;
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
