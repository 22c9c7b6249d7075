//! A file's bytes without reading them: the crate's only unsafe block.

use std::fs::File;
use std::io::{self, Read};

use bytes::Bytes;

/// Files up to this size are read rather than mapped: a map costs a page and a slot in the kernel's table.
const SMALL: u64 = 1 << 20;

/// The bytes of an open regular file, mapped where it is large.
///
/// A mapped file stays on the disk, and is paged in as it is looked at and out again when memory is short. Who truncates
/// it meanwhile kills this process (SIGBUS), as with any program that maps files.
pub fn bytes(file: &File) -> io::Result<Bytes> {
    let len = file.metadata()?.len();
    if len <= SMALL {
        let mut data = Vec::new();
        file.take(SMALL.saturating_add(1)).read_to_end(&mut data)?;
        return Ok(Bytes::from(data));
    }
    // SAFETY: the map is read-only and private, and is only ever read as plain bytes, for which every value is valid. That
    // another process may change the file while it is mapped is documented above; no length or index is derived from the
    // bytes twice in a way that memory safety relies on.
    let map = unsafe { memmap2::Mmap::map(file)? };
    Ok(Bytes::from_owner(map))
}
