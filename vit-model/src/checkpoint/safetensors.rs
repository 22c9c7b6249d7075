//! Reads a safetensors file as [`Weights`]. Opening checks the whole header; tensors are then read one at a time.
//!
//! The file is not memory-mapped, because the process would be killed if another one truncated the file. A read returns an
//! error instead.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    path::{Path, PathBuf},
};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::{
    Error, Result,
    checkpoint::checksum::{Checksums, Running},
    checkpoint::element::Element,
    inputs, limits, memory,
    weights::{Dtype, ReadAt, TensorInfo, Weights, check_finite, too_short, whole},
};

/// Bytes per read: few enough that they are still in the CPU's cache when their checksum is computed.
const BLOCK: usize = 256 << 10;

/// A checked safetensors file.
#[derive(Debug)]
pub struct Safetensors {
    /// Used in error messages.
    path: PathBuf,
    source: Source,
    /// Offset of the data section in the file.
    start: usize,
    tensors: BTreeMap<String, TensorInfo>,
    /// Offset of each tensor from `start`, its length in bytes and its elements.
    places: BTreeMap<String, (usize, usize, Element)>,
    others: Vec<String>,
    metadata: BTreeMap<String, String>,
    /// The checksums from the document, if it has any.
    checksums: Option<Checksums>,
}

/// A file on disk or in memory.
#[derive(Debug)]
pub(crate) enum Source {
    File(File, Box<fs::Metadata>),
    Memory(&'static [u8]),
}

impl Source {
    /// Opens a regular file and returns it with its length.
    pub(crate) fn open(path: &Path) -> Result<(Self, usize)> {
        let (file, meta) = inputs::open(path)?;
        let len = usize::try_from(meta.len()).map_err(|_| Error::file(path, "is larger than this machine's memory"))?;
        Ok((Self::File(file, Box::new(meta)), len))
    }

    pub(crate) fn read_exact_at(&self, out: &mut [u8], offset: usize) -> std::io::Result<()> {
        match self {
            Self::Memory(bytes) => match offset.checked_add(out.len()).and_then(|end| bytes.get(offset..end)) {
                Some(part) => {
                    out.copy_from_slice(part);
                    Ok(())
                }
                None => Err(std::io::ErrorKind::UnexpectedEof.into()),
            },
            Self::File(file, opened) => {
                read_exact_at(file, out, u64::try_from(offset).unwrap_or(u64::MAX))?;
                inputs::unchanged(file, opened)
            }
        }
    }
}

/// Fills `out` with the bytes at `offset`, without moving the file's cursor.
///
/// # Errors
/// If the file is too short or cannot be read.
#[cfg(unix)]
pub fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

/// Fills `out` with the bytes at `offset`. On Windows, this moves the file's cursor.
///
/// # Errors
/// If the file is too short or cannot be read.
#[cfg(windows)]
pub fn read_exact_at(file: &File, mut out: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                out = out.get_mut(n..).unwrap_or_default();
                offset = offset.saturating_add(n.try_into().unwrap_or(u64::MAX));
            }
        }
    }
    Ok(())
}

impl Safetensors {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// If it is not a regular file, or its header does not describe exactly the bytes that follow it.
    pub fn open(path: &Path) -> Result<Self> {
        let (source, len) = Source::open(path)?;
        Self::new(path, source, len)
    }

    /// Opens a file that is embedded in the program. Errors show `name` in place of a path.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Self::new(Path::new(name), Source::Memory(bytes), bytes.len())
    }

    fn new(path: &Path, source: Source, len: usize) -> Result<Self> {
        let fail = |why: String| Error::file(path, why);
        if len == 0 {
            return Err(fail("is an empty file".into()));
        }
        if is_onnx(&source) {
            return Err(fail(IS_ONNX.into()));
        }
        if let Some(what) = looks_like(&source, len) {
            return Err(fail(format!("is not a safetensors file but {what}")));
        }
        let Some(behind) = len.checked_sub(8) else {
            return Err(fail(format!("has {len} bytes, too few for a safetensors file (was it copied completely?)")));
        };
        let mut first = [0; 8];
        source.read_exact_at(&mut first, 0).map_err(Error::io(path))?;
        let header_len = u64::from_le_bytes(first);
        let header_len = usize::try_from(header_len).ok().filter(|&n| n <= limits::HEADER_BYTES).ok_or_else(|| {
            fail(format!(
                "announces a header of {header_len} bytes, but at most {} are allowed: not a safetensors file",
                limits::HEADER_BYTES
            ))
        })?;
        let Some(data_len) = behind.checked_sub(header_len) else {
            return Err(fail(format!("ends within its header of {header_len} bytes (was it copied completely?)")));
        };
        let mut header = memory::zeros(header_len, "the header")?;
        source.read_exact_at(&mut header, 8).map_err(Error::io(path))?;
        let header: Header =
            serde_json::from_slice(&header).map_err(|error| fail(format!("has a damaged header: {error}")))?;
        let start = header_len.saturating_add(8);
        let mut file = Self {
            path: path.to_owned(),
            source,
            start,
            tensors: BTreeMap::new(),
            places: BTreeMap::new(),
            others: Vec::new(),
            metadata: header.metadata,
            checksums: None,
        };
        file.add(header.entries, data_len)?;
        Ok(file)
    }

    /// Checks each tensor, and that together they fill the data section without gaps.
    fn add(&mut self, mut entries: Vec<(String, Entry)>, data_len: usize) -> Result<()> {
        entries.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut at = 0;
        for (name, entry) in entries {
            let [begin, end] = entry.data_offsets;
            let Some(len) = end.checked_sub(begin).filter(|_| begin == at) else {
                let why =
                    format!("is at bytes {begin} to {end}, but was expected to begin at {at}: the header is damaged");
                return Err(self.damaged(&name, &why));
            };
            at = end;
            if entry.shape.len() > limits::RANK {
                return Err(self.damaged(&name, &format!("has {} dimensions", entry.shape.len())));
            }
            let Some(size) = element_size(&entry.dtype) else {
                return Err(self.damaged(&name, &format!("has the unknown type {:?}", entry.dtype)));
            };
            let count = entry.shape.iter().try_fold(size, |n, &d| n.checked_mul(d));
            if count != Some(len) {
                let why = format!("is {} {:?}, which does not fit its {len} bytes", entry.dtype, entry.shape);
                return Err(self.damaged(&name, &why));
            }
            let element = element(&entry.dtype, size);
            match element.dtype() {
                Some(dtype) => {
                    self.places.insert(name.clone(), (begin, len, element));
                    self.tensors.insert(name, TensorInfo { dtype, shape: entry.shape });
                }
                None => self.others.push(name),
            }
        }
        if at != data_len {
            let why =
                format!("holds {data_len} bytes of data, but its header describes {at} (was it copied completely?)");
            return Err(Error::file(&self.path, why));
        }
        Ok(())
    }

    /// Starts a tensor's checksum, if the document has checksums to compare with.
    fn running(&self, name: &str) -> Option<Running> {
        self.checksums.as_ref().and(self.tensors.get(name)).map(|info| Running::new(name, info))
    }

    /// Compares a finished checksum with the document's.
    fn compare(&self, name: &str, running: &Running) -> Result<()> {
        let compared = self.checksums.as_ref().map_or(Ok(()), |all| all.compare(name, running.finish()));
        compared.map_err(|why| self.damaged(name, &why))
    }

    fn damaged(&self, name: &str, why: &str) -> Error {
        Error::file(&self.path, format!("tensor `{name}` {why}"))
    }

    /// A tensor's offset in the file, its length in bytes and its elements.
    fn place(&self, name: &str) -> Result<(usize, usize, Element)> {
        match self.places.get(name) {
            Some(&(offset, len, element)) => Ok((self.start.saturating_add(offset), len, element)),
            _ => Err(Error::file(&self.path, format!("has no tensor `{name}`"))),
        }
    }

    /// The strings of `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Names of the tensors of other than the supported float types (mostly integers and booleans), which no ViT needs.
    pub fn others(&self) -> &[String] {
        &self.others
    }

    /// Makes every later read compare the tensor with its checksum.
    pub(crate) fn expect(&mut self, checksums: Checksums) {
        self.checksums = Some(checksums);
    }

    /// The path that the file was opened with, or the name of an embedded file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Weights for Safetensors {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (mut at, len, element) = self.place(name)?;
        let mut running = self.running(name);
        let mut out = memory::zeros(len, name)?;
        for part in out.chunks_mut(BLOCK) {
            self.source.read_exact_at(part, at).map_err(Error::io(&self.path))?;
            if let Some(running) = &mut running {
                running.update(part);
            }
            at = at.saturating_add(part.len());
        }
        if let Some(running) = running {
            self.compare(name, &running)?;
        }
        let out = element.widened(out);
        if let Some(dtype) = element.dtype() {
            check_finite(name, dtype, &out)?;
        }
        Ok(out)
    }

    fn stretches(&self, name: &str) -> Result<ReadAt<'_>> {
        let (start, len, element) = self.place(name)?;
        let Element::Float(dtype) = element else { return Ok(whole(name, self.read(name)?)) };
        let name = name.to_owned();
        // the next offset and the checksum so far, as long as the stretches are read in order; otherwise the whole tensor is
        // read once more for its checksum
        let order = RefCell::new(self.running(&name).map(|running| (0, running)));
        Ok(Box::new(move |at, out| {
            let Some(end) = at.checked_add(out.len()).filter(|&end| end <= len) else {
                return Err(too_short(&name, len));
            };
            self.source.read_exact_at(out, start.saturating_add(at)).map_err(Error::io(&self.path))?;
            if let Some((next, mut running)) = order.take() {
                if at == next {
                    running.update(out);
                    if end < len {
                        order.replace(Some((end, running)));
                    } else {
                        self.compare(&name, &running)?;
                    }
                } else {
                    self.read(&name)?;
                }
            }
            // reading the whole tensor again makes the error name the element's index in the tensor, not in the stretch
            check_finite(&name, dtype, out).or_else(|error| self.read(&name).and(Err(error)))
        }))
    }
}

/// The elements of the type with this name and size.
fn element(name: &str, size: usize) -> Element {
    let float = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F64].into_iter().find(|dtype| dtype.name() == name);
    match (float, name) {
        (Some(dtype), _) => Element::Float(dtype),
        (None, "F8_E4M3") => Element::E4m3,
        (None, "F8_E5M2") => Element::E5m2,
        _ => Element::Other(size),
    }
}

/// Bytes per element, for every type in the format.
fn element_size(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 1,
        "U16" | "I16" | "F16" | "BF16" => 2,
        "U32" | "I32" | "F32" => 4,
        "U64" | "I64" | "F64" | "C64" => 8,
        _ => return None,
    })
}

/// The error for ONNX files, which `vit-convert` opens.
pub(crate) const IS_ONNX: &str = "is an ONNX file: open it with `vit_convert::open(path)` and `Predictor::from_checkpoint`, or convert it with vit-convert";

/// Whether a file starts as exporters write ONNX: a small version number (field 1 of the protobuf message), then the name of
/// the exporter, an opset or the graph. A safetensors file that starts with these bytes would have a header of over 10^12
/// bytes.
fn is_onnx(source: &Source) -> bool {
    let mut start = [0; 8];
    let read = source.read_exact_at(&mut start, 0).is_ok();
    let [0x08, version, 0x12 | 0x1a | 0x3a | 0x42, _, _, rest @ ..] = start else { return false };
    read && (1..32).contains(&version) && rest != [0; 3]
}

/// Guesses the type of a file that is not safetensors, for the error message.
fn looks_like(source: &Source, len: usize) -> Option<&'static str> {
    let mut start = vec![0; len.min(64)];
    source.read_exact_at(&mut start, 0).ok()?;
    let kinds: [(&[u8], &str); 6] = [
        (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
        (b"PK\x03\x04", "a zip archive (perhaps a PyTorch checkpoint)"),
        (b"\x80\x02", "a Python pickle (perhaps a PyTorch checkpoint)"),
        (b"\x1f\x8b", "a gzip archive: unpack it first"),
        (b"\x89HDF", "an HDF5 file (perhaps a Keras model)"),
        (b"GGUF", "a GGUF file"),
    ];
    if let Some((_, what)) = kinds.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Some(what);
    }
    let text = String::from_utf8_lossy(&start).trim_start().to_ascii_lowercase();
    if text.starts_with("<!doctype") || text.starts_with("<html") || text.starts_with("<?xml") {
        return Some("a web page: the download went wrong");
    }
    if start.iter().all(|&b| b == 0) {
        return Some("a file of zeros: the download or copy went wrong");
    }
    None
}

/// The JSON header, in which no name may occur twice.
struct Header {
    metadata: BTreeMap<String, String>,
    entries: Vec<(String, Entry)>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// `__metadata__`: a map of strings in which no key may occur twice.
struct Metadata(BTreeMap<String, String>);

/// Reads an object entry by entry, and rejects duplicate keys.
fn unique<'de, A: MapAccess<'de>>(
    map: &mut A,
    mut each: impl FnMut(&mut A, String) -> Result<(), A::Error>,
) -> Result<(), A::Error> {
    let mut seen = std::collections::HashSet::new();
    while let Some(key) = map.next_key::<String>()? {
        if !seen.insert(key.clone()) {
            return Err(A::Error::custom(format_args!("the key {key:?} stands twice")));
        }
        each(map, key)?;
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut strings = BTreeMap::new();
                unique(&mut map, |map, key| {
                    strings.insert(key, map.next_value()?);
                    Ok(())
                })?;
                Ok(Metadata(strings))
            }
        }
        deserializer.deserialize_map(Visit)
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: BTreeMap::new(), entries: Vec::new() };
                unique(&mut map, |map, key| {
                    if key == "__metadata__" {
                        header.metadata = map.next_value::<Metadata>()?.0;
                    } else {
                        header.entries.push((key, map.next_value()?));
                    }
                    Ok(())
                })?;
                Ok(header)
            }
        }
        deserializer.deserialize_map(Visit)
    }
}
