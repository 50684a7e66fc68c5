//! A stand-in for `libcuda.so`: the driver's entry points that a program reaches through cudarc, over an interpreter of PTX.
//! For tests of such programs, unchanged, on machines without a GPU; a program finds it through `LD_LIBRARY_PATH`
//! (`install`).
//!
//! Work is queued and executed as late as the driver's rules allow: by a call that waits for it. A missing
//! synchronisation, or a host buffer that is written or freed too early, then shows. A kernel's fault is told on stderr with
//! its line of the source, and is the error that a device would give, from which a context does not recover. Only PTX can be
//! loaded, no machine code.
//!
//! Environment variables:
//!
//! - `STANDIN_CC`: the compute capability (8.0), one of 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0.
//! - `STANDIN_MULTIPROCESSORS`: how many the device has (a product's of that capability): fewer make grids that depend on them
//!   smaller.
//! - `STANDIN_MEMORY`: bytes of a device's memory, with K, M or G (1G). The context takes a 64th part of it; an operation of a
//!   graph that was instantiated, 4 KiB.
//! - `STANDIN_DEVICES`: how many devices there are (1; at most 8). 0: `cuInit` finds none.
//! - `STANDIN_DRIVER`: the CUDA version of the driver (12090). PTX of a later version is refused.
//! - `STANDIN_FAIL=what:n:code,...`: the n-th, from 1, of these fails with this error: `alloc` (memory of the device or pinned
//!   memory), `launch` (a kernel or matrix product when it is executed, in graphs, too: the context is lost), or an entry
//!   point by its name.
//! - `STANDIN_SLOW`: microseconds before each operation of a stream.
//! - `STANDIN_SEED`: what the order of blocks, warps and streams is drawn from (0). If it isn't 0, work is now and then
//!   executed early, too.
//! - `STANDIN_RACES=0`: races are not looked for, which is faster.
//! - `STANDIN_COUNTERS`: a file for what was counted (`%p` in its name: the process's number), written as JSON when the
//!   process exits: by kernel launches, bytes, sectors, passes over shared memory and those for conflicts, tensor
//!   operations; calls by entry point, and of what `launch` counts, how much was in graphs; bytes copied; the most memory that
//!   was used.
//! - `STANDIN_ORDER`: a file for the names of entry points in the order in which they were called, a line each, with `launch` where
//!   a kernel or product was executed and `alloc` where memory was asked for. (`%p`, and when: as above.)
//!
//! Differences from a device, but for speed: the number of a kernel's registers is not known (64 is said), streams end in an
//! order of their own, and no capture spans several streams.

mod api;
mod c;
mod call;
mod codes;
mod counters;
mod device;
mod driver;
mod knobs;
mod run;
mod work;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// Puts the library into a folder under the names that programs look for, in place of what is there. Cargo built it beside the
/// test that calls this.
pub fn install(folder: &Path) -> io::Result<()> {
    static LINKS: AtomicU32 = AtomicU32::new(0);
    let library = std::env::current_exe()?.with_file_name("libstandin.so");
    for name in ["libcuda.so", "libcuda.so.1"] {
        // Others may be at it at the same time.
        let own = format!(".{name}.{}.{}", std::process::id(), LINKS.fetch_add(1, Ordering::Relaxed));
        std::os::unix::fs::symlink(&library, folder.join(&own))?;
        std::fs::rename(folder.join(own), folder.join(name))?;
    }
    Ok(())
}
