//! About how many tokens a batch may come to, and how many it will probably come to, before its lines are checked: from their length and what they ask for. Knows no
//! tokenizer. The check, which has one, tells the number that holds from then on.

use super::App;
use super::models::Offered;
use crate::format::openai::{COMPLETIONS_MAX_TOKENS, Endpoint};
use anyhow::Result;
use serde::Deserialize;
use std::io::BufRead;

/// Bytes of a line that stand for a token.
const BYTES_A_TOKEN: u64 = 4;

/// Most completions of a request.
const MAX_ROW_SEQUENCES: u64 = 1024;

/// More is not counted.
const MOST: u64 = 1 << 50;

/// What a line asks for; all else is skipped.
#[derive(Default, Deserialize)]
struct Line {
    #[serde(default)]
    body: Body,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Body {
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    max_output_tokens: Option<u64>,
    n: Option<u64>,
}

impl Body {
    /// Tokens of an answer, if this many are the most where it says nothing.
    fn most(&self, default: u64) -> u64 {
        self.max_completion_tokens.or(self.max_output_tokens).or(self.max_tokens).unwrap_or(default)
    }

    /// Tokens of a request of so many bytes, about, and the most of its answer.
    pub(super) fn asked(&self, n_bytes: usize) -> (usize, u32) {
        (n_bytes.div_ceil(BYTES_A_TOKEN as usize), u32::try_from(self.most(u64::MAX)).unwrap_or(u32::MAX))
    }

    /// Tokens of a request of so many bytes, and of its answer, which will probably have `drawn`.
    pub(super) fn likely(&self, n_bytes: usize, drawn: u64) -> u64 {
        let n_own = (n_bytes as u64).div_ceil(BYTES_A_TOKEN);
        // A request for more is found by the check.
        let n = self.n.unwrap_or(1).min(MAX_ROW_SEQUENCES);
        n_own.saturating_add(self.most(drawn).min(drawn).saturating_mul(n))
    }
}

/// What the requests of a file come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Estimate {
    /// Tokens at most.
    pub(super) most: u64,
    /// Tokens, probably.
    pub(super) likely: u64,
    pub(super) n_lines: u64,
}

/// Tokens that a request is answered with at most, where it says nothing.
pub(super) fn default_output(app: &App, model: &Offered, endpoint: &str) -> u64 {
    match app.defaults.max_tokens {
        Some(n_tokens) => n_tokens.into(),
        None if Endpoint::parse(endpoint) == Some(Endpoint::Completions) => COMPLETIONS_MAX_TOKENS.into(),
        None => model.live.preparer.max_context as u64,
    }
}

/// About how many tokens the requests of a file come to; their answers will probably have `drawn` each.
pub(super) fn estimate(mut lines: impl BufRead, default_output: u64, drawn: u64) -> Result<Estimate> {
    let (mut line, mut all) = (Vec::new(), Estimate::default());
    while lines.read_until(b'\n', &mut line)? > 0 {
        let text = line.trim_ascii();
        if !text.is_empty() {
            // What can't be read is found by the check.
            let body = serde_json::from_slice::<Line>(text).unwrap_or_default().body;
            let n_own = (text.len() as u64).div_ceil(BYTES_A_TOKEN);
            let most = n_own.saturating_add(body.most(default_output).saturating_mul(body.n.unwrap_or(1)));
            // As many as a number of the database holds, also of all batches together.
            all.most = all.most.saturating_add(most).min(MOST);
            all.likely = all.likely.saturating_add(body.likely(text.len(), drawn)).min(MOST);
            all.n_lines += 1;
        }
        line.clear();
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_counts_by_its_length_and_by_what_it_asks_for() {
        let line = |body: &str| format!("{{\"body\": {body}}}");
        let lines = [
            line(r#"{"max_tokens": 5, "n": 3}"#),
            line(r#"{"messages": []}"#),
            "{broken".into(),
            String::new(),
            line(r#"{"max_completion_tokens": 7, "max_tokens": 9}"#),
        ];
        let n_own: u64 = lines.iter().map(|line| (line.len() as u64).div_ceil(4)).sum();
        let found = estimate(lines.join("\r\n").as_bytes(), 1000, 6).unwrap();
        let expected = Estimate { most: n_own + 15 + 1000 + 1000 + 7, likely: n_own + 15 + 6 + 6 + 6, n_lines: 4 };
        assert_eq!(found, expected);
        let most = line(r#"{"max_tokens": 18446744073709551615, "n": 9}"#);
        let found = estimate(most.as_bytes(), 0, 1 << 60).unwrap();
        assert_eq!(found, Estimate { most: MOST, likely: MOST, n_lines: 1 });
    }
}
