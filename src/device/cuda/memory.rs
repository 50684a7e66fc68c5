//! Memory of a GPU and of the host beside it: one block of the device that everything is put into, and pinned words.
//!
//! Invariant: what is taken from an arena overlaps nothing else that was taken, and begins at a multiple of [`ALIGNMENT`].

use anyhow::{Result, ensure};
use cudarc::driver::result;
use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::slice;

/// Bytes that pieces of an arena begin at multiples of: what every kernel, and cuBLASLt, may ask for.
pub(super) const ALIGNMENT: usize = 256;

/// So many bytes with what alignment takes.
pub(super) fn aligned(n_bytes: usize) -> usize {
    n_bytes.next_multiple_of(ALIGNMENT)
}

/// A block of the device's memory; freed when dropped.
pub(super) struct DeviceMemory {
    at: u64,
    n_bytes: usize,
}

impl DeviceMemory {
    /// What the driver allocated.
    pub(super) fn new(at: u64, n_bytes: usize) -> Self {
        Self { at, n_bytes }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: it was allocated once, and whoever has an address in it is dropped with it. A context that has failed may
        // refuse; then the memory goes with the process.
        let _freed = unsafe { result::free_sync(self.at) };
    }
}

/// The block that everything is put into, one after the other. Nothing is given back.
#[derive(Default)]
pub(super) struct Arena {
    memory: Option<DeviceMemory>,
    used: Cell<usize>,
}

impl Arena {
    /// An arena over that memory.
    pub(super) fn new(memory: DeviceMemory) -> Self {
        Self { memory: Some(memory), used: Cell::new(0) }
    }

    /// The next so many bytes.
    ///
    /// # Errors
    /// There are not so many: whoever made room counted wrong.
    pub(super) fn take(&self, n_bytes: usize) -> Result<u64> {
        let (base, size) = self.memory.as_ref().map_or((0, 0), |memory| (memory.at, memory.n_bytes));
        let (from, to) = (self.used.get(), self.used.get() + aligned(n_bytes));
        ensure!(to <= size, "{n_bytes} bytes do not fit what was set aside on the GPU: {from} of {size} bytes are in use");
        self.used.set(to);
        Ok(base + from as u64)
    }
}

/// Words of the host that a GPU copies from and to; freed when dropped.
pub(super) struct Pinned {
    at: *mut u32,
    n_words: usize,
}

// SAFETY: it owns the words, as a vector would.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Words that the driver allocated; they become 0.
    ///
    /// # Safety
    /// They were allocated by the driver, aligned, and nobody else uses or frees them.
    pub(super) unsafe fn new(at: *mut u32, n_words: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe { at.write_bytes(0, n_words) };
        Self { at, n_words }
    }
}

impl Deref for Pinned {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        // SAFETY: so many words were allocated and written.
        unsafe { slice::from_raw_parts(self.at, self.n_words) }
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above; they are borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.at, self.n_words) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated once by the driver, as `new` was promised.
        let _freed = unsafe { result::free_host(self.at.cast()) };
    }
}
