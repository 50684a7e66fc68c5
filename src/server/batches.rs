//! `/v1/batches` over HTTP: created from a file or from requests in the body, fetched, listed, cancelled. What becomes of
//! them is in `batch_runs`. Invariant: a batch that was answered is on the disk with a copy of its own of its input.

use super::App;
use super::auth::Owner;
use super::batch_accept::{self, Tariff};
use super::batch_bodies::{BatchBody, Head};
use super::batch_inputs;
use super::batch_runs::{Settings, cancelled, folder};
use super::completion_webhook;
use super::errors::{ApiError, json_response};
use super::files::Arriving;
use super::models::now;
use super::paging::{Page, Pairs};
use super::prices::Amount;
use super::stored::listed;
use super::windows::{Mode, Table};
use super::{files, ids, message_batches, prices, windows};
use crate::format::openai::{Endpoint, kind};
use crate::pipeline::referenced::{Reference, Referenced};
use crate::store::Connection;
use crate::store::batches::{self, StoredBatch};
use crate::store::one_off::Receiver;
use anyhow::Context as _;
use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::task::spawn_blocking;

/// The window of a batch that names none.
const DEFAULT_HOURS: u64 = 24;
/// Longest window.
const MAX_HOURS: u64 = 24 * 30;
/// Most requests in a body.
const MAX_INLINE: usize = 100_000;
/// Longest `custom_id` of a request in a body.
const MAX_INLINE_ID: usize = 64;
/// What stands in the place of a `custom_id` in paths.
const ACTIONS: [&str; 2] = ["cancel", "retry"];
/// Batches that may be open at a time.
const MAX_OPEN: usize = 1000;
/// Seconds that output files may be kept.
const OUTPUT_S: std::ops::RangeInclusive<u64> = 3600..=2_592_000;

/// The file of a new batch.
pub(super) struct Input {
    pub(super) id: String,
    /// Where it lies.
    pub(super) path: PathBuf,
    /// If it was written for the batch: gone again, unless that is accepted and it is to be known.
    pub(super) written: Option<Arriving>,
    /// Whether it is to be known as a file.
    pub(super) is_file: bool,
    /// If it lies elsewhere.
    pub(super) reference: Option<(Reference, Referenced)>,
}

impl Input {
    /// One that is to be written.
    pub(super) fn new(app: &App, is_file: bool) -> Self {
        let id = ids::new("file-");
        let path = app.data.join("files").join(&id);
        Self { id, written: Some(Arriving::at(path.clone())), path, is_file, reference: None }
    }
}

/// What a new batch is to be.
pub(super) struct Wanted {
    pub(super) input: Input,
    pub(super) endpoint: Endpoint,
    pub(super) hours: u64,
    /// As it was asked for.
    pub(super) window: String,
    pub(super) metadata: Value,
    pub(super) label: Value,
    /// The batch whose errors it runs again.
    pub(super) retry_of: Option<String>,
    /// How long its files are kept.
    pub(super) output_seconds: Option<u64>,
    /// What it may cost, in millionths of the currency.
    pub(super) max_cost: Option<u64>,
    /// Who is to be told of it alone.
    pub(super) receiver: Option<Receiver>,
    /// How many requests it has, where that is told before they are looked at.
    pub(super) n_requests: usize,
}

/// What the ids of batches begin with.
const PREFIX: &str = "batch_";

/// `POST /v1/batches`
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    content: BatchBody,
) -> Result<Response, ApiError> {
    const KNOWN: [&str; 7] =
        ["input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after", "label", "max_cost"];
    let Head { fields: body, has_requests } = content.head().await?;
    if let Some((name, _)) = body.iter().find(|(name, value)| !KNOWN.contains(&name.as_str()) && !value.is_null()) {
        return Err(ApiError::field("unsupported_parameter", name.clone(), "is not supported"));
    }
    let endpoint = match text(&body, "endpoint")? {
        None => return Err(ApiError::missing("endpoint")),
        Some(url) => Endpoint::parse(url).filter(|endpoint| *endpoint != Endpoint::Messages).ok_or_else(|| {
            let message = format!("{url:?} is not supported; supported: /v1/chat/completions, /v1/completions, /v1/responses");
            ApiError::invalid_value("endpoint", message)
        })?,
    };
    let hours = hours(text(&body, "completion_window")?, &app.windows)?;
    let metadata = windows::metadata(&body)?.cloned();
    let receiver = completion_webhook::asked(&app, &owner, metadata.as_ref(), Mode::Background)?;
    if let Some(asked) = windows::asked(metadata.as_ref()) {
        app.models.check_window(asked)?;
    }
    let (output_seconds, max_cost) = (output_seconds(&body)?, max_cost(&body)?);
    let input = match (text(&body, "input_file_id")?, has_requests) {
        (Some(_), true) => return Err(ApiError::invalid_value("requests", "can't be combined with input_file_id")),
        (None, false) => return Err(ApiError::missing("input_file_id")),
        (Some(id), false) => {
            let file = files::find(&app, &owner, id).await?;
            if file.purpose != "batch" {
                let message = format!("is a file of purpose {:?}, not batch", file.purpose);
                return Err(ApiError::invalid_value("input_file_id", message));
            }
            let reference = match file.reference {
                None => None,
                Some((uri, version)) => {
                    let reference = Reference { uri, version };
                    let found = batch_inputs::find(&app, reference.clone()).await?;
                    Some((reference, found.map_err(|why| batch_inputs::refused("input_file_id", &why))?))
                }
            };
            Input { id: file.id, path: app.data.join(file.path), written: None, is_file: true, reference }
        }
        (None, true) => {
            let input = Input::new(&app, true);
            content.write_lines(input.path.clone(), MAX_INLINE, inline(endpoint)).await?;
            input
        }
    };
    let wanted = Wanted {
        input,
        endpoint,
        hours,
        window: text(&body, "completion_window")?.unwrap_or("24h").to_owned(),
        metadata: metadata.into(),
        label: text(&body, "label")?.into(),
        retry_of: None,
        output_seconds,
        max_cost,
        receiver,
        n_requests: 0,
    };
    Ok(json_response(&open(app, &owner, wanted).await?))
}

/// Whether another may be open.
pub(super) fn check_room(app: &App) -> Result<(), ApiError> {
    if app.batches.n_open() >= MAX_OPEN { Err(ApiError::busy()) } else { Ok(()) }
}

/// Accepts a batch; its object.
pub(super) async fn open(app: Arc<App>, owner: &Owner, wanted: Wanted) -> Result<Value, ApiError> {
    check_room(&app)?;
    let Wanted { input, endpoint, hours, window, metadata, label, retry_of, output_seconds, max_cost, receiver, n_requests } =
        wanted;
    let is_messages = endpoint == Endpoint::Messages;
    let (id, created_at) = (ids::new(if is_messages { message_batches::PREFIX } else { PREFIX }), now());
    let object = json!({
        "id": id, "object": "batch", "endpoint": endpoint.path(),
        "input_file_id": if input.is_file { input.id.as_str() } else { "" },
        "completion_window": window,
        "status": "validating", "created_at": created_at, "expires_at": created_at + 3600 * hours,
        "in_progress_at": null, "finalizing_at": null, "completed_at": null, "failed_at": null, "expired_at": null,
        "cancelling_at": null, "cancelled_at": null, "output_file_id": null, "error_file_id": null, "errors": null,
        "request_counts": {"total": n_requests, "completed": 0, "failed": 0},
        "metadata": metadata, "label": label, "max_cost": max_cost.map(|most| Amount::of_micro(most).to_string()), "retry_of": retry_of, "model": null, "usage": null,
    });
    let tariff = Tariff::Free;
    let (endpoint, keeps_faults) = (endpoint.path().to_owned(), is_messages);
    let reference = input.reference.as_ref().map(|(reference, _)| reference.clone());
    let settings = Settings { endpoint, output_seconds, tariff, max_cost, keeps_faults, reference, trace: owner.spot.link() };
    let expires_at = created_at + 3600 * hours;
    let status = "validating".to_owned();
    let new = StoredBatch {
        id: id.clone(),
        owner: owner.to_string(),
        created_at,
        expires_at,
        status,
        settings: String::new(),
        body: object.to_string(),
        n_tokens: 0,
    };
    // A caller who goes away now must not leave a batch behind that is stored and never run.
    tokio::spawn(batch_accept::accept(app, (new, settings), input, (owner.claim.clone(), receiver)))
        .await
        .context("accepting a batch panicked")??;
    Ok(object)
}

fn text<'b>(body: &'b Map<String, Value>, key: &str) -> Result<Option<&'b str>, ApiError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(ApiError::invalid_type(key, "a string", other)),
    }
}

/// `24h`, and other numbers of hours; the names of windows stand for 24.
fn hours(window: Option<&str>, windows: &Table) -> Result<u64, ApiError> {
    let Some(window) = window.filter(|window| windows.named(window).is_none()) else { return Ok(DEFAULT_HOURS) };
    let hours = window.strip_suffix('h').and_then(|hours| hours.parse().ok()).filter(|hours| (1..=MAX_HOURS).contains(hours));
    hours.ok_or_else(|| {
        let names = windows.names().collect::<Vec<_>>().join(", ");
        let message = format!("{window:?} is not one of 24h, another number of hours up to {MAX_HOURS}h, {names}");
        ApiError::invalid_value("completion_window", message)
    })
}

fn output_seconds(body: &Map<String, Value>) -> Result<Option<u64>, ApiError> {
    let field = "output_expires_after";
    let after = match body.get(field) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(after)) => after,
        Some(other) => return Err(ApiError::invalid_type(field, "an object", other)),
    };
    if text(after, "anchor")? != Some("created_at") {
        return Err(ApiError::invalid_value(format!("{field}.anchor"), "must be \"created_at\""));
    }
    let seconds = after.get("seconds").and_then(Value::as_u64).filter(|seconds| OUTPUT_S.contains(seconds));
    let fault =
        || ApiError::invalid_value(format!("{field}.seconds"), format!("must be {} to {}", OUTPUT_S.start(), OUTPUT_S.end()));
    seconds.ok_or_else(fault).map(Some)
}

/// `max_cost`: an amount of the currency that prices are in, a number or a text, as amounts are in answers.
fn max_cost(body: &Map<String, Value>) -> Result<Option<u64>, ApiError> {
    let field = "max_cost";
    let amount = match body.get(field) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Number(amount)) => amount.as_f64(),
        Some(Value::String(amount)) => amount.parse().ok(),
        Some(other) => return Err(ApiError::invalid_type(field, "an amount", other)),
    };
    let found = amount.and_then(|amount| prices::micro_sum(amount).ok()).filter(|&micro| micro > 0);
    let fault = || ApiError::invalid_value(field, "must be an amount over 0 and up to 100000000, of at most six decimals");
    found.ok_or_else(fault).map(Some)
}

/// The line of a request that stands in the body: `{custom_id, params}`.
fn inline(endpoint: Endpoint) -> impl FnMut(usize, &Value) -> Result<String, ApiError> {
    let mut used = HashSet::new();
    move |i, request| {
        let path = |key: &str| format!("requests[{i}].{key}");
        let Value::Object(request) = request else {
            return Err(ApiError::invalid_type(format!("requests[{i}]"), "an object", request));
        };
        let id = match request.get("custom_id") {
            Some(Value::String(id)) => id,
            None | Some(Value::Null) => return Err(ApiError::missing(path("custom_id"))),
            Some(other) => return Err(ApiError::invalid_type(path("custom_id"), "a string", other)),
        };
        let is_fine = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        let begins_well = id.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !begins_well || id.len() > MAX_INLINE_ID || !id.chars().all(is_fine) {
            let message = format!("{id:?} is not a letter or digit and up to {} more, - or _", MAX_INLINE_ID - 1);
            return Err(ApiError::invalid_value(path("custom_id"), message));
        }
        if ACTIONS.contains(&id.as_str()) {
            let message = format!("{id:?} is what is done to a batch, and can't be asked for as a result");
            return Err(ApiError::invalid_value(path("custom_id"), message));
        }
        if !used.insert(id.clone()) {
            return Err(ApiError::field("duplicate_custom_id", path("custom_id"), format!("{id:?} was used before")));
        }
        let Some(params @ Value::Object(_)) = request.get("params") else {
            let found = request.get("params").map_or("nothing", kind);
            return Err(ApiError::field("invalid_type", path("params"), format!("must be an object, is {found}")));
        };
        if let Some(other) = request.keys().find(|key| !["custom_id", "params"].contains(&key.as_str())) {
            return Err(ApiError::field("unsupported_parameter", path(other), "is not supported"));
        }
        Ok(json!({"custom_id": id, "method": "POST", "url": endpoint.path(), "body": params}).to_string())
    }
}

pub(super) fn not_found(id: &str) -> ApiError {
    ApiError::not_found("batch_id", format!("No batch found with id '{id}'."))
}

/// The batch object, with its counts of now.
fn shown(app: &App, stored: &StoredBatch) -> Result<Value, ApiError> {
    let mut body: Value = serde_json::from_str(&stored.body).map_err(anyhow::Error::from)?;
    if let Some((completed, failed)) = app.batches.counts(&stored.id).filter(|_| body["usage"].is_null()) {
        body["request_counts"]["completed"] = completed.into();
        body["request_counts"]["failed"] = failed.into();
        let settings: Settings = serde_json::from_str(&stored.settings).map_err(anyhow::Error::from)?;
        let price = settings.tariff.price(app, body["model"].as_str().unwrap_or_default());
        let n_rows = body["request_counts"]["total"].as_u64().unwrap_or_default();
        body["progress"] = app.batches.progress(&stored.id, n_rows, price).into();
    }
    Ok(body)
}

pub(super) async fn find(app: &App, owner: &Owner, id: &str) -> Result<StoredBatch, ApiError> {
    let (owner, key) = (owner.to_string(), id.to_owned());
    let found = app.store.read(move |connection| batches::get(connection, &owner, &key)).await?;
    found.filter(|batch| batch.id.starts_with(PREFIX)).ok_or_else(|| not_found(id))
}

/// The batch object.
pub(super) async fn show(app: &App, owner: &Owner, id: &str) -> Result<Response, ApiError> {
    Ok(json_response(&shown(app, &find(app, owner, id).await?)?))
}

pub(super) type Id = Result<UrlPath<String>, PathRejection>;

/// `GET /v1/batches/{id}`
pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
) -> Result<Response, ApiError> {
    let UrlPath(id) = path.map_err(|_| not_found(""))?;
    show(&app, &owner, &id).await
}

/// `GET /v1/batches`: newest first.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    query: Pairs,
) -> Result<Response, ApiError> {
    let Page { after, limit, .. } = Page::of(&query, (20, 100))?;
    let found =
        app.store.read(move |connection| batches::list(connection, (&*owner, PREFIX), after.as_deref(), limit + 1)).await?;
    let data: Vec<Value> = found.iter().take(limit).map(|stored| shown(&app, stored)).collect::<Result<_, _>>()?;
    Ok(json_response(&listed(&data, found.len() > data.len())))
}

/// `POST /v1/batches/{id}/cancel`: one that has ended stays as it is.
pub(super) async fn cancel(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
) -> Result<Response, ApiError> {
    let UrlPath(id) = path.map_err(|_| not_found(""))?;
    find(&app, &owner, &id).await?;
    begin_cancelling(&app, &id).await?;
    let stored = find(&app, &owner, &id).await?;
    Ok(json_response(&shown(&app, &stored)?))
}

/// Ends a batch early, unless it has ended.
pub(super) async fn begin_cancelling(app: &App, id: &str) -> Result<(), ApiError> {
    let key = id.to_owned();
    let write = move |connection: &Connection| {
        let stored = batches::any(connection, &key)?.context("the batch is gone")?;
        if !["validating", "in_progress"].contains(&stored.status.as_str()) {
            return Ok(stored.status == "cancelling");
        }
        let mut body: Value = serde_json::from_str(&stored.body)?;
        body["status"] = "cancelling".into();
        body["cancelling_at"] = now().into();
        batches::update(connection, &key, (&stored.status, "cancelling"), &body.to_string())
    };
    if app.store.write(write).await? {
        app.batches.end(id, cancelled());
    }
    Ok(())
}

/// `GET /v1/batches/{id}/{custom_id}`: the line of one request, once the batch has ended.
pub(super) async fn result(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Result<UrlPath<(String, String)>, PathRejection>,
) -> Result<Response, ApiError> {
    let UrlPath((id, custom_id)) = path.map_err(|_| not_found(""))?;
    let stored = find(&app, &owner, &id).await?;
    let folder = app.data.join(folder(&stored.id));
    let wanted = custom_id.clone();
    let line = spawn_blocking(move || find_line(&folder, &wanted)).await.context("reading the results panicked")??;
    let message = if line.is_none() && ["validating", "in_progress", "cancelling"].contains(&stored.status.as_str()) {
        format!("The batch is {}: there is no result of '{custom_id}' yet.", stored.status)
    } else {
        format!("The batch has no result of '{custom_id}'.")
    };
    let line =
        line.ok_or_else(|| ApiError { param: Some("custom_id".into()), ..ApiError::new(StatusCode::NOT_FOUND, None, message) })?;
    Ok(json_response(&line))
}

fn find_line(folder: &Path, custom_id: &str) -> anyhow::Result<Option<Value>> {
    // Most lines can be told apart without reading them as JSON.
    let quoted = json!(custom_id).to_string();
    for name in ["output.jsonl", "output.errors.jsonl"] {
        let path = folder.join(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            file => file.with_context(|| path.display().to_string())?,
        };
        for line in BufReader::new(file).lines() {
            let line = line?;
            if line.contains(&quoted) {
                let value: Value = serde_json::from_str(&line)?;
                if value["custom_id"] == custom_id {
                    return Ok(Some(value));
                }
            }
        }
    }
    Ok(None)
}
