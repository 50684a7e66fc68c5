//! Writes what the scheduler chose as the flat arrays that a device reads. Decides nothing.

use super::Scheduled;
use super::scheduler::Scheduler;
use crate::device::BLOCK_TOKENS;
use crate::device::batch::{Batch, BatchSeq};
use crate::model::RunnerLimits;

/// A batch with room for the largest step.
pub(super) fn with_capacity(limits: &RunnerLimits, max_running: usize) -> Batch {
    let (n_tokens, n_seqs) = (limits.max_step_tokens, limits.max_step_seqs);
    Batch {
        tokens: Vec::with_capacity(n_tokens),
        positions: Vec::with_capacity(n_tokens),
        seqs: Vec::with_capacity(n_seqs),
        // Shared blocks stand in many tables: the pool's size is no bound.
        block_tables: Vec::with_capacity(n_seqs.min(max_running) * limits.max_context.div_ceil(BLOCK_TOKENS)),
        copies: Vec::with_capacity(n_seqs),
        heads: Vec::with_capacity(n_seqs),
    }
}

/// Fills the batch with the step that was scheduled.
pub(super) fn fill(batch: &mut Batch, scheduler: &Scheduler) {
    batch.clear();
    for scheduled in &scheduler.scheduled {
        push(batch, scheduler, scheduled);
    }
    batch.copies.extend_from_slice(&scheduler.copies);
}

fn push(batch: &mut Batch, scheduler: &Scheduler, scheduled: &Scheduled) {
    let row = &scheduler.running[scheduled.running_idx];
    let (start, end) = (scheduled.first_position, scheduled.first_position + scheduled.n_tokens);
    let n_blocks = end.div_ceil(BLOCK_TOKENS);
    batch.seqs.push(BatchSeq {
        token_start: batch.tokens.len() as u32,
        n_tokens: scheduled.n_tokens as u32,
        first_position: start as u32,
        table_start: batch.block_tables.len() as u32,
        n_blocks: n_blocks as u32,
    });
    let (prompt, generated) = row.tokens(start, end);
    batch.tokens.extend_from_slice(prompt);
    batch.tokens.extend_from_slice(generated);
    batch.positions.extend(start as u32..end as u32);
    batch.block_tables.extend_from_slice(&row.buffers.table[..n_blocks]);
    if scheduled.draws {
        batch.heads.push(row.params.head_row(batch.tokens.len() as u32 - 1, end as u32));
    }
}
