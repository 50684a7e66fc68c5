//! Sampling parameters of a request body, under every name that clients use for them.

use super::fields::{
    integer, optional_bool, optional_f32, optional_object, optional_str, optional_u64, required_str, shorten, wrong_type,
};
use crate::outcome::{ErrorCode, RowError};
use crate::request::{AnswerFormat, MAX_CHOICES, MAX_STOP_BYTES, MAX_STOP_STRINGS, Params, Repetition};
use serde_json::{Map, Value};
use std::sync::Arc;

/// Fields that this file reads.
pub(super) const READ: &[&str] = &[
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "n",
    "best_of",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "repetition_detection",
    "response_format",
    "regex",
    "grammar",
    "guided_regex",
    "guided_grammar",
    "guided_json",
    "guided_choice",
    "structured_outputs",
];

/// Most `stop_token_ids`.
const MAX_STOP_TOKENS: usize = 256;
/// Most entries of `logit_bias` (the `OpenAI` limit).
const MAX_LOGIT_BIASES: usize = 1024;

/// Reads all of them. `defaults` hold where the body says nothing.
pub(super) fn parse(body: &Map<String, Value>, defaults: &Params) -> Result<Params, RowError> {
    let n = optional_u64(body, "n", 1, MAX_CHOICES.into())?.map_or(defaults.n, |n| n as u32);
    if let Some(best_of) = optional_u64(body, "best_of", 1, MAX_CHOICES.into())?
        && best_of != u64::from(n)
    {
        let message = format!("{best_of} is not supported beside body.n {n}; leave it out");
        return Err(RowError::field(ErrorCode::UnsupportedParameter, "body.best_of", message));
    }
    let min_tokens = optional_u64(body, "min_tokens", 0, u32::MAX.into())?.map_or(defaults.min_tokens, |n| n as u32);
    let format = parse_format(body)?.unwrap_or_else(|| defaults.format.clone());
    let ignore_eos = optional_bool(body, "ignore_eos")?.unwrap_or(defaults.ignore_eos);
    Ok(Params {
        max_tokens: parse_max_tokens(body)?.or(defaults.max_tokens),
        min_tokens,
        n,
        temperature: optional_f32(body, "temperature", 0.0, 2.0)?.unwrap_or(defaults.temperature),
        top_p: optional_f32(body, "top_p", 0.0, 1.0)?.unwrap_or(defaults.top_p),
        top_k: parse_top_k(body)?.unwrap_or(defaults.top_k),
        min_p: optional_f32(body, "min_p", 0.0, 1.0)?.unwrap_or(defaults.min_p),
        presence_penalty: optional_f32(body, "presence_penalty", -2.0, 2.0)?.unwrap_or(defaults.presence_penalty),
        frequency_penalty: optional_f32(body, "frequency_penalty", -2.0, 2.0)?.unwrap_or(defaults.frequency_penalty),
        repetition_penalty: optional_f32(body, "repetition_penalty", 0.01, 100.0)?.unwrap_or(defaults.repetition_penalty),
        logit_bias: parse_logit_bias(body)?.unwrap_or_else(|| defaults.logit_bias.clone()),
        seed: parse_seed(body)?.or(defaults.seed),
        stop: parse_stop(body)?.unwrap_or_else(|| defaults.stop.clone()),
        stop_tokens: parse_stop_tokens(body)?.unwrap_or_else(|| defaults.stop_tokens.clone()),
        ignore_eos,
        repetition: parse_repetition(body)?.or(defaults.repetition),
        logprobs: None,
        echo: false,
        format,
    })
}

fn parse_max_tokens(body: &Map<String, Value>) -> Result<Option<u32>, RowError> {
    let max_tokens = optional_u64(body, "max_tokens", 0, u32::MAX.into())?;
    let max_completion_tokens = optional_u64(body, "max_completion_tokens", 1, u32::MAX.into())?;
    if let (Some(a), Some(b)) = (max_tokens, max_completion_tokens)
        && a != b
    {
        let message = format!("{b} contradicts body.max_tokens {a}; give one of them");
        return Err(RowError::field(ErrorCode::InvalidValue, "body.max_completion_tokens", message));
    }
    let max_tokens = max_completion_tokens.or(max_tokens).map(|n| n as u32);
    let scores_only = body.get("echo") == Some(&Value::Bool(true));
    if max_tokens == Some(0) && !scores_only {
        let message = format!("0 is outside 1 to {} (0 is for body.echo)", u32::MAX);
        return Err(RowError::field(ErrorCode::InvalidValue, "body.max_tokens", message));
    }
    Ok(max_tokens)
}

/// `{"max_pattern_size", "min_count", "min_pattern_size"?}`, as vLLM has it.
fn parse_repetition(body: &Map<String, Value>) -> Result<Option<Repetition>, RowError> {
    const PATH: &str = "body.repetition_detection";
    let Some(object) = optional_object(body, "repetition_detection")? else { return Ok(None) };
    let known = ["max_pattern_size", "min_count", "min_pattern_size"];
    if let Some(other) = object.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{PATH}.{other}"), "is not supported"));
    }
    let number = |name: &str| match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => integer(value, &format!("{PATH}.{name}"), 0, u32::MAX.into()).map(|n| Some(n as u32)),
    };
    let required = |name: &str| {
        number(name)?.ok_or_else(|| RowError::field(ErrorCode::MissingField, format!("{PATH}.{name}"), "is required"))
    };
    let repetition =
        Repetition::new(number("min_pattern_size")?.unwrap_or(1), required("max_pattern_size")?, required("min_count")?);
    let repetition = repetition.map_err(|(name, why)| RowError::field(ErrorCode::InvalidValue, format!("{PATH}.{name}"), why));
    repetition.map(Some)
}

/// −1 and 0 both mean "off" (vLLM's and llama.cpp's spellings).
fn parse_top_k(body: &Map<String, Value>) -> Result<Option<u32>, RowError> {
    if body.get("top_k").and_then(Value::as_i64) == Some(-1) {
        return Ok(Some(0));
    }
    Ok(optional_u64(body, "top_k", 0, u32::MAX.into())?.map(|k| k as u32))
}

/// Any 64-bit integer, signed or not; negative ones keep their bits.
fn parse_seed(body: &Map<String, Value>) -> Result<Option<u64>, RowError> {
    match body.get("seed") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .or_else(|| value.as_i64().map(|seed| seed as u64))
            .map(Some)
            .ok_or_else(|| wrong_type("body.seed", "a 64-bit integer", value)),
    }
}

fn parse_stop(body: &Map<String, Value>) -> Result<Option<Vec<String>>, RowError> {
    let items: Vec<String> = match body.get("stop") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(items)) => items
            .iter()
            .enumerate()
            .filter(|(_, v)| !v.is_null())
            .map(|(i, v)| v.as_str().map(str::to_owned).ok_or_else(|| wrong_type(&format!("body.stop[{i}]"), "a string", v)))
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong_type("body.stop", "a string or an array of strings", other)),
    };
    if items.len() > MAX_STOP_STRINGS {
        let message = format!("at most {MAX_STOP_STRINGS} stop strings are allowed, {} given", items.len());
        return Err(RowError::field(ErrorCode::InvalidValue, "body.stop", message));
    }
    if let Some(i) = items.iter().position(String::is_empty) {
        return Err(RowError::field(ErrorCode::InvalidValue, format!("body.stop[{i}]"), "must not be empty"));
    }
    if let Some((i, item)) = items.iter().enumerate().find(|(_, item)| item.len() > MAX_STOP_BYTES) {
        let message = format!("at most {MAX_STOP_BYTES} bytes are allowed, {} given", item.len());
        return Err(RowError::field(ErrorCode::InvalidValue, format!("body.stop[{i}]"), message));
    }
    Ok(Some(items))
}

fn parse_stop_tokens(body: &Map<String, Value>) -> Result<Option<Vec<u32>>, RowError> {
    let path = "body.stop_token_ids";
    match body.get("stop_token_ids") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(items)) => {
            if items.len() > MAX_STOP_TOKENS {
                let message = format!("at most {MAX_STOP_TOKENS} are allowed, {} given", items.len());
                return Err(RowError::field(ErrorCode::InvalidValue, path, message));
            }
            let ids = items.iter().enumerate().map(|(i, v)| integer(v, &format!("{path}[{i}]"), 0, u32::MAX.into()));
            Ok(Some(ids.map(|id| id.map(|id| id as u32)).collect::<Result<_, _>>()?))
        }
        Some(other) => Err(wrong_type(path, "an array of token ids", other)),
    }
}

/// An object of token ids, as text, to −100 to 100.
fn parse_logit_bias(body: &Map<String, Value>) -> Result<Option<Vec<(u32, f32)>>, RowError> {
    let Some(object) = optional_object(body, "logit_bias")? else { return Ok(None) };
    if object.len() > MAX_LOGIT_BIASES {
        let message = format!("at most {MAX_LOGIT_BIASES} tokens are allowed, {} given", object.len());
        return Err(RowError::field(ErrorCode::InvalidValue, "body.logit_bias", message));
    }
    let mut biases = Vec::with_capacity(object.len());
    for (key, value) in object {
        let path = format!("body.logit_bias.{key}");
        let token = key.parse::<u32>();
        let token = token.map_err(|_| RowError::field(ErrorCode::InvalidValue, &*path, format!("{key:?} is no token id")))?;
        let bias = value.as_f64().ok_or_else(|| wrong_type(&path, "a number", value))?;
        if !(-100.0..=100.0).contains(&bias) {
            return Err(RowError::field(ErrorCode::InvalidValue, path, format!("{bias} is outside -100 to 100")));
        }
        biases.push((token, bias as f32));
    }
    biases.sort_unstable_by_key(|&(token, _)| token);
    Ok(Some(biases))
}

/// `response_format`, or one of the extensions that say the same; at most one of them.
fn parse_format(body: &Map<String, Value>) -> Result<Option<AnswerFormat>, RowError> {
    let mut found: Option<(String, AnswerFormat)> = None;
    let mut take = |name: &str, format: Option<AnswerFormat>| match (format, &found) {
        (None, _) => Ok(()),
        (Some(_), Some((other, _))) => {
            Err(RowError::field(ErrorCode::InvalidValue, format!("body.{name}"), format!("can't be combined with body.{other}")))
        }
        (Some(format), None) => {
            found = Some((name.to_owned(), format));
            Ok(())
        }
    };
    if let Some(object) = optional_object(body, "response_format")? {
        take("response_format", Some(response_format(object)?))?;
    }
    for name in ["regex", "guided_regex"] {
        take(name, optional_str(body, name)?.map(|text| AnswerFormat::Regex(text.to_owned())))?;
    }
    for name in ["grammar", "guided_grammar"] {
        take(name, optional_str(body, name)?.map(|text| AnswerFormat::Lark(text.to_owned())))?;
    }
    take("guided_json", body.get("guided_json").filter(|v| !v.is_null()).map(|v| schema(v, "body.guided_json")).transpose()?)?;
    take(
        "guided_choice",
        body.get("guided_choice").filter(|v| !v.is_null()).map(|v| choice(v, "body.guided_choice")).transpose()?,
    )?;
    if let Some(object) = optional_object(body, "structured_outputs")? {
        for (key, value) in object.iter().filter(|(_, value)| !value.is_null()) {
            let path = format!("body.structured_outputs.{key}");
            let text = || value.as_str().map(str::to_owned).ok_or_else(|| wrong_type(&path, "a string", value));
            let format = match key.as_str() {
                "json" => schema(value, &path)?,
                "regex" => AnswerFormat::Regex(text()?),
                "grammar" => AnswerFormat::Lark(text()?),
                "choice" => choice(value, &path)?,
                "json_object" if value == &Value::Bool(true) => AnswerFormat::JsonObject,
                _ => return Err(RowError::field(ErrorCode::UnsupportedParameter, path, "is not supported")),
            };
            take("structured_outputs", Some(format))?;
        }
    }
    Ok(found.map(|(_, format)| format))
}

/// `{"type": "text" | "json_object" | "json_schema", "json_schema": {"schema": …}}`, and `regex`, `grammar` as extensions.
fn response_format(object: &Map<String, Value>) -> Result<AnswerFormat, RowError> {
    let path = "body.response_format";
    match required_str(object, "type", path)? {
        "text" => Ok(AnswerFormat::Text),
        "json_object" => Ok(AnswerFormat::JsonObject),
        "json_schema" => {
            let inner = format!("{path}.json_schema");
            match object.get("json_schema") {
                Some(Value::Object(spec)) => json_schema(spec, &inner),
                Some(other) => Err(wrong_type(&inner, "an object", other)),
                None => Err(RowError::field(ErrorCode::MissingField, inner, "is required")),
            }
        }
        "regex" => Ok(AnswerFormat::Regex(required_str(object, "regex", path)?.to_owned())),
        "grammar" => Ok(AnswerFormat::Lark(required_str(object, "grammar", path)?.to_owned())),
        other => {
            let message = format!("{other:?} is not supported; supported: text, json_object, json_schema, regex, grammar");
            Err(RowError::field(ErrorCode::InvalidValue, format!("{path}.type"), message))
        }
    }
}

/// `{"name", "schema", "strict"?, "description"?}`
pub(super) fn json_schema(spec: &Map<String, Value>, path: &str) -> Result<AnswerFormat, RowError> {
    match spec.get("schema") {
        None | Some(Value::Null) => Ok(AnswerFormat::JsonObject),
        Some(value) => schema(value, &format!("{path}.schema")),
    }
}

/// A schema as an object, or as its JSON text.
fn schema(value: &Value, path: &str) -> Result<AnswerFormat, RowError> {
    match value {
        Value::Object(_) => Ok(AnswerFormat::JsonSchema(Arc::new(value.clone()))),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(value @ Value::Object(_)) => Ok(AnswerFormat::JsonSchema(Arc::new(value))),
            _ => Err(RowError::field(ErrorCode::InvalidValue, path, format!("{} is no JSON schema", shorten(value)))),
        },
        other => Err(wrong_type(path, "an object", other)),
    }
}

/// One of some texts.
fn choice(value: &Value, path: &str) -> Result<AnswerFormat, RowError> {
    let items = value.as_array().ok_or_else(|| wrong_type(path, "an array of strings", value))?;
    let texts: Option<Vec<&str>> = items.iter().map(Value::as_str).collect();
    match texts {
        Some(texts) if !texts.is_empty() => Ok(AnswerFormat::Regex(one_of(&texts))),
        _ => Err(RowError::field(ErrorCode::InvalidValue, path, "must be an array of at least one string")),
    }
}

/// The regular expression of some texts.
pub fn one_of(texts: &[&str]) -> String {
    texts.iter().map(|text| regex::escape(text)).collect::<Vec<_>>().join("|")
}
