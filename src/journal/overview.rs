//! How far a job is, from its store alone: nothing is claimed and nothing changed but for the wish that its run may stop.
//! Invariant: what is said of rows was committed and counts.

use std::time::{Duration, Instant, SystemTime};

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

/// What job is under way in a directory, whoever has it; `None` if none is.
pub fn manifest_in(storage: &Storage, at: &Location) -> Result<Option<Manifest>> {
    lease_in(storage, at)?.map_or(Ok(None), |lease| manifest_of(storage, at, &lease))
}

pub(super) fn manifest_of(storage: &Storage, at: &Location, lease: &Lease) -> Result<Option<Manifest>> {
    let Some(job) = lease.job else { return Ok(None) };
    let at = at.child(&manifest::name_of(job))?;
    storage.get(&at)?.map(|text| Manifest::parse_at(&text, &at.url)).transpose()
}

/// Segments that the writer of an epoch has put.
pub(super) fn n_segments(storage: &Storage, at: &Location, epoch: u32) -> Result<u32> {
    Root { storage: storage.clone(), at: at.clone(), swaps: false }.count(epoch)
}

/// Looks at a directory; `None` if no job is under way there.
pub fn overview(storage: &Storage, at: &Location) -> Result<Option<Overview>> {
    let Some(lease) = lease_in(storage, at)? else { return Ok(None) };
    match overview_of(storage, at, &lease) {
        // It has finished meanwhile, and removed what was being read; or began anew.
        Err(_) if lease_in(storage, at)?.is_none_or(|now| now.job != lease.job) => overview(storage, at),
        found => found,
    }
}

fn overview_of(storage: &Storage, at: &Location, lease: &Lease) -> Result<Option<Overview>> {
    let Some(manifest) = manifest_of(storage, at, lease)? else { return Ok(None) };
    let (mut n_done, mut n_failed) = (0u64, 0u64);
    let own = Closed { epoch: lease.epoch, n_segments: n_segments(storage, at, lease.epoch)? };
    for closed in lease.closed.iter().chain([&own]) {
        for number in 1..=closed.n_segments {
            let at = at.child(&segment::name_of(SegmentId { epoch: closed.epoch, number }))?;
            // A damaged one does not count, and the next run says so.
            let counts = segment::counts(&storage.get_end(&at, segment::SEAL_BYTES)?, &manifest.job_fingerprint);
            let (rows, failed) = counts.unwrap_or_default();
            if closed.epoch < lease.errors_from {
                n_done = rows.saturating_sub(failed).saturating_add(n_done);
            } else {
                n_done = rows.saturating_add(n_done);
                n_failed = failed.saturating_add(n_failed);
            }
        }
    }
    let (life, silence) = life(storage, at, lease)?;
    Ok(Some(Overview { life, holder: shown(lease), silence, manifest, n_done, n_failed }))
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

/// A run that was asked to stop.
#[derive(Debug)]
pub struct Asked {
    at: Location,
    epoch: u32,
    /// The last sign of life that was seen, and when, by this process's clock.
    seen: (u64, Instant),
}

impl Asked {
    /// Whether it has stopped: it has given its lease back, or shows no sign of life for longer than it may be silent. No
    /// clocks are compared, and nothing but the lease is read.
    pub fn has_stopped(&mut self, storage: &Storage) -> Result<bool> {
        let Some(lease) = lease_in(storage, &self.at)? else { return Ok(true) };
        if !lease.held || lease.epoch != self.epoch {
            return Ok(true);
        }
        if let Some(dir) = &self.at.local {
            return Ok(!lock::is_held(dir)?);
        }
        if lease.serial != self.seen.0 {
            self.seen = (lease.serial, Instant::now());
        }
        let is_silent = self.seen.1.elapsed() > Duration::from_millis(lease.lease_ms) * 5 / 4;
        Ok(is_silent || holder::is_dead(&lease.holder))
    }
}

/// Asks the run that works on a directory's job to stop; `None` if there is none.
pub fn ask_to_stop(storage: &Storage, at: &Location) -> Result<Option<Asked>> {
    let Some(lease) = lease_in(storage, at)? else { return Ok(None) };
    let is_there = match &at.local {
        Some(dir) => lock::is_held(dir)?,
        // One that is only silent may come back.
        None => lease.held && !holder::is_dead(&lease.holder),
    };
    if lease.job.is_none() || !is_there {
        return Ok(None);
    }
    storage.put(&at.child(CANCEL)?, Bytes::from(lease.epoch.to_string()))?;
    Ok(Some(Asked { at: at.clone(), epoch: lease.epoch, seen: (lease.serial, Instant::now()) }))
}
