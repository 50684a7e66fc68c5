//! Objects in stores: read, list, put, publish. Knows nothing of rows, formats or jobs. A synchronous face over
//! [`ObjectStore`]: the pipeline runs on plain threads, and only this module knows a runtime. Invariant: an object
//! appears under its name complete and durable, or not at all.
//!
//! Remote stores publish a put or a completed multipart upload at once. For local files that holds because
//! `LocalFileSystem::with_fsync(true)` writes beside the target (`name#1`), syncs the file, renames it and syncs the
//! directory, for puts as for multipart uploads (read in `object_store` 0.14.2).

mod cache;
mod conditional;
mod container;
mod glob;
mod location;
mod remote;
mod upload;
mod whole;

pub use conditional::Version;
pub use location::Location;
pub use upload::{Announce, Hear, Upload, Written};

use std::fs::File;
use std::future::Future;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::{Error, GetOptions, GetRange, ListResult, ObjectMeta, ObjectStoreExt as _, PutPayload};
use remote::{broke_off, tell};
use tokio::runtime::{Builder, Runtime};
use whole::{Copies, WholeCopy};

/// How much [`Object::chunk`] reads at once, bytes.
const CHUNK_BYTES: u64 = 4 << 20;

/// Size of every part of an upload but the last, bytes. S3 wants at least 5 MiB and at most 10,000 parts: enough for
/// 80 GB.
const PART_BYTES: usize = 8 << 20;

/// Deletions at a time.
const DELETIONS: usize = 16;

/// How long to wait before a request that broke off is made again.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_millis(800), Duration::from_secs(3), Duration::from_secs(8)];

/// An object as its store lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name in its folder.
    pub name: String,
    /// Its size, bytes.
    pub n_bytes: u64,
    /// When it was written, by its store's clock.
    pub changed_at: SystemTime,
}

/// The door to all stores. Cloning is cheap. Its methods block the calling thread, so they must not be called from
/// asynchronous code.
#[derive(Debug, Clone)]
pub struct Storage {
    runtime: Arc<Runtime>,
    part_bytes: usize,
    announce: Option<Announce>,
    /// How long a request may take, where a slow answer is as bad as none.
    limit: Option<Duration>,
    copies: Copies,
}

impl Storage {
    /// Starts the runtime that drives stores. Fails if the machine can't start a thread.
    pub fn new() -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("valar-storage").enable_all().build();
        let runtime = Arc::new(runtime.context("can't start the storage thread")?);
        Ok(Self { runtime, part_bytes: PART_BYTES, announce: None, limit: None, copies: Copies::default() })
    }

    /// The same with uploads in parts of `part_bytes`, at least 1; each upload under way holds one part in memory.
    #[must_use]
    pub fn with_part_bytes(self, part_bytes: usize) -> Self {
        Self { part_bytes: part_bytes.max(1), ..self }
    }

    /// The same with uploads to remote stores that begin only after they were announced. There, every object that is
    /// [uploaded](Storage::upload) has an id, however small it is; but for empty ones where nobody else writes.
    #[must_use]
    pub fn announcing(self, announce: Announce) -> Self {
        Self { announce: Some(announce), ..self }
    }

    /// The same for small requests that are made again soon anyhow: none takes longer than that, tries included.
    #[must_use]
    pub fn hurried(self, limit: Duration) -> Self {
        Self { limit: Some(limit), ..self }
    }

    fn wait<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Does what may be done twice, again if the connection breaks off: stores do that themselves while they wait for the
    /// head of an answer, but not for its body, and not for a deletion. The whole content is put each time, so that a put
    /// whose answer was lost changes nothing when it comes again.
    fn patiently<T, F: Future<Output = object_store::Result<T>>>(&self, what: impl Fn() -> F) -> object_store::Result<T> {
        self.wait(self.trying(what))
    }

    async fn trying<T, F: Future<Output = object_store::Result<T>>>(&self, what: impl Fn() -> F) -> object_store::Result<T> {
        let tries = async {
            for pause in PAUSES {
                match what().await {
                    Err(e) if broke_off(&e) => tokio::time::sleep(pause).await,
                    ended => return ended,
                }
            }
            what().await
        };
        let Some(limit) = self.limit else { return tries.await };
        let late = || Error::Generic { store: "store", source: format!("no answer within {limit:?}").into() };
        tokio::time::timeout(limit, tries).await.unwrap_or_else(|_| Err(late()))
    }

    /// Objects and folders directly under `at`.
    fn list_level(&self, at: &Location) -> Result<ListResult> {
        let listed = self.patiently(|| at.store.list_with_delimiter(Some(&at.path)));
        let mut listed = listed.map_err(|e| tell(e).context(format!("can't list {}", at.url)))?;
        // What consoles put where they show a folder.
        listed.objects.retain(|object| object.location != at.path);
        Ok(listed)
    }

    /// Whether there is an object at `at`.
    pub fn exists(&self, at: &Location) -> Result<bool> {
        Ok(self.head(at)?.is_some())
    }

    fn head(&self, at: &Location) -> Result<Option<ObjectMeta>> {
        match self.patiently(|| at.store.head(&at.path)) {
            Ok(meta) => Ok(Some(meta)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(tell(e).context(format!("can't read {}", at.url))),
        }
    }

    /// Opens an object for reading. An error if there is none, with a hint if it is a directory, or if it is another
    /// [version](Location::pinned).
    pub fn open(&self, at: &Location) -> Result<Object> {
        let file = file_id(at);
        match self.head(at)? {
            Some(meta) => {
                ensure!(file_id(at) == file, "{} changed while it was being opened", at.url);
                let copy = self.copies.of(at, &meta);
                let object = Object { storage: self.clone(), at: at.clone(), meta, file, copy };
                let is_same = at.version.as_ref().is_none_or(|version| **version == object.version());
                ensure!(is_same, "{} is not what it was", at.url);
                Ok(object)
            }
            None if self.is_directory(at)? => {
                bail!("{0} is a directory: name its files, for example {0}/*.jsonl", at.url.trim_end_matches('/'))
            }
            None => bail!("{}: no such file", at.url),
        }
    }

    /// Whether there are objects under `at`, or it is a local directory.
    pub fn is_directory(&self, at: &Location) -> Result<bool> {
        if at.local.as_ref().is_some_and(|path| path.is_dir()) || at.is_web() {
            return Ok(!at.is_web());
        }
        let listed = self.list_level(at)?;
        Ok(!listed.objects.is_empty() || !listed.common_prefixes.is_empty())
    }

    /// The whole content of a small object; `None` if there is none.
    pub fn get(&self, at: &Location) -> Result<Option<Bytes>> {
        if let Some(path) = &at.local {
            return match std::fs::read(path) {
                Ok(bytes) => Ok(Some(bytes.into())),
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
                Err(e) => Err(e).with_context(|| format!("can't read {}", at.url)),
            };
        }
        let content = self.patiently(|| async { at.store.get(&at.path).await?.bytes().await });
        match content {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(tell(e).context(format!("can't read {}", at.url))),
        }
    }

    /// The same, for content that hardly anybody reads again: the system need not keep a local file in its cache.
    pub fn get_once(&self, at: &Location) -> Result<Option<Bytes>> {
        let content = self.get(at)?;
        if let Some(path) = &at.local
            && let Ok(file) = File::open(path)
        {
            cache::release(&file);
        }
        Ok(content)
    }

    /// Bytes `range` of an object.
    pub fn get_range(&self, at: &Location, range: Range<u64>) -> Result<Bytes> {
        let read = self.patiently(|| at.store.get_range(&at.path, range.clone()));
        read.map_err(|e| tell(e).context(format!("can't read {}", at.url)))
    }

    /// The last `n_bytes` of an object, or all of it.
    pub fn get_end(&self, at: &Location, n_bytes: u64) -> Result<Bytes> {
        let options = GetOptions { range: Some(GetRange::Suffix(n_bytes)), ..GetOptions::default() };
        let read = self.patiently(|| async { at.store.get_opts(&at.path, options.clone()).await?.bytes().await });
        read.map_err(|e| tell(e).context(format!("can't read {}", at.url)))
    }

    /// When an object was written, by its store's clock; `None` if there is none.
    pub fn changed_at(&self, at: &Location) -> Result<Option<SystemTime>> {
        Ok(self.head(at)?.map(|meta| meta.last_modified.into()))
    }

    /// Puts a small object, replacing what is there; durable when this returns.
    pub fn put(&self, at: &Location, content: Bytes) -> Result<()> {
        let content = PutPayload::from_bytes(content);
        let put = self.patiently(|| at.store.put(&at.path, content.clone()));
        put.map(drop).map_err(|e| tell(e).context(format!("can't write {}", at.url)))
    }

    /// Deletes an object; that there is none is fine.
    pub fn delete(&self, at: &Location) -> Result<()> {
        self.delete_all(std::slice::from_ref(at))
    }

    /// Deletes objects, some at a time, in no order; that one is not there is fine.
    pub fn delete_all(&self, places: &[Location]) -> Result<()> {
        let delete = async |at: &Location| match self.trying(|| at.store.delete(&at.path)).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(tell(e).context(format!("can't delete {}", at.url))),
        };
        self.wait(futures::stream::iter(places).map(Ok).try_for_each_concurrent(DELETIONS, delete))
    }

    /// Names of the objects directly under `at`, sorted.
    pub fn list(&self, at: &Location) -> Result<Vec<String>> {
        let listed = self.list_level(at)?;
        let mut names: Vec<String> = listed.objects.iter().filter_map(|o| o.location.filename().map(str::to_owned)).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// The objects directly under `at`, the oldest first; those of one time by their names.
    pub fn list_by_age(&self, at: &Location) -> Result<Vec<Listed>> {
        let listed = self.list_level(at)?;
        let entry = |object: ObjectMeta| {
            let name = object.location.filename()?.to_owned();
            Some(Listed { name, n_bytes: object.size, changed_at: object.last_modified.into() })
        };
        let mut objects: Vec<Listed> = listed.objects.into_iter().filter_map(entry).collect();
        objects.sort_unstable_by(|a, b| (a.changed_at, &a.name).cmp(&(b.changed_at, &b.name)));
        Ok(objects)
    }

    /// Names of the folders directly under `at`, sorted.
    pub fn list_folders(&self, at: &Location) -> Result<Vec<String>> {
        let listed = self.list_level(at)?;
        let mut names: Vec<String> =
            listed.common_prefixes.iter().filter_map(|prefix| prefix.filename().map(str::to_owned)).collect();
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

/// Which file is at a place of this machine: device and inode.
fn file_id(at: &Location) -> Option<(u64, u64)> {
    let found = std::fs::metadata(at.local.as_ref()?).ok()?;
    Some((found.dev(), found.ino()))
}

/// Whether an error is that a store on another machine can't be reached, or does not do what it is asked to.
pub fn is_of_remote(error: &anyhow::Error) -> bool {
    error.is::<remote::RemoteFault>()
}

/// An object open for reading. If the object is replaced or changed meanwhile, reads fail instead of mixing two
/// versions (stores without entity tags can't tell).
#[derive(Debug, Clone)]
pub struct Object {
    storage: Storage,
    at: Location,
    meta: ObjectMeta,
    /// Which file it is, if it is one of this machine.
    file: Option<(u64, u64)>,
    copy: WholeCopy,
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

    /// What changes when the object does: its entity tag, or else its time; and its size.
    pub fn version(&self) -> String {
        let ObjectMeta { e_tag, last_modified, size, .. } = &self.meta;
        format!("{} {size}", e_tag.clone().unwrap_or_else(|| last_modified.to_rfc3339()))
    }

    /// Bytes `range`; both ends must lie within the object.
    pub fn range(&self, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let (storage, at) = (&self.storage, &self.at);
        if let Some(path) = &at.local {
            return self.local_range(path, range).with_context(|| format!("can't read {}", at.url));
        }
        if let Some(bytes) = self.range_of_copy(&range)? {
            return Ok(bytes);
        }
        // What arrived before a connection broke off is kept.
        let mut have = Vec::new();
        let mut pauses = PAUSES.iter();
        loop {
            let start = range.start + have.len() as u64;
            let rest = GetRange::Bounded(start..range.end);
            // A weak tag never matches (RFC 9110): web servers have such.
            let if_match = self.meta.e_tag.clone().filter(|tag| !tag.starts_with("W/"));
            let options = GetOptions { range: Some(rest), if_match, ..GetOptions::default() };
            let read = storage.wait(async {
                let mut body = at.store.get_opts(&at.path, options).await?.into_stream();
                while let Some(bytes) = body.next().await {
                    have.extend_from_slice(&bytes?);
                }
                Ok::<_, Error>(())
            });
            match read {
                Ok(()) if have.len() as u64 == range.end - range.start => return Ok(have.into()),
                Ok(()) => bail!("{} ended early: it changed while it was being read", at.url),
                Err(Error::NotSupported { .. }) if at.is_web() => {
                    self.fetch_whole()?;
                    return self.range_of_copy(&range)?.context("it was fetched");
                }
                Err(Error::Precondition { .. }) => bail!("{} changed while it was being read", at.url),
                Err(e) => match pauses.next() {
                    Some(pause) if broke_off(&e) => std::thread::sleep(*pause),
                    _ => return Err(tell(e).context(format!("can't read {} at byte {start}", at.url))),
                },
            }
        }
    }

    /// As [`Object::range`], of a file: into memory that nobody has cleared before, on this thread.
    fn local_range(&self, path: &Path, range: Range<u64>) -> Result<Bytes> {
        let mut file = File::open(path)?;
        self.check_identity(&file)?;
        let n_bytes = range.end - range.start;
        let mut bytes = Vec::with_capacity(usize::try_from(n_bytes)?);
        file.seek(SeekFrom::Start(range.start))?;
        file.by_ref().take(n_bytes).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 == n_bytes, "it ended early: it changed while it was being read");
        self.check_identity(&file)?;
        Ok(bytes.into())
    }

    /// Whether an open file is the one that was opened, as it was. It is asked of each chunk: an input may be of more files than
    /// a process may hold open.
    fn check_identity(&self, file: &File) -> Result<()> {
        let now = file.metadata()?;
        ensure!(
            Some((now.dev(), now.ino())) == self.file
                && now.len() == self.meta.size
                && DateTime::<Utc>::from(now.modified()?) == self.meta.last_modified,
            "it changed while it was being read"
        );
        Ok(())
    }

    /// The next few megabytes from `offset`; empty at the end.
    pub fn chunk(&self, offset: u64) -> Result<Bytes> {
        self.range(offset.min(self.meta.size)..(offset + CHUNK_BYTES).min(self.meta.size))
    }
}
