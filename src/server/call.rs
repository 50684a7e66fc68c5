//! What all calls to a model have in common: which model, which window, prompts, and the flow of what comes. Knows no
//! dialect's answer. Invariant: whatever can be wrong with a request is found before its answer begins.

use super::App;
use super::auth::Owner;
use super::backlog::Ticket;
use super::books::Bill;
use super::completion_webhook;
use super::errors::ApiError;
use super::flow::Flow;
use super::ids;
use super::limits::Held;
use super::live::{Place, Terms};
use super::models::{Offered, OpenCall, now, now_ms};
use super::once::Claim;
use super::residency::Lease;
use super::spans::CallTrace;
use super::trajectories::Turn;
use super::windows::{self, Mode, Window};
use crate::format::openai::answer::{self, Stamp};
use crate::format::openai::{Endpoint, parse_body};
use crate::outcome::{Completion, ErrorCode, RowError};
use crate::prepare::Prompt;
use crate::text::tokenizer::Tokenizer;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A call that runs.
pub struct Call {
    /// Who answers.
    pub model: Arc<Offered>,
    /// What it is billed as and scheduled by.
    pub window: Window,
    /// The end of its ids.
    pub id: String,
    /// What its answer is stamped with.
    pub stamp: Stamp,
    /// What the answer repeats of the request (Responses only).
    pub echo: Option<Box<Value>>,
    /// What comes of it.
    pub flow: Flow,
    /// What it is charged to.
    pub bill: Arc<Bill>,
    /// Whether its caller gets it as it comes.
    pub is_streamed: bool,
    /// Whether its caller waits for all of it.
    pub(super) is_waited_for: bool,
    pub(super) app: Arc<App>,
    /// If its request may come again.
    pub(super) claim: Option<Arc<Claim>>,
    /// The id of its request, if it has one.
    pub(super) request: Option<Arc<str>>,
    /// How long ago it was accepted when it began.
    accepted_ago: Duration,
    began: Instant,
    /// What will be told of it, if it is traced.
    pub(super) trace: Option<Box<CallTrace>>,
    /// Counts it as open.
    _open: OpenCall,
}

impl Call {
    /// Checks a request and starts it, as that turn. `body` holds only what the dialect's parser knows.
    ///
    /// # Errors
    /// What is wrong with it, or that too many calls wait.
    pub(super) async fn start(
        app: &Arc<App>,
        owner: &Owner,
        endpoint: Endpoint,
        body: &Map<String, Value>,
        turn: Turn,
    ) -> Result<Self, ApiError> {
        Self::start_as(app, owner, endpoint, body, (turn, &Identity::new())).await
    }

    /// As [`Call::start`], with that identity.
    ///
    /// # Errors
    /// What is wrong with it, or that too many calls wait.
    pub(super) async fn start_as(
        app: &Arc<App>,
        owner: &Owner,
        endpoint: Endpoint,
        body: &Map<String, Value>,
        (turn, identity): (Turn, &Identity),
    ) -> Result<Self, ApiError> {
        let asked = Asked { mode: Mode::Foreground, window: None };
        completion_webhook::asked(app, owner, windows::metadata(body)?, asked.mode)?;
        let mut prepared = Self::prepare(app, endpoint, body, asked).await?;
        owner.spot.wants(&prepared);
        prepared.turn = turn.reckoned(app, owner, prepared.window).await;
        Self::submit((app, owner), &prepared, identity).await
    }

    /// Starts prompts that are prepared, once their model is in memory.
    ///
    /// # Errors
    /// Too many calls wait, its owner has asked for too much, or its model can't be had in time.
    pub(super) async fn submit(
        (app, owner): (&Arc<App>, &Owner),
        prepared: &Prepared,
        identity: &Identity,
    ) -> Result<Self, ApiError> {
        let ticket = prepared.admit(app)?;
        prepared.check_size()?;
        let mut held = prepared.hold(app, owner).await?;
        let place = prepared.queue()?;
        let lease = app.models.lend(&prepared.model, prepared.window).await?;
        let mut call = Self::submit_held((app, owner), prepared, identity, (&mut Some(ticket), &mut held), (lease, place));
        call.is_waited_for = true;
        Ok(call)
    }

    /// Starts prompts whose model is in memory, and which have a place there; what they may come to was taken from what their
    /// owner may ask for, or need not be.
    pub(super) fn submit_held(
        (app, owner): (&Arc<App>, &Owner),
        prepared: &Prepared,
        identity: &Identity,
        (ticket, held): (&mut Option<Ticket>, &mut Option<Held>),
        at: (Lease, Place),
    ) -> Self {
        let Prepared { model, window, prompts, echo, id_prefix, turn } = prepared;
        let loading = at.0.loading;
        // At the same time: the engine may begin before the call is put together.
        let (accepted_ago, began) = (identity.accepted_ago(), Instant::now());
        let terms = Terms {
            class: window.class(),
            accepted_ago,
            credit_ms: turn.credit_ms(),
            seed: identity.seed,
            keep: turn.keep(owner, app.kept_for),
            share: app.keys.share(owner),
        };
        let flow = model.live.submit(at, prompts, terms);
        flow.count_as(ticket.take());
        let (model, stamp) = (Arc::clone(model), identity.stamp(model));
        let n_prompt: usize = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let object = format!("{id_prefix}{}", identity.id);
        let trace = CallTrace::new(&owner.spot, prepared, object.clone(), loading);
        let turn = turn.entry(&object, identity.accepted_ms, *window);
        let bill = Arc::new(Bill::new((app, owner), (&*model, *window), (object, n_prompt as u64, turn), held.take()));
        let (claim, request) = (owner.claim.clone(), owner.request.clone());
        let (id, echo, app) = (identity.id.clone(), echo.clone(), Arc::clone(app));
        let counted = OpenCall::new(&model, *window);
        Self {
            model,
            window: *window,
            id,
            stamp,
            echo,
            flow,
            bill,
            is_streamed: false,
            is_waited_for: false,
            app,
            claim,
            request,
            accepted_ago,
            began,
            trace,
            _open: counted,
        }
    }

    /// Time since it was accepted.
    pub(super) fn elapsed(&self) -> Duration {
        self.accepted_ago + self.began.elapsed()
    }

    /// What a request's prompts are counted as; nothing is run.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn count(app: &App, endpoint: Endpoint, body: &Map<String, Value>) -> Result<usize, ApiError> {
        let asked = Asked { mode: Mode::Foreground, window: None };
        let Prepared { prompts, .. } = Self::prepare(app, endpoint, body, asked).await?;
        Ok(prompts.iter().map(|prompt| prompt.tokens.len()).sum())
    }

    /// Checks a request; nothing is run.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn prepare(app: &App, endpoint: Endpoint, body: &Map<String, Value>, asked: Asked) -> Result<Prepared, ApiError> {
        let model = Arc::clone(app.models.named(body)?);
        let metadata = windows::metadata(body)?;
        let window = asked.window.map(Window::as_str).or_else(|| windows::asked(metadata));
        let window = app.windows.resolve(window, asked.mode, &model.id, &model.windows)?;
        let (mut request, echo) = parse_body(0, endpoint, body, &app.defaults)?;
        // The name is the server's matter, not the weights'.
        request.model = None;
        let prompts = model.live.prepare(request, endpoint).await.map_err(|error| named(error, endpoint, body))?;
        Ok(Prepared { model, window, prompts, echo, id_prefix: answer::id_prefix(endpoint), turn: Turn::default() })
    }

    /// What was told of it until now is charged if it is cancelled; so many of its tokens were thoughts.
    pub fn note_told(&self, n_thought: u64) {
        if let Some(usage) = self.flow.told() {
            self.bill.note((usage, n_thought), self.flow.machine_ns());
        }
    }

    /// It is whole: closes its bill, and writes what it costs into its usage.
    pub fn close(&self, completion: &Completion, usage: &mut Value) {
        self.trace.iter().for_each(|trace| trace.close(completion));
        if let Some(cost) = self.bill.close(completion.usage, self.flow.machine_ns()) {
            usage["cost"] = cost.to_string().into();
        }
    }

    /// Writes down what it came to, unless somebody has, with its answer, if that is one text.
    pub async fn settle(&self, answer: Option<&Value>) {
        if let Some(entry) = self.bill.take() {
            let kept = self.claim.clone().zip(answer.map(Value::to_string));
            self.app.charge(entry, kept).await;
        }
    }

    /// Of its model.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.model.live.preparer.tokenizer
    }

    /// Waits for all of it and writes the answer.
    ///
    /// # Errors
    /// The engine failed.
    pub async fn answer(mut self, endpoint: Endpoint) -> Result<Value, ApiError> {
        let tokenizer = Arc::clone(&self.model.live.preparer.tokenizer);
        let completion = self.flow.complete(&tokenizer).await?;
        let mut answer = self.stamp.answer(&self.id, endpoint, self.echo.as_deref(), &completion);
        self.close(&completion, &mut answer["usage"]);
        self.settle(Some(&answer)).await;
        Ok(answer)
    }
}

impl Prepared {
    /// Whether it can run at all.
    ///
    /// # Errors
    /// It asks for too many completions.
    pub(super) fn check_size(&self) -> Result<(), ApiError> {
        let n_sequences: usize = self.prompts.iter().map(|prompt| prompt.params.n as usize).sum();
        if n_sequences > MAX_SEQUENCES {
            let message = format!("at most {MAX_SEQUENCES} completions are allowed in one call, {n_sequences} asked for");
            return Err(ApiError::invalid_value("n", message));
        }
        Ok(())
    }

    /// A place among the calls that have not begun to run.
    ///
    /// # Errors
    /// Too many wait.
    pub(super) fn queue(&self) -> Result<Place, ApiError> {
        self.model.live.queue(self.window.class()).map_err(|_busy| ApiError::busy())
    }

    /// Counts it in as work to be done.
    ///
    /// # Errors
    /// Its window can't hold it now.
    pub(super) fn admit(&self, app: &App) -> Result<Ticket, ApiError> {
        let class = self.window.class();
        self.model.live.admit(&self.prompts, class).map_err(|full| {
            ApiError::over_capacity(self.window.as_str(), full, app.windows.of(class).ceiling.unwrap_or_default())
        })
    }
}

/// How a call is to be carried out.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Whether its caller waits.
    pub mode: Mode,
    /// The window, where it is not the body's to say.
    pub window: Option<Window>,
}

/// A request that can run.
pub struct Prepared {
    /// Who answers.
    pub model: Arc<Offered>,
    /// What it is billed as and scheduled by.
    pub window: Window,
    /// What is completed.
    pub prompts: Vec<Prompt>,
    /// What the answer repeats of the request (Responses only).
    pub echo: Option<Box<Value>>,
    /// What its answer's id begins with.
    pub id_prefix: &'static str,
    /// What it is a turn of; of nothing, until somebody says.
    pub turn: Turn,
}

impl Prepared {
    /// Takes what it may come to from what its owner may ask for, and be charged.
    ///
    /// # Errors
    /// There is nothing left of that.
    pub(super) async fn hold(&self, app: &App, owner: &Owner) -> Result<Option<Held>, ApiError> {
        let n_tokens = self.prompts.iter().map(Prompt::most_tokens).sum();
        let held = app.keys.allowance(owner).map(|allowance| allowance.hold(n_tokens)).transpose()?;
        let (Some(purse), Some(price)) = (app.keys.purse(owner), self.model.prices.of(self.window)) else { return Ok(held) };
        let n_input = self.prompts.iter().map(|prompt| prompt.tokens.len() as u64).sum();
        let cost = purse.hold(app, price.charge(n_input, 0, n_tokens.saturating_sub(n_input))).await?;
        Ok(held.map(|held| held.with_cost(cost)))
    }
}

/// What makes two runs of a request the same answer.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The end of its ids.
    pub id: String,
    /// Unix seconds.
    pub created: u64,
    /// Unix milliseconds: its request was accepted.
    pub accepted_ms: u64,
    /// What it draws with, where it names no seed.
    pub seed: u64,
}

impl Identity {
    /// A new one.
    #[expect(clippy::new_without_default, reason = "each is another")]
    pub fn new() -> Self {
        Self { id: ids::fresh(), created: now(), accepted_ms: now_ms(), seed: ids::seed() }
    }

    /// Time since it was accepted.
    pub fn accepted_ago(&self) -> Duration {
        Duration::from_millis(now_ms().saturating_sub(self.accepted_ms))
    }

    /// What the answer of a model is stamped with.
    pub fn stamp(&self, model: &Offered) -> Stamp {
        Stamp {
            job_fingerprint: String::new(),
            created: self.created,
            model: model.id.clone(),
            system_fingerprint: model.live.fingerprint.clone(),
        }
    }
}

/// Most completions of one call.
const MAX_SEQUENCES: usize = 1024;

/// What a limit on the tokens to generate may be called.
const LIMITS: [&str; 3] = ["max_output_tokens", "max_completion_tokens", "max_tokens"];

/// Where a format may stand in a body.
const FORMATS: [&str; 10] = [
    "response_format",
    "regex",
    "grammar",
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "guided_choice",
    "structured_outputs",
    "text",
    "output_config",
];

/// An error of preparing, its field as this body has it.
pub fn named(error: RowError, endpoint: Endpoint, body: &Map<String, Value>) -> ApiError {
    let is_given = |key: &str| body.get(key).is_some_and(|value| !value.is_null());
    let is_format = error.field.as_deref() == Some("body.response_format");
    let field = match (error.code, &error.field) {
        (_, Some(_)) if is_format => FORMATS.into_iter().find(|key| is_given(key)),
        (ErrorCode::TemplateError, None) if is_given("continue_final_message") => Some("continue_final_message"),
        (ErrorCode::TemplateError, None) => Some(if endpoint == Endpoint::Responses { "input" } else { "messages" }),
        (_, Some(field)) if field == "body.max_tokens" => LIMITS.into_iter().find(|key| is_given(key)),
        _ => None,
    };
    let error = ApiError::from(error);
    let Some(field) = field else { return error };
    let message = error.message.strip_prefix("response_format: ").unwrap_or(&error.message);
    ApiError { message: format!("{field}: {message}"), param: Some(field.to_owned()), ..error }
}

/// How an answer is sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Streaming {
    /// As events.
    pub is_on: bool,
    /// With the usage at the end (chat and text completions).
    pub include_usage: bool,
}

impl Streaming {
    /// Takes `stream` and `stream_options` out of a body.
    ///
    /// # Errors
    /// One is of the wrong type.
    pub fn take(body: &mut Map<String, Value>) -> Result<Self, ApiError> {
        let is_on = take_bool(body, "stream")?.unwrap_or(false);
        let mut options = match body.remove("stream_options") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(options)) => options,
            Some(other) => return Err(ApiError::invalid_type("stream_options", "an object", &other)),
        };
        let include_usage = match options.remove("include_usage") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(value)) => value,
            Some(other) => return Err(ApiError::invalid_type("stream_options.include_usage", "true or false", &other)),
        };
        Ok(Self { is_on, include_usage })
    }
}

/// Takes a field that is true, false or absent out of a body.
///
/// # Errors
/// It is something else.
pub fn take_bool(body: &mut Map<String, Value>, key: &str) -> Result<Option<bool>, ApiError> {
    match body.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(other) => Err(ApiError::invalid_type(key, "true or false", &other)),
    }
}
