//! Which batches run at a time, and which wait. Invariants: of those that want the same model, the ones that expire first run;
//! one that comes later and expires sooner takes the place of one that has more time; a place that is given up goes on.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Batches that run at a time, of a model; more would only share the machine.
const N_RUNNING: usize = 2;

/// When a batch expires, and its name.
type Key = (u64, String);
/// Asks a batch to leave its place.
type Ask = Box<dyn Fn() + Send>;

/// See the module.
#[derive(Default)]
pub(super) struct Places(Mutex<HashMap<String, Queue>>);

/// Of a model.
#[derive(Default)]
struct Queue {
    /// With who has been asked to leave.
    running: BTreeMap<Key, (Ask, bool)>,
    waiting: BTreeMap<Key, (Ask, oneshot::Sender<()>)>,
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Queue>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wants a place: rings when it has one, which may be at once. `ask` is called when another should have it.
    pub(super) fn enter(&self, model: &str, key: Key, ask: Ask) -> oneshot::Receiver<()> {
        let (bell, rung) = oneshot::channel();
        let mut queues = self.lock();
        let queue = queues.entry(model.to_owned()).or_default();
        // The one with most time leaves, if that is more than the new one has.
        let n_places = N_RUNNING.saturating_sub(queue.running.len());
        let staying = queue.running.iter_mut().rev().find(|(_, (_, is_asked))| !is_asked);
        if let Some((_, (ask, is_asked))) = staying.filter(|(last, _)| n_places == 0 && last.0 > key.0) {
            *is_asked = true;
            ask();
        }
        queue.waiting.insert(key, (ask, bell));
        queue.fill();
        rung
    }

    /// Has no place any more, and waits for none.
    pub(super) fn leave(&self, model: &str, key: &Key) {
        if let Some(queue) = self.lock().get_mut(model) {
            queue.running.remove(key);
            queue.waiting.remove(key);
            queue.fill();
        }
    }
}

impl Queue {
    /// Gives places to those that wait.
    fn fill(&mut self) {
        while self.running.len() < N_RUNNING
            && let Some((key, (ask, bell))) = self.waiting.pop_first()
        {
            // Who does not wait any more needs none.
            if bell.send(()).is_ok() {
                self.running.insert(key, (ask, false));
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
        is_asked: Arc<AtomicBool>,
        rung: Option<oneshot::Receiver<()>>,
        is_running: bool,
    }

    impl Batch {
        fn enter(&mut self, places: &Places) {
            let is_asked = Arc::clone(&self.is_asked);
            let ask = Box::new(move || is_asked.store(true, SeqCst));
            self.rung = Some(places.enter("model", self.key.clone(), ask));
        }

        fn look(&mut self) {
            if self.rung.as_mut().is_some_and(|rung| rung.try_recv().is_ok()) {
                (self.is_running, self.rung) = (true, None);
            }
        }
    }

    proptest! {
        /// Whoever comes and goes when: once those that were asked have left, the ones that expire first run.
        #[test]
        fn those_that_expire_first_run(steps in prop::collection::vec((0..40_u64, prop::bool::weighted(0.3)), 1..60)) {
            let (places, mut batches) = (Places::default(), Vec::<Batch>::new());
            for (i, (expires_at, ends)) in steps.into_iter().enumerate() {
                if ends && !batches.is_empty() {
                    let gone = batches.swap_remove(expires_at as usize % batches.len());
                    drop(gone.rung);
                    places.leave("model", &gone.key);
                } else {
                    let key = (expires_at, format!("{i:03}"));
                    let mut new = Batch { key, is_asked: Arc::default(), rung: None, is_running: false };
                    new.enter(&places);
                    batches.push(new);
                }
                // Those that are asked leave, and wait again.
                for _ in 0..batches.len() {
                    batches.iter_mut().for_each(Batch::look);
                    for batch in &mut batches {
                        if batch.is_running && batch.is_asked.swap(false, SeqCst) {
                            batch.is_running = false;
                            places.leave("model", &batch.key);
                            batch.enter(&places);
                        }
                    }
                }
                batches.iter_mut().for_each(Batch::look);
                let latest_running = batches.iter().filter(|batch| batch.is_running).map(|batch| batch.key.0).max();
                let earliest_waiting = batches.iter().filter(|batch| !batch.is_running).map(|batch| batch.key.0).min();
                let n_running = batches.iter().filter(|batch| batch.is_running).count();
                prop_assert_eq!(n_running, batches.len().min(N_RUNNING));
                prop_assert!(earliest_waiting.is_none() || latest_running <= earliest_waiting);
            }
        }
    }
}
