//! Who may write a job: the lease, one small object that changes by compare-and-swap alone, and the two machines that
//! change it. Knows no store and no clock: whoever drives a machine does what it asks and says what came of it, so that
//! the same code runs against stores and in a simulation (`tests/it/lease.rs`).
//!
//! Invariants, whatever stalls, is lost or comes late:
//! - an epoch has one holder, and epochs only grow;
//! - which segments of an epoch count is written down by the swap that ends it, and never grows after that: what a writer
//!   that was taken for dead puts later, nobody reads;
//! - an upload is in the lease before it has a part, so that the next holder can break it off before it does anything.
//!
//! No two versions of a lease have the same content (a store's version tags may be hashes of it).

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The job's root object, as it stands in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Counts the holders, from 1.
    pub epoch: u32,
    /// Counts the versions of this epoch: a holder that lives makes new ones.
    pub serial: u64,
    /// Whether somebody holds it; else the epoch has ended in good order.
    pub held: bool,
    /// Who holds or held it.
    pub holder: Holder,
    /// After so much silence a holder counts as dead, milliseconds.
    pub lease_ms: u64,
    /// The epoch that began the job under way, whose manifest it is; `None` if none is.
    pub job: Option<u32>,
    /// The ended epochs of the job under way and how many segments of each count, oldest first.
    pub closed: Vec<Closed>,
    /// Uploads that were begun and may be unfinished.
    pub uploads: Vec<Begun>,
    /// Errors that earlier epochs than this one journaled do not count: their rows are to be run again.
    #[serde(default)]
    pub errors_from: u32,
}

/// An epoch that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// Which.
    pub epoch: u32,
    /// Its segments that count: the first so many.
    pub n_segments: u32,
}

/// An upload that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// The path in the store.
    pub path: String,
    /// What the store calls it.
    pub id: String,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Unlike that of any other process.
    pub token: String,
    /// Its machine's name.
    pub host: String,
    /// Its number there.
    pub pid: u32,
    /// What tells its machine, as long as it runs, and its process from others with that number; empty where the system
    /// does not say.
    pub process: String,
}

/// What a run does that finds another one at its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum IfRunning {
    /// End, and say so.
    #[default]
    Leave,
    /// Wait until it ends.
    Wait,
    /// Take the job over at once: for whoever knows that the other run is dead.
    TakeOver,
}

/// Far more epochs than a job can have; what is over it is damage.
pub(super) const MAX_EPOCH: u32 = u32::MAX / 2;

impl Lease {
    /// Of its text in the store.
    pub(super) fn parse(text: &[u8]) -> serde_json::Result<Box<Self>> {
        let lease: Box<Self> = serde_json::from_slice(text)?;
        if lease.epoch > MAX_EPOCH {
            let damage = format!("epoch {} is over the limit of {MAX_EPOCH}", lease.epoch);
            return Err(serde::de::Error::custom(damage));
        }
        Ok(lease)
    }

    /// A job's first.
    pub fn first(holder: Holder, lease_ms: u64) -> Self {
        let (closed, uploads) = (Vec::new(), Vec::new());
        Self { epoch: 1, serial: 0, held: true, holder, lease_ms, job: None, closed, uploads, errors_from: 0 }
    }

    /// The next epoch's first version, if `n_segments` of this one count.
    #[must_use]
    pub fn next(&self, n_segments: u32, holder: Holder, lease_ms: u64) -> Self {
        let mut closed = self.closed.clone();
        if self.job.is_some() && n_segments > 0 {
            closed.push(Closed { epoch: self.epoch, n_segments });
        }
        let (epoch, uploads) = (self.epoch + 1, self.uploads.clone());
        let (job, errors_from) = (self.job, self.errors_from);
        Self { epoch, serial: 0, held: true, holder, lease_ms, job, closed, uploads, errors_from }
    }

    /// Whether both are versions of one holder's tenure.
    fn is_of(&self, other: &Self) -> bool {
        self.epoch == other.epoch && self.holder.token == other.holder.token
    }
}

/// What a machine wants done. `V` is what a store calls a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask<V> {
    /// Read the lease.
    Read,
    /// Count the segments of an epoch that are there now.
    Count(u32),
    /// Put this lease if the object's version is still that one; if there is none, with `None`.
    Put(Box<Lease>, Option<V>),
    /// Let time pass.
    Wait(Duration),
}

/// What came of it.
#[derive(Debug, Clone)]
pub enum Told<V> {
    /// Nothing was asked yet, or time passed.
    Nothing,
    /// The lease and its version; whether its holder is known to be dead.
    Found(Option<(Box<Lease>, V)>, bool),
    /// So many segments.
    Counted(u32),
    /// It was put: the new version.
    Done(V),
    /// It was refused, or nobody knows.
    Unsure,
}

/// Where a claim stands.
#[derive(Debug)]
pub enum Claimed<V> {
    /// It wants something.
    Asks(Ask<V>),
    /// The lease is held by the caller.
    Held(Box<Tenure<V>>),
    /// Somebody else is at the job.
    Busy(Box<Lease>),
}

/// How often a lease that somebody holds is looked at, in parts of its time, and the longest time between two looks.
const LOOKS: u32 = 8;
const MAX_LOOK: Duration = Duration::from_secs(5);

/// Tries to get the lease.
#[derive(Debug)]
pub struct Claim<V> {
    me: Holder,
    lease_ms: u64,
    if_running: IfRunning,
    /// Epoch and serial of the last version that was seen, and when first.
    watched: Option<((u32, u64), Duration)>,
    /// Whose segments are being counted.
    found: Option<(Box<Lease>, V)>,
    /// What may have been put.
    wanted: Option<Box<Lease>>,
}

impl<V: Clone> Claim<V> {
    /// Of a process that will hold it for `lease_ms` after each sign of life.
    pub fn new(me: Holder, lease_ms: u64, if_running: IfRunning) -> Self {
        Self { me, lease_ms, if_running, watched: None, found: None, wanted: None }
    }

    /// Goes on; `now` is the time of a clock of this process that nobody sets.
    pub fn next(&mut self, now: Duration, told: Told<V>) -> Claimed<V> {
        match told {
            Told::Nothing | Told::Unsure => Claimed::Asks(Ask::Read),
            Told::Found(found, is_dead) => self.find(now, found, is_dead),
            Told::Counted(n_segments) => {
                let (lease, version) = self.found.take().expect("counting follows finding");
                let wanted = Box::new(lease.next(n_segments, self.me.clone(), self.lease_ms));
                self.put(wanted, Some(version))
            }
            Told::Done(version) => {
                let lease = *self.wanted.take().expect("something was put");
                Claimed::Held(Box::new(Tenure { lease, version, wanted: None }))
            }
        }
    }

    fn find(&mut self, now: Duration, found: Option<(Box<Lease>, V)>, is_dead: bool) -> Claimed<V> {
        let Some((lease, version)) = found else {
            let first = Box::new(Lease::first(self.me.clone(), self.lease_ms));
            return self.put(first, None);
        };
        // A put whose answer was lost, or that was refused because it had been done.
        if self.wanted.as_ref().is_some_and(|wanted| wanted.is_of(&lease)) {
            self.wanted = None;
            return Claimed::Held(Box::new(Tenure { lease: *lease, version, wanted: None }));
        }
        if lease.held && !is_dead && self.if_running != IfRunning::TakeOver {
            let silence = Duration::from_millis(lease.lease_ms);
            let (sign, pause) = ((lease.epoch, lease.serial), (silence / LOOKS).min(MAX_LOOK));
            match self.watched {
                Some((seen, since)) if seen == sign => {
                    // A quarter more than it asks for, since clocks run differently fast.
                    if now.saturating_sub(since) < silence + silence / 4 {
                        return Claimed::Asks(Ask::Wait(pause));
                    }
                }
                Some(_) if self.if_running == IfRunning::Leave => return Claimed::Busy(lease),
                _ => {
                    self.watched = Some((sign, now));
                    return Claimed::Asks(Ask::Wait(pause));
                }
            }
        }
        let epoch = lease.epoch;
        self.found = Some((lease, version));
        Claimed::Asks(Ask::Count(epoch))
    }

    fn put(&mut self, lease: Box<Lease>, over: Option<V>) -> Claimed<V> {
        self.wanted = Some(lease.clone());
        Claimed::Asks(Ask::Put(lease, over))
    }
}

/// A lease that is held.
#[derive(Debug, Clone)]
pub struct Tenure<V> {
    lease: Lease,
    version: V,
    /// What may have been put.
    wanted: Option<Box<Lease>>,
}

/// Where a change of a held lease stands.
#[derive(Debug)]
pub enum Changed<V> {
    /// It wants something.
    Asks(Ask<V>),
    /// It is done.
    Done,
    /// Somebody else holds the lease now.
    Lost,
}

impl<V: Clone> Tenure<V> {
    /// As it was last known to stand in the store.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Begins a change; one that changes nothing is a sign of life.
    pub fn change(&mut self, change: impl FnOnce(&mut Lease)) -> Changed<V> {
        let mut wanted = Box::new(self.lease.clone());
        change(&mut wanted);
        wanted.serial = 1 + self.wanted.as_ref().map_or(self.lease.serial, |unsure| unsure.serial.max(self.lease.serial));
        self.wanted = Some(wanted.clone());
        Changed::Asks(Ask::Put(wanted, Some(self.version.clone())))
    }

    /// Goes on with a change.
    pub fn next(&mut self, told: Told<V>) -> Changed<V> {
        match (told, self.wanted.take()) {
            (Told::Done(version), Some(wanted)) => {
                (self.lease, self.version) = (*wanted, version);
                Changed::Done
            }
            (Told::Found(Some((lease, version)), _), wanted) if lease.is_of(&self.lease) => {
                (self.lease, self.version) = (*lease, version);
                match wanted {
                    // It was put after all.
                    Some(wanted) if wanted.serial == self.lease.serial => Changed::Done,
                    // It was not, or an older one came late: again, over what is there.
                    Some(mut wanted) => {
                        wanted.serial = 1 + wanted.serial.max(self.lease.serial);
                        self.wanted = Some(wanted.clone());
                        Changed::Asks(Ask::Put(wanted, Some(self.version.clone())))
                    }
                    None => Changed::Done,
                }
            }
            // Another holder, or whoever removed the job.
            (Told::Found(..), _) => Changed::Lost,
            (_, wanted) => {
                self.wanted = wanted;
                Changed::Asks(Ask::Read)
            }
        }
    }
}
