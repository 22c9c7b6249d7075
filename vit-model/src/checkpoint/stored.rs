//! The weights of a file or of a folder under their own names, whatever contains them: safetensors or PyTorch's pickles, one
//! file or several.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    Error, Result,
    checkpoint::{pickle::Pickle, safetensors::Safetensors},
    files::{FORMS, small_file},
    json, limits,
    weights::{ReadAt, TensorInfo, Weights},
};

/// The tensors of a model as its files name them.
pub(super) struct Stored {
    /// The file, for error messages.
    pub path: PathBuf,
    pub weights: Arc<dyn Weights>,
    /// Names of tensors that cannot be weights, because they are integers or the like.
    pub others: Vec<String>,
    /// What the file does not say and was assumed.
    pub assumed: Vec<String>,
    /// What was done that the user may want to know.
    pub remarks: Vec<String>,
    /// The key that the user named was found.
    pub keyed: bool,
    /// The file is a TorchScript archive.
    pub script: bool,
}

/// Name endings of files that may hold weights.
const ENDINGS: [&str; 6] = ["safetensors", "bin", "pth", "pt", "ckpt", "tar"];

/// What the weights of a folder are in.
pub(super) enum Found {
    /// A file that this project wrote, with its own document.
    Ours(Safetensors),
    Weights(Stored),
}

impl Stored {
    /// Opens one file. `key` names the state dict, if there are several.
    pub(super) fn file(path: &Path, key: Option<&str>) -> Result<Found> {
        if !Pickle::is(path) {
            let file = Safetensors::open(path)?;
            if file.metadata().contains_key("config") && key.is_none() {
                return Ok(Found::Ours(file));
            }
            let (others, path) = (file.others().to_vec(), path.to_owned());
            return Ok(Found::Weights(Self::new(path, Arc::new(file), others)));
        }
        let file = Pickle::open(path, key)?;
        let mut stored = Self::new(path.to_owned(), Arc::new(Empty), file.others().to_vec());
        if let Some(found) = file.key() {
            stored.keyed = true;
            stored.remarks.push(format!("the weights are those under the key `{found}`"));
            if key.is_none() && !file.besides().is_empty() {
                let besides = file.besides().join("`, `");
                stored
                    .assumed
                    .push(format!("weights: `{found}` (the file also holds `{besides}`; --state-dict chooses)"));
            }
        }
        stored.script = file.is_script();
        stored.weights = Arc::new(file);
        Ok(Found::Weights(stored))
    }

    fn new(path: PathBuf, weights: Arc<dyn Weights>, others: Vec<String>) -> Self {
        Self { path, weights, others, assumed: Vec::new(), remarks: Vec::new(), keyed: false, script: false }
    }

    /// The same tensors once more, to try names on.
    pub(super) fn again(&self) -> Self {
        let mut again = Self::new(self.path.clone(), self.weights.clone(), self.others.clone());
        again.script = self.script;
        again
    }

    /// Opens the weights of a folder that have one of the usual names.
    pub(super) fn usual(folder: &Path, key: Option<&str>) -> Result<Option<Found>> {
        let has = |name: &str| folder.join(name).symlink_metadata().is_ok();
        for [file, index] in FORMS {
            if has(file) {
                return Self::file(&folder.join(file), key).map(Some);
            }
            if has(index) {
                return Self::shards(folder, &folder.join(index)).map(|stored| Some(Found::Weights(stored)));
            }
        }
        Ok(None)
    }

    /// Opens several files and their index.
    fn shards(folder: &Path, index: &Path) -> Result<Self> {
        let shards = Shards::open(folder, index)?;
        let others = shards.files.iter().flat_map(|file| file.others.iter().cloned()).collect();
        Ok(Self::new(index.to_owned(), Arc::new(shards), others))
    }
}

/// Files of the folder that may hold the weights, by their name. Optimisers and settings are known by theirs.
pub(super) fn candidates(folder: &Path) -> Vec<String> {
    const NOT: [&str; 6] = ["training_args.bin", "optimizer", "scheduler", "rng_state", "scaler", "adapter_model"];
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let ends = |name: &String| {
        let ending = Path::new(name).extension().and_then(|ending| ending.to_str());
        ending.is_some_and(|ending| ENDINGS.iter().any(|known| ending.eq_ignore_ascii_case(known)))
    };
    let mut names: Vec<String> = names
        .filter(ends)
        .filter(|name| !name.starts_with('.') && !NOT.iter().any(|not| name.starts_with(not)))
        .take(limits::SHARDS)
        .collect();
    names.sort_unstable();
    names
}

/// No tensors, until there are some.
struct Empty;

impl Weights for Empty {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        const { &BTreeMap::new() }
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        Err(Error::missing(name))
    }
}

/// One of several files.
struct Shard {
    path: PathBuf,
    weights: Arc<dyn Weights>,
    others: Vec<String>,
}

/// Several files, and an index of which tensor is in which file.
struct Shards {
    files: Vec<Shard>,
    /// For each tensor, the index of its file in `files`.
    of: BTreeMap<String, usize>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Shards {
    fn open(folder: &Path, path: &Path) -> Result<Self> {
        let fail = |why: String| Error::file(path, why);
        let index = json::parse(&small_file(path)?).map_err(fail)?;
        let map = index.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| fail("has no `weight_map`".into()))?;
        let mut shards = Self { files: Vec::new(), of: BTreeMap::new(), tensors: BTreeMap::new() };
        let mut opened: BTreeMap<&str, usize> = BTreeMap::new();
        for (tensor, file) in map {
            let name = file.as_str().ok_or_else(|| fail(format!("`{tensor}` must name a file, found {file}")))?;
            let mut parts = Path::new(name).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !plain || name.contains(['\\', ':', '\0']) {
                return Err(fail(format!("says that `{tensor}` is in {name:?}, which is no file of this folder")));
            }
            let at = match opened.get(name) {
                Some(&at) => at,
                None if opened.len() >= limits::SHARDS => {
                    return Err(fail(format!("names more than {} files", limits::SHARDS)));
                }
                None => {
                    let at = shards.files.len();
                    shards.files.push(Shard::open(&folder.join(name))?);
                    opened.insert(name, at);
                    at
                }
            };
            let Some(shard) = shards.files.get(at) else { continue };
            match shard.weights.tensors().get(tensor) {
                Some(info) => {
                    shards.of.insert(tensor.clone(), at);
                    shards.tensors.insert(tensor.clone(), info.clone());
                }
                None if shard.others.contains(tensor) => {}
                None => return Err(fail(format!("says that `{tensor}` is in {name}, which does not hold it"))),
            }
        }
        for (at, file) in shards.files.iter().enumerate() {
            if let Some(name) = file.weights.tensors().keys().find(|name| shards.of.get(*name) != Some(&at)) {
                return Err(fail(format!("does not list `{name}` of {}", file.path.display())));
            }
        }
        Ok(shards)
    }

    /// The weights that contain a tensor.
    fn file(&self, name: &str) -> Result<&dyn Weights> {
        let file = self.of.get(name).and_then(|&at| self.files.get(at));
        file.map(|file| file.weights.as_ref()).ok_or_else(|| Error::missing(name))
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let path = path.to_owned();
        Ok(if Pickle::is(&path) {
            let file = Pickle::open(&path, None)?;
            Self { others: file.others().to_vec(), path, weights: Arc::new(file) }
        } else {
            let file = Safetensors::open(&path)?;
            Self { others: file.others().to_vec(), path, weights: Arc::new(file) }
        })
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
