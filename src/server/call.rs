//! What all calls to a model have in common: which model, which window, prompts, and the flow of what comes. Knows no
//! dialect's answer. Invariant: whatever can be wrong with a request is found before its answer begins.

use super::App;
use super::errors::ApiError;
use super::flow::Flow;
use super::ids;
use super::models::{Offered, now};
use super::windows::{self, Mode, Window};
use crate::format::openai::answer::Stamp;
use crate::format::openai::{Endpoint, parse_body};
use crate::outcome::{ErrorCode, RowError};
use crate::prepare::Prompt;
use crate::text::tokenizer::Tokenizer;
use serde_json::{Map, Value};
use std::sync::Arc;

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
}

impl Call {
    /// Checks a request and starts it. `body` holds only what the dialect's parser knows.
    ///
    /// # Errors
    /// What is wrong with it, or that too many calls wait.
    pub async fn start(app: &App, endpoint: Endpoint, body: &Map<String, Value>, mode: Mode) -> Result<Self, ApiError> {
        let (model, window, prompts, echo) = Self::prepare(app, endpoint, body, mode).await?;
        Self::submit(model, window, &prompts, echo)
    }

    /// Starts prompts that are prepared.
    ///
    /// # Errors
    /// Too many calls wait.
    pub fn submit(model: Arc<Offered>, window: Window, prompts: &[Prompt], echo: Option<Box<Value>>) -> Result<Self, ApiError> {
        let n_sequences: usize = prompts.iter().map(|prompt| prompt.params.n as usize).sum();
        if n_sequences > MAX_SEQUENCES {
            let message = format!("at most {MAX_SEQUENCES} completions are allowed in one call, {n_sequences} asked for");
            return Err(ApiError::invalid_value("n", message));
        }
        let flow = model.live.submit(prompts, window.class(), ids::seed()).map_err(|_busy| ApiError::busy())?;
        let stamp = Stamp {
            job_fingerprint: String::new(),
            created: now(),
            model: model.id.clone(),
            system_fingerprint: model.live.fingerprint.clone(),
        };
        Ok(Self { model, window, id: ids::fresh(), stamp, echo, flow })
    }

    /// What a request's prompts are counted as; nothing is run.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn count(app: &App, endpoint: Endpoint, body: &Map<String, Value>) -> Result<usize, ApiError> {
        let (_, _, prompts, _) = Self::prepare(app, endpoint, body, Mode::Foreground).await?;
        Ok(prompts.iter().map(|prompt| prompt.tokens.len()).sum())
    }

    async fn prepare(
        app: &App,
        endpoint: Endpoint,
        body: &Map<String, Value>,
        mode: Mode,
    ) -> Result<(Arc<Offered>, Window, Vec<Prompt>, Option<Box<Value>>), ApiError> {
        let model = Arc::clone(app.models.named(body)?);
        let window = windows::resolve(windows::asked(windows::metadata(body)?), mode, &model.id, &model.windows)?;
        let (mut request, echo) = parse_body(0, endpoint, body, &app.defaults)?;
        // The name is the server's matter, not the weights'.
        request.model = None;
        let prompts = model.live.prepare(request, endpoint).await.map_err(|error| named(error, endpoint, body))?;
        Ok((model, window, prompts, echo))
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
        let completion = self.flow.complete(&self.model.live.preparer.tokenizer).await?;
        Ok(self.stamp.answer(&self.id, endpoint, self.echo.as_deref(), &completion))
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
