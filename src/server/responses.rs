//! `POST /v1/responses`: what a response says beside its completion, and how it is created. What becomes of stored and
//! background ones is in `stored` and `background`. Invariant: a response that says `store` is on the disk before its end is told.

use super::App;
use super::auth::Owner;
use super::background;
use super::body::JsonObject;
use super::books::{Bill, JSON};
use super::call::{Call, Identity, Streaming, take_bool};
use super::conversation;
use super::errors::{ApiError, json_response};
use super::log::say;
use super::models::now;
use super::once::Claim;
use super::response_events::{TERMINAL, Told, events};
use super::sse;
use super::trajectories::Turn;
use super::windows::{Table, Window};
use crate::format::openai::{Endpoint, is_known};
use crate::outcome::Completion;
use crate::store::responses::{self, StoredResponse};
use async_stream::stream;
use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use futures::StreamExt as _;
use serde_json::{Map, Value, json};
use std::pin::pin;
use std::sync::Arc;

/// Fields with meaning that are not offered.
const REFUSED: &[&str] = &["prompt", "conversation", "moderation"];

/// Creates a response.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    JsonObject(mut body): JsonObject,
) -> Result<Response, ApiError> {
    let streaming = Streaming::take(&mut body)?;
    let mut own = Own::take(&mut body, streaming.is_on, &app.windows)?;
    let identity = Identity::new();
    let items;
    (items, own.follows) = conversation::join(&app, &owner, (&identity.id, own.previous.as_deref()), &mut body).await?;
    if own.background {
        let id = background::create(&app, &owner, (own, identity), body, items).await?;
        return if streaming.is_on {
            Ok(super::stored::stream(app, id, 0))
        } else {
            super::stored::show(&app, &owner, &id).await
        };
    }
    let turn = Turn::of(&body, own.follows.as_deref(), own.store);
    let mut call = Call::start_as(&app, &owner, Endpoint::Responses, &body, (turn, &identity)).await?;
    let bill = Arc::clone(&call.bill);
    let (previous, is_used, is_streamed) = (own.previous.clone(), own.store, streaming.is_on);
    let shelf = Shelf { app: Arc::clone(&app), owner, items, previous, is_used, is_streamed, bill };
    if !streaming.is_on {
        let mut response = answer(call, &own).await?;
        shelf.put(&mut response).await;
        return Ok(json_response(&response));
    }
    call.is_streamed = true;
    Ok(sse::response(stream! {
        let mut events = pin!(events(call, own, Told::default()));
        while let Some((name, mut data)) = events.next().await {
            if TERMINAL.contains(&name) {
                shelf.put(&mut data["response"]).await;
            }
            yield sse::event(name, &data);
        }
        yield sse::DONE.to_owned();
    }))
}

/// Where a response that was waited for is put.
struct Shelf {
    app: Arc<App>,
    owner: Owner,
    items: Vec<Value>,
    previous: Option<String>,
    /// Whether it is stored.
    is_used: bool,
    is_streamed: bool,
    bill: Arc<Bill>,
}

impl Shelf {
    /// What is remembered of it if its request may come again, and its answer is one text.
    fn kept(&self, response: &Value) -> Option<(Arc<Claim>, String)> {
        let claim = self.owner.claim.clone().filter(|_| !self.is_streamed);
        claim.map(|claim| (claim, response.to_string()))
    }

    /// Puts it there, with what it is charged. It is given whatever the disk does; if that fails, it says so.
    async fn put(&self, response: &mut Value) {
        let entry = self.bill.take();
        if !self.is_used {
            if let Some(entry) = entry {
                self.app.charge(entry, self.kept(response)).await;
            }
            return;
        }
        let text = |key: &str| response[key].as_str().unwrap_or_default().to_owned();
        let stored = StoredResponse {
            id: text("id"),
            owner: self.owner.to_string(),
            created_at: response["created_at"].as_u64().unwrap_or_else(now),
            status: text("status"),
            is_background: false,
            previous: self.previous.clone(),
            input: Value::from(self.items.clone()).to_string(),
            body: response.to_string(),
            request: None,
            n_faults: 0,
        };
        let (app, kept) = (Arc::clone(&self.app), self.kept(response));
        let put = self.app.store.write(move |connection| {
            responses::insert(connection, &stored)?;
            if let Some((claim, answer)) = kept {
                claim.keep(connection, JSON, &answer)?;
            }
            entry.map_or(Ok(()), |entry| app.books.add(connection, &entry))
        });
        if let Err(error) = put.await {
            say(&format!("a response could not be stored: {error:#}"));
            response["store"] = false.into();
        }
    }
}

/// What a response says beside its completion.
#[derive(Debug, Clone, Default)]
pub struct Own {
    /// Whether it outlives its call.
    pub store: bool,
    /// Whether it is fetched later.
    pub background: bool,
    /// The response that it follows.
    pub previous: Option<String>,
    /// The trajectory of what it follows.
    pub follows: Option<String>,
    /// Whether its events are wanted as they come.
    pub is_streamed: bool,
    /// The window that `background_options` asks for.
    pub window: Option<Window>,
}

impl Own {
    /// Takes the fields that are no request parser's out of a body; unknown ones are ignored here.
    fn take(body: &mut Map<String, Value>, is_stream: bool, windows: &Table) -> Result<Self, ApiError> {
        if let Some(name) = REFUSED.iter().find(|name| body.get(**name).is_some_and(|value| !value.is_null())) {
            return Err(ApiError::field("unsupported_parameter", *name, "is not supported"));
        }
        let store = take_bool(body, "store")?.unwrap_or(true);
        let background = take_bool(body, "background")?.unwrap_or(false);
        if background && !store {
            return Err(ApiError::invalid_value("background", "needs store to be true"));
        }
        let previous = take_str(body, "previous_response_id")?;
        let window = match body.remove("background_options") {
            None | Some(Value::Null) => None,
            Some(Value::Object(options)) => options_window(options, background && !is_stream, (body, windows))?,
            Some(other) => return Err(ApiError::invalid_type("background_options", "an object", &other)),
        };
        body.retain(|key, _| is_known(Endpoint::Responses, key));
        Ok(Self { store, background, previous, follows: None, is_streamed: is_stream, window })
    }

    /// Writes them on the response.
    pub fn put_on(&self, response: &mut Value, window: Window) {
        response["store"] = self.store.into();
        response["background"] = self.background.into();
        response["previous_response_id"] = self.previous.clone().into();
        response["completion_window"] = window.as_str().into();
    }
}

/// Takes a text that may be absent out of a body.
fn take_str(body: &mut Map<String, Value>, key: &str) -> Result<Option<String>, ApiError> {
    match body.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(ApiError::invalid_type(key, "a string", &other)),
    }
}

/// `background_options`: the official names of windows, for responses that are fetched.
fn options_window(
    mut options: Map<String, Value>,
    is_fetched: bool,
    (body, windows): (&Map<String, Value>, &Table),
) -> Result<Option<Window>, ApiError> {
    let field = "background_options.completion_window";
    let asked = take_str(&mut options, "completion_window")?;
    // What it hints at, a shared beginning, is found anyway.
    options.remove("continuation_id");
    if let Some(name) = options.keys().next() {
        return Err(ApiError::field("unsupported_parameter", format!("background_options.{name}"), "is not supported"));
    }
    if !is_fetched {
        return Err(ApiError::invalid_value("background_options", "needs background to be true, and no stream"));
    }
    let window = match asked.as_deref() {
        None => return Ok(None),
        Some("soonest") => Window::Asap,
        Some("2h" | "8h") => Window::Standard,
        Some(other) => return Err(ApiError::invalid_value(field, format!("{other:?} is not one of soonest, 2h, 8h"))),
    };
    let other = body.get("metadata").and_then(|metadata| metadata.get("completion_window")).and_then(Value::as_str);
    if let Some(other) = other.filter(|other| windows.named(other) != Some(window)) {
        return Err(ApiError::invalid_value(field, format!("contradicts metadata.completion_window, {other:?}")));
    }
    Ok(Some(window))
}

async fn answer(mut call: Call, own: &Own) -> Result<Value, ApiError> {
    let tokenizer = Arc::clone(&call.model.live.preparer.tokenizer);
    let completion = call.flow.complete(&tokenizer).await?;
    Ok(finished(&call, own, &completion))
}

/// The response when it is done.
pub(super) fn finished(call: &Call, own: &Own, completion: &Completion) -> Value {
    let mut response = call.stamp.answer(&call.id, Endpoint::Responses, call.echo.as_deref(), completion);
    if !response["completed_at"].is_null() {
        response["completed_at"] = now().into();
    }
    own.put_on(&mut response, call.window);
    call.close(completion, &mut response["usage"]);
    response
}

/// `POST /v1/responses/input_tokens`: what a request would be counted as.
pub(super) async fn input_tokens(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    JsonObject(mut body): JsonObject,
) -> Result<Response, ApiError> {
    let streaming = Streaming::take(&mut body)?;
    let own = Own::take(&mut body, streaming.is_on, &app.windows)?;
    conversation::join(&app, &owner, ("", own.previous.as_deref()), &mut body).await?;
    let n_tokens = Call::count(&app, Endpoint::Responses, &body).await?;
    Ok(json_response(&json!({"object": "response.input_tokens", "input_tokens": n_tokens})))
}
