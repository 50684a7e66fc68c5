//! How much a key may ask for: requests and tokens a minute, tokens in batches. Knows no call. Invariant: over any time a key
//! gets no more than its rate and what it had saved up, but for one call, however many come at the same time: what a call may
//! come to is taken before it runs, and what it does not use is given back when it ends.

use super::budgets::HeldCost;
use super::errors::ApiError;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::Deserialize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Seconds in which a bucket fills.
const MINUTE_S: f64 = 60.0;

/// What a key may ask for; 0: as much as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rates {
    /// Requests a minute.
    pub requests_per_minute: u64,
    /// Tokens a minute, of prompts and answers.
    pub tokens_per_minute: u64,
    /// Tokens that its batches which have not ended may come to, of prompts and answers.
    pub batch_tokens: u64,
}

/// What is left of a minute's worth, which fills up again as time goes by.
#[derive(Debug, Clone)]
struct Bucket {
    size: f64,
    /// Less than nothing where more was taken than was there.
    left: f64,
    at: Duration,
}

impl Bucket {
    fn new(size: u64) -> Option<Self> {
        (size > 0).then_some(Self { size: size as f64, left: size as f64, at: Duration::ZERO })
    }

    fn fill(&mut self, now: Duration) {
        let gained = now.saturating_sub(self.at).as_secs_f64() * self.size / MINUTE_S;
        (self.left, self.at) = ((self.left + gained).min(self.size), now.max(self.at));
    }

    /// Time until there is as much as that.
    fn wait(&self, wanted: f64) -> Duration {
        Duration::from_secs_f64(((wanted - self.left) * MINUTE_S / self.size).max(0.0))
    }
}

/// What a key has left.
#[derive(Debug)]
pub(super) struct Allowance {
    since: Instant,
    buckets: Mutex<[Option<Bucket>; 2]>,
    /// As [`Rates::batch_tokens`].
    pub(super) batch_tokens: u64,
}

/// The names of the buckets.
const NAMES: [&str; 2] = ["requests", "tokens"];

impl Allowance {
    pub(super) fn new(rates: Rates) -> Self {
        let buckets = [Bucket::new(rates.requests_per_minute), Bucket::new(rates.tokens_per_minute)];
        Self { since: Instant::now(), buckets: Mutex::new(buckets), batch_tokens: rates.batch_tokens }
    }

    fn with<T>(&self, work: impl FnOnce(&mut [Option<Bucket>; 2]) -> T) -> T {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.since.elapsed();
        buckets.iter_mut().flatten().for_each(|bucket| bucket.fill(now));
        work(&mut buckets)
    }

    /// Takes a request.
    ///
    /// # Errors
    /// There is none left, or no token: 429, with the time until there is.
    pub(super) fn take_request(&self) -> Result<(), ApiError> {
        let short = self.with(|buckets| {
            let short = buckets.iter().zip(NAMES).find_map(|(bucket, name)| {
                let bucket = bucket.as_ref().filter(|bucket| bucket.left < 1.0)?;
                Some((name, bucket.size, bucket.wait(1.0)))
            });
            if short.is_none() {
                buckets[0].iter_mut().for_each(|requests| requests.left -= 1.0);
            }
            short
        });
        short.map_or(Ok(()), |(name, size, wait)| Err(too_many(name, size, wait)))
    }

    /// Takes tokens that a call may come to, before it runs. They may be more than are left, if any is: what is beyond is owed.
    ///
    /// # Errors
    /// There is none left: 429, with the time until there is.
    pub(super) fn hold(self: &Arc<Self>, n_tokens: u64) -> Result<Held, ApiError> {
        self.with(|buckets| {
            let Some(tokens) = &mut buckets[1] else { return Ok(()) };
            if tokens.left < 1.0 {
                return Err(too_many(NAMES[1], tokens.size, tokens.wait(1.0)));
            }
            tokens.left -= n_tokens as f64;
            Ok(())
        })?;
        Ok(Held { allowance: Arc::clone(self), left: n_tokens, cost: None })
    }

    /// Takes tokens, whether they are there or not.
    pub(super) fn take_tokens(&self, n: u64) {
        self.with(|buckets| buckets[1].iter_mut().for_each(|tokens| tokens.left -= n as f64));
    }

    /// Says what is left, to clients of both dialects.
    pub(super) fn tell(&self, headers: &mut HeaderMap) {
        let now = chrono::Utc::now();
        self.with(|buckets| {
            for (bucket, name) in buckets.iter().zip(NAMES) {
                let Some(bucket) = bucket else { continue };
                let left = bucket.left.max(0.0).floor() as u64;
                let full = bucket.wait(bucket.size);
                let at = now + full;
                let mut put = |key: String, value: String| {
                    if let (Ok(key), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) {
                        headers.insert(key, value);
                    }
                };
                for (prefix, suffix, reset) in [
                    ("x-ratelimit-", ["limit-", "remaining-", "reset-"], shown(full)),
                    (
                        "anthropic-ratelimit-",
                        ["-limit", "-remaining", "-reset"],
                        at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
                    ),
                ] {
                    let values = [bucket.size.to_string(), left.to_string(), reset];
                    for (part, value) in suffix.into_iter().zip(values) {
                        let key =
                            if part.ends_with('-') { format!("{prefix}{part}{name}") } else { format!("{prefix}{name}{part}") };
                        put(key, value);
                    }
                }
            }
        });
    }
}

/// Tokens that were taken before it is known whether they are used. Those that are not go back when this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    allowance: Arc<Allowance>,
    left: u64,
    /// Of its owner's budget, until it is charged.
    cost: Option<HeldCost>,
}

impl Held {
    /// So many were used.
    pub(super) fn spend(&mut self, n_tokens: u64) {
        self.left = self.left.saturating_sub(n_tokens);
    }

    /// With what was taken of its owner's budget.
    pub(super) fn with_cost(self, cost: HeldCost) -> Self {
        let mut own = self;
        own.cost = Some(cost);
        own
    }

    /// No more of its tokens are used.
    pub(super) fn give_back(&mut self) {
        let n_tokens = std::mem::take(&mut self.left) as f64;
        self.allowance.with(|buckets| {
            buckets[1].iter_mut().for_each(|tokens| tokens.left = (tokens.left + n_tokens).min(tokens.size));
        });
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.give_back();
    }
}

fn too_many(name: &str, size: f64, wait: Duration) -> ApiError {
    let message = format!("the key's limit of {size} {name} a minute is reached; there are more in {}", shown(wait));
    let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded"), message);
    ApiError { retry_after_s: Some(wait.as_secs_f64().ceil().max(1.0) as u32), ..error }
}

/// The code of [`too_many_in_batches`].
pub(super) const IN_BATCHES: &str = "token_limit_exceeded";

/// What a batch is told that its key has no tokens left for. No wait helps: other batches must end first.
pub(super) fn too_many_in_batches(limit: u64, used: u64, asked: u64) -> String {
    format!("the key's limit of {limit} tokens in batches that have not ended: {used} are used, and this one may come to {asked}")
}

/// `6m0s`, `1.2s` or `12ms`.
fn shown(time: Duration) -> String {
    let (seconds, millis) = (time.as_secs(), time.as_millis());
    match seconds {
        0 => format!("{millis}ms"),
        1..60 => format!("{}s", (time.as_secs_f64() * 1e3).round() / 1e3),
        _ => format!("{}m{}s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is asked for and when, no more is given than the size and what has come in since.
        #[test]
        fn a_bucket_gives_no_more_than_its_rate(asks in prop::collection::vec((0..9000_u64, 1..200_u64), 1..60), size in 1..300_u64) {
            let mut bucket = Bucket::new(size).unwrap();
            let (mut now, mut given) = (Duration::ZERO, 0.0);
            for (millis, wanted) in asks {
                now += Duration::from_millis(millis);
                bucket.fill(now);
                let wanted = wanted as f64;
                if bucket.left >= wanted {
                    bucket.left -= wanted;
                    given += wanted;
                } else if wanted <= size as f64 {
                    // It says truly how long it takes.
                    let mut later = bucket.clone();
                    later.fill(now + bucket.wait(wanted) + Duration::from_micros(1));
                    prop_assert!(later.left >= wanted - 1e-6);
                }
                prop_assert!(given <= size as f64 * (1.0 + now.as_secs_f64() / MINUTE_S) + 1e-6);
            }
        }
    }

    #[test]
    fn what_is_held_and_not_used_goes_back() {
        let allowance = Arc::new(Allowance::new(Rates { tokens_per_minute: 1000, ..Rates::default() }));
        let mut first = allowance.hold(5000).unwrap();
        // A burst: none of the others gets anything while the first may use all of it.
        assert!((0..9).all(|_| allowance.hold(1).is_err()));
        first.spend(4000);
        drop(first);
        assert!(allowance.hold(1).is_err(), "3000 are owed");
        let other = Arc::new(Allowance::new(Rates { tokens_per_minute: 1000, ..Rates::default() }));
        drop(other.hold(5000).unwrap());
        other.take_tokens(1001);
        assert!(other.take_request().is_err(), "more went back than was taken");
    }

    #[test]
    fn tokens_that_were_not_there_are_owed() {
        let allowance = Allowance::new(Rates { tokens_per_minute: 60, ..Rates::default() });
        allowance.take_request().unwrap();
        allowance.take_tokens(60_000_000);
        let error = allowance.take_request().unwrap_err();
        assert!(error.status.as_u16() == 429 && error.retry_after_s.is_some_and(|seconds| seconds > 1_000_000), "{error:?}");
        let mut headers = HeaderMap::new();
        allowance.tell(&mut headers);
        assert_eq!(
            (&headers["x-ratelimit-limit-tokens"], &headers["anthropic-ratelimit-tokens-remaining"]),
            (&"60".parse::<HeaderValue>().unwrap(), &"0".parse::<HeaderValue>().unwrap())
        );
        assert!(!headers.contains_key("x-ratelimit-limit-requests"));
        assert_eq!(
            [shown(Duration::from_millis(12)), shown(Duration::from_millis(1200)), shown(Duration::from_mins(6))],
            ["12ms", "1.2s", "6m0s"]
        );
    }
}
