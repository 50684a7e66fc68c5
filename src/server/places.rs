//! Which batches run at a time, and which wait. Invariants: of those that want the same model, the ones that are due first run;
//! one that comes later and is due sooner takes the place of one that has more time; of those that are due at the same time, no
//! owner's keep all places while another's wait; a place that is given up goes on.

use crate::window::turns::{Share, Turns};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Batches that run at a time, of a model; more would only share the machine.
const N_RUNNING: usize = 2;

/// When a batch is due, when it expires, and its name.
type Key = (u64, u64, String);
/// Asks a batch to leave its place.
type Ask = Box<dyn Fn() + Send>;

/// What batches are due by, in parts of their window: what is only just done in time is done too late when a row takes longer than
/// others, and what is due at nearly the same time is due together, so that owners take turns.
const DUE_PARTS: u64 = 20;

/// When a batch is due that was accepted then and expires then, all unix seconds: a twentieth to a tenth of its window before.
pub(super) fn due(created_at: u64, expires_at: u64) -> u64 {
    let part = (expires_at.saturating_sub(created_at) / DUE_PARTS).max(1);
    expires_at.saturating_sub(part) / part * part
}

/// See the module.
#[derive(Default)]
pub(super) struct Places(Mutex<HashMap<String, Queue>>);

/// Of a model.
#[derive(Default)]
struct Queue {
    running: BTreeMap<Key, Running>,
    waiting: BTreeMap<Key, Waiting>,
    turns: Turns,
}

struct Running {
    ask: Ask,
    is_asked: bool,
    share: Share,
}

struct Waiting {
    ask: Ask,
    share: Share,
    bell: oneshot::Sender<()>,
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Queue>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wants a place: rings when it has one, which may be at once. `ask` is called when another should have it.
    pub(super) fn enter(&self, model: &str, (key, share): (Key, Share), ask: Ask) -> oneshot::Receiver<()> {
        let (bell, rung) = oneshot::channel();
        let mut queues = self.lock();
        let queue = queues.entry(model.to_owned()).or_default();
        if let Some(other) = queue.in_the_way_of(&key, share) {
            other.is_asked = true;
            (other.ask)();
        }
        queue.waiting.insert(key, Waiting { ask, share, bell });
        queue.fill();
        rung
    }

    /// Has no place any more, and waits for none.
    pub(super) fn leave(&self, model: &str, key: &Key) {
        if let Some(queue) = self.lock().get_mut(model) {
            if let Some(left) = queue.running.remove(key).filter(|left| left.is_asked) {
                queue.turns.give_back(left.share, 1);
            }
            queue.waiting.remove(key);
            queue.fill();
        }
    }
}

impl Queue {
    /// How many of an owner's run and are to stay.
    fn n_running(&self, share: Share) -> usize {
        self.running.values().filter(|running| !running.is_asked && running.share.owner == share.owner).count()
    }

    /// The one that leaves so that this one runs: the one with most time, if that is more than this one has; if it is as much, one
    /// whose owner has another, where this one's has none.
    fn in_the_way_of(&mut self, key: &Key, share: Share) -> Option<&mut Running> {
        if self.running.len() < N_RUNNING {
            return None;
        }
        let is_later = |(other, running): &(&Key, &Running)| {
            let has_more = || self.n_running(running.share) > 1 + self.n_running(share);
            !running.is_asked && (other.0 > key.0 || (other.0 == key.0 && has_more()))
        };
        let last = self.running.iter().rev().find(is_later)?.0.clone();
        self.running.get_mut(&last)
    }

    /// Gives places to those that wait: what is due first, then whose owner has fewest, then by turns.
    fn fill(&mut self) {
        while self.running.len() < N_RUNNING {
            let order = |key: &Key, share| (key.0, self.n_running(share), self.turns.next(share));
            let next = self.waiting.iter().min_by_key(|(key, waiting)| (order(key, waiting.share), *key));
            let Some((key, Waiting { ask, share, bell })) =
                next.map(|(key, _)| key.clone()).and_then(|key| self.waiting.remove_entry(&key))
            else {
                return;
            };
            // Who does not wait any more needs none.
            if bell.send(()).is_ok() {
                let at = self.turns.take(share, 1);
                self.turns.pass(share, at);
                self.running.insert(key, Running { ask, is_asked: false, share });
            }
        }
    }
}

/// A place, or the wait for one, that is given back.
pub(super) struct Place<'a> {
    pub(super) places: &'a Places,
    pub(super) model: &'a str,
    pub(super) key: Key,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.places.leave(self.model, &self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    /// A batch that leaves when it is asked.
    struct Batch {
        key: Key,
        share: Share,
        is_asked: Arc<AtomicBool>,
        rung: Option<oneshot::Receiver<()>>,
        is_running: bool,
    }

    impl Batch {
        fn enter(&mut self, places: &Places) {
            let is_asked = Arc::clone(&self.is_asked);
            let ask = Box::new(move || is_asked.store(true, SeqCst));
            self.rung = Some(places.enter("model", (self.key.clone(), self.share), ask));
        }

        fn look(&mut self) {
            if self.rung.as_mut().is_some_and(|rung| rung.try_recv().is_ok()) {
                (self.is_running, self.rung) = (true, None);
            }
        }
    }

    fn batch(due: u64, owner: u32, number: usize) -> Batch {
        let (key, share) = ((due, due, format!("{number:03}")), Share { owner, weight: 1 });
        Batch { key, share, is_asked: Arc::default(), rung: None, is_running: false }
    }

    /// Those that are asked leave, and wait again.
    fn settle(places: &Places, batches: &mut [Batch]) {
        for _ in 0..batches.len() {
            batches.iter_mut().for_each(Batch::look);
            for batch in &mut *batches {
                if batch.is_running && batch.is_asked.swap(false, SeqCst) {
                    batch.is_running = false;
                    places.leave("model", &batch.key);
                    batch.enter(places);
                }
            }
        }
        batches.iter_mut().for_each(Batch::look);
    }

    proptest! {
        /// Whoever comes and goes when: once those that were asked have left, the ones that are due first run; and of those that are
        /// due together, none waits while another owner's have all places.
        #[test]
        fn those_that_are_due_first_run(steps in prop::collection::vec((0..9_u64, 0..3_u32, prop::bool::weighted(0.3)), 1..60)) {
            let (places, mut batches) = (Places::default(), Vec::<Batch>::new());
            for (i, (due, owner, ends)) in steps.into_iter().enumerate() {
                if ends && !batches.is_empty() {
                    let gone = batches.swap_remove(due as usize % batches.len());
                    drop(gone.rung);
                    places.leave("model", &gone.key);
                } else {
                    let mut new = batch(due, owner, i);
                    new.enter(&places);
                    batches.push(new);
                }
                settle(&places, &mut batches);
                let (running, waiting): (Vec<&Batch>, Vec<&Batch>) = batches.iter().partition(|batch| batch.is_running);
                let latest_running = running.iter().map(|batch| batch.key.0).max();
                prop_assert_eq!(running.len(), batches.len().min(N_RUNNING));
                for other in waiting {
                    prop_assert!(latest_running <= Some(other.key.0));
                    let is_same = |batch: &&&Batch| batch.key.0 == other.key.0;
                    let has_all = running.iter().filter(is_same).count() == N_RUNNING
                        && running.iter().all(|batch| batch.share.owner == running[0].share.owner);
                    prop_assert!(!has_all || other.share.owner == running[0].share.owner);
                }
            }
        }
    }

    #[test]
    fn owners_have_places_in_turn() {
        let places = Places::default();
        let mut batches: Vec<Batch> = (0..9).map(|i| batch(7, i / 3, i as usize)).collect();
        let mut begun = Vec::new();
        for batch in &mut batches {
            batch.enter(&places);
        }
        while !batches.is_empty() {
            settle(&places, &mut batches);
            let first = batches
                .iter()
                .filter(|batch| batch.is_running)
                .min_by_key(|batch| begun.iter().position(|key| *key == batch.key.2).unwrap_or(usize::MAX));
            let done = first.unwrap().key.clone();
            for running in batches.iter().filter(|batch| batch.is_running) {
                if !begun.contains(&running.key.2) {
                    begun.push(running.key.2.clone());
                }
            }
            batches.retain(|batch| batch.key != done);
            places.leave("model", &done);
        }
        // The second of the first owner made room for the second owner's, and the third owner's need not wait for all of theirs.
        let owners: Vec<usize> = begun.iter().map(|key| key.parse::<usize>().unwrap() / 3).collect();
        for n_begun in 1..=6 {
            let mut counts = [0; 3];
            owners[..n_begun].iter().for_each(|&owner| counts[owner] += 1);
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 2, "{begun:?}");
        }
    }

    #[test]
    fn a_batch_is_due_before_it_expires_with_those_that_expire_soon_after() {
        const DAY: u64 = 86_400;
        for created in [0, 1_800_000_000, 1_800_003_333] {
            let own = due(created, created + DAY);
            assert!((created + DAY - DAY / 10..=created + DAY - DAY / 20).contains(&own));
        }
        let n_dues = (0..DAY).map(|second| due(second, second + DAY)).collect::<std::collections::BTreeSet<_>>().len();
        assert!((20..=21).contains(&n_dues), "{n_dues}");
        assert_eq!(due(5, 5), 4, "a window of no length is no fault");
    }
}
