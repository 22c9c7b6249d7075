//! `Checkpoint::save`: a model → a file or a folder, in the form that a library opens.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    model::Checkpoint,
    quantised::Quantised,
    timm, transformers,
    writer::{self, Container, How, Metadata},
    written::{Existing, Folder},
};
use crate::{Dtype, Error, Result, TensorProblem, Weights};

/// The form in which [`Checkpoint::save`] writes a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// One safetensors file: timm's tensor names, with the whole document (architecture, preprocessing, labels, origin) and
    /// checksums in its metadata.
    Safetensors,
    /// One GGUF file with the same document. Matrices that [`Checkpoint::quantised`] made stay in Q8_0.
    Gguf,
    /// A folder with `model.safetensors` and `config.json` that `timm.create_model("local-dir:…", pretrained=True)` opens.
    Timm,
    /// A folder with `model.safetensors`, `config.json` and `preprocessor_config.json` that transformers'
    /// `from_pretrained` opens.
    Transformers,
}

impl Format {
    /// Whether this form is a folder.
    pub fn is_folder(self) -> bool {
        matches!(self, Self::Timm | Self::Transformers)
    }
}

/// How [`Checkpoint::save_with`] writes.
#[derive(Default)]
pub struct SaveOptions<'a> {
    dtype: Option<Dtype>,
    threads: Option<usize>,
    existing: Existing,
    inputs: Vec<PathBuf>,
    progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
}

impl<'a> SaveOptions<'a> {
    /// Every tensor keeps its type, up to four threads write, a model in a folder is not replaced.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stores every tensor as this type. Matrices in Q8_0 stay as they are in a GGUF file.
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Threads that read and convert tensors. Each has at most one tensor in memory.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads.max(1));
        self
    }

    /// What happens to a model that the folder contains already. Files are always replaced.
    pub fn existing(mut self, existing: Existing) -> Self {
        self.existing = existing;
        self
    }

    /// Files that must not be overwritten, however the output's path is spelled: what the model is read from.
    pub fn inputs(mut self, inputs: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        self.inputs.extend(inputs.into_iter().map(Into::into));
        self
    }

    /// Calls `progress` with the number of bytes that are written, and of all bytes. Several threads may call at once.
    pub fn progress(mut self, progress: &'a (dyn Fn(u64, u64) + Sync)) -> Self {
        self.progress = Some(progress);
        self
    }
}

impl Checkpoint {
    /// Writes the model to a file or folder. See [`save_with`](Self::save_with).
    ///
    /// ```
    /// use vit_model::{Checkpoint, Format};
    ///
    /// # fn main() -> vit_model::Result<()> {
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let out = folder.path().join("digits");
    /// let digits = Checkpoint::open("../weights/digits/model.safetensors")?;
    /// digits.save(&out, Format::Timm)?; // timm.create_model("local-dir:digits", pretrained=True)
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`save_with`](Self::save_with).
    pub fn save(&self, path: impl AsRef<Path>, format: Format) -> Result<Vec<String>> {
        self.save_with(path, format, &SaveOptions::new())
    }

    /// Writes the model to a file or folder, each file whole or not at all, and returns notes on what the library that the
    /// format is for computes otherwise.
    ///
    /// The same model gives the same bytes.
    ///
    /// # Errors
    /// A model that the format cannot express; a tensor that cannot be read or does not fit its type; a file that cannot be
    /// written. Then nothing is left behind, and a file that was there before is unchanged.
    pub fn save_with(&self, path: impl AsRef<Path>, format: Format, options: &SaveOptions<'_>) -> Result<Vec<String>> {
        let path = path.as_ref();
        let silent = |_, _| {};
        let cores = || std::thread::available_parallelism().map_or(1, usize::from).min(4);
        let how = How {
            dtype: options.dtype,
            threads: options.threads.unwrap_or_else(cores),
            inputs: &options.inputs,
            progress: options.progress.unwrap_or(&silent),
        };
        let file = |container| {
            writer::write(path, Metadata::Document(&self.info), &*self.weights, container, &how).map(|()| Vec::new())
        };
        match format {
            Format::Safetensors => file(Container::Safetensors),
            Format::Gguf => file(Container::Gguf),
            Format::Timm | Format::Transformers => {
                let folder = self.folder(format)?;
                folder.write(path, options.existing, &how)?;
                Ok(folder.notes)
            }
        }
    }

    /// Whether the model can be written in a format, without writing it: the notes that [`save_with`](Self::save_with)
    /// would return.
    ///
    /// # Errors
    /// A model that the format cannot express, with the switch that it has no form for.
    pub fn fits(&self, format: Format) -> Result<Vec<String>> {
        if format.is_folder() { self.folder(format).map(|folder| folder.notes) } else { Ok(Vec::new()) }
    }

    fn folder(&self, format: Format) -> Result<Folder> {
        match format {
            Format::Transformers => transformers::folder(&self.info, &self.weights),
            _ => timm::folder(&self.info, &self.weights),
        }
    }

    /// The same model with its matrices in ggml's Q8_0: one scale for 32 values of 8 bits. [`Format::Gguf`] stores them so;
    /// every other reader gets the dequantised f32 values.
    ///
    /// A matrix has two dimensions, the inner one a multiple of 32: every linear layer of a usual ViT. Everything else keeps
    /// its type.
    pub fn quantised(&self) -> Self {
        let mut model = self.clone();
        model.weights = Arc::new(Quantised::new(self.weights.clone()));
        model
    }
}

/// The values of a tensor that is in memory.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Values<'a> {
    /// Written as F32; they must be finite.
    F32(&'a [f32]),
    /// Written as I64: token ids.
    I64(&'a [i64]),
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(values)
    }
}

/// Writes named tensors to a safetensors file, with strings beside them under `__metadata__`. The same input gives the same
/// bytes.
///
/// # Errors
/// A file that cannot be written, or one of `inputs`, which must not be overwritten.
pub fn save_tensors<'a>(
    path: impl AsRef<Path>,
    tensors: &[(&str, &[usize], impl Into<Values<'a>> + Copy)],
    metadata: &[(&str, String)],
    inputs: &[impl AsRef<Path>],
) -> Result<()> {
    let inputs: &Vec<PathBuf> = &inputs.iter().map(|input| input.as_ref().into()).collect();
    let tensors: Vec<(&str, &[usize], Values<'a>)> =
        tensors.iter().map(|&(name, shape, values)| (name, shape, values.into())).collect();
    let mut integers = Vec::new();
    let mut infos = std::collections::BTreeMap::new();
    for (name, shape, values) in &tensors {
        let dtype = match values {
            Values::F32(values) => {
                if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                    let why = format!("element {at} is not a finite number (NaN or infinite), and is not written");
                    return Err(Error::problem(*name, TensorProblem::NotFinite, why));
                }
                Dtype::F32
            }
            // weights are floats, so the writer is told which 8 bytes are integers
            Values::I64(_) => {
                integers.push(*name);
                Dtype::F64
            }
        };
        infos.insert((*name).to_owned(), crate::TensorInfo { dtype, shape: shape.to_vec() });
    }
    let how = How { dtype: None, threads: 1, inputs, progress: &|_, _| {} };
    let weights = InMemory { tensors: &tensors, infos };
    let metadata = Metadata::Strings { strings: metadata, integers: &integers };
    writer::write(path.as_ref(), metadata, &weights, Container::Safetensors, &how)
}

/// Values that are in memory.
struct InMemory<'a> {
    tensors: &'a [(&'a str, &'a [usize], Values<'a>)],
    infos: std::collections::BTreeMap<String, crate::TensorInfo>,
}

impl Weights for InMemory<'_> {
    fn tensors(&self) -> &std::collections::BTreeMap<String, crate::TensorInfo> {
        &self.infos
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let found = self.tensors.iter().find(|(own, ..)| *own == name);
        let (.., values) = found.ok_or_else(|| Error::missing(name))?;
        Ok(match values {
            Values::F32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Values::I64(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        })
    }
}
