//! What is seen of calls and steps, for `/metrics`: times as histograms, means of late, and the engine's time. Knows no call's
//! content. Invariant: what is kept of late is bounded.

use crate::window::Class;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Upper ends of the buckets of times to first tokens, in seconds.
const FIRST_TOKEN_S: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
/// Of turns.
const TURN_S: [f64; 14] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
/// Of what is left of a target at the end: less than nothing where it was missed.
const SLACK_S: [f64; 11] = [-1800.0, -600.0, -300.0, -60.0, -10.0, 0.0, 10.0, 60.0, 120.0, 240.0, 600.0];

/// The mean is that of so many turns, of no more than so long ago.
const RECENT: usize = 1000;
const RECENT_TIME: Duration = Duration::from_hours(1);

/// How often something was how much, over all calls.
#[derive(Debug)]
pub struct Histogram {
    /// Upper ends of the buckets.
    bounds: &'static [f64],
    /// How many are in each bucket and beyond the last, and their sum.
    seen: Mutex<(Vec<u64>, f64)>,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, seen: Mutex::new((vec![0; bounds.len() + 1], 0.0)) }
    }

    /// Of times from a call to its first token.
    pub fn of_first_tokens() -> Self {
        Self::new(&FIRST_TOKEN_S)
    }

    /// Takes in one value.
    pub fn note(&self, value: f64) {
        let (counts, sum) = &mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        counts[self.bounds.partition_point(|&end| end < value)] += 1;
        *sum += value;
    }

    /// Upper ends and how many are up to there, the last for all, and their sum.
    pub(super) fn read(&self) -> (Vec<(String, u64)>, f64) {
        let (counts, sum) = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let ends = self.bounds.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        let mut n = 0;
        let up_to = ends.zip(counts).map(|(end, count)| {
            n += count;
            (end, n)
        });
        (up_to.collect(), sum)
    }
}

/// What is seen of the calls of a window.
#[derive(Debug)]
pub struct Seen {
    /// Calls that were accepted.
    pub(super) n_accepted: AtomicU64,
    /// Seconds from acceptance to the end.
    pub(super) turns: Histogram,
    /// Seconds that were left of the target at the end.
    pub(super) slack: Histogram,
    /// Turns of more than twice the target.
    pub(super) n_over_twice: AtomicU64,
    /// Turns that ended within the target.
    pub(super) n_in_time: AtomicU64,
    /// Mean time that a turn should take.
    pub(super) target: Option<Duration>,
    recent: Mutex<VecDeque<(Instant, Duration)>>,
}

impl Seen {
    /// Of a window with that target.
    pub fn new(target: Option<Duration>) -> Self {
        let (turns, slack) = (Histogram::new(&TURN_S), Histogram::new(&SLACK_S));
        let [n_accepted, n_over_twice, n_in_time] = Default::default();
        Self { n_accepted, turns, slack, n_over_twice, n_in_time, target, recent: Mutex::default() }
    }

    /// A call was accepted.
    pub fn note_accepted(&self) {
        self.n_accepted.fetch_add(1, Relaxed);
    }

    /// A call has ended, so long after it was accepted.
    pub fn note_turn(&self, turn: Duration) {
        self.turns.note(turn.as_secs_f64());
        if let Some(target) = self.target {
            self.slack.note(target.as_secs_f64() - turn.as_secs_f64());
            self.n_in_time.fetch_add(u64::from(turn <= target), Relaxed);
            self.n_over_twice.fetch_add(u64::from(turn > 2 * target), Relaxed);
        }
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.push_back((Instant::now(), turn));
        if recent.len() > RECENT {
            recent.pop_front();
        }
    }

    /// The mean turn of late, if there was any.
    pub(super) fn mean(&self) -> Option<Duration> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.retain(|(at, _)| at.elapsed() <= RECENT_TIME);
        let sum: Duration = recent.iter().map(|(_, turn)| *turn).sum();
        (!recent.is_empty()).then(|| sum / recent.len() as u32)
    }
}

/// What is seen of a model's calls and steps.
#[derive(Debug)]
pub struct Observed {
    /// Seconds from a call to its first token, by class.
    pub(super) first_tokens: [Histogram; Class::ALL.len()],
    /// By class.
    pub(super) calls: [Seen; Class::ALL.len()],
    /// Time of steps.
    busy_ns: AtomicU64,
    /// Of it, what asap calls waited for others in the same step.
    interference_ns: AtomicU64,
    since: Instant,
}

impl Observed {
    /// Of a model that begins to work; `targets` are those of the classes.
    pub fn new(targets: [Option<Duration>; Class::ALL.len()]) -> Self {
        Self {
            first_tokens: Class::ALL.map(|_| Histogram::of_first_tokens()),
            calls: targets.map(Seen::new),
            busy_ns: AtomicU64::new(0),
            interference_ns: AtomicU64::new(0),
            since: Instant::now(),
        }
    }

    /// A step took so long, and that much longer than for its asap rows alone.
    pub(super) fn note_step(&self, time: Duration, interference: Duration) {
        self.busy_ns.fetch_add(time.as_nanos() as u64, Relaxed);
        self.interference_ns.fetch_add(interference.as_nanos() as u64, Relaxed);
    }

    /// Seconds of steps.
    pub(super) fn busy_s(&self) -> f64 {
        Duration::from_nanos(self.busy_ns.load(Relaxed)).as_secs_f64()
    }

    /// Seconds that asap calls waited for others in their steps.
    pub(super) fn interference_s(&self) -> f64 {
        Duration::from_nanos(self.interference_ns.load(Relaxed)).as_secs_f64()
    }

    /// Part of the time in which there was no step.
    pub(super) fn idle(&self) -> f64 {
        (1.0 - self.busy_s() / self.since.elapsed().as_secs_f64()).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_counted_by_what_they_leave_of_their_target() {
        let seen = Seen::new(Some(Duration::from_mins(5)));
        [1, 300, 301, 599, 700].map(Duration::from_secs).into_iter().for_each(|turn| seen.note_turn(turn));
        assert_eq!((seen.n_in_time.load(Relaxed), seen.n_over_twice.load(Relaxed)), (2, 1));
        let (up_to, sum) = seen.slack.read();
        let n_up_to = |end: &str| up_to.iter().find(|(other, _)| other == end).map(|(_, n)| *n);
        assert_eq!(
            [n_up_to("-600"), n_up_to("-300"), n_up_to("-10"), n_up_to("0"), n_up_to("240"), n_up_to("+Inf")],
            [Some(0), Some(1), Some(2), Some(4), Some(4), Some(5)]
        );
        assert!((sum - (1500.0 - 1901.0)).abs() < 1e-9);
        assert_eq!(seen.mean().map(|mean| mean.as_millis()), Some(380_200));
        assert_eq!(Seen::new(None).mean(), None);
    }
}
