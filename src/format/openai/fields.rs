//! Fields of a JSON object, read by type and range, with errors that name the field. Knows no field's meaning.

use crate::outcome::{ErrorCode, RowError};
use serde_json::{Map, Value};

pub(in crate::format) fn required_str<'a>(object: &'a Map<String, Value>, key: &str, parent: &str) -> Result<&'a str, RowError> {
    let path = if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") };
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        None => Err(RowError::field(ErrorCode::MissingField, path, "is required")),
        Some(other) => Err(wrong_type(&path, "a string", other)),
    }
}

pub(in crate::format) fn optional_str<'a>(body: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, RowError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong_type(&format!("body.{key}"), "a string", other)),
    }
}

pub(in crate::format) fn optional_bool(body: &Map<String, Value>, key: &str) -> Result<Option<bool>, RowError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => Err(wrong_type(&format!("body.{key}"), "true or false", other)),
    }
}

pub(in crate::format) fn optional_u64(body: &Map<String, Value>, key: &str, min: u64, max: u64) -> Result<Option<u64>, RowError> {
    let path = || format!("body.{key}");
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => integer(value, &path(), min, max).map(Some),
    }
}

pub(in crate::format) fn integer(value: &Value, path: &str, min: u64, max: u64) -> Result<u64, RowError> {
    match value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from)) {
        None => Err(wrong_type(path, "an integer", value)),
        Some(n) if (i128::from(min)..=i128::from(max)).contains(&n) => Ok(n as u64),
        Some(n) => Err(RowError::field(ErrorCode::InvalidValue, path, format!("{n} is outside {min} to {max}"))),
    }
}

pub(in crate::format) fn optional_object<'a>(
    body: &'a Map<String, Value>,
    key: &str,
) -> Result<Option<&'a Map<String, Value>>, RowError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(other) => Err(wrong_type(&format!("body.{key}"), "an object", other)),
    }
}

pub(in crate::format) fn optional_f32(body: &Map<String, Value>, key: &str, min: f32, max: f32) -> Result<Option<f32>, RowError> {
    let path = || format!("body.{key}");
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            None => Err(wrong_type(&path(), "a number", value)),
            Some(x) if (f64::from(min)..=f64::from(max)).contains(&x) => Ok(Some(x as f32)),
            Some(x) if min > 0.0 => {
                Err(RowError::field(ErrorCode::InvalidValue, path(), format!("{x} must be over 0 and at most {max}")))
            }
            Some(x) => Err(RowError::field(ErrorCode::InvalidValue, path(), format!("{x} is outside {min} to {max}"))),
        },
    }
}

pub(in crate::format) fn wrong_type(path: &str, expected: &str, found: &Value) -> RowError {
    RowError::field(ErrorCode::InvalidType, path, format!("must be {expected}, is {}", kind(found)))
}

/// What a JSON value is, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A value for a message: its JSON text, cut to what a person reads.
pub(in crate::format) fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
