//! Finds the entries of the zip archive that `torch.save` writes. Entries are stored, so they are read in place.

use std::collections::BTreeMap;

use crate::{checkpoint::safetensors::Source, limits};

const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const LOCATOR_64: u32 = 0x0706_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

/// What the directory says of an entry.
#[derive(Debug)]
struct Entry {
    /// Offset of the local header in the file.
    header: usize,
    len: usize,
    method: u16,
    encrypted: bool,
}

/// The directory of an archive.
#[derive(Debug)]
pub(super) struct Archive {
    entries: BTreeMap<String, Entry>,
}

/// Little-endian numbers of a record. Reading beyond its end gives `None`.
struct Record<'a>(&'a [u8]);

impl Record<'_> {
    fn u16(&self, at: usize) -> Option<u16> {
        self.0.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Option<u32> {
        self.0.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Option<u64> {
        self.0.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes)
    }

    fn size(&self, at: usize) -> Option<usize> {
        self.u64(at)?.try_into().ok()
    }
}

impl Archive {
    /// Reads the directory. Entries must end before it begins, must not overlap, and must have different names.
    pub(super) fn open(source: &Source, len: usize) -> Result<Self, String> {
        let damaged = || "is a zip archive whose directory is damaged (was the file copied completely?)".to_owned();
        let (count, size, offset) = directory(source, len).ok_or_else(damaged)?;
        if size > limits::ARCHIVE_DIRECTORY_BYTES || count > limits::ARCHIVE_ENTRIES {
            return Err(format!("has a directory of {size} bytes with {count} entries, more than a checkpoint has"));
        }
        let bytes = read(source, offset, size).ok_or_else(damaged)?;
        let mut entries = BTreeMap::new();
        let mut places = Vec::new();
        let mut rest = bytes.as_slice();
        for _ in 0..count {
            let (name, entry, used) = entry(rest).ok_or_else(damaged)?;
            rest = rest.get(used..).ok_or_else(damaged)?;
            places.push((entry.header, entry.header.checked_add(30).and_then(|n| n.checked_add(entry.len))));
            if entries.insert(name.clone(), entry).is_some() {
                return Err(format!("holds the entry {name:?} twice"));
            }
        }
        places.sort_unstable();
        let nexts = places.iter().map(|place| place.0).skip(1).chain([offset]);
        // a compressed entry is shorter than it says; it is refused if it is needed
        let apart = |(place, next): (&(usize, Option<usize>), usize)| place.1.is_some_and(|end| end <= next);
        let stored = entries.values().all(|entry: &Entry| entry.method == 0);
        if stored && !places.iter().zip(nexts).all(apart) {
            return Err("is a zip archive whose entries overlap: the file is damaged".into());
        }
        Ok(Self { entries })
    }

    /// The names of the entries.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Where an entry's bytes begin, and how many they are.
    pub(super) fn find(&self, source: &Source, len: usize, name: &str) -> Result<(usize, usize), String> {
        let entry =
            self.entries.get(name).ok_or_else(|| format!("has no entry {name:?} (was the file copied completely?)"))?;
        if entry.encrypted || entry.method != 0 {
            return Err(format!(
                "has the entry {name:?} compressed or encrypted, which torch.save never does: load the file in PyTorch and save it again"
            ));
        }
        let damaged = || format!("has a damaged entry {name:?}");
        let header = read(source, entry.header, 30).ok_or_else(damaged)?;
        let header = Record(&header);
        if header.u32(0) != Some(LOCAL) {
            return Err(damaged());
        }
        let (name_len, extra_len) = (header.u16(26).ok_or_else(damaged)?, header.u16(28).ok_or_else(damaged)?);
        let name_at = entry.header.checked_add(30).ok_or_else(damaged)?;
        // two headers that disagree are two archives in one, and another program would read the other one
        if read(source, name_at, name_len.into()).as_deref() != Some(name.as_bytes()) {
            return Err(damaged());
        }
        let start = name_at.checked_add(name_len.into()).and_then(|at| at.checked_add(extra_len.into()));
        let start = start.ok_or_else(damaged)?;
        if start.checked_add(entry.len).is_none_or(|end| end > len) {
            return Err(format!("ends within the entry {name:?} (was the file copied completely?)"));
        }
        Ok((start, entry.len))
    }
}

fn read(source: &Source, at: usize, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    source.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

/// How many entries the directory has, its size, and its offset.
fn directory(source: &Source, len: usize) -> Option<(usize, usize, usize)> {
    // the last record has a comment of at most 65535 bytes
    let tail = len.min(22 + 65535);
    let start = len.checked_sub(tail)?;
    let bytes = read(source, start, tail)?;
    let is_end = |at: &usize| Record(&bytes).u32(*at) == Some(END);
    let at = (0..=tail.checked_sub(22)?).rev().find(is_end)?;
    let end = Record(bytes.get(at..)?);
    let (count, size, offset) = (end.u16(10)?, end.u32(12)?, end.u32(16)?);
    let behind = start.checked_add(at)?;
    let (count, size, offset, behind) = match behind.checked_sub(20).and_then(|at| Some((at, read(source, at, 20)?))) {
        Some((_, locator)) if Record(&locator).u32(0) == Some(LOCATOR_64) => {
            let at = Record(&locator).size(8)?;
            let end = read(source, at, 56)?;
            let end = Record(&end);
            (end.u32(0) == Some(END_64)).then_some(())?;
            (end.size(32)?, end.size(40)?, end.size(48)?, at)
        }
        _ => (count.into(), size.try_into().ok()?, offset.try_into().ok()?, behind),
    };
    (offset.checked_add(size)? <= behind).then_some((count, size, offset))
}

/// The first entry of a directory: its name, what it says, and its length there.
fn entry(bytes: &[u8]) -> Option<(String, Entry, usize)> {
    let record = Record(bytes);
    (record.u32(0)? == CENTRAL).then_some(())?;
    let (flags, method) = (record.u16(8)?, record.u16(10)?);
    let (mut stored, mut len, mut header) =
        (u64::from(record.u32(20)?), u64::from(record.u32(24)?), u64::from(record.u32(42)?));
    let name_end = 46usize.checked_add(record.u16(28)?.into())?;
    let extra_end = name_end.checked_add(record.u16(30)?.into())?;
    let used = extra_end.checked_add(record.u16(32)?.into())?;
    let name = String::from_utf8(bytes.get(46..name_end)?.to_vec()).ok()?;
    let mut extra = bytes.get(name_end..extra_end)?;
    while let (Some(kind), Some(size)) = (Record(extra).u16(0), Record(extra).u16(2)) {
        let end = 4usize.checked_add(size.into())?;
        if kind == 1 {
            // the fields that did not fit, in this order
            let fields = Record(extra.get(4..end)?);
            let mut at = 0usize;
            for field in [&mut len, &mut stored, &mut header] {
                if *field == u64::from(u32::MAX) {
                    *field = fields.u64(at)?;
                    at = at.checked_add(8)?;
                }
            }
        }
        extra = extra.get(end..)?;
    }
    if method == 0 && stored != len {
        return None;
    }
    let entry = Entry { header: header.try_into().ok()?, len: len.try_into().ok()?, method, encrypted: flags & 1 == 1 };
    Some((name, entry, used))
}
