//! How the models of a server share its memories: the machine's, and that of each GPU.

use super::serve::{Load, ModelEntry};
use super::{ModelConfig, parse_bytes};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;

impl ModelConfig {
    /// What those that are loaded once have in common.
    pub fn weights(&self) -> (&str, &str, &str, &str, Option<&PathBuf>) {
        (&self.name, &self.device, &self.numerics, &self.kv, self.chat_template.as_ref())
    }
}

/// The GPU that an entry's model is for, if it is for one. `auto` may be for either: it gets a share of the machine's memory, and
/// on a GPU one of what is free there.
fn gpu(entry: &ModelEntry) -> Option<&str> {
    let number = entry.device.strip_prefix("cuda")?;
    Some(number.strip_prefix(':').unwrap_or("0"))
}

/// How many models may share a GPU's memory with that of an entry, that one counted.
pub(super) fn n_sharing(entries: &[ModelEntry], entry: &ModelEntry) -> u64 {
    let gpu_or_auto =
        |entry: &ModelEntry| if entry.device == "auto" { Some("0".to_owned()) } else { gpu(entry).map(str::to_owned) };
    let own = gpu_or_auto(entry);
    let is_first = |i: usize| entries[..i].iter().all(|earlier| !earlier.is_with(&entries[i]));
    (0..entries.len()).filter(|&i| is_first(i) && gpu_or_auto(&entries[i]) == own).count().max(1) as u64
}

/// What each entry's model may take when it is loaded: what it says; else an even share of what the others that are loaded at
/// the start leave of the budget of its memory. Of a GPU that is what is free there, unless a budget is given: nothing is shared
/// out here.
pub(super) fn shares(entries: &[ModelEntry], budget: u64, is_given: bool) -> Result<Vec<u64>> {
    let mut shares = vec![0; entries.len()];
    for i in 0..entries.len() {
        if entries[..i].iter().any(|earlier| gpu(earlier) == gpu(&entries[i])) {
            continue;
        }
        let of_memory: Vec<usize> = (i..entries.len()).filter(|&other| gpu(&entries[other]) == gpu(&entries[i])).collect();
        let budget = if is_given || gpu(&entries[i]).is_none() { budget } else { u64::MAX };
        for (at, share) in of_memory.iter().zip(shares_of(entries, &of_memory, budget)?) {
            shares[*at] = share;
        }
    }
    Ok(shares)
}

/// Of those entries that share a memory.
fn shares_of(entries: &[ModelEntry], own: &[usize], budget: u64) -> Result<Vec<u64>> {
    let entries: Vec<&ModelEntry> = own.iter().map(|&i| &entries[i]).collect();
    let firsts: Vec<usize> =
        (0..entries.len()).filter(|&i| entries[..i].iter().all(|other| !other.is_with(entries[i]))).collect();
    let mut own = vec![None; entries.len()];
    let (mut told, mut n_even) = (0_u64, 0_u64);
    for &first in &firsts {
        let same = || (first..entries.len()).filter(|&i| entries[i].is_with(entries[first]));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(weights: &str, device: &str, memory: Option<&str>) -> ModelEntry {
        let mut entry = ModelEntry::of(weights.into());
        (entry.device, entry.memory) = (device.into(), memory.map(str::to_owned));
        entry
    }

    #[test]
    fn a_gpu_and_the_machine_have_memories_of_their_own() {
        let entries = [entry("a", "cpu", None), entry("b", "cuda", Some("3KiB")), entry("c", "cuda:0", None)];
        assert_eq!(shares(&entries, 4096, true).unwrap(), [4096, 3072, 1024]);
        assert_eq!(entries.each_ref().map(|entry| n_sharing(&entries, entry)), [1, 2, 2]);
        // What a GPU has free may be more than the machine's memory.
        let large = [entry("a", "cpu", None), entry("b", "cuda:1", Some("60GiB"))];
        assert_eq!(shares(&large, 4096, false).unwrap(), [4096, 60 << 30]);
        assert!(shares(&large, 4096, true).is_err());
        assert!(shares(&[entry("b", "auto", Some("60GiB"))], 4096, false).is_err(), "it may be for the machine");
    }
}
