//! Which row was the first to have a key, for any number of keys: exact, on disk, in memory of a fixed size. Most keys of
//! a job are new, so that is what costs least: a Bloom filter says so without looking further, and the key is appended to
//! one of a few files (by a part of the key). A key that the filter may have seen is looked for in its file, read from
//! its beginning, together with all others of the same call that belong there.
//!
//! Invariant: memory does not grow with the number of keys. A call with keys that are known reads the files they belong to
//! once, up to 24 bytes for every key so far: cheap for windows of thousands of rows, less so for windows of a few. Beyond
//! what the filter has room for (some twenty million keys) it sends ever more new keys there too: that costs time, never a
//! wrong answer.

use anyhow::{Context, Result, ensure};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Files of a table.
const PARTS: usize = 32;
/// A key and its row.
const ENTRY_BYTES: usize = 24;
/// What a file's buffer holds before it is written.
const BUFFER_BYTES: usize = 512 * ENTRY_BYTES;
/// What is read of a file at a time.
const READ_BYTES: usize = 8192 * ENTRY_BYTES;
/// Words of the filter: 32 MiB, twenty bits for each of thirteen million keys.
const FILTER_WORDS: usize = 1 << 22;
/// Words of a block of the filter, which is as long as a cache line.
const BLOCK_WORDS: usize = 8;
/// Keys whose blocks are looked at together.
const FETCHED: usize = 16;
/// Bits that a key sets in its block.
const KEY_BITS: usize = 6;

/// See the module. Keys must be hashes: their bits are used as they are.
pub(super) struct FirstRows {
    folder: PathBuf,
    filter: Vec<u64>,
    parts: Vec<Part>,
    read: Vec<u8>,
}

/// The entries of the keys that end in the same bits; of a key that stands there twice, the lowest row counts.
struct Part {
    /// Made when the buffer is full for the first time.
    file: Option<File>,
    n_written: u64, // bytes
    buffer: Vec<u8>,
}

impl FirstRows {
    /// Nothing known; the files are unnamed ones in `folder`.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        ensure!(folder.is_dir(), "no folder {} for the index of the job's rows", folder.display());
        let parts = (0..PARTS).map(|_| Part { file: None, n_written: 0, buffer: Vec::new() }).collect();
        Ok(Self { folder: folder.to_owned(), filter: vec![0; FILTER_WORDS], parts, read: Vec::new() })
    }

    /// Notes keys and their rows; for each, the lowest row known to have it.
    pub(super) fn note(&mut self, uses: &[(u64, u128)]) -> Result<Vec<u64>> {
        let mut first: Vec<u64> = uses.iter().map(|(row, _)| *row).collect();
        // Places in `uses` of the keys that may be known, by the file that knows.
        let mut asked: [Vec<usize>; PARTS] = std::array::from_fn(|_| Vec::new());
        for (i, &(row, key)) in uses.iter().enumerate() {
            if i.is_multiple_of(FETCHED) {
                self.fetch(&uses[i..]);
            }
            if self.filter_has_or_adds(key) {
                asked[part_of(key)].push(i);
            } else {
                self.parts[part_of(key)].push(&self.folder, key, row)?;
            }
        }
        for (part, asked) in self.parts.iter_mut().zip(asked).filter(|(_, asked)| !asked.is_empty()) {
            let mut known: HashMap<u128, u64> = asked.iter().map(|&i| (uses[i].1, u64::MAX)).collect();
            part.find(&mut known, &mut self.read)?;
            for i in asked {
                let (row, key) = uses[i];
                let lowest = known.get_mut(&key).expect("all were put in");
                if row < *lowest {
                    *lowest = row;
                    part.push(&self.folder, key, row)?;
                }
                first[i] = *lowest;
            }
        }
        // A lower row may have come after a higher one of the same call.
        if !uses.is_sorted_by_key(|(row, _)| *row) {
            let mut lowest: HashMap<u128, u64> = HashMap::new();
            for (&(_, key), &row) in uses.iter().zip(&first) {
                let known = lowest.entry(key).or_insert(row);
                *known = row.min(*known);
            }
            first.iter_mut().zip(uses).for_each(|(first, (_, key))| *first = lowest[key]);
        }
        Ok(first)
    }

    /// Notes keys and their rows, and does not say which are known.
    pub(super) fn add(&mut self, uses: &[(u64, u128)]) -> Result<()> {
        for (i, &(row, key)) in uses.iter().enumerate() {
            if i.is_multiple_of(FETCHED) {
                self.fetch(&uses[i..]);
            }
            self.filter_has_or_adds(key);
            self.parts[part_of(key)].push(&self.folder, key, row)?;
        }
        Ok(())
    }

    /// Looks at the next keys' blocks, all at once: waiting for memory one after the other is what the filter costs.
    fn fetch(&self, uses: &[(u64, u128)]) {
        let words = uses.iter().take(FETCHED).map(|&(_, key)| self.filter[block_of(key)]);
        std::hint::black_box(words.fold(0, |seen, word| seen ^ word));
    }

    /// Whether the key may have been added before; it is now.
    fn filter_has_or_adds(&mut self, key: u128) -> bool {
        let mut bits = (key >> 64) as u64;
        let block = &mut self.filter[block_of(key)..][..BLOCK_WORDS];
        let mut has = true;
        for _ in 0..KEY_BITS {
            let (word, bit) = (bits as usize / 64 % BLOCK_WORDS, 1 << (bits % 64));
            has &= block[word] & bit != 0;
            block[word] |= bit;
            bits >>= 9; // a block has 2^9 bits
        }
        has
    }
}

/// Where the filter's block of a key begins.
fn block_of(key: u128) -> usize {
    key as u64 as usize % (FILTER_WORDS / BLOCK_WORDS) * BLOCK_WORDS
}

/// By other bits than the filter's.
fn part_of(key: u128) -> usize {
    (key >> 123) as usize % PARTS
}

impl Part {
    fn push(&mut self, folder: &Path, key: u128, row: u64) -> Result<()> {
        self.buffer.extend_from_slice(&key.to_le_bytes());
        self.buffer.extend_from_slice(&row.to_le_bytes());
        if self.buffer.len() >= BUFFER_BYTES {
            let file = match &mut self.file {
                Some(file) => file,
                none => none.insert(
                    tempfile::tempfile_in(folder)
                        .with_context(|| format!("cannot make a temporary file in {}", folder.display()))?,
                ),
            };
            file.write_all_at(&self.buffer, self.n_written).context("cannot write the index of the job's rows")?;
            self.n_written += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }

    /// Sets the lowest row of each key that is there. `read` is for use as a buffer.
    fn find(&self, keys: &mut HashMap<u128, u64>, read: &mut Vec<u8>) -> Result<()> {
        // Most entries are of other keys: a small table of bits turns nearly all of them away.
        const WORDS: usize = 256;
        let mut may_be = [0_u64; WORDS];
        let place = |key: u128| ((key >> 64) as usize % WORDS, 1 << ((key >> 72) % 64));
        for (word, bit) in keys.keys().map(|&key| place(key)) {
            may_be[word] |= bit;
        }
        let mut take = |entries: &[u8]| {
            for entry in entries.as_chunks::<ENTRY_BYTES>().0 {
                let (key, row) = entry.split_first_chunk().expect("an entry is longer than a key");
                let key = u128::from_le_bytes(*key);
                let (word, bit) = place(key);
                if may_be[word] & bit != 0
                    && let Some(lowest) = keys.get_mut(&key)
                {
                    let (row, _) = row.split_first_chunk().expect("a row is the rest of an entry");
                    *lowest = u64::from_le_bytes(*row).min(*lowest);
                }
            }
        };
        let mut start = 0;
        while let Some(file) = self.file.as_ref().filter(|_| start < self.n_written) {
            read.resize(READ_BYTES.min((self.n_written - start) as usize), 0);
            file.read_exact_at(read, start).context("cannot read the index of the job's rows")?;
            take(read);
            start += read.len() as u64;
        }
        take(&self.buffer);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash(key: u32) -> u128 {
        let (head, _) = blake3::hash(&key.to_le_bytes()).as_bytes().split_first_chunk().map(|(a, b)| (*a, b.len())).unwrap();
        u128::from_le_bytes(head)
    }

    proptest! {
        /// As a map in memory, in whatever order rows come; and also where the filter turns nothing away.
        #[test]
        fn answers_are_those_of_a_map(
            calls in prop::collection::vec(prop::collection::vec((0..5000_u64, 0..300_u32), 0..60), 1..30),
            filter_is_full in any::<bool>(),
        ) {
            let mut table = FirstRows::new(&std::env::temp_dir()).unwrap();
            if filter_is_full {
                table.filter.fill(u64::MAX);
            }
            let mut map: HashMap<u32, u64> = HashMap::new();
            for uses in calls {
                for &(row, key) in &uses {
                    let first = map.entry(key).or_insert(row);
                    *first = row.min(*first);
                }
                let noted: Vec<(u64, u128)> = uses.iter().map(|&(row, key)| (row, hash(key))).collect();
                let wanted: Vec<u64> = uses.iter().map(|(_, key)| map[key]).collect();
                prop_assert_eq!(table.note(&noted).unwrap(), wanted);
            }
        }
    }

    #[test]
    fn buffers_that_were_written_are_read_again() {
        let mut table = FirstRows::new(&std::env::temp_dir()).unwrap();
        let n_keys = 60_000;
        let uses: Vec<(u64, u128)> = (0..n_keys).map(|key| (u64::from(key) + 7, hash(key))).collect();
        let rows: Vec<u64> = uses.iter().map(|(row, _)| *row).collect();
        assert_eq!(table.note(&uses).unwrap(), rows);
        assert!(table.parts.iter().all(|part| part.n_written > 0 && part.buffer.len() < BUFFER_BYTES));
        let again: Vec<(u64, u128)> = uses.iter().map(|(row, key)| (row + 1_000_000, *key)).collect();
        assert_eq!(table.note(&again).unwrap(), rows);
    }
}
