//! Errors on the wire, in the form of the dialect that was spoken to: `OpenAI`'s everywhere, Anthropic's under
//! `/v1/messages`. Invariant: every answer that is no success is one of these, whatever went wrong.

use super::backlog::Full;
use super::budgets::USED_UP;
use super::limits::IN_BATCHES;
use super::log::say;
use crate::format::openai::kind;
use crate::outcome::{ErrorCode, RowError};
use crate::store;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::time::Duration;

/// Pause that is asked for when the store is busy or its disk full.
const STORE_RETRY_S: u32 = 5;

/// Whose form an answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error": {"message", "type", "param", "code"}}`
    OpenAi,
    /// `{"type": "error", "error": {"type", "message"}, "request_id"}`
    Anthropic,
}

impl Dialect {
    /// The dialect of a path; both speak of models, and one says who it is.
    pub fn of(path: &str, headers: &HeaderMap) -> Self {
        let path = path.strip_prefix("/v1").unwrap_or(path);
        let path = path.strip_prefix("/v1").unwrap_or(path);
        let is_anthropic = is_under(path, "/messages") || is_under(path, "/models") && headers.contains_key("anthropic-version");
        if is_anthropic { Self::Anthropic } else { Self::OpenAi }
    }
}

fn is_under(path: &str, root: &str) -> bool {
    path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A request that was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The status.
    pub status: StatusCode,
    /// What programs match on, beside the status.
    pub code: Option<&'static str>,
    /// The field at fault.
    pub param: Option<String>,
    /// For people.
    pub message: String,
    /// Seconds after which it may be tried again.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    /// An error without a field.
    pub fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into(), retry_after_s: None }
    }

    /// A fault of one field: 400.
    pub fn field(code: &'static str, param: impl Into<String>, message: impl std::fmt::Display) -> Self {
        let param = param.into();
        let message = format!("{param}: {message}");
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, Some(code), message) }
    }

    /// A field's value that is not allowed.
    pub fn invalid_value(param: impl Into<String>, message: impl std::fmt::Display) -> Self {
        Self::field("invalid_value", param, message)
    }

    /// A field of the wrong type.
    pub fn invalid_type(param: impl Into<String>, expected: &str, found: &Value) -> Self {
        Self::field("invalid_type", param, format!("must be {expected}, is {}", kind(found)))
    }

    /// A field that must be there.
    pub fn missing(param: impl Into<String>) -> Self {
        Self::field("missing_required_parameter", param, "is required")
    }

    /// Something that has no such id.
    pub fn not_found(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::new(StatusCode::NOT_FOUND, None, message) }
    }

    /// Too many calls wait.
    pub fn busy() -> Self {
        let message = "too many requests wait already; try again";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded"), message);
        Self { retry_after_s: Some(1), ..error }
    }

    /// So much is before it that it would be done too late: it may come again when its window can hold it.
    pub fn over_capacity(window: &str, full: Full, ceiling: Duration) -> Self {
        let (wait_s, ceiling_s) = (full.wait.as_secs(), ceiling.as_secs());
        let message =
            format!("the work before this request takes about {wait_s} s, and window {window} allows {ceiling_s} s; try again");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, Some("capacity_exceeded"), message);
        // The next whole second.
        let again_s = full.again_in.as_secs().saturating_add(1);
        Self { retry_after_s: Some(u32::try_from(again_s).unwrap_or(u32::MAX)), ..error }
    }

    /// By the forecast a batch would end so much after its window, or make another end late.
    pub fn late_batch(too_long: Duration, window_s: u64) -> Self {
        let too_long_s = too_long.as_secs().saturating_add(1);
        let message = format!(
            "by the forecast, all batches could not be done in time with this one, whose window is {window_s} s: that takes {too_long_s} s \
             longer; try again, with fewer requests or a longer completion_window"
        );
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, Some("capacity_exceeded"), message);
        Self { retry_after_s: Some(u32::try_from(too_long_s).unwrap_or(u32::MAX)), ..error }
    }

    /// The server has begun, and its models are not loaded yet.
    pub fn loading() -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, None, "the models are being loaded; try again");
        Self { retry_after_s: Some(1), ..error }
    }

    /// The server is on its way out.
    pub fn draining() -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, None, "the server is shutting down");
        Self { retry_after_s: Some(1), ..error }
    }

    /// `type` of `OpenAI`'s form.
    pub fn openai_type(&self) -> &'static str {
        if self.code == Some(USED_UP) {
            return USED_UP;
        }
        match self.status.as_u16() {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn anthropic_type(&self) -> &'static str {
        match self.status.as_u16() {
            _ if self.code == Some(USED_UP) => "billing_error",
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// The body.
    pub fn body(&self, dialect: Dialect, request_id: &str) -> Value {
        match dialect {
            Dialect::OpenAi => json!({"error": self.openai_error()}),
            Dialect::Anthropic => json!({
                "type": "error",
                "error": {"type": self.anthropic_type(), "message": self.anthropic_message()},
                "request_id": request_id,
            }),
        }
    }

    /// What stands under `error` in `OpenAI`'s form.
    pub fn openai_error(&self) -> Value {
        json!({"message": self.message, "type": self.openai_type(), "param": self.param, "code": self.code})
    }

    /// Anthropic's clients know a missing field by this text.
    fn anthropic_message(&self) -> String {
        match (&self.param, self.code) {
            (Some(param), Some("missing_required_parameter")) => format!("{param}: Field required"),
            _ => self.message.clone(),
        }
    }

    /// The answer in a dialect.
    pub fn response(&self, dialect: Dialect, request_id: &str) -> Response {
        let mut response = json_response(&self.body(dialect, request_id));
        // What a service that asks for patience, or for money, means has a status of its own there.
        *response.status_mut() = match dialect {
            Dialect::Anthropic if self.status == StatusCode::SERVICE_UNAVAILABLE => {
                StatusCode::from_u16(529).unwrap_or(self.status)
            }
            Dialect::Anthropic if self.code == Some(USED_UP) => StatusCode::PAYMENT_REQUIRED,
            _ => self.status,
        };
        let headers = response.headers_mut();
        // Tokens in batches come back when batches end, and budgets another day, which takes longer than clients wait.
        let is_for_long = self.code == Some(IN_BATCHES) || self.code == Some(USED_UP);
        let can_retry = matches!(self.status.as_u16(), 408 | 429 | 503) && !is_for_long;
        headers.insert("x-should-retry", HeaderValue::from_static(if can_retry { "true" } else { "false" }));
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::PAYLOAD_TOO_LARGE {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// The last layer writes it in the dialect of the path.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// What a request parser refuses. Fields stand under `body.` in rows of files; a call is its body.
impl From<RowError> for ApiError {
    fn from(error: RowError) -> Self {
        let code = match error.code {
            ErrorCode::InvalidJson | ErrorCode::InvalidUtf8 | ErrorCode::LineTooLong => None,
            ErrorCode::EngineError => return Self::new(StatusCode::INTERNAL_SERVER_ERROR, None, error.message),
            ErrorCode::TemplateError => Some("invalid_value"),
            code => Some(code.as_str()),
        };
        let param = error.field.map(|field| field.strip_prefix("body.").unwrap_or(&field).to_owned());
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, code, error.message.replace("body.", "")) }
    }
}

/// A fault of ours, of which callers are told no more than that, and whether it may pass.
impl From<anyhow::Error> for ApiError {
    fn from(error: anyhow::Error) -> Self {
        say(&format!("error: {error:#}"));
        let message = "the server could not read or write what it stores";
        if store::may_pass(&error) {
            // Nothing was done.
            let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, None, format!("{message}; try again"));
            return Self { retry_after_s: Some(STORE_RETRY_S), ..error };
        }
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, None, message)
    }
}

/// A JSON answer, status 200.
pub fn json_response(body: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}
