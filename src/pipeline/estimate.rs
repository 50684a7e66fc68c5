//! What a job is expected to take: feeds planned windows to the estimator, and knows how fast this machine has been. The
//! speeds of past runs are kept in the cache folder, by model, device and threads. Invariant: nothing here changes a
//! result; a lost or damaged history costs an estimate, never a job.

use super::report::ratio;
use super::window::PlannedWindow;
use crate::config::Config;
use crate::fingerprint::Fingerprint;
use crate::plan::common_prefix;
use crate::plan::estimate::{EstimateRow, Estimator, Interval, Setting, Totals};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

/// How far a measured speed may be off: other programs on the machine, rows of other lengths.
const MARGIN: f64 = 0.25;
/// Shortest completions that are expected where nothing is known, as a share of what rows allow.
const LOW_OUTPUT_SHARE: f64 = 0.1;
/// Runs that are remembered.
const MAX_RUNS: usize = 8;
/// A phase of a run that took less says nothing about speed, seconds.
const MIN_SECONDS: f64 = 0.25;

/// Reckons with planned windows.
pub(super) struct JobEstimator {
    estimator: Estimator,
    /// The last row: its prompt, and how much of it is kept for the next.
    last: Option<(Arc<[u32]>, u32)>,
}

impl JobEstimator {
    pub(super) fn new(setting: Setting) -> Self {
        Self { estimator: Estimator::new(setting), last: None }
    }

    /// The next window of the job; how many of its tokens the windows before have computed for it.
    pub(super) fn observe(&mut self, window: &PlannedWindow) -> u32 {
        // Within a window, a row's neighbour keeps just what they share.
        let first = window.submissions.first();
        let shared_with_last = first
            .zip(self.last.as_ref())
            .map(|(row, (prompt, kept))| common_prefix(prompt, &row.prompt).min(*kept).min(row.prompt.len() as u32 - 1));
        let from_before = shared_with_last.unwrap_or(0);
        let mut shared = from_before;
        for row in &window.submissions {
            let prompt_tokens = row.prompt.len() as u32;
            self.estimator.compute(EstimateRow {
                prompt_tokens,
                // The last prompt token is always computed.
                prefill_tokens: prompt_tokens - shared.min(prompt_tokens - 1),
                max_tokens: row.params.max_tokens,
                ignores_end: row.params.ignore_eos,
            });
            shared = row.keep_tokens;
        }
        if let Some(last) = window.submissions.last() {
            self.last = Some((Arc::clone(&last.prompt), last.keep_tokens));
        }
        let copies = window.groups.iter().flat_map(|group| &group.same);
        for row in copies.chain(window.followers.iter().map(|(_, row)| row)) {
            self.estimator.copy(row.prompts.iter().map(|prompt| prompt.n_tokens).sum());
        }
        from_before
    }

    pub(super) fn totals(&self) -> Totals {
        self.estimator.totals()
    }
}

/// How fast one run was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) prefill_tokens: u64,
    pub(super) prefill_seconds: f64,
    pub(super) decode_tokens: u64,
    pub(super) decode_seconds: f64,
    /// Tokens of completions that end tokens could have ended.
    pub(super) output_tokens: u64,
    /// What those rows allowed; 0 if the run says nothing about lengths.
    pub(super) max_tokens: u64,
}

/// The speeds of a model on this machine.
pub(super) struct History {
    file: PathBuf,
    runs: Vec<Run>, // the last ones
}

impl History {
    /// What is known of the job's model, device and threads.
    pub(super) fn of(config: &Config, fingerprint: &Fingerprint) -> Self {
        let name = format!("{fingerprint}-{}.json", config.n_threads);
        let file = config.cache.join("speeds").join(name);
        let runs = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { file, runs }
    }

    /// Remembers a run that took long enough to say something.
    ///
    /// # Errors
    /// The cache folder can't be written.
    pub(super) fn add(&mut self, run: Run) -> Result<()> {
        if run.prefill_seconds < MIN_SECONDS && run.decode_seconds < MIN_SECONDS {
            return Ok(());
        }
        self.runs.push(run);
        self.runs.drain(..self.runs.len().saturating_sub(MAX_RUNS));
        let folder = self.file.parent().context("the file is in a folder")?;
        std::fs::create_dir_all(folder)?;
        // Complete or not at all, whoever else writes it.
        let beside = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer(&beside, &self.runs)?;
        beside.persist(&self.file)?;
        Ok(())
    }

    /// Tokens per second of (prefill, decode); `None` until both were measured.
    pub(super) fn speeds(&self) -> Option<(Interval, Interval)> {
        let slowest_and_fastest = |rate: &dyn Fn(&Run) -> Option<f64>| {
            let rates: Vec<f64> = self.runs.iter().filter_map(rate).collect();
            let low = rates.iter().copied().reduce(f64::min)?;
            let high = rates.iter().copied().reduce(f64::max)?;
            Some(Interval { low: low * (1.0 - MARGIN), high: high * (1.0 + MARGIN) })
        };
        let of = |tokens: u64, seconds: f64| (seconds >= MIN_SECONDS).then(|| tokens as f64 / seconds);
        let prefill = slowest_and_fastest(&|run| of(run.prefill_tokens, run.prefill_seconds))?;
        let decode = slowest_and_fastest(&|run| of(run.decode_tokens, run.decode_seconds))?;
        Some((prefill, decode))
    }

    /// Completions' lengths as a share of what rows allow.
    pub(super) fn output_share(&self) -> Interval {
        let shares: Vec<f64> = self
            .runs
            .iter()
            .filter(|run| run.max_tokens > 0)
            .map(|run| ratio(run.output_tokens as f64, run.max_tokens as f64))
            .collect();
        match (shares.iter().copied().reduce(f64::min), shares.iter().copied().reduce(f64::max)) {
            (Some(low), Some(high)) => Interval { low: low * (1.0 - MARGIN), high: (high * (1.0 + MARGIN)).min(1.0) },
            _ => Interval { low: LOW_OUTPUT_SHARE, high: 1.0 },
        }
    }

    pub(super) fn n_runs(&self) -> usize {
        self.runs.len()
    }
}

/// Seconds of the engine's steps, if its speed is known.
pub(super) fn seconds(totals: &Totals, speeds: Option<(Interval, Interval)>) -> Option<Interval> {
    let (prefill, decode) = speeds?;
    let prefill_tokens = totals.prefill_tokens as f64;
    // A row's first token comes with its prefill.
    let decode_tokens = totals.output_tokens.map(|n| n - totals.n_computed as f64);
    Some(Interval { low: prefill_tokens, high: prefill_tokens }.at_rate(prefill).plus(decode_tokens.at_rate(decode)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(runs: Vec<Run>) -> History {
        History { file: PathBuf::from("/nowhere/speeds.json"), runs }
    }

    #[test]
    fn nothing_known_is_no_speed_and_a_wide_share() {
        let none = history(vec![]);
        assert!(none.speeds().is_none());
        assert_eq!((none.output_share().low, none.output_share().high), (0.1, 1.0));
    }

    #[test]
    fn the_slowest_and_the_fastest_run_are_the_bounds() {
        let run = |seconds: f64, output_tokens| Run {
            prefill_tokens: 1000,
            prefill_seconds: seconds,
            decode_tokens: 100,
            decode_seconds: seconds,
            output_tokens,
            max_tokens: 100,
        };
        let (prefill, decode) = history(vec![run(1.0, 20), run(2.0, 40), run(0.01, 40)]).speeds().unwrap();
        assert_eq!((prefill.low, prefill.high), (375.0, 1250.0), "runs of a hundredth of a second don't count");
        assert_eq!((decode.low, decode.high), (37.5, 125.0));
        let share = history(vec![run(1.0, 20), run(2.0, 40)]).output_share();
        assert!((share.low - 0.15).abs() < 1e-9 && (share.high - 0.5).abs() < 1e-9, "{share:?}");
    }
}
