//! A job's steps in counted time: how long the scheduler's steps would take on a machine that is bound by reading the weights
//! while a step is small, and by computing its tokens when it is not. Knows no clock: the same rows take the same time.

use crate::device::batch::{Batch, StepOutput};
use crate::engine::{Engine, EngineConfig, Submission, TokenTable};
use crate::model::{Runner, RunnerLimits};
use crate::pipeline::null::NullRunner;
use anyhow::Result;
use std::sync::{Arc, Mutex, PoisonError};

/// Reading the weights takes as long as computing so many tokens: a weight of 1.1 bytes is two operations for each token, of
/// which a CPU with dot products of 8 bits does some 40 while it reads a byte from memory.
const LEAST_TOKENS: u32 = 24;

/// What a run came to. The unit of time is that of a token in a step that is large enough.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Counted {
    pub(super) time: f64,
    /// Share of the time in which tokens went at under half their median rate.
    pub(super) tail: f64,
}

/// A machine's memory, and how large its steps may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) kv_tokens: usize,
    pub(super) budget_tokens: usize,
    pub(super) max_running: usize,
}

/// Notes how many tokens each step has.
struct Noting {
    runner: NullRunner,
    steps: Arc<Mutex<Vec<u32>>>,
}

impl Runner for Noting {
    fn limits(&self) -> RunnerLimits {
        self.runner.limits()
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<()> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).push(batch.tokens.len() as u32);
        self.runner.run(batch, out)
    }
}

/// Tokens that a row is counted with at most: one that may go on to the end of the context hardly does.
const MAX_TOKENS: u32 = 256;

/// Tokens that a row gets.
fn n_drawn(row: &Submission) -> u32 {
    row.params.max_tokens.min(MAX_TOKENS)
}

/// Tokens that there must be memory for when a row ends.
pub(super) fn n_held(row: &Submission) -> usize {
    row.prompt.len() + n_drawn(row) as usize
}

/// Runs rows in their order, each to as many tokens as it may have, or [`MAX_TOKENS`].
///
/// # Errors
/// The engine's.
pub(super) fn run(rows: &[Submission], size: Size, n_vocab: usize, tokens: &Arc<dyn TokenTable>) -> Result<Counted> {
    let max_context = rows.iter().map(n_held).max().unwrap_or(1);
    let runner = NullRunner::new(n_vocab, max_context, size.max_running, None).with_kv_tokens(size.kv_tokens);
    let config = EngineConfig { budget_tokens: size.budget_tokens, ..EngineConfig::for_runner(&runner.limits()) };
    let steps = Arc::default();
    let runner = Noting { runner, steps: Arc::clone(&steps) };
    let mut engine = Engine::new(config, Box::new(runner), Arc::clone(tokens))?;
    let to_the_end = rows.iter().cloned().map(|mut row| {
        (row.params.ignore_eos, row.params.max_tokens) = (true, n_drawn(&row));
        row
    });
    run_through(&mut engine, to_the_end)?;
    let steps = steps.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(counted(&steps))
}

/// Submits rows in their order, as the engine takes them, and runs it until all have finished.
///
/// # Errors
/// The engine's.
pub(super) fn run_through(engine: &mut Engine, rows: impl IntoIterator<Item = Submission>) -> Result<()> {
    let mut finished = Vec::new();
    for mut row in rows {
        while let Err(refused) = engine.submit(row) {
            row = refused;
            engine.step(&mut finished)?;
            finished.clear();
        }
    }
    while engine.has_work() {
        engine.step(&mut finished)?;
        finished.clear();
    }
    Ok(())
}

fn counted(steps: &[u32]) -> Counted {
    let mut steps: Vec<(f64, f64)> = steps
        .iter()
        .map(|&n_tokens| {
            let time = f64::from(n_tokens.max(LEAST_TOKENS));
            (f64::from(n_tokens) / time, time)
        })
        .collect();
    steps.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let time: f64 = steps.iter().map(|(_, time)| time).sum();
    let mut passed = 0.0;
    let median = steps.iter().find(|(_, step)| {
        passed += step;
        passed >= time / 2.0
    });
    let median = median.map_or(0.0, |(rate, _)| *rate);
    let slow: f64 = steps.iter().filter(|(rate, _)| *rate < median / 2.0).map(|(_, time)| time).sum();
    Counted { time, tail: if time > 0.0 { slow / time } else { 0.0 } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_time_of_steps_that_are_nearly_empty() {
        // 10 steps of 100 tokens, then 5 that take as long as 24 each and have 6, then 1 of half a rate.
        let mut steps = vec![100; 10];
        steps.extend([6; 5]);
        steps.push(12);
        let Counted { time, tail } = counted(&steps);
        assert!((time - (1000.0 + 6.0 * 24.0)).abs() < 1e-9, "{time}");
        assert!((tail - 5.0 * 24.0 / time).abs() < 1e-9, "{tail}");
        assert_eq!(counted(&[]), Counted { time: 0.0, tail: 0.0 });
    }
}
