//! The collecting side of a job, on the main thread: finished rows become records, records are committed in groups.
//! Invariant: a record is appended once per row; a window is reported finished when every row of it has one.

use super::answer::{Answers, RowMeta, step_answer};
use super::attempts::FIRST_RETRY_ID;
use super::budget::Budget;
pub(super) use super::events::{Counts, End, Event, Stop};
use super::flight::{Flight, OpenWindow};
use super::index::JobIndex;
use super::policy::Policy;
use super::progress::{Progress, Snapshot};
use super::reuse::{Keeping, Known};
use super::stepper::{FIRST_ID, PreparedStep, StepTask, Task};
use super::window::{Group, PlannedWindow};
use crate::config::{COMMIT_SECONDS, DRAIN_SECONDS};
use crate::engine::{EngineStats, Finished};
use crate::journal::{Apart, Journal, Place, Record, Standing};
use crate::outcome::RowError;
use crate::prepare::Origin;
use anyhow::{Context, Result, bail};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// How often the display is brought up to date at least.
const TICK: Duration = Duration::from_millis(200);

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
    /// For the cache that jobs share.
    pub(super) keeping: Option<Keeping>,
    budget: Budget,
    /// Windows with rows that have no record yet, in order.
    windows: VecDeque<OpenWindow>,
    /// Rows that take more than one sequence, by the row that is computed.
    pub(super) flights: HashMap<u64, Flight>,
    /// Rows that are computed and have not landed.
    n_in_flight: usize,
    /// By the engine's name, sequences of later steps and attempts: the row, and which of its prompts.
    pub(super) later: HashMap<u64, (u64, usize)>,
    /// The name of the next sequence of a later attempt.
    pub(super) next_retry_id: u64,
    /// By step, what completions must be.
    pub(super) policies: Vec<Option<Arc<Policy>>>,
    /// What seeds are derived from.
    pub(super) job_seed: u64,
    /// For each step of the job, the steps that it waits for.
    needs: Vec<Vec<usize>>,
    /// To the thread that prepares steps.
    pub(super) step_tasks: Sender<Task>,
    /// For the line that is being written.
    line: String,
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
        (needs, step_tasks): (Vec<Vec<usize>>, Sender<Task>),
        answers: Answers,
        (progress, budget): (Progress, Budget),
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
            keeping: None,
            budget,
            windows: VecDeque::new(),
            flights: HashMap::new(),
            n_in_flight: 0,
            later: HashMap::new(),
            next_retry_id: FIRST_RETRY_ID,
            policies: Vec::new(),
            job_seed: 0,
            needs,
            step_tasks,
            line: String::new(),
            places: Vec::new(),
            n_windows: 0,
            last_commit: now,
            last_step: now,
        }
    }

    /// Collects until every row has its record, a signal comes, or the engine ends. What was collected is committed.
    pub(super) fn run(&mut self, events: &Receiver<Event>) -> Result<End> {
        let end = self.collect(events);
        let committed = self.journal.commit();
        self.progress.finish(self.snapshot());
        committed.and(end)
    }

    fn collect(&mut self, events: &Receiver<Event>) -> Result<End> {
        let mut rows_read = None;
        let mut stopped: Option<(Stop, Instant)> = None;
        let mut is_drained = false;
        let start = Instant::now();
        loop {
            match events.recv_timeout(TICK) {
                Ok(Event::FeedEnded(result)) => rows_read = Some(result?),
                Ok(Event::EngineEnded) => return Ok(End::EngineEnded),
                Ok(Event::Halt) => {
                    self.stop.store(true, Relaxed);
                    return Ok(End::Stopped(Stop::Halted));
                }
                Ok(Event::Signal(signal)) => stopped = Some((Stop::Signal(signal), Instant::now())),
                Ok(event) => self.take(event)?,
                // What was announced and not submitted never comes.
                Err(RecvTimeoutError::Timeout) => is_drained = stopped.is_some() && self.is_idle(),
                Err(RecvTimeoutError::Disconnected) => bail!("the job's threads are gone"),
            }
            self.commit_if_due()?;
            // A job that is complete needs no more time or money.
            let is_complete = rows_read.is_some() && self.n_in_flight == 0;
            if stopped.is_none() && !is_complete {
                stopped = self.must_stop(start)?.map(|why| (why, Instant::now()));
            }
            self.stop.fetch_or(stopped.is_some(), Relaxed);
            self.progress.show(self.snapshot());
            match (rows_read, &stopped) {
                (Some(n_rows), None) if self.n_in_flight == 0 => return Ok(End::Complete(n_rows)),
                // Rows that are running get a moment to finish; what is lost is only work, never a committed row.
                (_, Some((why, since)))
                    if self.n_in_flight == 0 || is_drained || since.elapsed().as_secs_f64() > DRAIN_SECONDS =>
                {
                    return Ok(End::Stopped(why.clone()));
                }
                _ => {}
            }
        }
    }

    /// Takes what becomes of rows.
    pub(super) fn take(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Window(window) => self.open_window(window),
            Event::Finished(finished, stats) => self.take_finished(finished, stats),
            Event::Known(known) => self.take_known(known),
            Event::Checkpoints(checkpoints) => self.keep(&checkpoints),
            Event::Prepared(step) => self.take_prepared(step),
            Event::FeedEnded(result) => result.map(drop),
            Event::EngineEnded | Event::Signal(_) | Event::Halt => Ok(()),
        }
    }

    /// The row that a sequence is of.
    pub(super) fn row_of(&self, id: u64) -> u64 {
        if let Some(&(row, _)) = self.later.get(&id) {
            return row;
        }
        let found = self.windows.iter().find_map(|window| Some(window.leaders[window.sequence(id)?.0]));
        found.expect("every submission was announced")
    }

    /// Whether the engine had nothing to do when it was heard of last.
    fn is_idle(&self) -> bool {
        self.counts.stats.running + self.counts.stats.waiting == 0
    }

    /// Whether others, or the budget, want the run to end.
    fn must_stop(&self, start: Instant) -> Result<Option<Stop>> {
        match self.journal.standing() {
            Standing::Lost => Err(Apart::TakenOver.into()),
            Standing::Cancelled => Ok(Some(Stop::Cancelled)),
            Standing::Held => Ok(self.budget.reached(&self.counts.stats, start).map(Stop::Budget)),
        }
    }

    fn open_window(&mut self, window: PlannedWindow) -> Result<()> {
        let number = self.n_windows;
        self.n_windows += 1;
        self.counts.duplicates += window.n_duplicates;
        self.counts.trie_tokens += window.trie_tokens;
        self.counts.submitted += window.sequences.len() as u64;
        for (row, error) in window.failed {
            self.fail(&row, &error)?;
        }
        let PlannedWindow { groups, followers, first_id, sequences, end, .. } = window;
        self.n_in_flight += groups.len();
        let open = OpenWindow {
            number,
            end,
            n_open: groups.iter().map(|group| 1 + group.same.len()).sum(),
            leaders: groups.iter().map(|group| group.leader.row_idx).collect(),
            groups: groups.into_iter().map(Some).collect(),
            first_id,
            sequences,
        };
        self.windows.push_back(open);
        self.take_off();
        let mut n_following = 0;
        for (first, meta) in followers {
            if let Some(flight) = self.flight(first) {
                flight.follow(number, meta);
                n_following += 1;
            } else {
                self.copy(first, &meta)?;
            }
        }
        self.windows.back_mut().expect("it was pushed").n_open += n_following;
        self.close_if_finished(number, 0);
        Ok(())
    }

    /// Makes flights of those groups of the last window that are more than one sequence.
    fn take_off(&mut self) {
        let window = self.windows.back_mut().expect("the caller has pushed one");
        let has_steps = self.needs.len() > 1 || self.policies.iter().any(Option::is_some);
        if !has_steps && window.sequences.len() == window.groups.len() {
            return;
        }
        let mut n_missing: HashMap<u32, Vec<usize>> = HashMap::new();
        for &(group, prompt) in &window.sequences {
            let Some(Some(rows)) = window.groups.get(group as usize) else { unreachable!("every sequence has its group") };
            if has_steps || rows.n_sequences > 1 {
                n_missing.entry(group).or_insert_with(|| vec![0; rows.leader.prompts.len()])[prompt as usize] += 1;
            }
        }
        for (group, n_missing) in n_missing {
            let rows = window.groups[group as usize].take().expect("it is there");
            let leader = rows.leader.row_idx;
            self.flights.insert(leader, Flight::new(window.number, rows, n_missing, self.needs.len()));
        }
    }

    /// The flight of a row that is being computed; it is one from now on.
    fn flight(&mut self, leader: u64) -> Option<&mut Flight> {
        for window in &mut self.windows {
            if let Ok(group) = window.leaders.binary_search(&leader)
                && let Some(group) = window.groups[group].take()
            {
                self.flights.insert(leader, Flight::new(window.number, group, vec![1], self.needs.len()));
            }
        }
        self.flights.get_mut(&leader)
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
        let waited = self.journal.wait_time();
        for sequence in finished {
            if let Some(keeping) = &mut self.keeping {
                keeping.note(&sequence);
            }
            self.take_sequence(sequence)?;
        }
        self.counts.answer += (now.elapsed() + waited).saturating_sub(self.journal.wait_time());
        Ok(())
    }

    /// Takes results from the cache.
    fn take_known(&mut self, known: Known) -> Result<()> {
        if let Some(keeping) = &mut self.keeping {
            keeping.expect(known.keys);
        }
        self.counts.reused += known.found.len() as u64;
        known.found.into_iter().try_for_each(|sequence| self.take_sequence(sequence))
    }

    fn take_sequence(&mut self, finished: Finished) -> Result<()> {
        let (leader, prompt) = if finished.id >= FIRST_ID {
            self.later.remove(&finished.id).expect("every later step was announced")
        } else {
            let found = self.windows.iter_mut().find_map(|window| Some((window.sequence(finished.id)?, window)));
            let ((group, prompt), window) = found.expect("every submission was announced");
            if let Some(rows) = window.groups[group].take() {
                let number = window.number;
                return self.land(number, &rows, finished);
            }
            (window.leaders[group], prompt)
        };
        let flight = self.flights.get_mut(&leader).expect("its row is in flight");
        flight.n_left -= 1;
        flight.n_missing[prompt] -= 1;
        flight.results[prompt].push(finished);
        if flight.n_missing[prompt] == 0 {
            // A prompt's sequences are named in the order of its choices.
            flight.results[prompt].sort_unstable_by_key(|finished| finished.id);
            if self.stands(leader, prompt) {
                self.advance(leader, prompt);
            }
        }
        self.land_if_complete(leader)
    }

    /// A prompt of the row is completed: the steps that waited for it alone can begin.
    fn advance(&mut self, leader: u64, prompt: usize) {
        let flight = self.flights.get_mut(&leader).expect("the caller looked");
        let results = &flight.results[prompt];
        let step = flight.rows[0].prompts[prompt].step;
        if let Some(error) = self.answers.broken(&flight.rows[0].prompts[prompt], results) {
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
            let _nobody_listens = self.step_tasks.send(Task::Prepare(task));
        }
    }

    fn take_prepared(&mut self, step: PreparedStep) -> Result<()> {
        let leader = step.row_idx;
        let flight = self.flights.get_mut(&leader).expect("it waits for its step");
        flight.n_left -= 1;
        match step.prompt {
            Err(error) => flight.fail(step.step, error),
            Ok((meta, ids, given)) => {
                let prompt = flight.results.len();
                flight.prompts.extend(self.policies.iter().any(Option::is_some).then_some(*given));
                flight.n_left += ids.len();
                flight.results.push(Vec::with_capacity(ids.len()));
                flight.n_missing.push(ids.len());
                let followers = flight.followers.iter_mut().map(|(_, row)| row);
                for (i, row) in flight.rows.iter_mut().chain(followers).enumerate() {
                    row.prompts.push(if i == 0 { meta.clone() } else { meta.shared() });
                }
                self.counts.submitted += ids.len() as u64;
                self.later.extend(ids.into_iter().map(|id| (id, (leader, prompt))));
            }
        }
        self.land_if_complete(leader)
    }

    /// Writes the outcome of rows that one sequence completes.
    fn land(&mut self, number: u64, rows: &Group, finished: Finished) -> Result<()> {
        self.n_in_flight -= 1;
        let results = [[finished]];
        let error = self.answers.broken(&rows.leader.prompts[0], &results[0]);
        for row in std::iter::once(&rows.leader).chain(&rows.same) {
            self.settle(row, error.as_ref(), &results)?;
        }
        self.close_if_finished(number, 1 + rows.same.len());
        Ok(())
    }

    /// Writes the outcome of a row, and of all that share it, once nothing of it is on its way any more.
    fn land_if_complete(&mut self, leader: u64) -> Result<()> {
        if self.flights.get(&leader).is_none_or(|flight| flight.n_left > 0) {
            return Ok(());
        }
        let flight = self.flights.remove(&leader).expect("the row is in flight");
        self.n_in_flight -= 1;
        let followers = flight.followers.iter().map(|(number, row)| (number, row));
        for (number, row) in flight.rows.iter().map(|row| (&flight.window, row)).chain(followers) {
            self.settle(row, flight.error.as_ref().map(|(_, error)| error), &flight.results)?;
            self.close_if_finished(*number, 1);
        }
        Ok(())
    }

    /// Writes the outcome of a row.
    fn settle(&mut self, row: &RowMeta, error: Option<&RowError>, results: &[impl AsRef<[Finished]>]) -> Result<()> {
        if let Some(error) = error {
            return self.fail(row, error);
        }
        let mut line = std::mem::take(&mut self.line);
        self.append(&self.answers.finished(row, results, &mut line))?;
        self.line = line;
        Ok(())
    }

    /// So many more rows of a window have their record.
    fn close_if_finished(&mut self, number: u64, n_rows: usize) {
        let place = self.windows.iter().position(|window| window.number == number).expect("its window is open");
        self.windows[place].n_open -= n_rows;
        if self.windows[place].n_open == 0 {
            let end = self.windows.remove(place).map(|window| window.end).unwrap_or_default();
            match place.checked_sub(1) {
                None => self.journal.set_reached(end),
                Some(before) => self.windows[before].end = end,
            }
            // The feed may have ended already; then nobody waits for this.
            let _nobody_waits = self.finished_windows.send(());
        }
    }

    /// The journal commits by itself when a segment is full.
    fn append(&mut self, record: &Record<'_>) -> Result<()> {
        let place = self.journal.append(record)?;
        if record.key.is_some() {
            self.places.extend(place.map(|place| (record.row, place)));
        }
        Ok(())
    }

    fn commit_if_due(&mut self) -> Result<()> {
        self.journal.land_if_put()?;
        if self.last_commit.elapsed().as_secs_f64() < COMMIT_SECONDS {
            return Ok(());
        }
        self.journal.begin_commit()?;
        self.index.add_places(std::mem::take(&mut self.places))?;
        self.last_commit = Instant::now();
        Ok(())
    }

    /// The journal and the counts, once nothing more comes. The feed is told that nobody waits for windows any more.
    pub(super) fn into_parts(mut self) -> (Journal, Counts) {
        self.counts.journal = self.journal.commit_time();
        (self.journal, self.counts)
    }

    fn snapshot(&self) -> Snapshot {
        let (stats, totals) = (&self.counts.stats, self.journal.totals());
        Snapshot {
            done: totals.n_ok + totals.n_failed,
            committed: self.journal.n_committed(),
            open: self.windows.iter().map(|window| window.n_open as u64).sum(),
            running: stats.running as u64,
            total: self.total_rows,
            failed: totals.n_failed,
            resumed: self.counts.resumed,
            totals,
            prefill_tokens: stats.prefill_tokens,
            decode_tokens: stats.generated_tokens,
            cache_hits: stats.shared_tokens,
            kv_use: stats.blocks_used as f64 / stats.blocks_total.max(1) as f64,
        }
    }
}
