//! Files: what they are called and where they lie, here or elsewhere; not their content. Invariant: a file that has expired is not there.

use super::Connection;
use anyhow::Result;
use rusqlite::{OptionalExtension, Row, params};

/// The schema.
pub(super) const TABLES: &str = "
    CREATE TABLE file (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        purpose TEXT NOT NULL,
        filename TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        path TEXT NOT NULL -- in the data folder
    ) STRICT;
    CREATE INDEX file_owner ON file (owner);
    CREATE INDEX file_expires ON file (expires_at) WHERE expires_at IS NOT NULL;
";

/// Files that lie elsewhere.
pub(super) const REFERENCES: &str = "
    ALTER TABLE file ADD COLUMN uri TEXT;
    ALTER TABLE file ADD COLUMN version TEXT; -- of what the URI names
";

/// A file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// `file-…`
    pub id: String,
    /// Whose it is.
    pub owner: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds; `None`: never.
    pub expires_at: Option<u64>,
    /// What it is for.
    pub purpose: String,
    /// As its owner calls it.
    pub filename: String,
    /// Its length.
    pub bytes: u64,
    /// Where it lies, in the data folder; empty if it lies elsewhere.
    pub path: String,
    /// If it lies elsewhere: its URI, and the version of what is there.
    pub reference: Option<(String, String)>,
}

impl StoredFile {
    fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            owner: row.get("owner")?,
            created_at: row.get("created_at")?,
            expires_at: row.get("expires_at")?,
            purpose: row.get("purpose")?,
            filename: row.get("filename")?,
            bytes: row.get("bytes")?,
            path: row.get("path")?,
            reference: row.get::<_, Option<String>>("uri")?.zip(row.get("version")?),
        })
    }
}

/// Adds a file.
///
/// # Errors
/// The database's.
pub fn insert(connection: &Connection, new: &StoredFile) -> Result<()> {
    let sql = "INSERT INTO file (id, owner, created_at, expires_at, purpose, filename, bytes, path, uri, version)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
    let StoredFile { id, owner, created_at, expires_at, purpose, filename, bytes, path, reference } = new;
    let (uri, version) = reference.clone().unzip();
    connection.execute(sql, params![id, owner, created_at, expires_at, purpose, filename, bytes, path, uri, version])?;
    Ok(())
}

/// A file that is written as time goes by has come to its end; whether it is still known.
///
/// # Errors
/// The database's.
pub fn finish(connection: &Connection, file: &StoredFile) -> Result<bool> {
    let sql = "UPDATE file SET bytes = ?2, created_at = ?3, expires_at = ?4 WHERE id = ?1";
    Ok(connection.execute(sql, params![file.id, file.bytes, file.created_at, file.expires_at])? > 0)
}

/// A file of an owner's.
///
/// # Errors
/// The database's.
pub fn get(connection: &Connection, owner: &str, id: &str, now: u64) -> Result<Option<StoredFile>> {
    let sql = "SELECT * FROM file WHERE id = ?1 AND owner = ?2 AND coalesce(expires_at, ?3 + 1) > ?3";
    Ok(connection.prepare_cached(sql)?.query_row(params![id, owner, now], StoredFile::of).optional()?)
}

/// Which files of an owner's are listed.
#[derive(Debug, Clone)]
pub struct Listing {
    /// Only of this purpose.
    pub purpose: Option<String>,
    /// Only what comes after this one.
    pub after: Option<String>,
    /// At most so many.
    pub limit: usize,
    /// Oldest first.
    pub is_ascending: bool,
}

/// Files of an owner's.
///
/// # Errors
/// The database's.
pub fn list(connection: &Connection, owner: &str, listing: &Listing, now: u64) -> Result<Vec<StoredFile>> {
    let (beyond, order) = if listing.is_ascending { (">", "ASC") } else { ("<", "DESC") };
    let sql = format!(
        "SELECT * FROM file WHERE owner = ?1 AND coalesce(expires_at, ?2 + 1) > ?2 AND (?3 IS NULL OR purpose = ?3)
         AND (?4 IS NULL OR seq {beyond} (SELECT seq FROM file WHERE id = ?4 AND owner = ?1)) ORDER BY seq {order} LIMIT ?5"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let values = params![owner, now, listing.purpose, listing.after, listing.limit];
    let rows = statement.query_map(values, StoredFile::of)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Forgets a file.
///
/// # Errors
/// The database's.
pub fn delete(connection: &Connection, id: &str) -> Result<()> {
    connection.execute("DELETE FROM file WHERE id = ?1", [id])?;
    Ok(())
}

/// Files that have expired, at most `limit`.
///
/// # Errors
/// The database's.
pub fn expired(connection: &Connection, now: u64, limit: usize) -> Result<Vec<StoredFile>> {
    let mut statement = connection.prepare_cached("SELECT * FROM file WHERE expires_at <= ?1 ORDER BY expires_at LIMIT ?2")?;
    let rows = statement.query_map(params![now, limit], StoredFile::of)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Whether a file of that name lies in that place.
///
/// # Errors
/// The database's.
pub fn is_known(connection: &Connection, id: &str) -> Result<bool> {
    Ok(connection.prepare_cached("SELECT 1 FROM file WHERE id = ?1")?.exists([id])?)
}
