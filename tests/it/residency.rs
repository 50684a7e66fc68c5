//! Several models in one server, within one memory budget, as its callers see them: loaded when they are wanted, unloaded when
//! others need the room or nobody uses them, and their memory really given back.

use crate::common::{Sandbox, chat_line, model_path};
use crate::serving::{FOREVER, KEY, MODEL, Server};
use serde_json::{Value, json};
use std::fs;
use std::time::{Duration, Instant};

/// Two models that do not fit side by side into the server's 1 GiB: the same weights in two kinds of numbers.
fn config(server: &str, first: &str) -> String {
    // However slow the machine is, but for those who ask for less.
    let load_wait_s = if server.contains("100000") { 1 } else { 3600 };
    format!(
        "[server]\napi_keys = [\"{KEY}\"]\nload_wait_s = {load_wait_s}\n{server}\n
        [windows.asap]\nceiling_s = 3600\n
        [[model]]\nid = \"org/first\"\nweights = \"{MODEL}\"\nnumerics = \"int8\"\nmemory = \"600MiB\"\nload = \"on_demand\"\n{first}\n
        [[model]]\nid = \"org/second\"\nweights = \"{MODEL}\"\nnumerics = \"bf16\"\nmemory = \"700MiB\"\nload = \"on_demand\"\n"
    )
}

fn chat(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 6, "temperature": 0})
}

/// What a model answers, and what its bits depend on.
#[track_caller]
fn answer(server: &Server, model: &str) -> (String, String) {
    let answer = server.post("/v1/chat/completions", chat(model));
    assert_eq!(answer.status, 200, "{}", answer.text);
    let answer = answer.json();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (text(&answer["choices"][0]["message"]["content"]), text(&answer["system_fingerprint"]))
}

fn of(name: &str, model: &str) -> String {
    format!("{name}{{model=\"{model}\"}}")
}

/// Looks again until it is so.
#[track_caller]
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < FOREVER, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Memory of the server that is in use, MiB.
fn resident_mib(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

#[test]
fn models_are_loaded_on_demand_and_take_turns() {
    let server = Server::with(&config("min_loaded_s = 0", ""), &[]);
    let states = || {
        let models = server.get("/v1/models").json();
        models["data"].as_array().unwrap().iter().map(|model| model["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(states(), ["unloaded", "unloaded"]);
    // What needs no weights needs no load.
    assert_eq!(server.post("/tokenize", json!({"model": "org/second", "prompt": "Hello"})).status, 200);
    let long = json!({"model": "org/first", "input": "x ".repeat(20_000), "background": true});
    assert_eq!(server.post("/v1/responses", long).json()["error"]["code"], "context_length_exceeded");
    assert_eq!((server.metric("valar_model_loads_total"), server.metric("valar_memory_used_bytes")), (0, 0));
    let ready = server.get("/ready").json();
    assert_eq!(ready["models"], json!({"loaded": 0, "loading": 0, "unloading": 0, "unloaded": 2}));

    // Many at once: one load.
    let answers: Vec<_> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..8).map(|_| scope.spawn(|| answer(&server, "org/first"))).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    assert!(answers.iter().all(|other| *other == answers[0]), "{answers:?}");
    assert_eq!(server.metric(&of("valar_model_loads_total", "org/first")), 1);
    assert_eq!(states(), ["loaded", "unloaded"]);
    let steps = server.metric(&of("valar_generated_tokens_total", "org/first"));
    assert!(steps >= 8);

    // The other one takes its room.
    let second = answer(&server, "org/second");
    assert_ne!(second.1, answers[0].1, "other numbers");
    assert_eq!(states(), ["unloaded", "loaded"]);
    assert_eq!(server.metric(&of("valar_model_unloads_total", "org/first")), 1);
    let status = server.get("/v1/status").json();
    let used = &status["engines"][1]["memory_bytes"];
    assert_eq!(status["memories"], json!([{"device": "cpu", "budget_bytes": 1_u64 << 30, "used_bytes": used}]));
    assert_eq!(status["engines"][0]["loads"], json!({"loaded": 1, "unloaded": 1, "failed": 0, "error": null}));

    // What comes back has the same bits, and goes on counting.
    assert_eq!(answer(&server, "org/first"), answers[0]);
    assert!(server.metric(&of("valar_generated_tokens_total", "org/first")) > steps);
    server.wait_idle();
}

#[test]
fn a_model_that_nobody_uses_gives_its_memory_back() {
    let server = Server::with(&config("min_loaded_s = 0", "idle_unload_s = 1"), &[]);
    // Threads and what they keep are there after the first time.
    let mut before = None;
    for round in 0..4 {
        let answered = answer(&server, "org/first");
        assert!(!answered.0.is_empty());
        wait_until("it is unloaded", || server.metric(&of("valar_model_unloads_total", "org/first")) == round + 1);
        let Some(least) = before else {
            before = Some(resident_mib(&server));
            continue;
        };
        // The weights alone are more than that.
        wait_until("its memory comes back", || resident_mib(&server) < least + 48);
    }
    let unloaded = resident_mib(&server);
    // The other one stays: what is measured here is large enough to be seen.
    answer(&server, "org/second");
    let loaded = resident_mib(&server);
    assert!(loaded > unloaded + 80, "{unloaded} MiB unloaded, {loaded} MiB loaded");
}

#[test]
fn batches_and_background_responses_wait_for_their_models() {
    let server = Server::with(&config("min_loaded_s = 0", ""), &[]);
    let extra = json!({"model": "org/first", "max_tokens": 24});
    let lines: Vec<String> =
        (0..96).map(|i| chat_line(&format!("row-{i}"), &format!("Tell me of {i}."), extra.clone())).collect();
    let params: Vec<Value> = lines
        .iter()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            json!({"custom_id": line["custom_id"], "params": line["body"]})
        })
        .collect();
    let batch = server.post("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": params})).json();
    let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
    wait_until("the batch runs", || server.metric(&of("valar_generated_tokens_total", "org/first")) > 0);
    // A call for the other model has the batch pause; a background response is done once its model is there.
    let input = json!({"model": "org/second", "input": "Say hello.", "max_output_tokens": 6, "background": true});
    let response = server.post("/v1/responses", input).json();
    answer(&server, "org/second");
    assert_eq!(server.metric(&of("valar_model_unloads_total", "org/first")), 1);
    let id = response["id"].as_str().unwrap();
    let get = |path: &str| server.get(path).json();
    // As many tokens as it may have.
    wait_until("the response is done", || get(&format!("/v1/responses/{id}"))["status"] == "incomplete");
    wait_until("the batch is done", || get(&path)["status"] == "completed");
    let counts = &get(&path)["request_counts"];
    assert_eq!(counts, &json!({"total": 96, "completed": 96, "failed": 0}));
    assert!(server.metric(&of("valar_model_loads_total", "org/first")) >= 2, "it went on");
    server.wait_idle();
}

#[test]
fn a_call_waits_no_longer_than_it_may() {
    // The first stays for the test's time, whatever the machine's speed.
    let server = Server::with(&config("min_loaded_s = 100000", ""), &[]);
    answer_at_last(&server, "org/first");
    for (path, mut body, status) in [
        ("/v1/chat/completions", chat("org/second"), 503),
        ("/v1/messages", json!({"model": "org/second", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}), 529),
    ] {
        for is_streamed in [false, true] {
            body["stream"] = is_streamed.into();
            let refused = server.post(path, body.clone());
            assert_eq!((refused.status, refused.header("retry-after")), (status, "5"), "{}", refused.text);
            let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
            assert!(message.contains("org/second") && message.contains("others are at work"), "{message}");
        }
    }
    // A batch of it can be cancelled meanwhile.
    let requests = json!([{"custom_id": "a", "params": chat("org/second")}]);
    let batch = server.post("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": requests})).json();
    let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
    wait_until("it waits for its model", || server.get("/v1/status").json()["engines"][1]["users"]["waiting"] == 1);
    server.post(&format!("{path}/cancel"), json!({}));
    wait_until("it is cancelled", || server.get(&path).json()["status"] == "cancelled");
    assert_eq!(server.get(&path).json()["request_counts"], json!({"total": 1, "completed": 0, "failed": 1}));
    assert_eq!(server.get("/v1/status").json()["engines"][1]["users"], json!({"working": 0, "waiting": 0}));
    answer(&server, "org/first");
}

/// As [`answer`], of a server whose calls wait less long than a load takes.
fn answer_at_last(server: &Server, model: &str) {
    wait_until("it is loaded", || server.post("/v1/chat/completions", chat(model)).status == 200);
}

#[test]
fn a_load_that_fails_is_told_and_tried_again() {
    let config = format!(
        "[[key]]\nkey = \"{KEY}\"\n[[key]]\nkey = \"boss\"\nadmin = true\n
        [[model]]\nid = \"ours\"\nweights = \"own.gguf\"\nnumerics = \"int8\"\nload = \"on_demand\"\n"
    );
    let server = Server::with_files(&config, &[], |sandbox| fs::copy(model_path(), sandbox.path("own.gguf")).map(drop).unwrap());
    let (own, away) = (server.sandbox.path("own.gguf"), server.sandbox.path("away"));
    fs::rename(&own, &away).unwrap();
    let refused = server.post("/v1/chat/completions", chat("ours"));
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (503, &json!("server_error")), "{}", refused.text);
    // Where our files are is none of the caller's business, but the admin's.
    let message = "the model ours could not be loaded; try again";
    assert_eq!(refused.json()["error"]["message"], message);
    assert!(!refused.header("retry-after").is_empty());
    wait_until("the log says why", || server.said.lock().unwrap().contains("own.gguf"));
    let error = |key: &str| {
        let status = server.send("GET", "/v1/status", &[("x-api-key", key)], "").json();
        status["engines"][0]["loads"]["error"].to_string()
    };
    assert_eq!(error(KEY), "\"it could not be loaded\"");
    assert!(error("boss").contains("own.gguf"), "{}", error("boss"));
    // It is not tried for each who asks.
    assert_eq!(server.post("/v1/chat/completions", chat("ours")).status, 503);
    assert_eq!(server.metric("valar_model_load_failures_total"), 1);
    assert_eq!(server.get("/health").status, 200);
    // Others than those of the start are not served as if they were the same.
    let mut bytes = fs::read(&away).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&own, bytes).unwrap();
    // What can wait does, and has it tried again.
    let input = json!({"model": "ours", "input": "Say hello.", "max_output_tokens": 4, "background": true});
    let response = server.post("/v1/responses", input).json();
    wait_until("it is tried again", || error("boss").contains("have changed"));
    fs::rename(&away, &own).unwrap();
    let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
    // As many tokens as it may have.
    wait_until("the response is done", || server.get(&path).json()["status"] == "incomplete");
    answer(&server, "ours");
    assert_eq!(server.get("/v1/status").json()["engines"][0]["loads"]["error"], Value::Null);
}

#[test]
fn what_can_never_fit_is_refused_at_the_start() {
    let sandbox = Sandbox::new();
    let refused = |model: &str, budget: &str| {
        sandbox.write("valar.toml", format!("[[model]]\nid = \"ours\"\nweights = \"{MODEL}\"\n{model}\n"));
        let args = ["serve", "--config", "valar.toml", "--port", "0", "--data", "data", "--memory", budget];
        let output = sandbox.run(&args);
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = refused("load = \"on_demand\"", "64MiB");
    assert!(said.contains("ours") && said.contains("64 MiB allowed") && said.contains("weights"), "{said}");
    let said = refused("memory = \"2GiB\"", "1GiB");
    assert!(said.contains("model.memory: 2048 MiB for ours are more than the 1024 MiB"), "{said}");
    let both =
        format!("memory = \"600MiB\"\n[[model]]\nid = \"b\"\nweights = \"{MODEL}\"\nnumerics = \"int8\"\nmemory = \"600MiB\"");
    let said = refused(&both, "1GiB");
    assert!(said.contains("1200 MiB together, more than the 1024 MiB"), "{said}");
    let same = format!("memory = \"600MiB\"\n[[model]]\nid = \"b\"\nweights = \"{MODEL}\"\nmemory = \"500MiB\"");
    let said = refused(&same, "1GiB");
    assert!(said.contains("different things of the same weights"), "{said}");
}
