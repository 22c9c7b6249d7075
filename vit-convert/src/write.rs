//! A model → a safetensors or GGUF file: a header of our own, sorted, then each tensor at its place. The same model gives
//! the same bytes, whatever the number of threads.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use serde_json::{Map, Value, json};
use vit_model::{
    Dtype, ModelInfo, TensorInfo, Weights,
    checksum::{Checksum, Checksums},
    gguf,
    weights::{check_finite, widen},
};

use crate::{Error, Pending, Result, save};

/// Bytes between two requests to begin with the writing to disk, so that the last one is short.
const SYNC_EVERY: u64 = 32 << 20;

/// How a model is written.
pub struct Options<'a> {
    /// The type of every tensor; each keeps its own where this is not set. In a GGUF file, of those that are not quantised.
    pub dtype: Option<Dtype>,
    /// Threads that read and convert.
    pub threads: usize,
    /// What the document still lacks: it is found out while the tensors are written.
    pub pending: Option<&'a Pending>,
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
    tensors(path, Some(info), weights, options, Container::Safetensors)
}

/// As [`file()`], in GGUF: tensors that are quantised (see [`quantise`](crate::quantise)) as the blocks that they are, the
/// others in f32 or halves.
///
/// # Errors
/// As [`file()`].
pub fn gguf(path: &Path, info: &ModelInfo, weights: &dyn Weights, options: &Options<'_>) -> Result<()> {
    tensors(path, Some(info), weights, options, Container::Gguf)
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
    let (info, weights) = (folder.info.as_ref(), folder.weights.as_ref());
    let written = tensors(&path.join(WEIGHTS), info, weights, options, Container::Safetensors).and_then(|()| {
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

/// The format of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Container {
    Safetensors,
    Gguf,
}

fn tensors(
    path: &Path,
    info: Option<&ModelInfo>,
    weights: &dyn Weights,
    options: &Options<'_>,
    container: Container,
) -> Result<()> {
    let layout = Arc::new(Layout::new(weights, options.dtype, container)?);
    let draft = layout.header(info)?;
    save::file(path, options.inputs, |file| {
        let mut info = info.cloned();
        let output = Arc::new(Output::new(path, file, layout.clone(), &draft)?);
        if let Some(pending) = options.pending {
            // whoever proves these very tensors reads each of them, and once is enough
            let proven = pending.proves().filter(|proven| std::ptr::addr_eq(Arc::as_ptr(proven), weights)).cloned();
            let seen = proven.map(|inner| -> Arc<dyn Weights> { Arc::new(Seen { inner, output: output.clone() }) });
            fill(&output, weights, options, seen.is_some(), || pending.find(seen.clone()).map(drop))?;
            if let Some(info) = &mut info {
                pending.find(None)?.complete(info);
            }
        } else {
            fill(&output, weights, options, false, || Ok(()))?;
        }
        // what is known last stands in the header, which comes first
        let header = layout.header(info.as_ref())?;
        if header.len() == draft.len() {
            return write_all_at(file, &header, 0).map_err(Error::io(path));
        }
        // what was found is longer than the room that is kept for it
        fill(&Output::new(path, file, layout.clone(), &header)?, weights, options, false, || Ok(()))
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

/// Bytes of the header that are kept for what the document lacks as long as the proof runs. They are kept in every file,
/// so that its bytes do not say how it was written.
const ROOM: usize = 1024;

struct Layout {
    container: Container,
    /// By offset.
    places: Vec<Place>,
    /// Tensor → its place.
    index: HashMap<String, usize>,
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
        let align = |end: u64| if gguf { end.checked_next_multiple_of(gguf::ALIGNMENT as u64) } else { Some(end) };
        let too_large = |name: &str| Error::tensor(name, "is larger than any memory");
        let mut places = Vec::with_capacity(sorted.len());
        let mut data_len = 0_u64;
        for (name, info, dtype) in sorted {
            let (offset, q8_0) = (data_len, gguf && weights.is_q8_0(name));
            let count = info.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
            let (values, bytes) = if q8_0 { (gguf::BLOCK, gguf::BLOCK_BYTES) } else { (1, dtype.size()) };
            let len = count.and_then(|n| (n / values).checked_mul(bytes)).and_then(|n| u64::try_from(n).ok());
            let end = len.and_then(|len| offset.checked_add(len)).ok_or_else(|| too_large(name))?;
            let (stored, info) = (info.dtype, TensorInfo { dtype, shape: info.shape.clone() });
            places.push(Place { name: name.clone(), stored, info, q8_0, offset, end, checksum: AtomicU64::new(0) });
            data_len = align(end).ok_or_else(|| too_large(name))?;
        }
        let index = places.iter().enumerate().map(|(at, place)| (place.name.clone(), at)).collect();
        Ok(Self { container, places, index, data_len })
    }

    /// Everything before the data, as long before the tensors are written as after.
    fn header(&self, info: Option<&ModelInfo>) -> Result<Vec<u8>> {
        match self.container {
            Container::Safetensors => self.safetensors(info),
            Container::Gguf => self.gguf(info),
        }
    }

    /// The document as JSON.
    fn document(&self, info: &ModelInfo) -> Result<String> {
        let sum = |place: &Place| Checksum(place.checksum.load(Ordering::Relaxed));
        let tensors = self.places.iter().map(|place| (place.name.clone(), sum(place))).collect();
        let xxh3 = &Checksums { model: Checksum::of_model(&info.model), tensors };
        serde_json::to_string(&Document { info, xxh3 }).map_err(|error| Error::graph(format!("configuration: {error}")))
    }

    fn safetensors(&self, info: Option<&ModelInfo>) -> Result<Vec<u8>> {
        let failed = |error| Error::graph(format!("header: {error}"));
        let entries = self.places.iter().map(|Place { name, info, offset, end, .. }| {
            let entry = json!({ "dtype": info.dtype.name(), "shape": info.shape, "data_offsets": [offset, end] });
            (name.clone(), entry)
        });
        let mut header: Map<String, Value> =
            [("__metadata__".to_owned(), Value::Null)].into_iter().chain(entries).collect();
        let mut with = |info: Option<&ModelInfo>| -> Result<Vec<u8>> {
            let mut metadata = json!({ "format": "pt" });
            if let Some(info) = info {
                metadata["config"] = json!(self.document(info)?);
            }
            header["__metadata__"] = metadata;
            serde_json::to_vec(&header).map_err(failed)
        };
        let least = match info {
            None => 0,
            Some(info) => with(Some(&unfinished(info)))?.len().saturating_add(ROOM),
        };
        let mut json = with(info)?;
        json.resize(json.len().max(least).next_multiple_of(8), b' ');
        Ok([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
    }

    /// Version 3, the keys that ggml asks for, and the document under `config`; spaces behind it are the room.
    fn gguf(&self, info: Option<&ModelInfo>) -> Result<Vec<u8>> {
        let [f32, f16, q8_0, bf16] = gguf::TYPES;
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let mut keys = vec![
            [text("general.architecture"), 8_u32.to_le_bytes().into(), text("vit")].concat(),
            [text("general.quantization_version"), 4_u32.to_le_bytes().into(), 2_u32.to_le_bytes().into()].concat(),
        ];
        if let Some(info) = info {
            let least = self.document(&unfinished(info))?.len().saturating_add(ROOM);
            let config = format!("{:<least$}", self.document(info)?);
            keys.push([text("config"), 8_u32.to_le_bytes().into(), text(&config)].concat());
        }
        let mut header = gguf::MAGIC.to_vec();
        header.extend(3_u32.to_le_bytes());
        header.extend((self.places.len() as u64).to_le_bytes());
        header.extend((keys.len() as u64).to_le_bytes());
        header.extend(keys.concat());
        for place in &self.places {
            let kind = match place.info.dtype {
                _ if place.q8_0 => q8_0,
                Dtype::F16 => f16,
                Dtype::Bf16 => bf16,
                Dtype::F32 | Dtype::F64 => f32,
            };
            header.extend(text(&place.name));
            header.extend((place.info.shape.len() as u32).to_le_bytes());
            header.extend(place.info.shape.iter().rev().flat_map(|&d| (d as u64).to_le_bytes()));
            header.extend(kind.to_le_bytes());
            header.extend(place.offset.to_le_bytes());
        }
        header.resize(header.len().next_multiple_of(gguf::ALIGNMENT), 0);
        Ok(header)
    }
}

/// A document without what may be pending.
fn unfinished(info: &ModelInfo) -> ModelInfo {
    let mut draft = ModelInfo { verified: None, ..info.clone() };
    draft.source.remove("sha256");
    draft
}

/// A file that is being written, by several threads.
struct Output {
    path: PathBuf,
    file: File,
    layout: Arc<Layout>,
    /// Where the first tensor begins.
    start: u64,
    /// Tensors that are written, or that a thread is busy with.
    taken: Vec<AtomicBool>,
    /// Held by the thread that writes: the system lets one at a time, and the others would spin for it.
    writing: Mutex<()>,
    /// Bytes that are written.
    done: AtomicU64,
    failed: AtomicBool,
    failure: Mutex<Option<(usize, Error)>>,
}

impl Output {
    /// Writes the header, and makes room for the rest.
    fn new(path: &Path, file: &File, layout: Arc<Layout>, header: &[u8]) -> Result<Self> {
        let start = header.len() as u64;
        let begin = || -> std::io::Result<File> {
            file.set_len(start.saturating_add(layout.data_len))?;
            write_all_at(file, header, 0)?;
            file.try_clone()
        };
        let file = begin().map_err(Error::io(path))?;
        let taken = layout.places.iter().map(|_| AtomicBool::new(false)).collect();
        let (done, failed) = (AtomicU64::new(start), AtomicBool::new(false));
        let (writing, failure) = (Mutex::new(()), Mutex::new(None));
        Ok(Self { path: path.into(), file, layout, start, taken, writing, done, failed, failure })
    }

    fn total(&self) -> u64 {
        self.start.saturating_add(self.layout.data_len)
    }

    /// Writes a tensor, unless somebody else does.
    fn put<'b>(&self, at: usize, read: impl FnOnce(&Place) -> Result<Cow<'b, [u8]>>) {
        let (Some(place), Some(taken)) = (self.layout.places.get(at), self.taken.get(at)) else { return };
        if self.failed.load(Ordering::Relaxed) || taken.swap(true, Ordering::Relaxed) {
            return;
        }
        let written = read(place).and_then(|bytes| converted(place, bytes)).and_then(|bytes| {
            place.checksum.store(Checksum::of_tensor(&place.name, &place.info, &bytes).0, Ordering::Relaxed);
            let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            write_all_at(&self.file, &bytes, self.start.saturating_add(place.offset)).map_err(Error::io(&self.path))?;
            Ok(self.done.fetch_add(bytes.len() as u64, Ordering::Relaxed))
        });
        if let Err(error) = written {
            self.failed.store(true, Ordering::Relaxed);
            // the first in order, so that the message does not depend on the threads either
            let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            if first.as_ref().is_none_or(|(before, _)| at < *before) {
                *first = Some((at, error));
            }
        }
    }
}

/// Tensors that are written when somebody reads them.
struct Seen {
    inner: Arc<dyn Weights>,
    output: Arc<Output>,
}

impl Weights for Seen {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        self.inner.tensors()
    }

    fn read(&self, name: &str) -> vit_model::Result<Vec<u8>> {
        let bytes = self.inner.read(name)?;
        let layout = &self.output.layout;
        // blocks are not what is read here
        if let Some(&at) = layout.index.get(name).filter(|&&at| layout.places.get(at).is_some_and(|place| !place.q8_0))
        {
            self.output.put(at, |_| Ok(Cow::Borrowed(&bytes)));
        }
        Ok(bytes)
    }
}

/// Each thread takes the next tensor, converts it and writes it to its place. One of them does what is to be done `aside`
/// first; where that reads the tensors (`seen`), the others leave them to it.
fn fill(
    output: &Output,
    weights: &dyn Weights,
    options: &Options<'_>,
    seen: bool,
    aside: impl Fn() -> Result<()>,
) -> Result<()> {
    let total = output.total();
    let progress = || (options.progress)(output.done.load(Ordering::Relaxed), total);
    let next = AtomicUsize::new(0);
    let work = || {
        while !output.failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= output.layout.places.len() {
                break;
            }
            output.put(at, |Place { name, q8_0, .. }| {
                Ok(if *q8_0 { weights.read_q8_0(name)? } else { weights.read(name)? }.into())
            });
            progress();
        }
    };
    let finished = AtomicBool::new(false);
    thread::scope(|scope| {
        // the disk works while we do
        let early = || {
            let mut synced = 0;
            while !finished.load(Ordering::Acquire) {
                thread::park_timeout(std::time::Duration::from_millis(20));
                let now = output.done.load(Ordering::Relaxed);
                if now.saturating_sub(synced) >= SYNC_EVERY {
                    synced = now;
                    let _ = output.file.sync_data();
                    progress();
                }
            }
        };
        let early = (output.layout.data_len > 2 * SYNC_EVERY).then(|| scope.spawn(early));
        let others = || (1..options.threads).map(|_| scope.spawn(work)).collect::<Vec<_>>();
        let at_once = if seen { Vec::new() } else { others() };
        let done = aside();
        if done.is_err() {
            output.failed.store(true, Ordering::Relaxed);
        }
        let late = if seen { others() } else { Vec::new() };
        work();
        for other in at_once.into_iter().chain(late) {
            let _ = other.join();
        }
        finished.store(true, Ordering::Release);
        if let Some(early) = early {
            early.thread().unpark();
        }
        done
    })?;
    let first = output.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
    first.map_or(Ok(()), |(_, error)| Err(error))
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
        offset = offset.saturating_add(n as u64);
    }
    Ok(())
}
