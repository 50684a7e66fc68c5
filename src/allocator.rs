//! The program's allocator: mimalloc, with a limit on what one piece of work may take ([`within`]). For code of others that
//! runs what a file says and counts steps, not bytes. Knows nothing of what the work is.
//!
//! An allocator can't return an error to such code, and must not unwind through it; so a thread that goes over its limit ends
//! the program with exit code 1 and one clear line, before the machine's memory is gone. What is durable stays so, as after a kill.

use mimalloc::MiMalloc;
use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::io::Write;

thread_local! {
    /// Bytes that this thread may still take; `None` where nothing limits it.
    static LEFT: Cell<Option<(isize, &'static str)>> = const { Cell::new(None) };
}

/// Does some work on this thread that may hold `limit` bytes more at any time than when it began; `what` it is, for people.
/// Holds in programs that have [`Allocator`].
pub fn within<T>(limit: usize, what: &'static str, work: impl FnOnce() -> T) -> T {
    /// Puts back what held outside, also if the work panics.
    struct Outside(Option<(isize, &'static str)>);
    impl Drop for Outside {
        fn drop(&mut self) {
            LEFT.set(self.0);
        }
    }
    let _outside = Outside(LEFT.replace(Some((isize::try_from(limit).unwrap_or(isize::MAX), what))));
    work()
}

/// Counts bytes that are taken (under 0: given back).
fn take(n_bytes: isize) {
    if let Some((left, what)) = LEFT.get() {
        let left = left.saturating_sub(n_bytes);
        LEFT.set(Some((left, what)));
        if left < 0 {
            LEFT.set(None); // what follows allocates
            let _nobody_may_be_there =
                writeln!(std::io::stderr(), "error: {what} takes more memory than it may: not gone on with");
            // SAFETY: ends the process at once; nothing of it runs after that, no handler and no destructor.
            unsafe { libc::_exit(1) }
        }
    }
}

/// Bytes of a layout: never over `isize::MAX`, as `Layout` promises.
fn size(layout: Layout) -> isize {
    layout.size().cast_signed()
}

/// Rows are made on one thread and dropped on another, by the million: measured, mimalloc takes a tenth off what they cost.
pub struct Allocator;

// SAFETY: each call is passed on to mimalloc as it is; counting touches a thread-local without a destructor, and no memory.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(size(layout));
        // SAFETY: the caller's promises are mimalloc's.
        unsafe { MiMalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(size(layout));
        // SAFETY: the caller's promises are mimalloc's.
        unsafe { MiMalloc.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        take(-size(layout));
        // SAFETY: the caller's promises are mimalloc's.
        unsafe { MiMalloc.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        take(new_size.cast_signed() - size(layout));
        // SAFETY: the caller's promises are mimalloc's.
        unsafe { MiMalloc.realloc(memory, layout, new_size) }
    }
}
