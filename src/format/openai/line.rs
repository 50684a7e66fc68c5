//! The fast twin of [`Stamp::output_line`]: writes the line of a plain completion as text at once, where the other builds
//! a tree of values. Invariant: the same bytes (tested over all kinds of completions), so that either may be used.

use super::Endpoint;
use super::answer::Stamp;
use crate::outcome::{Choice, Completion, Usage};
use std::fmt::Write as _;

impl Stamp {
    /// The Batch output line of a completed row; `None` for one that only [`Stamp::output_line`] can write: with several
    /// completions, log-probabilities or tool calls, or a response object.
    pub fn plain_output_line(
        &self,
        row_idx: u64,
        custom_id: &str,
        endpoint: Endpoint,
        completion: &Completion,
    ) -> Option<String> {
        // All fields by name: whoever adds one must say here what becomes of it.
        let Completion { choices, usage, seed } = completion;
        let [Choice { text, tool_calls, finish_reason, logprobs: None }] = choices.as_slice() else { return None };
        if !tool_calls.is_empty() || endpoint == Endpoint::Responses {
            return None;
        }
        let Usage { prompt_tokens, completion_tokens, cached_tokens } = usage;
        let (id, finish_reason) = (self.row_id(row_idx), finish_reason.as_str());
        let mut line = String::with_capacity(640 + custom_id.len() + text.len());
        let total_tokens = prompt_tokens + completion_tokens;
        let written = (|| {
            write!(line, r#"{{"id":"batch_req_{id}","custom_id":"#)?;
            push_string(&mut line, custom_id);
            write!(line, r#","response":{{"status_code":200,"request_id":"req_{id}","body":{{"#)?;
            let is_chat = endpoint == Endpoint::ChatCompletions;
            let (prefix, object) = if is_chat { ("chatcmpl", "chat.completion") } else { ("cmpl", "text_completion") };
            write!(line, r#""id":"{prefix}-{id}","object":"{object}","#)?;
            write!(line, r#""created":{},"model":"#, self.created)?;
            push_string(&mut line, &self.model);
            if is_chat {
                line.push_str(r#","choices":[{"index":0,"message":{"role":"assistant","content":"#);
                push_string(&mut line, text);
                line.push_str(r#","refusal":null},"logprobs":null"#);
            } else {
                line.push_str(r#","choices":[{"text":"#);
                push_string(&mut line, text);
                line.push_str(r#","index":0,"logprobs":null"#);
            }
            write!(
                line,
                r#","finish_reason":"{finish_reason}"}}],"usage":{{"prompt_tokens":{prompt_tokens},"completion_tokens":{completion_tokens},"total_tokens":{total_tokens},"prompt_tokens_details":{{"cached_tokens":{cached_tokens},"cache_write_tokens":0}},"completion_tokens_details":{{"reasoning_tokens":0}}}},"service_tier":"default","system_fingerprint":"#
            )?;
            push_string(&mut line, &self.system_fingerprint);
            if let Some(seed) = seed {
                write!(line, r#","seed":{seed}"#)?;
            }
            line.push_str(r#"}},"error":null}"#);
            std::fmt::Result::Ok(())
        })();
        written.expect("memory takes text");
        Some(line)
    }
}

/// Appends a JSON string.
fn push_string(line: &mut String, text: &str) {
    if text.bytes().all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\') {
        line.push('"');
        line.push_str(text);
        line.push('"');
    } else {
        line.push_str(&serde_json::to_string(text).expect("any text is JSON"));
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
            let choice = Choice { text, tool_calls: Vec::new(), finish_reason, logprobs: None };
            let usage = Usage { prompt_tokens, completion_tokens, cached_tokens };
            let completion = Completion { choices: vec![choice.clone()], usage, seed };
            let endpoint = if chat { Endpoint::ChatCompletions } else { Endpoint::Completions };
            let slow = stamp.output_line(row_idx, &custom_id, endpoint, None, &completion).to_string();
            prop_assert_eq!(stamp.plain_output_line(row_idx, &custom_id, endpoint, &completion), Some(slow));
            let with_logprobs = Completion { choices: vec![Choice { logprobs: Some(vec![]), ..choice }], ..completion };
            prop_assert_eq!(stamp.plain_output_line(row_idx, &custom_id, endpoint, &with_logprobs), None);
        }
    }
}
