//! What a job did: counts, tokens, time by phase. Written to `<output>.report.json` and shown on the terminal.
//! Invariant: every number was counted or measured in this run; what came from an earlier run of the same job is
//! counted apart.

use super::busy::Busy;
use crate::plan::estimate::Interval;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A job's report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Hash of everything the results depend on (`valar` refuses to mix two).
    pub job_fingerprint: String,
    /// Hash of everything the bits depend on.
    pub system_fingerprint: String,
    /// The model's name.
    pub model: String,
    /// Device and kernel version.
    pub device: String,
    /// Unix seconds of the job's start.
    pub created: u64,
    /// Hash of the inputs.
    #[serde(default)]
    pub inputs: String,
    /// Hash of the results' file, or of the list of their parts.
    #[serde(default)]
    pub results: String,
    /// The form of dataset rows: the columns that were added, with their types, and which of their own they keep.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// As `job_fingerprint`, of the settings of this run: a retry may have others than the job whose name it keeps.
    #[serde(default)]
    pub settings: String,
    /// What else has made lines of the results: the runs that a retry took them from, where those had another model or settings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<Maker>,
    /// Row counts.
    pub rows: RowCounts,
    /// Token counts.
    pub tokens: TokenCounts,
    /// Seconds by phase, of this run.
    pub seconds: Seconds,
    /// Rates, of this run.
    pub rates: Rates,
    /// Most memory the process held, in bytes.
    pub peak_memory_bytes: u64,
    /// Size of the KV cache, in tokens.
    pub kv_tokens: u64,
    /// What was expected of this run before it ran, and what it took; absent if it computed nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
    /// What its kernels would have taken alone, where that was asked for (`valar bench --busy`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy: Option<Busy>,
}

/// What lines of the results were made with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maker {
    /// As [`Report::settings`].
    pub settings: String,
    /// As [`Report::system_fingerprint`].
    pub system_fingerprint: String,
    /// The model's name.
    pub model: String,
    /// Device and kernel version.
    pub device: String,
}

/// What was expected of a run, as `valar plan` says it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Prompt tokens to compute.
    pub prefill_tokens: u64,
    /// Tokens to generate.
    pub output_tokens: Interval,
    /// Steps of the engine.
    pub steps: Interval,
    /// Most KV cache used at a time.
    pub kv_peak_tokens: Interval,
    /// Seconds of the engine's steps; `None` if the machine's speed was not known.
    pub seconds: Option<Interval>,
    /// What it took.
    pub actual: Actual,
}

/// What a run took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Actual {
    /// Prompt tokens computed.
    pub prefill_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Steps of the engine.
    pub steps: u64,
    /// Most KV cache used at a time, in whole blocks.
    pub kv_peak_tokens: u64,
    /// Seconds of the engine's steps.
    pub seconds: f64,
}

/// Row counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowCounts {
    /// All rows of the job.
    pub total: u64,
    /// Rows with a completion.
    pub completed: u64,
    /// Rows with an error.
    pub failed: u64,
    /// Errors by code, where this run saw them.
    pub errors: BTreeMap<String, u64>,
    /// Rows that an earlier run had finished.
    pub resumed: u64,
    /// Rows of this run that got an identical row's completion.
    pub deduplicated: u64,
    /// Rows that were errors in the finished job whose other rows were taken over (`valar retry`).
    #[serde(default)]
    pub retried: u64,
    /// Completions of this run that were in the cache: nothing was computed for them.
    #[serde(default)]
    pub reused: u64,
    /// Times in this run that a prompt was completed again, because its completion failed a check.
    #[serde(default)]
    pub further_attempts: u64,
}

/// Token counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenCounts {
    /// Prompt tokens of completed rows.
    pub prompt: u64,
    /// Generated tokens of completed rows.
    pub completion: u64,
    /// Prompt tokens of completed rows that the plan shares.
    pub cached: u64,
    /// Prompt tokens computed in this run.
    pub prefilled: u64,
    /// The fewest that any engine must prefill for the rows of this run: distinct nodes of the token trie.
    pub prefill_minimum: u64,
    /// `prefilled / prefill_minimum`.
    pub prefill_ratio: f64,
    /// Prompt tokens of this run that were found in the cache.
    pub cache_hits: u64,
    /// Tokens computed again after a preemption.
    pub recomputed: u64,
}

/// Seconds by phase. Reading and preparing go on beside the engine, so phases add up to more than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// From the first input byte to the last fsync of the results, without `load`.
    pub total: f64,
    /// Model fetched from disk, repacked, memory made.
    pub load: f64,
    /// Input read.
    pub read: f64,
    /// Rows parsed, rendered and tokenized.
    pub prepare: f64,
    /// Rows' ids and contents looked up among all earlier ones.
    #[serde(default)]
    pub index: f64,
    /// Windows ordered.
    #[serde(default)]
    pub plan: f64,
    /// Mean wait of a row in the engine's queue.
    pub queue: f64,
    /// Engine steps, shared out by tokens between prefill and decode.
    pub prefill: f64,
    /// Likewise.
    pub decode: f64,
    /// Outcomes written as output lines.
    #[serde(default)]
    pub answer: f64,
    /// Journal written and synced.
    #[serde(default)]
    pub journal: f64,
    /// Final files put together from the journal and synced.
    #[serde(default)]
    pub finalise: f64,
}

/// Rates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Prompt tokens computed per second of prefill.
    pub prefill_tokens_per_s: f64,
    /// Tokens computed one at a time (all but a row's first), per second of decode.
    pub decode_tokens_per_s: f64,
    /// Prompt and generated tokens of this run per second of `seconds.total`.
    pub total_tokens_per_s: f64,
    /// Share of `seconds.total` in which the engine ran steps.
    pub busy_share: f64,
    /// Share of `seconds.total` in which tokens were computed at under half their median rate, waiting included.
    #[serde(default)]
    pub tail_share: f64,
}

/// 0 where nothing was divided.
pub(super) fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

impl Report {
    /// What the results were made with, this run last.
    pub(super) fn makers(&self) -> Vec<Maker> {
        let settings = if self.settings.is_empty() { &self.job_fingerprint } else { &self.settings };
        let (settings, system_fingerprint) = (settings.clone(), self.system_fingerprint.clone());
        let own = Maker { settings, system_fingerprint, model: self.model.clone(), device: self.device.clone() };
        self.earlier.iter().cloned().chain([own]).collect()
    }

    /// The table shown at the end of a run.
    pub fn table(&self) -> String {
        let (rows, tokens, seconds, rates) = (&self.rows, &self.tokens, &self.seconds, &self.rates);
        let mut table = String::new();
        let mut line = |name: &str, value: String, note: String| {
            table.push_str(format!("{name:<18}{value:>10}  {note}").trim_end());
            table.push('\n');
        };
        line(
            "rows",
            rows.total.to_string(),
            format!("{} completed, {} failed{}", rows.completed, rows.failed, self.error_codes()),
        );
        if rows.resumed + rows.deduplicated > 0 {
            let note = format!("finished by an earlier run; {} identical to another row", rows.deduplicated);
            line("", rows.resumed.to_string(), note);
        }
        if rows.retried > 0 {
            line("", rows.retried.to_string(), "were errors and were run again".into());
            for maker in &self.earlier {
                line("", String::new(), format!("others are {}'s, on {}", maker.model, maker.device));
            }
        }
        if rows.further_attempts > 0 {
            line("", rows.further_attempts.to_string(), "attempts more, because a completion failed a check".into());
        }
        if rows.reused > 0 {
            line("", rows.reused.to_string(), "completions from the result cache, for which nothing was computed".into());
        }
        line("prompt tokens", tokens.prompt.to_string(), format!("{} shared by the plan", tokens.cached));
        line("generated tokens", tokens.completion.to_string(), String::new());
        let note = format!("{:.3} of the minimum; {} from the cache", tokens.prefill_ratio, tokens.cache_hits);
        line("prefilled tokens", tokens.prefilled.to_string(), note);
        if tokens.recomputed > 0 {
            line("recomputed tokens", tokens.recomputed.to_string(), "after preemptions".into());
        }
        line("prefill", format!("{:.2} s", seconds.prefill), format!("{:.0} tokens/s", rates.prefill_tokens_per_s));
        line("decode", format!("{:.2} s", seconds.decode), format!("{:.0} tokens/s", rates.decode_tokens_per_s));
        let note = format!(
            "read {:.2}, prepare {:.2}, index {:.2}, plan {:.2}, answer {:.2}, journal {:.2}, final files {:.2}, mean queue {:.2}",
            seconds.read,
            seconds.prepare,
            seconds.index,
            seconds.plan,
            seconds.answer,
            seconds.journal,
            seconds.finalise,
            seconds.queue
        );
        line("beside it", String::new(), note);
        let note = format!(
            "{:.0} tokens/s; computing {:.0} % of it; load {:.2} s apart",
            rates.total_tokens_per_s,
            100.0 * rates.busy_share,
            seconds.load
        );
        line("total", format!("{:.2} s", seconds.total), note);
        line("tail", format!("{:.1} %", 100.0 * rates.tail_share), "of it at under half the median rate of tokens".into());
        if let Some(Estimate { seconds: Some(expected), actual, .. }) = &self.estimate {
            let note =
                format!("computing took {:.1} s; {:.1} to {:.1} s were expected", actual.seconds, expected.low, expected.high);
            line("estimate", if expected.holds(actual.seconds) { "held" } else { "missed" }.into(), note);
        }
        line("peak memory", format!("{} MiB", self.peak_memory_bytes >> 20), format!("KV cache of {} tokens", self.kv_tokens));
        table.push_str(&self.busy.as_ref().map_or(String::new(), Busy::table));
        table
    }

    /// As it is written beside the results.
    pub(super) fn to_json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self).context("cannot write down the report")?;
        text.push('\n');
        Ok(text)
    }

    fn error_codes(&self) -> String {
        let codes: Vec<_> = self.rows.errors.iter().map(|(code, n)| format!("{n} {code}")).collect();
        if codes.is_empty() { String::new() } else { format!(" ({})", codes.join(", ")) }
    }
}

/// What a report, as it is written, is known by.
pub(super) fn content_hash(text: &[u8]) -> String {
    blake3::hash(text).to_hex().to_string()
}

/// The most memory this process has held, in bytes; 0 where the system does not tell.
pub(super) fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
