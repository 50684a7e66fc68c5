//! Input items of responses: with names, as they are kept and shown, and the conversation that a response goes on with.
//! Invariants: every item of a response has an id of its own; a chain of responses is the same prompt as all of its items
//! sent at once.

use super::App;
use super::auth::Owner;
use super::errors::ApiError;
use super::ids;
use super::trajectories;
use crate::format::openai::{Endpoint, parse_body};
use crate::store::responses;
use axum::http::StatusCode;
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// Most responses of a chain.
const MAX_CHAIN: usize = 4096;

/// Puts what came before in front of a body's input; gives the body's own items, with names, and the trajectory of what came
/// before: what the nearest that names one names, or the id of the first.
///
/// # Errors
/// No such response before, or one that nothing can follow.
pub(super) async fn join(
    app: &App,
    owner: &Owner,
    previous: Option<&str>,
    body: &mut Map<String, Value>,
) -> Result<(Vec<Value>, Option<String>), ApiError> {
    let items = body.get("input").map(named).unwrap_or_default();
    let Some(previous) = previous else { return Ok((items, None)) };
    // What is wrong with it is said in its own places.
    parse_body(0, Endpoint::Responses, body, &app.defaults)?;
    let (owner, first, max_bytes) = (owner.to_string(), previous.to_owned(), app.max_body_bytes);
    let chain = app.store.read(move |connection| {
        let (mut chain, mut next, mut n_bytes) = (Vec::new(), Some(first), 0);
        while let Some(id) = next.take() {
            let Some(found) = responses::get(connection, &owner, &id)?.filter(|_| chain.len() < MAX_CHAIN) else {
                return Ok(Err(Missing::Unknown(id)));
            };
            if !["completed", "incomplete"].contains(&found.status.as_str()) {
                return Ok(Err(Missing::NotDone(id, found.status)));
            }
            n_bytes += found.input.len() + found.body.len();
            if n_bytes > max_bytes {
                return Ok(Err(Missing::TooLong(max_bytes)));
            }
            next = found.previous;
            chain.push((found.input, found.body));
        }
        Ok(Ok(chain))
    });
    let chain = chain.await?.map_err(|missing| missing.error(previous))?;
    let (mut input, mut first, mut named) = (Vec::new(), None, None);
    for (own, response) in chain.iter().rev() {
        let response = parsed(response)?;
        input.extend(array(&parsed(own)?));
        input.extend(array(&response["output"]));
        first = first.or_else(|| response["id"].as_str().map(str::to_owned));
        named = trajectories::inherited(&response).or(named);
    }
    input.extend(items.iter().cloned());
    body.insert("input".into(), input.into());
    Ok((items, named.or(first)))
}

fn parsed(text: &str) -> Result<Value, ApiError> {
    serde_json::from_str(text).map_err(|error| ApiError::from(anyhow::Error::from(error)))
}

fn array(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

enum Missing {
    Unknown(String),
    NotDone(String, String),
    TooLong(usize),
}

impl Missing {
    fn error(self, previous: &str) -> ApiError {
        let (status, message) = match self {
            Self::Unknown(id) if id == previous => {
                (StatusCode::NOT_FOUND, format!("Previous response with id '{id}' not found."))
            }
            Self::Unknown(id) => {
                let message = format!("Previous response with id '{previous}' follows '{id}', which is not found.");
                (StatusCode::NOT_FOUND, message)
            }
            Self::TooLong(max_bytes) => {
                let message = format!("The responses before are longer than {max_bytes} bytes together.");
                return ApiError::invalid_value("previous_response_id", message);
            }
            Self::NotDone(id, state) => {
                (StatusCode::BAD_REQUEST, format!("Previous response with id '{id}' is {state}: nothing can follow it."))
            }
        };
        let error = ApiError::new(status, Some("previous_response_not_found"), message);
        ApiError { param: Some("previous_response_id".into()), ..error }
    }
}

/// Items with ids. What is no item is left out: its request is refused.
fn named(input: &Value) -> Vec<Value> {
    if let Value::String(text) = input {
        return vec![message("user", &json!(text), None, &mut HashSet::new())];
    }
    let mut used = HashSet::new();
    let items = input.as_array().into_iter().flatten().filter_map(Value::as_object);
    items.map(|item| named_item(item, &mut used)).collect()
}

fn named_item(item: &Map<String, Value>, used: &mut HashSet<String>) -> Value {
    let kind = item.get("type").and_then(Value::as_str).unwrap_or("message");
    if kind == "message" {
        let role = item.get("role").and_then(Value::as_str).unwrap_or_default();
        return message(role, item.get("content").unwrap_or(&Value::Null), item.get("id"), used);
    }
    let prefix = match kind {
        "function_call" => "fc_",
        "function_call_output" => "fco_",
        _ => "rs_",
    };
    let mut named = item.clone();
    named.retain(|_, value| !value.is_null());
    named.insert("id".into(), id(prefix, item.get("id"), used).into());
    if kind != "reasoning" {
        named.entry("status").or_insert("completed".into());
    }
    named.into()
}

fn message(role: &str, content: &Value, id_given: Option<&Value>, used: &mut HashSet<String>) -> Value {
    let is_output = role == "assistant";
    let part = |text: &Value| {
        if is_output {
            json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
        } else {
            json!({"type": "input_text", "text": text})
        }
    };
    let content = match content {
        Value::Array(parts) => {
            parts.iter().map(|own| if own["text"].is_string() { part(&own["text"]) } else { own.clone() }).collect()
        }
        text => vec![part(text)],
    };
    json!({"type": "message", "id": id("msg_", id_given, used), "role": role, "status": "completed", "content": content})
}

/// The id that was given, if nobody has it yet; else a new one.
fn id(prefix: &str, given: Option<&Value>, used: &mut HashSet<String>) -> String {
    let given = given.and_then(Value::as_str).filter(|id| !id.is_empty() && !used.contains(*id));
    let id = given.map_or_else(|| ids::new(prefix), str::to_owned);
    used.insert(id.clone());
    id
}
