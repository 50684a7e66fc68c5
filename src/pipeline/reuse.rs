//! A job's use of the cache that jobs share: sequences whose results are known are not run, and what is run is kept.
//! Looking up is done by whoever submits, in a file of this machine; writing by a thread of its own, so that nothing of the
//! job ever waits for another process's transaction, or for a store. Invariant: a job's outputs are the same with and without
//! it; a cache that fails is left alone, never a job.

use super::collect::Collector;
use super::progress::say;
use crate::cache::{Brought, Cache, Found, Key, PackBuilder, Packs, key, kind};
use crate::config::ReusePlace;
use crate::engine::{Finished, Submission};
use anyhow::{Context, Result};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of results that may wait to be written; what comes when there are more is not kept.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// Bytes of results that are written together, about.
const GROUP_BYTES: usize = 2 << 20;
/// A pack is put when it is full, or so long after its first result.
const PACK_TIME: Duration = Duration::from_mins(10);
/// How often that is looked at.
const TICK: Duration = Duration::from_secs(10);

/// What the writing thread is to do.
enum Task {
    Keep(Key, Finished),
    Mark(Vec<Key>),
}

/// A cache that is there.
pub(super) struct Shared {
    place: ReusePlace,
    /// Where it is in a store.
    packs: Option<Packs>,
}

impl Shared {
    /// Finds out whether the store, if it is in one, can be reached.
    pub(super) fn find(place: &ReusePlace) -> Result<Self> {
        let packs = place.store.as_ref().map(|url| Packs::new(url, place.max_bytes)).transpose()?;
        packs.iter().try_for_each(Packs::check)?;
        Ok(Self { place: place.clone(), packs })
    }
}

/// To the writing thread.
#[derive(Clone)]
struct Outbox {
    tasks: Sender<Task>,
    n_waiting: Arc<AtomicUsize>,
}

impl Outbox {
    /// Has a result kept, if there is room for it to wait.
    fn keep(&self, key: Key, finished: &Finished) {
        if self.n_waiting.load(Relaxed) < MAX_WAITING_BYTES {
            self.n_waiting.fetch_add(n_bytes(finished), Relaxed);
            // A writer that has ended keeps nothing.
            let _nobody_listens = self.tasks.send(Task::Keep(key, finished.clone()));
        }
    }
}

/// Finds results; one for each thread that submits.
pub(super) struct Lookup {
    fingerprint: String,
    cache: Cache,
    outbox: Outbox,
    /// Results of old packs go into a new one: the old are about to go.
    renews: bool,
    is_off: Arc<AtomicBool>,
}

/// What a lookup comes to.
pub(super) struct Known {
    /// Results that are known.
    pub(super) found: Vec<Finished>,
    /// What the others' results are to be kept by.
    pub(super) keys: Vec<(u64, Key)>,
}

/// Keeps results.
pub(super) struct Keeping {
    /// Of what is being run.
    keys: HashMap<u64, Key>,
    outbox: Outbox,
    is_ending: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Opens the cache for a model with this fingerprint: to keep results, and to find them on two threads. What a store has
/// is brought here first; if that fails on the way, what is here is used.
fn open(shared: Shared, fingerprint: &str, quiet: bool) -> Result<(Keeping, [Lookup; 2])> {
    let Shared { place: ReusePlace { folder, max_bytes, .. }, packs } = shared;
    let (is_off, is_ending) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (sink, lookups) = match packs {
        None => {
            let open = || Cache::open(&folder, max_bytes);
            (Sink::File(open()?), [open()?, open()?])
        }
        Some(packs) => {
            let kind = kind(fingerprint);
            let (copy, brought) = packs.bring(&folder, &kind)?;
            let renew_before = tell(brought, &packs, quiet);
            let folder = packs.copy_folder(&folder)?;
            let open = || Cache::open_copy(&folder, packs.copy_bytes(), renew_before);
            let (pack, opened) = (PackBuilder::new(max_bytes)?, [open()?, open()?]);
            let is_ending = Arc::clone(&is_ending);
            let (begun, has_failed, gives_up) = (None, false, false);
            let packing = Packing { packs, copy, kind, max_bytes, pack, begun, has_failed, is_ending, gives_up };
            (Sink::Store(Box::new(packing)), opened)
        }
    };
    let renews = matches!(sink, Sink::Store(_));
    let (tasks, inbox) = channel();
    let n_waiting = Arc::new(AtomicUsize::new(0));
    let outbox = Outbox { tasks, n_waiting: Arc::clone(&n_waiting) };
    let lookups = lookups.map(|cache| Lookup {
        fingerprint: fingerprint.to_owned(),
        cache,
        outbox: outbox.clone(),
        renews,
        is_off: Arc::clone(&is_off),
    });
    let writer = Writer { sink, n_waiting, is_off, is_ending: Arc::clone(&is_ending) };
    let thread = std::thread::Builder::new().name("cache".into());
    let thread = thread.spawn(move || writer.run(&inbox)).context("cannot start the cache's thread")?;
    Ok((Keeping { keys: HashMap::new(), outbox, is_ending, thread }, lookups))
}

/// Says what came from a store, or did not; the time before which packs there are old.
fn tell(brought: Result<Brought>, packs: &Packs, quiet: bool) -> Option<i64> {
    match brought {
        Ok(brought) => {
            brought.warnings.iter().for_each(|warning| say(&format!("warning: {warning}")));
            if brought.n_packs > 0 && !quiet {
                say(&format!("{} packs of results fetched ({} KiB)", brought.n_packs, brought.n_packed >> 10));
            }
            brought.renew_before
        }
        Err(error) => {
            say(&format!("warning: going on with what is here of the cache {}: {error:#}", packs.url()));
            None
        }
    }
}

impl Collector {
    /// Keeps results in the cache, if there is one that can be used; what the feed and the stepper find them with.
    pub(super) fn share(&mut self, shared: Option<Shared>, fingerprint: &str, quiet: bool) -> [Option<Lookup>; 2] {
        let opened = shared.and_then(|shared| open(shared, fingerprint, quiet).map_err(|error| warn(&error)).ok());
        let Some((keeping, lookups)) = opened else { return [None, None] };
        self.keeping = Some(keeping);
        lookups.map(Some)
    }
}

/// Says that the job does without.
pub(super) fn warn(error: &anyhow::Error) {
    say(&format!("warning: going on without the cache: {error:#}"));
}

/// Takes the cache's answer. One that is busy has none this time; one that fails is not asked again.
fn answer<T>(result: Result<T>, is_off: &AtomicBool) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            if !Cache::is_passing(&error) && !is_off.swap(true, Relaxed) {
                warn(&error);
            }
            None
        }
    }
}

impl Lookup {
    /// Takes out of `submissions` those whose results are known. They stay in order.
    pub(super) fn split(&self, submissions: &mut Vec<Submission>) -> Known {
        if self.is_off.load(Relaxed) {
            return Known { found: Vec::new(), keys: Vec::new() };
        }
        let mut keys: Vec<(u64, Key)> = submissions.iter().filter_map(|s| Some((s.id, key(&self.fingerprint, s)?))).collect();
        let found = answer(self.cache.get(&keys), &self.is_off).unwrap_or_default();
        self.refresh(&found, &keys);
        let mut known: Vec<u64> = found.results.iter().map(|finished| finished.id).collect();
        known.sort_unstable();
        let is_known = |id: u64| known.binary_search(&id).is_ok();
        keys.retain(|(id, _)| !is_known(*id));
        take_out(submissions, is_known);
        Known { found: found.results, keys }
    }

    /// Sees to it that results that were found do not go before others that are not used.
    fn refresh(&self, found: &Found, keys: &[(u64, Key)]) {
        if found.stale.is_empty() {
            return;
        }
        if !self.renews {
            // A writer that has ended marks nothing.
            let _nobody_listens = self.outbox.tasks.send(Task::Mark(found.stale.clone()));
            return;
        }
        let stale: HashSet<&Key> = found.stale.iter().collect();
        let stale: HashMap<u64, Key> = keys.iter().copied().filter(|(_, key)| stale.contains(key)).collect();
        for finished in &found.results {
            stale.get(&finished.id).into_iter().for_each(|key| self.outbox.keep(*key, finished));
        }
    }
}

/// Takes submissions out. What one shares with the next that is left is what all between them share.
fn take_out(submissions: &mut Vec<Submission>, is_known: impl Fn(u64) -> bool) {
    let mut shared = u32::MAX;
    for submission in submissions.iter_mut().rev() {
        shared = shared.min(submission.keep_tokens);
        if !is_known(submission.id) {
            submission.keep_tokens = shared;
            shared = u32::MAX;
        }
    }
    submissions.retain(|submission| !is_known(submission.id));
}

impl Keeping {
    /// What sequences that are about to run are to be kept by.
    pub(super) fn expect(&mut self, keys: Vec<(u64, Key)>) {
        self.keys.extend(keys);
    }

    /// Keeps a result that was computed, if there is room for it to wait.
    pub(super) fn note(&mut self, finished: &Finished) {
        let Some(key) = self.keys.remove(&finished.id) else { return };
        if finished.broken.is_none() {
            self.outbox.keep(key, finished);
        }
    }

    /// Waits until what waits is written, or until somebody else stands in the way of that. Whoever looks up must be gone.
    pub(super) fn end(self) {
        self.is_ending.store(true, Relaxed);
        drop(self.outbox);
        if self.thread.join().is_err() {
            say("warning: the cache's thread panicked; what it had not written is not kept");
        }
    }
}

/// About what a result takes.
fn n_bytes(finished: &Finished) -> usize {
    let logprobs: usize = finished.logprobs.iter().map(|entry| 32 + 8 * entry.top.len()).sum();
    128 + 4 * finished.tokens.len() + finished.text.len() + logprobs
}

/// Where results are kept.
enum Sink {
    File(Cache),
    Store(Box<Packing>),
}

/// Makes packs and puts them into a store.
struct Packing {
    packs: Packs,
    /// This machine's.
    copy: Cache,
    kind: String,
    max_bytes: u64,
    /// The next one.
    pack: PackBuilder,
    /// When it had its first result.
    begun: Option<Instant>,
    /// Whether it was said that a pack was not taken.
    has_failed: bool,
    /// Whether the job waits for this thread.
    is_ending: Arc<AtomicBool>,
    /// Whether a pack was not taken while it did: no other is tried, for each may take a store that hangs minutes.
    gives_up: bool,
}

impl Packing {
    fn add(&mut self, results: &[(Key, Finished)]) -> Result<()> {
        for (key, finished) in results {
            if self.gives_up {
                return Ok(());
            }
            self.pack.add(key, finished)?;
            if self.pack.is_full() {
                self.put()?;
            }
        }
        if !self.pack.is_empty() {
            self.begun.get_or_insert_with(Instant::now);
        }
        Ok(())
    }

    fn put_if_due(&mut self) -> Result<()> {
        if self.begun.is_some_and(|begun| begun.elapsed() > PACK_TIME) { self.put() } else { Ok(()) }
    }

    /// Puts the pack. One that the store does not take is lost; the next may be taken again, unless the job is ending.
    fn put(&mut self) -> Result<()> {
        self.begun = None;
        let pack = std::mem::replace(&mut self.pack, PackBuilder::new(self.max_bytes)?);
        if self.gives_up {
            return Ok(());
        }
        if let Err(error) = self.packs.keep(pack, &self.kind, &self.copy) {
            self.gives_up = self.is_ending.load(Relaxed);
            if !std::mem::replace(&mut self.has_failed, true) {
                say(&format!("warning: the cache {} does not take results: {error:#}", self.packs.url()));
            }
        }
        Ok(())
    }
}

/// The writing thread's.
struct Writer {
    sink: Sink,
    n_waiting: Arc<AtomicUsize>,
    is_off: Arc<AtomicBool>,
    is_ending: Arc<AtomicBool>,
}

impl Writer {
    /// Until nobody has anything to write.
    fn run(mut self, inbox: &Receiver<Task>) {
        loop {
            let first = match inbox.recv_timeout(TICK) {
                Ok(first) => Some(first),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let (mut results, mut marks, mut n_group) = (Vec::new(), Vec::new(), 0);
            let mut next = first;
            while let Some(task) = next {
                match task {
                    Task::Keep(key, finished) => {
                        n_group += n_bytes(&finished);
                        results.push((key, finished));
                    }
                    Task::Mark(keys) => marks.extend(keys),
                }
                next = if n_group < GROUP_BYTES { inbox.try_recv().ok() } else { None };
            }
            let is_kept = self.is_off.load(Relaxed) || self.keep(&results, &marks).is_some();
            if !is_kept && self.is_ending.load(Relaxed) {
                return;
            }
            self.n_waiting.fetch_sub(n_group, Relaxed);
        }
        if let Sink::Store(packing) = &mut self.sink
            && !packing.pack.is_empty()
        {
            answer(packing.put(), &self.is_off);
        }
    }

    fn keep(&mut self, results: &[(Key, Finished)], marks: &[Key]) -> Option<()> {
        let kept = match &mut self.sink {
            Sink::File(_) if results.is_empty() && marks.is_empty() => Ok(()),
            Sink::File(cache) => cache.put(results, marks),
            Sink::Store(packing) => packing.add(results).and_then(|()| packing.put_if_due()),
        };
        answer(kept, &self.is_off)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::sampling::SeqParams;
    use crate::window::Class;

    #[test]
    fn what_is_left_shares_what_all_between_shared() {
        let submission = |id: u64, keep_tokens| Submission {
            id,
            prompt: Arc::new([1; 20]),
            params: SeqParams::default(),
            class: Class::Batch,
            keep_tokens,
            stream: 0,
            due: crate::engine::Due::NEVER,
        };
        let left = |known: &[u64]| {
            let keeps = [(0, 9), (1, 4), (2, 7), (3, 5), (4, 6), (5, 3)];
            let mut submissions = keeps.map(|(id, keep)| submission(id, keep)).to_vec();
            take_out(&mut submissions, |id| known.contains(&id));
            submissions.iter().map(|s| (s.id, s.keep_tokens)).collect::<Vec<_>>()
        };
        assert_eq!(left(&[]), [(0, 9), (1, 4), (2, 7), (3, 5), (4, 6), (5, 3)]);
        assert_eq!(left(&[1, 4]), [(0, 4), (2, 7), (3, 5), (5, 3)]);
        assert_eq!(left(&[0, 1, 2, 5]), [(3, 5), (4, 3)]);
        assert_eq!(left(&[0, 1, 2, 3, 4, 5]), []);
    }
}
