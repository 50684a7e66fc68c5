//! From the journal, in any order, to the output files, in input order. Knows nothing of what the lines say. Invariants:
//! every row stands in exactly one of the two files, once; done again after any interruption it makes the same bytes;
//! memory does not grow with the job, but for a few words per row that waits for an earlier one.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use arrow::datatypes::{Field, SchemaRef};

use super::{Journal, Place, Record, segment};
use crate::format::{Format, SchemaInference, Sink};
use crate::storage::Location;

/// Text of waiting records kept in memory, bytes; of the rest only where they are in the journal.
const WAITING_BYTES: usize = 256 << 20;

/// Where a job's records go.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// Rows that completed.
    pub results: Location,
    /// Rows that are errors.
    pub errors: Location,
    /// Columns of the results, if they are Parquet and the columns are known; otherwise found by reading the journal twice.
    pub schema: Option<SchemaRef>,
    /// Columns of the results whose types are known in any case.
    pub columns: Vec<Field>,
}

/// Commits the journal and writes both files, also if one has no rows. An error, before anything is written, if not
/// exactly the rows `0..n_rows` are journaled.
pub fn finalise(journal: &mut Journal, outputs: &Outputs, n_rows: u64) -> Result<()> {
    finalise_within(journal, outputs, n_rows, WAITING_BYTES)
}

fn finalise_within(journal: &mut Journal, outputs: &Outputs, n_rows: u64, waiting_bytes: usize) -> Result<()> {
    journal.commit()?;
    check_complete(journal, n_rows)?;
    let journal = &*journal;
    let storage = &journal.dir.storage;
    storage.sweep(&outputs.results)?;
    storage.sweep(&outputs.errors)?;
    let in_order = |each: &mut dyn FnMut(u64, &Line) -> Result<()>| InOrder::new(journal, waiting_bytes).run(n_rows, each);

    let schema = |at: &Location, ok: bool, known: Option<&SchemaRef>| match (Format::of(at)?, known) {
        (Format::Jsonl(_), _) => Ok(None),
        (Format::Parquet, Some(schema)) => Ok(Some(Arc::clone(schema))),
        (Format::Parquet, None) => {
            let mut inference = SchemaInference::default();
            in_order(&mut |_, line| if line.ok == ok { inference.observe(&line.text) } else { Ok(()) })?;
            anyhow::Ok(Some(inference.finish(if ok { &outputs.columns } else { &[] })))
        }
    };
    let mut results = Sink::create(storage, &outputs.results, schema(&outputs.results, true, outputs.schema.as_ref())?)?;
    let mut errors = Sink::create(storage, &outputs.errors, schema(&outputs.errors, false, None)?)?;
    in_order(&mut |row, line| {
        let sink = if line.ok { &mut results } else { &mut errors };
        sink.write(&line.text).with_context(|| format!("the output of row {row}"))
    })?;
    results.publish()?;
    errors.publish()
}

fn check_complete(journal: &Journal, n_rows: u64) -> Result<()> {
    let missing: Vec<Range<u64>> = journal.done.missing(n_rows).take(11).collect();
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

/// Reads the journal once and hands out its records in order of rows, each row once.
struct InOrder<'a> {
    journal: &'a Journal,
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
    waiting_bytes: usize, // of the lines in `waiting`
    max_waiting_bytes: usize,
}

/// A record whose turn has not come.
enum Waiting {
    Read(Line),
    There(Place),
}

/// What a record has to say here.
struct Line {
    ok: bool,
    text: Box<str>,
}

impl Line {
    fn of(record: Record<'_>) -> Self {
        Self { ok: record.ok, text: record.line.into() }
    }
}

impl<'a> InOrder<'a> {
    fn new(journal: &'a Journal, max_waiting_bytes: usize) -> Self {
        Self { journal, next: 0, waiting: BTreeMap::new(), waiting_bytes: 0, max_waiting_bytes }
    }

    fn run(mut self, n_rows: u64, each: &mut dyn FnMut(u64, &Line) -> Result<()>) -> Result<()> {
        for number in 1..self.journal.next_segment {
            let lines = self.journal.read(number)?;
            for entry in segment::entries(&lines)? {
                self.take(entry?, number);
            }
            self.drain(each)?;
        }
        assert!(self.next == n_rows && self.waiting.is_empty(), "{} of {n_rows} rows after a complete journal", self.next);
        Ok(())
    }

    fn take(&mut self, entry: segment::Entry<'_>, number: u32) {
        let segment::Entry { record, bytes } = entry;
        if record.row < self.next {
            return;
        }
        // The first committed outcome stays.
        if let MapEntry::Vacant(place) = self.waiting.entry(record.row) {
            let line_bytes = record.line.len();
            // The next row is handed out at once, whatever its size.
            let fits = record.row == self.next || self.waiting_bytes + line_bytes <= self.max_waiting_bytes;
            self.waiting_bytes += if fits { line_bytes } else { 0 };
            let there = Place { segment: number, start: bytes.start, n_bytes: bytes.end - bytes.start };
            place.insert(if fits { Waiting::Read(Line::of(record)) } else { Waiting::There(there) });
        }
    }

    fn drain(&mut self, each: &mut dyn FnMut(u64, &Line) -> Result<()>) -> Result<()> {
        while let Some(place) = self.waiting.first_entry()
            && *place.key() == self.next
        {
            let line = match place.remove() {
                Waiting::Read(line) => {
                    self.waiting_bytes -= line.text.len();
                    line
                }
                Waiting::There(place) => {
                    let record = self.journal.record(place)?;
                    assert_eq!(record.row, self.next, "the place of a waiting record");
                    Line::of(record)
                }
            };
            each(self.next, &line)?;
            self.next += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;
    use proptest::prelude::*;

    use super::*;
    use crate::journal::{JobDir, Manifest};
    use crate::storage::Storage;

    fn record(row: u64) -> Record<'static> {
        let line = format!("{{\"row\":{row},\"pad\":\"{}\"}}", "x".repeat(row as usize % 40)).into();
        Record { row, ok: true, prompt_tokens: 0, completion_tokens: 0, cached_tokens: 0, key: None, line }
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
        };
        let dir = JobDir::lock(&storage, &at.with_extension("job").unwrap()).unwrap();
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
            let (storage, at, mut journal) = journal_of(&segments);
            let outputs = Outputs { results: at.clone(), errors: at.with_extension("errors.jsonl").unwrap(), schema: None, columns: Vec::new() };
            finalise_within(&mut journal, &outputs, rows.len() as u64, waiting_bytes).unwrap();
            let wanted: Vec<String> = (0..rows.len() as u64).map(|row| record(row).line.into_owned()).collect();
            prop_assert_eq!(storage.get(&at).unwrap().unwrap(), wanted.join("\n") + "\n");
        }
    }

    #[test]
    fn what_waits_is_bounded() {
        let segments: Vec<Vec<u64>> = (0..100).rev().map(|row| vec![row]).collect();
        let (_, _, journal) = journal_of(&segments);
        let mut in_order = InOrder::new(&journal, 500);
        for number in 1..100 {
            let lines = journal.read(number).unwrap();
            for entry in segment::entries(&lines).unwrap() {
                in_order.take(entry.unwrap(), number);
            }
            let held: usize =
                in_order.waiting.values().map(|w| if let Waiting::Read(line) = w { line.text.len() } else { 0 }).sum();
            assert!(held == in_order.waiting_bytes && held <= 500, "{held} bytes held after {number} segments");
        }
        assert_eq!(in_order.waiting.len(), 99);
    }
}
