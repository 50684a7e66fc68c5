//! A job's rows, window by window, as prepared rows that know their first of the same content: what a run and a plan
//! have in common. Invariant: whoever reads the same inputs with the same settings sees the same windows.

use super::index::JobIndex;
use super::window::{WindowRow, WindowSettings, find_first, refuse_second_uses};
use crate::format::{Position, RawRow, Source};
use crate::journal::Journal;
use crate::prepare::{Prepared, Preparer};
use anyhow::{Context, Result};
use rayon::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Where the reading thread's time goes, in nanoseconds.
#[derive(Debug, Default)]
pub(super) struct FeedTimes {
    read: AtomicU64,
    prepare: AtomicU64,
    index: AtomicU64,
    plan: AtomicU64,
}

/// A reading of [`FeedTimes`].
#[derive(Debug, Clone, Copy)]
pub(super) struct FeedReading {
    /// Input read.
    pub(super) read: Duration,
    /// Rows parsed, rendered and tokenized.
    pub(super) prepare: Duration,
    /// Ids and contents looked up.
    pub(super) index: Duration,
    /// Windows ordered.
    pub(super) plan: Duration,
}

impl FeedTimes {
    pub(super) fn read(&self) -> FeedReading {
        let of = |ns: &AtomicU64| Duration::from_nanos(ns.load(Relaxed));
        FeedReading { read: of(&self.read), prepare: of(&self.prepare), index: of(&self.index), plan: of(&self.plan) }
    }

    /// A window was planned in that time.
    pub(super) fn planned(&self, time: Duration) {
        self.plan.fetch_add(time.as_nanos() as u64, Relaxed);
    }
}

/// Reads windows of rows.
pub(super) struct WindowReader {
    pub(super) source: Source,
    pub(super) preparer: Arc<Preparer>,
    pub(super) index: Arc<JobIndex>,
    pub(super) settings: WindowSettings,
    pub(super) window_rows: usize,
    pub(super) window_bytes: usize,
    /// Rows to read, at most.
    pub(super) rows_left: u64,
    pub(super) next_row: u64,
    pub(super) times: Arc<FeedTimes>,
}

impl WindowReader {
    /// Rows read so far.
    pub(super) fn n_rows(&self) -> u64 {
        self.next_row
    }

    /// Passes over the rows that a journal has the outcomes of, as far as it is known where in the files they end: where a
    /// window does. A shard must see all rows before its own.
    ///
    /// # Errors
    /// The journal's place is not in the files.
    pub(super) fn skip_done(&mut self, journal: &Journal) -> Result<()> {
        let Some(reached) = journal.reached().filter(|_| self.settings.shard_rows.is_none()) else { return Ok(()) };
        let reached: Position = serde_json::from_str(reached).context("how far the journal has come")?;
        // Errors may be run again: then rows before it have no outcome.
        if journal.done_rows().missing(0..reached.row_idx).next().is_none() {
            self.source.go_to(reached)?;
            self.rows_left = self.rows_left.saturating_sub(reached.row_idx);
            self.next_row = reached.row_idx;
        }
        Ok(())
    }

    /// Where the last window ended, for [`Journal::set_reached`].
    pub(super) fn reached(&self) -> String {
        serde_json::to_string(&self.source.position()).expect("numbers are JSON")
    }

    /// The next window's rows; `None` at the end.
    pub(super) fn read(&mut self) -> Result<Option<Vec<RawRow>>> {
        let start = Instant::now();
        let left = usize::try_from(self.rows_left).unwrap_or(usize::MAX);
        let rows = if left == 0 { None } else { self.source.next_chunk(self.window_rows.min(left), self.window_bytes)? };
        let n_rows = rows.as_ref().map_or(0, |rows| rows.len() as u64);
        self.rows_left -= n_rows;
        self.next_row += n_rows;
        self.times.read.fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
        Ok(rows)
    }

    /// Prepares a window's rows. Must see the windows in order, but for those that the index knows.
    pub(super) fn prepare(&self, rows: Vec<RawRow>) -> Result<Vec<WindowRow>> {
        let start = Instant::now();
        let (preparer, settings) = (&self.preparer, &self.settings);
        let mut rows: Vec<WindowRow> = rows.into_par_iter().map(|row| prepare(preparer, settings, row)).collect();
        let prepared = Instant::now();
        refuse_second_uses(&mut rows, &self.index)?;
        find_first(&mut rows, settings, &self.index)?;
        self.times.prepare.fetch_add((prepared - start).as_nanos() as u64, Relaxed);
        self.times.index.fetch_add(prepared.elapsed().as_nanos() as u64, Relaxed);
        Ok(rows)
    }
}

fn prepare(preparer: &Preparer, settings: &WindowSettings, row: RawRow) -> WindowRow {
    let prepared = match row.text() {
        Ok(text) => preparer.prepare(row.row_idx, text),
        Err(error) => Prepared { origin: preparer.unread_origin(), prompts: Err(error) },
    };
    WindowRow::new(row.row_idx, row.file, row.line, prepared, settings)
}
