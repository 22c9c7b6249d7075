//! Memory for weights and activations: aligned to cache lines, in huge pages where it is large.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

const LINE: usize = 64;
/// From here on memory comes from a [`Slab`](slab::Slab).
const LARGE: usize = 64 << 10;

/// Zeroed bytes that never move. Threads write disjoint parts of it through [`Buffer::ptr`].
#[derive(Debug)]
pub(crate) struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
    len: usize,
    /// Where it is a part of one.
    slab: Option<Arc<slab::Slab>>,
}

// SAFETY: it owns plain bytes; whoever writes through `ptr` answers for the absence of races
unsafe impl Send for Buffer {}
// SAFETY: as above
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zeroed bytes.
    pub(crate) fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), LINE).expect("the size of a buffer fits the address space");
        if len >= LARGE
            && let Some((slab, start)) = slab::take(len)
        {
            return Self { start, layout, len, slab: Some(slab) };
        }
        // SAFETY: the layout is not empty
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, layout, len, slab: None }
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
        match &self.slab {
            // SAFETY: `take` gave these bytes to this buffer alone
            Some(slab) => unsafe { slab.give_back(self.start, self.len) },
            // SAFETY: `new` allocated it with this layout
            None => unsafe { dealloc(self.start.as_ptr(), self.layout) },
        }
    }
}

/// Large buffers are cut one after the other from mappings of the system: zeroed without a write, so that the threads
/// that fill them take the page faults, and in huge pages, which neighbours share. A mapping for each would leave its ends,
/// half of a model's weights, in small pages.
#[cfg(all(target_os = "linux", not(miri)))]
mod slab {
    use std::ptr::NonNull;
    use std::sync::{Arc, Mutex, PoisonError, Weak};

    const HUGE: usize = 2 << 20;
    /// Where a buffer begins.
    const PAGE: usize = 4096;
    /// Bytes of a mapping that buffers share; what none needs is not touched, and takes no memory.
    const SHARED: usize = 64 << 20;

    /// A mapping, until the last buffer in it is dropped.
    #[derive(Debug)]
    pub(super) struct Slab {
        mapped: *mut libc::c_void,
        bytes: usize,
        /// The first huge page.
        start: NonNull<u8>,
    }

    // SAFETY: an address that only `drop` hands back to the system
    unsafe impl Send for Slab {}
    // SAFETY: as above
    unsafe impl Sync for Slab {}

    /// The mapping that buffers are cut from now, and the bytes that it has given.
    static CURRENT: Mutex<(Weak<Slab>, usize)> = Mutex::new((Weak::new(), 0));

    /// Fresh bytes, and what keeps them, where the system has them.
    pub(super) fn take(len: usize) -> Option<(Arc<Slab>, NonNull<u8>)> {
        if len > SHARED / 2 {
            let slab = Slab::new(len)?;
            let start = slab.start;
            return Some((Arc::new(slab), start));
        }
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let slab = match current.0.upgrade() {
            Some(slab) if current.1 + len <= SHARED => slab,
            _ => {
                let slab = Arc::new(Slab::new(SHARED)?);
                *current = (Arc::downgrade(&slab), 0);
                slab
            }
        };
        // SAFETY: the slab has `SHARED` bytes, of which nobody was given these
        let start = unsafe { slab.start.add(current.1) };
        current.1 += len.next_multiple_of(PAGE);
        Some((slab, start))
    }

    impl Slab {
        fn new(len: usize) -> Option<Self> {
            let bytes = len + HUGE;
            // SAFETY: a new private mapping; nothing else refers to it
            let mapped = unsafe {
                let (read_write, private) =
                    (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                libc::mmap(std::ptr::null_mut(), bytes, read_write, private | libc::MAP_NORESERVE, -1, 0)
            };
            let start = mapped.cast::<u8>().wrapping_add(mapped.cast::<u8>().align_offset(HUGE));
            let start = NonNull::new(start).filter(|_| mapped != libc::MAP_FAILED)?;
            // SAFETY: inside the mapping above; advice that the system may refuse
            unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
            Some(Self { mapped, bytes, start })
        }

        /// The memory of a buffer goes back to the system at once, its addresses with the last buffer.
        ///
        /// # Safety
        /// The bytes are what [`take`] gave, and nobody uses them any more.
        pub(super) unsafe fn give_back(&self, start: NonNull<u8>, len: usize) {
            debug_assert!(start >= self.start);
            // SAFETY: whole pages of the mapping, which are the buffer's alone
            unsafe { libc::madvise(start.as_ptr().cast(), len.next_multiple_of(PAGE), libc::MADV_DONTNEED) };
        }
    }

    impl Drop for Slab {
        fn drop(&mut self) {
            // SAFETY: `new` mapped exactly this, and no buffer is left in it
            unsafe { libc::munmap(self.mapped, self.bytes) };
        }
    }
}

#[cfg(not(all(target_os = "linux", not(miri))))]
mod slab {
    use std::ptr::NonNull;
    use std::sync::Arc;

    #[derive(Debug)]
    pub(super) enum Slab {}

    impl Slab {
        pub(super) unsafe fn give_back(&self, _start: NonNull<u8>, _len: usize) {
            match *self {}
        }
    }

    pub(super) fn take(_len: usize) -> Option<(Arc<Slab>, NonNull<u8>)> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_and_keep_what_is_theirs() {
        let mut kept = Vec::new();
        for round in 0..4u8 {
            for len in [0, 1, LINE, LARGE - 1, LARGE, LARGE + 1, 3 << 20, 33 << 20, 40 << 20] {
                let buffer = Buffer::new(len);
                assert!(buffer.ptr().addr().is_multiple_of(LINE) && buffer.len() == len);
                // SAFETY: its own bytes
                let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.ptr(), len) };
                assert!(bytes.iter().all(|&x| x == 0), "{len}");
                bytes.fill(kept.len() as u8 + 1);
                kept.push(buffer);
            }
            kept.retain(|buffer| buffer.len() % 2 == usize::from(round) % 2);
        }
        for buffer in &kept {
            // SAFETY: as above
            let bytes = unsafe { std::slice::from_raw_parts(buffer.ptr(), buffer.len()) };
            assert!(bytes.windows(2).all(|pair| pair[0] == pair[1] && pair[0] > 0));
        }
    }
}
