//! The fast twin of [`Stamp::output_line`]: writes the line of a plain completion as text at once, where the other builds
//! a tree of values. Invariant: the same bytes (tested over all kinds of completions), so that either may be used.

use super::Endpoint;
use super::answer::Stamp;
use crate::outcome::{Choice, Completion, FinishReason, Usage};

/// Writes the Batch output lines of plain completions, with what all of a job's lines have in common made ready.
#[derive(Debug)]
pub struct PlainLines {
    job_fingerprint: String,
    chat: Form,
    text: Form,
    /// From behind the usage to the end of the body.
    end: String,
}

/// What stands around the parts of one row in an endpoint's lines.
#[derive(Debug)]
struct Form {
    /// Before the row's id in the body.
    prefix: &'static str,
    /// From behind it to the text.
    start: String,
    /// From behind the text to the reason why it ended.
    end: &'static str,
}

impl PlainLines {
    /// For the lines of a job.
    pub fn new(stamp: &Stamp) -> Self {
        let form = |prefix, object: &str, choice: &str, end| {
            let mut start = format!(r#"","object":"{object}","created":{},"model":"#, stamp.created);
            push_string(&mut start, &stamp.model);
            start.push_str(choice);
            Form { prefix, start, end }
        };
        let message = r#","choices":[{"index":0,"message":{"role":"assistant","content":"#;
        let after_message = r#","refusal":null},"logprobs":null,"finish_reason":""#;
        let after_text = r#","index":0,"logprobs":null,"finish_reason":""#;
        let mut end = String::from(
            r#","cache_write_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}},"service_tier":"default","system_fingerprint":"#,
        );
        push_string(&mut end, &stamp.system_fingerprint);
        Self {
            job_fingerprint: stamp.job_fingerprint.clone(),
            chat: form("chatcmpl-", "chat.completion", message, after_message),
            text: form("cmpl-", "text_completion", r#","choices":[{"text":"#, after_text),
            end,
        }
    }

    /// Appends the line of a completed row; false, and nothing appended, for one that only [`Stamp::output_line`] can
    /// write: with several completions, log-probabilities, thoughts or tool calls, or a response object.
    pub fn push(&self, line: &mut String, row_idx: u64, custom_id: &str, endpoint: Endpoint, completion: &Completion) -> bool {
        // All fields by name: whoever adds one must say here what becomes of it.
        let Completion { choices, usage, seed } = completion;
        let [Choice { text, thought: None, tool_calls, finish_reason, logprobs: None }] = choices.as_slice() else {
            return false;
        };
        let is_plain = tool_calls.is_empty() && Self::writes(endpoint);
        if is_plain {
            self.push_text(line, (row_idx, custom_id, endpoint), (text, *finish_reason), *usage, *seed);
        }
        is_plain
    }

    /// Whether it writes the answers of an endpoint.
    pub fn writes(endpoint: Endpoint) -> bool {
        matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions)
    }

    /// Appends the line of a row whose one completion is nothing but text, of an endpoint that this writes.
    pub fn push_text(
        &self,
        line: &mut String,
        (row_idx, custom_id, endpoint): (u64, &str, Endpoint),
        (text, finish_reason): (&str, FinishReason),
        usage: Usage,
        seed: Option<u64>,
    ) {
        let Usage { prompt_tokens, completion_tokens, cached_tokens } = usage;
        let form = if endpoint == Endpoint::ChatCompletions { &self.chat } else { &self.text };
        line.reserve(640 + custom_id.len() + text.len());
        let id = row_id(&self.job_fingerprint, row_idx);
        let id = std::str::from_utf8(&id).expect("hexadecimal digits");
        push_all(line, &[r#"{"id":"batch_req_"#, id, r#"","custom_id":"#]);
        push_string(line, custom_id);
        push_all(line, &[r#","response":{"status_code":200,"request_id":"req_"#, id, r#"","body":{"id":""#, form.prefix, id]);
        line.push_str(&form.start);
        push_string(line, text);
        push_all(line, &[form.end, finish_reason.as_str(), r#""}],"usage":{"prompt_tokens":"#]);
        push_number(line, prompt_tokens);
        line.push_str(r#","completion_tokens":"#);
        push_number(line, completion_tokens);
        line.push_str(r#","total_tokens":"#);
        push_number(line, prompt_tokens + completion_tokens);
        line.push_str(r#","prompt_tokens_details":{"cached_tokens":"#);
        push_number(line, cached_tokens);
        line.push_str(&self.end);
        if let Some(seed) = seed {
            line.push_str(r#","seed":"#);
            push_number(line, seed);
        }
        line.push_str(r#"}},"error":null}"#);
    }
}

/// 24 hexadecimal digits, the same for the same job and row.
pub(super) fn row_id(job_fingerprint: &str, row_idx: u64) -> [u8; 24] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut name = String::with_capacity(job_fingerprint.len() + 21);
    push_all(&mut name, &[job_fingerprint, "/", itoa::Buffer::new().format(row_idx)]);
    let hash = blake3::hash(name.as_bytes());
    let mut id = [0; 24];
    for (digits, byte) in id.as_chunks_mut::<2>().0.iter_mut().zip(hash.as_bytes()) {
        *digits = [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
    }
    id
}

fn push_all(line: &mut String, parts: &[&str]) {
    for part in parts {
        line.push_str(part);
    }
}

fn push_number(line: &mut String, number: impl itoa::Integer) {
    line.push_str(itoa::Buffer::new().format(number));
}

/// Appends a JSON string.
fn push_string(line: &mut String, text: &str) {
    if text.bytes().any(|byte| byte < b' ' || byte == b'"' || byte == b'\\') {
        line.push_str(&serde_json::to_string(text).expect("any text is JSON"));
    } else {
        push_all(line, &["\"", text, "\""]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::FinishReason;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn both_ways_write_the_same_bytes(
            (custom_id, text) in (any::<String>(), any::<String>()),
            (row_idx, created) in (any::<u64>(), any::<u64>()),
            [prompt_tokens, completion_tokens, cached_tokens] in [0u32..1 << 30, 0u32..1 << 30, 0u32..1 << 30],
            seed in any::<Option<u64>>(),
            chat in any::<bool>(),
            stop in any::<bool>(),
        ) {
            let stamp = Stamp {
                job_fingerprint: "f".into(),
                created,
                model: "a \"model\"".into(),
                system_fingerprint: "fp_0\u{7f}".into(),
            };
            let finish_reason = if stop { FinishReason::Stop } else { FinishReason::Length };
            let choice = Choice { text, thought: None, tool_calls: Vec::new(), finish_reason, logprobs: None };
            let usage = Usage { prompt_tokens, completion_tokens, cached_tokens };
            let completion = Completion { choices: vec![choice.clone()], usage, seed };
            let endpoint = if chat { Endpoint::ChatCompletions } else { Endpoint::Completions };
            let lines = PlainLines::new(&stamp);
            let plain = |completion: &Completion| {
                let mut line = String::new();
                lines.push(&mut line, row_idx, &custom_id, endpoint, completion).then_some(line)
            };
            let slow = stamp.output_line(row_idx, &custom_id, endpoint, None, &completion).to_string();
            prop_assert_eq!(plain(&completion), Some(slow));
            let with_logprobs = Completion { choices: vec![Choice { logprobs: Some(vec![]), ..choice }], ..completion };
            prop_assert_eq!(plain(&with_logprobs), None);
            let thought = Some(crate::outcome::Thought { text: String::new(), n_tokens: 2 });
            let with_thought = Completion { choices: vec![Choice { thought, ..with_logprobs.choices[0].clone() }], ..with_logprobs };
            prop_assert_eq!(plain(&with_thought), None);
        }
    }
}
