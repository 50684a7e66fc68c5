//! The engine: prompts in, completions out, as many side by side as the KV cache holds. Synchronous; knows nothing of
//! files, JSON, time or threads (`handle` puts it on one). [`Engine::step`] is the whole of it: schedule, run, settle.
//!
//! Invariants: every submission that is not cancelled becomes exactly one [`Finished`]; its tokens depend on its prompt
//! and parameters alone; a step never passes its budget; no block is written by two rows, or read before it is written
//! (see `stream` for how rows share them).

mod ahead;
mod audit;
mod batch;
mod blocks;
mod checkpoint;
mod completion;
pub mod handle;
mod keep;
mod policy;
mod preemption;
mod progress;
mod quarantine;
pub mod repetition;
mod reserve;
pub mod sampling;
mod scheduler;
mod sequence;
pub mod shaping;
mod stats;
pub mod stop;
mod stream;
mod waiting;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use anyhow::ensure;

use crate::device::batch::HeadOut;
use crate::device::{BLOCK_TOKENS, Lost};
use crate::model::{Runner, RunnerLimits};
use crate::outcome::FinishReason;
use crate::request::MAX_TOP_LOGPROBS;
use crate::window::Class;
use ahead::Flight;
use scheduler::Scheduler;
use sequence::{Phase, Sequence};

pub use checkpoint::{Begun, Checkpoint};
pub use completion::{Finished, SeqLogprob, TokenTable};
pub use keep::Keep;
pub use policy::Due;
pub use progress::Progress;
pub use sequence::Submission;
pub use stats::EngineStats;

/// Of what makes completions of logits: draws, edits and masks, stops, text. Who changes a result there raises it, for
/// results are kept (`tests/it/reuse.rs` has some of each).
pub const RESULT_VERSION: u32 = 1;

/// Limits of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences with KV blocks at a time.
    pub max_running: usize,
    /// Most sequences of each class that have been submitted and never ran.
    pub max_waiting: usize,
    /// Most tokens in a step.
    pub budget_tokens: usize,
    /// Preemptions after which a row is left alone (except by asap, or if nothing else could go on).
    pub max_preemptions: u32,
    /// Output tokens that a stream's rows are expected to have until some have finished.
    pub cold_output_tokens: u32,
    /// By class: percent of the last minute's tokens (but for asap's) that it gets at least, while it waits.
    pub share_floors: [u8; 3],
    /// Most KV blocks that are kept of sequences that have ended, while nobody else needs them.
    pub max_kept_blocks: usize,
    /// Percent of the blocks and of the places that are kept free for asap rows at least, more if they want more; 0: none are.
    pub asap_reserve: u8,
}

impl EngineConfig {
    /// All that the runner allows.
    pub fn for_runner(limits: &RunnerLimits) -> Self {
        Self {
            max_running: limits.max_step_seqs,
            max_waiting: (4 * limits.max_step_seqs).max(64),
            budget_tokens: limits.max_step_tokens,
            max_preemptions: 3,
            cold_output_tokens: 256,
            share_floors: [0, 10, 2],
            max_kept_blocks: 0,
            asap_reserve: 0,
        }
    }
}

/// How long steps may be, in tokens.
#[derive(Debug)]
pub struct StepLimits {
    /// Most tokens of a step, but for asap rows that decode. Never more than the budget.
    pub tokens: AtomicUsize,
    /// What a step takes whatever is in it, as tokens that would take as long.
    pub base_tokens: AtomicUsize,
}

impl Default for StepLimits {
    /// Nothing but the budget limits steps.
    fn default() -> Self {
        Self { tokens: AtomicUsize::new(usize::MAX), base_tokens: AtomicUsize::new(usize::MAX / 4) }
    }
}

/// One sequence's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// As submitted.
    pub id: u64,
    /// As submitted.
    pub class: Class,
    /// Position of its first token in the step.
    pub first_position: usize,
    /// Its tokens in the step.
    pub n_tokens: usize,
    /// Whether the step draws its next token.
    pub draws: bool,
    /// Position of its first prompt token whose follower's log-probability is wanted from this step.
    first_score: usize,
    /// How many there are.
    n_scores: usize,
    /// Of its tokens: computed again, of a prompt, drawn.
    counts: [usize; 3],
    running_idx: usize,
}

impl Scheduled {
    /// Positions of prompt tokens whose follower's log-probability is wanted from this step.
    fn scores(&self) -> std::ops::Range<usize> {
        self.first_score..self.first_score + self.n_scores
    }
}

/// See the module.
pub struct Engine {
    scheduler: Scheduler,
    runner: Box<dyn Runner>,
    tokens: Arc<dyn TokenTable>,
    /// At most two.
    flights: VecDeque<Flight>,
    /// Memory of those that have ended.
    spare: Vec<Flight>,
    /// What the last step ran that has ended.
    last: Vec<Scheduled>,
    /// What watched rows gained since it was taken.
    progress: Vec<Progress>,
    /// Those that were due since they were taken.
    checkpoints: Vec<Checkpoint>,
    /// Rows that failed alone since the last step that did not fail; they have left the queues.
    accused: Vec<Finished>,
}

impl Engine {
    /// An idle engine.
    ///
    /// # Errors
    /// If a limit is 0 or over the runner's, or the pool can't hold one sequence of full length.
    pub fn new(config: EngineConfig, runner: Box<dyn Runner>, tokens: Arc<dyn TokenTable>) -> anyhow::Result<Self> {
        let limits = runner.limits();
        let RunnerLimits { n_blocks, max_step_tokens, max_step_seqs, max_context, .. } = limits;
        ensure!(config.max_running > 0 && config.max_waiting > 0 && max_step_seqs > 0, "no room for a single row");
        ensure!(
            (1..=max_step_tokens).contains(&config.budget_tokens),
            "a budget of {} tokens per step, but the runner takes 1 to {max_step_tokens}",
            config.budget_tokens
        );
        ensure!(
            n_blocks * BLOCK_TOKENS >= max_context,
            "the KV cache holds {} tokens, less than one sequence of {max_context}: give it more memory or lower the context limit",
            n_blocks * BLOCK_TOKENS
        );
        let scheduler = Scheduler::new(config, limits);
        // Where steps are begun ahead, the second one's memory is made with the first of those.
        let spare = vec![Flight::new(&scheduler)];
        Ok(Self {
            scheduler,
            runner,
            tokens,
            flights: VecDeque::with_capacity(2),
            spare,
            last: Vec::with_capacity(max_step_seqs),
            progress: Vec::new(),
            checkpoints: Vec::new(),
            accused: Vec::new(),
        })
    }

    /// Takes how long steps may be from `limits`, which may change between steps. Changes no result: only how prompts are cut
    /// into steps.
    pub fn limit_steps(&mut self, limits: Arc<StepLimits>) {
        self.scheduler.step_limits = limits;
    }

    /// Tells the time that rows are due by: milliseconds of a clock of the caller's. Told before and after each step, it
    /// teaches what steps take. Where it is never told, time stands still.
    pub fn advance(&mut self, now_ms: i64) {
        self.scheduler.policy.advance(now_ms);
    }

    /// Queues a prompt. Gives it back if its class's queue is full: step, then try again.
    ///
    /// # Errors
    /// The submission, unchanged.
    ///
    /// # Panics
    /// If it could never run: see [`Submission::check`].
    #[expect(clippy::result_large_err, reason = "a refused submission comes back whole, to be submitted again")]
    pub fn submit(&mut self, submission: Submission) -> Result<(), Submission> {
        submission.check(&self.scheduler.limits);
        self.queue(submission)
    }

    /// As [`Engine::submit`], of a submission that was checked.
    #[expect(clippy::result_large_err, reason = "a refused submission comes back whole, to be submitted again")]
    fn queue(&mut self, submission: Submission) -> Result<(), Submission> {
        let queued = self.scheduler.submit(submission, &*self.tokens);
        self.scheduler.measure();
        queued
    }

    /// Forgets a sequence: no `Finished` will come, and what it held is free at once. False if it is not there (any
    /// more).
    pub fn cancel(&mut self, id: u64) -> bool {
        let found = self.scheduler.cancel(id, !self.flights.is_empty());
        self.scheduler.measure();
        found
    }

    /// Forgets a stream: its sequences, as [`Engine::cancel`] does, and what it keeps for its next row. Not needed when all
    /// have finished and the last one has `keep_tokens` 0.
    pub fn end_stream(&mut self, stream: u32) {
        self.scheduler.end_stream(stream, !self.flights.is_empty());
        self.scheduler.measure();
    }

    /// When the first of what is kept of ended sequences lapses, by the engine's clock; `None` if nothing is kept. It goes with the
    /// next step, or with [`Engine::lapse`].
    pub fn next_lapse_ms(&self) -> Option<i64> {
        self.scheduler.kept.next_lapse_ms()
    }

    /// Forgets what has lapsed.
    pub fn lapse(&mut self) {
        self.scheduler.lapse_kept();
        self.scheduler.measure();
    }

    /// Forgets all that is kept of ended sequences.
    pub fn drop_kept(&mut self) {
        self.scheduler.drop_kept();
        self.scheduler.measure();
    }

    /// Whether anything waits or runs.
    pub fn has_work(&self) -> bool {
        !self.accused.is_empty()
            || !self.flights.is_empty()
            || !self.scheduler.running.is_empty()
            || self.scheduler.waiting.iter().any(|queue| !queue.is_empty())
    }

    /// Begins a step, if there is work and none has begun. True if the device is at it by itself now: [`Engine::step`], which is to
    /// be called next (nothing that changes the engine before it), only has to wait for it. Then the step after it has begun, too,
    /// if nothing but tokens is missing (see `ahead`).
    pub fn start(&mut self) -> bool {
        if self.flights.is_empty() {
            self.begin_next();
        }
        if self.looks_ahead() {
            self.begin_next();
        }
        self.flights.front().is_some_and(Flight::is_under_way)
    }

    fn begin_next(&mut self) {
        self.scheduler.schedule();
        if !self.scheduler.scheduled.is_empty() {
            self.begin();
        }
    }

    /// Runs one step, if there is work, or the rest of the one that began first; what it completed is appended to `finished`. If the step
    /// fails, so do the rows at which it does (see `quarantine`), and only they.
    ///
    /// # Errors
    /// The runner's, if it can't run any row. The engine is of no use any more then.
    pub fn step(&mut self, finished: &mut Vec<Finished>) -> anyhow::Result<()> {
        if self.flights.is_empty() {
            self.start();
        }
        let Some(mut flight) = self.flights.pop_front() else {
            self.last.clear();
            finished.append(&mut self.accused);
            return Ok(());
        };
        match self.land(&mut flight) {
            Ok(()) => {
                self.settle(flight, finished);
                // The device works: it was their fault.
                finished.append(&mut self.accused);
                Ok(())
            }
            // No row is at fault, and none can be tried.
            Err(why) if why.is::<Lost>() => Err(why),
            Err(_) => {
                self.give_up_flights();
                self.isolate(flight, finished)
            }
        }
    }

    /// Takes in what a step drew.
    fn settle(&mut self, flight: Flight, finished: &mut Vec<Finished>) {
        let Flight { shares, batch, out, broken: unfollowed, .. } = &flight;
        assert_eq!(out.rows.len(), batch.heads.len(), "the runner's answers");
        let mut rows = out.rows.iter();
        self.last.clear();
        for (place, share) in shares.iter().enumerate() {
            if !self.scheduler.is_there(share) {
                rows.by_ref().take(share.n_scores + usize::from(share.draws)).for_each(drop);
                continue;
            }
            self.last.push(*share);
            let Scheduler { running, streams, stats, limits, policy, kept, blocks, .. } = &mut self.scheduler;
            policy.note(share.class, share.n_tokens);
            let seq = &mut running[share.running_idx];
            seq.pending = None;
            let mut broken = unfollowed.iter().find(|(broken, _)| *broken == place).map(|(_, why)| why.clone());
            let not_a_number = |seq: &Sequence| {
                format!("the model's output is not a number after {} generated tokens", seq.buffers.generated.len())
            };
            for row in rows.by_ref().take(share.n_scores) {
                if row.is_broken() {
                    broken.get_or_insert_with(|| not_a_number(seq));
                }
                seq.note_score(row);
            }
            let drawn = if share.draws { rows.next() } else { None };
            if drawn.is_some_and(HeadOut::is_broken) {
                broken.get_or_insert_with(|| not_a_number(seq));
            }
            let mut ended = None;
            if broken.is_some() {
                ended = Some(FinishReason::Stop);
            } else if let Some(row) = drawn {
                assert!((row.token as usize) < limits.n_vocab, "token {} drawn of {}", row.token, limits.n_vocab);
                stats.generated_tokens += 1;
                if seq.buffers.generated.is_empty() {
                    // Those beside it may have the same prompt.
                    kept.add(seq, policy.now_ms(), blocks);
                }
                ended = seq.accept(row, &*self.tokens, limits.max_context).unwrap_or_else(|why| {
                    broken = Some(why);
                    Some(FinishReason::Stop)
                });
            } else if share.first_position + share.n_tokens == seq.n_tokens() {
                ended = Some(FinishReason::Length); // nothing to draw
            }
            if seq.params.watch {
                self.progress.extend(seq.take_progress(ended.is_some()));
            }
            if let Some(reason) = ended {
                // A step that has begun may compute its last token.
                seq.computed = seq.computed.min(share.first_position + share.n_tokens);
                if broken.is_none() {
                    kept.add(seq, policy.now_ms(), blocks);
                }
                seq.phase = Phase::Finished;
                streams[seq.stream_idx].note_finished(seq);
                finished.push(Finished { broken, ..seq.output(reason) });
                stats.finished += 1;
            }
        }
        self.spare.push(flight);
        self.scheduler.stats.steps += 1;
        self.scheduler.settle(self.flights.front_mut().map_or(&mut [], |next| &mut next.shares));
        self.scheduler.measure();
        // Together, so that they are kept together: those that are half-way to theirs have it now, too.
        if self.scheduler.running.iter().any(Sequence::wants_checkpoint) {
            self.checkpoint(|seq| seq.params.checkpoint.div_ceil(2) as usize);
        }
    }

    /// Makes checkpoints of all sequences that gained at least so many tokens since their last.
    fn checkpoint(&mut self, least: impl Fn(&Sequence) -> usize) {
        let waiting = self.scheduler.waiting.iter_mut().flatten();
        let rows = self.scheduler.running.iter_mut().chain(waiting);
        // One that was cancelled while a step is under way is still there.
        let rows = rows.filter(|row| row.phase != Phase::Finished);
        self.checkpoints.extend(rows.filter_map(|seq| seq.take_checkpoint(least(seq))));
    }

    /// Makes checkpoints of all sequences that want any.
    pub fn checkpoint_all(&mut self) {
        self.checkpoint(|_| 1);
    }

    /// Checkpoints that were due since they were last taken, in order.
    pub fn take_checkpoints(&mut self) -> Vec<Checkpoint> {
        std::mem::take(&mut self.checkpoints)
    }

    /// What watched rows gained since it was last asked for, in order; a row's last comes with its [`Finished`].
    pub fn take_progress(&mut self) -> Vec<Progress> {
        std::mem::take(&mut self.progress)
    }

    /// What the last step ran, in order, but for rows that had left by then.
    pub fn last_step(&self) -> &[Scheduled] {
        &self.last
    }

    /// Rows of the class that were submitted and never ran: what `EngineConfig::max_waiting` limits.
    pub fn n_queued(&self, class: Class) -> usize {
        self.scheduler.n_queued[class as usize]
    }

    /// Its limits.
    pub fn config(&self) -> &EngineConfig {
        &self.scheduler.config
    }

    /// Its runner's limits.
    pub fn limits(&self) -> &RunnerLimits {
        &self.scheduler.limits
    }

    /// Counters and gauges.
    pub fn stats(&self) -> &EngineStats {
        &self.scheduler.stats
    }

    /// Audits the books, between steps: references of blocks, writers, queues. Takes time proportional to the tables.
    ///
    /// # Panics
    /// If they do not add up.
    pub fn check(&self) {
        self.scheduler.check(!self.flights.is_empty());
    }
}

impl Submission {
    /// Asserts that it can run; whoever prepares rows has turned away those that can't.
    ///
    /// # Panics
    /// If the prompt is empty or leaves no token of the context, or a parameter is
    /// out of range.
    pub fn check(&self, limits: &RunnerLimits) {
        let (id, n_prompt) = (self.id, self.prompt.len());
        assert!((1..limits.max_context).contains(&n_prompt), "row {id}: {n_prompt} tokens of {}", limits.max_context);
        assert!(self.params.max_tokens > 0 || self.params.score_from.is_some(), "row {id}: nothing to do");
        if let Some(first) = self.params.score_from {
            let is_known = self.params.logprobs.is_some() || first as usize >= n_prompt;
            assert!(first > 0 && is_known, "row {id}: scores from {first} on");
        }
        let edited = self.params.logit_bias.iter().map(|&(token, _)| token).chain(self.params.stop_tokens.iter().copied());
        assert!(edited.into_iter().all(|t| (t as usize) < limits.n_vocab), "row {id}: a token id over {}", limits.n_vocab);
        if let Some(begun) = &self.params.begun {
            let (n_begun, n_entries) = (begun.tokens.len(), begun.logprobs.len());
            assert!(n_begun < self.params.max_tokens as usize && n_prompt + n_begun < limits.max_context, "row {id}: is over");
            assert!(begun.tokens.iter().all(|&t| (t as usize) < limits.n_vocab), "row {id}: a token id over {}", limits.n_vocab);
            let n_scores = self.params.score_from.map_or(0, |first| n_prompt.saturating_sub(first as usize));
            let wanted = if self.params.logprobs.is_some() && n_begun > 0 { n_begun + n_scores } else { 0 };
            assert!(n_entries == wanted, "row {id}: begins with {n_entries} log-probabilities, not {wanted}");
        }
        assert!(self.params.logprobs.is_none_or(|n| n as usize <= MAX_TOP_LOGPROBS), "row {id}: too many alternatives");
    }
}
