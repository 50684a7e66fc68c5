//! Receivers that a response or a batch names for itself: each is told once what has become of that one object, which is sent
//! whole. To the outbox they are endpoints, one for each receiver of an owner's, which nobody lists. Invariants: who is to be told
//! is written with what it is told of, and what is told with the end of that; nothing is kept of it when it was told, or given
//! up, or its object is deleted.

use super::Connection;
use anyhow::Result;
use rusqlite::params;

/// The schema.
pub(super) const TABLES: &str = "
    ALTER TABLE endpoint ADD COLUMN is_one_off INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE endpoint ADD COLUMN token TEXT; -- is sent along
    ALTER TABLE delivery ADD COLUMN object TEXT; -- whose end is told to a receiver of its own
    CREATE INDEX delivery_object ON delivery (object) WHERE object IS NOT NULL;
    CREATE TABLE one_off (
        object TEXT PRIMARY KEY, -- that has not ended
        endpoint INTEGER NOT NULL REFERENCES endpoint (seq)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX one_off_endpoint ON one_off (endpoint);
    CREATE TABLE one_off_secret (
        owner TEXT PRIMARY KEY,
        secret TEXT NOT NULL,
        old_secret TEXT,
        old_until INTEGER
    ) STRICT, WITHOUT ROWID;
";

/// Who is to be told of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receiver {
    /// `we_…`, the same for the same receiver of the same owner's.
    pub id: String,
    /// Where it is told.
    pub url: String,
    /// What is sent along, as a bearer's.
    pub token: Option<String>,
    /// `whsec_…`, if its owner's messages of this kind have none yet.
    pub new_secret: String,
}

/// Notes that somebody is to be told what becomes of an object, which was accepted at `now` (unix seconds). One that wanted to hear
/// nothing any more hears again.
///
/// # Errors
/// The database's.
pub fn expect(connection: &Connection, (owner, object): (&str, &str), receiver: &Receiver, now: u64) -> Result<()> {
    let Receiver { id, url, token, new_secret } = receiver;
    let sql = "INSERT INTO one_off_secret (owner, secret) VALUES (?1, ?2) ON CONFLICT DO NOTHING";
    connection.prepare_cached(sql)?.execute([owner, new_secret])?;
    let sql = "INSERT INTO endpoint (id, owner, created_at, updated_at, name, url, event_types, secret, old_secret, old_until,
                                     is_one_off, token)
               SELECT ?1, owner, ?3, ?3, '', ?4, '[]', secret, old_secret, old_until, 1, ?5 FROM one_off_secret WHERE owner = ?2
               ON CONFLICT (id) DO UPDATE SET is_disabled = 0 RETURNING seq";
    let values = params![id, owner, now, url, token];
    let endpoint: i64 = connection.prepare_cached(sql)?.query_row(values, |row| row.get(0))?;
    connection.prepare_cached("INSERT INTO one_off VALUES (?1, ?2)")?.execute(params![object, endpoint])?;
    Ok(())
}

/// Puts an object that has ended, as it stands there now, into the outbox, if somebody is to be told.
///
/// # Errors
/// The database's.
pub(super) fn tell(connection: &Connection, object: &str) -> Result<()> {
    let sql = "INSERT INTO delivery (endpoint, id, created_at, body, next_at, object)
               SELECT endpoint, 'evt_' || lower(hex(randomblob(16))), unixepoch(),
                      coalesce((SELECT body FROM response WHERE id = ?1), (SELECT body FROM batch WHERE id = ?1)), unixepoch(), ?1
               FROM one_off JOIN endpoint ON seq = endpoint WHERE object = ?1 AND NOT is_disabled";
    connection.prepare_cached(sql)?.execute([object])?;
    connection.prepare_cached("DELETE FROM one_off WHERE object = ?1")?.execute([object])?;
    Ok(())
}

/// Nobody is to be told of an object any more.
///
/// # Errors
/// The database's.
pub(super) fn forget(connection: &Connection, object: &str) -> Result<()> {
    for table in ["delivery", "one_off"] {
        connection.prepare_cached(&format!("DELETE FROM {table} WHERE object = ?1"))?.execute([object])?;
    }
    Ok(())
}

/// Forgets what was told, or given up; of a receiver who wants to hear nothing, all that it was to be told.
///
/// # Errors
/// The database's.
pub(super) fn settle(connection: &Connection, delivery: &str, is_gone: bool) -> Result<()> {
    let which = if is_gone { "endpoint = (SELECT endpoint FROM delivery WHERE id = ?1)" } else { "id = ?1" };
    connection.execute(&format!("DELETE FROM delivery WHERE {which} AND object IS NOT NULL"), [delivery])?;
    Ok(())
}

/// Forgets receivers that are to be told nothing.
///
/// # Errors
/// The database's.
pub(super) fn sweep(connection: &Connection) -> Result<()> {
    let sql = "DELETE FROM endpoint WHERE is_one_off AND seq NOT IN (SELECT endpoint FROM delivery)
               AND seq NOT IN (SELECT endpoint FROM one_off)";
    connection.execute(sql, [])?;
    Ok(())
}

/// Signs an owner's messages of this kind with a new secret; `old_until` (unix seconds): with the one before it too, until then.
///
/// # Errors
/// The database's.
pub fn rotate(connection: &Connection, owner: &str, secret: &str, old_until: Option<u64>) -> Result<()> {
    let sql = "INSERT INTO one_off_secret (owner, secret) VALUES (?1, ?2) ON CONFLICT (owner) DO UPDATE
               SET secret = ?2, old_secret = CASE WHEN ?3 IS NULL THEN NULL ELSE secret END, old_until = ?3";
    connection.execute(sql, params![owner, secret, old_until])?;
    let sql = "UPDATE endpoint SET (secret, old_secret, old_until) =
                   (SELECT secret, old_secret, old_until FROM one_off_secret WHERE owner = ?1)
               WHERE owner = ?1 AND is_one_off";
    connection.execute(sql, [owner])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::migrate;
    use crate::store::responses::{self, StoredResponse};
    use crate::store::webhooks::{self, Delivery, Tried};

    const NOW: u64 = 1 << 40;

    fn accept(connection: &Connection, id: &str, receiver: &Receiver) {
        let new = StoredResponse {
            id: id.into(),
            owner: "o".into(),
            created_at: NOW,
            status: "queued".into(),
            is_background: true,
            previous: None,
            input: "[]".into(),
            body: "{}".into(),
            request: None,
            n_faults: 0,
        };
        responses::insert(connection, &new).unwrap();
        expect(connection, ("o", id), receiver, NOW).unwrap();
    }

    fn end(connection: &Connection, id: &str) {
        assert!(responses::update(connection, id, "completed", Some(&format!("the end of {id}")), &[]).unwrap());
    }

    fn due(connection: &Connection) -> Option<Delivery> {
        webhooks::due(connection, NOW, 9).unwrap().pop()
    }

    fn count(connection: &Connection, table: &str) -> u64 {
        connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
    }

    #[test]
    fn each_object_is_told_once_and_nothing_is_left_of_it() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        let text = |text: &str| text.to_owned();
        let receiver = Receiver { id: text("we_1"), url: text("u"), token: Some(text("t")), new_secret: text("first") };
        for id in ["a", "b", "c", "d"] {
            accept(&connection, id, &Receiver { new_secret: text(id), ..receiver.clone() });
        }
        assert!(due(&connection).is_none() && webhooks::list(&connection, "o", None, 9).unwrap().is_empty());
        end(&connection, "b");
        let told = due(&connection).unwrap();
        assert_eq!((&*told.body, &*told.to.url, told.to.token.as_deref()), ("the end of b", "u", Some("t")));
        assert_eq!((&*told.to.secret, &told.to.old_secret), ("a", &None), "the first that was made");
        webhooks::note(&connection, &told.id, Tried::Again(NOW), NOW).unwrap();
        rotate(&connection, "o", "new", Some(NOW + 9)).unwrap();
        let again = due(&connection).unwrap();
        assert_eq!((again.id, again.n_tries, again.to.secret), (told.id.clone(), 1, text("new")));
        assert_eq!(again.to.old_secret, Some((text("a"), NOW + 9)));
        webhooks::note(&connection, &told.id, Tried::Told, NOW).unwrap();
        // One that is deleted is not told.
        end(&connection, "a");
        responses::delete(&connection, "a").unwrap();
        assert!(due(&connection).is_none() && count(&connection, "delivery") == 0);
        // Who wants to hear nothing hears nothing, until somebody names it again.
        end(&connection, "c");
        webhooks::note(&connection, &due(&connection).unwrap().id, Tried::Gone, NOW).unwrap();
        end(&connection, "d");
        assert_eq!(count(&connection, "delivery") + count(&connection, "one_off"), 0);
        accept(&connection, "e", &receiver);
        webhooks::forget_before(&connection, NOW, 9).unwrap();
        end(&connection, "e");
        let told = due(&connection).unwrap();
        assert_eq!((&*told.body, &*told.to.secret), ("the end of e", "new"));
        webhooks::note(&connection, &told.id, Tried::GivenUp, NOW).unwrap();
        webhooks::forget_before(&connection, NOW, 9).unwrap();
        assert_eq!(count(&connection, "endpoint"), 0);
        // The secret stays, for whoever has been told it.
        accept(&connection, "f", &Receiver { id: text("we_2"), ..receiver });
        end(&connection, "f");
        assert_eq!(due(&connection).unwrap().to.secret, "new");
    }
}
