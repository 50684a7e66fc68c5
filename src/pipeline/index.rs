//! What a job of any size must remember of its rows: who used a `custom_id` first, which row was the first of its content,
//! and where that row's outcome is. Disk-backed tables with a small fixed cache, and a file of places by row, both unnamed
//! and gone with the process; a resumed job fills them again from its journal. Invariant: memory does not grow with the
//! number of rows.

use crate::journal::{Place, Record};
use anyhow::{Context, Result};
use redb::backends::FileBackend;
use redb::{Database, Durability, TableDefinition, WriteTransaction};
use serde::Deserialize;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Hash of a thing (128 bits of BLAKE3: collisions are out of reach) -> the lowest row known to have it.
type FirstRows = TableDefinition<'static, u128, u64>;
const FIRST_OF_ID: FirstRows = TableDefinition::new("first_of_id");
const FIRST_OF_CONTENT: FirstRows = TableDefinition::new("first_of_content");
/// Segment, first byte and length of a record, each of 8 bytes; a segment's number is never 0.
const PLACE_BYTES: usize = 24;
const CACHE_BYTES: usize = 16 << 20;
/// Records that are noted in one transaction.
const BATCH: usize = 4096;

/// See the module.
pub(super) struct JobIndex {
    db: Database,
    /// At row · [`PLACE_BYTES`]: where the row's record is; zeros where it has none.
    places: File,
}

impl JobIndex {
    /// An empty index whose file lives in `folder`.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let file =
            || tempfile::tempfile_in(folder).with_context(|| format!("cannot make a temporary file in {}", folder.display()));
        let db = FileBackend::new(file()?)
            .and_then(|backend| Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend));
        let db = db.context("cannot make the index of the job's rows")?;
        Ok(Self { db, places: file()? })
    }

    /// Notes `custom_id`s and their rows; for each, the lowest row known to use it.
    pub(super) fn first_of_ids<'a>(&self, ids: impl Iterator<Item = (u64, &'a str)>) -> Result<Vec<u64>> {
        let uses: Vec<_> = ids.map(|(row, id)| (row, id_key(id))).collect();
        self.write(|transaction| note_first(transaction, FIRST_OF_ID, &uses))
    }

    /// Notes contents and their rows; for each, the lowest row known to have it.
    pub(super) fn first_of_contents(&self, uses: &[(u64, u128)]) -> Result<Vec<u64>> {
        self.write(|transaction| note_first(transaction, FIRST_OF_CONTENT, uses))
    }

    /// Notes where rows' records are.
    pub(super) fn add_places(&self, mut places: Vec<(u64, Place)>) -> Result<()> {
        places.sort_unstable_by_key(|(row, _)| *row);
        let mut bytes = Vec::with_capacity(places.len() * PLACE_BYTES);
        // One write for each run of rows without a gap.
        for run in places.chunk_by(|(row, _), (next, _)| row + 1 == *next) {
            bytes.clear();
            for (_, Place { segment, start, n_bytes }) in run {
                bytes.extend([u64::from(*segment), *start, *n_bytes].into_iter().flat_map(u64::to_le_bytes));
            }
            self.places
                .write_all_at(&bytes, run[0].0 * PLACE_BYTES as u64)
                .context("cannot write the index of the job's rows")?;
        }
        Ok(())
    }

    /// Where a row's record is; `None` if it has none yet.
    pub(super) fn place(&self, row: u64) -> Result<Option<Place>> {
        let mut bytes = [0; PLACE_BYTES];
        match self.places.read_exact_at(&mut bytes, row * PLACE_BYTES as u64) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error).context("cannot read the index of the job's rows"),
        }
        let (numbers, _) = bytes.as_chunks::<8>();
        let [segment, start, n_bytes] = [0, 1, 2].map(|i| u64::from_le_bytes(numbers[i]));
        Ok((segment > 0).then_some(Place { segment: segment as u32, start, n_bytes }))
    }

    /// The changes are for this process alone: they need not survive it.
    fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T>) -> Result<T> {
        let mut transaction = self.db.begin_write()?;
        transaction.set_durability(Durability::None)?;
        let result = change(&transaction)?;
        transaction.commit()?;
        Ok(result)
    }
}

/// Notes what an earlier run has journaled.
pub(super) struct Replay<'a> {
    index: &'a JobIndex,
    /// Whether rows have a `custom_id`.
    pub(super) requests: bool,
    ids: Vec<(u64, u128)>,
    contents: Vec<(u64, u128)>,
    places: Vec<(u64, Place)>,
}

impl<'a> Replay<'a> {
    pub(super) fn new(index: &'a JobIndex, requests: bool) -> Self {
        Self { index, requests, ids: Vec::new(), contents: Vec::new(), places: Vec::new() }
    }

    /// Notes one record.
    pub(super) fn note(&mut self, record: &Record, place: Place) -> Result<()> {
        if self.requests
            && let Some(id) = custom_id(record)?
        {
            self.ids.push((record.row, id_key(&id)));
        }
        if let Some(key) = &record.key {
            let key = u128::from_str_radix(key, 16).with_context(|| format!("the key of row {} in the journal", record.row))?;
            self.contents.push((record.row, key));
            self.places.push((record.row, place));
        }
        if self.ids.len().max(self.places.len()) >= BATCH { self.flush() } else { Ok(()) }
    }

    /// Makes what was noted known.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.index.write(|transaction| {
            note_first(transaction, FIRST_OF_ID, &self.ids)?;
            note_first(transaction, FIRST_OF_CONTENT, &self.contents)
        })?;
        self.ids.clear();
        self.contents.clear();
        self.index.add_places(std::mem::take(&mut self.places))
    }
}

/// The id in a request row's output or error line.
fn custom_id(record: &Record) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Line {
        custom_id: Option<String>,
    }
    let line: Line =
        serde_json::from_str(record.line.get()).with_context(|| format!("the journaled line of row {}", record.row))?;
    Ok(line.custom_id)
}

fn id_key(id: &str) -> u128 {
    let hash = blake3::hash(id.as_bytes());
    let (key, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    u128::from_le_bytes(*key)
}

/// In order of the keys, which a tree likes better than any other.
fn note_first(transaction: &WriteTransaction, table: FirstRows, uses: &[(u64, u128)]) -> Result<Vec<u64>> {
    let mut table = transaction.open_table(table)?;
    let mut order: Vec<usize> = (0..uses.len()).collect();
    order.sort_by_key(|&i| (uses[i].1, uses[i].0));
    let mut first = vec![0; uses.len()];
    for i in order {
        let (row, key) = uses[i];
        // Most keys are new: one walk down the tree, and another only to take back what was wrong to write.
        let known = table.insert(key, row)?.map(|row| row.value());
        first[i] = known.map_or(row, |known| known.min(row));
        if first[i] != row {
            table.insert(key, first[i])?;
        }
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> JobIndex {
        JobIndex::new(tempfile::tempdir().unwrap().path()).unwrap()
    }

    #[test]
    fn later_uses_name_the_first() {
        let index = index();
        assert_eq!(index.first_of_ids([(0, "a"), (1, "b"), (2, "a")].into_iter()).unwrap(), [0, 1, 0]);
        assert_eq!(index.first_of_ids([(3, "b"), (4, "c")].into_iter()).unwrap(), [1, 4]);
    }

    #[test]
    fn an_earlier_row_that_comes_later_is_the_first() {
        let index = index();
        assert_eq!(index.first_of_contents(&[(9, 5)]).unwrap(), [9]);
        assert_eq!(index.first_of_contents(&[(2, 5), (1, 5)]).unwrap(), [1, 1]);
        assert_eq!(index.first_of_contents(&[(12, 5)]).unwrap(), [1]);
    }

    #[test]
    fn places_are_found_by_row() {
        let index = index();
        let place = |row: u64| Place { segment: 1 + row as u32, start: 10 * row, n_bytes: 1 << 40 };
        index.add_places([9, 3, 4, 5, 0].map(|row| (row, place(row))).to_vec()).unwrap();
        for row in 0..20 {
            let wanted = [0, 3, 4, 5, 9].contains(&row).then(|| place(row));
            assert_eq!(index.place(row).unwrap(), wanted, "row {row}");
        }
    }

    #[test]
    fn a_replay_restores_what_was_known() {
        use serde_json::value::RawValue;
        let record = |row, key: Option<&str>| Record {
            row,
            ok: true,
            prompt_tokens: 0,
            completion_tokens: 0,
            cached_tokens: 0,
            key: key.map(str::to_owned),
            line: RawValue::from_string(format!("{{\"custom_id\":\"id {row}\"}}")).unwrap(),
        };
        let index = index();
        let mut replay = Replay::new(&index, true);
        let place = Place { segment: 7, start: 1, n_bytes: 2 };
        replay.note(&record(3, Some("ff")), place).unwrap();
        replay.note(&record(4, None), place).unwrap();
        replay.flush().unwrap();
        assert_eq!(index.first_of_ids([(8, "id 3"), (9, "id 4")].into_iter()).unwrap(), [3, 4]);
        assert_eq!(index.first_of_contents(&[(8, 255)]).unwrap(), [3]);
        assert_eq!((index.place(3).unwrap(), index.place(4).unwrap()), (Some(place), None));
    }
}
