//! How a sequence's tokens are drawn and where it ends: parameters, and the keyed draw made of them. The arithmetic is
//! the device's (`device::sample`). Invariant: a draw is keyed by (seed, choice, position) alone, so that preemption,
//! batch mix and order can't change it.

use crate::device::batch::{Draw, HeadRow, Want};

/// A sequence's parameters, all resolved: nothing is optional that has a default.
#[derive(Debug, Clone, PartialEq)]
pub struct SeqParams {
    /// Most tokens to generate, at least 1.
    pub max_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus probability; 1 is off.
    pub top_p: f32,
    /// Likeliest tokens to keep; 0 is off.
    pub top_k: u32,
    /// Seed of the row.
    pub seed: u64,
    /// Which of the row's completions (0 unless n > 1).
    pub choice: u32,
    /// Texts that end the completion; empty ones are ignored.
    pub stop: Vec<String>,
    /// End tokens are emitted and generation goes on.
    pub ignore_eos: bool,
    /// `Some(n)`: log-probabilities of the drawn tokens and of the `n` likeliest (at most `MAX_TOP_LOGPROBS`).
    pub logprobs: Option<u8>,
}

impl Default for SeqParams {
    /// 16 greedy tokens.
    fn default() -> Self {
        Self {
            max_tokens: 16,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            choice: 0,
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: None,
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
            seed: self.seed,
            choice: self.choice,
            position,
            logprob: self.logprobs.is_some(),
        };
        HeadRow { token_idx, want: Want::Draw(draw), n_top: self.logprobs.unwrap_or(0) }
    }
}
