//! How the models of a server share its memory.

use super::parse_bytes;
use super::serve::{Load, ModelEntry};
use anyhow::{Context, Result, ensure};

/// What each entry's model may take when it is loaded: what it says; else an even share of what the others that are loaded at
/// the start leave of the budget.
pub(super) fn shares(entries: &[ModelEntry], budget: u64) -> Result<Vec<u64>> {
    let firsts: Vec<usize> =
        (0..entries.len()).filter(|&i| entries[..i].iter().all(|other| !other.is_with(&entries[i]))).collect();
    let mut own = vec![None; entries.len()];
    let (mut told, mut n_even) = (0_u64, 0_u64);
    for &first in &firsts {
        let same = || (first..entries.len()).filter(|&i| entries[i].is_with(&entries[first]));
        let mut texts = same().filter_map(|i| entries[i].memory.as_ref());
        let text = texts.next();
        let name = entries[first].id.as_ref().unwrap_or(&entries[first].weights);
        ensure!(
            texts.all(|other| Some(other) == text),
            "model.memory: the entries of {name} say different things of the same weights"
        );
        let bytes = text.map(|text| parse_bytes(text).context("model.memory")).transpose()?;
        if let Some(bytes) = bytes {
            let (mib, all) = (bytes >> 20, budget >> 20);
            ensure!(bytes <= budget, "model.memory: {mib} MiB for {name} are more than the {all} MiB of engine.memory");
        }
        if same().any(|i| entries[i].load == Load::Start) {
            told = told.saturating_add(bytes.unwrap_or(0));
            n_even += u64::from(bytes.is_none());
        }
        same().for_each(|i| own[i] = bytes);
    }
    ensure!(
        told <= budget,
        "model.memory: the models that are loaded at the start say {} MiB together, more than the {} MiB of engine.memory",
        told >> 20,
        budget >> 20
    );
    let even = (budget - told) / n_even.max(1);
    Ok(own.into_iter().map(|own| own.unwrap_or(even)).collect())
}
