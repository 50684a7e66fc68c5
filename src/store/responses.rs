//! Stored responses and the events of background ones. Invariants: a response that is terminal never changes again, but
//! that it may be deleted; events have numbers without gaps, and the last is written with the terminal state.

use super::{Connection, one_off, webhooks};
use anyhow::Result;
use rusqlite::{OptionalExtension, Row, params};

/// The schema.
pub(super) const TABLES: &str = "
    CREATE TABLE response (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        status TEXT NOT NULL, -- or 'deleted'
        is_background INTEGER NOT NULL,
        previous TEXT,
        input TEXT NOT NULL, -- its own items
        body TEXT NOT NULL, -- as it is answered
        request TEXT -- while it is open: what is run
    ) STRICT;
    CREATE INDEX response_open ON response (seq) WHERE status IN ('queued', 'in_progress');
    CREATE INDEX response_owner ON response (owner, status);
    CREATE INDEX response_created ON response (created_at);
    CREATE TABLE event (
        response INTEGER NOT NULL REFERENCES response (seq),
        number INTEGER NOT NULL,
        name TEXT NOT NULL,
        data TEXT NOT NULL,
        PRIMARY KEY (response, number)
    ) STRICT, WITHOUT ROWID;
";

/// How often an engine failed while a response ran.
pub(super) const FAULTS: &str = "ALTER TABLE response ADD COLUMN n_faults INTEGER NOT NULL DEFAULT 0";

/// What of an open response's text was told so far, as an entry of the ledger: it is charged if it is cancelled.
pub(super) const TOLD: &str = "CREATE TABLE told (
        response INTEGER PRIMARY KEY REFERENCES response (seq),
        entry TEXT NOT NULL
    ) STRICT";

/// States that something may come of.
pub const OPEN: [&str; 2] = ["queued", "in_progress"];
const DELETED: &str = "deleted";

/// A response.
#[derive(Debug, Clone)]
pub struct StoredResponse {
    /// `resp_…`
    pub id: String,
    /// Whose it is.
    pub owner: String,
    /// Unix seconds.
    pub created_at: u64,
    /// As on the wire.
    pub status: String,
    /// Whether it was accepted to be fetched later.
    pub is_background: bool,
    /// The response that it follows.
    pub previous: Option<String>,
    /// Its own input items, a JSON array.
    pub input: String,
    /// The response object.
    pub body: String,
    /// While it is open: what is run.
    pub request: Option<String>,
    /// How often an engine failed while it ran.
    pub n_faults: u32,
}

impl StoredResponse {
    fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            owner: row.get("owner")?,
            created_at: row.get("created_at")?,
            status: row.get("status")?,
            is_background: row.get("is_background")?,
            previous: row.get("previous")?,
            input: row.get("input")?,
            body: row.get("body")?,
            request: row.get("request")?,
            n_faults: row.get("n_faults")?,
        })
    }

    /// Whether something may come of it still.
    pub fn is_open(&self) -> bool {
        OPEN.contains(&self.status.as_str())
    }
}

/// An event: its number, name and data.
pub type StoredEvent = (u64, String, String);

/// Adds a response.
///
/// # Errors
/// The database's.
pub fn insert(connection: &Connection, new: &StoredResponse) -> Result<()> {
    let sql = "INSERT INTO response (id, owner, created_at, status, is_background, previous, input, body, request)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)";
    let StoredResponse { id, owner, created_at, status, is_background, previous, input, body, request, .. } = new;
    let values = params![id, owner, created_at, status, is_background, previous, input, body, request];
    connection.prepare_cached(sql)?.execute(values)?;
    Ok(())
}

/// A response of an owner, unless it was deleted.
///
/// # Errors
/// The database's.
pub fn get(connection: &Connection, owner: &str, id: &str) -> Result<Option<StoredResponse>> {
    let sql = "SELECT * FROM response WHERE id = ?1 AND owner = ?2 AND status <> 'deleted'";
    Ok(connection.prepare_cached(sql)?.query_row([id, owner], StoredResponse::of).optional()?)
}

/// Whether an owner's response was deleted.
///
/// # Errors
/// The database's.
pub fn is_deleted(connection: &Connection, owner: &str, id: &str) -> Result<bool> {
    let sql = "SELECT 1 FROM response WHERE id = ?1 AND owner = ?2 AND status = 'deleted'";
    Ok(connection.prepare_cached(sql)?.exists([id, owner])?)
}

/// An owner's responses, newest first, after one of them; at most `limit`.
///
/// # Errors
/// The database's.
pub fn list(
    connection: &Connection,
    owner: &str,
    status: Option<&str>,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<StoredResponse>> {
    let sql = "SELECT * FROM response WHERE owner = ?1 AND status <> 'deleted' AND (?2 IS NULL OR status = ?2)
               AND (?3 IS NULL OR seq < (SELECT seq FROM response WHERE id = ?3 AND owner = ?1))
               ORDER BY seq DESC LIMIT ?4";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map(params![owner, status, after, limit], StoredResponse::of)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Background responses that are open, oldest first: id, owner, request.
///
/// # Errors
/// The database's.
pub fn open(connection: &Connection, each: &mut dyn FnMut(String, String, &str)) -> Result<()> {
    let sql = "SELECT id, owner, request FROM response WHERE status IN ('queued', 'in_progress') ORDER BY seq";
    let mut statement = connection.prepare(sql)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let request: Option<String> = row.get(2)?;
        each(row.get(0)?, row.get(1)?, &request.unwrap_or_default());
    }
    Ok(())
}

/// A response, whoever owns it.
///
/// # Errors
/// The database's.
pub fn any(connection: &Connection, id: &str) -> Result<Option<StoredResponse>> {
    Ok(connection.prepare_cached("SELECT * FROM response WHERE id = ?1")?.query_row([id], StoredResponse::of).optional()?)
}

fn seq_and_owner(row: &Row<'_>) -> rusqlite::Result<(i64, String)> {
    Ok((row.get(0)?, row.get(1)?))
}

/// Changes an open response and adds events; false, and nothing is done, if it is not open any more. A terminal state is
/// its last, and is told to who wants to know.
///
/// # Errors
/// The database's.
pub fn update(connection: &Connection, id: &str, status: &str, body: Option<&str>, events: &[StoredEvent]) -> Result<bool> {
    // A row with a long conversation is not written again for each event.
    let same = "SELECT seq, owner FROM response WHERE id = ?1 AND status = ?2 AND status IN ('queued', 'in_progress')";
    let mut changed: Option<(i64, String)> = None;
    if body.is_none() {
        changed = connection.prepare_cached(same)?.query_row([id, status], seq_and_owner).optional()?;
    }
    if changed.is_none() {
        let sql = "UPDATE response SET status = ?2, body = coalesce(?3, body),
                   request = CASE WHEN ?2 IN ('queued', 'in_progress') THEN request END
                   WHERE id = ?1 AND status IN ('queued', 'in_progress') RETURNING seq, owner";
        changed = connection.prepare_cached(sql)?.query_row(params![id, status, body], seq_and_owner).optional()?;
    }
    let Some((seq, owner)) = changed else { return Ok(false) };
    if !OPEN.contains(&status) {
        connection.prepare_cached("DELETE FROM told WHERE response = ?1")?.execute([seq])?;
        webhooks::tell(connection, &owner, &format!("response.{status}"), id)?;
        one_off::tell(connection, id)?;
    }
    let mut insert = connection.prepare_cached("INSERT INTO event VALUES (?1, ?2, ?3, ?4)")?;
    for (number, name, data) in events {
        insert.execute(params![seq, number, name, data])?;
    }
    Ok(true)
}

/// Notes what an open response has told, in the transaction that stores the events which do.
///
/// # Errors
/// The database's.
pub fn note_told(connection: &Connection, id: &str, entry: &str) -> Result<()> {
    let sql = "INSERT OR REPLACE INTO told SELECT seq, ?2 FROM response WHERE id = ?1";
    connection.prepare_cached(sql)?.execute([id, entry])?;
    Ok(())
}

/// What an open response has told.
///
/// # Errors
/// The database's.
pub fn told(connection: &Connection, id: &str) -> Result<Option<String>> {
    let sql = "SELECT entry FROM told WHERE response = (SELECT seq FROM response WHERE id = ?1)";
    Ok(connection.prepare_cached(sql)?.query_row([id], |row| row.get(0)).optional()?)
}

/// Notes that an engine has failed while responses ran.
///
/// # Errors
/// The database's.
pub fn note_fault(connection: &Connection) -> Result<()> {
    connection.execute("UPDATE response SET n_faults = n_faults + 1 WHERE status = 'in_progress' AND is_background", [])?;
    Ok(())
}

/// Events of a response from a number on; at most `limit`.
///
/// # Errors
/// The database's.
pub fn events(connection: &Connection, id: &str, from: u64, limit: usize) -> Result<Vec<StoredEvent>> {
    let sql = "SELECT number, name, data FROM event WHERE response = (SELECT seq FROM response WHERE id = ?1) AND number >= ?2
               ORDER BY number LIMIT ?3";
    let mut statement = connection.prepare_cached(sql)?;
    let from = i64::try_from(from).unwrap_or(i64::MAX);
    let rows = statement.query_map(params![id, from, limit], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// The number of a response's next event.
///
/// # Errors
/// The database's.
pub fn next_event(connection: &Connection, id: &str) -> Result<u64> {
    let sql = "SELECT coalesce(max(number) + 1, 0) FROM event WHERE response = (SELECT seq FROM response WHERE id = ?1)";
    Ok(connection.prepare_cached(sql)?.query_row([id], |row| row.get(0))?)
}

/// Deletes a response's content, also where it is to be told; its name stays known.
///
/// # Errors
/// The database's.
pub fn delete(connection: &Connection, id: &str) -> Result<()> {
    one_off::forget(connection, id)?;
    connection.execute("DELETE FROM event WHERE response = (SELECT seq FROM response WHERE id = ?1)", [id])?;
    let sql = "UPDATE response SET status = ?2, input = '[]', body = '', request = NULL, previous = NULL WHERE id = ?1";
    connection.execute(sql, [id, DELETED])?;
    Ok(())
}

/// Forgets responses that are older than that and not open, at most `limit`; how many.
///
/// # Errors
/// The database's.
pub fn forget_before(connection: &Connection, created_at: u64, limit: usize) -> Result<usize> {
    let old = "SELECT seq FROM response WHERE created_at < ?1 AND status NOT IN ('queued', 'in_progress')
               ORDER BY created_at, seq LIMIT ?2";
    connection.execute(&format!("DELETE FROM event WHERE response IN ({old})"), params![created_at, limit])?;
    Ok(connection.execute(&format!("DELETE FROM response WHERE seq IN ({old})"), params![created_at, limit])?)
}
