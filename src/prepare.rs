//! Row -> prompt: rendered, tokenized and checked against the model's limits. Pure, one row at a time, run on all cores.
//! Knows nothing of files or of the engine. Invariant: whatever is in a row, the result is a prompt that the engine can
//! run or that row's error; nothing a row contains can stop the job.

use crate::format::openai::{self, Endpoint};
use crate::outcome::{ErrorCode, RowError};
use crate::request::{Input, Message, Params, Request};
use crate::text::template::{ChatTemplate, RowTemplate};
use crate::text::tokenizer::Tokenizer;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// What a row becomes.
#[derive(Debug)]
pub struct Prepared {
    /// What of the row its outcome must carry.
    pub origin: Origin,
    /// The prompt, or why there is none.
    pub prompt: Result<Prompt, RowError>,
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
    },
    /// A dataset row: its own columns as one JSON object's text; `None` where the row could not be read.
    Dataset {
        /// The columns.
        columns: Option<String>,
    },
}

/// A prompt that the engine can run.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Token ids, at least one, at most the context less one.
    pub tokens: Arc<[u32]>,
    /// Sampling parameters, as the row and the job's defaults say.
    pub params: Params,
    /// Tokens to generate at most: `params.max_tokens`, or what the context leaves.
    pub max_tokens: u32,
}

/// How rows are read.
pub enum RowForm {
    /// `OpenAI` Batch lines.
    Requests,
    /// Any columns, through templates.
    Dataset(Box<PromptTemplate>),
}

/// A dataset row's templates.
pub enum PromptTemplate {
    /// The prompt as it is.
    Text(Box<RowTemplate>),
    /// (role, content) of each message.
    Messages(Vec<(String, RowTemplate)>),
}

/// What all rows of a job are prepared with.
pub struct Preparer {
    /// How rows are read.
    pub form: RowForm,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's chat template.
    pub template: ChatTemplate,
    /// Names that rows may call the model by.
    pub model: crate::hub::LocalModel,
    /// Names of the columns that dataset rows are given; a row may not have them already.
    pub result_columns: Vec<String>,
    /// Sampling parameters where a row says nothing.
    pub defaults: Params,
    /// Most tokens of prompt and completion together.
    pub max_context: usize,
    /// What sets that limit, for messages ("the model's context", "the KV memory").
    pub max_context_reason: &'static str,
}

impl Preparer {
    /// Prepares one row from its text, a JSON object. A panic in a template or a parser is the row's error, not the
    /// job's end.
    pub fn prepare(&self, row_idx: u64, text: String) -> Prepared {
        catch_unwind(AssertUnwindSafe(|| self.prepare_unguarded(row_idx, text))).unwrap_or_else(|_| Prepared {
            origin: self.unread_origin(),
            prompt: Err(RowError::row(ErrorCode::EngineError, "preparing the row failed; this is a fault of valar")),
        })
    }

    /// What is known of a row that could not be read.
    pub fn unread_origin(&self) -> Origin {
        match self.form {
            RowForm::Requests => Origin::Request { custom_id: None, endpoint: Endpoint::ChatCompletions },
            RowForm::Dataset(_) => Origin::Dataset { columns: None },
        }
    }

    fn prepare_unguarded(&self, row_idx: u64, text: String) -> Prepared {
        match &self.form {
            RowForm::Requests => {
                let line = openai::parse_batch_line(row_idx, &text, &self.defaults);
                let (endpoint, request) = match line.request {
                    Ok((endpoint, request)) => (endpoint, Ok(request)),
                    Err(error) => (Endpoint::ChatCompletions, Err(error)),
                };
                let prompt = request.and_then(|request| self.prompt(&request));
                Prepared { origin: Origin::Request { custom_id: line.custom_id, endpoint }, prompt }
            }
            RowForm::Dataset(template) => match self.render_columns(row_idx, template, &text) {
                Ok(request) => {
                    let prompt = request.and_then(|request| self.prompt(&request));
                    Prepared { origin: Origin::Dataset { columns: Some(text) }, prompt }
                }
                Err(error) => Prepared { origin: Origin::Dataset { columns: None }, prompt: Err(error) },
            },
        }
    }

    /// The outer error is a row that is no object; the inner one a row that the template refuses.
    fn render_columns(&self, row_idx: u64, template: &PromptTemplate, text: &str) -> Result<Result<Request, RowError>, RowError> {
        let columns = openai::parse_object(text)?;
        if let Some(name) = self.result_columns.iter().find(|name| columns.contains_key(*name)) {
            let message = "the row has a column of the same name as a result column; set output.prefix";
            return Err(RowError::field(ErrorCode::InvalidValue, name, message));
        }
        let input = match template {
            PromptTemplate::Text(template) => template.render(&columns).map(Input::Text),
            PromptTemplate::Messages(messages) => messages
                .iter()
                .map(|(role, content)| {
                    content.render(&columns).map(|content| Message { role: role.clone(), content, name: None })
                })
                .collect::<Result<_, _>>()
                .map(Input::Messages),
        };
        Ok(input.map(|input| Request { row_idx, model: None, input, params: self.defaults.clone() }))
    }

    fn prompt(&self, request: &Request) -> Result<Prompt, RowError> {
        if let Some(name) = &request.model
            && !self.model.is_called(name)
        {
            let message = format!("{name:?} is not the job's model ({})", self.model.name);
            return Err(RowError::field(ErrorCode::ModelMismatch, "body.model", message));
        }
        let tokens = match &request.input {
            Input::Messages(messages) => self.tokenizer.encode(&self.template.render(messages, true)?),
            Input::Text(text) => self.tokenizer.encode(text),
            Input::Tokens(tokens) => self.check_ids(tokens)?,
        };
        let field = match (&self.form, &request.input) {
            (RowForm::Dataset(_), _) => "prompt",
            (RowForm::Requests, Input::Messages(_)) => "body.messages",
            (RowForm::Requests, _) => "body.prompt",
        };
        if tokens.is_empty() {
            return Err(RowError::field(ErrorCode::InvalidValue, field, "has no tokens"));
        }
        let max_tokens = self.max_tokens(field, tokens.len(), request.params.max_tokens)?;
        Ok(Prompt { tokens: tokens.into(), params: request.params.clone(), max_tokens })
    }

    fn check_ids(&self, tokens: &[u32]) -> Result<Vec<u32>, RowError> {
        let n_vocab = self.tokenizer.n_vocab();
        match tokens.iter().position(|&id| id as usize >= n_vocab) {
            None => Ok(tokens.to_vec()),
            Some(i) => {
                let message = format!("token id {} is outside the vocabulary of {n_vocab}", tokens[i]);
                Err(RowError::field(ErrorCode::InvalidValue, format!("body.prompt[{i}]"), message))
            }
        }
    }

    /// Nothing is truncated: a row that does not fit is an error that says by how much.
    fn max_tokens(&self, field: &str, n_prompt: usize, asked: Option<u32>) -> Result<u32, RowError> {
        let (limit, reason) = (self.max_context, self.max_context_reason);
        let left = limit.saturating_sub(n_prompt);
        let fits = asked.map_or(left > 0, |asked| asked as usize <= left);
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
