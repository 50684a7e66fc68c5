//! About how many tokens a batch may come to, before its lines are checked: from their length and what they ask for. Knows no
//! tokenizer. The check, which has one, tells the number that holds from then on.

use super::App;
use super::models::Offered;
use crate::format::openai::{COMPLETIONS_MAX_TOKENS, Endpoint};
use anyhow::Result;
use serde::Deserialize;
use std::io::BufRead;

/// Bytes of a line that stand for a token.
const BYTES_A_TOKEN: u64 = 4;

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
struct Body {
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    max_output_tokens: Option<u64>,
    n: Option<u64>,
}

/// Tokens that a request is answered with at most, where it says nothing.
pub(super) fn default_output(app: &App, model: &Offered, endpoint: &str) -> u64 {
    match app.defaults.max_tokens {
        Some(n_tokens) => n_tokens.into(),
        None if Endpoint::parse(endpoint) == Some(Endpoint::Completions) => COMPLETIONS_MAX_TOKENS.into(),
        None => model.live.preparer.max_context as u64,
    }
}

/// About how many tokens the requests of a file may come to.
pub(super) fn estimate(mut lines: impl BufRead, default_output: u64) -> Result<u64> {
    let (mut line, mut n_tokens) = (Vec::new(), 0_u64);
    while lines.read_until(b'\n', &mut line)? > 0 {
        let text = line.trim_ascii();
        if !text.is_empty() {
            // What can't be read is found by the check.
            let Body { max_tokens, max_completion_tokens, max_output_tokens, n } =
                serde_json::from_slice::<Line>(text).unwrap_or_default().body;
            let most = max_completion_tokens.or(max_output_tokens).or(max_tokens).unwrap_or(default_output);
            let n_own = (text.len() as u64).div_ceil(BYTES_A_TOKEN);
            n_tokens = n_tokens.saturating_add(n_own).saturating_add(most.saturating_mul(n.unwrap_or(1)));
        }
        line.clear();
    }
    // As many as a number of the database holds, also of all batches together.
    Ok(n_tokens.min(MOST))
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
        assert_eq!(estimate(lines.join("\r\n").as_bytes(), 1000).unwrap(), n_own + 15 + 1000 + 1000 + 7);
        let most = line(r#"{"max_tokens": 18446744073709551615, "n": 9}"#);
        assert_eq!(estimate(most.as_bytes(), 0).unwrap(), MOST);
    }
}
