//! `POST /v1/responses`, in the foreground. Invariants: a stream's events are those of one response whose ids never
//! change, numbered without gaps, with exactly one terminal event, which holds the response that is given without a
//! stream; every snapshot is of its moment.

use super::App;
use super::body::JsonObject;
use super::call::{Call, Streaming, take_bool};
use super::errors::{ApiError, json_response};
use super::models::now;
use super::shown::Shown;
use super::sse;
use super::windows::{Mode, Window};
use crate::format::openai::answer;
use crate::format::openai::{Endpoint, is_known};
use crate::outcome::{Completion, RowError};
use crate::prepare::sequences::token_logprob;
use async_stream::stream;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use futures::Stream;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Fields with meaning that are not offered.
const REFUSED: &[&str] = &["prompt", "conversation", "moderation", "background_options"];

/// Creates a response.
pub(super) async fn create(State(app): State<Arc<App>>, JsonObject(mut body): JsonObject) -> Result<Response, ApiError> {
    let streaming = Streaming::take(&mut body)?;
    let own = Own::take(&mut body)?;
    let call = Call::start(&app, Endpoint::Responses, &body, Mode::Foreground).await?;
    if !streaming.is_on {
        return answer(call, &own).await.map(|answer| json_response(&answer));
    }
    let events = events(call, own);
    Ok(sse::response(stream! {
        let mut events = std::pin::pin!(events);
        while let Some((name, data)) = std::future::poll_fn(|cx| events.as_mut().poll_next(cx)).await {
            yield sse::event(name, &data);
        }
        yield sse::DONE.to_owned();
    }))
}

/// What a response says beside its completion.
#[derive(Debug, Clone, Default)]
pub struct Own {
    /// Whether it outlives its call. (Nothing does yet.)
    store: bool,
}

impl Own {
    /// Takes the fields that are no request parser's out of a body; unknown ones are ignored here.
    fn take(body: &mut Map<String, Value>) -> Result<Self, ApiError> {
        let refuse = |param: &str, message: &str| Err(ApiError::field("unsupported_parameter", param, message));
        if let Some(name) = REFUSED.iter().find(|name| body.get(**name).is_some_and(|value| !value.is_null())) {
            return refuse(name, "is not supported");
        }
        let wants_store = take_bool(body, "store")?;
        if take_bool(body, "background")? == Some(true) {
            if wants_store == Some(false) {
                return Err(ApiError::invalid_value("background", "needs store to be true"));
            }
            return refuse("background", "is not supported");
        }
        match body.remove("previous_response_id") {
            None | Some(Value::Null) => {}
            Some(Value::String(id)) => {
                let message = format!("Previous response with id '{id}' not found.");
                let error = ApiError::not_found("previous_response_id", message);
                return Err(ApiError { code: Some("previous_response_not_found"), ..error });
            }
            Some(other) => return Err(ApiError::invalid_type("previous_response_id", "a string", &other)),
        }
        body.retain(|key, _| is_known(Endpoint::Responses, key));
        Ok(Self { store: false })
    }

    fn put_on(&self, response: &mut Value, window: Window) {
        response["store"] = self.store.into();
        response["completion_window"] = window.as_str().into();
    }
}

async fn answer(mut call: Call, own: &Own) -> Result<Value, ApiError> {
    let tokenizer = Arc::clone(&call.model.live.preparer.tokenizer);
    let completion = call.flow.complete(&tokenizer).await?;
    Ok(finished(&call, own, &completion))
}

/// The response when it is done.
fn finished(call: &Call, own: &Own, completion: &Completion) -> Value {
    let mut response = call.stamp.answer(&call.id, Endpoint::Responses, call.echo.as_deref(), completion);
    if !response["completed_at"].is_null() {
        response["completed_at"] = now().into();
    }
    own.put_on(&mut response, call.window);
    response
}

/// Numbers events.
#[derive(Default)]
struct Numbered(u64);

/// An event's name and data.
pub type Event = (&'static str, Value);

impl Numbered {
    fn event(&mut self, name: &'static str, fields: Value) -> Event {
        let mut data = Map::new();
        data.insert("type".into(), name.into());
        data.insert("sequence_number".into(), self.0.into());
        self.0 += 1;
        if let Value::Object(fields) = fields {
            data.extend(fields);
        }
        (name, Value::Object(data))
    }

    /// The beginning of the message item.
    fn open_message(&mut self, item_id: &str) -> [Event; 2] {
        let item = json!({"type": "message", "id": item_id, "role": "assistant", "status": "in_progress", "content": []});
        let part = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []});
        [
            self.event("response.output_item.added", json!({"output_index": 0, "item": item})),
            self.event(
                "response.content_part.added",
                json!({"item_id": item_id, "output_index": 0, "content_index": 0, "part": part}),
            ),
        ]
    }

    fn delta(&mut self, item_id: &str, delta: &str, logprobs: &Value) -> Event {
        let fields = json!({"item_id": item_id, "output_index": 0, "content_index": 0, "delta": delta, "logprobs": logprobs});
        self.event("response.output_text.delta", fields)
    }

    /// The end of an item of the finished response; a call comes whole.
    fn close_item(&mut self, output_index: usize, item: &Value) -> Vec<Event> {
        let (item_id, mut events) = (&item["id"], Vec::new());
        if item["type"] == "message" {
            let part = &item["content"][0];
            let place = |mut fields: Value| {
                fields["item_id"] = item_id.clone();
                fields["output_index"] = output_index.into();
                fields["content_index"] = 0.into();
                fields
            };
            let text = place(json!({"text": part["text"], "logprobs": part["logprobs"]}));
            events.push(self.event("response.output_text.done", text));
            events.push(self.event("response.content_part.done", place(json!({"part": part}))));
        } else {
            let (mut opened, arguments) = (item.clone(), &item["arguments"]);
            (opened["arguments"], opened["status"]) = ("".into(), "in_progress".into());
            let added = json!({"output_index": output_index, "item": opened});
            events.push(self.event("response.output_item.added", added));
            let delta = json!({"item_id": item_id, "output_index": output_index, "delta": arguments});
            events.push(self.event("response.function_call_arguments.delta", delta));
            let done = json!({"item_id": item_id, "output_index": output_index, "name": item["name"], "arguments": arguments});
            events.push(self.event("response.function_call_arguments.done", done));
        }
        events.push(self.event("response.output_item.done", json!({"output_index": output_index, "item": item})));
        events
    }
}

/// The events of a response, as they come.
pub fn events(mut call: Call, own: Own) -> impl Stream<Item = Event> {
    stream! {
        let mut numbered = Numbered::default();
        let tokenizer = Arc::clone(&call.model.live.preparer.tokenizer);
        let mut snapshot = call.stamp.response_in_progress(&call.id, call.echo.as_deref().unwrap_or(&Value::Null));
        own.put_on(&mut snapshot, call.window);
        yield numbered.event("response.created", json!({"response": snapshot}));
        yield numbered.event("response.in_progress", json!({"response": snapshot}));
        let (item_id, mut is_open) = (format!("msg_{}", call.id), false);
        let mut logprobs: Vec<Value> = Vec::new();
        let mut shown = Shown::new(call.flow.prompts()[0].call_format);
        loop {
            let gained = match call.flow.next().await {
                Ok(Some(gained)) => gained,
                Ok(None) => break,
                Err(error) => {
                    yield numbered.event("response.failed", json!({"response": failed(snapshot, &error)}));
                    return;
                }
            };
            for next in gained {
                let text = shown.push(&next.text);
                let entries = next.logprobs.iter().map(|entry| answer::chat_logprob(&token_logprob(entry, &tokenizer)));
                // Entries of text that waits go with the text.
                logprobs.extend(entries);
                if text.is_empty() {
                    continue;
                }
                if !is_open {
                    is_open = true;
                    for event in numbered.open_message(&item_id) {
                        yield event;
                    }
                }
                yield numbered.delta(&item_id, &text, &std::mem::take(&mut logprobs).into());
            }
        }
        let completion = call.flow.completion(&tokenizer);
        let response = finished(&call, &own, &completion);
        let items = response["output"].as_array().cloned().unwrap_or_default();
        for (output_index, item) in items.iter().enumerate() {
            if item["type"] == "message" {
                if !is_open {
                    for event in numbered.open_message(&item_id) {
                        yield event;
                    }
                }
                let rest = shown.rest(&completion.choices[0].text);
                if !rest.is_empty() || !logprobs.is_empty() {
                    yield numbered.delta(&item_id, rest, &std::mem::take(&mut logprobs).into());
                }
            }
            for event in numbered.close_item(output_index, item) {
                yield event;
            }
        }
        let name = if response["status"] == "completed" { "response.completed" } else { "response.incomplete" };
        yield numbered.event(name, json!({"response": response}));
    }
}

/// A response that the engine could not complete.
fn failed(mut response: Value, error: &RowError) -> Value {
    response["status"] = "failed".into();
    response["error"] = json!({"code": "server_error", "message": error.message});
    response
}

/// `POST /v1/responses/input_tokens`: what a request would be counted as.
pub(super) async fn input_tokens(State(app): State<Arc<App>>, JsonObject(mut body): JsonObject) -> Result<Response, ApiError> {
    Streaming::take(&mut body)?;
    Own::take(&mut body)?;
    let n_tokens = Call::count(&app, Endpoint::Responses, &body).await?;
    Ok(json_response(&json!({"object": "response.input_tokens", "input_tokens": n_tokens})))
}

/// What is not offered: nothing outlives its call yet.
pub(super) async fn retrieve(axum::extract::Path(id): axum::extract::Path<String>) -> ApiError {
    let error = ApiError::new(StatusCode::NOT_FOUND, None, format!("Response with id '{id}' not found."));
    ApiError { param: Some("response_id".into()), ..error }
}
