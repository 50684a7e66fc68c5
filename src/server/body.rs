//! Request bodies: read within their limits, and parsed once. Invariant: what is no JSON object is the caller's error.

use super::App;
use super::errors::ApiError;
use anyhow::Context as _;
use async_stream::stream;
use axum::body::Body;
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

/// A body that is one JSON object.
pub(super) struct JsonObject(pub(super) Map<String, Value>);

impl FromRequest<Arc<App>> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        parse(read(&parts.headers, body, app, app.max_body_bytes).await?).await.map(Self)
    }
}

/// The same, which may be left out.
pub(super) struct MaybeObject(pub(super) Map<String, Value>);

impl FromRequest<Arc<App>> for MaybeObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let bytes = read(&parts.headers, body, app, app.max_body_bytes).await?;
        if bytes.trim_ascii().is_empty() { Ok(Self(Map::new())) } else { parse(bytes).await.map(Self) }
    }
}

/// Bytes over the limit that are read and thrown away: most clients send their body before they read an answer, and would see
/// a broken connection.
pub(super) const MAX_DISCARDED: usize = 16 << 20;
/// Bodies from that length on are parsed away from the threads that serve connections.
const LONG: usize = 256 << 10;

/// Reads a body, within the limits of its length and its time.
pub(super) async fn read(headers: &HeaderMap, body: Body, app: &App, limit: usize) -> Result<Bytes, ApiError> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let is_too_long = length.is_some_and(|n_bytes| n_bytes > limit);
    match tokio::time::timeout(app.body_timeout, up_to(body, limit)).await {
        Ok(Ok(Some(bytes))) => Ok(bytes),
        Ok(Ok(None)) => Err(too_large(limit)),
        _ if is_too_long => Err(too_large(limit)),
        Ok(Err(_)) => Err(broken_off()),
        Err(_) => Err(too_slow()),
    }
}

pub(super) fn broken_off() -> ApiError {
    refuse("the body broke off")
}

pub(super) fn too_slow() -> ApiError {
    ApiError::new(StatusCode::REQUEST_TIMEOUT, None, "the body took too long to arrive")
}

/// A body of at most `limit` bytes; `None` of a longer one.
async fn up_to(body: Body, limit: usize) -> Result<Option<Bytes>, axum::Error> {
    let mut chunks = body.into_data_stream();
    let (mut bytes, mut n_bytes) = (BytesMut::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        n_bytes += chunk.len();
        if n_bytes <= limit {
            bytes.extend_from_slice(&chunk);
        } else {
            bytes = BytesMut::new();
        }
        if n_bytes > limit + MAX_DISCARDED {
            break;
        }
    }
    Ok((n_bytes <= limit).then(|| bytes.freeze()))
}

/// Bytes a second that uploads must have on average, after the time that a body has.
const MIN_RATE: f64 = 4096.0;

/// When the next part of an upload must be there, after so many bytes.
pub(super) fn end(start: Instant, app: &App, n_bytes: usize) -> Instant {
    start + app.body_timeout + Duration::from_secs_f64(n_bytes as f64 / MIN_RATE)
}

/// A long body: it breaks off if it comes so slowly that it seems to be there to take up room.
pub(super) async fn paced(State(app): State<Arc<App>>, request: Request) -> Request {
    request.map(|body| {
        let (start, mut n_bytes) = (Instant::now(), 0);
        let chunks = stream! {
            let mut chunks = body.into_data_stream();
            loop {
                match tokio::time::timeout_at(end(start, &app, n_bytes), chunks.next()).await {
                    Ok(Some(Ok(chunk))) => {
                        n_bytes += chunk.len();
                        yield Ok(chunk);
                    }
                    Ok(Some(Err(error))) => yield Err(std::io::Error::other(error)),
                    Ok(None) => return,
                    Err(_) => {
                        yield Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "it comes too slowly"));
                        return;
                    }
                }
            }
        };
        Body::from_stream(chunks)
    })
}

pub(super) fn too_large(limit: usize) -> ApiError {
    let message = format!("the body is over the limit of {limit} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("request_too_large"), message)
}

fn refuse(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, None, message)
}

pub(super) fn empty() -> ApiError {
    refuse("the body is empty; it must be a JSON object")
}

pub(super) fn no_object() -> ApiError {
    refuse("the body must be a JSON object")
}

pub(super) fn no_json(error: &serde_json::Error) -> ApiError {
    refuse(format!("the body is not valid JSON: {error}"))
}

async fn parse(bytes: Bytes) -> Result<Map<String, Value>, ApiError> {
    if bytes.len() < LONG {
        return parse_now(&bytes);
    }
    spawn_blocking(move || parse_now(&bytes)).await.context("parsing a body panicked")?
}

fn parse_now(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    if bytes.trim_ascii().is_empty() {
        return Err(empty());
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(no_object()),
        Err(error) => Err(no_json(&error)),
    }
}
