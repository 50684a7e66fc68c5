//! `POST /v1/completions`: raw prompts, echo and log-probabilities, as evaluation harnesses ask for them. Invariant: the
//! pieces of a stream, joined, are the answer without a stream.

use super::App;
use super::auth::Owner;
use super::body::JsonObject;
use super::call::{Call, Streaming};
use super::chat::failed;
use super::errors::{ApiError, json_response};
use super::sse;
use super::trajectories::Turn;
use crate::format::openai::Endpoint;
use crate::format::openai::answer;
use crate::outcome::TokenLogprob;
use crate::prepare::sequences::token_logprob;
use async_stream::stream;
use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use futures::Stream;
use serde_json::{Value, json};
use std::sync::Arc;

/// Completes prompts.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    JsonObject(mut body): JsonObject,
) -> Result<Response, ApiError> {
    let streaming = Streaming::take(&mut body)?;
    let call = Call::start(&app, &owner, Endpoint::Completions, &body, Turn::of(&body, None, false)).await?;
    if streaming.is_on {
        return Ok(sse::response(events(call, streaming.include_usage)));
    }
    call.answer(Endpoint::Completions).await.map(|answer| json_response(&answer))
}

/// One choice on its way.
#[derive(Default, Clone)]
struct Progress {
    has_begun: bool,
    /// Characters of the tokens so far.
    offset: usize,
}

impl Progress {
    /// A chunk's `logprobs`.
    fn logprobs(&mut self, tokens: &[TokenLogprob]) -> Value {
        if tokens.is_empty() {
            return Value::Null;
        }
        let logprobs = answer::text_logprobs(tokens, self.offset);
        self.offset += tokens.iter().map(|token| String::from_utf8_lossy(&token.bytes).chars().count()).sum::<usize>();
        logprobs
    }
}

fn events(mut call: Call, include_usage: bool) -> impl Stream<Item = String> {
    stream! {
        call.is_streamed = true;
        let stamp = call.stamp.clone();
        let chunk = |choices: &Value, usage: &Value| {
            let mut chunk = json!({
                "id": format!("cmpl-{}", call.id),
                "object": "text_completion",
                "created": stamp.created,
                "model": stamp.model,
                "choices": choices,
                "system_fingerprint": stamp.system_fingerprint,
            });
            if include_usage {
                chunk["usage"] = usage.clone();
            }
            sse::data(&chunk)
        };
        let choice = |index: usize, text: &str, logprobs: &Value, finish_reason: Option<&str>| {
            let choice = json!({"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason});
            chunk(&json!([choice]), &Value::Null)
        };
        let n_choices: usize = call.flow.prompts().iter().map(|prompt| prompt.n_choices).sum();
        let mut progress = vec![Progress::default(); n_choices];
        let tokenizer = Arc::clone(&call.model.live.preparer.tokenizer);
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
                let entries: Vec<TokenLogprob> =
                    next.logprobs.iter().map(|entry| token_logprob(entry, &tokenizer)).collect();
                for index in call.flow.choices_of(next.sequence) {
                    let own = &mut progress[index];
                    let (mut text, mut tokens) = (String::new(), Vec::new());
                    if !own.has_begun {
                        (text, tokens) = call.flow.prompt_of(next.sequence).echoed(&tokenizer);
                        own.has_begun = true;
                    }
                    text += &next.text;
                    tokens.extend(entries.iter().cloned());
                    let logprobs = own.logprobs(&tokens);
                    if !text.is_empty() || !logprobs.is_null() {
                        yield choice(index, &text, &logprobs, None);
                    }
                }
            }
        }
        let completion = call.flow.completion(&tokenizer);
        for (index, done) in completion.choices.iter().enumerate() {
            yield choice(index, "", &Value::Null, Some(done.finish_reason.as_str()));
        }
        let mut usage = answer::usage(&completion);
        call.close(&completion, &mut usage);
        call.settle(None).await;
        if include_usage {
            yield chunk(&json!([]), &usage);
        }
        yield sse::DONE.to_owned();
    }
}
