//! Long rows that go on where an earlier run left them: what the engine gives of a sequence on its way, as the journal keeps
//! it, and back. Invariant: a sequence goes on only from its own tokens, by its row, its number and its prompt; whatever does
//! not fit is computed from the start.

use super::collect::{Collector, Event};
use crate::config::KEEP_SECONDS;
use crate::engine::{Begun, Checkpoint, SeqLogprob, Submission};
use crate::journal;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One checkpoint in the journal. Log-probabilities as bits: they come back as they were.
#[derive(Debug, Serialize, Deserialize)]
struct Data {
    /// Hash of the prompt.
    prompt: u64,
    tokens: Vec<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<Entry>,
}

/// A token, its log-probability's bits, and the likeliest tokens with theirs.
type Entry = (u32, u32, Vec<(u32, u32)>);

/// By row and the number of its sequence; with the prompt's hash.
type BegunSequences = HashMap<(u64, u32), (u64, Begun)>;

/// What sequences are to begin with, and how often they are to be kept.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    /// Tokens between two; 0 for none.
    every: u32,
    /// `None` if no row was begun: nobody needs to look.
    begun: Option<Mutex<BegunSequences>>,
}

impl Checkpoints {
    /// Those of the rows that earlier runs have begun.
    ///
    /// # Errors
    /// The journal holds something else.
    pub(super) fn new(every: u32, rows: journal::BegunRows) -> Result<Self> {
        let mut begun = HashMap::new();
        for (row, part, pieces) in rows.into_parts() {
            let mut joined = (0, Begun::default());
            for piece in pieces {
                let Data { prompt, tokens, logprobs } =
                    serde_json::from_str(&piece).with_context(|| format!("the checkpoint of row {row}"))?;
                let entries = logprobs.into_iter().map(|(token, bits, top)| SeqLogprob {
                    token,
                    logprob: f32::from_bits(bits),
                    top: top.into_iter().map(|(token, bits)| (token, f32::from_bits(bits))).collect(),
                });
                joined.0 = prompt;
                joined.1.tokens.extend(tokens);
                joined.1.logprobs.extend(entries);
            }
            begun.insert((row, part), joined);
        }
        Ok(Self { every, begun: (!begun.is_empty()).then(|| Mutex::new(begun)) })
    }

    /// Makes a row's sequence go on from where it was, and be kept.
    pub(super) fn apply(&self, row: u64, submission: &mut Submission) {
        submission.params.checkpoint = self.every;
        let Some(rows) = &self.begun else { return };
        let found = rows.lock().unwrap_or_else(PoisonError::into_inner).remove(&(row, submission.params.choice));
        let Some((prompt, begun)) = found else { return };
        let params = &submission.params;
        let n_scores = params.score_from.map_or(0, |first| submission.prompt.len().saturating_sub(first as usize));
        let n_entries = params.logprobs.map_or(0, |_| begun.tokens.len() + n_scores);
        let fits = begun.tokens.len() < params.max_tokens as usize && begun.logprobs.len() == n_entries;
        if fits && prompt == prompt_hash(&submission.prompt) {
            submission.params.begun = Some(Arc::new(begun));
        }
    }
}

/// A checkpoint of a row as the journal keeps it.
fn of_row(row: u64, checkpoint: &Checkpoint) -> journal::Checkpoint<'static> {
    let Checkpoint { choice, prompt, start, tokens, logprobs, .. } = checkpoint;
    let bits = |(token, logprob): &(u32, f32)| (*token, logprob.to_bits());
    let logprobs = logprobs.iter().map(|e| (e.token, e.logprob.to_bits(), e.top.iter().map(bits).collect())).collect();
    let data = Data { prompt: prompt_hash(prompt), tokens: tokens.clone(), logprobs };
    let data = serde_json::to_string(&data).expect("numbers are JSON").into();
    journal::Checkpoint { row, part: *choice, start: *start as u64, end: (start + tokens.len()) as u64, data }
}

impl Collector {
    /// Journals how far sequences came, at once: they are few, and each is the work of many steps.
    pub(super) fn keep(&mut self, checkpoints: &[Checkpoint]) -> Result<()> {
        for checkpoint in checkpoints {
            let row = self.row_of(checkpoint.id);
            self.journal.checkpoint(&of_row(row, checkpoint))?;
        }
        self.journal.begin_commit()
    }

    /// Takes what an engine that was told to end still gives, and commits it.
    pub(super) fn keep_the_rest(&mut self, events: &Receiver<Event>) -> Result<()> {
        let start = Instant::now();
        while let Some(left) = Duration::from_secs_f64(KEEP_SECONDS).checked_sub(start.elapsed()) {
            match events.recv_timeout(left) {
                Ok(Event::EngineEnded) | Err(_) => break,
                // What the feed says now is of no interest: it was told to end, too.
                Ok(Event::FeedEnded(_)) => {}
                Ok(event) => self.take(event)?,
            }
        }
        self.journal.commit()
    }
}

fn prompt_hash(prompt: &[u32]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for token in prompt {
        hasher.update(&token.to_le_bytes());
    }
    let hash = hasher.finalize();
    let (head, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    u64::from_le_bytes(*head)
}
