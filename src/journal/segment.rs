//! One segment: lines of records and a last line that seals them. Knows nothing of stores. Invariant: what passes
//! [`verify`] is byte for byte what was sealed, by the same job.

use std::borrow::Cow;
use std::fmt;
use std::io::Write as _;
use std::ops::Range;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// What became of one row. Written as one JSON object ([`fmt::Display`]), always in the same layout: a sealed line is one
/// that this file has written, so that it is taken apart without reading the output line's JSON again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record<'a> {
    /// Index of the row over all input files.
    pub row: u64,
    /// Whether the line belongs to the results or to the errors.
    pub ok: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Prompt tokens shared with another row.
    pub cached_tokens: u32,
    /// What identical rows are found by; `None` if nobody shares this row's outcome.
    pub key: Option<u128>,
    /// The finished output line: one JSON object without line feeds.
    pub line: Cow<'a, str>,
}

impl fmt::Display for Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, line } = self;
        write!(f, r#"{{"row":{row},"ok":{ok},"prompt_tokens":{prompt_tokens},"completion_tokens":{completion_tokens},"#)?;
        write!(f, r#""cached_tokens":{cached_tokens}"#)?;
        if let Some(key) = key {
            write!(f, r#","key":"{key:032x}""#)?;
        }
        f.write_str(r#","line":"#)?;
        f.write_str(line)?;
        f.write_str("}")
    }
}

impl<'a> Record<'a> {
    /// Of a record's text; `None` if it has another layout.
    fn parse(text: &'a str) -> Option<Self> {
        let (row, rest) = text.strip_prefix(r#"{"row":"#)?.split_once(r#","ok":"#)?;
        let (ok, rest) = rest.split_once(r#","prompt_tokens":"#)?;
        let (prompt_tokens, rest) = rest.split_once(r#","completion_tokens":"#)?;
        let (completion_tokens, rest) = rest.split_once(r#","cached_tokens":"#)?;
        let (cached_tokens, mut rest) = rest.split_once(',')?;
        let mut key = None;
        if let Some(after) = rest.strip_prefix(r#""key":""#) {
            let (digits, after) = after.split_once(r#"","#)?;
            (key, rest) = (Some(u128::from_str_radix(digits, 16).ok()?), after);
        }
        let line = rest.strip_prefix(r#""line":"#)?.strip_suffix('}')?;
        Some(Self {
            row: row.parse().ok()?,
            ok: ok.parse().ok()?,
            prompt_tokens: prompt_tokens.parse().ok()?,
            completion_tokens: completion_tokens.parse().ok()?,
            cached_tokens: cached_tokens.parse().ok()?,
            key,
            line: Cow::Borrowed(line),
        })
    }

    /// The record with a line of its own.
    pub(super) fn into_owned(self) -> Record<'static> {
        let Self { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, line } = self;
        let line = Cow::Owned(line.into_owned());
        Record { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, line }
    }
}

/// Where a record is in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the segment.
    pub segment: u32,
    /// Its first byte there.
    pub start: u64,
    /// Its length, line feed included.
    pub n_bytes: u64,
}

/// A segment that is not what was sealed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Damaged(String);

/// The last line of a segment.
#[derive(Debug, Serialize, Deserialize)]
struct Seal {
    /// Records before it.
    rows: u64,
    /// Fingerprint of the job.
    job: String,
    /// Hash of all bytes before it, hexadecimal.
    blake3: String,
}

/// A segment being gathered.
#[derive(Debug, Default)]
pub(super) struct Segment {
    lines: Vec<u8>,
    n_rows: u64,
}

impl Segment {
    pub(super) fn n_rows(&self) -> u64 {
        self.n_rows
    }

    pub(super) fn n_bytes(&self) -> usize {
        self.lines.len()
    }

    /// Adds a record; says which bytes it has.
    pub(super) fn push(&mut self, record: &Record<'_>) -> Range<u64> {
        let start = self.lines.len() as u64;
        assert!(line_feeds(record.line.as_bytes()) == 0, "the output line of row {} has a line feed", record.row);
        writeln!(self.lines, "{record}").expect("memory takes it");
        self.n_rows += 1;
        start..self.lines.len() as u64
    }

    /// The record at these bytes.
    pub(super) fn record(&self, bytes: Range<usize>) -> Result<Record<'static>> {
        parse_record(std::str::from_utf8(&self.lines[bytes])?).map(Record::into_owned)
    }

    /// The whole segment.
    pub(super) fn seal(&self, job: &str) -> Bytes {
        let blake3 = blake3::hash(&self.lines).to_hex().to_string();
        let seal = Seal { rows: self.n_rows, job: job.to_owned(), blake3 };
        let mut content = self.lines.clone();
        serde_json::to_writer(&mut content, &seal).expect("a seal is JSON and memory takes it");
        content.push(b'\n');
        content.into()
    }

    /// Empties it; the memory stays for the next one.
    pub(super) fn clear(&mut self) {
        self.lines.clear();
        self.n_rows = 0;
    }
}

/// The lines of records of a segment of `job`, or [`Damaged`].
pub(super) fn verify(content: &Bytes, job: &str) -> Result<Bytes> {
    let damaged = |what: String| Err(Damaged(what).into());
    let Some(text) = content.strip_suffix(b"\n") else { return damaged("its end is missing".to_owned()) };
    let start = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |feed| feed + 1);
    let Ok(seal) = serde_json::from_slice::<Seal>(&text[start..]) else { return damaged("its end is missing".to_owned()) };
    let lines = content.slice(..start);
    if blake3::hash(&lines).to_hex().as_str() != seal.blake3 {
        return damaged("its checksum is wrong".to_owned());
    }
    if seal.job != job {
        return damaged(format!("it is of another job, {}", seal.job));
    }
    let n_rows = line_feeds(&lines);
    if n_rows != seal.rows {
        return damaged(format!("it holds {n_rows} rows, not {}", seal.rows));
    }
    Ok(lines)
}

/// How many there are; a sum takes many bytes at a time, which a search that may end early does not.
fn line_feeds(bytes: &[u8]) -> u64 {
    bytes.iter().map(|&byte| u64::from(byte == b'\n')).sum()
}

/// A record and where it is in its segment.
pub(super) struct Entry<'a> {
    pub(super) record: Record<'a>,
    pub(super) bytes: Range<u64>,
}

/// The records of verified lines.
pub(super) fn entries(lines: &[u8]) -> Result<impl Iterator<Item = Result<Entry<'_>>>> {
    let text = std::str::from_utf8(lines).context("a sealed segment is not UTF-8")?;
    let mut start = 0;
    Ok(text.split_inclusive('\n').map(move |line| {
        let bytes = start..start + line.len() as u64;
        start = bytes.end;
        Ok(Entry { record: parse_record(line)?, bytes })
    }))
}

/// The record of one line.
pub(super) fn parse_record(line: &str) -> Result<Record<'_>> {
    Record::parse(line.trim_end_matches('\n')).context("a sealed record is not readable")
}

/// The name of segment `number`, from 1.
pub(super) fn name_of(number: u32) -> String {
    format!("seg-{number:08}.jsonl")
}

/// The number of the segment called `name`; `None` if it is not a segment's name.
pub(super) fn number_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("seg-")?.strip_suffix(".jsonl")?;
    let number = digits.parse().ok()?;
    (name_of(number) == name).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn any_flipped_bit_and_any_cut_is_found() {
        let mut segment = Segment::default();
        for row in 0..3 {
            let line = format!("{{\"x\": {row} }}").into();
            segment.push(&Record { row, ok: true, prompt_tokens: 1, completion_tokens: 2, cached_tokens: 0, key: None, line });
        }
        let sealed = segment.seal("job");
        let lines = verify(&sealed, "job").unwrap();
        let records: Vec<Record<'_>> = entries(&lines).unwrap().map(|entry| entry.unwrap().record).collect();
        assert_eq!(records.iter().map(|r| &*r.line).collect::<Vec<_>>(), ["{\"x\": 0 }", "{\"x\": 1 }", "{\"x\": 2 }"]);
        assert!(verify(&sealed, "another").unwrap_err().is::<Damaged>());
        for cut in 0..sealed.len() {
            assert!(verify(&sealed.slice(..cut), "job").unwrap_err().is::<Damaged>(), "cut at {cut}");
        }
        for bit in 0..8 * sealed.len() {
            let mut flipped = sealed.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let error = verify(&flipped.into(), "job").map(|_| ()).expect_err("found");
            assert!(error.is::<Damaged>(), "bit {bit}: {error:#}");
        }
    }

    proptest! {
        #[test]
        fn a_record_is_json_and_is_read_as_it_was_written(
            (row, ok, key) in (any::<u64>(), any::<bool>(), any::<Option<u128>>()),
            [prompt_tokens, completion_tokens, cached_tokens] in any::<[u32; 3]>(),
            text in any::<String>(),
        ) {
            let line = serde_json::json!({"line": text, "key": ["},"]}).to_string().into();
            let record = Record { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, line };
            let written = record.to_string() + "\n";
            prop_assert_eq!(parse_record(&written).unwrap(), record.clone());
            let json: serde_json::Value = serde_json::from_str(&written).unwrap();
            prop_assert_eq!(json["line"]["line"].as_str(), Some(text.as_str()));
            prop_assert_eq!(json["key"].as_str().map(|key| u128::from_str_radix(key, 16).unwrap()), key);
            prop_assert_eq!((json["row"].as_u64(), json["ok"].as_bool()), (Some(row), Some(ok)));
        }
    }

    #[test]
    fn names_are_numbers() {
        assert_eq!(name_of(7), "seg-00000007.jsonl");
        assert_eq!(number_of("seg-00000007.jsonl"), Some(7));
        for other in ["seg-7.jsonl", "seg-+0000007.jsonl", "manifest.json", "seg-00000007.jsonl#1"] {
            assert_eq!(number_of(other), None, "{other}");
        }
    }
}
