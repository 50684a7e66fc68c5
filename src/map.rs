//! Memory maps of model files. Knows nothing of what is in them.

use anyhow::{Context, Result};
use memmap2::{Mmap, UncheckedAdvice};
use std::fs::File;
use std::path::Path;

/// Maps a model file for reading.
///
/// # Errors
/// The file can't be opened or mapped.
pub(crate) fn open(path: &Path) -> Result<Mmap> {
    let file = File::open(path).with_context(|| format!("cannot open model file {}", path.display()))?;
    // SAFETY: the map is read-only. A file that another process truncates while it is mapped would fault; model files are
    // written once and renamed into place (hub.rs), and the same holds for every engine that maps weights.
    unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))
}

/// Takes the pages of a map that were read out of the process's memory; those that are read again come back.
pub(crate) fn release(map: &Mmap) {
    // SAFETY: `MADV_DONTNEED` on a read-only map of a file: a page that is touched again has the file's bytes, as before.
    let _costs_only_memory = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
}
