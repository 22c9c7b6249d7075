//! Reads a GGUF file as [`Weights`]: matrices in ggml's Q8_0, other tensors in F32, F16 or BF16. Opening checks the whole
//! header; tensors are then read one at a time.
//!
//! The format is described in ggml's `docs/gguf.md`; versions 2 and 3 are supported. The files that this project writes use
//! timm's tensor names. Beside ggml's own keys they have the string `config`, the same document as in safetensors files.
//! Q8_0 stores 32 values of a row as 34 bytes: a scale in f16, and 32 signed bytes that it multiplies.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

use half::f16;

pub use crate::weights::{Q8_0_BLOCK as BLOCK, Q8_0_BLOCK_BYTES as BLOCK_BYTES};
use crate::{
    Error, Result,
    checkpoint::checksum::{Checksum, Checksums},
    checkpoint::safetensors::Source,
    limits, memory,
    weights::{Dtype, TensorInfo, Weights, check_finite},
};

/// The first bytes of a GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// ggml's numbers for the supported types: F32, F16, Q8_0, BF16.
pub const TYPES: [u32; 4] = [0, 1, 8, 30];
/// The data section and each tensor start at a multiple of this, unless the file sets another alignment.
pub const ALIGNMENT: usize = 32;

/// The largest number of dimensions that the format allows.
const RANK: usize = 4;
/// The largest alignment that this reader accepts.
const MAX_ALIGNMENT: usize = 1 << 16;

/// A checked GGUF file.
#[derive(Debug)]
pub struct Gguf {
    /// Used in error messages.
    path: PathBuf,
    source: Source,
    tensors: BTreeMap<String, TensorInfo>,
    places: BTreeMap<String, Place>,
    metadata: BTreeMap<String, String>,
    /// The checksums from the document, if it has any.
    checksums: Option<Checksums>,
}

/// Where a tensor is in its file.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: usize,
    len: usize,
    q8_0: bool,
}

impl Gguf {
    /// Whether a file starts with [`MAGIC`].
    pub(crate) fn is(path: &Path) -> bool {
        let mut start = [0; 4];
        Source::open(path).is_ok_and(|(source, _)| source.read_exact_at(&mut start, 0).is_ok()) && start == MAGIC
    }

    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// If it is not a regular file, its header does not describe exactly the bytes that follow it, or a tensor has a type
    /// other than F32, F16, BF16 and Q8_0.
    pub fn open(path: &Path) -> Result<Self> {
        let (source, len) = Source::open(path)?;
        let mut header = Header::new(path, &source, len);
        if header.array()? != MAGIC {
            return Err(Error::file(path, "is not a GGUF file"));
        }
        match header.u32()? {
            2 | 3 => {}
            version => {
                return Err(Error::file(path, format!("is GGUF version {version}; versions 2 and 3 are read")));
            }
        }
        // the least that an entry takes: for a tensor a name's length, a number of dimensions, a type and an offset (24
        // bytes); for a key a length, a type and a value of one byte (13 bytes)
        let tensors = header.count(24, "tensors")?;
        let keys = header.count(13, "keys")?;
        let (metadata, alignment) = header.metadata(keys)?;
        let entries = (0..tensors).map(|_| header.entry()).collect::<Result<Vec<_>>>()?;
        let start = header.at.next_multiple_of(alignment);
        let mut file = Self {
            path: path.to_owned(),
            source,
            tensors: BTreeMap::new(),
            places: BTreeMap::new(),
            metadata,
            checksums: None,
        };
        file.add(entries, start, alignment, len)?;
        Ok(file)
    }

    /// Checks that the tensors fill the data section, each at the first offset that the alignment allows.
    fn add(&mut self, mut entries: Vec<Entry>, start: usize, alignment: usize, len: usize) -> Result<()> {
        entries.sort_by_key(|entry| entry.offset);
        let (mut at, mut end) = (0_usize, 0_usize);
        for Entry { name, info, q8_0, offset, len } in entries {
            let fail = |why: String| Error::file(&self.path, format!("tensor `{name}` {why}: the header is damaged"));
            if offset != at {
                return Err(fail(format!("is at byte {offset} of the data, expected {at}")));
            }
            end = at.checked_add(len).ok_or_else(|| fail(format!("has {len} bytes")))?;
            at = end.checked_next_multiple_of(alignment).ok_or_else(|| fail(format!("has {len} bytes")))?;
            let place = start.checked_add(offset).map(|offset| Place { offset, len, q8_0 });
            let place = place.ok_or_else(|| fail(format!("is at byte {offset}")))?;
            if self.tensors.insert(name.clone(), info).is_some() {
                return Err(fail("stands twice".into()));
            }
            self.places.insert(name, place);
        }
        // the padding after the last tensor is optional
        let held = len.saturating_sub(start);
        if held != end && held != at {
            let why = format!("holds {held} bytes of data, but its header describes {end} (was it copied completely?)");
            return Err(Error::file(&self.path, why));
        }
        Ok(())
    }

    /// The file's keys whose values are strings.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    fn place(&self, name: &str) -> Result<Place> {
        self.places.get(name).copied().ok_or_else(|| Error::file(&self.path, format!("has no tensor `{name}`")))
    }

    /// Makes every later read compare the tensor with its checksum.
    pub(crate) fn expect(&mut self, checksums: Checksums) {
        self.checksums = Some(checksums);
    }

    /// A tensor's bytes as they are stored, after comparing them with the checksum.
    fn bytes(&self, name: &str, place: Place) -> Result<Vec<u8>> {
        let mut out = memory::zeros(place.len, name)?;
        self.source.read_exact_at(&mut out, place.offset).map_err(Error::io(&self.path))?;
        if let (Some(checksums), Some(info)) = (&self.checksums, self.tensors.get(name)) {
            let compared = checksums.compare(name, Checksum::of_tensor(name, info, &out));
            compared.map_err(|why| Error::file(&self.path, format!("tensor `{name}` {why}")))?;
        }
        Ok(out)
    }
}

impl Weights for Gguf {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let place = self.place(name)?;
        if place.q8_0 {
            return self.read_q8_0(name).map(|blocks| dequantise(&blocks).flat_map(f32::to_le_bytes).collect());
        }
        let bytes = self.bytes(name, place)?;
        let dtype = self.tensors.get(name).map_or(Dtype::F32, |info| info.dtype);
        check_finite(name, dtype, &bytes)?;
        Ok(bytes)
    }

    fn is_q8_0(&self, name: &str) -> bool {
        self.places.get(name).is_some_and(|place| place.q8_0)
    }

    fn read_q8_0(&self, name: &str) -> Result<Vec<u8>> {
        let place = self.place(name)?;
        if !place.q8_0 {
            return Err(Error::tensor(name, "is not stored in Q8_0"));
        }
        let blocks = self.bytes(name, place)?;
        check_scales(name, &blocks)?;
        Ok(blocks)
    }
}

/// Rejects Q8_0 blocks whose scale is NaN or infinite.
///
/// # Errors
/// If there is such a block. The error names the tensor and the index of the first one.
pub fn check_scales(name: &str, blocks: &[u8]) -> Result<()> {
    let scales: Vec<u8> = blocks.chunks_exact(BLOCK_BYTES).flat_map(|block| block.iter().take(2).copied()).collect();
    check_finite(name, Dtype::F16, &scales)
}

/// Dequantises blocks of Q8_0. This is exact, because the product of an 11-bit significand and an 8-bit integer fits into f32.
pub fn dequantise(blocks: &[u8]) -> impl Iterator<Item = f32> {
    blocks.as_chunks::<BLOCK_BYTES>().0.iter().flat_map(|[low, high, integers @ ..]| {
        let scale = f16::from_le_bytes([*low, *high]).to_f32();
        integers.iter().map(move |&n| f32::from(n.cast_signed()) * scale)
    })
}

/// A tensor's entry in the header.
struct Entry {
    name: String,
    info: TensorInfo,
    q8_0: bool,
    offset: usize,
    len: usize,
}

/// Reads a file from its beginning, because the format does not say how long the header is.
struct Bytes<'a> {
    source: &'a Source,
    at: usize,
    len: usize,
}

impl Read for Bytes<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let n = out.len().min(self.len.saturating_sub(self.at));
        let part = out.get_mut(..n).unwrap_or_default();
        self.source.read_exact_at(part, self.at)?;
        self.at = self.at.saturating_add(n);
        Ok(n)
    }
}

/// Reads the header from front to back. Every length is compared with the bytes that are left before anything is allocated.
struct Header<'a> {
    path: &'a Path,
    reader: BufReader<Bytes<'a>>,
    at: usize,
    /// The length of the file, or of the longest header that is accepted if that is less.
    len: usize,
}

impl<'a> Header<'a> {
    fn new(path: &'a Path, source: &'a Source, len: usize) -> Self {
        let len = len.min(limits::HEADER_BYTES);
        Self { path, reader: BufReader::new(Bytes { source, at: 0, len }), at: 0, len }
    }

    fn fail(&self, why: impl std::fmt::Display) -> Error {
        Error::file(self.path, format!("has a damaged header: {why} (at byte {})", self.at))
    }

    /// The number of bytes that are left.
    fn left(&self) -> usize {
        self.len.saturating_sub(self.at)
    }

    /// The next `len` bytes.
    fn bytes(&mut self, len: usize) -> Result<Vec<u8>> {
        if len > self.left() {
            return Err(self.fail(format_args!("{len} bytes are announced, but {} are left", self.left())));
        }
        let mut out = vec![0; len];
        self.reader.read_exact(&mut out).map_err(Error::io(self.path))?;
        self.at = self.at.saturating_add(len);
        Ok(out)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn number(&mut self) -> Result<usize> {
        let number = self.array().map(u64::from_le_bytes)?;
        usize::try_from(number).map_err(|_| self.fail(format_args!("{number} is too large for this machine")))
    }

    /// Reads how many items follow, each of at least `bytes` bytes.
    fn count(&mut self, bytes: usize, what: &str) -> Result<usize> {
        let count = self.number()?;
        match count.checked_mul(bytes) {
            Some(len) if len <= self.left() => Ok(count),
            _ => Err(self.fail(format_args!("{count} {what} are announced, but {} bytes are left", self.left()))),
        }
    }

    fn text(&mut self) -> Result<String> {
        let len = self.number()?;
        let bytes = self.bytes(len)?;
        String::from_utf8(bytes).map_err(|_| self.fail("a text is not UTF-8"))
    }

    /// Reads the keys. Returns those whose values are strings, and the alignment.
    fn metadata(&mut self, count: usize) -> Result<(BTreeMap<String, String>, usize)> {
        let (mut strings, mut seen, mut alignment) = (BTreeMap::new(), BTreeSet::new(), ALIGNMENT);
        for _ in 0..count {
            let key = self.text()?;
            if !seen.insert(key.clone()) {
                return Err(self.fail(format_args!("the key {key:?} stands twice")));
            }
            match self.u32()? {
                8 => drop(strings.insert(key, self.text()?)),
                4 if key == "general.alignment" => {
                    let n = self.u32()?;
                    let good = |n: &usize| n.is_power_of_two() && *n <= MAX_ALIGNMENT;
                    alignment = usize::try_from(n).ok().filter(good).ok_or_else(|| {
                        self.fail(format_args!(
                            "`general.alignment` must be a power of two up to {MAX_ALIGNMENT}, found {n}"
                        ))
                    })?;
                }
                9 => self.skip_array(&key)?,
                kind => {
                    let len = self.size(kind, &key)?;
                    drop(self.bytes(len)?);
                }
            }
        }
        Ok((strings, alignment))
    }

    /// The size of a value of a fixed-size type, by the type's number.
    fn size(&self, kind: u32, key: &str) -> Result<usize> {
        Ok(match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            other => return Err(self.fail(format_args!("the key {key:?} has a value of the unknown type {other}"))),
        })
    }

    /// Skips an array, for example a tokenizer's words, because no ViT needs one. Nested arrays are not supported.
    fn skip_array(&mut self, key: &str) -> Result<()> {
        match self.u32()? {
            8 => {
                let count = self.count(8, "texts")?;
                (0..count).try_for_each(|_| self.text().map(drop))
            }
            kind => {
                let size = self.size(kind, key)?;
                let count = self.count(size, "values")?;
                self.bytes(count.saturating_mul(size)).map(drop)
            }
        }
    }

    fn entry(&mut self) -> Result<Entry> {
        let name = self.text()?;
        let rank = self.u32()?;
        let rank = usize::try_from(rank).ok().filter(|&rank| rank <= RANK).ok_or_else(|| {
            self.fail(format_args!("tensor `{name}` has {rank} dimensions, but the format allows at most {RANK}"))
        })?;
        let mut shape = (0..rank).map(|_| self.number()).collect::<Result<Vec<_>>>()?;
        shape.reverse(); // ggml's first dimension is the innermost
        let kind = self.u32()?;
        let offset = self.number()?;
        let dtype = match kind {
            0 | 8 => Dtype::F32,
            1 => Dtype::F16,
            30 => Dtype::Bf16,
            other => {
                let why = format!("tensor `{name}` is of ggml's type {other}; F32, F16, BF16 and Q8_0 are read");
                return Err(Error::file(self.path, why));
            }
        };
        let q8_0 = kind == 8;
        let count = shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
        let whole = !q8_0 || shape.last().is_some_and(|row| row.is_multiple_of(BLOCK));
        let (values, bytes) = if q8_0 { (BLOCK, BLOCK_BYTES) } else { (1, dtype.size()) };
        let len = count.filter(|_| whole).and_then(|count| count.checked_div(values)?.checked_mul(bytes));
        let len = len.ok_or_else(|| self.fail(format_args!("tensor `{name}` cannot have the shape {shape:?}")))?;
        Ok(Entry { name, info: TensorInfo { dtype, shape }, q8_0, offset, len })
    }
}
