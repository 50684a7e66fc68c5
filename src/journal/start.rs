//! When a job that is run in shards began: the first shard to begin writes it down for all. Invariant: shards of one job are
//! told one time, from the first that begins until the job is merged or run as a whole.

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::storage::{Location, Storage};

/// How the object's name begins, in the job's directory, beside those of its shards. A job's fingerprint follows: what
/// another job has left is in nobody's way, and nobody deletes what a shard that begins at the same time has put.
const STEM: &str = "begun";

/// Times that it is tried to be the first.
const TRIES: usize = 10;

#[derive(Serialize, Deserialize)]
struct Start {
    created_unix_s: u64,
}

/// When the job of this fingerprint began, unix seconds: `now`, if none of its shards has begun before.
pub fn shared_start(storage: &Storage, dir: &Location, job: &str, now: u64) -> Result<u64> {
    let at = dir.child(&format!("{STEM}-{job}.json"))?;
    let own = Bytes::from(serde_json::to_vec(&Start { created_unix_s: now }).expect("numbers are JSON"));
    for _ in 0..TRIES {
        if let Some(text) = storage.get(&at)? {
            let start: Start = serde_json::from_slice(&text).with_context(|| format!("{} is damaged", at.url))?;
            return Ok(start.created_unix_s);
        }
        if storage.put_over(&at, &own, None)?.is_some() {
            return Ok(now);
        }
    }
    bail!("{} can't be created, and is not there", at.url)
}

/// Forgets it, and what other jobs have left, once no shard is under way.
pub fn forget_start(storage: &Storage, dir: &Location) -> Result<()> {
    let names = storage.list(dir)?;
    names.iter().filter(|name| name.starts_with(STEM)).try_for_each(|name| storage.delete(&dir.child(name)?))
}
