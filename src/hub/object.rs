//! A model in an object store (a GGUF file, or a folder in Hugging Face's form), brought into the cache. Invariant: what is in
//! the cache is one version of each object, whole: it is read under the entity tag it was opened with, beside its place, and
//! renamed when all of it is there.

use super::{Lock, remote};
use crate::storage::{Location, Object, Storage};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Where the cache has this file or folder as it is now, fetched if need be.
///
/// # Errors
/// Neither a GGUF file nor a folder with `config.json` and safetensors, a store that can't be read.
pub(super) fn fetch(url: &str, cache: &Path, say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let (at, storage) = (Location::parse(url)?, Storage::new()?);
    let name = at.path.filename().unwrap_or("model");
    let is_gguf = Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let files = if is_gguf { vec![(name.to_owned(), storage.open(&at)?)] } else { folder_files(&storage, &at)? };
    let versions: Vec<String> = files.iter().map(|(name, object)| format!("{name} {}", object.version())).collect();
    let version = blake3::hash(format!("{url}\n{}", versions.join("\n")).as_bytes()).to_hex();
    let folder = cache.join("objects").join(&version[..32]);
    let target = folder.join(name);
    if target.exists() {
        return Ok(target);
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create the model cache {}", folder.display()))?;
    let _lock = Lock::take(&folder)?;
    if target.exists() {
        return Ok(target);
    }
    let n_bytes: u64 = files.iter().map(|(_, object)| object.n_bytes()).sum();
    say(&format!("fetching {url} ({} MB)", n_bytes / 1_000_000));
    let part = folder.join(format!("{name}.part"));
    if is_gguf {
        copy(&files[0].1, &part)?;
    } else {
        fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
        files.iter().try_for_each(|(name, object)| copy(object, &part.join(name)))?;
        sync_folder(&part)?;
    }
    fs::rename(&part, &target).with_context(|| format!("cannot move {} into place", part.display()))?;
    sync_folder(&folder)?;
    Ok(target)
}

/// The files of a model folder that the engine reads.
fn folder_files(storage: &Storage, at: &Location) -> Result<Vec<(String, Object)>> {
    let url = &at.url;
    ensure!(!at.is_web(), "model {url}: of models on web servers only .gguf files can be used, for these list no folders");
    let names = storage.list(at)?;
    let wanted = remote::wanted(names.iter().map(String::as_str));
    let is_model = wanted.contains(&"config.json") && wanted.iter().any(|name| name.ends_with(".safetensors"));
    ensure!(is_model, "model {url}: neither a .gguf file nor a folder with config.json and model.safetensors");
    wanted.into_iter().map(|name| Ok((name.to_owned(), storage.open(&at.child(name)?)?))).collect()
}

/// Names in a folder are on the disk when this returns.
fn sync_folder(folder: &Path) -> Result<()> {
    // Only on Unix a folder can be opened.
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).with_context(|| format!("cannot write {}", folder.display()))?;
    }
    Ok(())
}

/// Writes the object into a file, which is on the disk when this returns.
fn copy(object: &Object, to: &Path) -> Result<()> {
    let cannot = || format!("cannot write {}", to.display());
    let mut file = File::create(to).with_context(cannot)?;
    let mut offset = 0;
    while offset < object.n_bytes() {
        let chunk = object.chunk(offset)?;
        file.write_all(&chunk).with_context(cannot)?;
        offset += chunk.len() as u64;
    }
    file.sync_all().with_context(cannot)
}
