//! Measures what the engine's steps do: a [`Runner`] around another. Invariant: adds two clock reads, a lock and some
//! additions per step (and where it is to count, a walk over the batch, of which it copies a few); results pass through untouched.

use super::tail::Series;
use super::tally::Tally;
use crate::device::AttentionSpec;
use crate::device::batch::{Batch, StepOutput};
use crate::model::{Runner, RunnerLimits};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Totals since the start, read by other threads while the engine runs.
#[derive(Debug, Default)]
pub struct Meter {
    prefill_ns: AtomicU64,
    decode_ns: AtomicU64,
    pace: Mutex<Pace>,
    /// What steps compute, where that is to be counted.
    tally: Option<Mutex<Tally>>,
}

/// Tokens over the time since the first step.
#[derive(Debug, Default)]
struct Pace {
    begin: Option<Instant>,
    series: Series,
}

/// A reading of a [`Meter`].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reading {
    /// Time in steps, shared out by tokens where a step mixes both (a prefill chunk of one token counts as decoding).
    pub prefill: Duration,
    /// Likewise.
    pub decode: Duration,
}

impl Meter {
    /// One that counts, too, what steps compute.
    pub(super) fn counting() -> Self {
        Self { tally: Some(Mutex::default()), ..Self::default() }
    }

    /// Whether it does.
    pub(super) fn counts(&self) -> bool {
        self.tally.is_some()
    }

    /// Told before the first step, where it counts: the layers of the model.
    pub(super) fn count_layers(&self, layers: &[AttentionSpec]) {
        self.with_tally(|tally| *tally = Tally::new(layers));
    }

    /// Of a run of so many seconds, the share of time in which tokens went slowly ([`Series::tail`]).
    pub(super) fn tail(&self, total: f64) -> f64 {
        self.pace().series.tail(total)
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it has counted; `None` if it does not.
    pub(super) fn take_tally(&self) -> Option<Tally> {
        let mut taken = None;
        self.with_tally(|tally| taken = Some(std::mem::take(tally)));
        taken
    }

    fn with_tally(&self, change: impl FnOnce(&mut Tally)) {
        if let Some(tally) = &self.tally {
            change(&mut tally.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Totals so far.
    pub fn read(&self) -> Reading {
        Reading {
            prefill: Duration::from_nanos(self.prefill_ns.load(Relaxed)),
            decode: Duration::from_nanos(self.decode_ns.load(Relaxed)),
        }
    }
}

/// A runner that counts.
pub struct MeteredRunner {
    inner: Box<dyn Runner>,
    meter: Arc<Meter>,
    /// When the steps began that are under way.
    began: VecDeque<Instant>,
    /// When the last one ended: one that began before that takes its time from then on.
    ended: Option<Instant>,
}

impl MeteredRunner {
    /// Wraps `inner`; totals go to `meter`.
    pub fn new(inner: Box<dyn Runner>, meter: Arc<Meter>) -> Self {
        Self { inner, meter, began: VecDeque::new(), ended: None }
    }
}

impl Runner for MeteredRunner {
    fn limits(&self) -> RunnerLimits {
        self.inner.limits()
    }

    fn start(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<bool> {
        let now = Instant::now();
        let has_begun = self.inner.start(batch, out)?;
        self.began.extend(has_begun.then_some(now));
        Ok(has_begun)
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<()> {
        let own = self.began.pop_front().unwrap_or_else(Instant::now);
        let start = self.ended.map_or(own, |ended| ended.max(own));
        self.inner.run(batch, out)?;
        let now = Instant::now();
        self.ended = Some(now);
        let took = now - start;
        let ns = took.as_nanos() as u64;
        let n_tokens = batch.tokens.len() as u64;
        let n_decode = batch.seqs.iter().filter(|s| s.n_tokens == 1).count() as u64;
        let decode_ns = (ns * n_decode).checked_div(n_tokens).unwrap_or(0);
        self.meter.prefill_ns.fetch_add(ns - decode_ns, Relaxed);
        self.meter.decode_ns.fetch_add(decode_ns, Relaxed);
        let mut pace = self.meter.pace();
        let from = (start - *pace.begin.get_or_insert(start)).as_secs_f64();
        pace.series.add(from, from + took.as_secs_f64(), n_tokens);
        drop(pace);
        self.meter.with_tally(|tally| tally.add(batch));
        Ok(())
    }
}
