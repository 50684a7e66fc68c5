//! `/v1/files`: uploads streamed to the disk, listed, read and deleted; and names for objects that stay where they are
//! (`file_references`). Invariants: memory does not grow with a file; an upload that was answered is on the disk, whole.

use super::App;
use super::auth::Owner;
use super::body::JsonObject;
use super::errors::{ApiError, json_response};
use super::file_references;
use super::ids;
use super::models::now;
use super::paging::{Page, Pairs, get};
use super::stored::listed;
use crate::pipeline::hosted::{self, Committed};
use crate::pipeline::referenced::Reference;
use crate::store::files::{self, Listing, StoredFile};
use anyhow::Context as _;
use async_stream::stream;
use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, MultipartRejection};
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest as _, Multipart, Path as UrlPath, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

/// What a file may be for.
const PURPOSES: [&str; 6] = ["batch", "user_data", "assistants", "vision", "fine-tune", "evals"];
/// What a batch writes.
pub(super) const BATCH_OUTPUT: &str = "batch_output";
/// How long an input of batches is kept, where nothing is said.
pub(super) const BATCH_DAYS: u64 = 30;
/// Seconds that a file may be kept, where they are given.
const EXPIRES_S: std::ops::RangeInclusive<u64> = 3600..=2_592_000;
/// Bytes that are written or read at a time.
const PIECE: usize = 256 << 10;
/// Longest value of a form's other fields.
const MAX_FIELD: usize = 1024;

pub(super) fn refuse(param: &str, message: impl std::fmt::Display) -> ApiError {
    ApiError::invalid_value(param, message)
}

/// The file object.
pub(super) fn shown(file: &StoredFile) -> Value {
    let mut shown = json!({
        "id": file.id, "object": "file", "bytes": file.bytes, "created_at": file.created_at, "filename": file.filename,
        "purpose": file.purpose, "status": "processed", "expires_at": file.expires_at, "status_details": null,
    });
    if let Some((uri, _)) = &file.reference {
        shown["uri"] = uri.as_str().into();
    }
    shown
}

fn not_found(id: &str) -> ApiError {
    ApiError::not_found("file_id", format!("No such File object: {id}"))
}

/// A file of the caller's.
pub(super) async fn find(app: &App, owner: &Owner, id: &str) -> Result<StoredFile, ApiError> {
    let (owner, key) = (owner.to_string(), id.to_owned());
    let found = app.store.read(move |connection| files::get(connection, &owner, &key, now())).await?;
    found.ok_or_else(|| not_found(id))
}

/// Fields of the form besides the file.
const FIELDS: [&str; 3] = ["purpose", "expires_after[anchor]", "expires_after[seconds]"];

/// A file that is being written; gone again, unless it is kept.
pub(super) struct Arriving {
    path: PathBuf,
    is_kept: bool,
}

impl Arriving {
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path, is_kept: false }
    }

    /// It is known now.
    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if !self.is_kept {
            // What is left of it is swept at the next start.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

/// `POST /v1/files`
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    request: Request,
) -> Result<Response, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !kind.to_ascii_lowercase().starts_with("multipart/") {
        return file_references::create(&app, &owner, JsonObject::from_request(request, &app).await?.0).await;
    }
    let form: Result<Multipart, MultipartRejection> = Multipart::from_request(request, &app).await;
    let broken = |what: String| ApiError::new(StatusCode::BAD_REQUEST, None, format!("the form can't be read: {what}"));
    let mut form = form.map_err(|rejection| broken(rejection.body_text()))?;
    let (mut values, mut arrived) = (HashMap::new(), None);
    let id = ids::new("file-");
    while let Some(mut field) = in_time(&app, form.next_field()).await?.map_err(|error| broken(error.body_text()))? {
        let name = field.name().unwrap_or_default().to_owned();
        if name == "file" {
            if arrived.is_some() {
                return Err(refuse("file", "only one file can be uploaded at a time"));
            }
            let filename = field.file_name().unwrap_or("upload").to_owned();
            let path = app.data.join("files").join(&id);
            let file = Arriving::at(path);
            let n_bytes = receive(&app, &mut field, &file.path).await?;
            arrived = Some((file, filename, n_bytes));
        } else if FIELDS.contains(&name.as_str()) {
            values.insert(name, text_of(&app, &mut field).await?);
        } else {
            return Err(ApiError::field("unsupported_parameter", name, "is not supported"));
        }
    }
    let Some((file, filename, bytes)) = arrived else { return Err(ApiError::missing("file")) };
    let purpose = values.remove("purpose").ok_or_else(|| ApiError::missing("purpose"))?;
    if !PURPOSES.contains(&purpose.as_str()) {
        return Err(refuse("purpose", format!("{purpose:?} is not one of {}", PURPOSES.join(", "))));
    }
    if purpose == "batch" && bytes == 0 {
        return Err(refuse("file", "is empty"));
    }
    let created_at = now();
    let (anchor, seconds) = (values.remove("expires_after[anchor]"), values.remove("expires_after[seconds]"));
    let seconds = seconds.map(|text| text.parse().unwrap_or(0));
    let kept_s = kept_seconds(anchor.as_deref(), seconds)?.or_else(|| (purpose == "batch").then_some(BATCH_DAYS * 86_400));
    let (owner, path) = (owner.to_string(), format!("files/{id}"));
    let expires_at = kept_s.map(|seconds| created_at + seconds);
    let new = StoredFile { id, owner, created_at, expires_at, purpose, filename, bytes, path, reference: None };
    let answer = shown(&new);
    // A caller who goes away now must not leave a file behind that is known and has no content.
    let kept = tokio::spawn(async move {
        app.store.write(move |connection| files::insert(connection, &new)).await?;
        file.keep();
        anyhow::Ok(())
    });
    kept.await.context("keeping a file panicked")??;
    Ok(json_response(&answer))
}

/// What `expires_after` says: its `anchor` and its `seconds`.
pub(super) fn kept_seconds(anchor: Option<&str>, seconds: Option<u64>) -> Result<Option<u64>, ApiError> {
    let Some(seconds) = seconds else { return Ok(None) };
    if anchor != Some("created_at") {
        return Err(refuse("expires_after.anchor", "must be \"created_at\""));
    }
    let seconds = Some(seconds).filter(|seconds| EXPIRES_S.contains(seconds));
    let fault = || refuse("expires_after.seconds", format!("must be {} to {}", EXPIRES_S.start(), EXPIRES_S.end()));
    seconds.ok_or_else(fault).map(Some)
}

async fn in_time<T>(app: &App, next: impl Future<Output = T>) -> Result<T, ApiError> {
    let late = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, None, "the body took too long to arrive");
    tokio::time::timeout(app.body_timeout, next).await.map_err(late)
}

async fn text_of(app: &App, field: &mut Field<'_>) -> Result<String, ApiError> {
    let mut text = Vec::new();
    while let Some(chunk) = next_chunk(app, field).await? {
        text.extend_from_slice(&chunk);
        if text.len() > MAX_FIELD {
            return Err(refuse(field.name().unwrap_or_default(), format!("is longer than {MAX_FIELD} bytes")));
        }
    }
    String::from_utf8(text).map_err(|_| refuse(field.name().unwrap_or_default(), "is not UTF-8"))
}

async fn next_chunk(app: &App, field: &mut Field<'_>) -> Result<Option<Bytes>, ApiError> {
    let chunk = in_time(app, field.chunk()).await?;
    chunk.map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, None, format!("the form broke off: {}", error.body_text())))
}

/// Writes a field to a file, which is on the disk then; its length.
async fn receive(app: &App, field: &mut Field<'_>, path: &Path) -> Result<u64, ApiError> {
    let mut file = File::create_new(path).with_context(|| format!("cannot write {}", path.display()))?;
    let (mut n_bytes, mut piece) = (0, Vec::with_capacity(PIECE));
    loop {
        let chunk = next_chunk(app, field).await?;
        let is_end = chunk.is_none();
        piece.extend_from_slice(&chunk.unwrap_or_default());
        if piece.len() < PIECE && !is_end {
            continue;
        }
        n_bytes += piece.len() as u64;
        if n_bytes > app.max_file_bytes {
            let message = format!("the file is over the limit of {} bytes", app.max_file_bytes);
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("file_too_large"), message));
        }
        let folder = path.parent().map(Path::to_owned).unwrap_or_default();
        let written = spawn_blocking(move || -> std::io::Result<_> {
            file.write_all(&piece)?;
            if is_end {
                file.sync_all()?;
                File::open(folder)?.sync_all()?;
            }
            piece.clear();
            Ok((file, piece))
        });
        (file, piece) = written.await.context("writing a file panicked")?.with_context(|| path.display().to_string())?;
        if is_end {
            return Ok(n_bytes);
        }
    }
}

/// `GET /v1/files`
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    query: Pairs,
) -> Result<Response, ApiError> {
    let Page { after, limit, is_ascending } = Page::of(&query, (10_000, 10_000))?;
    let listing = Listing { purpose: get(&query, "purpose").map(str::to_owned), after, limit: limit + 1, is_ascending };
    let found = app.store.read(move |connection| files::list(connection, &owner, &listing, now())).await?;
    let data: Vec<Value> = found.iter().take(limit).map(shown).collect();
    Ok(json_response(&listed(&data, found.len() > data.len())))
}

type Id = Result<UrlPath<String>, PathRejection>;

async fn named(app: &App, owner: &Owner, path: Id) -> Result<StoredFile, ApiError> {
    let UrlPath(id) = path.map_err(|_| not_found(""))?;
    find(app, owner, &id).await
}

/// `GET /v1/files/{id}`
pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
) -> Result<Response, ApiError> {
    Ok(json_response(&shown(&named(&app, &owner, path).await?)))
}

/// `GET /v1/files/{id}/content`. Of a batch that runs, what it has so far, after the first `offset` lines.
pub(super) async fn content(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
    query: Pairs,
) -> Result<Response, ApiError> {
    let file = named(&app, &owner, path).await?;
    let offset = match get(&query, "offset") {
        None => 0,
        Some(text) => text.parse().map_err(|_| refuse("offset", format!("{text:?} is no number of lines")))?,
    };
    if let Some((uri, version)) = file.reference {
        return file_references::send(&app, Reference { uri, version }, file.bytes).await;
    }
    let at = app.data.join(&file.path);
    if file.purpose == BATCH_OUTPUT && !at.exists() {
        return partial(&app, at, offset).await;
    }
    // It may have been written since it was looked up.
    let n_bytes =
        if file.purpose == BATCH_OUTPUT { std::fs::metadata(&at).context("a batch's results")?.len() } else { file.bytes };
    send(&at, n_bytes, "application/octet-stream")
}

/// Results of a batch that runs, in the order in which it came to them.
async fn partial(app: &App, at: PathBuf, offset: u64) -> Result<Response, ApiError> {
    let folder = at.parent().map(Path::to_owned).unwrap_or_default();
    let found = spawn_blocking(move || hosted::committed(&folder)).await.context("looking at a journal panicked")?;
    let found = match found {
        // Its journal went while it was looked at: it has ended.
        Err(_) | Ok(None) if at.exists() => {
            let n_bytes = std::fs::metadata(&at).context("a batch's results")?.len();
            return send(&at, n_bytes, "application/octet-stream");
        }
        found => found?,
    };
    let n_lines = found.as_ref().map_or(0, Committed::n_lines);
    let (sender, mut pieces) = mpsc::channel::<std::io::Result<Bytes>>(2);
    let reader = app.reader()?;
    spawn_blocking(move || {
        let _reader = reader; // until all is sent
        let Some(found) = found else { return };
        if let Err(error) = found.read(offset, &mut |lines| sender.blocking_send(Ok(lines.into())).is_ok()) {
            // The answer breaks off: its batch has ended, and the whole file is there.
            drop(sender.blocking_send(Err(std::io::Error::other(error))));
        }
    });
    let pieces = futures::stream::poll_fn(move |context| pieces.poll_recv(context));
    let mut response = Response::new(Body::from_stream(pieces));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert("x-incomplete", HeaderValue::from_static("true"));
    headers.insert("x-last-line", HeaderValue::from(n_lines.max(offset)));
    Ok(response)
}

/// A file's bytes, read as they are sent.
pub(super) fn send(path: &Path, n_bytes: u64, content_type: &'static str) -> Result<Response, ApiError> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let body = stream! {
        loop {
            let read = spawn_blocking(move || {
                let mut piece = Vec::with_capacity(PIECE);
                let read = std::io::Read::by_ref(&mut file).take(PIECE as u64).read_to_end(&mut piece);
                (file, read.map(|_| Bytes::from(piece)))
            });
            // An answer that breaks off is not as long as it says.
            let (same, piece) = match read.await {
                Ok(read) => read,
                Err(panic) => {
                    yield Err(std::io::Error::other(panic));
                    return;
                }
            };
            file = same;
            match &piece {
                Ok(piece) if piece.is_empty() => return,
                Ok(_) => yield piece,
                Err(_) => {
                    yield piece;
                    return;
                }
            }
        }
    };
    let mut response = Response::new(Body::from_stream(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(n_bytes));
    Ok(response)
}

/// `DELETE /v1/files/{id}`
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
) -> Result<Response, ApiError> {
    let file = named(&app, &owner, path).await?;
    remove(&app, file.clone()).await?;
    Ok(json_response(&json!({"id": file.id, "object": "file", "deleted": true})))
}

/// The name first: a name that leads elsewhere is all there is here; else a name without content would be a lie, content without a name is swept.
async fn remove(app: &App, file: StoredFile) -> anyhow::Result<()> {
    let path = app.data.join(&file.path);
    let is_elsewhere = file.reference.is_some();
    app.store.write(move |connection| files::delete(connection, &file.id)).await?;
    if is_elsewhere {
        return Ok(());
    }
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes what uploads that broke off have left.
pub(super) async fn sweep(app: &App) -> anyhow::Result<()> {
    let folder = app.data.join("files");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for entry in std::fs::read_dir(&folder)? {
        let entry = entry?;
        let id = entry.file_name().to_string_lossy().into_owned();
        if !app.store.read(move |connection| files::is_known(connection, &id)).await? {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Files that are removed at a time.
const AT_A_TIME: usize = 256;

/// Removes files whose time has come.
pub(super) async fn expire(app: &App) -> anyhow::Result<()> {
    loop {
        let expired = app.store.read(|connection| files::expired(connection, now(), AT_A_TIME)).await?;
        let is_last = expired.len() < AT_A_TIME;
        for file in expired {
            remove(app, file).await.context("a file that has expired")?;
        }
        if is_last {
            return Ok(());
        }
    }
}
