//! Prices and amounts of money, in whole numbers. Knows no call. Invariant: nothing is rounded but prices that are derived
//! from others, once, and the cost of time, so that parts add up to the whole.

use super::windows::Window;
use crate::outcome::Usage;
use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fmt;

/// Prices have so many millionths a unit, and amounts so many millionths of that.
const MILLION: u64 = 1_000_000;
/// Where a configuration says nothing: standard as a share of asap, cached tokens as a share of input, in percent.
const STANDARD_PERCENT: u64 = 55;
const CACHED_PERCENT: u64 = 10;
/// Highest price.
const MAX_PRICE: f64 = 1e6;
/// Most that may be said of a sum: an f64 is within a fiftieth of a millionth of it.
const MAX_SUM: f64 = 1e8;
/// Nanoseconds of an hour.
const HOUR_NS: i128 = 3_600_000_000_000;

/// Prices of a million tokens, in millionths of the currency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Price {
    /// Of prompts, but for what was in the cache.
    pub input: u64,
    /// Of prompts that were in the cache.
    pub cached: u64,
    /// Generated.
    pub output: u64,
}

/// A sum of money, in millionths of millionths of the currency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Amount(pub i128);

impl Amount {
    /// So many millionths of the currency.
    pub fn of_micro(value: u64) -> Self {
        Self(i128::from(value) * i128::from(MILLION))
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = u128::from(MILLION * MILLION);
        let (sign, value) = (if self.0 < 0 { "-" } else { "" }, self.0.unsigned_abs());
        let text = format!("{sign}{}.{:012}", value / unit, value % unit);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

/// A price as it is shown.
fn shown(price: u64) -> String {
    Amount::of_micro(price).to_string()
}

impl Price {
    /// What tokens cost, in millionths of millionths. A price is at most 10^12 of its parts, so that no number of tokens makes it
    /// more than an amount holds.
    pub fn charge(self, input_tokens: u64, cached_tokens: u64, output_tokens: u64) -> i128 {
        let computed = input_tokens.saturating_sub(cached_tokens);
        let parts = [(computed, self.input), (cached_tokens.min(input_tokens), self.cached), (output_tokens, self.output)];
        parts.iter().map(|(n, price)| i128::from(*n) * i128::from(*price)).sum()
    }

    /// As [`Price::charge`], of one answer.
    pub fn of(self, usage: Usage) -> i128 {
        self.charge(usage.prompt_tokens.into(), usage.cached_tokens.into(), usage.completion_tokens.into())
    }

    /// For a million tokens.
    pub fn shown(self) -> Value {
        json!({"input": shown(self.input), "cached_input": shown(self.cached), "output": shown(self.output)})
    }
}

/// What time of a machine costs that costs `hour_price` an hour: nanoseconds times that price.
pub fn machine_amount(ns_times_price: i128) -> Amount {
    Amount(ns_times_price.saturating_mul(i128::from(MILLION)).div_euclid(HOUR_NS))
}

/// The prices of a model; all are there, or none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prices(Option<[Price; 3]>);

impl Prices {
    /// Of a window.
    pub fn of(self, window: Window) -> Option<Price> {
        let [asap, standard, _] = self.0?;
        Some(match window {
            Window::Asap => asap,
            Window::Standard => standard,
        })
    }

    /// Of batches.
    pub fn of_batch(self) -> Option<Price> {
        self.0.map(|[_, _, batch]| batch)
    }
}

impl Prices {
    /// Of a million tokens, in each window that is supported, and in batches; nothing where nothing is known.
    pub fn shown(self, windows: &[Window], currency: &str) -> Value {
        let Some(batch) = self.of_batch() else { return Value::Null };
        let mut shown = json!({"currency": currency, "per_tokens": MILLION});
        for window in windows {
            shown[window.as_str()] = self.of(*window).map(Price::shown).into();
        }
        shown["batch"] = batch.shown();
        shown
    }
}

/// What a configuration says of a window's prices.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriceSpec {
    input: f64,
    cached: Option<f64>,
    output: f64,
}

/// What a configuration says of a model's prices.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PricesSpec {
    /// Of asap.
    pub asap: Option<PriceSpec>,
    /// Of standard.
    pub standard: Option<PriceSpec>,
    /// Of batches.
    pub batch: Option<PriceSpec>,
}

impl PricesSpec {
    /// What is said here, else what `other` says.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        if self == Self::default() { other } else { self }
    }

    /// Checked and complete.
    ///
    /// # Errors
    /// A price that is none, by its name, or prices without that of asap.
    pub fn checked(self) -> Result<Prices> {
        if self == Self::default() {
            return Ok(Prices::default());
        }
        let asap = self.asap.context("asap: is needed where there are prices")?.checked().context("asap")?;
        let share = |price: u64| (price * STANDARD_PERCENT + 50) / 100;
        let derived = Price { input: share(asap.input), cached: share(asap.cached), output: share(asap.output) };
        let standard = self.standard.map(PriceSpec::checked).transpose().context("standard")?.unwrap_or(derived);
        let batch = self.batch.map(PriceSpec::checked).transpose().context("batch")?.unwrap_or(standard);
        Ok(Prices(Some([asap, standard, batch])))
    }
}

impl PriceSpec {
    fn checked(self) -> Result<Price> {
        let (input, output) = (micro(self.input).context("input")?, micro(self.output).context("output")?);
        let derived = (input * CACHED_PERCENT + 50) / 100;
        let cached = self.cached.map(micro).transpose().context("cached")?.unwrap_or(derived);
        Ok(Price { input, cached, output })
    }
}

/// A price in millionths.
///
/// # Errors
/// It is none, or finer than that.
pub fn micro(price: f64) -> Result<u64> {
    ensure!((0.0..=MAX_PRICE).contains(&price), "{price} is no price of 0 to {MAX_PRICE}");
    millionths(price, 0.01)
}

/// A sum of money in millionths.
///
/// # Errors
/// It is none, or finer than that.
pub fn micro_sum(sum: f64) -> Result<u64> {
    ensure!((0.0..=MAX_SUM).contains(&sum), "{sum} is no sum of 0 to {MAX_SUM}");
    millionths(sum, 0.05)
}

/// With so much of one for what an f64 can't say.
fn millionths(value: f64, tolerance: f64) -> Result<u64> {
    let millionths = value * MILLION as f64;
    ensure!((millionths - millionths.round()).abs() < tolerance, "{value} has more than six decimals");
    Ok(millionths.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prices_that_are_not_said_follow_from_those_that_are() {
        let spec: PricesSpec = toml::from_str("asap = { input = 0.1, output = 0.4 }").unwrap();
        let prices = spec.checked().unwrap();
        let asap = Price { input: 100_000, cached: 10_000, output: 400_000 };
        let standard = Price { input: 55_000, cached: 5_500, output: 220_000 };
        assert_eq!(prices.of(Window::Asap), Some(asap));
        assert_eq!((prices.of(Window::Standard), prices.of_batch()), (Some(standard), Some(standard)));
        // A million tokens of each: 0.1 - 0.05 + 0.005 + 0.4.
        assert_eq!(Amount(asap.charge(1_000_000, 500_000, 1_000_000)).to_string(), "0.455");
        let most = Price { input: 1_000_000_000_000, cached: 0, output: 1_000_000_000_000 };
        assert_eq!(Amount(most.charge(u64::MAX, 0, u64::MAX)).to_string(), "36893488147419103230");
        assert_eq!(PricesSpec::default().checked().unwrap().of(Window::Asap), None);
        for wrong in [
            "standard = { input = 1, output = 1 }",
            "asap = { input = -1.0, output = 1.0 }",
            "asap = { input = 0.1234567, output = 1.0 }",
        ] {
            assert!(
                toml::from_str::<PricesSpec>(wrong).map_err(anyhow::Error::from).and_then(PricesSpec::checked).is_err(),
                "{wrong}"
            );
        }
    }

    proptest! {
        /// Amounts are shown whole: what is shown, read back, is the amount.
        #[test]
        fn an_amount_is_shown_as_it_is(value in -(1_i128 << 80)..1_i128 << 80) {
            let text = Amount(value).to_string();
            let (whole, part) = text.split_once('.').unwrap_or((&text, ""));
            prop_assert_eq!(format!("{whole}{part:0<12}").parse::<i128>().unwrap(), value);
        }

        /// However answers are put together, they cost the same.
        #[test]
        fn parts_cost_what_the_whole_does(parts in prop::collection::vec((0..9999_u64, 0..9999_u64, 0..9999_u64), 0..20)) {
            let price = Price { input: 137_001, cached: 13_700, output: 999_983 };
            let sum = parts.iter().fold((0, 0, 0), |s, p| (s.0 + p.0 + p.1, s.1 + p.1, s.2 + p.2));
            let each: i128 = parts.iter().map(|p| price.charge(p.0 + p.1, p.1, p.2)).sum();
            prop_assert_eq!(each, price.charge(sum.0, sum.1, sum.2));
        }
    }
}
