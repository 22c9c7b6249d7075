//! `vit-convert IN OUT`: the library's steps on the command line.

#![forbid(unsafe_code)]

use std::{
    ffi::OsStr,
    io::{IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use vit_convert::{
    Converted, Options, Pending, begin, explain, preset,
    quantise::{self, Moved, Quantised},
    save, timm_config, to_hf, write,
};
use vit_model::{Dtype, ModelInfo, PreprocessConfig, Weights, load::Checkpoint};

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
  vit-convert model.onnx model.gguf --dtype q8     matrices in 8 bits
  vit-convert vit-base/ vit-base.gguf --dtype q8   of a folder as found on the Hub
  vit-convert model.onnx folder/                   a folder that timm opens: create_model(\"local-dir:folder\")
  vit-convert model.onnx folder/ --to hf           one that transformers opens
  vit-convert model.onnx --dry-run --report report.json

Exit status: 0 converted; 2 refused or failed, and why is said on stderr; 130 interrupted."
)]
struct Args {
    /// The model: an ONNX file; or a checkpoint (a file of ours, a folder of timm's or transformers') to write in another form.
    #[arg(value_name = "IN")]
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
    /// Attention heads, for a state dict of torchvision's that is none of its own models' (they are not in the tensors).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    num_heads: Option<u16>,
    /// Store every tensor as this type; by default each keeps the type that it has in the file. q8: matrices in ggml's Q8_0,
    /// the rest as it is, in a file that ends in .gguf.
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

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
    Q8,
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
    save::guard();
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
    if args.dtype == Some(Type::Q8) && args.output.as_deref().is_some_and(|output| !is_gguf(output)) {
        bail!("--dtype q8 writes a GGUF file: let the output end in .gguf");
    }
    let (mut model, moved) = if is_checkpoint(&args.input) { opened(args, &options)? } else { begun(args, &options)? };
    // a dry run says too whether the folder could be written
    let folder = match args.to {
        _ if !folder => None,
        Some(Library::Hf) => Some(to_hf::folder(model.info(), model.weights())?),
        _ => Some(timm_config::folder(model.info(), model.weights())?),
    };
    let output = args.output.as_deref().filter(|_| !args.dry_run);
    if let Some(output) = output {
        write_model(args, output, &model, folder.as_ref())?;
    }
    let mut notes = model.notes(folder.map(|folder| folder.notes).unwrap_or_default())?;
    notes.extend(moved.map(|moved| format!("q8: {moved}")));
    notes.extend(output.map(|output| format!("written: {}", output.display())));
    answer(args, &model, &notes)
}

/// A model to be written.
enum Model {
    /// Of an ONNX file.
    Graph(Box<Converted>),
    /// As it is found: there is no graph, and so no proof.
    Checkpoint(Box<Checkpoint>),
}

impl Model {
    fn info(&self) -> &ModelInfo {
        match self {
            Self::Graph(converted) => &converted.info,
            Self::Checkpoint(checkpoint) => &checkpoint.info,
        }
    }

    fn weights(&self) -> &Arc<dyn Weights> {
        match self {
            Self::Graph(converted) => &converted.weights,
            Self::Checkpoint(checkpoint) => &checkpoint.weights,
        }
    }

    fn pending(&self) -> Option<&Pending> {
        match self {
            Self::Graph(converted) => converted.pending(),
            Self::Checkpoint(_) => None,
        }
    }

    /// What there is to say about it, with `more` of the folder that it became. A proof that was not run yet is run now.
    fn notes(&mut self, more: Vec<String>) -> vit_convert::Result<Vec<String>> {
        let more = more.into_iter().map(|note| format!("note: {note}"));
        let Self::Graph(converted) = self else { return Ok(more.collect()) };
        converted.document()?;
        let mut notes = Vec::new();
        let found = [("assumed", &converted.imported.assumed), ("approximate", &converted.imported.approximate)];
        for (what, list) in found {
            notes.extend(list.iter().map(|note| format!("{what}: {note}")));
        }
        notes.extend(more);
        notes.push(match &converted.verified {
            Some(v) => format!(
                "verified: {} inputs, largest difference {:.1e} absolute, {:.1e} relative ({})",
                v.inputs, v.max_abs, v.max_rel, v.evaluator
            ),
            None => "not verified".into(),
        });
        if let Some(said) = converted.info.source.get("candle_onnx") {
            notes.push(match said.get("max_rel") {
                Some(far) => format!("candle-onnx agrees: largest difference {far} relative"),
                None => format!("candle-onnx has no opinion: {}", said["not_run"]),
            });
        }
        Ok(notes)
    }
}

/// An ONNX file, converted; it is proven while it is written, unless what is written is something else, or a report is asked for.
fn begun(args: &Args, options: &Options) -> anyhow::Result<(Model, Option<Moved>)> {
    if args.num_heads.is_some() {
        bail!(
            "{}: --num-heads is for a state dict of torchvision's; a graph says its heads itself",
            args.input.display()
        );
    }
    let mut converted = begin(&args.input, options)?;
    let moved = if args.dtype == Some(Type::Q8) { converted.quantise()? } else { None };
    if let Some(report) = &args.report {
        let text = serde_json::to_vec_pretty(&report_of(&mut converted)?)?;
        save::file(report, &[&args.input], |mut file| file.write_all(&text).map_err(vit_convert::Error::io(report)))?;
    }
    Ok((Model::Graph(Box::new(converted)), moved))
}

/// A checkpoint as it is, but for what the user changes: there is no graph, and so no proof.
fn opened(args: &Args, options: &Options) -> anyhow::Result<(Model, Option<Moved>)> {
    let name = args.input.display();
    if args.img_size.is_some() || args.report.is_some() || args.verify_with.is_some() {
        bail!("{name}: --img-size, --report and --verify-with are for ONNX files");
    }
    let folder = |path: &Path| path.canonicalize().ok();
    let input = folder(&args.input);
    let inside = |output: &PathBuf| folder(output) == input || output.parent().and_then(folder) == input;
    if args.input.is_dir() && args.output.as_ref().is_some_and(inside) {
        bail!("{name}: the output is in the folder that is read; name another");
    }
    let Checkpoint { mut info, mut weights } = match args.num_heads {
        Some(heads) => vit_model::load::torchvision(&args.input, heads.into())?,
        None => vit_model::load::open(&args.input)?,
    };
    if let Some(labels) = &options.labels {
        info.labels = Some(labels.clone());
    }
    if let Some(preprocess) = &options.preprocess {
        let input_size = info.preprocess.input_size;
        info.preprocess = PreprocessConfig { input_size, ..preprocess.clone() };
    }
    info.validate()?;
    let mut moved = None;
    if args.dtype == Some(Type::Q8) {
        let own = weights.clone();
        weights = Arc::new(Quantised::new(own.clone()));
        if options.verify {
            let far = quantise::moved(&info, own, weights.clone())?;
            match &mut info.verified {
                Some(Value::Object(proof)) => drop(proof.insert("q8_0".into(), far.to_json())),
                verified => *verified = Some(json!({ "q8_0": far.to_json() })),
            }
            moved = Some(far);
        }
    }
    Ok((Model::Checkpoint(Box::new(Checkpoint { info, weights })), moved))
}

/// A folder, or a file by its name.
fn is_checkpoint(input: &Path) -> bool {
    let ours = |extension: &OsStr| ["safetensors", "gguf"].iter().any(|ours| extension.eq_ignore_ascii_case(ours));
    input.is_dir() || input.extension().is_some_and(ours)
}

/// A name that ends in `.gguf`, unless it is a folder's.
fn is_gguf(output: &Path) -> bool {
    !is_folder(output) && output.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// A name that ends in a separator, or a folder that is there.
fn is_folder(output: &Path) -> bool {
    output.as_os_str().as_encoded_bytes().ends_with(b"/") || output.is_dir()
}

fn write_model(args: &Args, output: &Path, model: &Model, folder: Option<&write::Folder>) -> anyhow::Result<()> {
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
    let dtype = args.dtype.and_then(|dtype| match dtype {
        Type::F32 => Some(Dtype::F32),
        Type::F16 => Some(Dtype::F16),
        Type::Bf16 => Some(Dtype::Bf16),
        Type::Q8 => None,
    });
    let options = write::Options {
        dtype,
        threads: args.threads.map_or(cores, usize::from),
        pending: model.pending(),
        inputs: &[&args.input],
        progress: &progress,
    };
    match folder {
        Some(folder) => write::folder(output, folder, args.force, &options)?,
        None if is_gguf(output) => write::gguf(output, model.info(), model.weights().as_ref(), &options)?,
        None => write::file(output, model.info(), model.weights().as_ref(), &options)?,
    }
    bar.finish_and_clear();
    Ok(())
}

/// What was converted, on stdout.
fn answer(args: &Args, model: &Model, notes: &[String]) -> anyhow::Result<()> {
    let c = &model.info().model;
    let parameters: usize = model.weights().tensors().values().map(|t| t.shape.iter().product::<usize>()).sum();
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
    for note in notes {
        text.push_str(&printable(note));
        text.push('\n');
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
