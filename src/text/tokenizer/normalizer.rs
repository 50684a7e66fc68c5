//! Checks what the crate would do with a normalizer of a file before it does it. Knows the field names of tokenizer.json.
//! Invariant: a normalizer that passes makes a text at most [`MAX_GROWTH`] times as long, and takes memory by its own size.

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

/// How much longer a text may get by all replacements.
const MAX_GROWTH: usize = 4096;

/// Checks a normalizer of tokenizer.json.
pub(super) fn check(value: &Value) -> Result<()> {
    let growth = growth(value)?;
    ensure!(growth <= MAX_GROWTH, "it makes texts {growth} times as long or more, the limit is {MAX_GROWTH}");
    Ok(())
}

/// How many times as long a text can become.
fn growth(value: &Value) -> Result<usize> {
    let all_of = |parts: &Value| {
        let parts = parts.as_array().map_or(&[][..], Vec::as_slice);
        parts.iter().try_fold(1usize, |product, part| Ok(product.saturating_mul(growth(part)?)))
    };
    match value["type"].as_str() {
        Some("Replace") => {
            let n_content = value["content"].as_str().unwrap_or_default().len();
            // What an expression matches may be nothing at all, between any two bytes.
            let n_pattern = value["pattern"]["String"].as_str().unwrap_or_default().len();
            Ok(if n_pattern == 0 { n_content + 1 } else { n_content.div_ceil(n_pattern).max(1) })
        }
        Some("Precompiled") => {
            let charsmap = value["precompiled_charsmap"].as_str().unwrap_or_default();
            check_charsmap(&STANDARD.decode(charsmap).context("precompiled_charsmap is not base64")?)?;
            Ok(1)
        }
        _ => all_of(&value["normalizers"]),
    }
}

/// Checks the length that `SentencePiece`'s map of characters begins with: the crate takes memory by it.
pub(super) fn check_charsmap(charsmap: &[u8]) -> Result<()> {
    let Some((size, rest)) = charsmap.split_first_chunk() else { bail!("precompiled_charsmap is cut off") };
    let size = u32::from_le_bytes(*size) as usize;
    ensure!(size <= rest.len(), "precompiled_charsmap: a tree of {size} bytes in {} bytes", rest.len());
    Ok(())
}
