//! Memory for weights and activations: aligned to cache lines, in huge pages where it is large.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

const LINE: usize = 64;
const HUGE: usize = 2 << 20;

/// Zeroed bytes that never move. Threads write disjoint parts of it through [`Buffer::ptr`].
#[derive(Debug)]
pub(crate) struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
    len: usize,
}

// SAFETY: it owns plain bytes; whoever writes through `ptr` answers for the absence of races
unsafe impl Send for Buffer {}
// SAFETY: as above
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zeroed bytes.
    pub(crate) fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), LINE).expect("the size of a buffer fits the address space");
        if len >= HUGE
            && let Some(start) = map::zeroed(len)
        {
            return Self { start, layout, len };
        }
        // SAFETY: the layout is not empty
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, layout, len }
    }

    /// The first byte, aligned to 64.
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Sets every byte to zero. Nothing may be using the buffer.
    pub(crate) fn clear(&self) {
        // SAFETY: the buffer has `len` bytes
        unsafe { self.start.as_ptr().write_bytes(0, self.len) }
    }

    /// Bytes in the buffer.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len >= HUGE && map::release(self.start, self.len) {
            return;
        }
        // SAFETY: `new` allocated it with this layout
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// Large buffers come straight from the system: zeroed without a write, so that the threads that fill them take the
/// page faults, and in huge pages.
#[cfg(all(target_os = "linux", not(miri)))]
mod map {
    use std::ptr::NonNull;

    /// Fresh pages, or nothing where the system has none; then [`release`] is not to be asked either.
    pub(super) fn zeroed(len: usize) -> Option<NonNull<u8>> {
        // SAFETY: a new private mapping; nothing else refers to it
        let start = unsafe {
            let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), len, read_write, private, -1, 0)
        };
        if start == libc::MAP_FAILED {
            let layout = std::alloc::Layout::from_size_align(len, 64).expect("checked by the caller");
            std::alloc::handle_alloc_error(layout);
        }
        // SAFETY: the mapping above; advice that the system may refuse
        unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
        NonNull::new(start.cast())
    }

    pub(super) fn release(start: NonNull<u8>, len: usize) -> bool {
        // SAFETY: `zeroed` mapped exactly this
        unsafe { libc::munmap(start.as_ptr().cast(), len) == 0 }
    }
}

#[cfg(not(all(target_os = "linux", not(miri))))]
mod map {
    use std::ptr::NonNull;

    pub(super) fn zeroed(_len: usize) -> Option<NonNull<u8>> {
        None
    }

    pub(super) fn release(_start: NonNull<u8>, _len: usize) -> bool {
        false
    }
}
