//! What a sequence has drawn so far, for whoever keeps it, and a sequence that goes on from there. Knows nothing of where it
//! is kept. Invariants: the checkpoints of a sequence, joined in order, are the beginning of what its [`super::Finished`]
//! holds; a sequence that begins with them ends with the same bits. A sequence that is shorter than the distance between
//! two checkpoints costs nothing.

use std::sync::Arc;

use super::sequence::Sequence;
use super::shaping::Constraint;
use super::{SeqLogprob, TokenTable};

/// What a sequence gained since its last checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// As submitted.
    pub id: u64,
    /// As submitted: which of its row's completions.
    pub choice: u32,
    /// Its prompt.
    pub prompt: Arc<[u32]>,
    /// Tokens in earlier checkpoints.
    pub start: usize,
    /// Tokens drawn since.
    pub tokens: Vec<u32>,
    /// As [`super::Finished::logprobs`], of these tokens; in the first one, scored prompt tokens stand before them.
    pub logprobs: Vec<SeqLogprob>,
}

/// What a sequence begins with: the checkpoints of another life, joined.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Begun {
    /// Tokens drawn.
    pub tokens: Vec<u32>,
    /// Of the scored prompt tokens and of those, if asked for.
    pub logprobs: Vec<SeqLogprob>,
}

/// What of a sequence stands in checkpoints: counts.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Kept {
    tokens: usize,
    logprobs: usize,
    top: usize,
}

impl Sequence {
    /// Takes in what it begins with.
    pub(super) fn restore(&mut self, table: &dyn TokenTable) {
        let Some(begun) = self.params.begun.take() else { return };
        for &token in &begun.tokens {
            self.buffers.generated.push(token);
            if let Some(history) = &mut self.history {
                history.note(token);
            }
            self.push_text(token, table);
        }
        let n_scores = begun.logprobs.len().saturating_sub(begun.tokens.len());
        self.buffers.restore_logprobs(&begun.logprobs, n_scores);
        let top = begun.logprobs.iter().map(|entry| entry.top.len()).sum();
        self.kept = Kept { tokens: begun.tokens.len(), logprobs: begun.logprobs.len(), top };
        self.restored_end = self.n_tokens();
    }

    /// Starts its grammar, if it has one, and goes on to where its tokens are.
    pub(super) fn start_constraint(&mut self) {
        let Some(grammar) = &self.params.grammar else { return };
        let mut constraint = grammar.start();
        let followed = self.buffers.generated.iter().try_for_each(|&token| constraint.accept(token));
        if let Err(why) = followed {
            constraint = Box::new(Lost(why));
        }
        self.constraint = Some(constraint);
    }

    /// What it gained since its last checkpoint, if that is at least so many tokens.
    pub(super) fn take_checkpoint(&mut self, least: usize) -> Option<Checkpoint> {
        let Kept { tokens: start, logprobs: n_logprobs, top } = self.kept;
        if self.params.checkpoint == 0 || self.buffers.generated.len() < start + least.max(1) {
            return None;
        }
        let tokens = self.buffers.generated[start..].to_vec();
        let logprobs = self.logprobs_from(n_logprobs, top);
        self.kept = Kept {
            tokens: start + tokens.len(),
            logprobs: n_logprobs + logprobs.len(),
            top: top + logprobs.iter().map(|entry| entry.top.len()).sum::<usize>(),
        };
        Some(Checkpoint { id: self.id, choice: self.params.choice, prompt: Arc::clone(&self.prompt), start, tokens, logprobs })
    }

    /// Whether a checkpoint of it is due.
    pub(super) fn wants_checkpoint(&self) -> bool {
        let every = self.params.checkpoint as usize;
        every > 0 && self.buffers.generated.len() >= self.kept.tokens + every
    }
}

/// A grammar that could not be followed.
struct Lost(String);

impl Constraint for Lost {
    fn mask(&mut self, _words: &mut [u32]) -> Result<(), String> {
        Err(self.0.clone())
    }

    fn accept(&mut self, _token: u32) -> Result<(), String> {
        Err(self.0.clone())
    }
}
