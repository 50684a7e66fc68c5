//! Which `custom_id`s have been used, for jobs of any size: a disk-backed table with a small fixed cache, in an unnamed
//! file that vanishes with the process. Invariant: memory does not grow with the number of rows.

use anyhow::{Context, Result};
use redb::backends::FileBackend;
use redb::{Database, Durability, ReadableTable, TableDefinition};
use std::path::Path;

/// Hash of the id (128 bits of BLAKE3: collisions are out of reach) -> first row that used it.
const FIRST_USE: TableDefinition<'_, u128, u64> = TableDefinition::new("first_use");
const CACHE_BYTES: usize = 16 << 20;

/// The ids used so far.
pub(super) struct SeenIds {
    db: Database,
}

impl SeenIds {
    /// An empty set whose file lives in `folder`.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let file =
            tempfile::tempfile_in(folder).with_context(|| format!("cannot make a temporary file in {}", folder.display()))?;
        let db = FileBackend::new(file)
            .and_then(|backend| Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend));
        let db = db.context("cannot make the table of custom_ids")?;
        Ok(Self { db })
    }

    /// Adds ids in row order; for each, the earlier row that used it, if any.
    pub(super) fn insert<'a>(&self, ids: impl Iterator<Item = (u64, &'a str)>) -> Result<Vec<Option<u64>>> {
        let mut transaction = self.db.begin_write()?;
        transaction.set_durability(Durability::None)?;
        let mut earlier = Vec::new();
        {
            let mut table = transaction.open_table(FIRST_USE)?;
            for (row_idx, id) in ids {
                let hash = blake3::hash(id.as_bytes());
                let (key, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
                let key = u128::from_le_bytes(*key);
                let first = table.get(key)?.map(|row| row.value());
                if first.is_none() {
                    table.insert(key, row_idx)?;
                }
                earlier.push(first);
            }
        }
        transaction.commit()?;
        Ok(earlier)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_uses_name_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let seen = SeenIds::new(folder.path()).unwrap();
        assert_eq!(seen.insert([(0, "a"), (1, "b"), (2, "a")].into_iter()).unwrap(), [None, None, Some(0)]);
        assert_eq!(seen.insert([(3, "b"), (4, "c")].into_iter()).unwrap(), [Some(1), None]);
    }
}
