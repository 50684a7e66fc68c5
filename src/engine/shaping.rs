//! What of a sequence's past changes its next logits: penalties for tokens that stand in it already, biases, and the
//! tokens that may come next under a grammar. Knows nothing of grammars or of the arithmetic. Invariant: all of it is a
//! function of the sequence's own tokens and parameters.

use super::sampling::SeqParams;
use crate::device::batch::LogitEdit;
use std::collections::HashMap;
use std::fmt;

/// Texts that a completion may be, compiled; shared by all rows that ask for the same.
pub trait Grammar: Send + Sync + fmt::Debug {
    /// Hash of what it allows; `None` if nobody knows: then what follows it is computed each time.
    fn identity(&self) -> Option<[u8; 32]> {
        None
    }

    /// At the start of a completion.
    fn start(&self) -> Box<dyn Constraint>;
}

/// A completion that follows a grammar.
pub trait Constraint: Send {
    /// Sets the bits of the tokens that may come next, end tokens included, and clears all others; bit `i % 32` of word
    /// `i / 32` is token i.
    ///
    /// # Errors
    /// The grammar can't be followed (it is too large, say); the message is for people.
    fn mask(&mut self, words: &mut [u32]) -> Result<(), String>;

    /// Goes on by a token that the mask allowed and that is no end token.
    ///
    /// # Errors
    /// As [`Constraint::mask`].
    fn accept(&mut self, token: u32) -> Result<(), String>;
}

/// Changes to logits, one per token that has any.
pub(super) struct LogitHistory {
    edits: Vec<LogitEdit>,
    /// Of each edit: the bias that the row asks for, and how often the token was drawn.
    counts: Vec<(f32, u32)>,
    /// Token -> index of its edit.
    places: HashMap<u32, u32>,
    presence: f32,
    frequency: f32,
    repetition: f32,
}

impl LogitHistory {
    /// `None` if nothing of it changes a logit.
    pub(super) fn new(params: &SeqParams, prompt: &[u32]) -> Option<Box<Self>> {
        let (presence, frequency, repetition) = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty);
        if (presence, frequency, repetition) == (0.0, 0.0, 1.0) && params.logit_bias.is_empty() {
            return None;
        }
        let mut history = Self { edits: Vec::new(), counts: Vec::new(), places: HashMap::new(), presence, frequency, repetition };
        for &(token, bias) in &params.logit_bias {
            let place = history.place(token);
            history.counts[place].0 += bias;
            history.edits[place].bias = history.counts[place].0;
        }
        let penalises = (repetition - 1.0).abs() > 0.0;
        if penalises {
            for &token in prompt {
                let place = history.place(token);
                history.edits[place].penalty = repetition;
            }
        }
        Some(Box::new(history))
    }

    /// Takes in a drawn token.
    pub(super) fn note(&mut self, token: u32) {
        let place = self.place(token);
        let (bias, count) = &mut self.counts[place];
        *count += 1;
        self.edits[place].penalty = self.repetition;
        self.edits[place].bias = *bias - self.presence - self.frequency * *count as f32;
    }

    pub(super) fn edits(&self) -> &[LogitEdit] {
        &self.edits
    }

    fn place(&mut self, token: u32) -> usize {
        *self.places.entry(token).or_insert_with(|| {
            self.edits.push(LogitEdit { token, penalty: 1.0, bias: 0.0 });
            self.counts.push((0.0, 0));
            self.edits.len() as u32 - 1
        }) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn penalties_count_what_was_drawn() {
        let params = SeqParams {
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            repetition_penalty: 1.5,
            logit_bias: vec![(7, 2.0), (7, 1.0)],
            ..SeqParams::default()
        };
        let mut history = LogitHistory::new(&params, &[3, 3]).unwrap();
        let edit = |token, penalty, bias| LogitEdit { token, penalty, bias };
        assert_eq!(history.edits(), [edit(7, 1.0, 3.0), edit(3, 1.5, 0.0)]);
        history.note(7);
        history.note(9);
        history.note(7);
        assert_eq!(history.edits(), [edit(7, 1.5, 2.0), edit(3, 1.5, 0.0), edit(9, 1.5, -0.75)]);
        assert!(LogitHistory::new(&SeqParams::default(), &[1]).is_none());
    }
}
