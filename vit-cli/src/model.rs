//! What MODEL on the command line means: a file, a folder, an ONNX export, `digits`, or a repository on the Hub.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::bail;
use vit_model::load::{self, Checkpoint};
use vit_model::{ModelInfo, Predictor, predictor};

use crate::args::{Device, Precision, RunArgs};
use crate::complain;
use crate::output::show;

/// The model inside this program: handwritten digits, see `weights/digits/README.md`.
static DIGITS: &[u8] = include_bytes!("../../weights/digits/model.safetensors");

/// Where a MODEL was found.
pub enum Place {
    /// Inside this program.
    Digits,
    /// A safetensors or GGUF file, or a folder.
    Path(PathBuf),
    /// An ONNX file.
    Onnx(PathBuf),
}

/// Finds a MODEL; a repository is fetched. A path that exists wins.
pub fn find(model: &OsStr) -> anyhow::Result<Place> {
    let path = Path::new(model);
    if let Ok(found) = std::fs::metadata(path) {
        let is_onnx = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("onnx"));
        return match () {
            () if found.is_file() && is_onnx => Ok(Place::Onnx(path.into())),
            () if found.is_file() => refuse_pickle(path).map(|()| Place::Path(path.into())),
            () => Ok(folder(path)),
        };
    }
    if std::fs::symlink_metadata(path).is_ok() {
        bail!("{}: a link that leads nowhere", show(path));
    }
    match model.to_str() {
        Some("digits") => Ok(Place::Digits),
        Some(name) if looks_like_a_path(name) => bail!("{}: no such file or folder{}", show(path), near_miss(path)),
        #[cfg(feature = "hub")]
        Some(name) if name.contains('/') => Ok(Place::Path(crate::pull::folder(name)?)),
        #[cfg(feature = "hub")]
        Some(name) if crate::models::repository(name).is_some() => Ok(Place::Path(crate::pull::folder(name)?)),
        Some(name) => bail!(forms(name)),
        None => bail!("{}: no such file or folder", show(path)),
    }
}

/// A folder that holds an ONNX file and nothing else of use is most likely meant to be that file.
fn folder(path: &Path) -> Place {
    let has = |name: &str| path.join(name).exists();
    if path.is_dir() && !has("config.json") && !has("model.safetensors") && has("model.onnx") {
        return Place::Onnx(path.join("model.onnx"));
    }
    Place::Path(path.into())
}

/// PyTorch's own files are programs; they are not opened.
fn refuse_pickle(path: &Path) -> anyhow::Result<()> {
    let pickles = ["pt", "pth", "bin", "ckpt", "pkl"];
    if path.extension().and_then(OsStr::to_str).is_some_and(|e| pickles.contains(&e.to_ascii_lowercase().as_str())) {
        bail!(
            "{}: PyTorch's pickled files are programs and are not opened; save the state dict with safetensors \
             beside its config.json, or export the model to ONNX",
            show(path)
        );
    }
    Ok(())
}

fn looks_like_a_path(name: &str) -> bool {
    let slashes = name.matches('/').count();
    let extensions = ["safetensors", "onnx", "json", "pt", "pth", "bin", "gguf"];
    name.starts_with(['/', '.', '~', '\\'])
        || name.ends_with('/')
        || slashes > 1
        || name.contains(['\\', '\n', '\0'])
        || Path::new(name).extension().and_then(OsStr::to_str).is_some_and(|e| extensions.contains(&e))
}

/// `; did you mean …` where a file of almost that name exists.
fn near_miss(path: &Path) -> String {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return String::new(),
    };
    if !parent.is_dir() {
        return format!(" (nor is there a folder {})", show(parent));
    }
    for extension in ["safetensors", "onnx", "gguf"] {
        let candidate = path.with_extension(extension);
        if candidate != path && candidate.is_file() {
            return format!("; did you mean {}?", show(candidate));
        }
    }
    String::new()
}

fn forms(name: &str) -> String {
    let hint = match vit_model::names::Architecture::of(name) {
        Some(_) => format!("`{name}` is an architecture; its weights are in timm/{name} on the Hub. "),
        None => String::new(),
    };
    hint + &format!(
        "`{name}` is neither a file nor a folder. A MODEL is a .safetensors or .gguf file of vit-convert's, a folder with model.safetensors \
         and config.json, an .onnx file, `digits`, or a repository on the Hub (owner/name, or a short name of `vit-cli models`)"
    )
}

/// The model's configuration and tensors. Weights are read later, by whoever runs them.
pub fn checkpoint(model: &OsStr) -> anyhow::Result<Checkpoint> {
    match find(model)? {
        Place::Digits => Ok(load::from_bytes("digits", DIGITS)?),
        Place::Path(path) => Ok(load::open(&path)?),
        Place::Onnx(path) => {
            let (info, imported) = convert(&path)?;
            Ok(Checkpoint::new(info, imported.weights)?)
        }
    }
}

/// The model's configuration; a folder with configurations alone has one.
pub fn info(model: &OsStr) -> anyhow::Result<ModelInfo> {
    match find(model)? {
        Place::Path(path) => Ok(load::info(&path)?),
        _ => Ok(checkpoint(model)?.info),
    }
}

/// An ONNX file as a model: its document, and what was found in the graph. The weights are read from that file when they
/// are asked for. Nothing is verified here; `vit-convert` does that.
pub fn convert(path: &Path) -> anyhow::Result<(ModelInfo, vit_convert::Imported)> {
    let graph = vit_convert::onnx::read(path)?;
    let imported = vit_convert::import(&graph).map_err(|e| e.at(path))?;
    let source = [("producer", graph.producer.as_str().into()), ("opset", graph.opset.into())];
    let info = ModelInfo {
        vit: 1,
        model: imported.config.clone(),
        preprocess: imported.preprocess.clone(),
        labels: None,
        source: source.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        verified: None,
    };
    Ok((info, imported))
}

/// A model, ready to run as the options say; `once`: it will answer for one image, and need not hold its weights.
pub fn predictor(model: &OsStr, run: RunArgs, once: bool, verbose: bool) -> anyhow::Result<Predictor> {
    predictor_for(model, run, once, verbose, |_| {})
}

/// As [`predictor()`], with a look at the document before the model is built.
pub fn predictor_for(
    model: &OsStr,
    run: RunArgs,
    once: bool,
    verbose: bool,
    fit: impl FnOnce(&mut ModelInfo),
) -> anyhow::Result<Predictor> {
    let options = predictor::Options { streamed: once, ..options(run)? };
    let mut checkpoint = checkpoint(model)?;
    fit(&mut checkpoint.info);
    let predictor = Predictor::new(&checkpoint, &options).map_err(|e| named(model, e))?;
    if verbose {
        let backend = predictor.backend();
        let mut why = backend.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        if backend.quantised && backend.precision != "q8_0" {
            why += " from weights in q8_0";
        }
        complain(&format!(
            "{} runs on {} in {} with {} threads{why}",
            show(model),
            backend.kernel,
            backend.precision,
            backend.threads
        ));
    }
    Ok(predictor)
}

/// The error, with the model's name unless it has that already.
pub fn named(model: &OsStr, error: vit_model::Error) -> anyhow::Error {
    let plain = Path::new(model).display().to_string();
    if error.to_string().contains(&plain) { error.into() } else { anyhow::Error::new(error).context(show(model)) }
}

/// The device and the precision that were asked for, or why they cannot be had.
pub fn options(run: RunArgs) -> anyhow::Result<predictor::Options> {
    let threads = run.threads.map(usize::from);
    if let Some(threads) = threads {
        // decoding and resizing, too; it fails only where the pool runs already, and then nothing is lost
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    let precision = match run.precision {
        Precision::Auto => predictor::Precision::Auto,
        Precision::F32 => predictor::Precision::F32,
        Precision::Bf16x3 => predictor::Precision::Bf16x3,
        Precision::Bf16 => predictor::Precision::Bf16,
        Precision::Int8 => predictor::Precision::Int8,
        Precision::F16 => predictor::Precision::F16,
    };
    Ok(predictor::Options { device: device(run.device)?, precision, threads, modules: run.modules, streamed: false })
}

/// `candle_core::utils::cuda_is_available` only says how this was built, so the device itself is tried.
fn device(device: Device) -> anyhow::Result<candle_core::Device> {
    // with RUST_BACKTRACE candle's errors have a backtrace beneath their first line
    let first_line = |e: candle_core::Error| e.to_string().lines().next().unwrap_or_default().to_owned();
    let cuda = || candle_core::Device::new_cuda(0).map_err(first_line);
    let metal = || candle_core::Device::new_metal(0).map_err(first_line);
    match device {
        Device::Cpu => Ok(candle_core::Device::Cpu),
        Device::Cuda if !cfg!(feature = "cuda") => {
            bail!("--device cuda: this program was built without CUDA (cargo build --features cuda)")
        }
        Device::Cuda => cuda().map_err(|e| {
            anyhow::anyhow!(
                "--device cuda: no usable CUDA device: {e}. It takes an NVIDIA GPU, its driver, and a CUDA_VISIBLE_DEVICES that \
                 does not hide it; --device cpu needs none, and --device auto takes what there is"
            )
        }),
        Device::Metal if !cfg!(feature = "metal") => {
            bail!("--device metal: this program was built without Metal (cargo build --features metal)")
        }
        Device::Metal => metal().map_err(|e| anyhow::anyhow!("--device metal: no usable Metal device: {e}")),
        Device::Auto => {
            let found = match () {
                () if cfg!(feature = "cuda") => cuda(),
                () if cfg!(feature = "metal") => metal(),
                () => return Ok(candle_core::Device::Cpu),
            };
            Ok(found.unwrap_or_else(|e| {
                complain(&format!("no GPU ({e}); running on the CPU"));
                candle_core::Device::Cpu
            }))
        }
    }
}
