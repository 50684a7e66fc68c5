//! From the first connection to the last: while models are loaded and when the server ends, whoever comes is told to come again.
//! Invariant: what was told of a call is charged, also of one that is cut off at the end.

use super::App;
use super::errors::{ApiError, Dialect, json_response};
use super::http::Server;
use super::log::say;
use super::models::now;
use super::{deliveries, files, ids, once, trajectories};
use crate::config::serve::ServeConfig;
use crate::store::responses;
use anyhow::{Result, bail};
use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use axum::routing::get;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How often it is looked whether all have ended.
const PAUSING: Duration = Duration::from_millis(20);
/// How often what is old is looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// How long the last charges may take.
const CHARGING: Duration = Duration::from_secs(10);
/// Responses that are forgotten at a time.
const AT_A_TIME: usize = 256;

/// What connections get while no call can be taken: the server is there, and calls come too early or too late.
pub(super) fn away(why: fn() -> ApiError) -> Router {
    let refuse = move |request: Request| async move {
        let dialect = Dialect::of(request.uri().path(), request.headers());
        let id = ids::new("req_");
        let response = why().response(dialect, &id);
        let id = HeaderValue::try_from(id).ok();
        with(with(response, "x-request-id", id.clone()), "request-id", id)
    };
    let alive = || async { last(json_response(&json!({"status": "ok"}))) };
    Router::new().route("/health", get(alive)).fallback(move |request: Request| async move { last(refuse(request).await) })
}

fn with(mut response: Response, name: &'static str, value: Option<HeaderValue>) -> Response {
    if let Some(value) = value {
        response.headers_mut().insert(name, value);
    }
    response
}

/// The last answer of its connection: the next one may get more.
fn last(response: Response) -> Response {
    with(response, header::CONNECTION.as_str(), Some(HeaderValue::from_static("close")))
}

/// Serves until a signal, or until an engine ends.
pub(super) async fn run(server: &Server, app: Arc<App>, (config, address): (&ServeConfig, &str)) -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    say(&format!("listening on {}://{address}", if config.tls.is_some() { "https" } else { "http" }));
    let mut any_signal = async || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::select! {
        () = app.models.any_failed() => return Ok(()),
        () = app.store.ended() => bail!("a thread of the database failed"),
        () = any_signal() => {}
    }
    app.is_draining.store(true, Relaxed);
    // It goes on at the next start.
    app.background.close_all();
    app.batches.pause_all();
    app.models.residency.close();
    say("finishing what runs; a second signal ends it at once");
    if let Some(connections) = server.drain(away(ApiError::draining)) {
        tokio::select! {
            () = connections.shutdown() => {}
            () = tokio::time::sleep(config.limits.drain) => say("some calls had not finished"),
            () = any_signal() => {}
            () = app.models.any_failed() => {}
        }
    }
    // Who is cut off has had what was told until now.
    server.cut();
    let charged = wait_until(|| app.connections.load(SeqCst) == 0 && app.n_charging.load(SeqCst) == 0);
    if tokio::time::timeout(CHARGING, charged).await.is_err() {
        say("warning: some calls that were cut off are not charged");
    }
    // What batches have computed is put into their journals.
    tokio::select! {
        () = wait_until(|| app.batches.n_open() == 0) => {}
        () = tokio::time::sleep(config.limits.drain) => say("some batches had not paused"),
        () = any_signal() => {}
        () = app.models.any_failed() => {}
    }
    Ok(())
}

async fn wait_until(is_so: impl Fn() -> bool) {
    while !is_so() {
        tokio::time::sleep(PAUSING).await;
    }
}

/// Forgets responses that are older than that.
async fn forget_responses(app: &App, retention: Duration) -> Result<()> {
    let before = now().saturating_sub(retention.as_secs());
    // In small bites, between which others get to write.
    while app.store.write(move |connection| responses::forget_before(connection, before, AT_A_TIME)).await? == AT_A_TIME {}
    Ok(())
}

/// Removes what is too old, until the server ends.
pub(super) async fn sweep(app: Arc<App>, retention: Duration) {
    while !app.is_draining() {
        let (told, keys) = (deliveries::forget_old(&app, retention).await, once::forget_old(&app).await);
        let trajectories = trajectories::forget_old(&app, retention).await;
        for swept in [files::expire(&app).await, forget_responses(&app, retention).await, trajectories, told, keys] {
            if let Err(error) = swept {
                say(&format!("removing what is old: {error:#}"));
            }
        }
        tokio::time::sleep(SWEEP_EVERY).await;
    }
}
