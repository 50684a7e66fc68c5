//! Writes what the scheduler chose as the flat arrays that a device reads. Decides nothing.

use super::ahead::Flight;
use super::scheduler::Scheduler;
use super::{Scheduled, TokenTable};
use crate::device::BLOCK_TOKENS;
use crate::device::batch::{Batch, BatchSeq, Drawn, HeadRow, LogitEdit, Want, mask_words};
use crate::model::RunnerLimits;
use rayon::prelude::*;

/// A batch with room for the largest step.
pub(super) fn with_capacity(limits: &RunnerLimits, max_running: usize) -> Batch {
    let (n_tokens, n_seqs) = (limits.max_step_tokens, limits.max_step_seqs);
    Batch {
        tokens: Vec::with_capacity(n_tokens),
        // Grown where steps are planned ahead, and kept.
        drawn: Vec::new(),
        positions: Vec::with_capacity(n_tokens),
        seqs: Vec::with_capacity(n_seqs),
        // Shared blocks stand in many tables: the pool's size is no bound.
        block_tables: Vec::with_capacity(n_seqs.min(max_running) * limits.max_context.div_ceil(BLOCK_TOKENS)),
        copies: Vec::with_capacity(n_seqs),
        heads: Vec::with_capacity(n_seqs),
        // Grown by the first rows that want them, and kept.
        edits: Vec::new(),
        masks: Vec::new(),
    }
}

/// Fills the batch of a step with what it runs. In `broken` are then the places of rows whose grammar can't be followed, and why; their
/// masks allow everything.
pub(super) fn fill(flight: &mut Flight, scheduler: &mut Scheduler, tokens: &dyn TokenTable) {
    let Flight { shares, batch, broken, .. } = flight;
    batch.clear();
    broken.clear();
    let mut n_masks = 0;
    for share in &*shares {
        push(batch, scheduler, share, tokens);
        if share.draws && scheduler.running[share.running_idx].constraint.is_some() {
            batch.heads.last_mut().expect("it draws").mask = Some(n_masks);
            n_masks += 1;
        }
    }
    batch.copies.extend_from_slice(&scheduler.copies);
    fill_masks((batch, shares), scheduler, n_masks as usize, broken);
}

/// Computes the masks of the rows that draw under a grammar, on all cores.
fn fill_masks(
    (batch, shares): (&mut Batch, &[Scheduled]),
    scheduler: &mut Scheduler,
    n_masks: usize,
    broken: &mut Vec<(usize, String)>,
) {
    if n_masks == 0 {
        return;
    }
    let Scheduler { running, limits, .. } = scheduler;
    let n_words = mask_words(limits.n_vocab);
    batch.masks.resize(n_masks * n_words, 0);
    let mut drawing = vec![None; running.len()];
    for (place, share) in shares.iter().enumerate().filter(|(_, share)| share.draws) {
        drawing[share.running_idx] = Some(place);
    }
    let constraints = running.iter_mut().zip(&drawing).filter_map(|(row, place)| Some(((*place)?, row.constraint.as_mut()?)));
    let mut constraints: Vec<_> = constraints.collect();
    constraints.sort_unstable_by_key(|(place, _)| *place);
    let masks = constraints.into_par_iter().zip(batch.masks.par_chunks_mut(n_words));
    broken.par_extend(masks.filter_map(|((place, constraint), words)| {
        let error = constraint.mask(words).err()?;
        words.fill(u32::MAX);
        Some((place, error))
    }));
}

/// Forbids tokens, in the edits from `start` on.
fn forbid(edits: &mut Vec<LogitEdit>, start: usize, tokens: &[u32]) {
    for &token in tokens {
        let bias = f32::NEG_INFINITY;
        match edits[start..].iter_mut().find(|edit| edit.token == token) {
            Some(edit) => edit.bias = bias,
            None => edits.push(LogitEdit { token, penalty: 1.0, bias }),
        }
    }
}

fn push(batch: &mut Batch, scheduler: &Scheduler, scheduled: &Scheduled, token_table: &dyn TokenTable) {
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
    let (prompt, generated) = row.tokens(start, end.min(row.n_known()));
    batch.tokens.extend_from_slice(prompt);
    batch.tokens.extend_from_slice(generated);
    if let Some(head_idx) = row.pending.filter(|_| end > row.n_known()) {
        batch.drawn.push(Drawn { token_idx: batch.tokens.len() as u32, head_idx });
        batch.tokens.push(0);
    }
    batch.positions.extend(start as u32..end as u32);
    batch.block_tables.extend_from_slice(&row.buffers.table[..n_blocks]);
    let first_idx = batch.tokens.len() - (end - start);
    for position in scheduled.scores() {
        let want = Want::Score { token: row.prompt[position + 1] };
        let n_top = row.params.logprobs.unwrap_or(0);
        batch.heads.push(HeadRow::new((first_idx + position - start) as u32, want, n_top));
    }
    if scheduled.draws {
        let edits_start = batch.edits.len() as u32;
        if let Some(history) = &row.history {
            batch.edits.extend_from_slice(history.edits());
        }
        if row.n_drawn() < row.params.min_tokens as usize {
            forbid(&mut batch.edits, edits_start as usize, token_table.end_ids());
            forbid(&mut batch.edits, edits_start as usize, &row.params.stop_tokens);
        }
        let n_edits = batch.edits.len() as u32 - edits_start;
        let head = row.params.head_row(batch.tokens.len() as u32 - 1, end as u32);
        batch.heads.push(HeadRow { edits_start, n_edits, ..head });
    }
}
