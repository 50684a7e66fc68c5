//! What a run may spend before it pauses. Knows nothing of rows. Invariant: what was committed stays, and the same command with
//! another budget goes on from there.

use super::spec::PriceSpec;
use crate::engine::EngineStats;
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

/// Limits of one run; `None` for no limit.
#[derive(Debug, Clone, Default)]
pub struct Budget {
    /// Prompt tokens and generated ones that are computed.
    pub max_tokens: Option<u64>,
    /// Their price and that of the time.
    pub max_cost: Option<f64>,
    /// Time since the work began.
    pub deadline: Option<Duration>,
    /// What things cost.
    pub prices: PriceSpec,
}

impl Budget {
    /// Checks that a cost can be known.
    ///
    /// # Errors
    /// A cost without prices, or one that is no number.
    pub fn check(&self) -> Result<()> {
        let PriceSpec { input, output, hour } = &self.prices;
        let has_prices = input.or(*output).or(*hour).is_some();
        ensure!(self.max_cost.is_none() || has_prices, "--max-cost: set prices.input, prices.output or prices.hour");
        ensure!(self.max_cost.is_none_or(|cost| cost.is_finite() && cost > 0.0), "--max-cost: must be a number over 0");
        Ok(())
    }

    /// What was reached, for people; `None` while there is something left.
    pub(super) fn reached(&self, stats: &EngineStats, since: Instant) -> Option<String> {
        let elapsed = since.elapsed();
        let tokens = stats.prefill_tokens + stats.generated_tokens;
        if let Some(max) = self.max_tokens.filter(|&max| tokens >= max) {
            return Some(format!("--max-tokens {max}"));
        }
        if let Some(deadline) = self.deadline.filter(|&deadline| elapsed >= deadline) {
            return Some(format!("--deadline {}", deadline.as_secs()));
        }
        let max = self.max_cost?;
        let price = |price: Option<f64>, amount: f64| price.unwrap_or(0.0) * amount;
        let prompt = price(self.prices.input, stats.prefill_tokens as f64 / 1e6);
        let generated = price(self.prices.output, stats.generated_tokens as f64 / 1e6);
        let cost = prompt + generated + price(self.prices.hour, elapsed.as_secs_f64() / 3600.0);
        (cost >= max).then(|| format!("--max-cost {max}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_is_reached() {
        let stats = EngineStats { prefill_tokens: 600_000, generated_tokens: 400_000, ..EngineStats::default() };
        let reached = |budget: Budget| budget.reached(&stats, Instant::now()).is_some();
        let prices = PriceSpec { input: Some(1.0), output: Some(2.0), hour: None };
        assert!(!reached(Budget::default()));
        assert!(reached(Budget { max_tokens: Some(1_000_000), ..Budget::default() }));
        assert!(!reached(Budget { max_tokens: Some(1_000_001), ..Budget::default() }));
        assert!(reached(Budget { max_cost: Some(1.39), prices: prices.clone(), ..Budget::default() }));
        assert!(!reached(Budget { max_cost: Some(1.41), prices: prices.clone(), ..Budget::default() }));
        assert!(reached(Budget { deadline: Some(Duration::ZERO), ..Budget::default() }));
        assert!(!reached(Budget { deadline: Some(Duration::from_hours(1)), ..Budget::default() }));
        assert!(Budget { max_cost: Some(1.0), ..Budget::default() }.check().is_err());
        assert!(Budget { max_cost: Some(1.0), prices, ..Budget::default() }.check().is_ok());
    }
}
