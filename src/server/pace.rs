//! How many tokens a step may have, so that whoever comes waits no longer than a step may take: by the speed of the steps
//! before. Changes no result, only how prompts are cut into steps.

use crate::engine::{EngineStats, StepLimits};
use crate::pipeline::meter::Meter;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// Steps of fewer tokens say what a step takes whatever is in it; those of more, what a token takes.
const MIN_TOKENS: u64 = 32;
/// How much a new step counts against those before.
const NEW_SHARE: f64 = 0.2;
/// Fewer tokens in a step would make prompts wait for ever.
const LEAST: usize = 32;
/// Part of the time that is aimed at: some steps take longer than was thought.
const AIM: f64 = 0.85;

/// See the module.
pub(super) struct Pace {
    meter: Arc<Meter>,
    /// What a step may take; `None` for as long as it likes.
    max_step: Option<Duration>,
    limits: Arc<StepLimits>,
    /// Time and tokens of all steps before.
    before: (Duration, u64),
    speed: Speed,
}

/// What steps take.
#[derive(Debug, Default)]
struct Speed {
    /// Seconds of a step, whatever is in it; 0: not known.
    base_s: f64,
    /// Seconds of a token more; 0: not known.
    token_s: f64,
}

impl Speed {
    fn note(&mut self, step_s: f64, n_tokens: u64) {
        if n_tokens == 0 {
            return;
        }
        if n_tokens < MIN_TOKENS {
            self.base_s = if self.base_s > 0.0 { self.base_s + NEW_SHARE * (step_s - self.base_s) } else { step_s };
        } else {
            let new = (step_s - self.base_s).max(0.1 * step_s) / n_tokens as f64;
            // What is slower counts at once: the next step must not take too long.
            self.token_s = new.max(self.token_s * (1.0 - NEW_SHARE) + new * NEW_SHARE);
        }
    }

    /// Tokens of a step that takes so long.
    fn tokens(&self, step_s: f64) -> usize {
        // Where a step takes long whatever is in it, at least half of its time is work.
        let least = ((self.base_s / self.token_s) as usize).max(LEAST);
        (((step_s - self.base_s) / self.token_s).max(0.0) as usize).max(least)
    }
}

impl Pace {
    /// Times are `meter`'s; what follows goes to `limits`. Nothing does if `max_step` is zero.
    pub(super) fn new(meter: Arc<Meter>, max_step: Duration, limits: Arc<StepLimits>) -> Self {
        let max_step = Some(max_step).filter(|time| !time.is_zero());
        Self { meter, max_step, limits, before: (Duration::ZERO, 0), speed: Speed::default() }
    }

    /// What a step of so many tokens would take, as far as is known.
    pub(super) fn expected(&self, n_tokens: usize) -> Duration {
        Duration::try_from_secs_f64(self.speed.base_s + self.speed.token_s * n_tokens as f64).unwrap_or_default()
    }

    /// Learns from the step that just ended, and gives its time.
    pub(super) fn note(&mut self, stats: &EngineStats) -> Duration {
        let reading = self.meter.read();
        let time = reading.prefill + reading.decode;
        let tokens = stats.computed_tokens();
        let (step_time, step_tokens) = (time.saturating_sub(self.before.0), tokens - self.before.1);
        self.before = (time, tokens);
        self.speed.note(step_time.as_secs_f64(), step_tokens);
        if let Some(max_step) = self.max_step.filter(|_| self.speed.token_s > 0.0) {
            self.limits.tokens.store(self.speed.tokens(AIM * max_step.as_secs_f64()), Relaxed);
            self.limits.base_tokens.store((self.speed.base_s / self.speed.token_s) as usize, Relaxed);
        }
        step_time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_what_it_takes_and_more_for_each_token() {
        let mut speed = Speed::default();
        for n_tokens in [1, 500, 1, 2000, 1, 300] {
            speed.note(0.03 + 0.0005 * n_tokens as f64, n_tokens);
        }
        assert!((0.00045..0.00055).contains(&speed.token_s) && (0.030..0.031).contains(&speed.base_s), "{speed:?}");
        assert!((330..460).contains(&speed.tokens(0.25)), "{}", speed.tokens(0.25));
        speed.note(3.0, 300);
        assert!(speed.tokens(0.25) < LEAST + 1, "a step that takes too long shortens the next");
        for _ in 0..100 {
            speed.note(0.18, 300);
        }
        assert!(speed.tokens(0.25) > 300, "and is forgotten");
    }
}
