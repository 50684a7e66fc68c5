//! Which row goes first, who loses its place, and which class is owed: by class, deadline, predicted service and share.
//! Pure: time comes in as a number, nothing is read from a clock. Knows nothing of blocks, queues or budgets.
//!
//! - asap goes before everything else, in the order of arrival.
//! - Of standard, the row goes first that has the least *slack*: time until it is due, less the service it still needs.
//! - Of batches, the one that is due first; rows of one job keep the order of its plan.
//! - A row without slack is *urgent*, and so is a batch's that nears its deadline (the ramp): these go before all that have
//!   time, least slack first.
//! - Standard and batch have *floors*: whoever waits and got less than its share of the tokens of the last minute is *owed*,
//!   and goes before the urgent. So neither starves the other, whatever is overdue.

use crate::window::Class;

/// When a row should be done, on the engine's clock (see [`super::Engine::advance`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// The time, in milliseconds; it may have passed.
    pub at_ms: i64,
    /// It is urgent from so many milliseconds before.
    pub ramp_ms: i64,
}

/// Minutes of the ramp are those of the window to this power: 59 minutes of a day.
const RAMP_POWER: f64 = 0.56;

impl Due {
    /// It has all the time there is.
    pub const NEVER: Self = Self { at_ms: i64::MAX, ramp_ms: 0 };

    /// The end of a window of that length, with its ramp.
    pub fn window(at_ms: i64, window_ms: i64) -> Self {
        let minutes = (window_ms.max(0) as f64 / 60_000.0).powf(RAMP_POWER);
        Self { at_ms, ramp_ms: ((minutes * 60_000.0) as i64).min(window_ms.max(0)) }
    }
}

/// A row's place in the order of its class: the time at which it must begin at the latest (a batch's: at which it is due).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rank {
    by_ms: i64,
    ramp_ms: i64,
}

impl Rank {
    pub(super) fn new(class: Class, due: Due, service_ms: i64) -> Self {
        let by_ms = match class {
            Class::Asap => Due::NEVER.at_ms,
            Class::Standard if due != Due::NEVER => due.at_ms.saturating_sub(service_ms),
            Class::Standard | Class::Batch => due.at_ms,
        };
        Self { by_ms, ramp_ms: due.ramp_ms }
    }

    /// What a class's queue is ordered by, least first.
    pub(super) fn order(self) -> i64 {
        self.by_ms
    }

    fn is_urgent(self, now_ms: i64) -> bool {
        self.by_ms < i64::MAX && self.by_ms.saturating_sub(self.ramp_ms) <= now_ms
    }
}

/// Milliseconds in which what a class got counts for less, to the e-th part.
const SHARE_MEMORY_MS: f64 = 60_000.0;
/// How much a new step counts against those before, in what steps take.
const NEW_SHARE: f64 = 0.1;

/// Tokens of a step from which on it says what a prompt's tokens take; a smaller one takes what any step takes.
const PROMPT_TOKENS: usize = 32;

/// What the order depends on besides the rows.
#[derive(Debug, Clone, Default)]
pub(super) struct Policy {
    now_ms: i64,
    /// By class: least share of the tokens that it and others of its kind get.
    floors: [f64; 3],
    /// By class: tokens of late.
    served: [f64; 3],
    /// Milliseconds that a step takes, and a token of a step.
    step_ms: f64,
    token_ms: f64,
    /// Tokens since time was last told.
    n_untimed: usize,
}

impl Policy {
    pub(super) fn new(floors: [f64; 3]) -> Self {
        Self { floors, ..Self::default() }
    }

    /// It is that time now. If a step was run since it was last told, that took the time between.
    pub(super) fn advance(&mut self, now_ms: i64) {
        let passed_ms = now_ms.saturating_sub(self.now_ms).max(0) as f64;
        self.now_ms = self.now_ms.max(now_ms);
        if self.n_untimed > 0 {
            let learn = |old: &mut f64, new: f64| *old = if *old > 0.0 { *old + NEW_SHARE * (new - *old) } else { new };
            learn(&mut self.step_ms, passed_ms);
            if self.n_untimed >= PROMPT_TOKENS {
                learn(&mut self.token_ms, passed_ms / self.n_untimed as f64);
            }
            self.n_untimed = 0;
        }
        let faded = (-passed_ms / SHARE_MEMORY_MS).exp();
        self.served.iter_mut().for_each(|tokens| *tokens *= faded);
    }

    /// The time that was told last.
    pub(super) fn now_ms(&self) -> i64 {
        self.now_ms
    }

    /// A step gave tokens to a class.
    pub(super) fn note(&mut self, class: Class, n_tokens: usize) {
        self.served[class as usize] += n_tokens as f64;
        self.n_untimed += n_tokens;
    }

    /// Predicted time for so many prompt tokens and then so many drawn ones.
    pub(super) fn service_ms(&self, n_prompt: usize, n_drawn: usize) -> i64 {
        (n_prompt as f64 * self.token_ms + n_drawn as f64 * self.step_ms) as i64
    }

    /// Whether a row goes before those that have time.
    pub(super) fn is_urgent(&self, rank: Rank) -> bool {
        rank.is_urgent(self.now_ms)
    }

    /// Whoever waits for nothing is owed nothing, now and when it waits again.
    pub(super) fn excuse(&mut self, class: Class) {
        self.served[class as usize] = self.served[class as usize].max(self.floor(class));
    }

    /// Whether a class that waits got less than its floor.
    pub(super) fn is_owed(&self, class: Class) -> bool {
        self.served[class as usize] < self.floor(class)
    }

    /// Tokens of late that would be its floor, beside what the other class got. asap takes part in no shares.
    fn floor(&self, class: Class) -> f64 {
        let [_, standard, batch] = self.served;
        // Not as a difference: what is exactly its floor is no rounding error below it.
        let others = if class == Class::Standard { batch } else { standard };
        let share = self.floors[class as usize];
        share / (1.0 - share) * others
    }

    /// Of two rows, the one that is greater here loses its place first: the lower class, then who has more slack. Urgent
    /// rows count as standard.
    pub(super) fn expendable(&self, class: Class, rank: Rank) -> (Class, i64) {
        (if self.is_urgent(rank) { class.min(Class::Standard) } else { class }, rank.by_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn due() -> impl Strategy<Value = Due> {
        prop_oneof![
            1 => Just(Due::NEVER),
            4 => (-1_000_000..1_000_000_i64, 0..10_000_000_i64).prop_map(|(at, window)| Due::window(at, window)),
        ]
    }

    proptest! {
        /// Time only ever makes a row more urgent, less of it always does, and what has no deadline never is.
        #[test]
        fn urgency_grows_with_time(due in due(), class in 0..3_usize, service in 0..100_000_i64, now in -2_000_000..2_000_000_i64, later in 0..1_000_000_i64) {
            let class = Class::ALL[class];
            let rank = Rank::new(class, due, service);
            prop_assert!(!rank.is_urgent(now) || rank.is_urgent(now + later));
            let sooner = Due { at_ms: due.at_ms.saturating_sub(if due == Due::NEVER { 0 } else { later }), ..due };
            prop_assert!(Rank::new(class, sooner, service).order() <= rank.order());
            prop_assert!(!rank.is_urgent(now) || Rank::new(class, sooner, service).is_urgent(now));
            prop_assert!(!rank.is_urgent(now) || (due != Due::NEVER && class != Class::Asap));
        }

        /// Whatever is served to whom: both are never owed at once where floors leave room, and who is owed gets out of it
        /// by the tokens of its floor.
        #[test]
        fn floors_are_shares(steps in prop::collection::vec((1..3_usize, 1..4096_usize, 0..5_000_i64), 1..50)) {
            let mut policy = Policy::new([0.0, 0.1, 0.02]);
            let mut now = 0;
            for (class, n_tokens, ms) in steps {
                policy.note(Class::ALL[class], n_tokens);
                now += ms;
                policy.advance(now);
                prop_assert!(!policy.is_owed(Class::ALL[class]) || policy.is_owed(Class::ALL[class]) != policy.is_owed(Class::ALL[3 - class]));
                prop_assert!(!policy.is_owed(Class::Asap));
            }
            for class in [Class::Standard, Class::Batch] {
                let mut own = policy.clone();
                let total: f64 = own.served.iter().sum();
                own.note(class, (total * 0.2) as usize + 1);
                prop_assert!(!own.is_owed(class));
                policy.excuse(class);
                prop_assert!(!policy.is_owed(class));
            }
        }
    }

    #[test]
    fn the_ramp_of_a_day_is_an_hour() {
        let day = Due::window(0, 24 * 3_600_000);
        assert_eq!(day.ramp_ms / 60_000, 58);
        assert_eq!(Due::window(0, 30_000).ramp_ms, 30_000, "never longer than the window");
    }

    #[test]
    fn a_step_teaches_what_service_takes() {
        let mut policy = Policy::new([0.0; 3]);
        policy.advance(5_000);
        assert_eq!(policy.service_ms(100, 100), 0, "nothing is known yet");
        for i in 1..100 {
            policy.note(Class::Batch, 50);
            policy.advance(5_000 + 100 * i);
        }
        // Idle time is no step's.
        policy.advance(1_000_000);
        assert_eq!(policy.service_ms(50, 10), 100 + 1000);
    }
}
