//! `/v1/messages/batches` from outside: each request has the answer that `/v1/messages` gives it, or its error, exactly once.

use crate::references::SLOW;
use crate::serving::{Answer, FOREVER, KEY, MODEL, Server};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const PATH: &str = "/v1/messages/batches";

fn params(content: &str, max_tokens: usize) -> Value {
    json!({"model": MODEL, "max_tokens": max_tokens, "temperature": 0, "messages": [{"role": "user", "content": content}]})
}

fn path(batch: &Value, action: &str) -> String {
    format!("{PATH}/{}{action}", batch["id"].as_str().unwrap())
}

impl Server {
    #[track_caller]
    fn message_batch(&self, requests: &[(&str, Value)]) -> Value {
        let requests: Vec<Value> = requests.iter().map(|(id, params)| json!({"custom_id": id, "params": params})).collect();
        let answer = self.post(PATH, json!({"requests": requests}));
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    /// Waits until it has ended; its counts always add up.
    #[track_caller]
    fn ended_messages(&self, batch: &Value, total: u64) -> Value {
        let start = Instant::now();
        loop {
            let batch = self.get(&path(batch, "")).json();
            let counts = batch["request_counts"].as_object().unwrap();
            assert_eq!(counts.values().map(|n| n.as_u64().unwrap()).sum::<u64>(), total, "{batch}");
            if batch["processing_status"] == "ended" {
                return batch;
            }
            assert!(batch["results_url"].is_null() && batch["ended_at"].is_null(), "{batch}");
            assert!(start.elapsed() < FOREVER, "{batch}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// By `custom_id`.
    fn message_results(&self, batch: &Value) -> BTreeMap<String, Value> {
        let content = self.get(batch["results_url"].as_str().unwrap());
        assert_eq!((content.status, content.header("content-type")), (200, "application/x-jsonl"), "{}", content.text);
        let mut found = BTreeMap::new();
        for line in content.text.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let id = line["custom_id"].as_str().unwrap().to_owned();
            assert!(found.insert(id.clone(), line["result"].clone()).is_none(), "{id} stands there twice");
        }
        found
    }
}

/// What of a message does not depend on when it was made.
fn essence(message: &Value) -> Value {
    json!([
        message["type"],
        message["role"],
        message["model"],
        message["content"],
        message["stop_reason"],
        message["stop_sequence"],
        message["usage"]["output_tokens"]
    ])
}

#[test]
fn a_batch_of_messages_has_their_answers() {
    let server = Server::start();
    let stopped = |stops: Value| {
        let mut stopped = params("Count from one to nine.", 60);
        stopped["stop_sequences"] = stops;
        stopped
    };
    let mut streamed = params("Hi", 4);
    streamed["stream"] = false.into();
    let mut nameless = params("Hi", 4);
    nameless["model"] = "nobody".into();
    let requests = [
        ("plain", params("Tell me about the sea.", 12)),
        ("again", params("Tell me about the sea.", 12)),
        ("stop", stopped(json!([" ", "e"]))),
        ("never", stopped(json!(["ZZZ"]))),
        ("streamed", streamed),
        ("no limit", json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]})),
        ("wrong", json!({"model": MODEL, "max_tokens": 5, "messages": [{"role": "nobody", "content": "Hi"}]})),
        ("nobody", nameless),
    ];
    let made = server.message_batch(&requests);
    assert!(made["id"].as_str().unwrap().starts_with("msgbatch_"));
    assert_eq!(
        json!([made["type"], made["processing_status"], made["archived_at"]]),
        json!(["message_batch", "in_progress", null])
    );
    assert_eq!(made["request_counts"], json!({"processing": 8, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}));
    let ended = server.ended_messages(&made, 8);
    assert_eq!(ended["request_counts"], json!({"processing": 0, "succeeded": 5, "errored": 3, "canceled": 0, "expired": 0}));
    let results = server.message_results(&ended);
    for (id, params) in &requests[..5] {
        let direct = server.post("/v1/messages", params.clone()).json();
        assert_eq!(results[*id]["type"], "succeeded", "{}", results[*id]);
        let message = &results[*id]["message"];
        assert_eq!(essence(message), essence(&direct), "{id}");
        let n_prompt =
            |usage: &Value| usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
        assert_eq!(n_prompt(&message["usage"]), n_prompt(&direct["usage"]), "{id}");
    }
    assert_eq!(results["stop"]["message"]["stop_reason"], "stop_sequence", "{}", results["stop"]);
    assert_ne!(results["plain"]["message"]["id"], results["again"]["message"]["id"]);
    for (id, kind, text) in [
        ("no limit", "invalid_request_error", "max_tokens: Field required"),
        ("wrong", "invalid_request_error", "messages[0].role"),
        ("nobody", "not_found_error", "nobody"),
    ] {
        let error = &results[id]["error"];
        assert_eq!(json!([results[id]["type"], error["type"], error["error"]["type"]]), json!(["errored", "error", kind]));
        assert!(error["error"]["message"].as_str().unwrap().contains(text), "{error}");
    }
    it_is_listed_and_deleted(&server, &made);
}

/// Of a batch that has ended, and is the only one.
fn it_is_listed_and_deleted(server: &Server, made: &Value) {
    // Each of the two doors has its own.
    assert_eq!(server.get(&format!("/v1/batches/{}", made["id"].as_str().unwrap())).status, 404);
    assert_eq!(server.get("/v1/batches").json()["data"], json!([]));
    assert_eq!(server.get("/v1/files").json()["data"], json!([]));
    let usage = server.get("/v1/usage?group_by=batch").json();
    let own = usage["data"].as_array().unwrap().iter().find(|group| group["batch"] == made["id"]);
    assert_eq!(own.map(|group| &group["n_requests"]), Some(&json!(5)), "{usage}");
    // Pages go both ways.
    let others: Vec<Value> = (0..3).map(|_| server.message_batch(&[("a", params("Hi", 2))])["id"].clone()).collect();
    let ids = |query: &str| {
        let page = server.get(&format!("{PATH}?{query}")).json();
        let ids: Vec<Value> = page["data"].as_array().unwrap().iter().map(|batch| batch["id"].clone()).collect();
        assert_eq!((&page["first_id"], &page["last_id"]), (ids.first().unwrap(), ids.last().unwrap()));
        json!([ids, page["has_more"]])
    };
    assert_eq!(ids("limit=2"), json!([[others[2], others[1]], true]));
    assert_eq!(ids(&format!("after_id={}", others[1].as_str().unwrap())), json!([[others[0], made["id"]], false]));
    assert_eq!(ids(&format!("limit=1&before_id={}", made["id"].as_str().unwrap())), json!([[others[0]], true]));
    // What is deleted is gone.
    let delete = |key: &str| server.send("DELETE", &path(made, ""), &[("x-api-key", key)], "");
    assert_eq!(delete(KEY).json(), json!({"id": made["id"], "type": "message_batch_deleted"}));
    assert_eq!((delete(KEY).status, server.get(&path(made, "/results")).status), (404, 404));
    assert!(!server.sandbox.path(&format!("data/batches/{}", made["id"].as_str().unwrap())).exists());
}

#[test]
fn a_batch_of_messages_is_cancelled_and_refused() {
    let server = Server::with("[engine]\nmax_running = 4\n", &["--api-key", KEY]);
    let ids: Vec<String> = (0..200).map(|i| format!("r{i}")).collect();
    let requests: Vec<(&str, Value)> = ids.iter().map(|id| (id.as_str(), params(&format!("Number {id}?"), 90))).collect();
    let made = server.message_batch(&requests);
    let refused = |answer: &Answer| {
        assert_eq!(answer.status, 400, "{}", answer.text);
        let error = answer.json();
        assert_eq!(json!([error["type"], error["error"]["type"]]), json!(["error", "invalid_request_error"]));
    };
    refused(&server.get(&path(&made, "/results")));
    refused(&server.send("DELETE", &path(&made, ""), &[("x-api-key", KEY)], ""));
    server.wait_for_journal(&made["id"]);
    let cancelling = server.post(&path(&made, "/cancel"), Value::Null).json();
    assert!(["canceling", "ended"].contains(&cancelling["processing_status"].as_str().unwrap()), "{cancelling}");
    assert!(cancelling["cancel_initiated_at"].is_string(), "{cancelling}");
    let ended = server.ended_messages(&made, 200);
    let counts = &ended["request_counts"];
    assert!(counts["succeeded"].as_u64() > Some(0) && counts["canceled"].as_u64() > Some(0), "{ended}");
    let results = server.message_results(&ended);
    let n = |kind: &str| results.values().filter(|result| result["type"] == kind).count();
    assert_eq!(json!([results.len(), n("succeeded"), n("canceled")]), json!([200, counts["succeeded"], counts["canceled"]]));
    assert_eq!(server.post(&path(&made, "/cancel"), Value::Null).json(), ended, "one that has ended stays as it is");
    // What is wrong with its shape is said at once.
    let with = |requests: Value| server.post(PATH, json!({"requests": requests}));
    let mut streamed = params("Hi", 4);
    streamed["stream"] = true.into();
    for (requests, field) in [
        (json!([]), "requests"),
        (json!([{"custom_id": "", "params": {}}]), "requests.0.custom_id"),
        (json!([{"custom_id": "x".repeat(65), "params": {}}]), "requests.0.custom_id"),
        (json!([{"params": {}}]), "requests.0.custom_id: Field required"),
        (json!([{"custom_id": "a", "params": {}}, {"custom_id": "a", "params": {}}]), "requests.1.custom_id"),
        (json!([{"custom_id": "a", "params": 5}]), "requests.0.params"),
        (json!([{"custom_id": "a", "params": streamed}]), "requests.0.params.stream"),
    ] {
        let answer = with(requests);
        refused(&answer);
        assert!(answer.json()["error"]["message"].as_str().unwrap().starts_with(field), "{}", answer.text);
    }
}

#[test]
fn all_requests_are_counted_however_many_are_faulty() {
    let server = Server::start();
    // More than are looked at together, so that those after many faults are looked at, too.
    let ids: Vec<String> = (0..8400).map(|i| format!("r{i}")).collect();
    let mut requests: Vec<(&str, Value)> = ids.iter().map(|id| (id.as_str(), json!({}))).collect();
    requests.push(("fine", params("Hi", 2)));
    let n = requests.len() as u64;
    let ended = server.ended_messages(&server.message_batch(&requests), n);
    let counts = json!({"processing": 0, "succeeded": 1, "errored": n - 1, "canceled": 0, "expired": 0});
    assert_eq!(ended["request_counts"], counts);
}

#[test]
fn what_was_done_before_a_batch_of_messages_broke_off_is_kept_and_charged() {
    let mut server = Server::with(SLOW, &["--api-key", KEY]);
    let ids: Vec<String> = (0..200).map(|i| format!("r{i}")).collect();
    let requests: Vec<(&str, Value)> = ids.iter().map(|id| (id.as_str(), params(&format!("Number {id}?"), 90))).collect();
    for (kind, change) in [
        ("canceled", "UPDATE batch SET status = 'cancelling' WHERE id = ?1"),
        ("expired", "UPDATE batch SET expires_at = created_at + 1 WHERE id = ?1"),
        ("errored", "UPDATE batch SET status = status WHERE id = ?1"),
    ] {
        let made = server.message_batch(&requests);
        let id = made["id"].as_str().unwrap();
        server.wait_for_journal(&made["id"]);
        drop(server.child.kill());
        server.child.wait().unwrap();
        let database = rusqlite::Connection::open(server.sandbox.path("data/valar.db")).unwrap();
        assert_eq!(database.execute(change, [id]).unwrap(), 1);
        drop(database);
        // With an input that is another one, the job can't be gone on with.
        let input = format!("data/batches/{id}/input.jsonl");
        let text = server.sandbox.read(&input);
        assert!(text.contains("Number r199?"));
        server.sandbox.write(&input, text.replace("Number r199?", "Number x199?"));
        server.restart();
        let ended = server.ended_messages(&made, 200);
        let counts = &ended["request_counts"];
        let n_done = counts["succeeded"].as_u64().unwrap();
        assert!(n_done > 0 && counts[kind] == 200 - n_done, "{kind}: {ended}");
        let results = server.message_results(&ended);
        let done: Vec<&Value> = results.values().filter(|result| result["type"] == "succeeded").collect();
        let n_others = results.values().filter(|result| result["type"] == kind).count();
        assert_eq!((done.len() as u64, n_others as u64), (n_done, 200 - n_done), "{kind}");
        let n_tokens: u64 = done.iter().map(|result| result["message"]["usage"]["output_tokens"].as_u64().unwrap()).sum();
        let usage = server.get("/v1/usage?group_by=batch").json();
        let own = usage["data"].as_array().unwrap().iter().find(|group| group["batch"] == id);
        let own = own.unwrap_or_else(|| panic!("no bill: {usage}"));
        assert_eq!((&own["n_requests"], &own["output_tokens"]), (&json!(n_done), &json!(n_tokens)), "{kind}");
        assert_ne!(own["charge"], "0");
    }
}
