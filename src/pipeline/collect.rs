//! The collecting side of a job, on the main thread: finished rows become records, records are committed in groups.
//! Invariant: a record is appended once per row; a window is reported finished when every row of it has one.

use super::answer::{Answers, RowMeta, broken, step_answer};
use super::index::JobIndex;
use super::progress::{Progress, Snapshot};
use super::stepper::{PreparedStep, StepTask};
use super::window::{Group, PlannedWindow};
use crate::config::{COMMIT_SECONDS, DRAIN_SECONDS};
use crate::engine::{EngineStats, Finished};
use crate::journal::{Journal, Place, Record};
use crate::outcome::RowError;
use crate::prepare::sequences::PromptMeta;
use crate::prepare::{Origin, StepAnswer};
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// What happens in a job.
pub(super) enum Event {
    /// A window was planned; its rows are about to be submitted.
    Window(PlannedWindow),
    /// A step finished these rows.
    Finished(Vec<Finished>, EngineStats),
    /// A later step of a row was prepared, and is about to be submitted.
    Prepared(PreparedStep),
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
    /// Putting output lines together.
    pub(super) answer: Duration,
    /// Appending and committing.
    pub(super) journal: Duration,
    /// Writing the final files.
    pub(super) finalise: Duration,
    /// Most KV blocks in use at a time.
    pub(super) peak_blocks: usize,
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
    /// By the row that is computed.
    in_flight: HashMap<u64, Flight, NumberHash>,
    /// By the engine's name: the row, and which of its prompts.
    sequences: HashMap<u64, (u64, usize), NumberHash>,
    /// For each step of the job, the steps that it waits for.
    needs: Vec<Vec<usize>>,
    /// To the thread that prepares steps.
    step_tasks: Sender<StepTask>,
    /// Rows of each window that have no record yet.
    open_windows: HashMap<u64, usize>,
    /// Where records are that others may need; not yet in the index.
    places: Vec<(u64, Place)>,
    n_windows: u64,
    last_commit: Instant,
    last_step: Instant,
}

/// Spreads numbers that are dense; nobody chooses them to collide.
#[derive(Default)]
struct NumberHasher(u64);

type NumberHash = BuildHasherDefault<NumberHasher>;

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("for numbers only");
    }

    fn write_u64(&mut self, number: u64) {
        // The table takes its place from the low bits and its tag from the high ones.
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// A row that is being computed.
struct Flight {
    /// The row itself and those of its window that get its completion.
    rows: Vec<RowMeta>,
    /// Their window's number.
    window: u64,
    /// Rows of later windows that get it too, with their windows' numbers.
    followers: Vec<(u64, RowMeta)>,
    /// The completions of each of its prompts: as they come, and in the order of its choices once all have.
    results: Vec<Vec<Finished>>,
    /// How many of each are missing.
    n_missing: Vec<usize>,
    /// Sequences that have not finished, and steps that are being prepared.
    n_left: usize,
    /// By step.
    answers: Vec<Option<StepAnswer>>,
    /// By step: whether it is being prepared or was.
    is_started: Vec<bool>,
    /// Of the first prompt, in order of steps, that has one.
    error: Option<(usize, RowError)>,
}

impl Flight {
    fn new(number: u64, group: Group, n_steps: usize) -> Self {
        let mut n_missing = vec![0; group.rows[0].prompts.len()];
        for &(_, prompt) in &group.sequences {
            n_missing[prompt] += 1;
        }
        Self {
            rows: group.rows,
            window: number,
            followers: Vec::new(),
            results: n_missing.iter().map(|&n| Vec::with_capacity(n)).collect(),
            n_missing,
            n_left: group.sequences.len(),
            answers: vec![None; n_steps],
            is_started: vec![false; n_steps],
            error: None,
        }
    }

    /// A step can't be done. Which error the row gets must not depend on which step was the first to fail.
    fn fail(&mut self, step: usize, error: RowError) {
        if self.error.as_ref().is_none_or(|(first, _)| step < *first) {
            self.error = Some((step, error));
        }
    }

    /// Another row gets the same.
    fn follow(&mut self, number: u64, mut row: RowMeta) {
        let later = &self.rows[0].prompts[row.prompts.len()..];
        row.prompts.extend(later.iter().map(PromptMeta::shared));
        self.followers.push((number, row));
    }
}

impl Collector {
    /// Nothing in flight.
    pub(super) fn new(
        (journal, index): (Journal, Arc<JobIndex>),
        (needs, step_tasks): (Vec<Vec<usize>>, Sender<StepTask>),
        answers: Answers,
        progress: Progress,
        n_rows: u64,
        (finished_windows, stop): (Sender<()>, Arc<AtomicBool>),
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
            in_flight: HashMap::default(),
            sequences: HashMap::default(),
            needs,
            step_tasks,
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
                Ok(Event::Finished(finished, stats)) => self.take_finished(finished, stats)?,
                Ok(Event::Prepared(step)) => self.take_prepared(step)?,
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
        self.counts.submitted += window.groups.iter().map(|group| group.sequences.len() as u64).sum::<u64>();
        for (row, error) in window.failed {
            self.fail(&row, &error)?;
        }
        let mut n_open = 0;
        for group in window.groups {
            n_open += group.rows.len();
            let leader = group.rows[0].row_idx;
            self.sequences.extend(group.sequences.iter().map(|&(id, prompt)| (id, (leader, prompt))));
            self.in_flight.insert(leader, Flight::new(number, group, self.needs.len()));
        }
        for (first, meta) in window.followers {
            if let Some(flight) = self.in_flight.get_mut(&first) {
                flight.follow(number, meta);
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
        self.index.add_places(std::mem::take(&mut self.places))?;
        let place = self.index.place(first)?;
        let place = place.with_context(|| format!("row {} waits for row {first}, which nobody computes", meta.row_idx))?;
        let (record, error) = self.answers.copied(meta, &self.journal.record(place)?)?;
        if let Some(code) = error {
            *self.counts.errors.entry(code.as_str().to_owned()).or_default() += 1;
        }
        self.append(&record)
    }

    fn fail(&mut self, row: &RowMeta, error: &RowError) -> Result<()> {
        *self.counts.errors.entry(error.code.as_str().to_owned()).or_default() += 1;
        let record = self.answers.failed(row, error);
        self.append(&record)
    }

    fn take_finished(&mut self, finished: Vec<Finished>, stats: EngineStats) -> Result<()> {
        let now = Instant::now();
        self.counts.waiting_row_seconds += stats.waiting as f64 * (now - self.last_step).as_secs_f64();
        self.last_step = now;
        self.counts.stats = stats;
        self.counts.peak_blocks = self.counts.peak_blocks.max(stats.blocks_used);
        for sequence in finished {
            let (leader, prompt) = self.sequences.remove(&sequence.id).expect("every submission was announced");
            let flight = self.in_flight.get_mut(&leader).expect("its row is in flight");
            flight.n_left -= 1;
            flight.n_missing[prompt] -= 1;
            flight.results[prompt].push(sequence);
            if flight.n_missing[prompt] == 0 {
                // A prompt's sequences are named in the order of its choices.
                flight.results[prompt].sort_unstable_by_key(|finished| finished.id);
                self.advance(leader, prompt);
            }
            self.land_if_complete(leader)?;
        }
        Ok(())
    }

    /// A prompt of the row is completed: the steps that waited for it alone can begin.
    fn advance(&mut self, leader: u64, prompt: usize) {
        let flight = self.in_flight.get_mut(&leader).expect("the caller looked");
        let results = &flight.results[prompt];
        let step = flight.rows[0].prompts[prompt].step;
        if let Some(error) = broken(results) {
            return flight.fail(step, error);
        }
        if self.needs.len() < 2 {
            return;
        }
        flight.answers[step] = Some(step_answer(results));
        let Origin::Dataset { columns: Some(columns) } = &flight.rows[0].origin else { return };
        for (step, needs) in self.needs.iter().enumerate() {
            let is_ready = needs.iter().all(|&need| flight.answers[need].is_some());
            if needs.is_empty() || flight.is_started[step] || !is_ready {
                continue;
            }
            flight.is_started[step] = true;
            flight.n_left += 1; // until it is prepared
            let task = StepTask { row_idx: leader, step, columns: Arc::clone(columns), answers: flight.answers.clone() };
            // The stepper may have ended with the engine; then the end comes soon.
            let _nobody_listens = self.step_tasks.send(task);
        }
    }

    fn take_prepared(&mut self, step: PreparedStep) -> Result<()> {
        let leader = step.row_idx;
        let flight = self.in_flight.get_mut(&leader).expect("it waits for its step");
        flight.n_left -= 1;
        match step.prompt {
            Err(error) => flight.fail(step.step, error),
            Ok((meta, ids)) => {
                let prompt = flight.results.len();
                flight.n_left += ids.len();
                flight.results.push(Vec::with_capacity(ids.len()));
                flight.n_missing.push(ids.len());
                let followers = flight.followers.iter_mut().map(|(_, row)| row);
                for (i, row) in flight.rows.iter_mut().chain(followers).enumerate() {
                    row.prompts.push(if i == 0 { meta.clone() } else { meta.shared() });
                }
                self.counts.submitted += ids.len() as u64;
                self.sequences.extend(ids.into_iter().map(|id| (id, (leader, prompt))));
            }
        }
        self.land_if_complete(leader)
    }

    /// Writes the outcome of a row, and of all that share it, once nothing of it is on its way any more.
    fn land_if_complete(&mut self, leader: u64) -> Result<()> {
        if self.in_flight.get(&leader).is_none_or(|flight| flight.n_left > 0) {
            return Ok(());
        }
        let flight = self.in_flight.remove(&leader).expect("the row is in flight");
        let followers = flight.followers.iter().map(|(number, row)| (number, row));
        for (number, row) in flight.rows.iter().map(|row| (&flight.window, row)).chain(followers) {
            if let Some((_, error)) = &flight.error {
                self.fail(row, error)?;
            } else {
                let start = Instant::now();
                let record = self.answers.finished(row, &flight.results);
                self.counts.answer += start.elapsed();
                self.append(&record)?;
            }
            *self.open_windows.get_mut(number).expect("its window is open") -= 1;
            self.close_window_if_finished(*number);
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
    fn append(&mut self, record: &Record<'_>) -> Result<()> {
        let start = Instant::now();
        let place = self.journal.append(record)?;
        if record.key.is_some() {
            self.places.extend(place.map(|place| (record.row, place)));
        }
        self.counts.journal += start.elapsed();
        Ok(())
    }

    fn commit_if_due(&mut self) -> Result<()> {
        if self.last_commit.elapsed().as_secs_f64() >= COMMIT_SECONDS { self.commit() } else { Ok(()) }
    }

    fn commit(&mut self) -> Result<()> {
        let start = Instant::now();
        self.journal.commit()?;
        self.index.add_places(std::mem::take(&mut self.places))?;
        self.last_commit = Instant::now();
        self.counts.journal += start.elapsed();
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
