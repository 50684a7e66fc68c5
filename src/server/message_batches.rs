//! `/v1/messages/batches`: batches of messages, as Anthropic's clients know them. What becomes of them is in `batch_runs`, as of any
//! batch. Invariant: of a batch that has ended, every request has exactly one result.

use super::App;
use super::auth::Owner;
use super::batch_bodies::{BatchBody, Head};
use super::batch_runs::folder;
use super::batches::{self, Id, Input, Wanted, begin_cancelling};
use super::errors::{ApiError, json_response};
use super::log::say;
use super::models::rfc3339;
use super::paging::{Pairs, get};
use crate::format::openai::Endpoint;
use crate::store::batches::{self as stored_batches, StoredBatch};
use anyhow::{Context as _, Result};
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::{get as on_get, post};
use axum::{Extension, Router};
use futures::stream;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead as _, BufReader, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

/// What their ids begin with.
pub(super) const PREFIX: &str = "msgbatch_";
/// Most requests of one.
const MAX_REQUESTS: usize = 100_000;
/// Longest `custom_id`.
const MAX_ID: usize = 64;
/// Time until one expires.
const HOURS: u64 = 24;
/// Batches of a page, and most of them.
const PAGE: usize = 20;
const MAX_PAGE: usize = 1000;
/// How often it is looked whether a run has ended.
const PAUSE: Duration = Duration::from_millis(20);
/// Bytes of results that are sent at a time, about.
const PIECE: usize = 64 << 10;

/// The routes, under a path.
pub(super) fn routes(root: &str) -> Router<Arc<App>> {
    Router::new()
        .route(root, post(create).get(list))
        .route(&format!("{root}/{{id}}"), on_get(retrieve).delete(delete))
        .route(&format!("{root}/{{id}}/cancel"), post(cancel))
        .route(&format!("{root}/{{id}}/results"), on_get(results))
}

/// Creates one. What is wrong with the parameters of a request is its result's to say; their shape is looked at here.
async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    content: BatchBody,
) -> Result<Response, ApiError> {
    let Head { fields, has_requests } = content.head().await?;
    if let Some((name, _)) = fields.iter().find(|(_, value)| !value.is_null()) {
        return Err(ApiError::field("unsupported_parameter", name.clone(), "is not supported"));
    }
    if !has_requests {
        return Err(ApiError::missing("requests"));
    }
    let input = Input::new(&app, false);
    let mut used = HashSet::new();
    let n_requests = content.write_lines(input.path.clone(), MAX_REQUESTS, move |i, request| line(i, request, &mut used)).await?;
    let wanted = Wanted {
        input,
        endpoint: Endpoint::Messages,
        hours: HOURS,
        window: format!("{HOURS}h"),
        metadata: Value::Null,
        label: Value::Null,
        retry_of: None,
        output_seconds: None,
        max_cost: None,
        receiver: None,
        n_requests,
    };
    let object = batches::open(app, &owner, wanted).await?;
    Ok(json_response(&shown(&object, None)))
}

/// The line of a request.
fn line(i: usize, request: &Value, used: &mut HashSet<String>) -> Result<String, ApiError> {
    let path = |key: &str| format!("requests.{i}.{key}");
    let Value::Object(request) = request else {
        return Err(ApiError::invalid_type(format!("requests.{i}"), "an object", request));
    };
    let id = match request.get("custom_id") {
        Some(Value::String(id)) => id,
        None | Some(Value::Null) => return Err(ApiError::missing(path("custom_id"))),
        Some(other) => return Err(ApiError::invalid_type(path("custom_id"), "a string", other)),
    };
    if id.is_empty() || id.chars().count() > MAX_ID {
        return Err(ApiError::invalid_value(path("custom_id"), format!("must have 1 to {MAX_ID} characters")));
    }
    if !used.insert(id.clone()) {
        return Err(ApiError::invalid_value(path("custom_id"), format!("{id:?} was used before")));
    }
    let params = match request.get("params") {
        Some(params @ Value::Object(_)) => params,
        None | Some(Value::Null) => return Err(ApiError::missing(path("params"))),
        Some(other) => return Err(ApiError::invalid_type(path("params"), "an object", other)),
    };
    if params.get("stream") == Some(&Value::Bool(true)) {
        return Err(ApiError::invalid_value(path("params.stream"), "is not supported in batches"));
    }
    if let Some(other) = request.keys().find(|key| !["custom_id", "params"].contains(&key.as_str())) {
        return Err(ApiError::field("unsupported_parameter", path(other), "is not supported"));
    }
    Ok(json!({"custom_id": id, "method": "POST", "url": Endpoint::Messages.path(), "body": params}).to_string())
}

/// The object, of a batch's own; `counts` are those of now, completed and failed.
fn shown(body: &Value, counts: Option<(u64, u64)>) -> Value {
    let status = body["status"].as_str().unwrap_or_default();
    let id = body["id"].as_str().unwrap_or_default();
    let time = |key: &str| body[key].as_u64().map(rfc3339);
    let ended = ["completed_at", "cancelled_at", "expired_at", "failed_at"].into_iter().find_map(time);
    let count = |pointer: &str| body.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    let total = count("/request_counts/total");
    let (succeeded, failed) = counts.unwrap_or((count("/request_counts/completed"), count("/request_counts/failed")));
    let [mut canceled, mut expired] = ["/not_run/batch_cancelled", "/not_run/batch_expired"].map(count);
    let mut errored = failed.saturating_sub(canceled + expired);
    // Of one that broke off, the rest have no lines.
    if ended.is_some() && succeeded + failed < total {
        let rest = match status {
            "cancelled" => &mut canceled,
            "expired" => &mut expired,
            _ => &mut errored,
        };
        *rest += total - succeeded - failed;
    }
    let processing = total.saturating_sub(succeeded + errored + canceled + expired);
    json!({
        "id": id,
        "type": "message_batch",
        "processing_status": match (&ended, status) {
            (Some(_), _) => "ended",
            (None, "cancelling") => "canceling",
            (None, _) => "in_progress",
        },
        "request_counts": {"processing": processing, "succeeded": succeeded, "errored": errored, "canceled": canceled,
                           "expired": expired},
        "created_at": time("created_at"),
        "expires_at": time("expires_at"),
        "cancel_initiated_at": time("cancelling_at"),
        "archived_at": null,
        "results_url": ended.is_some().then(|| format!("/v1/messages/batches/{id}/results")),
        "ended_at": ended,
    })
}

fn object(app: &App, stored: &StoredBatch) -> Result<Value, ApiError> {
    let body: Value = serde_json::from_str(&stored.body).map_err(anyhow::Error::from)?;
    Ok(shown(&body, if stored.is_open() { app.batches.counts(&stored.id) } else { None }))
}

fn not_found(id: &str) -> ApiError {
    ApiError::not_found("message_batch_id", format!("No message batch found with id '{id}'."))
}

async fn find(app: &App, owner: &Owner, id: &str) -> Result<StoredBatch, ApiError> {
    let (owner, key) = (owner.to_string(), id.to_owned());
    let found = app.store.read(move |connection| stored_batches::get(connection, &owner, &key)).await?;
    found.filter(|batch| batch.id.starts_with(PREFIX)).ok_or_else(|| not_found(id))
}

async fn named(app: &App, owner: &Owner, path: Id) -> Result<StoredBatch, ApiError> {
    let UrlPath(id) = path.map_err(|_| not_found(""))?;
    find(app, owner, &id).await
}

/// The batch with that id.
pub(super) async fn show(app: &App, owner: &Owner, id: &str) -> Result<Response, ApiError> {
    Ok(json_response(&object(app, &find(app, owner, id).await?)?))
}

async fn retrieve(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>, path: Id) -> Result<Response, ApiError> {
    Ok(json_response(&object(&app, &named(&app, &owner, path).await?)?))
}

/// Newest first.
async fn list(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>, query: Pairs) -> Result<Response, ApiError> {
    let limit = match get(&query, "limit") {
        None => PAGE,
        Some(text) => {
            let limit = text.parse().ok().filter(|limit| (1..=MAX_PAGE).contains(limit));
            limit.ok_or_else(|| ApiError::invalid_value("limit", format!("{text:?} is no number from 1 to {MAX_PAGE}")))?
        }
    };
    let id = |name: &str| get(&query, name).map(str::to_owned);
    let (before, after) = (id("before_id"), id("after_id"));
    if before.is_some() && after.is_some() {
        return Err(ApiError::invalid_value("before_id", "can't be combined with after_id"));
    }
    let is_before = before.is_some();
    let found = app.store.read(move |connection| match before {
        Some(id) => stored_batches::list_newer(connection, (&*owner, PREFIX), &id, limit + 1),
        None => stored_batches::list(connection, (&*owner, PREFIX), after.as_deref(), limit + 1),
    });
    let found = found.await?;
    let mut data: Vec<Value> = found.iter().take(limit).map(|stored| object(&app, stored)).collect::<Result<_, _>>()?;
    if is_before {
        data.reverse();
    }
    let id = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    let (first, last) = (id(data.first()), id(data.last()));
    Ok(json_response(&json!({"data": data, "has_more": found.len() > limit, "first_id": first, "last_id": last})))
}

/// One that has ended stays as it is.
async fn cancel(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>, path: Id) -> Result<Response, ApiError> {
    let stored = named(&app, &owner, path).await?;
    begin_cancelling(&app, &stored.id).await?;
    show(&app, &owner, &stored.id).await
}

async fn delete(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>, path: Id) -> Result<Response, ApiError> {
    let stored = named(&app, &owner, path).await?;
    // The run of one that has ended puts its journal away.
    while !stored.is_open() && app.batches.counts(&stored.id).is_some() {
        tokio::time::sleep(PAUSE).await;
    }
    let (id, key) = (stored.id.clone(), stored.id);
    if !app.store.write(move |connection| stored_batches::delete(connection, &key)).await? {
        let message = "The message batch has not ended: cancel it, and delete it when it has.";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message));
    }
    let at = app.data.join(folder(&id));
    // What is left of it is removed at the next start.
    if let Err(error) = spawn_blocking(move || std::fs::remove_dir_all(at)).await.context("removing a batch panicked")? {
        say(&format!("{id}: its folder is left behind: {error}"));
    }
    Ok(json_response(&json!({"id": id, "type": "message_batch_deleted"})))
}

/// How many requests did not run, by why: from a batch's error file.
pub(super) fn not_run(errors: &Path) -> Result<Value> {
    let mut counts = Map::new();
    for line in lines(errors)? {
        let line: Value = serde_json::from_str(&line?).context("an error is no JSON")?;
        if let (true, Some(code)) = (line["response"].is_null(), line["error"]["code"].as_str()) {
            let n = counts.get(code).and_then(Value::as_u64).unwrap_or(0);
            counts.insert(code.to_owned(), (n + 1).into());
        }
    }
    Ok(counts.into())
}

/// A file's lines; none if it is not there.
fn lines(path: &Path) -> Result<impl Iterator<Item = std::io::Result<String>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        file => Some(file.with_context(|| format!("cannot read {}", path.display()))?),
    };
    Ok(file.into_iter().flat_map(|file| BufReader::new(file).lines()))
}

/// One line a request.
async fn results(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>, path: Id) -> Result<Response, ApiError> {
    let stored = named(&app, &owner, path).await?;
    if stored.is_open() {
        let message = "The message batch has not ended: its results are there when it has.";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message));
    }
    let (id, at) = (stored.id.clone(), app.data.join(folder(&stored.id)));
    let (sender, mut pieces) = mpsc::channel::<std::io::Result<Bytes>>(2);
    let reader = app.reader()?;
    spawn_blocking(move || {
        let _reader = reader; // until all is sent
        if let Err(error) = send_results(&at, &stored, &sender) {
            say(&format!("results of {id}: {error:#}"));
            // The answer breaks off, so that nobody takes it for whole.
            drop(sender.blocking_send(Err(std::io::Error::other(error))));
        }
    });
    let mut response = Response::new(Body::from_stream(stream::poll_fn(move |context| pieces.poll_recv(context))));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-jsonl"));
    Ok(response)
}

/// Sends the results of a batch that has ended; ends early if nobody takes them.
fn send_results(at: &Path, stored: &StoredBatch, to: &mpsc::Sender<std::io::Result<Bytes>>) -> Result<()> {
    let body: Value = serde_json::from_str(&stored.body)?;
    let [total, completed, failed] =
        ["total", "completed", "failed"].map(|key| body["request_counts"][key].as_u64().unwrap_or(0));
    // Of one that broke off, the rest stand in its input alone.
    let (has_lines, is_whole) = (completed + failed > 0, completed + failed >= total);
    let rest = match stored.status.as_str() {
        "cancelled" => json!({"type": "canceled"}),
        "expired" => json!({"type": "expired"}),
        _ => errored("api_error", body["errors"]["data"][0]["message"].as_str().unwrap_or("the batch failed"), &Value::Null),
    };
    let (mut piece, mut told) = (Vec::new(), HashSet::new());
    for (name, is_read) in [("output.jsonl", has_lines), ("output.errors.jsonl", has_lines), ("input.jsonl", !is_whole)] {
        if !is_read {
            continue;
        }
        for line in lines(&at.join(name))? {
            let line: Value = serde_json::from_str(&line?).with_context(|| format!("a line of {name} is no JSON"))?;
            let is_new = is_whole || told.insert(line["custom_id"].as_str().unwrap_or_default().to_owned());
            let result = match (name, is_new) {
                ("input.jsonl", false) => continue,
                ("input.jsonl", true) => rest.clone(),
                _ => result(&line),
            };
            serde_json::to_writer(&mut piece, &json!({"custom_id": line["custom_id"], "result": result}))?;
            piece.push(b'\n');
            if piece.len() >= PIECE && to.blocking_send(Ok(std::mem::take(&mut piece).into())).is_err() {
                return Ok(());
            }
        }
    }
    drop(to.blocking_send(Ok(piece.into())));
    Ok(())
}

/// What a line of a batch's output says.
fn result(line: &Value) -> Value {
    let response = &line["response"];
    match (&line["error"]["code"], &response["body"]["error"]) {
        (code, _) if code == "batch_cancelled" => json!({"type": "canceled"}),
        (code, _) if code == "batch_expired" => json!({"type": "expired"}),
        (Value::String(_), _) => errored("api_error", line["error"]["message"].as_str().unwrap_or_default(), &Value::Null),
        (_, Value::Null) => json!({"type": "succeeded", "message": response["body"]}),
        (_, error) => {
            let kind = match response["status_code"].as_u64() {
                Some(404) => "not_found_error",
                Some(500..) | None => "api_error",
                Some(_) => "invalid_request_error",
            };
            let text = |key: &str| error[key].as_str().unwrap_or_default().replace("body.", "");
            // Clients know a missing field by this text.
            let is_missing = error["code"] == "missing_required_parameter";
            let message = if is_missing { format!("{}: Field required", text("param")) } else { text("message") };
            errored(kind, &message, &response["request_id"])
        }
    }
}

fn errored(kind: &str, message: &str, request_id: &Value) -> Value {
    json!({"type": "errored", "error": {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}})
}
