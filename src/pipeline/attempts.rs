//! The collecting side's part that judges finished completions and has others drawn instead. Invariant: which attempt a row ends
//! with, its seed and its tokens depend on the row alone.

use super::collect::Collector;
use super::policy::{Policy, Verdict, attempt_seed};
use super::stepper::Task;
use crate::engine::{Finished, Submission};
use crate::outcome::{ErrorCode, RowError, Tried};
use crate::prepare::sequences::{PromptMeta, draw_number, n_computed, submission};
use crate::prepare::{Origin, Prompt};
use std::sync::Arc;

/// Sequences of later attempts are named from here on; those of later steps never get so far.
pub(super) const FIRST_RETRY_ID: u64 = 3 << 61;
/// Later attempts share prefixes among themselves, not with the rows that come in plan order.
const RETRY_STREAM: u32 = 1 << 16;

impl Collector {
    /// Completions must be so, by step; seeds of attempts derive from the job's where a row has none.
    pub(super) fn judge_by(&mut self, policies: &[Option<Arc<Policy>>], job_seed: u64) {
        (self.policies, self.job_seed) = (policies.to_vec(), job_seed);
    }

    /// Judges a prompt's completions. False if they are not the row's: others are on their way, or it is an error.
    pub(super) fn stands(&mut self, leader: u64, prompt: usize) -> bool {
        let Self { flights, policies, .. } = self;
        let flight = flights.get_mut(&leader).expect("the caller looked");
        let results = &flight.results[prompt];
        let meta = &flight.rows[0].prompts[prompt];
        let step = meta.step;
        let Some(policy) = policies.get(step).and_then(Option::as_ref) else { return true };
        if results.iter().any(|result| result.broken.is_some()) {
            return true;
        }
        let columns = match &flight.rows[0].origin {
            Origin::Dataset { columns } => columns.as_deref(),
            Origin::Request { .. } => None,
        };
        let given = &flight.prompts[prompt];
        match policy.judge(results, columns, meta.n_attempts(), given) {
            Verdict::Keep(names) => {
                if !names.is_empty() {
                    flight.each_meta(prompt, |meta| meta.note_failed_checks(&names));
                }
                true
            }
            Verdict::Again => {
                let seed = attempt_seed(meta.first_seed(), self.job_seed, meta.n_attempts() + 1);
                let next = policy.next(given.clone(), seed);
                self.try_again(leader, prompt, next);
                false
            }
            Verdict::Refuse(why) => {
                let tried = self.answers.tried(meta, results);
                let message = format!("{why}; attempts: {}", tried.attempts);
                let error = RowError { tried: Some(Box::new(tried)), ..RowError::row(ErrorCode::CheckFailed, message) };
                flight.fail(step, error);
                false
            }
        }
    }

    /// Has a prompt completed again.
    fn try_again(&mut self, leader: u64, prompt: usize, next: Prompt) {
        let flight = self.flights.get_mut(&leader).expect("the caller looked");
        let results = std::mem::take(&mut flight.results[prompt]);
        flight.each_meta(prompt, |meta| meta.begin_again(&results, &next));
        let n_sequences = n_computed(&next);
        flight.n_missing[prompt] = n_sequences;
        flight.n_left += n_sequences;
        let seed = flight.rows[0].prompts[prompt].seed;
        let place = if matches!(flight.rows[0].origin, Origin::Request { .. }) { prompt } else { 0 };
        let again = |choice| {
            let keep_tokens = if choice + 1 < n_sequences { next.tokens.len() as u32 } else { 0 };
            let id = self.next_retry_id + choice as u64;
            let draw = (seed, draw_number(&next, place, choice));
            let sequence = submission(id, &next, draw, keep_tokens);
            Submission { stream: RETRY_STREAM + sequence.stream, ..sequence }
        };
        let submissions: Vec<Submission> = (0..n_sequences).map(again).collect();
        flight.prompts[prompt] = next;
        self.next_retry_id += n_sequences as u64;
        self.later.extend(submissions.iter().map(|sequence| (sequence.id, (leader, prompt))));
        self.counts.further_attempts += 1;
        self.counts.submitted += n_sequences as u64;
        // The stepper may have ended with the engine; then the end comes soon.
        let _nobody_listens = self.step_tasks.send(Task::Submit(submissions));
    }
}

impl super::answer::Answers {
    /// What was tried with a prompt, for its row's error.
    pub(super) fn tried(&self, meta: &PromptMeta, results: &[Finished]) -> Tried {
        let usage = meta.usage(results);
        Tried {
            attempts: meta.n_attempts(),
            seed: meta.seed,
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            system_fingerprint: self.stamp.system_fingerprint.clone(),
        }
    }
}
