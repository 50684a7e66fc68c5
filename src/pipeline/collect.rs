//! The collecting side of a job, on the main thread: finished rows become records, records are committed in groups.
//! Invariant: a record is appended once per row; a window is reported finished when every row of it has one.

use super::answer::{Answers, RowMeta};
use super::index::JobIndex;
use super::progress::{Progress, Snapshot};
use super::window::PlannedWindow;
use crate::config::{COMMIT_SECONDS, DRAIN_SECONDS};
use crate::engine::{EngineStats, Finished};
use crate::journal::{Journal, Place, Record};
use crate::outcome::ErrorCode;
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// What happens in a job.
pub(super) enum Event {
    /// A window was planned; its rows are about to be submitted.
    Window(PlannedWindow),
    /// A step finished these rows.
    Step(Vec<Finished>, EngineStats),
    /// Everything was read and submitted, or the feed failed.
    FeedEnded(Result<u64>),
    /// The engine's thread has ended.
    EngineEnded,
    /// A signal asks for an end.
    Signal(u8),
}

/// How often the display is brought up to date at least.
const TICK: Duration = Duration::from_millis(200);

/// What the collecting side counts.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) errors: BTreeMap<String, u64>,
    pub(super) duplicates: u64,
    pub(super) trie_tokens: u64,
    pub(super) stats: EngineStats,
    /// Sum over time of the rows waiting: divided by the rows, their mean wait (Little's law).
    pub(super) waiting_row_seconds: f64,
    pub(super) submitted: u64,
    pub(super) write: Duration,
    /// Rows that an earlier run had finished.
    pub(super) resumed: u64,
}

/// How collecting ended.
pub(super) enum End {
    /// Every row has its record; so many were read.
    Complete(u64),
    /// A signal.
    Stopped(u8),
    /// The engine's thread has ended early; it knows why.
    EngineEnded,
}

/// The rows in flight and where their outcomes go.
pub(super) struct Collector {
    pub(super) journal: Journal,
    pub(super) index: Arc<JobIndex>,
    pub(super) answers: Answers,
    pub(super) progress: Progress,
    pub(super) total_rows: u64,
    /// Told once per finished window.
    pub(super) finished_windows: Sender<()>,
    /// Set to stop the feed.
    pub(super) stop: Arc<AtomicBool>,
    pub(super) counts: Counts,
    /// By the row that is computed: the rows that get its completion, itself first, each with its window's number.
    in_flight: HashMap<u64, Vec<(u64, RowMeta)>>,
    /// Rows of each window that have no record yet.
    open_windows: HashMap<u64, usize>,
    /// Where records are that others may need; not yet in the index.
    places: Vec<(u64, Place)>,
    n_windows: u64,
    last_commit: Instant,
    last_step: Instant,
}

impl Collector {
    /// Nothing in flight.
    pub(super) fn new(
        (journal, index): (Journal, Arc<JobIndex>),
        answers: Answers,
        progress: Progress,
        n_rows: u64,
        finished_windows: Sender<()>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let now = Instant::now();
        let counts = Counts { resumed: journal.done_rows().len(), ..Counts::default() };
        Self {
            journal,
            index,
            answers,
            progress,
            total_rows: n_rows,
            finished_windows,
            stop,
            counts,
            in_flight: HashMap::new(),
            open_windows: HashMap::new(),
            places: Vec::new(),
            n_windows: 0,
            last_commit: now,
            last_step: now,
        }
    }

    /// Collects until every row has its record, a signal comes, or the engine ends. What was collected is committed.
    pub(super) fn run(&mut self, events: &Receiver<Event>) -> Result<End> {
        let end = self.collect(events);
        self.progress.finish();
        self.commit()?;
        end
    }

    fn collect(&mut self, events: &Receiver<Event>) -> Result<End> {
        let mut rows_read = None;
        let mut stopped: Option<(u8, Instant)> = None;
        loop {
            match events.recv_timeout(TICK) {
                Ok(Event::Window(window)) => self.open_window(window)?,
                Ok(Event::Step(finished, stats)) => self.step(&finished, stats)?,
                Ok(Event::FeedEnded(result)) => rows_read = Some(result?),
                Ok(Event::EngineEnded) => return Ok(End::EngineEnded),
                Ok(Event::Signal(signal)) => {
                    self.stop.store(true, Relaxed);
                    stopped = Some((signal, Instant::now()));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the job's threads are gone"),
            }
            self.commit_if_due()?;
            self.progress.show(self.snapshot());
            match (rows_read, stopped) {
                (Some(n_rows), None) if self.in_flight.is_empty() => return Ok(End::Complete(n_rows)),
                // Rows that are running get a moment to finish; what is lost is only work, never a committed row.
                (_, Some((signal, since))) if self.in_flight.is_empty() || since.elapsed().as_secs_f64() > DRAIN_SECONDS => {
                    return Ok(End::Stopped(signal));
                }
                _ => {}
            }
        }
    }

    fn open_window(&mut self, window: PlannedWindow) -> Result<()> {
        let number = self.n_windows;
        self.n_windows += 1;
        self.counts.duplicates += window.n_duplicates;
        self.counts.trie_tokens += window.trie_tokens;
        self.counts.submitted += window.groups.len() as u64;
        for (row, error) in window.failed {
            *self.counts.errors.entry(error.code.as_str().to_owned()).or_default() += 1;
            let record = self.answers.failed(&row, error);
            self.append(&record)?;
        }
        let mut n_open = 0;
        for group in window.groups {
            n_open += group.len();
            self.in_flight.insert(group[0].row_idx, group.into_iter().map(|meta| (number, meta)).collect());
        }
        for (first, meta) in window.followers {
            if let Some(group) = self.in_flight.get_mut(&first) {
                group.push((number, meta));
                n_open += 1;
            } else {
                self.copy(first, &meta)?;
            }
        }
        self.open_windows.insert(number, n_open);
        self.close_window_if_finished(number);
        Ok(())
    }

    /// Gives a row the completion of row `first`, which has its record.
    fn copy(&mut self, first: u64, meta: &RowMeta) -> Result<()> {
        self.index.add_places(&std::mem::take(&mut self.places))?;
        let place = self.index.place(first)?;
        let place = place.with_context(|| format!("row {} waits for row {first}, which nobody computes", meta.row_idx))?;
        let record = self.answers.copied(meta, &self.journal.record(place)?)?;
        if !record.ok {
            *self.counts.errors.entry(ErrorCode::EngineError.as_str().to_owned()).or_default() += 1;
        }
        self.append(&record)
    }

    fn step(&mut self, finished: &[Finished], stats: EngineStats) -> Result<()> {
        let now = Instant::now();
        self.counts.waiting_row_seconds += stats.waiting as f64 * (now - self.last_step).as_secs_f64();
        self.last_step = now;
        self.counts.stats = stats;
        for row in finished {
            let group = self.in_flight.remove(&row.id).expect("every submission was announced");
            if row.is_broken {
                *self.counts.errors.entry(ErrorCode::EngineError.as_str().to_owned()).or_default() += group.len() as u64;
            }
            for (number, meta) in &group {
                let record = self.answers.finished(meta, row);
                self.append(&record)?;
                *self.open_windows.get_mut(number).expect("its window is open") -= 1;
                self.close_window_if_finished(*number);
            }
        }
        Ok(())
    }

    fn close_window_if_finished(&mut self, number: u64) {
        if self.open_windows.get(&number) == Some(&0) {
            self.open_windows.remove(&number);
            // The feed may have ended already; then nobody waits for this.
            let _nobody_waits = self.finished_windows.send(());
        }
    }

    /// The journal commits by itself when a segment is full.
    fn append(&mut self, record: &Record) -> Result<()> {
        let start = Instant::now();
        let place = self.journal.append(record)?;
        if record.key.is_some() {
            self.places.extend(place.map(|place| (record.row, place)));
        }
        self.counts.write += start.elapsed();
        Ok(())
    }

    fn commit_if_due(&mut self) -> Result<()> {
        if self.last_commit.elapsed().as_secs_f64() >= COMMIT_SECONDS { self.commit() } else { Ok(()) }
    }

    fn commit(&mut self) -> Result<()> {
        let start = Instant::now();
        self.journal.commit()?;
        self.index.add_places(&std::mem::take(&mut self.places))?;
        self.last_commit = Instant::now();
        self.counts.write += start.elapsed();
        Ok(())
    }

    /// The journal and the counts, once nothing more comes. The feed is told that nobody waits for windows any more.
    pub(super) fn into_parts(self) -> (Journal, Counts) {
        (self.journal, self.counts)
    }

    fn snapshot(&self) -> Snapshot {
        let (stats, totals) = (&self.counts.stats, self.journal.totals());
        Snapshot {
            done: totals.n_ok + totals.n_failed,
            total: self.total_rows,
            failed: totals.n_failed,
            resumed: self.counts.resumed,
            prefill_tokens: stats.prefill_tokens,
            decode_tokens: stats.generated_tokens,
            cache_hits: stats.shared_tokens,
            kv_use: stats.blocks_used as f64 / stats.blocks_total.max(1) as f64,
        }
    }
}
