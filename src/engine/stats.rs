//! What an engine has counted, and what it holds. Knows nothing of where that is shown.

/// Counters since the start, and gauges as of the last call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Steps run.
    pub steps: u64,
    /// Prompt tokens computed, each counted once.
    pub prefill_tokens: u64,
    /// Drawn tokens computed (the last one of a row never is), each counted once.
    pub decode_tokens: u64,
    /// Tokens drawn.
    pub generated_tokens: u64,
    /// Prompt tokens that did not have to be computed because they were in the KV cache.
    pub shared_tokens: u64,
    /// Those of them that sequences had left which have ended.
    pub found_tokens: u64,
    /// Kept blocks that went before their time, because others needed them or too many were kept.
    pub evicted_blocks: u64,
    /// Kept blocks that nobody asked for in time.
    pub lapsed_blocks: u64,
    /// Tokens computed again: the tax of preemptions, and of rows that begin with what another life has drawn.
    pub recomputed_tokens: u64,
    /// Tokens computed for nobody: their rows had ended, or were cancelled, when their step ended. In none of the counts above.
    pub unused_tokens: u64,
    /// Steps that failed, those included that were tried to find out why.
    pub failed_steps: u64,
    /// Times that a row lost its blocks.
    pub preemptions: u64,
    /// The same, by class.
    pub preemptions_of: [u64; 3],
    /// Rows completed.
    pub finished: u64,
    /// Blocks of the pool that are in use.
    pub blocks_used: usize,
    /// Blocks that are kept of sequences which have ended, and not in use.
    pub blocks_kept: usize,
    /// Blocks of the pool.
    pub blocks_total: usize,
    /// Rows that hold blocks.
    pub running: usize,
    /// Rows that wait, preempted ones included.
    pub waiting: usize,
}

impl EngineStats {
    /// All tokens that steps computed, of use or not.
    pub fn computed_tokens(&self) -> u64 {
        self.prefill_tokens + self.decode_tokens + self.recomputed_tokens + self.unused_tokens
    }

    /// With the counters of an engine that was there before.
    #[must_use]
    pub fn after(self, before: Self) -> Self {
        Self {
            steps: self.steps + before.steps,
            prefill_tokens: self.prefill_tokens + before.prefill_tokens,
            decode_tokens: self.decode_tokens + before.decode_tokens,
            generated_tokens: self.generated_tokens + before.generated_tokens,
            shared_tokens: self.shared_tokens + before.shared_tokens,
            found_tokens: self.found_tokens + before.found_tokens,
            evicted_blocks: self.evicted_blocks + before.evicted_blocks,
            lapsed_blocks: self.lapsed_blocks + before.lapsed_blocks,
            recomputed_tokens: self.recomputed_tokens + before.recomputed_tokens,
            unused_tokens: self.unused_tokens + before.unused_tokens,
            failed_steps: self.failed_steps + before.failed_steps,
            preemptions: self.preemptions + before.preemptions,
            preemptions_of: std::array::from_fn(|class| self.preemptions_of[class] + before.preemptions_of[class]),
            finished: self.finished + before.finished,
            ..self
        }
    }
}
