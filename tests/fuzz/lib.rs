//! The parsers under a fuzzer; see `run.sh`.

mod parsers;
pub use parsers::*;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// More in one piece is more than the fuzzed parser may ask for, whatever its input says.
static MOST_BYTES: AtomicUsize = AtomicUsize::new(256 << 20);

/// Called once before all inputs.
pub fn begin() {
    // The fuzzer's hook ends the process at a panic, also at one that valar catches. One that is not caught still ends it.
    drop(std::panic::take_hook());
}

/// [`begin`], for Parquet: a page says that it unpacks to up to 2 GiB, and the library takes its word for it.
pub fn begin_parquet() {
    begin();
    MOST_BYTES.store(2 << 30, Relaxed);
}

/// Counts a huge allocation as a crash, also where its pages are never touched.
struct Bounded;

// SAFETY: the system's allocator, or the end of the process.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST_BYTES.load(Relaxed) {
            std::process::abort();
        }
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;
