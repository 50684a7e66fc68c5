//! The reading side of a job, on its own thread: rows are read, prepared on all cores, planned window by window and
//! submitted to the engine. Invariant: at most [`WINDOWS_AHEAD`] windows are in memory at any time, finished or not.

use super::collect::Event;
use super::index::JobIndex;
use super::window::{PlannedWindow, WindowRow, WindowSettings, find_first, plan_window, refuse_second_uses};
use crate::engine::handle::EngineHandle;
use crate::format::{RawRow, Source};
use crate::journal::RowSet;
use crate::prepare::{Prepared, Preparer};
use anyhow::Result;
use rayon::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

/// Windows that may be read and not finished.
pub(super) const WINDOWS_AHEAD: usize = 2;

/// Where the feeding thread's time goes, in nanoseconds.
#[derive(Debug, Default)]
pub(super) struct FeedTimes {
    read_ns: AtomicU64,
    prepare_ns: AtomicU64,
}

impl FeedTimes {
    /// (reading, preparing and planning)
    pub(super) fn read(&self) -> (Duration, Duration) {
        (Duration::from_nanos(self.read_ns.load(Relaxed)), Duration::from_nanos(self.prepare_ns.load(Relaxed)))
    }
}

/// Everything the feeding thread owns.
pub(super) struct Feed {
    pub(super) source: Source,
    pub(super) preparer: Arc<Preparer>,
    pub(super) index: Arc<JobIndex>,
    pub(super) settings: WindowSettings,
    pub(super) window_rows: usize,
    pub(super) window_bytes: usize,
    /// Rows to read at most.
    pub(super) limit: u64,
    /// Rows that an earlier run has finished.
    pub(super) done: Arc<RowSet>,
    pub(super) engine: Arc<EngineHandle>,
    pub(super) events: Sender<Event>,
    /// One message per finished window.
    pub(super) finished_windows: Receiver<()>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) times: Arc<FeedTimes>,
}

impl Feed {
    /// Feeds the job to its end, or until it is stopped; returns the number of rows read.
    pub(super) fn run(mut self) -> Result<u64> {
        let (mut n_rows, mut n_open, mut next_id) = (0, 0, 0);
        while !self.stop.load(Relaxed) {
            if n_open == WINDOWS_AHEAD {
                if self.finished_windows.recv().is_err() {
                    break;
                }
                n_open -= 1;
            }
            let Some(rows) = self.read_window(n_rows)? else { break };
            n_rows += rows.len() as u64;
            let Some(window) = self.prepare_window(rows, &mut next_id)? else { continue };
            n_open += 1;
            if !self.submit(window) {
                break;
            }
        }
        Ok(n_rows)
    }

    fn read_window(&mut self, n_rows: u64) -> Result<Option<Vec<RawRow>>> {
        let start = Instant::now();
        let left = usize::try_from(self.limit - n_rows).unwrap_or(usize::MAX);
        let rows = if left == 0 { None } else { self.source.next_chunk(self.window_rows.min(left), self.window_bytes)? };
        self.times.read_ns.fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
        Ok(rows)
    }

    /// `None` if an earlier run has finished every row of the window.
    fn prepare_window(&self, rows: Vec<RawRow>, next_id: &mut u64) -> Result<Option<PlannedWindow>> {
        let start = Instant::now();
        if rows.iter().all(|row| self.done.contains(row.row_idx)) {
            return Ok(None);
        }
        let (preparer, settings) = (&self.preparer, self.settings);
        let mut rows: Vec<WindowRow> = rows.into_par_iter().map(|row| prepare(preparer, settings, row)).collect();
        refuse_second_uses(&mut rows, &self.index)?;
        find_first(&mut rows, &self.index)?;
        let window = plan_window(rows, settings, next_id, |row_idx| self.done.contains(row_idx));
        self.times.prepare_ns.fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
        Ok(Some(window))
    }

    /// Announces the window's rows, then submits them; false if the job is over.
    fn submit(&self, mut window: PlannedWindow) -> bool {
        let submissions = std::mem::take(&mut window.submissions);
        if self.events.send(Event::Window(window)).is_err() {
            return false;
        }
        // A refused submission means that the engine has stopped; whoever owns it knows why.
        submissions.into_iter().all(|submission| self.engine.submit(submission).is_ok() && !self.stop.load(Relaxed))
    }
}

fn prepare(preparer: &Preparer, settings: WindowSettings, row: RawRow) -> WindowRow {
    let prepared = match row.content {
        Ok(text) => preparer.prepare(row.row_idx, text),
        Err(error) => Prepared { origin: preparer.unread_origin(), prompts: Err(error) },
    };
    WindowRow::new(row.row_idx, row.file, row.line, prepared, settings)
}
