//! A machine that only takes time, by a clock that is counted: the engine with its scheduler runs on it as on any. Knows
//! nothing of windows. A token says how many are left of its answer, so each row ends where its request did, and the engine
//! knows of it as little as of a real one.

use crate::device::BLOCK_TOKENS;
use crate::device::batch::{Batch, HeadOut, StepOutput, Want};
use crate::engine::TokenTable;
use crate::model::{Runner, RunnerLimits};
use anyhow::Result;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::load::{MAX_DRAWN, MAX_PROMPT};

/// Rows side by side, and tokens of a step.
const MAX_SEQS: usize = 32;
const MAX_STEP_TOKENS: usize = 512;
/// KV memory, in tokens: less than the rows would have if all were long.
const KV_TOKENS: usize = 65_536;
/// What a step takes, what a prompt's token adds to it, and what a row that decodes does.
const STEP_US: u64 = 40_000;
const PROMPT_TOKEN_US: u64 = 400;
const DECODE_US: u64 = 1000;

/// See the module.
pub(super) struct Machine {
    /// Time that all its steps took.
    time_us: Arc<AtomicU64>,
}

impl Machine {
    /// A machine whose steps add to the clock.
    pub(super) fn new(time_us: &Arc<AtomicU64>) -> Self {
        Self { time_us: Arc::clone(time_us) }
    }
}

/// The prompt of a request.
pub(super) fn prompt(n_prompt: usize, n_drawn: usize) -> Arc<[u32]> {
    let last = n_prompt - 1;
    (0..n_prompt).map(|i| if i == last { n_drawn as u32 } else { 1 }).collect()
}

impl Runner for Machine {
    fn limits(&self) -> RunnerLimits {
        RunnerLimits {
            n_blocks: KV_TOKENS / BLOCK_TOKENS,
            max_step_tokens: MAX_STEP_TOKENS,
            max_step_seqs: MAX_SEQS,
            n_vocab: MAX_DRAWN + 1,
            max_context: MAX_PROMPT + MAX_DRAWN + 1,
        }
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<()> {
        let n_decode = batch.seqs.iter().filter(|seq| seq.n_tokens == 1).count() as u64;
        let n_prompt = batch.tokens.len() as u64 - n_decode;
        self.time_us.fetch_add(STEP_US + PROMPT_TOKEN_US * n_prompt + DECODE_US * n_decode, Relaxed);
        out.rows.clear();
        for head in &batch.heads {
            let token = match head.want {
                Want::Score { token } => token,
                Want::Draw(_) => batch.tokens[head.token_idx as usize] - 1,
            };
            out.rows.push(HeadOut { token, logprob: 0.0, top: HeadOut::BROKEN.top, n_top: 0 });
        }
        Ok(())
    }
}

/// Tokens without text; the last of an answer is 0.
pub(super) struct Countdown;

impl TokenTable for Countdown {
    fn token_bytes(&self, _id: u32) -> &[u8] {
        b""
    }

    fn is_end(&self, id: u32) -> bool {
        id == 0
    }

    fn is_special(&self, _id: u32) -> bool {
        true
    }

    fn end_ids(&self) -> &[u32] {
        &[0]
    }
}
