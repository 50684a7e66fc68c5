//! `GET /openapi.json`: what the server can be asked, for programs. Its forms stand in `openapi.json`, its operations in the
//! table below. Invariant: the router's routes are in the table, and no others; `tests/it/openapi.rs` holds it to that.

use super::errors::json_response;
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::sync::LazyLock;

/// What a request's body, or an answer, is.
#[derive(Clone, Copy)]
enum Form {
    Nothing,
    /// JSON of a form in `components.schemas`.
    Json(&'static str),
    /// The same, which may be left out.
    MaybeJson(&'static str),
    /// JSON, or events if `stream` asks for them.
    Events(&'static str),
    /// A form, or JSON.
    MultipartOr(&'static str, &'static str),
    /// Anything, of a content type.
    Bytes(&'static str),
}

use Form::{Bytes, Events, Json, MaybeJson, MultipartOr, Nothing};

/// Method, path, what it does, parts of the query, body, answer.
type Operation = (&'static str, &'static str, &'static str, &'static str, Form, Form);

#[rustfmt::skip]
const OPERATIONS: &[Operation] = &[
    ("get", "/", "A page for people", "", Nothing, Bytes("text/html")),
    ("get", "/openapi.json", "This document", "", Nothing, Json("OpenApi")),
    ("get", "/health", "Whether the server is there", "", Nothing, Json("Ok")),
    ("get", "/ready", "Whether new requests are taken", "", Nothing, Json("Ok")),
    ("get", "/metrics", "Gauges and counters, for Prometheus", "", Nothing, Bytes("text/plain")),
    ("get", "/v1/status", "What the server does just now", "", Nothing, Json("Status")),
    ("get", "/v1/models", "List models", "", Nothing, Json("ModelList")),
    ("get", "/v1/models/{id}", "Retrieve a model", "", Nothing, Json("Model")),
    ("post", "/v1/chat/completions", "Complete a chat", "", Json("ChatRequest"), Events("Chat")),
    ("post", "/v1/completions", "Complete a text", "", Json("CompletionRequest"), Events("Completion")),
    ("post", "/v1/embeddings", "Refused: models here have no embeddings", "", Json("EmbeddingRequest"), Nothing),
    ("post", "/v1/responses", "Create a response", "", Json("ResponseRequest"), Events("Response")),
    ("get", "/v1/responses", "List responses", "after limit newest_first status", Nothing, Json("ResponseList")),
    ("post", "/v1/responses/wait", "Wait until one of several responses has ended", "", Json("WaitRequest"), Json("Waited")),
    ("post", "/v1/responses/input_tokens", "Count a response's input tokens", "", Json("ResponseRequest"), Json("InputTokens")),
    ("get", "/v1/responses/{id}", "Retrieve a response", "stream starting_after", Nothing, Events("Response")),
    ("delete", "/v1/responses/{id}", "Delete a response", "", Nothing, Json("Deleted")),
    ("post", "/v1/responses/{id}/cancel", "Cancel a background response", "", Nothing, Json("Response")),
    ("get", "/v1/responses/{id}/input_items", "List a response's input", "after limit order", Nothing, Json("List")),
    ("post", "/v1/files", "Upload a file, or name an object that stays where it is", "", MultipartOr("Upload", "FileReference"), Json("File")),
    ("get", "/v1/files", "List files", "after limit order purpose", Nothing, Json("List")),
    ("get", "/v1/files/{id}", "Retrieve a file's object", "", Nothing, Json("File")),
    ("delete", "/v1/files/{id}", "Delete a file", "", Nothing, Json("Deleted")),
    ("get", "/v1/files/{id}/content", "Download a file", "", Nothing, Bytes("application/octet-stream")),
    ("post", "/v1/batches", "Create a batch", "", Json("BatchRequest"), Json("Batch")),
    ("get", "/v1/batches", "List batches", "after limit order", Nothing, Json("List")),
    ("get", "/v1/batches/{id}", "Retrieve a batch", "", Nothing, Json("Batch")),
    ("post", "/v1/batches/{id}/cancel", "Cancel a batch", "", Nothing, Json("Batch")),
    ("post", "/v1/batches/{id}/retry", "Make a batch of the requests that failed in one", "", Nothing, Json("Batch")),
    ("get", "/v1/batches/{id}/{custom_id}", "Retrieve the result of one request", "", Nothing, Json("BatchLine")),
    ("post", "/v1/webhook_endpoints", "Create a webhook endpoint", "", Json("WebhookRequest"), Json("WebhookWithSecret")),
    ("get", "/v1/webhook_endpoints", "List webhook endpoints", "after limit order", Nothing, Json("List")),
    ("get", "/v1/webhook_endpoints/{id}", "Retrieve a webhook endpoint", "", Nothing, Json("Webhook")),
    ("post", "/v1/webhook_endpoints/{id}", "Change a webhook endpoint", "", Json("WebhookChange"), Json("Webhook")),
    ("delete", "/v1/webhook_endpoints/{id}", "Delete a webhook endpoint", "", Nothing, Json("Deleted")),
    ("post", "/v1/webhook_endpoints/{id}/rotate_secret", "Replace its secret", "", MaybeJson("RotateRequest"), Json("WebhookWithSecret")),
    ("post", "/v1/webhook_endpoints/{id}/test", "Send it a message", "", Json("TestRequest"), Json("Tested")),
    ("post", "/v1/webhook_endpoints/{id}/redeliver", "Send again what was given up", "", MaybeJson("RedeliverRequest"), Json("Redelivered")),
    ("get", "/v1/webhook_event_types", "What can be told", "", Nothing, Json("EventTypes")),
    ("get", "/v1/usage", "What was used, and what it costs", "start end group_by", Nothing, Json("UsageReport")),
    ("get", "/v1/trajectories", "List trajectories", "after limit", Nothing, Json("TrajectoryList")),
    ("get", "/v1/trajectories/{id}", "What the turns of a trajectory came to", "", Nothing, Json("Trajectory")),
    ("post", "/v1/messages", "Create a message", "", Json("MessagesRequest"), Events("Message")),
    ("post", "/v1/messages/count_tokens", "Count a message's tokens", "", Json("CountRequest"), Json("InputTokens")),
    ("post", "/v1/messages/batches", "Create a batch of messages", "", Json("MessageBatchRequest"), Json("MessageBatch")),
    ("get", "/v1/messages/batches", "List batches of messages", "before_id after_id message_limit", Nothing, Json("MessageBatchList")),
    ("get", "/v1/messages/batches/{id}", "Retrieve a batch of messages", "", Nothing, Json("MessageBatch")),
    ("delete", "/v1/messages/batches/{id}", "Delete a batch of messages", "", Nothing, Json("MessageBatchDeleted")),
    ("post", "/v1/messages/batches/{id}/cancel", "Cancel a batch of messages", "", Nothing, Json("MessageBatch")),
    ("get", "/v1/messages/batches/{id}/results", "Download its results", "", Nothing, Bytes("application/x-jsonl")),
    ("post", "/v1/v1/messages", "As /v1/messages, for clients that add /v1", "", Json("MessagesRequest"), Events("Message")),
    ("post", "/v1/v1/messages/count_tokens", "As /v1/messages/count_tokens", "", Json("CountRequest"), Json("InputTokens")),
    ("post", "/v1/v1/messages/batches", "Create a batch of messages, for clients that add /v1", "", Json("MessageBatchRequest"), Json("MessageBatch")),
    ("get", "/v1/v1/messages/batches", "List batches of messages, for clients that add /v1", "before_id after_id message_limit", Nothing, Json("MessageBatchList")),
    ("get", "/v1/v1/messages/batches/{id}", "Retrieve a batch of messages, for clients that add /v1", "", Nothing, Json("MessageBatch")),
    ("delete", "/v1/v1/messages/batches/{id}", "Delete a batch of messages, for clients that add /v1", "", Nothing, Json("MessageBatchDeleted")),
    ("post", "/v1/v1/messages/batches/{id}/cancel", "Cancel a batch of messages, for clients that add /v1", "", Nothing, Json("MessageBatch")),
    ("get", "/v1/v1/messages/batches/{id}/results", "Download its results, for clients that add /v1", "", Nothing, Bytes("application/x-jsonl")),
    ("post", "/tokenize", "Text to tokens", "", Json("TokenizeRequest"), Json("Tokens")),
    ("post", "/detokenize", "Tokens to text", "", Json("DetokenizeRequest"), Json("Prompt")),
    ("get", "/tokenizer_info", "What the tokenizer is", "", Nothing, Json("TokenizerInfo")),
];

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let mut document: Value = serde_json::from_str(include_str!("openapi.json")).expect("the file is JSON");
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    document["security"] = json!([{"bearer": []}, {"x_api_key": []}]);
    let mut paths = Map::new();
    for (method, path, ..) in OPERATIONS {
        paths.entry(*path).or_insert_with(|| json!({"parameters": path_parameters(path)}))[*method] = Value::Null;
    }
    for operation @ (method, path, ..) in OPERATIONS {
        paths[*path][*method] = described(operation);
    }
    document["paths"] = paths.into();
    document
});

/// What stands in a path's braces.
fn path_parameters(path: &str) -> Vec<Value> {
    let names = path.split('{').skip(1).filter_map(|rest| Some(rest.split_once('}')?.0));
    names
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}))
        .collect()
}

fn schema(name: &str) -> Value {
    json!({"schema": {"$ref": format!("#/components/schemas/{name}")}})
}

fn content(form: Form) -> Value {
    match form {
        Nothing => json!({}),
        Json(name) | MaybeJson(name) => json!({"application/json": schema(name)}),
        Events(name) => json!({"application/json": schema(name), "text/event-stream": {"schema": {"type": "string"}}}),
        MultipartOr(name, other) => json!({"multipart/form-data": schema(name), "application/json": schema(other)}),
        Bytes(content_type) => json!({content_type: {"schema": {"type": "string"}}}),
    }
}

fn described(&(method, path, summary, query, body, answer): &Operation) -> Value {
    let words = path.split(['/', '.', '{', '}']).filter(|word| !word.is_empty() && *word != "v1");
    let prefix = if path.starts_with("/v1/v1") { "v1_" } else { "" };
    let name = words.collect::<Vec<_>>().join("_");
    let name = if name.is_empty() { "page".to_owned() } else { name };
    let error = if path.contains("/messages") { "MessagesError" } else { "Error" };
    // Both dialects speak of models, and the caller's header says which it is.
    let error = if path.starts_with("/v1/models") { "AnyError" } else { error };
    let error = json!({"description": "What is wrong", "content": content(Json(error))});
    let query: Vec<Value> =
        query.split_whitespace().map(|name| json!({"$ref": format!("#/components/parameters/{name}")})).collect();
    let mut described = json!({
        "operationId": format!("{method}_{prefix}{name}"),
        "summary": summary,
        "parameters": query,
        "responses": {"200": {"description": "Done", "content": content(answer)}, "4XX": error, "5XX": error},
    });
    if super::UNLOCKED.contains(&path) {
        described["security"] = json!([]);
    }
    if !matches!(body, Nothing) {
        let is_required = !matches!(body, MaybeJson(_));
        described["requestBody"] = json!({"required": is_required, "content": content(body)});
    }
    described
}

/// Answers with the document.
pub(super) async fn show() -> Response {
    json_response(&DOCUMENT)
}
