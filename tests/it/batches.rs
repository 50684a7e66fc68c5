//! Files and batches from outside: a batch has the answers of `valar run`, each request exactly once, whatever is killed;
//! what is wrong with a file is said before any work, with its line.

use crate::common::chat_line;
use crate::serving::{Answer, FOREVER, KEY, MODEL, Server};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A row for the model of our server.
pub(crate) fn line(id: &str, content: &str, extra: Value) -> String {
    let mut line: Value = serde_json::from_str(&chat_line(id, content, extra)).unwrap();
    line["body"]["model"] = MODEL.into();
    line.to_string()
}

pub(crate) fn lines(n: usize, max_tokens: usize) -> Vec<String> {
    let extra = |i: usize| json!({"max_tokens": 4 + i % max_tokens, "temperature": if i.is_multiple_of(3) { 1.0 } else { 0.0 }, "ignore_eos": true});
    (0..n).map(|i| line(&format!("row-{i}"), &format!("Tell me about the number {}.", i % 50), extra(i))).collect()
}

impl Server {
    fn upload(&self, purpose: &str, content: &str) -> Answer {
        let boundary = "a-line-that-nobody-writes";
        let part = |head: &str, body: &str| format!("--{boundary}\r\ncontent-disposition: form-data; {head}\r\n\r\n{body}\r\n");
        let purpose = part("name=\"purpose\"", purpose);
        let file = part("name=\"file\"; filename=\"Zeilen ü.jsonl\"\r\ncontent-type: application/x-any", content);
        let body = format!("{purpose}{file}--{boundary}--\r\n");
        let kind = format!("multipart/form-data; boundary={boundary}");
        self.send("POST", "/v1/files", &[("x-api-key", KEY), ("content-type", &kind)], body)
    }

    #[track_caller]
    pub(crate) fn batch_of(&self, content: &str) -> Value {
        let file = self.upload("batch", content).json();
        let body = json!({"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"});
        let batch = self.post("/v1/batches", body);
        assert_eq!(batch.status, 200, "{}", batch.text);
        batch.json()
    }

    pub(crate) fn batch(&self, id: &Value) -> Value {
        self.get(&format!("/v1/batches/{}", id.as_str().unwrap())).json()
    }

    /// Waits until it has ended.
    #[track_caller]
    pub(crate) fn ended(&self, id: &Value) -> Value {
        let start = Instant::now();
        loop {
            let batch = self.batch(id);
            let counts = &batch["request_counts"];
            assert!(
                counts["completed"].as_u64().unwrap() + counts["failed"].as_u64().unwrap() <= counts["total"].as_u64().unwrap()
            );
            if !["validating", "in_progress", "finalizing", "cancelling"].contains(&batch["status"].as_str().unwrap()) {
                return batch;
            }
            assert!(start.elapsed() < FOREVER, "{batch}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// By `custom_id`, the lines of a file of a batch's.
    pub(crate) fn results(&self, file: &Value) -> BTreeMap<String, Value> {
        let Some(id) = file.as_str() else { return BTreeMap::new() };
        let content = self.get(&format!("/v1/files/{id}/content"));
        assert_eq!((content.status, content.header("content-type")), (200, "application/octet-stream"));
        let mut found = BTreeMap::new();
        for line in content.text.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let id = line["custom_id"].as_str().unwrap().to_owned();
            assert!(found.insert(id.clone(), line).is_none(), "{id} stands there twice");
        }
        found
    }
}

/// What a row's answer depends on.
pub(crate) fn essence(line: &Value) -> Value {
    let body = &line["response"]["body"];
    json!([line["custom_id"], body["choices"], body["usage"]["completion_tokens"], body["usage"]["prompt_tokens"], body["seed"]])
}

#[test]
fn a_batch_has_the_answers_of_a_job() {
    let server = Server::start();
    // A mark, blank lines, CRLF and no end of the last line are fine.
    let content = format!("\u{feff}{}", lines(40, 9).join("\r\n\r\n"));
    server.sandbox.write("in.jsonl", &content);
    server.sandbox.expect(&["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "--memory", "1GiB"], 0);
    let expected: Vec<Value> = server.sandbox.rows("out.jsonl").iter().map(essence).collect();
    let started = server.batch_of(&content);
    assert_eq!(json!([started["status"], started["object"], started["completed_at"]]), json!(["validating", "batch", null]));
    // The batch has its own.
    let file = started["input_file_id"].as_str().unwrap();
    assert_eq!(server.get(&format!("/v1/files/{file}")).json()["filename"], "Zeilen ü.jsonl");
    assert_eq!(server.get(&format!("/v1/files/{file}/content")).text, content);
    server.send("DELETE", &format!("/v1/files/{file}"), &[("x-api-key", KEY)], "");
    assert_eq!(server.get(&format!("/v1/files/{file}/content")).status, 404);
    let ended = server.ended(&started["id"]);
    assert_eq!(
        json!([ended["status"], ended["request_counts"], ended["error_file_id"]]),
        json!(["completed", {"total": 40, "completed": 40, "failed": 0}, null])
    );
    let results = server.results(&ended["output_file_id"]);
    let found: Vec<Value> = (0..40).map(|i| essence(&results[&format!("row-{i}")])).collect();
    assert_eq!(found, expected);
    let one = server.get(&format!("/v1/batches/{}/row-7", ended["id"].as_str().unwrap())).json();
    assert_eq!(&one, &results["row-7"]);
    let tokens: u64 = results.values().map(|line| line["response"]["body"]["usage"]["completion_tokens"].as_u64().unwrap()).sum();
    assert_eq!(ended["usage"]["output_tokens"], tokens);
    // Requests in the body; rows that fail at the end are in the error file.
    let requests: Vec<Value> = lines(3, 9)
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|line| json!({"custom_id": line["custom_id"], "params": line["body"]}))
        .collect();
    let inline = server
        .post("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": requests, "metadata": {"a": "b"}}))
        .json();
    let kept = server.get(&format!("/v1/files/{}/content", inline["input_file_id"].as_str().unwrap()));
    assert_eq!(kept.text.lines().count(), requests.len());
    let inline = server.ended(&inline["id"]);
    assert_eq!(inline["metadata"], json!({"a": "b"}));
    let again = server.results(&inline["output_file_id"]);
    for id in ["row-1", "row-2"] {
        assert_eq!(essence(&again[id]), essence(&results[id]));
    }
    let listed = server.get("/v1/batches?limit=1").json();
    assert_eq!(json!([listed["data"][0]["id"], listed["has_more"]]), json!([inline["id"], true]));
    let listed = server.get(&format!("/v1/batches?after={}", listed["last_id"].as_str().unwrap())).json();
    assert_eq!(json!([listed["data"][0]["id"], listed["has_more"]]), json!([ended["id"], false]));
    let outputs = server.get("/v1/files?purpose=batch_output&order=asc").json();
    assert_eq!(outputs["data"][0]["id"], ended["output_file_id"]);
}

#[test]
fn what_is_wrong_is_said_before_any_work() {
    let server = Server::start();
    let fine = || line("fine", "Hi", json!({}));
    let with = |id: &str, key: &str, value: Value| {
        let mut row: Value = serde_json::from_str(&fine()).unwrap();
        row["custom_id"] = id.into();
        row["body"][key] = value;
        row.to_string()
    };
    let other_url = fine().replace("/v1/chat/completions", "/v1/completions").replace("\"fine\"", "\"url\"");
    let rows = [
        fine(),
        String::new(),
        "{broken".into(),
        fine(),
        other_url.replace("\"messages\"", "\"prompt\":\"x\",\"user\""),
        with("a", "stream", true.into()),
        with("b", "model", "nobody".into()),
        with("c", "max_tokens", json!("many")),
        with("d", "max_tokens", 100_000.into()),
        json!({"custom_id": "x"}).to_string(),
    ];
    let ended = server.ended(&server.batch_of(&rows.join("\n"))["id"]);
    assert_eq!(json!([ended["status"], ended["output_file_id"], ended["in_progress_at"]]), json!(["failed", null, null]));
    assert_eq!(ended["completed_with_errors"], false, "{ended}");
    let found: Vec<Value> =
        ended["errors"]["data"].as_array().unwrap().iter().map(|fault| json!([fault["line"], fault["code"]])).collect();
    let expected = json!([
        [3, "invalid_json_line"],
        [4, "duplicate_custom_id"],
        [5, "url_mismatch"],
        [6, "unsupported_parameter"],
        [7, "model_mismatch"],
        [8, "invalid_type"],
        [9, "context_length_exceeded"],
        [10, "missing_required_parameter"]
    ]);
    assert_eq!(json!(found), expected, "{ended}");
    assert_eq!(server.metric("valar_generated_tokens_total{"), 0);
    let code = |content: &str| server.ended(&server.batch_of(content)["id"])["errors"]["data"][0]["code"].clone();
    assert_eq!(code("\n\n"), "empty_file");
    assert_eq!(code(&fine().replace(MODEL, "nobody")), "model_not_found");
}

#[test]
fn what_is_wrong_with_a_call_is_said_by_its_field() {
    let server = Server::start();
    assert_eq!(server.upload("nothing", "x").json()["error"]["param"], "purpose");
    assert_eq!(server.upload("batch", "").json()["error"]["param"], "file");
    let broken = server.send(
        "POST",
        "/v1/files",
        &[("x-api-key", KEY), ("content-type", "multipart/form-data; boundary=x")],
        "--x\r\nnothing",
    );
    assert_eq!(broken.status, 400, "{}", broken.text);
    let other = server.upload("user_data", "x").json();
    for (body, status, param) in [
        (json!({"endpoint": "/v1/chat/completions"}), 400, "input_file_id"),
        (json!({"input_file_id": "file-x", "endpoint": "/v1/chat/completions"}), 404, "file_id"),
        (json!({"input_file_id": other["id"], "endpoint": "/v1/chat/completions"}), 400, "input_file_id"),
        (json!({"input_file_id": other["id"], "endpoint": "/v1/images"}), 400, "endpoint"),
        (
            json!({"input_file_id": other["id"], "endpoint": "/v1/responses", "completion_window": "soon"}),
            400,
            "completion_window",
        ),
        (json!({"requests": [{"custom_id": "-", "params": {}}], "endpoint": "/v1/responses"}), 400, "requests[0].custom_id"),
        (json!({"requests": [{"custom_id": "cancel", "params": {}}], "endpoint": "/v1/responses"}), 400, "requests[0].custom_id"),
        (
            json!({"requests": [], "endpoint": "/v1/responses", "metadata": {"completion_window": "soon"}}),
            400,
            "metadata.completion_window",
        ),
        (json!({"requests": [{"custom_id": "a", "params": 5}], "endpoint": "/v1/responses"}), 400, "requests[0].params"),
    ] {
        let answer = server.post("/v1/batches", body);
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (status, &json!(param)), "{}", answer.text);
    }
    assert_eq!(
        std::fs::read_dir(server.sandbox.path("data/files")).unwrap().count(),
        server.get("/v1/files").json()["data"].as_array().unwrap().len()
    );
}

#[test]
fn a_batch_is_cancelled_in_time_and_every_request_stands_once() {
    let server = Server::with("[engine]\nmax_running = 4\n", &["--api-key", KEY]);
    let batch = server.batch_of(&lines(300, 90).join("\n"));
    let start = Instant::now();
    while server.batch(&batch["id"])["request_counts"]["completed"].as_u64().unwrap() < 5 {
        assert!(start.elapsed() < FOREVER);
        std::thread::sleep(Duration::from_millis(20));
    }
    let path = format!("/v1/batches/{}/cancel", batch["id"].as_str().unwrap());
    let cancelling = server.post(&path, Value::Null).json();
    assert_eq!(cancelling["status"], "cancelling");
    let ended = server.ended(&batch["id"]);
    assert_eq!((&ended["status"], ended["cancelled_at"].is_u64()), (&json!("cancelled"), true));
    let (done, rest) = (server.results(&ended["output_file_id"]), server.results(&ended["error_file_id"]));
    // Most of it was never run.
    assert!(
        done.len() >= 5 && rest.len() > 150 && done.len() + rest.len() == 300 && done.keys().all(|id| !rest.contains_key(id))
    );
    assert!(rest.values().all(|line| line["error"]["code"] == "batch_cancelled" && line["response"].is_null()));
    assert_eq!(ended["request_counts"], json!({"total": 300, "completed": done.len(), "failed": rest.len()}));
    assert_eq!(server.post(&path, Value::Null).json(), ended, "a batch that has ended stays as it is");
    server.wait_idle();
    // Live calls have what the batch gave back.
    assert!(server.metric("valar_kv_blocks_used{") <= 4, "{}", server.get("/metrics").text);
}

#[test]
fn batches_go_on_after_kills_and_expire() {
    let mut server = Server::with("[engine]\nmax_running = 4\n", &["--api-key", KEY]);
    let content = lines(80, 30).join("\n");
    let calm = server.ended(&server.batch_of(&content)["id"]);
    let expected: BTreeMap<String, Value> =
        server.results(&calm["output_file_id"]).iter().map(|(id, line)| (id.clone(), essence(line))).collect();
    let batch = server.batch_of(&content);
    // While it is checked, when it begins to run, and then each time that more of it is in the journal, which goes at the end.
    let journal = server.sandbox.path(&format!("data/batches/{}/output.job", batch["id"].as_str().unwrap()));
    let n_segments = || {
        let names = std::fs::read_dir(&journal).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.file_name());
        names.filter(|name| name.to_string_lossy().starts_with("seg-") && name.to_string_lossy().ends_with(".jsonl")).count()
    };
    let mut n_running = 0;
    for round in 0..6 {
        let (before, start) = (n_segments(), Instant::now());
        let mut shown = server.batch(&batch["id"]);
        while match round {
            0 => false,
            1 => shown["status"] == "validating",
            _ => shown["status"] == "in_progress" && n_segments() == before,
        } {
            assert!(start.elapsed() < FOREVER, "{shown}");
            std::thread::sleep(Duration::from_millis(5));
            shown = server.batch(&batch["id"]);
        }
        n_running += usize::from(shown["status"] == "in_progress");
        server.restart();
    }
    assert!(n_running >= 2, "killed while it ran only {n_running} times");
    let ended = server.ended(&batch["id"]);
    let found: BTreeMap<String, Value> =
        server.results(&ended["output_file_id"]).iter().map(|(id, line)| (id.clone(), essence(line))).collect();
    assert_eq!(ended["status"], "completed");
    assert!(found == expected, "other answers after kills");
    // The journal goes when the end is written down.
    let start = Instant::now();
    while journal.exists() {
        assert!(start.elapsed() < FOREVER, "{}", journal.display());
        std::thread::sleep(Duration::from_millis(20));
    }

    // One whose time is up when the server starts again.
    let batch = server.batch_of(&lines(2000, 90).join("\n"));
    server.wait_for_journal(&batch["id"]);
    drop(server.child.kill());
    server.child.wait().unwrap();
    let database = rusqlite::Connection::open(server.sandbox.path("data/valar.db")).unwrap();
    database.execute("UPDATE batch SET expires_at = created_at + 1 WHERE id = ?1", [batch["id"].as_str().unwrap()]).unwrap();
    drop(database);
    server.restart();
    let ended = server.ended(&batch["id"]);
    assert_eq!((&ended["status"], ended["expired_at"].is_u64()), (&json!("expired"), true), "{ended}");
    let (done, rest) = (server.results(&ended["output_file_id"]), server.results(&ended["error_file_id"]));
    assert_eq!(done.len() + rest.len(), 2000);
    assert!(rest.values().all(|line| line["error"]["code"] == "batch_expired"));
}

#[test]
fn a_batch_that_can_not_be_stored_now_is_not_half_accepted() {
    let server = Server::start();
    let params = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    let body = json!({"endpoint": "/v1/chat/completions", "requests": [{"custom_id": "a", "params": params}]});
    let database = rusqlite::Connection::open(server.sandbox.path("data/valar.db")).unwrap();
    // Somebody has it, for longer than is waited for.
    database.busy_timeout(FOREVER).unwrap();
    database.execute_batch("BEGIN IMMEDIATE").unwrap();
    let refused = server.post("/v1/batches", body.clone());
    assert_eq!((refused.status, refused.header("retry-after")), (503, "5"), "{}", refused.text);
    assert_eq!(refused.header("x-should-retry"), "true");
    for folder in ["data/batches", "data/files"] {
        assert_eq!(std::fs::read_dir(server.sandbox.path(folder)).unwrap().count(), 0, "{folder}");
    }
    database.execute_batch("ROLLBACK").unwrap();
    assert_eq!(server.get("/v1/batches").json()["data"], json!([]));
    assert_eq!(server.ended(&server.post("/v1/batches", body).json()["id"])["status"], "completed");
}
