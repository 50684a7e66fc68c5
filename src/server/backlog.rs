//! How long a call would have to wait: the work that is open before it, at the speed that the engine has when it is full.
//! What a window can't honour is refused when it is asked for, not accepted and done too late. Knows no clock and no HTTP.
//! Invariants: nothing is refused that finds nothing before it, or while the speed is not known; work is counted until it is
//! done or its ticket is dropped.

use crate::window::Class;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How much a new measurement counts against those before.
const NEW_SHARE: f64 = 0.05;
/// Tokens that a completion is expected to have until some have ended.
const COLD_DRAWN: f64 = 256.0;

/// See the module.
#[derive(Debug, Default)]
pub struct Backlog(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By class: tokens of open calls, those that they will probably draw among them.
    open: [f64; Class::ALL.len()],
    /// Of late, steps after which rows waited for the engine: their seconds, and their tokens.
    full: (f64, f64),
    /// Tokens that completions have; 0: not known.
    drawn: f64,
}

fn learn(old: &mut f64, new: f64) {
    *old = if *old > 0.0 { *old + NEW_SHARE * (new - *old) } else { new };
}

impl Backlog {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A step of so many tokens took that long while others waited.
    pub fn note_full_step(&self, time: Duration, n_tokens: usize) {
        if n_tokens > 0 {
            self.with(|state| {
                let (seconds, tokens) = &mut state.full;
                *seconds = *seconds * (1.0 - NEW_SHARE) + time.as_secs_f64();
                *tokens = *tokens * (1.0 - NEW_SHARE) + n_tokens as f64;
            });
        }
    }

    /// A call's completion had so many tokens.
    pub fn note_finished(&self, n_tokens: usize) {
        self.with(|state| learn(&mut state.drawn, n_tokens as f64));
    }

    /// How long what is asked for now would wait behind its class and those before it.
    pub fn wait(&self, class: Class) -> Duration {
        self.with(|state| state.wait(class))
    }

    /// Counts a call in; `sequences` are the prompt tokens and the most drawn ones of each.
    ///
    /// # Errors
    /// It would wait longer than `ceiling`: how long.
    pub fn enter(
        self: &Arc<Self>,
        class: Class,
        sequences: impl Iterator<Item = (usize, u32)>,
        ceiling: Option<Duration>,
    ) -> Result<Ticket, Duration> {
        self.with(|state| {
            let wait = state.wait(class);
            if ceiling.is_some_and(|ceiling| wait > ceiling) {
                return Err(wait);
            }
            let drawn = if state.drawn > 0.0 { state.drawn } else { COLD_DRAWN };
            let n_tokens = sequences.map(|(n_prompt, most)| n_prompt as f64 + drawn.min(f64::from(most))).sum();
            state.open[class as usize] += n_tokens;
            Ok(Ticket { backlog: Arc::clone(self), class, n_tokens })
        })
    }
}

impl State {
    fn wait(&self, class: Class) -> Duration {
        let n_tokens: f64 = self.open[..=class as usize].iter().sum();
        let (seconds, tokens) = self.full;
        let token_s = if tokens > 0.0 { seconds / tokens } else { 0.0 };
        Duration::try_from_secs_f64(n_tokens.max(0.0) * token_s).unwrap_or(Duration::MAX)
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

#[cfg(test)]
mod tests {
    use super::*;

    const CEILING: Option<Duration> = Some(Duration::from_secs(10));

    fn enter(backlog: &Arc<Backlog>, class: Class, n_tokens: usize) -> Result<Ticket, Duration> {
        backlog.enter(class, [(n_tokens, 0)].into_iter(), CEILING)
    }

    #[test]
    fn what_would_wait_too_long_is_refused() {
        let backlog = Arc::new(Backlog::default());
        let first = enter(&backlog, Class::Standard, 1_000_000).expect("the speed is not known");
        backlog.note_full_step(Duration::from_millis(100), 100);
        assert_eq!(enter(&backlog, Class::Standard, 1).unwrap_err().as_secs(), 1000);
        drop(enter(&backlog, Class::Asap, 1).expect("what is before standard does not wait for it"));
        let mut first = first;
        first.spend(999_990);
        assert_eq!(backlog.wait(Class::Standard), Duration::from_millis(10));
        drop(first);
        let held: Vec<Ticket> = std::iter::from_fn(|| enter(&backlog, Class::Standard, 1000).ok()).collect();
        assert_eq!(held.len(), 11, "ten seconds of work, and the one after which that is passed");
        drop(held);
        assert_eq!(backlog.wait(Class::Batch), Duration::ZERO);
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
        backlog.note_finished(20);
        assert_eq!((wait(10), wait(4096)), (22, 42));
    }
}
