//! `valar plan`: reads a job's input as a run would and runs nothing; says what the run would take. Invariant: memory is
//! that of a window, whatever the size of the input.

use super::columns::ResultColumns;
use super::estimate::{History, JobEstimator, seconds};
use super::index::JobIndex;
use super::job::{self, Inputs, JobFiles};
use super::load::{self, MemoryPlan, OpenModel};
use super::rows::{FeedTimes, WindowReader};
use super::spec::PriceSpec;
use super::window::{PlannedWindow, plan_window};
use super::{calibrate, needed_columns, preparer, steps, window_reader};
use crate::config::Config;
use crate::fingerprint::Fingerprint;
use crate::format::{Columns, Source};
use crate::grammar::Grammars;
use crate::outcome::RowError;
use crate::plan::estimate::{Interval, Totals};
use crate::prepare::RowForm;
use crate::storage::Storage;
use crate::text::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Instant;

/// Invalid rows that are shown.
const SHOWN_ERRORS: usize = 10;

/// What a job would take.
#[derive(Debug, Serialize)]
struct Explanation {
    model: String,
    device: String,
    inputs: Vec<InputFile>,
    rows: Rows,
    /// Steps whose prompts are made of others' answers: nothing is known of them, and they are counted nowhere here.
    later_steps: usize,
    prompt_tokens: PromptTokens,
    sharing: Sharing,
    kv: Kv,
    /// Tokens to generate.
    output_tokens: Interval,
    /// Steps of the engine.
    steps: Interval,
    /// Tokens per second; `None` where this machine was never measured.
    speed: Option<Speed>,
    /// Of the engine's steps.
    seconds: Option<Interval>,
    /// In the currency of the prices.
    price: Price,
    /// What reading and planning took.
    planning_seconds: f64,
}

#[derive(Debug, Serialize)]
struct InputFile {
    file: String,
    bytes: u64,
    rows: u64,
}

#[derive(Debug, Default, Serialize)]
struct Rows {
    total: u64,
    valid: u64,
    invalid: u64,
    /// By code.
    errors: BTreeMap<String, u64>,
    first_invalid: Vec<InvalidRow>,
    /// Rows that get another row's completion.
    duplicates: u64,
}

#[derive(Debug, Serialize)]
struct InvalidRow {
    file: String,
    line: u64,
    code: &'static str,
    message: String,
}

#[derive(Debug, Serialize)]
struct PromptTokens {
    total: u64,
    p50: u32,
    p95: u32,
    p99: u32,
    max: u32,
}

#[expect(clippy::struct_field_names, reason = "the unit stands in every name")]
#[derive(Debug, Serialize)]
struct Sharing {
    /// Distinct nodes of the windows' prefix trees.
    tree_tokens: u64,
    /// Prompt tokens that the run computes.
    prefill_tokens: u64,
    /// Prompt tokens that it need not compute.
    saved_tokens: u64,
}

#[derive(Debug, Serialize)]
struct Kv {
    peak_tokens: Interval,
    peak_bytes: Interval,
    available_tokens: u64,
    available_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Speed {
    prefill: Interval,
    decode: Interval,
    /// Runs and calibrations that it comes from.
    measurements: usize,
}

#[derive(Debug, Default, Serialize)]
struct Price {
    /// By tokens, every row counted.
    tokens: Option<Interval>,
    /// By the machine's hours.
    machine: Option<Interval>,
}

/// Prints what a job would take, as a table or as one JSON object. `calibrate` measures the machine first.
///
/// # Errors
/// As a job's before its work begins.
pub fn show(config: &Config, calibrate: bool, json: bool) -> Result<()> {
    let explanation = explain(config, calibrate)?;
    let text = if json {
        serde_json::to_string(&explanation).context("cannot write down the plan")? + "\n"
    } else {
        explanation.table()
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}

/// A job's input and what it is read with; nothing of a job under way is touched.
pub(super) struct Reading {
    pub(super) inputs: Inputs,
    pub(super) reader: WindowReader,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) model: String,
    fingerprint: Fingerprint,
    memory: MemoryPlan,
    /// Steps whose prompts are made of others' answers.
    later_steps: usize,
}

/// Opens a job's input as a run would.
///
/// # Errors
/// As a job's before its work begins.
pub(super) fn open_input(config: &Config) -> Result<Reading> {
    let storage = Storage::new()?;
    let files = JobFiles::new(&storage, &config.spec.output)?;
    let inputs = job::inspect_inputs(&storage, &config.spec, &files)?;
    let form = steps::read(config, &storage)?;
    let result_columns = ResultColumns::of(&form.rows, &config.spec.output.prefix);
    job::result_schema(&storage, config, &inputs, &result_columns)?;
    let open = load::open(&config.model())?;
    let grammars = Grammars::new(Arc::clone(&open.tokenizer));
    steps::check_formats(&form.rows, &grammars)?;
    let later_steps = n_later_steps(&form.rows);
    let OpenModel { local, tokenizer, template, fingerprint, memory, .. } = open;
    let model = local.name.clone();
    let index = Arc::new(JobIndex::new(&std::env::temp_dir())?);
    let model_parts = (local, Arc::clone(&tokenizer), template);
    let preparer = Arc::new(preparer(config, form.rows, grammars, &result_columns, model_parts, memory));
    // A plan writes no rows: it needs what the prompts are made of, and columns that a run would refuse.
    let read = needed_columns(&preparer.form, &form.policies, Some(&preparer.result_columns));
    let columns = Columns { told: needed_columns(&preparer.form, &form.policies, Some(&[])), read };
    let source = Source::open(&storage, &inputs.files, inputs.limits)?.with_columns(columns);
    let reader = window_reader(config, (source, inputs.n_rows), (preparer, index), Arc::new(FeedTimes::default()));
    Ok(Reading { inputs, reader, tokenizer, model, fingerprint, memory, later_steps })
}

fn explain(config: &Config, calibrate: bool) -> Result<Explanation> {
    let start = Instant::now();
    let Reading { inputs, mut reader, model, fingerprint, memory, later_steps, .. } = open_input(config)?;
    let mut history = History::of(config, &fingerprint);
    let mut estimator = JobEstimator::new(memory.setting(config, history.output_share()));
    let (mut rows, mut tree_tokens, mut next_id) = (Rows::default(), 0, 0);
    while let Some(window) = reader.read()? {
        let window = plan_window(reader.prepare(window)?, &reader.settings, &mut next_id, |_| false);
        let _from_before = estimator.observe(&window);
        tree_tokens += window.trie_tokens;
        rows.count(window);
    }
    rows.total = reader.n_rows();
    let planning_seconds = start.elapsed().as_secs_f64();
    let totals = estimator.totals();
    rows.valid = totals.n_rows;
    if calibrate && totals.n_computed > 0 {
        let open = load::open(&config.model())?;
        history.add(calibrate::measure(open, config, &totals)?).context("cannot keep the measured speed")?;
    }
    let speeds = history.speeds();
    let seconds = seconds(&totals, speeds);
    let bytes = |tokens: f64| tokens * memory.kv_token_bytes as f64;
    Ok(Explanation {
        model,
        device: fingerprint.device,
        inputs: inputs.described.iter().map(|i| InputFile { file: i.url.clone(), bytes: i.n_bytes, rows: i.n_rows }).collect(),
        rows,
        later_steps,
        prompt_tokens: prompt_tokens(&totals),
        sharing: Sharing {
            tree_tokens,
            prefill_tokens: totals.prefill_tokens,
            saved_tokens: totals.prompt_tokens - totals.prefill_tokens,
        },
        kv: Kv {
            peak_tokens: totals.kv_peak_tokens,
            peak_bytes: totals.kv_peak_tokens.map(bytes),
            available_tokens: memory.kv_tokens(),
            available_bytes: bytes(memory.kv_tokens() as f64) as u64,
        },
        output_tokens: totals.output_tokens,
        steps: totals.steps,
        speed: speeds.map(|(prefill, decode)| Speed { prefill, decode, measurements: history.n_runs() }),
        seconds,
        price: Price::of(&config.spec.prices, &totals, seconds),
        planning_seconds,
    })
}

/// Steps whose prompts are made of others' answers.
fn n_later_steps(form: &RowForm) -> usize {
    match form {
        RowForm::Requests => 0,
        RowForm::Dataset(steps) => steps.iter().filter(|step| !step.needs.is_empty()).count(),
    }
}

/// How long the prompts are.
fn prompt_tokens(totals: &Totals) -> PromptTokens {
    let [p50, p95, p99, max] = totals.quantiles;
    PromptTokens { total: totals.prompt_tokens, p50, p95, p99, max }
}

impl Rows {
    fn count(&mut self, window: PlannedWindow) {
        self.duplicates += window.n_duplicates;
        for (row, error) in window.failed {
            self.invalid += 1;
            *self.errors.entry(error.code.as_str().to_owned()).or_default() += 1;
            if self.first_invalid.len() < SHOWN_ERRORS {
                let RowError { code, message, .. } = error;
                self.first_invalid.push(InvalidRow { file: row.file.to_string(), line: row.line, code: code.as_str(), message });
            }
        }
    }
}

impl Price {
    fn of(prices: &PriceSpec, totals: &Totals, seconds: Option<Interval>) -> Self {
        // Who sells by tokens sells the copies too; they are as long as the rows they are copies of.
        let copies = super::report::ratio(totals.n_rows as f64, totals.n_computed as f64);
        let per_token = |price: Option<f64>| price.unwrap_or(0.0) / 1e6;
        let tokens = (prices.input.is_some() || prices.output.is_some()).then(|| {
            totals
                .output_tokens
                .map(|n| n * copies * per_token(prices.output) + totals.prompt_tokens as f64 * per_token(prices.input))
        });
        let machine = prices.hour.and_then(|price| Some(seconds?.map(|seconds| seconds / 3600.0 * price)));
        Self { tokens, machine }
    }
}

impl Explanation {
    fn table(&self) -> String {
        let mut table = format!("{} on {}\n", self.model, self.device);
        let mut line = |name: &str, value: String, note: &str| {
            let _memory_takes_it = writeln!(table, "{}", format!("{name:<18}{value:>16}  {note}").trim_end());
        };
        let (rows, tokens, sharing) = (&self.rows, &self.prompt_tokens, &self.sharing);
        line(
            "rows",
            rows.total.to_string(),
            &format!("{} to compute, {} identical to another row", rows.valid - rows.duplicates, rows.duplicates),
        );
        let codes: Vec<_> = rows.errors.iter().map(|(code, n)| format!("{n} {code}")).collect();
        line("invalid rows", rows.invalid.to_string(), &codes.join(", "));
        for row in &rows.first_invalid {
            line("", String::new(), &format!("{}:{}: {}", row.file, row.line, row.message));
        }
        line(
            "prompt tokens",
            tokens.total.to_string(),
            &format!("a row: p50 {}, p95 {}, p99 {}, max {}", tokens.p50, tokens.p95, tokens.p99, tokens.max),
        );
        if self.later_steps > 0 {
            line("later steps", self.later_steps.to_string(), "use others' answers: not known yet, not counted here");
        }
        let share = 100.0 * super::report::ratio(sharing.saved_tokens as f64, tokens.total as f64);
        line(
            "to prefill",
            sharing.prefill_tokens.to_string(),
            &format!("{} saved by sharing ({share:.0} %); prefix tree of {}", sharing.saved_tokens, sharing.tree_tokens),
        );
        line("to generate", span(self.output_tokens, 0), "tokens");
        line("steps", span(self.steps, 0), "");
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        let note = format!(
            "tokens; {} MiB of {:.0} MiB ({} tokens)",
            span(self.kv.peak_bytes.map(mib), 0),
            mib(self.kv.available_bytes as f64),
            self.kv.available_tokens
        );
        line("KV cache peak", span(self.kv.peak_tokens, 0), &note);
        match (&self.speed, self.seconds) {
            (Some(speed), Some(seconds)) => {
                let note = format!(
                    "tokens/s: prefill {}, decode {} ({} measured)",
                    span(speed.prefill, 0),
                    span(speed.decode, 0),
                    speed.measurements
                );
                line("time", format!("{} s", span(seconds, 1)), &note);
            }
            _ => line("time", "unknown".into(), "this machine was not measured yet; --calibrate takes a few seconds"),
        }
        if let Some(price) = self.price.tokens {
            line("price of tokens", span(price, 2), "");
        }
        if let Some(price) = self.price.machine {
            line("price of hours", span(price, 2), "");
        }
        table
    }
}

/// "3" or "3 to 5".
fn span(interval: Interval, decimals: usize) -> String {
    let [low, high] = [interval.low, interval.high].map(|bound| format!("{bound:.decimals$}"));
    if low == high { low } else { format!("{low} to {high}") }
}
