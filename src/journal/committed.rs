//! The results that a job has committed so far, in the order in which that was done. Nothing is claimed and nothing changed.
//! Invariant: the results of a later look begin with those of an earlier one, whoever went on with the job meanwhile.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use bytes::Bytes;

use super::lease::Closed;
use super::overview::{lease_in, manifest_of};
use super::segment::{self, Line, SegmentId};
use super::{Noted, RowSet, Totals};
use crate::storage::{Location, Storage};

/// Results that were committed.
#[derive(Debug)]
pub struct Committed {
    storage: Storage,
    at: Location,
    /// Fingerprint of the job.
    job: String,
    /// The segments, each with the number of its results.
    segments: Vec<(SegmentId, u64)>,
}

/// Those of the job that is under way in a directory; `None` if none is.
pub fn committed(storage: &Storage, at: &Location) -> Result<Option<Committed>> {
    let Some(lease) = lease_in(storage, at)? else { return Ok(None) };
    let Some(manifest) = manifest_of(storage, at, &lease)? else { return Ok(None) };
    let own = Closed { epoch: lease.epoch, n_segments: super::overview::n_segments(storage, at, lease.epoch)? };
    let mut segments = Vec::new();
    for closed in lease.closed.iter().chain([&own]) {
        for number in 1..=closed.n_segments {
            let id = SegmentId { epoch: closed.epoch, number };
            let end = storage.get_end(&at.child(&segment::name_of(id))?, segment::SEAL_BYTES)?;
            // A damaged one does not count, and the next run says so.
            let (rows, failed) = segment::counts(&end, &manifest.job_fingerprint).unwrap_or_default();
            segments.push((id, rows - failed));
        }
    }
    Ok(Some(Committed { storage: storage.clone(), at: at.clone(), job: manifest.job_fingerprint, segments }))
}

impl Committed {
    /// How many results there are.
    pub fn n_lines(&self) -> u64 {
        self.segments.iter().map(|(_, n_lines)| n_lines).sum()
    }

    /// Hands out the lines after the first `skip`, a segment's at a time, each with its line feed; until `each` has enough.
    ///
    /// # Errors
    /// A segment that can't be read, or was removed meanwhile.
    pub fn read(&self, mut skip: u64, each: &mut dyn FnMut(Vec<u8>) -> bool) -> Result<()> {
        for (id, n_lines) in &self.segments {
            if skip >= *n_lines {
                skip -= n_lines;
                continue;
            }
            let mut lines = Vec::new();
            let verified = self.segment(*id)?;
            for entry in segment::entries(&verified)? {
                let Line::Record(record) = entry?.line else { continue };
                if !record.ok {
                    continue;
                }
                if skip > 0 {
                    skip -= 1;
                } else {
                    lines.extend_from_slice(record.line.as_bytes());
                    lines.push(b'\n');
                }
            }
            if !each(lines) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn segment(&self, id: SegmentId) -> Result<Bytes> {
        let at = self.at.child(&segment::name_of(id))?;
        let content = self.storage.get(&at)?.with_context(|| format!("{} is gone", at.url))?;
        segment::verify(&content, &self.job).with_context(|| at.url.to_string())
    }

    /// Publishes what was committed as the files of a job that will not be gone on with: what it came to. Writes nothing if that
    /// is nothing.
    ///
    /// # Errors
    /// The store's.
    pub fn publish(&self, results: &Location, errors: &Location) -> Result<Totals> {
        let (mut totals, mut rows) = (Totals::default(), RowSet::default());
        let mut files = [results, errors].map(|at| self.storage.upload(at));
        for &(id, _) in &self.segments {
            let verified = match self.segment(id) {
                // What its writer was killed in.
                Err(error) if error.is::<segment::Damaged>() => continue,
                segment => segment?,
            };
            for entry in segment::entries(&verified)? {
                let segment::Entry { line: Line::Record(record), bytes } = entry? else { continue };
                // A row's first outcome counts.
                if rows.insert(record.row) {
                    writeln!(files[usize::from(!record.ok)], "{}", record.line)?;
                    totals.add(&Noted::new(&record, bytes));
                }
            }
        }
        if !rows.is_empty() {
            for file in files {
                file.publish()?;
            }
        }
        Ok(totals)
    }
}
