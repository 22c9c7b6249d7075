//! Opens files and folders in every supported format.

use std::{fs, path::Path, sync::Arc};

use candle_core::{DType, Device};

use super::{
    document::{document, ours},
    folder,
    gguf::Gguf,
    model::Checkpoint,
    prefix,
    safetensors::{self, Safetensors},
    stored::{Found, Stored},
    text::TextSource,
};
use crate::{Error, ModelInfo, Result, VisionTransformer};

/// A small model that classifies handwritten digits, as the bytes of a file that [`Checkpoint::from_bytes`] opens. It has 208,074
/// parameters. `weights/digits` in the repository describes how it was trained.
#[cfg(feature = "digits")]
pub static DIGITS: &[u8] = include_bytes!("../../digits/model.safetensors");

/// What a file does not say about itself.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    pub(super) arch: Option<String>,
    pub(super) state_dict: Option<String>,
}

impl OpenOptions {
    /// Nothing that the file does not say.
    pub fn new() -> Self {
        Self::default()
    }

    /// timm's name of the architecture, for weights without a configuration or with a wrong one.
    #[must_use]
    pub fn arch(mut self, name: impl Into<String>) -> Self {
        self.arch = Some(name.into());
        self
    }

    /// Which of several networks in the file to read: the key of its state dict, such as `model_ema`, or the first part of
    /// its tensors' names, such as `teacher`.
    #[must_use]
    pub fn state_dict(mut self, key: impl Into<String>) -> Self {
        self.state_dict = Some(key.into());
        self
    }

    /// Opens a file or folder; see [`Checkpoint::open`].
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and if the file has no such architecture or key.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Checkpoint> {
        let path = path.as_ref();
        let meta = fs::metadata(path).map_err(Error::io(path))?;
        if meta.is_dir() {
            return folder::open(path, self);
        }
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx")) {
            return Err(Error::file(path, safetensors::IS_ONNX));
        }
        if Gguf::is(path) {
            let mut file = Gguf::open(path)?;
            let (info, checksums) = document(path, file.metadata())?;
            if let Some(checksums) = checksums {
                file.expect(checksums);
            }
            return Checkpoint::new(info, Arc::new(file)).map_err(|error| error.within(path));
        }
        match Stored::file(path, self.state_dict.as_deref())? {
            Found::Ours(file) => ours(file),
            Found::Weights(stored) => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                folder::tie(folder.unwrap_or(Path::new(".")), stored, self)
            }
        }
    }
}

impl Checkpoint {
    /// Opens a model: a safetensors or GGUF file that this project wrote; a folder as found on the Hub (timm's, transformers'
    /// or open_clip's format); a file of weights beside its `config.json`; or a state dict whose architecture its tensors
    /// determine (torchvision's, OpenAI's CLIP, one of timm's). Weights are safetensors, or PyTorch's `.pth`, `.pt`, `.bin` and
    /// `.ckpt`, which are read without executing anything in them. Building a model reads the tensors; opening reads only
    /// the headers.
    ///
    /// [`resolve`](Self::resolve) also accepts names: `digits`, short names and repositories on the Hub. [`OpenOptions`] says
    /// what a file does not.
    ///
    /// # Errors
    /// If the path cannot be used. The message says what is there and why it cannot be used.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        open(path.as_ref())
    }

    /// Opens a safetensors file that is embedded in the program. Errors show `name` in place of a path.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(name: &str, bytes: &'static [u8]) -> Result<Self> {
        ours(Safetensors::from_bytes(name, bytes)?)
    }
}

impl TextSource {
    /// The text tower of a folder as found on the Hub, whether there is an image tower beside it or not.
    ///
    /// # Errors
    /// If the folder cannot be read, or describes no text tower.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !fs::metadata(path).map_err(Error::io(path))?.is_dir() {
            return Err(Error::unsupported("a text tower is read from a folder, with its tokenizer").within(path));
        }
        folder::text(path)
    }
}

/// Opens a file or folder; see [`Checkpoint::open`].
///
/// # Errors
/// If the path cannot be used. The message says what is there and why it cannot be used.
pub fn open(path: &Path) -> Result<Checkpoint> {
    OpenOptions::new().open(path)
}

/// Opens a file with the state dict of torchvision's `VisionTransformer`. The tensors do not determine the number of heads,
/// which is why it is an argument; [`open`] knows it for the widths of torchvision's own models.
///
/// # Errors
/// As [`open`], and if `num_heads` does not divide the width.
pub fn torchvision(path: &Path, num_heads: usize) -> Result<Checkpoint> {
    match Stored::file(path, None)? {
        Found::Ours(file) => ours(file),
        Found::Weights(mut stored) => {
            prefix::unwrap(&mut stored, None)?;
            super::torchvision::open(&stored, Some(num_heads))
        }
    }
}

impl VisionTransformer {
    /// Builds a model in f32 on a device from a file or folder; see [`open`].
    ///
    /// # Errors
    /// As [`open`] and [`Checkpoint::model`].
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        open(path)?.model(DType::F32, device)
    }
}

/// Reads the document of a file or folder. In a folder, this reads only the configuration files, which are enough for
/// preprocessing, but in transformers' format they do not tell whether the model has a head.
///
/// # Errors
/// As [`open`].
pub fn info(path: &Path) -> Result<ModelInfo> {
    let meta = fs::metadata(path).map_err(Error::io(path))?;
    if meta.is_dir() { folder::info(path) } else { open(path).map(|checkpoint| checkpoint.info) }
}
