//! The reading side of a job, on two threads: one reads windows of rows and prepares them on all cores, the other plans
//! them and submits them to the engine. Invariant: at most [`WINDOWS_AHEAD`] windows are in memory at any time, finished or
//! not.

use super::checkpoint::Checkpoints;
use super::collect::Event;
use super::estimate::JobEstimator;
use super::reuse::Lookup;
use super::rows::{FeedTimes, WindowReader};
use super::window::{PlannedWindow, WindowRow, WindowSettings, plan_window};
use crate::engine::handle::{EngineHandle, panic_message};
use crate::engine::{Due, Submission};
use crate::journal::RowSet;
use crate::window::turns::Share;
use anyhow::{Context, Result, anyhow};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::Builder;
use std::time::Instant;

/// Windows that may be read and not finished: one that is prepared, one that is planned and one that runs.
pub(super) const WINDOWS_AHEAD: usize = 3;

/// Everything the reading side owns.
pub(super) struct Feed {
    pub(super) reader: WindowReader,
    /// Rows that an earlier run has finished.
    pub(super) done: Arc<RowSet>,
    pub(super) engine: Arc<EngineHandle>,
    pub(super) events: Sender<Event>,
    /// One message per finished window.
    pub(super) finished_windows: Receiver<()>,
    pub(super) stop: Arc<AtomicBool>,
    /// What jobs share.
    pub(super) lookup: Option<Lookup>,
    /// Told of every window, before it runs; `None` where nobody reckons.
    pub(super) estimator: Option<Arc<Mutex<JobEstimator>>>,
    /// The name of the first sequence.
    pub(super) first_id: u64,
    /// What rows share prefixes in and when they are due, where the engine is not the job's own.
    pub(super) seat: Option<(u32, Due, Share)>,
    pub(super) checkpoints: Arc<Checkpoints>,
}

impl Feed {
    /// Feeds the job to its end, or until it is stopped; returns the number of rows read.
    pub(super) fn run(self) -> Result<u64> {
        let Self { reader, done, engine, events, finished_windows, stop, lookup, estimator, first_id, seat, checkpoints } = self;
        let planner = Planner {
            settings: reader.settings.clone(),
            times: Arc::clone(&reader.times),
            done: &done,
            engine: &engine,
            events,
            stop: &stop,
            lookup: lookup.as_ref(),
            estimator: estimator.as_deref(),
            seat,
            checkpoints,
        };
        // Prepared windows are handed over one by one, none waits.
        let (prepared, windows) = sync_channel(0);
        std::thread::scope(|scope| {
            let (done, stop) = (&*done, &*stop);
            let read = move || read(reader, done, &finished_windows, stop, &prepared);
            let reading =
                Builder::new().name("reader".into()).spawn_scoped(scope, read).context("starting the reader's thread")?;
            planner.run(windows, first_id);
            reading.join().unwrap_or_else(|panic| Err(anyhow!("the reader panicked: {}", panic_message(&*panic))))
        })
    }
}

/// Reads and prepares windows until there are no more, or nobody wants them; returns the number of rows read.
fn read(
    mut reader: WindowReader,
    done: &RowSet,
    finished_windows: &Receiver<()>,
    stop: &AtomicBool,
    prepared: &SyncSender<(Vec<WindowRow>, String)>,
) -> Result<u64> {
    let mut n_open = 0;
    let own_end = reader.settings.shard_rows.as_ref().map_or(u64::MAX, |rows| rows.end);
    while !stop.load(Relaxed) && reader.n_rows() < own_end {
        if n_open == WINDOWS_AHEAD {
            if finished_windows.recv().is_err() {
                break;
            }
            n_open -= 1;
        }
        let Some(rows) = reader.read()? else { break };
        // Windows that an earlier run has finished need not be prepared.
        if rows.iter().all(|row| done.contains(row.row_idx)) {
            continue;
        }
        let rows = reader.prepare(rows)?;
        if rows.iter().all(|row| !reader.settings.is_own(row.row_idx) || done.contains(row.row_idx)) {
            // Another shard's: their ids and contents are known now.
            continue;
        }
        n_open += 1;
        if prepared.send((rows, reader.reached())).is_err() {
            break;
        }
    }
    Ok(reader.n_rows())
}

/// Plans windows and submits them.
struct Planner<'a> {
    settings: WindowSettings,
    times: Arc<FeedTimes>,
    done: &'a RowSet,
    engine: &'a EngineHandle,
    events: Sender<Event>,
    stop: &'a AtomicBool,
    lookup: Option<&'a Lookup>,
    estimator: Option<&'a Mutex<JobEstimator>>,
    seat: Option<(u32, Due, Share)>,
    checkpoints: Arc<Checkpoints>,
}

impl Planner<'_> {
    /// Until no more windows come, or the job is over.
    fn run(self, windows: Receiver<(Vec<WindowRow>, String)>, mut next_id: u64) {
        for (rows, end) in windows {
            let window = PlannedWindow { end, ..self.plan(rows, &mut next_id) };
            if !self.submit(window) {
                break;
            }
        }
    }

    fn plan(&self, rows: Vec<WindowRow>, next_id: &mut u64) -> PlannedWindow {
        let start = Instant::now();
        let mut window = plan_window(rows, &self.settings, next_id, |row_idx| self.done.contains(row_idx));
        if let Some(estimator) = self.estimator {
            let from_before = estimator.lock().expect("an estimator does not panic").observe(&window);
            window.trie_tokens -= u64::from(from_before);
        }
        if let Some(seat) = self.seat {
            let place = |next: &mut Submission| (next.stream, next.due, next.params.share) = seat;
            window.submissions.iter_mut().for_each(place);
        }
        for (submission, (group, _)) in window.submissions.iter_mut().zip(&window.sequences) {
            self.checkpoints.apply(window.groups[*group as usize].leader.row_idx, submission);
        }
        self.times.planned(start.elapsed());
        window
    }

    /// Announces the window's rows, then submits them; false if the job is over.
    fn submit(&self, mut window: PlannedWindow) -> bool {
        let mut submissions = std::mem::take(&mut window.submissions);
        if self.events.send(Event::Window(window)).is_err() {
            return false;
        }
        if let Some(lookup) = self.lookup {
            let known = lookup.split(&mut submissions);
            if self.events.send(Event::Known(known)).is_err() {
                return false;
            }
        }
        // A refused submission means that the engine has stopped; whoever owns it knows why.
        self.engine.submit_all(submissions.into_iter().take_while(|_| !self.stop.load(Relaxed))) && !self.stop.load(Relaxed)
    }
}
