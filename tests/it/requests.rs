//! Batch lines: what is accepted, what is refused, and by which name.

use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;
use valar::format::openai::{Endpoint, parse_batch_line};
use valar::outcome::ErrorCode;
use valar::request::{AnswerFormat, Input, Params, Request, Truncate};

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
    let parsed = parsed.request.unwrap_or_else(|e| panic!("{line} was refused: {e}"));
    (parsed.endpoint, parsed.request)
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
        ..Params::default()
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
    match &accepted(&chat(parts)).1.inputs[0] {
        Input::Messages(messages) => assert_eq!(messages[0].content, "ab"),
        other => panic!("{other:?}"),
    }
    assert_eq!(accepted(&text(json!({"prompt": [1, 2, 3]}))).1.inputs, [Input::Tokens(vec![1, 2, 3])]);
    assert_eq!(accepted(&text(json!({"prompt": ["one"]}))).1.inputs, [Input::Text("one".into())]);
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
        (json!({"best_of": 2}), "body.best_of"),
        (json!({"stream": true}), "body.stream"),
        (json!({"echo": true}), "body.echo"),
        (json!({"tools": [{"type": "web_search"}]}), "body.tools[0].type"),
        (json!({"functions": [{"name": "f"}]}), "body.functions"),
        (json!({"structured_outputs": {"xml": "x"}}), "body.structured_outputs.xml"),
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
    refused(&text(json!({"suffix": "x"})), UnsupportedParameter, "body.suffix");
    refused(&text(json!({"tools": [{"type": "function"}]})), UnsupportedParameter, "body.tools");
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
        (json!({"top_p": 1.5}), InvalidValue, "body.top_p"),
        (json!({"top_k": -2}), InvalidValue, "body.top_k"),
        (json!({"seed": 1.5}), InvalidType, "body.seed"),
        (json!({"stop": [""]}), InvalidValue, "body.stop[0]"),
        (json!({"stop": vec!["x"; 65]}), InvalidValue, "body.stop"),
        (json!({"n": 129}), InvalidValue, "body.n"),
        (json!({"presence_penalty": 2.5}), InvalidValue, "body.presence_penalty"),
        (json!({"logit_bias": {"x": 1}}), InvalidValue, "body.logit_bias.x"),
        (json!({"logit_bias": {"5": 101}}), InvalidValue, "body.logit_bias.5"),
        (json!({"response_format": {"type": "xml"}}), InvalidValue, "body.response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), MissingField, "body.response_format.json_schema"),
        (json!({"response_format": {"type": "json_object"}, "regex": "a"}), InvalidValue, "body.regex"),
        (json!({"stop_token_ids": vec![1; 257]}), InvalidValue, "body.stop_token_ids"),
        (json!({"tools": [{"type": "function"}]}), MissingField, "body.tools[0].function"),
        (json!({"tool_choice": "required"}), InvalidValue, "body.tool_choice"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "g"}}}), InvalidValue, "body.tool_choice"),
        (json!({"add_generation_prompt": false}), InvalidValue, "body.add_generation_prompt"),
        (json!({"truncate_prompt_tokens": 0}), InvalidValue, "body.truncate_prompt_tokens"),
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
fn parameters_are_read_under_all_their_names() {
    let params = |extra| accepted(&chat(extra)).1.params;
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let wanted = AnswerFormat::JsonSchema(Arc::new(schema.clone()));
    for extra in [
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": true}}}),
        json!({"guided_json": schema}),
        json!({"guided_json": schema.to_string()}),
        json!({"structured_outputs": {"json": schema}}),
    ] {
        assert_eq!(params(extra.clone()).format, wanted, "{extra}");
    }
    assert_eq!(params(json!({"guided_choice": ["a.b", "c"]})).format, AnswerFormat::Regex("a\\.b|c".into()));
    let all = params(json!({"n": 3, "min_p": 0.1, "presence_penalty": -1, "frequency_penalty": 0.5, "repetition_penalty": 1.1,
                            "logit_bias": {"7": -100, "5": 2}, "min_tokens": 4, "stop_token_ids": [9], "stop": [null, "x"]}));
    let expected = Params {
        n: 3,
        min_p: 0.1,
        presence_penalty: -1.0,
        frequency_penalty: 0.5,
        repetition_penalty: 1.1,
        logit_bias: vec![(5, 2.0), (7, -100.0)],
        min_tokens: 4,
        stop_tokens: vec![9],
        stop: vec!["x".into()],
        ..Params::default()
    };
    assert_eq!(all, expected);
    let several = accepted(&text(json!({"prompt": ["a", [1, 2]], "max_tokens": 0, "echo": true, "logprobs": 1}))).1;
    assert_eq!(several.inputs, [Input::Text("a".into()), Input::Tokens(vec![1, 2])]);
    assert_eq!((several.params.max_tokens, several.params.echo), (Some(0), true));
}

#[test]
fn response_items_become_turns() {
    let mut line = chat(json!({}));
    line["url"] = "/v1/responses".into();
    line["body"] = json!({
        "instructions": "Be brief.", "max_output_tokens": 9, "include": ["message.output_text.logprobs"], "top_logprobs": 2,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}, "truncation": "auto",
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}], "metadata": {"k": "v"},
        "input": [
            {"role": "user", "content": "Hi"},
            {"type": "message", "id": "m", "status": "completed", "role": "assistant", "content": [{"type": "output_text", "text": "Ho", "annotations": []}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{\"x\": 1}"},
            {"type": "function_call_output", "call_id": "c", "output": "2"},
            {"type": "reasoning", "summary": []},
        ],
    });
    let parsed = parse_batch_line(7, &line.to_string(), &Params::default()).request.unwrap();
    let request = parsed.request;
    let Input::Messages(messages) = &request.inputs[0] else { panic!("no messages") };
    let turns: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str(), m.tool_calls.len())).collect();
    assert_eq!(turns, [("system", "Be brief.", 0), ("user", "Hi", 0), ("assistant", "Ho", 1), ("tool", "2", 0)]);
    assert_eq!(messages[2].tool_calls[0]["function"], json!({"name": "f", "arguments": {"x": 1}}));
    assert_eq!(
        (request.params.max_tokens, request.params.logprobs, request.truncate),
        (Some(9), Some(2), Truncate::DropMessages)
    );
    let echo = parsed.echo.unwrap();
    assert_eq!(
        (&echo["metadata"], &echo["truncation"], &echo["tools"][0]["name"]),
        (&json!({"k": "v"}), &json!("auto"), &json!("f"))
    );
    for (key, value, field) in [
        ("input", json!([]), "body.input"),
        ("input", json!([{"type": "item_reference", "id": "x"}]), "body.input[0].type"),
        ("max_tokens", json!(3), "body.max_tokens"),
        ("previous_response_id", json!("resp_1"), "body.previous_response_id"),
        ("tools", json!([{"type": "mcp"}]), "body.tools[0].type"),
        ("include", json!(["file_search_call.results"]), "body.include"),
        ("include", json!([]), "body.top_logprobs"),
        ("regex", json!("a"), "body.text.format"),
    ] {
        let mut bad = line.clone();
        bad["body"][key] = value;
        let error = parse_batch_line(7, &bad.to_string(), &Params::default()).request.unwrap_err();
        assert_eq!(error.field.as_deref(), Some(field), "{error}");
    }
}

/// Of whatever form a line is: nobody would be told.
#[test]
fn a_line_that_asks_to_be_told_of_is_refused() {
    for (url, input) in [
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "Hi"}]})),
        ("/v1/completions", json!({"prompt": "Hi"})),
        ("/v1/responses", json!({"input": "Hi"})),
        ("/v1/messages", json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5})),
    ] {
        let mut body = input;
        merge(&mut body, &json!({"model": "m", "metadata": {"user_id": "u"}}));
        let line = |body: Value| json!({"custom_id": "a", "method": "POST", "url": url, "body": body});
        accepted(&line(body.clone()));
        for key in ["completion_webhook", "webhook_token"] {
            body["metadata"] = json!({key: "https://hooks.example.com/x"});
            refused(&line(body.clone()), ErrorCode::UnsupportedParameter, &format!("body.metadata.{key}"));
            refused(&line(body.to_string().into()), ErrorCode::UnsupportedParameter, &format!("body.metadata.{key}"));
        }
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
