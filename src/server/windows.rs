//! Completion windows: what a call asks for, what its model supports, and the scheduling class that follows. Invariant:
//! a window that is not supported is refused by name, never ignored.

use super::errors::ApiError;
use crate::window::Class;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// How much time a call gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Window {
    /// Now.
    Asap,
    /// Minutes.
    Standard,
}

impl Window {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Asap, Self::Standard];

    /// As written on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asap => "asap",
            Self::Standard => "standard",
        }
    }

    /// How it is scheduled.
    pub fn class(self) -> Class {
        match self {
            Self::Asap => Class::Asap,
            Self::Standard => Class::Standard,
        }
    }
}

/// How a call is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The caller waits for the answer.
    Foreground,
    /// It is fetched later.
    Background,
}

/// Most pairs of `metadata`.
const MAX_PAIRS: usize = 16;
/// Longest key, in characters.
const MAX_KEY_CHARS: usize = 64;
/// Longest value, in characters.
const MAX_VALUE_CHARS: usize = 512;

/// Reads `metadata`: at most so many pairs of texts.
///
/// # Errors
/// It is something else.
pub fn metadata(body: &Map<String, Value>) -> Result<Option<&Map<String, Value>>, ApiError> {
    let pairs = match body.get("metadata") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(pairs)) => pairs,
        Some(other) => return Err(ApiError::invalid_type("metadata", "an object", other)),
    };
    if pairs.len() > MAX_PAIRS {
        let message = format!("at most {MAX_PAIRS} pairs are allowed, {} given", pairs.len());
        return Err(ApiError::invalid_value("metadata", message));
    }
    for (key, value) in pairs {
        let path = format!("metadata.{key}");
        if key.chars().count() > MAX_KEY_CHARS {
            return Err(ApiError::invalid_value(path, format!("keys have at most {MAX_KEY_CHARS} characters")));
        }
        match value {
            Value::String(text) if text.chars().count() <= MAX_VALUE_CHARS => {}
            Value::String(_) => {
                return Err(ApiError::invalid_value(path, format!("values have at most {MAX_VALUE_CHARS} characters")));
            }
            other => return Err(ApiError::invalid_type(path, "a string", other)),
        }
    }
    Ok(Some(pairs))
}

/// The window of a call: what `asked` says, or what its mode means where it says nothing.
///
/// # Errors
/// A window that the model does not support; the message lists those that it does.
pub fn resolve(asked: Option<&str>, mode: Mode, model: &str, supported: &[Window]) -> Result<Window, ApiError> {
    let Some(asked) = asked else {
        let default = if mode == Mode::Foreground { Window::Asap } else { Window::Standard };
        return Ok(supported.iter().copied().find(|window| *window == default).unwrap_or(supported[0]));
    };
    let found = supported.iter().copied().find(|window| window.as_str() == asked);
    found.ok_or_else(|| {
        let names: Vec<&str> = supported.iter().map(|window| window.as_str()).collect();
        let message = format!("completion_window {asked:?} is not supported by model {model}; supported: {}", names.join(", "));
        ApiError {
            param: Some("metadata.completion_window".into()),
            ..ApiError::new(axum::http::StatusCode::BAD_REQUEST, Some("unsupported_value"), message)
        }
    })
}

/// `metadata.completion_window`, if it is there.
pub fn asked(metadata: Option<&Map<String, Value>>) -> Option<&str> {
    metadata?.get("completion_window").and_then(Value::as_str)
}
