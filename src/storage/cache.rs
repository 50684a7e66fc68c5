//! The system's cache of local files.

use std::fs::File;

/// Gives back the memory in which the system caches what of a file is on the disk. Results are written once and read by
/// others, if at all: without this, gigabytes of them push out what is read often, and each page of them is one that the
/// system (and under it a hypervisor) must first find and clear, which costs more than the copy into it.
pub(super) fn release(file: &File) {
    // Only a hint, and only Linux takes it.
    #[cfg(target_os = "linux")]
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).ok();
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}
