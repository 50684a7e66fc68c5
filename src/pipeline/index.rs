//! What a job of any size must remember of its rows: who used a `custom_id` first, which row was the first of its content,
//! and where that row's outcome is. Disk-backed tables with a small fixed cache, in an unnamed file that vanishes with the
//! process; a resumed job fills them again from its journal. Invariant: memory does not grow with the number of rows.

use crate::journal::{Place, Record};
use anyhow::{Context, Result};
use redb::backends::FileBackend;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Deserialize;
use std::path::Path;

/// Hash of a thing (128 bits of BLAKE3: collisions are out of reach) -> the lowest row known to have it.
type FirstRows = TableDefinition<'static, u128, u64>;
const FIRST_OF_ID: FirstRows = TableDefinition::new("first_of_id");
const FIRST_OF_CONTENT: FirstRows = TableDefinition::new("first_of_content");
/// Row -> (segment, first byte, bytes) of its record.
const PLACES: TableDefinition<'_, u64, (u32, u64, u64)> = TableDefinition::new("places");
const CACHE_BYTES: usize = 16 << 20;
/// Records that are noted in one transaction.
const BATCH: usize = 4096;

/// See the module.
pub(super) struct JobIndex {
    db: Database,
}

impl JobIndex {
    /// An empty index whose file lives in `folder`.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let file =
            tempfile::tempfile_in(folder).with_context(|| format!("cannot make a temporary file in {}", folder.display()))?;
        let db = FileBackend::new(file)
            .and_then(|backend| Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend));
        let db = db.context("cannot make the index of the job's rows")?;
        Ok(Self { db })
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
    pub(super) fn add_places(&self, places: &[(u64, Place)]) -> Result<()> {
        self.write(|transaction| note_places(transaction, places))
    }

    /// Where a row's record is; `None` if it has none yet.
    pub(super) fn place(&self, row: u64) -> Result<Option<Place>> {
        let table = self.db.begin_read()?.open_table(PLACES)?;
        let place = table.get(row)?.map(|place| place.value());
        Ok(place.map(|(segment, start, n_bytes)| Place { segment, start, n_bytes }))
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
            note_first(transaction, FIRST_OF_CONTENT, &self.contents)?;
            note_places(transaction, &self.places)
        })?;
        self.ids.clear();
        self.contents.clear();
        self.places.clear();
        Ok(())
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
        let known = table.get(key)?.map(|row| row.value());
        first[i] = known.map_or(row, |known| known.min(row));
        if known != Some(first[i]) {
            table.insert(key, first[i])?;
        }
    }
    Ok(first)
}

fn note_places(transaction: &WriteTransaction, places: &[(u64, Place)]) -> Result<()> {
    let mut table = transaction.open_table(PLACES)?;
    for (row, place) in places {
        table.insert(row, (place.segment, place.start, place.n_bytes))?;
    }
    Ok(())
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
