//! The models that are offered: `/v1/models` for both dialects at once, and who answers to a name. Invariant: models
//! with equal weights are in memory once.

use super::App;
use super::errors::{ApiError, json_response};
use super::live::LiveModel;
use super::prices::Prices;
use super::windows::{self, Mode, Window};
use crate::config::ModelConfig;
use crate::config::serve::ServeConfig;
use anyhow::{Result, ensure};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

/// A model under its public name.
pub struct Offered {
    /// The name.
    pub id: String,
    /// Windows that it may be asked for, at least one.
    pub windows: Vec<Window>,
    /// What it costs.
    pub prices: Prices,
    /// What answers.
    pub live: Arc<LiveModel>,
    /// Unix seconds of the start.
    created: u64,
    /// By window: calls that have not ended.
    open: [AtomicUsize; Window::ALL.len()],
    /// Set when the engine has ended, which is a fault.
    has_ended: AtomicBool,
}

/// All that are offered; at least one.
pub struct Models(Vec<Arc<Offered>>);

impl Models {
    /// Loads what the configuration names.
    pub(super) fn load(config: &ServeConfig) -> Result<Self> {
        let mut offered: Vec<Arc<Offered>> = Vec::new();
        let mut loaded: Vec<(&ModelConfig, Arc<LiveModel>)> = Vec::new();
        let n_busy = Arc::default();
        for next in &config.models {
            let model = &next.model;
            let key = |model: &ModelConfig| {
                let ModelConfig { name, device, numerics, chat_template, .. } = model.clone();
                (name, device, numerics, chat_template)
            };
            let known = loaded.iter().find(|(other, _)| key(other) == key(model));
            let live = if let Some((_, live)) = known {
                Arc::clone(live)
            } else {
                let same = config.models.iter().filter(|other| key(&other.model) == key(model));
                let names = same.filter_map(|other| other.id.clone()).collect();
                let live =
                    Arc::new(LiveModel::start(model, names, config.defaults.clone(), &config.limits, Arc::clone(&n_busy))?);
                loaded.push((model, Arc::clone(&live)));
                live
            };
            let id = next.id.clone().unwrap_or_else(|| live.preparer.model.name.clone());
            ensure!(offered.iter().all(|other| other.id != id), "model.id: {id:?} is offered twice");
            let (windows, prices, open, has_ended) =
                (next.windows.clone(), next.prices, Default::default(), AtomicBool::new(false));
            offered.push(Arc::new(Offered { id, windows, prices, live, created: now(), open, has_ended }));
        }
        Ok(Self(offered))
    }

    /// The model that a body asks for.
    ///
    /// # Errors
    /// It names none (400), or one that is not offered (404).
    pub fn named(&self, body: &Map<String, Value>) -> Result<&Arc<Offered>, ApiError> {
        match body.get("model") {
            None | Some(Value::Null) => Err(ApiError::missing("model")),
            Some(Value::String(name)) => self.find(name).ok_or_else(|| unknown(name)),
            Some(other) => Err(ApiError::invalid_type("model", "a string", other)),
        }
    }

    /// By its public name, or by any other that its weights are known by.
    pub fn find(&self, name: &str) -> Option<&Arc<Offered>> {
        let by_id = self.0.iter().find(|model| model.id == name);
        by_id.or_else(|| self.0.iter().find(|model| model.live.preparer.model.is_called(name)))
    }

    /// Every one.
    pub fn all(&self) -> &[Arc<Offered>] {
        &self.0
    }

    /// Checks a window that is asked for before it is known of which model.
    ///
    /// # Errors
    /// None supports it.
    pub(super) fn check_window(&self, asked: &str) -> Result<(), ApiError> {
        let supports = |window: &&Window| self.0.iter().any(|model| model.windows.contains(window));
        let supported: Vec<Window> = Window::ALL.iter().filter(supports).copied().collect();
        let names: Vec<&str> = self.0.iter().map(|model| model.id.as_str()).collect();
        windows::resolve(Some(asked), Mode::Background, &names.join(", "), &supported).map(drop)
    }

    /// One of each that is in memory.
    pub(super) fn loaded(&self) -> Vec<&Offered> {
        let is_first = |i: usize| self.0[..i].iter().all(|other| !Arc::ptr_eq(&other.live, &self.0[i].live));
        (0..self.0.len()).filter(|&i| is_first(i)).map(|i| &*self.0[i]).collect()
    }

    /// Returns when the engine of any has ended.
    pub(super) async fn any_ended(&self) {
        let mut ends = tokio::task::JoinSet::new();
        for model in &self.0 {
            let model = Arc::clone(model);
            ends.spawn(async move {
                model.live.ended().await;
                model.has_ended.store(true, Relaxed);
            });
        }
        ends.join_next().await;
    }

    /// Whether any engine has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.0.iter().any(|model| model.live.has_ended())
    }

    /// A model whose engine has ended.
    pub(super) fn ended(&self) -> Option<&str> {
        self.0.iter().find(|model| model.has_ended.load(Relaxed)).map(|model| model.id.as_str())
    }
}

fn unknown(name: &str) -> ApiError {
    let message = format!("the model {name:?} is not offered here; GET /v1/models lists those that are");
    ApiError { param: Some("model".into()), ..ApiError::new(StatusCode::NOT_FOUND, Some("model_not_found"), message) }
}

/// Unix seconds.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A call that has not ended: counted as long as this is held.
pub(super) struct OpenCall {
    model: Arc<Offered>,
    window: Window,
}

impl OpenCall {
    pub(super) fn new(model: &Arc<Offered>, window: Window) -> Self {
        model.open[window as usize].fetch_add(1, Relaxed);
        Self { model: Arc::clone(model), window }
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.model.open[self.window as usize].fetch_sub(1, Relaxed);
    }
}

impl Offered {
    /// Calls of a window that have not ended.
    pub(super) fn n_open(&self, window: Window) -> usize {
        self.open[window as usize].load(Relaxed)
    }

    /// One object that both dialects' clients read.
    fn shown(&self, currency: &str) -> Value {
        let max_context = self.live.preparer.max_context;
        let mut shown = json!({
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "valar",
            "max_model_len": max_context,
            "supported_completion_windows": self.windows.iter().map(|window| window.as_str()).collect::<Vec<_>>(),
            "type": "model",
            "display_name": self.id,
            "created_at": rfc3339(self.created),
            "lifecycle": "active",
            "max_input_tokens": max_context,
            "max_tokens": max_context,
        });
        let pricing = self.prices.shown(&self.windows, currency);
        if !pricing.is_null() {
            shown["pricing"] = pricing;
        }
        shown
    }
}

/// `2026-11-22T10:00:00Z`
pub(super) fn rfc3339(unix_s: u64) -> String {
    let date = chrono::DateTime::from_timestamp(unix_s as i64, 0).unwrap_or_default();
    date.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}

/// `GET /v1/models`
pub(super) async fn list(State(app): State<Arc<App>>) -> Response {
    let models = app.models.all();
    let id = |model: Option<&Arc<Offered>>| model.map(|model| model.id.clone());
    json_response(&json!({
        "object": "list",
        "data": models.iter().map(|model| model.shown(&app.books.currency)).collect::<Vec<_>>(),
        "has_more": false,
        "first_id": id(models.first()),
        "last_id": id(models.last()),
    }))
}

/// `GET /v1/models/{id…}`
pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(id) = path.map_err(|_| unknown(""))?;
    let model = app.models.find(&id).ok_or_else(|| unknown(&id))?;
    Ok(json_response(&model.shown(&app.books.currency)))
}
