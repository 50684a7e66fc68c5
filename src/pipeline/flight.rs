//! What is known of rows between their submission and their outcome. Invariant: a row that one sequence completes is no more
//! than its entry in its window; what has more to wait for is a flight.

use super::answer::RowMeta;
use super::window::Group;
use crate::engine::Finished;
use crate::outcome::RowError;
use crate::prepare::sequences::PromptMeta;
use crate::prepare::{Prompt, StepAnswer};

/// A window with rows that have no record yet.
pub(super) struct OpenWindow {
    pub(super) number: u64,
    /// Where in the inputs it ends, and all windows after it that have been closed before it.
    pub(super) end: String,
    /// Rows without a record.
    pub(super) n_open: usize,
    /// By group, the row that is computed; ascending.
    pub(super) leaders: Vec<u64>,
    /// By group; none that has landed or become a [`Flight`].
    pub(super) groups: Vec<Option<Group>>,
    /// See [`super::window::PlannedWindow`].
    pub(super) first_id: u64,
    pub(super) sequences: Vec<(u32, u32)>,
}

impl OpenWindow {
    /// The group and the prompt that a sequence completes, if it is one of the window's.
    pub(super) fn sequence(&self, id: u64) -> Option<(usize, usize)> {
        let &(group, prompt) = self.sequences.get(usize::try_from(id.checked_sub(self.first_id)?).ok()?)?;
        Some((group as usize, prompt as usize))
    }
}

/// A row that is being computed.
pub(super) struct Flight {
    /// The row itself and those of its window that get its completion.
    pub(super) rows: Vec<RowMeta>,
    /// Their window's number.
    pub(super) window: u64,
    /// Rows of later windows that get it too, with their windows' numbers.
    pub(super) followers: Vec<(u64, RowMeta)>,
    /// The completions of each of its prompts: as they come, and in the order of its choices once all have.
    pub(super) results: Vec<Vec<Finished>>,
    /// Its prompts, where they may have to be run again; else none.
    pub(super) prompts: Vec<Prompt>,
    /// How many of each are missing.
    pub(super) n_missing: Vec<usize>,
    /// Sequences that have not finished, and steps that are being prepared.
    pub(super) n_left: usize,
    /// By step.
    pub(super) answers: Vec<Option<StepAnswer>>,
    /// By step: whether it is being prepared or was.
    pub(super) is_started: Vec<bool>,
    /// Of the first prompt, in order of steps, that has one.
    pub(super) error: Option<(usize, RowError)>,
}

impl Flight {
    /// `n_missing`: how many sequences complete each of its prompts.
    pub(super) fn new(number: u64, group: Group, n_missing: Vec<usize>, n_steps: usize) -> Self {
        let mut rows = group.same;
        rows.insert(0, group.leader);
        Self {
            rows,
            window: number,
            followers: Vec::new(),
            results: n_missing.iter().map(|&n| Vec::with_capacity(n)).collect(),
            prompts: group.prompts,
            n_missing,
            n_left: group.n_sequences as usize,
            answers: vec![None; n_steps],
            is_started: vec![false; n_steps],
            error: None,
        }
    }

    /// A step can't be done. Which error the row gets must not depend on which step was the first to fail.
    pub(super) fn fail(&mut self, step: usize, error: RowError) {
        if self.error.as_ref().is_none_or(|(first, _)| step < *first) {
            self.error = Some((step, error));
        }
    }

    /// Changes what is known of a prompt of this row, and of all rows that get the same.
    pub(super) fn each_meta(&mut self, prompt: usize, change: impl Fn(&mut PromptMeta)) {
        let followers = self.followers.iter_mut().map(|(_, row)| row);
        self.rows.iter_mut().chain(followers).for_each(|row| change(&mut row.prompts[prompt]));
    }

    /// Another row gets the same.
    pub(super) fn follow(&mut self, number: u64, mut row: RowMeta) {
        for (own, first) in row.prompts.iter_mut().zip(&self.rows[0].prompts) {
            own.follow(first);
        }
        let later = &self.rows[0].prompts[row.prompts.len()..];
        row.prompts.extend(later.iter().map(PromptMeta::shared));
        self.followers.push((number, row));
    }
}
