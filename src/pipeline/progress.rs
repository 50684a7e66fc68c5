//! What a person sees while a job runs: a live line on a terminal, a plain line every few seconds elsewhere, nothing
//! when quiet. Knows nothing of how the numbers come about.

use crate::journal::Totals;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A reading of a running job.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Snapshot {
    /// Rows with an outcome.
    pub(super) done: u64,
    /// Of these, how many are known to be durable.
    pub(super) committed: u64,
    /// Rows that were read and planned, and have no outcome yet.
    pub(super) open: u64,
    /// Sequences that the engine computes at a time.
    pub(super) running: u64,
    /// All rows.
    pub(super) total: u64,
    /// Rows that failed.
    pub(super) failed: u64,
    /// Rows an earlier run had finished (they say nothing about speed).
    pub(super) resumed: u64,
    /// What the rows with an outcome come to, those of earlier runs too.
    pub(super) totals: Totals,
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
        /// How often one is due.
        every: Duration,
    },
}

impl Progress {
    /// The display that fits where standard error goes.
    pub(super) fn new(quiet: bool, every: Duration) -> Self {
        let now = Instant::now();
        if quiet {
            return Self::Quiet;
        }
        if is_json() || !std::io::stderr().is_terminal() {
            return Self::Lines { start: now, last: now, every };
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
            Self::Lines { start, last, every } => {
                if last.elapsed() >= *every {
                    *last = Instant::now();
                    snapshot.say(start.elapsed());
                }
            }
        }
    }

    /// Takes the live line away, or tells a program how it ended.
    pub(super) fn finish(&self, snapshot: Snapshot) {
        match self {
            Self::Live(bar, _) => bar.finish_and_clear(),
            Self::Lines { start, .. } if is_json() => snapshot.say(start.elapsed()),
            _ => {}
        }
    }
}

/// Whether lines are JSON objects.
static IS_JSON: AtomicBool = AtomicBool::new(false);

/// From now on, lines are JSON objects: `time`, `level`, `message`, and what else is known.
pub fn say_as_json() {
    IS_JSON.store(true, Relaxed);
}

/// Whether they are.
pub fn is_json() -> bool {
    IS_JSON.load(Relaxed)
}

/// One line for people, on standard error. A closed standard error is no reason to lose a job.
pub fn say(line: &str) {
    say_with(line, &Map::new());
}

/// One line, and what it is of.
pub fn say_with(line: &str, fields: &Map<String, Value>) {
    let text = if is_json() { json_line(line, fields) } else { text_line(line, fields) };
    let _closed = writeln!(std::io::stderr(), "{text}");
}

fn text_line(line: &str, fields: &Map<String, Value>) -> String {
    fields.iter().fold(line.to_owned(), |line, (name, value)| format!("{line} {name}={value}"))
}

fn json_line(line: &str, fields: &Map<String, Value>) -> String {
    let level = ["error", "warning"].into_iter().find(|level| line.starts_with(level)).unwrap_or("info");
    let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let mut object = json!({"time": time, "level": level, "message": line});
    fields.iter().for_each(|(name, value)| object[name] = value.clone());
    object.to_string()
}

impl Snapshot {
    fn say(&self, elapsed: Duration) {
        say_with(&self.line(elapsed), &if is_json() { self.fields() } else { Map::new() });
    }

    /// What a program is told.
    fn fields(&self) -> Map<String, Value> {
        let Self { done, committed, open, running, total, failed, resumed, prefill_tokens, decode_tokens, .. } = *self;
        let numbers = [
            ("rows", total),
            ("done", done),
            ("committed", committed),
            ("failed", failed),
            ("resumed", resumed),
            ("open", open),
            ("running", running),
            ("prefill_tokens", prefill_tokens),
            ("decode_tokens", decode_tokens),
        ];
        numbers.into_iter().map(|(name, number)| (name.to_owned(), number.into())).collect()
    }

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
    fn a_line_for_programs_is_one_object_whatever_it_says() {
        let Value::Object(fields) = json!({"request_id": "req_1", "status": 200}) else { unreachable!() };
        let text = json_line("error: \"two\nlines\"", &fields);
        assert!(!text.contains('\n'), "{text}");
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&line["level"], &line["message"]), (&json!("error"), &json!("error: \"two\nlines\"")));
        assert_eq!((&line["request_id"], &line["status"]), (&json!("req_1"), &json!(200)));
        assert!(chrono::DateTime::parse_from_rfc3339(line["time"].as_str().unwrap()).is_ok(), "{line}");
        assert_eq!(text_line("a", &fields), "a request_id=\"req_1\" status=200");
    }

    #[test]
    fn a_line_says_everything_even_when_nothing_is_known() {
        let line = Snapshot::default().line(Duration::ZERO);
        assert!(line.contains("0/0 rows") && line.contains("ETA ?"), "{line}");
        let snapshot = Snapshot { done: 30, total: 110, resumed: 10, cache_hits: 1, prefill_tokens: 3, ..Snapshot::default() };
        let line = snapshot.line(Duration::from_secs(10));
        assert!(line.contains("30/110 rows") && line.contains("ETA 0:40") && line.contains("prefix hits 25%"), "{line}");
    }
}
