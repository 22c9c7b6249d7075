//! Memory for weights and activations: aligned to cache lines, and in huge pages if it is large.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::panic::resume_unwind;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::memory::{NoMemory, has};

const LINE: usize = 64;
/// Buffers of at least so many bytes are cut from a [`Slab`](slab::Slab).
const LARGE: usize = 64 << 10;

/// Zeroed bytes that never move. Threads write disjoint parts of them through [`Buffer::ptr`].
#[derive(Debug)]
pub(crate) struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
    len: usize,
    /// The slab that it is cut from, if any.
    slab: Option<Arc<slab::Slab>>,
}

// SAFETY: it owns plain bytes; code that writes through `ptr` is unsafe and promises the absence of races
unsafe impl Send for Buffer {}
// SAFETY: as for `Send`
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zeroed bytes. If the system has not so many, this unwinds with [`NoMemory`], which [`crate::memory::guarded`] catches.
    pub(crate) fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), LINE).expect("the size of a buffer fits the address space");
        let none = || -> ! { resume_unwind(Box::new(NoMemory { bytes: len })) };
        if len >= LARGE && !has(len) {
            none()
        }
        if len >= LARGE
            && let Some((slab, start)) = slab::take(len)
        {
            return Self { start, layout, len, slab: Some(slab) };
        }
        // SAFETY: the layout has at least one byte
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| none());
        Self { start, layout, len, slab: None }
    }

    /// The first byte, aligned to 64.
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Sets every byte to zero.
    pub(crate) fn clear(&mut self) {
        // SAFETY: the buffer has `len` bytes, and the mutable borrow excludes views of them
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
            // SAFETY: `take` gave these bytes to this buffer alone, which is dropped
            Some(slab) => unsafe { slab.give_back(self.start, self.len) },
            // SAFETY: `new` allocated these bytes with this layout
            None => unsafe { dealloc(self.start.as_ptr(), self.layout) },
        }
    }
}

/// Large buffers are cut one after the other from mappings of the system. These are zeroed without a write, so that the
/// threads that fill them take the page faults, and are in huge pages, which neighbours share. A mapping per buffer would leave
/// the ends of each, half of a model's weights, in small pages.
#[cfg(all(target_os = "linux", not(miri)))]
mod slab {
    use std::ptr::NonNull;
    use std::sync::{Arc, Mutex, PoisonError, Weak};

    const HUGE: usize = 2 << 20;
    /// The alignment of a buffer.
    const PAGE: usize = 4096;
    /// Bytes of a mapping that buffers share. Pages that no buffer uses are never touched, so they take no memory.
    const SHARED: usize = 64 << 20;

    /// A mapping, until the last buffer in it is dropped.
    #[derive(Debug)]
    pub(super) struct Slab {
        mapped: *mut libc::c_void,
        bytes: usize,
        /// The first huge page.
        start: NonNull<u8>,
    }

    // SAFETY: an address that only `drop` returns to the system
    unsafe impl Send for Slab {}
    // SAFETY: as for `Send`
    unsafe impl Sync for Slab {}

    /// The mapping that buffers are currently cut from, and the bytes that are used.
    static CURRENT: Mutex<(Weak<Slab>, usize)> = Mutex::new((Weak::new(), 0));

    /// Fresh bytes and the slab that keeps them, if the system has memory.
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
        // SAFETY: the slab has `SHARED` bytes, and those from `current.1` on belong to no buffer yet
        let start = unsafe { slab.start.add(current.1) };
        current.1 += len.next_multiple_of(PAGE);
        Some((slab, start))
    }

    impl Slab {
        fn new(len: usize) -> Option<Self> {
            let bytes = len + HUGE;
            // SAFETY: a new private mapping, which replaces no other because the address is null
            let mapped = unsafe {
                let (read_write, private) =
                    (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                libc::mmap(std::ptr::null_mut(), bytes, read_write, private | libc::MAP_NORESERVE, -1, 0)
            };
            let start = mapped.cast::<u8>().wrapping_add(mapped.cast::<u8>().align_offset(HUGE));
            let start = NonNull::new(start).filter(|_| mapped != libc::MAP_FAILED)?;
            // SAFETY: these bytes are inside the mapping above; the system may ignore the advice
            unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
            Some(Self { mapped, bytes, start })
        }

        /// Returns the memory of a buffer to the system at once. Its addresses are returned with the last buffer.
        ///
        /// # Safety
        /// The bytes are those that [`take`] returned, and are no longer used.
        pub(super) unsafe fn give_back(&self, start: NonNull<u8>, len: usize) {
            debug_assert!(start >= self.start);
            // SAFETY: `take` hands out whole pages, so no other buffer has a part of these
            unsafe { libc::madvise(start.as_ptr().cast(), len.next_multiple_of(PAGE), libc::MADV_DONTNEED) };
        }
    }

    impl Drop for Slab {
        fn drop(&mut self) {
            // SAFETY: `new` mapped exactly these bytes, and every buffer in them held a reference to this slab
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
                // SAFETY: the buffer has `len` bytes, which nothing else refers to
                let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.ptr(), len) };
                assert!(bytes.iter().all(|&x| x == 0), "{len}");
                bytes.fill(kept.len() as u8 + 1);
                kept.push(buffer);
            }
            kept.retain(|buffer| buffer.len() % 2 == usize::from(round) % 2);
        }
        for buffer in &kept {
            // SAFETY: the buffer has these bytes, which nothing else refers to
            let bytes = unsafe { std::slice::from_raw_parts(buffer.ptr(), buffer.len()) };
            assert!(bytes.windows(2).all(|pair| pair[0] == pair[1] && pair[0] > 0));
        }
    }
}
