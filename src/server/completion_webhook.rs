//! `metadata.completion_webhook`: where a background response, or a batch, wants to be told that it has ended; what is sent is
//! the object, as it is fetched. How it gets there is in `deliveries`. Invariant: what can't be done is refused when it is asked for.

use super::App;
use super::auth::Owner;
use super::deliveries::new_secret;
use super::errors::{ApiError, json_response};
use super::ids;
use super::models::now;
use super::windows::Mode;
use crate::store::Connection;
use crate::store::one_off::{self, MAX_WAITING, Receiver};
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use serde_json::{Map, Value, json};

const URL: &str = "completion_webhook";
const TOKEN: &str = "webhook_token";
/// What stands for all receivers of an owner's where webhook endpoints have their ids.
pub(super) const ID: &str = "completion";

/// Pause that is asked for while too many receivers wait.
const RETRY_S: u32 = 10;

/// Who is to be told.
///
/// # Errors
/// A call's caller waits for it anyway; or a URL or token that can't be used.
pub(super) fn asked(
    app: &App,
    owner: &Owner,
    metadata: Option<&Map<String, Value>>,
    mode: Mode,
) -> Result<Option<Receiver>, ApiError> {
    let text = |key: &str| metadata.and_then(|metadata| metadata.get(key)?.as_str());
    let refuse = |key: &str, why: &str| Err(ApiError::invalid_value(format!("metadata.{key}"), why));
    let (url, token) = (text(URL), text(TOKEN));
    let Some(key) = url.map(|_| URL).or(token.map(|_| TOKEN)) else { return Ok(None) };
    if mode == Mode::Foreground {
        return refuse(key, "is for background responses and batches: this request is answered when it is done");
    }
    let Some(url) = url else { return refuse(TOKEN, "needs metadata.completion_webhook") };
    if let Err(why) = app.deliveries.check_url(url) {
        return refuse(URL, &format!("{url:?} {why:#}"));
    }
    // Whatever can stand in the header, and nothing that would end it early.
    let is_fine = |token: &str| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    if token.is_some_and(|token| !is_fine(token)) {
        return refuse(TOKEN, "must be letters, digits and signs of ASCII, without spaces");
    }
    let whose = json!([**owner, url, token]).to_string();
    let id = format!("we_{}", ids::derived("valar completion webhook 1", whose.as_bytes()));
    Ok(Some(Receiver { id, url: url.to_owned(), token: token.map(str::to_owned), new_secret: new_secret() }))
}

/// Notes that it is to be told of an object, which was accepted at `now` (unix seconds), in the transaction that stores that.
///
/// # Errors
/// The database's; or as many others of the owner's wait as may: then nothing is noted.
pub(super) fn expect(
    connection: &Connection,
    (owner, object): (&str, &str),
    receiver: &Receiver,
    now: u64,
) -> anyhow::Result<Result<(), ApiError>> {
    if one_off::expect(connection, (owner, object), receiver, now)? {
        return Ok(Ok(()));
    }
    let message = format!(
        "metadata.{URL}: {MAX_WAITING} receivers of this key wait to be told already; name one of them, or try again when some have \
         been told"
    );
    let refused = ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded"), message);
    Ok(Err(ApiError { param: Some(format!("metadata.{URL}")), retry_after_s: Some(RETRY_S), ..refused }))
}

/// The header that a token is sent in.
pub(super) fn bearer(token: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(format!("Bearer {token}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Signs with a new secret from now on, and shows it: until then, nobody knows the one that an owner's messages have. `old_until`
/// (unix seconds): with the old one too, until then.
pub(super) async fn rotate(app: &App, owner: &Owner, old_until: Option<u64>) -> Result<Response, ApiError> {
    let (owner, secret, at) = (owner.to_string(), new_secret(), now());
    let hint: String = secret.chars().skip(secret.chars().count().saturating_sub(4)).collect();
    let answer = json!({"id": ID, "object": "webhook_endpoint", "created_at": at, "updated_at": at, "name": ID, "url": "",
                        "event_types": [], "signing_secret_hint": format!("…{hint}"), "signing_secret": secret});
    app.store.write(move |connection| one_off::rotate(connection, &owner, &secret, old_until)).await?;
    Ok(json_response(&answer))
}
