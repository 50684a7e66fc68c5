//! Where a batch's requests are: in a file of its own in the data folder, or in an object that stays where it is. And which
//! model they name. Knows no tokenizer.

use super::App;
use super::errors::ApiError;
use super::models::{Models, Offered};
use crate::format::openai::parse_object;
use crate::pipeline::referenced::{Reference, Referenced, Refused, refusal};
use anyhow::{Context as _, Result};
use axum::http::StatusCode;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;
use tokio::task::spawn_blocking;

/// Longest beginning of a file that is searched for the name of its model.
const FIRST_LINE_BYTES: u64 = 16 << 20;

/// What a caller is told of an object that can't be read.
pub(super) fn refused(param: &str, why: &Refused) -> ApiError {
    let (status, code) = match why {
        Refused::Invalid(_) | Refused::Missing => return ApiError::invalid_value(param, why),
        Refused::NotAllowed => (StatusCode::FORBIDDEN, Some("uri_not_allowed")),
        Refused::Changed => (StatusCode::BAD_REQUEST, Some(CHANGED)),
        Refused::Unreadable(_) => (StatusCode::SERVICE_UNAVAILABLE, None),
    };
    let error = ApiError::new(status, code, format!("{param}: {why}"));
    let retry_after_s = matches!(why, Refused::Unreadable(_)).then_some(5);
    ApiError { param: Some(param.to_owned()), retry_after_s, ..error }
}

/// What the caller is told whose input could not be read or put on the disk.
pub(super) fn unread(error: anyhow::Error) -> ApiError {
    match refusal(&error) {
        Some(why) => refused("input_file_id", why),
        None => error.into(),
    }
}

/// An object is not what it was.
const CHANGED: &str = "file_changed";

/// What a batch's errors call it, if that will not get better by itself.
pub(super) fn final_code(why: &Refused) -> Option<&'static str> {
    match why {
        Refused::Changed => Some(CHANGED),
        Refused::Missing => Some("file_not_found"),
        Refused::NotAllowed => Some("uri_not_allowed"),
        Refused::Invalid(_) => Some("invalid_value"),
        Refused::Unreadable(_) => None,
    }
}

/// Finds an object again, away from the threads that serve connections.
///
/// # Errors
/// The outer one is the server's, the inner one says why it can't be read.
pub(super) async fn find(app: &Arc<App>, reference: Reference) -> Result<Result<Referenced, Refused>> {
    let app = Arc::clone(app);
    spawn_blocking(move || app.places.find(&reference)).await.context("looking for an object panicked")
}

/// The lines of a batch's input.
pub(super) fn lines(own: &Path, referenced: Option<&Referenced>) -> Result<Box<dyn BufRead>> {
    Ok(match referenced {
        Some(object) => Box::new(object.read()?),
        None => Box::new(BufReader::new(File::open(own).with_context(|| format!("cannot read {}", own.display()))?)),
    })
}

/// The model that the first line names.
pub(super) fn first_model(input: impl BufRead) -> Result<Option<String>> {
    let (mut line, mut input) = (Vec::new(), input.take(FIRST_LINE_BYTES));
    while input.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_start_matches('\u{feff}').trim();
        if !text.is_empty() {
            let model = parse_object(text).ok().and_then(|object| Some(object.get("body")?.get("model")?.as_str()?.to_owned()));
            return Ok(model);
        }
        line.clear();
    }
    Ok(None)
}

/// The model that runs a batch whose first line names this one. If that is none that is offered, it is the first that is: rows that
/// name none run there, and are priced and estimated by the same one when the batch is accepted.
pub(super) fn model_of<'m>(models: &'m Models, named: Option<&str>) -> &'m Arc<Offered> {
    named.and_then(|name| models.find(name)).unwrap_or_else(|| &models.all()[0])
}
