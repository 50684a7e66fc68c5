//! Stored responses over HTTP: fetched, listed, waited for, watched, cancelled and deleted. Invariants: an owner's responses
//! are nobody else's; a stream and the response that it leads to agree.

use super::App;
use super::auth::Owner;
use super::background;
use super::body::JsonObject;
use super::errors::{ApiError, json_response};
use super::log::say;
use super::paging::{Page, Pairs, get};
use super::response_events::TERMINAL;
use super::sse;
use crate::store::responses::{self, StoredResponse};
use async_stream::stream;
use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Events that are read at a time.
const EVENTS: usize = 512;
/// Most responses that are waited for at once.
const MAX_IDS: usize = 10_000;
/// Most responses that a wait gives at once.
const MAX_GIVEN: usize = 100;
/// How long a wait may last.
const MAX_WAIT_S: u64 = 600;
const DEFAULT_WAIT_S: u64 = 60;
/// States of responses.
const STATES: [&str; 6] = ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"];
/// How often responses that nobody runs are looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long those that end together are gathered.
const GATHER: Duration = Duration::from_millis(20);

/// An id in a path.
pub(super) type Id = Result<Path<String>, PathRejection>;

fn not_found(id: &str) -> ApiError {
    ApiError::not_found("response_id", format!("Response with id '{id}' not found."))
}

/// The id, if it is one at all.
fn id_of(path: Id) -> Result<String, ApiError> {
    path.map(|Path(id)| id).map_err(|_| not_found(""))
}

async fn find(app: &App, owner: &Owner, id: &str) -> Result<StoredResponse, ApiError> {
    let (owner, key) = (owner.to_string(), id.to_owned());
    let found = app.store.read(move |connection| responses::get(connection, &owner, &key)).await?;
    found.ok_or_else(|| not_found(id))
}

fn object(text: &str) -> Result<Value, ApiError> {
    Ok(serde_json::from_str(text).map_err(anyhow::Error::from)?)
}

/// The response object.
pub(super) async fn show(app: &App, owner: &Owner, id: &str) -> Result<Response, ApiError> {
    Ok(json_response(&object(&find(app, owner, id).await?.body)?))
}

/// `GET /v1/responses/{id}`
pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
    query: Pairs,
) -> Result<Response, ApiError> {
    let id = id_of(path)?;
    let stored = find(&app, &owner, &id).await?;
    match get(&query, "stream") {
        None | Some("false") => Ok(json_response(&object(&stored.body)?)),
        Some("true") if !stored.is_background => {
            let message = "the response was not created with background=true";
            Err(ApiError::invalid_value("stream", message))
        }
        Some("true") => {
            let after = get(&query, "starting_after").map(|text| {
                let fault = || ApiError::invalid_value("starting_after", format!("{text:?} is no number of an event"));
                text.parse::<u64>().map_err(|_| fault())
            });
            let from = after.transpose()?.map_or(0, |after| after.saturating_add(1));
            Ok(stream(app, id, from))
        }
        Some(other) => Err(ApiError::invalid_value("stream", format!("{other:?} is not one of true, false"))),
    }
}

/// A background response's events from a number on, until it ends.
pub(super) fn stream(app: Arc<App>, id: String, mut from: u64) -> Response {
    sse::response(stream! {
        // Before the first look, so that nothing is missed between looks.
        let mut bell = app.background.listen(&id);
        loop {
            let key = id.clone();
            let events = match app.store.read(move |connection| responses::events(connection, &key, from, EVENTS)).await {
                Ok(events) => events,
                Err(error) => {
                    // The client asks again from where it was.
                    say(&format!("events of {id}: {error:#}"));
                    return;
                }
            };
            let is_whole = events.len() < EVENTS;
            for (number, name, data) in events {
                from = number + 1;
                yield sse::event_text(&name, &data);
                if TERMINAL.contains(&name.as_str()) {
                    yield sse::DONE.to_owned();
                    return;
                }
            }
            if is_whole {
                match &mut bell {
                    Some(waiting) => if waiting.changed().await.is_err() {
                        bell = None;
                    },
                    // It has ended, and was told so before; or the server ends.
                    None => return,
                }
            }
        }
    })
}

/// `POST /v1/responses/{id}/cancel`
pub(super) async fn cancel(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
) -> Result<Response, ApiError> {
    let id = id_of(path)?;
    let (owner, key, own) = (owner.to_string(), id.clone(), Arc::clone(&app));
    let cancelled = app.store.write(move |connection| {
        let Some(stored) = responses::get(connection, &owner, &key)? else { return Ok(Err(not_found(&key))) };
        if !stored.is_background {
            return Ok(Err(cannot_cancel("synchronous")));
        }
        if stored.is_open() || stored.status == "cancelled" {
            return background::cancel(&own, connection, &stored).map(Ok);
        }
        Ok(Err(cannot_cancel(&stored.status)))
    });
    let response = cancelled.await??;
    app.background.close(&id);
    Ok(json_response(&response))
}

fn cannot_cancel(what: &str) -> ApiError {
    let article = if what.starts_with('i') { "an" } else { "a" };
    let message = format!("Cannot cancel {article} {what} response.");
    ApiError { param: Some("response_id".into()), ..ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message) }
}

/// `DELETE /v1/responses/{id}`: again and again, if need be.
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
) -> Result<Response, ApiError> {
    let id = id_of(path)?;
    let (owner, key, own) = (owner.to_string(), id.clone(), Arc::clone(&app));
    let deleted = app.store.write(move |connection| {
        let Some(stored) = responses::get(connection, &owner, &key)? else {
            return responses::is_deleted(connection, &owner, &key);
        };
        background::cancel(&own, connection, &stored)?;
        responses::delete(connection, &key).map(|()| true)
    });
    if !deleted.await? {
        return Err(not_found(&id));
    }
    app.background.close(&id);
    Ok(json_response(&json!({"id": id, "object": "response", "deleted": true})))
}

/// `GET /v1/responses/{id}/input_items`
pub(super) async fn input_items(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
    query: Pairs,
) -> Result<Response, ApiError> {
    let page = Page::of(&query, (20, 100))?;
    let stored = find(&app, &owner, &id_of(path)?).await?;
    let mut items = object(&stored.input)?.as_array().cloned().unwrap_or_default();
    if !page.is_ascending {
        items.reverse();
    }
    let start = match &page.after {
        None => 0,
        Some(after) => {
            let place = items.iter().position(|item| item["id"] == after.as_str());
            place.ok_or_else(|| ApiError::invalid_value("after", format!("there is no item {after:?}")))? + 1
        }
    };
    let data: Vec<Value> = items.iter().skip(start).take(page.limit).cloned().collect();
    let has_more = start + data.len() < items.len();
    Ok(json_response(&listed(&data, has_more)))
}

/// A page of a list.
pub(super) fn listed(data: &[Value], has_more: bool) -> Value {
    let id = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    json!({"object": "list", "data": data, "first_id": id(data.first()), "last_id": id(data.last()), "has_more": has_more})
}

/// `GET /v1/responses`: newest first, of a status if one is named.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    query: Pairs,
) -> Result<Response, ApiError> {
    let page = Page::of(&query, (20, 100))?;
    if page.is_ascending {
        return Err(ApiError::invalid_value("order", "only desc is supported"));
    }
    let status = get(&query, "status").map(str::to_owned);
    if let Some(other) = status.as_deref().filter(|status| !STATES.contains(status)) {
        return Err(ApiError::invalid_value("status", format!("{other:?} is not one of {}", STATES.join(", "))));
    }
    let found = app
        .store
        .read(move |connection| responses::list(connection, &owner, status.as_deref(), page.after.as_deref(), page.limit + 1));
    let found = found.await?;
    let data: Vec<Value> = found.iter().take(page.limit).map(|stored| object(&stored.body)).collect::<Result<_, _>>()?;
    Ok(json_response(&listed(&data, found.len() > data.len())))
}

/// `POST /v1/responses/wait`: answers when one of several responses has ended, with all that have.
pub(super) async fn wait(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    JsonObject(mut body): JsonObject,
) -> Result<Response, ApiError> {
    let ids = ids_of(body.remove("ids"))?;
    let timeout_s = match body.remove("timeout_s") {
        None | Some(Value::Null) => DEFAULT_WAIT_S,
        Some(value) => value.as_u64().filter(|s| *s <= MAX_WAIT_S).ok_or_else(|| {
            ApiError::invalid_value("timeout_s", format!("must be a whole number of at most {MAX_WAIT_S}, is {value}"))
        })?,
    };
    if let Some(name) = body.keys().next() {
        return Err(ApiError::field("unsupported_parameter", name.clone(), "is not supported"));
    }
    let end = Instant::now() + Duration::from_secs(timeout_s);
    let mut ends = app.background.ends();
    loop {
        ends.mark_unchanged();
        let (closed, pending) = app.background.closed_and_open(&ids);
        let left = end.saturating_duration_since(Instant::now());
        if !closed.is_empty() || left.is_zero() {
            let (ended, open) = given(&app, &owner, closed.into_iter().cloned().collect()).await?;
            if !ended.is_empty() || left.is_zero() || app.is_draining() {
                let data: Vec<Value> = ended.iter().map(|body| object(body)).collect::<Result<_, _>>()?;
                let pending: Vec<&String> = pending.into_iter().chain(&open).collect();
                return Ok(json_response(&json!({"object": "list", "data": data, "pending": pending})));
            }
            // Nobody runs them, and they have not ended: they are run at the next start.
            tokio::time::sleep(left.min(LOOK_AGAIN)).await;
            continue;
        }
        // An error means that the time is up; that is seen above.
        drop(tokio::time::timeout(left, ends.changed()).await);
        tokio::time::sleep(GATHER.min(left)).await;
    }
}

fn ids_of(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    let fault = |message: String| ApiError::invalid_value("ids", message);
    let ids = match value {
        None | Some(Value::Null) => return Err(ApiError::missing("ids")),
        Some(Value::Array(ids)) => ids,
        Some(other) => return Err(ApiError::invalid_type("ids", "an array of ids", &other)),
    };
    if ids.is_empty() || ids.len() > MAX_IDS {
        return Err(fault(format!("must hold 1 to {MAX_IDS} ids, holds {}", ids.len())));
    }
    let ids = ids.into_iter().map(|id| match id {
        Value::String(id) => Ok(id),
        other => Err(fault(format!("{other} is no id"))),
    });
    ids.collect()
}

/// What of these has ended, and the rest.
async fn given(app: &App, owner: &Owner, closed: Vec<String>) -> Result<(Vec<String>, Vec<String>), ApiError> {
    let owner = owner.to_string();
    let found = app.store.read(move |connection| {
        let (mut ended, mut open) = (Vec::new(), Vec::new());
        let mut rest = closed.into_iter();
        for id in rest.by_ref() {
            match responses::get(connection, &owner, &id)? {
                None => return Ok(Err(not_found(&id))),
                Some(stored) if stored.is_open() => open.push(id),
                Some(stored) => ended.push(stored.body),
            }
            if ended.len() == MAX_GIVEN {
                break;
            }
        }
        open.extend(rest);
        Ok(Ok((ended, open)))
    });
    found.await?
}
