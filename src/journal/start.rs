//! How a job that is run in shards began: the first shard to begin writes it down for all. Invariant: shards of one job are
//! told the same, from the first that begins until the job is merged or run as a whole.

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::storage::{Location, Storage};

/// How the object's name begins, in the job's directory, beside those of its shards. The job's name follows: what
/// another job has left is in nobody's way, and nobody deletes what a shard that begins at the same time has put.
const STEM: &str = "begun";

/// Times that it is tried to be the first.
const TRIES: usize = 10;

/// What shards must agree on that is not in their inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// When the job began, unix seconds.
    pub created_unix_s: u64,
    /// The longest row that it may have: of the first machine's memory.
    pub max_context: Option<usize>,
}

/// How the job of that name began: as `own` says, if none of its shards has begun before.
pub fn shared_start(storage: &Storage, dir: &Location, job: &str, own: Start) -> Result<Start> {
    let at = dir.child(&format!("{STEM}-{job}.json"))?;
    let text = Bytes::from(serde_json::to_vec(&own).expect("numbers are JSON"));
    for _ in 0..TRIES {
        if let Some(text) = storage.get(&at)? {
            return serde_json::from_slice(&text).with_context(|| format!("{} is damaged", at.url));
        }
        if storage.put_over(&at, &text, None)?.is_some() {
            return Ok(own);
        }
    }
    bail!("{} can't be created, and is not there", at.url)
}

/// Forgets it, and what other jobs have left, once no shard is under way.
pub fn forget_start(storage: &Storage, dir: &Location) -> Result<()> {
    let names = storage.list(dir)?;
    names.iter().filter(|name| name.starts_with(STEM)).try_for_each(|name| storage.delete(&dir.child(name)?))
}
