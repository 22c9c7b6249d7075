//! The MODEL of a command line, opened: what `vit_model::resolve` finds, or an ONNX file through `vit-convert`.

use std::ffi::OsStr;
use std::sync::OnceLock;

use vit_model::checkpoint::{OpenOptions, TextSource};
use vit_model::resolve::Location;
use vit_model::{Checkpoint, ModelInfo};

/// What the command line says of models whose files do not say it: the same for every model of a run.
static OPTIONS: OnceLock<OpenOptions> = OnceLock::new();

/// Sets what the files do not say.
pub fn say(arch: Option<&str>, state_dict: Option<&str>) {
    let mut options = OpenOptions::new();
    if let Some(arch) = arch {
        options = options.arch(arch);
    }
    if let Some(key) = state_dict {
        options = options.state_dict(key);
    }
    if arch.is_some() || state_dict.is_some() {
        let _ = OPTIONS.set(options);
    }
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
    match find(model)? {
        Location::Onnx(path) => Ok(vit_convert::open(path)?),
        found => Ok(match OPTIONS.get() {
            Some(options) => found.open_with(options)?,
            None => found.open()?,
        }),
    }
}

/// The model's text tower, whether there is an image tower beside it or not.
pub fn text(model: &OsStr) -> anyhow::Result<TextSource> {
    Ok(find(model)?.text()?)
}

/// The model's configuration; a folder with configurations alone has one.
pub fn info(model: &OsStr) -> anyhow::Result<ModelInfo> {
    match find(model)? {
        Location::Onnx(path) => Ok(vit_convert::open(path)?.info),
        found => Ok(match OPTIONS.get() {
            Some(options) => found.open_with(options)?.info,
            None => found.info()?,
        }),
    }
}
