//! `valar serve`: the engine over HTTP, in the forms of `OpenAI` and Anthropic. Each dialect has a file of its own, which
//! alone knows its field names; what a call comes to is `live`'s, and the same for all. Invariants: a request that is
//! accepted is answered, or its caller is gone; the same request has the same bits as through `valar run`.

mod auth;
pub mod background;
pub mod backlog;
mod batch_accept;
mod batch_bodies;
mod batch_ends;
mod batch_inputs;
pub mod batch_open;
mod batch_retry;
mod batch_runs;
mod batch_tokens;
mod batch_tries;
mod batches;
mod body;
pub mod books;
pub mod budgets;
pub mod call;
mod chat;
mod completion_webhook;
mod completions;
mod conversation;
pub mod deliveries;
pub mod errors;
mod fair;
mod file_references;
mod files;
pub mod flow;
mod http;
pub mod ids;
mod lifetime;
pub mod limits;
pub mod live;
mod log;
mod message_batches;
mod messages;
mod metrics;
pub mod models;
pub mod observed;
pub mod once;
mod openapi;
mod pace;
mod page;
mod paging;
mod places;
pub mod prices;
mod receiving;
pub mod residency;
pub mod response_events;
pub mod responses;
pub mod room;
mod shown;
mod spans;
mod sse;
mod stalled;
mod status;
mod stored;
mod tls;
mod tokens;
mod traces;
pub mod trajectories;
pub mod usage;
mod webhooks;
pub mod windows;

use crate::config::serve::{LogFormat, ServeConfig};
use crate::pipeline::progress::say_as_json;
use crate::pipeline::referenced::Places;
use crate::request::Params;
use crate::store::Store;
use anyhow::{Context, Result, bail};
use auth::{Keys, Owner};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state, map_request_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use background::Background;
use batch_open::Batches;
use books::Books;
use deliveries::Deliveries;
use errors::{ApiError, Dialect, json_response};
use metrics::Counters;
use models::Models;
use once::Once;
use serde_json::json;
use status::Asked;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use traces::Traces;

/// Answers at a time that have a thread of their own.
const MAX_READERS: usize = 64;
/// Longest body that holds a batch's requests, where files may be longer.
const MAX_BATCH_BODY: usize = 256 << 20;

/// What all requests share.
pub struct App {
    /// What is offered.
    pub models: Models,
    /// Who may call.
    keys: Keys,
    /// Sampling parameters where a request says nothing.
    pub defaults: Params,
    counters: Counters,
    traces: Traces,
    max_body_bytes: usize,
    body_timeout: Duration,
    /// What lasts.
    pub store: Store,
    /// Responses that are fetched later.
    pub background: Background,
    /// Batches that have not ended.
    pub batches: Batches,
    /// What is told to webhooks.
    pub deliveries: Deliveries,
    books: Books,
    once: Once,
    /// What went wrong of late.
    errors: status::Errors,
    /// For answers that have a thread of their own: those who read slowly must not hold all threads.
    readers: Arc<Semaphore>,
    /// How many are open.
    connections: Arc<AtomicUsize>,
    /// Charges of calls that were broken off, on their way to the ledger.
    n_charging: AtomicUsize,
    /// Unix seconds.
    started_at: u64,
    /// The data folder.
    pub data: PathBuf,
    max_file_bytes: u64,
    /// From where files may be taken by reference.
    places: Places,
    max_batch_rows: u64,
    windows: windows::Table,
    /// How long trajectories keep their KV after a turn.
    kept_for: Duration,
    /// Set by the first signal: new requests are sent away.
    is_draining: AtomicBool,
}

/// Serves until a signal.
///
/// # Errors
/// A model that can't be loaded, an address that can't be had, or an engine that fails.
pub fn serve(config: &ServeConfig) -> Result<()> {
    if config.log_format == LogFormat::Json {
        say_as_json();
    }
    let tls = config.tls.as_ref().map(tls::load).transpose()?;
    let traces = Traces::new(config.otlp_endpoint.as_deref())?;
    let data = config.data.display();
    std::fs::create_dir_all(&config.data).with_context(|| format!("cannot make the data folder {data}"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("http").build();
    let runtime = runtime.context("cannot start the threads that serve connections")?;
    runtime.block_on(async {
        // Before the models: a port that is taken is known at once.
        let (listener, address) = listen(config).await?;
        let connections = Arc::default();
        let server =
            Arc::new(http::Server::new(lifetime::away(ApiError::loading), &config.limits, tls, Arc::clone(&connections)));
        let accepting = Arc::clone(&server);
        tokio::spawn(async move { accepting.accept(listener).await });
        let store = Store::open(&config.data)?;
        let models = Models::load(config)?;
        let n_running = 2 * config.models.iter().map(|offered| offered.model.max_running).max().unwrap_or(1);
        let background = Background::new(&models, config.limits.max_background);
        let app = Arc::new(App {
            models,
            store,
            background,
            batches: Batches::default(),
            deliveries: Deliveries::new(config.limits.webhook_private_addresses)?,
            books: Books::new(config.hour_price, config.currency.clone()),
            data: config.data.clone(),
            max_file_bytes: config.limits.max_file_bytes,
            places: config.places.clone(),
            max_batch_rows: config.limits.max_batch_rows,
            windows: config.limits.windows.clone(),
            kept_for: config.limits.kept_for,
            keys: Keys::new(&config.keys, config.limits.rates, &config.currency),
            once: Once::default(),
            errors: status::Errors::default(),
            readers: Arc::new(Semaphore::new(MAX_READERS)),
            connections,
            n_charging: AtomicUsize::new(0),
            started_at: models::now(),
            defaults: config.defaults.clone(),
            counters: Counters::default(),
            traces,
            max_body_bytes: config.limits.max_body_bytes,
            body_timeout: config.limits.body_timeout,
            is_draining: AtomicBool::new(false),
        });
        files::sweep(&app).await?;
        background::start(&app, n_running).await?;
        batch_runs::start(&app).await?;
        tokio::spawn(Arc::clone(&app.models.residency).run());
        tokio::spawn(deliveries::run(Arc::clone(&app)));
        tokio::spawn(books::run(Arc::clone(&app)));
        tokio::spawn(lifetime::sweep(Arc::clone(&app), config.limits.retention));
        server.serve(router(Arc::clone(&app)));
        let ended = lifetime::run(&server, Arc::clone(&app), (config, &address)).await;
        let ((), read) = tokio::join!(app.traces.flush(), app.read_meters());
        read?;
        if let Some(id) = app.models.failed() {
            app.store.write(crate::store::responses::note_fault).await?;
            bail!("the engine of {id} failed");
        }
        ended
    })?;
    // Threads that still prepare prompts need not be waited for.
    runtime.shutdown_background();
    Ok(())
}

/// Listens; and where.
async fn listen(config: &ServeConfig) -> Result<(TcpListener, String)> {
    let listener = TcpListener::bind((config.host.as_str(), config.port)).await;
    let listener = listener.with_context(|| format!("cannot listen on {}:{}", config.host, config.port))?;
    let address = listener.local_addr().context("an address that is bound is known")?.to_string();
    Ok((listener, address))
}

/// All routes.
fn router(app: Arc<App>) -> Router {
    let front = from_fn_with_state(Arc::clone(&app), front);
    let paced = map_request_with_state(Arc::clone(&app), body::paced);
    Router::new()
        .route("/", get(page::show))
        .route("/openapi.json", get(openapi::show))
        .route("/health", get(async || json_response(&json!({"status": "ok"}))))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics::show))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(models::embed))
        .route("/v1/responses", post(responses::create).get(stored::list))
        .route("/v1/responses/wait", post(stored::wait))
        .route("/v1/responses/input_tokens", post(responses::input_tokens))
        .route("/v1/responses/{id}", get(stored::retrieve).delete(stored::delete))
        .route("/v1/responses/{id}/cancel", post(stored::cancel))
        .route("/v1/responses/{id}/input_items", get(stored::input_items))
        // Its own limit stands in `files`.
        .route("/v1/files", post(files::create).layer(DefaultBodyLimit::disable()).layer(paced).get(files::list))
        .route("/v1/files/{id}", get(files::retrieve).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/batches", post(batches::create).get(batches::list))
        .route("/v1/batches/{id}", get(batches::retrieve))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
        .route("/v1/batches/{id}/retry", post(batch_retry::create))
        .route("/v1/batches/{id}/{custom_id}", get(batches::result))
        .route("/v1/webhook_endpoints", post(webhooks::create).get(webhooks::list))
        .route("/v1/webhook_endpoints/{id}", get(webhooks::retrieve).post(webhooks::update).delete(webhooks::delete))
        .route("/v1/webhook_endpoints/{id}/rotate_secret", post(webhooks::rotate_secret))
        .route("/v1/webhook_endpoints/{id}/test", post(webhooks::test))
        .route("/v1/webhook_endpoints/{id}/redeliver", post(webhooks::redeliver))
        .route("/v1/webhook_event_types", get(webhooks::event_types_list))
        .route("/v1/usage", get(usage::show))
        .route("/v1/trajectories", get(trajectories::list))
        .route("/v1/trajectories/{id}", get(trajectories::retrieve))
        .route("/v1/status", get(status::show))
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .merge(message_batches::routes("/v1/messages/batches"))
        // Clients that add `/v1` themselves, given a base that has it.
        .route("/v1/v1/messages", post(messages::create))
        .route("/v1/v1/messages/count_tokens", post(messages::count_tokens))
        .merge(message_batches::routes("/v1/v1/messages/batches"))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::info))
        .fallback(async |request: Request| {
            let message = format!("unknown URL: {} {}", request.method(), request.uri().path());
            ApiError::new(StatusCode::NOT_FOUND, Some("unknown_url"), message)
        })
        .method_not_allowed_fallback(async |request: Request| {
            let message = format!("{} is not allowed for {}", request.method(), request.uri().path());
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
        })
        .layer(front)
        .with_state(app)
}

/// Whether new requests are taken.
async fn ready(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    if app.is_draining.load(Relaxed) {
        return Err(ApiError::draining());
    }
    // How many are where; who may not call need not know their names.
    let mut models = json!({"loaded": 0, "loading": 0, "unloading": 0, "unloaded": 0});
    for model in app.models.distinct() {
        let n = &mut models[app.models.place(model).state];
        *n = (n.as_u64().unwrap_or_default() + 1).into();
    }
    Ok(json_response(&json!({"status": "ready", "models": models})))
}

/// What counts as a request where requests are limited: what makes the model work at once.
const LIMITED: [&str; 5] = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/v1/messages"];

/// What anybody may ask for: what is no secret, and whether the server is there.
const UNLOCKED: [&str; 4] = ["/", "/openapi.json", "/health", "/ready"];

/// What every request passes through: its id, whether it may, and the form of its error.
async fn front(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (request_id, began) = (ids::new("req_"), Instant::now());
    let path = request.uri().path();
    let dialect = Dialect::of(path, request.headers());
    let asked = Asked { method: request.method().clone(), path: path.to_owned() };
    let spot = app.traces.request(&request, &request_id);
    let own = |owner: Owner| Some(owner.of_request(&request_id).at(spot.clone()));
    let allowed = if UNLOCKED.contains(&path) { Ok(None) } else { app.admit(&request).map(own) };
    let allowance = app.allowance_for(&allowed, request.method(), path);
    let caller = allowed.as_ref().ok().and_then(|owner| Some(owner.as_ref()?.to_string()));
    let answered = async {
        match allowed {
            Ok(Some(owner)) => once::through(&app, owner, request, next).await.unwrap_or_else(ApiError::into_response),
            Ok(None) => next.run(request).await,
            Err(error) => error.into_response(),
        }
    };
    let response = log::of_request(request_id.clone(), answered).await;
    let mut response = match response.extensions().get::<ApiError>() {
        None => response,
        Some(error) => {
            app.errors.note(caller.clone(), &asked, error, &request_id);
            let mut written = error.response(dialect, &request_id);
            if let Some(allow) = response.headers().get("allow") {
                written.headers_mut().insert("allow", allow.clone());
            }
            written
        }
    };
    if let Some(allowance) = allowance {
        allowance.tell(response.headers_mut());
    }
    app.counters.count(response.status().as_u16());
    let told = log::Told { id: &request_id, method: &asked.method, path: &asked.path, began };
    let caller = caller.map(|owner| app.keys.name(&owner));
    told.answered(response.status().as_u16(), caller.as_deref());
    spot.answered(response.status().as_u16(), caller.as_deref());
    if let Ok(id) = HeaderValue::try_from(request_id) {
        response.headers_mut().insert("x-request-id", id.clone());
        response.headers_mut().insert("request-id", id);
    }
    spot.until_sent(response)
}

impl App {
    /// A thread to send results from, while it is held.
    fn reader(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.readers).try_acquire_owned().map_err(|_| ApiError::busy())
    }

    /// Longest body that holds a batch's requests: as long as a file may be.
    fn batch_body_bytes(&self) -> usize {
        let file = usize::try_from(self.max_file_bytes).unwrap_or(usize::MAX);
        self.max_body_bytes.max(MAX_BATCH_BODY.min(file))
    }

    fn is_draining(&self) -> bool {
        self.is_draining.load(Relaxed)
    }

    /// What limits a request of that kind, if anything does.
    fn allowance_for(
        &self,
        owner: &Result<Option<Owner>, ApiError>,
        method: &Method,
        path: &str,
    ) -> Option<Arc<limits::Allowance>> {
        let owner = owner.as_ref().ok()?.as_ref()?;
        if *method == Method::POST && LIMITED.contains(&path) { self.keys.allowance(owner).cloned() } else { None }
    }

    /// Takes a request from what its owner may ask for.
    fn take_request(&self, owner: &Owner, method: &Method, path: &str) -> Result<(), ApiError> {
        let allowance = self.allowance_for(&Ok(Some(owner.clone())), method, path);
        allowance.map_or(Ok(()), |allowance| allowance.take_request())
    }

    fn admit(&self, request: &Request) -> Result<Owner, ApiError> {
        let owner = self.keys.check(request.headers())?;
        if self.is_draining.load(Relaxed) { Err(ApiError::draining()) } else { Ok(owner) }
    }
}
