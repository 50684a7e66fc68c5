//! `/v1/files` of objects that stay where they are: named by a URI, from places that the configuration allows. Invariants: their
//! bytes are not kept here, and are read as long as they are the same; deleting the name deletes nothing else.

use super::App;
use super::auth::Owner;
use super::batch_inputs::{self, refused};
use super::errors::{ApiError, json_response};
use super::files::{BATCH_DAYS, kept_seconds, refuse, shown};
use super::ids;
use super::models::now;
use crate::pipeline::referenced::Reference;
use crate::store::files::{self, StoredFile};
use anyhow::Context as _;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::{Map, Value};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

/// What a body may say.
const FIELDS: [&str; 5] = ["purpose", "uri", "format", "filename", "expires_after"];
/// Longest name, in characters.
const MAX_NAME: usize = 512;

fn text<'b>(body: &'b Map<String, Value>, key: &str) -> Result<Option<&'b str>, ApiError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(ApiError::invalid_type(key, "a string", other)),
    }
}

/// `expires_after`: how long the name is kept.
fn kept(body: &Map<String, Value>) -> Result<u64, ApiError> {
    let kept_s = match body.get("expires_after") {
        None | Some(Value::Null) => None,
        Some(Value::Object(after)) => {
            let seconds = match after.get("seconds") {
                None | Some(Value::Null) => return Err(ApiError::missing("expires_after.seconds")),
                Some(seconds) => seconds.as_u64(),
            };
            kept_seconds(text(after, "anchor")?, Some(seconds.unwrap_or(0)))?
        }
        Some(other) => return Err(ApiError::invalid_type("expires_after", "an object", other)),
    };
    Ok(kept_s.unwrap_or(BATCH_DAYS * 86_400))
}

/// Makes a name for an object.
pub(super) async fn create(app: &Arc<App>, owner: &Owner, body: Map<String, Value>) -> Result<Response, ApiError> {
    if let Some((name, _)) = body.iter().find(|(name, value)| !FIELDS.contains(&name.as_str()) && !value.is_null()) {
        return Err(ApiError::field("unsupported_parameter", name.clone(), "is not supported"));
    }
    let purpose = text(&body, "purpose")?.ok_or_else(|| ApiError::missing("purpose"))?.to_owned();
    if purpose != "batch" {
        return Err(refuse("purpose", format!("{purpose:?} is not batch, which files by reference are for")));
    }
    let uri = text(&body, "uri")?.ok_or_else(|| ApiError::missing("uri"))?.to_owned();
    if let Some(format) = text(&body, "format")?.filter(|format| *format != "jsonl") {
        return Err(ApiError::field("unsupported_value", "format", format!("{format:?} is not jsonl")));
    }
    let kept_s = kept(&body)?;
    let last = uri.rsplit('/').next().unwrap_or_default().to_owned();
    let filename = text(&body, "filename")?.map_or(last, str::to_owned);
    let own = Arc::clone(app);
    let pinned = spawn_blocking(move || own.places.pin(&uri)).await.context("looking for an object panicked")?;
    let (Reference { uri, version }, bytes) = pinned.map_err(|why| refused("uri", &why))?;
    if filename.is_empty() || filename.chars().count() > MAX_NAME {
        return Err(refuse("filename", format!("must have 1 to {MAX_NAME} characters")));
    }
    if bytes == 0 {
        return Err(refuse("uri", "is empty"));
    }
    if bytes > app.max_file_bytes {
        let message = format!("the file is over the limit of {} bytes", app.max_file_bytes);
        return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("file_too_large"), message));
    }
    let (created_at, path) = (now(), String::new());
    let (id, owner, expires_at) = (ids::new("file-"), owner.to_string(), Some(created_at + kept_s));
    let reference = Some((uri, version));
    let new = StoredFile { id, owner, created_at, expires_at, purpose, filename, bytes, path, reference };
    let answer = shown(&new);
    app.store.write(move |connection| files::insert(connection, &new)).await?;
    Ok(json_response(&answer))
}

/// An object's bytes, read in ranges as they are sent.
pub(super) async fn send(app: &Arc<App>, reference: Reference, n_bytes: u64) -> Result<Response, ApiError> {
    let reader = app.reader()?;
    let found = batch_inputs::find(app, reference).await?.map_err(|why| refused("file_id", &why))?;
    let (sender, mut pieces) = mpsc::channel(2);
    spawn_blocking(move || {
        let _reader = reader; // until all is sent
        let mut content = match found.read() {
            Ok(content) => content,
            Err(why) => return drop(sender.blocking_send(Err(std::io::Error::other(why)))),
        };
        loop {
            match content.next_chunk() {
                Ok(chunk) if chunk.is_empty() => return,
                Ok(chunk) => {
                    if sender.blocking_send(Ok(chunk)).is_err() {
                        return;
                    }
                }
                // An answer that breaks off is not as long as it says.
                Err(error) => return drop(sender.blocking_send(Err(std::io::Error::other(error)))),
            }
        }
    });
    let pieces = futures::stream::poll_fn(move |context| pieces.poll_recv(context));
    let mut response = Response::new(Body::from_stream(pieces));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(n_bytes));
    Ok(response)
}
