//! A completion as bytes, and back. Invariant: what comes back is what was stored, under the key that it was stored by.

use serde::{Deserialize, Serialize};

use super::Key;
use crate::engine::{Finished, SeqLogprob};
use crate::outcome::FinishReason;

/// Bytes of a result's hash before it.
const HASH_BYTES: usize = 8;

/// A completion as it is stored; log-probabilities as bits, so that they come back as they were.
#[derive(Serialize, Deserialize)]
struct Stored {
    tokens: Vec<u32>,
    text: String,
    reason: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<StoredLogprob>,
}

/// Token, bits, and the likeliest tokens with theirs.
type StoredLogprob = (u32, u32, Vec<(u32, u32)>);

/// So that neither damage nor another key's result passes for this one's.
fn hash(key: &Key, text: &[u8]) -> [u8; HASH_BYTES] {
    let hash = *blake3::Hasher::new().update(key).update(text).finalize().as_bytes();
    *hash.first_chunk().expect("a hash has 32 bytes")
}

pub(super) fn encode(key: &Key, finished: &Finished) -> Vec<u8> {
    let logprob = |entry: &SeqLogprob| {
        let top = entry.top.iter().map(|(token, logprob)| (*token, logprob.to_bits())).collect();
        (entry.token, entry.logprob.to_bits(), top)
    };
    let stored = Stored {
        tokens: finished.tokens.clone(),
        text: finished.text.clone(),
        reason: finished.finish_reason.as_str().to_owned(),
        logprobs: finished.logprobs.iter().map(logprob).collect(),
    };
    let mut bytes = vec![0; HASH_BYTES];
    serde_json::to_writer(&mut bytes, &stored).expect("numbers and texts are JSON, and memory takes it");
    let hash = hash(key, &bytes[HASH_BYTES..]);
    bytes[..HASH_BYTES].copy_from_slice(&hash);
    bytes
}

/// `None` if that is not what was written.
pub(super) fn decode(id: u64, key: &Key, bytes: &[u8]) -> Option<Finished> {
    let (known, text) = bytes.split_at_checked(HASH_BYTES)?;
    if hash(key, text) != *known {
        return None;
    }
    let Stored { tokens, text, reason, logprobs } = serde_json::from_slice(text).ok()?;
    let finish_reason = FinishReason::parse(&reason)?;
    let logprob = |(token, bits, top): StoredLogprob| {
        let top = top.into_iter().map(|(token, bits)| (token, f32::from_bits(bits))).collect();
        SeqLogprob { token, logprob: f32::from_bits(bits), top }
    };
    let logprobs = logprobs.into_iter().map(logprob).collect();
    Some(Finished { id, tokens, text, finish_reason, logprobs, broken: None })
}
