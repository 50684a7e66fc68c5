//! When a job that is run in parts began: the first part to begin writes it down for all. Invariant: parts of one job that
//! begin while it is under way are told one time.

use anyhow::{Result, bail};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::storage::{Location, Storage};

/// The object's name in the job's directory, beside those of its parts.
pub(super) const NAME: &str = "begun.json";

/// Times that it is tried to be the first.
const TRIES: usize = 10;

#[derive(Serialize, Deserialize)]
struct Start {
    job: String,
    created_unix_s: u64,
}

/// When the job of this fingerprint began, unix seconds: `now`, if none of its parts has begun before.
pub fn shared_start(storage: &Storage, dir: &Location, job: &str, now: u64) -> Result<u64> {
    let at = dir.child(NAME)?;
    let own = Start { job: job.to_owned(), created_unix_s: now };
    let own = Bytes::from(serde_json::to_vec(&own).expect("strings and numbers are JSON"));
    for _ in 0..TRIES {
        let found = storage.get_version(&at)?;
        let there = found.as_ref().and_then(|(text, _)| serde_json::from_slice::<Start>(text).ok());
        if let Some(start) = there.filter(|start| start.job == job) {
            return Ok(start.created_unix_s);
        }
        // Another job's, which nobody will finish: this one takes its place.
        let over = found.map(|(_, version)| version);
        if over.is_some() && at.local.is_some() {
            storage.delete(&at)?;
        } else if storage.put_over(&at, &own, over.as_ref())?.is_some() {
            return Ok(now);
        }
    }
    bail!("{} changes all the time: several jobs seem to have this output", at.url)
}

/// Forgets it, once no part is under way.
pub fn forget_start(storage: &Storage, dir: &Location) -> Result<()> {
    storage.delete(&dir.child(NAME)?)
}
