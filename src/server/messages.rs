//! `POST /v1/messages` and `count_tokens`: Anthropic's form of an answer. Invariant: the blocks of a stream, put
//! together, are those of the answer without a stream, at the same indices.

use super::App;
use super::auth::Owner;
use super::body::JsonObject;
use super::call::{Call, Identity, Prepared, Streaming, named};
use super::completion_webhook;
use super::errors::{ApiError, Dialect, json_response};
use super::ids;
use super::shown::Shown;
use super::sse;
use super::trajectories::Turn;
use super::windows::{self, Mode};
use crate::format::anthropic::{blocks, empty_message, message, parse_messages, stop_reason, usage};
use crate::format::openai::Endpoint;
use crate::outcome::{Choice, Completion, ErrorCode, FinishReason, RowError, Usage};
use crate::prepare::sequences::stop_of;
use crate::text::thinking::Split;
use async_stream::stream;
use axum::Extension;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use futures::Stream;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Answers a message.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    headers: HeaderMap,
    JsonObject(mut body): JsonObject,
) -> Result<Response, ApiError> {
    let streaming = Streaming::take(&mut body)?;
    completion_webhook::asked(&app, &owner, windows::metadata(&body)?, Mode::Foreground)?;
    let mut prepared = prepare(&app, &headers, &body, true).await?;
    prepared.turn = Turn::of(&body, None, false).reckoned(&app, &owner, prepared.window).await;
    let stops = prepared.prompts.iter().flat_map(|prompt| prompt.params.stop.clone()).collect();
    let mut call = Call::submit((&app, &owner), &prepared, &Identity::new()).await?;
    if streaming.is_on {
        return Ok(sse::response(events(call, stops)));
    }
    let tokenizer = Arc::clone(&call.model.live.preparer.tokenizer);
    let completion = call.flow.complete(&tokenizer).await?;
    let stop = stop(&call, &completion, &stops);
    let mut message = message(&call.id, &call.stamp.model, &completion, stop.as_deref());
    call.close(&completion, &mut message["usage"]);
    call.settle(Some(&message)).await;
    Ok(json_response(&message))
}

/// `POST /v1/messages/count_tokens`
pub(super) async fn count_tokens(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonObject(mut body): JsonObject,
) -> Result<Response, ApiError> {
    Streaming::take(&mut body)?;
    let Prepared { prompts, .. } = prepare(&app, &headers, &body, false).await?;
    Ok(json_response(&json!({"input_tokens": prompts.iter().map(|prompt| prompt.tokens.len()).sum::<usize>()})))
}

async fn prepare(
    app: &App,
    headers: &HeaderMap,
    body: &Map<String, Value>,
    needs_max_tokens: bool,
) -> Result<Prepared, ApiError> {
    let model = Arc::clone(app.models.named(body)?);
    let header = headers.get("x-completion-window").and_then(|value| value.to_str().ok());
    let asked = header.or(windows::asked(windows::metadata(body)?));
    let window = app.windows.resolve(asked, Mode::Foreground, &model.id, &model.windows)?;
    let request = parse_messages(body, &app.defaults, needs_max_tokens)?;
    let prompts = model.live.prepare(request, Endpoint::ChatCompletions).await;
    let prompts = prompts.map_err(|error| too_long(error, body))?;
    Ok(Prepared { model, window, prompts, echo: None, id_prefix: "msg_", turn: Turn::default() })
}

/// Clients know a prompt that is too long by the beginning of this text.
fn too_long(error: RowError, body: &Map<String, Value>) -> ApiError {
    let is_too_long = error.code == ErrorCode::ContextLengthExceeded && error.field.as_deref() != Some("body.max_tokens");
    let mut numbers = error.message.split(|c: char| !c.is_ascii_digit()).filter(|word| !word.is_empty());
    let (n_tokens, last) = (numbers.next().unwrap_or_default().to_owned(), numbers.next_back().unwrap_or_default().to_owned());
    let error = named(error, Endpoint::ChatCompletions, body);
    if is_too_long {
        let message = format!("prompt is too long: {n_tokens} tokens > {last} maximum ({})", error.message);
        return ApiError { message, ..error };
    }
    error
}

/// A message of which nothing has come yet.
fn begun(call: &Call) -> Value {
    let prompt_tokens = call.flow.prompts().iter().map(|prompt| prompt.n_tokens).sum();
    empty_message(&call.id, &call.stamp.model, Usage { prompt_tokens, completion_tokens: 1, cached_tokens: 0 })
}

/// The stop sequence that ended a message.
fn stop(call: &Call, completion: &Completion, stops: &[String]) -> Option<String> {
    let is_stopped = completion.choices[0].finish_reason == FinishReason::Stop;
    call.flow.finished(0).filter(|_| is_stopped).and_then(|finished| stop_of(finished, stops, call.tokenizer()))
}

fn event(mut data: Value, name: &'static str) -> String {
    data["type"] = name.into();
    sse::event(name, &data)
}

fn block_start(index: usize, block: &Value) -> String {
    event(json!({"type": "", "index": index, "content_block": block}), "content_block_start")
}

fn block_delta(index: usize, delta: &Value) -> String {
    event(json!({"type": "", "index": index, "delta": delta}), "content_block_delta")
}

fn block_stop(index: usize) -> String {
    event(json!({"type": "", "index": index}), "content_block_stop")
}

/// The blocks of a message that comes.
#[derive(Default)]
struct Blocks {
    has_thought: bool,
    /// Whether its thoughts have ended.
    is_thought: bool,
    has_text: bool,
}

impl Blocks {
    /// More text; nothing if that is nothing.
    fn more(&mut self, more: &Split) -> String {
        let mut events = String::new();
        if !more.thought.is_empty() {
            if !std::mem::replace(&mut self.has_thought, true) {
                events += &block_start(0, &json!({"type": "thinking", "thinking": "", "signature": ""}));
            }
            events += &block_delta(0, &json!({"type": "thinking_delta", "thinking": more.thought}));
        }
        if !more.answer.is_empty() {
            events += &self.open_text();
            events += &block_delta(usize::from(self.has_thought), &json!({"type": "text_delta", "text": more.answer}));
        }
        events
    }

    fn open_text(&mut self) -> String {
        if std::mem::replace(&mut self.has_text, true) {
            return String::new();
        }
        let start = block_start(usize::from(self.has_thought), &json!({"type": "text", "text": "", "citations": null}));
        self.end_thought() + &start
    }

    fn end_thought(&mut self) -> String {
        let is_open = self.has_thought && !std::mem::replace(&mut self.is_thought, true);
        if is_open { block_stop(0) } else { String::new() }
    }

    /// What is left of them when the message is whole.
    fn end(&mut self, choice: &Choice, rest: &Split, id: &str) -> String {
        let mut events = self.more(rest);
        for (index, block) in blocks(choice, id).iter().enumerate() {
            match block["type"].as_str() {
                Some("thinking") => {
                    events += &self.end_thought();
                    continue;
                }
                Some("text") => events += &self.open_text(),
                _ => {
                    let start = json!({"type": "tool_use", "id": block["id"], "name": block["name"], "input": {}});
                    events += &block_start(index, &start);
                    let input = json!({"type": "input_json_delta", "partial_json": block["input"].to_string()});
                    events += &block_delta(index, &input);
                }
            }
            events += &block_stop(index);
        }
        events
    }
}

fn events(mut call: Call, stops: Vec<String>) -> impl Stream<Item = String> {
    stream! {
        call.is_streamed = true;
        let tokenizer = Arc::clone(&call.model.live.preparer.tokenizer);
        yield event(json!({"type": "", "message": begun(&call)}), "message_start");
        yield event(json!({"type": ""}), "ping");
        let (mut shown, mut told) = (Shown::new(&call.flow.prompts()[0]), Blocks::default());
        loop {
            let gained = match call.flow.next().await {
                Ok(Some(gained)) => gained,
                Ok(None) => break,
                Err(error) => {
                    let error = ApiError::from(error).body(Dialect::Anthropic, &ids::new("req_"));
                    yield sse::event("error", &error);
                    return;
                }
            };
            let events: String = gained.iter().map(|next| told.more(&shown.push(&next.text))).collect();
            if !events.is_empty() {
                yield events;
            }
        }
        let completion = call.flow.completion(&tokenizer);
        let choice = &completion.choices[0];
        yield told.end(choice, &shown.rest(choice), &call.id);
        let stop = stop(&call, &completion, &stops);
        let delta = json!({"stop_reason": stop_reason(choice, stop.as_deref()), "stop_sequence": stop});
        let mut usage = usage(completion.usage, completion.n_thought());
        call.close(&completion, &mut usage);
        call.settle(None).await;
        yield event(json!({"type": "", "delta": delta, "usage": usage}), "message_delta");
        yield event(json!({"type": ""}), "message_stop");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_is_too_long_says_so_first() {
        let message =
            "body.messages: 9000 prompt tokens and max_tokens 5 are over the limit of 8192 tokens (the model's context)";
        let error = RowError::row(ErrorCode::ContextLengthExceeded, message);
        assert!(too_long(error, &Map::new()).message.starts_with("prompt is too long: 9000 tokens > 8192 maximum"));
    }
}
