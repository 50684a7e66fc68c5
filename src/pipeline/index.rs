//! What a job of any size must remember of its rows: who used a `custom_id` first, which row was the first of its content,
//! and where that row's outcome is. Tables on disk (`first_rows`) and a file of places by row, all unnamed and gone with
//! the process; a resumed job fills them again from its journal. Invariant: memory does not grow with the number of rows.

use super::first_rows::FirstRows;
use crate::journal::{Place, RowSet, SegmentId};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Segment, first byte and length of a record, each of 8 bytes; a segment as a number is never 0.
const PLACE_BYTES: usize = 24;
/// No row has this number.
pub(super) const NOBODY: u64 = u64::MAX;
/// Records that are noted together.
const BATCH: usize = 1 << 17;

/// See the module. Things are known by a hash of them (128 bits of BLAKE3: collisions are out of reach).
pub(super) struct JobIndex {
    ids: Mutex<FirstRows>,
    /// The rows that a retry keeps, by their ids: these are taken, also for rows before them.
    kept_ids: Option<Mutex<FirstRows>>,
    sharing: Option<RowSet>,
    contents: Mutex<FirstRows>,
    /// At row · [`PLACE_BYTES`]: where the row's record is; zeros where it has none.
    places: File,
}

impl JobIndex {
    /// An empty index whose files live in `folder`.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let places = tempfile::tempfile_in(folder);
        let places = places.with_context(|| format!("cannot make a temporary file in {}", folder.display()))?;
        let (ids, contents) = (Mutex::new(FirstRows::new(folder)?), Mutex::new(FirstRows::new(folder)?));
        Ok(Self { ids, kept_ids: None, sharing: None, contents, places })
    }

    /// The same for a job that keeps rows of a finished one. `sharing`: the only rows that may share a completion, because all
    /// others were made with other settings; `None` for all.
    pub(super) fn keeping(folder: &Path, sharing: Option<RowSet>) -> Result<Self> {
        Ok(Self { kept_ids: Some(Mutex::new(FirstRows::new(folder)?)), sharing, ..Self::new(folder)? })
    }

    /// Whether a row's completion may be another's, too.
    pub(super) fn may_share(&self, row: u64) -> bool {
        self.sharing.as_ref().is_none_or(|rows| rows.contains(row))
    }

    /// Notes ids of rows that are kept.
    pub(super) fn keep_ids(&self, rows: &[(u64, u128)]) -> Result<()> {
        self.kept_ids.as_ref().map_or(Ok(()), |kept| kept.lock().unwrap_or_else(PoisonError::into_inner).add(rows))
    }

    /// For each id the kept row that has it; [`NOBODY`] if there is none.
    pub(super) fn keepers_of_ids(&self, uses: &[(u64, u128)]) -> Result<Vec<u64>> {
        let Some(kept) = &self.kept_ids else { return Ok(vec![NOBODY; uses.len()]) };
        // To ask is to note: as a row behind all others.
        let asked: Vec<(u64, u128)> = uses.iter().map(|(_, key)| (NOBODY, *key)).collect();
        kept.lock().unwrap_or_else(PoisonError::into_inner).note(&asked)
    }

    /// Notes `custom_id`s (their keys: [`id_key`]) and their rows; for each, the lowest row known to use it.
    pub(super) fn first_of_ids(&self, uses: &[(u64, u128)]) -> Result<Vec<u64>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).note(uses)
    }

    /// Notes contents and their rows; for each, the lowest row known to have it.
    pub(super) fn first_of_contents(&self, uses: &[(u64, u128)]) -> Result<Vec<u64>> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner).note(uses)
    }

    /// The same among the rows of this shard alone.
    pub(super) fn first_of_own_contents(&self, uses: &[(u64, u128)]) -> Result<Vec<u64>> {
        let uses: Vec<(u64, u128)> = uses.iter().map(|(row, key)| (*row, own_key(*key))).collect();
        self.first_of_contents(&uses)
    }

    /// Notes where rows' records are.
    pub(super) fn add_places(&self, mut places: Vec<(u64, Place)>) -> Result<()> {
        places.sort_unstable_by_key(|(row, _)| *row);
        let mut bytes = Vec::with_capacity(places.len() * PLACE_BYTES);
        // One write for each run of rows without a gap.
        for run in places.chunk_by(|(row, _), (next, _)| row + 1 == *next) {
            bytes.clear();
            for (_, Place { segment, start, n_bytes }) in run {
                bytes.extend([segment.to_u64(), *start, *n_bytes].into_iter().flat_map(u64::to_le_bytes));
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
        Ok((segment > 0).then(|| Place { segment: SegmentId::from_u64(segment), start, n_bytes }))
    }
}

/// Notes what an earlier run has journaled.
pub(super) struct Replay<'a> {
    index: &'a JobIndex,
    /// Whether the job is a shard of one.
    pub(super) is_shard: bool,
    /// Whether places are noted of records without a key, too.
    pub(super) all_places: bool,
    ids: Vec<(u64, u128)>,
    kept_ids: Vec<(u64, u128)>,
    contents: Vec<(u64, u128)>,
    places: Vec<(u64, Place)>,
}

impl<'a> Replay<'a> {
    pub(super) fn new(index: &'a JobIndex, is_shard: bool) -> Self {
        let (ids, kept_ids, contents, places) = Default::default();
        Self { index, is_shard, all_places: false, ids, kept_ids, contents, places }
    }

    /// Notes a row that another shard keeps, by its id.
    pub(super) fn note_foreign(&mut self, row: u64, id: Option<u128>) -> Result<()> {
        self.kept_ids.extend(id.map(|id| (row, id)));
        if self.kept_ids.len() >= BATCH { self.flush() } else { Ok(()) }
    }

    /// Notes one record: its row, whether it completed, and what its id and its content are known by.
    pub(super) fn note(&mut self, (row, ok): (u64, bool), (id, key): (Option<u128>, Option<u128>), place: Place) -> Result<()> {
        self.ids.extend(id.map(|id| (row, id)));
        self.kept_ids.extend(id.filter(|_| ok).map(|id| (row, id)));
        self.contents.extend(key.map(|key| (row, key)));
        if key.is_some() || self.all_places {
            self.places.push((row, place));
        }
        if self.ids.len().max(self.places.len()) >= BATCH { self.flush() } else { Ok(()) }
    }

    /// Makes what was noted known.
    pub(super) fn flush(&mut self) -> Result<()> {
        let Self { index, is_shard, ids, kept_ids, contents, places, .. } = self;
        let add = |table: &Mutex<FirstRows>, uses: &[(u64, u128)]| table.lock().unwrap_or_else(PoisonError::into_inner).add(uses);
        let own: Vec<(u64, u128)> = contents.iter().filter(|_| *is_shard).map(|(row, key)| (*row, own_key(*key))).collect();
        let places = std::mem::take(places);
        let (noted, (known, placed)) = rayon::join(
            || add(&index.ids, ids).and_then(|()| index.keep_ids(kept_ids)),
            || {
                let known = add(&index.contents, contents).and_then(|()| add(&index.contents, &own));
                (known, index.add_places(places))
            },
        );
        ids.clear();
        kept_ids.clear();
        contents.clear();
        noted.and(known).and(placed)
    }
}

/// The id in a request row's output or error line.
pub(super) fn custom_id(row: u64, line: &str) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Line {
        custom_id: Option<String>,
    }
    let line: Line = serde_json::from_str(line).with_context(|| format!("the line of row {row}"))?;
    Ok(line.custom_id)
}

/// What a content is known by among a shard's own rows.
fn own_key(key: u128) -> u128 {
    key ^ 0x6f77_6e20_726f_7773_206f_6620_6120_7368
}

/// What a `custom_id` is known by.
pub(super) fn id_key(id: &str) -> u128 {
    let hash = blake3::hash(id.as_bytes());
    let (key, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    u128::from_le_bytes(*key)
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
        let ids = |ids: &[(u64, &str)]| ids.iter().map(|(row, id)| (*row, id_key(id))).collect::<Vec<_>>();
        assert_eq!(index.first_of_ids(&ids(&[(0, "a"), (1, "b"), (2, "a")])).unwrap(), [0, 1, 0]);
        assert_eq!(index.first_of_ids(&ids(&[(3, "b"), (4, "c")])).unwrap(), [1, 4]);
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
        let place =
            |row: u64| Place { segment: SegmentId { epoch: 1, number: 1 + row as u32 }, start: 10 * row, n_bytes: 1 << 40 };
        index.add_places([9, 3, 4, 5, 0].map(|row| (row, place(row))).to_vec()).unwrap();
        for row in 0..20 {
            let wanted = [0, 3, 4, 5, 9].contains(&row).then(|| place(row));
            assert_eq!(index.place(row).unwrap(), wanted, "row {row}");
        }
    }

    #[test]
    fn a_replay_restores_what_was_known() {
        let index = index();
        let mut replay = Replay::new(&index, false);
        let place = Place { segment: SegmentId { epoch: 2, number: 7 }, start: 1, n_bytes: 2 };
        replay.note((3, true), (Some(id_key("id 3")), Some(255)), place).unwrap();
        replay.note((4, true), (Some(id_key("id 4")), None), place).unwrap();
        replay.flush().unwrap();
        assert_eq!(index.first_of_ids(&[(8, id_key("id 3")), (9, id_key("id 4"))]).unwrap(), [3, 4]);
        assert_eq!(index.first_of_contents(&[(8, 255)]).unwrap(), [3]);
        assert_eq!((index.place(3).unwrap(), index.place(4).unwrap()), (Some(place), None));
    }
}
