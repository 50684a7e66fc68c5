//! `POST /v1/chat/completions`. Invariants: the pieces of a stream, joined, are the answer without a stream; whatever is
//! wrong is said before the stream begins.

use super::App;
use super::auth::Owner;
use super::body::JsonObject;
use super::call::{Call, Streaming};
use super::errors::{ApiError, json_response};
use super::shown::Shown;
use super::sse;
use super::trajectories::Turn;
use crate::format::openai::Endpoint;
use crate::format::openai::answer::{self, Stamp};
use crate::outcome::{Choice, RowError};
use crate::prepare::sequences::token_logprob;
use crate::text::thinking::Split;
use async_stream::stream;
use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use futures::Stream;
use serde_json::{Value, json};
use std::sync::Arc;

/// Fields without effect here.
const IGNORED: &[&str] = &["moderation"];

/// Answers a chat.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    JsonObject(mut body): JsonObject,
) -> Result<Response, ApiError> {
    let streaming = Streaming::take(&mut body)?;
    body.retain(|key, value| !(IGNORED.contains(&key.as_str()) && value.is_null()));
    let call = Call::start(&app, &owner, Endpoint::ChatCompletions, &body, Turn::of(&body, None, false)).await?;
    if streaming.is_on {
        return Ok(sse::response(events(call, streaming.include_usage)));
    }
    call.answer(Endpoint::ChatCompletions).await.map(|answer| json_response(&answer))
}

/// What all chunks of a stream have in common.
struct Head {
    id: String,
    stamp: Stamp,
    include_usage: bool,
}

impl Head {
    fn chunk(&self, choices: &Value, usage: &Value) -> String {
        let mut chunk = json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.stamp.created,
            "model": self.stamp.model,
            "choices": choices,
            "service_tier": "default",
            "system_fingerprint": self.stamp.system_fingerprint,
        });
        if self.include_usage {
            chunk["usage"] = usage.clone();
        }
        sse::data(&chunk)
    }

    fn choice(&self, index: usize, delta: &Value, logprobs: &Value, finish_reason: Option<&str>) -> String {
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason});
        self.chunk(&json!([choice]), &Value::Null)
    }

    /// More of a choice; nothing if that is nothing.
    fn more(&self, index: usize, more: &Split, mut logprobs: Value) -> String {
        let mut events = String::new();
        if !more.thought.is_empty() {
            events += &self.choice(index, &json!({"reasoning_content": more.thought}), &logprobs.take(), None);
        }
        if !more.answer.is_empty() || !logprobs.is_null() {
            events += &self.choice(index, &json!({"content": more.answer}), &logprobs, None);
        }
        events
    }

    /// What is left of a choice when all have finished.
    fn end(&self, index: usize, choice: &Choice, shown: &Shown) -> String {
        let mut events = self.more(index, &shown.rest(choice), Value::Null);
        for (k, call) in choice.tool_calls.iter().enumerate() {
            let id = answer::call_id(index, k, self.id.rsplit('-').next().unwrap_or_default());
            let function = json!({"name": call.name, "arguments": ""});
            let first = json!({"index": k, "id": id, "type": "function", "function": function});
            events += &self.choice(index, &json!({"tool_calls": [first]}), &Value::Null, None);
            let arguments = json!({"index": k, "function": {"arguments": call.arguments}});
            events += &self.choice(index, &json!({"tool_calls": [arguments]}), &Value::Null, None);
        }
        events + &self.choice(index, &json!({}), &Value::Null, Some(choice.finish_reason.as_str()))
    }
}

fn events(mut call: Call, include_usage: bool) -> impl Stream<Item = String> {
    stream! {
        call.is_streamed = true;
        let head = Head { id: format!("chatcmpl-{}", call.id), stamp: call.stamp.clone(), include_usage };
        let n_choices: usize = call.flow.prompts().iter().map(|prompt| prompt.n_choices).sum();
        let mut shown: Vec<Shown> = (0..n_choices).map(|_| Shown::new(&call.flow.prompts()[0])).collect();
        for index in 0..n_choices {
            yield head.choice(index, &json!({"role": "assistant", "content": ""}), &Value::Null, None);
        }
        loop {
            let gained = match call.flow.next().await {
                Ok(Some(gained)) => gained,
                Ok(None) => break,
                Err(error) => {
                    yield failed(error);
                    return;
                }
            };
            for next in gained {
                let entries = next.logprobs.iter().map(|entry| answer::chat_logprob(&token_logprob(entry, call.tokenizer())));
                let entries: Vec<Value> = entries.collect();
                let logprobs = if entries.is_empty() { Value::Null } else { json!({"content": entries, "refusal": null}) };
                for index in call.flow.choices_of(next.sequence) {
                    let events = head.more(index, &shown[index].push(&next.text), logprobs.clone());
                    if !events.is_empty() {
                        yield events;
                    }
                }
            }
        }
        let completion = call.flow.completion(call.tokenizer());
        for (index, (choice, shown)) in completion.choices.iter().zip(&shown).enumerate() {
            yield head.end(index, choice, shown);
        }
        let mut usage = answer::usage(&completion);
        call.close(&completion, &mut usage);
        call.settle(None).await;
        if include_usage {
            yield head.chunk(&json!([]), &usage);
        }
        yield sse::DONE.to_owned();
    }
}

/// The end of a stream that can't go on; clients raise it.
pub(super) fn failed(error: RowError) -> String {
    sse::data(&json!({"error": ApiError::from(error).openai_error()}))
}
