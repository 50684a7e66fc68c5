//! What watched sequences gained in a step, for callers that stream. Knows nothing of who watches. Invariant: what a
//! sequence is told of, joined in order, is what its [`super::Finished`] holds, and nothing told is ever taken back:
//! text that may be the beginning of a stop string waits. A sequence that nobody watches costs nothing.

use super::SeqLogprob;
use super::sequence::Sequence;

/// What one sequence gained since it was last told of.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// As submitted.
    pub id: u64,
    /// Tokens drawn.
    pub tokens: Vec<u32>,
    /// Text that no later token can change; it may lag behind the tokens.
    pub text: String,
    /// As [`super::Finished::logprobs`].
    pub logprobs: Vec<SeqLogprob>,
    /// Leading tokens of the prompt that were in the KV cache when it first ran.
    pub cached_tokens: u32,
}

/// How far a sequence was told of: counts.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Told {
    tokens: usize,
    text_bytes: usize,
    logprobs: usize,
    top: usize,
}

impl Sequence {
    /// What it gained; `None` if nothing. `is_last` if nothing more will come.
    pub(super) fn take_progress(&mut self, is_last: bool) -> Option<Progress> {
        let Told { tokens: n_tokens, text_bytes: n_text_bytes, logprobs: n_logprobs, top: n_top } = self.told;
        let logprobs = self.logprobs_from(n_logprobs, n_top);
        let buffers = &mut self.buffers;
        if is_last {
            buffers.text.finish();
        }
        let text = buffers.text.text();
        let stable = if is_last { text.len() } else { buffers.text.stable_len(&self.params.stop) };
        let progress = Progress {
            id: self.id,
            tokens: buffers.generated[n_tokens..].to_vec(),
            text: text[n_text_bytes.min(stable)..stable].to_owned(),
            cached_tokens: self.n_cached.min(self.prompt.len()) as u32,
            logprobs,
        };
        self.told = Told {
            tokens: n_tokens + progress.tokens.len(),
            text_bytes: n_text_bytes + progress.text.len(),
            logprobs: n_logprobs + progress.logprobs.len(),
            top: n_top + progress.logprobs.iter().map(|entry| entry.top.len()).sum::<usize>(),
        };
        let is_empty = progress.tokens.is_empty() && progress.text.is_empty() && progress.logprobs.is_empty();
        (!is_empty).then_some(progress)
    }
}
