//! What a person sees while a job runs: a live line on a terminal, a plain line every few seconds elsewhere, nothing
//! when quiet. Knows nothing of how the numbers come about.

use crate::config::PROGRESS_LINE_SECONDS;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// A reading of a running job.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Snapshot {
    /// Rows with an outcome.
    pub(super) done: u64,
    /// All rows.
    pub(super) total: u64,
    /// Rows that failed.
    pub(super) failed: u64,
    /// Rows an earlier run had finished (they say nothing about speed).
    pub(super) resumed: u64,
    /// Prompt tokens computed.
    pub(super) prefill_tokens: u64,
    /// Tokens generated.
    pub(super) decode_tokens: u64,
    /// Prompt tokens found in the cache.
    pub(super) cache_hits: u64,
    /// Share of the KV cache in use, 0 to 1.
    pub(super) kv_use: f64,
}

/// The display.
pub(super) enum Progress {
    /// Nothing is shown.
    Quiet,
    /// A live line.
    Live(ProgressBar, Instant),
    /// Whoever asked is told.
    Told(Box<dyn FnMut(Snapshot) + Send>),
    /// A line now and then.
    Lines {
        /// When the job started.
        start: Instant,
        /// When the last line was written.
        last: Instant,
    },
}

impl Progress {
    /// The display that fits where standard error goes.
    pub(super) fn new(quiet: bool) -> Self {
        let now = Instant::now();
        if quiet {
            return Self::Quiet;
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines { start: now, last: now };
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(5));
        let style = ProgressStyle::with_template("{bar:30} {msg}").expect("the template is a constant");
        bar.set_style(style);
        Self::Live(bar, now)
    }

    /// Shows a reading, if it is time to.
    pub(super) fn show(&mut self, snapshot: Snapshot) {
        match self {
            Self::Quiet => {}
            Self::Told(tell) => tell(snapshot),
            Self::Live(bar, start) => {
                bar.set_length(snapshot.total.max(1));
                bar.set_position(snapshot.done);
                bar.set_message(snapshot.line(start.elapsed()));
            }
            Self::Lines { start, last } => {
                if last.elapsed().as_secs_f64() >= PROGRESS_LINE_SECONDS {
                    *last = Instant::now();
                    say(&snapshot.line(start.elapsed()));
                }
            }
        }
    }

    /// Takes the live line away.
    pub(super) fn finish(&self) {
        if let Self::Live(bar, _) = self {
            bar.finish_and_clear();
        }
    }
}

/// One line for people, on standard error. A closed standard error is no reason to lose a job.
pub fn say(line: &str) {
    let _closed = writeln!(std::io::stderr(), "{line}");
}

impl Snapshot {
    fn line(&self, elapsed: Duration) -> String {
        let seconds = elapsed.as_secs_f64().max(1e-3);
        let here = self.done.saturating_sub(self.resumed);
        let eta =
            if here > 0 { clock(self.total.saturating_sub(self.done) as f64 * seconds / here as f64) } else { "?".to_owned() };
        let asked = self.cache_hits + self.prefill_tokens;
        let hit_rate = if asked > 0 { 100.0 * self.cache_hits as f64 / asked as f64 } else { 0.0 };
        format!(
            "{}/{} rows  prefill {:.0} tok/s  decode {:.0} tok/s  ETA {eta}  errors {}  prefix hits {hit_rate:.0}%  KV {:.0}%",
            self.done,
            self.total,
            self.prefill_tokens as f64 / seconds,
            self.decode_tokens as f64 / seconds,
            self.failed,
            100.0 * self.kv_use,
        )
    }
}

/// 75 -> "1:15", 3700 -> "1:01:40".
fn clock(seconds: f64) -> String {
    let s = seconds.round() as u64;
    if s >= 3600 { format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60) } else { format!("{}:{:02}", s / 60, s % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_everything_even_when_nothing_is_known() {
        let line = Snapshot::default().line(Duration::ZERO);
        assert!(line.contains("0/0 rows") && line.contains("ETA ?"), "{line}");
        let snapshot = Snapshot { done: 30, total: 110, resumed: 10, cache_hits: 1, prefill_tokens: 3, ..Snapshot::default() };
        let line = snapshot.line(Duration::from_secs(10));
        assert!(line.contains("30/110 rows") && line.contains("ETA 0:40") && line.contains("prefix hits 25%"), "{line}");
    }
}
