//! The ledger: what was done, for whom, at which prices. Invariants: an entry is never changed or removed; a thing is
//! charged once; sums are of whole numbers, so that parts add up to the whole.

use super::Connection;
use anyhow::Result;
use rusqlite::params;

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

/// An entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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
    /// What is charged, in millionths of millionths.
    pub charge: u64,
    /// Time of the machine.
    pub machine_ns: i64,
    /// What an hour of it costs, in millionths.
    pub hour_price: u64,
}

/// Adds an entry.
///
/// # Errors
/// The database's, or the object was charged before.
pub fn add(connection: &Connection, entry: &Entry) -> Result<()> {
    let sql = "INSERT INTO ledger (at, object, owner, key, model, window, batch, n_requests, input_tokens, cached_tokens,
               output_tokens, input_price, cached_price, output_price, charge, machine_ns, hour_price)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17)";
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
        entry.charge,
        entry.machine_ns,
        entry.hour_price
    ])?;
    Ok(())
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
    pub charge: u64,
    /// Time of the machine.
    pub machine_ns: i64,
    /// What that costs: nanoseconds times millionths of the currency an hour.
    pub machine_cost: i128,
}

/// The sums of each group, in the order of what they are told apart by.
///
/// # Errors
/// The database's.
pub fn sums(connection: &Connection, question: &Question) -> Result<Vec<Sums>> {
    let groups = question.by.iter().fold(String::new(), |groups, by| groups + by.expression() + ", ");
    // Times at different prices are not added up.
    let sql = format!(
        "SELECT {groups} hour_price, sum(n_requests), sum(input_tokens), sum(cached_tokens), sum(output_tokens), sum(charge),
         sum(machine_ns) FROM ledger WHERE at >= ?1 AND at < ?2 AND (?3 IS NULL OR owner = ?3)
         GROUP BY {groups} hour_price ORDER BY {groups} hour_price"
    );
    let n_groups = question.by.len();
    let mut statement = connection.prepare(&sql)?;
    let until = question.until.min(i64::MAX as u64);
    let mut rows = statement.query(params![question.from.min(i64::MAX as u64), until, question.owner])?;
    let mut found: Vec<Sums> = Vec::new();
    while let Some(row) = rows.next()? {
        let group: Vec<String> = (0..n_groups).map(|i| row.get(i)).collect::<rusqlite::Result<_>>()?;
        if found.last().is_none_or(|last| last.group != group) {
            found.push(Sums { group, ..Sums::default() });
        }
        let Some(sums) = found.last_mut() else { continue };
        let hour_price: u64 = row.get(n_groups)?;
        let machine_ns: i64 = row.get(n_groups + 6)?;
        sums.n_requests += row.get::<_, u64>(n_groups + 1)?;
        sums.input_tokens += row.get::<_, u64>(n_groups + 2)?;
        sums.cached_tokens += row.get::<_, u64>(n_groups + 3)?;
        sums.output_tokens += row.get::<_, u64>(n_groups + 4)?;
        sums.charge += row.get::<_, u64>(n_groups + 5)?;
        sums.machine_ns += machine_ns;
        sums.machine_cost += i128::from(machine_ns) * i128::from(hour_price);
    }
    Ok(found)
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
