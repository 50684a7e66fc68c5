//! One prompt being completed: what is known of it, what of it is in the KV cache, and its text so far. Knows nothing of
//! other sequences. Invariant: `computed` is less than the number of its tokens, for the last token is what the next
//! step computes (and equal to it while that step is under way); between steps `table` covers exactly the tokens it was given blocks for, and is empty while it waits.

use std::ops::Range;
use std::sync::Arc;

use super::checkpoint::Kept;
use super::policy::{Due, Rank};
use super::progress::Told;
use super::repetition::ends_in_circles;
use super::sampling::SeqParams;
use super::shaping::{Constraint, LogitHistory};
use super::stop::StopText;
use super::{Finished, SeqLogprob, TokenTable};
use crate::device::BLOCK_TOKENS;
use crate::device::batch::HeadOut;
use crate::outcome::FinishReason;
use crate::window::Class;

/// A prompt to complete.
#[derive(Debug, Clone)]
pub struct Submission {
    /// The caller's name for it, not in use by another live sequence.
    pub id: u64,
    /// Token ids, at least one.
    pub prompt: Arc<[u32]>,
    /// How it is completed.
    pub params: SeqParams,
    /// How soon.
    pub class: Class,
    /// How many of the prompt's leading tokens the next submissions of the stream share. A wrong number costs
    /// computation or memory, never a bit of the result.
    pub keep_tokens: u32,
    /// Which job's trunk it belongs to; one stream's submissions should be of one class.
    pub stream: u32,
    /// When it should be done. Changes who goes first, never a bit of the result.
    pub due: Due,
}

/// Where a sequence of the running list stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Waiting, or holding KV blocks.
    Live,
    /// Lost its blocks in this step; goes back to the queue at the step's end.
    Preempted,
    /// Done; leaves at the step's end.
    Finished,
}

/// Bytes of text per token that there is room for from the start: of most tokenizers' tokens, nearly twice the mean.
const TEXT_BYTES_PER_TOKEN: usize = 8;

/// What grows while a sequence runs, made when it is submitted with room for the longest answer it may give: a step then
/// allocates nothing (but for a text of unusually long tokens).
#[derive(Debug)]
pub(super) struct Buffers {
    /// Tokens drawn.
    pub(super) generated: Vec<u32>,
    /// Entry i holds positions 16 i to 16 i + 15.
    pub(super) table: Vec<u32>,
    pub(super) text: StopText,
    /// Prompt tokens whose log-probabilities are known: from `score_from` on.
    n_scores: usize,
    /// Of each scored and each drawn token: its log-probability and how many entries of `top` are its own. Empty unless
    /// asked for.
    logprobs: Vec<(f32, u8)>,
    /// The likeliest tokens of all positions, one after the other.
    top: Vec<(u32, f32)>,
}

/// See the module.
pub(super) struct Sequence {
    pub(super) id: u64,
    pub(super) prompt: Arc<[u32]>,
    pub(super) params: SeqParams,
    pub(super) class: Class,
    /// When it should be done.
    due: Due,
    /// Its place in the order of its class.
    pub(super) rank: Rank,
    /// Among those of its rank that never ran: when its owner's turn comes.
    pub(super) turn: u64,
    /// At most `prompt.len()`.
    pub(super) keep_tokens: usize,
    /// Index of its stream in the scheduler.
    pub(super) stream_idx: usize,
    pub(super) buffers: Buffers,
    /// What its tokens do to the next logits, if anything.
    pub(super) history: Option<Box<LogitHistory>>,
    /// Where it stands in its grammar, if it has one; made when it is admitted, for it takes memory.
    pub(super) constraint: Option<Box<dyn Constraint>>,
    /// Leading entries of the table that are another sequence's full blocks: never written by this one.
    pub(super) n_shared_blocks: usize,
    /// How many of them were kept from a sequence that has ended: perhaps nobody else uses them.
    pub(super) n_kept_blocks: usize,
    /// Positions 0..computed are in the KV cache (or will be when the step under way is done).
    pub(super) computed: usize,
    /// Positions below this were computed or shared at some time: computing them again is the tax of a preemption.
    pub(super) high_water: usize,
    pub(super) phase: Phase,
    /// It has one more token, which the step under way draws and nobody knows yet: at that head row.
    pub(super) pending: Option<u32>,
    /// Whether it ever ran.
    pub(super) is_admitted: bool,
    /// Leading tokens that it shared when it first ran.
    pub(super) n_cached: usize,
    /// How far its watcher was told of it.
    pub(super) told: Told,
    /// How far it stands in checkpoints.
    pub(super) kept: Kept,
    /// Drawn tokens before this position were drawn in another life: computing them is done again.
    pub(super) restored_end: usize,
    /// The last step that it has tokens in.
    pub(super) in_step: u64,
    /// Times that it lost its blocks; as many as are allowed, if it is to keep them.
    pub(super) n_preemptions: u32,
}

impl Sequence {
    /// What its class's queue is ordered by, least first: its rank; of the same, those that have run go before those that have not,
    /// and these by turns.
    pub(super) fn order(&self) -> (i64, u64) {
        (self.rank.order(), if self.is_admitted { 0 } else { self.turn.saturating_add(1) })
    }

    /// A sequence that waits.
    pub(super) fn new(submission: Submission, stream_idx: usize, max_context: usize) -> Self {
        let buffers = Buffers::new(&submission, max_context);
        let history = LogitHistory::new(&submission.params, &submission.prompt);
        Self {
            id: submission.id,
            keep_tokens: (submission.keep_tokens as usize).min(submission.prompt.len()),
            prompt: submission.prompt,
            params: submission.params,
            class: submission.class,
            due: submission.due,
            rank: Rank::new(submission.class, submission.due, 0),
            turn: 0,
            stream_idx,
            buffers,
            history,
            constraint: None,
            n_shared_blocks: 0,
            n_kept_blocks: 0,
            computed: 0,
            high_water: 0,
            phase: Phase::Live,
            pending: None,
            is_admitted: false,
            n_cached: 0,
            told: Told::default(),
            kept: Kept::default(),
            restored_end: 0,
            in_step: 0,
            n_preemptions: 0,
        }
    }

    /// It is predicted to take that time.
    pub(super) fn predict(&mut self, service_ms: i64) {
        self.rank = Rank::new(self.class, self.due, service_ms);
    }

    /// Tokens so far: prompt and drawn, known or not.
    pub(super) fn n_tokens(&self) -> usize {
        self.n_known() + usize::from(self.pending.is_some())
    }

    /// Those that are known.
    pub(super) fn n_known(&self) -> usize {
        self.prompt.len() + self.buffers.generated.len()
    }

    /// Drawn tokens, known or not.
    pub(super) fn n_drawn(&self) -> usize {
        self.n_tokens() - self.prompt.len()
    }

    /// Tokens not in the cache: 1 while decoding, more while prefilling, 0 once all of it is in the step under way.
    pub(super) fn remaining(&self) -> usize {
        self.n_tokens() - self.computed
    }

    /// The tokens of positions `start..end`, in two pieces: of the prompt and of what was drawn.
    pub(super) fn tokens(&self, start: usize, end: usize) -> (&[u32], &[u32]) {
        let n_prompt = self.prompt.len();
        let prompt = &self.prompt[start.min(n_prompt)..end.min(n_prompt)];
        let generated = &self.buffers.generated[start.max(n_prompt) - n_prompt..end.max(n_prompt) - n_prompt];
        (prompt, generated)
    }

    /// The tokens of a block that they fill.
    pub(super) fn block_tokens(&self, idx: usize) -> [u32; BLOCK_TOKENS] {
        let start = idx * BLOCK_TOKENS;
        let (prompt, generated) = self.tokens(start, start + BLOCK_TOKENS);
        let mut tokens = [0; BLOCK_TOKENS];
        tokens[..prompt.len()].copy_from_slice(prompt);
        tokens[prompt.len()..].copy_from_slice(generated);
        tokens
    }

    /// Whose sequences it shares KV with.
    pub(super) fn shared_by(&self) -> Option<u64> {
        self.params.keep.map(|keep| keep.owner)
    }

    /// How many leading tokens are those of `other`.
    pub(super) fn common_tokens(&self, other: &[u32]) -> usize {
        let (prompt, generated) = self.tokens(0, self.n_tokens());
        prompt.iter().chain(generated).zip(other).take_while(|(a, b)| a == b).count()
    }

    /// Blocks for the tokens so far.
    pub(super) fn n_blocks(&self) -> usize {
        self.n_tokens().div_ceil(BLOCK_TOKENS)
    }

    /// Blocks it will hold at its end if its stream's outputs have `estimate` tokens (the last one needs no slot). One
    /// that has passed the estimate is expected to go on for a quarter of what it has.
    pub(super) fn final_blocks(&self, estimate: u32, max_context: usize) -> usize {
        let generated = self.buffers.generated.len() as u32;
        let max_tokens = self.params.max_tokens;
        let output = if self.params.ignore_eos {
            max_tokens
        } else if estimate > generated {
            estimate.min(max_tokens)
        } else {
            (generated + generated / 4 + 16).min(max_tokens)
        };
        let n_slots = (self.prompt.len() + output as usize).min(max_context) - 1;
        n_slots.max(self.n_tokens()).div_ceil(BLOCK_TOKENS)
    }

    /// Positions of `start..end` whose next prompt token's log-probability is wanted and not known yet.
    pub(super) fn scores_within(&self, start: usize, end: usize) -> Range<usize> {
        let Some(first) = self.params.score_from else { return start..start };
        let first = start.max(first as usize - 1 + self.buffers.n_scores);
        first..end.min(self.prompt.len() - 1).max(first)
    }

    /// Takes in the log-probability of the next prompt token.
    pub(super) fn note_score(&mut self, row: &HeadOut) {
        self.buffers.n_scores += 1;
        self.buffers.note_logprob(row);
    }

    /// Takes in a drawn token; says whether it was the last.
    ///
    /// # Errors
    /// Its grammar can't be followed.
    pub(super) fn accept(
        &mut self,
        row: &HeadOut,
        tokens: &dyn TokenTable,
        max_context: usize,
    ) -> Result<Option<FinishReason>, String> {
        let buffers = &mut self.buffers;
        buffers.generated.push(row.token);
        if self.params.logprobs.is_some() {
            buffers.note_logprob(row);
        }
        if let Some(history) = &mut self.history {
            history.note(row.token);
        }
        let ignore_eos = self.params.ignore_eos;
        if tokens.is_end(row.token) && !ignore_eos || self.params.stop_tokens.contains(&row.token) {
            return Ok(Some(FinishReason::Stop));
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(row.token)?;
        }
        if self.push_text(row.token, tokens) {
            return Ok(Some(FinishReason::Stop));
        }
        if self.params.repetition.is_some_and(|rule| ends_in_circles(&self.buffers.generated, rule)) {
            return Ok(Some(FinishReason::Repetition));
        }
        Ok(self.is_full(0, max_context).then_some(FinishReason::Length))
    }

    /// Whether it can have no more tokens when it has so many more.
    pub(super) fn is_full(&self, n_more: usize, max_context: usize) -> bool {
        self.n_drawn() + n_more >= self.params.max_tokens as usize || self.n_tokens() + n_more >= max_context
    }

    /// Appends a drawn token to the text, if it is part of it; says whether that completes a stop string.
    pub(super) fn push_text(&mut self, token: u32, tokens: &dyn TokenTable) -> bool {
        let is_text = self.params.ignore_eos || !tokens.is_special(token);
        is_text && self.buffers.text.push(tokens.token_bytes(token), &self.params.stop)
    }

    /// The entries from `start` on, whose alternatives begin at `top_start`.
    pub(super) fn logprobs_from(&self, start: usize, top_start: usize) -> Vec<SeqLogprob> {
        let buffers = &self.buffers;
        let mut top = &buffers.top[top_start..];
        let first = self.params.score_from.map_or(self.prompt.len(), |first| first as usize).min(self.prompt.len());
        let tokens = self.prompt[first..].iter().take(buffers.n_scores).chain(&buffers.generated);
        let entries = buffers.logprobs.iter().zip(tokens).skip(start).map(|(&(logprob, n_top), &token)| {
            let (own, rest) = top.split_at(n_top as usize);
            top = rest;
            SeqLogprob { token, logprob, top: own.to_vec() }
        });
        entries.collect()
    }

    /// What the caller gets. The row is over: nothing may be asked of it but what it held.
    pub(super) fn output(&mut self, finish_reason: FinishReason) -> Finished {
        let logprobs = self.logprobs_from(0, 0);
        let buffers = &mut self.buffers;
        buffers.text.finish();
        Finished {
            id: self.id,
            tokens: std::mem::take(&mut buffers.generated),
            text: buffers.text.take(),
            finish_reason,
            logprobs,
            broken: None,
        }
    }
}

impl Buffers {
    /// Takes in entries of another life, of which the first so many are of prompt tokens.
    pub(super) fn restore_logprobs(&mut self, entries: &[SeqLogprob], n_scores: usize) {
        self.n_scores = n_scores;
        self.logprobs.extend(entries.iter().map(|entry| (entry.logprob, entry.top.len() as u8)));
        self.top.extend(entries.iter().flat_map(|entry| &entry.top));
    }

    fn note_logprob(&mut self, row: &HeadOut) {
        self.logprobs.push((row.logprob, row.n_top));
        self.top.extend_from_slice(&row.top[..row.n_top as usize]);
    }

    fn new(submission: &Submission, max_context: usize) -> Self {
        let n_prompt = submission.prompt.len();
        let n_answer = (submission.params.max_tokens as usize).min(max_context - n_prompt);
        let n_scored = submission.params.score_from.map_or(0, |first| n_prompt.saturating_sub(first as usize));
        let n_logprobs = if submission.params.logprobs.is_some() { n_answer + n_scored } else { 0 };
        let n_top = submission.params.logprobs.map_or(0, usize::from);
        Self {
            generated: Vec::with_capacity(n_answer),
            table: Vec::with_capacity((n_prompt + n_answer).div_ceil(BLOCK_TOKENS)),
            text: StopText::with_capacity(TEXT_BYTES_PER_TOKEN * n_answer),
            n_scores: 0,
            logprobs: Vec::with_capacity(n_logprobs),
            top: Vec::with_capacity(n_logprobs * n_top),
        }
    }
}
