//! `OpenAI`'s wire form of a row: parses Batch input lines and request bodies into a [`Request`], writes outcomes as
//! Batch output and error lines. The only file (with its twin for the answers, `openai_answer`) that knows `OpenAI`'s
//! field names.
//!
//! Invariant: a field with meaning is either honoured or refused by name ([`ErrorCode::UnsupportedParameter`]); none is
//! silently dropped. Fields that have no effect on the completion (`user`, `metadata`, …) are accepted, and so is any
//! field at the value that means "off".

use crate::outcome::{ErrorCode, RowError};
use crate::request::{Input, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, Message, Params, Request};
use serde_json::{Map, Value};

/// Longest `custom_id`, in characters (`OpenAI`'s limit).
pub const MAX_CUSTOM_ID_CHARS: usize = 512;
/// Most alternatives per token that `/v1/completions` may ask for.
const MAX_COMPLETION_LOGPROBS: u64 = 20;

/// The endpoints that rows of a job may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
}

impl Endpoint {
    /// All endpoints with their paths.
    const ALL: [(&'static str, Self); 2] =
        [("/v1/chat/completions", Self::ChatCompletions), ("/v1/completions", Self::Completions)];

    fn parse(url: &str) -> Option<Self> {
        Self::ALL.iter().find(|(path, _)| *path == url).map(|&(_, endpoint)| endpoint)
    }
}

/// A Batch input line: what identifies it, and the request, if that much could be read.
#[derive(Debug)]
pub struct BatchLine {
    /// The line's `custom_id`, if it has a usable one.
    pub custom_id: Option<String>,
    /// The endpoint and the request, or what is wrong with the line.
    pub request: Result<(Endpoint, Request), RowError>,
}

/// Parses one Batch input line. `defaults` are the sampling settings that hold where the row says nothing.
pub fn parse_batch_line(row_idx: u64, line: &str, defaults: &Params) -> BatchLine {
    let object = match parse_object(line) {
        Ok(object) => object,
        Err(error) => return BatchLine { custom_id: None, request: Err(error) },
    };
    let custom_id = object.get("custom_id").and_then(Value::as_str).map(str::to_owned);
    let request = parse_envelope(row_idx, &object, defaults);
    BatchLine { custom_id, request }
}

/// Parses a text that must be one JSON object.
pub fn parse_object(text: &str) -> Result<Map<String, Value>, RowError> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(RowError::row(ErrorCode::InvalidJson, format!("the line is {}, not a JSON object", kind(&other)))),
        Err(error) => Err(RowError::row(ErrorCode::InvalidJson, format!("the line is not valid JSON: {error}"))),
    }
}

fn parse_envelope(row_idx: u64, object: &Map<String, Value>, defaults: &Params) -> Result<(Endpoint, Request), RowError> {
    let custom_id = required_str(object, "custom_id", "")?;
    let n_chars = custom_id.chars().count();
    if n_chars == 0 || n_chars > MAX_CUSTOM_ID_CHARS {
        let message = format!("must have 1 to {MAX_CUSTOM_ID_CHARS} characters, has {n_chars}");
        return Err(RowError::field(ErrorCode::InvalidValue, "custom_id", message));
    }
    let method = required_str(object, "method", "")?;
    if method != "POST" {
        return Err(RowError::field(ErrorCode::InvalidValue, "method", format!("must be \"POST\", is {method:?}")));
    }
    let url = required_str(object, "url", "")?;
    let endpoint = Endpoint::parse(url).ok_or_else(|| {
        let known: Vec<_> = Endpoint::ALL.iter().map(|(path, _)| *path).collect();
        RowError::field(ErrorCode::UrlMismatch, "url", format!("{url:?} is not supported; supported: {}", known.join(", ")))
    })?;
    let body = match object.get("body") {
        None => return Err(RowError::field(ErrorCode::MissingField, "body", "is required")),
        Some(Value::Object(body)) => parse_body_endpoint(row_idx, endpoint, body, defaults),
        // Parquet files often carry the body as JSON text in a string column.
        Some(Value::String(text)) => {
            let body = parse_object(text).map_err(|e| RowError::field(e.code, "body", e.message))?;
            parse_body_endpoint(row_idx, endpoint, &body, defaults)
        }
        Some(other) => Err(wrong_type("body", "an object", other)),
    }?;
    let known = ["custom_id", "method", "url", "body"];
    if let Some((key, _)) = object.iter().find(|(key, value)| !known.contains(&key.as_str()) && !value.is_null()) {
        return Err(RowError::field(ErrorCode::UnsupportedParameter, key, "is not a field of a batch line"));
    }
    Ok((endpoint, body))
}

fn parse_body_endpoint(
    row_idx: u64,
    endpoint: Endpoint,
    body: &Map<String, Value>,
    defaults: &Params,
) -> Result<Request, RowError> {
    for (key, value) in body {
        check_known(endpoint, key, value)?;
    }
    let mut params = parse_params(body, defaults)?;
    let input = match endpoint {
        Endpoint::ChatCompletions => {
            params.logprobs = parse_chat_logprobs(body)?;
            parse_messages(body)?
        }
        Endpoint::Completions => {
            params.logprobs = optional_u64(body, "logprobs", 0, MAX_COMPLETION_LOGPROBS)?.map(|n| n as u8);
            // The API's own default; without it a completion would run to the end of the context.
            params.max_tokens = params.max_tokens.or(Some(16));
            parse_prompt(body)?
        }
    };
    let model = optional_str(body, "model")?.map(str::to_owned);
    Ok(Request { row_idx, model, input, params })
}

/// Fields that are read; the rest must be without effect.
const READ: [&str; 10] =
    ["model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "logprobs"];
/// Fields that do not change a completion here.
const WITHOUT_EFFECT: [&str; 8] = [
    "user",
    "metadata",
    "store",
    "prompt_cache_key",
    "safety_identifier",
    "parallel_tool_calls",
    "stream_options",
    "service_tier",
];

/// Refuses a field whose meaning is not supported, unless its value is the one that means "off".
fn check_known(endpoint: Endpoint, key: &str, value: &Value) -> Result<(), RowError> {
    let own: &[&str] = match endpoint {
        Endpoint::ChatCompletions => &["messages", "top_logprobs"],
        Endpoint::Completions => &["prompt"],
    };
    if READ.contains(&key) || own.contains(&key) || WITHOUT_EFFECT.contains(&key) || is_off(key, value) {
        return Ok(());
    }
    let path = format!("body.{key}");
    Err(RowError::field(ErrorCode::UnsupportedParameter, path, format!("{} is not supported", shorten(value))))
}

fn is_off(key: &str, value: &Value) -> bool {
    let number = |off: f64| value.as_f64() == Some(off);
    match key {
        _ if value.is_null() => true,
        "n" | "best_of" | "repetition_penalty" | "length_penalty" => number(1.0),
        "presence_penalty" | "frequency_penalty" | "min_p" | "min_tokens" => number(0.0),
        "stream" | "echo" | "background" | "use_beam_search" => value == &Value::Bool(false),
        "skip_special_tokens" | "spaces_between_special_tokens" | "add_generation_prompt" => value == &Value::Bool(true),
        "logit_bias" => value.as_object().is_some_and(Map::is_empty),
        "tools" | "functions" | "stop_token_ids" => value.as_array().is_some_and(Vec::is_empty),
        "tool_choice" | "function_call" => value == "none" || value == "auto",
        "response_format" => value.get("type").is_some_and(|t| t == "text"),
        "modalities" => value.as_array().is_some_and(|m| m.len() == 1 && m[0] == "text"),
        "suffix" => value == "",
        _ => false,
    }
}

fn parse_params(body: &Map<String, Value>, defaults: &Params) -> Result<Params, RowError> {
    let max_tokens = optional_u64(body, "max_tokens", 1, u32::MAX.into())?;
    let max_completion_tokens = optional_u64(body, "max_completion_tokens", 1, u32::MAX.into())?;
    if let (Some(a), Some(b)) = (max_tokens, max_completion_tokens)
        && a != b
    {
        let message = format!("{b} contradicts body.max_tokens {a}; give one of them");
        return Err(RowError::field(ErrorCode::InvalidValue, "body.max_completion_tokens", message));
    }
    Ok(Params {
        max_tokens: max_completion_tokens.or(max_tokens).map(|n| n as u32).or(defaults.max_tokens),
        temperature: optional_f32(body, "temperature", 0.0, 2.0)?.unwrap_or(defaults.temperature),
        top_p: optional_f32(body, "top_p", f32::MIN_POSITIVE, 1.0)?.unwrap_or(defaults.top_p),
        top_k: parse_top_k(body)?.unwrap_or(defaults.top_k),
        seed: parse_seed(body)?.or(defaults.seed),
        stop: parse_stop(body)?.unwrap_or_else(|| defaults.stop.clone()),
        ignore_eos: optional_bool(body, "ignore_eos")?.unwrap_or(defaults.ignore_eos),
        logprobs: None,
    })
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
    let items = match body.get("stop") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(items)) => items
            .iter()
            .enumerate()
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
    Ok(Some(items))
}

/// `logprobs: true` with `top_logprobs: n`.
fn parse_chat_logprobs(body: &Map<String, Value>) -> Result<Option<u8>, RowError> {
    let wanted = optional_bool(body, "logprobs")?.unwrap_or(false);
    let n_top = optional_u64(body, "top_logprobs", 0, MAX_TOP_LOGPROBS as u64)?;
    match (wanted, n_top) {
        (true, n_top) => Ok(Some(n_top.unwrap_or(0) as u8)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(RowError::field(ErrorCode::InvalidValue, "body.top_logprobs", "needs body.logprobs to be true")),
    }
}

fn parse_messages(body: &Map<String, Value>) -> Result<Input, RowError> {
    let value = body.get("messages").ok_or_else(|| RowError::field(ErrorCode::MissingField, "body.messages", "is required"))?;
    let items = value.as_array().ok_or_else(|| wrong_type("body.messages", "an array", value))?;
    if items.is_empty() {
        return Err(RowError::field(ErrorCode::InvalidValue, "body.messages", "must hold at least one message"));
    }
    let messages = items.iter().enumerate().map(|(i, item)| parse_message(&format!("body.messages[{i}]"), item));
    Ok(Input::Messages(messages.collect::<Result<_, _>>()?))
}

fn parse_message(path: &str, item: &Value) -> Result<Message, RowError> {
    let object = item.as_object().ok_or_else(|| wrong_type(path, "an object", item))?;
    for (key, value) in object {
        let known = ["role", "content", "name"].contains(&key.as_str());
        let off = value.is_null() || (key == "tool_calls" && value.as_array().is_some_and(Vec::is_empty));
        if !known && !off {
            return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{path}.{key}"), "is not supported"));
        }
    }
    let role = required_str(object, "role", path)?;
    if !["system", "developer", "user", "assistant"].contains(&role) {
        let message = format!("{role:?} is not supported; supported: system, developer, user, assistant");
        return Err(RowError::field(ErrorCode::InvalidValue, format!("{path}.role"), message));
    }
    let content = object.get("content").unwrap_or(&Value::Null);
    let name = match object.get("name") {
        None | Some(Value::Null) => None,
        Some(Value::String(name)) => Some(name.clone()),
        Some(other) => return Err(wrong_type(&format!("{path}.name"), "a string", other)),
    };
    Ok(Message { role: role.to_owned(), content: parse_content(&format!("{path}.content"), content)?, name })
}

/// A string, or text parts, which are joined.
fn parse_content(path: &str, content: &Value) -> Result<String, RowError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Null => Err(RowError::field(ErrorCode::MissingField, path, "is required")),
        Value::Array(parts) => parts.iter().enumerate().map(|(i, part)| parse_text_part(&format!("{path}[{i}]"), part)).collect(),
        other => Err(wrong_type(path, "a string or an array of text parts", other)),
    }
}

fn parse_text_part<'a>(path: &str, part: &'a Value) -> Result<&'a str, RowError> {
    let object = part.as_object().ok_or_else(|| wrong_type(path, "an object", part))?;
    let kind = required_str(object, "type", path)?;
    if kind != "text" {
        let message = format!("{kind:?} is not supported; supported: text");
        return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{path}.type"), message));
    }
    if let Some((key, _)) = object.iter().find(|(key, value)| !["type", "text"].contains(&key.as_str()) && !value.is_null()) {
        return Err(RowError::field(ErrorCode::UnsupportedParameter, format!("{path}.{key}"), "is not supported"));
    }
    required_str(object, "text", path)
}

fn parse_prompt(body: &Map<String, Value>) -> Result<Input, RowError> {
    let path = "body.prompt";
    match body.get("prompt") {
        None | Some(Value::Null) => Err(RowError::field(ErrorCode::MissingField, path, "is required")),
        Some(Value::String(text)) => Ok(Input::Text(text.clone())),
        Some(Value::Array(items)) if !items.is_empty() && items.iter().all(Value::is_number) => items
            .iter()
            .enumerate()
            .map(|(i, v)| {
                let id = v.as_u64().and_then(|id| u32::try_from(id).ok());
                id.ok_or_else(|| RowError::field(ErrorCode::InvalidValue, format!("{path}[{i}]"), format!("{v} is no token id")))
            })
            .collect::<Result<_, _>>()
            .map(Input::Tokens),
        Some(Value::Array(items)) if items.len() == 1 && items[0].is_string() => {
            Ok(Input::Text(items[0].as_str().unwrap_or_default().to_owned()))
        }
        Some(Value::Array(items)) if items.is_empty() => Err(RowError::field(ErrorCode::InvalidValue, path, "must not be empty")),
        Some(Value::Array(_)) => {
            Err(RowError::field(ErrorCode::UnsupportedParameter, path, "several prompts in one row are not supported"))
        }
        Some(other) => Err(wrong_type(path, "a string or an array of token ids", other)),
    }
}

fn required_str<'a>(object: &'a Map<String, Value>, key: &str, parent: &str) -> Result<&'a str, RowError> {
    let path = if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") };
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        None => Err(RowError::field(ErrorCode::MissingField, path, "is required")),
        Some(other) => Err(wrong_type(&path, "a string", other)),
    }
}

fn optional_str<'a>(body: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, RowError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong_type(&format!("body.{key}"), "a string", other)),
    }
}

fn optional_bool(body: &Map<String, Value>, key: &str) -> Result<Option<bool>, RowError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => Err(wrong_type(&format!("body.{key}"), "true or false", other)),
    }
}

fn optional_u64(body: &Map<String, Value>, key: &str, min: u64, max: u64) -> Result<Option<u64>, RowError> {
    let path = || format!("body.{key}");
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from)) {
            None => Err(wrong_type(&path(), "an integer", value)),
            Some(n) if (i128::from(min)..=i128::from(max)).contains(&n) => Ok(Some(n as u64)),
            Some(n) => Err(RowError::field(ErrorCode::InvalidValue, path(), format!("{n} is outside {min} to {max}"))),
        },
    }
}

fn optional_f32(body: &Map<String, Value>, key: &str, min: f32, max: f32) -> Result<Option<f32>, RowError> {
    let path = || format!("body.{key}");
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            None => Err(wrong_type(&path(), "a number", value)),
            Some(x) if (f64::from(min)..=f64::from(max)).contains(&x) => Ok(Some(x as f32)),
            Some(x) if min > 0.0 => {
                Err(RowError::field(ErrorCode::InvalidValue, path(), format!("{x} must be over 0 and at most {max}")))
            }
            Some(x) => Err(RowError::field(ErrorCode::InvalidValue, path(), format!("{x} is outside {min} to {max}"))),
        },
    }
}

fn wrong_type(path: &str, expected: &str, found: &Value) -> RowError {
    RowError::field(ErrorCode::InvalidType, path, format!("must be {expected}, is {}", kind(found)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A value for a message: its JSON text, cut to what a person reads.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
