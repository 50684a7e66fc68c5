//! Lines of a JSONL file. Knows nothing of JSON: a line is bytes that end at a line feed. Blank lines are no rows; a
//! byte order mark, CRLF and a missing final newline are accepted. Invariant: how the bytes were cut into chunks never
//! shows in the lines.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use bytes::{Buf as _, Bytes};

use super::compressed::Chunks;
use super::{FileRow, Limits};
use crate::storage::Object;

/// What some editors put before the first line of a UTF-8 file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads the rows of one file.
#[derive(Debug)]
pub(super) struct JsonlReader {
    chunks: Chunks,
    chunk: Bytes,
    lines: LineSplitter,
    limits: Limits,
    at_end: bool,
}

impl JsonlReader {
    pub(super) fn new(chunks: Chunks, limits: Limits) -> Self {
        let lines = LineSplitter::new(limits.max_row_bytes);
        Self { chunks, chunk: Bytes::new(), lines, limits, at_end: false }
    }

    /// After `number` lines of an unpacked file, at this byte.
    pub(super) fn at(object: Object, limits: Limits, (number, offset): (u64, u64)) -> Result<Self> {
        let lines = LineSplitter { number, mark: None, ..LineSplitter::new(limits.max_row_bytes) };
        Ok(Self { lines, ..Self::new(Chunks::from(object, offset)?, limits) })
    }

    /// Lines of the file that were read, and the byte that the next one begins at.
    pub(super) fn place(&self) -> (u64, u64) {
        (self.lines.number, self.chunks.offset() - self.chunk.len() as u64)
    }

    /// Passes over the file's first `number` lines.
    pub(super) fn skip_to(&mut self, number: u64) -> Result<()> {
        while self.lines.number < number && self.next_line()?.is_some() {}
        Ok(())
    }

    pub(super) fn url(&self) -> &Arc<str> {
        self.chunks.object().url()
    }

    pub(super) fn next_row(&mut self) -> Result<Option<FileRow>> {
        Ok(self.next_line()?.map(|line| (line.number, line.content.map_err(|n_bytes| self.limits.too_long(n_bytes)))))
    }

    fn next_line(&mut self) -> Result<Option<Line>> {
        while !self.at_end {
            let line = self.lines.next_line(&mut self.chunk);
            if line.is_some() {
                return Ok(line);
            }
            let read = self.chunks.next_chunk();
            self.chunk = read.with_context(|| format!("{}, line {}", self.url(), self.lines.number + 1))?;
            self.at_end = self.chunk.is_empty();
        }
        Ok(self.lines.last_line())
    }
}

/// One line that is not blank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// In the file, from 1, blank lines counted.
    pub number: u64,
    /// The line without its ending: of the chunk's memory if it lies within one; `Err(length in bytes)` if it is longer
    /// than the limit.
    pub content: Result<Bytes, u64>,
}

/// Cuts a stream of chunks into lines, holding at most one line, up to the limit.
#[derive(Debug)]
pub struct LineSplitter {
    max_bytes: usize,
    line: Vec<u8>, // what earlier chunks had of the current line; empty once it is too long
    n_bytes: u64,  // length of that part, kept or not
    is_blank: bool,
    number: u64,         // lines ended so far
    mark: Option<usize>, // at the start of the file: how many bytes of a byte order mark were seen
}

impl LineSplitter {
    /// Lines over `max_bytes` (without their ending) are not kept.
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, line: Vec::new(), n_bytes: 0, is_blank: true, number: 0, mark: Some(0) }
    }

    /// The next line that ends in `input`, which is left at what follows. `None`: all of `input` is taken.
    pub fn next_line(&mut self, input: &mut Bytes) -> Option<Line> {
        self.skip_mark(input);
        while let Some(end) = memchr::memchr(b'\n', input) {
            let mut part = input.split_to(end + 1);
            part.truncate(end);
            let line = if self.n_bytes == 0 {
                self.whole_line(part)
            } else {
                self.extend(&part);
                self.end_line()
            };
            if line.is_some() {
                return line;
            }
        }
        self.extend(input);
        input.clear();
        None
    }

    /// What follows the last line feed, once there is no more input.
    pub fn last_line(&mut self) -> Option<Line> {
        self.refuse_mark();
        if self.n_bytes == 0 { None } else { self.end_line() }
    }

    fn skip_mark(&mut self, input: &mut Bytes) {
        while let Some(n_seen) = self.mark {
            match input.first() {
                None => return,
                Some(&byte) if byte == BYTE_ORDER_MARK[n_seen] => {
                    input.advance(1);
                    self.mark = (n_seen + 1 < BYTE_ORDER_MARK.len()).then_some(n_seen + 1);
                }
                Some(_) => self.refuse_mark(),
            }
        }
    }

    /// What looked like a byte order mark is content.
    fn refuse_mark(&mut self) {
        if let Some(n_seen) = self.mark.take() {
            self.extend(&BYTE_ORDER_MARK[..n_seen]);
        }
    }

    fn extend(&mut self, part: &[u8]) {
        self.n_bytes += part.len() as u64;
        self.is_blank = self.is_blank && is_blank(part);
        // One more than the limit: the last byte may be the carriage return of the line's end.
        if self.n_bytes <= self.max_bytes as u64 + 1 {
            self.line.extend_from_slice(part);
        } else {
            self.line = Vec::new();
        }
    }

    /// Ends the line that earlier chunks began.
    fn end_line(&mut self) -> Option<Line> {
        let line = Bytes::from(std::mem::take(&mut self.line));
        let n_bytes = std::mem::take(&mut self.n_bytes);
        let is_blank = std::mem::replace(&mut self.is_blank, true);
        self.numbered(line, n_bytes, is_blank)
    }

    /// A line that lies within one chunk.
    fn whole_line(&mut self, line: Bytes) -> Option<Line> {
        let (n_bytes, is_blank) = (line.len() as u64, is_blank(&line));
        self.numbered(line, n_bytes, is_blank)
    }

    /// `line` is empty if it was too long to be kept.
    fn numbered(&mut self, mut line: Bytes, n_bytes: u64, is_blank: bool) -> Option<Line> {
        self.number += 1;
        let is_kept = line.len() as u64 == n_bytes;
        if line.last() == Some(&b'\r') {
            line.truncate(line.len() - 1);
        }
        let content = if is_kept && line.len() <= self.max_bytes { Ok(line) } else { Err(n_bytes) };
        (!is_blank).then_some(Line { number: self.number, content })
    }
}

fn is_blank(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(chunks: &[&[u8]], max_bytes: usize) -> Vec<Line> {
        let mut lines = LineSplitter::new(max_bytes);
        let mut found = Vec::new();
        for &chunk in chunks {
            let mut chunk = Bytes::copy_from_slice(chunk);
            while let Some(line) = lines.next_line(&mut chunk) {
                found.push(line);
            }
            assert!(chunk.is_empty());
        }
        found.extend(lines.last_line());
        found
    }

    /// The definition, over the whole file at once.
    fn split_naively(file: &[u8], max_bytes: usize) -> Vec<Line> {
        let file = file.strip_prefix(BYTE_ORDER_MARK).unwrap_or(file);
        let mut lines: Vec<&[u8]> = file.split(|&byte| byte == b'\n').collect();
        if lines.last().is_some_and(|line| line.is_empty()) {
            lines.pop();
        }
        let numbered = lines.into_iter().zip(1..).map(|(raw, number)| {
            let line = raw.strip_suffix(b"\r").unwrap_or(raw);
            let content = if line.len() <= max_bytes { Ok(Bytes::copy_from_slice(line)) } else { Err(raw.len() as u64) };
            (is_blank(line), Line { number, content })
        });
        numbered.filter(|(is_blank, _)| !is_blank).map(|(_, line)| line).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn chunks_do_not_show(
            pieces in prop::collection::vec(prop::sample::select(vec![
                &b"\n"[..], b"\r\n", b"\r", b" ", b"\t", b"{}", b"\xef", b"\xbb\xbf", b"\xff", b"ab", "é".as_bytes(),
            ]), 0..30),
            has_mark in any::<bool>(),
            cuts in prop::collection::vec(1usize..6, 1..20),
            max_bytes in 1usize..8,
        ) {
            let mut file = if has_mark { BYTE_ORDER_MARK.to_vec() } else { Vec::new() };
            file.extend(pieces.concat());
            let mut chunks = Vec::new();
            let (mut rest, mut sizes) = (&file[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (chunk, after) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            prop_assert_eq!(split(&chunks, max_bytes), split_naively(&file, max_bytes));
        }
    }

    #[test]
    fn a_huge_line_is_not_held() {
        let part = Bytes::from(vec![b'x'; 1 << 20]);
        let mut lines = LineSplitter::new(16 << 20);
        for _ in 0..20 {
            assert_eq!(lines.next_line(&mut part.clone()), None);
            assert!(lines.line.capacity() <= 33 << 20);
        }
        assert_eq!(lines.line.capacity(), 0);
        let after = lines.next_line(&mut Bytes::from_static(b"\n{}\n"));
        assert_eq!(after, Some(Line { number: 1, content: Err(20 << 20) }));
    }
}
