//! Text as it is streamed, where it may turn out to be a thought or a function call. Invariant: what was shown is the beginning
//! of what the whole completion has, and so is what was counted of its thoughts.

use crate::outcome::Choice;
use crate::prepare::sequences::{PromptMeta, text_bytes};
use crate::text::thinking::{Counted, Split, Splitter};
use crate::text::tokenizer::Tokenizer;
use crate::text::tool_calls::CallFormat;

/// One completion's text so far.
#[derive(Debug)]
pub(super) struct Shown {
    /// If thoughts are told apart.
    splitter: Option<Splitter>,
    format: Option<CallFormat>,
    /// But for thoughts.
    text: String,
    n_told: usize,
    n_thought_told: usize,
    counted: Counted,
}

impl Shown {
    /// Of a completion of that prompt.
    pub(super) fn new(prompt: &PromptMeta) -> Self {
        let (splitter, format) = (prompt.thinking.map(Splitter::new), prompt.call_format);
        Self { splitter, format, text: String::new(), n_told: 0, n_thought_told: 0, counted: Counted::default() }
    }

    /// Takes in more text; gives what can be shown of it by now.
    pub(super) fn push(&mut self, more: &str) -> Split {
        let split = match &mut self.splitter {
            Some(splitter) => splitter.push(more),
            None => Split { thought: String::new(), answer: more.to_owned() },
        };
        self.n_thought_told += split.thought.len();
        self.text.push_str(&split.answer);
        let plain = self.format.map_or(self.text.len(), |format| format.plain_len(&self.text));
        let answer = self.text[self.n_told.min(plain)..plain].to_owned();
        self.n_told += answer.len();
        Split { answer, ..split }
    }

    /// Takes in the tokens of the text, so that those of thoughts are counted.
    pub(super) fn count(&mut self, tokens: &[u32], tokenizer: &Tokenizer) {
        if self.splitter.is_some() {
            for &id in tokens {
                self.counted.push(text_bytes(id, tokenizer));
            }
        }
    }

    /// Tokens that were thoughts and their marks, by now.
    pub(super) fn n_thought(&self) -> u64 {
        if self.has_thought() { self.counted.n_tokens as u64 } else { 0 }
    }

    /// Whether what comes now is no thought any more.
    pub(super) fn is_answering(&self) -> bool {
        self.splitter.as_ref().is_none_or(Splitter::is_answering)
    }

    /// Whether there are thoughts before the answer, or at least their marks.
    pub(super) fn has_thought(&self) -> bool {
        self.splitter.as_ref().is_some_and(Splitter::has_thought)
    }

    /// What is left to show of the completion.
    pub(super) fn rest(&self, choice: &Choice) -> Split {
        let rest = |text: &str, n_told: usize| text.get(n_told..).unwrap_or_default().to_owned();
        Split { thought: rest(choice.thoughts(), self.n_thought_told), answer: rest(&choice.text, self.n_told) }
    }
}
