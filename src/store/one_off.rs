//! Receivers that a response or a batch names for itself: each is told once what has become of that one object, which is sent
//! whole. To the outbox they are endpoints, one for each receiver of an owner's, which nobody lists. Invariants: who is to be told
//! is written with what it is told of, and what is told with the end of that; nothing is kept of it when it was told, or given
//! up, or its object is deleted.

use super::Connection;
use super::webhooks::Tried;
use anyhow::Result;
use rusqlite::{OptionalExtension as _, params};

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

/// Receivers of an owner's that may wait at a time.
pub const MAX_WAITING: usize = 100;

/// Notes that somebody is to be told what becomes of an object, which was accepted at `now` (unix seconds). One that wanted to hear
/// nothing any more hears again. False, and nothing is noted: as many other receivers of the owner's wait as may.
///
/// # Errors
/// The database's.
pub fn expect(connection: &Connection, (owner, object): (&str, &str), receiver: &Receiver, now: u64) -> Result<bool> {
    let Receiver { id, url, token, new_secret } = receiver;
    let sql = "SELECT count(*) FROM endpoint WHERE owner = ?1 AND is_one_off AND id != ?2
               AND (EXISTS (SELECT 1 FROM one_off WHERE endpoint = seq)
                    OR EXISTS (SELECT 1 FROM delivery WHERE endpoint = endpoint.seq AND next_at IS NOT NULL))";
    let n_others: usize = connection.prepare_cached(sql)?.query_row([owner, id], |row| row.get(0))?;
    if n_others >= MAX_WAITING {
        return Ok(false);
    }
    let sql = "INSERT INTO one_off_secret (owner, secret) VALUES (?1, ?2) ON CONFLICT DO NOTHING";
    connection.prepare_cached(sql)?.execute([owner, new_secret])?;
    let sql = "INSERT INTO endpoint (id, owner, created_at, updated_at, name, url, event_types, secret, old_secret, old_until,
                                     is_one_off, token)
               SELECT ?1, owner, ?3, ?3, '', ?4, '[]', secret, old_secret, old_until, 1, ?5 FROM one_off_secret WHERE owner = ?2
               ON CONFLICT (id) DO UPDATE SET is_disabled = 0 RETURNING seq";
    let values = params![id, owner, now, url, token];
    let endpoint: i64 = connection.prepare_cached(sql)?.query_row(values, |row| row.get(0))?;
    connection.prepare_cached("INSERT INTO one_off VALUES (?1, ?2)")?.execute(params![object, endpoint])?;
    Ok(true)
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

/// Forgets what was told, with a receiver that is to be told nothing else, or given up; of one who wants to hear nothing, all that
/// it was to be told.
///
/// # Errors
/// The database's.
pub(super) fn settle(connection: &Connection, delivery: &str, tried: Tried) -> Result<()> {
    let endpoint: Option<i64> = connection
        .query_row("SELECT endpoint FROM delivery WHERE id = ?1 AND object IS NOT NULL", [delivery], |row| row.get(0))
        .optional()?;
    let Some(endpoint) = endpoint else { return Ok(()) };
    if tried == Tried::Gone {
        connection.execute("DELETE FROM delivery WHERE endpoint = ?1 AND object IS NOT NULL", [endpoint])?;
    } else {
        connection.execute("DELETE FROM delivery WHERE id = ?1", [delivery])?;
    }
    if tried == Tried::Told {
        // It has not failed, so that nothing has to be remembered of it.
        let sql = "DELETE FROM endpoint WHERE seq = ?1 AND NOT EXISTS (SELECT 1 FROM delivery WHERE endpoint = ?1)
                   AND NOT EXISTS (SELECT 1 FROM one_off WHERE endpoint = ?1)";
        connection.execute(sql, [endpoint])?;
    }
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
    use crate::store::webhooks::{self, Delivery};

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
        assert!(expect(connection, ("o", id), receiver, NOW).unwrap());
    }

    fn end(connection: &Connection, id: &str) {
        assert!(responses::update(connection, id, "completed", Some(&format!("the end of {id}")), &[]).unwrap());
    }

    fn due(connection: &Connection) -> Option<Delivery> {
        webhooks::due(connection, NOW, &[], (9, 9)).unwrap().pop()
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
        let told = due(&connection).unwrap();
        assert_eq!(told.to.secret, "new");
        // One that has heard all is forgotten at once.
        webhooks::note(&connection, &told.id, Tried::Told, NOW).unwrap();
        assert_eq!(count(&connection, "endpoint"), 0);
    }

    #[test]
    fn so_many_receivers_of_an_owners_wait_and_no_more() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        let receiver = |i: usize| Receiver { id: format!("we_{i}"), url: "u".into(), token: None, new_secret: "s".into() };
        let ask = |object: &str, i: usize| expect(&connection, ("o", object), &receiver(i), NOW).unwrap();
        for i in 0..MAX_WAITING {
            accept(&connection, &format!("resp_{i}"), &receiver(i));
        }
        assert!(!ask("one more", MAX_WAITING), "one too many");
        assert_eq!((count(&connection, "endpoint"), count(&connection, "one_off")), (100, 100), "nothing of it is noted");
        // Others' are their own, and one that waits anyway can be told more.
        assert!(expect(&connection, ("p", "another's"), &Receiver { id: "we_p".into(), ..receiver(0) }, NOW).unwrap());
        assert!(ask("more for the first", 0));
        // One waits until it was told.
        end(&connection, "resp_7");
        assert!(!ask("one more", MAX_WAITING));
        webhooks::note(&connection, &due(&connection).unwrap().id, Tried::Told, NOW).unwrap();
        assert!(ask("one more", MAX_WAITING) && !ask("and one more", MAX_WAITING + 1));
    }
}
