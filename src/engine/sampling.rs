//! How a sequence's tokens are drawn and where it ends: parameters, and the keyed draw made of them. The arithmetic is
//! the device's (`device::sample`). Invariant: a draw is keyed by (seed, choice, position) alone, so that preemption,
//! batch mix and order can't change it.

use super::checkpoint::Begun;
use super::keep::Keep;
use super::shaping::Grammar;
use crate::device::batch::{Draw, HeadRow, Want};
use crate::request::Repetition;
use crate::window::turns::Share;
use std::sync::Arc;

/// A sequence's parameters, all resolved: nothing is optional that has a default.
#[derive(Debug, Clone)]
pub struct SeqParams {
    /// Most tokens to generate, at least 1; 0 if only the prompt is scored.
    pub max_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus probability; 1 is off.
    pub top_p: f32,
    /// Likeliest tokens to keep; 0 is off.
    pub top_k: u32,
    /// Tokens whose probability is under this share of the likeliest's are left out; 0 is off.
    pub min_p: f32,
    /// Taken from the logit of each token that was drawn already.
    pub presence_penalty: f32,
    /// Taken from the logit of a token for each time it was drawn.
    pub frequency_penalty: f32,
    /// Divides a positive and multiplies a negative logit of each token of the prompt and of what was drawn; 1 is off.
    pub repetition_penalty: f32,
    /// Added to tokens' logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// No end token before so many tokens were drawn.
    pub min_tokens: u32,
    /// Tokens that end the completion like end tokens.
    pub stop_tokens: Vec<u32>,
    /// The log-probabilities of the prompt's own tokens from this one on (at least 1) are wanted; they stand before the
    /// drawn ones'. Needs `logprobs`. That part of the prompt is computed then, never shared.
    pub score_from: Option<u32>,
    /// What the completion must follow; end tokens come when it is complete.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// Seed of the row.
    pub seed: u64,
    /// Which of the row's completions (0 unless n > 1).
    pub choice: u32,
    /// Texts that end the completion; empty ones are ignored.
    pub stop: Vec<String>,
    /// End tokens are emitted and generation goes on.
    pub ignore_eos: bool,
    /// When a completion that goes round in circles is ended; `None` for never.
    pub repetition: Option<Repetition>,
    /// `Some(n)`: log-probabilities of the drawn tokens and of the `n` likeliest (at most `MAX_TOP_LOGPROBS`).
    pub logprobs: Option<u8>,
    /// After each step the caller is told what the sequence gained: see `Progress`.
    pub watch: bool,
    /// After so many tokens the caller is given a `Checkpoint`; 0 for never.
    pub checkpoint: u32,
    /// What the sequence begins with: fewer tokens than it may have, none of which ended it.
    pub begun: Option<Arc<Begun>>,
    /// Whose KV it may begin with, and how long its own is kept; `None`: it shares with those of its stream that say nothing
    /// either, and leaves nothing.
    pub keep: Option<Keep>,
    /// Whose it is. Changes who goes first, never a bit of the result.
    pub share: Share,
}

impl Default for SeqParams {
    /// 16 greedy tokens.
    fn default() -> Self {
        Self {
            max_tokens: 16,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            stop_tokens: Vec::new(),
            score_from: None,
            grammar: None,
            seed: 0,
            choice: 0,
            stop: Vec::new(),
            ignore_eos: false,
            repetition: None,
            logprobs: None,
            watch: false,
            checkpoint: 0,
            begun: None,
            keep: None,
            share: Share::default(),
        }
    }
}

impl SeqParams {
    /// The head row that draws the token at absolute position `position` from the token at `token_idx` of the batch.
    pub(super) fn head_row(&self, token_idx: u32, position: u32) -> HeadRow {
        let draw = Draw {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            seed: self.seed,
            choice: self.choice,
            position,
            logprob: self.logprobs.is_some(),
        };
        HeadRow::new(token_idx, Want::Draw(draw), self.logprobs.unwrap_or(0))
    }
}
