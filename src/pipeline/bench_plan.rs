//! `valar bench plan`: what the order of a job is worth. Plans a workload's rows as a job would and runs them through the
//! engine's scheduler with no model behind it and with KV memory for a part of the job only. Invariant: what it counts is
//! what a job with that memory would compute.

mod counted;

use super::explain::{Reading, open_input};
use super::null::NullRunner;
use super::spec;
use super::window::plan_window;
use crate::config::Config;
use crate::engine::{Engine, EngineConfig, EngineStats, Submission, TokenTable};
use crate::model::Runner;
use crate::plan::common_prefix;
use crate::text::tokenizer::Tokenizer;
use anyhow::{Context, Result, ensure};
use counted::{Counted, Size};
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use toml::Value;

/// What is measured.
pub struct PlanBench {
    config: Config,
    /// KV memory as a share of the tokens that all rows hold at their ends.
    kv_share: f64,
    /// Where the prompts' token ids go, one JSON array a line, so that others can count what they share.
    prompts: Option<PathBuf>,
}

/// What the order came to, in tokens unless it says otherwise.
#[derive(Debug, Serialize)]
struct Outcome {
    model: String,
    /// Sequences run.
    sequences: usize,
    prompt_tokens: u64,
    /// Distinct nodes of the windows' prefix trees: what any engine must compute.
    minimum: u64,
    /// Computed, whatever was computed again included.
    prefilled: u64,
    prefilled_by_minimum: f64,
    /// Computed again after preemptions.
    recomputed: u64,
    /// Rows that lost their memory for others.
    preemptions: u64,
    steps: u64,
    kv_tokens: usize,
    /// Share of the counted time in which tokens went at under half their median rate.
    tail: f64,
    /// Counted time of all files as one job by the sum of their times one after the other, in the same memory; of one file
    /// there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    time_by_parts: Option<f64>,
}

/// A workload's rows in the order in which they would run.
struct Planned {
    rows: Vec<Submission>,
    /// Distinct nodes of the windows' prefix trees.
    minimum: u64,
    tokenizer: Arc<Tokenizer>,
    model: String,
}

impl PlanBench {
    /// Of the workload that `overrides` (pipeline keys) describe.
    ///
    /// # Errors
    /// Settings that make no sense.
    pub fn new(mut overrides: Vec<(String, Value)>, kv_share: f64, prompts: Option<PathBuf>) -> Result<Self> {
        ensure!(kv_share > 0.0 && kv_share <= 1.0, "--kv-share: {kv_share} is not between 0 and 1");
        overrides.push(("engine.kind".into(), Value::String("null".into())));
        overrides.push(("output.file".into(), Value::String(std::env::temp_dir().join("out.jsonl").display().to_string())));
        Ok(Self { config: Config::new(spec::load(None, &overrides)?, false, true)?, kv_share, prompts })
    }

    /// Plans, runs and prints a table, or one JSON object.
    ///
    /// # Errors
    /// As a job's before its work begins; a row that is no valid request.
    pub fn run(&self, json: bool) -> Result<()> {
        let Planned { rows, minimum, tokenizer, model } = read(&self.config)?;
        if let Some(path) = &self.prompts {
            write_prompts(path, &rows).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let (sequences, prompt_tokens) = (rows.len(), rows.iter().map(|row| row.prompt.len() as u64).sum());
        let kv_tokens = self.kv_tokens(&rows);
        let counted_kv = self.share(rows.iter().map(counted::n_held).sum());
        let counted = self.counted(&rows, counted_kv, &tokenizer)?;
        let time_by_parts = self.parts_time(counted_kv)?.map(|parts| super::report::ratio(counted.time, parts));
        let stats = self.engine_counts(rows, kv_tokens, &tokenizer)?;
        let prefilled = stats.prefill_tokens + stats.recomputed_tokens;
        let outcome = Outcome {
            model,
            sequences,
            prompt_tokens,
            minimum,
            prefilled,
            prefilled_by_minimum: super::report::ratio(prefilled as f64, minimum as f64),
            recomputed: stats.recomputed_tokens,
            preemptions: stats.preemptions,
            steps: stats.steps,
            kv_tokens,
            tail: counted.tail,
            time_by_parts,
        };
        let text = if json {
            serde_json::to_string(&outcome).context("cannot write down the outcome")? + "\n"
        } else {
            outcome.table(self.kv_share)
        };
        std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
    }

    /// Tokens that there is memory for.
    fn kv_tokens(&self, rows: &[Submission]) -> usize {
        // With no model behind it a row gets a token and an end, unless it must go on.
        let n_held = |row: &Submission| row.prompt.len() + if row.params.ignore_eos { row.params.max_tokens as usize } else { 1 };
        self.share(rows.iter().map(n_held).sum())
    }

    /// The share of so many tokens that there is memory for.
    fn share(&self, n_tokens: usize) -> usize {
        (n_tokens as f64 * self.kv_share).ceil() as usize
    }

    /// Rows in counted time, in steps as a job's.
    fn counted(&self, rows: &[Submission], kv_tokens: usize, tokenizer: &Arc<Tokenizer>) -> Result<Counted> {
        let engine = &self.config.spec.engine;
        let size = Size { kv_tokens, budget_tokens: engine.budget_tokens, max_running: engine.max_running };
        let tokens: Arc<dyn TokenTable> = Arc::clone(tokenizer) as _;
        counted::run(rows, size, tokenizer.n_vocab(), &tokens)
    }

    /// The sum of the files' counted times, each as a job of its own; `None` of one file.
    fn parts_time(&self, kv_tokens: usize) -> Result<Option<f64>> {
        let files = &self.config.spec.input.files;
        if files.len() < 2 {
            return Ok(None);
        }
        let mut sum = 0.0;
        for file in files {
            let mut config = self.config.clone();
            config.spec.input.files = vec![file.clone()];
            let Planned { rows, tokenizer, .. } = read(&config)?;
            sum += self.counted(&rows, kv_tokens, &tokenizer)?.time;
        }
        Ok(Some(sum))
    }

    /// Runs the rows in their order.
    fn engine_counts(&self, rows: Vec<Submission>, kv_tokens: usize, tokenizer: &Arc<Tokenizer>) -> Result<EngineStats> {
        let max_context = rows.iter().map(|row| row.prompt.len() + row.params.max_tokens as usize).max().unwrap_or(1);
        let end = tokenizer.end_ids().first().copied();
        let runner =
            NullRunner::new(tokenizer.n_vocab(), max_context, self.config.spec.engine.max_running, end).with_kv_tokens(kv_tokens);
        let limits = runner.limits();
        let mut engine = Engine::new(EngineConfig::for_runner(&limits), Box::new(runner), Arc::clone(tokenizer) as _)?;
        counted::run_through(&mut engine, rows)?;
        Ok(*engine.stats())
    }
}

/// Reads and plans a workload.
fn read(config: &Config) -> Result<Planned> {
    let Reading { mut reader, tokenizer, model, .. } = open_input(config)?;
    let (mut windows, mut minimum, mut next_id) = (Vec::new(), 0, 0);
    let mut last: Option<(Arc<[u32]>, u32)> = None;
    while let Some(rows) = reader.read()? {
        let window = plan_window(reader.prepare(rows)?, &reader.settings, &mut next_id, |_| false);
        if let Some((row, error)) = window.failed.first() {
            return Err(anyhow::anyhow!("{}", error.message).context(format!("{}, line {}", row.file, row.line)));
        }
        minimum += window.trie_tokens;
        // What the window before leaves need not be computed again.
        if let (Some((prompt, kept)), Some(first)) = (&last, window.submissions.first()) {
            minimum -= u64::from(common_prefix(prompt, &first.prompt).min(*kept));
        }
        last = window.submissions.last().map(|row| (Arc::clone(&row.prompt), row.keep_tokens)).or(last);
        windows.push(window.submissions);
    }
    Ok(Planned { rows: windows.into_iter().flatten().collect(), minimum, tokenizer, model })
}

fn write_prompts(path: &Path, rows: &[Submission]) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for row in rows {
        serde_json::to_writer(&mut file, &row.prompt[..])?;
        file.write_all(b"\n")?;
    }
    Ok(file.flush()?)
}

impl Outcome {
    fn table(&self, kv_share: f64) -> String {
        let Self { sequences, prompt_tokens, minimum, prefilled, prefilled_by_minimum, .. } = self;
        let Self { recomputed, preemptions, steps, kv_tokens, .. } = self;
        let tail = 100.0 * self.tail;
        let by_parts = self.time_by_parts.map_or(String::new(), |ratio| {
            format!("time / its parts'     {ratio:>14.4}  in counted time, of all files as one job\n")
        });
        format!(
            "sequences             {sequences:>14}\n\
             prompt tokens         {prompt_tokens:>14}\n\
             minimum to prefill    {minimum:>14}  distinct nodes of the windows' prefix trees\n\
             prefilled             {prefilled:>14}\n\
             prefilled / minimum   {prefilled_by_minimum:>14.4}\n\
             recomputed            {recomputed:>14}  after {preemptions} preemptions\n\
             steps                 {steps:>14}\n\
             KV memory, tokens     {kv_tokens:>14}  {:.0} % of the job's\n\
             tail                  {tail:>12.2} %  of the counted time, at under half the median rate\n\
             {by_parts}",
            100.0 * kv_share
        )
    }
}
