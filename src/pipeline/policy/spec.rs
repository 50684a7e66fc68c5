//! `[policy]` of a pipeline: what a finished completion must be, and what becomes of one that is not. Types and keys only.

use serde::{Deserialize, Serialize};
use toml::Value;

/// `[policy]`, or a step's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicySpec {
    /// Completions of a prompt at most, the first one included.
    pub attempts: u32,
    /// What becomes of a row whose last attempt fails a check that asks for another: `error` or `keep`.
    pub finally: Action,
    /// How completions are drawn from the second attempt on, where that differs.
    #[serde(skip_serializing_if = "RetrySpec::is_empty")]
    pub retry: RetrySpec,
    /// All are looked at; the strictest of those that fail decides: error, then retry, then keep.
    pub check: Vec<CheckSpec>,
}

impl Default for PolicySpec {
    fn default() -> Self {
        Self { attempts: 3, finally: Action::Error, retry: RetrySpec::default(), check: Vec::new() }
    }
}

/// What becomes of a completion that fails a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It stays; the row says which check it failed.
    Keep,
    /// Another is drawn.
    Retry,
    /// The row is an error.
    Error,
}

/// `[policy.retry]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetrySpec {
    /// 0 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Over 0, at most 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// 0 to 1; 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// −2 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// −2 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Over 0; 1 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
}

impl RetrySpec {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// `[[policy.check]]`: one condition, and what to do where it does not hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckSpec {
    /// What messages and the row's `failed_checks` call it; without it, the condition's own name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `keep`, `retry` or `error`.
    pub on_fail: Action,
    /// The completion is JSON that this schema (or the schema in this file) allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<Value>,
    /// The regular expression is found in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
    /// It has so many characters at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_chars: Option<usize>,
    /// It has so many characters at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_chars: Option<usize>,
    /// No pattern of up to 64 tokens stands in it more often than this, one directly after the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_repeats: Option<usize>,
    /// It ended for one of these reasons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<Vec<String>>,
    /// The expression, as in templates, is true; it sees `completion`, `parsed`, `finish_reason`, `n_tokens` and the row's
    /// columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expression: Option<String>,
}
