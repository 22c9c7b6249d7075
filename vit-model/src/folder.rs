//! A folder as found on the Hub, timm's or transformers', → [`Checkpoint`].

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::{
    collections::BTreeMap,
    path::{Component, Path},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    Error, ModelInfo, Result, hf, json, limits,
    load::{Checkpoint, small_file},
    safetensors::Safetensors,
    timm,
    weights::{ReadAt, TensorInfo, Weights},
};

/// The weights of a folder: one file, or an index of several.
pub(crate) const WEIGHTS: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Opens a folder with `model.safetensors` (or its index and shards) and `config.json`.
pub(crate) fn open(folder: &Path) -> Result<Checkpoint> {
    let weights = folder.join(WEIGHTS);
    let index = folder.join(INDEX);
    if weights.symlink_metadata().is_ok() {
        let file = Safetensors::open(&weights)?;
        let others = file.others().to_vec();
        if file.metadata().contains_key("config") {
            return crate::load::ours(file);
        }
        return tie(folder, &weights, Arc::new(file), &others);
    }
    if index.symlink_metadata().is_ok() {
        let shards = Shards::open(folder, &index)?;
        let others: Vec<String> = shards.files.iter().flat_map(Safetensors::others).cloned().collect();
        return tie(folder, &index, Arc::new(shards), &others);
    }
    let pickle = folder.join("pytorch_model.bin").exists();
    Err(Error::file(
        folder,
        if pickle {
            format!("holds pytorch_model.bin, and no {WEIGHTS}: save the model as safetensors first")
        } else {
            format!("holds neither {WEIGHTS} nor {INDEX}")
        },
    ))
}

/// The document of a folder, without its weights: enough to preprocess.
pub(crate) fn info(folder: &Path) -> Result<ModelInfo> {
    let (path, config, processor) = documents(folder)?;
    match config.get("model_type") {
        Some(_) => hf::info(&config, processor.as_ref(), None).map(|(info, _)| info).map_err(|e| e.within(&path)),
        None => timm::info(&config).map_err(|why| Error::file(&path, why)),
    }
}

fn documents(folder: &Path) -> Result<(std::path::PathBuf, Value, Option<Value>)> {
    let path = folder.join("config.json");
    if path.symlink_metadata().is_err() {
        return Err(Error::file(folder, "holds no config.json, which says what the model is"));
    }
    let config = value(&path)?;
    if !config.is_object() {
        return Err(Error::file(&path, format!("must hold an object, found {}", kind(&config))));
    }
    let beside = folder.join("preprocessor_config.json");
    let processor = if beside.symlink_metadata().is_ok() { Some(value(&beside)?) } else { None };
    Ok((path, config, processor))
}

fn value(path: &Path) -> Result<Value> {
    json::parse(&small_file(path)?).map_err(|why| Error::file(path, why))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Ties the documents of a folder to its weights.
fn tie(folder: &Path, path: &Path, weights: Arc<dyn Weights>, others: &[String]) -> Result<Checkpoint> {
    let (config_path, config, processor) = documents(folder)?;
    let checkpoint = if config.get("model_type").is_some() {
        let (info, names) = hf::info(&config, processor.as_ref(), Some(weights.tensors()))
            .map_err(|error| error.within(&config_path))?;
        let renamed = hf::Renamed::new(weights, names, &info.model).map_err(|error| error.within(path))?;
        Checkpoint::new(info, Arc::new(renamed))
    } else {
        let info = timm::info(&config).map_err(|why| Error::file(&config_path, why))?;
        if let Some(other) = others.first() {
            return Err(Error::file(path, format!("tensor `{other}` is left over: not a tensor of weights")));
        }
        let weights = timm::loaded(weights, &config, &info.model).map_err(|error| error.within(path))?;
        Checkpoint::new(info, weights)
    };
    checkpoint.map_err(|error| error.within(path))
}

/// Several files, and an index that says which tensor is in which.
struct Shards {
    files: Vec<Safetensors>,
    /// Tensor → its file.
    of: BTreeMap<String, usize>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Shards {
    fn open(folder: &Path, path: &Path) -> Result<Self> {
        let fail = |why: String| Error::file(path, why);
        let index = value(path)?;
        let map = index.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| fail("has no `weight_map`".into()))?;
        let mut shards = Self { files: Vec::new(), of: BTreeMap::new(), tensors: BTreeMap::new() };
        let mut opened: BTreeMap<&str, usize> = BTreeMap::new();
        for (tensor, file) in map {
            let name = file.as_str().ok_or_else(|| fail(format!("`{tensor}` must name a file, found {file}")))?;
            let mut parts = Path::new(name).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !plain || name.contains(['\\', ':', '\0']) {
                return Err(fail(format!("`{tensor}` is said to be in {name:?}, which is no file of this folder")));
            }
            let at = match opened.get(name) {
                Some(&at) => at,
                None if opened.len() >= limits::SHARDS => {
                    return Err(fail(format!("names more than {} files", limits::SHARDS)));
                }
                None => {
                    let at = shards.files.len();
                    shards.files.push(Safetensors::open(&folder.join(name))?);
                    opened.insert(name, at);
                    at
                }
            };
            let Some(shard) = shards.files.get(at) else { continue };
            match shard.tensors().get(tensor) {
                Some(info) => {
                    shards.of.insert(tensor.clone(), at);
                    shards.tensors.insert(tensor.clone(), info.clone());
                }
                None if shard.others().contains(tensor) => {}
                None => return Err(fail(format!("says that `{tensor}` is in {name}, which does not hold it"))),
            }
        }
        for (at, file) in shards.files.iter().enumerate() {
            if let Some(name) = file.tensors().keys().find(|name| shards.of.get(*name) != Some(&at)) {
                return Err(fail(format!("does not list `{name}` of {}", file.path().display())));
            }
        }
        Ok(shards)
    }

    /// The file that holds a tensor.
    fn file(&self, name: &str) -> Result<&Safetensors> {
        let file = self.of.get(name).and_then(|&at| self.files.get(at));
        file.ok_or_else(|| Error::tensor(name, "missing"))
    }
}

impl Weights for Shards {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        self.file(name)?.read(name)
    }

    fn stretches(&self, name: &str) -> Result<ReadAt<'_>> {
        self.file(name)?.stretches(name)
    }
}
