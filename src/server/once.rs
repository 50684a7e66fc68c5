//! `Idempotency-Key`: a request that may come again, because its caller has not heard an answer, is done once. Knows no
//! dialect. Invariants: of two requests with a key the second waits for the first; what was made is remembered in the
//! transaction that made it; a key that comes with another request is refused.

use super::App;
use super::auth::Owner;
use super::errors::ApiError;
use super::log::say;
use super::models::now;
use super::{batches, body, message_batches, stored};
use crate::store::Connection;
use crate::store::answers::{self, Answer};
use anyhow::Result;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures::{StreamExt as _, stream};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::{OwnedMutexGuard, mpsc};

const HEADER: &str = "idempotency-key";
/// How long keys are remembered.
const KEPT_S: u64 = 86_400;
/// Requests that may wait for one with their key.
const MAX_WAITING: usize = 16;
/// Longest key.
const MAX_KEY: usize = 255;
/// Keys that are forgotten at a time.
const AT_A_TIME: usize = 256;
/// Whose bodies hold a batch's requests.
const BATCHES: [&str; 3] = ["/v1/batches", "/v1/messages/batches", "/v1/v1/messages/batches"];
/// Kinds of what was made, where the answer is what has become of it.
pub(super) const RESPONSE: &str = "response";
/// As events.
pub(super) const RESPONSE_EVENTS: &str = "response events";
pub(super) const BATCH: &str = "batch";
pub(super) const MESSAGE_BATCH: &str = "message batch";

/// Requests with a key that are under way: each has a lock that others wait for.
#[derive(Debug, Default)]
pub struct Once(Mutex<HashMap<OwnKey, Weak<tokio::sync::Mutex<()>>>>);

/// An owner and one of its keys.
type OwnKey = (String, String);

impl Once {
    /// The request's turn, once nobody else has it; `None` if too many wait for it, each with its body.
    async fn turn(&self, owner: &str, key: &str) -> Option<OwnedMutexGuard<()>> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let own = locks.entry((owner.to_owned(), key.to_owned())).or_default();
            own.upgrade().unwrap_or_else(|| {
                let new = Arc::default();
                *own = Arc::downgrade(&new);
                new
            })
        };
        if Arc::strong_count(&lock) > 1 + MAX_WAITING {
            return None;
        }
        Some(lock.lock_owned().await)
    }
}

/// A request with a key, the first of its kind.
#[derive(Debug)]
pub(super) struct Claim {
    owner: String,
    key: String,
    request: String,
    is_kept: AtomicBool,
    /// Whoever sends the key again waits as long as anybody holds this: until what it asks for is done, or stored.
    _turn: OwnedMutexGuard<()>,
}

impl Claim {
    /// Remembers what was answered, or made, in the transaction that makes it.
    pub(super) fn keep(&self, connection: &Connection, kind: &str, content: &str) -> Result<()> {
        let (request, kind, content) = (self.request.clone(), kind.to_owned(), content.to_owned());
        answers::put(connection, &self.owner, &self.key, &Answer { request, created_at: now(), kind, content })?;
        self.is_kept.store(true, Relaxed);
        Ok(())
    }
}

/// Hands a request on, unless it was done before.
///
/// # Errors
/// Its key came with another request, or is none; or the key's owner has asked for too much.
pub(super) async fn through(app: &Arc<App>, owner: Owner, mut request: Request, next: Next) -> Result<Response, ApiError> {
    let path = request.uri().path().to_owned();
    let is_call = request.method() == Method::POST;
    let Some(key) = request.headers().get(HEADER).filter(|_| is_call).cloned() else {
        app.take_request(&owner, request.method(), &path)?;
        request.extensions_mut().insert(owner);
        return Ok(next.run(request).await);
    };
    let key = key.to_str().ok().filter(|key| (1..=MAX_KEY).contains(&key.len())).map(str::to_owned);
    let key = key.ok_or_else(|| ApiError::invalid_value(HEADER, format!("must be 1 to {MAX_KEY} visible ASCII characters")))?;
    if path == "/v1/files" {
        return Err(ApiError::field("unsupported_parameter", HEADER, "is not supported for files"));
    }
    let (parts, content) = request.into_parts();
    let limit = if BATCHES.contains(&&*path) { app.batch_body_bytes() } else { app.max_body_bytes };
    let content = body::read(&parts.headers, content, app, limit).await?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(path.as_bytes()).update(&[0]).update(&content);
    let hash = hasher.finalize().to_hex().to_string();
    let turn = app.once.turn(&owner, &key).await;
    let turn = turn.ok_or_else(ApiError::busy)?;
    let (own, wanted) = (owner.to_string(), key.clone());
    let since = now().saturating_sub(KEPT_S);
    if let Some(found) = app.store.read(move |connection| answers::get(connection, &own, &wanted, since)).await? {
        if found.request != hash {
            return Err(ApiError::field("idempotency_key_reused", HEADER, "was used with another request before"));
        }
        return replay(app, &owner, found).await;
    }
    app.take_request(&owner, &parts.method, &path)?;
    let claim = Arc::new(Claim { owner: owner.to_string(), key, request: hash, is_kept: AtomicBool::new(false), _turn: turn });
    let mut request = Request::from_parts(parts, Body::from(content));
    request.extensions_mut().insert(owner.with(Arc::clone(&claim)));
    let response = next.run(request).await;
    if !response.status().is_success() || claim.is_kept.load(Relaxed) {
        return Ok(response);
    }
    Ok(kept(app, claim, response))
}

/// The answer, which is remembered when it is whole. It goes on if its caller goes away: whoever gave it a key will ask for it
/// again, and is charged once.
fn kept(app: &Arc<App>, claim: Arc<Claim>, response: Response) -> Response {
    let app = Arc::clone(app);
    let (parts, content) = response.into_parts();
    let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default().to_owned();
    let mut chunks = content.into_data_stream();
    let (sender, mut told) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut text = Vec::new();
        while let Some(chunk) = chunks.next().await {
            let is_whole = chunk.as_ref().map(|chunk| text.extend_from_slice(chunk)).is_ok();
            // Nobody may be there any more.
            drop(sender.send(chunk).await);
            if !is_whole {
                return;
            }
        }
        let (text, _turn) = (String::from_utf8_lossy(&text).into_owned(), Arc::clone(&claim));
        if let Err(error) = app.store.write(move |connection| claim.keep(connection, &kind, &text)).await {
            say(&format!("an answer could not be kept: {error:#}"));
        }
    });
    Response::from_parts(parts, Body::from_stream(stream::poll_fn(move |context| told.poll_recv(context))))
}

/// What was answered, or what has become of what was made.
async fn replay(app: &Arc<App>, owner: &Owner, found: Answer) -> Result<Response, ApiError> {
    let mut response = match found.kind.as_str() {
        RESPONSE => stored::show(app, owner, &found.content).await?,
        RESPONSE_EVENTS => stored::stream(Arc::clone(app), found.content, 0),
        BATCH => batches::show(app, owner, &found.content).await?,
        MESSAGE_BATCH => message_batches::show(app, owner, &found.content).await?,
        kind => ([(header::CONTENT_TYPE, kind.to_owned())], found.content).into_response(),
    };
    response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
    Ok(response)
}

/// Forgets keys that are too old.
pub(super) async fn forget_old(app: &App) -> Result<()> {
    let before = now().saturating_sub(KEPT_S);
    while app.store.write(move |connection| answers::forget_before(connection, before, AT_A_TIME)).await? == AT_A_TIME {}
    Ok(())
}
