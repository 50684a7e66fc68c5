//! Input items of responses: with names, as they are kept and shown, and the conversation that a response goes on with.
//! Invariants: every item of a response has an id of its own, from which it is found again; a chain of responses is the same prompt as all of its items
//! sent at once.

use super::App;
use super::auth::Owner;
use super::errors::ApiError;
use super::trajectories;
use crate::format::openai::{Endpoint, parse_body};
use crate::store::responses;
use anyhow::Context as _;
use axum::http::StatusCode;
use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};

/// Most responses of a chain.
const MAX_CHAIN: usize = 4096;

/// Most items that an input refers to.
const MAX_REFERENCES: usize = 1024;

/// Puts what came before in front of a body's input, and items in the place of references to them; gives the body's own items,
/// with names, and the trajectory of what came before: what the nearest that names one names, or the id of the first. `id` is the
/// end of the response's ids.
///
/// # Errors
/// No such response before, or one that nothing can follow; no such item.
pub(super) async fn join(
    app: &App,
    owner: &Owner,
    (id, previous): (&str, Option<&str>),
    body: &mut Map<String, Value>,
) -> Result<(Vec<Value>, Option<String>), ApiError> {
    let has_references = body.get("input").is_some_and(|input| references(input).next().is_some());
    // What is wrong with it is said in its own places.
    if previous.is_some() && !has_references {
        parse_body(0, Endpoint::Responses, body, &app.defaults)?;
    }
    let before = match previous {
        Some(previous) => before(app, owner, previous).await?,
        None => Before::default(),
    };
    if has_references {
        resolve(app, owner, &before.items, &mut body["input"]).await?;
        parse_body(0, Endpoint::Responses, body, &app.defaults)?;
    }
    let items = body.get("input").map(|input| named(input, id)).unwrap_or_default();
    if previous.is_some() {
        body.insert("input".into(), before.items.into_iter().chain(items.iter().cloned()).collect());
    }
    Ok((items, before.trajectory))
}

/// What came before a response.
#[derive(Default)]
struct Before {
    items: Vec<Value>,
    trajectory: Option<String>,
}

async fn before(app: &App, owner: &Owner, previous: &str) -> Result<Before, ApiError> {
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
    Ok(Before { items: input, trajectory: named.or(first) })
}

/// The ids of items that an input refers to.
fn references(input: &Value) -> impl Iterator<Item = &str> {
    input.as_array().into_iter().flatten().filter_map(referred)
}

/// The id of the item that another refers to, if it does: `{"type": "item_reference", "id"}`, or the id alone.
fn referred(item: &Value) -> Option<&str> {
    let object = item.as_object()?;
    let is_reference = match object.get("type") {
        Some(Value::String(kind)) => kind == "item_reference",
        None | Some(Value::Null) => !["role", "content"].iter().any(|key| object.contains_key(*key)),
        Some(_) => false,
    };
    object.get("id").filter(|_| is_reference)?.as_str()
}

/// Puts an owner's items in the place of references to them: those of `before`, and those of any response that is stored.
async fn resolve(app: &App, owner: &Owner, before: &[Value], input: &mut Value) -> Result<(), ApiError> {
    let ids: HashSet<String> = references(input).map(str::to_owned).collect();
    if ids.len() > MAX_REFERENCES {
        return Err(ApiError::invalid_value("input", format!("refers to more than {MAX_REFERENCES} items")));
    }
    let mut found: HashMap<String, Value> =
        before.iter().filter_map(|item| Some((item["id"].as_str()?.to_owned(), item.clone()))).collect();
    let (owner, max_bytes) = (owner.to_string(), app.max_body_bytes);
    let missing: Vec<String> = ids.into_iter().filter(|id| !found.contains_key(id)).collect();
    let stored = app.store.read(move |connection| {
        // Items are called by the response that they are of, which is read once.
        let mut wanted: HashMap<&str, HashSet<&str>> = HashMap::new();
        for id in &missing {
            wanted.entry(id.rsplit('_').next().unwrap_or_default()).or_default().insert(id.as_str());
        }
        let (mut stored, mut n_bytes) = (Vec::new(), 0);
        for (of, ids) in wanted {
            let Some(response) = responses::get(connection, &owner, &format!("resp_{of}"))? else { continue };
            n_bytes += response.input.len() + response.body.len();
            if n_bytes > max_bytes {
                return Ok(None);
            }
            for text in [&response.input, &response.body] {
                let value: Value = serde_json::from_str(text).context("a stored response is no JSON")?;
                let items = value.get("output").unwrap_or(&value);
                let is_wanted = |item: &&Value| item["id"].as_str().is_some_and(|id| ids.contains(id));
                stored.extend(items.as_array().into_iter().flatten().filter(is_wanted).cloned());
            }
        }
        Ok(Some(stored))
    });
    let too_long = || {
        let message = format!("refers to items of responses that have more than {max_bytes} bytes together");
        ApiError::invalid_value("input", message)
    };
    let stored = stored.await?.ok_or_else(too_long)?;
    found.extend(stored.into_iter().filter_map(|item| Some((item["id"].as_str()?.to_owned(), item))));
    let mut n_bytes = 0;
    for item in input.as_array_mut().into_iter().flatten() {
        let Some(id) = referred(item) else { continue };
        let Some(referred) = found.get(id) else {
            return Err(ApiError::not_found("input", format!("Item with id '{id}' not found.")));
        };
        n_bytes += referred.to_string().len();
        if n_bytes > max_bytes {
            return Err(too_long());
        }
        *item = referred.clone();
    }
    Ok(())
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

/// Ids of a response's own items.
struct Ids<'r> {
    /// The end of the response's.
    of: &'r str,
    used: HashSet<String>,
}

impl Ids<'_> {
    /// The id that was given, if no item has it yet; else a new one.
    fn of(&mut self, prefix: &str, given: Option<&Value>) -> String {
        let given = given.and_then(Value::as_str).filter(|id| !id.is_empty() && !self.used.contains(*id));
        let id = given.map_or_else(|| format!("{prefix}in{}_{}", self.used.len(), self.of), str::to_owned);
        self.used.insert(id.clone());
        id
    }
}

/// Items with ids. What is no item is left out: its request is refused.
fn named(input: &Value, id: &str) -> Vec<Value> {
    let mut used = Ids { of: id, used: HashSet::new() };
    if let Value::String(text) = input {
        return vec![message("user", &json!(text), None, &mut used)];
    }
    let items = input.as_array().into_iter().flatten().filter_map(Value::as_object);
    items.map(|item| named_item(item, &mut used)).collect()
}

fn named_item(item: &Map<String, Value>, used: &mut Ids<'_>) -> Value {
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
    named.insert("id".into(), used.of(prefix, item.get("id")).into());
    if kind != "reasoning" {
        named.entry("status").or_insert("completed".into());
    }
    named.into()
}

fn message(role: &str, content: &Value, id_given: Option<&Value>, used: &mut Ids<'_>) -> Value {
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
    json!({"type": "message", "id": used.of("msg_", id_given), "role": role, "status": "completed", "content": content})
}
