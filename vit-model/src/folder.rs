//! A folder as found on the Hub, timm's or transformers', → [`Checkpoint`].

use std::path::Path;

use crate::{
    Error, Result,
    load::{self, Checkpoint},
    safetensors::Safetensors,
};

/// Opens a folder with `model.safetensors` and `config.json`.
pub(crate) fn open(path: &Path) -> Result<Checkpoint> {
    let weights = path.join("model.safetensors");
    if !weights.exists() {
        return Err(Error::file(path, "holds no model.safetensors"));
    }
    load::ours(Safetensors::open(&weights)?)
}
