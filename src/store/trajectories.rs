//! Trajectories: what the turns of a conversation came to, together. Invariant: a turn counts once, in the transaction that
//! charges it, so that a trajectory's numbers are the sums of its entries in the ledger.

use super::Connection;
use super::ledger::Entry;
use anyhow::Result;
use rusqlite::{OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

/// The schema. A charge is `charge_millions` times a million and `charge_rest`, in millionths of a millionth of the currency.
pub(super) const TABLES: &str = "
    CREATE TABLE trajectory (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        began_ms INTEGER NOT NULL, -- its first turn was accepted
        ended_ms INTEGER NOT NULL, -- its last turn ended
        n_turns INTEGER NOT NULL,
        turns_ms INTEGER NOT NULL, -- from accepted to ended, of all turns
        n_standard INTEGER NOT NULL, -- turns in that window
        standard_ms INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        charge_millions INTEGER NOT NULL,
        charge_rest INTEGER NOT NULL,
        PRIMARY KEY (owner, id)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX trajectory_ended ON trajectory (ended_ms);
    CREATE INDEX trajectory_owner ON trajectory (owner, ended_ms, id);
";

/// What `charge_millions` counts.
const MILLION: i128 = 1_000_000;

/// What an entry of the ledger says of the turn that it charges.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// The trajectory.
    pub id: String,
    /// Unix milliseconds.
    pub accepted_ms: u64,
    /// Unix milliseconds.
    pub ended_ms: u64,
    /// Whether it had the standard window's time.
    pub is_standard: bool,
}

/// What its turns came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trajectory {
    /// Its name.
    pub id: String,
    /// Unix milliseconds: its first turn was accepted.
    pub began_ms: u64,
    /// Unix milliseconds: its last turn ended.
    pub ended_ms: u64,
    /// How many.
    pub n_turns: u64,
    /// Their times from accepted to ended, together.
    pub turns_ms: u64,
    /// How many in the standard window.
    pub n_standard: u64,
    /// Their times.
    pub standard_ms: u64,
    /// Tokens of prompts.
    pub input_tokens: u64,
    /// Those of them that were in the cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// What was charged, in millionths of millionths.
    pub charge: i128,
}

impl Trajectory {
    fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        let (millions, rest): (i64, i64) = (row.get("charge_millions")?, row.get("charge_rest")?);
        Ok(Self {
            id: row.get("id")?,
            began_ms: row.get("began_ms")?,
            ended_ms: row.get("ended_ms")?,
            n_turns: row.get("n_turns")?,
            turns_ms: row.get("turns_ms")?,
            n_standard: row.get("n_standard")?,
            standard_ms: row.get("standard_ms")?,
            input_tokens: row.get("input_tokens")?,
            cached_tokens: row.get("cached_tokens")?,
            output_tokens: row.get("output_tokens")?,
            charge: i128::from(millions) * MILLION + i128::from(rest),
        })
    }
}

/// Counts the turn of an entry, if it is one.
pub(super) fn note(connection: &Connection, entry: &Entry) -> Result<()> {
    let Some(turn) = &entry.turn else { return Ok(()) };
    let sql = "INSERT INTO trajectory VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
               ON CONFLICT (owner, id) DO UPDATE SET
               began_ms = min(began_ms, excluded.began_ms), ended_ms = max(ended_ms, excluded.ended_ms),
               n_turns = n_turns + excluded.n_turns, turns_ms = turns_ms + excluded.turns_ms,
               n_standard = n_standard + excluded.n_standard, standard_ms = standard_ms + excluded.standard_ms,
               input_tokens = input_tokens + excluded.input_tokens, cached_tokens = cached_tokens + excluded.cached_tokens,
               output_tokens = output_tokens + excluded.output_tokens,
               charge_millions = charge_millions + excluded.charge_millions, charge_rest = charge_rest + excluded.charge_rest";
    let turn_ms = turn.ended_ms.saturating_sub(turn.accepted_ms);
    connection.prepare_cached(sql)?.execute(params![
        entry.owner,
        turn.id,
        turn.accepted_ms,
        turn.ended_ms,
        entry.n_requests,
        turn_ms,
        u64::from(turn.is_standard),
        if turn.is_standard { turn_ms } else { 0 },
        entry.input_tokens,
        entry.cached_tokens,
        entry.output_tokens,
        i64::try_from(entry.charge / MILLION)?,
        (entry.charge % MILLION) as i64
    ])?;
    Ok(())
}

/// A trajectory of an owner's.
///
/// # Errors
/// The database's.
pub fn get(connection: &Connection, owner: &str, id: &str) -> Result<Option<Trajectory>> {
    let sql = "SELECT * FROM trajectory WHERE owner = ?1 AND id = ?2";
    Ok(connection.prepare_cached(sql)?.query_row([owner, id], Trajectory::of).optional()?)
}

/// An owner's trajectories, those first whose last turn ended last, after one of them; at most `limit`.
///
/// # Errors
/// The database's.
pub fn list(connection: &Connection, owner: &str, after: Option<&str>, limit: usize) -> Result<Vec<Trajectory>> {
    let sql = "SELECT * FROM trajectory WHERE owner = ?1 AND (?2 IS NULL OR
               (ended_ms, id) < (SELECT ended_ms, id FROM trajectory WHERE owner = ?1 AND id = ?2))
               ORDER BY ended_ms DESC, id DESC LIMIT ?3";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map(params![owner, after, limit], Trajectory::of)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// The sums over trajectories whose last turn ended in a span (unix seconds), of an owner's or of all; and how many there are. The
/// whole has no name, and the time from the first's beginning to the last's end.
///
/// # Errors
/// The database's.
pub fn sum(connection: &Connection, owner: Option<&str>, (from, until): (u64, u64)) -> Result<(Trajectory, u64)> {
    let sql = "SELECT '' AS id, coalesce(min(began_ms), 0) AS began_ms, coalesce(max(ended_ms), 0) AS ended_ms,
               coalesce(sum(n_turns), 0) AS n_turns, coalesce(sum(turns_ms), 0) AS turns_ms,
               coalesce(sum(n_standard), 0) AS n_standard, coalesce(sum(standard_ms), 0) AS standard_ms,
               coalesce(sum(input_tokens), 0) AS input_tokens, coalesce(sum(cached_tokens), 0) AS cached_tokens,
               coalesce(sum(output_tokens), 0) AS output_tokens, coalesce(sum(charge_millions), 0) AS charge_millions,
               coalesce(sum(charge_rest), 0) AS charge_rest, count(*) AS n
               FROM trajectory WHERE (?1 IS NULL OR owner = ?1) AND ended_ms >= ?2 AND ended_ms < ?3";
    let sum = |row: &Row<'_>| Ok((Trajectory::of(row)?, row.get("n")?));
    let span = [from, until].map(millis);
    Ok(connection.prepare_cached(sql)?.query_row(params![owner, span[0], span[1]], sum)?)
}

/// Those trajectories, as [`list`] orders them; at most `limit`.
///
/// # Errors
/// The database's.
pub fn of_span(connection: &Connection, owner: Option<&str>, (from, until): (u64, u64), limit: usize) -> Result<Vec<Trajectory>> {
    let sql = "SELECT * FROM trajectory WHERE (?1 IS NULL OR owner = ?1) AND ended_ms >= ?2 AND ended_ms < ?3
               ORDER BY ended_ms DESC, id DESC, owner LIMIT ?4";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map(params![owner, millis(from), millis(until), limit], Trajectory::of)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Of a time in seconds, as far as the database's numbers go.
fn millis(seconds: u64) -> i64 {
    i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX)
}

/// Forgets trajectories whose last turn ended before then; how many, at most `limit`.
///
/// # Errors
/// The database's.
pub fn forget_before(connection: &Connection, ended_ms: u64, limit: usize) -> Result<usize> {
    let sql = "DELETE FROM trajectory WHERE (owner, id) IN (SELECT owner, id FROM trajectory WHERE ended_ms < ?1 LIMIT ?2)";
    Ok(connection.execute(sql, params![ended_ms, limit])?)
}
