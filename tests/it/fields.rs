//! Every field of every request, as the server's own document lists them, with values of every kind and of extreme sizes, and so is
//! everything within them: never a fault of the server, never one that hangs; what the document calls wrong is refused, and every
//! answer has the form that the document says.

use crate::common::{Sandbox, tiny_llama};
use crate::serving::{Answer, Server};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;

/// A template that teaches calls.
const TEMPLATE: &str = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{# <tool_call> #}";

/// A tiny model, which knows the letters that JSON and calls are written with.
fn model(sandbox: &Sandbox) {
    let path = tiny_llama(sandbox).0.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    for letter in "{}\":[]-_/<>\u{10a}".chars() {
        vocab.insert(letter.to_string(), vocab.len().into());
    }
    fs::write(path, tokenizer.to_string()).unwrap();
    sandbox.write("own.jinja", TEMPLATE);
}

/// What may stand anywhere.
fn values() -> Vec<Value> {
    let numbers = [json!(-1), json!(0), json!(1.5), json!(1e300), json!(1_u64 << 53 | 1), json!(i64::MIN), json!(u64::MAX)];
    let texts = ["", "\0", "\u{1f642}", &"x".repeat(70_000)].map(Value::from);
    let others =
        [json!(null), json!(true), json!(false), json!([]), json!([null]), json!([[[]]]), json!({}), json!({"a": {"": []}})];
    let many = json!(vec!["x"; 300]);
    numbers.into_iter().chain(texts).chain(others).chain([many]).collect()
}

/// The places of a value and of all that is within it, as pointers.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(object) => object.iter().for_each(|(key, value)| places(value, &format!("{at}/{key}"), found)),
        Value::Array(items) => items.iter().enumerate().for_each(|(i, value)| places(value, &format!("{at}/{i}"), found)),
        _ => {}
    }
}

/// The fields that a schema declares, with those within them: `/messages/*/role`.
fn declared(document: &Value, schema: &Value, at: &str, found: &mut BTreeSet<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        return declared(document, document.pointer(reference.trim_start_matches('#')).unwrap(), at, found);
    }
    for several in ["allOf", "anyOf"] {
        schema[several].as_array().into_iter().flatten().for_each(|part| declared(document, part, at, found));
    }
    declared_in(document, &schema["items"], &format!("{at}/*"), found);
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        found.insert(format!("{at}/{name}"));
        declared_in(document, field, &format!("{at}/{name}"), found);
    }
}

fn declared_in(document: &Value, schema: &Value, at: &str, found: &mut BTreeSet<String>) {
    if schema.is_object() {
        declared(document, schema, at, found);
    }
}

/// A pointer whose numbers are any.
fn any_number(pointer: &str) -> String {
    pointer.split('/').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part }).collect::<Vec<_>>().join("/")
}

/// Of an operation: its path, what is asked, and how that is answered.
type Example = (&'static str, Value, u16);

fn sampling(more: &[(&str, Value)]) -> Value {
    let mut body = json!({
        "model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "seed": 7, "stop": ["x"], "metadata": {"trajectory_id": "t", "completion_window": "asap"},
        "stream": false,
    });
    for (name, value) in more {
        body[*name] = value.clone();
    }
    body
}

fn schema() -> Value {
    json!({"type": "object", "properties": {"a": {"type": "integer"}}})
}

fn chats() -> Vec<Example> {
    let path = "/v1/chat/completions";
    let function = json!({"name": "look", "description": "d", "strict": false, "parameters": schema()});
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{\"a\": 1}"}});
    let messages = json!([
        {"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "d"},
    ]);
    let short = json!([{"role": "user", "content": "a"}]);
    let completing = [
        ("n", json!(2)),
        ("max_tokens", json!(3)),
        ("min_tokens", json!(1)),
        ("ignore_eos", json!(false)),
        ("stop_token_ids", json!([5])),
        ("logit_bias", json!({"7": 1.5})),
    ];
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema()}});
    let mut chat = sampling(&completing);
    for (name, value) in [("messages", messages), ("logprobs", json!(true)), ("top_logprobs", json!(2))] {
        chat[name] = value;
    }
    let choice = json!({"type": "function", "function": {"name": "look"}});
    let streamed = json!({
        "model": "m", "messages": short, "max_completion_tokens": 3, "stream": true, "stream_options": {"include_usage": true},
        "tools": [{"type": "function", "function": function}], "tool_choice": choice, "parallel_tool_calls": true,
    });
    let mut examples = vec![(path, chat, 200), (path, streamed, 200)];
    let mut text = sampling(&completing);
    for (name, value) in [("prompt", json!(["a", "b"])), ("logprobs", json!(2)), ("echo", json!(true))] {
        text[name] = value;
    }
    let streamed = json!({"model": "m", "prompt": [[5, 6]], "stream": true, "stream_options": {"include_usage": true}});
    examples.extend([("/v1/completions", text, 200), ("/v1/completions", streamed, 200)]);
    for (name, value) in [("response_format", format), ("regex", json!("a+")), ("grammar", json!("start: \"a\""))] {
        examples.push((path, json!({"model": "m", "messages": short, name: value}), 200));
        examples.push(("/v1/completions", json!({"model": "m", "prompt": [5, 6], name: value}), 200));
    }
    examples.push(("/v1/embeddings", json!({"model": "m", "input": ["a"]}), 400));
    examples
}

/// `previous` is a stored response.
fn responses(previous: &str) -> Vec<Example> {
    let whole = sampling(&[
        (
            "input",
            json!([
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "d"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": []}]},
                {"role": "user", "content": "e"},
            ]),
        ),
        ("instructions", json!("i")),
        ("max_output_tokens", json!(3)),
        ("store", json!(true)),
        ("background", json!(false)),
        ("top_logprobs", json!(2)),
        ("include", json!(["message.output_text.logprobs"])),
        ("text", json!({"format": {"type": "text"}})),
        ("tools", json!([{"type": "function", "name": "look", "description": "d", "strict": false, "parameters": schema()}])),
        ("tool_choice", json!({"type": "function", "name": "look"})),
        ("parallel_tool_calls", json!(true)),
        ("reasoning", json!({"effort": "low"})),
        ("truncation", json!("disabled")),
    ]);
    let later = json!({
        "model": "m", "input": "a", "background": true, "background_options": {"completion_window": "2h"}, "max_output_tokens": 2,
        "previous_response_id": previous,
    });
    let format = json!({"type": "json_schema", "name": "n", "strict": true, "schema": schema()});
    let formed = json!({"model": "m", "input": "a", "text": {"format": format}});
    let mut examples = vec![("/v1/responses/wait", json!({"ids": [previous], "timeout_s": 0}), 200)];
    for body in [whole, later, formed] {
        examples.extend(["/v1/responses", "/v1/responses/input_tokens"].map(|path| (path, body.clone(), 200)));
    }
    examples
}

fn messages() -> Vec<Example> {
    let whole = json!({
        "model": "m", "max_tokens": 3, "stop_sequences": ["x"], "stream": false, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
        "system": [{"type": "text", "text": "s"}], "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"},
        "tools": [{"name": "look", "description": "d", "input_schema": schema()}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": true},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "tool_use", "id": "t1", "name": "look", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "c"}], "is_error": false},
            ]},
        ],
    });
    let short = json!([{"role": "user", "content": "a"}]);
    let config = json!({"format": {"type": "json_schema", "schema": schema()}, "effort": "low"});
    let streamed = json!({"model": "m", "max_tokens": 3, "messages": short, "stream": true, "output_config": config});
    let counted = json!({"model": "m", "messages": short, "system": "s"});
    let batch = json!({"requests": [{"custom_id": "a", "params": {"model": "m", "max_tokens": 1, "messages": short}}]});
    vec![
        ("/v1/messages", whole.clone(), 200),
        ("/v1/messages", streamed.clone(), 200),
        ("/v1/messages/count_tokens", counted.clone(), 200),
        ("/v1/messages/batches", batch.clone(), 200),
        ("/v1/v1/messages", whole, 200),
        ("/v1/v1/messages", streamed, 200),
        ("/v1/v1/messages/count_tokens", counted, 200),
        ("/v1/v1/messages/batches", batch, 200),
    ]
}

/// `file` is one for batches, `uri` one that stays where it is.
fn others(file: &str, uri: &str) -> Vec<Example> {
    let hook = json!({"name": "n", "url": "https://hooks.invalid/", "event_types": ["batch.completed"]});
    let after = json!({"anchor": "created_at", "seconds": 3600});
    let params = json!({"model": "m", "prompt": "a", "max_tokens": 1});
    let batch = json!({
        "endpoint": "/v1/completions", "requests": [{"custom_id": "a", "params": params}], "completion_window": "24h",
        "metadata": {"a": "b"}, "label": "l", "output_expires_after": after,
    });
    let of_file = json!({"endpoint": "/v1/completions", "input_file_id": file, "max_cost": "1.5"});
    let reference = json!({"purpose": "batch", "uri": uri, "format": "jsonl", "filename": "f", "expires_after": after});
    vec![
        ("/v1/batches", batch, 200),
        ("/v1/batches", of_file, 200),
        ("/v1/files", reference, 200),
        ("/v1/webhook_endpoints", hook.clone(), 200),
        ("/v1/webhook_endpoints/{id}", hook, 200),
        ("/v1/webhook_endpoints/{id}/rotate_secret", json!({"keep_old_secret_active_for_24_hours": true}), 200),
        // Nobody is there.
        ("/v1/webhook_endpoints/{id}/test", json!({"event_type": "batch.completed"}), 400),
        ("/v1/webhook_endpoints/{id}/redeliver", json!({"event_id": "e"}), 404),
        ("/tokenize", json!({"prompt": "a", "add_special_tokens": true, "model": "m"}), 200),
        ("/detokenize", json!({"tokens": [5], "model": "m"}), 200),
    ]
}

/// What checks a form of the document.
fn validator(document: &Value, schema: &Value) -> jsonschema::Validator {
    let mut schema = schema.clone();
    schema["components"] = document["components"].clone();
    jsonschema::validator_for(&schema).unwrap()
}

/// Whether an answer has the form that the operation says.
#[track_caller]
fn check_form(document: &Value, operation: &Value, answer: &Answer, asked: &str) {
    let kind = if answer.status == 200 { "200" } else { "4XX" };
    let schema = &operation["responses"][kind]["content"]["application/json"]["schema"];
    assert!((200..500).contains(&answer.status), "{asked}: {} {}", answer.status, answer.text);
    if answer.header("content-type").starts_with("application/json") {
        let (answer, validator) = (answer.json(), validator(document, schema));
        let faults: Vec<String> = validator.iter_errors(&answer).map(|fault| fault.to_string()).collect();
        assert!(faults.is_empty(), "{asked}: {faults:?} {answer}");
    } else {
        assert_eq!((answer.status, answer.header("content-type").starts_with("text/event-stream")), (200, true), "{asked}");
    }
}

#[test]
fn every_field_of_every_request_may_be_anything() {
    let elsewhere = tempfile::tempdir().unwrap();
    let line = json!({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "a", "max_tokens": 1}});
    fs::write(elsewhere.path().join("a.jsonl"), line.to_string()).unwrap();
    let uri = format!("file://{}", elsewhere.path().join("a.jsonl").display());
    let config = format!(
        "[[model]]\nid = \"m\"\nweights = \"tiny-llama\"\nchat_template = \"own.jinja\"\n[windows.asap]\nceiling_s = 1000000\n\
         [windows.standard]\nceiling_s = 1000000\n[prices]\nasap = {{ input = 1.0, output = 3.0 }}\n[files]\nallow = [\"file://{}/\"]\n",
        elsewhere.path().display()
    );
    let server = Server::with_files(&config, &[], model);
    let document = server.get("/openapi.json").json();
    let made = |path: &str, body: Value| server.post(path, body).json()["id"].as_str().unwrap().to_owned();
    let previous = made("/v1/responses", json!({"model": "m", "input": "a"}));
    let hook =
        made("/v1/webhook_endpoints", json!({"name": "n", "url": "https://hooks.invalid/", "event_types": ["batch.completed"]}));
    let file = made("/v1/files", json!({"purpose": "batch", "uri": uri}));
    let examples = [chats(), responses(&previous), messages(), others(&file, &uri)].concat();
    let (mut n_asked, mut seen) = (0, BTreeSet::new());
    for (path, body, status) in &examples {
        let operation = &document["paths"][path]["post"];
        let request = validator(&document, &operation["requestBody"]["content"]["application/json"]["schema"]);
        assert!(request.is_valid(body), "{path}: the example is not what the document says");
        let ask = |body: &Value| server.post(&path.replace("{id}", &hook), body.clone());
        let answer = ask(body);
        assert_eq!(answer.status, *status, "{path} {body}: {}", answer.text);
        let mut found = Vec::new();
        places(body, "", &mut found);
        for (place, value) in found.iter().flat_map(|place| values().into_iter().map(move |value| (place, value))) {
            let mut other = body.clone();
            *other.pointer_mut(place).unwrap() = value.clone();
            let (answer, asked) = (ask(&other), format!("{path} {place}: {value:.60}"));
            check_form(&document, operation, &answer, &asked);
            assert!(request.is_valid(&other) || answer.status >= 400, "{asked}: the document calls it wrong, and it was done");
            n_asked += 1;
        }
        seen.extend(found.iter().map(|place| format!("{path}{}", any_number(place))));
    }
    assert!(n_asked > 10_000, "{n_asked}");
    // Nothing that the document has is missing here.
    let mut all = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        declared_in(&document, &operations["post"]["requestBody"]["content"]["application/json"]["schema"], path, &mut all);
    }
    let missing: Vec<_> = all.difference(&seen).collect();
    assert!(missing.is_empty() && all.len() > 100, "{missing:?} of {}", all.len());
    server.wait_idle();
    assert_eq!(server.metric("valar_http_responses_total{status=\"5xx\"}"), 0);
}

/// The query's parts, and the fields of forms.
#[test]
fn every_part_of_a_query_or_a_form_may_be_anything() {
    let server = Server::with("", &["--engine", "null"]);
    let document = server.get("/openapi.json").json();
    let texts = [
        "",
        "x",
        "-1",
        "0",
        "1.5",
        "1e9",
        "true",
        "%00",
        "%F0%9F%99%82",
        "99999999999999999999999",
        "9223372036854775807",
        &"x".repeat(5000),
    ];
    let mut n_asked = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        let operation = &operations["get"];
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let parameter = document.pointer(parameter["$ref"].as_str().unwrap().trim_start_matches('#')).unwrap();
            for text in texts {
                let asked = format!("{}?{}={text}", path.replace(['{', '}'], ""), parameter["name"].as_str().unwrap());
                check_form(&document, operation, &server.get(&asked), &format!("{asked:.80}"));
                n_asked += 1;
            }
        }
    }
    let operation = &document["paths"]["/v1/files"]["post"];
    let mut fields = BTreeSet::new();
    declared(&document, &operation["requestBody"]["content"]["multipart/form-data"]["schema"], "", &mut fields);
    assert!(fields.len() > 3, "{fields:?}");
    let values = [
        "",
        "\0",
        "x",
        "batch",
        "created_at",
        "3600",
        "-1",
        "1e300",
        "99999999999999999999999",
        "\u{1f642}",
        &"x".repeat(70_000),
    ];
    for field in &fields {
        for value in values {
            let part =
                |name: &str, value: &str| format!("--x\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
            let others: String =
                [("purpose", "batch"), ("expires_after[anchor]", "created_at"), ("expires_after[seconds]", "3600")]
                    .iter()
                    .filter(|(name, _)| format!("/{name}") != *field)
                    .map(|(name, value)| part(name, value))
                    .collect();
            let file = if field == "/file" { String::new() } else { part("file", "{}") };
            let form = format!("{others}{file}{}--x--\r\n", part(field.trim_start_matches('/'), value));
            let answer = server.send("POST", "/v1/files", &[("content-type", "multipart/form-data; boundary=x")], form);
            check_form(&document, operation, &answer, &format!("{field}: {value:.40?}"));
            n_asked += 1;
        }
    }
    assert!(n_asked > 300, "{n_asked}");
}
