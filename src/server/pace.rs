//! How many tokens a step may have while somebody waits for it: as many as fit the time that a step may take, by the
//! speed of the steps before. Changes no result, only how prompts are cut into steps.

use crate::engine::EngineStats;
use crate::pipeline::meter::Meter;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Steps of fewer tokens say more of the weights' size than of a token's time.
const MIN_TOKENS: u64 = 32;
/// How much a new step counts against those before.
const NEW_SHARE: f64 = 0.2;
/// Fewer tokens in a step would make prompts wait for ever.
const LEAST: usize = 32;

/// See the module.
pub(super) struct Pace {
    meter: Arc<Meter>,
    max_step: Duration,
    limit: Arc<AtomicUsize>,
    /// Time and tokens of all steps before.
    before: (Duration, u64),
    seconds_per_token: f64,
}

impl Pace {
    /// Times are `meter`'s; the limit goes to `limit`.
    pub(super) fn new(meter: Arc<Meter>, max_step: Duration, limit: Arc<AtomicUsize>) -> Self {
        Self { meter, max_step, limit, before: (Duration::ZERO, 0), seconds_per_token: 0.0 }
    }

    /// Learns from the step that just ended, and gives its time.
    pub(super) fn note(&mut self, stats: &EngineStats) -> Duration {
        let reading = self.meter.read();
        let time = reading.prefill + reading.decode;
        let tokens = stats.prefill_tokens + stats.decode_tokens + stats.recomputed_tokens;
        let (step_time, step_tokens) = (time.saturating_sub(self.before.0), tokens - self.before.1);
        self.before = (time, tokens);
        if step_tokens < MIN_TOKENS {
            return step_time;
        }
        let new = step_time.as_secs_f64() / step_tokens as f64;
        // What is slower counts at once: the next step must not take too long.
        self.seconds_per_token = new.max(self.seconds_per_token * (1.0 - NEW_SHARE) + new * NEW_SHARE);
        if self.seconds_per_token > 0.0 {
            let limit = self.max_step.as_secs_f64() / self.seconds_per_token;
            self.limit.store((limit as usize).max(LEAST), Relaxed);
        }
        step_time
    }
}
