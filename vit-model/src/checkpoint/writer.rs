//! Tensors → a safetensors or GGUF file: a sorted header of our own, then each tensor at its place. The same tensors give the
//! same bytes, whatever the number of threads.

use std::{
    borrow::Cow,
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use serde_json::{Map, Value, json};

use super::{
    atomic,
    checksum::{Checksum, Checksums},
    gguf,
};
use crate::{
    Dtype, Error, ModelInfo, Result, TensorInfo, Weights,
    weights::{check_finite, widen},
};

/// Bytes between two requests to begin with the writing to disk, so that the last one is short.
const SYNC_EVERY: u64 = 32 << 20;

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Container {
    Safetensors,
    Gguf,
}

/// The strings that a file carries beside its tensors.
#[derive(Clone, Copy)]
pub(super) enum Metadata<'a> {
    /// The document of a model, with the checksums of its tensors as the last field.
    Document(&'a ModelInfo),
    /// Anything else, under `format`, which is always `pt`.
    Strings {
        strings: &'a [(&'a str, String)],
        /// The tensors of 8-byte elements that are integers, and not [`Dtype::F64`].
        integers: &'a [&'a str],
    },
}

/// How tensors are written.
pub(super) struct How<'a> {
    /// The type of every tensor. Without it each tensor keeps its own. Blocks of Q8_0 stay blocks in a GGUF file.
    pub dtype: Option<Dtype>,
    /// Threads that read and convert.
    pub threads: usize,
    /// Files that must not be overwritten.
    pub inputs: &'a [PathBuf],
    /// Told how many bytes are written, of how many.
    pub progress: &'a (dyn Fn(u64, u64) + Sync),
}

/// Writes all tensors. At most one tensor per thread is in memory.
///
/// # Errors
/// A tensor that cannot be read, is not finite, or does not fit the type; a file that cannot be written. Then nothing is
/// left behind, and a file that was there before is unchanged.
pub(super) fn write(
    path: &Path,
    metadata: Metadata<'_>,
    weights: &dyn Weights,
    container: Container,
    how: &How<'_>,
) -> Result<()> {
    let layout = Layout::new(weights, how.dtype, container)?;
    let draft = layout.header(metadata)?;
    atomic::file(path, how.inputs, |file| {
        let output = Output::new(path, file, &layout, &draft)?;
        output.fill(weights, how)?;
        // the header comes first in the file, and its checksums are known last
        write_all_at(file, &layout.header(metadata)?, 0).map_err(Error::io(path))
    })
}

/// The document, and the checksums as its last field.
#[derive(serde::Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    info: &'a ModelInfo,
    xxh3: &'a Checksums,
}

/// A tensor's place in the file.
struct Place {
    name: String,
    stored: Dtype,
    /// As it is written, and read back.
    info: TensorInfo,
    /// It is written as blocks of Q8_0, which are read as f32.
    q8_0: bool,
    /// Behind the header.
    offset: u64,
    end: u64,
    /// Its [`Checksum`], once it is written.
    checksum: AtomicU64,
}

struct Layout {
    container: Container,
    /// By offset.
    places: Vec<Place>,
    /// Bytes behind the header.
    data_len: u64,
}

impl Layout {
    fn new(weights: &dyn Weights, dtype: Option<Dtype>, container: Container) -> Result<Self> {
        let gguf = container == Container::Gguf;
        let mut sorted: Vec<(&String, &TensorInfo, Dtype)> = (weights.tensors().iter())
            .map(|(name, info)| match dtype.unwrap_or(info.dtype) {
                // ggml's own programs have no f64
                Dtype::F64 if gguf => (name, info, Dtype::F32),
                _ if gguf && weights.is_q8_0(name) => (name, info, Dtype::F32),
                dtype => (name, info, dtype),
            })
            .collect();
        if !gguf {
            // wide elements first: then each tensor is aligned to its elements
            sorted.sort_by_key(|(name, _, dtype)| (std::cmp::Reverse(dtype.size()), *name));
        }
        let align = |end: u64| if gguf { end.checked_next_multiple_of(u64_of(gguf::ALIGNMENT)) } else { Some(end) };
        let too_large = |name: &str| Error::tensor(name, "is larger than any memory");
        let mut places = Vec::with_capacity(sorted.len());
        let mut data_len = 0_u64;
        for (name, info, dtype) in sorted {
            let (offset, q8_0) = (data_len, gguf && weights.is_q8_0(name));
            let count = info.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
            let (values, bytes) = if q8_0 { (gguf::BLOCK, gguf::BLOCK_BYTES) } else { (1, dtype.size()) };
            let len = count.and_then(|n| n.checked_div(values)?.checked_mul(bytes)).and_then(|n| u64::try_from(n).ok());
            let end = len.and_then(|len| offset.checked_add(len)).ok_or_else(|| too_large(name))?;
            let (stored, info) = (info.dtype, TensorInfo { dtype, shape: info.shape.clone() });
            places.push(Place { name: name.clone(), stored, info, q8_0, offset, end, checksum: AtomicU64::new(0) });
            data_len = align(end).ok_or_else(|| too_large(name))?;
        }
        Ok(Self { container, places, data_len })
    }

    /// Everything before the data. Its length does not depend on the checksums.
    fn header(&self, metadata: Metadata<'_>) -> Result<Vec<u8>> {
        let (config, integers) = match metadata {
            Metadata::Document(info) => (vec![("config", self.document(info)?)], &[][..]),
            Metadata::Strings { strings, integers } => (strings.to_vec(), integers),
        };
        match self.container {
            Container::Safetensors => self.safetensors(&config, integers),
            Container::Gguf => Ok(self.gguf(&config)),
        }
    }

    /// The document as JSON.
    fn document(&self, info: &ModelInfo) -> Result<String> {
        let sum = |place: &Place| Checksum(place.checksum.load(Ordering::Relaxed));
        let tensors = self.places.iter().map(|place| (place.name.clone(), sum(place))).collect();
        let xxh3 = &Checksums { model: Checksum::of_model(&info.model), tensors };
        serde_json::to_string(&Document { info, xxh3 }).map_err(|error| Error::config(error.to_string()))
    }

    fn safetensors(&self, strings: &[(&str, String)], integers: &[&str]) -> Result<Vec<u8>> {
        let metadata: Map<String, Value> = ([("format".to_owned(), json!("pt"))].into_iter())
            .chain(strings.iter().map(|(key, value)| ((*key).to_owned(), json!(value))))
            .collect();
        let entries = self.places.iter().map(|Place { name, info, offset, end, .. }| {
            let dtype = if integers.contains(&name.as_str()) { "I64" } else { info.dtype.name() };
            let entry = json!({ "dtype": dtype, "shape": info.shape, "data_offsets": [offset, end] });
            (name.clone(), entry)
        });
        let header: Map<String, Value> =
            [("__metadata__".to_owned(), metadata.into())].into_iter().chain(entries).collect();
        let mut json = serde_json::to_vec(&header).map_err(|error| Error::config(error.to_string()))?;
        json.resize(json.len().next_multiple_of(8), b' ');
        Ok([&length(json.len()), json.as_slice()].concat())
    }

    /// Version 3, with the keys that ggml asks for.
    fn gguf(&self, strings: &[(&str, String)]) -> Vec<u8> {
        let [f32, f16, q8_0, bf16] = gguf::TYPES;
        let text = |text: &str| [&length(text.len()), text.as_bytes()].concat();
        let mut keys = vec![
            [text("general.architecture"), 8_u32.to_le_bytes().into(), text("vit")].concat(),
            [text("general.quantization_version"), 4_u32.to_le_bytes().into(), 2_u32.to_le_bytes().into()].concat(),
        ];
        for (key, value) in strings {
            keys.push([text(key), 8_u32.to_le_bytes().into(), text(value)].concat());
        }
        let mut header = gguf::MAGIC.to_vec();
        header.extend(3_u32.to_le_bytes());
        header.extend(length(self.places.len()));
        header.extend(length(keys.len()));
        header.extend(keys.concat());
        for place in &self.places {
            let kind = match place.info.dtype {
                _ if place.q8_0 => q8_0,
                Dtype::F16 => f16,
                Dtype::Bf16 => bf16,
                Dtype::F32 | Dtype::F64 => f32,
            };
            header.extend(text(&place.name));
            header.extend(u32::try_from(place.info.shape.len()).unwrap_or(u32::MAX).to_le_bytes());
            header.extend(place.info.shape.iter().rev().flat_map(|&d| length(d)));
            header.extend(kind.to_le_bytes());
            header.extend(place.offset.to_le_bytes());
        }
        header.resize(header.len().next_multiple_of(gguf::ALIGNMENT), 0);
        header
    }
}

/// A file that is being written, by several threads.
struct Output<'a> {
    path: PathBuf,
    file: File,
    layout: &'a Layout,
    /// Where the first tensor begins.
    start: u64,
    /// Held by the thread that writes: the system lets one at a time, and the others would spin for it.
    writing: Mutex<()>,
    /// Bytes that are written.
    done: AtomicU64,
    failed: AtomicBool,
    failure: Mutex<Option<(usize, Error)>>,
}

impl<'a> Output<'a> {
    /// Writes the header, and makes room for the rest.
    fn new(path: &Path, file: &File, layout: &'a Layout, header: &[u8]) -> Result<Self> {
        let start = u64_of(header.len());
        let begin = || -> std::io::Result<File> {
            file.set_len(start.saturating_add(layout.data_len))?;
            write_all_at(file, header, 0)?;
            file.try_clone()
        };
        let file = begin().map_err(Error::io(path))?;
        let (done, failed) = (AtomicU64::new(start), AtomicBool::new(false));
        let (writing, failure) = (Mutex::new(()), Mutex::new(None));
        Ok(Self { path: path.into(), file, layout, start, writing, done, failed, failure })
    }

    fn total(&self) -> u64 {
        self.start.saturating_add(self.layout.data_len)
    }

    /// Reads, converts and writes one tensor.
    fn put(&self, weights: &dyn Weights, place: &Place) -> Result<()> {
        let Place { name, q8_0, .. } = place;
        let bytes = if *q8_0 { weights.read_q8_0(name)? } else { weights.read(name)? };
        let bytes = converted(place, bytes.into())?;
        place.checksum.store(Checksum::of_tensor(name, &place.info, &bytes).0, Ordering::Relaxed);
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        write_all_at(&self.file, &bytes, self.start.saturating_add(place.offset)).map_err(Error::io(&self.path))?;
        self.done.fetch_add(u64_of(bytes.len()), Ordering::Relaxed);
        Ok(())
    }

    /// Writes all tensors: each thread takes the next one.
    fn fill(&self, weights: &dyn Weights, how: &How<'_>) -> Result<()> {
        let progress = || (how.progress)(self.done.load(Ordering::Relaxed), self.total());
        let next = AtomicUsize::new(0);
        let work = || {
            while !self.failed.load(Ordering::Relaxed) {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(place) = self.layout.places.get(at) else { break };
                if let Err(error) = self.put(weights, place) {
                    self.failed.store(true, Ordering::Relaxed);
                    // keep the error of the first tensor, so that the message does not depend on the threads
                    let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                    if first.as_ref().is_none_or(|(before, _)| at < *before) {
                        *first = Some((at, error));
                    }
                }
                progress();
            }
        };
        let finished = AtomicBool::new(false);
        // asking the system early to write to disk leaves little to wait for at the end
        let sync_early = || {
            let mut synced = 0;
            while !finished.load(Ordering::Acquire) {
                thread::park_timeout(std::time::Duration::from_millis(20));
                let now = self.done.load(Ordering::Relaxed);
                if now.saturating_sub(synced) >= SYNC_EVERY {
                    synced = now;
                    let _ = self.file.sync_data();
                }
            }
        };
        thread::scope(|scope| {
            let early =
                (self.layout.data_len > 2 * SYNC_EVERY).then(|| thread::Builder::new().spawn_scoped(scope, sync_early));
            // as many as the system can start
            let others: Vec<_> =
                (1..how.threads).map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
            work();
            for other in others {
                let _ = other.join();
            }
            finished.store(true, Ordering::Release);
            if let Some(Ok(early)) = early {
                early.thread().unpark();
            }
        });
        let first = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.map_or(Ok(()), |(_, error)| Err(error))
    }
}

/// A length as both formats store it.
fn length(len: usize) -> [u8; 8] {
    u64_of(len).to_le_bytes()
}

/// No platform's sizes have more than 64 bits.
fn u64_of(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// A tensor's elements in the type that is written; blocks are so already.
fn converted<'b>(place: &Place, bytes: Cow<'b, [u8]>) -> Result<Cow<'b, [u8]>> {
    if place.q8_0 || place.stored == place.info.dtype {
        return Ok(bytes);
    }
    let values = widen(place.stored, &bytes);
    let bytes: Vec<u8> = match place.info.dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F64 => values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
    };
    if let Ok(()) = check_finite(&place.name, place.info.dtype, &bytes) {
        Ok(bytes.into())
    } else {
        let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        let why = format!("its largest value {largest} does not fit into {}", place.info.dtype.name());
        Err(Error::tensor(&place.name, why))
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
        offset = offset.saturating_add(u64_of(n));
    }
    Ok(())
}
