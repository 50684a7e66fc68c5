//! `pipelines/*.toml`: what a job reads, asks, and writes. Parsing checks types and unknown keys; `config` checks
//! meaning. Knows nothing of models or files.

pub use super::policy::PolicySpec;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use toml::{Table, Value};

/// A pipeline file, every section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PipelineSpec {
    /// What is read.
    pub input: InputSpec,
    /// How a dataset row becomes a prompt; without it and `step`, rows are requests in `OpenAI` Batch form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<PromptSpec>,
    /// Several prompts per row, each with a name; one that uses another's answer waits for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub step: Vec<StepSpec>,
    /// What completions must be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicySpec>,
    /// What is written.
    pub output: OutputSpec,
    /// Which model runs.
    #[serde(default)]
    pub model: ModelSpec,
    /// Sampling parameters where a row says nothing.
    #[serde(default)]
    pub sampling: SamplingSpec,
    /// Limits and resources.
    #[serde(default)]
    pub engine: EngineSpec,
    /// What makes this job itself.
    #[serde(default)]
    pub job: JobSpec,
    /// What things cost.
    #[serde(default, skip_serializing_if = "PriceSpec::is_empty")]
    pub prices: PriceSpec,
}

/// `[input]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputSpec {
    /// Files or globs, read in this order (a glob's files by name).
    pub files: Vec<String>,
    /// Only the first rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// Longest line of a JSONL file, in bytes.
    #[serde(default = "default_max_line_bytes")]
    pub max_line_bytes: usize,
}

fn default_max_line_bytes() -> usize {
    16 << 20
}

/// `[[step]]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepSpec {
    /// Put before the names of its result columns; other steps' templates say `steps.NAME.completion` and
    /// `steps.NAME.parsed`.
    pub name: String,
    /// What the model is given.
    pub prompt: PromptSpec,
    /// What differs from `[sampling]`.
    #[serde(default)]
    pub sampling: SamplingSpec,
    /// Instead of the pipeline's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicySpec>,
}

/// `[prompt]`: templates (minijinja) over a row's columns. Either `text`, or `user` with an optional `system`, or
/// `messages`, or `messages_column`; or `tokens`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptSpec {
    /// The whole prompt, given to the model without its chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The system message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// The user's message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Any chat.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<MessageSpec>,
    /// The column that holds the prompt's token ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<String>,
    /// A column that holds a chat: a list of `{role, content}`. `system` may stand before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages_column: Option<String>,
    /// Worked examples, as turns before the row's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<FewShotSpec>,
    /// Text that the answer begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill: Option<String>,
    /// Text that is scored as the answer; nothing is generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continuation: Option<String>,
    /// What the answer must be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<FormatSpec>,
}

/// `[prompt.few_shot]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FewShotSpec {
    /// A JSONL file of examples; relative paths as for inputs.
    pub file: String,
    /// Only the first so many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<usize>,
    /// Template of an example's question; without it, the prompt's own `user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Template of its answer.
    pub assistant: String,
}

/// `[prompt.format]`: one of these.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FormatSpec {
    /// JSON of a schema: the schema itself, or a file that holds it. The answer becomes typed columns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<Value>,
    /// Any JSON object.
    pub json_object: bool,
    /// Text that matches as a whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
    /// Text of a grammar, in llguidance's variant of Lark.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grammar: Option<String>,
    /// One of these texts; or a file with one on each line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choices: Option<Choices>,
}

/// `choices = […]` or `choices = "file"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Choices {
    /// The texts.
    List(Vec<String>),
    /// A file.
    File(String),
}

/// One message of `[[prompt.messages]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MessageSpec {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Template of the message's text.
    pub content: String,
}

/// `[output]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputSpec {
    /// The results; `.jsonl` or `.parquet`. Errors, report and journal stand beside it.
    pub file: String,
    /// Cuts the results into parts: `file` is a folder of files of so much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<PartsSpec>,
    /// Put before the names of the columns that are added to a dataset row.
    #[serde(default)]
    pub prefix: String,
    /// The only columns of its own that a dataset row keeps, in this order; without it, all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
}

/// `output.parts = 100000` or `output.parts = "256MiB"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PartsSpec {
    /// Rows of a part.
    Rows(u64),
    /// Bytes of its rows.
    Size(String),
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSpec {
    /// A catalogue name (`valar models`) or a path to a GGUF file.
    pub name: String,
    /// `cpu`, `cuda` or `cuda:1` and so on (an NVIDIA GPU), `auto` (the first GPU that can be used, else the CPU), `reference`.
    pub device: String,
    /// In which numbers the CPU computes: `int8`, `int8-bf16`, `bf16`, `exact` (f32), or `fast`, the fastest of the first three.
    pub numerics: String,
    /// How the CPU keeps keys and values: `floats` (of 16 bits) or `int8` (with a scale per token and head).
    pub kv: String,
    /// What else rows may call the model in `body.model`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub served_names: Vec<String>,
}

impl Default for ModelSpec {
    fn default() -> Self {
        let [name, device, numerics, kv] = ["SmolLM2-135M-Instruct", "cpu", "fast", "floats"].map(str::to_owned);
        Self { name, device, numerics, kv, served_names: Vec::new() }
    }
}

/// `[sampling]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingSpec {
    /// Most tokens per completion; without it, what the context leaves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// No end token before so many tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_tokens: Option<u32>,
    /// Completions per prompt; the result columns are lists if more than 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// 0 (greedy) to 2; without it, 1.
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
    /// Token ids to what is added to their logits.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<String, f32>,
    /// One seed for every row; without it, each row's is derived from `job.seed` and the row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Texts that end a completion.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Vec<String>>,
    /// Go on after end tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignore_eos: Option<bool>,
    /// End completions that go round in circles, with the finish reason `repetition`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_detection: Option<RepetitionSpec>,
    /// Log-probabilities with this many alternatives per token (dataset rows).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u8>,
}

/// `sampling.repetition_detection`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepetitionSpec {
    /// Shortest pattern, in tokens.
    #[serde(default = "default_min_pattern")]
    pub min_pattern_size: u32,
    /// Longest pattern, in tokens.
    pub max_pattern_size: u32,
    /// How often it stands there, one directly after the other.
    pub min_count: u32,
}

fn default_min_pattern() -> u32 {
    1
}

/// What computes a job's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// The model.
    #[default]
    Model,
    /// Nothing: every row gets its last prompt token back. Shows how fast the pipeline itself is.
    Null,
}

impl EngineKind {
    /// As written in a pipeline.
    pub fn as_str(self) -> &'static str {
        if self == Self::Model { "model" } else { "null" }
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it")]
    fn is_default(&self) -> bool {
        *self == Self::Model
    }
}

/// `[engine]`: resources; none of these changes a result, but for `kind`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineSpec {
    /// What computes.
    #[serde(skip_serializing_if = "EngineKind::is_default")]
    pub kind: EngineKind,
    /// Memory for weights, KV cache and workspace, such as "4GiB"; without it, half of what is free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Threads that compute; without it, one for each core that the process may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Tokens per step.
    pub budget_tokens: usize,
    /// Sequences per step.
    pub max_running: usize,
    /// Tokens after which a row that is not done is journaled, to go on from there after a kill; 0 for never.
    pub checkpoint_tokens: u32,
}

impl Default for EngineSpec {
    fn default() -> Self {
        Self {
            kind: EngineKind::Model,
            memory: None,
            threads: None,
            budget_tokens: 1024,
            max_running: 256,
            checkpoint_tokens: 512,
        }
    }
}

/// `[job]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobSpec {
    /// What the seeds of rows without one are derived from.
    pub seed: u64,
    /// Rows that are planned together (and at most this many are held in memory, twice).
    pub window_rows: usize,
    /// Bytes of rows that are planned together.
    pub window_bytes: usize,
    /// Whether identical rows of a window under deterministic sampling are computed once.
    pub dedup: bool,
}

impl Default for JobSpec {
    fn default() -> Self {
        Self { seed: 0, window_rows: 16_384, window_bytes: 64 << 20, dedup: true }
    }
}

impl SamplingSpec {
    /// These settings, and `base` where they say nothing.
    #[must_use]
    pub fn over(&self, base: &Self) -> Self {
        let own = self.clone();
        Self {
            max_tokens: own.max_tokens.or(base.max_tokens),
            min_tokens: own.min_tokens.or(base.min_tokens),
            n: own.n.or(base.n),
            temperature: own.temperature.or(base.temperature),
            top_p: own.top_p.or(base.top_p),
            top_k: own.top_k.or(base.top_k),
            min_p: own.min_p.or(base.min_p),
            presence_penalty: own.presence_penalty.or(base.presence_penalty),
            frequency_penalty: own.frequency_penalty.or(base.frequency_penalty),
            repetition_penalty: own.repetition_penalty.or(base.repetition_penalty),
            logit_bias: if own.logit_bias.is_empty() { base.logit_bias.clone() } else { own.logit_bias },
            seed: own.seed.or(base.seed),
            stop: own.stop.or_else(|| base.stop.clone()),
            ignore_eos: own.ignore_eos.or(base.ignore_eos),
            repetition_detection: own.repetition_detection.or(base.repetition_detection),
            logprobs: own.logprobs.or(base.logprobs),
        }
    }
}

impl PipelineSpec {
    /// Whether completions are checked.
    pub fn has_policy(&self) -> bool {
        self.policy.is_some() || self.step.iter().any(|step| step.policy.is_some())
    }

    /// Whether rows are dataset rows rather than requests.
    pub fn is_dataset(&self) -> bool {
        self.prompt.is_some() || !self.step.is_empty()
    }
}

/// `[prices]`: for the money in a plan; no result depends on them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PriceSpec {
    /// Of a million prompt tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<f64>,
    /// Of a million generated tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<f64>,
    /// Of an hour of this machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hour: Option<f64>,
}

impl PriceSpec {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Reads a pipeline file (or none), lays `overrides` (`key=value`, dotted keys) over it and checks the result.
///
/// # Errors
/// An unreadable file, bad TOML, an unknown key, a wrong type, a missing section: with file, line or key.
pub fn load(path: Option<&Path>, overrides: &[(String, Value)]) -> Result<PipelineSpec> {
    let source = path.map_or_else(|| "the command line".to_owned(), |p| p.display().to_string());
    let mut table = match path {
        None => Table::new(),
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read pipeline {}", path.display()))?;
            toml::from_str(&text).with_context(|| format!("pipeline {}", path.display()))?
        }
    };
    for (key, value) in overrides {
        set(&mut table, key, value.clone())?;
    }
    table.try_into().with_context(|| format!("pipeline from {source}"))
}

/// Sets a dotted key, making tables on the way.
fn set(table: &mut Table, key: &str, value: Value) -> Result<()> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
            Ok(())
        }
        Some((head, rest)) => match table.entry(head.to_owned()).or_insert_with(|| Table::new().into()) {
            Value::Table(inner) => set(inner, rest, value),
            _ => bail!("--set {key}: {head} is not a section"),
        },
    }
}

/// Parses `key=value` of `--set`: the value is TOML, or else a string.
pub fn parse_override(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("expected key=value, such as sampling.temperature=0")?;
    let key = key.trim().to_owned();
    if key.is_empty() || key.split('.').any(str::is_empty) {
        return Err(format!("{key:?} is not a key; expected section.key=value"));
    }
    let parsed = toml::from_str::<Table>(&format!("v = {value}")).ok().filter(|t| t.len() == 1).and_then(|mut t| t.remove("v"));
    Ok((key, parsed.unwrap_or_else(|| Value::String(value.to_owned()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_are_toml_or_else_strings() {
        let (key, value) = parse_override("sampling.temperature=0.5").unwrap();
        assert_eq!((key.as_str(), value), ("sampling.temperature", Value::Float(0.5)));
        assert_eq!(parse_override("output.file=a/b.jsonl").unwrap().1, Value::String("a/b.jsonl".into()));
        assert_eq!(parse_override("sampling.stop=[\"x\"]").unwrap().1, Value::Array(vec!["x".into()]));
        assert!(parse_override("x").is_err() && parse_override("=1").is_err() && parse_override("a..b=1").is_err());
    }

    #[test]
    fn unknown_keys_are_named() {
        let set = |k: &str, v: Value| (k.to_owned(), v);
        let good = [set("input.files", vec!["a.jsonl"].into()), set("output.file", "o.jsonl".into())];
        assert_eq!(load(None, &good).unwrap().model.device, "cpu");
        let mut bad = good.to_vec();
        bad.push(set("sampling.temprature", Value::Float(0.0)));
        let error = format!("{:#}", load(None, &bad).unwrap_err());
        assert!(error.contains("temprature"), "{error}");
        let error = format!("{:#}", load(None, &good[..1]).unwrap_err());
        assert!(error.contains("output"), "{error}");
    }
}
