//! A model → a safetensors file: a header of our own, sorted, then each tensor at its place. The same model gives the same
//! bytes, whatever the number of threads.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    path::Path,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use serde_json::{Map, Value, json};
use vit_model::{
    Dtype, ModelInfo, TensorInfo, Weights,
    weights::{check_finite, widen},
};

use crate::{Error, Result, save, stored::StoredFile};

/// Bytes between two requests to begin with the writing to disk, so that the last one is short.
const SYNC_EVERY: u64 = 32 << 20;

/// How a model is written.
pub struct Options<'a> {
    /// The type of every tensor; each keeps its own where this is not set.
    pub dtype: Option<Dtype>,
    /// Threads that read and convert.
    pub threads: usize,
    /// The ONNX file, where the document still lacks its SHA-256: it is computed while the tensors are written.
    pub unhashed: Option<&'a StoredFile>,
    /// Files that must not be overwritten.
    pub inputs: &'a [&'a Path],
    /// Told how many bytes are done, of how many.
    pub progress: &'a (dyn Fn(u64, u64) + Sync),
}

/// Writes a safetensors file with timm's tensor names, and the document in its metadata.
///
/// At most one tensor per thread is in memory.
///
/// # Errors
/// A tensor that cannot be read, is not finite, or does not fit the type; a file that cannot be written. Then nothing is
/// left behind, and a file that was there before is unchanged.
pub fn file(path: &Path, info: &ModelInfo, weights: &dyn Weights, options: &Options<'_>) -> Result<()> {
    tensors(path, Some(info), weights, options)
}

/// A model as a folder, in the form that another library opens.
pub struct Folder {
    /// The document that goes into `model.safetensors`; none where the tensors have other names than the document means.
    pub info: Option<ModelInfo>,
    /// The tensors of `model.safetensors`.
    pub weights: Arc<dyn Weights>,
    /// The other files.
    pub files: Vec<(&'static str, Value)>,
    /// What the other library will do otherwise, for the user to know.
    pub notes: Vec<String>,
}

/// Writes a folder, which is made where it is not there: `model.safetensors`, then the files beside it.
///
/// # Errors
/// As [`file()`]; and a folder that holds a model already, unless `force` says to replace it.
pub fn folder(path: &Path, folder: &Folder, force: bool, options: &Options<'_>) -> Result<()> {
    const WEIGHTS: &str = "model.safetensors";
    if !force
        && let Some(there) = [WEIGHTS, "config.json"].iter().find(|name| path.join(name).symlink_metadata().is_ok())
    {
        return Err(Error::file(path, format!("holds {there} already; --force replaces the model in it")));
    }
    let made = !path.exists();
    std::fs::create_dir_all(path).map_err(Error::io(path))?;
    let written = tensors(&path.join(WEIGHTS), folder.info.as_ref(), folder.weights.as_ref(), options).and_then(|()| {
        folder.files.iter().try_for_each(|(name, value)| {
            let path = path.join(name);
            let mut text =
                serde_json::to_string_pretty(value).map_err(|error| Error::graph(format!("{name}: {error}")))?;
            text.push('\n');
            save::file(&path, options.inputs, |mut file| file.write_all(text.as_bytes()).map_err(Error::io(&path)))
        })
    });
    if written.is_err() && made {
        // empty, unless a later file failed; then what is whole stays
        let _ = std::fs::remove_dir(path);
    }
    written
}

fn tensors(path: &Path, info: Option<&ModelInfo>, weights: &dyn Weights, options: &Options<'_>) -> Result<()> {
    let (Some(info), Some(hashed)) = (info, options.unhashed) else {
        let layout = Layout::new(info, weights.tensors(), options.dtype)?;
        return save::file(path, options.inputs, |file| fill(path, file, &layout, weights, options, || ()));
    };
    let layout = |digest: &str| {
        let mut info = info.clone();
        info.source.insert("sha256".into(), digest.into());
        Layout::new(Some(&info), weights.tensors(), options.dtype)
    };
    // every digest is as long as this one
    let draft = layout(&"0".repeat(64))?;
    save::file(path, options.inputs, |file| {
        let digest = OnceLock::new();
        fill(path, file, &draft, weights, options, || drop(digest.set(hashed.sha256())))?;
        let digest = digest.into_inner().unwrap_or_else(|| hashed.sha256())?;
        let header = layout(&digest)?.header;
        write_all_at(file, &header, 8).map_err(Error::io(path))
    })
}

/// A tensor's place in the file.
struct Place<'a> {
    name: &'a str,
    stored: Dtype,
    dtype: Dtype,
    offset: u64,
}

struct Layout<'a> {
    header: Vec<u8>,
    places: Vec<Place<'a>>,
    /// Bytes behind the header.
    data_len: u64,
}

impl<'a> Layout<'a> {
    fn new(info: Option<&ModelInfo>, tensors: &'a BTreeMap<String, TensorInfo>, dtype: Option<Dtype>) -> Result<Self> {
        let mut sorted: Vec<(&String, &TensorInfo, Dtype)> =
            tensors.iter().map(|(name, info)| (name, info, dtype.unwrap_or(info.dtype))).collect();
        // wide elements first: then each tensor is aligned to its elements
        sorted.sort_by_key(|(name, _, dtype)| (std::cmp::Reverse(dtype.size()), *name));
        let too_large = |name: &str| Error::tensor(name, "is larger than any memory");
        let mut metadata = json!({ "format": "pt" });
        if let Some(info) = info {
            let config =
                serde_json::to_string(info).map_err(|error| Error::graph(format!("configuration: {error}")))?;
            metadata["config"] = json!(config);
        }
        let mut header = Map::new();
        header.insert("__metadata__".into(), metadata);
        let mut places = Vec::with_capacity(sorted.len());
        let mut offset = 0_u64;
        for (name, info, dtype) in sorted {
            let count = info.shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d));
            let len = count.and_then(|n| u64::try_from(n).ok()).ok_or_else(|| too_large(name))?;
            let end = offset.checked_add(len).ok_or_else(|| too_large(name))?;
            let entry = json!({ "dtype": dtype.name(), "shape": info.shape, "data_offsets": [offset, end] });
            header.insert(name.clone(), entry);
            places.push(Place { name, stored: info.dtype, dtype, offset });
            offset = end;
        }
        let mut header =
            serde_json::to_vec(&Value::Object(header)).map_err(|error| Error::graph(format!("header: {error}")))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok(Self { header, places, data_len: offset })
    }
}

/// Header, then tensors: each thread takes the next one, converts it and writes it to its place. One of them does what is
/// to be done `aside` first.
fn fill(
    path: &Path,
    file: &File,
    layout: &Layout<'_>,
    weights: &dyn Weights,
    options: &Options<'_>,
    aside: impl Fn() + Sync,
) -> Result<()> {
    let io = |result: std::io::Result<()>| result.map_err(Error::io(path));
    let start = layout.header.len().saturating_add(8) as u64;
    let total = start.saturating_add(layout.data_len);
    io(file.set_len(total))?;
    io(write_all_at(file, &(layout.header.len() as u64).to_le_bytes(), 0))?;
    io(write_all_at(file, &layout.header, 8))?;
    let (next, done, failed) = (AtomicUsize::new(0), AtomicU64::new(start), AtomicBool::new(false));
    let failure: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(place) = layout.places.get(at) else { break };
            let written = tensor(weights, place)
                .and_then(|bytes| {
                    io(write_all_at(file, &bytes, start.saturating_add(place.offset)))?;
                    Ok(bytes.len() as u64)
                })
                .inspect(|&len| (options.progress)(done.fetch_add(len, Ordering::Relaxed).saturating_add(len), total));
            if let Err(error) = written {
                failed.store(true, Ordering::Relaxed);
                // the first in order, so that the message does not depend on the threads either
                if let Ok(mut first) = failure.lock()
                    && first.as_ref().is_none_or(|(before, _)| at < *before)
                {
                    *first = Some((at, error));
                }
            }
        }
    };
    let finished = AtomicBool::new(false);
    thread::scope(|scope| {
        // the disk works while we do
        let early = || {
            let mut synced = start;
            while !finished.load(Ordering::Acquire) {
                thread::park_timeout(std::time::Duration::from_millis(20));
                let now = done.load(Ordering::Relaxed);
                if now.saturating_sub(synced) >= SYNC_EVERY {
                    synced = now;
                    let _ = file.sync_data();
                }
            }
        };
        let early = (layout.data_len > 2 * SYNC_EVERY).then(|| scope.spawn(early));
        let aside = &aside;
        let others: Vec<_> = (1..options.threads).map(|_| scope.spawn(work)).collect();
        aside();
        work();
        for other in others {
            let _ = other.join();
        }
        finished.store(true, Ordering::Release);
        if let Some(early) = early {
            early.thread().unpark();
        }
    });
    match failure.into_inner() {
        Ok(Some((_, error))) => Err(error),
        _ => Ok(()),
    }
}

/// A tensor's elements in the type that is written.
fn tensor(weights: &dyn Weights, place: &Place<'_>) -> Result<Vec<u8>> {
    let bytes = weights.read(place.name)?;
    if place.stored == place.dtype {
        return Ok(bytes);
    }
    let values = widen(place.stored, &bytes);
    let bytes: Vec<u8> = match place.dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F64 => values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
    };
    if let Ok(()) = check_finite(place.name, place.dtype, &bytes) {
        Ok(bytes)
    } else {
        let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        let why = format!("its largest value {largest} does not fit into {}", place.dtype.name());
        Err(Error::tensor(place.name, why))
    }
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        bytes = bytes.get(n..).unwrap_or_default();
        offset = offset.saturating_add(n as u64);
    }
    Ok(())
}
