//! `GET /v1/status`: what the server does just now, for people and their page. Counters are since the start. Invariant: a key
//! sees the errors of its own requests, an admin's all of them.

use super::App;
use super::auth::Owner;
use super::errors::{ApiError, json_response};
use super::models::{Models, now};
use super::windows::Window;
use crate::outcome::shortened;
use axum::Extension;
use axum::extract::State;
use axum::http::Method;
use axum::response::Response;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Errors that are remembered.
const N_ERRORS: usize = 100;
/// Most of them that are of somebody without a key: nobody may push out the others with requests that cost nothing.
const N_STRANGERS: usize = 10;
/// Longest path that is remembered, in characters.
const MAX_PATH_CHARS: usize = 200;

/// The last requests that were answered with an error.
#[derive(Debug, Default)]
pub(super) struct Errors(Mutex<VecDeque<Noted>>);

#[derive(Debug)]
struct Noted {
    /// Whose request it was; `None` of somebody without a key.
    owner: Option<String>,
    shown: Value,
}

/// A request as far as it is remembered: its query may hold what is nobody's business.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) method: Method,
    pub(super) path: String,
}

impl Errors {
    /// Remembers an answer that was an error.
    pub(super) fn note(&self, owner: Option<String>, asked: &Asked, error: &ApiError, request_id: &str) {
        let path: String = asked.path.chars().take(MAX_PATH_CHARS).collect();
        let shown = json!({
            "at": now(), "status": error.status.as_u16(), "code": error.code, "message": shortened(error.message.clone()),
            "method": asked.method.as_str(), "path": path, "request_id": request_id,
        });
        let mut errors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_strange = |noted: &Noted| noted.owner.is_none();
        if owner.is_none() && errors.iter().filter(|noted| is_strange(noted)).count() >= N_STRANGERS {
            // The newest are first.
            if let Some(oldest) = errors.iter().rposition(is_strange) {
                errors.remove(oldest);
            }
        }
        errors.truncate(N_ERRORS - 1);
        errors.push_front(Noted { owner, shown });
    }

    /// Those that an owner may see, or all; newest first.
    fn seen_by(&self, owner: Option<&str>) -> Vec<Value> {
        let errors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_seen = |noted: &&Noted| owner.is_none_or(|owner| noted.owner.as_deref() == Some(owner));
        errors.iter().filter(is_seen).map(|noted| noted.shown.clone()).collect()
    }
}

/// What every engine does; what went wrong with files in full, if the asker `sees_all`.
fn engines(models: &Models, sees_all: bool) -> Vec<Value> {
    let memories = models.residency.memories();
    let engines = models.distinct().into_iter().map(|first| {
        let place = models.place(first);
        let (stats, live) = (first.live.stats(), &first.live);
        let sharing: Vec<_> = models.all().iter().filter(|model| Arc::ptr_eq(&model.live, live)).collect();
        let windows = Window::ALL.into_iter().map(|window| {
            let n_open: usize = sharing.iter().map(|model| model.n_open(window)).sum();
            json!({"window": window.as_str(), "open": n_open, "waiting": live.n_queued(window.class())})
        });
        json!({
            "id": first.id,
            "models": sharing.iter().map(|model| model.id.as_str()).collect::<Vec<_>>(),
            "state": place.state,
            "memory_bytes": place.bytes,
            "device": memories[place.memory].0,
            "users": {"working": place.n_users, "waiting": place.n_waiting},
            "loads": {
                "loaded": place.counts.n_loads, "unloaded": place.counts.n_unloads, "failed": place.counts.n_failures,
                "error": if sees_all { place.counts.error } else { place.counts.error.map(|_| "it could not be loaded".into()) },
            },
            "windows": windows.collect::<Vec<_>>(),
            "sequences": {"running": stats.running, "waiting": stats.waiting},
            "kv_blocks": {"used": stats.blocks_used, "kept": stats.blocks_kept, "total": stats.blocks_total},
            "tokens": {"prefill": stats.prefill_tokens, "generated": stats.generated_tokens, "shared": stats.shared_tokens},
        })
    });
    engines.collect()
}

/// `GET /v1/status`
pub(super) async fn show(State(app): State<Arc<App>>, Extension(owner): Extension<Owner>) -> Response {
    let sees_all = app.keys.sees_all(&owner);
    let memories = app.models.residency.memories().into_iter();
    let memories = memories.map(|(device, budget, used)| json!({"device": device, "budget_bytes": budget, "used_bytes": used}));
    json_response(&json!({
        "object": "status",
        "version": env!("CARGO_PKG_VERSION"),
        "started_at": app.started_at,
        "memories": memories.collect::<Vec<_>>(),
        "engines": engines(&app.models, sees_all),
        "background_responses": app.background.n_open(),
        "batches": app.batches.n_open(),
        "errors": app.errors.seen_by((!sees_all).then_some(&*owner)),
    }))
}
