//! One valid input row. Knows nothing of JSON field names, tokens or devices: wire parsers (`format`) make a
//! [`Request`], `prepare` turns it into token ids. A `Request` that exists is well-formed; only limits that need the
//! model (context length, vocabulary, what its template can do) are checked later.

use serde_json::{Map, Value};
use std::sync::Arc;

/// Most alternatives per position that a request may ask for (the `OpenAI` limit for chat completions).
pub const MAX_TOP_LOGPROBS: usize = 20;

/// Most stop strings a request may carry (generous; `OpenAI` allows 4).
pub const MAX_STOP_STRINGS: usize = 64;
/// Most bytes of a stop string: every text is searched for it as it grows.
pub const MAX_STOP_BYTES: usize = 1024;

/// Most completions per prompt (the `OpenAI` limit).
pub const MAX_CHOICES: u32 = 128;

/// A valid row of the input.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Index of the row over all input files, from 0.
    pub row_idx: u64,
    /// The model the row names, if it names one.
    pub model: Option<String>,
    /// What the model is given: at least one prompt, each completed on its own.
    pub inputs: Vec<Input>,
    /// How completions are drawn.
    pub params: Params,
    /// How messages become a prompt.
    pub chat: ChatOptions,
    /// What to do with a prompt that is too long.
    pub truncate: Truncate,
}

/// What the model is given, before it is tokenized.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Chat turns, rendered by the model's own chat template.
    Messages(Vec<Message>),
    /// Text given to the tokenizer as it is (special tokens in it are recognised, none is added).
    Text(String),
    /// Token ids given to the model as they are.
    Tokens(Vec<u32>),
}

/// One chat turn.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Message {
    /// `system`, `user`, `assistant`, `developer` or `tool`: what the template makes of it is the template's matter.
    pub role: String,
    /// The text of the turn; may be empty for an assistant's turn that only calls tools.
    pub content: String,
    /// What an assistant thought before it said that, without marks; for templates that repeat it.
    pub thought: Option<String>,
    /// The speaker's name, for templates that use one.
    pub name: Option<String>,
    /// The calls of an assistant's turn, as templates see them: `{"id", "type": "function", "function": {"name", "arguments"}}`
    /// with the arguments as an object.
    pub tool_calls: Vec<Value>,
    /// Which call a tool's turn answers.
    pub tool_call_id: Option<String>,
}

/// How messages become a prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChatOptions {
    /// Functions that the model may call, as templates see them: `{"type": "function", "function": {…}}`.
    pub tools: Vec<Value>,
    /// Whether it must.
    pub tool_choice: ToolChoice,
    /// Of several calls only the first is kept.
    pub one_call: bool,
    /// The last message is the beginning of the answer: it is gone on with, not answered.
    pub continue_final: bool,
    /// More variables for the template.
    pub template_kwargs: Map<String, Value>,
}

/// Whether the model must call a function.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ToolChoice {
    /// As it likes.
    #[default]
    Auto,
    /// It must not; it is not even told of them.
    None,
    /// It must call one.
    Required,
    /// It must call this one.
    Named(String),
}

/// What to do with a prompt that is too long for the context and what is to be generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Truncate {
    /// It is an error.
    #[default]
    Never,
    /// Keep at most this many last tokens of the prompt.
    KeepLast(u32),
    /// Keep as many last tokens as fit.
    KeepWhatFits,
    /// Leave out the oldest messages but system ones, as many as must be.
    DropMessages,
}

/// What a completion must be.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum AnswerFormat {
    /// Anything.
    #[default]
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON that this schema allows.
    JsonSchema(Arc<Value>),
    /// Text that matches a regular expression as a whole.
    Regex(String),
    /// Text of a context-free grammar, in llguidance's variant of Lark.
    Lark(String),
}

/// Most tokens of a pattern whose repetition ends a completion.
pub const MAX_REPEATED_PATTERN: u32 = 128;
/// Most times that it may have to stand there.
pub const MAX_REPEATED_COUNT: u32 = 64;

/// When a completion that goes round in circles is ended: where it ends in a pattern of so many tokens that stands there so
/// often, one directly after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repetition {
    /// Shortest pattern, at least 1.
    pub min_pattern: u32,
    /// Longest pattern, at most [`MAX_REPEATED_PATTERN`].
    pub max_pattern: u32,
    /// 2 to [`MAX_REPEATED_COUNT`].
    pub min_count: u32,
}

impl Repetition {
    /// Where a request says only how long a pattern may be and how often it stands there.
    ///
    /// # Errors
    /// What is out of range, by its name on the wire.
    pub fn new(min_pattern: u32, max_pattern: u32, min_count: u32) -> Result<Self, (&'static str, String)> {
        // 0 is how others spell the default.
        let min_pattern = min_pattern.max(1);
        if !(1..=MAX_REPEATED_PATTERN).contains(&max_pattern) {
            return Err(("max_pattern_size", format!("{max_pattern} is outside 1 to {MAX_REPEATED_PATTERN}")));
        }
        if min_pattern > max_pattern {
            return Err(("min_pattern_size", format!("{min_pattern} is over max_pattern_size {max_pattern}")));
        }
        if !(2..=MAX_REPEATED_COUNT).contains(&min_count) {
            return Err(("min_count", format!("{min_count} is outside 2 to {MAX_REPEATED_COUNT}")));
        }
        Ok(Self { min_pattern, max_pattern, min_count })
    }
}

/// How a completion is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Most tokens to generate; `None` means all that the context leaves; 0 only with `echo`.
    pub max_tokens: Option<u32>,
    /// No end token before so many tokens.
    pub min_tokens: u32,
    /// Completions per prompt, 1 to [`MAX_CHOICES`].
    pub n: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of likeliest tokens whose probabilities sum to at least this; 1 is off.
    pub top_p: f32,
    /// Only the `top_k` likeliest tokens; 0 is off.
    pub top_k: u32,
    /// Only tokens of at least this share of the likeliest one's probability; 0 is off.
    pub min_p: f32,
    /// Taken from the logits of tokens that were generated already, −2 to 2.
    pub presence_penalty: f32,
    /// Taken from a token's logit for each time it was generated, −2 to 2.
    pub frequency_penalty: f32,
    /// Makes tokens of the prompt and of what was generated less likely if over 1; 1 is off.
    pub repetition_penalty: f32,
    /// Added to tokens' logits; by token id, ascending.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the draw; `None` lets the job derive one from its own seed and the row.
    pub seed: Option<u64>,
    /// Texts that end the completion; they are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the completion; they are not part of its text.
    pub stop_tokens: Vec<u32>,
    /// End tokens are emitted and generation goes on to `max_tokens`.
    pub ignore_eos: bool,
    /// When a completion that goes round in circles is ended; `None` for never.
    pub repetition: Option<Repetition>,
    /// `None`: no log-probabilities. `Some(n)`: the chosen token's, and the `n` likeliest alternatives.
    pub logprobs: Option<u8>,
    /// The answer begins with the prompt; with `logprobs`, the prompt's tokens are scored too.
    pub echo: bool,
    /// What the completion must be.
    pub format: AnswerFormat,
}

impl Default for Params {
    /// The `OpenAI` defaults: temperature 1, `top_p` 1.
    fn default() -> Self {
        Self {
            max_tokens: None,
            min_tokens: 0,
            n: 1,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: None,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            repetition: None,
            logprobs: None,
            echo: false,
            format: AnswerFormat::Text,
        }
    }
}

impl Params {
    /// Whether the same prompt gives the same completion whatever row it stands in: then it needs computing only once.
    pub fn is_deterministic(&self) -> bool {
        self.temperature == 0.0 || self.seed.is_some()
    }
}
