//! What a segment says of its rows besides their output lines, in a line of its own: a job is gone on with by reading these
//! lines and not all others, which are twenty times as long. Knows nothing of stores. Invariant: what is read is what was
//! written; anything else is refused.

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;

use super::Record;

/// What the journal knows of a row's outcome without its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Noted {
    /// Index of the row over all input files.
    pub row: u64,
    /// Whether the row completed.
    pub ok: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Prompt tokens shared with another row.
    pub cached_tokens: u32,
    /// See [`Record::key`].
    pub key: Option<u128>,
    /// See [`Record::id`].
    pub id: Option<u128>,
    /// Where the record is in the segment.
    pub(super) bytes: Range<u64>,
}

impl Noted {
    /// Of a record at a place.
    pub(super) fn new(record: &Record<'_>, bytes: Range<u64>) -> Self {
        let &Record { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, id, line: _ } = record;
        Self { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, id, bytes }
    }
}

/// The line around the index.
const HEAD: &[u8] = br#"{"index":""#;
const TAIL: &[u8] = b"\"}\n";

/// An index being gathered: numbers of seven bits a byte (LEB128), rows and places as differences to the one before.
#[derive(Debug, Default)]
pub(super) struct SegmentIndex {
    bytes: Vec<u8>,
    last_row: u64,
    last_end: u64,
}

impl SegmentIndex {
    pub(super) fn push(&mut self, noted: &Noted) {
        let Noted { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, id, bytes } = noted;
        self.bytes.push(u8::from(*ok) | u8::from(key.is_some()) << 1 | u8::from(id.is_some()) << 2);
        let (ahead, back) = (row.wrapping_sub(self.last_row) as i64, row.wrapping_sub(self.last_row) as i64 >> 63);
        let tokens = [*prompt_tokens, *completion_tokens, *cached_tokens].map(u64::from);
        // Small numbers of either sign are short.
        for number in [(ahead << 1 ^ back) as u64, bytes.start - self.last_end, bytes.end - bytes.start].into_iter().chain(tokens)
        {
            push_number(&mut self.bytes, number);
        }
        for hash in [key, id].into_iter().flatten() {
            self.bytes.extend_from_slice(&hash.to_le_bytes());
        }
        (self.last_row, self.last_end) = (*row, bytes.end);
    }

    /// Appends its line, and begins anew.
    pub(super) fn finish(&mut self, to: &mut Vec<u8>) {
        to.extend_from_slice(HEAD);
        let start = to.len();
        to.resize(start + self.bytes.len().div_ceil(3) * 4, 0);
        let n_written = STANDARD_NO_PAD.encode_slice(&self.bytes, &mut to[start..]).expect("there is room for it");
        to.truncate(start + n_written);
        to.extend_from_slice(TAIL);
        self.bytes.clear();
        (self.last_row, self.last_end) = (0, 0);
    }
}

/// What an index's line says; `None` if it is none.
pub(super) fn parse(line: &[u8]) -> Option<Vec<Noted>> {
    let text = line.strip_prefix(HEAD)?.strip_suffix(TAIL)?;
    let bytes = STANDARD_NO_PAD.decode(text).ok()?;
    let mut rest = &bytes[..];
    let mut found = Vec::with_capacity(bytes.len() / 32);
    let (mut last_row, mut last_end) = (0_u64, 0_u64);
    while let Some((&flags, after)) = rest.split_first() {
        rest = after;
        let ahead = take_number(&mut rest)?;
        let row = last_row.wrapping_add(ahead >> 1 ^ (ahead & 1).wrapping_neg());
        let start = last_end.checked_add(take_number(&mut rest)?)?;
        let end = start.checked_add(take_number(&mut rest)?)?;
        let mut token_count = || u32::try_from(take_number(&mut rest)?).ok();
        let (prompt_tokens, completion_tokens, cached_tokens) = (token_count()?, token_count()?, token_count()?);
        let mut hash = |bit: u8| -> Option<Option<u128>> {
            if flags & bit == 0 {
                return Some(None);
            }
            let (hash, after) = rest.split_first_chunk()?;
            rest = after;
            Some(Some(u128::from_le_bytes(*hash)))
        };
        let (key, id) = (hash(2)?, hash(4)?);
        let ok = flags & 1 != 0;
        found.push(Noted { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, id, bytes: start..end });
        (last_row, last_end) = (row, end);
    }
    Some(found)
}

fn push_number(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

fn take_number(from: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = from.split_first()?;
        *from = after;
        let bits = u64::from(byte & 0x7f);
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return (bits << shift >> shift == bits).then_some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(
            rows in prop::collection::vec((any::<u64>(), any::<bool>(), any::<[u32; 3]>(), any::<[Option<u128>; 2]>(), 0..9_u64, any::<u32>()), 0..50),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut end = 0;
            let noted: Vec<Noted> = rows.into_iter().map(|(row, ok, tokens, [key, id], gap, n_bytes)| {
                let start = end + gap;
                end = start + u64::from(n_bytes);
                let [prompt_tokens, completion_tokens, cached_tokens] = tokens;
                Noted { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, id, bytes: start..end }
            }).collect();
            let mut index = SegmentIndex::default();
            for _ in 0..2 {
                for noted in &noted {
                    index.push(noted);
                }
                let mut line = Vec::new();
                index.finish(&mut line);
                prop_assert_eq!(parse(&line).unwrap(), noted.clone());
                let cut = cut.index(line.len());
                prop_assert_eq!(parse(&line[..cut]), None);
            }
        }
    }
}
