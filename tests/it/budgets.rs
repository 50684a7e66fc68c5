//! What a key may be charged, from outside: nothing runs for a key whose budget is used up, whatever is restarted; its batches wait
//! until there is some again, and lose nothing.

use crate::serving::{Answer, KEY, MODEL, Server, read_until};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

const PRICES: &str = "[prices]\nasap = { input = 1.0, output = 3.0 }\nbatch = { input = 0.25, output = 0.75 }\n";

/// One of two keys has a budget, as it is said here.
fn config(budget: &str) -> String {
    format!(
        "[[key]]\nname = \"ours\"\nkey = {KEY:?}\n[[key]]\nname = \"poor\"\nkey = \"poor\"\n{budget}\n[engine]\nmax_running = 1\n{PRICES}"
    )
}

fn chat(max_tokens: u32) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": max_tokens, "ignore_eos": true})
}

impl Server {
    fn poor(&self, method: &str, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(method, path, &[("x-api-key", "poor")], body)
    }

    /// What the key with the budget was charged, in millionths.
    fn charged_micro(&self) -> f64 {
        let total = self.poor("GET", "/v1/usage?group_by=", &Value::Null).json()["total"]["charge"].clone();
        total.as_str().unwrap().parse::<f64>().unwrap() * 1e6
    }

    fn post_batch(&self, path: &str, n: usize) -> Answer {
        let params = |i: usize| {
            let mut body = chat(40);
            body["messages"][0]["content"] = format!("Number {i}?").into();
            body
        };
        let requests: Vec<Value> = (0..n).map(|i| json!({"custom_id": format!("r{i}"), "params": params(i)})).collect();
        let mut body = json!({"requests": requests});
        if path == "/v1/batches" {
            body["endpoint"] = "/v1/chat/completions".into();
        } else {
            let requests = body["requests"].as_array_mut().unwrap().iter_mut();
            requests.for_each(|request| drop(request["params"].as_object_mut().unwrap().remove("ignore_eos")));
        }
        self.poor("POST", path, &body)
    }

    fn until(&self, batch: &Value, states: &[&str]) -> Value {
        loop {
            let batch = self.poor("GET", &format!("/v1/batches/{}", batch["id"].as_str().unwrap()), &Value::Null).json();
            if states.contains(&batch["status"].as_str().unwrap()) {
                return batch;
            }
            assert!(
                !["completed", "cancelled", "failed"].contains(&batch["status"].as_str().unwrap()),
                "never {states:?}: {batch}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn until_paused(&self, batch: &Value) -> Value {
        loop {
            let batch = self.until(batch, &["in_progress"]);
            if batch["progress"]["paused"].is_object() {
                return batch;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn rows(&self, file: &Value) -> Vec<Value> {
        let Some(file) = file.as_str() else { return Vec::new() };
        let text = self.poor("GET", &format!("/v1/files/{file}/content"), &Value::Null).text;
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

const ENDS: [&str; 4] = ["completed", "cancelled", "failed", "expired"];

fn code(answer: &Answer) -> Value {
    json!([answer.status, answer.json()["error"]["type"], answer.json()["error"]["code"], answer.header("x-should-retry")])
}

#[test]
fn a_key_is_charged_no_more_than_its_budget() {
    let mut server = Server::with(&config("max_cost = 0.0004"), &[]);
    let mut last = 0.0;
    let refused = loop {
        let answer = server.poor("POST", "/v1/chat/completions", &chat(20));
        if answer.status != 200 {
            break answer;
        }
        assert!(last < 400.0, "{last} was charged, and one more was let in");
        last = server.charged_micro();
    };
    assert!((400.0..800.0).contains(&last), "{last}");
    let used_up = json!([429, "insufficient_quota", "insufficient_quota", "false"]);
    assert_eq!(code(&refused), used_up, "{}", refused.text);
    let message = refused.json()["error"]["message"].clone();
    assert!(message.as_str().unwrap().starts_with("the key's budget of 0.0004 USD is used up: 0.0004"), "{message}");
    for is_restarted in [false, true] {
        if is_restarted {
            server.restart();
        }
        let background = json!({"model": MODEL, "input": "Hi", "background": true});
        for (path, body) in [("/v1/responses", background), ("/v1/completions", json!({"model": MODEL, "prompt": "Hi"}))] {
            assert_eq!(code(&server.poor("POST", path, &body)), used_up, "{path}");
        }
        let message = json!({"model": MODEL, "max_tokens": 5, "messages": chat(5)["messages"]});
        let answer = server.poor("POST", "/v1/messages", &message);
        assert_eq!((answer.status, &answer.json()["error"]["type"]), (402, &json!("billing_error")), "{}", answer.text);
        let count = || std::fs::read_dir(server.sandbox.path("data/batches")).unwrap().count();
        let before = count();
        assert_eq!(code(&server.post_batch("/v1/batches", 2)), used_up);
        assert_eq!((server.post_batch("/v1/messages/batches", 2).status, count()), (402, before), "something of it is left");
        assert_eq!(server.poor("GET", "/v1/models", &Value::Null).status, 200, "only what is charged is limited");
    }
    assert!((server.charged_micro() - last).abs() < 1e-6);
    let report = server.poor("GET", "/v1/usage?group_by=", &Value::Null).json();
    let expected = json!({"max_cost": "0.0004", "cost_period": "total", "charged": report["total"]["charge"], "running": "0", "resets_at": null});
    assert_eq!(report["budget"], expected);
    assert_eq!(server.post("/v1/chat/completions", chat(5)).status, 200, "another key's budget is another");
}

#[test]
fn what_runs_counts_as_what_it_may_come_to() {
    // Each may come to three times the budget.
    let server = Server::with(&config("max_cost = 0.0004\ncost_period = \"month\""), &[]);
    let body = chat(400);
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..8).map(|_| scope.spawn(|| server.poor("POST", "/v1/chat/completions", &body))).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    let (done, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 200);
    assert_eq!((done.len(), refused.len()), (1, 7), "{answers:?}");
    let message = refused[0].json()["error"]["message"].clone();
    assert!(
        message.as_str().unwrap().contains("0.0004 USD a month") && message.as_str().unwrap().contains("whole again at"),
        "{message}"
    );
}

#[test]
fn a_batch_waits_for_its_keys_budget_and_loses_no_row() {
    const N: usize = 60;
    let mut server = Server::with(&config("max_cost = 0.0005"), &[]);
    let made = server.post_batch("/v1/batches", N).json();
    let paused = server.until_paused(&made);
    let why = &paused["progress"]["paused"];
    assert_eq!(json!([paused["status"], paused["errors"], why["code"]]), json!(["in_progress", null, "paused_budget"]));
    assert!(why["message"].as_str().unwrap().starts_with("the key's budget of 0.0005 USD is used up: 0 USD"), "{why}");
    let done = server.rows(&paused["output_file_id"]);
    assert_eq!(paused["request_counts"], json!({"total": N, "completed": done.len(), "failed": 0}));
    assert!(!done.is_empty() && done.len() < N / 2, "{} of {N} were run", done.len());
    let report = server.poor("GET", "/v1/usage?group_by=", &Value::Null).json();
    assert_eq!(json!([report["budget"]["charged"], report["budget"]["running"]]), json!(["0", paused["progress"]["cost"]]));
    let cost = paused["progress"]["cost"].as_str().unwrap().parse::<f64>().unwrap();
    assert!((0.0005..0.0007).contains(&cost), "{cost}");
    // It is in nobody's way meanwhile.
    assert_eq!(server.post("/v1/chat/completions", chat(50)).status, 200);
    assert_eq!(code(&server.post_batch("/v1/batches", 2))[1], "insufficient_quota");
    assert_eq!(server.until_paused(&made)["request_counts"], paused["request_counts"], "nothing of it was run");
    // What it has cost is known after a kill, before anything more is run.
    server.restart();
    let again = server.until_paused(&made);
    assert_eq!(
        json!([again["request_counts"], again["progress"]["cost"]]),
        json!([paused["request_counts"], paused["progress"]["cost"]])
    );
    server.sandbox.write("valar.toml", config("max_cost = 5"));
    server.restart();
    let ended = server.until(&made, &ENDS);
    assert_eq!(
        json!([ended["status"], ended["request_counts"]["completed"], ended["error_file_id"]]),
        json!(["completed", N, null])
    );
    let rows = server.rows(&ended["output_file_id"]);
    let ids: BTreeSet<&str> = rows.iter().map(|line| line["custom_id"].as_str().unwrap()).collect();
    assert_eq!((ids.len(), rows.len()), (N, N), "each request ended once");
    for line in &done {
        assert!(rows.contains(line), "{line} is another now");
    }
    let cost = ended["usage"]["cost"].as_str().unwrap().parse::<f64>().unwrap();
    assert!((server.charged_micro() - cost * 1e6).abs() < 1e-6, "charged once");
}

#[test]
fn a_batch_waits_when_other_work_has_used_up_its_keys_budget() {
    let mut server = Server::with(&config("max_cost = 0.5\ncost_period = \"day\""), &[]);
    // Nothing of the batches begins while this has the place.
    let mut long = chat(7000);
    long["stream"] = true.into();
    let mut running = server.open("/v1/chat/completions", &long);
    read_until(&mut running, "\"content\":\"");
    let batch = server.post_batch("/v1/batches", 3).json();
    let messages = server.post_batch("/v1/messages/batches", 3).json();
    server.until(&batch, &["in_progress"]);
    // As if a call had been charged.
    let database = rusqlite::Connection::open(server.sandbox.path("data/valar.db")).unwrap();
    database.busy_timeout(Duration::from_mins(1)).unwrap();
    let sql =
        "INSERT INTO ledger SELECT NULL, unixepoch(), NULL, owner, 'poor', 'm', 'asap', '', 1, 0, 0, 0, 0, 0, 0, ?1, 0, 0, 0
               FROM batch LIMIT 1";
    database.execute(sql, [500_000_000_000_i64]).unwrap();
    let why = server.until_paused(&batch)["progress"]["paused"]["message"].clone();
    assert!(why.as_str().unwrap().contains("whole again at"), "{why}");
    drop(running);
    // Another key's batch has the places.
    let requests = json!([{"custom_id": "other", "params": chat(5)}]);
    let other = server.post("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": requests})).json();
    let path = format!("/v1/batches/{}", other["id"].as_str().unwrap());
    while server.get(&path).json()["status"] != "completed" {
        std::thread::sleep(Duration::from_millis(20));
    }
    let counts = server.until_paused(&batch)["request_counts"].clone();
    assert_eq!(counts, json!({"total": 3, "completed": 0, "failed": 0}));
    // It is cancelled as any other.
    server.poor("POST", &format!("/v1/batches/{}/cancel", batch["id"].as_str().unwrap()), &Value::Null);
    let ended = server.until(&batch, &["cancelled"]);
    let lines = server.rows(&ended["error_file_id"]);
    assert_eq!(lines.iter().filter(|line| line["error"]["code"] == "batch_cancelled").count(), 3, "{lines:?}");
    // And it has its time and no more.
    let sql = "UPDATE batch SET expires_at = unixepoch() WHERE id = ?1";
    assert_eq!(database.execute(sql, [messages["id"].as_str().unwrap()]).unwrap(), 1);
    drop(database);
    server.restart();
    let path = format!("/v1/messages/batches/{}", messages["id"].as_str().unwrap());
    while server.poor("GET", &path, &Value::Null).json()["processing_status"] != "ended" {
        std::thread::sleep(Duration::from_millis(20));
    }
    let results = server.poor("GET", &format!("{path}/results"), &Value::Null).text;
    for line in results.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["result"]["type"], "expired", "{line}");
    }
    assert_eq!(results.lines().count(), 3);
}

#[test]
fn a_budget_that_makes_no_sense_is_refused() {
    let sandbox = crate::common::Sandbox::new();
    for (text, why) in [
        (config("max_cost = -1"), "key.max_cost"),
        (config("max_cost = 0"), "key.max_cost"),
        (config("cost_period = \"day\""), "key.cost_period"),
        (config("max_cost = 1\ncost_period = \"year\""), "cost_period"),
        ("[[key]]\nkey = \"poor\"\nmax_cost = 1\n".to_owned(), "there are no prices"),
    ] {
        sandbox.write("valar.toml", &text);
        let output = sandbox.command(&["serve", "--config", "valar.toml", "--port", "0", "--data", "data"]).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(why), "{text}: {said}");
    }
}
