//! Results that jobs share: what a sequence came to, found by everything that it depends on (see `key`), so that a row whose
//! like was computed before is not computed again. One `SQLite` file that several processes use at once; for those of several
//! machines, packs of results in a store (`packs`), and such a file as each machine's copy of them.
//! Invariants: what is found is, bit for bit, what would be computed; a file that is lost, damaged or another program's costs
//! computation, never a result; results never take more than the bound.

mod copy;
mod key;
mod pack;
mod packs;
mod stored;

pub use key::{Key, key, kind};
pub use pack::PackBuilder;
pub use packs::{Brought, PackStats, Packs};

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use rusqlite::{Connection, ErrorCode, OptionalExtension as _, Row, Transaction, TransactionBehavior, params};
use stored::{decode, encode};

use crate::engine::Finished;

/// The form of the file; each has a file of its own, so that two versions of the program never meet in one.
const FORM: u32 = 1;
/// What marks a file as ours ("valr").
const APPLICATION: i32 = 0x7661_6c72;
/// How long another process's transaction is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often, and how long after each other, a cache that is busy is opened.
const OPEN_TRIES: u32 = 20;
const OPEN_PAUSE: Duration = Duration::from_millis(50);
/// A result that was used is marked so at most this often, seconds.
const MARK_SECONDS: i64 = 3600;
/// What the log beside the file is cut down to.
const LOG_BYTES: u32 = 8 << 20;
/// Results that are let go of in one transaction where many must go.
const EVICT_STEP: u32 = 4096;

/// See the module.
#[derive(Debug)]
pub struct Cache {
    db: Connection,
    path: PathBuf,
    max_bytes: u64,
    role: Role,
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// It is the cache.
    Own,
    /// It is a copy of packs; those written before this time (unix milliseconds) are old.
    Copy { renew_before: i64 },
}

impl Role {
    fn file_name(self) -> String {
        match self {
            Self::Own => format!("results-{FORM}.sqlite"),
            Self::Copy { .. } => format!("results-copy-{FORM}.sqlite"),
        }
    }

    fn tables(self) -> &'static str {
        match self {
            Self::Own => {
                "CREATE TABLE results (key BLOB NOT NULL UNIQUE, used INTEGER NOT NULL, result BLOB NOT NULL);
                 CREATE INDEX results_used ON results (used);"
            }
            Self::Copy { .. } => copy::TABLES,
        }
    }
}

/// What a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheStats {
    /// Results.
    pub n_results: u64,
    /// The file's size.
    pub n_bytes: u64,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Each result under its submission's name.
    pub results: Vec<Finished>,
    /// Those that were not marked as used for a while; of a copy, those of old packs.
    pub stale: Vec<Key>,
}

impl Cache {
    /// Opens the cache in a folder, making it if need be; its file is kept under `max_bytes`.
    ///
    /// # Errors
    /// The disk's, a damaged file, or one that is not ours.
    pub fn open(folder: &Path, max_bytes: u64) -> Result<Self> {
        Self::open_as(folder, max_bytes, Role::Own)
    }

    fn open_as(folder: &Path, max_bytes: u64, role: Role) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let path = folder.join(role.file_name());
        let mut db = connect(&path, role);
        for _ in 1..OPEN_TRIES {
            // Another process may be making it; not all of that waits by itself.
            if !db.as_ref().is_err_and(Self::is_passing) {
                break;
            }
            std::thread::sleep(OPEN_PAUSE);
            db = connect(&path, role);
        }
        let db = db.with_context(|| format!("cannot use the cache {}", path.display()))?;
        Ok(Self { db, path, max_bytes, role })
    }

    /// Whether an error is one that passes: somebody else is writing, or the disk is full.
    pub fn is_passing(error: &anyhow::Error) -> bool {
        let code = error.downcast_ref::<rusqlite::Error>().and_then(rusqlite::Error::sqlite_error_code);
        matches!(code, Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::DiskFull))
    }

    /// What is known of these sequences.
    ///
    /// # Errors
    /// `SQLite`'s.
    pub fn get(&self, wanted: &[(u64, Key)]) -> Result<Found> {
        let stale_before = match self.role {
            Role::Own => unix_seconds() - MARK_SECONDS,
            Role::Copy { renew_before } => renew_before,
        };
        let transaction = self.db.unchecked_transaction()?;
        let mut found = Found::default();
        let mut query = transaction.prepare_cached("SELECT result, used FROM results WHERE key = ?1")?;
        for (id, key) in wanted {
            let read = |row: &Row<'_>| {
                let bytes = row.get_ref(0)?.as_bytes().map(<[u8]>::to_vec).unwrap_or_default();
                Ok((bytes, row.get::<_, i64>(1)?))
            };
            let row = query.query_row([key], read).optional()?;
            let Some((bytes, last)) = row else { continue };
            let Some(result) = decode(*id, key, &bytes) else { continue };
            found.results.push(result);
            if last < stale_before {
                found.stale.push(*key);
            }
        }
        Ok(found)
    }

    /// Keeps results, marks others as used, and lets go of those that were not used for longest where all are too many.
    ///
    /// # Errors
    /// `SQLite`'s; then none was kept.
    pub fn put(&self, results: &[(Key, Finished)], used: &[Key]) -> Result<()> {
        self.make_room()?;
        let now = unix_seconds();
        let transaction = self.write()?;
        for key in used {
            transaction.prepare_cached("UPDATE results SET used = ?2 WHERE key = ?1")?.execute(params![key, now])?;
        }
        for (key, finished) in results.iter().filter(|(_, finished)| finished.broken.is_none()) {
            let insert = "INSERT OR REPLACE INTO results (key, used, result) VALUES (?1, ?2, ?3)";
            transaction.prepare_cached(insert)?.execute(params![key, now, encode(key, finished)])?;
        }
        while used_bytes(&transaction)? > self.max_bytes && evict(&transaction, 64)? > 0 {}
        if pragma(&transaction, "page_count")? * pragma(&transaction, "page_size")? > self.max_bytes {
            give_back(&transaction)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Where the bound was lowered: lets go of much, in transactions that are short, for others wait for them.
    fn make_room(&self) -> Result<()> {
        while used_bytes(&self.db)? > self.max_bytes {
            let transaction = self.write()?;
            let n_gone = evict(&transaction, EVICT_STEP)?;
            give_back(&transaction)?;
            transaction.commit()?;
            if n_gone == 0 {
                break;
            }
        }
        Ok(())
    }

    fn write(&self) -> Result<Transaction<'_>> {
        Ok(Transaction::new_unchecked(&self.db, TransactionBehavior::Immediate)?)
    }

    /// What it holds.
    ///
    /// # Errors
    /// `SQLite`'s.
    pub fn stats(&self) -> Result<CacheStats> {
        let n_results = self.db.query_row("SELECT count(*) FROM results", [], |row| row.get(0))?;
        Ok(CacheStats { n_results, n_bytes: pragma(&self.db, "page_count")? * pragma(&self.db, "page_size")? })
    }

    /// Forgets everything in a folder and gives the space back. A file that is damaged is removed; so are those of other forms.
    ///
    /// # Errors
    /// The disk's, or a file that is not ours.
    pub fn clear(folder: &Path) -> Result<()> {
        Self::clear_as(folder, Role::Own)
    }

    fn clear_as(folder: &Path, role: Role) -> Result<()> {
        let own = role.file_name();
        let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_file_name(&name) && !name.starts_with(&own) {
                fs::remove_file(entry.path())?;
            }
        }
        let cleared = Self::open_as(folder, u64::MAX, role).and_then(|cache| {
            let transaction = cache.write()?;
            transaction.execute("DELETE FROM results", [])?;
            if role != Role::Own {
                transaction.execute("DELETE FROM packs", [])?;
            }
            transaction.commit()?;
            give_back(&cache.db)?;
            Ok(cache.db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?)
        });
        if !cleared.as_ref().is_err_and(is_damage) {
            return cleared;
        }
        for path in [own.clone(), format!("{own}-wal"), format!("{own}-shm")].map(|name| folder.join(name)) {
            if path.exists() {
                fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Whether a file's name is one that we give, in whatever form: the folder may be one that holds users' own files too.
fn is_file_name(name: &str) -> bool {
    let name = name.strip_suffix("-wal").or_else(|| name.strip_suffix("-shm")).unwrap_or(name);
    let form = name.strip_prefix("results-").and_then(|name| name.strip_suffix(".sqlite"));
    form.is_some_and(|form| is_number(form.strip_prefix("copy-").unwrap_or(form)))
}

/// Whether a text is digits only.
fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether a file is no database, or a broken one.
fn is_damage(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<rusqlite::Error>().and_then(rusqlite::Error::sqlite_error_code);
    matches!(code, Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt))
}

fn connect(path: &Path, role: Role) -> Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(PATIENCE)?;
    let n_tables = |db: &Connection| db.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, u64>(0));
    if n_tables(&db)? == 0 {
        // Before the first table, or it does nothing; later it would wait for whoever writes.
        db.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        let transaction = Transaction::new_unchecked(&db, TransactionBehavior::Immediate)?;
        // Another process may have been faster.
        if n_tables(&transaction)? == 0 {
            transaction.pragma_update(None, "application_id", APPLICATION)?;
            transaction.pragma_update(None, "user_version", FORM)?;
            transaction.execute_batch(role.tables())?;
        }
        transaction.commit()?;
    }
    let number = |name| db.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    ensure!(number("application_id")? == i64::from(APPLICATION), "it is another program's database");
    ensure!(number("user_version")? == i64::from(FORM), "its form is not {FORM}");
    db.pragma_update(None, "journal_mode", "WAL")?;
    // What a power failure takes away is computed again.
    db.pragma_update(None, "synchronous", "NORMAL")?;
    db.pragma_update(None, "journal_size_limit", LOG_BYTES)?;
    Ok(db)
}

fn pragma(db: &Connection, name: &str) -> rusqlite::Result<u64> {
    db.pragma_query_value(None, name, |row| row.get(0))
}

/// Pages in use.
fn used_bytes(db: &Connection) -> rusqlite::Result<u64> {
    Ok((pragma(db, "page_count")? - pragma(db, "freelist_count")?) * pragma(db, "page_size")?)
}

/// Lets go of the results that were not used for longest; how many there were.
fn evict(db: &Connection, n_results: u32) -> rusqlite::Result<usize> {
    let oldest = "DELETE FROM results WHERE rowid IN (SELECT rowid FROM results ORDER BY used LIMIT ?1)";
    db.prepare_cached(oldest)?.execute([n_results])
}

/// Gives free pages back to the file system.
fn give_back(db: &Connection) -> rusqlite::Result<()> {
    // Each row that it is asked for is a page.
    let mut vacuum = db.prepare_cached("PRAGMA incremental_vacuum")?;
    let mut pages = vacuum.query([])?;
    while pages.next()?.is_some() {}
    Ok(())
}

fn unix_seconds() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::SeqLogprob;
    use crate::outcome::FinishReason;
    use proptest::prelude::*;

    fn finished(id: u64, text: &str) -> Finished {
        let top = vec![(1, f32::NEG_INFINITY), (2, -0.1)];
        let logprobs = vec![SeqLogprob { token: 7, logprob: f32::from_bits(0x3eaa_aaab), top }];
        let finish_reason = FinishReason::Length;
        Finished { id, tokens: vec![1, 2, 3], text: text.to_owned(), finish_reason, logprobs, broken: None }
    }

    #[test]
    fn what_was_put_is_found_by_all_and_damage_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let one = Cache::open(folder.path(), 1 << 30).unwrap();
        let other = Cache::open(folder.path(), 1 << 30).unwrap();
        let broken = Finished { broken: Some("NaN".into()), ..finished(3, "c") };
        one.put(&[([1; 16], finished(1, "a")), ([2; 16], finished(2, "b")), ([3; 16], broken)], &[]).unwrap();
        let wanted = [(10, [2; 16]), (11, [3; 16]), (12, [1; 16])];
        assert_eq!(other.get(&wanted).unwrap().results, [finished(10, "b"), finished(12, "a")]);
        assert_eq!(other.stats().unwrap().n_results, 2);
        let damage = "UPDATE results SET result = substr(result, 1, length(result) - 1) || 'x' WHERE key = ?1";
        one.db.execute(damage, [[2u8; 16]]).unwrap();
        assert_eq!(other.get(&wanted).unwrap().results, [finished(12, "a")]);
        // A result under another key is damage too.
        one.db.execute("UPDATE results SET key = ?1 WHERE key = ?2", [[3u8; 16], [1u8; 16]]).unwrap();
        assert!(other.get(&wanted).unwrap().results.is_empty());
        Cache::clear(folder.path()).unwrap();
        assert_eq!(other.stats().unwrap().n_results, 0);
    }

    #[test]
    fn the_size_is_bounded_and_the_unused_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let max_bytes = 400_000;
        let cache = Cache::open(folder.path(), max_bytes).unwrap();
        let text = "x".repeat(1000);
        for i in 0..100_u64 {
            let key = |j: u128| (u128::from(i) << 64 | j).to_be_bytes();
            let results: Vec<(Key, Finished)> = (0..20).map(|j| (key(j), finished(0, &text))).collect();
            cache.put(&results, &[]).unwrap();
            cache.db.execute("UPDATE results SET used = used - 10000", []).unwrap();
            // One that is used again and again.
            let found = cache.get(&[(5, [0; 16])]).unwrap();
            assert_eq!((found.results.len(), &*found.stale), (1, &[[0; 16]][..]), "after {i}");
            cache.put(&[], &found.stale).unwrap();
            assert!(cache.stats().unwrap().n_bytes <= max_bytes, "{:?} after {i}", cache.stats());
            assert!(fs::metadata(cache.path()).unwrap().len() <= max_bytes);
        }
        assert!(cache.stats().unwrap().n_results > 100);
        // A lower bound holds from the first write on.
        let smaller = Cache::open(folder.path(), 100_000).unwrap();
        smaller.put(&[([9; 16], finished(1, "a"))], &[]).unwrap();
        assert!(smaller.stats().unwrap().n_bytes <= 100_000);
        assert_eq!(smaller.get(&[(1, [9; 16])]).unwrap().results.len(), 1);
    }

    #[test]
    fn whoever_waits_for_another_process_waits_a_second_and_may_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (Cache::open(folder.path(), 1 << 30).unwrap(), Cache::open(folder.path(), 1 << 30).unwrap());
        let transaction = one.write().unwrap();
        let error = other.put(&[([1; 16], finished(1, "a"))], &[]).unwrap_err();
        assert!(Cache::is_passing(&error), "{error:#}");
        assert!(other.get(&[(1, [1; 16])]).unwrap().results.is_empty(), "readers don't wait");
        drop(transaction);
        other.put(&[([1; 16], finished(1, "a"))], &[]).unwrap();
    }

    #[test]
    fn what_is_not_ours_is_left_alone_and_what_is_damaged_can_be_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(format!("results-{FORM}.sqlite"));
        Connection::open(&path).unwrap().execute_batch("CREATE TABLE mine (x); INSERT INTO mine VALUES (1);").unwrap();
        let before = fs::read(&path).unwrap();
        let error = format!("{:#}", Cache::open(folder.path(), 1 << 30).unwrap_err());
        assert!(error.contains("another program"), "{error}");
        assert!(Cache::clear(folder.path()).is_err());
        assert_eq!(fs::read(&path).unwrap(), before);
        fs::write(&path, "damaged ".repeat(1000)).unwrap();
        let error = Cache::open(folder.path(), 1 << 30).unwrap_err();
        assert!(is_damage(&error) && !Cache::is_passing(&error), "{error:#}");
        Cache::clear(folder.path()).unwrap();
        Cache::open(folder.path(), 1 << 30).unwrap();
    }

    #[test]
    fn clearing_removes_files_of_other_forms_and_nothing_of_the_users() {
        let folder = tempfile::tempdir().unwrap();
        let forms = ["results-0.sqlite", "results-0.sqlite-wal", "results-0.sqlite-shm", "results-copy-20.sqlite"];
        let users = [
            "results-mine.jsonl",
            "results-1.jsonl",
            "results-.sqlite",
            "results-mine.sqlite",
            "results-copy-.sqlite",
            "results-1.sqlite-old",
            "results-2-1.sqlite",
            "results-0.sqlite-wal-wal",
        ];
        forms.iter().chain(&users).for_each(|name| fs::write(folder.path().join(name), "text").unwrap());
        let old = folder.path().join("results-old");
        fs::create_dir(&old).unwrap();
        fs::write(old.join("results-0.sqlite"), "text").unwrap();
        Cache::clear(folder.path()).unwrap();
        assert!(forms.iter().all(|name| !folder.path().join(name).exists()));
        for name in users {
            assert!(folder.path().join(name).exists(), "{name} was removed");
        }
        assert!(old.join("results-0.sqlite").exists());
    }

    #[test]
    fn many_may_make_it_at_once() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for i in 0..8 {
                let folder = &folder;
                scope.spawn(move || {
                    let cache = Cache::open(folder.path(), 1 << 30).unwrap();
                    cache.put(&[([i; 16], finished(1, "a"))], &[]).unwrap();
                });
            }
        });
        assert_eq!(Cache::open(folder.path(), 1 << 30).unwrap().stats().unwrap().n_results, 8);
    }

    proptest! {
        #[test]
        fn any_result_comes_back(
            tokens in any::<Vec<u32>>(), text in any::<String>(), bits in any::<Vec<u32>>(), id in any::<u64>(),
        ) {
            let entry = |&b: &u32| SeqLogprob { token: b, logprob: f32::from_bits(b), top: vec![(b, f32::from_bits(!b))] };
            let logprobs: Vec<SeqLogprob> = bits.iter().map(entry).collect();
            let result = Finished { id, tokens, text, finish_reason: FinishReason::Stop, logprobs, broken: None };
            let back = decode(id, &[1; 16], &encode(&[1; 16], &result)).unwrap();
            // NaN equals nothing, so bits are compared.
            prop_assert_eq!(encode(&[1; 16], &back), encode(&[1; 16], &result));
            prop_assert_eq!((back.tokens, back.text), (result.tokens, result.text));
        }
    }
}
