//! A file or a folder → [`Checkpoint`]: the document and the weights under timm's names, every name and shape checked.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::Path,
    sync::{Arc, Mutex},
};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

use crate::{
    Config, Error, ModelInfo, Result, VisionTransformer,
    checksum::{self, Checksum, Checksums},
    gguf::Gguf,
    json, limits,
    safetensors::Safetensors,
    torchvision,
    vit::Q8_0,
    weights::{Weights, candle_dtype},
};

/// A model that can be built: on any device, by the candle modules or by the CPU engine.
#[derive(Clone)]
pub struct Checkpoint {
    /// Architecture, preprocessing, labels, origin.
    pub info: ModelInfo,
    /// The tensors, under timm's names.
    pub weights: Arc<dyn Weights>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Ties a document to weights.
    ///
    /// # Errors
    /// An impossible document; a tensor that is missing, left over or of another shape than the architecture implies.
    pub fn new(info: ModelInfo, weights: Arc<dyn Weights>) -> Result<Self> {
        info.validate()?;
        check(&info.model, weights.as_ref())?;
        Ok(Self { info, weights })
    }

    /// The model as candle modules.
    ///
    /// # Errors
    /// A file that can no longer be read, weights that are not finite, a lack of memory.
    pub fn model(&self, dtype: DType, device: &Device) -> Result<VisionTransformer> {
        VisionTransformer::from_weights(&self.info.model, self.weights.as_ref(), dtype, device)
    }
}

/// Opens a safetensors or GGUF file of ours, a folder as found on the Hub, or a state dict of torchvision's.
///
/// # Errors
/// What is there and why it cannot be used, with the path.
pub fn open(path: &Path) -> Result<Checkpoint> {
    let meta = fs::metadata(path).map_err(Error::io(path))?;
    if meta.is_dir() {
        crate::folder::open(path)
    } else if Gguf::is(path) {
        let mut file = Gguf::open(path)?;
        let (info, checksums) = document(path, file.metadata())?;
        if let Some(checksums) = checksums {
            file.expect(checksums);
        }
        Checkpoint::new(info, Arc::new(file)).map_err(|error| error.within(path))
    } else {
        let file = Safetensors::open(path)?;
        let bare = !file.metadata().contains_key("config");
        if bare && torchvision::is(file.tensors()) { torchvision::open(file, None) } else { ours(file) }
    }
}

/// A safetensors file with the state dict of torchvision's `VisionTransformer`, and the heads that it has: their number is
/// not in the tensors. [`open`] knows it for the widths of torchvision's own models.
///
/// # Errors
/// As [`open`]; heads that do not divide the width.
pub fn torchvision(path: &Path, num_heads: usize) -> Result<Checkpoint> {
    torchvision::open(Safetensors::open(path)?, Some(num_heads))
}

/// A safetensors file of ours that is part of the program; `name` stands for its path in errors.
///
/// # Errors
/// As [`open`].
pub fn from_bytes(name: &str, bytes: &'static [u8]) -> Result<Checkpoint> {
    ours(Safetensors::from_bytes(name, bytes)?)
}

pub(crate) fn ours(mut file: Safetensors) -> Result<Checkpoint> {
    let path = file.path().to_owned();
    let (info, checksums) = document(&path, file.metadata())?;
    if let Some(other) = file.others().first() {
        return Err(Error::file(&path, format!("tensor `{other}` is left over: not a tensor of weights")));
    }
    if let Some(checksums) = checksums {
        file.expect(checksums);
    }
    Checkpoint::new(info, Arc::new(file)).map_err(|error| error.within(&path))
}

/// The document that a file of ours carries among its strings, and the checksums in it.
fn document(path: &Path, strings: &BTreeMap<String, String>) -> Result<(ModelInfo, Option<Checksums>)> {
    let Some(text) = strings.get("config") else {
        return Err(Error::file(
            path,
            "carries no configuration: it was not written by vit-convert. If it came with a config.json, name the folder that holds both",
        ));
    };
    let fail = |why: String| Error::file(path, format!("its configuration {why}"));
    let mut value = json::parse(text.as_bytes()).map_err(fail)?;
    if let Some(version) = value.get("vit").filter(|version| **version != 1) {
        return Err(fail(format!("is of version {version}, this program reads version 1: update it")));
    }
    let understood = |error| fail(format!("cannot be understood: {error}"));
    let checksums = value.as_object_mut().and_then(|document| document.remove(checksum::KEY));
    let checksums: Option<Checksums> = checksums.map(serde_json::from_value).transpose().map_err(understood)?;
    let info: ModelInfo = serde_json::from_value(value).map_err(understood)?;
    if let Some(expected) = checksums.as_ref().map(|checksums| checksums.model) {
        // a number that no model can have says more than a checksum
        info.validate().map_err(|error| fail(format!("is impossible: {error}")))?;
        let found = Checksum::of_model(&info.model);
        if found != expected {
            return Err(fail(format!(
                "holds another `model` than was written: its checksum is {found}, expected {expected}. The file is damaged, \
                 or was edited; convert or fetch it again (after a change on purpose, leave `{}` out)",
                checksum::KEY
            )));
        }
    }
    Ok((info, checksums))
}

/// A whole small file.
pub(crate) fn small_file(path: &Path) -> Result<Vec<u8>> {
    // looked at before it is opened, because opening a pipe waits
    let meta = fs::metadata(path).map_err(Error::io(path))?;
    if !meta.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    let file = fs::File::open(path).map_err(Error::io(path))?;
    let mut bytes = Vec::new();
    file.take(u64::try_from(limits::JSON_BYTES).unwrap_or(u64::MAX).saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(Error::io(path))?;
    Ok(bytes)
}

/// Every parameter of an architecture: name → shape. Nothing is allocated for it.
///
/// The list is what [`VisionTransformer::new`] asks for, so that the two cannot differ.
///
/// # Errors
/// An impossible configuration.
pub fn parameters(config: &Config) -> Result<BTreeMap<String, Vec<usize>>> {
    let list = Arc::new(Mutex::new(BTreeMap::new()));
    let backend: Box<dyn SimpleBackend> = Box::new(Lister(list.clone()));
    VisionTransformer::new(config, VarBuilder::from_backend(backend, DType::F32, Device::Cpu))?;
    let list = list.lock().map(|list| list.clone());
    list.map_err(|_| Error::Config("the parameters could not be listed".into()))
}

/// Compares names and shapes with what an architecture implies; says all that is wrong at once.
///
/// # Errors
/// The tensors that are missing, left over or of another shape.
pub fn check(config: &Config, weights: &dyn Weights) -> Result<()> {
    let expected = parameters(config)?;
    let found = weights.tensors();
    let list = |names: &[&str]| {
        let shown = names.iter().take(5).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        match names.len().saturating_sub(5) {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    };
    for (name, shape) in &expected {
        if let Some(info) = found.get(name).filter(|info| info.shape != *shape) {
            return Err(Error::tensor(name, format!("expected the shape {shape:?}, found {:?}", info.shape)));
        }
    }
    let missing: Vec<_> = expected.keys().filter(|name| !found.contains_key(*name)).map(String::as_str).collect();
    let left: Vec<_> = found.keys().filter(|name| !expected.contains_key(*name)).map(String::as_str).collect();
    let why = match (missing.as_slice(), left.as_slice()) {
        ([], []) => return Ok(()),
        (missing, []) => format!("missing: {}", list(missing)),
        ([], left) => format!("left over: {}", list(left)),
        (missing, left) => format!("missing: {}; left over: {}", list(missing), list(left)),
    };
    let name = missing.first().or(left.first()).copied().unwrap_or_default();
    Err(Error::tensor(name, format!("the tensors are not those of the configured architecture; {why}")))
}

impl VisionTransformer {
    /// A model with weights from a file, an importer or a program.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape or not finite; a lack of memory.
    pub fn from_weights(config: &Config, weights: &dyn Weights, dtype: DType, device: &Device) -> Result<Self> {
        // candle's errors are strings; ours goes around it and keeps its kind
        let failure = Mutex::new(None);
        let backend: Box<dyn SimpleBackend + '_> = Box::new(Reader { weights, failure: &failure });
        let model = Self::new(config, VarBuilder::from_backend(backend, dtype, device.clone()));
        match failure.into_inner() {
            Ok(Some(error)) => Err(error),
            _ => model,
        }
    }

    /// A model from a file or folder, in f32 on a device; see [`open`].
    ///
    /// # Errors
    /// As [`open`] and [`Checkpoint::model`].
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        open(path)?.model(DType::F32, device)
    }
}

/// A `VarBuilder`'s view of [`Weights`].
struct Reader<'a> {
    weights: &'a dyn Weights,
    /// The first error, with its kind: candle's interface has room for a string only.
    failure: &'a Mutex<Option<Error>>,
}

impl Reader<'_> {
    fn tensor(&self, name: &str, shape: Option<&Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let info = self.weights.tensors().get(name).ok_or_else(|| Error::tensor(name, "missing"))?;
        if let Some(shape) = shape.filter(|shape| shape.dims() != info.shape) {
            return Err(Error::tensor(name, format!("expected the shape {:?}, found {:?}", shape.dims(), info.shape)));
        }
        let stored = candle_dtype(info.dtype);
        let bytes = self.weights.read(name)?;
        let tensor = if stored == dtype || device.is_cpu() {
            Tensor::from_raw_buffer(&bytes, stored, &info.shape, device)?
        } else {
            Tensor::from_raw_buffer(&bytes, stored, &info.shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?
        };
        Ok(tensor.to_dtype(dtype)?)
    }

    /// A linear's weights as they are stored in Q8_0: the bytes of each row.
    fn blocks(&self, name: &str) -> Result<Tensor> {
        let blocks = self.weights.read_q8_0(name)?;
        let rows = self.weights.tensors().get(name).and_then(|info| info.shape.first()).copied().unwrap_or(1);
        let row = blocks.len().checked_div(rows).unwrap_or(0);
        Ok(Tensor::from_vec(blocks, (rows, row), &Device::Cpu)?)
    }

    fn get(&self, name: &str, shape: Option<&Shape>, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.noted(self.tensor(name, shape, dtype, device))
    }

    /// The result as candle's, with the first error kept.
    fn noted<T>(&self, result: Result<T>) -> candle_core::Result<T> {
        result.map_err(|error| {
            let message = error.to_string();
            if let Ok(mut failure) = self.failure.lock() {
                failure.get_or_insert(error);
            }
            candle_core::Error::Msg(message)
        })
    }
}

impl SimpleBackend for Reader<'_> {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.get(name, Some(&s), dtype, dev)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        match name.strip_suffix(Q8_0) {
            Some(name) => self.noted(self.blocks(name)),
            None => self.get(name, None, dtype, dev),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match name.strip_suffix(Q8_0) {
            Some(name) => self.weights.is_q8_0(name),
            None => self.weights.tensors().contains_key(name),
        }
    }
}

/// Notes what a model asks for, and answers with a zero that is broadcast: no memory, whatever the size.
struct Lister(Arc<Mutex<BTreeMap<String, Vec<usize>>>>);

impl SimpleBackend for Lister {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        if let Ok(mut list) = self.0.lock() {
            list.insert(name.to_owned(), s.dims().to_vec());
        }
        Tensor::zeros((), dtype, dev)?.broadcast_as(s)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("`{name}` is asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        !name.ends_with(Q8_0)
    }
}

/// The document of a file of ours or of a folder. A folder's configuration files are enough; its weights are not looked
/// at, so that the document does not tell whether transformers' model has a head.
///
/// # Errors
/// As [`open`].
pub fn info(path: &Path) -> Result<ModelInfo> {
    let meta = fs::metadata(path).map_err(Error::io(path))?;
    if meta.is_dir() { crate::folder::info(path) } else { open(path).map(|checkpoint| checkpoint.info) }
}

/// A checkpoint by its repository id on the Hub (`timm/…`, `google/vit-base-patch16-224`, `…@revision`), out of the cache
/// or fetched; a path that exists wins.
///
/// # Errors
/// As [`crate::hub::Hub::get`] and [`open`].
#[cfg(feature = "hub")]
pub fn pretrained(name: &str) -> Result<Checkpoint> {
    let path = Path::new(name);
    if path.exists() {
        return open(path);
    }
    open(&crate::hub::Hub::from_env()?.get(&name.parse()?, &mut ())?)
}

#[cfg(feature = "hub")]
impl crate::VisionTransformer {
    /// The model of a repository on the Hub, or of a file or folder, see [`pretrained`].
    ///
    /// # Errors
    /// As [`pretrained`] and [`crate::VisionTransformer::from_weights`].
    pub fn from_pretrained(name: &str, dtype: candle_core::DType, device: &candle_core::Device) -> Result<Self> {
        let checkpoint = pretrained(name)?;
        Self::from_weights(&checkpoint.info.model, &*checkpoint.weights, dtype, device)
    }
}
