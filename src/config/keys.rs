//! The keys that callers of a server may have, of the file and of the flags; of each only its hash stays.

use super::serve::KeyConfig;
use crate::server::budgets::{Budget, Period};
use crate::server::limits::Rates;
use crate::server::prices::micro_sum;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::ops::RangeInclusive;

/// `[[key]]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeyEntry {
    name: Option<String>,
    key: Option<String>,
    hash: Option<String>,
    #[serde(default)]
    admin: bool,
    #[serde(default = "one")]
    weight: u32,
    requests_per_minute: Option<u64>,
    tokens_per_minute: Option<u64>,
    batch_tokens: Option<u64>,
    max_cost: Option<f64>,
    cost_period: Option<Period>,
}

fn one() -> u32 {
    1
}

impl KeyEntry {
    fn budget(&self) -> Result<Option<Budget>> {
        let Some(most) = self.max_cost else {
            ensure!(self.cost_period.is_none(), "key.cost_period: needs key.max_cost");
            return Ok(None);
        };
        let most = micro_sum(most).context("key.max_cost")?;
        ensure!(most > 0, "key.max_cost: must be more than 0; leave it out for a key without a budget");
        Ok(Some(Budget { most, period: self.cost_period.unwrap_or_default() }))
    }
}

/// What keys may weigh.
const WEIGHTS: RangeInclusive<u32> = 1..=1000;

/// What keys may ask for that say nothing of their own: requests and tokens a minute, and tokens in batches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Common {
    pub(super) requests_per_minute: u64,
    pub(super) tokens_per_minute: u64,
    pub(super) batch_tokens: Option<u64>,
}

impl Common {
    /// In batches as many as the key gets in a day, where nothing is said.
    pub(super) fn rates(self) -> Rates {
        let Self { requests_per_minute, tokens_per_minute, batch_tokens } = self;
        let batch_tokens = batch_tokens.unwrap_or(tokens_per_minute.saturating_mul(24 * 60));
        Rates { requests_per_minute, tokens_per_minute, batch_tokens }
    }
}

/// Keys that are given as they are, and entries of the file.
pub(super) fn keys<'k>(plain: impl Iterator<Item = &'k String>, entries: &[KeyEntry], common: Common) -> Result<Vec<KeyConfig>> {
    let rates = common.rates();
    let plain = plain.map(|key| {
        ensure!(!key.is_empty(), "server.api_keys: a key is empty");
        Ok(KeyConfig { name: None, hash: blake3::hash(key.as_bytes()), rates, is_admin: false, weight: 1, budget: None })
    });
    let entries = entries.iter().map(|entry| {
        let hash = match (&entry.key, &entry.hash) {
            (Some(key), None) if !key.is_empty() => blake3::hash(key.as_bytes()),
            (None, Some(hash)) => blake3::Hash::from_hex(hash).context("key.hash: is not what `valar key` prints")?,
            _ => bail!("key: needs either key or hash"),
        };
        ensure!(WEIGHTS.contains(&entry.weight), "key.weight: must be {} to {}", WEIGHTS.start(), WEIGHTS.end());
        let own = Common {
            requests_per_minute: entry.requests_per_minute.unwrap_or(common.requests_per_minute),
            tokens_per_minute: entry.tokens_per_minute.unwrap_or(common.tokens_per_minute),
            batch_tokens: entry.batch_tokens.or(common.batch_tokens),
        };
        let budget = entry.budget()?;
        let (name, rates) = (entry.name.clone(), own.rates());
        Ok(KeyConfig { name, hash, rates, is_admin: entry.admin, weight: entry.weight, budget })
    });
    let keys: Vec<KeyConfig> = plain.chain(entries).collect::<Result<_>>()?;
    for (i, key) in keys.iter().enumerate() {
        ensure!(key.name.as_deref() != Some(""), "key.name: is empty; leave it out, or say whose the key is");
        // Which of two counts, and whose usage is whose, could not be told.
        ensure!(keys[..i].iter().all(|other| other.hash != key.hash), "key: the same key stands there twice");
        let name = key.name.as_ref();
        ensure!(
            name.is_none() || keys[..i].iter().all(|other| other.name.as_ref() != name),
            "key.name: {name:?} stands there twice"
        );
    }
    Ok(keys)
}
