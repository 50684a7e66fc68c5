//! A [`Runner`] that computes nothing: what is left of a job's time is the pipeline's own. Every row gets its last prompt
//! token and then the end token, so that an output can be checked against its input. Invariant: an answer depends on the
//! row alone, as with any runner.

use crate::device::BLOCK_TOKENS;
use crate::device::batch::{Batch, HeadOut, StepOutput, Want};
use crate::model::{Runner, RunnerLimits};
use anyhow::Result;

/// Tokens of a step; they cost nothing here.
const STEP_TOKENS: usize = 1 << 16;

/// See the module.
pub(super) struct NullRunner {
    limits: RunnerLimits,
    /// What ends a completion.
    end: Option<u32>,
}

impl NullRunner {
    /// For a model of that vocabulary and context; `max_seqs` rows at once, none of which waits for KV memory.
    pub(super) fn new(n_vocab: usize, max_context: usize, max_seqs: usize, end: Option<u32>) -> Self {
        let limits = RunnerLimits {
            // Every row has its blocks at full length.
            n_blocks: max_seqs * max_context.div_ceil(BLOCK_TOKENS),
            max_step_tokens: STEP_TOKENS,
            max_step_seqs: max_seqs,
            n_vocab,
            max_context,
        };
        Self { limits, end }
    }

    /// With room in KV memory for so many tokens (at least for one row of full length), whatever rows would need.
    pub(super) fn with_kv_tokens(self, kv_tokens: usize) -> Self {
        let n_blocks = kv_tokens.max(self.limits.max_context).div_ceil(BLOCK_TOKENS);
        Self { limits: RunnerLimits { n_blocks, ..self.limits }, ..self }
    }
}

impl Runner for NullRunner {
    fn limits(&self) -> RunnerLimits {
        self.limits
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<()> {
        out.rows.clear();
        let mut seqs = batch.seqs.iter();
        for head in &batch.heads {
            // Heads come in the order of their sequences; a sequence in the middle of its prompt has none.
            let is_decoding = seqs
                .find(|seq| (seq.token_start..seq.token_start + seq.n_tokens).contains(&head.token_idx))
                .is_some_and(|seq| seq.n_tokens == 1 && seq.first_position > 0);
            let echo = batch.tokens[head.token_idx as usize];
            let token = match head.want {
                Want::Score { token } => token,
                Want::Draw(_) if is_decoding => self.end.unwrap_or(echo),
                Want::Draw(_) => echo,
            };
            out.rows.push(HeadOut { token, logprob: 0.0, top: HeadOut::BROKEN.top, n_top: 0 });
        }
        Ok(())
    }
}
