//! Finished rows -> journal records: puts completions together from what the engine gives and what the row brought, and
//! writes the row's output line. Invariant: the line depends on the row, its tokens and the job's stamp alone.

use super::columns::{self, ResultColumns, Score, StepResult};
use crate::engine::Finished;
use crate::format::openai::answer::{Place, Stamp};
use crate::format::openai::{Endpoint, PlainLines};
use crate::journal::Record;
use crate::outcome::{Completion, ErrorCode, RowError, Tried, Usage};
use crate::prepare::sequences::{PromptMeta, stop_of};
use crate::prepare::{Origin, StepAnswer};
use crate::text::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::sync::Arc;

/// What is known of a row before its outcome.
#[derive(Debug)]
pub(super) struct RowMeta {
    pub(super) row_idx: u64,
    pub(super) file: Arc<str>,
    pub(super) line: u64,
    pub(super) origin: Origin,
    /// Its prompts so far; none where the row failed before.
    pub(super) prompts: Vec<PromptMeta>,
    /// What later identical rows find its record by.
    pub(super) key: Option<u128>,
    /// What its `custom_id` is known by.
    pub(super) id: Option<u128>,
}

impl RowMeta {
    /// The row shares all of its prompts with another one.
    pub(super) fn share_all(&mut self) {
        for prompt in &mut self.prompts {
            prompt.cached_tokens = prompt.n_tokens;
        }
    }
}

/// Writes outcomes as records.
pub(super) struct Answers {
    pub(super) stamp: Stamp,
    /// Of that stamp.
    pub(super) plain_lines: PlainLines,
    pub(super) tokenizer: Arc<Tokenizer>,
    /// What is added to dataset rows.
    pub(super) columns: ResultColumns,
    /// Columns of its own that a dataset row's outcome carries, in this order; `None` for all, as they are.
    pub(super) kept_columns: Option<Vec<String>>,
}

impl Answers {
    /// The record of a row whose prompts are all completed, none of them broken: `results` are each prompt's completions.
    /// `line` is for use as a buffer.
    pub(super) fn finished<'l>(&self, row: &RowMeta, results: &[impl AsRef<[Finished]>], line: &'l mut String) -> Record<'l> {
        line.clear();
        let per_prompt = row.prompts.iter().zip(results.iter().map(AsRef::as_ref));
        match &row.origin {
            Origin::Request { custom_id, endpoint, echo } => {
                let usage = per_prompt.clone().fold(Usage::default(), |sum, (prompt, choices)| sum.plus(prompt.usage(choices)));
                let seed = row.prompts.iter().find_map(|prompt| prompt.seed);
                let custom_id = custom_id.as_deref().expect("a row without a custom_id has failed already");
                let mut one = per_prompt.clone().filter(|(prompt, choices)| prompt.is_plain() && choices.len() == 1);
                if row.prompts.len() == 1
                    && PlainLines::writes(*endpoint)
                    && let Some((_, [only])) = one.next()
                {
                    let place = (row.row_idx, custom_id, *endpoint);
                    self.plain_lines.push_text(line, place, (&only.text, only.finish_reason), usage, seed);
                    add_attempts(line, row);
                    return record(row, true, usage, line.as_str());
                }
                let stop = (*endpoint == Endpoint::Messages).then(|| self.stop(echo.as_deref(), results)).flatten();
                let echo = if *endpoint == Endpoint::Messages { stop.as_ref() } else { echo.as_deref() };
                let choices = per_prompt.flat_map(|(prompt, choices)| prompt.choices(choices, &self.tokenizer)).collect();
                let completion = Completion { choices, usage, seed };
                if !self.plain_lines.push(line, row.row_idx, custom_id, *endpoint, &completion) {
                    let value = self.stamp.output_line(row.row_idx, custom_id, *endpoint, echo, &completion);
                    *line = value.to_string();
                }
                add_attempts(line, row);
                record(row, true, usage, line.as_str())
            }
            Origin::Dataset { columns } => {
                let mut steps: Vec<(usize, StepResult)> =
                    per_prompt.map(|(prompt, choices)| (prompt.step, self.step_result(prompt, choices))).collect();
                steps.sort_by_key(|(step, _)| *step);
                let steps: Vec<StepResult> = steps.into_iter().map(|(_, result)| result).collect();
                let usage = steps.iter().fold(Usage::default(), |sum, step| sum.plus(step.usage));
                let values = self.columns.values(place(row), Ok(&steps));
                record(row, true, usage, self.line(columns.as_deref(), values))
            }
        }
    }

    /// Which of a message's strings has ended it.
    fn stop(&self, stops: Option<&Value>, results: &[impl AsRef<[Finished]>]) -> Option<Value> {
        let stops: Vec<String> = stops?.as_array()?.iter().filter_map(|stop| Some(stop.as_str()?.to_owned())).collect();
        stop_of(results.first()?.as_ref().first()?, &stops, &self.tokenizer).map(Value::from)
    }

    /// The record of a row that failed.
    pub(super) fn failed(&self, row: &RowMeta, error: &RowError) -> Record<'static> {
        let line = match &row.origin {
            Origin::Request { custom_id, .. } => self.stamp.error_line(place(row), custom_id.as_deref(), error).to_string(),
            Origin::Dataset { columns } => self.line(columns.as_deref(), self.columns.values(place(row), Err(error))),
        };
        record(row, false, Usage::default(), line)
    }

    /// The record of a row that gets what an identical row got, from that row's record; and its error, if that is one.
    ///
    /// # Errors
    /// The record is not of this job's form.
    pub(super) fn copied(&self, row: &RowMeta, first: &Record<'_>) -> Result<(Record<'static>, Option<ErrorCode>)> {
        let mut line: Map<String, Value> = serde_json::from_str(&first.line).context("a journaled line is no object")?;
        if !first.ok {
            let error = line.get(self.columns.error_name()).filter(|error| error.is_object());
            let error =
                error.or_else(|| line.get("response")?.pointer("/body/error")).context("a journaled error says nothing")?;
            let error = again(error);
            return Ok((self.failed(row, &error), Some(error.code)));
        }
        let cached_tokens = first.prompt_tokens;
        let line = match &row.origin {
            Origin::Request { custom_id, .. } => {
                let custom_id = custom_id.as_deref().expect("a row without a custom_id has failed already");
                self.stamp.same_output_line(row.row_idx, custom_id, cached_tokens, line).to_string()
            }
            Origin::Dataset { columns } => {
                for name in self.columns.usage_names() {
                    if let Some(usage) = line.get_mut(name) {
                        usage["cached_tokens"] = usage["prompt_tokens"].clone();
                    }
                }
                self.line(columns.as_deref(), columns::values_of(&self.columns, &line))
            }
        };
        let usage = Usage { prompt_tokens: first.prompt_tokens, completion_tokens: first.completion_tokens, cached_tokens };
        Ok((Record { key: None, ..record(row, true, usage, line) }, None))
    }

    /// Why one of a prompt's completions is none.
    pub(super) fn broken(&self, prompt: &PromptMeta, results: &[Finished]) -> Option<RowError> {
        let why = results.iter().find_map(|finished| finished.broken.clone())?;
        let tried = Some(Box::new(self.tried(prompt, results)));
        Some(RowError { tried, ..RowError::row(ErrorCode::EngineError, why) })
    }

    /// A dataset row's line: its own columns that are kept, and these.
    fn line(&self, columns: Option<&str>, values: Vec<(&str, Value)>) -> String {
        match (&self.kept_columns, columns) {
            (Some(kept), Some(own)) => columns::line(Some(&columns::kept(own, kept)), values),
            (_, own) => columns::line(own, values),
        }
    }

    fn step_result(&self, prompt: &PromptMeta, choices: &[Finished]) -> StepResult {
        let usage = prompt.usage(choices);
        let score = prompt.is_scored_only.then(|| score(&choices[0]));
        let choices = if prompt.is_scored_only { Vec::new() } else { prompt.choices(choices, &self.tokenizer) };
        let (attempts, failed_checks) = (prompt.n_attempts(), prompt.failed_checks().to_vec());
        StepResult { choices, usage, seed: prompt.seed, attempts, failed_checks, score }
    }
}

/// Adds to a request row's line how often it was completed and what it failed, where there is anything to say.
fn add_attempts(line: &mut String, row: &RowMeta) {
    let n_attempts = row.prompts.iter().map(PromptMeta::n_attempts).max().unwrap_or(1);
    let mut failed: Vec<&String> = row.prompts.iter().flat_map(PromptMeta::failed_checks).collect();
    failed.sort_unstable();
    failed.dedup();
    if (n_attempts > 1 || !failed.is_empty()) && line.pop() == Some('}') {
        let failed: Value = failed.into_iter().map(String::as_str).collect();
        for part in [",\"attempts\":", &n_attempts.to_string(), ",\"failed_checks\":", &failed.to_string(), "}"] {
            line.push_str(part);
        }
    }
}

/// What later steps may use of a completed one.
pub(super) fn step_answer(choices: &[Finished]) -> StepAnswer {
    let text = choices.first().map(|choice| choice.text.clone()).unwrap_or_default();
    StepAnswer { parsed: columns::parsed(&text), text }
}

/// The error that an earlier line tells of.
fn again(error: &Value) -> RowError {
    let text = |key: &str| error[key].as_str().map(str::to_owned);
    let code = text("code").and_then(|code| ErrorCode::parse(&code)).unwrap_or(ErrorCode::EngineError);
    let number = |key: &str| error[key].as_u64().unwrap_or_default() as u32;
    let tried = error["attempts"].is_u64().then(|| {
        Box::new(Tried {
            attempts: number("attempts"),
            seed: error["seed"].as_u64(),
            prompt_tokens: number("prompt_tokens"),
            completion_tokens: number("completion_tokens"),
            system_fingerprint: text("system_fingerprint").unwrap_or_default(),
        })
    });
    RowError { code, field: text("param"), message: text("message").unwrap_or_default(), tried }
}

/// The likelihood of what was scored.
fn score(finished: &Finished) -> Score {
    let entries = &finished.logprobs;
    Score {
        logprob: entries.iter().map(|entry| f64::from(entry.logprob)).sum(),
        n_tokens: entries.len(),
        is_greedy: entries.iter().all(|entry| entry.top.first().is_some_and(|&(token, _)| token == entry.token)),
    }
}

fn place(row: &RowMeta) -> Place<'_> {
    Place { row_idx: row.row_idx, file: &row.file, line: row.line }
}

fn record<'l>(row: &RowMeta, ok: bool, usage: Usage, line: impl Into<Cow<'l, str>>) -> Record<'l> {
    Record {
        row: row.row_idx,
        ok,
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        cached_tokens: usage.cached_tokens,
        key: row.key,
        id: row.id,
        line: line.into(),
    }
}
