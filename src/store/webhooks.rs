//! Webhook endpoints, and the outbox of what is to be told to them. Invariant: what a state's change has to tell is written
//! with the change; it is taken out when it was told, or given up.

use super::{Connection, one_off};
use anyhow::Result;
use rusqlite::{OptionalExtension, Row, params};
use serde_json::json;

/// The schema.
pub(super) const TABLES: &str = "
    CREATE TABLE endpoint (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        updated_at INTEGER NOT NULL,
        name TEXT NOT NULL,
        url TEXT NOT NULL,
        event_types TEXT NOT NULL, -- a JSON array
        secret TEXT NOT NULL,
        old_secret TEXT,
        old_until INTEGER,
        is_disabled INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE delivery (
        seq INTEGER PRIMARY KEY,
        endpoint INTEGER NOT NULL REFERENCES endpoint (seq) ON DELETE CASCADE,
        id TEXT NOT NULL UNIQUE,
        created_at INTEGER NOT NULL,
        body TEXT NOT NULL,
        n_tries INTEGER NOT NULL DEFAULT 0,
        next_at INTEGER -- NULL: told, or given up
        , is_told INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX delivery_next ON delivery (next_at) WHERE next_at IS NOT NULL;
    CREATE INDEX delivery_endpoint ON delivery (endpoint);
";

/// How often an endpoint has failed since it last answered, and until when it is left alone for that.
pub(super) const BREAKER: &str = "
    ALTER TABLE endpoint ADD COLUMN n_failed INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE endpoint ADD COLUMN resting_until INTEGER;
";

/// What waits for each endpoint, so that whoever looks for what is due reads one entry of each, however many wait.
pub(super) const WAITING: &str = "
    CREATE INDEX delivery_waiting ON delivery (endpoint, seq, next_at) WHERE next_at IS NOT NULL;
";

/// An endpoint that has failed so often in a row is left alone for a while, whatever is to be told to it.
const MAX_FAILED: u32 = 10;
/// How long at first, and at most: seconds. It doubles with each failure.
const REST_S: u64 = 60;
const MAX_REST_S: u64 = 3600;

/// Somebody who wants to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `we_…`
    pub id: String,
    /// Whose it is.
    pub owner: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds.
    pub updated_at: u64,
    /// As its owner calls it.
    pub name: String,
    /// Where it is told.
    pub url: String,
    /// Of what, a JSON array of names.
    pub event_types: String,
    /// `whsec_…`
    pub secret: String,
    /// The one before, and until when it is used too.
    pub old_secret: Option<(String, u64)>,
    /// What is sent along, as a bearer's; of those alone that a response or batch names for itself.
    pub token: Option<String>,
}

impl Endpoint {
    fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        let old: (Option<String>, Option<u64>) = (row.get("old_secret")?, row.get("old_until")?);
        Ok(Self {
            id: row.get("id")?,
            owner: row.get("owner")?,
            created_at: row.get("created_at")?,
            updated_at: row.get("updated_at")?,
            name: row.get("name")?,
            url: row.get("url")?,
            event_types: row.get("event_types")?,
            secret: row.get("secret")?,
            old_secret: old.0.zip(old.1),
            token: row.get("token")?,
        })
    }
}

/// Adds an endpoint, or changes the one of that id.
///
/// # Errors
/// The database's.
pub fn put(connection: &Connection, new: &Endpoint) -> Result<()> {
    let sql = "INSERT INTO endpoint (id, owner, created_at, updated_at, name, url, event_types, secret, old_secret, old_until)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
               ON CONFLICT (id) DO UPDATE SET updated_at = ?4, name = ?5, url = ?6, event_types = ?7, secret = ?8,
               old_secret = ?9, old_until = ?10, is_disabled = 0, n_failed = 0, resting_until = NULL";
    let Endpoint { id, owner, created_at, updated_at, name, url, event_types, secret, old_secret, .. } = new;
    let (old_secret, old_until) = old_secret.clone().unzip();
    connection.execute(sql, params![id, owner, created_at, updated_at, name, url, event_types, secret, old_secret, old_until])?;
    Ok(())
}

/// An endpoint of an owner's.
///
/// # Errors
/// The database's.
pub fn get(connection: &Connection, owner: &str, id: &str) -> Result<Option<Endpoint>> {
    let sql = "SELECT * FROM endpoint WHERE id = ?1 AND owner = ?2 AND NOT is_one_off";
    Ok(connection.prepare_cached(sql)?.query_row([id, owner], Endpoint::of).optional()?)
}

/// Endpoints of an owner's, newest first, after one of them.
///
/// # Errors
/// The database's.
pub fn list(connection: &Connection, owner: &str, after: Option<&str>, limit: usize) -> Result<Vec<Endpoint>> {
    let sql = "SELECT * FROM endpoint WHERE owner = ?1 AND NOT is_one_off
               AND (?2 IS NULL OR seq < (SELECT seq FROM endpoint WHERE id = ?2 AND owner = ?1)) ORDER BY seq DESC LIMIT ?3";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map(params![owner, after, limit], Endpoint::of)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Forgets an endpoint and what was to be told to it.
///
/// # Errors
/// The database's.
pub fn delete(connection: &Connection, id: &str) -> Result<()> {
    connection.execute("DELETE FROM delivery WHERE endpoint = (SELECT seq FROM endpoint WHERE id = ?1)", [id])?;
    connection.execute("DELETE FROM endpoint WHERE id = ?1", [id])?;
    Ok(())
}

/// Puts into the outbox, for everybody who wants to know, what has become of an object.
///
/// # Errors
/// The database's.
pub(super) fn tell(connection: &Connection, owner: &str, event_type: &str, object: &str) -> Result<()> {
    let sql = "WITH made AS MATERIALIZED (
                   SELECT seq, 'evt_' || lower(hex(randomblob(16))) AS id, unixepoch() AS now FROM endpoint
                   WHERE owner = ?1 AND NOT is_disabled AND EXISTS (SELECT 1 FROM json_each(event_types) WHERE value = ?2))
               INSERT INTO delivery (endpoint, id, created_at, body, next_at)
               SELECT seq, id, now, json_object('id', id, 'object', 'event', 'created_at', now, 'type', ?2,
                                                'data', json_object('id', ?3)), now FROM made";
    connection.prepare_cached(sql)?.execute([owner, event_type, object])?;
    Ok(())
}

/// Something to be told.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// `evt_…`
    pub id: String,
    /// When it happened, unix seconds.
    pub created_at: u64,
    /// What is said.
    pub body: String,
    /// How often that was tried.
    pub n_tries: u32,
    /// To whom.
    pub to: Endpoint,
}

/// What is due, `limit` at most: of each endpoint the oldest, nothing of those that rest or are `busy` (their ids). Owners take
/// turns, and of one at most `of_owner` are busy with these, so that no owner's slow endpoints hold up another's.
///
/// # Errors
/// The database's.
pub fn due(connection: &Connection, now: u64, busy: &[String], (of_owner, limit): (usize, usize)) -> Result<Vec<Delivery>> {
    // What a busy one is being told waits until that has ended, so it is among these.
    let sql = "WITH RECURSIVE waiting (seq) AS (
                   SELECT min(endpoint) FROM delivery WHERE next_at IS NOT NULL
                   UNION ALL
                   SELECT (SELECT min(endpoint) FROM delivery WHERE next_at IS NOT NULL AND endpoint > waiting.seq)
                   FROM waiting WHERE seq IS NOT NULL),
               oldest AS MATERIALIZED (
                   SELECT owner, id IN (SELECT value FROM json_each(?2)) AS is_busy,
                          (SELECT min(seq) FROM delivery WHERE endpoint = endpoint.seq AND next_at <= ?1) AS seq
                   FROM waiting JOIN endpoint USING (seq) WHERE NOT is_disabled AND coalesce(resting_until, 0) <= ?1),
               ranked AS (
                   SELECT seq, is_busy, row_number() OVER (PARTITION BY owner ORDER BY is_busy DESC, next_at, seq) AS turn
                   FROM oldest JOIN delivery USING (seq))
               SELECT delivery.id AS event, delivery.created_at AS happened, body, n_tries, endpoint.* FROM ranked
               JOIN delivery ON delivery.seq = ranked.seq JOIN endpoint ON endpoint.seq = delivery.endpoint
               WHERE NOT is_busy AND turn <= ?3 ORDER BY turn, next_at, delivery.seq LIMIT ?4";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map(params![now, json!(busy).to_string(), of_owner, limit], |row| {
        let (id, created_at) = (row.get("event")?, row.get("happened")?);
        Ok(Delivery { id, created_at, body: row.get("body")?, n_tries: row.get("n_tries")?, to: Endpoint::of(row)? })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// What became of a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tried {
    /// It was told.
    Told,
    /// It is to be tried again then.
    Again(u64),
    /// It is given up.
    GivenUp,
    /// The endpoint wants to hear nothing any more.
    Gone,
}

/// Notes what became of a try that ended now. After many failures in a row its endpoint rests; then one message is tried, and
/// others when that was told.
///
/// # Errors
/// The database's.
pub fn note(connection: &Connection, id: &str, tried: Tried, now: u64) -> Result<()> {
    let (next_at, is_told) = match tried {
        Tried::Again(at) => (Some(at), false),
        Tried::Told => (None, true),
        Tried::GivenUp | Tried::Gone => (None, false),
    };
    let sql = "UPDATE delivery SET n_tries = n_tries + 1, next_at = ?2, is_told = ?3 WHERE id = ?1";
    connection.execute(sql, params![id, next_at, is_told])?;
    let of_endpoint = "WHERE seq = (SELECT endpoint FROM delivery WHERE id = ?1)";
    if tried == Tried::Told {
        connection.execute(&format!("UPDATE endpoint SET n_failed = 0, resting_until = NULL {of_endpoint}"), [id])?;
    } else {
        let sql = format!("UPDATE endpoint SET n_failed = n_failed + 1 {of_endpoint} RETURNING n_failed");
        // The endpoint may have been deleted meanwhile.
        let n_failed: Option<u32> = connection.query_row(&sql, [id], |row| row.get(0)).optional()?;
        if let Some(n_more) = n_failed.and_then(|n_failed| n_failed.checked_sub(MAX_FAILED)) {
            let rest_s = (REST_S << n_more.min(6)).min(MAX_REST_S);
            connection.execute(&format!("UPDATE endpoint SET resting_until = ?2 {of_endpoint}"), params![id, now + rest_s])?;
        }
    }
    if tried == Tried::Gone {
        let sql = "UPDATE endpoint SET is_disabled = 1 WHERE seq = (SELECT endpoint FROM delivery WHERE id = ?1)";
        connection.execute(sql, [id])?;
    }
    if next_at.is_none() {
        one_off::settle(connection, id, tried)?;
    }
    Ok(())
}

/// Puts what was given up into the outbox again, or one event whatever became of it; how many.
///
/// # Errors
/// The database's.
pub fn again(connection: &Connection, endpoint: &str, event: Option<&str>, now: u64) -> Result<usize> {
    connection.execute("UPDATE endpoint SET is_disabled = 0, n_failed = 0, resting_until = NULL WHERE id = ?1", [endpoint])?;
    let sql =
        "UPDATE delivery SET next_at = ?3, n_tries = 0, is_told = 0 WHERE endpoint = (SELECT seq FROM endpoint WHERE id = ?1)
               AND CASE WHEN ?2 IS NULL THEN next_at IS NULL AND NOT is_told ELSE id = ?2 END";
    Ok(connection.execute(sql, params![endpoint, event, now])?)
}

/// Forgets what was told or given up before that, at most `limit`.
///
/// # Errors
/// The database's.
pub fn forget_before(connection: &Connection, created_at: u64, limit: usize) -> Result<()> {
    let sql = "DELETE FROM delivery WHERE seq IN
               (SELECT seq FROM delivery WHERE next_at IS NULL AND created_at < ?1 ORDER BY seq LIMIT ?2)";
    connection.execute(sql, params![created_at, limit])?;
    one_off::sweep(connection)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::migrate;

    fn endpoint(id: &str, owner: &str) -> Endpoint {
        Endpoint {
            id: id.into(),
            owner: owner.into(),
            created_at: 0,
            updated_at: 0,
            name: "n".into(),
            url: "http://example.com".into(),
            event_types: "[\"batch.failed\"]".into(),
            secret: "whsec_AA==".into(),
            old_secret: None,
            token: None,
        }
    }

    /// Somebody has many endpoints, all of which hang, and more waits for them than is looked at in one go.
    #[test]
    fn what_one_owner_waits_for_holds_up_no_other() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        for i in 0..20 {
            put(&connection, &endpoint(&format!("hangs-{i}"), "o")).unwrap();
        }
        for i in 0..1000 {
            tell(&connection, "o", "batch.failed", &format!("batch_{i}")).unwrap();
        }
        for owner in ["p", "q"] {
            put(&connection, &endpoint(owner, owner)).unwrap();
            tell(&connection, owner, "batch.failed", "last").unwrap();
        }
        let now = 1 << 40;
        let look = |busy: &[String], at_a_time| -> Vec<String> {
            due(&connection, now, busy, at_a_time).unwrap().into_iter().map(|delivery| delivery.to.id).collect()
        };
        assert_eq!(look(&[], (4, 3)), ["hangs-0", "p", "q"]);
        let mut busy = Vec::new();
        busy.extend(look(&busy, (4, 9)));
        assert_eq!(busy.len(), 4 + 2);
        // All of them hang: no more of that owner's, and what others have is found.
        put(&connection, &endpoint("q-2", "q")).unwrap();
        tell(&connection, "q", "batch.failed", "later").unwrap();
        assert_eq!(look(&busy, (4, 9)), ["q-2"]);
        // One that has ended makes room for the one that is due the longest.
        let ended = due(&connection, now, &[], (1, 1)).unwrap().pop().unwrap();
        note(&connection, &ended.id, Tried::Again(now), now).unwrap();
        busy.retain(|id| *id != ended.to.id);
        assert_eq!(look(&busy, (4, 9)), ["q-2", "hangs-4"]);
    }

    #[test]
    fn an_endpoint_that_goes_on_failing_is_left_alone_for_longer_and_longer() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        put(&connection, &endpoint("down", "o")).unwrap();
        put(&connection, &endpoint("up", "o")).unwrap();
        for i in 0..20 {
            tell(&connection, "o", "batch.failed", &format!("batch_{i}")).unwrap();
        }
        // Long after all of that happened.
        let mut now = 1 << 40;
        let due_to = |id: &str, now: u64| due(&connection, now, &[], (10, 10)).unwrap().into_iter().find(|next| next.to.id == id);
        // Each message waits for its own next try, so the next one is told; the tenth failure ends that.
        for i in 1..=MAX_FAILED {
            let next = due_to("down", now).unwrap_or_else(|| panic!("after {i} failures"));
            assert_eq!(next.n_tries, 0);
            note(&connection, &next.id, Tried::Again(now + 5), now).unwrap();
        }
        for rest_s in [60, 120, 240, 480, 960, 1920, 3600, 3600] {
            assert!(due_to("down", now + rest_s - 1).is_none() && due_to("up", now).is_some(), "{rest_s}");
            now += rest_s;
            let next = due_to("down", now).unwrap();
            note(&connection, &next.id, Tried::Again(now + 5), now).unwrap();
        }
        // One that is told opens the way for the rest, and so does its owner.
        now += MAX_REST_S;
        let next = due_to("down", now).unwrap();
        note(&connection, &next.id, Tried::Told, now).unwrap();
        for _ in 0..MAX_FAILED {
            let next = due_to("down", now).unwrap();
            note(&connection, &next.id, Tried::Again(now), now).unwrap();
        }
        assert!(due_to("down", now).is_none());
        assert_eq!(again(&connection, "down", None, now).unwrap(), 0);
        assert!(due_to("down", now).is_some());
    }
}
