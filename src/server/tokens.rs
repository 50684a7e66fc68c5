//! The tokenizer over HTTP, as evaluation harnesses probe for it. Nothing is run.

use super::App;
use super::body::JsonObject;
use super::errors::{ApiError, json_response};
use super::models::Offered;
use axum::extract::State;
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// The model that a body names; the first one if it names none.
fn model<'a>(app: &'a App, body: &Map<String, Value>) -> Result<&'a Arc<Offered>, ApiError> {
    match body.get("model") {
        None | Some(Value::Null) => Ok(&app.models.all()[0]),
        Some(_) => app.models.named(body),
    }
}

/// `POST /tokenize {"prompt", "add_special_tokens"}`
pub(super) async fn tokenize(State(app): State<Arc<App>>, JsonObject(mut body): JsonObject) -> Result<Response, ApiError> {
    let preparer = Arc::clone(&model(&app, &body)?.live.preparer);
    let add_special = super::call::take_bool(&mut body, "add_special_tokens")?.unwrap_or(true);
    let prompt = match body.remove("prompt") {
        None | Some(Value::Null) => return Err(ApiError::missing("prompt")),
        Some(Value::String(prompt)) => prompt,
        Some(other) => return Err(ApiError::invalid_type("prompt", "a string", &other)),
    };
    let max_context = preparer.max_context;
    let encode = move || {
        let tokenizer = &preparer.tokenizer;
        if add_special { tokenizer.encode_prompt(&prompt) } else { tokenizer.encode(&prompt) }
    };
    let tokens = tokio::task::spawn_blocking(encode).await;
    let tokens = tokens.map_err(|_| ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, None, "tokenizing failed"))?;
    Ok(json_response(&json!({"tokens": tokens, "count": tokens.len(), "max_model_len": max_context})))
}

/// `POST /detokenize {"tokens"}`
pub(super) async fn detokenize(State(app): State<Arc<App>>, JsonObject(body): JsonObject) -> Result<Response, ApiError> {
    let tokenizer = &model(&app, &body)?.live.preparer.tokenizer;
    let items = match body.get("tokens") {
        None | Some(Value::Null) => return Err(ApiError::missing("tokens")),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(ApiError::invalid_type("tokens", "an array of token ids", other)),
    };
    let ids = items.iter().enumerate().map(|(i, item)| {
        let id = item.as_u64().filter(|&id| id < tokenizer.n_vocab() as u64);
        id.map(|id| id as u32).ok_or_else(|| ApiError::invalid_value(format!("tokens[{i}]"), format!("{item} is no token id")))
    });
    let ids = ids.collect::<Result<Vec<u32>, _>>()?;
    Ok(json_response(&json!({"prompt": tokenizer.decode(&ids)})))
}

/// `GET /tokenizer_info`
pub(super) async fn info(State(app): State<Arc<App>>) -> Response {
    let preparer = &app.models.all()[0].live.preparer;
    let special = |name: &str| preparer.template.special(name).map(str::to_owned);
    // A model ends its text with its first end token where its template names none.
    let first_end = || {
        let id = *preparer.tokenizer.end_ids().first()?;
        Some(String::from_utf8_lossy(preparer.tokenizer.token_bytes(id)).into_owned())
    };
    json_response(&json!({
        "tokenizer_class": preparer.tokenizer.kind(),
        "n_vocab": preparer.tokenizer.n_vocab(),
        "model_max_length": preparer.max_context,
        "bos_token": special("bos_token"),
        "eos_token": special("eos_token").or_else(first_end),
        "pad_token": special("pad_token"),
        "unk_token": special("unk_token"),
        "chat_template": preparer.template.source(),
    }))
}
