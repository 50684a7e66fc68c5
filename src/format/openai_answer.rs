//! Outcomes in `OpenAI`'s wire form: Batch output and error lines with whole response bodies. Knows field names and
//! nothing of engines or files. Invariant: the bytes of a line depend on the row, its outcome and the job's
//! [`Stamp`] alone, so that an interrupted and resumed job writes the same files.

use super::openai::Endpoint;
use crate::outcome::{Completion, RowError, TokenLogprob};
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
        let hash = blake3::hash(format!("{}/{row_idx}", self.job_fingerprint).as_bytes());
        hash.to_hex()[..24].to_owned()
    }

    /// The Batch output line of a completed row.
    pub fn output_line(&self, row_idx: u64, custom_id: &str, endpoint: Endpoint, completion: &Completion) -> Value {
        let id = self.row_id(row_idx);
        let body = match endpoint {
            Endpoint::ChatCompletions => self.chat_completion(&id, completion),
            Endpoint::Completions => self.text_completion(&id, completion),
        };
        json!({
            "id": format!("batch_req_{id}"),
            "custom_id": custom_id,
            "response": {"status_code": 200, "request_id": format!("req_{id}"), "body": body},
            "error": null,
        })
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
        let prefix = body["id"].as_str().and_then(|id| id.split_once('-')).map_or("", |(prefix, _)| prefix);
        body["id"] = format!("{prefix}-{id}").into();
        body["usage"]["prompt_tokens_details"]["cached_tokens"] = cached_tokens.into();
        line
    }

    /// The Batch error line of a row that failed.
    pub fn error_line(&self, place: Place<'_>, custom_id: Option<&str>, error: &RowError) -> Value {
        let id = self.row_id(place.row_idx);
        json!({
            "id": format!("batch_req_{id}"),
            "custom_id": custom_id,
            "response": {
                "status_code": status_code(error),
                "request_id": format!("req_{id}"),
                "body": {"error": {
                    "message": error.message,
                    "type": if status_code(error) == 500 { "server_error" } else { "invalid_request_error" },
                    "param": error.field,
                    "code": error.code.as_str(),
                }},
            },
            "error": null,
            "file": place.file,
            "line": place.line,
        })
    }

    fn chat_completion(&self, id: &str, completion: &Completion) -> Value {
        let logprobs = completion
            .logprobs
            .as_ref()
            .map(|tokens| json!({"content": tokens.iter().map(chat_logprob).collect::<Vec<_>>(), "refusal": null}));
        let choice = json!({
            "index": 0,
            "message": {"role": "assistant", "content": completion.text, "refusal": null},
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason.as_str(),
        });
        self.body(&format!("chatcmpl-{id}"), "chat.completion", &choice, completion)
    }

    fn text_completion(&self, id: &str, completion: &Completion) -> Value {
        let choice = json!({
            "text": completion.text,
            "index": 0,
            "logprobs": completion.logprobs.as_deref().map(text_logprobs),
            "finish_reason": completion.finish_reason.as_str(),
        });
        self.body(&format!("cmpl-{id}"), "text_completion", &choice, completion)
    }

    fn body(&self, id: &str, object: &str, choice: &Value, completion: &Completion) -> Value {
        let mut body = json!({
            "id": id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "usage": usage(completion),
            "system_fingerprint": self.system_fingerprint,
        });
        if let (Some(seed), Some(body)) = (completion.seed, body.as_object_mut()) {
            body.insert("seed".into(), seed.into());
        }
        body
    }
}

/// The `usage` object.
fn usage(completion: &Completion) -> Value {
    let usage = completion.usage;
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    })
}

/// Faults of ours are 500, everything else is the row's.
fn status_code(error: &RowError) -> u16 {
    match error.code {
        crate::outcome::ErrorCode::EngineError => 500,
        crate::outcome::ErrorCode::ModelMismatch => 404,
        _ => 400,
    }
}

/// One entry of a chat completion's `logprobs.content`.
pub fn chat_logprob(token: &TokenLogprob) -> Value {
    let top: Vec<_> = token.top.iter().map(|(bytes, logprob)| logprob_entry(bytes, *logprob)).collect();
    let mut entry = logprob_entry(&token.bytes, token.logprob);
    entry["top_logprobs"] = top.into();
    entry
}

fn logprob_entry(bytes: &[u8], logprob: f32) -> Value {
    json!({"token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes})
}

/// The `logprobs` object of a text completion; offsets count characters from the completion's start.
fn text_logprobs(tokens: &[TokenLogprob]) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut offset = 0;
    let offsets: Vec<usize> = tokens
        .iter()
        .map(|t| {
            let start = offset;
            offset += text(&t.bytes).chars().count();
            start
        })
        .collect();
    // The chosen token is always in the map, even where it is not among the likeliest (clients look it up there).
    let top = |t: &TokenLogprob| {
        let mut map: Map<String, Value> = t.top.iter().map(|(b, p)| (text(b), json!(p))).collect();
        map.entry(text(&t.bytes)).or_insert(json!(t.logprob));
        map
    };
    json!({
        "tokens": tokens.iter().map(|t| text(&t.bytes)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}
