//! The document of what the server can be asked: the router's routes are in it, and no others.

use crate::common::root;
use crate::serving::{KEY, Server};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;

/// The paths that the router has, as its source says.
fn routes() -> BTreeSet<String> {
    let source = fs::read_to_string(root().join("src/server/mod.rs")).unwrap();
    let first = |rest: &str| rest.split('"').next().unwrap().to_owned();
    let mut paths: BTreeSet<String> = source.split(".route(\"").skip(1).map(first).collect();
    // Routes of a module of their own, which stand there under a root.
    for merged in source.split(".merge(").skip(1) {
        let (module, rest) = merged.split_once("::routes(\"").unwrap_or_else(|| panic!("no routes are found in {merged:.60}"));
        let (root_path, module) = (first(rest), fs::read_to_string(root().join(format!("src/server/{module}.rs"))).unwrap());
        for route in module.split(".route(").skip(1) {
            let rest = route.strip_prefix("&format!(\"{root}").map(first);
            assert!(rest.is_some() || route.starts_with("root,"), "a route that is not understood: {route:.60}");
            paths.insert(format!("{root_path}{}", rest.unwrap_or_default().replace("{{", "{").replace("}}", "}")));
        }
    }
    paths.into_iter().map(|path| path.replace("{*", "{")).collect()
}

/// Every `$ref` of a document.
fn references(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            found.extend(object.get("$ref").and_then(Value::as_str).map(str::to_owned));
            object.values().for_each(|value| references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[test]
fn the_document_has_the_routers_routes_and_no_others() {
    let server = Server::start();
    // It is no secret.
    let answer = server.send("GET", "/openapi.json", &[], "");
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/json"));
    let document = answer.json();
    assert_eq!((&document["openapi"], &document["info"]["version"]), (&json!("3.1.0"), &json!(env!("CARGO_PKG_VERSION"))));
    let paths = document["paths"].as_object().unwrap();
    assert_eq!(paths.keys().cloned().collect::<BTreeSet<_>>(), routes());
    let mut ids = BTreeSet::new();
    for (path, operations) in paths {
        let operations = operations.as_object().unwrap();
        let methods: BTreeSet<String> =
            operations.keys().filter(|key| *key != "parameters").map(|key| key.to_uppercase()).collect();
        // A method that none has: the router says which it has.
        let concrete = path.replace(['{', '}'], "");
        let answer = server.send("TRACE", &concrete, &[("x-api-key", KEY)], "");
        assert_eq!(answer.status, 405, "{path}: {}", answer.text);
        let allowed = answer.header("allow").split(',').map(str::to_owned).filter(|method| method != "HEAD");
        assert_eq!(allowed.collect::<BTreeSet<_>>(), methods, "{path}");
        for (_, operation) in operations.iter().filter(|(key, _)| *key != "parameters") {
            assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{operation}");
        }
    }
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    for reference in &found {
        assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
    }
    for kind in ["schemas", "parameters"] {
        for name in document["components"][kind].as_object().unwrap().keys() {
            assert!(found.contains(&format!("#/components/{kind}/{name}")), "{name} is of no use");
        }
    }
}

#[test]
fn answers_have_the_forms_that_the_document_says() {
    let server = Server::start();
    let document = server.get("/openapi.json").json();
    let check = |method: &str, path: &str, asked: &str, body: Value| {
        let answer = match method {
            "get" => server.get(asked),
            _ => server.post(asked, body),
        };
        let responses = &document["paths"][path][method]["responses"];
        let described = if answer.status == 200 { &responses["200"] } else { &responses["4XX"] };
        let mut schema = described["content"]["application/json"]["schema"].clone();
        assert!(schema.is_object(), "{method} {path} {}: {described}", answer.status);
        // Its references are to the document's forms.
        schema["components"] = document["components"].clone();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let answer = answer.json();
        let faults: Vec<String> =
            validator.iter_errors(&answer).map(|fault| format!("{}: {fault}", fault.instance_path)).collect();
        assert!(faults.is_empty(), "{method} {path}: {faults:?} {answer}");
        answer
    };
    let model = crate::serving::MODEL;
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let post = |path: &str, body: Value| check("post", path, path, body);
    let chat = json!({"model": model, "messages": messages, "max_tokens": 2});
    post("/v1/chat/completions", chat.clone());
    post("/v1/chat/completions", json!({"model": model}));
    post("/v1/messages", chat.clone());
    post("/v1/messages", json!({"model": model}));
    post("/v1/messages/count_tokens", json!({"model": model, "messages": messages}));
    post("/v1/completions", json!({"model": model, "prompt": "Hi", "max_tokens": 2}));
    let response = post("/v1/responses", json!({"model": model, "input": "Hi", "max_output_tokens": 2}));
    let id = response["id"].as_str().unwrap();
    check("get", "/v1/responses/{id}", &format!("/v1/responses/{id}"), Value::Null);
    check("get", "/v1/responses/{id}/input_items", &format!("/v1/responses/{id}/input_items"), Value::Null);
    post("/v1/responses/wait", json!({"ids": [id]}));
    post("/v1/responses/input_tokens", json!({"model": model, "input": "Hi"}));
    post("/tokenize", json!({"prompt": "Hi"}));
    post("/detokenize", json!({"tokens": [28]}));
    let batch = json!({"endpoint": "/v1/chat/completions", "requests": [{"custom_id": "a", "params": chat}]});
    let batch = post("/v1/batches", batch);
    check("get", "/v1/batches/{id}", &format!("/v1/batches/{}", batch["id"].as_str().unwrap()), Value::Null);
    let batch = json!({"requests": [{"custom_id": "a", "params": {"model": model, "messages": messages, "max_tokens": 2}}]});
    let batch = post("/v1/messages/batches", batch);
    let id = batch["id"].as_str().unwrap();
    check("get", "/v1/messages/batches/{id}", &format!("/v1/messages/batches/{id}"), Value::Null);
    check("post", "/v1/messages/batches/{id}/cancel", &format!("/v1/messages/batches/{id}/cancel"), json!({}));
    let hook = json!({"name": "n", "url": "https://hooks.invalid/", "event_types": ["batch.completed"]});
    let hook = post("/v1/webhook_endpoints", hook);
    let hook = format!("/v1/webhook_endpoints/{}", hook["id"].as_str().unwrap());
    check("get", "/v1/webhook_endpoints/{id}", &hook, Value::Null);
    check("post", "/v1/webhook_endpoints/{id}/rotate_secret", &format!("{hook}/rotate_secret"), json!({}));
    check("post", "/v1/webhook_endpoints/{id}/redeliver", &format!("{hook}/redeliver"), json!({}));
    // Everything that can be read without knowing more.
    for (path, operations) in document["paths"].as_object().unwrap() {
        let is_json = operations["get"]["responses"]["200"]["content"]["application/json"].is_object();
        if is_json && !path.contains('{') {
            check("get", path, path, Value::Null);
        }
    }
    check("get", "/v1/models/{id}", &format!("/v1/models/{model}"), Value::Null);
    for missing in ["/v1/models/{id}", "/v1/batches/{id}", "/v1/files/{id}", "/v1/responses/{id}"] {
        let error = check("get", missing, &missing.replace("{id}", "nobody"), Value::Null);
        assert!(error["error"].is_object(), "{error}");
    }
}
