//! Batches: what they are and how far they are; not their rows, which are files and journals. Invariant: a batch that is
//! terminal never changes again.

use super::{Connection, one_off, webhooks};
use anyhow::Result;
use rusqlite::{OptionalExtension, Row, params};

/// The schema.
pub(super) const TABLES: &str = "
    CREATE TABLE batch (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL,
        status TEXT NOT NULL,
        settings TEXT NOT NULL, -- what is not in the body
        body TEXT NOT NULL -- as it is answered
    ) STRICT;
    CREATE INDEX batch_owner ON batch (owner);
    CREATE INDEX batch_open ON batch (seq) WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
";

/// Tokens that an open batch holds of what its owner may have in batches.
pub(super) const TOKENS: &str = "ALTER TABLE batch ADD COLUMN n_tokens INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX batch_owner_open ON batch (owner) WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')";

/// States that something may come of.
const OPEN: [&str; 4] = ["validating", "in_progress", "finalizing", "cancelling"];

/// A batch.
#[derive(Debug, Clone)]
pub struct StoredBatch {
    /// `batch_…`
    pub id: String,
    /// Whose it is.
    pub owner: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds.
    pub expires_at: u64,
    /// As on the wire.
    pub status: String,
    /// What is not in the body.
    pub settings: String,
    /// The object.
    pub body: String,
    /// Tokens that it may come to, while it is open.
    pub n_tokens: u64,
}

impl StoredBatch {
    fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            owner: row.get("owner")?,
            created_at: row.get("created_at")?,
            expires_at: row.get("expires_at")?,
            status: row.get("status")?,
            settings: row.get("settings")?,
            body: row.get("body")?,
            n_tokens: row.get("n_tokens")?,
        })
    }
}

impl StoredBatch {
    /// Whether something may come of it still.
    pub fn is_open(&self) -> bool {
        OPEN.contains(&self.status.as_str())
    }
}

/// Adds a batch.
///
/// # Errors
/// The database's.
pub fn insert(connection: &Connection, new: &StoredBatch) -> Result<()> {
    let sql = "INSERT INTO batch (id, owner, created_at, expires_at, status, settings, body, n_tokens)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    let StoredBatch { id, owner, created_at, expires_at, status, settings, body, n_tokens } = new;
    connection.execute(sql, params![id, owner, created_at, expires_at, status, settings, body, n_tokens])?;
    Ok(())
}

/// Tokens that the open batches of an owner's hold, but for one of them.
///
/// # Errors
/// The database's.
pub fn held_tokens(connection: &Connection, owner: &str, but: &str) -> Result<u64> {
    let sql = "SELECT coalesce(sum(n_tokens), 0) FROM batch
               WHERE owner = ?1 AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling') AND id <> ?2";
    Ok(connection.prepare_cached(sql)?.query_row([owner, but], |row| row.get(0))?)
}

/// Notes how many tokens a batch holds.
///
/// # Errors
/// The database's.
pub fn hold_tokens(connection: &Connection, id: &str, n_tokens: u64) -> Result<()> {
    connection.prepare_cached("UPDATE batch SET n_tokens = ?2 WHERE id = ?1")?.execute(params![id, n_tokens])?;
    Ok(())
}

/// A batch of an owner's.
///
/// # Errors
/// The database's.
pub fn get(connection: &Connection, owner: &str, id: &str) -> Result<Option<StoredBatch>> {
    Ok(any(connection, id)?.filter(|batch| batch.owner == owner))
}

/// A batch, whoever owns it.
///
/// # Errors
/// The database's.
pub fn any(connection: &Connection, id: &str) -> Result<Option<StoredBatch>> {
    Ok(connection.prepare_cached("SELECT * FROM batch WHERE id = ?1")?.query_row([id], StoredBatch::of).optional()?)
}

/// Batches of an owner's whose ids begin so, newest first, after one of them.
///
/// # Errors
/// The database's.
pub fn list(
    connection: &Connection,
    (owner, prefix): (&str, &str),
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<StoredBatch>> {
    let sql = "SELECT * FROM batch WHERE owner = ?1 AND substr(id, 1, length(?4)) = ?4
               AND (?2 IS NULL OR seq < (SELECT seq FROM batch WHERE id = ?2 AND owner = ?1)) ORDER BY seq DESC LIMIT ?3";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map(params![owner, after, limit, prefix], StoredBatch::of)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// As [`list`], but those that are newer than one of them, the next newer first.
///
/// # Errors
/// The database's.
pub fn list_newer(connection: &Connection, (owner, prefix): (&str, &str), than: &str, limit: usize) -> Result<Vec<StoredBatch>> {
    let sql = "SELECT * FROM batch WHERE owner = ?1 AND substr(id, 1, length(?4)) = ?4
               AND seq > (SELECT seq FROM batch WHERE id = ?2 AND owner = ?1) ORDER BY seq LIMIT ?3";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map(params![owner, than, limit, prefix], StoredBatch::of)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Forgets a batch that has ended; false if it has not.
///
/// # Errors
/// The database's.
pub fn delete(connection: &Connection, id: &str) -> Result<bool> {
    let sql = "DELETE FROM batch WHERE id = ?1 AND status NOT IN ('validating', 'in_progress', 'finalizing', 'cancelling')";
    Ok(connection.execute(sql, [id])? > 0)
}

/// Batches that something may come of, oldest first.
///
/// # Errors
/// The database's.
pub fn open(connection: &Connection) -> Result<Vec<String>> {
    let sql = "SELECT id FROM batch WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling') ORDER BY seq";
    let mut statement = connection.prepare(sql)?;
    let rows = statement.query_map([], |row| row.get(0))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Changes a batch that is in the state `from`; false, and nothing is done, if it is in another. A
/// terminal state is told to who wants to know.
///
/// # Errors
/// The database's.
pub fn update(connection: &Connection, id: &str, (from, to): (&str, &str), body: &str) -> Result<bool> {
    let sql = "UPDATE batch SET status = ?3, body = ?4 WHERE id = ?1 AND status = ?2 RETURNING owner";
    let owner: Option<String> = connection.query_row(sql, [id, from, to, body], |row| row.get(0)).optional()?;
    let Some(owner) = owner else { return Ok(false) };
    if !OPEN.contains(&to) {
        webhooks::tell(connection, &owner, &format!("batch.{to}"), id)?;
        one_off::tell(connection, id)?;
    }
    Ok(true)
}
