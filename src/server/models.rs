//! The models that are offered: `/v1/models` for both dialects at once, and who answers to a name. Invariant: models
//! with equal weights are in memory once, or not at all.

use super::App;
use super::body::JsonObject;
use super::errors::{ApiError, json_response};
use super::live::{AtWork, Faults, LiveModel, Shared};
use super::prices::Prices;
use super::residency::{Absent, Lease, Residency, Shown, Wanted};
use super::room::Terms;
use super::windows::{Mode, Table, Window};
use crate::config::ModelConfig;
use crate::config::serve::{OfferedModel, ServeConfig};
use crate::window::AIM;
use anyhow::{Context as _, Result, ensure};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
}

/// All that are offered; at least one.
pub struct Models {
    offered: Vec<Arc<Offered>>,
    /// Which of them are in memory.
    pub residency: Arc<Residency>,
    faults: Arc<Faults>,
    windows: Table,
    /// Most time that a call waits for its model.
    load_wait: Duration,
}

/// A batch gives other models' work so much time before they must make room for its own.
const BATCH_PATIENCE: Duration = Duration::from_mins(10);
/// Loads that may fail, one after the other, before a background response does.
const MAX_FAILURES: u32 = 3;

impl Models {
    /// Opens what the configuration names, and loads what is to be there from the start.
    pub(super) fn load(config: &ServeConfig) -> Result<Self> {
        let mut offered: Vec<Arc<Offered>> = Vec::new();
        let mut known: Vec<(&ModelConfig, Arc<LiveModel>, Terms, Option<AtWork>)> = Vec::new();
        let (n_busy, faults) = (Arc::default(), Arc::new(Faults::new(None)));
        let mut memories = vec![("cpu".to_owned(), config.memory_bytes)];
        let shared = Shared { defaults: &config.defaults, limits: &config.limits, n_busy: &n_busy, faults: &faults };
        for next in &config.models {
            let model = &next.model;
            let live = if let Some((_, live, ..)) = known.iter().find(|(other, ..)| other.weights() == model.weights()) {
                Arc::clone(live)
            } else {
                let same: Vec<&OfferedModel> =
                    config.models.iter().filter(|other| other.model.weights() == model.weights()).collect();
                let names = same.iter().filter_map(|other| other.id.clone()).collect();
                let named = || format!("model {}", next.id.as_ref().unwrap_or(&model.name));
                let (live, open) = LiveModel::open(known.len(), model, names, &shared).with_context(named)?;
                let memory = memory_of(&mut memories, open.device_memory.as_ref(), live.n_bytes(), config);
                let is_loaded = same.iter().any(|other| other.is_loaded);
                let work = is_loaded.then(|| live.put(open)).transpose().with_context(named)?;
                // As long as any of its names wants it.
                let idle = same.iter().map(|other| other.idle_unload).collect::<Option<Vec<_>>>();
                let terms = Terms { bytes: live.n_bytes(), memory, idle: idle.and_then(|times| times.into_iter().max()) };
                let live = Arc::new(live);
                known.push((model, Arc::clone(&live), terms, work));
                live
            };
            let id = next.id.clone().unwrap_or_else(|| live.preparer.model.name.clone());
            ensure!(offered.iter().all(|other| other.id != id), "model.id: {id:?} is offered twice");
            let (windows, prices, open) = (next.windows.clone(), next.prices, Default::default());
            offered.push(Arc::new(Offered { id, windows, prices, live, created: now(), open }));
        }
        for (memory, (_, budget)) in memories.iter_mut().enumerate() {
            let loaded = known.iter().filter(|(_, _, terms, work)| terms.memory == memory && work.is_some());
            // What is there has its room: each was told how much is free.
            *budget = loaded.map(|(_, _, terms, _)| terms.bytes).sum::<u64>().max(*budget);
        }
        let models = known.into_iter().map(|(_, live, terms, work)| (live, terms, work)).collect();
        let residency = Residency::new(models, memories, config.limits.min_loaded);
        let (windows, load_wait) = (config.limits.windows.clone(), config.limits.load_wait);
        Ok(Self { offered, residency, faults, windows, load_wait })
    }

    /// The engine of a model, for a call whose caller waits.
    ///
    /// # Errors
    /// It can't be had in time.
    pub(super) async fn lend(&self, model: &Offered, window: Window) -> Result<Lease, ApiError> {
        let terms = self.windows.of(window.class());
        let limits = Some((terms.ceiling.unwrap_or(self.load_wait), self.load_wait));
        let due_in = self.patience(window, Duration::ZERO);
        let wanted = Wanted { due_in, limits, max_failures: Some(1), ask: None };
        self.residency.lease(model.live.number, wanted).await.map_err(|absent| absent.told(&model.id))
    }

    /// The engine of a model, for a background response that was accepted so long ago.
    ///
    /// # Errors
    /// It can't be loaded, or the server ends.
    pub(super) async fn lend_later(&self, model: &Offered, window: Window, accepted_ago: Duration) -> Result<Lease, Absent> {
        let due_in = self.patience(window, accepted_ago);
        let wanted = Wanted { due_in, limits: None, max_failures: Some(MAX_FAILURES), ask: None };
        self.residency.lease(model.live.number, wanted).await
    }

    /// The engine of a model, for a batch that has so much time left. `ask` is called when it should let go of it.
    ///
    /// # Errors
    /// The server ends.
    pub(super) async fn lend_to_batch(
        &self,
        model: &Offered,
        left: Duration,
        ask: Box<dyn Fn() + Send>,
    ) -> Result<Lease, Absent> {
        // A half of what is left is for its work.
        let due_in = BATCH_PATIENCE.min(left / 2);
        let wanted = Wanted { due_in, limits: None, max_failures: None, ask: Some(ask) };
        self.residency.lease(model.live.number, wanted).await
    }

    /// How long a call of a window may wait for its model while others are at work.
    fn patience(&self, window: Window, accepted_ago: Duration) -> Duration {
        let target = self.windows.of(window.class()).target;
        target.map_or(Duration::ZERO, |target| target.mul_f64(AIM)).saturating_sub(accepted_ago)
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
        let by_id = self.offered.iter().find(|model| model.id == name);
        by_id.or_else(|| self.offered.iter().find(|model| model.live.preparer.model.is_called(name)))
    }

    /// Every one.
    pub fn all(&self) -> &[Arc<Offered>] {
        &self.offered
    }

    /// Checks a window that is asked for before it is known of which model.
    ///
    /// # Errors
    /// None supports it.
    pub(super) fn check_window(&self, asked: &str) -> Result<(), ApiError> {
        let supports = |window: &&Window| self.offered.iter().any(|model| model.windows.contains(window));
        let supported: Vec<Window> = Window::ALL.iter().filter(supports).copied().collect();
        let names: Vec<&str> = self.offered.iter().map(|model| model.id.as_str()).collect();
        self.windows.resolve(Some(asked), Mode::Background, &names.join(", "), &supported).map(drop)
    }

    /// One of each whose weights are others than those of all before it.
    pub(super) fn distinct(&self) -> Vec<&Offered> {
        let is_first = |i: usize| self.offered[..i].iter().all(|other| !Arc::ptr_eq(&other.live, &self.offered[i].live));
        (0..self.offered.len()).filter(|&i| is_first(i)).map(|i| &*self.offered[i]).collect()
    }

    /// Returns when any engine has failed.
    pub(super) async fn any_failed(&self) {
        // An error would mean that the sender is gone, which is held here.
        drop(self.faults.subscribe().wait_for(Option::is_some).await);
    }

    /// A model whose engine has failed.
    pub(super) fn failed(&self) -> Option<String> {
        self.faults.borrow().clone()
    }

    /// A model's place in memory.
    pub(super) fn place(&self, model: &Offered) -> Shown {
        self.residency.shown(model.live.number)
    }
}

/// The memory that a model of so many bytes takes: the machine's, or that of a device with so much free when it is met first, of
/// which as much may be taken as the configuration says, or a tenth less than all.
fn memory_of(memories: &mut Vec<(String, u64)>, device: Option<&(String, u64)>, n_bytes: u64, config: &ServeConfig) -> usize {
    let Some((name, free)) = device else { return 0 };
    let at = memories.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
        let budget = if config.memory_is_given { config.memory_bytes.min(*free) } else { free / 10 * 9 };
        memories.push((name.clone(), budget));
        memories.len() - 1
    });
    // A model may be told to take more than what others may take together.
    memories[at].1 = memories[at].1.max(n_bytes);
    at
}

/// `POST /v1/embeddings`: no model here computes them.
pub(super) async fn embed(State(app): State<Arc<App>>, JsonObject(body): JsonObject) -> Result<Response, ApiError> {
    let model = app.models.named(&body)?;
    let message = format!("model {} has no embeddings: it completes chats and texts", model.id);
    Err(ApiError { param: Some("model".into()), ..ApiError::new(StatusCode::BAD_REQUEST, Some("unsupported_value"), message) })
}

fn unknown(name: &str) -> ApiError {
    let message = format!("the model {name:?} is not offered here; GET /v1/models lists those that are");
    ApiError { param: Some("model".into()), ..ApiError::new(StatusCode::NOT_FOUND, Some("model_not_found"), message) }
}

/// Unix seconds.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Unix milliseconds.
pub(super) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
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
    fn shown(&self, app: &App) -> Value {
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
            "state": app.models.place(self).state,
        });
        let pricing = self.prices.shown(&self.windows, &app.books.currency);
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
        "data": models.iter().map(|model| model.shown(&app)).collect::<Vec<_>>(),
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
    Ok(json_response(&model.shown(&app)))
}
