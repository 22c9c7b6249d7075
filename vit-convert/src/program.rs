//! `vit-convert IN OUT`, the command line of this library. It is part of the library because it reports details of the
//! import that are private.

use std::{
    ffi::OsStr,
    io::{IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use crate::{
    Options, Verify, convert, explain, preset, process,
    quantise::{self, Moved},
    signals,
};
use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use vit_model::text::DEFAULT_TEMPLATE;
use vit_model::{
    Checkpoint, Dtype, Existing, Format, SaveOptions,
    checkpoint::{OpenOptions, atomic},
    inputs,
};

/// Converts a Vision Transformer from ONNX to safetensors with timm's tensor names.
///
/// vit-convert recovers weights and hyper-parameters from the graph's dataflow, so it does not matter which program exported
/// the file. It then runs the graph and the converted model on the same inputs and compares their outputs.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  vit-convert flowers.onnx flowers.safetensors --labels class_indices.json
  vit-convert clip.onnx clip.safetensors --preprocess clip --dtype f16
  vit-convert model.onnx model.gguf --dtype q8     quantise the matrices to 8 bits
  vit-convert vit-base/ vit-base.gguf --dtype q8   the same, from a folder as found on the Hub
  vit-convert vit.pth vit.safetensors              a PyTorch checkpoint; nothing in it is executed
  vit-convert model.onnx folder/                   write a folder for timm: create_model(\"local-dir:folder\")
  vit-convert model.onnx folder/ --to hf           write a folder for transformers
  vit-convert clip/ pets.safetensors --labels-file pets.txt --template 'a photo of a {}'
  vit-convert model.onnx --dry-run --report report.json

Exit status: 0 converted; 2 refused or failed, with the reason on stderr; 130 interrupted."
)]
struct Args {
    /// The model: an ONNX file, or a checkpoint to write in another format (a file that vit-convert wrote, a folder in timm's,
    /// transformers' or open_clip's format, or a file of weights such as vit.pth beside its config.json).
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The file to write. If this is an existing folder or a name that ends in /, writes model.safetensors and config.json there.
    #[arg(value_name = "OUT", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// The library to write a folder for: timm, or hf for transformers (ViT, DeiT, DINOv2, CLIP, SigLIP).
    #[arg(long, value_name = "LIBRARY")]
    to: Option<Library>,
    /// Replace the model if the output folder already contains one.
    #[arg(long)]
    force: bool,
    /// The image size if the file leaves it open: pixels, or HEIGHTxWIDTH.
    #[arg(long, value_name = "SIZE", value_parser = vit_model::command_line::img_size)]
    img_size: Option<[usize; 2]>,
    /// The architecture of weights without a configuration, by timm's name.
    #[arg(long, value_name = "NAME")]
    arch: Option<String>,
    /// Which network of a checkpoint to read, if it has several: `model_ema`, `teacher`, …
    #[arg(long, value_name = "KEY")]
    state_dict: Option<String>,
    /// Which output of the graph to convert if it has several answers: its name, or that of a value inside of the graph.
    #[arg(long = "output", value_name = "NAME")]
    output_name: Option<String>,
    /// Number of attention heads of a torchvision state dict. Needed only for widths that torchvision's own models do not have,
    /// because the tensors do not determine it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    num_heads: Option<u16>,
    /// Store every tensor as this type; by default each tensor keeps its type. q8 quantises the matrices to ggml's Q8_0, keeps
    /// the other tensors as they are, and needs an output name that ends in .gguf.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Type>,
    /// Class names: a text file with one name per line, or JSON: a list, {"0": "daisy", …}, or a config.json with id2label.
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Bake classes in words into a linear head: a file with the classes, for a folder with a text tower (CLIP, SigLIP).
    #[arg(long, value_name = "FILE", conflicts_with = "labels")]
    labels_file: Option<PathBuf>,
    /// With --labels-file: what an image of a class is called, with {} for the label; if given more than once, embeddings are
    /// averaged.
    #[arg(long = "template", value_name = "TEXT", requires = "labels_file")]
    templates: Vec<String>,
    /// How to preprocess images: imagenet, inception, clip, or changes to timm's defaults such as
    /// `mean=0.5,std=0.5,crop_pct=0.9,interpolation=bicubic,crop_mode=center` (one value per channel: `mean=0.4:0.5:0.6`).
    #[arg(long, value_name = "NAME|KEY=VALUE,…")]
    preprocess: Option<String>,
    /// Write a JSON report of what was recovered from which nodes.
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// Do not run the graph and the model to compare them; the written file records that.
    #[arg(long)]
    no_verify: bool,
    /// Also compare with another evaluator. candle, which is candle-onnx, needs a build with the feature candle-onnx.
    #[arg(long, value_name = "EVALUATOR", conflicts_with = "no_verify")]
    verify_with: Option<Evaluator>,
    /// Do everything except write the model.
    #[arg(long)]
    dry_run: bool,
    /// Number of threads that read and write (default: one per core, at most 4).
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

/// The program.
pub fn main() -> ExitCode {
    process::with_stack(program)
}

fn program() -> ExitCode {
    signals::guard();
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
            // some errors already contain the text of their cause
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
    inputs::protect();
    process::start_threads(None);
    if args.verify_with.is_some() && cfg!(not(feature = "candle-onnx")) {
        bail!("--verify-with candle: this program was built without it; build with --features candle-onnx");
    }
    let output = args.output.as_deref();
    let format = format(args)?;
    if args.dtype == Some(Type::Q8) && output.is_some() && format != Format::Gguf {
        bail!("--dtype q8 writes a GGUF file: let the output end in .gguf");
    }
    // what the command line names is not opened yet
    for named in [Some(&args.input), args.labels.as_ref(), args.labels_file.as_ref()].into_iter().flatten() {
        inputs::expect(named);
    }
    check_outputs(args, format)?;
    let model = if is_checkpoint(&args.input) { opened(args)? } else { converted(args, format)? };
    let output = output.filter(|_| !args.dry_run);
    // a dry run also reports whether the folder could be written
    let differs = match output {
        Some(output) => write_model(args, output, format, &model.checkpoint)?,
        None => model.checkpoint.fits(format)?,
    };
    let mut notes = model.found;
    notes.extend(differs.into_iter().map(|note| format!("note: {note}")));
    notes.extend(model.proof);
    notes.extend(model.moved.map(|moved| format!("q8: {moved}")));
    notes.extend(output.map(|output| format!("written: {}", output.display())));
    answer(args, &model.checkpoint, &notes)
}

/// A model to write, and the notes to print about it.
struct Model {
    checkpoint: Checkpoint,
    /// Notes on assumptions and approximations.
    found: Vec<String>,
    /// The result of the comparison with the graph.
    proof: Vec<String>,
    moved: Option<Moved>,
}

/// Refuses outputs that would replace a file which this run has read or is going to read, or one another.
fn check_outputs(args: &Args, format: Format) -> anyhow::Result<()> {
    let mut files: Vec<PathBuf> = args.report.iter().cloned().collect();
    if let Some(output) = args.output.as_deref().filter(|_| !args.dry_run) {
        if format.is_folder() {
            let names: &[&str] = &["model.safetensors", "config.json", "preprocessor_config.json"];
            files.extend(names.iter().map(|name| output.join(name)));
        } else {
            files.push(output.into());
        }
    }
    Ok(atomic::check(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>())?)
}

/// An ONNX file, converted.
fn converted(args: &Args, format: Format) -> anyhow::Result<Model> {
    let name = args.input.display();
    if args.arch.is_some() || args.state_dict.is_some() {
        bail!("{name}: --arch and --state-dict are for checkpoints; a graph says what it computes");
    }
    if args.num_heads.is_some() {
        bail!("{name}: --num-heads is for torchvision state dicts; a graph says its heads itself");
    }
    if args.labels_file.is_some() {
        bail!(
            "{name}: --labels-file is for folders with a text tower; an ONNX file has none. For class names, use --labels"
        );
    }
    let mut options = Options::new();
    if let Some(path) = &args.labels {
        options = options.labels(labels(path)?);
    }
    if let Some(text) = &args.preprocess {
        options = options.preprocess(preset::parse(text)?);
    }
    if let Some(img_size) = args.img_size {
        options = options.img_size(img_size);
    }
    if let Some(name) = &args.output_name {
        options = options.output(name);
    }
    #[cfg(feature = "candle-onnx")]
    if args.verify_with.is_some() {
        options = options.verify(Verify::RunWithCandle);
    }
    if args.no_verify {
        options = options.verify(Verify::Skip);
    }
    let mut converted = convert(&args.input, &options)?;
    // the files of external data are known now
    check_outputs(args, format)?;
    let moved = if args.dtype == Some(Type::Q8) { converted.quantise()? } else { None };
    if let Some(report) = &args.report {
        let found = json!({ "config": converted.info(), "found": explain::report(converted.imported()) });
        let text = serde_json::to_vec_pretty(&found)?;
        atomic::file(report, &[] as &[&Path], |mut file| file.write_all(&text).map_err(vit_model::Error::io(report)))?;
    }
    let imported = converted.imported();
    let mut found = Vec::new();
    for (what, list) in
        [("assumed", &imported.assumed), ("ignored", &imported.ignored), ("approximate", &imported.approximate)]
    {
        found.extend(list.iter().map(|note| format!("{what}: {note}")));
    }
    let mut proof = vec![match converted.verified() {
        Some(v) => format!(
            "verified: {} inputs, largest difference {:.1e} absolute, {:.1e} relative ({})",
            v.inputs, v.max_abs, v.max_rel, v.evaluator
        ),
        None => "not verified".into(),
    }];
    if let Some(said) = converted.info().source.candle_onnx() {
        proof.push(match said {
            Ok(far) => format!("candle-onnx agrees: largest difference {} relative", json!(far)),
            Err(why) => format!("candle-onnx cannot run the graph: {why}"),
        });
    }
    Ok(Model { checkpoint: converted.checkpoint().clone(), found, proof, moved })
}

/// A checkpoint with the user's changes. It is not verified, because there is no graph to compare it with.
fn opened(args: &Args) -> anyhow::Result<Model> {
    let name = args.input.display();
    if args.img_size.is_some() || args.report.is_some() || args.verify_with.is_some() || args.output_name.is_some() {
        bail!("{name}: --img-size, --output, --report and --verify-with are for ONNX files");
    }
    let folder = |path: &Path| path.canonicalize().ok();
    let input = folder(&args.input);
    let inside = |output: &PathBuf| folder(output) == input || output.parent().and_then(folder) == input;
    if args.input.is_dir() && args.output.as_ref().is_some_and(inside) {
        bail!("{name}: the output is in the folder that is read; choose another");
    }
    let mut checkpoint = if let Some(heads) = args.num_heads {
        vit_model::checkpoint::torchvision(&args.input, heads.into())?
    } else {
        let mut options = OpenOptions::new();
        if let Some(arch) = &args.arch {
            options = options.arch(arch);
        }
        if let Some(key) = &args.state_dict {
            options = options.state_dict(key);
        }
        options.open(&args.input)?
    };
    let mut found = Vec::new();
    if let Some(path) = &args.labels_file {
        let before = checkpoint.info.source.approximate().len();
        checkpoint = checkpoint.with_classes(&labels(path)?, &args.templates)?;
        let notes = checkpoint.info.source.approximate();
        found.extend(notes.iter().skip(before).map(|note| format!("approximate: {note}")));
        if args.templates.is_empty() {
            found.push(format!("assumed: the template {DEFAULT_TEMPLATE:?}, because no --template is given"));
        }
    }
    let info = &mut checkpoint.info;
    if let Some(path) = &args.labels {
        info.labels = Some(labels(path)?);
    }
    if let Some(text) = &args.preprocess {
        let input_size = info.preprocess.input_size;
        info.preprocess = preset::parse(text)?;
        info.preprocess.input_size = input_size;
    }
    info.validate()?;
    let mut moved = None;
    if args.dtype == Some(Type::Q8) {
        (checkpoint, moved) = quantise::quantise(&checkpoint, !args.no_verify)?;
    }
    found.extend(checkpoint.info.source.assumed().into_iter().map(|note| format!("assumed: {note}")));
    found.extend(checkpoint.remarks().iter().map(|remark| format!("note: {remark}")));
    Ok(Model { checkpoint, found, proof: Vec::new(), moved })
}

/// The output format, from the output's name and `--to`.
fn format(args: &Args) -> anyhow::Result<Format> {
    let output = args.output.as_deref();
    if args.to.is_some() && output.is_some_and(|output| !is_folder(output)) {
        bail!("--to writes a folder: let the output end in /");
    }
    Ok(match args.to {
        Some(Library::Hf) => Format::Transformers,
        Some(Library::Timm) if output.is_some() => Format::Timm,
        _ if output.is_some_and(is_folder) => Format::Timm,
        _ if output.is_some_and(is_gguf) => Format::Gguf,
        _ => Format::Safetensors,
    })
}

/// Whether the input is a checkpoint: a folder, or a file whose name ends as those of checkpoints do.
fn is_checkpoint(input: &Path) -> bool {
    const ENDINGS: [&str; 7] = ["safetensors", "gguf", "pth", "pt", "bin", "ckpt", "tar"];
    let ours = |extension: &OsStr| ENDINGS.iter().any(|ours| extension.eq_ignore_ascii_case(ours));
    input.is_dir() || input.extension().is_some_and(ours)
}

/// Whether the output is a file whose name ends in `.gguf`.
fn is_gguf(output: &Path) -> bool {
    !is_folder(output) && output.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// Whether the output is a folder: it exists, or its name ends in a separator.
fn is_folder(output: &Path) -> bool {
    output.as_os_str().as_encoded_bytes().ends_with(b"/") || output.is_dir()
}

/// Writes the model. Returns notes on what the target library computes differently.
fn write_model(args: &Args, output: &Path, format: Format, model: &Checkpoint) -> anyhow::Result<Vec<String>> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    bar.set_style(
        ProgressStyle::with_template("writing {bar:30} {bytes}/{total_bytes}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let mut options = SaveOptions::new().progress(&progress);
    if let Some(threads) = args.threads {
        options = options.threads(threads.into());
    }
    if args.force {
        options = options.existing(Existing::Replace);
    }
    options = match args.dtype {
        Some(Type::F32) => options.dtype(Dtype::F32),
        Some(Type::F16) => options.dtype(Dtype::F16),
        Some(Type::Bf16) => options.dtype(Dtype::Bf16),
        Some(Type::Q8) | None => options,
    };
    let notes = model.save_with(output, format, &options)?;
    bar.finish_and_clear();
    Ok(notes)
}

/// Prints a summary of the conversion to stdout.
fn answer(args: &Args, model: &Checkpoint, notes: &[String]) -> anyhow::Result<()> {
    let c = model.config();
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

/// Class names from a file.
fn labels(path: &Path) -> anyhow::Result<Vec<String>> {
    Ok(vit_model::labels::read(path)?)
}

/// Escapes control characters, so that the text stays on one line, and limits its length.
fn printable(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().take(6000) {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}
