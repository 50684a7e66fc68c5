//! What a finished completion must be, and what becomes of one that is not. Knows nothing of queues or journals.
//! Invariant: the verdict on a completion, and what is drawn instead of it, depend on the row alone: not on the batch, on the
//! order, or on what a kill has cut short.

mod cycles;
mod spec;

pub use spec::{Action, CheckSpec, PolicySpec, RetrySpec};

use crate::config::sampling_params;
use crate::engine::Finished;
use crate::engine::repetition::most_repeats;
use crate::format::openai::parse_object;
use crate::outcome::FinishReason;
use crate::prepare::Prompt;
use crate::request::Params;
use crate::text::template::RowTemplate;
use anyhow::{Context, Result, bail, ensure};
use regex::Regex;
use serde_json::{Value, json};
use spec::Action::{Error, Keep, Retry};

/// Longest pattern that `max_repeats` looks for, in tokens.
const MAX_PATTERN: usize = 64;
/// Most attempts.
const MAX_ATTEMPTS: u32 = 100;
/// What expressions see besides the row's columns.
const NAMES: [&str; 4] = ["completion", "parsed", "finish_reason", "n_tokens"];

/// See the module.
pub(super) struct Policy {
    checks: Vec<Check>,
    attempts: u32,
    finally: Action,
    retry: RetrySpec,
}

struct Check {
    name: String,
    on_fail: Action,
    condition: Condition,
}

enum Condition {
    JsonSchema(Box<jsonschema::Validator>),
    Regex(Regex),
    MinChars(usize),
    MaxChars(usize),
    MaxRepeats(usize),
    FinishReason(Vec<FinishReason>),
    Expression(Box<RowTemplate>),
}

/// What becomes of a prompt's completions.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// They are the row's; they failed these checks.
    Keep(Vec<String>),
    /// Others are drawn.
    Again,
    /// The row is an error.
    Refuse(String),
}

impl Policy {
    /// Compiles a policy; `read` gives the text of a file.
    ///
    /// # Errors
    /// A check that is none, by its name.
    pub(super) fn new(spec: &PolicySpec, mut read: impl FnMut(&str) -> Result<String>) -> Result<Self> {
        let PolicySpec { attempts, finally, retry, check } = spec;
        ensure!((1..=MAX_ATTEMPTS).contains(attempts), "attempts: {attempts} is outside 1 to {MAX_ATTEMPTS}");
        ensure!(*finally != Retry, "finally: is error or keep");
        ensure!(!check.is_empty(), "there is no check");
        // Ranges are those of sampling.
        sampling_params(&retry.sampling(), true).context("retry")?;
        let mut checks: Vec<Check> = Vec::new();
        for spec in check {
            let (kind, condition) = condition(spec, &mut read)?;
            let name = spec.name.clone().unwrap_or_else(|| kind.to_owned());
            ensure!(checks.iter().all(|other| other.name != name), "check: the name {name:?} is used twice");
            checks.push(Check { name, on_fail: spec.on_fail, condition });
        }
        Ok(Self { checks, attempts: *attempts, finally: *finally, retry: retry.clone() })
    }

    /// Columns of the row that it looks at.
    pub(super) fn columns(&self) -> impl Iterator<Item = &String> {
        let expressions = self.checks.iter().filter_map(|check| match &check.condition {
            Condition::Expression(expression) => Some(expression.columns()),
            _ => None,
        });
        expressions.flatten().filter(|name| !NAMES.contains(&name.as_str()))
    }

    /// Judges the completions that attempt `attempt` (from 1) at a prompt gave. `columns` are the row's, as JSON.
    pub(super) fn judge(&self, choices: &[Finished], columns: Option<&str>, attempt: u32, prompt: &Prompt) -> Verdict {
        // What was thought is no part of what was answered.
        let answer = |choice: &Finished| prompt.thinking.map(|format| format.parse(&choice.text).1);
        let answers: Vec<Option<String>> = choices.iter().map(answer).collect();
        let mut failed: Vec<(&Check, String)> = Vec::new();
        for check in &self.checks {
            let why = choices
                .iter()
                .zip(&answers)
                .find_map(|(choice, answer)| check.condition.fails(choice, answer.as_deref().unwrap_or(&choice.text), columns));
            failed.extend(why.map(|why| (check, why)));
        }
        let names = || failed.iter().map(|(check, _)| check.name.clone()).collect();
        let Some((worst, why)) = failed.iter().rev().max_by_key(|(check, _)| check.on_fail) else {
            return Verdict::Keep(Vec::new());
        };
        let may_retry = attempt < self.attempts && self.changes(prompt);
        match worst.on_fail {
            Keep => Verdict::Keep(names()),
            Retry if may_retry => Verdict::Again,
            Retry if self.finally == Keep => Verdict::Keep(names()),
            Retry | Error => Verdict::Refuse(format!("check {:?}: {why}", worst.name)),
        }
    }

    /// Whether another attempt could give anything else.
    fn changes(&self, prompt: &Prompt) -> bool {
        let next = self.next(prompt.clone(), 0);
        next.params.temperature > 0.0 || Params { seed: prompt.params.seed, ..next.params } != prompt.params
    }

    /// The prompt as the next attempt has it, drawn with that seed.
    pub(super) fn next(&self, mut prompt: Prompt, seed: u64) -> Prompt {
        let (retry, params) = (&self.retry, &mut prompt.params);
        params.temperature = retry.temperature.unwrap_or(params.temperature);
        params.top_p = retry.top_p.unwrap_or(params.top_p);
        params.top_k = retry.top_k.unwrap_or(params.top_k);
        params.min_p = retry.min_p.unwrap_or(params.min_p);
        params.presence_penalty = retry.presence_penalty.unwrap_or(params.presence_penalty);
        params.frequency_penalty = retry.frequency_penalty.unwrap_or(params.frequency_penalty);
        params.repetition_penalty = retry.repetition_penalty.unwrap_or(params.repetition_penalty);
        params.seed = Some(seed);
        prompt
    }
}

/// The seed of a later attempt. `seed` is the first one's; rows without (greedy ones) share the job's, so that identical rows
/// stay identical.
pub(super) fn attempt_seed(seed: Option<u64>, job_seed: u64, attempt: u32) -> u64 {
    let of = seed.map_or_else(|| format!("job {job_seed}"), |seed| format!("row {seed}"));
    let hash = blake3::hash(format!("valar attempt seed {of} {attempt}").as_bytes());
    let (head, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    // 53 bits survive JSON readers that keep numbers as doubles.
    u64::from_le_bytes(*head) >> 11
}

impl RetrySpec {
    fn sampling(&self) -> super::spec::SamplingSpec {
        super::spec::SamplingSpec {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repetition_penalty: self.repetition_penalty,
            ..super::spec::SamplingSpec::default()
        }
    }
}

/// A check's condition, and its kind's name.
fn condition(spec: &CheckSpec, read: &mut impl FnMut(&str) -> Result<String>) -> Result<(&'static str, Condition)> {
    let CheckSpec { name, on_fail: _, json_schema, regex, min_chars, max_chars, max_repeats, finish_reason, expression } = spec;
    let mut found = Vec::new();
    if let Some(schema) = json_schema {
        let schema = match schema {
            toml::Value::String(file) => {
                serde_json::from_str(&read(file)?).with_context(|| format!("check: {file} is not JSON"))?
            }
            inline => serde_json::to_value(inline).context("check: json_schema")?,
        };
        cycles::refuse(&schema).context("check: json_schema")?;
        let validator = jsonschema::validator_for(&schema).map_err(|error| anyhow::anyhow!("check: json_schema: {error}"))?;
        found.push(("json_schema", Condition::JsonSchema(Box::new(validator))));
    }
    if let Some(regex) = regex {
        found.push(("regex", Condition::Regex(Regex::new(regex).context("check: regex")?)));
    }
    found.extend(min_chars.map(|n| ("min_chars", Condition::MinChars(n))));
    found.extend(max_chars.map(|n| ("max_chars", Condition::MaxChars(n))));
    found.extend(max_repeats.map(|n| ("max_repeats", Condition::MaxRepeats(n))));
    if let Some(reasons) = finish_reason {
        let parse =
            |name: &String| FinishReason::parse(name).with_context(|| format!("check: finish_reason: there is no {name:?}"));
        found.push(("finish_reason", Condition::FinishReason(reasons.iter().map(parse).collect::<Result<_>>()?)));
    }
    if let Some(expression) = expression {
        let template = RowTemplate::compile(&format!("{{% if {expression} %}}pass{{% endif %}}")).context("check: expression")?;
        found.push(("expression", Condition::Expression(Box::new(template))));
    }
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(only),
        _ => bail!(
            "check {}: give one of json_schema, regex, min_chars, max_chars, max_repeats, finish_reason, expression",
            name.as_deref().unwrap_or_default()
        ),
    }
}

impl Condition {
    /// What is wrong with a completion, whose answer is `text`; `None` if the condition holds.
    fn fails(&self, choice: &Finished, text: &str, columns: Option<&str>) -> Option<String> {
        match self {
            Self::JsonSchema(validator) => match serde_json::from_str::<Value>(text) {
                Err(error) => Some(format!("the completion is not JSON: {error}")),
                Ok(value) => {
                    let error = validator.iter_errors(&value).next()?;
                    Some(format!("the completion's {:?}: {error}", error.instance_path.to_string()))
                }
            },
            Self::Regex(regex) => {
                (!regex.is_match(text)).then(|| format!("the completion has nothing like {:?}", regex.as_str()))
            }
            Self::MinChars(min) => {
                let n_chars = text.chars().count();
                (n_chars < *min).then(|| format!("{n_chars} characters, fewer than {min}"))
            }
            Self::MaxChars(max) => {
                let n_chars = text.chars().count();
                (n_chars > *max).then(|| format!("{n_chars} characters, more than {max}"))
            }
            Self::MaxRepeats(max) => {
                let n_repeats = most_repeats(&choice.tokens, MAX_PATTERN);
                (n_repeats > *max).then(|| format!("a pattern stands there {n_repeats} times in a row, more than {max}"))
            }
            Self::FinishReason(reasons) => {
                let reason = choice.finish_reason;
                (!reasons.contains(&reason)).then(|| format!("it ended by {:?}", reason.as_str()))
            }
            Self::Expression(expression) => {
                let mut values = columns.and_then(|columns| parse_object(columns).ok()).unwrap_or_default();
                values.insert("completion".into(), text.into());
                values.insert("parsed".into(), serde_json::from_str(text).unwrap_or_default());
                values.insert("finish_reason".into(), choice.finish_reason.as_str().into());
                values.insert("n_tokens".into(), json!(choice.tokens.len()));
                match expression.render(&values) {
                    Ok(result) if result == "pass" => None,
                    Ok(_) => Some("the expression is false".to_owned()),
                    Err(error) => Some(error.message),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn finished(text: &str, tokens: &[u32]) -> Finished {
        let finish_reason = FinishReason::Stop;
        Finished { id: 0, tokens: tokens.to_vec(), text: text.to_owned(), finish_reason, logprobs: Vec::new(), broken: None }
    }

    fn prompt(temperature: f32) -> Prompt {
        Prompt {
            step: 0,
            tokens: Arc::new([1]),
            params: Params { temperature, ..Params::default() },
            max_tokens: 4,
            grammar: None,
            score_from: None,
            call_format: None,
            one_call: false,
            thinking: None,
        }
    }

    fn policy(text: &str) -> Result<Policy> {
        Policy::new(&toml::from_str(text).unwrap(), |_| bail!("no files"))
    }

    /// Whether a completion passes a check.
    fn passes(check: &str, text: &str, tokens: &[u32]) -> bool {
        let policy = policy(&format!("[[check]]\non_fail = \"error\"\n{check}")).unwrap();
        policy.judge(&[finished(text, tokens)], Some(r#"{"limit": 5}"#), 1, &prompt(1.0)) == Verdict::Keep(Vec::new())
    }

    #[test]
    fn each_condition_holds_or_not() {
        for (check, good, bad) in [
            ("regex = '^[0-9]+$'", "42", "42?"),
            ("min_chars = 2", "éé", "é"),
            ("max_chars = 2", "éé", "ééé"),
            ("json_schema = {type = \"object\", required = [\"a\"]}", r#"{"a": 1}"#, r#"{"b": 1}"#),
            ("json_schema = {type = \"number\"}", "1", "one"),
            ("expression = 'completion | length < limit'", "four", "fiver"),
            ("expression = 'parsed.a == 1 and finish_reason == \"stop\"'", r#"{"a": 1}"#, r#"{"a": 2}"#),
            ("expression = 'no_such_column'", "", "x"),
        ] {
            assert_eq!((passes(check, good, &[1]) || good.is_empty(), passes(check, bad, &[1])), (true, false), "{check}");
        }
        assert!(passes("max_repeats = 3", "", &[7, 8, 7, 8, 7, 8, 9]));
        assert!(!passes("max_repeats = 2", "", &[7, 8, 7, 8, 7, 8, 9]));
        assert!(passes("finish_reason = [\"stop\"]", "", &[]) && !passes("finish_reason = [\"length\"]", "", &[]));
    }

    #[test]
    fn the_strictest_check_that_fails_decides() {
        let checks = |more: &str| {
            let text = format!(
                "attempts = 2\n{more}[[check]]\nname = \"a\"\nmax_chars = 1\non_fail = \"keep\"\n\
                 [[check]]\nname = \"b\"\nmax_chars = 2\non_fail = \"retry\"\n\
                 [[check]]\nname = \"c\"\nmax_chars = 3\non_fail = \"error\"\n"
            );
            policy(&text).unwrap()
        };
        let judge = |policy: &Policy, text: &str, attempt, temperature| {
            policy.judge(&[finished("", &[]), finished(text, &[])], None, attempt, &prompt(temperature))
        };
        let kept = |names: &[&str]| Verdict::Keep(names.iter().map(|&name| name.to_owned()).collect());
        let strict = checks("");
        assert_eq!(judge(&strict, "1", 1, 1.0), kept(&[]));
        assert_eq!(judge(&strict, "12", 1, 1.0), kept(&["a"]));
        assert_eq!(judge(&strict, "123", 1, 1.0), Verdict::Again);
        let refused =
            |check: &str, n: usize, max: usize| Verdict::Refuse(format!("check {check:?}: {n} characters, more than {max}"));
        assert_eq!(judge(&strict, "123", 2, 1.0), refused("b", 3, 2));
        assert_eq!(judge(&strict, "1234", 1, 1.0), refused("c", 4, 3));
        // A greedy row would give the same again.
        assert_eq!(judge(&strict, "123", 1, 0.0), refused("b", 3, 2));
        assert_eq!(judge(&checks("retry.temperature = 0.5\n"), "123", 1, 0.0), Verdict::Again);
        assert_eq!(judge(&checks("retry.repetition_penalty = 1.2\n"), "123", 1, 0.0), Verdict::Again);
        assert_eq!(judge(&checks("finally = \"keep\"\n"), "123", 2, 1.0), kept(&["a", "b"]));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, why) in [
            ("", "no check"),
            ("attempts = 0\n[[check]]\nmin_chars = 1\non_fail = \"keep\"", "attempts"),
            ("finally = \"retry\"\n[[check]]\nmin_chars = 1\non_fail = \"keep\"", "finally"),
            ("retry.temperature = 3.0\n[[check]]\nmin_chars = 1\non_fail = \"keep\"", "temperature"),
            ("[[check]]\non_fail = \"keep\"", "give one of"),
            ("[[check]]\nmin_chars = 1\nmax_chars = 2\non_fail = \"keep\"", "give one of"),
            ("[[check]]\nregex = '('\non_fail = \"keep\"", "regex"),
            ("[[check]]\nexpression = '%}'\non_fail = \"keep\"", "expression"),
            ("[[check]]\nfinish_reason = [\"boredom\"]\non_fail = \"keep\"", "boredom"),
            ("[[check]]\njson_schema = {type = \"thing\"}\non_fail = \"keep\"", "json_schema"),
            ("[[check]]\nmin_chars = 1\non_fail = \"keep\"\n[[check]]\nmin_chars = 2\non_fail = \"error\"", "twice"),
        ] {
            let error = format!("{:#}", policy(text).err().unwrap_or_else(|| panic!("{text} is taken")));
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
