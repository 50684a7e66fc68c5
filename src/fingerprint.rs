//! What the bits of a completion depend on (exactness.md R9). Two runs with equal fingerprints give equal rows equal
//! tokens and log-probabilities; runs with different ones may not share a job, a journal or a cache. Knows nothing of how
//! the parts are found out.

use std::fmt;

/// Everything that a row's bits depend on besides the row.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    /// [`content_hash`] of the weights' file.
    pub weights: String,
    /// [`content_hash`] of what the tokenizer is made from.
    pub tokenizer: String,
    /// [`content_hash`] of the chat template.
    pub template: String,
    /// Device, kernel version, numerics and KV type (`Device::fingerprint`).
    pub device: String,
}

/// The short form, `fp_` and 16 hexadecimal digits: stands in manifests, journals and responses (`system_fingerprint`).
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { weights, tokenizer, template, device } = self;
        let mut hasher = blake3::Hasher::new();
        for part in [weights, tokenizer, template, device] {
            // The length keeps ("ab", "c") and ("a", "bc") apart.
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        write!(f, "fp_{}", &hasher.finalize().to_hex()[..16])
    }
}

/// BLAKE3 of some bytes, given in parts, 64 hexadecimal digits. About 1 GB/s: 0.1 s for a small model's file.
pub fn content_hash(parts: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_counts() {
        let parts = |p: [&str; 4]| {
            let [weights, tokenizer, template, device] = p.map(str::to_owned);
            Fingerprint { weights, tokenizer, template, device }.to_string()
        };
        let base = parts(["a", "b", "c", "d"]);
        assert_eq!(base.len(), 19);
        assert_eq!(base, parts(["a", "b", "c", "d"]));
        for other in
            [["x", "b", "c", "d"], ["a", "x", "c", "d"], ["a", "b", "x", "d"], ["a", "b", "c", "x"], ["ab", "", "c", "d"]]
        {
            assert_ne!(base, parts(other), "{other:?}");
        }
    }
}
