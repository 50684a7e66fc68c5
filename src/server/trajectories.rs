//! Trajectories: calls that are turns of one conversation. What a call says of the one that it belongs to, how long its KV is
//! kept for the next turn, how much time the turns before have left it; and `GET /v1/trajectories`, what the turns came to.
//! Invariant: nobody finds, counts or sees another key's.

use super::App;
use super::auth::Owner;
use super::errors::{ApiError, json_response};
use super::log::say;
use super::models::now_ms;
use super::paging::{Page, Pairs};
use super::prices::Amount;
use super::windows::Window;
use crate::engine::Keep;
use crate::store::trajectories::{self, Trajectory};
use crate::window::{AIM, Class};
use anyhow::{Result, ensure};
use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Longest name, in characters.
const MAX_NAME_CHARS: usize = 512;
/// What nobody has said to belong to a conversation, but may be followed by its id, is kept for such a part of the time.
const UNNAMED_PART: u32 = 4;

/// `[trajectories]` of `valar.toml`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrajectoriesSpec {
    keep_percent: u8,
    keep_s: u64,
}

/// Longest time that anything is kept: 30 days.
const MAX_KEEP_S: u64 = 30 * 86_400;

impl Default for TrajectoriesSpec {
    fn default() -> Self {
        Self { keep_percent: 50, keep_s: 600 }
    }
}

impl TrajectoriesSpec {
    /// Percent of the KV cache that may be kept between turns, and how long.
    ///
    /// # Errors
    /// What makes no sense, by its name.
    pub fn checked(self) -> Result<(u8, Duration)> {
        let Self { keep_percent, keep_s } = self;
        ensure!(keep_percent <= 100, "keep_percent: {keep_percent} is over 100");
        ensure!(keep_s <= MAX_KEEP_S, "keep_s: {keep_s} is over {MAX_KEEP_S}");
        Ok((keep_percent, Duration::from_secs(if keep_percent > 0 { keep_s } else { 0 })))
    }
}

/// What a call is a turn of.
#[derive(Debug, Clone, Default)]
pub struct Turn {
    /// The trajectory that its caller named.
    name: Option<String>,
    /// Whether others may follow it by its id.
    is_stored: bool,
    /// Milliseconds that the turns before were done early, or, below 0, late.
    credit_ms: i64,
}

/// The name that a body gives, or that of an answer.
fn named(body: &Map<String, Value>) -> Option<String> {
    let of_metadata = body.get("metadata").and_then(|metadata| metadata.get("trajectory_id"));
    let names = of_metadata.into_iter().chain(body.get("prompt_cache_key")).filter_map(Value::as_str);
    let mut fitting = names.filter(|name| (1..=MAX_NAME_CHARS).contains(&name.chars().count()));
    fitting.next().map(str::to_owned)
}

/// The name that a response's followers inherit.
pub(super) fn inherited(response: &Value) -> Option<String> {
    named(response.as_object()?)
}

impl Turn {
    /// Of a call with this body, which goes on with what is called `follows`, and may be followed if it `is_stored`.
    pub fn of(body: &Map<String, Value>, follows: Option<&str>, is_stored: bool) -> Self {
        Self { name: named(body).or_else(|| follows.map(str::to_owned)), is_stored, credit_ms: 0 }
    }

    /// With the time that the turns before have left it, where that matters.
    pub(super) async fn reckoned(mut self, app: &App, owner: &Owner, window: Window) -> Self {
        let target = app.windows.of(window.class()).target;
        let (Some(name), Some(target)) = (self.name.clone(), target.filter(|_| window.class() == Class::Standard)) else {
            return self;
        };
        let owner = owner.to_string();
        match app.store.read(move |connection| trajectories::get(connection, &owner, &name)).await {
            Ok(before) => self.credit_ms = before.map_or(0, |before| credit_ms(&before, target)),
            // It runs all the same, as if it were the first.
            Err(error) => say(&format!("the turns before a call: {error:#}")),
        }
        self
    }

    /// See the field.
    pub(super) fn credit_ms(&self) -> i64 {
        self.credit_ms
    }

    /// Whose KV it finds, and how long its own is kept.
    pub fn keep(&self, owner: &str, kept_for: Duration) -> Keep {
        let time = match (&self.name, self.is_stored) {
            (Some(_), _) => kept_for,
            (None, true) => kept_for / UNNAMED_PART,
            (None, false) => Duration::ZERO,
        };
        let hash = blake3::derive_key("valar owner of kept KV 1", owner.as_bytes());
        let (owner, _) = hash.split_first_chunk().expect("a hash has 32 bytes");
        Keep { owner: u64::from_le_bytes(*owner), for_ms: time.as_millis() as i64 }
    }

    /// What its entry in the ledger says of it; `object` is its answer's id.
    pub fn entry(&self, object: &str, accepted_ms: u64, window: Window) -> Option<trajectories::Turn> {
        // Whatever follows it by its id belongs to it.
        let id = self.name.clone().or_else(|| self.is_stored.then(|| object.to_owned()))?;
        let is_standard = window == Window::Standard;
        Some(trajectories::Turn { id, accepted_ms, ended_ms: now_ms(), is_standard })
    }
}

/// How much earlier than aimed at the turns of a trajectory were done that had the time of the standard window.
pub fn credit_ms(before: &Trajectory, target: Duration) -> i64 {
    let aimed = target.mul_f64(AIM).as_millis().saturating_mul(u128::from(before.n_standard));
    i64::try_from(aimed).unwrap_or(i64::MAX).saturating_sub(before.standard_ms as i64)
}

/// `GET /v1/trajectories`' answer for one.
pub(super) fn shown(found: &Trajectory) -> Value {
    json!({
        "id": found.id,
        "object": "trajectory",
        "began_at": found.began_ms / 1000,
        "ended_at": found.ended_ms / 1000,
        "wall_seconds": found.ended_ms.saturating_sub(found.began_ms) as f64 / 1e3,
        "turns": found.n_turns,
        "turn_seconds": found.turns_ms as f64 / 1e3,
        "input_tokens": found.input_tokens,
        "cached_tokens": found.cached_tokens,
        "cached_share": found.cached_tokens as f64 / found.input_tokens.max(1) as f64,
        "output_tokens": found.output_tokens,
        "charge": Amount(found.charge).to_string(),
    })
}

fn not_found(id: &str) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, Some("trajectory_not_found"), format!("No trajectory with id '{id}'."))
}

/// `GET /v1/trajectories/{id}`
pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Ok(Path(id)) = id else { return Err(not_found("")) };
    let (owner, name) = (owner.to_string(), id.clone());
    let found = app.store.read(move |connection| trajectories::get(connection, &owner, &name)).await?;
    Ok(json_response(&shown(&found.ok_or_else(|| not_found(&id))?)))
}

/// `GET /v1/trajectories`: those first whose last turn ended last.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(owner): Extension<Owner>,
    query: Pairs,
) -> Result<Response, ApiError> {
    let Page { after, limit, .. } = Page::of(&query, (20, 100))?;
    let owner = owner.to_string();
    let found = app.store.read(move |connection| {
        if let Some(id) = after.as_ref()
            && trajectories::get(connection, &owner, id)?.is_none()
        {
            return Ok(Err(not_found(id)));
        }
        trajectories::list(connection, &owner, after.as_deref(), limit + 1).map(Ok)
    });
    let mut found = found.await??;
    let has_more = found.len() > limit;
    found.truncate(limit);
    let data: Vec<Value> = found.iter().map(shown).collect();
    Ok(json_response(&json!({"object": "list", "data": data, "has_more": has_more})))
}

/// Trajectories that are forgotten at a time.
const AT_A_TIME: usize = 256;

/// Forgets trajectories that are older than that.
pub(super) async fn forget_old(app: &App, retention: Duration) -> Result<()> {
    let before = now_ms().saturating_sub(retention.as_millis() as u64);
    let forget = || app.store.write(move |connection| trajectories::forget_before(connection, before, AT_A_TIME));
    while forget().await? == AT_A_TIME {}
    Ok(())
}
