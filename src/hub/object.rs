//! A GGUF file in an object store, brought into the cache. Invariant: a file in the cache is one version of the object,
//! whole: it is read under the entity tag it was opened with, beside its place, and renamed when all of it is there.

use super::Lock;
use crate::storage::{Location, Storage};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Where the cache has this object as it is now, fetched if need be.
///
/// # Errors
/// No GGUF file by its name, none there, a store that can't be read.
pub(super) fn fetch(url: &str, cache: &Path, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let at = Location::parse(url)?;
    let name = at.path.filename().unwrap_or_default();
    let is_gguf = Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    ensure!(is_gguf, "model {url}: of models in object stores only .gguf files can be used");
    let object = Storage::new()?.open(&at)?;
    let version = blake3::hash(format!("{url}\n{}", object.version()).as_bytes()).to_hex();
    let folder = cache.join("objects").join(&version[..32]);
    let target = folder.join(name);
    if target.is_file() {
        return Ok(target);
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create the model cache {}", folder.display()))?;
    let _lock = Lock::take(&folder)?;
    if target.is_file() {
        return Ok(target);
    }
    say(&format!("fetching {url} ({} MB)", object.n_bytes() / 1_000_000));
    let part = folder.join(format!("{name}.part"));
    let cannot = || format!("cannot write {}", part.display());
    let mut file = File::create(&part).with_context(cannot)?;
    let mut offset = 0;
    while offset < object.n_bytes() {
        let chunk = object.chunk(offset)?;
        file.write_all(&chunk).with_context(cannot)?;
        offset += chunk.len() as u64;
    }
    file.sync_all().with_context(cannot)?;
    fs::rename(&part, &target).with_context(|| format!("cannot move {} into place", part.display()))?;
    Ok(target)
}
