//! `POST /v1/batches/{id}/retry`: a batch of those requests of another that stand in its error file. Invariant: the lines of the
//! new batch are those of the old one's input, as they are.

use super::App;
use super::auth::Owner;
use super::batch_inputs;
use super::batch_runs::{Settings, folder};
use super::batches::{self, Input, Wanted};
use super::completion_webhook;
use super::errors::{ApiError, json_response};
use super::windows::Mode;
use crate::format::openai::{Endpoint, parse_object};
use crate::pipeline::referenced::Referenced;
use anyhow::{Context as _, Result};
use axum::Extension;
use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::Value;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, ErrorKind, Write as _};
use std::path::Path;
use std::sync::Arc;
use tokio::task::spawn_blocking;

/// Makes it.
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    path: batches::Id,
) -> Result<Response, ApiError> {
    let refuse = |message: String| ApiError {
        param: Some("batch_id".into()),
        ..ApiError::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message)
    };
    let old = batches::find(&app, &owner, &path.map(|UrlPath(id)| id).map_err(|_| batches::not_found(""))?).await?;
    if old.is_open() {
        return Err(refuse(format!("The batch is {}: it can be retried when it has ended.", old.status)));
    }
    // Before anything is read or written for it.
    batches::check_room(&app)?;
    let body: Value = serde_json::from_str(&old.body).map_err(anyhow::Error::from)?;
    let receiver = completion_webhook::asked(&app, &owner, body["metadata"].as_object(), Mode::Background)?;
    let (input, from) = (Input::new(&app, true), app.data.join(folder(&old.id)));
    let settings: Settings = serde_json::from_str(&old.settings).map_err(anyhow::Error::from)?;
    let input_at = match settings.reference.clone() {
        Some(reference) => {
            Some(batch_inputs::find(&app, reference).await?.map_err(|why| batch_inputs::refused("batch_id", &why))?)
        }
        None => None,
    };
    let written = spawn_blocking(move || -> Result<_> { Ok((failed_rows(&from, input_at.as_ref(), &input.path)?, input)) });
    let (n_rows, input) = written.await.context("reading the errors panicked")??;
    if n_rows == 0 {
        return Err(refuse("The batch has no requests that failed.".into()));
    }
    let wanted = Wanted {
        input,
        endpoint: Endpoint::parse(&settings.endpoint).context("its endpoint")?,
        hours: (old.expires_at - old.created_at) / 3600,
        window: body["completion_window"].as_str().unwrap_or("24h").to_owned(),
        metadata: body["metadata"].clone(),
        label: body["label"].clone(),
        retry_of: Some(old.id),
        output_seconds: settings.output_seconds,
        max_cost: settings.max_cost,
        receiver,
        n_requests: 0,
    };
    Ok(json_response(&batches::open(app, &owner, wanted).await?))
}

/// Writes the input lines of the requests that failed; how many.
fn failed_rows(folder: &Path, input_at: Option<&Referenced>, to: &Path) -> Result<u64> {
    let lines = |name: &str| -> Result<Option<BufReader<File>>> {
        match File::open(folder.join(name)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            file => Ok(Some(BufReader::new(file.with_context(|| folder.join(name).display().to_string())?))),
        }
    };
    let id = |line: &str| -> Option<String> {
        let object = parse_object(line.trim_start_matches('\u{feff}').trim()).ok()?;
        object.get("custom_id").and_then(Value::as_str).map(str::to_owned)
    };
    let mut failed = HashSet::new();
    if let Some(errors) = lines("output.errors.jsonl")? {
        for line in errors.lines() {
            failed.extend(id(&line?));
        }
    }
    if failed.is_empty() {
        return Ok(0);
    }
    let mut out = BufWriter::new(File::create_new(to).with_context(|| to.display().to_string())?);
    let mut n_rows = 0;
    for line in batch_inputs::lines(&folder.join("input.jsonl"), input_at)?.lines() {
        let line = line?;
        if id(&line).is_some_and(|id| failed.contains(&id)) {
            writeln!(out, "{}", line.trim_start_matches('\u{feff}').trim())?;
            n_rows += 1;
        }
    }
    out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    Ok(n_rows)
}
