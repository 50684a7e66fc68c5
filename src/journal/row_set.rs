//! A set of row indexes. Invariant: at most one bit per row up to the largest in the set, and next to nothing where rows
//! are dense, whatever the order they came in: ten million rows are 1.25 MB at worst.

use std::collections::BTreeMap;
use std::ops::Range;

/// Rows per chunk; one that is full keeps no bits.
const CHUNK_ROWS: u64 = 1 << 16;
const CHUNK_WORDS: usize = (CHUNK_ROWS / 64) as usize;

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct RowSet {
    chunks: BTreeMap<u64, Chunk>, // by row / CHUNK_ROWS
    len: u64,
}

#[derive(Debug, Clone)]
enum Chunk {
    Full,
    Some { bits: Box<[u64]>, n_rows: u64 },
}

impl RowSet {
    /// Adds a row; `false` if it was there.
    pub fn insert(&mut self, row: u64) -> bool {
        let empty = || Chunk::Some { bits: vec![0; CHUNK_WORDS].into(), n_rows: 0 };
        let chunk = self.chunks.entry(row / CHUNK_ROWS).or_insert_with(empty);
        let Chunk::Some { bits, n_rows } = chunk else { return false };
        let (word, bit) = position(row);
        if bits[word] & bit != 0 {
            return false;
        }
        bits[word] |= bit;
        *n_rows += 1;
        self.len += 1;
        if *n_rows == CHUNK_ROWS {
            *chunk = Chunk::Full;
        }
        true
    }

    /// Whether a row is in the set.
    pub fn contains(&self, row: u64) -> bool {
        match self.chunks.get(&(row / CHUNK_ROWS)) {
            None => false,
            Some(Chunk::Full) => true,
            Some(Chunk::Some { bits, .. }) => {
                let (word, bit) = position(row);
                bits[word] & bit != 0
            }
        }
    }

    /// How many rows.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The ranges of rows among these that are not in the set, ascending.
    pub fn missing(&self, rows: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut next = rows.start;
        std::iter::from_fn(move || {
            let start = (next..rows.end).find(|&row| !self.contains(row))?;
            let end = (start..rows.end).find(|&row| self.contains(row)).unwrap_or(rows.end);
            next = end;
            Some(start..end)
        })
    }
}

/// Word and bit of a row in its chunk.
fn position(row: u64) -> (usize, u64) {
    ((row % CHUNK_ROWS / 64) as usize, 1 << (row % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_a_set(rows in prop::collection::vec(prop_oneof![0..70u64, 65_500..65_600u64, any::<u64>()], 0..200)) {
            let (mut set, mut oracle) = (RowSet::default(), BTreeSet::new());
            for &row in &rows {
                prop_assert_eq!(set.insert(row), oracle.insert(row));
            }
            prop_assert_eq!(set.len(), oracle.len() as u64);
            for row in rows.iter().flat_map(|&row| [row, row ^ 1, row.wrapping_add(64)]) {
                prop_assert_eq!(set.contains(row), oracle.contains(&row));
            }
            let missing: Vec<u64> = set.missing(0..100).flatten().collect();
            let wanted: Vec<u64> = (0..100).filter(|row| !oracle.contains(row)).collect();
            prop_assert_eq!(missing, wanted);
        }
    }

    #[test]
    fn dense_rows_take_no_memory_in_any_order() {
        // A step that shares no factor with the count visits every row once, far from its neighbours.
        let (n_rows, step) = (10 * CHUNK_ROWS, 257_617);
        let mut set = RowSet::default();
        for i in 0..n_rows {
            assert!(set.insert(i * step % n_rows));
        }
        assert_eq!(set.len(), n_rows);
        assert!(set.chunks.len() == 10 && set.chunks.values().all(|chunk| matches!(chunk, Chunk::Full)));
        assert_eq!(set.missing(0..n_rows + 3).flatten().collect::<Vec<_>>(), [n_rows, n_rows + 1, n_rows + 2]);
    }
}
