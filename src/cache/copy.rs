//! A local copy of the packs in a store: what is looked up, so that no look-up waits for the store. Invariant: every result
//! came from a pack that was there when the copy was last brought up to date, or that this machine has put there since.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::pack::Pack;
use super::{Cache, Role, evict, give_back, used_bytes};

/// The tables of a copy: the results know their packs.
pub(super) const TABLES: &str = "
    CREATE TABLE results (key BLOB NOT NULL UNIQUE, used INTEGER NOT NULL, result BLOB NOT NULL, pack INTEGER NOT NULL);
    CREATE INDEX results_used ON results (used);
    CREATE INDEX results_pack ON results (pack);
    CREATE TABLE packs (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);";

/// How long another process may take to put a pack into the copy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether a copy has room for packs that are older than one that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    Left,
    /// Of this one, or of what is as old, something had to go.
    None,
}

impl Cache {
    /// Opens the copy in a folder, making it if need be; its file is kept under `max_bytes`. Results of packs written before
    /// `renew_before` (unix milliseconds) are said to be stale when they are found.
    ///
    /// # Errors
    /// As [`Cache::open`]'s.
    pub fn open_copy(folder: &Path, max_bytes: u64, renew_before: Option<i64>) -> Result<Self> {
        let cache = Self::open_as(folder, max_bytes, Role::Copy { renew_before: renew_before.unwrap_or(i64::MIN) })?;
        cache.db.busy_timeout(PATIENCE)?;
        Ok(cache)
    }

    /// The copies in a folder that holds those of several stores.
    ///
    /// # Errors
    /// As [`Cache::open`]'s.
    pub fn copies(folder: &Path) -> Result<Vec<Self>> {
        copy_folders(folder)?.iter().map(|copy| Self::open_copy(copy, u64::MAX, None)).collect()
    }

    /// Forgets what they hold, and gives the space back.
    ///
    /// # Errors
    /// As [`Cache::clear`]'s.
    pub fn clear_copies(folder: &Path) -> Result<()> {
        let role = Role::Copy { renew_before: i64::MIN };
        copy_folders(folder)?.iter().try_for_each(|copy| Self::clear_as(copy, role))
    }

    /// The names of the packs that it has.
    pub(super) fn packs(&self) -> Result<HashSet<String>> {
        let mut names = self.db.prepare("SELECT name FROM packs")?;
        let names = names.query_map([], |row| row.get(0))?;
        Ok(names.collect::<rusqlite::Result<_>>()?)
    }

    /// Lets go of packs, and of their results that are in no younger pack.
    pub(super) fn drop_packs<'a>(&self, names: impl Iterator<Item = &'a String>) -> Result<()> {
        let transaction = self.write()?;
        for name in names {
            if let Some(id) = id(&transaction, name)? {
                transaction.prepare_cached("DELETE FROM results WHERE pack = ?1")?.execute([id])?;
                transaction.prepare_cached("DELETE FROM packs WHERE id = ?1")?.execute([id])?;
            }
        }
        give_back(&transaction)?;
        transaction.commit()?;
        Ok(())
    }

    /// Takes in a pack, written at that time (unix milliseconds): all of it, but for what there is no room for.
    pub(super) fn take_pack(&self, name: &str, written: i64, pack: &Pack) -> Result<Room> {
        let transaction = self.write()?;
        if id(&transaction, name)?.is_some() {
            return Ok(Room::Left);
        }
        transaction.prepare_cached("INSERT INTO packs (name) VALUES (?1)")?.execute([name])?;
        let id = transaction.last_insert_rowid();
        let insert = "INSERT INTO results (key, used, result, pack) VALUES (?1, ?2, ?3, ?4) ON CONFLICT (key) DO UPDATE
            SET used = excluded.used, result = excluded.result, pack = excluded.pack WHERE excluded.used >= used";
        for (key, result) in pack.results() {
            transaction.prepare_cached(insert)?.execute(params![key, written, result, id])?;
        }
        let mut room = Room::Left;
        while used_bytes(&transaction)? > self.max_bytes {
            let mut oldest = transaction.prepare_cached("SELECT min(used) FROM results")?;
            let oldest: Option<i64> = oldest.query_row([], |row| row.get(0))?;
            if oldest.is_none_or(|oldest| oldest >= written) {
                room = Room::None;
            }
            if evict(&transaction, 64)? == 0 {
                break;
            }
        }
        give_back(&transaction)?;
        transaction.commit()?;
        Ok(room)
    }
}

/// Folders of copies are called so, and then by a hash of the store's URL.
pub(super) const FOLDERS: &str = "of-";

fn copy_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let Ok(entries) = folder.read_dir() else { return Ok(Vec::new()) };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(FOLDERS) && entry.path().is_dir() {
            folders.push(entry.path());
        }
    }
    folders.sort_unstable();
    Ok(folders)
}

fn id(db: &Connection, name: &str) -> rusqlite::Result<Option<i64>> {
    db.prepare_cached("SELECT id FROM packs WHERE name = ?1")?.query_row([name], |row| row.get(0)).optional()
}
