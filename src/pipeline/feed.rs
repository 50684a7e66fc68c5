//! The reading side of a job, on its own thread: rows are read, prepared on all cores, planned window by window and
//! submitted to the engine. Invariant: at most [`WINDOWS_AHEAD`] windows are in memory at any time, finished or not.

use super::collect::Event;
use super::estimate::JobEstimator;
use super::rows::WindowReader;
use super::window::{PlannedWindow, plan_window};
use crate::engine::handle::EngineHandle;
use crate::format::RawRow;
use crate::journal::RowSet;
use anyhow::Result;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Windows that may be read and not finished.
pub(super) const WINDOWS_AHEAD: usize = 2;

/// Everything the feeding thread owns.
pub(super) struct Feed {
    pub(super) reader: WindowReader,
    /// Rows that an earlier run has finished.
    pub(super) done: Arc<RowSet>,
    pub(super) engine: Arc<EngineHandle>,
    pub(super) events: Sender<Event>,
    /// One message per finished window.
    pub(super) finished_windows: Receiver<()>,
    pub(super) stop: Arc<AtomicBool>,
    /// Told of every window, before it runs.
    pub(super) estimator: Arc<Mutex<JobEstimator>>,
}

impl Feed {
    /// Feeds the job to its end, or until it is stopped; returns the number of rows read.
    pub(super) fn run(mut self) -> Result<u64> {
        let (mut n_open, mut next_id) = (0, 0);
        while !self.stop.load(Relaxed) {
            if n_open == WINDOWS_AHEAD {
                if self.finished_windows.recv().is_err() {
                    break;
                }
                n_open -= 1;
            }
            let Some(rows) = self.reader.read()? else { break };
            let Some(window) = self.prepare_window(rows, &mut next_id)? else { continue };
            n_open += 1;
            if !self.submit(window) {
                break;
            }
        }
        Ok(self.reader.n_rows())
    }

    /// `None` if an earlier run has finished every row of the window.
    fn prepare_window(&self, rows: Vec<RawRow>, next_id: &mut u64) -> Result<Option<PlannedWindow>> {
        if rows.iter().all(|row| self.done.contains(row.row_idx)) {
            return Ok(None);
        }
        let rows = self.reader.prepare(rows)?;
        let start = Instant::now();
        let mut window = plan_window(rows, self.reader.settings, next_id, |row_idx| self.done.contains(row_idx));
        let from_before = self.estimator.lock().expect("an estimator does not panic").observe(&window);
        window.trie_tokens -= u64::from(from_before);
        self.reader.times.planned(start.elapsed());
        Ok(Some(window))
    }

    /// Announces the window's rows, then submits them; false if the job is over.
    fn submit(&self, mut window: PlannedWindow) -> bool {
        let submissions = std::mem::take(&mut window.submissions);
        if self.events.send(Event::Window(window)).is_err() {
            return false;
        }
        // A refused submission means that the engine has stopped; whoever owns it knows why.
        self.engine.submit_all(submissions.into_iter().take_while(|_| !self.stop.load(Relaxed))) && !self.stop.load(Relaxed)
    }
}
