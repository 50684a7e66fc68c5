//! From the journal, in any order, to the output files, in input order. Knows nothing of what the lines say. Invariants:
//! every row stands in exactly one of the two files, once; done again after any interruption it makes the same bytes;
//! memory does not grow with the job, but for a few words per row that waits for an earlier one.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use anyhow::{Context as _, Result, bail};
use arrow::datatypes::{Field, SchemaRef};
use bytes::Bytes;

use super::checking::Checking;
use super::{Journal, Place, SegmentId, segment};
use crate::format::passed::Passed;
use crate::format::{Format, Parts, SchemaInference, Sink};
use crate::storage::Location;

/// Segments with waiting records kept in memory, bytes; of the rest only where they are in the journal.
const WAITING_BYTES: usize = 256 << 20;

/// Where a job's records go.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// Rows that completed.
    pub results: Location,
    /// How the results are cut into parts, if their place is a folder and not one file.
    pub parts: Option<Parts>,
    /// Rows that are errors.
    pub errors: Location,
    /// Columns that the results take over from the inputs as they are; the records need not have them.
    pub passed: Option<Passed>,
    /// The other columns of the results, if they are Parquet and the columns are known; otherwise found by reading the journal
    /// twice.
    pub schema: Option<SchemaRef>,
    /// Columns of the results whose types are known in any case.
    pub columns: Vec<Field>,
}

/// Commits the journal and writes both files, also if one has no rows. An error, before anything is written, if not
/// exactly the rows `0..n_rows` are journaled. Returns the hash of the results: of their file, or of the list of their parts.
pub fn finalise(journal: &mut Journal, outputs: &Outputs, n_rows: u64) -> Result<String> {
    journal.commit()?;
    // Everything is read and verified now.
    journal.checking = Checking::None;
    finalise_within(&[(&*journal, 0..n_rows)], outputs, WAITING_BYTES)
}

/// Writes both files from journals of parts: each with its rows, one after the other. Everything was committed. An error,
/// before anything is written, if not exactly these rows are journaled.
pub fn finalise_parts(parts: &[(&Journal, Range<u64>)], outputs: &Outputs) -> Result<String> {
    finalise_within(parts, outputs, WAITING_BYTES)
}

fn finalise_within(parts: &[(&Journal, Range<u64>)], outputs: &Outputs, waiting_bytes: usize) -> Result<String> {
    for (journal, rows) in parts {
        check_complete(journal, rows)?;
    }
    let Some((first, _)) = parts.first() else { bail!("a job has at least one part") };
    let storage = &first.dir.storage;
    match outputs.parts {
        Some(_) => storage.sweep_under(&outputs.results)?,
        None => storage.sweep(&outputs.results)?,
    }
    storage.sweep(&outputs.errors)?;
    let in_order =
        |each: Each<'_>| parts.iter().try_for_each(|(journal, rows)| InOrder::new(journal, rows, waiting_bytes).run(rows, each));

    let schema = |at: &Location, ok: bool, known: Option<&SchemaRef>| match (Format::of(at)?, known) {
        (Format::Jsonl(_), _) => Ok(None),
        (Format::Parquet, Some(schema)) => Ok(Some(Arc::clone(schema))),
        (Format::Parquet, None) => {
            let mut inference = SchemaInference::default();
            in_order(&mut |_, line_ok, line| if line_ok == ok { inference.observe(line) } else { Ok(()) })?;
            anyhow::Ok(Some(inference.finish(if ok { &outputs.columns } else { &[] })))
        }
    };
    let columns = schema(&outputs.results, true, outputs.schema.as_ref())?;
    let beside = (outputs.passed.as_ref(), outputs.parts.clone());
    let mut results = Sink::create_passing(storage, &outputs.results, columns, beside)?;
    let mut errors = Sink::create(storage, &outputs.errors, schema(&outputs.errors, false, None)?)?;
    in_order(&mut |row, ok, line| {
        let sink = if ok { &mut results } else { &mut errors };
        sink.write_row(row, line).with_context(|| format!("the output of row {row}"))
    })?;
    let written = results.publish()?;
    errors.publish()?;
    Ok(written.blake3.unwrap_or_default())
}

fn check_complete(journal: &Journal, rows: &Range<u64>) -> Result<()> {
    let n_rows = rows.end - rows.start;
    let missing: Vec<Range<u64>> = journal.done.missing(rows.clone()).take(11).collect();
    if !missing.is_empty() {
        let shown = missing.iter().take(10).map(|rows| match rows.end - rows.start {
            1 => rows.start.to_string(),
            _ => format!("{}-{}", rows.start, rows.end - 1),
        });
        let more = if missing.len() > 10 { " and more" } else { "" };
        bail!("the journal has no outcome of the rows {}{more} (counted from 0)", shown.collect::<Vec<_>>().join(", "));
    }
    if journal.done.len() != n_rows {
        bail!("the journal has outcomes of {} rows, the inputs have only {n_rows}", journal.done.len());
    }
    Ok(())
}

/// Hands out the journal's records in order of rows, each row once.
struct InOrder<'a> {
    journal: &'a Journal,
    next: u64,
    /// From row `next` on: where the row's record is, if it was seen. As long as the furthest row is ahead: some windows'
    /// rows as a rule, more where one row ran on while later ones ended.
    waiting: VecDeque<Option<Waiting>>,
    /// Segments with records that wait.
    held: BTreeMap<SegmentId, Held>,
    held_bytes: usize,
    max_held_bytes: usize,
}

/// A record whose turn has not come.
struct Waiting {
    ok: bool,
    place: Place,
    /// In the segment.
    line: Range<usize>,
}

/// A segment in memory.
struct Held {
    text: Bytes,
    n_waiting: usize,
}

/// A verified segment, read.
struct Read {
    id: SegmentId,
    text: Bytes,
    /// In the order they were journaled.
    records: Vec<(u64, Waiting)>,
}

/// Takes a row, whether it completed, and its output line.
type Each<'e> = &'e mut dyn FnMut(u64, bool, &str) -> Result<()>;

impl Read {
    fn of(journal: &Journal, id: SegmentId) -> Result<Self> {
        let text = journal.read(id)?;
        let mut records = Vec::new();
        for entry in segment::entries(&text)? {
            let segment::Entry { line: segment::Line::Record(record), bytes } = entry? else { continue };
            if !journal.counts(record.ok, id) {
                continue;
            }
            // A record ends with its line, a brace and a line feed.
            let end = bytes.end as usize - 2;
            let place = Place { segment: id, start: bytes.start, n_bytes: bytes.end - bytes.start };
            records.push((record.row, Waiting { ok: record.ok, place, line: end - record.line.len()..end }));
        }
        Ok(Self { id, text, records })
    }
}

impl<'a> InOrder<'a> {
    fn new(journal: &'a Journal, rows: &Range<u64>, max_held_bytes: usize) -> Self {
        Self { journal, next: rows.start, waiting: VecDeque::new(), held: BTreeMap::new(), held_bytes: 0, max_held_bytes }
    }

    fn run(mut self, rows: &Range<u64>, each: Each<'_>) -> Result<()> {
        let journal = self.journal;
        // A segment is read and verified while the one before it is written.
        let (read, segments) = sync_channel(1);
        std::thread::scope(|scope| {
            let reader = std::thread::Builder::new().name("segments".into());
            let reader = reader.spawn_scoped(scope, move || {
                for &id in &journal.segments {
                    // Nobody takes more after an error.
                    if read.send(Read::of(journal, id)).is_err() {
                        return;
                    }
                }
            });
            reader.context("cannot start the thread that reads segments")?;
            segments.into_iter().try_for_each(|segment| self.take(segment?, each))
        })?;
        let is_empty = self.waiting.iter().all(Option::is_none);
        assert!(self.next == rows.end && is_empty, "{} of the rows {rows:?} after a complete journal", self.next);
        Ok(())
    }

    /// Takes in a segment and hands out the rows whose turn has come.
    fn take(&mut self, segment: Read, each: Each<'_>) -> Result<()> {
        let Read { id, text, records } = segment;
        let mut n_waiting = 0;
        for (row, record) in records {
            let Some(ahead) = row.checked_sub(self.next) else { continue };
            let ahead = usize::try_from(ahead)?;
            if ahead >= self.waiting.len() {
                self.waiting.resize_with(ahead + 1, || None);
            }
            // The first committed outcome stays.
            let place = &mut self.waiting[ahead];
            n_waiting += usize::from(place.is_none());
            place.get_or_insert(record);
        }
        if n_waiting > 0 {
            self.held_bytes += text.len();
            self.held.insert(id, Held { text, n_waiting });
        }
        self.drain(each)?;
        // What is too much to wait in memory is read again when its turn comes.
        if self.held_bytes > self.max_held_bytes {
            self.let_go(id);
        }
        Ok(())
    }

    fn drain(&mut self, each: Each<'_>) -> Result<()> {
        while let Some(Some(record)) = self.waiting.pop_front_if(|first| first.is_some()) {
            let Waiting { ok, place, line } = record;
            if let Some(held) = self.held.get_mut(&place.segment) {
                let text = simdutf8::basic::from_utf8(&held.text[line]).context("a sealed segment is not UTF-8")?;
                each(self.next, ok, text)?;
                held.n_waiting -= 1;
                if held.n_waiting == 0 {
                    self.let_go(place.segment);
                }
            } else {
                let record = self.journal.record(place)?;
                assert_eq!(record.row, self.next, "the place of a waiting record");
                each(self.next, ok, &record.line)?;
            }
            self.next += 1;
        }
        Ok(())
    }

    fn let_go(&mut self, id: SegmentId) {
        self.held_bytes -= self.held.remove(&id).map_or(0, |held| held.text.len());
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;
    use proptest::prelude::*;

    use super::*;
    use crate::journal::{JobDir, Manifest, Record, Terms};
    use crate::storage::Storage;

    fn record(row: u64) -> Record<'static> {
        let line = format!("{{\"row\":{row},\"pad\":\"{}\"}}", "x".repeat(row as usize % 40)).into();
        Record { row, ok: true, prompt_tokens: 0, completion_tokens: 0, cached_tokens: 0, key: None, id: None, line }
    }

    fn journal_of(segments: &[Vec<u64>]) -> (Storage, Location, Journal) {
        let storage = Storage::new().unwrap();
        let at = Location::new(Arc::new(InMemory::new()), "x.jsonl".into(), "x.jsonl");
        let manifest = Manifest {
            format_version: Manifest::FORMAT_VERSION,
            valar_version: String::new(),
            job_fingerprint: "job".to_owned(),
            created_unix_s: 0,
            job_seed: 0,
            model_fingerprint: String::new(),
            pipeline: String::new(),
            inputs: Vec::new(),
            rows: 0..u64::MAX,
            replaces: None,
            retries: None,
            versions: Vec::new(),
        };
        let dir = JobDir::claim(&storage, &at.with_extension("job").unwrap(), &Terms::default()).unwrap();
        let mut journal = Journal::create(dir, &manifest).unwrap();
        for rows in segments {
            for &row in rows {
                journal.append(&record(row)).unwrap();
            }
            journal.commit().unwrap();
        }
        (storage, at, journal)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn order_is_restored_whatever_waits_in_memory(
            rows in (1..120u64).prop_flat_map(|n| Just((0..n).collect::<Vec<_>>()).prop_shuffle()),
            sizes in prop::collection::vec(1..20usize, 120),
            waiting_bytes in prop::sample::select(vec![0, 1, 100, 1000, usize::MAX / 2]),
        ) {
            let mut rest = &rows[..];
            let mut segments = Vec::new();
            for size in sizes {
                let (segment, after) = rest.split_at(size.min(rest.len()));
                segments.push(segment.to_vec());
                rest = after;
            }
            let (storage, at, journal) = journal_of(&segments);
            let errors = at.with_extension("errors.jsonl").unwrap();
            let outputs = Outputs { results: at.clone(), parts: None, errors, passed: None, schema: None, columns: Vec::new() };
            finalise_within(&[(&journal, 0..rows.len() as u64)], &outputs, waiting_bytes).unwrap();
            let wanted: Vec<String> = (0..rows.len() as u64).map(|row| record(row).line.into_owned()).collect();
            prop_assert_eq!(storage.get(&at).unwrap().unwrap(), wanted.join("\n") + "\n");
        }
    }

    #[test]
    fn what_waits_is_bounded() {
        let segments: Vec<Vec<u64>> = (0..100).rev().map(|row| vec![row]).collect();
        let (_, _, journal) = journal_of(&segments);
        let mut in_order = InOrder::new(&journal, &(0..100), 500);
        for number in 1..100 {
            let segment = Read::of(&journal, SegmentId { epoch: 1, number }).unwrap();
            in_order.take(segment, &mut |row, _, _| panic!("row {row} was handed out")).unwrap();
            let held: usize = in_order.held.values().map(|held| held.text.len()).sum();
            assert!(held == in_order.held_bytes && held <= 500, "{held} bytes held after {number} segments");
        }
        assert_eq!(in_order.waiting.iter().flatten().count(), 99);
    }
}
