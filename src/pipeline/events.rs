//! What the threads of a job tell its collecting side, and what that comes to. Knows nothing of how rows are collected.

use super::reuse::Known;
use super::stepper::PreparedStep;
use super::window::PlannedWindow;
use crate::engine::{Checkpoint, EngineStats, Finished};
use anyhow::Result;
use std::collections::BTreeMap;
use std::time::Duration;

/// What happens in a job.
pub(super) enum Event {
    /// A window was planned; its rows are about to be submitted.
    Window(PlannedWindow),
    /// Sequences that are about to be submitted were looked up in the cache.
    Known(Known),
    /// A step finished these rows.
    Finished(Vec<Finished>, EngineStats),
    /// How far sequences came that run on.
    Checkpoints(Vec<Checkpoint>),
    /// A later step of a row was prepared, and is about to be submitted.
    Prepared(PreparedStep),
    /// Everything was read and submitted, or the feed failed.
    FeedEnded(Result<u64>),
    /// The engine's thread has ended.
    EngineEnded,
    /// A signal asks for an end.
    Signal(u8),
    /// It ends here and now: what runs is not waited for.
    Halt,
}

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
    /// Putting output lines and records together.
    pub(super) answer: Duration,
    /// Committing.
    pub(super) journal: Duration,
    /// Writing the final files.
    pub(super) finalise: Duration,
    /// Most KV blocks in use at a time.
    pub(super) peak_blocks: usize,
    /// Rows that an earlier run had finished.
    pub(super) resumed: u64,
    /// Sequences whose results were in the cache.
    pub(super) reused: u64,
    /// Attempts beyond the first.
    pub(super) further_attempts: u64,
}

/// How collecting ended.
pub(super) enum End {
    /// Every row has its record; so many were read.
    Complete(u64),
    /// Before its end, in good order.
    Stopped(Stop),
    /// The engine's thread has ended early; it knows why.
    EngineEnded,
}

/// Why a run ends before its job.
#[derive(Debug, Clone)]
pub(super) enum Stop {
    /// A signal.
    Signal(u8),
    /// `valar cancel`.
    Cancelled,
    /// Its budget is spent: this one.
    Budget(String),
    /// Whoever runs it on an engine that others use, too.
    Halted,
}
