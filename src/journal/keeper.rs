//! Keeps a lease: the IO of the machines in `lease`, a thread that shows a sign of life now and then, and what others want of
//! the holder. Invariant: once the lease is lost nothing more is put over it, and every later change says so.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;

use super::lease::{Ask, Changed, Claim, Claimed, Lease, Tenure, Told};
use super::{holder, segment};
use crate::storage::{Location, Storage, Version};

/// The lease's name in a job's directory.
pub(super) const LEASE: &str = "lease.json";
/// Whoever wants the holder to stop puts its epoch here.
pub(super) const CANCEL: &str = "cancel";
/// Signs of life in a lease's time, and the longest time between two.
const BEATS: u32 = 6;
const MAX_BEAT: Duration = Duration::from_secs(10);
/// Puts that may be refused one after the other, and the pause after the first; it grows with each.
const MAX_REFUSALS: u32 = 12;
const REFUSAL_PAUSE: Duration = Duration::from_millis(20);
/// How long a request for the lease may take, at least; where it is tried again, for how long in all.
const MIN_LIMIT: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_mins(15);
/// How often is looked for a wish to stop, where no sign of life is needed.
const LOOK: Duration = Duration::from_millis(500);

/// Another run is at this job.
#[derive(Debug, thiserror::Error)]
pub enum Apart {
    /// It was there first.
    #[error("another run is at this job: {0}; --if-running=wait waits for its end")]
    Busy(String),
    /// It has taken this run for dead.
    #[error("another run has taken this job over: this one was silent for too long; what it committed before counts")]
    TakenOver,
}

/// The directory and how its lease is changed.
#[derive(Debug, Clone)]
pub(super) struct Root {
    pub(super) storage: Storage,
    pub(super) at: Location,
    /// Whether the lease changes by compare-and-swap; else something else keeps others away.
    pub(super) swaps: bool,
}

/// `None` where nothing is compared.
pub(super) type LeaseVersion = Option<Version>;

impl Root {
    pub(super) fn read(&self) -> Result<Option<(Box<Lease>, LeaseVersion)>> {
        let at = self.at.child(LEASE)?;
        let Some((text, version)) = self.storage.get_version(&at)? else { return Ok(None) };
        let lease = Lease::parse(&text)
            .with_context(|| format!("{} is damaged, or of another valar; --restart begins the job anew", at.url))?;
        Ok(Some((lease, Some(version))))
    }

    /// Does what a machine asks.
    fn answer(&self, ask: Ask<LeaseVersion>) -> Result<Told<LeaseVersion>> {
        Ok(match ask {
            Ask::Read => {
                let found = self.read()?;
                let is_dead = found.as_ref().is_some_and(|(lease, _)| holder::is_dead(&lease.holder));
                Told::Found(found, is_dead)
            }
            Ask::Count(epoch) => Told::Counted(self.count(epoch)?),
            Ask::Put(lease, over) => self.put(&lease, over.flatten().as_ref())?,
            Ask::Wait(time) => {
                std::thread::sleep(time);
                Told::Nothing
            }
        })
    }

    /// How many segments of an epoch there are.
    pub(super) fn count(&self, epoch: u32) -> Result<u32> {
        let names = self.storage.list(&self.at)?;
        let ids = names.iter().filter_map(|name| segment::id_of(name)).filter(|id| id.epoch == epoch);
        Ok(ids.map(|id| id.number).max().unwrap_or(0))
    }

    /// Removes what an epoch put after somebody else had begun another: it does not count, and nobody knows of it.
    fn remove_late(&self, epoch: u32) -> Result<()> {
        let Some((lease, _)) = self.read()? else { return Ok(()) };
        if lease.epoch <= epoch {
            return Ok(());
        }
        let n_counted = lease.closed.iter().find(|closed| closed.epoch == epoch).map_or(0, |closed| closed.n_segments);
        for name in self.storage.list(&self.at)? {
            if segment::id_of(&name).is_some_and(|id| id.epoch == epoch && id.number > n_counted) {
                self.storage.delete(&self.at.child(&name)?)?;
            }
        }
        Ok(())
    }

    fn put(&self, lease: &Lease, over: Option<&Version>) -> Result<Told<LeaseVersion>> {
        let at = self.at.child(LEASE)?;
        let mut text = serde_json::to_vec_pretty(lease).expect("strings and numbers are JSON");
        text.push(b'\n');
        if !self.swaps {
            self.storage.put(&at, Bytes::from(text))?;
            return Ok(Told::Done(None));
        }
        let put = self.storage.put_over(&at, &Bytes::from(text), over)?;
        Ok(put.map_or(Told::Unsure, |version| Told::Done(Some(version))))
    }

    /// Puts a lease over one that can't be read.
    pub(super) fn replace_damaged(&self, lease: &Lease) -> Result<()> {
        let found = self.storage.get_version(&self.at.child(LEASE)?)?;
        self.put(lease, found.map(|(_, version)| version).as_ref()).map(drop)
    }

    /// Whether the store compares before it swaps, tried with the lease itself, which is there.
    pub(super) fn is_honoured(&self) -> Result<bool> {
        let at = self.at.child(LEASE)?;
        let content = self.storage.get(&at)?;
        content.map_or(Ok(true), |content| self.storage.keeps_conditions(&at, &content))
    }

    /// Gets the lease, or says who has it.
    pub(super) fn claim(&self, mut claim: Claim<LeaseVersion>) -> Result<Tenure<LeaseVersion>> {
        let start = Instant::now();
        let mut told = Told::Nothing;
        let mut refusals = Refusals::default();
        loop {
            match claim.next(start.elapsed(), told) {
                Claimed::Asks(ask) => told = refusals.note(self.answer(ask)?, self)?,
                Claimed::Held(tenure) => return Ok(*tenure),
                Claimed::Busy(lease) => return Err(Apart::Busy(shown(&lease)).into()),
            }
        }
    }
}

/// Puts that were refused one after the other: a few are others who want the same, many a store that never takes one.
#[derive(Default)]
struct Refusals(u32);

impl Refusals {
    /// Pauses after each, and gives up after too many.
    fn note(&mut self, told: Told<LeaseVersion>, root: &Root) -> Result<Told<LeaseVersion>> {
        if let Told::Unsure = told {
            self.0 += 1;
            ensure!(
                self.0 <= MAX_REFUSALS,
                "{}: the store refuses to replace {LEASE} on a condition that holds; \
                 if only one run is at this job, say --unguarded",
                root.at.url
            );
            std::thread::sleep(REFUSAL_PAUSE * self.0);
        }
        Ok(told)
    }
}

/// A lease's holder, for people.
pub(super) fn shown(lease: &Lease) -> String {
    format!("process {} on {}", lease.holder.pid, lease.holder.host)
}

/// What became of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is held.
    Held,
    /// Somebody else has it.
    Lost,
    /// Somebody wants its holder to stop.
    Cancelled,
}

/// A held lease.
pub(super) struct Keeper {
    kept: Arc<Kept>,
    /// Ends the thread when dropped.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("kept", &self.kept).finish_non_exhaustive()
    }
}

/// What the thread and the job's own threads share.
#[derive(Debug)]
pub(super) struct Kept {
    root: Root,
    /// The same for requests of which none may take longer than `limit`.
    hurried: Root,
    limit: Duration,
    tenure: Mutex<Tenure<LeaseVersion>>,
    standing: AtomicU8,
}

impl Kept {
    fn tenure(&self) -> MutexGuard<'_, Tenure<LeaseVersion>> {
        self.tenure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the lease; returns when the store has it.
    pub(super) fn change(&self, change: impl Fn(&mut Lease)) -> Result<()> {
        if !self.root.swaps {
            return self.change_by(&self.root, change);
        }
        // In short tries: while one hangs, no sign of life can be shown.
        let start = Instant::now();
        loop {
            let tried = Instant::now();
            let ended = self.change_by(&self.hurried, &change);
            let is_over = ended.is_ok() || self.standing() == Standing::Lost;
            if is_over || tried.elapsed() < self.limit || start.elapsed() > PATIENCE {
                return ended;
            }
        }
    }

    fn change_by(&self, root: &Root, change: impl FnOnce(&mut Lease)) -> Result<()> {
        let mut tenure = self.tenure();
        if self.standing() == Standing::Lost {
            return Err(Apart::TakenOver.into());
        }
        let mut step = tenure.change(change);
        let mut refusals = Refusals::default();
        loop {
            match step {
                Changed::Asks(ask) => step = tenure.next(refusals.note(root.answer(ask)?, root)?),
                Changed::Done => return Ok(()),
                Changed::Lost => {
                    self.standing.store(Standing::Lost as u8, Ordering::Relaxed);
                    return Err(Apart::TakenOver.into());
                }
            }
        }
    }

    fn standing(&self) -> Standing {
        match self.standing.load(Ordering::Relaxed) {
            lost if lost == Standing::Lost as u8 => Standing::Lost,
            cancelled if cancelled == Standing::Cancelled as u8 => Standing::Cancelled,
            _ => Standing::Held,
        }
    }

    /// Looks whether somebody wants this epoch to stop.
    fn look(&self, root: &Root, epoch: u32) -> Result<()> {
        let wish = root.storage.get(&root.at.child(CANCEL)?)?;
        if wish.is_some_and(|wish| wish == epoch.to_string()) && self.standing() == Standing::Held {
            self.standing.store(Standing::Cancelled as u8, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Keeper {
    /// Begins to show signs of life.
    pub(super) fn start(root: Root, tenure: Tenure<LeaseVersion>) -> Result<Self> {
        // Where a lock keeps others away, nobody looks for signs of life.
        let beats = root.swaps || root.at.is_remote();
        let beat = if beats { (Duration::from_millis(tenure.lease().lease_ms) / BEATS).min(MAX_BEAT) } else { LOOK };
        let epoch = tenure.lease().epoch;
        // A sign of life must not wait for a request that hangs: there is time for some tries before others give up waiting.
        let limit = beat.max(MIN_LIMIT);
        let hurried = Root { storage: root.storage.clone().hurried(limit), ..root.clone() };
        let (tenure, standing) = (Mutex::new(tenure), AtomicU8::new(Standing::Held as u8));
        let kept = Arc::new(Kept { root, hurried: hurried.clone(), limit, tenure, standing });
        let (stop, stopped) = channel();
        let shared = Arc::clone(&kept);
        let thread = std::thread::Builder::new().name("lease".into()).spawn(move || {
            while stopped.recv_timeout(beat) == Err(RecvTimeoutError::Timeout) {
                // A store that can't be reached now may be later: until then nobody else can take over either, and whoever
                // commits hears of it.
                let mut shown = !beats || shared.change_by(&hurried, |_| {}).is_ok();
                if !shown && shared.standing() != Standing::Lost {
                    shown = shared.change_by(&hurried, |_| {}).is_ok();
                }
                if shown {
                    let _tried_again_soon = shared.look(&hurried, epoch);
                }
                if shared.standing() == Standing::Lost {
                    return;
                }
            }
        });
        Ok(Self { kept, stop: Some(stop), thread: Some(thread.context("cannot start the thread that keeps the lease")?) })
    }

    pub(super) fn kept(&self) -> &Arc<Kept> {
        &self.kept
    }

    pub(super) fn lease(&self) -> Lease {
        self.kept.tenure().lease().clone()
    }

    pub(super) fn standing(&self) -> Standing {
        self.kept.standing()
    }

    /// Ends without a word, for a directory that is removed as a whole.
    pub(super) fn end(mut self) {
        self.end_thread();
        self.kept.standing.store(Standing::Lost as u8, Ordering::Relaxed);
    }

    fn end_thread(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It has no results, and a panic in it was shown.
            let _nothing = thread.join();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end_thread();
        if self.standing() == Standing::Lost {
            let _best_effort = self.kept.root.remove_late(self.lease().epoch);
            return;
        }
        // If this fails, the next run finds a silent holder, and waits a little.
        let _best_effort = self.kept.change(|lease| lease.held = false);
    }
}
