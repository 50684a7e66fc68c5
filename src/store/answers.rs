//! First answers to requests that may come again: what was answered to a key that a caller has made up. Invariant: what a
//! request has caused is written together with its answer here, so that it is caused once.

use super::Connection;
use anyhow::Result;
use rusqlite::{OptionalExtension, params};

/// The schema.
pub(super) const TABLES: &str = "
    CREATE TABLE answer (
        owner TEXT NOT NULL,
        key TEXT NOT NULL,
        request TEXT NOT NULL, -- a hash of it
        created_at INTEGER NOT NULL,
        kind TEXT NOT NULL, -- of what was made, or the content type of the text
        content TEXT NOT NULL, -- an id, or the text
        PRIMARY KEY (owner, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX answer_created ON answer (created_at);
";

/// A first answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// A hash of the request.
    pub request: String,
    /// Unix seconds.
    pub created_at: u64,
    /// What was made, or the content type of the text.
    pub kind: String,
    /// Its id, or the text.
    pub content: String,
}

/// The first answer to an owner's key, if it was given since then.
///
/// # Errors
/// The database's.
pub fn get(connection: &Connection, owner: &str, key: &str, since: u64) -> Result<Option<Answer>> {
    let sql = "SELECT request, created_at, kind, content FROM answer WHERE owner = ?1 AND key = ?2 AND created_at >= ?3";
    let found = connection.prepare_cached(sql)?.query_row(params![owner, key, since], |row| {
        Ok(Answer { request: row.get(0)?, created_at: row.get(1)?, kind: row.get(2)?, content: row.get(3)? })
    });
    Ok(found.optional()?)
}

/// Keeps the first answer to an owner's key, instead of one that is too old.
///
/// # Errors
/// The database's.
pub fn put(connection: &Connection, owner: &str, key: &str, answer: &Answer) -> Result<()> {
    let sql = "INSERT OR REPLACE INTO answer (owner, key, request, created_at, kind, content) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
    let Answer { request, created_at, kind, content } = answer;
    connection.prepare_cached(sql)?.execute(params![owner, key, request, created_at, kind, content])?;
    Ok(())
}

/// Forgets answers that were given before that, at most `limit`; how many.
///
/// # Errors
/// The database's.
pub fn forget_before(connection: &Connection, created_at: u64, limit: usize) -> Result<usize> {
    let sql = "DELETE FROM answer WHERE (owner, key) IN (SELECT owner, key FROM answer WHERE created_at < ?1 LIMIT ?2)";
    Ok(connection.execute(sql, params![created_at, limit])?)
}
