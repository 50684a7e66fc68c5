//! Row -> prompts: rendered, tokenized and checked against the model's limits. Pure, one row at a time, run on all cores.
//! Knows nothing of files or of running engines. Invariant: whatever is in a row, the result is prompts that the engine
//! can run or that row's error; nothing a row contains can stop the job.

mod dataset;
pub mod sequences;

pub use dataset::{PromptTemplate, Step, StepAnswer, Turn};

use crate::engine::shaping::Grammar;
use crate::format::openai::{self, BatchRequest, Endpoint};
use crate::grammar::Grammars;
use crate::outcome::{ErrorCode, RowError};
use crate::request::{AnswerFormat, Input, Message, Params, Request, ToolChoice, Truncate};
use crate::text::template::ChatTemplate;
use crate::text::thinking::ThinkFormat;
use crate::text::tokenizer::Tokenizer;
use crate::text::tool_calls::CallFormat;
use serde_json::Value;
use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// What a row becomes.
#[derive(Debug)]
pub struct Prepared {
    /// What of the row its outcome must carry.
    pub origin: Origin,
    /// The prompts that can be run at once, at least one, or why there are none.
    pub prompts: Result<Vec<Prompt>, RowError>,
}

/// What of a row its outcome must carry.
#[derive(Debug)]
pub enum Origin {
    /// A request row.
    Request {
        /// The row's id, if it could be read.
        custom_id: Option<String>,
        /// The endpoint it names; chat completions where none could be read.
        endpoint: Endpoint,
        /// What the answer repeats of the request.
        echo: Option<Box<Value>>,
    },
    /// A dataset row: its own columns as one JSON object's text; `None` where the row could not be read.
    Dataset {
        /// The columns.
        columns: Option<Arc<str>>,
    },
}

/// A prompt that the engine can run.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Which of the job's steps it belongs to; 0 for requests.
    pub step: usize,
    /// Token ids, at least one, at most the context less what is to be generated.
    pub tokens: Arc<[u32]>,
    /// Sampling parameters, as the row and the job's defaults say.
    pub params: Params,
    /// Tokens to generate at most: `params.max_tokens`, or what the context leaves.
    pub max_tokens: u32,
    /// What the completion must follow.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// The prompt's tokens from this one on are scored (at least 1: nothing comes before the first token).
    pub score_from: Option<u32>,
    /// How function calls are written, if the model was offered any.
    pub call_format: Option<CallFormat>,
    /// Of several calls only the first is kept.
    pub one_call: bool,
    /// How thoughts are written before the answer, if they are told apart.
    pub thinking: Option<ThinkFormat>,
}

impl Prompt {
    /// Tokens that it may come to at most, its own included.
    pub fn most_tokens(&self) -> u64 {
        self.tokens.len() as u64 + u64::from(self.max_tokens) * u64::from(self.params.n)
    }
}

/// How rows are read.
pub enum RowForm {
    /// `OpenAI` Batch lines.
    Requests,
    /// Any columns, through the templates of at least one step.
    Dataset(Vec<Step>),
}

/// What all rows of a job are prepared with.
pub struct Preparer {
    /// How rows are read.
    pub form: RowForm,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's chat template.
    pub template: ChatTemplate,
    /// Compiles formats that rows ask for.
    pub grammars: Arc<Grammars>,
    /// Names that rows may call the model by.
    pub model: crate::hub::LocalModel,
    /// Names of the columns that dataset rows are given; a row may not have them already.
    pub result_columns: Vec<String>,
    /// Columns of its own that a dataset row's outcome carries; `None` for all.
    pub kept_columns: Option<Vec<String>>,
    /// Sampling parameters where a request row says nothing.
    pub defaults: Params,
    /// Most tokens of prompt and completion together.
    pub max_context: usize,
    /// What sets that limit, for messages ("the model's context", "the KV memory").
    pub max_context_reason: &'static str,
}

/// Tokens at a prompt's end that an open mark of thoughts, and the blanks after it, would be within.
const PROMPT_END: usize = 16;

impl Preparer {
    /// The same for requests, within a smaller context.
    #[must_use]
    pub fn within(&self, max_context: usize, max_context_reason: &'static str) -> Self {
        Self {
            form: RowForm::Requests,
            tokenizer: Arc::clone(&self.tokenizer),
            template: self.template.clone(),
            grammars: Arc::clone(&self.grammars),
            model: self.model.clone(),
            result_columns: Vec::new(),
            kept_columns: None,
            defaults: self.defaults.clone(),
            max_context,
            max_context_reason,
        }
    }

    /// Prepares one row from its text, a JSON object. A panic in a template or a parser is the row's error, not the
    /// job's end.
    pub fn prepare(&self, row_idx: u64, text: &str) -> Prepared {
        catch_unwind(AssertUnwindSafe(|| self.prepare_unguarded(row_idx, text)))
            .unwrap_or_else(|_| Prepared { origin: self.unread_origin(), prompts: Err(panicked()) })
    }

    /// Prepares a later step of a dataset row: its columns, and what the steps so far gave.
    ///
    /// # Errors
    /// As a row's.
    pub fn prepare_step(
        &self,
        row_idx: u64,
        columns: &str,
        step: usize,
        answers: &[Option<StepAnswer>],
    ) -> Result<Prompt, RowError> {
        let RowForm::Dataset(steps) = &self.form else { unreachable!("requests have one step") };
        let prepare = || {
            let values = dataset::with_answers(openai::parse_object(columns)?, steps, answers);
            self.step_prompt(row_idx, steps, step, &values)
        };
        catch_unwind(AssertUnwindSafe(prepare)).unwrap_or_else(|_| Err(panicked()))
    }

    /// What is known of a row that could not be read.
    pub fn unread_origin(&self) -> Origin {
        match self.form {
            RowForm::Requests => Origin::Request { custom_id: None, endpoint: Endpoint::ChatCompletions, echo: None },
            RowForm::Dataset(_) => Origin::Dataset { columns: None },
        }
    }

    fn prepare_unguarded(&self, row_idx: u64, text: &str) -> Prepared {
        match &self.form {
            RowForm::Requests => {
                let line = openai::parse_batch_line(row_idx, text, &self.defaults);
                let (endpoint, echo, request) = match line.request {
                    Ok(BatchRequest { endpoint, request, echo }) => (endpoint, echo, Ok(request)),
                    Err(error) => (Endpoint::ChatCompletions, None, Err(error)),
                };
                let prompts = request.and_then(|request| self.prompts(&request, endpoint));
                Prepared { origin: Origin::Request { custom_id: line.custom_id, endpoint, echo }, prompts }
            }
            RowForm::Dataset(steps) => {
                let columns = match self.read_columns(text) {
                    Ok(columns) => columns,
                    Err(error) => return Prepared { origin: Origin::Dataset { columns: None }, prompts: Err(error) },
                };
                let ready = (0..steps.len()).filter(|&step| steps[step].needs.is_empty());
                let prompts = ready.map(|step| self.step_prompt(row_idx, steps, step, &columns)).collect();
                Prepared { origin: Origin::Dataset { columns: Some(text.into()) }, prompts }
            }
        }
    }

    /// The prompts of a request that was read already.
    ///
    /// # Errors
    /// As a row's.
    pub fn prepare_request(&self, request: &Request, endpoint: Endpoint) -> Result<Vec<Prompt>, RowError> {
        let prepare = || self.prompts(request, endpoint);
        catch_unwind(AssertUnwindSafe(prepare)).unwrap_or_else(|_| Err(panicked()))
    }

    fn prompts(&self, request: &Request, endpoint: Endpoint) -> Result<Vec<Prompt>, RowError> {
        if let Some(name) = &request.model
            && !self.model.is_called(name)
        {
            let message = format!("{name:?} is not the job's model ({}; model.served_names may list more)", self.model.name);
            return Err(RowError::field(ErrorCode::ModelMismatch, "body.model", message));
        }
        let field = match endpoint {
            Endpoint::ChatCompletions | Endpoint::Messages => "body.messages",
            Endpoint::Completions => "body.prompt",
            Endpoint::Responses => "body.input",
        };
        request.inputs.iter().map(|input| self.prompt(request, input, field)).collect()
    }

    /// The prompt of one input; `field` is what errors name.
    fn prompt(&self, request: &Request, input: &Input, field: &str) -> Result<Prompt, RowError> {
        let params = &request.params;
        let offers_tools = !request.chat.tools.is_empty() && request.chat.tool_choice != ToolChoice::None;
        let call_format = if offers_tools { Some(self.call_format()?) } else { None };
        let format = match call_format.and_then(|format| format.required(&request.chat.tools, &request.chat.tool_choice)) {
            Some(_) if params.format != AnswerFormat::Text => {
                let message = "a required call can't be combined with a required format";
                return Err(RowError::field(ErrorCode::InvalidValue, "body.tool_choice", message));
            }
            Some(lark) => AnswerFormat::Lark(lark),
            None => params.format.clone(),
        };
        if format != AnswerFormat::Text && (params.min_tokens > 0 || params.ignore_eos) {
            let name = if params.ignore_eos { "ignore_eos" } else { "min_tokens" };
            let message = "can't be combined with a required format or call";
            return Err(RowError::field(ErrorCode::InvalidValue, format!("body.{name}"), message));
        }
        let grammar = self.grammars.compile(&format).map_err(|why| {
            let field = if call_format.is_some() { "body.tools" } else { self.format_field() };
            RowError::field(ErrorCode::InvalidValue, field, why)
        })?;
        self.check_token_params(params)?;
        let tokens = self.tokens(request, input, field)?;
        if tokens.is_empty() {
            return Err(RowError::field(ErrorCode::InvalidValue, field, "has no tokens"));
        }
        let max_tokens = self.max_tokens(field, tokens.len(), params.max_tokens)?;
        let score_from = match (params.echo, params.logprobs) {
            (true, Some(_)) => Some(1),
            // Nothing to score, and nothing to generate: the prompt alone.
            _ if max_tokens == 0 => Some(tokens.len() as u32),
            _ => None,
        };
        let thinking = self.think_format(input, &tokens, (request.chat.continue_final, grammar.is_some()));
        let params = Params { format, ..params.clone() };
        Ok(Prompt {
            step: 0,
            tokens: tokens.into(),
            params,
            max_tokens,
            grammar,
            score_from,
            call_format,
            one_call: request.chat.one_call,
            thinking,
        })
    }

    /// How thoughts are told apart in what follows a prompt: of chats with models whose template knows thoughts and whose
    /// tokenizer shows their marks. Where the answer must have a format, it has that from its beginning on.
    fn think_format(&self, input: &Input, tokens: &[u32], (continues, has_format): (bool, bool)) -> Option<ThinkFormat> {
        let Input::Messages(messages) = input else { return None };
        let shows = || !self.tokenizer.encode(ThinkFormat::CLOSE).iter().any(|&id| self.tokenizer.is_special(id));
        if !(matches!(self.form, RowForm::Requests) && self.template.thinks() && shows()) {
            return None;
        }
        if has_format {
            return Some(ThinkFormat::Marked);
        }
        let begun = messages.last().filter(|_| continues).map(|last| last.content.as_str());
        let end = &tokens[tokens.len().saturating_sub(PROMPT_END)..];
        let end: Vec<u8> = end.iter().flat_map(|&id| self.tokenizer.token_bytes(id)).copied().collect();
        Some(ThinkFormat::after(&String::from_utf8_lossy(&end), begun))
    }

    fn format_field(&self) -> &'static str {
        match self.form {
            RowForm::Requests => "body.response_format",
            RowForm::Dataset(_) => "prompt.format",
        }
    }

    fn call_format(&self) -> Result<CallFormat, RowError> {
        self.template.call_format().ok_or_else(|| {
            let message = format!("{}'s chat template knows no tools", self.model.name);
            RowError::field(ErrorCode::UnsupportedParameter, "body.tools", message)
        })
    }

    fn check_token_params(&self, params: &Params) -> Result<(), RowError> {
        let n_vocab = self.tokenizer.n_vocab();
        let biased = params.logit_bias.iter().map(|&(id, _)| ("body.logit_bias", id));
        let stops = params.stop_tokens.iter().map(|&id| ("body.stop_token_ids", id));
        match biased.chain(stops).find(|&(_, id)| id as usize >= n_vocab) {
            None => Ok(()),
            Some((field, id)) => {
                let message = format!("token id {id} is outside the vocabulary of {n_vocab}");
                Err(RowError::field(ErrorCode::InvalidValue, field, message))
            }
        }
    }

    /// The tokens of an input, truncated where that was asked for.
    fn tokens<'a>(&self, request: &Request, input: &'a Input, field: &str) -> Result<Cow<'a, [u32]>, RowError> {
        let room = self.max_context.saturating_sub(request.params.max_tokens.unwrap_or(1) as usize);
        if let (Input::Messages(messages), Truncate::DropMessages) = (input, request.truncate) {
            return self.drop_messages(messages, request, room).map(Cow::Owned);
        }
        let mut tokens: Cow<'_, [u32]> = match input {
            Input::Messages(messages) => self.tokenizer.encode(&self.template.render_chat(messages, &request.chat)?).into(),
            Input::Text(text) => self.tokenizer.encode_prompt(text).into(),
            Input::Tokens(tokens) => self.check_ids(tokens, field)?.into(),
        };
        let kept = match request.truncate {
            Truncate::Never | Truncate::DropMessages => tokens.len(),
            Truncate::KeepLast(n) => n as usize,
            Truncate::KeepWhatFits => room.max(1),
        };
        let n_left_out = tokens.len().saturating_sub(kept);
        if n_left_out > 0 {
            tokens.to_mut().drain(..n_left_out);
        }
        Ok(tokens)
    }

    /// Leaves out the oldest turns, up to the next of the user's, as few as will make the rest fit; system messages stay.
    fn drop_messages(&self, messages: &[Message], request: &Request, room: usize) -> Result<Vec<u32>, RowError> {
        let is_system = |m: &Message| m.role == "system" || m.role == "developer";
        let without = |start: usize| {
            let kept = messages.iter().enumerate().filter(|(i, m)| *i >= start || is_system(m));
            let kept: Vec<Message> = kept.map(|(_, m)| m.clone()).collect();
            self.template.render_chat(&kept, &request.chat).map(|text| self.tokenizer.encode(&text))
        };
        let whole = without(0)?;
        // Where what is left begins with a user's turn.
        let starts: Vec<usize> = (1..messages.len()).filter(|&i| messages[i].role == "user").collect();
        if whole.len() <= room || starts.is_empty() {
            return Ok(whole);
        }
        // Less is left the later it begins: the first start that fits.
        let fits = |start: &usize| without(*start).is_ok_and(|tokens| tokens.len() <= room);
        let place = starts.partition_point(|start| !fits(start)).min(starts.len() - 1);
        without(starts[place])
    }

    fn check_ids<'a>(&self, tokens: &'a [u32], field: &str) -> Result<&'a [u32], RowError> {
        let n_vocab = self.tokenizer.n_vocab();
        match tokens.iter().position(|&id| id as usize >= n_vocab) {
            None => Ok(tokens),
            Some(i) => {
                let message = format!("token id {} is outside the vocabulary of {n_vocab}", tokens[i]);
                Err(RowError::field(ErrorCode::InvalidValue, format!("{field}[{i}]"), message))
            }
        }
    }

    /// A row that does not fit is an error that says by how much.
    fn max_tokens(&self, field: &str, n_prompt: usize, asked: Option<u32>) -> Result<u32, RowError> {
        let (limit, reason) = (self.max_context, self.max_context_reason);
        let left = limit.saturating_sub(n_prompt);
        let fits = asked.map_or(left > 0, |asked| (asked as usize).max(1) <= left);
        if !fits {
            let is_request = matches!(self.form, RowForm::Requests);
            let field = if left > 0 && is_request { "body.max_tokens" } else { field };
            let wanted = asked.map_or("at least 1 to generate".into(), |asked| format!("max_tokens {asked}"));
            let message = format!("{n_prompt} prompt tokens and {wanted} are over the limit of {limit} tokens ({reason})");
            return Err(RowError::field(ErrorCode::ContextLengthExceeded, field, message));
        }
        Ok(asked.unwrap_or(left as u32))
    }
}

fn panicked() -> RowError {
    RowError::row(ErrorCode::EngineError, "preparing the row failed; this is a fault of valar")
}
