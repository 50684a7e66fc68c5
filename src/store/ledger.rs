//! The ledger: what was done, for whom, at which prices. Invariants: an entry is never changed or removed; a thing is
//! charged once; sums are of whole numbers, so that parts add up to the whole; a question reads the sums of whole hours, and
//! entries only of the hours that it begins and ends within.

use super::Connection;
use super::trajectories::{self, Turn};
use anyhow::Result;
use rusqlite::{Row, ToSql, params};
use serde::{Deserialize, Serialize};

/// The schema. Amounts are millionths of a millionth of the currency; prices millionths of it.
pub(super) const TABLES: &str = "
    CREATE TABLE ledger (
        seq INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        object TEXT, -- what was charged; NULL: time of the machine alone
        owner TEXT NOT NULL,
        key TEXT NOT NULL,
        model TEXT NOT NULL,
        window TEXT NOT NULL,
        batch TEXT NOT NULL, -- or empty
        n_requests INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        input_price INTEGER NOT NULL,
        cached_price INTEGER NOT NULL,
        output_price INTEGER NOT NULL,
        charge INTEGER NOT NULL,
        machine_ns INTEGER NOT NULL,
        hour_price INTEGER NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX ledger_object ON ledger (object) WHERE object IS NOT NULL;
    CREATE INDEX ledger_at ON ledger (at);
    CREATE INDEX ledger_batch ON ledger (batch) WHERE batch <> '';
    CREATE TRIGGER ledger_stays_1 BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is only added to'); END;
    CREATE TRIGGER ledger_stays_2 BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is only added to'); END;
";

/// Amounts beyond what one number of the database holds, and the sums of each hour. An amount is `charge_high` times
/// [`HIGH`] and `charge`; a sum is `charge_millions` times [`MILLION`] and `charge_rest`, so that no sum of an hour overflows
/// before its charges are 9 million million units of the currency.
pub(super) const HOURS: &str = "
    ALTER TABLE ledger ADD COLUMN charge_high INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE ledger_hour (
        hour INTEGER NOT NULL, -- since 1970
        owner TEXT NOT NULL,
        key TEXT NOT NULL,
        model TEXT NOT NULL,
        window TEXT NOT NULL,
        batch TEXT NOT NULL,
        hour_price INTEGER NOT NULL,
        n_requests INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        charge_millions INTEGER NOT NULL,
        charge_rest INTEGER NOT NULL,
        machine_ns INTEGER NOT NULL,
        PRIMARY KEY (hour, owner, key, model, window, batch, hour_price)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO ledger_hour
        SELECT at / 3600, owner, key, model, window, batch, hour_price, sum(n_requests), sum(input_tokens), sum(cached_tokens),
               sum(output_tokens), sum(charge / 1000000), sum(charge % 1000000), sum(machine_ns)
        FROM ledger GROUP BY at / 3600, owner, key, model, window, batch, hour_price;
    CREATE TRIGGER ledger_sums AFTER INSERT ON ledger BEGIN
        INSERT INTO ledger_hour
        VALUES (new.at / 3600, new.owner, new.key, new.model, new.window, new.batch, new.hour_price, new.n_requests,
                new.input_tokens, new.cached_tokens, new.output_tokens,
                new.charge_high * 1000000000000 + new.charge / 1000000, new.charge % 1000000, new.machine_ns)
        ON CONFLICT (hour, owner, key, model, window, batch, hour_price) DO UPDATE SET
            n_requests = n_requests + excluded.n_requests, input_tokens = input_tokens + excluded.input_tokens,
            cached_tokens = cached_tokens + excluded.cached_tokens, output_tokens = output_tokens + excluded.output_tokens,
            charge_millions = charge_millions + excluded.charge_millions, charge_rest = charge_rest + excluded.charge_rest,
            machine_ns = machine_ns + excluded.machine_ns;
    END;
";

/// What `charge_high` counts, and `charge` is less than.
const HIGH: i128 = 1_000_000_000_000_000_000;
/// What `charge_millions` counts.
const MILLION: i128 = 1_000_000;
/// Seconds of an hour.
const HOUR_S: u64 = 3600;

/// An entry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Unix seconds.
    pub at: u64,
    /// The id of what was charged; `None`: time of the machine alone.
    pub object: Option<String>,
    /// Whose it is.
    pub owner: String,
    /// What people call the key.
    pub key: String,
    /// The model, or nothing.
    pub model: String,
    /// The window, or nothing.
    pub window: String,
    /// The batch, or nothing.
    pub batch: String,
    /// Requests.
    pub n_requests: u64,
    /// Tokens of prompts.
    pub input_tokens: u64,
    /// Those of them that were in the cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Prices of a million tokens: input, cached, output. In millionths of the currency.
    pub prices: [u64; 3],
    /// What is charged, in millionths of millionths; never less than nothing.
    pub charge: i128,
    /// Time of the machine.
    pub machine_ns: i64,
    /// What an hour of it costs, in millionths.
    pub hour_price: u64,
    /// Those of them that were thoughts, as far as that is known; not kept.
    #[serde(default)]
    pub reasoning_tokens: u64,
    /// What trajectory it is a turn of, if it is one; its sums are kept, not which entries they are of.
    #[serde(default)]
    pub turn: Option<Turn>,
}

/// Adds an entry, and counts it for its trajectory.
///
/// # Errors
/// The database's, or the object was charged before.
pub fn add(connection: &Connection, entry: &Entry) -> Result<()> {
    let sql = "INSERT INTO ledger (at, object, owner, key, model, window, batch, n_requests, input_tokens, cached_tokens,
               output_tokens, input_price, cached_price, output_price, charge, charge_high, machine_ns, hour_price)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)";
    let Entry { at, object, owner, key, model, window, batch, n_requests, .. } = entry;
    let [input_price, cached_price, output_price] = entry.prices;
    connection.prepare_cached(sql)?.execute(params![
        at,
        object,
        owner,
        key,
        model,
        window,
        batch,
        n_requests,
        entry.input_tokens,
        entry.cached_tokens,
        entry.output_tokens,
        input_price,
        cached_price,
        output_price,
        (entry.charge % HIGH) as i64,
        i64::try_from(entry.charge / HIGH)?,
        entry.machine_ns,
        entry.hour_price
    ])?;
    trajectories::note(connection, entry)
}

/// What entries are told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The day, in UTC.
    Day,
    /// The model.
    Model,
    /// The window.
    Window,
    /// The key.
    Key,
    /// The batch.
    Batch,
}

impl By {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 5] =
        [("day", Self::Day), ("model", Self::Model), ("window", Self::Window), ("key", Self::Key), ("batch", Self::Batch)];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, by)| *by == self).map_or("", |(name, _)| name)
    }

    fn expression(self) -> &'static str {
        match self {
            Self::Day => "date(at, 'unixepoch')",
            Self::Model => "model",
            Self::Window => "window",
            Self::Key => "key",
            Self::Batch => "batch",
        }
    }
}

/// Which entries are summed, and how.
#[derive(Debug, Clone, Default)]
pub struct Question {
    /// From then on, unix seconds.
    pub from: u64,
    /// Until before then.
    pub until: u64,
    /// Only of this owner.
    pub owner: Option<String>,
    /// What groups are told apart by.
    pub by: Vec<By>,
}

/// A group's sums.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sums {
    /// A value for each of [`Question::by`].
    pub group: Vec<String>,
    /// Requests.
    pub n_requests: u64,
    /// Tokens of prompts.
    pub input_tokens: u64,
    /// Those of them that were in the cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// What was charged, in millionths of millionths.
    pub charge: i128,
    /// Time of the machine.
    pub machine_ns: i64,
    /// What that costs: nanoseconds times millionths of the currency an hour.
    pub machine_cost: i128,
}

/// Where a question's sums are: whole hours from the first to before the second, and entries from the first to before the
/// second second of each span.
fn parts(from: u64, until: u64) -> ([u64; 2], [[u64; 2]; 2]) {
    let hours = [from.div_ceil(HOUR_S), until / HOUR_S];
    if hours[0] >= hours[1] {
        return ([0, 0], [[from, until], [0, 0]]);
    }
    (hours, [[from, hours[0] * HOUR_S], [hours[1] * HOUR_S, until]])
}

/// The sums of each group, in the order of what they are told apart by.
///
/// # Errors
/// The database's.
pub fn sums(connection: &Connection, question: &Question) -> Result<Vec<Sums>> {
    let groups = question.by.iter().fold(String::new(), |groups, by| groups + by.expression() + ", ");
    let entries = |from: &str, until: &str| {
        format!(
            "SELECT at, owner, key, model, window, batch, hour_price, n_requests, input_tokens, cached_tokens, output_tokens,
             charge_high * 1000000000000 + charge / 1000000 AS charge_millions, charge % 1000000 AS charge_rest, machine_ns
             FROM ledger WHERE at >= {from} AND at < {until}"
        )
    };
    // Times at different prices are not added up.
    let sql = format!(
        "WITH part AS (SELECT hour * 3600 AS at, owner, key, model, window, batch, hour_price, n_requests, input_tokens,
                       cached_tokens, output_tokens, charge_millions, charge_rest, machine_ns
                       FROM ledger_hour WHERE hour >= ?1 AND hour < ?2
                       UNION ALL {} UNION ALL {})
         SELECT {groups} hour_price, sum(n_requests), sum(input_tokens), sum(cached_tokens), sum(output_tokens),
         sum(charge_millions), sum(charge_rest), sum(machine_ns) FROM part WHERE ?7 IS NULL OR owner = ?7
         GROUP BY {groups} hour_price ORDER BY {groups} hour_price",
        entries("?3", "?4"),
        entries("?5", "?6"),
    );
    let most = i64::MAX as u64;
    let (hours, [begin, end]) = parts(question.from.min(most), question.until.min(most));
    let n_groups = question.by.len();
    let mut statement = connection.prepare_cached(&sql)?;
    let values = params![hours[0], hours[1], begin[0], begin[1], end[0], end[1], question.owner];
    let mut rows = statement.query(values)?;
    let mut found: Vec<Sums> = Vec::new();
    while let Some(row) = rows.next()? {
        let group: Vec<String> = (0..n_groups).map(|i| row.get(i)).collect::<rusqlite::Result<_>>()?;
        if found.last().is_none_or(|last| last.group != group) {
            found.push(Sums { group, ..Sums::default() });
        }
        if let Some(sums) = found.last_mut() {
            add_row(sums, row, n_groups)?;
        }
    }
    Ok(found)
}

/// Adds a row of sums at one price of the machine, which begin at a column.
fn add_row(sums: &mut Sums, row: &Row<'_>, first: usize) -> Result<()> {
    let hour_price: u64 = row.get(first)?;
    let machine_ns: i64 = row.get(first + 7)?;
    sums.n_requests += row.get::<_, u64>(first + 1)?;
    sums.input_tokens += row.get::<_, u64>(first + 2)?;
    sums.cached_tokens += row.get::<_, u64>(first + 3)?;
    sums.output_tokens += row.get::<_, u64>(first + 4)?;
    sums.charge += i128::from(row.get::<_, i64>(first + 5)?) * MILLION + i128::from(row.get::<_, i64>(first + 6)?);
    sums.machine_ns += machine_ns;
    sums.machine_cost += i128::from(machine_ns) * i128::from(hour_price);
    Ok(())
}

/// What an owner was charged in whole hours from that second on, and the last entry that this counts.
///
/// # Errors
/// The database's.
pub fn charged_since(connection: &Connection, owner: &str, from: u64) -> Result<(u64, i128)> {
    let sql =
        "SELECT (SELECT coalesce(max(seq), 0) FROM ledger), coalesce(sum(charge_millions), 0), coalesce(sum(charge_rest), 0)
               FROM ledger_hour WHERE hour >= ?1 AND owner = ?2";
    charged(connection, sql, params![from / HOUR_S, owner])
}

/// What an owner was charged from that second on by entries after one, and the last entry that this counts.
///
/// # Errors
/// The database's.
pub fn charged_after(connection: &Connection, owner: &str, seq: u64, from: u64) -> Result<(u64, i128)> {
    let sql = "SELECT coalesce(max(seq), ?1),
               coalesce(sum((charge_high * 1000000000000 + charge / 1000000) * (owner = ?2 AND at >= ?3)), 0),
               coalesce(sum((charge % 1000000) * (owner = ?2 AND at >= ?3)), 0) FROM ledger WHERE seq > ?1";
    charged(connection, sql, params![seq, owner, from])
}

fn charged(connection: &Connection, sql: &str, values: &[&dyn ToSql]) -> Result<(u64, i128)> {
    let sum = |row: &Row<'_>| Ok((row.get(0)?, i128::from(row.get::<_, i64>(1)?) * MILLION + i128::from(row.get::<_, i64>(2)?)));
    Ok(connection.prepare_cached(sql)?.query_row(values, sum)?)
}

/// What a batch has taken of the machine so far: nanoseconds times millionths of the currency an hour.
///
/// # Errors
/// The database's.
pub fn machine_cost_of_batch(connection: &Connection, batch: &str) -> Result<i128> {
    let mut statement = connection.prepare("SELECT machine_ns, hour_price FROM ledger WHERE batch = ?1 AND batch <> ''")?;
    let parts = statement.query_map([batch], |row| Ok(i128::from(row.get::<_, i64>(0)?) * i128::from(row.get::<_, u64>(1)?)))?;
    let mut sum = 0;
    for part in parts {
        sum += part?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A database with these entries; the ledger of an earlier version has the first `n_old`.
    fn database(entries: &[Entry], n_old: usize) -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(TABLES).unwrap();
        for entry in &entries[..n_old] {
            let sql = "INSERT INTO ledger (at, owner, key, model, window, batch, n_requests, input_tokens, cached_tokens,
                       output_tokens, input_price, cached_price, output_price, charge, machine_ns, hour_price)
                       VALUES (?1, ?2, '', ?3, '', '', 1, ?4, 0, 0, 0, 0, 0, ?5, ?6, ?7)";
            let Entry { at, owner, model, input_tokens, charge, machine_ns, hour_price, .. } = entry;
            let values = params![at, owner, model, input_tokens, *charge as i64, machine_ns, hour_price];
            connection.execute(sql, values).unwrap();
        }
        connection.execute_batch(HOURS).unwrap();
        entries[n_old..].iter().for_each(|entry| add(&connection, entry).unwrap());
        connection
    }

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let entry = (0..40_000_u64, 0..2_u8, 0..2_u8, 0..1_i128 << 76, -5..99_i64, 1..3_u64);
        let entry = entry.prop_map(|(at, owner, model, charge, machine_ns, hour_price)| Entry {
            at,
            owner: owner.to_string(),
            model: model.to_string(),
            n_requests: 1,
            input_tokens: at,
            charge,
            machine_ns,
            hour_price,
            ..Entry::default()
        });
        prop::collection::vec(entry, 0..40)
    }

    proptest! {
        /// Whatever is asked for, the answer is the sum of the entries, also of amounts that one number of the database does not
        /// hold, and of entries that an earlier version has written.
        #[test]
        fn sums_are_those_of_the_entries(mut entries in entries(), n_old in 0..40_usize, from in 0..45_000_u64, until in 0..45_000_u64) {
            let n_old = n_old.min(entries.len());
            entries[..n_old].iter_mut().for_each(|entry| entry.charge %= i128::from(i64::MAX));
            let connection = database(&entries, n_old);
            for owner in [None, Some("1".to_owned())] {
                let question = Question { from, until, owner, by: vec![By::Model] };
                let mut expected: Vec<Sums> = Vec::new();
                for model in ["0", "1"] {
                    let mut sum = Sums { group: vec![model.to_owned()], ..Sums::default() };
                    for entry in &entries {
                        let is_own = question.owner.as_ref().is_none_or(|owner| entry.owner == *owner);
                        if entry.model == model && (from..until).contains(&entry.at) && is_own {
                            sum.n_requests += 1;
                            sum.input_tokens += entry.input_tokens;
                            sum.charge += entry.charge;
                            sum.machine_ns += entry.machine_ns;
                            sum.machine_cost += i128::from(entry.machine_ns) * i128::from(entry.hour_price);
                        }
                    }
                    if sum.n_requests > 0 {
                        expected.push(sum);
                    }
                }
                prop_assert_eq!(sums(&connection, &question).unwrap(), expected);
            }
        }
    }

    #[test]
    fn what_an_owner_was_charged_is_found_in_two_parts() {
        let entry = |at, owner: &str, charge| Entry { at, owner: owner.into(), charge, ..Entry::default() };
        let most = 3 * HIGH + 7;
        let before = [entry(3599, "a", 1), entry(3600, "a", most), entry(9000, "b", 50)];
        let connection = database(&before, 0);
        let (seq, charged) = charged_since(&connection, "a", 3600).unwrap();
        assert_eq!((seq, charged), (3, most));
        assert_eq!(charged_after(&connection, "a", seq, 3600).unwrap(), (3, 0));
        for next in [entry(9001, "a", most), entry(9002, "b", 5), entry(3500, "a", 9)] {
            add(&connection, &next).unwrap();
        }
        assert_eq!(charged_after(&connection, "a", seq, 3600).unwrap(), (6, most), "of that time, and that owner");
        assert_eq!(charged_since(&connection, "a", 0).unwrap(), (6, 2 * most + 10));
    }

    #[test]
    fn whole_hours_are_answered_without_their_entries() {
        let entry = |at| Entry { at, n_requests: 1, ..Entry::default() };
        let connection = database(&[entry(7199), entry(7200), entry(7201), entry(12_000)], 0);
        let ask = |from, until| sums(&connection, &Question { from, until, ..Question::default() }).unwrap();
        assert_eq!((ask(7200, 10_800)[0].n_requests, ask(7199, 12_001)[0].n_requests), (2, 4));
        connection.execute_batch("DROP TRIGGER ledger_stays_2; DELETE FROM ledger").unwrap();
        assert_eq!((ask(7200, 10_800)[0].n_requests, ask(0, u64::MAX)[0].n_requests), (2, 4));
        assert_eq!(ask(7199, 12_001)[0].n_requests, 2, "the hours' parts are in the entries");
    }
}
