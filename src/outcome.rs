//! What becomes of a row: a completion or an error, exactly one of them. Knows nothing of files, JSON or the engine.

use std::fmt;

/// Exactly one per row.
pub type Outcome = Result<Completion, RowError>;

/// What a row's prompts were completed with.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The first prompt's completions, then the second's, and so on; at least one.
    pub choices: Vec<Choice>,
    /// Token counts.
    pub usage: Usage,
    /// The seed the tokens were drawn with (the row's own or the derived one); `None` if greedy.
    pub seed: Option<u64>,
}

/// One completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The generated text, without the stop string or the end token (the latter is kept under `ignore_eos`); after the
    /// prompt's own text if that was asked for. Empty if there are only tool calls.
    pub text: String,
    /// What the model thought before that, where its text tells; `None` too where thoughts are left in the text.
    pub thought: Option<Thought>,
    /// Functions that the model calls.
    pub tool_calls: Vec<ToolCall>,
    /// Why generation ended.
    pub finish_reason: FinishReason,
    /// One entry per token of the text, if asked for.
    pub logprobs: Option<Vec<TokenLogprob>>,
}

impl Choice {
    /// Its thoughts; empty if there are none.
    pub fn thoughts(&self) -> &str {
        self.thought.as_ref().map_or("", |thought| &thought.text)
    }

    /// How many of its tokens are thoughts and their marks.
    pub fn n_thought(&self) -> u32 {
        self.thought.as_ref().map_or(0, |thought| thought.n_tokens)
    }
}

impl Completion {
    /// How many of its tokens are thoughts and their marks.
    pub fn n_thought(&self) -> u32 {
        self.choices.iter().map(Choice::n_thought).sum()
    }
}

/// What a model thinks before it answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thought {
    /// Without its marks; may be empty.
    pub text: String,
    /// Tokens of it and its marks.
    pub n_tokens: u32,
}

/// A function that the model calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// Its name.
    pub name: String,
    /// JSON text of its arguments.
    pub arguments: String,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The model calls functions.
    ToolCalls,
    /// It went round in circles, and the request asked for an end then.
    Repetition,
}

impl FinishReason {
    /// The `OpenAI` spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::Repetition => "repetition",
        }
    }

    /// The reason of a spelling; `None` if there is none.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Stop, Self::Length, Self::ToolCalls, Self::Repetition].into_iter().find(|reason| reason.as_str() == text)
    }
}

/// Token counts of one row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the row's prompts, each counted once.
    pub prompt_tokens: u32,
    /// Tokens generated, end tokens included.
    pub completion_tokens: u32,
    /// Prompt tokens that the plan shares with another row of the job (exactness.md: what the plan says, not what
    /// a particular run did, so that outputs are reproducible).
    pub cached_tokens: u32,
}

impl Usage {
    /// The sum of two.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            completion_tokens: self.completion_tokens + other.completion_tokens,
            cached_tokens: self.cached_tokens + other.cached_tokens,
        }
    }
}

/// Log-probability of one generated token and of its likeliest alternatives, in nats, of the model's own distribution
/// (before temperature, `top_p` and `top_k`).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The chosen token's bytes.
    pub bytes: Vec<u8>,
    /// The chosen token's log-probability; `None` for the first token of a prompt, which nothing comes before.
    pub logprob: Option<f32>,
    /// The likeliest tokens, most likely first.
    pub top: Vec<(Vec<u8>, f32)>,
}

/// Why a row failed. Where the row stands (file, line) is known to whoever read it and is added there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RowError {
    /// What kind of fault.
    pub code: ErrorCode,
    /// The field at fault, dotted (`body.messages[0].role`), if it is one field.
    pub field: Option<String>,
    /// For people: names the field, the value and the limit.
    pub message: String,
    /// What was computed before it failed, if anything was.
    pub tried: Option<Box<Tried>>,
}

/// What was computed of a row that failed: with the row itself, what is needed to see it fail again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// How often the prompt that failed was completed, or begun to be.
    pub attempts: u32,
    /// The seed of the last attempt; `None` if greedy.
    pub seed: Option<u64>,
    /// Prompt tokens of all attempts.
    pub prompt_tokens: u32,
    /// Tokens generated in all attempts.
    pub completion_tokens: u32,
    /// What the bits depend on.
    pub system_fingerprint: String,
}

impl RowError {
    /// An error of a whole row.
    pub fn row(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, field: None, message: shortened(message.into()), tried: None }
    }

    /// An error of one field; `message` is prefixed by the field's name.
    pub fn field(code: ErrorCode, field: impl Into<String>, message: impl fmt::Display) -> Self {
        let field = shortened(field.into());
        Self { code, message: shortened(format!("{field}: {message}")), field: Some(field), tried: None }
    }
}

/// Most bytes of a message. What it repeats of an input may be of any length.
const MAX_MESSAGE_BYTES: usize = 2000;

/// A message without its middle if it is too long: what is wrong stands at its beginning or at its end.
pub fn shortened(message: String) -> String {
    if message.len() <= MAX_MESSAGE_BYTES {
        return message;
    }
    let start = message.floor_char_boundary(MAX_MESSAGE_BYTES / 2);
    let end = message.ceil_char_boundary(message.len() - MAX_MESSAGE_BYTES / 2);
    format!("{} … {}", &message[..start], &message[end..])
}

/// Kinds of row errors. The spelling on the wire is [`ErrorCode::as_str`]; programs match on it, never on messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The line is not a JSON object (or a Parquet value can't be read).
    InvalidJson,
    /// The line is not UTF-8.
    InvalidUtf8,
    /// The line is longer than the limit.
    LineTooLong,
    /// A field that must be there is not.
    MissingField,
    /// A field has the wrong type.
    InvalidType,
    /// A field's value is outside what is allowed.
    InvalidValue,
    /// A field with meaning that is not supported.
    UnsupportedParameter,
    /// A `custom_id` was used by an earlier row.
    DuplicateCustomId,
    /// The row's `url` is not an endpoint that jobs may use.
    UrlMismatch,
    /// The row names another model than the job's.
    ModelMismatch,
    /// Prompt, or prompt and output, over the model's context.
    ContextLengthExceeded,
    /// The pipeline's or the model's template refused the row.
    TemplateError,
    /// The engine could not compute the row (a fault of ours).
    EngineError,
    /// The completion is not what the job's policy asks for.
    CheckFailed,
}

impl ErrorCode {
    /// All of them, as written to error files.
    const ALL: [(Self, &'static str); 14] = [
        (Self::InvalidJson, "invalid_json_line"),
        (Self::InvalidUtf8, "invalid_utf8"),
        (Self::LineTooLong, "line_too_long"),
        (Self::MissingField, "missing_required_parameter"),
        (Self::InvalidType, "invalid_type"),
        (Self::InvalidValue, "invalid_value"),
        (Self::UnsupportedParameter, "unsupported_parameter"),
        (Self::DuplicateCustomId, "duplicate_custom_id"),
        (Self::UrlMismatch, "url_mismatch"),
        (Self::ModelMismatch, "model_mismatch"),
        (Self::ContextLengthExceeded, "context_length_exceeded"),
        (Self::TemplateError, "template_error"),
        (Self::EngineError, "engine_error"),
        (Self::CheckFailed, "check_failed"),
    ];

    /// The code as written to error files.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(code, _)| *code == self).map_or("", |(_, text)| text)
    }

    /// The code of a text; `None` if there is none.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == text).map(|&(code, _)| code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_own_text() {
        for (code, text) in ErrorCode::ALL {
            assert_eq!((code.as_str(), ErrorCode::parse(text)), (text, Some(code)));
        }
        assert!(!ErrorCode::EngineError.as_str().is_empty());
    }
}
