//! Reads what `torch.save` wrote (`.pth`, `.pt`, `.bin`, `.ckpt`) as [`Weights`], without executing anything in it.
//!
//! candle's reader is not used: it knows neither the format before PyTorch 1.6 nor tensors of other strides than the two usual
//! ones, opens the file once more for each tensor, and does not bound what a pickle may ask for.

mod choose;
mod legacy;
mod machine;
mod value;
mod zip;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use self::{
    choose::Chosen,
    machine::Trouble,
    value::{Tensor, Values},
    zip::Archive,
};
use crate::{
    Error, Result,
    checkpoint::{element::Element, safetensors::Source},
    limits, memory,
    weights::{ReadAt, TensorInfo, Weights, check_finite, too_short, whole},
};

/// Bytes per read.
const BLOCK: usize = 256 << 10;

/// The state dict in a file of PyTorch's.
#[derive(Debug)]
pub(super) struct Pickle {
    path: PathBuf,
    source: Source,
    tensors: BTreeMap<String, TensorInfo>,
    places: BTreeMap<String, Place>,
    others: Vec<String>,
    /// The key of the state dict, if it is inside of a dictionary.
    key: Option<String>,
    /// Other state dicts in the same file, which are not read.
    besides: Vec<String>,
    /// The file is a TorchScript archive.
    script: bool,
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    /// Offset of its first element in the file.
    start: usize,
    element: Element,
    /// Whether the elements are in order. Otherwise [`strides`](Self::strides) counts.
    contiguous: bool,
    strides: Vec<usize>,
}

/// The file as its container describes it.
struct Container {
    values: Values,
    root: value::Id,
    /// The offset and the length of each storage in the file.
    storages: BTreeMap<String, (usize, usize)>,
    script: bool,
}

impl Pickle {
    /// Whether a file begins as `torch.save` lets it begin: a zip archive, or a pickle.
    pub(super) fn is(path: &Path) -> bool {
        let Ok((source, len)) = Source::open(path) else { return false };
        let mut start = [0; 4];
        len >= 4
            && source.read_exact_at(&mut start, 0).is_ok()
            && (start == *b"PK\x03\x04" || matches!(start, [0x80, 2..=5, 0x8a | 0x95 | b'}' | b'c', _]))
    }

    /// Opens a file. `key` names the state dict to read, if the file has several.
    pub(super) fn open(path: &Path, key: Option<&str>) -> Result<Self> {
        let (source, len) = Source::open(path)?;
        Self::new(path, source, len, key).map_err(|why| Error::file(path, why))
    }

    /// As [`open`](Self::open), of bytes in memory.
    #[cfg(test)]
    pub(super) fn from_bytes(bytes: &'static [u8], key: Option<&str>) -> Result<Self> {
        let path = Path::new("memory");
        Self::new(path, Source::Memory(bytes), bytes.len(), key).map_err(|why| Error::file(path, why))
    }

    fn new(path: &Path, source: Source, len: usize, key: Option<&str>) -> Result<Self, String> {
        let mut start = [0; 2];
        source.read_exact_at(&mut start, 0).map_err(|_| "is too short for a PyTorch checkpoint".to_owned())?;
        let container = if &start == b"PK" { zipped(&source, len)? } else { legacy::container(&source, len)? };
        let Chosen { tensors: chosen, key, besides } = choose::state_dict(&container.values, container.root, key)?;
        let mut file = Self {
            path: path.to_owned(),
            source,
            tensors: BTreeMap::new(),
            places: BTreeMap::new(),
            others: Vec::new(),
            key,
            besides,
            script: container.script,
        };
        for (name, tensor) in chosen {
            let place = place(tensor, &container.storages).map_err(|why| format!("tensor `{name}` {why}"))?;
            match tensor.element.dtype() {
                Some(dtype) => {
                    file.tensors.insert(name.clone(), TensorInfo { dtype, shape: tensor.shape.clone() });
                    file.places.insert(name, place);
                }
                None => file.others.push(name),
            }
        }
        Ok(file)
    }

    /// Names of the tensors that cannot be weights, mostly integers.
    pub(super) fn others(&self) -> &[String] {
        &self.others
    }

    /// The key of the state dict, if it is inside of a dictionary.
    pub(super) fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Other state dicts in the same file, which are not read.
    pub(super) fn besides(&self) -> &[String] {
        &self.besides
    }

    /// Whether the file is a TorchScript archive, as OpenAI published CLIP.
    pub(super) fn is_script(&self) -> bool {
        self.script
    }

    fn place(&self, name: &str) -> Result<(&Place, &TensorInfo)> {
        let found = self.places.get(name).zip(self.tensors.get(name));
        found.ok_or_else(|| Error::file(&self.path, format!("has no tensor `{name}`")))
    }

    fn bytes(&self, start: usize, len: usize) -> Result<Vec<u8>> {
        let mut out = memory::zeros(len, "a tensor")?;
        let mut at = start;
        for part in out.chunks_mut(BLOCK) {
            self.source.read_exact_at(part, at).map_err(Error::io(&self.path))?;
            at = at.saturating_add(part.len());
        }
        Ok(out)
    }
}

/// An archive as PyTorch writes it since version 1.6.
fn zipped(source: &Source, len: usize) -> Result<Container, String> {
    let archive = Archive::open(source, len)?;
    let mut pickles = archive
        .names()
        .filter_map(|name| name.strip_suffix("data.pkl"))
        .filter(|folder| folder.is_empty() || folder.ends_with('/') && folder.matches('/').count() == 1);
    let (Some(folder), None) = (pickles.next(), pickles.next()) else {
        return Err("is a zip archive, but not one that torch.save wrote: it has no data.pkl".into());
    };
    let entry = |name: &str| archive.find(source, len, &format!("{folder}{name}"));
    let read = |name: &str, most: usize| {
        let (at, size) = entry(name)?;
        if size > most {
            return Err(format!("has a pickle of {size} bytes, at most {most} are read"));
        }
        let mut bytes = memory::zeros(size, name).map_err(|error| error.to_string())?;
        source.read_exact_at(&mut bytes, at).map_err(|error| format!("{folder}{name}: {error}"))?;
        Ok(bytes)
    };
    let has = |name: &str| archive.names().any(|entry| entry.strip_prefix(folder) == Some(name));
    if has("byteorder") && read("byteorder", 64)?.trim_ascii() != b"little" {
        return Err("was written by a big-endian machine: save it again on a little-endian one".into());
    }
    let script = has("constants.pkl");
    let pickle = read("data.pkl", limits::PICKLE_BYTES)?;
    let pickled = machine::read(&pickle, script).map_err(|trouble| match trouble {
        Trouble::Ends => "has a pickle that ends too early: the file is damaged".to_owned(),
        Trouble::Refused(why) => why,
    })?;
    let data = format!("{folder}data/");
    let mut storages = BTreeMap::new();
    for name in archive.names().filter_map(|name| name.strip_prefix(data.as_str())) {
        storages.insert(name.to_owned(), archive.find(source, len, &format!("{data}{name}"))?);
    }
    Ok(Container { values: pickled.values, root: pickled.root, storages, script })
}

/// Checks that a tensor is inside of its storage, and its storage inside of the file.
fn place(tensor: &Tensor, storages: &BTreeMap<String, (usize, usize)>) -> Result<Place, String> {
    let size = tensor.element.size();
    let key = &*tensor.storage.key;
    let outside = || format!("is partly outside of its storage {key}: the file is damaged");
    let &(start, len) = storages.get(key).ok_or_else(|| format!("is in the storage {key:?}, which the file lacks"))?;
    // a storage counts its own elements, or bytes
    let unit = tensor.storage.element.map_or(1, Element::size);
    let bytes = |count: usize, unit: usize| count.checked_mul(unit);
    let first = bytes(tensor.storage.first, unit).ok_or_else(outside)?;
    let room = bytes(tensor.storage.count, unit).ok_or_else(outside)?;
    if first.checked_add(room).is_none_or(|end| end > len) {
        return Err(format!("is in the storage {key:?} of {room} bytes, but the file has {len} of them"));
    }
    let count = tensor.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(outside)?;
    let mut expected = 1usize;
    let mut contiguous = true;
    let mut last = 0usize;
    for (&n, &stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
        contiguous &= n <= 1 || stride == expected;
        expected = expected.saturating_mul(n.max(1));
        last = n.saturating_sub(1).checked_mul(stride).and_then(|far| last.checked_add(far)).ok_or_else(outside)?;
    }
    let end = tensor.offset.checked_add(last).and_then(|end| end.checked_add(usize::from(count > 0)));
    if end.and_then(|end| bytes(end, size)).is_none_or(|end| end > room) {
        return Err(outside());
    }
    // the result of `expand` repeats what is stored, so a few bytes could ask for any amount of memory
    if count > room.max(limits::REPEATED) {
        return Err(format!(
            "has {count} elements, which repeat those of a storage of {room} bytes: save it after .contiguous()"
        ));
    }
    let from =
        bytes(tensor.offset, size).and_then(|offset| offset.checked_add(first)).and_then(|at| at.checked_add(start));
    Ok(Place { start: from.ok_or_else(outside)?, element: tensor.element, contiguous, strides: tensor.strides.clone() })
}

impl Weights for Pickle {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (place, info) = self.place(name)?;
        let size = place.element.size();
        let count = info.shape.iter().product::<usize>();
        let bytes = if place.contiguous {
            self.bytes(place.start, count.saturating_mul(size))?
        } else {
            let last: usize = info
                .shape
                .iter()
                .zip(&place.strides)
                .map(|(&n, &stride)| n.saturating_sub(1).saturating_mul(stride))
                .sum();
            let stored = self.bytes(place.start, last.saturating_add(1).saturating_mul(size))?;
            gathered(&stored, size, &info.shape, &place.strides)
        };
        let bytes = place.element.widened(bytes);
        check_finite(name, info.dtype, &bytes)?;
        Ok(bytes)
    }

    fn stretches(&self, name: &str) -> Result<ReadAt<'_>> {
        let (place, info) = self.place(name)?;
        if !place.contiguous || !matches!(place.element, Element::Float(_)) {
            return Ok(whole(name, self.read(name)?));
        }
        let len = info.shape.iter().product::<usize>().saturating_mul(place.element.size());
        let (start, dtype, name) = (place.start, info.dtype, name.to_owned());
        Ok(Box::new(move |at, out| {
            if at.checked_add(out.len()).is_none_or(|end| end > len) {
                return Err(too_short(&name, len));
            }
            self.source.read_exact_at(out, start.saturating_add(at)).map_err(Error::io(&self.path))?;
            // reading the whole tensor again makes the error name the element's index in the tensor, not in the stretch
            check_finite(&name, dtype, out).or_else(|error| self.read(&name).and(Err(error)))
        }))
    }
}

/// The elements of a view in row-major order.
fn gathered(stored: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let count = shape.iter().product::<usize>();
    let mut out = Vec::with_capacity(count.saturating_mul(size));
    let mut index = vec![0usize; shape.len()];
    let mut at = 0usize;
    for _ in 0..count {
        let from = at.saturating_mul(size);
        out.extend_from_slice(stored.get(from..from.saturating_add(size)).unwrap_or_default());
        // the next index, last axis first
        for ((i, &n), &stride) in index.iter_mut().zip(shape).zip(strides).rev() {
            *i = i.saturating_add(1);
            at = at.saturating_add(stride);
            if *i < n {
                break;
            }
            at = at.saturating_sub(n.saturating_mul(stride));
            *i = 0;
        }
    }
    out
}
