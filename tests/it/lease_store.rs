//! The store of the lease's simulation: one linearizable world of objects, which sees what must never be. It answers at the
//! moment a request reaches it; when that is, and whether anybody hears the answer, is the world's matter.

use std::collections::{BTreeMap, BTreeSet};
use valar::journal::lease::{Begun, Closed, Lease};

use crate::lease::N_ROWS;

/// A rule that is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mistake {
    None,
    /// Every segment that is there is read, whenever it came.
    NoEpochs,
    /// The lease is put whatever is there.
    NoFencing,
    /// Uploads of earlier holders are left alone.
    NoAbort,
    /// A deletion reaches whatever is there when it comes, not what its sender saw.
    DeletesAll,
}

pub(crate) type Version = u64;

/// What a writer tells the store.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Read,
    Count(u32),
    PutLease(Box<Lease>, Option<Version>),
    PutSegment(Closed, Vec<u32>),
    BeginUpload(String),
    CompleteUpload(String, u32),
    AbortUploads(Vec<Begun>),
    ReadJob(Vec<Closed>),
    /// Segments that were listed.
    Delete(Vec<(u32, u32)>),
}

/// What the store answers.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Lease(Option<(Box<Lease>, Version)>),
    Count(u32),
    Put(Option<Version>),
    Served,
    Rows(BTreeSet<u32>),
    /// Lost, or never sent.
    Silence,
}

#[derive(Default)]
pub(crate) struct Store {
    lease: Option<(Box<Lease>, Version)>,
    n_versions: u64,
    segments: BTreeMap<(u32, u32), Vec<u32>>,
    uploads: BTreeSet<String>,
    /// How many segments of an epoch count, once that was said.
    closed: BTreeMap<u32, u32>,
    /// The generation whose results are published: the epoch that began the job.
    published: Option<u32>,
    pub(crate) violations: Vec<String>,
}

impl Store {
    pub(crate) fn serve(&mut self, request: Request, mistake: Mistake) -> Answer {
        match request {
            Request::Read => Answer::Lease(self.lease.clone()),
            Request::Count(epoch) => Answer::Count(self.segments.keys().filter(|key| key.0 == epoch).count() as u32),
            Request::PutLease(lease, over) => {
                let is_right = self.lease.as_ref().map(|(_, version)| *version) == over;
                if !is_right && mistake != Mistake::NoFencing {
                    return Answer::Put(None);
                }
                self.check_swap(&lease, mistake);
                self.n_versions += 1;
                self.lease = Some((lease, self.n_versions));
                Answer::Put(Some(self.n_versions))
            }
            Request::PutSegment(at, rows) => {
                let new = self.segments.insert((at.epoch, at.n_segments), rows.clone());
                if new.is_some_and(|old| old != rows) {
                    self.violations.push(format!("segment {at:?} was put twice"));
                }
                Answer::Served
            }
            Request::BeginUpload(id) => {
                self.uploads.insert(id);
                Answer::Served
            }
            Request::CompleteUpload(id, generation) => {
                let there = self.uploads.remove(&id);
                if there {
                    if self.published.is_some_and(|newer| newer > generation) {
                        self.violations.push(format!("generation {generation} was published over a newer one"));
                    }
                    self.published = Some(generation);
                }
                Answer::Served
            }
            Request::AbortUploads(uploads) => {
                if mistake != Mistake::NoAbort {
                    self.uploads.retain(|id| uploads.iter().all(|begun| begun.id != *id));
                }
                Answer::Served
            }
            Request::ReadJob(closed) => Answer::Rows(self.rows(&closed, mistake)),
            Request::Delete(names) => {
                self.delete(if mistake == Mistake::DeletesAll { self.names(u32::MAX) } else { names });
                Answer::Served
            }
        }
    }

    /// Segments of these epochs and earlier ones.
    pub(crate) fn names(&self, epoch: u32) -> Vec<(u32, u32)> {
        self.segments.keys().copied().filter(|name| name.0 <= epoch).collect()
    }

    /// No segment may go that counts.
    fn delete(&mut self, names: Vec<(u32, u32)>) {
        let lease = self.lease.as_ref().map(|(lease, _)| lease).filter(|lease| lease.job.is_some());
        let counts = |&(epoch, number): &(u32, u32)| {
            lease.is_some_and(|lease| {
                let is_closed = |closed: &Closed| closed.epoch == epoch && number <= closed.n_segments;
                lease.epoch == epoch || lease.closed.iter().any(is_closed)
            })
        };
        for name in names {
            if counts(&name) && self.segments.contains_key(&name) {
                self.violations.push(format!("segment {name:?} was deleted, and counts"));
            }
            self.segments.remove(&name);
        }
    }

    /// What a lease says once it says for ever; a job that ends is complete and published.
    fn check_swap(&mut self, new: &Lease, mistake: Mistake) {
        for closed in &new.closed {
            if *self.closed.entry(closed.epoch).or_insert(closed.n_segments) != closed.n_segments {
                self.violations.push(format!("epoch {} was closed twice", closed.epoch));
            }
        }
        let Some((old, _)) = self.lease.clone() else { return };
        if (new.epoch, new.serial) <= (old.epoch, old.serial) {
            self.violations.push(format!("epoch {} went back to {}", old.epoch, new.epoch));
        }
        if let (Some(generation), None, false) = (old.job, new.job, new.held) {
            let mut all = old.closed;
            all.push(Closed { epoch: old.epoch, n_segments: u32::MAX });
            let n_rows = self.rows(&all, mistake).len();
            if n_rows != N_ROWS as usize || self.published != Some(generation) {
                let published = self.published;
                self.violations.push(format!("generation {generation} ended with {n_rows} rows, {published:?} published"));
            }
        }
    }

    /// The rows of a job's segments. No row may stand there twice.
    fn rows(&mut self, closed: &[Closed], mistake: Mistake) -> BTreeSet<u32> {
        let mut rows = BTreeSet::new();
        for (&(epoch, number), segment) in &self.segments {
            let counts = closed.iter().any(|c| c.epoch == epoch && number <= c.n_segments);
            // Who reads all of what is there must at least begin where the job began.
            let begun = closed.first().is_some_and(|first| epoch >= first.epoch);
            if counts || (mistake == Mistake::NoEpochs && begun) {
                for &row in segment {
                    if !rows.insert(row) {
                        self.violations.push(format!("row {row} counts twice"));
                    }
                }
            }
        }
        rows
    }
}
