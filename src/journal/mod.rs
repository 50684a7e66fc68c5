//! The durable state of a job: which rows are done, and what became of them. Knows nothing of requests or models. It
//! lives in a directory of its own: `lease.json` says who may write and what counts, `manifest-00001.json` what job it is,
//! immutable segments `seg-00001-00000001.jsonl` and so on (epoch of the writer, number) hold finished output lines, each
//! segment put atomically (object stores can't append), and how far long rows have come (checkpoints).
//!
//! Invariant: a row whose commit returned is never lost and never computed again, unless its writer had been taken for dead;
//! a row counts once, with its first committed outcome, however often it was journaled.

mod begun;
mod checking;
mod committed;
mod dir;
mod finalise;
mod flight;
mod holder;
mod keeper;
pub mod lease;
mod lock;
mod manifest;
mod overview;
mod row_set;
mod segment;
mod segment_index;
mod start;

pub use begun::BegunRows;
pub use committed::{Committed, committed};
pub use dir::{JobDir, Terms};
pub use finalise::{Outputs, finalise, finalise_parts};
pub use keeper::{Apart, Standing};
pub use lease::IfRunning;
pub use manifest::{Input, Manifest, Shard};
pub use overview::{Asked, Life, Overview, ask_to_stop, lease_in, manifest_in, overview};
pub use row_set::RowSet;
pub use segment::{Checkpoint, Place, Record, SegmentId, is_damaged};
pub use segment_index::Noted;
pub use start::{forget_start, shared_start};

use std::io::Write as _;
use std::ops::Range;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use rayon::prelude::*;

use crate::storage::{Location, Storage};
use checking::Checking;
use flight::Flight;
use lease::Closed;
use segment::Segment;

/// Rows that make a segment full: each is a file that is synced, so that few of them cost less; how much work a crash
/// may lose is for whoever calls [`Journal::commit`] in time.
const SEGMENT_ROWS: u64 = 16_384;

/// Text that makes a segment full, bytes.
const SEGMENT_BYTES: usize = 8 << 20;

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

/// Most segments of a job: one a second for half a year.
const MAX_SEGMENTS: u64 = 1 << 24;

/// Segments whose indexes are in memory at a time.
const READ_AHEAD: usize = 4;

/// What helps if a segment that others follow is damaged.
const DAMAGED: &str = "the journal is damaged; --restart begins the job anew";

/// What was read of a segment.
struct ReadIndex {
    rows: Vec<Noted>,
    lines: Option<Bytes>,
    reached: Option<String>,
}

impl ReadIndex {
    /// Of a segment of `job` in the directory `dir`.
    fn new(storage: &Storage, dir: &Location, job: &str, id: SegmentId) -> Result<Self> {
        let at = dir.child(&segment::name_of(id))?;
        let read = || {
            let end = segment::end(&storage.get_end(&at, segment::SEAL_BYTES)?, job)?;
            let rows = end.rows(&storage.get_end(&at, end.n_bytes)?)?;
            let whole = if end.has_checkpoints { storage.get(&at)? } else { None };
            let lines = whole.map(|content| segment::verify(&content, job)).transpose()?;
            anyhow::Ok(Self { rows, lines, reached: end.reached })
        };
        match read() {
            Err(_) if !storage.exists(&at)? => bail!("{} is gone", at.url),
            read => read.with_context(|| at.url.to_string()),
        }
    }
}

/// The journal of one job, open for appending.
#[derive(Debug)]
pub struct Journal {
    /// The segment that is being put. Dropped before the directory is given back: nothing is written after that.
    flight: Option<Flight>,
    dir: JobDir,
    job: String, // the job's fingerprint
    /// Those that count, in the order they were written.
    segments: Vec<SegmentId>,
    /// Errors of earlier epochs than this one do not count.
    errors_from: u32,
    next_segment: SegmentId,
    pending: Segment,
    done: RowSet,
    begun: BegunRows,
    reached: Option<String>,
    /// Of the segments that were there.
    checking: Checking,
    totals: Totals,
    /// Spent in making outcomes durable, and what of it the caller waited for.
    commit_time: Duration,
    wait_time: Duration,
    /// What was found wrong on opening, and set right; for people.
    pub warnings: Vec<String>,
}

impl Journal {
    /// Begins a job in `dir`, removing whatever job was there before.
    pub fn create(dir: JobDir, manifest: &Manifest) -> Result<Self> {
        dir.begin(manifest)?;
        Ok(Self::empty(dir, manifest))
    }

    /// Goes on with the job of `dir`, whose manifest is `manifest`. Reads the last segment, and of the others what they say of
    /// their rows; their lines are verified by the way, on a thread of its own: [`Journal::begin_commit`] says what it finds. A
    /// damaged last segment is dropped (its rows are not done), with a warning; a damaged or missing one before it is an error.
    /// `each` is shown every row's outcome and where it is.
    pub fn resume(dir: JobDir, manifest: &Manifest, each: &mut dyn FnMut(&Noted, Place) -> Result<()>) -> Result<Self> {
        let mut journal = Self::empty(dir, manifest);
        let closed = journal.dir.lease().closed;
        let n_segments: u64 = closed.iter().map(|closed| u64::from(closed.n_segments)).sum();
        ensure!(n_segments <= MAX_SEGMENTS, "the lease says that there are {n_segments} segments; {DAMAGED}");
        let ids = closed
            .iter()
            .flat_map(|&Closed { epoch, n_segments }| (1..=n_segments).map(move |number| SegmentId { epoch, number }));
        let mut ids: Vec<SegmentId> = ids.collect();
        // Where the writer was killed, if it was.
        let last = closed.last().and_then(|closed| ids.pop_if(|last| last.epoch == closed.epoch));
        if let Some(last) = last {
            match journal.read(last) {
                Ok(_) => ids.push(last),
                Err(e) if e.is::<segment::Damaged>() => journal.drop_damaged(last, &e)?,
                Err(e) => return Err(e.context(DAMAGED)),
            }
        }
        let (storage, at, job) = (journal.dir.storage.clone(), journal.dir.at.clone(), journal.job.clone());
        let (read, indexes) = sync_channel(1);
        std::thread::scope(|scope| {
            let ids = &ids;
            let read = move || {
                for some in ids.chunks(READ_AHEAD) {
                    let found: Vec<_> = some.par_iter().map(|&id| ReadIndex::new(&storage, &at, &job, id)).collect();
                    // Nobody takes more after an error.
                    if read.send(found).is_err() {
                        return;
                    }
                }
            };
            std::thread::Builder::new().name("segments".into()).spawn_scoped(scope, read).context("starting a thread")?;
            for (&id, read) in ids.iter().zip(indexes.into_iter().flatten()) {
                journal.count(id, read.context(DAMAGED)?, &manifest.rows, each)?;
            }
            anyhow::Ok(())
        })?;
        journal.segments = ids;
        journal.checking = Checking::Waits;
        Ok(journal)
    }

    /// What its writer was killed in: from now on it does not count.
    fn drop_damaged(&mut self, id: SegmentId, error: &anyhow::Error) -> Result<()> {
        let url = self.dir.segment(id)?.url;
        self.warnings.push(format!("{url} is damaged ({}): its rows are computed again", error.root_cause()));
        self.dir.change(|lease| {
            let last = lease.closed.last_mut().expect("it is the last segment's");
            last.n_segments = id.number - 1;
        })
    }

    fn empty(dir: JobDir, manifest: &Manifest) -> Self {
        let (pending, done) = (Segment::default(), RowSet::default());
        let job = manifest.job_fingerprint.clone();
        let lease = dir.lease();
        let (next_segment, errors_from) = (SegmentId { epoch: lease.epoch, number: 1 }, lease.errors_from);
        Self {
            flight: None,
            dir,
            job,
            segments: Vec::new(),
            errors_from,
            next_segment,
            pending,
            done,
            begun: BegunRows::default(),
            reached: None,
            checking: Checking::None,
            totals: Totals::default(),
            commit_time: Duration::ZERO,
            wait_time: Duration::ZERO,
            warnings: Vec::new(),
        }
    }

    fn count(
        &mut self,
        id: SegmentId,
        read: ReadIndex,
        own: &Range<u64>,
        each: &mut dyn FnMut(&Noted, Place) -> Result<()>,
    ) -> Result<()> {
        let ReadIndex { rows, lines, reached } = read;
        let name = segment::name_of(id);
        self.reached = reached.or(self.reached.take());
        if let Some(lines) = lines {
            for (number, entry) in (1..).zip(segment::entries(&lines).with_context(|| name.clone())?) {
                if let segment::Line::Checkpoint(checkpoint) = entry.with_context(|| format!("{name}, line {number}"))?.line {
                    self.begun.add(checkpoint);
                }
            }
        }
        for noted in rows {
            ensure!(own.contains(&noted.row), "{name}: row {} is none of the job's", noted.row);
            self.begun.end(noted.row);
            if self.counts(noted.ok, id) && self.done.insert(noted.row) {
                self.totals.add(&noted);
                let Range { start, end } = noted.bytes;
                each(&noted, Place { segment: id, start, n_bytes: end - start })?;
            }
        }
        Ok(())
    }

    /// Whether what a segment says of a row still holds.
    fn counts(&self, ok: bool, id: SegmentId) -> bool {
        ok || id.epoch >= self.errors_from
    }

    /// The verified lines of a segment, which is hardly read again.
    fn read(&self, id: SegmentId) -> Result<Bytes> {
        let at = self.dir.segment(id)?;
        let Some(content) = self.dir.storage.get_once(&at)? else { bail!("{} is gone", at.url) };
        segment::verify(&content, &self.job).with_context(|| at.url.to_string())
    }

    /// Journals an outcome; durable once the next [`Journal::commit`] returns. Begins to commit by itself when a segment is
    /// full. A row that is journaled already is left as it is; otherwise says where the record is.
    pub fn append(&mut self, record: &Record<'_>) -> Result<Option<Place>> {
        if !self.done.insert(record.row) {
            return Ok(None);
        }
        let bytes = self.pending.push(record);
        self.totals.add(&Noted::new(record, bytes.clone()));
        let place = Place { segment: self.next_segment, start: bytes.start, n_bytes: bytes.end - bytes.start };
        if self.pending.n_rows() >= SEGMENT_ROWS || self.pending.n_bytes() >= SEGMENT_BYTES {
            self.begin_commit()?;
        }
        Ok(Some(place))
    }

    /// Journals how far a row's sequence came; durable once the next [`Journal::commit`] returns. No outcome: it is of use
    /// only as long as the row has none.
    pub fn checkpoint(&mut self, checkpoint: &Checkpoint<'_>) -> Result<()> {
        self.pending.push_checkpoint(checkpoint);
        if self.pending.n_bytes() >= SEGMENT_BYTES { self.begin_commit() } else { Ok(()) }
    }

    /// How far earlier runs came with rows that have no outcome: by row and sequence, the checkpoints' data in order.
    pub fn take_begun(&mut self) -> BegunRows {
        std::mem::take(&mut self.begun)
    }

    /// The record at a place, committed or not.
    pub fn record(&self, place: Place) -> Result<Record<'static>> {
        let bytes = place.start as usize..(place.start + place.n_bytes) as usize;
        if place.segment == self.next_segment {
            return segment::record_in(self.pending.lines(), bytes);
        }
        if let Some(flight) = self.flight.as_ref().filter(|flight| flight.id == place.segment) {
            return segment::record_in(&flight.sealed, bytes);
        }
        let at = self.dir.segment(place.segment)?;
        let line = self.dir.storage.get_range(&at, place.start..place.start + place.n_bytes)?;
        segment::record_in(&line, 0..line.len()).with_context(|| format!("{} changed while it was being read", at.url))
    }

    /// Makes what was appended durable. Does nothing if nothing was. After an error it may be called again, unless the job
    /// was taken over: then it says so each time.
    pub fn commit(&mut self) -> Result<()> {
        self.begin_commit()?;
        self.land()
    }

    /// Begins to make durable what was appended, and returns while the store is at it; waits only for the commit before
    /// this one. What goes wrong is said by the next commit.
    pub fn begin_commit(&mut self) -> Result<()> {
        self.land()?;
        if self.pending.is_empty() {
            return Ok(());
        }
        self.check().context(DAMAGED)?;
        let start = Instant::now();
        let at = self.dir.segment(self.next_segment)?;
        let n_rows = self.pending.n_rows();
        let sealed = self.pending.seal(&self.job, self.reached.as_deref());
        self.flight = Some(Flight { id: self.next_segment, at, sealed, n_rows, put: None });
        self.next_segment.number += 1;
        let begun = self.put_flight();
        self.wait_time += start.elapsed();
        self.commit_time += start.elapsed();
        begun
    }

    /// Takes note of a commit that has ended by itself; says what went wrong, as the next commit would.
    pub fn land_if_put(&mut self) -> Result<()> {
        if self.flight.as_ref().is_some_and(Flight::is_over) { self.land() } else { Ok(()) }
    }

    /// Waits until the segment that is being put is durable.
    fn land(&mut self) -> Result<()> {
        if self.flight.as_ref().is_some_and(|flight| flight.put.is_none()) {
            self.put_flight()?;
        }
        let Some(flight) = &mut self.flight else { return Ok(()) };
        let start = Instant::now();
        let (put, time) = flight.wait();
        self.wait_time += start.elapsed();
        self.commit_time += time;
        put?;
        if let Some(mut flight) = self.flight.take() {
            self.segments.push(flight.id);
            self.pending.reuse(std::mem::take(&mut flight.sealed));
        }
        Ok(())
    }

    fn put_flight(&mut self) -> Result<()> {
        if self.standing() == Standing::Lost {
            return Err(Apart::TakenOver.into());
        }
        self.flight.as_mut().map_or(Ok(()), |flight| flight.begin(&self.dir))
    }

    /// Whether this process may still write here.
    pub fn standing(&self) -> Standing {
        self.dir.standing()
    }

    /// Gives the job back. [`Apart::TakenOver`] if another run had taken this one for dead: then what was committed since
    /// does not count.
    pub fn leave(&self) -> Result<()> {
        self.dir.change(|lease| lease.held = false)
    }

    /// The same for a thread that knows nothing else of the job, and ends the process next; goes on if it fails.
    pub fn leaving(&self) -> impl FnOnce() + Send + 'static {
        self.dir.leaving()
    }

    /// Writes an object beside the job, like the outputs: only while nobody else has taken the job over.
    pub fn publish(&self, at: &Location, content: &[u8]) -> Result<()> {
        self.dir.storage.sweep(at)?;
        let mut upload = self.dir.storage.upload(at);
        upload.write_all(content)?;
        upload.publish().map(drop)
    }

    /// Says how far all rows have their outcome: up to where the job goes on, as its caller says it. Durable with the next
    /// commit.
    pub fn set_reached(&mut self, reached: String) {
        self.reached = Some(reached);
    }

    /// What [`Journal::set_reached`] was told last, by this run or an earlier one.
    pub fn reached(&self) -> Option<&str> {
        self.reached.as_deref()
    }

    /// Rows journaled, committed or not.
    pub fn done_rows(&self) -> &RowSet {
        &self.done
    }

    /// How many of these are known to be durable.
    pub fn n_committed(&self) -> u64 {
        self.done.len() - self.pending.n_rows() - self.flight.as_ref().map_or(0, |flight| flight.n_rows)
    }

    /// Sums over the rows of [`Journal::done_rows`].
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// How long committing took, all in all.
    pub fn commit_time(&self) -> Duration {
        self.commit_time
    }

    /// How long the callers were held up by it.
    pub fn wait_time(&self) -> Duration {
        self.wait_time
    }

    /// Removes the journal; see [`JobDir::remove`].
    pub fn remove(mut self) -> Result<()> {
        // What is being put would come after the removal.
        (self.flight, self.checking) = (None, Checking::None);
        self.dir.remove()
    }
}

impl Totals {
    /// The sums of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            n_ok: self.n_ok + other.n_ok,
            n_failed: self.n_failed + other.n_failed,
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            completion_tokens: self.completion_tokens + other.completion_tokens,
            cached_tokens: self.cached_tokens + other.cached_tokens,
        }
    }

    fn add(&mut self, noted: &Noted) {
        self.n_ok += u64::from(noted.ok);
        self.n_failed += u64::from(!noted.ok);
        self.prompt_tokens += u64::from(noted.prompt_tokens);
        self.completion_tokens += u64::from(noted.completion_tokens);
        self.cached_tokens += u64::from(noted.cached_tokens);
    }
}

impl JobDir {
    fn segment(&self, id: SegmentId) -> Result<Location> {
        self.at.child(&segment::name_of(id))
    }
}
