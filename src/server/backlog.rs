//! How long a call would have to wait, and whether a batch would be done in time: the work that is open before it, at the speed
//! that the engine has when it is full. What a window can't honour is refused when it is asked for, not accepted and done too
//! late. Knows no HTTP. Invariants: nothing is refused that finds nothing before it, but for a batch that alone would take too
//! long, and nothing while the speed is not known; work is counted until it is done or its ticket is dropped.

use crate::window::Class;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How much a new measurement counts against those before.
const NEW_SHARE: f64 = 0.05;
/// Tokens that a completion is expected to have until some have ended.
const COLD_DRAWN: f64 = 256.0;
/// A speed that was measured so long ago says nothing of calls that come now, and little of batches.
const QUIET: Duration = Duration::from_mins(1);
/// What measurements count that were made before a quiet time.
const OLD_SHARE: f64 = 0.2;
/// Batches are accepted whose forecast is so much longer than their window: some rows end sooner than others of their kind.
const BATCH_RELAXATION: f64 = 1.25;

/// Those who are turned away are asked to come back one after the other, as their work could be done: within so much time after there
/// is room for the first, for clients do not wait for long, and not all of them come.
const SPREAD: Duration = Duration::from_mins(1);

/// A window holds no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    /// How long what is asked for would wait.
    pub wait: Duration,
    /// When there will be room for it, after those who were turned away before.
    pub again_in: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Backlog {
    state: Mutex<State>,
    since: Instant,
}

impl Default for Backlog {
    fn default() -> Self {
        Self { state: Mutex::default(), since: Instant::now() }
    }
}

#[derive(Debug, Default)]
struct State {
    /// By class: tokens of open calls, those that they will probably draw among them.
    open: [f64; Class::ALL.len()],
    /// The same of open batches, by when they expire (unix seconds), and a number.
    batches: BTreeMap<(u64, u64), f64>,
    n_batches: u64,
    /// Of late, steps after which rows waited for the engine: their seconds, and their tokens.
    full: (f64, f64),
    /// When the last of them ended.
    full_at: Duration,
    /// Tokens that completions of calls and of batches have; 0: not known.
    drawn: [f64; 2],
    /// By class: when there will be room for one more than have been turned away.
    room_at: [Duration; Class::ALL.len()],
}

fn learn(old: &mut f64, new: f64) {
    *old = if *old > 0.0 { *old + NEW_SHARE * (new - *old) } else { new };
}

impl Backlog {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A step of so many tokens took that long while others waited.
    pub fn note_full_step(&self, time: Duration, n_tokens: usize) {
        let at = self.since.elapsed();
        self.with(|state| state.note_full_step(at, time, n_tokens));
    }

    /// A completion, of a batch or of a call, had so many tokens.
    pub fn note_finished(&self, is_of_batch: bool, n_tokens: usize) {
        self.with(|state| learn(&mut state.drawn[usize::from(is_of_batch)], n_tokens as f64));
    }

    /// Tokens that a completion of a batch will probably have.
    pub fn batch_drawn(&self) -> u64 {
        self.with(|state| state.expected(true)) as u64
    }

    /// Tokens of a class that are open, those that will probably be drawn among them.
    pub fn open_tokens(&self, class: Class) -> f64 {
        self.with(|state| match class {
            // Of no batch it would be a negative zero.
            Class::Batch => state.batches.values().fold(0.0, |sum, tokens| sum + tokens),
            Class::Asap | Class::Standard => state.open[class as usize],
        })
    }

    /// How long what is asked for now would wait behind its class and those before it.
    pub fn wait(&self, class: Class) -> Duration {
        let at = self.since.elapsed();
        self.with(|state| state.wait(class, at))
    }

    /// Counts a call in; `sequences` are the prompt tokens and the most drawn ones of each.
    ///
    /// # Errors
    /// It would wait longer than `ceiling`.
    pub fn enter(
        self: &Arc<Self>,
        class: Class,
        sequences: impl Iterator<Item = (usize, u32)>,
        ceiling: Option<Duration>,
    ) -> Result<Ticket, Full> {
        let at = self.since.elapsed();
        self.with(|state| {
            let (wait, n_tokens) = (state.wait(class, at), state.n_tokens(sequences));
            match ceiling.filter(|&ceiling| wait > ceiling) {
                Some(ceiling) => {
                    Err(Full { wait, again_in: state.turn_away(class, n_tokens, (at, wait.saturating_sub(ceiling))) })
                }
                None => Ok(state.add_call(self, class, n_tokens)),
            }
        })
    }

    /// As [`Backlog::enter`], of a call that was accepted before.
    pub fn count_in(self: &Arc<Self>, class: Class, sequence: (usize, u32)) -> Ticket {
        self.with(|state| {
            let n_tokens = state.n_tokens(std::iter::once(sequence));
            state.add_call(self, class, n_tokens)
        })
    }

    /// Counts a batch of so many tokens in, which expires then (unix seconds).
    ///
    /// # Errors
    /// It would not be done by then, or make another one late that was accepted: how much too long all would take.
    pub fn enter_batch(self: &Arc<Self>, n_tokens: u64, now: u64, expires_at: u64) -> Result<BatchTicket, Duration> {
        self.with(|state| {
            let too_long = state.too_long(n_tokens as f64, now, expires_at);
            if too_long.is_zero() { Ok(state.add_batch(self, n_tokens, expires_at)) } else { Err(too_long) }
        })
    }

    /// As [`Backlog::enter_batch`], of one that was accepted before.
    pub fn enter_accepted(self: &Arc<Self>, n_tokens: u64, expires_at: u64) -> BatchTicket {
        self.with(|state| state.add_batch(self, n_tokens, expires_at))
    }
}

impl State {
    fn note_full_step(&mut self, at: Duration, time: Duration, n_tokens: usize) {
        if n_tokens == 0 {
            return;
        }
        let is_old = at.saturating_sub(self.full_at) > QUIET;
        let kept = if is_old { OLD_SHARE } else { 1.0 - NEW_SHARE };
        let (seconds, tokens) = &mut self.full;
        *seconds = *seconds * kept + time.as_secs_f64();
        *tokens = *tokens * kept + n_tokens as f64;
        self.full_at = at;
    }

    fn expected(&self, is_of_batch: bool) -> f64 {
        let drawn = self.drawn[usize::from(is_of_batch)];
        if drawn > 0.0 { drawn } else { COLD_DRAWN }
    }

    /// Seconds that a token takes when the engine is full; 0: not known.
    fn token_s(&self) -> f64 {
        let (seconds, tokens) = self.full;
        if tokens > 0.0 { seconds / tokens } else { 0.0 }
    }

    fn wait(&self, class: Class, at: Duration) -> Duration {
        // Nobody has waited for the engine since: whoever comes begins.
        if at.saturating_sub(self.full_at) > QUIET {
            return Duration::ZERO;
        }
        let n_tokens: f64 = self.open[..=class as usize].iter().sum();
        Duration::try_from_secs_f64(n_tokens.max(0.0) * self.token_s()).unwrap_or(Duration::MAX)
    }

    /// How much too long a new batch, and those that expire after it, would take; calls go before all of them.
    fn too_long(&self, n_tokens: f64, now: u64, expires_at: u64) -> Duration {
        let mut before: f64 = self.open[..Class::Batch as usize].iter().sum();
        before += self.batches.range(..(expires_at, u64::MAX)).map(|(_, tokens)| tokens).sum::<f64>();
        let late_s =
            |n_tokens: f64, expires_at: u64| n_tokens * self.token_s() - BATCH_RELAXATION * expires_at.saturating_sub(now) as f64;
        let mut most_s = late_s(before + n_tokens, expires_at);
        for (&(expires_at, _), tokens) in self.batches.range((expires_at, u64::MAX)..) {
            before += tokens;
            // One that is late already is none the worse for being last.
            if late_s(before, expires_at) <= 0.0 {
                most_s = most_s.max(late_s(before + n_tokens, expires_at));
            }
        }
        Duration::try_from_secs_f64(most_s.max(0.0)).unwrap_or(Duration::MAX)
    }

    /// Tokens that a call will probably come to.
    fn n_tokens(&self, sequences: impl Iterator<Item = (usize, u32)>) -> f64 {
        let drawn = self.expected(false);
        sequences.map(|(n_prompt, most)| n_prompt as f64 + drawn.min(f64::from(most))).sum()
    }

    /// When a call of so many tokens, which would wait `too_long` at `at`, should come again.
    fn turn_away(&mut self, class: Class, n_tokens: f64, (at, too_long): (Duration, Duration)) -> Duration {
        let own = Duration::try_from_secs_f64(n_tokens * self.token_s()).unwrap_or(SPREAD);
        let first = at.saturating_add(too_long);
        let room_at = &mut self.room_at[class as usize];
        let again_at = (*room_at).clamp(first, first.saturating_add(SPREAD));
        *room_at = again_at.saturating_add(own);
        again_at.saturating_sub(at)
    }

    fn add_call(&mut self, backlog: &Arc<Backlog>, class: Class, n_tokens: f64) -> Ticket {
        self.open[class as usize] += n_tokens;
        Ticket { backlog: Arc::clone(backlog), class, n_tokens }
    }

    fn add_batch(&mut self, backlog: &Arc<Backlog>, n_tokens: u64, expires_at: u64) -> BatchTicket {
        self.n_batches += 1;
        let key = (expires_at, self.n_batches);
        self.batches.insert(key, n_tokens as f64);
        BatchTicket { backlog: Arc::clone(backlog), key, aside: Mutex::default() }
    }
}

/// A call's part of what is open.
#[derive(Debug)]
pub struct Ticket {
    backlog: Arc<Backlog>,
    class: Class,
    n_tokens: f64,
}

impl Ticket {
    /// So many tokens of it are done.
    pub fn spend(&mut self, n_tokens: usize) {
        let n_tokens = (n_tokens as f64).min(self.n_tokens);
        self.n_tokens -= n_tokens;
        self.backlog.with(|state| {
            let open = &mut state.open[self.class as usize];
            // What rounding leaves must not add up.
            *open = (*open - n_tokens).max(0.0);
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.spend(usize::MAX);
    }
}

/// A batch's part of what is open.
#[derive(Debug)]
pub struct BatchTicket {
    backlog: Arc<Backlog>,
    key: (u64, u64),
    /// Tokens that nobody waits for, as the batch waits for something else than the engine.
    aside: Mutex<f64>,
}

impl BatchTicket {
    /// So many tokens of it are done.
    pub fn spend(&self, n_tokens: usize) {
        self.backlog.with(|state| {
            if let Some(open) = state.batches.get_mut(&self.key) {
                *open = (*open - n_tokens as f64).max(0.0);
            }
        });
    }
}

impl BatchTicket {
    /// It waits for something else than the engine, and nobody waits for it; or it does no more.
    pub fn put_aside(&self, is_aside: bool) {
        let mut aside = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        self.backlog.with(|state| {
            if let Some(open) = state.batches.get_mut(&self.key) {
                let (from, to) = if is_aside { (open, &mut *aside) } else { (&mut *aside, open) };
                *to += std::mem::take(from);
            }
        });
    }
}

impl Drop for BatchTicket {
    fn drop(&mut self) {
        self.backlog.with(|state| state.batches.remove(&self.key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CEILING: Option<Duration> = Some(Duration::from_secs(10));

    fn enter(backlog: &Arc<Backlog>, class: Class, n_tokens: usize) -> Result<Ticket, Full> {
        backlog.enter(class, [(n_tokens, 0)].into_iter(), CEILING)
    }

    #[test]
    fn what_would_wait_too_long_is_refused() {
        let backlog = Arc::new(Backlog::default());
        let first = enter(&backlog, Class::Standard, 1_000_000).expect("the speed is not known");
        backlog.note_full_step(Duration::from_millis(100), 100);
        assert_eq!(enter(&backlog, Class::Standard, 1).unwrap_err().wait.as_secs(), 1000);
        drop(enter(&backlog, Class::Asap, 1).expect("what is before standard does not wait for it"));
        let mut first = first;
        first.spend(999_990);
        assert_eq!(backlog.wait(Class::Standard), Duration::from_millis(10));
        drop(first);
        let held: Vec<Ticket> = std::iter::from_fn(|| enter(&backlog, Class::Standard, 1000).ok()).collect();
        assert_eq!(held.len(), 11, "ten seconds of work, and the one after which that is passed");
        drop(held);
        assert_eq!(backlog.wait(Class::Batch), Duration::ZERO);
        assert!(backlog.open_tokens(Class::Batch).is_sign_positive());
    }

    #[test]
    fn those_who_are_turned_away_come_back_one_after_the_other() {
        let mut state = State { open: [0.0, 50.0, 0.0], ..State::default() };
        let at = Duration::from_secs;
        // A token a second: 50 s of work, and 10 s are allowed.
        state.note_full_step(at(100), at(1), 1);
        assert_eq!(state.wait(Class::Standard, at(100)), at(50));
        let mut turn_away = |n_tokens: f64, now: u64, too_long: u64| {
            state.turn_away(Class::Standard, n_tokens, (at(now), at(too_long))).as_secs()
        };
        assert_eq!([turn_away(5.0, 100, 40), turn_away(20.0, 100, 40), turn_away(1.0, 100, 40)], [40, 45, 65]);
        // Five seconds later, that many tokens later.
        assert_eq!(turn_away(100.0, 105, 35), 61);
        // Nobody is asked to wait for everybody.
        assert_eq!([turn_away(1.0, 105, 35), turn_away(1.0, 105, 35)], [95, 95]);
        // Those who did not come are not waited for.
        assert_eq!(turn_away(1.0, 300, 3), 3);
    }

    #[test]
    fn answers_are_expected_to_be_as_long_as_others() {
        let backlog = Arc::new(Backlog::default());
        backlog.note_full_step(Duration::from_secs(1), 1);
        let wait = |most: u32| {
            let ticket = backlog.enter(Class::Asap, [(1, most), (1, most)].into_iter(), None).expect("no ceiling");
            let wait = backlog.wait(Class::Asap).as_secs();
            drop(ticket);
            wait
        };
        assert_eq!((wait(10), wait(4096)), (22, 514));
        backlog.note_finished(false, 20);
        assert_eq!((wait(10), wait(4096)), (22, 42));
    }

    #[test]
    fn a_speed_of_long_ago_refuses_nobody() {
        let mut state = State { open: [0.0, 1e6, 0.0], ..State::default() };
        let at = Duration::from_secs;
        state.note_full_step(at(100), at(1), 10);
        assert_eq!(state.wait(Class::Standard, at(130)).as_secs(), 100_000);
        assert_eq!(state.wait(Class::Standard, at(161)), Duration::ZERO, "nobody has waited for a minute");
        // What is measured then counts more than what was.
        state.note_full_step(at(1000), at(1), 1000);
        let wait = state.wait(Class::Standard, at(1000)).as_secs();
        assert!((1100..1250).contains(&wait), "{wait}");
        assert!(state.too_long(1e6, 0, 100) > Duration::ZERO, "batches are judged by what is known");
    }

    #[test]
    fn batches_are_refused_that_would_be_late_or_make_others_late() {
        let backlog = Arc::new(Backlog::default());
        let enter = |n_tokens, expires_at| backlog.enter_batch(n_tokens, 1000, expires_at);
        drop(enter(1 << 50, 1001).expect("the speed is not known"));
        backlog.note_full_step(Duration::from_secs(1), 10);
        assert_eq!(enter(2000, 1100).unwrap_err().as_secs(), 75, "200 s of work, and 1.25 times 100");
        let calls = backlog.enter(Class::Standard, [(500, 0)].into_iter(), None).expect("no ceiling");
        let first = enter(700, 1100).expect("with the calls, 120 of 125 s");
        assert!(enter(100, 1100).is_err());
        assert!(enter(51, 1200).is_ok(), "what expires later has more time");
        // Sooner, it would go before the first, and leave it too little.
        assert_eq!(enter(100, 1090).unwrap_err().as_secs(), 5);
        drop(calls);
        let second = enter(100, 1090).expect("the calls are done");
        first.spend(600);
        drop(second);
        assert!(enter(1150, 1100).is_ok() && enter(1151, 1100).is_err(), "what is done is not open");
        // One that waits for something else is in nobody's way until it goes on.
        first.put_aside(true);
        assert!(enter(1250, 1100).is_ok() && enter(1251, 1100).is_err());
        first.put_aside(true);
        first.put_aside(false);
        assert!(enter(1150, 1100).is_ok() && enter(1151, 1100).is_err(), "the same as before");
        // One that is late anyway keeps nobody out.
        let late = backlog.enter_accepted(90_000, 1300);
        assert!(enter(100, 1200).is_ok());
        drop(late);
    }
}
