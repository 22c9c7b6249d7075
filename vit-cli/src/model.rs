//! The MODEL of a command line, opened: what `vit_model::resolve` finds, or an ONNX file through `vit-convert`.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::OnceLock;

use vit_model::checkpoint::{OpenOptions, TextSource};
use vit_model::resolve::Location;
use vit_model::{Checkpoint, Config, ModelInfo};

use crate::args::OpenArgs;
use crate::open;

/// What the command line says of models: the same for every model of a run.
static OPENING: OnceLock<Opening> = OnceLock::new();

#[derive(Default)]
struct Opening {
    /// What the files do not say, if the command line does. Without it, a folder of configurations is enough for some commands.
    options: Option<OpenOptions>,
    /// The size of images, if it is not to be the model's own.
    img_size: Option<[usize; 2]>,
}

/// Sets what the command line says.
pub fn say(args: &OpenArgs) {
    let mut options = None;
    if let Some(arch) = &args.arch {
        options = Some(OpenOptions::new().arch(arch));
    }
    if let Some(key) = &args.state_dict {
        options = Some(options.unwrap_or_default().state_dict(key));
    }
    let _ = OPENING.set(Opening { options, img_size: args.img_size });
}

fn opening() -> &'static Opening {
    OPENING.get_or_init(Opening::default)
}

/// Finds a MODEL; a repository is fetched, with a bar that shows how far it is.
pub fn find(model: &OsStr) -> anyhow::Result<Location> {
    match Location::of(model)? {
        #[cfg(feature = "hub")]
        Location::Repository(id) => Ok(Location::Path(crate::commands::pull::folder(&id)?)),
        found => Ok(found),
    }
}

/// The model's configuration and tensors. Weights are read later, by whoever runs them.
pub fn checkpoint(model: &OsStr) -> anyhow::Result<Checkpoint> {
    let checkpoint = match (find(model)?, &opening().options) {
        (Location::Onnx(path), _) => onnx(&path)?,
        (found, Some(options)) => found.open_with(options)?,
        (found, None) => found.open()?,
    };
    Ok(match opening().img_size {
        Some(img_size) => checkpoint.resized(img_size).map_err(|error| open::named(model, error))?,
        None => checkpoint,
    })
}

/// A graph, at the size of the command line if it leaves its size open, and otherwise at its own.
fn onnx(path: &Path) -> anyhow::Result<Checkpoint> {
    let options = vit_convert::Options::new();
    Ok(match opening().img_size {
        Some(img_size) => vit_convert::open_with(path, &options.img_size_if_open(img_size))?,
        None => vit_convert::open(path)?,
    })
}

/// The model's text tower, whether there is an image tower beside it or not.
pub fn text(model: &OsStr) -> anyhow::Result<TextSource> {
    Ok(find(model)?.text()?)
}

/// The model's configuration; a folder with configurations alone has one.
pub fn info(model: &OsStr) -> anyhow::Result<ModelInfo> {
    let mut info = match (find(model)?, &opening().options) {
        (Location::Onnx(path), _) => onnx(&path)?.info,
        (found, Some(options)) => found.open_with(options)?.info,
        (found, None) => found.info()?,
    };
    if let Some(img_size) = opening().img_size {
        info.model = resized(info.model);
        info.preprocess.set_input_size(img_size);
        info.validate().map_err(|error| open::named(model, error))?;
    }
    Ok(info)
}

/// An architecture for images of the size that the command line says.
pub fn resized(mut config: Config) -> Config {
    config.img_size = opening().img_size.unwrap_or(config.img_size);
    config
}
