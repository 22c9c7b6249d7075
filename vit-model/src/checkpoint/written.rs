//! Writes a model as a folder in the form that another library opens.

use std::{fs, io::Write as _, path::Path, sync::Arc};

use serde_json::Value;

use super::{
    atomic,
    writer::{self, Container, How, Metadata},
};
use crate::{
    Error, ModelInfo, Result, Weights,
    files::{CONFIG, WEIGHTS},
};

/// What [`Checkpoint::save_with`](super::Checkpoint::save_with) does with a model that a folder contains already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Existing {
    /// It is an error.
    #[default]
    Refuse,
    /// It is replaced.
    Replace,
}

/// A model as a folder, in the form that another library opens.
pub(super) struct Folder {
    /// The document that goes into `model.safetensors`; none if its tensors have other names than the document's.
    pub info: Option<ModelInfo>,
    /// The tensors of `model.safetensors`.
    pub weights: Arc<dyn Weights>,
    /// The other files.
    pub files: Vec<(&'static str, Value)>,
    /// What the other library computes otherwise.
    pub notes: Vec<String>,
}

impl Folder {
    /// Writes `model.safetensors`, then the files beside it. The folder is made if it does not exist.
    pub(super) fn write(&self, path: &Path, existing: Existing, how: &How<'_>) -> Result<()> {
        if existing == Existing::Refuse
            && let Some(there) = [WEIGHTS, CONFIG].iter().find(|name| path.join(name).symlink_metadata().is_ok())
        {
            return Err(Error::file(path, format!("holds {there} already; --force replaces the model in it")));
        }
        let made = !path.exists();
        fs::create_dir_all(path).map_err(Error::io(path))?;
        let metadata = self.info.as_ref().map_or(Metadata::Strings { strings: &[], integers: &[] }, Metadata::Document);
        let weights = path.join(WEIGHTS);
        let written = writer::write(&weights, metadata, &*self.weights, Container::Safetensors, how).and_then(|()| {
            self.files.iter().try_for_each(|(name, value)| {
                let path = path.join(name);
                let text =
                    serde_json::to_string_pretty(value).map_err(|error| Error::file(&path, error.to_string()))?;
                atomic::file(&path, how.inputs, |mut file| {
                    file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n")).map_err(Error::io(&path))
                })
            })
        });
        if written.is_err() && made {
            // it is empty unless a later file failed; then what is whole stays
            let _ = fs::remove_dir(path);
        }
        written
    }
}
