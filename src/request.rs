//! One valid input row. Knows nothing of JSON field names, tokens or devices: wire parsers (`format`) make a
//! [`Request`], `prepare` turns it into token ids. A `Request` that exists is well-formed; only limits that need the
//! model (context length, vocabulary) are checked later.

/// Most alternatives per position that a request may ask for (the `OpenAI` limit for chat completions).
pub const MAX_TOP_LOGPROBS: usize = 20;

/// Most stop strings a request may carry (generous; `OpenAI` allows 4).
pub const MAX_STOP_STRINGS: usize = 16;

/// A valid row of the input.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Index of the row over all input files, from 0.
    pub row_idx: u64,
    /// The model the row names, if it names one.
    pub model: Option<String>,
    /// What the model is given.
    pub input: Input,
    /// How the completion is drawn.
    pub params: Params,
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `developer` or `tool`: what the template makes of it is the template's matter.
    pub role: String,
    /// The text of the turn.
    pub content: String,
    /// The speaker's name, for templates that use one.
    pub name: Option<String>,
}

/// How a completion is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Most tokens to generate; `None` means all that the context leaves.
    pub max_tokens: Option<u32>,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of likeliest tokens whose probabilities sum to at least this; 1 is off.
    pub top_p: f32,
    /// Only the `top_k` likeliest tokens; 0 is off.
    pub top_k: u32,
    /// Seed of the draw; `None` lets the job derive one from its own seed and the row.
    pub seed: Option<u64>,
    /// Texts that end the completion; they are not part of it.
    pub stop: Vec<String>,
    /// End tokens are emitted and generation goes on to `max_tokens`.
    pub ignore_eos: bool,
    /// `None`: no log-probabilities. `Some(n)`: the chosen token's, and the `n` likeliest alternatives.
    pub logprobs: Option<u8>,
}

impl Default for Params {
    /// The `OpenAI` defaults: temperature 1, `top_p` 1.
    fn default() -> Self {
        Self {
            max_tokens: None,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            seed: None,
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

impl Params {
    /// Whether the same prompt gives the same completion whatever row it stands in: then it needs computing only once.
    pub fn is_deterministic(&self) -> bool {
        self.temperature == 0.0 || self.seed.is_some()
    }
}
