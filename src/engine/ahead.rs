//! Steps that have begun: the one whose results are waited for next and, on a device that goes on by itself, perhaps the one after
//! it. That one is planned and begun while the first is under way: where its tokens stand is known, what they are is not, and the
//! device reads them from what the first step draws. Knows nothing of who runs in a step.
//!
//! Invariants: a step is begun before another has ended only if nothing but tokens is missing: each row that draws in the first one
//! ends with it for certain, or needs nothing of the host that depends on its token (a mask, edits for what was drawn). What the
//! second step computes of a row that turns out to have ended, or is cancelled, is used by nobody and counted apart
//! (`EngineStats::unused_tokens`). Blocks
//! that are free may be given away at once: whatever writes to them does so in a later step, and a device does one after the other.

use std::mem;

use super::scheduler::Scheduler;
use super::sequence::{Phase, Sequence};
use super::{Engine, Scheduled, batch};
use crate::device::batch::{Batch, StepOutput};

/// A step that has begun and whose results nobody has read.
pub(super) struct Flight {
    /// What it runs, in order.
    pub(super) shares: Vec<Scheduled>,
    pub(super) batch: Batch,
    pub(super) out: StepOutput,
    /// Places in `shares` of rows whose grammar can't be followed, and why.
    pub(super) broken: Vec<(usize, String)>,
    /// How its beginning went: true if the device goes on with it by itself.
    pub(super) begun: anyhow::Result<bool>,
}

impl Flight {
    /// Room for the largest step.
    pub(super) fn new(scheduler: &Scheduler) -> Self {
        let limits = &scheduler.limits;
        Self {
            shares: Vec::with_capacity(limits.max_step_seqs),
            batch: batch::with_capacity(limits, scheduler.config.max_running),
            out: StepOutput { rows: Vec::with_capacity(limits.max_step_seqs) },
            broken: Vec::new(),
            begun: Ok(false),
        }
    }

    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.begun, Ok(true))
    }

    /// The rows that it runs.
    pub(super) fn ids(&self) -> Vec<u64> {
        self.shares.iter().map(|share| share.id).collect()
    }
}

impl Engine {
    /// Begins what was scheduled.
    pub(super) fn begin(&mut self) {
        let mut flight = self.spare.pop().unwrap_or_else(|| Flight::new(&self.scheduler));
        mem::swap(&mut flight.shares, &mut self.scheduler.scheduled);
        batch::fill(&mut flight, &mut self.scheduler, &*self.tokens);
        flight.batch.check(self.scheduler.limits.n_blocks, self.scheduler.limits.n_vocab);
        flight.out.rows.clear();
        flight.begun = self.attempt(&mut flight, |runner, batch, out| runner.start(batch, out));
        self.flights.push_back(flight);
    }

    /// Waits for a step's results.
    ///
    /// # Errors
    /// The runner's, or its panic's message. Nothing of the step may be used then.
    pub(super) fn land(&mut self, flight: &mut Flight) -> anyhow::Result<()> {
        self.scheduler.count(&flight.shares);
        mem::replace(&mut flight.begun, Ok(false))?;
        self.attempt(flight, |runner, batch, out| runner.run(batch, out))
    }

    /// Whether the next step may begin while the first one is under way. Its rows have another token then, which nobody knows yet.
    pub(super) fn looks_ahead(&mut self) -> bool {
        let max_context = self.scheduler.limits.max_context;
        let running = &mut self.scheduler.running;
        let [flight] = self.flights.make_contiguous() else { return false };
        let goes_on = |row: &Sequence| row.phase == Phase::Live && !row.is_full(1, max_context);
        let mut rows = flight.shares.iter().filter(|share| share.draws).filter_map(|share| running.get(share.running_idx));
        let needs_host = |row: &Sequence| row.constraint.is_some() || row.history.is_some();
        if !flight.is_under_way() || rows.any(|row| goes_on(row) && needs_host(row)) {
            return false;
        }
        let mut head_idx = 0;
        for share in &flight.shares {
            head_idx += share.n_scores as u32;
            if share.draws {
                if let Some(row) = running.get_mut(share.running_idx).filter(|row| goes_on(row)) {
                    row.pending = Some(head_idx);
                }
                head_idx += 1;
            }
        }
        true
    }

    /// Lets steps come to their end that were begun on top of one that failed; nothing of them is used.
    pub(super) fn give_up_flights(&mut self) {
        while let Some(mut flight) = self.flights.pop_front() {
            if flight.is_under_way() {
                // That it fails, too, says nothing of its rows.
                let _not_used = self.land(&mut flight);
            } else {
                // What is computed later of that is computed again, as of any step that fails.
                self.scheduler.count(&flight.shares);
            }
            self.spare.push(flight);
        }
        self.scheduler.running.iter_mut().for_each(|row| row.pending = None);
    }
}

impl Scheduled {
    /// In place of the index of a row that has left.
    const GONE: usize = usize::MAX;
}

impl Scheduler {
    /// Whether a row of a step that has begun is still there: it may have ended in the step before, or been cancelled.
    pub(super) fn is_there(&self, share: &Scheduled) -> bool {
        self.running.get(share.running_idx).is_some_and(|row| row.phase != Phase::Finished)
    }

    /// Counts what a step computes; what it does of rows that have left is of no use, and apart.
    fn count(&mut self, shares: &[Scheduled]) {
        for share in shares {
            if self.is_there(share) {
                let [recomputed, prefill, decode] = share.counts.map(|n| n as u64);
                self.stats.recomputed_tokens += recomputed;
                self.stats.prefill_tokens += prefill;
                self.stats.decode_tokens += decode;
            } else {
                self.stats.unused_tokens += share.n_tokens as u64;
            }
        }
    }

    /// Gives shares of a step that has begun the numbers that their rows have when all but live ones have left.
    pub(super) fn renumber(&self, shares: &mut [Scheduled]) {
        if shares.is_empty() {
            return;
        }
        let mut n_live = 0;
        let of_row = |row: &Sequence| {
            let is_live = row.phase == Phase::Live;
            n_live += usize::from(is_live);
            if is_live { n_live - 1 } else { Scheduled::GONE }
        };
        let new: Vec<usize> = self.running.iter().map(of_row).collect();
        for share in shares {
            share.running_idx = new.get(share.running_idx).copied().unwrap_or(Scheduled::GONE);
        }
    }
}
