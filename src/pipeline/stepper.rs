//! The thread that prepares later steps of dataset rows: when a row's earlier steps have given what a step needs, its
//! prompt is made and submitted, whatever the other rows are at. Invariant: a step is announced to the collector before
//! it is submitted.

use super::checkpoint::Checkpoints;
use super::collect::Event;
use super::reuse::Lookup;
use super::window::derived_seed;
use crate::engine::Submission;
use crate::engine::handle::EngineHandle;
use crate::outcome::RowError;
use crate::prepare::sequences::{PromptMeta, draw_number, n_computed, submission};
use crate::prepare::{Preparer, Prompt, StepAnswer};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

/// What the thread is to do.
pub(super) enum Task {
    /// To prepare a step, and submit it.
    Prepare(StepTask),
    /// To submit what the collector has announced to itself.
    Submit(Vec<Submission>),
}

/// A step that can be run.
pub(super) struct StepTask {
    pub(super) row_idx: u64,
    pub(super) step: usize,
    /// The row's own columns.
    pub(super) columns: Arc<str>,
    /// What its steps have given so far.
    pub(super) answers: Vec<Option<StepAnswer>>,
}

/// A step that was prepared.
pub(super) struct PreparedStep {
    pub(super) row_idx: u64,
    pub(super) step: usize,
    /// Its prompt and the names of its sequences, or the row's error.
    pub(super) prompt: Result<(PromptMeta, Vec<u64>, Box<Prompt>), RowError>,
}

/// What the thread owns.
pub(super) struct Stepper {
    pub(super) preparer: Arc<Preparer>,
    pub(super) engine: Arc<EngineHandle>,
    pub(super) tasks: Receiver<Task>,
    pub(super) events: Sender<Event>,
    /// What jobs share.
    pub(super) lookup: Option<Lookup>,
    pub(super) job_seed: u64,
    pub(super) checkpoints: Arc<Checkpoints>,
}

/// Sequences of later steps are named from here on; a window's never get so far.
pub(super) const FIRST_ID: u64 = 1 << 62;

impl Stepper {
    /// Works until there is nobody left to give it tasks.
    pub(super) fn run(self) {
        let mut next_id = FIRST_ID;
        let mut last: Vec<Arc<[u32]>> = Vec::new(); // each step's last prompt
        for task in &self.tasks {
            let StepTask { row_idx, step, columns, answers } = match task {
                Task::Prepare(task) => task,
                Task::Submit(submissions) => {
                    if !self.submit(submissions) {
                        return;
                    }
                    continue;
                }
            };
            let prompt = match self.preparer.prepare_step(row_idx, &columns, step, &answers) {
                Ok(prompt) => prompt,
                Err(error) => {
                    if self.tell(PreparedStep { row_idx, step, prompt: Err(error) }).is_err() {
                        return;
                    }
                    continue;
                }
            };
            let ids: Vec<u64> = (next_id..).take(n_computed(&prompt)).collect();
            next_id += ids.len() as u64;
            let meta = PromptMeta::new(&prompt, || derived_seed(self.job_seed, row_idx));
            let seed = meta.seed;
            if self.tell(PreparedStep { row_idx, step, prompt: Ok((meta, ids.clone(), Box::new(prompt.clone()))) }).is_err() {
                return;
            }
            // What it shares with the last one, the next one is likely to share too.
            last.resize(last.len().max(step + 1), Arc::default());
            let keep_tokens = last[step].iter().zip(prompt.tokens.iter()).take_while(|(a, b)| a == b).count() as u32;
            last[step] = Arc::clone(&prompt.tokens);
            let submission = |(choice, &id): (usize, &u64)| {
                let keep_tokens = if choice + 1 < ids.len() { prompt.tokens.len() as u32 } else { keep_tokens };
                let draw = (seed, draw_number(&prompt, 0, choice));
                let mut submission = submission(id, &prompt, draw, keep_tokens);
                self.checkpoints.apply(row_idx, &mut submission);
                submission
            };
            if !self.submit(ids.iter().enumerate().map(submission).collect()) {
                return;
            }
        }
    }

    /// False if the job is over.
    fn submit(&self, mut submissions: Vec<Submission>) -> bool {
        if let Some(lookup) = &self.lookup {
            let known = lookup.split(&mut submissions);
            if self.events.send(Event::Known(known)).is_err() {
                return false;
            }
        }
        // Refused only by an engine that has stopped; then the collector hears of it.
        self.engine.submit_all(submissions.into_iter())
    }

    fn tell(&self, step: PreparedStep) -> Result<(), ()> {
        self.events.send(Event::Prepared(step)).map_err(drop)
    }
}
