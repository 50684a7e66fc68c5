//! The server from outside: every dialect gives the bits of `valar run`, streams are their answers in pieces, and what is
//! wrong is said in the caller's own form.

use crate::serving::{FOREVER, KEY, MODEL, Server, read_until};
use serde_json::{Map, Value, json};
use std::process::Command;
use std::time::Instant;

/// Requests of all kinds, with their endpoint.
fn requests() -> Vec<(&'static str, Value)> {
    let chat = |content: &str, extra: Value| {
        let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 12});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ("/v1/chat/completions", body)
    };
    let schema = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 99}},
                        "required": ["name", "age"], "additionalProperties": false});
    vec![
        chat("Say hello.", json!({"temperature": 0})),
        chat("Write a poem.", json!({"seed": 7, "n": 3, "logprobs": true, "top_logprobs": 2})),
        chat("Count: 1, 2, 3,", json!({"temperature": 0, "n": 2, "max_tokens": 30, "stop": ["6", "5,"]})),
        chat(
            "Give me a person as JSON.",
            json!({"temperature": 0, "max_tokens": 60,
            "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}}),
        ),
        chat("Draw emoji: 🙂🙃", json!({"seed": 3, "ignore_eos": true, "max_tokens": 40})),
        (
            "/v1/completions",
            json!({"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "logprobs": 2, "echo": true, "max_tokens": 9}),
        ),
        (
            "/v1/completions",
            json!({"model": MODEL, "prompt": [[504, 3575, 282], [28, 198, 1]], "temperature": 0, "logprobs": 1, "echo": true, "max_tokens": 1, "seed": 1234}),
        ),
        ("/v1/completions", json!({"model": MODEL, "prompt": ["The sea is", "The sky is"], "n": 2, "seed": 5, "max_tokens": 8})),
        ("/v1/responses", json!({"model": MODEL, "input": "Name three rivers.", "temperature": 0, "max_output_tokens": 24})),
        (
            "/v1/responses",
            json!({"model": MODEL, "instructions": "Be brief.", "input": [{"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}],
            "seed": 9, "max_output_tokens": 9, "include": ["message.output_text.logprobs"], "top_logprobs": 3}),
        ),
    ]
}

/// What of an answer is the model's.
fn essence(body: &Value) -> Value {
    if body["object"] != "response" {
        return json!([body["choices"], body["usage"]["completion_tokens"], body["usage"]["prompt_tokens"], body["seed"]]);
    }
    let contents: Vec<&Value> = body["output"].as_array().unwrap().iter().map(|item| &item["content"]).collect();
    json!([contents, body["status"], body["incomplete_details"], body["usage"]["output_tokens"], body["seed"], body["text"]])
}

#[test]
fn the_server_gives_the_bits_of_a_job_streamed_or_not() {
    let server = Server::start();
    let rows = requests()
        .into_iter()
        .enumerate()
        .map(|(i, (url, body))| json!({"custom_id": i.to_string(), "method": "POST", "url": url, "body": body}).to_string());
    server.sandbox.write("in.jsonl", rows.collect::<Vec<_>>().join("\n"));
    server.sandbox.expect(&["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "--memory", "1GiB"], 0);
    let expected = server.sandbox.rows("out.jsonl");
    for ((url, body), row) in requests().into_iter().zip(&expected) {
        let of_job = essence(&row["response"]["body"]);
        let answer = server.post(url, body.clone());
        assert_eq!(answer.status, 200, "{}", answer.text);
        let whole = answer.json();
        assert_eq!(essence(&whole), of_job, "{body}");
        let mut streamed = body.clone();
        streamed["stream"] = true.into();
        if url != "/v1/responses" {
            streamed["stream_options"] = json!({"include_usage": true});
        }
        let answer = server.post(url, streamed);
        assert_eq!((answer.status, answer.header("content-type")), (200, "text/event-stream; charset=utf-8"));
        let chunks = answer.chunks();
        match url {
            "/v1/chat/completions" => assert_eq!(joined_chat(&chunks), whole["choices"], "{body}"),
            "/v1/completions" => assert_eq!(joined_text(&chunks), joined_text(std::slice::from_ref(&whole)), "{body}"),
            _ => check_response_events(&answer.events(), &chunks, &whole),
        }
        if url != "/v1/responses" {
            let last = chunks.last().unwrap();
            assert_eq!(
                (&last["choices"], &last["usage"]["completion_tokens"]),
                (&json!([]), &whole["usage"]["completion_tokens"])
            );
        }
    }
    server.wait_idle();
}

/// A chat's choices, put together from chunks.
fn joined_chat(chunks: &[Value]) -> Value {
    let mut choices: Vec<Value> = Vec::new();
    for chunk in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        let index = chunk["index"].as_u64().unwrap() as usize;
        if index == choices.len() {
            assert_eq!(chunk["delta"]["role"], "assistant");
            choices.push(json!({"index": index, "message": {"role": "assistant", "content": "", "refusal": null}, "logprobs": null, "finish_reason": null}));
        }
        let choice = &mut choices[index];
        assert!(choice["finish_reason"].is_null(), "a chunk after the last");
        let content =
            choice["message"]["content"].as_str().unwrap().to_owned() + chunk["delta"]["content"].as_str().unwrap_or("");
        choice["message"]["content"] = content.into();
        if let Some(entries) = chunk["logprobs"]["content"].as_array() {
            if choice["logprobs"].is_null() {
                choice["logprobs"] = json!({"content": [], "refusal": null});
            }
            choice["logprobs"]["content"].as_array_mut().unwrap().extend(entries.clone());
        }
        choice["finish_reason"] = chunk["finish_reason"].clone();
    }
    choices.into()
}

/// Per choice: text, finish reason, and the parts of its log-probabilities.
fn joined_text(chunks: &[Value]) -> Vec<(String, Value, Map<String, Value>)> {
    let mut choices = Vec::new();
    let mut all: Vec<&Value> = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()).collect();
    all.sort_by_key(|choice| choice["index"].as_u64());
    for chunk in all {
        let index = chunk["index"].as_u64().unwrap() as usize;
        if index == choices.len() {
            choices.push((String::new(), Value::Null, Map::new()));
        }
        let (text, finish_reason, logprobs) = &mut choices[index];
        text.push_str(chunk["text"].as_str().unwrap());
        *finish_reason = chunk["finish_reason"].clone();
        for (name, entries) in chunk["logprobs"].as_object().into_iter().flatten() {
            let all = logprobs.entry(name).or_insert_with(|| json!([])).as_array_mut().unwrap();
            all.extend(entries.as_array().unwrap().clone());
        }
    }
    choices
}

/// The order of events, their numbers, and that they come to the response without a stream.
fn check_response_events(events: &[(String, String)], chunks: &[Value], whole: &Value) {
    for (i, chunk) in chunks.iter().enumerate() {
        assert_eq!((&chunk["sequence_number"], chunk["type"].as_str()), (&json!(i), Some(events[i].0.as_str())));
    }
    assert_eq!((&chunks[0]["type"], &chunks[0]["response"]["output"]), (&json!("response.created"), &json!([])));
    let text: String =
        chunks.iter().filter(|c| c["type"] == "response.output_text.delta").map(|c| c["delta"].as_str().unwrap()).collect();
    assert_eq!(text, whole["output"][0]["content"][0]["text"].as_str().unwrap());
    let last = &chunks.last().unwrap()["response"];
    assert_eq!(essence(last), essence(whole));
    let ends: Vec<&Value> = chunks.iter().filter(|c| c["type"] == "response.output_item.done").map(|c| &c["item"]).collect();
    assert_eq!(ends, last["output"].as_array().unwrap().iter().collect::<Vec<_>>());
    let is_id = |chunk: &&Value| chunk["item_id"] != Value::Null;
    assert!(chunks.iter().filter(is_id).all(|chunk| chunk["item_id"] == last["output"][0]["id"]));
}

#[test]
fn messages_have_the_bits_of_a_chat_streamed_or_not() {
    let server = Server::start();
    let chat = json!({"model": MODEL, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count to ten: 1, 2,"}],
                      "max_tokens": 24, "temperature": 0, "stop": ["5"]});
    let mut message = json!({"model": MODEL, "system": "Be brief.", "messages": [{"role": "user", "content": [{"type": "text", "text": "Count to ten: 1, 2,"}]}],
                         "max_tokens": 24, "temperature": 0, "stop_sequences": ["5"]});
    let chat = server.post("/v1/chat/completions", chat).json();
    let answer = server.post("/v1/messages", message.clone()).json();
    assert_eq!(answer["content"][0]["text"], chat["choices"][0]["message"]["content"], "{answer}");
    let stopped = chat["choices"][0]["finish_reason"] == "stop";
    let end = if stopped { json!(["stop_sequence", "5"]) } else { json!(["max_tokens", null]) };
    assert_eq!(json!([answer["stop_reason"], answer["stop_sequence"]]), end);
    let usage = &answer["usage"];
    let total = usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!(chat["usage"]["prompt_tokens"], total);
    assert_eq!(server.post("/v1/messages/count_tokens", message.clone()).json(), json!({"input_tokens": total}));
    message["stream"] = true.into();
    let events = server.post("/v1/messages", message.clone()).events();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).filter(|name| *name != "content_block_delta").collect();
    assert_eq!(names, ["message_start", "ping", "content_block_start", "content_block_stop", "message_delta", "message_stop"]);
    let data: Vec<Value> = events.iter().map(|(_, data)| serde_json::from_str(data).unwrap()).collect();
    let text: String = data.iter().filter_map(|data| data["delta"]["text"].as_str()).collect();
    assert_eq!(text, answer["content"][0]["text"].as_str().unwrap());
    let end = &data[data.len() - 2];
    assert_eq!((&end["delta"]["stop_reason"], &end["usage"]["output_tokens"]), (&answer["stop_reason"], &usage["output_tokens"]));
    // A last turn of the assistant's is gone on with.
    let prefilled = json!({"model": MODEL, "max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "The capital of France is"}]});
    let prefilled = server.post("/v1/messages", prefilled).json();
    assert!(prefilled["content"][0]["text"].as_str().unwrap().contains("Paris"), "{prefilled}");
}

#[test]
fn a_client_that_goes_leaves_nothing_behind() {
    let server = Server::start();
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Tell me a very long story."}],
                      "ignore_eos": true, "max_tokens": 6000, "stream": true, "n": 4, "seed": 1});
    let mut streams: Vec<_> = (0..3).map(|_| server.open("/v1/chat/completions", &body)).collect();
    for stream in &mut streams {
        read_until(stream, "\"content\":\"");
    }
    let mut quiet = body.clone();
    quiet["stream"] = false.into();
    streams.push(server.open("/v1/chat/completions", &quiet));
    let start = Instant::now();
    while server.metric("valar_open_calls{") < 16 {
        assert!(start.elapsed() < FOREVER);
    }
    drop(streams);
    server.wait_idle();
    // What is left is what the last prompt keeps in the cache for the next.
    assert!(server.metric("valar_kv_blocks_used{") <= 4, "{}", server.get("/metrics").text);
    // The engine is as it was.
    assert_eq!(
        server
            .post(
                "/v1/chat/completions",
                json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3})
            )
            .status,
        200
    );
}

#[test]
fn the_first_signal_lets_calls_finish() {
    // However long they take.
    let mut server = Server::with("[server]\ndrain_s = 3600\n", &["--api-key", KEY]);
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "ignore_eos": true, "max_tokens": 150, "stream": true});
    let mut stream = server.open("/v1/chat/completions", &body);
    read_until(&mut stream, "\"content\":\"");
    let pid = server.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    read_until(&mut stream, "[DONE]");
    drop(stream);
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

#[test]
fn models_keys_windows_and_unknown_places() {
    let config = "[[model]]\nid = \"zai-org/GLM-5.1-FP8\"\nweights = \"SmolLM2-135M-Instruct\"\n\
                  [[model]]\nid = \"fast/only\"\nweights = \"SmolLM2-135M-Instruct\"\nwindows = [\"asap\"]\n";
    let server = Server::with(config, &["--api-key", KEY]);
    let key = format!("Bearer {KEY}");
    for (header, value) in [("authorization", key.as_str()), ("x-api-key", KEY)] {
        let answer = server.send("GET", "/v1/models", &[(header, value)], "");
        assert_eq!(answer.json()["data"].as_array().unwrap().len(), 2);
        assert!(
            answer.header("x-request-id").starts_with("req_") && answer.header("request-id") == answer.header("x-request-id")
        );
    }
    for id in ["zai-org/GLM-5.1-FP8", "zai-org%2FGLM-5.1-FP8"] {
        let model = server.get(&format!("/v1/models/{id}")).json();
        assert_eq!(
            (&model["id"], &model["supported_completion_windows"]),
            (&json!("zai-org/GLM-5.1-FP8"), &json!(["asap", "standard"]))
        );
    }
    for headers in [&[][..], &[("authorization", "Bearer wrong")], &[("x-api-key", "")]] {
        for path in ["/v1/models", "/nowhere", "/v1/chat/completions"] {
            let answer = server.send("GET", path, headers, "");
            assert_eq!((answer.status, &answer.json()["error"]["code"]), (401, &json!("invalid_api_key")), "{path}");
        }
        let answer = server.send("POST", "/v1/messages", headers, "{}");
        assert_eq!((answer.status, &answer.json()["error"]["type"]), (401, &json!("authentication_error")));
        assert_eq!(answer.json()["request_id"], answer.header("request-id"));
    }
    let answer = server.get("/v1/nowhere");
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (404, &json!("unknown_url")));
    let answer = server.get("/v1/chat/completions");
    assert_eq!(
        (answer.status, answer.header("allow"), &answer.json()["error"]["code"]),
        (405, "POST", &json!("method_not_allowed"))
    );
    assert_eq!(server.get("/v1/models/nobody").json()["error"]["code"], "model_not_found");
    let ask = |model: &str, window: Value| {
        server.post(
            "/v1/responses",
            json!({"model": model, "input": "Hi", "max_output_tokens": 1, "metadata": {"completion_window": window}}),
        )
    };
    let answer = ask("zai-org/GLM-5.1-FP8", json!("standard")).json();
    assert_eq!(
        (&answer["completion_window"], &answer["metadata"]),
        (&json!("standard"), &json!({"completion_window": "standard"}))
    );
    for (model, window, supported) in [
        ("fast/only", "standard", "supported: asap"),
        ("zai-org/GLM-5.1-FP8", "batch", "supported: asap, standard"),
        ("fast/only", "", "supported: asap"),
    ] {
        let answer = ask(model, json!(window));
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status, &error["type"], &error["param"]),
            (400, &json!("invalid_request_error"), &json!("metadata.completion_window"))
        );
        assert!(error["message"].as_str().unwrap().contains(supported), "{error}");
    }
    for (path, status) in [("/health", 200), ("/ready", 200)] {
        assert_eq!(server.send("GET", path, &[], "").status, status);
    }
}
