//! How far a job is, from its store alone: nothing is claimed and nothing changed but for the wish that its run may stop.
//! Invariant: what is said of rows was committed and counts.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use bytes::Bytes;

use super::keeper::{CANCEL, LEASE, Root, shown};
use super::lease::{Closed, Lease};
use super::manifest::{self, Manifest};
use super::segment::{self, SegmentId};
use super::{holder, lock};
use crate::storage::{Location, Storage};

/// Whether somebody works on a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Its holder lives, as far as can be known.
    Running,
    /// Its holder is dead, or silent for longer than it may be.
    Dead,
    /// Nobody holds it.
    Stopped,
}

/// One journal: of a job or of a shard.
#[derive(Debug, Clone)]
pub struct Overview {
    /// Whether it goes on.
    pub life: Life,
    /// Who works on it, or did last.
    pub holder: String,
    /// Since its last sign of life; on a local disk, where none is needed, `None`.
    pub silence: Option<Duration>,
    /// What job it is.
    pub manifest: Manifest,
    /// Rows committed.
    pub n_done: u64,
    /// How many of them are errors.
    pub n_failed: u64,
}

/// The lease in a directory, whoever has it.
pub fn lease_in(storage: &Storage, at: &Location) -> Result<Option<Lease>> {
    let root = Root { storage: storage.clone(), at: at.clone(), swaps: false };
    Ok(root.read()?.map(|(lease, _)| *lease))
}

/// Looks at a directory; `None` if no job is under way there.
pub fn overview(storage: &Storage, at: &Location) -> Result<Option<Overview>> {
    let Some(lease) = lease_in(storage, at)? else { return Ok(None) };
    let Some(job) = lease.job else { return Ok(None) };
    let Some(text) = storage.get(&at.child(&manifest::name_of(job))?)? else { return Ok(None) };
    let manifest = Manifest::parse(&text)?;
    let (mut n_done, mut n_failed) = (0, 0);
    let root = Root { storage: storage.clone(), at: at.clone(), swaps: false };
    let own = Closed { epoch: lease.epoch, n_segments: root.count(lease.epoch)? };
    for closed in lease.closed.iter().chain([&own]) {
        for number in 1..=closed.n_segments {
            let at = at.child(&segment::name_of(SegmentId { epoch: closed.epoch, number }))?;
            // A damaged one does not count, and the next run says so.
            let counts = segment::counts(&storage.get_end(&at, segment::SEAL_BYTES)?, &manifest.job_fingerprint);
            let (rows, failed) = counts.unwrap_or_default();
            n_done += rows;
            n_failed += failed;
        }
    }
    let (life, silence) = life(storage, at, &lease)?;
    Ok(Some(Overview { life, holder: shown(&lease), silence, manifest, n_done, n_failed }))
}

fn life(storage: &Storage, at: &Location, lease: &Lease) -> Result<(Life, Option<Duration>)> {
    if let Some(dir) = &at.local {
        return Ok((
            if lock::is_held(dir)? {
                Life::Running
            } else if lease.held {
                Life::Dead
            } else {
                Life::Stopped
            },
            None,
        ));
    }
    if !lease.held {
        return Ok((Life::Stopped, None));
    }
    let changed = storage.changed_at(&at.child(LEASE)?)?;
    // Clocks that differ make this wrong by as much; a run that wants the job looks for itself.
    let silence = changed.and_then(|then| SystemTime::now().duration_since(then).ok()).unwrap_or_default();
    let is_silent = silence > Duration::from_millis(lease.lease_ms) * 5 / 4;
    Ok((if is_silent || holder::is_dead(&lease.holder) { Life::Dead } else { Life::Running }, Some(silence)))
}

/// Asks the run that works on a directory's job to stop; whether there is one.
pub fn ask_to_stop(storage: &Storage, at: &Location) -> Result<bool> {
    let Some(lease) = lease_in(storage, at)? else { return Ok(false) };
    let is_there = match &at.local {
        Some(dir) => lock::is_held(dir)?,
        // One that is only silent may come back.
        None => lease.held && !holder::is_dead(&lease.holder),
    };
    if lease.job.is_none() || !is_there {
        return Ok(false);
    }
    storage.put(&at.child(CANCEL)?, Bytes::from(lease.epoch.to_string()))?;
    Ok(true)
}
