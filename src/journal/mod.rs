//! The durable state of a job: which rows are done, and what became of them. Knows nothing of requests or models. It
//! lives in a directory of its own: `manifest.json` says what job it is, immutable segments `seg-00000001.jsonl` and so
//! on hold finished output lines, each segment put atomically (object stores can't append).
//!
//! Invariant: a row whose commit returned is never lost and never computed again; a row counts once, with its first
//! committed outcome, however often it was journaled.

mod finalise;
mod manifest;
mod row_set;
mod segment;

pub use finalise::{Outputs, finalise};
pub use manifest::{Input, Manifest};
pub use row_set::RowSet;
pub use segment::{Place, Record};

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;

use crate::storage::{Location, Storage};
use segment::Segment;

/// Rows that make a segment full: each is a file that is synced, so that few of them cost less; how much work a crash
/// may lose is for whoever calls [`Journal::commit`] in time.
const SEGMENT_ROWS: u64 = 16_384;

/// Text that makes a segment full, bytes.
const SEGMENT_BYTES: usize = 8 << 20;

const MANIFEST: &str = "manifest.json";
const LOCK: &str = "lock";

/// The directory of a job, held by this process alone (for local files; object stores have no locks).
#[derive(Debug)]
pub struct JobDir {
    storage: Storage,
    at: Location,
    lock: Option<File>, // unlocked when closed
}

impl JobDir {
    /// Takes the directory `at`, creating it if need be. An error if another process holds it.
    pub fn lock(storage: &Storage, at: &Location) -> Result<Self> {
        let lock = match &at.local {
            Some(path) => Some(lock_dir(path).with_context(|| format!("can't use the job directory {}", at.url))?),
            None => None,
        };
        storage.sweep_under(at)?;
        Ok(Self { storage: storage.clone(), at: at.clone(), lock })
    }

    /// What job is under way here; `None` if none is.
    pub fn manifest(&self) -> Result<Option<Manifest>> {
        let at = self.at.child(MANIFEST)?;
        let Some(text) = self.storage.get(&at)? else { return Ok(None) };
        let manifest = Manifest::parse(&text);
        manifest.map(Some).with_context(|| format!("{} is damaged; --restart begins the job anew", at.url))
    }

    /// Removes the job's state. Only for a job whose outputs are published, or that is to begin anew. Killed half-way,
    /// it leaves no manifest, and the next job here removes the rest.
    pub fn remove(self) -> Result<()> {
        self.clear()?;
        if let Some(dir) = &self.at.local {
            match std::fs::remove_file(dir.join(LOCK)).and_then(|()| std::fs::remove_dir(dir)) {
                // Somebody else's files, or the lock of the next job.
                Err(e) if e.kind() != ErrorKind::DirectoryNotEmpty => {
                    return Err(e).with_context(|| format!("can't remove {}", self.at.url));
                }
                _ => {}
            }
        }
        drop(self.lock);
        Ok(())
    }

    /// Manifest first: without it, segments mean nothing. Last segments first: what a power failure leaves is whole.
    fn clear(&self) -> Result<()> {
        self.storage.delete(&self.at.child(MANIFEST)?)?;
        for number in self.segments()?.into_iter().rev() {
            self.storage.delete(&self.segment(number)?)?;
        }
        Ok(())
    }

    /// Numbers of the segments there are, ascending.
    fn segments(&self) -> Result<Vec<u32>> {
        Ok(self.storage.list(&self.at)?.iter().filter_map(|name| segment::number_of(name)).collect())
    }

    fn segment(&self, number: u32) -> Result<Location> {
        self.at.child(&segment::name_of(number))
    }
}

fn lock_dir(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    loop {
        create_dir(dir)?;
        let file = match File::options().create(true).truncate(false).write(true).open(&path) {
            Ok(file) => file,
            // Whoever held it before has just removed the folder.
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e.into()),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("another valar process is running this job"),
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

/// What was journaled, in sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Rows that completed.
    pub n_ok: u64,
    /// Rows that are errors.
    pub n_failed: u64,
    /// Prompt tokens of all rows.
    pub prompt_tokens: u64,
    /// Generated tokens of all rows.
    pub completion_tokens: u64,
    /// Prompt tokens that were shared with another row.
    pub cached_tokens: u64,
}

/// The journal of one job, open for appending.
#[derive(Debug)]
pub struct Journal {
    dir: JobDir,
    job: String, // the job's fingerprint
    next_segment: u32,
    pending: Segment,
    done: RowSet,
    totals: Totals,
    /// Spent in making outcomes durable.
    commit_time: Duration,
    /// What was found wrong on opening, and set right; for people.
    pub warnings: Vec<String>,
}

impl Journal {
    /// Begins a job in `dir`, removing whatever job was there before.
    pub fn create(dir: JobDir, manifest: &Manifest) -> Result<Self> {
        dir.clear()?;
        dir.storage.put(&dir.at.child(MANIFEST)?, Bytes::from(manifest.to_json()))?;
        Ok(Self::empty(dir, manifest))
    }

    /// Goes on with the job of `dir`, whose manifest is `manifest`. Reads all segments once. A damaged last segment is
    /// dropped (its rows are not done), with a warning; a damaged or missing one before it is an error. `each` is shown
    /// every row's outcome and where it is.
    pub fn resume(dir: JobDir, manifest: &Manifest, each: &mut dyn FnMut(&Record<'_>, Place) -> Result<()>) -> Result<Self> {
        let mut journal = Self::empty(dir, manifest);
        let numbers = journal.dir.segments()?;
        for (i, &number) in numbers.iter().enumerate() {
            let wanted = i as u32 + 1;
            ensure!(number == wanted, "the journal lacks {}; --restart begins the job anew", journal.dir.segment(wanted)?.url);
            match journal.count(number, each) {
                Ok(()) => journal.next_segment = number + 1,
                Err(e) if i + 1 == numbers.len() && e.is::<segment::Damaged>() => {
                    let url = journal.dir.segment(number)?.url;
                    journal.warnings.push(format!("{url} is damaged ({}): its rows are computed again", e.root_cause()));
                }
                Err(e) => return Err(e.context("the journal is damaged; --restart begins the job anew")),
            }
        }
        Ok(journal)
    }

    fn empty(dir: JobDir, manifest: &Manifest) -> Self {
        let (pending, done) = (Segment::default(), RowSet::default());
        let job = manifest.job_fingerprint.clone();
        let (totals, commit_time) = (Totals::default(), Duration::ZERO);
        Self { dir, job, next_segment: 1, pending, done, totals, commit_time, warnings: Vec::new() }
    }

    fn count(&mut self, number: u32, each: &mut dyn FnMut(&Record<'_>, Place) -> Result<()>) -> Result<()> {
        let content = self.read(number)?;
        for entry in segment::entries(&content)? {
            let segment::Entry { record, bytes } = entry?;
            if self.done.insert(record.row) {
                self.totals.add(&record);
                each(&record, Place { segment: number, start: bytes.start, n_bytes: bytes.end - bytes.start })?;
            }
        }
        Ok(())
    }

    /// The verified lines of a segment.
    fn read(&self, number: u32) -> Result<Bytes> {
        let at = self.dir.segment(number)?;
        let Some(content) = self.dir.storage.get(&at)? else { bail!("{} is gone", at.url) };
        segment::verify(&content, &self.job).with_context(|| at.url.to_string())
    }

    /// Journals an outcome; durable once the next [`Journal::commit`] returns. Commits by itself when a segment is full.
    /// A row that is journaled already is left as it is; otherwise says where the record is.
    pub fn append(&mut self, record: &Record<'_>) -> Result<Option<Place>> {
        if !self.done.insert(record.row) {
            return Ok(None);
        }
        self.totals.add(record);
        let bytes = self.pending.push(record);
        let place = Place { segment: self.next_segment, start: bytes.start, n_bytes: bytes.end - bytes.start };
        if self.pending.n_rows() >= SEGMENT_ROWS || self.pending.n_bytes() >= SEGMENT_BYTES {
            self.commit()?;
        }
        Ok(Some(place))
    }

    /// The record at a place, committed or not.
    pub fn record(&self, place: Place) -> Result<Record<'static>> {
        let bytes = place.start..place.start + place.n_bytes;
        if place.segment == self.next_segment {
            return self.pending.record(bytes.start as usize..bytes.end as usize);
        }
        let at = self.dir.segment(place.segment)?;
        let line = self.dir.storage.get_range(&at, bytes)?;
        let record = std::str::from_utf8(&line).map_err(anyhow::Error::from).and_then(segment::parse_record);
        record.map(Record::into_owned).with_context(|| format!("{} changed while it was being read", at.url))
    }

    /// Makes what was appended durable. Does nothing if nothing was. After an error it may be called again.
    pub fn commit(&mut self) -> Result<()> {
        if self.pending.n_rows() == 0 {
            return Ok(());
        }
        let start = Instant::now();
        let at = self.dir.segment(self.next_segment)?;
        let sealed = self.pending.seal(&self.job);
        let put = self.dir.storage.put(&at, sealed.clone());
        self.pending.put_back(sealed, put.is_ok());
        self.next_segment += u32::from(put.is_ok());
        self.commit_time += start.elapsed();
        put
    }

    /// Rows journaled, committed or not.
    pub fn done_rows(&self) -> &RowSet {
        &self.done
    }

    /// Sums over the rows of [`Journal::done_rows`].
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// How long committing took, all in all.
    pub fn commit_time(&self) -> Duration {
        self.commit_time
    }

    /// Removes the journal; see [`JobDir::remove`].
    pub fn remove(self) -> Result<()> {
        self.dir.remove()
    }
}

impl Totals {
    fn add(&mut self, record: &Record<'_>) {
        self.n_ok += u64::from(record.ok);
        self.n_failed += u64::from(!record.ok);
        self.prompt_tokens += u64::from(record.prompt_tokens);
        self.completion_tokens += u64::from(record.completion_tokens);
        self.cached_tokens += u64::from(record.cached_tokens);
    }
}
