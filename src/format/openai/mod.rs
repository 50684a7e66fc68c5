//! `OpenAI`'s wire form of a row: parses Batch input lines and request bodies into a [`Request`], writes outcomes as
//! Batch output and error lines (`answer`). The only module that knows `OpenAI`'s field names.
//!
//! Invariant: a field with meaning is either honoured or refused by name ([`ErrorCode::UnsupportedParameter`]); none is
//! silently dropped. Fields that have no effect on the completion (`user`, `metadata`, …) are accepted, and so is any
//! field at the value that means "off".

pub mod answer;
pub(super) mod fields;
mod line;
pub(super) mod messages;
mod params;
mod plain;
mod responses;

pub use fields::kind;
pub use line::PlainLines;
pub use params::one_of;

use super::anthropic;
use crate::outcome::{ErrorCode, RowError};
use crate::request::{ChatOptions, Input, MAX_TOP_LOGPROBS, Params, Request, Truncate};
use fields::{optional_bool, optional_str, optional_u64, required_str, shorten, wrong_type};
use serde_json::{Map, Value};

/// Longest `custom_id`, in characters (`OpenAI`'s limit).
pub const MAX_CUSTOM_ID_CHARS: usize = 512;
/// Most alternatives per token that `/v1/completions` may ask for.
const MAX_COMPLETION_LOGPROBS: u64 = 20;
/// Most prompts of one row.
const MAX_PROMPTS: usize = 2048;

/// Tokens to generate where a completion's row and the job say nothing, as the API has it; without it a completion would
/// run to the end of the context.
pub const COMPLETIONS_MAX_TOKENS: u32 = 16;
/// Fields of a chat that this file reads.
const CHAT: &[&str] = &["model", "logprobs", "truncate_prompt_tokens", "messages", "top_logprobs"];
/// Fields of a text completion that this file reads.
const TEXT: &[&str] = &["model", "logprobs", "truncate_prompt_tokens", "prompt", "echo"];

/// The endpoints that rows of a job may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/messages`, in Anthropic's form.
    Messages,
}

impl Endpoint {
    /// All endpoints with their paths.
    const ALL: [(&'static str, Self); 4] = [
        ("/v1/chat/completions", Self::ChatCompletions),
        ("/v1/completions", Self::Completions),
        ("/v1/responses", Self::Responses),
        ("/v1/messages", Self::Messages),
    ];

    /// Its path.
    pub fn path(self) -> &'static str {
        Self::ALL.iter().find(|(_, endpoint)| *endpoint == self).map_or("", |(path, _)| path)
    }

    /// The endpoint of a path.
    pub fn parse(url: &str) -> Option<Self> {
        Self::ALL.iter().find(|(path, _)| *path == url).map(|&(_, endpoint)| endpoint)
    }
}

/// A Batch input line: what identifies it, and the request, if that much could be read.
#[derive(Debug)]
pub struct BatchLine {
    /// The line's `custom_id`, if it has a usable one.
    pub custom_id: Option<String>,
    /// The request, or what is wrong with the line.
    pub request: Result<BatchRequest, RowError>,
}

/// What a Batch line asks for.
#[derive(Debug)]
pub struct BatchRequest {
    /// Whose form the body has.
    pub endpoint: Endpoint,
    /// The row.
    pub request: Request,
    /// As [`parse_body`] gives it.
    pub echo: Option<Box<Value>>,
}

/// Parses one Batch input line. `defaults` are the sampling settings that hold where the row says nothing.
pub fn parse_batch_line(row_idx: u64, line: &str, defaults: &Params) -> BatchLine {
    plain::parse(row_idx, line, defaults).unwrap_or_else(|| parse_any_line(row_idx, line, defaults))
}

/// As [`parse_batch_line`], whatever the line is.
fn parse_any_line(row_idx: u64, line: &str, defaults: &Params) -> BatchLine {
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

fn parse_envelope(row_idx: u64, object: &Map<String, Value>, defaults: &Params) -> Result<BatchRequest, RowError> {
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
    let read = |body: &Map<String, Value>| {
        check_unheard(body)?;
        parse_body(row_idx, endpoint, body, defaults)
    };
    let (request, echo) = match object.get("body") {
        None => return Err(RowError::field(ErrorCode::MissingField, "body", "is required")),
        Some(Value::Object(body)) => read(body),
        // Parquet files often carry the body as JSON text in a string column.
        Some(Value::String(text)) => {
            let body = parse_object(text).map_err(|e| RowError::field(e.code, "body", e.message))?;
            read(&body)
        }
        Some(other) => Err(wrong_type("body", "an object", other)),
    }?;
    let known = ["custom_id", "method", "url", "body"];
    if let Some((key, _)) = object.iter().find(|(key, value)| !known.contains(&key.as_str()) && !value.is_null()) {
        return Err(RowError::field(ErrorCode::UnsupportedParameter, key, "is not a field of a batch line"));
    }
    Ok(BatchRequest { endpoint, request, echo })
}

/// Nobody is told of one line: who wants to be would wait for ever.
fn check_unheard(body: &Map<String, Value>) -> Result<(), RowError> {
    let asked = ["completion_webhook", "webhook_token"].into_iter().find(|key| {
        let value = body.get("metadata").and_then(|metadata| metadata.get(key));
        value.is_some_and(|value| !value.is_null())
    });
    asked.map_or(Ok(()), |key| {
        let message = "is for background responses and whole batches, in the batch's own metadata";
        Err(RowError::field(ErrorCode::UnsupportedParameter, format!("body.metadata.{key}"), message))
    })
}

/// Parses the body of a request to an endpoint; with it, what the answer repeats of the request's settings (Responses), or
/// which strings may end it (Messages, where there are any).
///
/// # Errors
/// The first fault, its field named from `body.` on.
pub fn parse_body(
    row_idx: u64,
    endpoint: Endpoint,
    body: &Map<String, Value>,
    defaults: &Params,
) -> Result<(Request, Option<Box<Value>>), RowError> {
    if endpoint == Endpoint::Responses {
        return responses::parse(row_idx, body, defaults).map(|(request, echo)| (request, Some(Box::new(echo))));
    }
    if endpoint == Endpoint::Messages {
        return anthropic::parse_row(row_idx, body, defaults).map(|(request, stops)| (request, stops.map(Box::new)));
    }
    let own: &[&[&str]] = match endpoint {
        Endpoint::ChatCompletions => &[CHAT, params::READ, messages::CHAT_OPTIONS],
        _ => &[TEXT, params::READ],
    };
    for (key, value) in body {
        check_known(own, key, value)?;
    }
    let mut params = params::parse(body, defaults)?;
    let mut chat = ChatOptions::default();
    let inputs = if endpoint == Endpoint::ChatCompletions {
        params.logprobs = parse_chat_logprobs(body)?;
        chat = messages::parse_chat_options(body)?;
        vec![Input::Messages(messages::parse_messages(body)?)]
    } else {
        params.logprobs = optional_u64(body, "logprobs", 0, MAX_COMPLETION_LOGPROBS)?.map(|n| n as u8);
        params.echo = optional_bool(body, "echo")?.unwrap_or(false);
        params.max_tokens = params.max_tokens.or(Some(COMPLETIONS_MAX_TOKENS));
        parse_prompts(body)?
    };
    let model = optional_str(body, "model")?.map(str::to_owned);
    Ok((Request { row_idx, model, inputs, params, chat, truncate: parse_truncate(body)? }, None))
}

/// Whether a body's field is known to an endpoint, whatever its value.
pub fn is_known(endpoint: Endpoint, key: &str) -> bool {
    let own: &[&[&str]] = match endpoint {
        Endpoint::Responses => &[responses::READ, params::READ],
        Endpoint::ChatCompletions => &[CHAT, params::READ, messages::CHAT_OPTIONS],
        Endpoint::Completions => &[TEXT, params::READ],
        Endpoint::Messages => return anthropic::is_known(key),
    };
    WITHOUT_EFFECT.contains(&key) || own.iter().any(|names| names.contains(&key))
}

/// vLLM's extension: so many last tokens of the prompt are kept; −1 is as many as fit.
fn parse_truncate(body: &Map<String, Value>) -> Result<Truncate, RowError> {
    if body.get("truncate_prompt_tokens").and_then(Value::as_i64) == Some(-1) {
        return Ok(Truncate::KeepWhatFits);
    }
    let kept = optional_u64(body, "truncate_prompt_tokens", 1, u32::MAX.into())?;
    Ok(kept.map_or(Truncate::Never, |n| Truncate::KeepLast(n as u32)))
}

/// Fields that do not change a completion here.
const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "metadata",
    "store",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "stream_options",
    "service_tier",
    "verbosity",
    "prediction",
];

/// Refuses a field whose meaning is not supported, unless its value is the one that means "off".
fn check_known(own: &[&[&str]], key: &str, value: &Value) -> Result<(), RowError> {
    let is_read = own.iter().any(|names| names.contains(&key));
    if is_read || WITHOUT_EFFECT.contains(&key) || is_off(key, value) {
        return Ok(());
    }
    let path = format!("body.{key}");
    Err(RowError::field(ErrorCode::UnsupportedParameter, path, format!("{} is not supported", shorten(value))))
}

fn is_off(key: &str, value: &Value) -> bool {
    match key {
        _ if value.is_null() => true,
        "length_penalty" => value.as_f64() == Some(1.0),
        "stream" | "echo" | "background" | "use_beam_search" => value == &Value::Bool(false),
        "skip_special_tokens" | "spaces_between_special_tokens" => value == &Value::Bool(true),
        "tools" | "functions" | "context_management" => value.as_array().is_some_and(Vec::is_empty),
        "tool_choice" | "function_call" => value == "none" || value == "auto",
        "modalities" => value.as_array().is_some_and(|m| m.len() == 1 && m[0] == "text"),
        "suffix" => value == "",
        _ => false,
    }
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

/// A text, a list of token ids, or a list of either: each is a prompt of its own.
fn parse_prompts(body: &Map<String, Value>) -> Result<Vec<Input>, RowError> {
    let path = "body.prompt";
    match body.get("prompt") {
        None | Some(Value::Null) => Err(RowError::field(ErrorCode::MissingField, path, "is required")),
        Some(Value::Array(items)) if !items.is_empty() && !items.iter().all(Value::is_number) => {
            if items.len() > MAX_PROMPTS {
                let message = format!("at most {MAX_PROMPTS} prompts are allowed in one row, {} given", items.len());
                return Err(RowError::field(ErrorCode::InvalidValue, path, message));
            }
            items.iter().enumerate().map(|(i, item)| parse_prompt(item, &format!("{path}[{i}]"))).collect()
        }
        Some(prompt) => Ok(vec![parse_prompt(prompt, path)?]),
    }
}

fn parse_prompt(value: &Value, path: &str) -> Result<Input, RowError> {
    match value {
        Value::String(text) => Ok(Input::Text(text.clone())),
        Value::Array(items) if items.is_empty() => Err(RowError::field(ErrorCode::InvalidValue, path, "must not be empty")),
        Value::Array(items) => {
            let ids = items.iter().enumerate().map(|(i, v)| {
                let id = v.as_u64().and_then(|id| u32::try_from(id).ok());
                id.ok_or_else(|| RowError::field(ErrorCode::InvalidValue, format!("{path}[{i}]"), format!("{v} is no token id")))
            });
            ids.collect::<Result<_, _>>().map(Input::Tokens)
        }
        other => Err(wrong_type(path, "a string or an array of token ids", other)),
    }
}
