//! A job's use of the cache that jobs share: sequences whose results are known are not run, and what is run is kept.
//! Looking up is done by whoever submits; writing by a thread of its own, so that nothing of the job ever waits for another
//! process's transaction. Invariant: a job's outputs are the same with and without it; a cache that fails is left alone,
//! never a job.

use super::collect::Collector;
use super::progress::say;
use crate::cache::{Cache, Key, key};
use crate::config::ReusePlace;
use crate::engine::{Finished, Submission};
use anyhow::{Context, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// Bytes of results that may wait to be written; what comes when there are more is not kept.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// Bytes of results that are written together, about.
const GROUP_BYTES: usize = 2 << 20;

/// What the writing thread is to do.
enum Task {
    Keep(Key, Finished),
    Mark(Vec<Key>),
}

/// Finds results; one for each thread that submits.
pub(super) struct Lookup {
    fingerprint: String,
    cache: Cache,
    tasks: Sender<Task>,
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
    tasks: Sender<Task>,
    n_waiting: Arc<AtomicUsize>,
    is_ending: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Opens the cache in a folder, for a model with this fingerprint: to keep results, and to find them on two threads.
fn open(place: &ReusePlace, fingerprint: &str) -> Result<(Keeping, [Lookup; 2])> {
    let open = || Cache::open(&place.folder, place.max_bytes);
    let (tasks, inbox) = channel();
    let (is_off, is_ending) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let n_waiting = Arc::new(AtomicUsize::new(0));
    let lookup = || {
        let (fingerprint, tasks, is_off) = (fingerprint.to_owned(), tasks.clone(), Arc::clone(&is_off));
        anyhow::Ok(Lookup { fingerprint, cache: open()?, tasks, is_off })
    };
    let lookups = [lookup()?, lookup()?];
    let writer = Writer { cache: open()?, n_waiting: Arc::clone(&n_waiting), is_off, is_ending: Arc::clone(&is_ending) };
    let thread = std::thread::Builder::new().name("cache".into());
    let thread = thread.spawn(move || writer.run(&inbox)).context("cannot start the cache's thread")?;
    Ok((Keeping { keys: HashMap::new(), tasks, n_waiting, is_ending, thread }, lookups))
}

impl Collector {
    /// Keeps results in the cache, if there is one that can be used; what the feed and the stepper find them with.
    pub(super) fn share(&mut self, place: Option<&ReusePlace>, fingerprint: &str) -> [Option<Lookup>; 2] {
        let opened = place.and_then(|place| open(place, fingerprint).map_err(|error| warn(&error)).ok());
        let Some((keeping, lookups)) = opened else { return [None, None] };
        self.keeping = Some(keeping);
        lookups.map(Some)
    }
}

fn warn(error: &anyhow::Error) {
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
        if !found.stale.is_empty() {
            // A writer that has ended marks nothing.
            let _nobody_listens = self.tasks.send(Task::Mark(found.stale));
        }
        let mut known: Vec<u64> = found.results.iter().map(|finished| finished.id).collect();
        known.sort_unstable();
        let is_known = |id: u64| known.binary_search(&id).is_ok();
        keys.retain(|(id, _)| !is_known(*id));
        take_out(submissions, is_known);
        Known { found: found.results, keys }
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
        if finished.broken.is_none() && self.n_waiting.load(Relaxed) < MAX_WAITING_BYTES {
            self.n_waiting.fetch_add(n_bytes(finished), Relaxed);
            // A writer that has ended keeps nothing.
            let _nobody_listens = self.tasks.send(Task::Keep(key, finished.clone()));
        }
    }

    /// Waits until what waits is written, or until somebody else stands in the way of that. Whoever looks up must be gone.
    pub(super) fn end(self) {
        self.is_ending.store(true, Relaxed);
        drop(self.tasks);
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

/// The writing thread's.
struct Writer {
    cache: Cache,
    n_waiting: Arc<AtomicUsize>,
    is_off: Arc<AtomicBool>,
    is_ending: Arc<AtomicBool>,
}

impl Writer {
    /// Until nobody has anything to write.
    fn run(self, inbox: &Receiver<Task>) {
        while let Ok(first) = inbox.recv() {
            let (mut results, mut marks, mut n_group) = (Vec::new(), Vec::new(), 0);
            let mut next = Some(first);
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
            let is_kept = !self.is_off.load(Relaxed) && answer(self.cache.put(&results, &marks), &self.is_off).is_some();
            if !is_kept && self.is_ending.load(Relaxed) {
                return;
            }
            self.n_waiting.fetch_sub(n_group, Relaxed);
        }
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
