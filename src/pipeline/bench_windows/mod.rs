//! `valar bench windows`: what the order of windows is worth. A day of calls, with bursts beyond what the machine can do, and
//! of batches with mixed deadlines, through the engine and its scheduler, on a machine that only takes time; and the same in
//! the order of arrival. Invariant: nothing here is measured by a wall clock, so every run says the same.

pub mod load;
mod machine;
mod plot;
pub mod run;

use crate::window::Class;
use anyhow::{Context, Result, ensure};
use load::{Load, read_trace};
use run::{Order, Outcome};
use serde::Serialize;
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

/// Runs both orders and prints a table, or one JSON object.
///
/// # Errors
/// The trace can't be read, or the picture not written.
pub fn show(trace: &Path, hours: u32, svg: Option<&Path>, json: bool) -> Result<()> {
    ensure!(hours > 0, "--hours: must be at least 1");
    let trace = read_trace(trace)?;
    let capacity = run::capacity(&trace)?;
    let load = Load::new(&trace, capacity, hours);
    let windows = run::run(&load, Order::Windows)?;
    let arrival = run::run(&load, Order::Arrival)?;
    if let Some(path) = svg {
        let picture = plot::draw(&load, [&windows, &arrival]);
        std::fs::write(path, picture).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let summaries = [Summary::of(&load, &windows), Summary::of(&load, &arrival)];
    let text = if json {
        let [windows, arrival] = &summaries;
        json!({"hours": hours, "capacity_per_s": capacity, "windows": windows, "arrival": arrival}).to_string() + "\n"
    } else {
        table(&load, capacity, hours, &summaries)
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}

/// Times of a class's calls, in seconds.
#[derive(Debug, Serialize)]
struct Turns {
    mean: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

/// An outcome in numbers.
#[derive(Debug, Serialize)]
struct Summary {
    asap: Turns,
    /// To the ends of their first steps.
    asap_begins: Turns,
    standard: Turns,
    /// Of all batches, those that ended after they were due.
    batches_late: usize,
    /// Pairs of them that ended in another order than they were due.
    batches_inverted: usize,
    /// The least share of tokens in five minutes in which it waited all the time; none if there were none.
    least_standard_share: Option<f64>,
    least_batch_share: Option<f64>,
    preemptions: u64,
    /// Tokens computed again, of all computed.
    recomputed: f64,
    busy: f64,
}

impl Turns {
    fn of(turns: &[f64]) -> Self {
        let at = |part: f64| turns.get((turns.len() as f64 * part) as usize).or(turns.last()).copied().unwrap_or_default();
        let mean = turns.iter().sum::<f64>() / turns.len().max(1) as f64;
        Self { mean, p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl Summary {
    fn of(load: &Load, outcome: &Outcome) -> Self {
        let stats = &outcome.stats;
        Self {
            asap: Turns::of(&outcome.turns_s(load, Class::Asap)),
            asap_begins: Turns::of(&outcome.begins_s(load, Class::Asap)),
            standard: Turns::of(&outcome.turns_s(load, Class::Standard)),
            batches_late: outcome.n_late(load),
            batches_inverted: outcome.n_inversions(load),
            least_standard_share: outcome.least_share(Class::Standard),
            least_batch_share: outcome.least_share(Class::Batch),
            preemptions: stats.preemptions,
            recomputed: stats.recomputed_tokens as f64 / stats.computed_tokens().max(1) as f64,
            busy: outcome.busy,
        }
    }
}

/// Turns of one kind.
type Part = fn(&Summary) -> &Turns;

fn table(load: &Load, capacity: f64, hours: u32, [windows, arrival]: &[Summary; 2]) -> String {
    let n_calls = load.rows.iter().filter(|row| row.batch.is_none()).count();
    let mut out = String::new();
    let mut line = |name: &str, of: &dyn Fn(&Summary) -> String| {
        writeln!(out, "{name:<34}{:>12}{:>12}", of(windows), of(arrival)).expect("memory takes text");
    };
    let seconds = |value: f64| format!("{value:.1} s");
    let percent = |value: f64| format!("{:.1} %", 100.0 * value);
    let share = |value: Option<f64>| value.map_or("-".into(), percent);
    let parts: [(&str, Part); 3] =
        [("asap to its first step", |s| &s.asap_begins), ("asap turn", |s| &s.asap), ("standard turn", |s| &s.standard)];
    for (name, of) in parts {
        line(&format!("{name}, mean"), &|s| seconds(of(s).mean));
        line(&format!("{name}, p50"), &|s| seconds(of(s).p50));
        line(&format!("{name}, p99"), &|s| seconds(of(s).p99));
        line(&format!("{name}, longest"), &|s| seconds(of(s).max));
    }
    line(&format!("batches late, of {}", load.batches.len()), &|s| s.batches_late.to_string());
    line("pairs not in order of deadlines", &|s| s.batches_inverted.to_string());
    line("standard's least share", &|s| share(s.least_standard_share));
    line("batches' least share", &|s| share(s.least_batch_share));
    line("preemptions", &|s| s.preemptions.to_string());
    line("computed again", &|s| percent(s.recomputed));
    line("machine busy", &|s| percent(s.busy));
    let head = format!("{n_calls} calls and {} batches in {hours} h; capacity {capacity:.2} requests/s", load.batches.len());
    format!("{head}\n{:<34}{:>12}{:>12}\n{out}", "", "windows", "arrival")
}
