//! Objects in stores: read, list, put, publish. Knows nothing of rows, formats or jobs. A synchronous face over
//! [`ObjectStore`]: the pipeline runs on plain threads, and only this module knows a runtime. Invariant: an object
//! appears under its name complete and durable, or not at all.
//!
//! For local files that holds because `LocalFileSystem::with_fsync(true)` writes beside the target (`name#1`), syncs
//! the file, renames it and syncs the directory, for puts as for multipart uploads (read in `object_store` 0.14.2).

mod glob;
mod location;
mod upload;

pub use location::Location;
pub use upload::Upload;

use std::future::Future;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use object_store::{Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutPayload};
use tokio::runtime::{Builder, Runtime};

/// How much [`Object::chunk`] reads at once, bytes.
const CHUNK_BYTES: u64 = 4 << 20;

/// Size of every part of an upload but the last, bytes. S3 wants at least 5 MiB and at most 10,000 parts: enough for
/// 80 GB.
const PART_BYTES: usize = 8 << 20;

/// The door to all stores. Cloning is cheap. Its methods block the calling thread, so they must not be called from
/// asynchronous code.
#[derive(Debug, Clone)]
pub struct Storage {
    runtime: Arc<Runtime>,
    part_bytes: usize,
}

impl Storage {
    /// Starts the runtime that drives stores. Fails if the machine can't start a thread.
    pub fn new() -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("valar-storage").enable_all().build();
        Ok(Self { runtime: Arc::new(runtime.context("can't start the storage thread")?), part_bytes: PART_BYTES })
    }

    /// The same with uploads in parts of `part_bytes`, at least 1; each upload under way holds one part in memory.
    #[must_use]
    pub fn with_part_bytes(self, part_bytes: usize) -> Self {
        Self { part_bytes: part_bytes.max(1), ..self }
    }

    fn wait<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Whether there is an object at `at`.
    pub fn exists(&self, at: &Location) -> Result<bool> {
        Ok(self.head(at)?.is_some())
    }

    fn head(&self, at: &Location) -> Result<Option<ObjectMeta>> {
        match self.wait(at.store.head(&at.path)) {
            Ok(meta) => Ok(Some(meta)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(e).with_context(|| format!("can't read {}", at.url)),
        }
    }

    /// Opens an object for reading. An error if there is none, with a hint if it is a directory.
    pub fn open(&self, at: &Location) -> Result<Object> {
        match self.head(at)? {
            Some(meta) => Ok(Object { storage: self.clone(), at: at.clone(), meta }),
            None if self.is_directory(at)? => bail!("{0} is a directory: name its files, for example {0}/*.jsonl", at.url),
            None => bail!("{}: no such file", at.url),
        }
    }

    /// Whether there are objects under `at`, or it is a local directory.
    pub fn is_directory(&self, at: &Location) -> Result<bool> {
        if at.local.as_ref().is_some_and(|path| path.is_dir()) {
            return Ok(true);
        }
        let listed = self.wait(at.store.list_with_delimiter(Some(&at.path)));
        let listed = listed.with_context(|| format!("can't list {}", at.url))?;
        Ok(!listed.objects.is_empty() || !listed.common_prefixes.is_empty())
    }

    /// The whole content of a small object; `None` if there is none.
    pub fn get(&self, at: &Location) -> Result<Option<Bytes>> {
        let content = self.wait(async { at.store.get(&at.path).await?.bytes().await });
        match content {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(e).with_context(|| format!("can't read {}", at.url)),
        }
    }

    /// Bytes `range` of an object.
    pub fn get_range(&self, at: &Location, range: Range<u64>) -> Result<Bytes> {
        self.wait(at.store.get_range(&at.path, range)).with_context(|| format!("can't read {}", at.url))
    }

    /// Puts a small object, replacing what is there; durable when this returns.
    pub fn put(&self, at: &Location, content: Bytes) -> Result<()> {
        let put = self.wait(at.store.put(&at.path, PutPayload::from_bytes(content)));
        put.map(drop).with_context(|| format!("can't write {}", at.url))
    }

    /// Deletes an object; that there is none is fine.
    pub fn delete(&self, at: &Location) -> Result<()> {
        match self.wait(at.store.delete(&at.path)) {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(e).with_context(|| format!("can't delete {}", at.url)),
        }
    }

    /// Names of the objects directly under `at`, sorted.
    pub fn list(&self, at: &Location) -> Result<Vec<String>> {
        let listed = self.wait(at.store.list_with_delimiter(Some(&at.path)));
        let listed = listed.with_context(|| format!("can't list {}", at.url))?;
        let mut names: Vec<String> = listed.objects.iter().filter_map(|o| o.location.filename().map(str::to_owned)).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Begins writing a large object; see [`Upload`].
    pub fn upload(&self, at: &Location) -> Upload {
        Upload::new(self.clone(), at.clone())
    }

    /// Removes what killed writers of `at` left beside it (`name#1`, which stores neither list nor reuse). Only for
    /// whoever holds the lock of the job that writes `at`.
    pub fn sweep(&self, at: &Location) -> Result<()> {
        let Some(path) = &at.local else { return Ok(()) };
        let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else { return Ok(()) };
        sweep_staged(dir, |stem| stem == name)
    }

    /// Like [`Storage::sweep`], for everything directly under `dir`.
    pub fn sweep_under(&self, dir: &Location) -> Result<()> {
        dir.local.as_ref().map_or(Ok(()), |path| sweep_staged(path, |_| true))
    }
}

/// Removes files `stem#N` of `dir` for the stems asked for.
fn sweep_staged(dir: &Path, of: impl Fn(&str) -> bool) -> Result<()> {
    let Ok(entries) = dir.read_dir() else { return Ok(()) };
    for entry in entries {
        let path = entry.with_context(|| format!("can't list {}", dir.display()))?.path();
        let staged = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.rsplit_once('#'));
        let is_staged = staged.is_some_and(|(stem, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()) && of(stem));
        if is_staged && path.is_file() {
            std::fs::remove_file(&path).with_context(|| format!("can't delete {}", path.display()))?;
        }
    }
    Ok(())
}

/// An object open for reading. If the object is replaced or changed meanwhile, reads fail instead of mixing two
/// versions (stores without entity tags can't tell).
#[derive(Debug, Clone)]
pub struct Object {
    storage: Storage,
    at: Location,
    meta: ObjectMeta,
}

impl Object {
    /// Size, bytes.
    pub fn n_bytes(&self) -> u64 {
        self.meta.size
    }

    /// For error messages: the URL the object was opened by.
    pub fn url(&self) -> &Arc<str> {
        &self.at.url
    }

    /// Bytes `range`; both ends must lie within the object.
    pub fn range(&self, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let (start, n_bytes) = (range.start, range.end - range.start);
        let options =
            GetOptions { range: Some(GetRange::Bounded(range)), if_match: self.meta.e_tag.clone(), ..GetOptions::default() };
        let read = self.storage.wait(async { self.at.store.get_opts(&self.at.path, options).await?.bytes().await });
        match read {
            Ok(bytes) if bytes.len() as u64 == n_bytes => Ok(bytes),
            Ok(_) => bail!("{} ended early: it changed while it was being read", self.at.url),
            Err(Error::Precondition { .. }) => bail!("{} changed while it was being read", self.at.url),
            Err(e) => Err(e).with_context(|| format!("can't read {} at byte {start}", self.at.url)),
        }
    }

    /// The next few megabytes from `offset`; empty at the end.
    pub fn chunk(&self, offset: u64) -> Result<Bytes> {
        self.range(offset.min(self.meta.size)..(offset + CHUNK_BYTES).min(self.meta.size))
    }
}
