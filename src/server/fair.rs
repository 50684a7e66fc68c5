//! Things that wait, and are taken by turns (`window::turns`). Knows nothing of what they are. Invariants: what is an owner's keeps
//! its order; one that nobody wants any more takes no turn.

use crate::window::turns::{Share, Turns};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use tokio::sync::Notify;

/// See the module. Pure.
#[derive(Debug)]
pub(super) struct Fair<T> {
    /// By owner, what it has waiting, with their numbers, in the order in which they came.
    waiting: BTreeMap<u32, (Share, VecDeque<(u64, T)>)>,
    turns: Turns,
    n_pushed: u64,
}

impl<T> Default for Fair<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), turns: Turns::default(), n_pushed: 0 }
    }
}

impl<T> Fair<T> {
    /// One more waits, behind what its owner has waiting.
    pub(super) fn push(&mut self, share: Share, item: T) {
        let (_, items) = self.waiting.entry(share.owner).or_insert_with(|| (share, VecDeque::new()));
        items.push_back((self.n_pushed, item));
        self.n_pushed += 1;
    }

    /// Forgets those at the head of their owners' that nobody wants any more: they take no turn.
    pub(super) fn skip(&mut self, is_wanted: impl Fn(&T) -> bool) {
        for (_, items) in self.waiting.values_mut() {
            while items.front().is_some_and(|(_, item)| !is_wanted(item)) {
                items.pop_front();
            }
        }
    }

    /// The one whose turn it is: of those whose time it is, the one that came first.
    pub(super) fn pop(&mut self) -> Option<T> {
        let firsts = self.waiting.values().filter_map(|(share, items)| Some((*share, items.front()?.0)));
        let (share, _) = firsts.min_by_key(|&(share, number)| (self.turns.next(share), number))?;
        let at = self.turns.take(share, 1);
        self.turns.pass(share, at);
        self.waiting.get_mut(&share.owner)?.1.pop_front().map(|(_, item)| item)
    }
}

/// Ids that wait to be taken, one after the other.
#[derive(Default)]
pub(super) struct Line {
    ids: Mutex<Fair<String>>,
    bell: Notify,
}

impl Line {
    fn with<T>(&self, work: impl FnOnce(&mut Fair<String>) -> T) -> T {
        work(&mut self.ids.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// One more waits, behind what its owner has waiting.
    pub(super) fn push(&self, share: Share, id: String) {
        self.with(|ids| ids.push(share, id));
        self.bell.notify_one();
    }

    /// The one whose turn it is, of those that are still wanted; waits for one. Asked for by one task alone.
    pub(super) async fn next(&self, is_wanted: impl Fn(&str) -> bool) -> String {
        loop {
            let next = self.with(|ids| {
                ids.skip(|id| is_wanted(id));
                ids.pop()
            });
            if let Some(id) = next {
                return id;
            }
            self.bell.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn turns_are_by_weight_and_one_owner_waits_in_order() {
        let mut fair = Fair::default();
        let share = |owner, weight| Share { owner, weight };
        (0..100).for_each(|i| fair.push(share(0, 1), ("a", i)));
        (0..100).for_each(|i| fair.push(share(1, 3), ("b", i)));
        let first: Vec<(&str, i32)> = (0..40).filter_map(|_| fair.pop()).collect();
        assert_eq!(first.iter().filter(|(owner, _)| *owner == "b").count(), 30, "{first:?}");
        for name in ["a", "b"] {
            let own: Vec<i32> = first.iter().filter(|(owner, _)| *owner == name).map(|(_, i)| *i).collect();
            assert!(own.is_sorted(), "{own:?}");
        }
        // One that comes now is served soon, and gets no turns for the time before.
        (0..100).for_each(|i| fair.push(share(7, 1), ("c", i)));
        let then: Vec<&str> = (0..10).filter_map(|_| fair.pop()).map(|(owner, _)| owner).collect();
        assert_eq!(then.iter().filter(|owner| **owner == "c").count(), 2, "{then:?}");
        let alone: Vec<(&str, i32)> = std::iter::from_fn(|| fair.pop()).collect();
        assert_eq!((alone.len(), fair.pop()), (300 - 50, None));
    }

    proptest! {
        #[test]
        fn everything_has_its_turn_once_and_no_owner_falls_behind(
            weights in prop::collection::vec(1_u32..5, 1..5),
            steps in prop::collection::vec((0_usize..5, prop::bool::weighted(0.6)), 1..200),
        ) {
            let (mut fair, mut n_waiting) = (Fair::default(), vec![0_usize; weights.len()]);
            let (mut n_pushed, mut given) = (0, Vec::new());
            // Turns since all owners began to wait.
            let mut turns = vec![0_u32; weights.len()];
            for (owner, is_push) in steps {
                let owner = owner % weights.len();
                if is_push {
                    fair.push(Share { owner: owner as u32, weight: weights[owner] }, (owner, n_pushed));
                    n_waiting[owner] += 1;
                    n_pushed += 1;
                } else if let Some((owner, number)) = fair.pop() {
                    given.push(number);
                    n_waiting[owner] -= 1;
                    turns[owner] += 1;
                }
                if n_waiting.contains(&0) {
                    turns.fill(0);
                }
                // Of two that wait, neither is ahead by more than a turn of each.
                for (a, b) in (0..weights.len()).flat_map(|a| (0..a).map(move |b| (a, b))) {
                    let [a, b] = [a, b].map(|i| f64::from(turns[i]) / f64::from(weights[i]));
                    prop_assert!((a - b).abs() <= 2.0 + 1e-6, "{turns:?} {weights:?}");
                }
            }
            given.extend(std::iter::from_fn(|| fair.pop()).map(|(_, number)| number));
            given.sort_unstable();
            prop_assert_eq!(given, (0..n_pushed).collect::<Vec<_>>());
        }
    }
}
