//! From a prompt to the sequences that the engine runs, and from what they came to back to the prompt's completions.
//! The same for rows of jobs and for live calls. Invariant: what a sequence is asked for, and what is made of its tokens,
//! depends on the prompt and the seed alone, so that the same request has the same bits through every door.

use super::Prompt;
use crate::engine::sampling::SeqParams;
use crate::engine::{Due, Finished, SeqLogprob, Submission};
use crate::outcome::{Choice, FinishReason, Thought, TokenLogprob, Usage};
use crate::request::MAX_CHOICES;
use crate::text::thinking::{self, ThinkFormat};
use crate::text::tokenizer::Tokenizer;
use crate::text::tool_calls::CallFormat;
use crate::window::Class;
use crate::window::turns::Share;
use std::sync::Arc;

/// Which of a request's stop strings has ended a completion: what was drawn goes on with it after the text.
pub fn stop_of(finished: &Finished, stops: &[String], tokenizer: &Tokenizer) -> Option<String> {
    let drawn = finished.tokens.iter().filter(|&&id| !tokenizer.is_special(id));
    let bytes: Vec<u8> = drawn.flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
    let text = String::from_utf8_lossy(&bytes);
    let after = text.get(finished.text.len()..)?;
    stops.iter().filter(|stop| after.starts_with(stop.as_str())).min_by_key(|stop| stop.len()).cloned()
}

/// What is known of one prompt of a row.
#[expect(clippy::struct_excessive_bools, reason = "independent facts of a request")]
#[derive(Debug, Clone)]
pub struct PromptMeta {
    /// As [`Prompt::step`].
    pub step: usize,
    /// Its length.
    pub n_tokens: u32,
    /// Tokens that the plan shares.
    pub cached_tokens: u32,
    /// The seed of the draw; `None` if greedy.
    pub seed: Option<u64>,
    /// Completions wanted.
    pub n_choices: usize,
    logprobs: bool,
    /// As [`Prompt::call_format`].
    pub call_format: Option<CallFormat>,
    one_call: bool,
    /// As [`Prompt::thinking`].
    pub thinking: Option<ThinkFormat>,
    /// Whether the answer begins with the prompt.
    pub echo: bool,
    /// The prompt's tokens from this one on are scored.
    score_from: Option<usize>,
    /// The prompt, where the answer needs it.
    tokens: Option<Arc<[u32]>>,
    /// Whether nothing is generated.
    pub is_scored_only: bool,
    /// What is known of it beyond its first attempt; `None` if nothing is.
    attempts: Option<Box<Attempts>>,
}

/// What became of a prompt that is completed more than once, or not as it should be.
#[derive(Debug, Clone)]
struct Attempts {
    /// How many there were, the last one included.
    n: u32,
    /// The seed of the first.
    first_seed: Option<u64>,
    /// Tokens of all but the last.
    earlier: Usage,
    /// What the last one failed.
    failed_checks: Vec<String>,
}

impl PromptMeta {
    /// Of a prompt; `derived_seed` gives the seed where the request names none and one is needed.
    pub fn new(prompt: &Prompt, derived_seed: impl FnOnce() -> u64) -> Self {
        Self {
            step: prompt.step,
            n_tokens: prompt.tokens.len() as u32,
            cached_tokens: 0,
            seed: draw_seed(prompt, derived_seed),
            n_choices: prompt.params.n as usize,
            logprobs: prompt.params.logprobs.is_some(),
            call_format: prompt.call_format,
            one_call: prompt.one_call,
            thinking: prompt.thinking,
            echo: prompt.params.echo,
            score_from: prompt.score_from.map(|first| first as usize),
            tokens: prompt.params.echo.then(|| Arc::clone(&prompt.tokens)),
            is_scored_only: prompt.max_tokens == 0,
            attempts: None,
        }
    }

    /// How often it is completed, this time included.
    pub fn n_attempts(&self) -> u32 {
        self.attempts.as_ref().map_or(1, |attempts| attempts.n)
    }

    /// The seed of its first attempt.
    pub fn first_seed(&self) -> Option<u64> {
        self.attempts.as_ref().map_or(self.seed, |attempts| attempts.first_seed)
    }

    /// What its completions failed and are kept all the same.
    pub fn failed_checks(&self) -> &[String] {
        self.attempts.as_ref().map_or(&[], |attempts| &attempts.failed_checks)
    }

    fn attempts(&mut self) -> &mut Attempts {
        let first_seed = self.seed;
        let new = || Box::new(Attempts { n: 1, first_seed, earlier: Usage::default(), failed_checks: Vec::new() });
        self.attempts.get_or_insert_with(new)
    }

    /// Its completions fail these checks, and are kept.
    pub fn note_failed_checks(&mut self, names: &[String]) {
        self.attempts().failed_checks = names.to_vec();
    }

    /// It is completed again, as `next`, instead of having these completions. Its prompt is computed again, whatever the plan
    /// says of the first time; that of a row which gets another's completion never is.
    pub fn begin_again(&mut self, given: &[Finished], next: &Prompt) {
        let earlier = self.usage(given);
        let attempts = self.attempts();
        attempts.n += 1;
        attempts.earlier = earlier;
        self.seed = draw_seed(next, || 0);
        // What is computed is never shared as a whole.
        if self.cached_tokens < self.n_tokens {
            self.cached_tokens = 0;
        }
    }

    /// It is another row's prompt, and is completed as often as that one.
    pub fn follow(&mut self, other: &Self) {
        self.seed = other.seed;
        self.attempts.clone_from(&other.attempts);
        if let Some(attempts) = &mut self.attempts {
            attempts.earlier.cached_tokens = attempts.earlier.prompt_tokens;
        }
    }

    /// The same prompt of a row that gets another row's completion.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self { cached_tokens: self.n_tokens, ..self.clone() }
    }

    /// Whether its one completion's text is all of its answer.
    pub fn is_plain(&self) -> bool {
        self.n_choices == 1 && !self.logprobs && !self.echo && self.call_format.is_none() && self.thinking.is_none()
    }

    /// Its usage, given its completions.
    pub fn usage(&self, choices: &[Finished]) -> Usage {
        let each: u32 = choices.iter().map(|choice| choice.tokens.len() as u32).sum();
        // One greedy completion that stands for several.
        let copies = (self.n_choices / choices.len().max(1)) as u32;
        let last = Usage { prompt_tokens: self.n_tokens, completion_tokens: each * copies, cached_tokens: self.cached_tokens };
        self.attempts.as_ref().map_or(last, |attempts| attempts.earlier.plus(last))
    }

    /// A prompt's completions; one that is computed once for all choices is repeated.
    pub fn choices(&self, computed: &[Finished], tokenizer: &Tokenizer) -> Vec<Choice> {
        let choices: Vec<Choice> = computed.iter().map(|finished| self.choice(finished, tokenizer)).collect();
        if choices.len() >= self.n_choices {
            return choices;
        }
        choices.iter().cycle().take(self.n_choices).cloned().collect()
    }

    /// What an answer begins with where it repeats its prompt: its text, and entries for the tokens that nothing scores.
    pub fn echoed(&self, tokenizer: &Tokenizer) -> (String, Vec<TokenLogprob>) {
        let Some(tokens) = self.tokens.as_deref() else { return Default::default() };
        let n_unscored = if self.logprobs { self.score_from.unwrap_or(0) } else { 0 };
        let unscored = tokens.iter().take(n_unscored);
        let unscored =
            unscored.map(|&id| TokenLogprob { bytes: tokenizer.token_bytes(id).to_vec(), logprob: None, top: Vec::new() });
        (tokenizer.decode(tokens), unscored.collect())
    }

    fn choice(&self, finished: &Finished, tokenizer: &Tokenizer) -> Choice {
        let mut text = finished.text.clone();
        let mut finish_reason = finished.finish_reason;
        let (mut tool_calls, mut thought) = (Vec::new(), None);
        if let Some(format) = self.thinking {
            let (found, answer) = format.parse(&text);
            let n_tokens = || n_thought(finished.tokens.iter().copied(), tokenizer) as u32;
            thought = found.map(|text| Thought { text, n_tokens: n_tokens() });
            text = answer;
        }
        if let Some(format) = self.call_format {
            (text, tool_calls) = format.parse(&text);
            tool_calls.truncate(if self.one_call { 1 } else { usize::MAX });
            if !tool_calls.is_empty() && finish_reason == FinishReason::Stop {
                finish_reason = FinishReason::ToolCalls;
            }
        }
        let (before, mut entries) = self.echoed(tokenizer);
        text.insert_str(0, &before);
        let logprobs = self.logprobs.then(|| {
            entries.extend(finished.logprobs.iter().map(|entry| token_logprob(entry, tokenizer)));
            entries
        });
        Choice { text, thought, tool_calls, finish_reason, logprobs }
    }
}

/// How many of a completion's tokens are its thoughts and their marks, if it begins with thoughts.
pub fn n_thought(tokens: impl Iterator<Item = u32>, tokenizer: &Tokenizer) -> usize {
    thinking::n_thought(tokens.map(|id| text_bytes(id, tokenizer)))
}

/// What a token adds to the text: of a special one, nothing.
pub fn text_bytes(id: u32, tokenizer: &Tokenizer) -> &[u8] {
    if tokenizer.is_special(id) { &[][..] } else { tokenizer.token_bytes(id) }
}

/// An entry with its tokens' bytes.
pub fn token_logprob(entry: &SeqLogprob, tokenizer: &Tokenizer) -> TokenLogprob {
    let bytes = |id: u32| tokenizer.token_bytes(id).to_vec();
    TokenLogprob {
        bytes: bytes(entry.token),
        logprob: Some(entry.logprob),
        top: entry.top.iter().map(|&(id, logprob)| (bytes(id), logprob)).collect(),
    }
}

/// Completions of a prompt that are computed: greedy ones are all the same.
pub fn n_computed(prompt: &Prompt) -> usize {
    if prompt.params.temperature == 0.0 { 1 } else { prompt.params.n as usize }
}

/// Which of its row's completions one is: draws with the same seed differ by it.
pub fn draw_number(prompt: &Prompt, prompt_idx: usize, choice: usize) -> u32 {
    // Requests have one step and perhaps several prompts; dataset rows one prompt per step.
    (prompt_idx.max(prompt.step) as u32) * MAX_CHOICES + choice as u32
}

/// The engine's work for one completion; `draw` is the row's seed and which of its completions it is.
pub fn submission(id: u64, prompt: &Prompt, draw: (Option<u64>, u32), keep_tokens: u32) -> Submission {
    let params = &prompt.params;
    Submission {
        id,
        prompt: Arc::clone(&prompt.tokens),
        params: SeqParams {
            max_tokens: prompt.max_tokens,
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            min_p: params.min_p,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            repetition_penalty: params.repetition_penalty,
            logit_bias: params.logit_bias.clone(),
            min_tokens: params.min_tokens,
            stop_tokens: params.stop_tokens.clone(),
            score_from: prompt.score_from,
            grammar: prompt.grammar.clone(),
            seed: draw.0.unwrap_or(0),
            choice: draw.1,
            stop: params.stop.clone(),
            ignore_eos: params.ignore_eos,
            repetition: params.repetition,
            logprobs: params.logprobs,
            watch: false,
            checkpoint: 0,
            begun: None,
            keep: None,
            share: Share::default(),
        },
        class: Class::Batch,
        keep_tokens,
        stream: prompt.step as u32,
        due: Due::NEVER,
    }
}

/// The seed that a prompt's tokens are drawn with; `None` if none is drawn.
fn draw_seed(prompt: &Prompt, derived_seed: impl FnOnce() -> u64) -> Option<u64> {
    let is_drawn = prompt.params.temperature > 0.0 && prompt.max_tokens > 0;
    is_drawn.then(|| prompt.params.seed.unwrap_or_else(derived_seed))
}
