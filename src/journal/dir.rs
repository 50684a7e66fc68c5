//! A job's directory while this process may write it: by a lock on a local disk, by the lease elsewhere. Invariant: what a
//! process deletes or replaces here belongs to its own epoch or to earlier ones, and only after the lease says that no job
//! needs it.

use std::fs::File;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;

use super::keeper::{CANCEL, Keeper, Kept, LEASE, Root, Standing};
use super::lease::{Begun, Claim, IfRunning, Lease, MAX_EPOCH};
use super::manifest::{self, Manifest};
use super::{holder, lock, segment};
use crate::storage::{Announce, Hear, Location, Storage};

/// How far ahead of the last epoch that left something the next one is, where nothing says which was the last.
const EPOCHS_AHEAD: u32 = 1000;

/// What older programs called the manifest.
const OLD_MANIFEST: &str = "manifest.json";

/// How a job's directory is taken.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// What to do if another run is there.
    pub if_running: IfRunning,
    /// After so much silence others may take this run for dead.
    pub lease: Duration,
    /// Whether a store is used that does not honour conditional writes: then nothing keeps others away.
    pub unguarded: bool,
    /// Whether what is there may be thrown away, also if it can't be read.
    pub restart: bool,
}

impl Default for Terms {
    fn default() -> Self {
        Self { if_running: IfRunning::default(), lease: Duration::from_secs(30), unguarded: false, restart: false }
    }
}

/// The directory of a job, held by this process alone.
#[derive(Debug)]
pub struct JobDir {
    /// Its uploads are written into the lease before they begin.
    pub(super) storage: Storage,
    pub(super) at: Location,
    /// Whether others can write here, whom only the lease tells not to.
    pub(super) is_shared: bool,
    keeper: Keeper,
    _lock: Option<File>, // unlocked when closed, after the keeper has ended
}

impl JobDir {
    /// Takes the directory `at`, creating it if need be. [`Apart::Busy`] if another process holds it.
    pub fn claim(storage: &Storage, at: &Location, terms: &Terms) -> Result<Self> {
        let in_words = || format!("can't use the job directory {}", at.url);
        let lock = match &at.local {
            Some(path) => Some(lock::take(path, terms.if_running).with_context(in_words)?),
            None => None,
        };
        storage.sweep_under(at)?;
        let me = holder::this();
        let swaps = lock.is_none() && !terms.unguarded;
        let root = Root { storage: storage.clone(), at: at.clone(), swaps };
        let lease_ms = terms.lease.as_millis() as u64;
        let is_lost = match root.read() {
            Err(error) if terms.restart && error.root_cause().is::<serde_json::Error>() => true,
            found => found?.is_none() && has_orphans(&root, terms.restart)?,
        };
        if is_lost {
            // A holder that still lives has not come so far.
            let epoch = last_epoch(&root)? + EPOCHS_AHEAD;
            root.replace_damaged(&Lease { held: false, epoch, ..Lease::first(me.clone(), lease_ms) })?;
        }
        // Whoever has the lock is alone, whatever the lease says.
        let if_running = if lock.is_some() { IfRunning::TakeOver } else { terms.if_running };
        let tenure = root.claim(Claim::new(me, lease_ms, if_running)).with_context(in_words)?;
        let keeper = Keeper::start(root.clone(), tenure)?;
        if swaps && at.is_remote() && !at.names_uploads() {
            bail!(
                "{}: uploads to this kind of store can't be broken off by another run, so that two runs of this job could \
                 not be kept apart; see to it that there is only one, and say --unguarded",
                at.url
            );
        }
        // What a store that ignores conditions did to the lease is mended: nobody could be told from this run there.
        if swaps && !root.is_honoured().with_context(in_words)? {
            bail!(
                "{}: this store does not honour conditional writes, so that two runs of this job could not be kept apart; \
                 see to it that there is only one, and say --unguarded",
                at.url
            );
        }
        let uploads = Uploads { kept: Arc::clone(keeper.kept()), completed: Mutex::default(), is_shared: swaps };
        let announce = Announce(Arc::new(uploads));
        let dir = Self { storage: storage.clone().announcing(announce), at: at.clone(), is_shared: swaps, keeper, _lock: lock };
        dir.abort_uploads()?;
        Ok(dir)
    }

    /// See [`super::Journal::leaving`].
    pub(super) fn leaving(&self) -> impl FnOnce() + Send + 'static {
        let kept = Arc::clone(self.keeper.kept());
        // If this fails, the next run finds a silent holder, and waits a little.
        move || drop(kept.change(|lease| lease.held = false))
    }

    /// Breaks off what earlier holders were publishing: one that comes back can't publish it any more.
    fn abort_uploads(&self) -> Result<()> {
        let uploads = self.lease().uploads;
        for Begun { path, id } in &uploads {
            self.storage.abort_upload(&self.at.same_store(path)?, id)?;
        }
        if uploads.is_empty() { Ok(()) } else { self.change(|lease| lease.uploads.clear()) }
    }

    /// What job is under way here; `None` if none is.
    pub fn manifest(&self) -> Result<Option<Manifest>> {
        let Some(epoch) = self.lease().job else { return Ok(None) };
        let at = self.at.child(&manifest::name_of(epoch))?;
        let text = self.storage.get(&at)?;
        let text = text.with_context(|| format!("{} is gone; --restart begins the job anew", at.url))?;
        Manifest::parse_at(&text, &at.url).map(Some)
    }

    /// Whether this process may still write here.
    pub fn standing(&self) -> Standing {
        self.keeper.standing()
    }

    pub(super) fn lease(&self) -> Lease {
        self.keeper.lease()
    }

    pub(super) fn change(&self, change: impl Fn(&mut Lease)) -> Result<()> {
        self.keeper.kept().change(change)
    }

    /// Makes errors of the job under way count no more: their rows have no outcome from now on. For a journal that is not open.
    pub fn forget_errors(&self) -> Result<()> {
        self.change(|lease| lease.errors_from = lease.epoch)
    }

    /// Whether some errors do not count.
    pub fn has_forgotten(&self) -> bool {
        self.lease().errors_from > 0
    }

    /// Begins a job here, in place of what was.
    pub(super) fn begin(&self, manifest: &Manifest) -> Result<()> {
        self.clear()?;
        let epoch = self.lease().epoch;
        self.storage.put(&self.at.child(&manifest::name_of(epoch))?, Bytes::from(manifest.to_json()))?;
        self.change(|lease| lease.job = Some(epoch))
    }

    /// Removes the job's state. Only for a job whose outputs are published, or that is to begin anew. Killed half-way,
    /// it leaves no job, and the next one here removes the rest. In a remote store the lease stays, so that epochs go on.
    pub fn remove(self) -> Result<()> {
        self.clear()?;
        let Some(dir) = &self.at.local else { return Ok(()) };
        self.keeper.end();
        self.storage.delete(&self.at.child(LEASE)?)?;
        match std::fs::remove_file(dir.join(lock::NAME)).and_then(|()| std::fs::remove_dir(dir)) {
            // Somebody else's files, or the lock of the next job.
            Err(e) if e.kind() != ErrorKind::DirectoryNotEmpty => Err(e).with_context(|| format!("can't remove {}", self.at.url)),
            _ => Ok(()),
        }
    }

    /// The lease first: without it, manifests and segments mean nothing.
    fn clear(&self) -> Result<()> {
        let lease = self.lease();
        if lease.job.is_some() || !lease.closed.is_empty() {
            self.change(|lease| (lease.job, lease.closed, lease.errors_from) = (None, Vec::new(), 0))?;
        }
        let is_left = |name: &&String| {
            let epoch = segment::id_of(name).map(|id| id.epoch).or_else(|| manifest::epoch_of(name));
            epoch.is_some_and(|epoch| epoch <= lease.epoch) || is_of_old_form(name) || *name == CANCEL
        };
        let left: Result<Vec<Location>> =
            self.storage.list(&self.at)?.iter().filter(is_left).map(|name| self.at.child(name)).collect();
        self.storage.delete_all(&left?)
    }
}

/// Writes uploads into the lease.
struct Uploads {
    kept: Arc<Kept>,
    /// Ids that need not stand there any more. They go with the next one that comes: a job of many outputs has a few at a time.
    completed: Mutex<Vec<String>>,
    /// Of the [`JobDir`].
    is_shared: bool,
}

impl Hear for Uploads {
    fn begun(&self, at: &Location, id: &str) -> Result<()> {
        let begun = Begun { path: at.path.to_string(), id: id.to_owned() };
        let completed = std::mem::take(&mut *self.completed.lock().unwrap_or_else(PoisonError::into_inner));
        self.kept.change(|lease| {
            lease.uploads.retain(|upload| !completed.contains(&upload.id));
            lease.uploads.push(begun.clone());
        })
    }

    fn completed(&self, id: &str) {
        self.completed.lock().unwrap_or_else(PoisonError::into_inner).push(id.to_owned());
    }

    fn is_shared(&self) -> bool {
        self.is_shared
    }
}

/// Whether a file is one of those that older programs wrote.
fn is_of_old_form(name: &str) -> bool {
    let digits = name.strip_prefix("seg-").and_then(|rest| rest.strip_suffix(".jsonl"));
    name == OLD_MANIFEST || digits.is_some_and(|digits| digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a directory that had no lease has the state of a job, of which nobody knows what counts: an error unless it may be
/// thrown away.
fn has_orphans(root: &Root, may_go: bool) -> Result<bool> {
    let names = root.storage.list(&root.at)?;
    let url = &root.at.url;
    if names.iter().any(|name| name == OLD_MANIFEST) && !may_go {
        bail!("{url} was written by an older valar: finish it with that one, or throw it away with --restart");
    }
    let is_state = |name: &&String| segment::id_of(name).is_some() || manifest::epoch_of(name).is_some();
    let Some(name) = names.iter().find(is_state) else { return Ok(false) };
    // Another run may have begun meanwhile: with the lease.
    if root.read()?.is_some() {
        return Ok(false);
    }
    if !may_go {
        bail!("{url} has {name}, but no {LEASE}, which says what counts: put that back, or throw the job away with --restart");
    }
    Ok(true)
}

/// The largest epoch that left something.
fn last_epoch(root: &Root) -> Result<u32> {
    let names = root.storage.list(&root.at)?;
    let epochs = names.iter().filter_map(|name| segment::id_of(name).map(|id| id.epoch).or_else(|| manifest::epoch_of(name)));
    // What bears a larger one was never written by a run.
    Ok(epochs.filter(|&epoch| epoch < MAX_EPOCH - EPOCHS_AHEAD).max().unwrap_or(0))
}
