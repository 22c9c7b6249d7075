//! Elements of a constant: in memory, or a range of a file that is read on demand.
//!
//! Files are not memory-mapped, because truncating a mapped file kills the process. A failed read returns zeros and is
//! remembered, so that [`StoredFile::check`] refuses every result made from them.

use std::{
    cell::Cell,
    fs::{File, Metadata},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use vit_model::{checkpoint::safetensors::read_exact_at, inputs};

use crate::{Error, Result};

/// Bytes read at a time when a whole file is hashed, few enough to stay in the cache.
const CHUNK: usize = 1 << 17;

/// The largest buffer that a thread keeps for the next read: a weight of a ViT-B.
const KEPT: usize = 16 << 20;

thread_local! {
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A size in memory as an offset in a file.
pub(crate) fn wide(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}

/// An open regular file that notices if it changes.
#[derive(Debug)]
pub struct StoredFile {
    path: PathBuf,
    file: File,
    len: u64,
    opened: Metadata,
    failed: OnceLock<String>,
}

impl StoredFile {
    /// Opens a regular file.
    ///
    /// # Errors
    /// It is none, or it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, opened) = inputs::open(path)?;
        Ok(Self { path: path.into(), file, len: opened.len(), opened, failed: OnceLock::new() })
    }

    /// Its metadata when it was opened.
    pub fn opened(&self) -> &Metadata {
        &self.opened
    }

    /// Its length when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Was it empty?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The open file; only its own cursor may be moved.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// `len` bytes from `offset`. If they cannot be read, they are zeros and the failure is remembered.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.fill(offset, &mut out);
        out
    }

    /// Like [`read`](Self::read), into an existing buffer.
    fn fill(&self, offset: u64, out: &mut [u8]) {
        if let Err(error) = read_exact_at(&self.file, out, offset) {
            let why = match error.kind() {
                io::ErrorKind::UnexpectedEof => "became shorter while it was read".to_owned(),
                _ => format!("could not be read: {error}"),
            };
            let _ = self.failed.set(why);
            out.fill(0);
        }
    }

    /// Checks that every read so far returned what the file held when it was opened.
    ///
    /// # Errors
    /// A read failed, or the file has changed since.
    pub fn check(&self) -> Result<()> {
        let now = self.file.metadata().map_err(Error::io(&self.path))?;
        // not every system records times
        let written = matches!((now.modified(), self.opened.modified()), (Ok(now), Ok(then)) if now != then);
        if now.len() != self.len {
            let _ = self.failed.set(format!("had {} bytes and has {} now", self.len, now.len()));
        } else if written {
            let _ = self.failed.set("was written to".into());
        }
        match self.failed.get() {
            None => Ok(()),
            Some(why) => {
                let why =
                    format!("{why}: the file changed during the conversion; convert it again when it is complete");
                Err(Error::file(&self.path, why))
            }
        }
    }

    /// The SHA-256 of the whole file, in hexadecimal digits.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn sha256(&self) -> Result<String> {
        let mut digest = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < self.len {
            let left = usize::try_from(self.len.saturating_sub(at)).unwrap_or(CHUNK);
            let part = buffer.get_mut(..left.min(CHUNK)).unwrap_or_default();
            self.fill(at, part);
            digest.update(&*part);
            at = at.saturating_add(wide(part.len()));
        }
        self.check()?;
        Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// The elements of a constant.
#[derive(Clone, Debug)]
pub enum Data {
    /// In memory.
    Memory(Bytes),
    /// In a file.
    File {
        /// The file.
        file: Arc<StoredFile>,
        /// Where they begin.
        offset: u64,
        /// How many bytes they are.
        len: usize,
    },
}

impl Data {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Memory(bytes) => bytes.len(),
            Self::File { len, .. } => *len,
        }
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All bytes. Those of a file are read each time.
    pub fn read(&self) -> Bytes {
        self.range(0..self.len())
    }

    /// The bytes of a range, cut off at the end of the data.
    pub fn range(&self, range: Range<usize>) -> Bytes {
        let (start, len) = self.within(range);
        match self {
            Self::Memory(bytes) => bytes.slice(start..start.saturating_add(len)),
            Self::File { file, offset, .. } => file.read(offset.saturating_add(wide(start)), len).into(),
        }
    }

    /// The start and length of a range, cut off at the end of the data.
    fn within(&self, range: Range<usize>) -> (usize, usize) {
        let end = range.end.min(self.len());
        let start = range.start.min(end);
        (start, end.saturating_sub(start))
    }

    /// Calls `see` with the bytes of a range, in a buffer that is reused.
    pub fn look<R>(&self, range: Range<usize>, see: impl FnOnce(&[u8]) -> R) -> R {
        let Self::File { file, offset, .. } = self else { return see(&self.range(range)) };
        let (start, len) = self.within(range);
        // a fresh buffer for each of hundreds of weights would have to be zeroed each time
        let mut buffer = BUFFER.take();
        if buffer.len() < len {
            buffer = vec![0; len];
        }
        let part = buffer.get_mut(..len).unwrap_or_default();
        file.fill(offset.saturating_add(wide(start)), part);
        let seen = see(part);
        if buffer.len() <= KEPT {
            BUFFER.set(buffer);
        }
        seen
    }

    /// Copies the bytes from `start` on into `out`, and fills the rest of `out` with zeros.
    pub fn copy(&self, start: usize, out: &mut [u8]) {
        let (start, len) = self.within(start..start.saturating_add(out.len()));
        let (out, rest) = out.split_at_mut(len);
        rest.fill(0);
        match self {
            Self::Memory(bytes) => out.copy_from_slice(bytes.get(start..start.saturating_add(len)).unwrap_or_default()),
            Self::File { file, offset, .. } => file.fill(offset.saturating_add(wide(start)), out),
        }
    }

    /// Is it the same range of memory, or of the same file?
    pub fn same_place(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Memory(a), Self::Memory(b)) => a.as_ptr() == b.as_ptr() && a.len() == b.len(),
            (Self::File { file: f, offset: a, len: m }, Self::File { file: g, offset: b, len: n }) => {
                Arc::ptr_eq(f, g) && a == b && m == n
            }
            _ => false,
        }
    }

    /// Checks that reads from its file succeeded.
    ///
    /// # Errors
    /// As [`StoredFile::check`].
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Memory(_) => Ok(()),
            Self::File { file, .. } => file.check(),
        }
    }
}

impl PartialEq for Data {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && (self.same_place(other) || self.read() == other.read())
    }
}

impl From<Vec<u8>> for Data {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Memory(bytes.into())
    }
}

impl From<Bytes> for Data {
    fn from(bytes: Bytes) -> Self {
        Self::Memory(bytes)
    }
}
