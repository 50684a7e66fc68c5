//! What a run comes to: its report, with what was expected of it beside what it took. Knows nothing of how the numbers
//! were counted.

use super::collect::Counts;
use super::estimate::{self, seconds};
use super::progress::say;
use super::report::{self, Actual, Estimate, Maker, Report};
use super::{Measured, Run, job};
use crate::device::BLOCK_TOKENS;
use crate::journal::Totals;
use anyhow::Result;

/// The report of a job that has finished now, `results` by their hash.
///
/// # Errors
/// The earlier report of a retried job can't be read.
pub(super) fn report(
    run: &Run<'_>,
    (n_rows, results): (u64, String),
    totals: Totals,
    counts: &Counts,
    measured: &Measured,
) -> Result<Report> {
    let (stats, meter, feed) = (&counts.stats, measured.meter.read(), measured.feed.read());
    let total = measured.start.elapsed().saturating_sub(measured.load).as_secs_f64();
    let seconds = report::Seconds {
        total,
        load: measured.load.as_secs_f64(),
        read: (measured.inspect + feed.read).as_secs_f64(),
        prepare: feed.prepare.as_secs_f64(),
        index: feed.index.as_secs_f64(),
        plan: feed.plan.as_secs_f64(),
        queue: report::ratio(counts.waiting_row_seconds, counts.submitted as f64),
        prefill: meter.prefill.as_secs_f64(),
        decode: meter.decode.as_secs_f64(),
        answer: counts.answer.as_secs_f64(),
        journal: counts.journal.as_secs_f64(),
        finalise: counts.finalise.as_secs_f64(),
    };
    let mut report = Report {
        job_fingerprint: run.manifest.job_fingerprint.clone(),
        system_fingerprint: run.manifest.model_fingerprint.clone(),
        model: measured.model.clone(),
        device: measured.device.clone(),
        created: run.manifest.created_unix_s,
        inputs: run.manifest.inputs_hash(),
        results,
        columns: run.columns.clone(),
        settings: run.settings.clone(),
        earlier: Vec::new(),
        rows: report::RowCounts {
            total: n_rows,
            completed: totals.n_ok,
            failed: totals.n_failed,
            errors: counts.errors.clone(),
            resumed: counts.resumed,
            deduplicated: counts.duplicates,
            retried: run.manifest.retries.unwrap_or(0),
            reused: counts.reused,
            further_attempts: counts.further_attempts,
        },
        tokens: report::TokenCounts {
            prompt: totals.prompt_tokens,
            completion: totals.completion_tokens,
            cached: totals.cached_tokens,
            prefilled: stats.prefill_tokens,
            prefill_minimum: counts.trie_tokens,
            prefill_ratio: report::ratio(stats.prefill_tokens as f64, counts.trie_tokens as f64),
            cache_hits: stats.shared_tokens,
            recomputed: stats.recomputed_tokens,
        },
        rates: rates(counts, measured, &seconds),
        peak_memory_bytes: report::peak_memory_bytes(),
        kv_tokens: measured.kv_tokens,
        estimate: estimate(counts, measured, &seconds),
        busy: None,
        seconds,
    };
    report.earlier = earlier_makers(run, &report)?;
    Ok(report)
}

fn rates(counts: &Counts, measured: &Measured, seconds: &report::Seconds) -> report::Rates {
    let stats = &counts.stats;
    let computed = (stats.prefill_tokens + stats.generated_tokens) as f64;
    report::Rates {
        prefill_tokens_per_s: report::ratio(stats.prefill_tokens as f64, seconds.prefill),
        decode_tokens_per_s: report::ratio(stats.decode_tokens as f64, seconds.decode),
        total_tokens_per_s: report::ratio(computed, seconds.total),
        busy_share: report::ratio(seconds.prefill + seconds.decode, seconds.total),
        tail_share: measured.meter.tail(seconds.total),
    }
}

/// What has made the lines that a retry took over.
fn earlier_makers(run: &Run<'_>, report: &Report) -> Result<Vec<Maker>> {
    let finished = if run.manifest.retries.is_some() { job::report(run.storage, run.files)? } else { None };
    // Killed just before the journal was removed, it is this run's.
    let own = report.makers();
    Ok(finished.map(|finished| finished.makers()).into_iter().flatten().filter(|maker| !own.contains(maker)).collect())
}

/// What was expected of this run; `None` if it ran nothing.
fn estimate(counts: &Counts, measured: &Measured, took: &report::Seconds) -> Option<Estimate> {
    let totals = measured.estimator.lock().expect("an estimator does not panic").totals();
    // What the cache knew was expected to be computed.
    (totals.n_computed > 0 && counts.reused == 0).then(|| Estimate {
        prefill_tokens: totals.prefill_tokens,
        output_tokens: totals.output_tokens,
        steps: totals.steps,
        kv_peak_tokens: totals.kv_peak_tokens,
        seconds: seconds(&totals, measured.history.speeds()),
        actual: Actual {
            prefill_tokens: counts.stats.prefill_tokens,
            output_tokens: counts.stats.generated_tokens,
            steps: counts.stats.steps,
            kv_peak_tokens: (counts.peak_blocks * BLOCK_TOKENS) as u64,
            seconds: took.prefill + took.decode,
        },
    })
}

/// Keeps the run's speed for later estimates. A cache that can't be written is no reason to fail a job.
pub(super) fn remember(mut measured: Measured, counts: &Counts) {
    let totals = measured.estimator.lock().expect("an estimator does not panic").totals();
    let (stats, meter) = (&counts.stats, measured.meter.read());
    if counts.reused > 0 {
        return;
    }
    let run = estimate::Run {
        prefill_tokens: stats.prefill_tokens,
        prefill_seconds: meter.prefill.as_secs_f64(),
        decode_tokens: stats.decode_tokens,
        decode_seconds: meter.decode.as_secs_f64(),
        output_tokens: stats.generated_tokens.saturating_sub(totals.fixed_tokens),
        max_tokens: totals.open_tokens,
    };
    if let Err(error) = measured.history.add(run) {
        say(&format!("warning: cannot keep this run's speed for later plans: {error:#}"));
    }
}
