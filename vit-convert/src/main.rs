//! `vit-convert IN.onnx OUT`: the library's steps on the command line.

use std::{
    ffi::OsStr,
    io::{IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use vit_convert::{Converted, Options, convert, explain, save, write};
use vit_model::{Dtype, PreprocessConfig};

/// Converts a Vision Transformer from ONNX to safetensors with timm's tensor names.
///
/// Weights and hyper-parameters are recovered from the dataflow, whichever program exported the file, and the result is
/// proven by running the graph and the converted model on the same inputs.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  vit-convert flowers.onnx flowers.safetensors --labels class_indices.json
  vit-convert clip.onnx clip.safetensors --preprocess clip --dtype f16
  vit-convert model.onnx --dry-run --report report.json

Exit status: 0 converted; 2 refused or failed, and why is said on stderr; 130 interrupted."
)]
struct Args {
    /// The model.
    #[arg(value_name = "IN.onnx")]
    input: PathBuf,
    /// The file to write.
    #[arg(value_name = "OUT.safetensors", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Store every tensor as this type; by default each keeps the type that it has in the file.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Type>,
    /// Class names: a text file of one a line, or JSON: a list, {"0": "daisy", …}, or a config.json with id2label.
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// How a photograph becomes the input: imagenet, inception, clip, or changes to timm's defaults such as
    /// `mean=0.5,std=0.5,crop_pct=0.9,interpolation=bicubic,crop_mode=center` (three values: `mean=0.4:0.5:0.6`).
    #[arg(long, value_name = "NAME|KEY=VALUE,…")]
    preprocess: Option<String>,
    /// Write as JSON what was found where.
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// Do not run the graph and the model to compare them; the written file says so.
    #[arg(long)]
    no_verify: bool,
    /// Everything but writing the model.
    #[arg(long)]
    dry_run: bool,
    /// Threads that read and write (default: the machine's).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

fn main() -> ExitCode {
    // a second handler cannot be installed, and without one the system's default still ends the program
    let _ = ctrlc::set_handler(|| {
        save::abandon();
        std::process::exit(130);
    });
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr().lock(), "vit-convert: error: {}", printable(&format!("{error:#}")));
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let options = Options {
        labels: args.labels.as_deref().map(labels).transpose()?,
        preprocess: args.preprocess.as_deref().map(preprocess).transpose()?,
        verify: !args.no_verify,
    };
    let converted = convert(&args.input, &options)?;
    if let Some(report) = &args.report {
        let text = serde_json::to_vec_pretty(&report_of(&converted))?;
        save::file(report, &[&args.input], |mut file| file.write_all(&text).map_err(vit_convert::Error::io(report)))?;
    }
    if let (Some(output), false) = (&args.output, args.dry_run) {
        write_model(args, output, &converted)?;
    }
    answer(args, &converted)
}

fn write_model(args: &Args, output: &Path, converted: &Converted) -> anyhow::Result<()> {
    if output.as_os_str().as_encoded_bytes().ends_with(b"/") || output.is_dir() {
        bail!("{}: this is a folder; name the .safetensors file to write", output.display());
    }
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    bar.set_style(
        ProgressStyle::with_template("writing {bar:30} {bytes}/{total_bytes}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let dtype = args.dtype.map(|dtype| match dtype {
        Type::F32 => Dtype::F32,
        Type::F16 => Dtype::F16,
        Type::Bf16 => Dtype::Bf16,
    });
    let options = write::Options {
        dtype,
        threads: args.threads.map_or(cores, usize::from),
        inputs: &[&args.input],
        progress: &progress,
    };
    write::file(output, &converted.info, converted.weights.as_ref(), &options)?;
    bar.finish_and_clear();
    Ok(())
}

/// What was converted, on stdout.
fn answer(args: &Args, converted: &Converted) -> anyhow::Result<()> {
    let c = &converted.info.model;
    let parameters: usize = converted.weights.tensors().values().map(|t| t.shape.iter().product::<usize>()).sum();
    let mut text = format!(
        "{}: ViT {}×{}, patch {}×{}, {} wide, {} deep, {} heads, {} classes, {parameters} parameters\n",
        printable(&args.input.display().to_string()),
        c.img_size[0],
        c.img_size[1],
        c.patch_size[0],
        c.patch_size[1],
        c.embed_dim,
        c.depth,
        c.num_heads,
        c.num_classes
    );
    for (what, notes) in [("assumed", &converted.imported.assumed), ("approximate", &converted.imported.approximate)] {
        for note in notes {
            text.push_str(&format!("{what}: {}\n", printable(note)));
        }
    }
    match &converted.verified {
        Some(v) => text.push_str(&format!(
            "verified: {} inputs, largest difference {:.1e} absolute, {:.1e} relative ({})\n",
            v.inputs, v.max_abs, v.max_rel, v.evaluator
        )),
        None => text.push_str("not verified\n"),
    }
    if let (Some(output), false) = (&args.output, args.dry_run) {
        text.push_str(&format!("written: {}\n", printable(&output.display().to_string())));
    }
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("standard output"),
        _ => Ok(()),
    }
}

/// Everything that was found, for `--report`.
fn report_of(converted: &Converted) -> Value {
    json!({ "config": converted.info, "found": explain::report(&converted.imported) })
}

/// Class names from a file.
fn labels(path: &Path) -> anyhow::Result<Vec<String>> {
    let name = || path.display().to_string();
    let size = std::fs::metadata(path).with_context(name)?;
    if !size.is_file() || size.len() > 16 << 20 {
        bail!("{}: not a file of class names", name());
    }
    let text = std::fs::read_to_string(path).with_context(name)?;
    if path.extension() != Some(OsStr::new("json")) {
        return Ok(text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect());
    }
    let value: Value = serde_json::from_str(&text).with_context(name)?;
    let value = value.get("id2label").or(value.get("label_names")).unwrap_or(&value);
    let word = |value: &Value| value.as_str().map(str::to_owned);
    let list: Option<Vec<String>> = match value {
        Value::Array(list) => list.iter().map(word).collect(),
        Value::Object(map) => (0..map.len()).map(|id| map.get(&id.to_string()).and_then(word)).collect(),
        _ => None,
    };
    list.with_context(|| {
        format!("{}: expected a list of names, or {{\"0\": \"daisy\", …}} with every class from 0", name())
    })
}

/// `--preprocess`: a well-known set, or changes to timm's defaults. The image size is filled in from the model.
fn preprocess(text: &str) -> anyhow::Result<PreprocessConfig> {
    let base = |mean: [f64; 3], std: [f64; 3]| json!({ "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center", "mean": mean, "std": std });
    let half = base([0.5; 3], [0.5; 3]);
    let mut config = match text {
        "imagenet" => base([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "clip" => {
            let mut clip = base([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]);
            clip["crop_pct"] = json!(1.0);
            clip
        }
        _ => half,
    };
    if !matches!(text, "imagenet" | "inception" | "clip") {
        for part in text.split(',') {
            let (key, value) = part.split_once('=').with_context(|| {
                format!("--preprocess {text:?}: imagenet, inception, clip, or key=value pairs such as crop_pct=0.9")
            })?;
            config[key] = match key {
                "mean" | "std" => {
                    let list: Result<Vec<f64>, _> = value.split(':').map(str::parse).collect();
                    let list = list.with_context(|| format!("--preprocess {key}={value}: numbers are expected"))?;
                    json!(if let [one] = list[..] { vec![one; 3] } else { list })
                }
                "crop_pct" => json!(value.parse::<f64>().with_context(|| format!("--preprocess {key}={value}"))?),
                "interpolation" | "crop_mode" => json!(value),
                _ => bail!("--preprocess {key}: known are mean, std, crop_pct, interpolation and crop_mode"),
            };
        }
    }
    serde_json::from_value(config).with_context(|| format!("--preprocess {text}"))
}

/// A text as one line, bounded, with control characters escaped.
fn printable(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().take(6000) {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}
