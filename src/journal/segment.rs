//! One segment: lines of records and a last line that seals them. Knows nothing of stores. Invariant: what passes
//! [`verify`] is byte for byte what was sealed, by the same job.

use std::borrow::Cow;
use std::ops::Range;
use std::str::FromStr;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::segment_index::{self, Noted, SegmentIndex};

/// What became of one row. Written as one JSON object, always in the same layout: a sealed line is one that this file has
/// written, so that it is taken apart without reading the output line's JSON again.
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
    /// What second uses of the row's own id are found by, if it has one. Only in the segment's index: `None` in a record that
    /// was read.
    pub id: Option<u128>,
    /// The finished output line: one JSON object without line feeds.
    pub line: Cow<'a, str>,
}

impl<'a> Record<'a> {
    /// Appends the record's text.
    pub fn write(&self, to: &mut Vec<u8>) {
        let Self { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, id: _, line } = self;
        to.reserve(160 + line.len());
        let mut number = itoa::Buffer::new();
        to.extend_from_slice(br#"{"row":"#);
        to.extend_from_slice(number.format(*row).as_bytes());
        to.extend_from_slice(if *ok { br#","ok":true,"prompt_tokens":"# } else { br#","ok":false,"prompt_tokens":"# });
        to.extend_from_slice(number.format(*prompt_tokens).as_bytes());
        to.extend_from_slice(br#","completion_tokens":"#);
        to.extend_from_slice(number.format(*completion_tokens).as_bytes());
        to.extend_from_slice(br#","cached_tokens":"#);
        to.extend_from_slice(number.format(*cached_tokens).as_bytes());
        if let Some(key) = key {
            to.extend_from_slice(br#","key":""#);
            let digit = |place: u32| b"0123456789abcdef"[(key >> (4 * place)) as usize & 15];
            to.extend((0..32).rev().map(digit));
            to.push(b'"');
        }
        to.extend_from_slice(br#","line":"#);
        to.extend_from_slice(line.as_bytes());
        to.push(b'}');
    }

    /// Of a record's text; `None` if it has another layout.
    fn parse(text: &'a str) -> Option<Self> {
        let (row, rest) = number_after(text, r#"{"row":"#)?;
        let rest = rest.strip_prefix(r#","ok":"#)?;
        let (ok, rest) = match rest.strip_prefix("true") {
            Some(rest) => (true, rest),
            None => (false, rest.strip_prefix("false")?),
        };
        let (prompt_tokens, rest) = number_after(rest, r#","prompt_tokens":"#)?;
        let (completion_tokens, rest) = number_after(rest, r#","completion_tokens":"#)?;
        let (cached_tokens, mut rest) = number_after(rest, r#","cached_tokens":"#)?;
        let mut key = None;
        if let Some(after) = rest.strip_prefix(r#","key":""#) {
            let (digits, after) = after.split_at_checked(32)?;
            (key, rest) = (Some(u128::from_str_radix(digits, 16).ok()?), after.strip_prefix('"')?);
        }
        let line = rest.strip_prefix(r#","line":"#)?.strip_suffix('}')?;
        Some(Self { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, id: None, line: Cow::Borrowed(line) })
    }

    /// The record with a line of its own.
    pub(super) fn into_owned(self) -> Record<'static> {
        let line = Cow::Owned(self.line.into_owned());
        Record { line, ..self }
    }
}

/// How far one of a row's sequences came: no outcome of the row, only what it can go on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint<'a> {
    /// Index of the row over all input files.
    #[serde(rename = "begun")]
    pub row: u64,
    /// Which of the row's sequences.
    pub part: u32,
    /// Where it goes on: the end of the one before, or 0.
    pub start: u64,
    /// Where it ends.
    pub end: u64,
    /// What it holds, for whoever wrote it.
    #[serde(borrow)]
    pub data: Cow<'a, str>,
}

/// The number that stands behind this text at the beginning of another, and what follows it.
fn number_after<'a, T: FromStr>(text: &'a str, before: &str) -> Option<(T, &'a str)> {
    let rest = text.strip_prefix(before)?;
    let n_digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, rest) = rest.split_at(n_digits);
    Some((digits.parse().ok()?, rest))
}

/// Which segment: one of its writer's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentId {
    /// The epoch of its writer.
    pub epoch: u32,
    /// Its number there, from 1.
    pub number: u32,
}

impl SegmentId {
    /// As one number, never 0.
    pub fn to_u64(self) -> u64 {
        u64::from(self.epoch) << 32 | u64::from(self.number)
    }

    /// From [`SegmentId::to_u64`].
    pub fn from_u64(number: u64) -> Self {
        Self { epoch: (number >> 32) as u32, number: number as u32 }
    }
}

/// Where a record is in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The segment.
    pub segment: SegmentId,
    /// Its first byte there.
    pub start: u64,
    /// Its length, line feed included.
    pub n_bytes: u64,
}

/// A segment that is not what was sealed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Damaged(String);

/// Whether something failed since a segment is not what was sealed, which no other try would mend.
pub fn is_damaged(error: &anyhow::Error) -> bool {
    error.is::<Damaged>()
}

/// The last line of a segment.
#[derive(Debug, Serialize, Deserialize)]
struct Seal {
    /// Records before it.
    rows: u64,
    /// Checkpoints among them.
    checkpoints: u64,
    /// How many of them are errors.
    failed: u64,
    /// Fingerprint of the job.
    job: String,
    /// How far all rows have their outcome in this segment and those before it, for whoever wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reached: Option<String>,
    /// Bytes of the index's line, the last one before it.
    index: u64,
    /// Hash of that line, hexadecimal.
    index_blake3: String,
    /// Hash of all bytes before it, of the number of errors and of what was reached, hexadecimal.
    blake3: String,
}

impl Seal {
    /// The last line; `None` if it is none.
    fn read(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line.strip_suffix(b"\n")?).ok()
    }

    fn hash(&self, before: &[u8]) -> String {
        let said = format!("{} {:?}", self.failed, self.reached);
        blake3::Hasher::new().update(before).update(said.as_bytes()).finalize().to_hex().to_string()
    }
}

/// A segment being gathered.
#[derive(Debug, Default)]
pub(super) struct Segment {
    lines: Vec<u8>,
    index: SegmentIndex,
    /// Memory for the lines after these.
    spare: Vec<u8>,
    n_rows: u64,
    n_failed: u64,
    n_checkpoints: u64,
}

impl Segment {
    pub(super) fn n_rows(&self) -> u64 {
        self.n_rows
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Adds a checkpoint.
    pub(super) fn push_checkpoint(&mut self, checkpoint: &Checkpoint<'_>) {
        serde_json::to_writer(&mut self.lines, checkpoint).expect("strings and numbers are JSON");
        self.lines.push(b'\n');
        self.n_checkpoints += 1;
    }

    pub(super) fn n_bytes(&self) -> usize {
        self.lines.len()
    }

    /// Adds a record; says which bytes it has.
    pub(super) fn push(&mut self, record: &Record<'_>) -> Range<u64> {
        let start = self.lines.len() as u64;
        assert!(memchr::memchr(b'\n', record.line.as_bytes()).is_none(), "the output line of row {} has a line feed", record.row);
        record.write(&mut self.lines);
        self.lines.push(b'\n');
        self.n_rows += 1;
        self.n_failed += u64::from(!record.ok);
        let bytes = start..self.lines.len() as u64;
        self.index.push(&Noted::new(record, bytes.clone()));
        bytes
    }

    /// All records' text.
    pub(super) fn lines(&self) -> &[u8] {
        &self.lines
    }

    /// The whole segment, taken out.
    pub(super) fn seal(&mut self, job: &str, reached: Option<&str>) -> Bytes {
        let mut content = std::mem::replace(&mut self.lines, std::mem::take(&mut self.spare));
        let start = content.len();
        self.index.finish(&mut content);
        let mut seal = Seal {
            rows: self.n_rows,
            checkpoints: self.n_checkpoints,
            failed: self.n_failed,
            job: job.to_owned(),
            reached: reached.map(str::to_owned),
            index: (content.len() - start) as u64,
            index_blake3: blake3::hash(&content[start..]).to_hex().to_string(),
            blake3: String::new(),
        };
        seal.blake3 = seal.hash(&content);
        serde_json::to_writer(&mut content, &seal).expect("a seal is JSON and memory takes it");
        content.push(b'\n');
        (self.n_rows, self.n_failed, self.n_checkpoints) = (0, 0, 0);
        content.into()
    }

    /// Takes memory that nobody else holds any more, for the lines after the next seal.
    pub(super) fn reuse(&mut self, sealed: Bytes) {
        self.spare = sealed.into();
        self.spare.clear();
    }
}

/// The record at these bytes of a segment.
pub(super) fn record_in(lines: &[u8], bytes: Range<usize>) -> Result<Record<'static>> {
    parse_record(std::str::from_utf8(&lines[bytes])?).map(Record::into_owned)
}

/// Where the last line begins.
fn start_of_seal(content: &[u8]) -> usize {
    let before = content.strip_suffix(b"\n").unwrap_or(content);
    memchr::memrchr(b'\n', before).map_or(0, |feed| feed + 1)
}

/// Bytes that hold a seal, at most, whatever is before it.
pub(super) const SEAL_BYTES: u64 = 1024;

/// Rows and failed rows of a segment of `job`, as its end says; `None` if that is not its end.
pub(super) fn counts(end: &[u8], job: &str) -> Option<(u64, u64)> {
    let seal = Seal::read(&end[start_of_seal(end)..])?;
    (seal.job == job && seal.failed <= seal.rows).then_some((seal.rows, seal.failed))
}

/// What the end of a segment says.
pub(super) struct End {
    /// Bytes of the index and of all that follows it.
    pub(super) n_bytes: u64,
    pub(super) has_checkpoints: bool,
    pub(super) reached: Option<String>,
    seal: Seal,
}

/// Of the last [`SEAL_BYTES`] of a segment of `job`, or [`Damaged`].
pub(super) fn end(content: &[u8], job: &str) -> Result<End> {
    let start = start_of_seal(content);
    let Some(mut seal) = Seal::read(&content[start..]) else { return Err(Damaged(NO_END.to_owned()).into()) };
    if seal.job != job {
        return Err(Damaged(format!("it is of another job, {}", seal.job)).into());
    }
    let n_bytes = seal.index.saturating_add((content.len() - start) as u64);
    Ok(End { n_bytes, has_checkpoints: seal.checkpoints > 0, reached: seal.reached.take(), seal })
}

impl End {
    /// The rows, of the last `n_bytes` of the segment, or [`Damaged`].
    pub(super) fn rows(&self, content: &[u8]) -> Result<Vec<Noted>> {
        let line = usize::try_from(self.seal.index).ok().and_then(|n_bytes| content.get(..n_bytes));
        let line = line.filter(|line| blake3::hash(line).to_hex().as_str() == self.seal.index_blake3);
        let rows = line.and_then(segment_index::parse).filter(|rows| rows.len() as u64 == self.seal.rows);
        rows.ok_or_else(|| Damaged("its index is damaged".to_owned()).into())
    }
}

const NO_END: &str = "its end is missing";

/// The lines of records of a segment of `job`, or [`Damaged`].
pub(super) fn verify(content: &Bytes, job: &str) -> Result<Bytes> {
    let damaged = |what: String| Err(Damaged(what).into());
    let start = start_of_seal(content);
    let Some(seal) = Seal::read(&content[start..]) else { return damaged(NO_END.to_owned()) };
    let index_start = usize::try_from(seal.index).ok().and_then(|n_bytes| start.checked_sub(n_bytes));
    let Some(index_start) = index_start.filter(|_| seal.hash(&content[..start]) == seal.blake3) else {
        return damaged("its checksum is wrong".to_owned());
    };
    if seal.job != job {
        return damaged(format!("it is of another job, {}", seal.job));
    }
    if blake3::hash(&content[index_start..start]).to_hex().as_str() != seal.index_blake3 {
        return damaged("its index is damaged".to_owned());
    }
    let lines = content.slice(..index_start);
    let (n_lines, n_wanted) = (line_feeds(&lines), seal.rows.checked_add(seal.checkpoints));
    if n_wanted != Some(n_lines) {
        return damaged(format!("it holds {n_lines} lines, not {} and {}", seal.rows, seal.checkpoints));
    }
    Ok(lines)
}

fn line_feeds(bytes: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', bytes).count() as u64
}

/// A line and where it is in its segment.
pub(super) struct Entry<'a> {
    pub(super) line: Line<'a>,
    pub(super) bytes: Range<u64>,
}

/// What a line of a segment says.
pub(super) enum Line<'a> {
    /// What became of a row.
    Record(Record<'a>),
    /// How far a sequence came.
    Checkpoint(Checkpoint<'a>),
}

/// The lines of verified ones.
pub(super) fn entries(lines: &[u8]) -> Result<impl Iterator<Item = Result<Entry<'_>>>> {
    let text = simdutf8::basic::from_utf8(lines).context("a sealed segment is not UTF-8")?;
    let mut start = 0;
    Ok(memchr::memchr_iter(b'\n', lines).map(move |feed| {
        let line = &text[start..feed];
        let bytes = start as u64..feed as u64 + 1;
        start = feed + 1;
        let line = match Record::parse(line) {
            Some(record) => Line::Record(record),
            None => Line::Checkpoint(serde_json::from_str(line).context("a sealed record is not readable")?),
        };
        Ok(Entry { line, bytes })
    }))
}

/// The record of one line.
pub(super) fn parse_record(line: &str) -> Result<Record<'_>> {
    Record::parse(line.trim_end_matches('\n')).context("a sealed record is not readable")
}

/// The name of a segment.
pub(super) fn name_of(id: SegmentId) -> String {
    format!("seg-{:05}-{:08}.jsonl", id.epoch, id.number)
}

/// The segment called `name`; `None` if it is not a segment's name.
pub(super) fn id_of(name: &str) -> Option<SegmentId> {
    let (epoch, number) = name.strip_prefix("seg-")?.strip_suffix(".jsonl")?.split_once('-')?;
    let id = SegmentId { epoch: epoch.parse().ok()?, number: number.parse().ok()? };
    (name_of(id) == name).then_some(id)
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
            segment.push(&Record {
                row,
                ok: true,
                prompt_tokens: 1,
                completion_tokens: 2,
                cached_tokens: 0,
                key: None,
                id: Some(u128::from(row)),
                line,
            });
        }
        let data = "[1,\"x\"]".into();
        segment.push_checkpoint(&Checkpoint { row: 3, part: 1, start: 0, end: 7, data });
        let sealed = segment.seal("job", Some("here"));
        assert_eq!((segment.n_rows(), segment.n_bytes()), (0, 0));
        let lines = verify(&sealed, "job").unwrap();
        let (mut records, mut checkpoints) = (Vec::new(), Vec::new());
        for entry in entries(&lines).unwrap() {
            match entry.unwrap().line {
                Line::Record(record) => records.push(record),
                Line::Checkpoint(checkpoint) => checkpoints.push(checkpoint),
            }
        }
        assert_eq!(checkpoints, [Checkpoint { row: 3, part: 1, start: 0, end: 7, data: "[1,\"x\"]".into() }]);
        assert_eq!(counts(&sealed, "job"), Some((3, 0)));
        let end = end(&sealed[sealed.len().saturating_sub(SEAL_BYTES as usize)..], "job").unwrap();
        assert_eq!((end.has_checkpoints, end.reached.as_deref()), (true, Some("here")));
        let rows = end.rows(&sealed[sealed.len() - end.n_bytes as usize..]).unwrap();
        let found: Vec<Record<'_>> = rows
            .iter()
            .map(|noted| {
                let (start, end) = (noted.bytes.start as usize, noted.bytes.end as usize);
                let record = record_in(&lines, start..end).unwrap();
                assert_eq!(
                    *noted,
                    Noted::new(&Record { id: Some(u128::from(noted.row)), ..record.clone() }, noted.bytes.clone())
                );
                record
            })
            .collect();
        assert_eq!(found, records);
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
            let record = Record { row, ok, prompt_tokens, completion_tokens, cached_tokens, key, id: None, line };
            let mut written = Vec::new();
            record.write(&mut written);
            let written = String::from_utf8(written).unwrap() + "\n";
            prop_assert_eq!(parse_record(&written).unwrap(), record.clone());
            let json: serde_json::Value = serde_json::from_str(&written).unwrap();
            prop_assert_eq!(json["line"]["line"].as_str(), Some(text.as_str()));
            prop_assert_eq!(json["key"].as_str().map(|key| u128::from_str_radix(key, 16).unwrap()), key);
            prop_assert_eq!((json["row"].as_u64(), json["ok"].as_bool()), (Some(row), Some(ok)));
        }
    }

    #[test]
    fn names_are_numbers() {
        let id = SegmentId { epoch: 3, number: 7 };
        assert_eq!((name_of(id).as_str(), SegmentId::from_u64(id.to_u64())), ("seg-00003-00000007.jsonl", id));
        assert_eq!(id_of("seg-00003-00000007.jsonl"), Some(id));
        assert_eq!(id_of("seg-123456-00000007.jsonl"), Some(SegmentId { epoch: 123_456, number: 7 }));
        for other in ["seg-00000007.jsonl", "seg-3-7.jsonl", "seg-+0003-00000007.jsonl", "seg-00003-00000007.jsonl#1"] {
            assert_eq!(id_of(other), None, "{other}");
        }
    }
}
