//! `/v1/batches` over HTTP: created from a file or from requests in the body, fetched, listed, cancelled. What becomes of
//! them is in `batch_runs`. Invariant: a batch that was answered is on the disk with a copy of its own of its input.

use super::App;
use super::auth::Owner;
use super::batch_inputs::{self, first_model, model_of};
use super::batch_runs::{self, Settings, Tariff, cancelled, folder};
use super::batch_tokens::{default_output, estimate};
use super::body::JsonObject;
use super::errors::{ApiError, json_response};
use super::files::Arriving;
use super::limits;
use super::models::now;
use super::once::{self, Claim};
use super::paging::{Page, Pairs};
use super::stored::listed;
use super::{files, ids, message_batches, windows};
use crate::format::openai::{Endpoint, kind};
use crate::pipeline::referenced::{Reference, Referenced};
use crate::store::Connection;
use crate::store::batches::{self, StoredBatch};
use crate::store::files::{self as stored_files, StoredFile};
use anyhow::Context as _;
use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
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
    /// If it is to be known as a file, and is not yet: gone again, unless its batch is accepted.
    pub(super) arriving: Option<Arriving>,
    /// Its lines, if they came with the batch: then it is to be written; to the batch's folder alone if it is not to be known.
    pub(super) lines: Option<Vec<String>>,
    /// If it lies elsewhere.
    pub(super) reference: Option<(Reference, Referenced)>,
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
}

/// What the ids of batches begin with.
const PREFIX: &str = "batch_";

/// `POST /v1/batches`
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    JsonObject(body): JsonObject,
) -> Result<Response, ApiError> {
    const KNOWN: [&str; 7] =
        ["input_file_id", "requests", "endpoint", "completion_window", "metadata", "output_expires_after", "label"];
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
    let hours = hours(text(&body, "completion_window")?)?;
    let metadata = windows::metadata(&body)?.cloned();
    if let Some(asked) = windows::asked(metadata.as_ref()) {
        app.models.check_window(asked)?;
    }
    let output_seconds = output_seconds(&body)?;
    let input = match (text(&body, "input_file_id")?, body.get("requests").filter(|value| !value.is_null())) {
        (Some(_), Some(_)) => return Err(ApiError::invalid_value("requests", "can't be combined with input_file_id")),
        (None, None) => return Err(ApiError::missing("input_file_id")),
        (Some(id), None) => {
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
            Input { id: file.id, path: app.data.join(file.path), arriving: None, lines: None, reference }
        }
        (None, Some(requests)) => {
            let (id, lines) = (ids::new("file-"), inline(requests, endpoint)?);
            let path = app.data.join("files").join(&id);
            Input { id, arriving: Some(Arriving::at(path.clone())), path, lines: Some(lines), reference: None }
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
    let Wanted { input, endpoint, hours, window, metadata, label, retry_of, output_seconds } = wanted;
    let is_messages = endpoint == Endpoint::Messages;
    let (id, created_at) = (ids::new(if is_messages { message_batches::PREFIX } else { PREFIX }), now());
    let n_known = input.lines.as_ref().filter(|_| is_messages).map_or(0, Vec::len);
    let object = json!({
        "id": id, "object": "batch", "endpoint": endpoint.path(),
        "input_file_id": input.id,
        "completion_window": window,
        "status": "validating", "created_at": created_at, "expires_at": created_at + 3600 * hours,
        "in_progress_at": null, "finalizing_at": null, "completed_at": null, "failed_at": null, "expired_at": null,
        "cancelling_at": null, "cancelled_at": null, "output_file_id": null, "error_file_id": null, "errors": null,
        "request_counts": {"total": n_known, "completed": 0, "failed": 0},
        "metadata": metadata, "label": label, "retry_of": retry_of, "model": null, "usage": null,
    });
    let tariff = Tariff::Free;
    let (endpoint, keeps_faults) = (endpoint.path().to_owned(), is_messages);
    let reference = input.reference.as_ref().map(|(reference, _)| reference.clone());
    let settings = Settings { endpoint, output_seconds, tariff, keeps_faults, reference };
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
    tokio::spawn(accept(app, (new, settings), input, owner.claim.clone())).await.context("accepting a batch panicked")??;
    Ok(object)
}

/// Puts a batch on the disk, and has it run, unless its owner has too much in batches.
async fn accept(
    app: Arc<App>,
    (mut new, mut settings): (StoredBatch, Settings),
    mut input: Input,
    claim: Option<Arc<Claim>>,
) -> Result<(), ApiError> {
    let (id, at) = (new.id.clone(), app.data.join(folder(&new.id)));
    let arriving = input.arriving.take();
    let file = arriving.as_ref().map(|_| StoredFile {
        id: input.id.clone(),
        owner: new.owner.clone(),
        created_at: new.created_at,
        expires_at: Some(new.created_at + files::BATCH_DAYS * 86_400),
        purpose: "batch".into(),
        filename: format!("{id}.jsonl"),
        bytes: 0,
        path: format!("files/{}", input.id),
        reference: None,
    });
    let limit = app.keys.allowance(&new.owner).map_or(0, |allowance| allowance.batch_tokens);
    let (unwanted, is_new) = (at.clone(), arriving.is_some());
    let (own, endpoint) = (Arc::clone(&app), settings.endpoint.clone());
    let put = spawn_blocking(move || -> anyhow::Result<_> {
        let referenced = input.reference.take().map(|(_, referenced)| referenced);
        let n_bytes = put_input(&at, input, (is_new, referenced.is_some()))?;
        let lines = || batch_inputs::lines(&at.join("input.jsonl"), referenced.as_ref());
        let model = model_of(&own.models, first_model(lines()?)?.as_deref());
        let n_tokens = if limit > 0 { estimate(lines()?, default_output(&own, model, &endpoint))? } else { 0 };
        Ok((n_bytes, Tariff::of(model), n_tokens))
    });
    let n_bytes;
    (n_bytes, settings.tariff, new.n_tokens) = put.await.context("writing the input panicked")??;
    new.settings = serde_json::to_string(&settings).context("settings are JSON")?;
    // Held until it is stored, also if its caller goes away.
    let _turn = claim.clone();
    let write = move |connection: &Connection| {
        let used = if limit > 0 { batches::held_tokens(connection, &new.owner, &new.id)? } else { 0 };
        if limit > 0 && used.saturating_add(new.n_tokens) > limit {
            let message = limits::too_many_in_batches(limit, used, new.n_tokens);
            return Ok(Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some(limits::IN_BATCHES), message)));
        }
        if let Some(file) = file {
            stored_files::insert(connection, &StoredFile { bytes: n_bytes, ..file })?;
        }
        if let Some(claim) = claim {
            let is_messages = new.id.starts_with(message_batches::PREFIX);
            claim.keep(connection, if is_messages { once::MESSAGE_BATCH } else { once::BATCH }, &new.id)?;
        }
        batches::insert(connection, &new).map(Ok)
    };
    if let Err(refused) = app.store.write(write).await? {
        // What is left of it is removed at the next start.
        let removed = spawn_blocking(move || drop(std::fs::remove_dir_all(unwanted)));
        removed.await.context("removing an input panicked")?;
        return Err(refused);
    }
    if let Some(arriving) = arriving {
        arriving.keep();
    }
    batch_runs::take_up(&app, id);
    Ok(())
}

fn text<'b>(body: &'b Map<String, Value>, key: &str) -> Result<Option<&'b str>, ApiError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(ApiError::invalid_type(key, "a string", other)),
    }
}

/// `24h`, and other numbers of hours; the names of windows stand for 24.
fn hours(window: Option<&str>) -> Result<u64, ApiError> {
    let Some(window) = window.filter(|window| !["asap", "standard"].contains(window)) else { return Ok(DEFAULT_HOURS) };
    let hours = window.strip_suffix('h').and_then(|hours| hours.parse().ok()).filter(|hours| (1..=MAX_HOURS).contains(hours));
    hours.ok_or_else(|| {
        let message = format!("{window:?} is not one of 24h, another number of hours up to {MAX_HOURS}h, asap, standard");
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

/// Lines of requests that stand in the body: `{custom_id, params}`.
fn inline(requests: &Value, endpoint: Endpoint) -> Result<Vec<String>, ApiError> {
    let requests = requests.as_array().ok_or_else(|| ApiError::invalid_type("requests", "an array", requests))?;
    if requests.is_empty() || requests.len() > MAX_INLINE {
        let message = format!("must hold 1 to {MAX_INLINE} requests, holds {}", requests.len());
        return Err(ApiError::invalid_value("requests", message));
    }
    let mut used = HashSet::new();
    let lines = requests.iter().enumerate().map(|(i, request)| {
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
        if !used.insert(id) {
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
    });
    lines.collect()
}

/// Makes the batch's folder with its input, durably; the input's length.
fn put_input(folder: &Path, Input { path, lines, .. }: Input, (is_new, is_elsewhere): (bool, bool)) -> anyhow::Result<u64> {
    std::fs::create_dir(folder).with_context(|| folder.display().to_string())?;
    if is_elsewhere {
        for folder in [Some(folder), folder.parent()].into_iter().flatten() {
            File::open(folder)?.sync_all()?;
        }
        return Ok(0);
    }
    let own = folder.join("input.jsonl");
    let is_own = lines.is_some() && !is_new;
    if let Some(lines) = lines {
        let at = if is_own { &own } else { &path };
        let mut file = BufWriter::new(File::create_new(at).with_context(|| at.display().to_string())?);
        for line in lines {
            writeln!(file, "{line}")?;
        }
        file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    }
    if !is_own {
        // A second name for the same bytes, which nobody changes: it stays when the file is deleted.
        std::fs::hard_link(&path, &own).with_context(|| path.display().to_string())?;
    }
    for folder in [Some(folder), folder.parent(), path.parent()].into_iter().flatten() {
        File::open(folder)?.sync_all()?;
    }
    Ok(std::fs::metadata(&own)?.len())
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
