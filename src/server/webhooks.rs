//! `/v1/webhook_endpoints` over HTTP: who wants to be told of what. What is told is in `deliveries`. Invariant: a secret is
//! shown when it is made, and never again.

use super::App;
use super::auth::Owner;
use super::body::{JsonObject, MaybeObject};
use super::completion_webhook;
use super::deliveries::new_secret;
use super::errors::{ApiError, json_response};
use super::ids;
use super::models::now;
use super::paging::{Page, Pairs};
use super::stored::listed;
use crate::store::webhooks::{self, Delivery, Endpoint};
use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// What can be told.
const EVENT_TYPES: [&str; 8] = [
    "response.completed",
    "response.failed",
    "response.cancelled",
    "response.incomplete",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
];
/// Most endpoints of an owner's.
const MAX_ENDPOINTS: usize = 100;
/// Longest name or URL.
const MAX_CHARS: usize = 2048;
/// How long a secret is used beside the one after it.
const OLD_SECRET_S: u64 = 86_400;

fn not_found(id: &str) -> ApiError {
    ApiError::not_found("webhook_endpoint_id", format!("No webhook endpoint found with id '{id}'."))
}

type Id = Result<Path<String>, PathRejection>;

async fn find(app: &App, owner: &Owner, path: Id) -> Result<Endpoint, ApiError> {
    let Path(id) = path.map_err(|_| not_found(""))?;
    let (owner, key) = (owner.to_string(), id.clone());
    let found = app.store.read(move |connection| webhooks::get(connection, &owner, &key)).await?;
    found.ok_or_else(|| not_found(&id))
}

fn shown(endpoint: &Endpoint) -> Result<Value, ApiError> {
    let event_types: Value = serde_json::from_str(&endpoint.event_types).map_err(anyhow::Error::from)?;
    let hint: String = endpoint.secret.chars().rev().take(4).collect::<Vec<_>>().into_iter().rev().collect();
    Ok(json!({"id": endpoint.id, "object": "webhook_endpoint", "created_at": endpoint.created_at,
              "updated_at": endpoint.updated_at, "name": endpoint.name, "url": endpoint.url, "event_types": event_types,
              "signing_secret_hint": format!("…{hint}")}))
}

fn with_secret(endpoint: &Endpoint) -> Result<Value, ApiError> {
    let mut shown = shown(endpoint)?;
    shown["signing_secret"] = endpoint.secret.clone().into();
    Ok(shown)
}

fn only(body: &Map<String, Value>, known: &[&str]) -> Result<(), ApiError> {
    match body.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(name) => Err(ApiError::field("unsupported_parameter", name.clone(), "is not supported")),
    }
}

fn text(body: &Map<String, Value>, key: &str) -> Result<Option<String>, ApiError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() || text.len() > MAX_CHARS => {
            Err(ApiError::invalid_value(key, format!("must have 1 to {MAX_CHARS} characters")))
        }
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(ApiError::invalid_type(key, "a string", other)),
    }
}

fn event_type(value: &Value, path: &str) -> Result<String, ApiError> {
    let name = value.as_str().filter(|name| EVENT_TYPES.contains(name));
    let fault = || ApiError::invalid_value(path, format!("{value} is not one of {}", EVENT_TYPES.join(", ")));
    name.map(str::to_owned).ok_or_else(fault)
}

fn event_types(body: &Map<String, Value>) -> Result<Option<String>, ApiError> {
    let types = match body.get("event_types") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(types)) if !types.is_empty() => types,
        Some(Value::Array(_)) => return Err(ApiError::invalid_value("event_types", "must hold at least one")),
        Some(other) => return Err(ApiError::invalid_type("event_types", "an array", other)),
    };
    let types: Vec<String> = types.iter().map(|value| event_type(value, "event_types")).collect::<Result<_, _>>()?;
    Ok(Some(json!(types).to_string()))
}

fn url(app: &App, body: &Map<String, Value>) -> Result<Option<String>, ApiError> {
    let Some(url) = text(body, "url")? else { return Ok(None) };
    app.deliveries.check_url(&url).map_err(|error| ApiError::invalid_value("url", format!("{url:?} {error:#}")))?;
    Ok(Some(url))
}

/// `POST /v1/webhook_endpoints`
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    JsonObject(body): JsonObject,
) -> Result<Response, ApiError> {
    only(&body, &["name", "url", "event_types"])?;
    let created_at = now();
    let endpoint = Endpoint {
        id: ids::new("we_"),
        owner: owner.to_string(),
        created_at,
        updated_at: created_at,
        name: text(&body, "name")?.ok_or_else(|| ApiError::missing("name"))?,
        url: url(&app, &body)?.ok_or_else(|| ApiError::missing("url"))?,
        event_types: event_types(&body)?.ok_or_else(|| ApiError::missing("event_types"))?,
        secret: new_secret(),
        old_secret: None,
        token: None,
    };
    let answer = with_secret(&endpoint)?;
    let stored = app.store.write(move |connection| {
        let n_known = webhooks::list(connection, &endpoint.owner, None, MAX_ENDPOINTS)?.len();
        if n_known < MAX_ENDPOINTS { webhooks::put(connection, &endpoint).map(|()| true) } else { Ok(false) }
    });
    if !stored.await? {
        let message = format!("there are {MAX_ENDPOINTS} webhook endpoints already");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message));
    }
    Ok(json_response(&answer))
}

/// `GET /v1/webhook_endpoints`
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    query: Pairs,
) -> Result<Response, ApiError> {
    let Page { after, limit, .. } = Page::of(&query, (20, 100))?;
    let found = app.store.read(move |connection| webhooks::list(connection, &owner, after.as_deref(), limit + 1)).await?;
    let data: Vec<Value> = found.iter().take(limit).map(shown).collect::<Result<_, _>>()?;
    Ok(json_response(&listed(&data, found.len() > data.len())))
}

/// `GET /v1/webhook_endpoints/{id}`
pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
) -> Result<Response, ApiError> {
    Ok(json_response(&shown(&find(&app, &owner, path).await?)?))
}

/// `POST /v1/webhook_endpoints/{id}`: what is given is changed; and it is told again, if it wanted to hear nothing.
pub(super) async fn update(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
    JsonObject(body): JsonObject,
) -> Result<Response, ApiError> {
    only(&body, &["name", "url", "event_types"])?;
    let before = find(&app, &owner, path).await?;
    let mut endpoint = before.clone();
    endpoint.name = text(&body, "name")?.unwrap_or(endpoint.name);
    endpoint.url = url(&app, &body)?.unwrap_or(endpoint.url);
    endpoint.event_types = event_types(&body)?.unwrap_or(endpoint.event_types);
    if endpoint != before {
        endpoint.updated_at = now();
    }
    let answer = shown(&endpoint)?;
    app.store.write(move |connection| webhooks::put(connection, &endpoint)).await?;
    Ok(json_response(&answer))
}

/// `DELETE /v1/webhook_endpoints/{id}`
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
) -> Result<Response, ApiError> {
    let id = find(&app, &owner, path).await?.id;
    let key = id.clone();
    app.store.write(move |connection| webhooks::delete(connection, &key)).await?;
    Ok(json_response(&json!({"id": id, "object": "webhook_endpoint.deleted", "deleted": true})))
}

/// `POST /v1/webhook_endpoints/{id}/rotate_secret`; of `completion`: the secret of all receivers that responses and batches name for
/// themselves.
pub(super) async fn rotate_secret(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
    MaybeObject(body): MaybeObject,
) -> Result<Response, ApiError> {
    let field = "keep_old_secret_active_for_24_hours";
    only(&body, &[field])?;
    let keeps = match body.get(field) {
        None | Some(Value::Null) => false,
        Some(Value::Bool(keeps)) => *keeps,
        Some(other) => return Err(ApiError::invalid_type(field, "true or false", other)),
    };
    let old_until = keeps.then(|| now() + OLD_SECRET_S);
    if path.as_ref().is_ok_and(|Path(id)| id == completion_webhook::ID) {
        return completion_webhook::rotate(&app, &owner, old_until).await;
    }
    let mut endpoint = find(&app, &owner, path).await?;
    let old = std::mem::replace(&mut endpoint.secret, new_secret());
    endpoint.updated_at = now();
    endpoint.old_secret = old_until.map(|until| (old, until));
    let answer = with_secret(&endpoint)?;
    app.store.write(move |connection| webhooks::put(connection, &endpoint)).await?;
    Ok(json_response(&answer))
}

/// `POST /v1/webhook_endpoints/{id}/test`: tells it something, once.
pub(super) async fn test(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
    JsonObject(body): JsonObject,
) -> Result<Response, ApiError> {
    only(&body, &["event_type"])?;
    let event_type = event_type(body.get("event_type").ok_or_else(|| ApiError::missing("event_type"))?, "event_type")?;
    let to = find(&app, &owner, path).await?;
    let (id, created_at) = (ids::new("evt_"), now());
    let prefix = if event_type.starts_with("batch") { "batch_" } else { "resp_" };
    let message =
        json!({"id": id, "object": "event", "created_at": created_at, "type": event_type, "data": {"id": ids::new(prefix)}});
    let endpoint_id = to.id.clone();
    let delivery = Delivery { id, created_at, body: message.to_string(), n_tries: 0, to };
    let sent = app.deliveries.send(&delivery).await;
    let (status_code, _) = sent.map_err(|error| {
        let message = format!("the endpoint could not be reached: {error:#}");
        ApiError::new(StatusCode::BAD_REQUEST, Some("webhook_unreachable"), message)
    })?;
    Ok(json_response(&json!({"object": "webhook_endpoint.test", "event_type": event_type, "status_code": status_code,
                             "success": true, "webhook_endpoint_id": endpoint_id})))
}

/// `POST /v1/webhook_endpoints/{id}/redeliver`: tells again what was given up, or one event by its id.
pub(super) async fn redeliver(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: Id,
    MaybeObject(body): MaybeObject,
) -> Result<Response, ApiError> {
    only(&body, &["event_id"])?;
    let event = text(&body, "event_id")?;
    let id = find(&app, &owner, path).await?.id;
    let (key, wanted) = (id.clone(), event.clone());
    let again = app.store.write(move |connection| webhooks::again(connection, &key, wanted.as_deref(), now())).await?;
    if let Some(event) = event.filter(|_| again == 0) {
        return Err(ApiError::not_found("event_id", format!("No event found with id '{event}'.")));
    }
    app.deliveries.ring();
    Ok(json_response(&json!({"object": "webhook_endpoint.redelivery", "webhook_endpoint_id": id, "n_events": again})))
}

/// `GET /v1/webhook_event_types`
pub(super) async fn event_types_list() -> Response {
    json_response(&json!(EVENT_TYPES))
}
