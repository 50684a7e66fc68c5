//! Measures what the engine's steps do: a [`Runner`] around another. Invariant: adds two clock reads per step and nothing
//! else; results pass through untouched.

use crate::device::batch::{Batch, StepOutput};
use crate::model::{Runner, RunnerLimits};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Totals since the start, read by other threads while the engine runs.
#[derive(Debug, Default)]
pub struct Meter {
    prefill_ns: AtomicU64,
    decode_ns: AtomicU64,
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
    /// When the step began that is under way.
    began: Option<Instant>,
}

impl MeteredRunner {
    /// Wraps `inner`; totals go to `meter`.
    pub fn new(inner: Box<dyn Runner>, meter: Arc<Meter>) -> Self {
        Self { inner, meter, began: None }
    }
}

impl Runner for MeteredRunner {
    fn limits(&self) -> RunnerLimits {
        self.inner.limits()
    }

    fn start(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<bool> {
        let now = Instant::now();
        let has_begun = self.inner.start(batch, out)?;
        self.began = has_begun.then_some(now);
        Ok(has_begun)
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> anyhow::Result<()> {
        let start = self.began.take().unwrap_or_else(Instant::now);
        self.inner.run(batch, out)?;
        let ns = start.elapsed().as_nanos() as u64;
        let n_tokens = batch.tokens.len() as u64;
        let n_decode = batch.seqs.iter().filter(|s| s.n_tokens == 1).count() as u64;
        let decode_ns = (ns * n_decode).checked_div(n_tokens).unwrap_or(0);
        self.meter.prefill_ns.fetch_add(ns - decode_ns, Relaxed);
        self.meter.decode_ns.fetch_add(decode_ns, Relaxed);
        Ok(())
    }
}
