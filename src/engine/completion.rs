//! What the engine gives back of a sequence, and what it must know of the tokens that it is made of.

use crate::outcome::FinishReason;

/// What the engine must know of the tokenizer.
pub trait TokenTable: Send + Sync {
    /// The bytes a token stands for.
    fn token_bytes(&self, id: u32) -> &[u8];
    /// Whether it ends a completion.
    fn is_end(&self, id: u32) -> bool;
    /// Whether it is a mark of the model's rather than text. Unless a row ignores end tokens, marks are no part of its
    /// text.
    fn is_special(&self, id: u32) -> bool;
    /// All tokens that end a completion.
    fn end_ids(&self) -> &[u32];
}

/// A completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// As submitted.
    pub id: u64,
    /// All tokens drawn, an end token included.
    pub tokens: Vec<u32>,
    /// Their text, without the stop string and what follows it.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One entry per token, if asked for; else empty. Scored prompt tokens stand before the drawn ones.
    pub logprobs: Vec<SeqLogprob>,
    /// Why it could not be completed; the rest says how far it came.
    pub broken: Option<String>,
}

/// Log-probability of a drawn token, in nats, of the model's own distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct SeqLogprob {
    /// The token drawn.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The likeliest tokens, most likely first.
    pub top: Vec<(u32, f32)>,
}
