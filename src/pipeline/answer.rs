//! Finished rows -> journal records: puts a completion together from what the engine gives and what the row brought,
//! and writes its output line. Invariant: the line depends on the row, its tokens and the job's stamp alone.

use crate::engine::Finished;
use crate::format::openai_answer::{Place, Stamp, chat_logprob};
use crate::journal::Record;
use crate::outcome::{Completion, ErrorCode, Outcome, RowError, TokenLogprob, Usage};
use crate::prepare::Origin;
use crate::text::tokenizer::Tokenizer;
use anyhow::{Context, Result};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Names of the columns that are added to a dataset row, before the job's prefix.
pub(super) const RESULT_COLUMNS: [&str; 5] = ["completion", "finish_reason", "usage", "logprobs", "error"];

/// What is known of a row before its outcome.
#[derive(Debug)]
pub(super) struct RowMeta {
    pub(super) row_idx: u64,
    pub(super) file: Arc<str>,
    pub(super) line: u64,
    pub(super) origin: Origin,
    /// Tokens of the prompt; 0 where there is none.
    pub(super) prompt_tokens: u32,
    /// What the plan shares.
    pub(super) cached_tokens: u32,
    /// The seed of the draw; `None` if greedy.
    pub(super) seed: Option<u64>,
    /// Whether log-probabilities were asked for.
    pub(super) logprobs: bool,
    /// What later identical rows find its record by.
    pub(super) key: Option<u128>,
}

/// Writes outcomes as records.
pub(super) struct Answers {
    pub(super) stamp: Stamp,
    pub(super) tokenizer: Arc<Tokenizer>,
    /// Put before the names of added columns.
    pub(super) prefix: String,
    /// Whether dataset rows carry a `logprobs` column.
    pub(super) logprobs_column: bool,
}

impl Answers {
    /// The record of a row that the engine finished.
    pub(super) fn finished(&self, row: &RowMeta, finished: &Finished) -> Record {
        if finished.is_broken {
            let n = finished.tokens.len();
            let message = format!("the model's output is not a number after {n} generated tokens");
            return self.failed(row, RowError::row(ErrorCode::EngineError, message));
        }
        let usage = Usage {
            prompt_tokens: row.prompt_tokens,
            completion_tokens: finished.tokens.len() as u32,
            cached_tokens: row.cached_tokens,
        };
        let bytes = |id: u32| self.tokenizer.token_bytes(id).to_vec();
        let logprobs = row.logprobs.then(|| {
            let entries = finished.logprobs.iter().map(|entry| TokenLogprob {
                bytes: bytes(entry.token),
                logprob: entry.logprob,
                top: entry.top.iter().map(|&(id, logprob)| (bytes(id), logprob)).collect(),
            });
            entries.collect()
        });
        let text = finished.text.clone();
        self.record(row, Ok(Completion { text, finish_reason: finished.finish_reason, usage, logprobs, seed: row.seed }))
    }

    /// The record of a row that failed.
    pub(super) fn failed(&self, row: &RowMeta, error: RowError) -> Record {
        self.record(row, Err(error))
    }

    /// The record of a row that gets what an identical row got, from that row's record.
    ///
    /// # Errors
    /// The record is not of this job's form.
    pub(super) fn copied(&self, row: &RowMeta, first: &Record) -> Result<Record> {
        let line: Map<String, Value> = serde_json::from_str(first.line.get()).context("a journaled line is no object")?;
        if !first.ok {
            let error = line.get(&format!("{}error", self.prefix)).filter(|error| error.is_object());
            let error =
                error.or_else(|| line.get("response")?.pointer("/body/error")).context("a journaled error says nothing")?;
            let message = error["message"].as_str().unwrap_or_default();
            return Ok(self.failed(row, RowError::row(ErrorCode::EngineError, message)));
        }
        let line = match &row.origin {
            Origin::Request { custom_id, .. } => {
                let custom_id = custom_id.as_deref().expect("a row without a custom_id has failed already");
                self.stamp.same_output_line(row.row_idx, custom_id, row.cached_tokens, line).to_string()
            }
            Origin::Dataset { columns } => {
                let mut results = Vec::new();
                for name in RESULT_COLUMNS {
                    results.extend(line.get(&format!("{}{name}", self.prefix)).map(|value| (name, value.clone())));
                }
                for (_, usage) in results.iter_mut().filter(|(name, _)| *name == "usage") {
                    usage["cached_tokens"] = row.cached_tokens.into();
                }
                self.line_of_columns(columns.as_deref(), results)
            }
        };
        let (line, cached_tokens) = (raw(line), row.cached_tokens);
        Ok(Record { row: row.row_idx, key: None, cached_tokens, line, ..*first })
    }

    fn record(&self, row: &RowMeta, outcome: Outcome) -> Record {
        let place = Place { row_idx: row.row_idx, file: &row.file, line: row.line };
        let (ok, usage) = (outcome.is_ok(), outcome.as_ref().map(|c| c.usage).unwrap_or_default());
        let line = match (&row.origin, outcome) {
            (Origin::Request { custom_id, endpoint }, Ok(completion)) => {
                let custom_id = custom_id.as_deref().expect("a row without a custom_id has failed already");
                raw(self.stamp.output_line(row.row_idx, custom_id, *endpoint, &completion).to_string())
            }
            (Origin::Request { custom_id, .. }, Err(error)) => {
                raw(self.stamp.error_line(place, custom_id.as_deref(), &error).to_string())
            }
            (Origin::Dataset { columns }, outcome) => {
                raw(self.line_of_columns(columns.as_deref(), self.result_columns(place, &outcome)))
            }
        };
        Record {
            row: row.row_idx,
            ok,
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            cached_tokens: usage.cached_tokens,
            key: row.key.map(|key| format!("{key:032x}")),
            line,
        }
    }

    /// The row's own columns, as they were written, with the result columns behind them.
    fn line_of_columns(&self, columns: Option<&str>, results: Vec<(&'static str, Value)>) -> String {
        let own = columns.and_then(|text| text.trim().strip_prefix('{')?.strip_suffix('}')).unwrap_or_default().trim();
        let mut line = String::with_capacity(own.len() + 256);
        line.push('{');
        line.push_str(own);
        for (name, value) in results {
            if line.len() > 1 {
                line.push(',');
            }
            line.push_str(&Value::String(format!("{}{name}", self.prefix)).to_string());
            line.push(':');
            line.push_str(&value.to_string());
        }
        line.push('}');
        line
    }

    fn result_columns(&self, place: Place<'_>, outcome: &Outcome) -> Vec<(&'static str, Value)> {
        let (completion, finish_reason, usage, logprobs, error) = match outcome {
            Ok(c) => (
                json!(c.text),
                json!(c.finish_reason.as_str()),
                json!({
                    "prompt_tokens": c.usage.prompt_tokens,
                    "completion_tokens": c.usage.completion_tokens,
                    "cached_tokens": c.usage.cached_tokens,
                    "seed": c.seed,
                }),
                json!(c.logprobs.as_ref().map(|tokens| tokens.iter().map(chat_logprob).collect::<Vec<_>>())),
                Value::Null,
            ),
            Err(e) => (
                Value::Null,
                Value::Null,
                Value::Null,
                Value::Null,
                json!({"code": e.code.as_str(), "message": e.message, "param": e.field, "file": place.file, "line": place.line}),
            ),
        };
        let [a, b, c, d, e] = RESULT_COLUMNS;
        let mut columns = vec![(a, completion), (b, finish_reason), (c, usage)];
        if self.logprobs_column {
            columns.push((d, logprobs));
        }
        columns.push((e, error));
        columns
    }
}

fn raw(json: String) -> Box<RawValue> {
    RawValue::from_string(json).expect("lines are put together from valid JSON")
}
