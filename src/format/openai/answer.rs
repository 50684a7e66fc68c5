//! Outcomes in `OpenAI`'s wire form: Batch output and error lines with whole response bodies. Knows field names and
//! nothing of engines or files. Invariant: the bytes of a line depend on the row, its outcome and the job's
//! [`Stamp`] alone, so that an interrupted and resumed job writes the same files.

use super::Endpoint;
use super::line::row_id;
use crate::format::anthropic::message;
use crate::outcome::{Completion, FinishReason, RowError, TokenLogprob};
use serde_json::{Map, Value, json};

/// What all answers of a job have in common.
#[derive(Debug, Clone)]
pub struct Stamp {
    /// Hash that ids are derived from.
    pub job_fingerprint: String,
    /// Unix seconds, from the job's manifest.
    pub created: u64,
    /// The model's canonical name.
    pub model: String,
    /// `system_fingerprint`: what the bits depend on.
    pub system_fingerprint: String,
}

/// Where a row stands, for error lines.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Index over all inputs, from 0.
    pub row_idx: u64,
    /// The file's name as given.
    pub file: &'a str,
    /// 1-based line (JSONL) or row (Parquet) in the file.
    pub line: u64,
}

impl Stamp {
    /// 24 hex digits, the same for the same job and row.
    pub fn row_id(&self, row_idx: u64) -> String {
        String::from_utf8_lossy(&row_id(&self.job_fingerprint, row_idx)).into_owned()
    }

    /// The Batch output line of a completed row. `echo` is what a response object repeats of its request.
    pub fn output_line(
        &self,
        row_idx: u64,
        custom_id: &str,
        endpoint: Endpoint,
        echo: Option<&Value>,
        completion: &Completion,
    ) -> Value {
        let id = self.row_id(row_idx);
        let body = self.answer(&id, endpoint, echo, completion);
        json!({
            "id": format!("batch_req_{id}"),
            "custom_id": custom_id,
            "response": {"status_code": 200, "request_id": format!("req_{id}"), "body": body},
            "error": null,
        })
    }

    /// The body that answers a request. Its ids end with `id`. `echo` is what a response repeats of its request, or the string
    /// that ended a message.
    pub fn answer(&self, id: &str, endpoint: Endpoint, echo: Option<&Value>, completion: &Completion) -> Value {
        match endpoint {
            Endpoint::ChatCompletions => self.chat_completion(id, completion),
            Endpoint::Completions => self.text_completion(id, completion),
            Endpoint::Responses => self.response(id, echo.unwrap_or(&Value::Null), completion),
            Endpoint::Messages => message(id, &self.model, completion, echo.and_then(Value::as_str)),
        }
    }

    /// The output line of a row with the same body as an earlier one's, `line`.
    pub fn same_output_line(&self, row_idx: u64, custom_id: &str, cached_tokens: u32, line: Map<String, Value>) -> Value {
        let id = self.row_id(row_idx);
        let mut line = Value::Object(line);
        line["id"] = format!("batch_req_{id}").into();
        line["custom_id"] = custom_id.into();
        let response = &mut line["response"];
        response["request_id"] = format!("req_{id}").into();
        let body = &mut response["body"];
        // Every id in a body ends with the row's.
        let old = body["id"].as_str().and_then(|id| id.rsplit(['-', '_']).next()).unwrap_or_default().to_owned();
        replace_ids(body, &old, &id);
        if body["type"] == "message" {
            // Its input leaves out what was cached.
            let usage = &mut body["usage"];
            let n_prompt = ["input_tokens", "cache_read_input_tokens"].iter().filter_map(|key| usage[*key].as_u64()).sum::<u64>();
            usage["cache_read_input_tokens"] = cached_tokens.into();
            usage["input_tokens"] = n_prompt.saturating_sub(cached_tokens.into()).into();
            return line;
        }
        let details = if body["object"] == "response" { "input_tokens_details" } else { "prompt_tokens_details" };
        body["usage"][details]["cached_tokens"] = cached_tokens.into();
        line
    }

    /// The Batch error line of a row that failed.
    pub fn error_line(&self, place: Place<'_>, custom_id: Option<&str>, error: &RowError) -> Value {
        let id = self.row_id(place.row_idx);
        let mut body = json!({
            "message": error.message,
            "type": if status_code(error) == 500 { "server_error" } else { "invalid_request_error" },
            "param": error.field,
            "code": error.code.as_str(),
        });
        add_tried(&mut body, error);
        json!({
            "id": format!("batch_req_{id}"),
            "custom_id": custom_id,
            "response": {
                "status_code": status_code(error),
                "request_id": format!("req_{id}"),
                "body": {"error": body},
            },
            "error": null,
            "file": place.file,
            "line": place.line,
        })
    }

    fn chat_completion(&self, id: &str, completion: &Completion) -> Value {
        let choices = completion.choices.iter().enumerate().map(|(i, choice)| {
            let logprobs = choice
                .logprobs
                .as_ref()
                .map(|tokens| json!({"content": tokens.iter().map(chat_logprob).collect::<Vec<_>>(), "refusal": null}));
            let has_others = !choice.tool_calls.is_empty() || !choice.thoughts().is_empty();
            let content = if choice.text.is_empty() && has_others { None } else { Some(&choice.text) };
            let mut message = json!({"role": "assistant", "content": content, "refusal": null});
            if !choice.thoughts().is_empty() {
                message["reasoning_content"] = choice.thoughts().into();
            }
            if !choice.tool_calls.is_empty() {
                let calls = choice.tool_calls.iter().enumerate().map(|(k, call)| {
                    let function = json!({"name": call.name, "arguments": call.arguments});
                    json!({"id": call_id(i, k, id), "type": "function", "function": function})
                });
                message["tool_calls"] = calls.collect();
            }
            json!({"index": i, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason.as_str()})
        });
        self.body(&format!("chatcmpl-{id}"), "chat.completion", &choices.collect(), completion)
    }

    fn text_completion(&self, id: &str, completion: &Completion) -> Value {
        let choices = completion.choices.iter().enumerate().map(|(i, choice)| {
            json!({
                "text": choice.text,
                "index": i,
                "logprobs": choice.logprobs.as_deref().map(|tokens| text_logprobs(tokens, 0)),
                "finish_reason": choice.finish_reason.as_str(),
            })
        });
        self.body(&format!("cmpl-{id}"), "text_completion", &choices.collect(), completion)
    }

    fn body(&self, id: &str, object: &str, choices: &Value, completion: &Completion) -> Value {
        let mut body = json!({
            "id": id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage(completion),
            "service_tier": "default",
            "system_fingerprint": self.system_fingerprint,
        });
        Self::add_seed(&mut body, completion);
        body
    }

    /// A response object: <https://www.openresponses.org> asks for every key, in any order.
    fn response(&self, id: &str, echo: &Value, completion: &Completion) -> Value {
        let choice = &completion.choices[0];
        let is_whole = !matches!(choice.finish_reason, FinishReason::Length | FinishReason::Repetition);
        let status = if is_whole { "completed" } else { "incomplete" };
        let mut output = Vec::new();
        if !choice.thoughts().is_empty() {
            let is_open = choice.text.is_empty() && choice.tool_calls.is_empty();
            output.push(reasoning_item(id, choice.thoughts(), if is_open { status } else { "completed" }));
        }
        if !choice.text.is_empty() || (choice.tool_calls.is_empty() && output.is_empty()) {
            let of_text = choice.logprobs.iter().flatten().skip(choice.n_thought() as usize);
            let logprobs: Vec<_> = of_text.map(chat_logprob).collect();
            let part = json!({"type": "output_text", "text": choice.text, "annotations": [], "logprobs": logprobs});
            output.push(
                json!({"type": "message", "id": format!("msg_{id}"), "role": "assistant", "status": status, "content": [part]}),
            );
        }
        for (k, call) in choice.tool_calls.iter().enumerate() {
            output.push(json!({"type": "function_call", "id": format!("fc_{k}_{id}"), "call_id": call_id(0, k, id),
                               "name": call.name, "arguments": call.arguments, "status": status}));
        }
        let usage = completion.usage;
        let mut body = self.response_in_progress(id, echo);
        body["status"] = status.into();
        body["completed_at"] = is_whole.then_some(self.created).into();
        body["incomplete_details"] = if is_whole { Value::Null } else { json!({"reason": "max_output_tokens"}) };
        body["output"] = output.into();
        body["usage"] = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": completion.n_thought()},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        });
        Self::add_seed(&mut body, completion);
        body
    }

    /// A response object of which nothing has come yet.
    pub fn response_in_progress(&self, id: &str, echo: &Value) -> Value {
        let mut body = json!({
            "id": format!("resp_{id}"),
            "object": "response",
            "created_at": self.created,
            "completed_at": null,
            "status": "in_progress",
            "background": false,
            "store": false,
            "model": self.model,
            "previous_response_id": null,
            "error": null,
            "incomplete_details": null,
            "output": [],
            "usage": null,
            "system_fingerprint": self.system_fingerprint,
        });
        if let (Some(body), Value::Object(echo)) = (body.as_object_mut(), echo) {
            body.extend(echo.clone());
        }
        body
    }

    fn add_seed(body: &mut Value, completion: &Completion) {
        if let Some(seed) = completion.seed {
            body["seed"] = seed.into();
        }
    }
}

/// What the id of an answer begins with.
pub fn id_prefix(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::ChatCompletions => "chatcmpl-",
        Endpoint::Completions => "cmpl-",
        Endpoint::Responses => "resp_",
        Endpoint::Messages => "msg_",
    }
}

/// The id of a choice's k-th call, in the answer whose ids end with `id`.
pub fn call_id(choice: usize, k: usize, id: &str) -> String {
    format!("call_{choice}_{k}_{id}")
}

/// Replaces the ends of all ids.
fn replace_ids(value: &mut Value, old: &str, new: &str) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| replace_ids(item, old, new)),
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(text) if (key == "id" || key == "call_id") && text.ends_with(old) => {
                        text.replace_range(text.len() - old.len().., new);
                    }
                    Value::Object(_) | Value::Array(_) => replace_ids(value, old, new),
                    _ => {}
                }
            }
        }
        _ => {}
    }
}

/// The `usage` object of chat and text completions.
pub fn usage(completion: &Completion) -> Value {
    let usage = completion.usage;
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": completion.n_thought()},
    })
}

/// A response's item of what the model thought.
pub fn reasoning_item(id: &str, thought: &str, status: &str) -> Value {
    let part = json!({"type": "reasoning_text", "text": thought});
    json!({"type": "reasoning", "id": format!("rs_{id}"), "summary": [], "content": [part], "status": status})
}

/// Adds what was computed before a row failed to the object that tells of its error.
pub fn add_tried(body: &mut Value, error: &RowError) {
    let Some(tried) = &error.tried else { return };
    body["attempts"] = tried.attempts.into();
    body["seed"] = tried.seed.into();
    body["prompt_tokens"] = tried.prompt_tokens.into();
    body["completion_tokens"] = tried.completion_tokens.into();
    body["system_fingerprint"] = tried.system_fingerprint.as_str().into();
}

/// Faults of ours are 500, everything else is the row's.
fn status_code(error: &RowError) -> u16 {
    match error.code {
        crate::outcome::ErrorCode::EngineError | crate::outcome::ErrorCode::CheckFailed => 500,
        crate::outcome::ErrorCode::ModelMismatch => 404,
        _ => 400,
    }
}

/// One entry of a chat completion's `logprobs.content`.
pub fn chat_logprob(token: &TokenLogprob) -> Value {
    let top: Vec<_> = token.top.iter().map(|(bytes, logprob)| logprob_entry(bytes, Some(*logprob))).collect();
    let mut entry = logprob_entry(&token.bytes, token.logprob);
    entry["top_logprobs"] = top.into();
    entry
}

fn logprob_entry(bytes: &[u8], logprob: Option<f32>) -> Value {
    json!({"token": String::from_utf8_lossy(bytes), "logprob": logprob.map(finite), "bytes": bytes})
}

/// JSON has no infinities; a token that can't come has the log-probability that clients take for one.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// The `logprobs` object of a text completion; offsets count characters from `offset` on.
pub fn text_logprobs(tokens: &[TokenLogprob], mut offset: usize) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let offsets: Vec<usize> = tokens
        .iter()
        .map(|t| {
            let start = offset;
            offset += text(&t.bytes).chars().count();
            start
        })
        .collect();
    // The chosen token is always in the map, even where it is not among the likeliest (clients look it up there); a token
    // that is part of a character goes by its bytes.
    let name = |bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => format!("bytes:{}", bytes.escape_ascii()),
    };
    let top = |t: &TokenLogprob| {
        let logprob = t.logprob?;
        let mut map: Map<String, Value> = t.top.iter().map(|(b, p)| (name(b), json!(finite(*p)))).collect();
        map.entry(name(&t.bytes)).or_insert(json!(finite(logprob)));
        Some(map)
    };
    json!({
        "tokens": tokens.iter().map(|t| name(&t.bytes)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprob.map(finite)).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}
