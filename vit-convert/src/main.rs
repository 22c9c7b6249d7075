//! `vit-convert IN.onnx OUT`: the library's steps on the command line.

#![forbid(unsafe_code)]

use std::{
    io::{IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use vit_convert::{Converted, Options, begin, explain, preset, save, timm_config, to_hf, write};
use vit_model::Dtype;

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
  vit-convert model.onnx folder/                   a folder that timm opens: create_model(\"local-dir:folder\")
  vit-convert model.onnx folder/ --to hf           one that transformers opens
  vit-convert model.onnx --dry-run --report report.json

Exit status: 0 converted; 2 refused or failed, and why is said on stderr; 130 interrupted."
)]
struct Args {
    /// The model.
    #[arg(value_name = "IN.onnx")]
    input: PathBuf,
    /// The file to write; or a folder (one that is there, or a name that ends in /), for model.safetensors and config.json.
    #[arg(value_name = "OUT", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// What a folder is written for: timm's names and configuration, or transformers' (ViT, DeiT, DINOv2, CLIP, SigLIP).
    #[arg(long, value_name = "LIBRARY")]
    to: Option<Library>,
    /// Replace the model that a folder holds already.
    #[arg(long)]
    force: bool,
    /// The image size, where the file leaves it open: pixels, or HEIGHTxWIDTH.
    #[arg(long, value_name = "SIZE", value_parser = img_size)]
    img_size: Option<[usize; 2]>,
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
    /// A second opinion beside the converter's own evaluator: candle-onnx, in a build with the feature candle-onnx.
    #[arg(long, value_name = "EVALUATOR", conflicts_with = "no_verify")]
    verify_with: Option<Evaluator>,
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

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Evaluator {
    Candle,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Library {
    Timm,
    Hf,
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
            // some errors say their cause themselves
            let text = error
                .chain()
                .map(ToString::to_string)
                .reduce(|text, cause| if text.contains(&cause) { text } else { format!("{text}: {cause}") });
            let _ = writeln!(std::io::stderr().lock(), "vit-convert: error: {}", printable(&text.unwrap_or_default()));
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let options = Options {
        labels: args.labels.as_deref().map(labels).transpose()?,
        preprocess: args.preprocess.as_deref().map(preset::parse).transpose()?,
        img_size: args.img_size,
        verify: !args.no_verify,
        #[cfg(feature = "candle-onnx")]
        candle: args.verify_with.is_some(),
    };
    if args.verify_with.is_some() && cfg!(not(feature = "candle-onnx")) {
        bail!("--verify-with candle: this program was built without it; build with --features candle-onnx");
    }
    let folder = args.output.as_deref().is_some_and(is_folder) || args.to == Some(Library::Hf);
    if args.to.is_some() && args.output.as_deref().is_some_and(|output| !is_folder(output)) {
        bail!("--to writes a folder: let the output end in /");
    }
    let mut converted = begin(&args.input, &options)?;
    if let Some(report) = &args.report {
        let text = serde_json::to_vec_pretty(&report_of(&mut converted)?)?;
        save::file(report, &[&args.input], |mut file| file.write_all(&text).map_err(vit_convert::Error::io(report)))?;
    }
    let weights = converted.weights.clone();
    // a dry run says too whether the folder could be written
    let folder = match args.to {
        _ if !folder => None,
        Some(Library::Hf) => Some(to_hf::folder(&converted.info, &weights)?),
        _ => Some(timm_config::folder(&converted.info, &weights)?),
    };
    if let (Some(output), false) = (&args.output, args.dry_run) {
        write_model(args, output, &converted, folder.as_ref())?;
    }
    converted.document()?;
    answer(args, &converted, folder.map(|folder| folder.notes).unwrap_or_default())
}

/// A name that ends in a separator, or a folder that is there.
fn is_folder(output: &Path) -> bool {
    output.as_os_str().as_encoded_bytes().ends_with(b"/") || output.is_dir()
}

fn write_model(
    args: &Args,
    output: &Path,
    converted: &Converted,
    folder: Option<&write::Folder>,
) -> anyhow::Result<()> {
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
        pending: converted.pending(),
        inputs: &[&args.input],
        progress: &progress,
    };
    match folder {
        Some(folder) => write::folder(output, folder, args.force, &options)?,
        None => write::file(output, &converted.info, converted.weights.as_ref(), &options)?,
    }
    bar.finish_and_clear();
    Ok(())
}

/// What was converted, on stdout.
fn answer(args: &Args, converted: &Converted, notes: Vec<String>) -> anyhow::Result<()> {
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
    for note in notes {
        text.push_str(&format!("note: {}\n", printable(&note)));
    }
    match &converted.verified {
        Some(v) => text.push_str(&format!(
            "verified: {} inputs, largest difference {:.1e} absolute, {:.1e} relative ({})\n",
            v.inputs, v.max_abs, v.max_rel, v.evaluator
        )),
        None => text.push_str("not verified\n"),
    }
    if let Some(said) = converted.info.source.get("candle_onnx") {
        text.push_str(&match said.get("max_rel") {
            Some(far) => format!("candle-onnx agrees: largest difference {far} relative\n"),
            None => format!("candle-onnx has no opinion: {}\n", printable(&said["not_run"].to_string())),
        });
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
fn report_of(converted: &mut Converted) -> vit_convert::Result<Value> {
    Ok(json!({ "config": converted.document()?.clone(), "found": explain::report(&converted.imported) }))
}

/// Class names from a file.
fn labels(path: &Path) -> anyhow::Result<Vec<String>> {
    let name = || path.display().to_string();
    let size = std::fs::metadata(path).with_context(name)?;
    if !size.is_file() || size.len() > vit_model::limits::LABELS_BYTES as u64 {
        bail!("{}: not a file of class names", name());
    }
    vit_model::labels::parse(&std::fs::read(path).with_context(name)?).with_context(name)
}

/// `224`, or `224x320`: height and width.
fn img_size(text: &str) -> Result<[usize; 2], String> {
    let side = |text: &str| text.trim().parse::<usize>().ok().filter(|n| (1..=16384).contains(n));
    let (h, w) = text.split_once(['x', '×']).unwrap_or((text, text));
    match (side(h), side(w)) {
        (Some(h), Some(w)) => Ok([h, w]),
        _ => Err("a number of pixels, or HEIGHTxWIDTH, is expected".into()),
    }
}

/// A text as one line, bounded, with control characters escaped.
fn printable(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().take(6000) {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}
