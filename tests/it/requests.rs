//! Batch lines: what is accepted, what is refused, and by which name.

use proptest::prelude::*;
use serde_json::{Value, json};
use valar::format::openai::{Endpoint, parse_batch_line};
use valar::outcome::ErrorCode;
use valar::request::{Input, Params, Request};

#[expect(clippy::needless_pass_by_value, reason = "so that callers can write json!(..)")]
fn chat(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
    merge(&mut body, &extra);
    json!({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
}

#[expect(clippy::needless_pass_by_value, reason = "so that callers can write json!(..)")]
fn text(extra: Value) -> Value {
    let mut body = json!({"prompt": "hi"});
    merge(&mut body, &extra);
    json!({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
}

fn merge(body: &mut Value, extra: &Value) {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
}

fn accepted(line: &Value) -> (Endpoint, Request) {
    let parsed = parse_batch_line(7, &line.to_string(), &Params::default());
    parsed.request.unwrap_or_else(|e| panic!("{line} was refused: {e}"))
}

#[track_caller]
fn refused(line: &Value, code: ErrorCode, field: &str) {
    let parsed = parse_batch_line(7, &line.to_string(), &Params::default());
    let error = parsed.request.expect_err(&format!("{line} was accepted"));
    assert_eq!((error.code, error.field.as_deref()), (code, Some(field)), "{line}: {error}");
    assert!(error.message.contains(field), "the message does not name {field}: {error}");
}

#[test]
fn a_full_chat_request() {
    let (endpoint, request) = accepted(&chat(json!({
        "model": "m", "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": -1, "stop": ["x", "y"],
        "ignore_eos": true, "logprobs": true, "top_logprobs": 3,
    })));
    assert_eq!(endpoint, Endpoint::ChatCompletions);
    assert_eq!((request.row_idx, request.model.as_deref()), (7, Some("m")));
    let expected = Params {
        max_tokens: Some(9),
        temperature: 0.5,
        top_p: 0.9,
        top_k: 40,
        seed: Some(u64::MAX),
        stop: vec!["x".into(), "y".into()],
        ignore_eos: true,
        logprobs: Some(3),
    };
    assert_eq!(request.params, expected);
}

#[test]
fn defaults_are_the_apis_own() {
    let (_, request) = accepted(&chat(json!({})));
    assert_eq!(request.params, Params::default());
    let (endpoint, request) = accepted(&text(json!({})));
    assert_eq!(endpoint, Endpoint::Completions);
    assert_eq!(request.params.max_tokens, Some(16));
    assert_eq!(accepted(&text(json!({"logprobs": 2}))).1.params.logprobs, Some(2));
}

#[test]
fn content_parts_and_token_prompts() {
    let parts =
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]});
    match accepted(&chat(parts)).1.input {
        Input::Messages(messages) => assert_eq!(messages[0].content, "ab"),
        other => panic!("{other:?}"),
    }
    assert_eq!(accepted(&text(json!({"prompt": [1, 2, 3]}))).1.input, Input::Tokens(vec![1, 2, 3]));
    assert_eq!(accepted(&text(json!({"prompt": ["one"]}))).1.input, Input::Text("one".into()));
}

#[test]
fn fields_at_their_off_value_are_accepted() {
    for extra in [
        json!({"n": 1, "stream": false, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": []}),
        json!({"response_format": {"type": "text"}, "user": "u", "metadata": {"a": "b"}, "store": false, "seed": null}),
        json!({"top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "tool_choice": "none"}),
    ] {
        accepted(&chat(extra));
    }
}

#[test]
fn fields_with_meaning_are_refused_by_name() {
    use ErrorCode::UnsupportedParameter;
    for (extra, field) in [
        (json!({"n": 2}), "body.n"),
        (json!({"stream": true}), "body.stream"),
        (json!({"presence_penalty": 0.1}), "body.presence_penalty"),
        (json!({"response_format": {"type": "json_object"}}), "body.response_format"),
        (json!({"tools": [{"type": "function"}]}), "body.tools"),
        (json!({"logit_bias": {"5": 1}}), "body.logit_bias"),
        (json!({"something_new": 1}), "body.something_new"),
        (json!({"messages": [{"role": "user", "content": "x", "audio": {}}]}), "body.messages[0].audio"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "body.messages[0].content[0].type"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]}),
            "body.messages[0].content[0].cache_control",
        ),
        (json!({"prompt": "x"}), "body.prompt"),
    ] {
        refused(&chat(extra), UnsupportedParameter, field);
    }
    refused(&text(json!({"echo": true})), UnsupportedParameter, "body.echo");
    refused(&text(json!({"prompt": ["a", "b"]})), UnsupportedParameter, "body.prompt");
    refused(&text(json!({"messages": []})), UnsupportedParameter, "body.messages");
}

#[test]
fn bad_values_name_field_and_limit() {
    use ErrorCode::{InvalidType, InvalidValue, MissingField};
    for (extra, code, field) in [
        (json!({"max_tokens": 0}), InvalidValue, "body.max_tokens"),
        (json!({"max_tokens": -1}), InvalidValue, "body.max_tokens"),
        (json!({"max_tokens": "9"}), InvalidType, "body.max_tokens"),
        (json!({"max_tokens": 1.5}), InvalidType, "body.max_tokens"),
        (json!({"max_tokens": 5, "max_completion_tokens": 6}), InvalidValue, "body.max_completion_tokens"),
        (json!({"temperature": 2.1}), InvalidValue, "body.temperature"),
        (json!({"temperature": true}), InvalidType, "body.temperature"),
        (json!({"top_p": 0}), InvalidValue, "body.top_p"),
        (json!({"top_k": -2}), InvalidValue, "body.top_k"),
        (json!({"seed": 1.5}), InvalidType, "body.seed"),
        (json!({"stop": [""]}), InvalidValue, "body.stop[0]"),
        (json!({"stop": vec!["x"; 17]}), InvalidValue, "body.stop"),
        (json!({"stop": [1]}), InvalidType, "body.stop[0]"),
        (json!({"logprobs": true, "top_logprobs": 21}), InvalidValue, "body.top_logprobs"),
        (json!({"top_logprobs": 2}), InvalidValue, "body.top_logprobs"),
        (json!({"messages": []}), InvalidValue, "body.messages"),
        (json!({"messages": [{"content": "x"}]}), MissingField, "body.messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), MissingField, "body.messages[0].content"),
        (json!({"messages": [{"role": "king", "content": "x"}]}), InvalidValue, "body.messages[0].role"),
        (json!({"messages": "x"}), InvalidType, "body.messages"),
        (json!({"model": 3}), InvalidType, "body.model"),
    ] {
        refused(&chat(extra), code, field);
    }
}

#[test]
fn the_envelope_is_checked() {
    use ErrorCode::{InvalidType, InvalidValue, MissingField, UnsupportedParameter, UrlMismatch};
    let without = |key: &str| {
        let mut line = chat(json!({}));
        line.as_object_mut().unwrap().remove(key);
        line
    };
    let with = |key: &str, value: Value| {
        let mut line = chat(json!({}));
        line[key] = value;
        line
    };
    for key in ["custom_id", "method", "url", "body"] {
        refused(&without(key), MissingField, key);
        refused(&with(key, json!(5)), InvalidType, key);
    }
    refused(&with("custom_id", json!("")), InvalidValue, "custom_id");
    refused(&with("custom_id", json!("x".repeat(513))), InvalidValue, "custom_id");
    refused(&with("method", json!("GET")), InvalidValue, "method");
    refused(&with("url", json!("/v1/embeddings")), UrlMismatch, "url");
    refused(&with("extra", json!(1)), UnsupportedParameter, "extra");
}

#[test]
fn a_broken_line_keeps_its_custom_id_where_it_can() {
    let bad_body =
        parse_batch_line(0, r#"{"custom_id":"k","method":"POST","url":"/v1/completions","body":{}}"#, &Params::default());
    assert_eq!(bad_body.custom_id.as_deref(), Some("k"));
    assert!(bad_body.request.is_err());
    for line in ["{", "[1]", "", "nul", "{\"custom_id\": \"k\""] {
        let parsed = parse_batch_line(0, line, &Params::default());
        assert_eq!(parsed.request.unwrap_err().code, ErrorCode::InvalidJson, "{line:?}");
    }
}

proptest! {
    /// Whatever a line holds, parsing answers; it never panics.
    #[test]
    fn any_line_gets_an_answer(line in ".{0,200}", key in "[a-z_]{1,12}", value in "[-0-9.e\\[\\]{}\"a-z:,]{0,20}") {
        let _ = parse_batch_line(0, &line, &Params::default());
        let body = format!(r#"{{"custom_id":"a","method":"POST","url":"/v1/completions","body":{{"prompt":"x","{key}":{value}}}}}"#);
        let _ = parse_batch_line(0, &body, &Params::default());
    }
}
