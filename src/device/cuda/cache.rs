//! A folder of compiled kernels, by hash. Knows nothing of how they are compiled.
//!
//! Invariant: a file of the folder is whole (it gets its name when it is), and its name says all that it depends on.

use super::nvrtc::Nvrtc;
use super::sources::{HEADERS, OPTIONS, Program, hash, is_arch};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// One image of the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Its file.
    pub path: PathBuf,
    /// Its length.
    pub n_bytes: u64,
    /// Whether it was there before.
    pub was_there: bool,
}

/// Checks that an architecture's name is one that NVRTC may know (`sm_90a`, `compute_80`); whether it does, compiling tells.
///
/// # Errors
/// A name of another form.
pub fn check_arch(arch: &str) -> Result<&str> {
    ensure!(is_arch(arch), "{arch:?} names no architecture: they are called sm_80, sm_90a, or for PTX compute_80");
    Ok(arch)
}

/// The file that the image of a program has in the folder.
pub(super) fn path_of(program: &Program, arch: &str, compiler: (i32, i32), folder: &Path) -> PathBuf {
    let ending = if arch.starts_with("sm_") { "cubin" } else { "ptx" };
    folder.join(format!("{}.{arch}.{}.{ending}", program.name, hash(program, arch, compiler)))
}

/// The image of a program for an architecture, from the folder or, if it is not there, compiled into it.
///
/// # Errors
/// What the compiler says, or the file system.
pub fn build(nvrtc: &Nvrtc, program: &Program, arch: &str, folder: &Path) -> Result<Kept> {
    check_arch(arch)?;
    let path = path_of(program, arch, nvrtc.version(), folder);
    match fs::metadata(&path) {
        Ok(found) => return Ok(Kept { path, n_bytes: found.len(), was_there: true }),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    }
    let image = nvrtc.compile((program.name, program.source), HEADERS, arch, OPTIONS)?;
    write(folder, &path, &image.bytes).with_context(|| path.display().to_string())?;
    Ok(Kept { path, n_bytes: image.bytes.len() as u64, was_there: false })
}

/// Writes a file that has its name only when it is whole: two processes may build the same at once.
fn write(folder: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    // Temporary files are their owner's alone; what others may run, they may read.
    #[cfg(unix)]
    file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
