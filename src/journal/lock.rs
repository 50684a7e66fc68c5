//! The lock of a job's directory on a local disk. Invariant: one process of this machine has it at a time; a process that
//! ends, however, has let go of it.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::keeper::Apart;
use super::lease::IfRunning;

/// The file that is locked.
pub(super) const NAME: &str = "lock";

/// How often a lock that another process has is tried again, and how long between: it may only look.
const LOOKS: usize = 5;
const LOOK: Duration = Duration::from_millis(20);

/// Whether a process has the lock.
pub(super) fn is_held(dir: &Path) -> Result<bool> {
    match File::open(dir.join(NAME)) {
        // Held for a moment in a way that others who look may share.
        Ok(file) => Ok(matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| format!("can't look at {}", dir.display())),
    }
}

/// Takes the lock of a directory, creating it if need be. [`Apart::Busy`] if another process has it.
pub(super) fn take(dir: &Path, if_running: IfRunning) -> Result<File> {
    let path = dir.join(NAME);
    let mut n_tries = 0;
    loop {
        create_dir(dir)?;
        let file = match File::options().create(true).truncate(false).read(true).write(true).open(&path) {
            Ok(file) => file,
            // Whoever held it before has just removed the folder.
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e.into()),
        };
        match file.try_lock() {
            Ok(()) => {}
            // Somebody may just be looking.
            Err(TryLockError::WouldBlock) if n_tries < LOOKS => {
                n_tries += 1;
                std::thread::sleep(LOOK);
                continue;
            }
            Err(TryLockError::WouldBlock) if if_running == IfRunning::Wait => file.lock().context("can't lock it")?,
            Err(TryLockError::WouldBlock) => {
                // A lock on a local disk is never left behind by a process that died.
                ensure!(if_running != IfRunning::TakeOver, "another process of this machine is running this job: end it first");
                return Err(Apart::Busy("a process of this machine".to_owned()).into());
            }
            Err(TryLockError::Error(e)) => return Err(e).context("can't lock it"),
        }
        // Whoever held it before may have removed the file since we opened it: then it locks nothing.
        match std::fs::metadata(&path) {
            Ok(there) if there.ino() == file.metadata()?.ino() => return Ok(file),
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e).context("can't lock it"),
        }
    }
}

/// Creates a directory and what is missing above it, durably: segments in a directory that a power failure takes away
/// would not be durable.
fn create_dir(dir: &Path) -> Result<()> {
    let missing: Vec<PathBuf> = dir.ancestors().take_while(|dir| !dir.exists()).map(Path::to_owned).collect();
    std::fs::create_dir_all(dir)?;
    for parent in missing.iter().filter_map(|dir| dir.parent()) {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}
