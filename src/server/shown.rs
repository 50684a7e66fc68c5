//! Text as it is streamed, where it may turn out to be a function call. Invariant: what was shown is the beginning of
//! the text that the whole completion has.

use crate::text::tool_calls::CallFormat;

/// One completion's text so far.
#[derive(Debug, Default)]
pub(super) struct Shown {
    format: Option<CallFormat>,
    text: String,
    n_told: usize,
}

impl Shown {
    /// Of a completion that may hold calls in that form.
    pub(super) fn new(format: Option<CallFormat>) -> Self {
        Self { format, ..Self::default() }
    }

    /// Takes in more text; gives what can be shown of it by now.
    pub(super) fn push(&mut self, more: &str) -> String {
        self.text.push_str(more);
        let plain = self.format.map_or(self.text.len(), |format| format.plain_len(&self.text));
        let next = self.text[self.n_told.min(plain)..plain].to_owned();
        self.n_told += next.len();
        next
    }

    /// What is left to show of the completion's text.
    pub(super) fn rest<'a>(&self, text: &'a str) -> &'a str {
        text.get(self.n_told..).unwrap_or_default()
    }
}
