//! A GGUF file as [`Weights`]: matrices in ggml's Q8_0, all else in f32 or halves; the header is checked whole, the tensors are
//! read one at a time.
//!
//! The format is ggml's (`docs/gguf.md` there), versions 2 and 3. A file of ours carries timm's tensor names, and beside
//! ggml's own keys the string `config`, the document that our safetensors files carry too. Q8_0 stores 32 values of a row
//! as 34 bytes: a scale in f16, and 32 integers of a byte that it multiplies.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

use half::f16;

use crate::{
    Error, Result,
    checksum::{Checksum, Checksums},
    limits,
    safetensors::Source,
    weights::{Dtype, TensorInfo, Weights, check_finite},
};

/// What a GGUF file begins with.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Values of a block of Q8_0.
pub const BLOCK: usize = 32;
/// Bytes of a block of Q8_0: the scale and the integers.
pub const BLOCK_BYTES: usize = 34;
/// The numbers that ggml gives the types that are read: F32, F16, Q8_0, BF16.
pub const TYPES: [u32; 4] = [0, 1, 8, 30];
/// Data begin, and each tensor begins, at a multiple of this, where the file says nothing else.
pub const ALIGNMENT: usize = 32;

/// Dimensions of a tensor, as the format says.
const RANK: usize = 4;
/// Largest alignment that a file may ask for.
const MAX_ALIGNMENT: usize = 1 << 16;

/// A checked GGUF file.
#[derive(Debug)]
pub struct Gguf {
    /// For errors.
    path: PathBuf,
    source: Source,
    tensors: BTreeMap<String, TensorInfo>,
    places: BTreeMap<String, Place>,
    metadata: BTreeMap<String, String>,
    /// What its document says that the tensors are.
    checksums: Option<Checksums>,
}

/// Where a tensor lies in its file.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: usize,
    len: usize,
    q8_0: bool,
}

impl Gguf {
    /// Whether a file begins as GGUF does.
    pub(crate) fn is(path: &Path) -> bool {
        let mut start = [0; 4];
        Source::open(path).is_ok_and(|(source, _)| source.read_exact_at(&mut start, 0).is_ok()) && start == MAGIC
    }

    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// No regular file, one whose header does not describe exactly the bytes behind it, or a tensor of another type than
    /// F32, F16, BF16 and Q8_0.
    pub fn open(path: &Path) -> Result<Self> {
        let (source, len) = Source::open(path)?;
        let mut header = Header::new(path, &source, len);
        if header.array()? != MAGIC {
            return Err(Error::file(path, "is no GGUF file"));
        }
        match header.u32()? {
            2 | 3 => {}
            version => {
                return Err(Error::file(path, format!("is GGUF of version {version}, versions 2 and 3 are read")));
            }
        }
        // a tensor has at least a name's length, a number of dimensions, a type and an offset; a key a length and a type
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

    /// Checks that the tensors fill the file, each at the first place that the alignment allows.
    fn add(&mut self, mut entries: Vec<Entry>, start: usize, alignment: usize, len: usize) -> Result<()> {
        entries.sort_by_key(|entry| entry.offset);
        let (mut at, mut end) = (0_usize, 0_usize);
        for Entry { name, info, q8_0, offset, len } in entries {
            let fail = |why: String| Error::file(&self.path, format!("tensor `{name}` {why}: the header is damaged"));
            if offset != at {
                return Err(fail(format!("lies at byte {offset} of the data, expected {at}")));
            }
            end = at.checked_add(len).ok_or_else(|| fail(format!("has {len} bytes")))?;
            at = end.checked_next_multiple_of(alignment).ok_or_else(|| fail(format!("has {len} bytes")))?;
            let place = start.checked_add(offset).map(|offset| Place { offset, len, q8_0 });
            let place = place.ok_or_else(|| fail(format!("lies at byte {offset}")))?;
            if self.tensors.insert(name.clone(), info).is_some() {
                return Err(fail("stands twice".into()));
            }
            self.places.insert(name, place);
        }
        // the last tensor may be padded, or not
        let held = len.saturating_sub(start);
        if held != end && held != at {
            let why = format!("holds {held} bytes of data, its header describes {end} (was it copied completely?)");
            return Err(Error::file(&self.path, why));
        }
        Ok(())
    }

    /// The strings among the file's keys.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    fn place(&self, name: &str) -> Result<Place> {
        self.places.get(name).copied().ok_or_else(|| Error::file(&self.path, format!("has no tensor `{name}`")))
    }

    /// From now on a tensor that is not what its checksum says is an error.
    pub(crate) fn expect(&mut self, checksums: Checksums) {
        self.checksums = Some(checksums);
    }

    /// A tensor's bytes as they are stored, and as its checksum says.
    fn bytes(&self, name: &str, place: Place) -> Result<Vec<u8>> {
        let mut out = vec![0; place.len];
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

/// Refuses a block of Q8_0 whose scale is NaN or infinite.
///
/// # Errors
/// The tensor's name, and the index of the first such block.
pub fn check_scales(name: &str, blocks: &[u8]) -> Result<()> {
    let scales: Vec<u8> = blocks.chunks_exact(BLOCK_BYTES).flat_map(|block| block.iter().take(2).copied()).collect();
    check_finite(name, Dtype::F16, &scales)
}

/// Blocks of Q8_0 → the values that they stand for; exact, for a product of 11 and 8 bits fits into f32.
pub fn dequantise(blocks: &[u8]) -> impl Iterator<Item = f32> {
    blocks.as_chunks::<BLOCK_BYTES>().0.iter().flat_map(|[low, high, integers @ ..]| {
        let scale = f16::from_le_bytes([*low, *high]).to_f32();
        integers.iter().map(move |&n| f32::from(n.cast_signed()) * scale)
    })
}

/// What the header says of a tensor.
struct Entry {
    name: String,
    info: TensorInfo,
    q8_0: bool,
    offset: usize,
    len: usize,
}

/// A file's bytes from its beginning, for a reader that does not know how long the header is.
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

/// Reads the header from front to back. What it announces is compared with the bytes that are left before it is read.
struct Header<'a> {
    path: &'a Path,
    reader: BufReader<Bytes<'a>>,
    at: usize,
    /// Of the file, or the longest header that is read.
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

    /// Bytes that are left.
    fn left(&self) -> usize {
        self.len.saturating_sub(self.at)
    }

    /// The next `len` bytes.
    fn bytes(&mut self, len: usize) -> Result<Vec<u8>> {
        if len > self.left() {
            return Err(self.fail(format_args!("{len} bytes are announced, {} are there", self.left())));
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
        usize::try_from(number).map_err(|_| self.fail(format_args!("{number} is no size of this machine")))
    }

    /// How many of something follow, each of at least `bytes` bytes.
    fn count(&mut self, bytes: usize, what: &str) -> Result<usize> {
        let count = self.number()?;
        match count.checked_mul(bytes) {
            Some(len) if len <= self.left() => Ok(count),
            _ => Err(self.fail(format_args!("{count} {what} are announced, {} bytes are there", self.left()))),
        }
    }

    fn text(&mut self) -> Result<String> {
        let len = self.number()?;
        let bytes = self.bytes(len)?;
        String::from_utf8(bytes).map_err(|_| self.fail("a text is not UTF-8"))
    }

    /// The keys: those that are strings, and the alignment.
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

    /// Bytes of a value of a fixed size, by the number of its type.
    fn size(&self, kind: u32, key: &str) -> Result<usize> {
        Ok(match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            other => return Err(self.fail(format_args!("the key {key:?} has a value of the unknown type {other}"))),
        })
    }

    /// An array that nobody needs: a tokenizer's words, say. Arrays of arrays are not read.
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
            self.fail(format_args!("tensor `{name}` has {rank} dimensions, the format has at most {RANK}"))
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
        let len = len.ok_or_else(|| self.fail(format_args!("tensor `{name}` cannot be of the shape {shape:?}")))?;
        Ok(Entry { name, info: TensorInfo { dtype, shape }, q8_0, offset, len })
    }
}
