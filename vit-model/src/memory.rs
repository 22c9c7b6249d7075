//! Large buffers: a lack of memory is an error that says for what, not the end of the process.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::{Error, Result};

/// Buffers of fewer bytes are not asked for in advance.
const LARGE: usize = 1 << 20;

/// What has to be left beside a large buffer, for the many small ones that nobody asks for in advance. It is more than the largest
/// size to which glibc adapts its allocator, so asking changes nothing.
const REST: usize = 33 << 20;

/// Whether the system has so many bytes in one piece, and some more. Nothing is kept of them: a large allocation maps memory that is
/// only counted when it is written to, so asking costs microseconds, and `vec![0; n]` afterwards still gets zeroed pages.
pub(crate) fn has(bytes: usize) -> bool {
    bytes.checked_add(REST).is_some_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok())
}

/// What the CPU engine unwinds with if the system has no memory for a buffer. [`guarded`] makes an error of it.
pub(crate) struct NoMemory {
    pub bytes: usize,
}

/// An error if the system has not so many bytes.
pub(crate) fn check(bytes: usize, what: &str) -> Result<()> {
    if bytes >= LARGE && !has(bytes) {
        return Err(Error::Memory { what: what.into(), bytes });
    }
    Ok(())
}

/// So many zeros.
pub(crate) fn zeros(bytes: usize, what: &str) -> Result<Vec<u8>> {
    check(bytes, what)?;
    Ok(vec![0; bytes])
}

/// Runs code that uses the CPU engine's buffers.
pub(crate) fn guarded<T>(what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| match payload.downcast::<NoMemory>() {
        Ok(none) => Err(Error::Memory { what: what.into(), bytes: none.bytes }),
        Err(payload) => resume_unwind(payload),
    })
}
