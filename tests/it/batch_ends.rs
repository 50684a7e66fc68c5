//! How batches end that something comes between: another batch that expires sooner, another model, a cancel; and that what did
//! not run can be run again.

use crate::batches::{essence, line, lines};
use crate::serving::{FOREVER, KEY, MODEL, Server, read_until};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

impl Server {
    /// Waits until a part of a batch is in its journal, which is removed at its end.
    #[track_caller]
    pub(crate) fn wait_for_journal(&self, id: &Value) {
        let (journal, start) = (self.sandbox.path(&format!("data/batches/{}/output.job", id.as_str().unwrap())), Instant::now());
        // Not one that is being written.
        let is_segment = |name: &str| name.strip_prefix("seg-").is_some_and(|rest| rest.strip_suffix(".jsonl").is_some());
        while !std::fs::read_dir(&journal).is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|entry| is_segment(&entry.file_name().to_string_lossy())))
        }) {
            assert!(start.elapsed() < FOREVER, "nothing is journaled of {}", self.batch(id));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn act(&self, id: &Value, action: &str) -> Value {
        let answer = self.post(&format!("/v1/batches/{}/{action}", id.as_str().unwrap()), Value::Null);
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }
}

#[test]
fn what_did_not_run_can_be_run_again() {
    let server = Server::with("[engine]\nmax_running = 4\n", &["--api-key", KEY]);
    let content = lines(60, 9);
    let whole = server.ended(&server.batch_of(&content.join("\n"))["id"]);
    let expected = server.results(&whole["output_file_id"]);
    let answer = server.post(&format!("/v1/batches/{}/retry", whole["id"].as_str().unwrap()), Value::Null);
    assert_eq!(answer.status, 400, "nothing failed: {}", answer.text);
    // While these run, the batch has no place, and is not done before it is cancelled.
    let call = json!({"model": MODEL, "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 7000, "ignore_eos": true,
                      "stream": true});
    let mut running: Vec<_> = (0..4).map(|_| server.open("/v1/chat/completions", &call)).collect();
    for stream in &mut running {
        drop(read_until(stream, "\"content\":\""));
    }
    let first = server.batch_of(&format!("\u{feff}{}\r\n", content.join("\r\n")));
    server.act(&first["id"], "cancel");
    let first = server.ended(&first["id"]);
    drop(running);
    let (done, rest) = (server.results(&first["output_file_id"]), server.results(&first["error_file_id"]));
    assert!(!rest.is_empty(), "{first}");
    let again = server.act(&first["id"], "retry");
    assert_eq!(
        json!([again["retry_of"], again["endpoint"], again["status"]]),
        json!([first["id"], first["endpoint"], "validating"])
    );
    let again = server.ended(&again["id"]);
    assert_eq!(again["request_counts"], json!({"total": rest.len(), "completed": rest.len(), "failed": 0}));
    let more = server.results(&again["output_file_id"]);
    assert_eq!(more.keys().collect::<BTreeSet<_>>(), rest.keys().collect::<BTreeSet<_>>());
    for (id, line) in done.iter().chain(&more) {
        assert_eq!(essence(line), essence(&expected[id]));
    }
    let answer = server.send("POST", &format!("/v1/batches/{}/retry", first["id"].as_str().unwrap()), &[("x-api-key", "x")], "");
    assert_eq!(answer.status, 401);
}

#[test]
fn a_batch_that_expires_sooner_goes_first() {
    let server = Server::with("[engine]\nmax_running = 4\n", &["--api-key", KEY]);
    let long: Vec<Value> = (0..2).map(|_| server.batch_of(&lines(400, 4000).join("\n"))["id"].clone()).collect();
    while long.iter().any(|id| server.batch(id)["status"] != "in_progress") {
        std::thread::sleep(Duration::from_millis(20));
    }
    let params = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5});
    let body = json!({"endpoint": "/v1/chat/completions", "requests": [{"custom_id": "a", "params": params}], "completion_window": "1h"});
    let short = server.post("/v1/batches", body).json();
    assert_eq!(server.ended(&short["id"])["status"], "completed");
    for id in &long {
        let batch = server.batch(id);
        assert_eq!(batch["status"], "in_progress", "{batch}");
        server.act(id, "cancel");
        assert_eq!(server.ended(id)["status"], "cancelled");
    }
    server.wait_idle();
}

#[test]
fn what_was_done_stays_when_the_model_changes() {
    let config = |numerics: &str| {
        format!("[[model]]\nid = {MODEL:?}\nweights = {MODEL:?}\nnumerics = {numerics:?}\n[engine]\nmax_running = 4\n")
    };
    let mut server = Server::with(&config("int8"), &["--api-key", KEY]);
    let n = 1500;
    let batch = server.batch_of(&lines(n, 60).join("\n"));
    server.wait_for_journal(&batch["id"]);
    server.sandbox.write("valar.toml", config("bf16"));
    server.restart();
    let ended = server.ended(&batch["id"]);
    let (done, rest) = (server.results(&ended["output_file_id"]), server.results(&ended["error_file_id"]));
    assert_eq!(ended["status"], "completed", "{ended}");
    assert!(!done.is_empty() && !rest.is_empty() && done.len() + rest.len() == n, "{} and {}", done.len(), rest.len());
    assert!(rest.values().all(|line| line["error"]["code"] == "model_changed"));
    assert_eq!(ended["request_counts"], json!({"total": n, "completed": done.len(), "failed": rest.len()}));
    // They can be run by the model that there is now.
    assert_eq!(server.act(&ended["id"], "retry")["status"], "validating");
}

#[test]
fn a_batch_keeps_the_context_that_it_began_with() {
    // As many rows as this machine does not do before it is halted.
    assert!((0..6).any(|i| is_kept_within_its_context(5 << i)), "batches were always done before the restart");
}

/// Halts batches of so many rows and goes on with them where there is more or less memory; false if one was done before that.
fn is_kept_within_its_context(n: usize) -> bool {
    let config = |memory: &str| {
        let model = format!("id = {MODEL:?}\nweights = {MODEL:?}\nnumerics = \"int8\"\nmemory = {memory:?}");
        format!("[[model]]\n{model}\n[engine]\nmax_running = 4\n")
    };
    let limit = |server: &Server| server.get("/v1/models").json()["data"][0]["max_model_len"].as_u64().unwrap();
    // Each goes on to the end of the context.
    let extra = || json!({"max_tokens": null, "ignore_eos": true});
    let content: Vec<String> =
        (0..n).map(|i| line(&format!("row-{i}"), &format!("Tell me about the number {i}."), extra())).collect();
    let begin = |server: &Server| {
        let (id, start) = (server.batch_of(&content.join("\n"))["id"].clone(), Instant::now());
        while server.batch(&id)["request_counts"]["completed"] == 0 {
            assert!(start.elapsed() < FOREVER, "{}", server.batch(&id));
            std::thread::sleep(Duration::from_millis(20));
        }
        id
    };
    let lengths = |results: &BTreeMap<String, Value>| -> BTreeSet<u64> {
        results.values().map(|line| line["response"]["body"]["usage"]["total_tokens"].as_u64().unwrap()).collect()
    };
    let mut server = Server::with(&config("132MiB"), &["--api-key", KEY]);
    let small = limit(&server);
    let first = begin(&server);
    server.sandbox.write("valar.toml", config("134MiB"));
    server.restart();
    let large = limit(&server);
    assert!(large > small);
    if server.batch(&first)["request_counts"]["completed"].as_u64() == Some(n as u64) {
        return false;
    }
    let ended = server.ended(&first);
    assert_eq!(ended["request_counts"], json!({"total": n, "completed": n, "failed": 0}), "{ended}");
    assert_eq!(lengths(&server.results(&ended["output_file_id"])), BTreeSet::from([small]));
    // Where there is less, it says so.
    let second = begin(&server);
    server.sandbox.write("valar.toml", config("132MiB"));
    server.restart();
    assert_eq!(limit(&server), small);
    let ended = server.ended(&second);
    let (done, rest) = (server.results(&ended["output_file_id"]), server.results(&ended["error_file_id"]));
    assert_eq!((&ended["status"], done.len() + rest.len()), (&json!("completed"), n));
    assert!(lengths(&done).iter().all(|length| *length == large), "{:?}", lengths(&done));
    for line in rest.values() {
        assert_eq!(line["error"]["code"], "context_changed");
        let message = line["error"]["message"].as_str().unwrap();
        assert!(message.contains(&format!("context of {large} tokens")) && message.contains(&small.to_string()), "{message}");
    }
    !rest.is_empty()
}

#[test]
fn the_command_line_sees_a_batch() {
    let server = Server::with("[engine]\nmax_running = 4\n", &["--api-key", KEY]);
    let batch = server.batch_of(&lines(300, 60).join("\n"));
    let folder = format!("data/batches/{}", batch["id"].as_str().unwrap());
    let status = |at: &str| -> Value {
        let output = server.sandbox.run(&["status", at, "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
    };
    let seen = |shown: &Value| json!([shown["state"], shown["rows"]]);
    assert!([json!(["waiting", 300]), json!(["running", 300])].contains(&seen(&status(&folder))));
    server.wait_for_journal(&batch["id"]);
    let running = status(&format!("{folder}/output.jsonl"));
    assert_eq!(seen(&running), json!(["running", 300]));
    assert!(running["done"].as_u64() > Some(0), "{running}");
    server.act(&batch["id"], "cancel");
    let counts = &server.ended(&batch["id"])["request_counts"];
    let start = Instant::now();
    // The journal goes when the end is written down.
    while seen(&status(&folder))[0] != "finished" {
        assert!(start.elapsed() < FOREVER, "{}", status(&folder));
    }
    let ended = status(&folder);
    assert_eq!(json!([ended["rows"], ended["done"], ended["failed"]]), json!([300, 300, counts["failed"]]));
    assert_eq!(status("data/batches/batch_none/output.jsonl")["state"], "none");
    // Files of the same names elsewhere are no batch.
    std::fs::create_dir_all(server.sandbox.path("batch_plain")).unwrap();
    for name in ["input", "output"] {
        std::fs::write(server.sandbox.path(&format!("batch_plain/{name}.jsonl")), "{}\n").unwrap();
    }
    assert_eq!(status("batch_plain/output.jsonl")["state"], "none");
}

#[test]
fn results_are_read_while_a_batch_runs() {
    let mut server = Server::with("[engine]\nmax_running = 4\n", &["--api-key", KEY]);
    let batch = server.batch_of(&lines(300, 60).join("\n"));
    server.wait_for_journal(&batch["id"]);
    let file = server.batch(&batch["id"])["output_file_id"].as_str().unwrap().to_owned();
    let read = |server: &Server, offset: u64| {
        let answer = server.get(&format!("/v1/files/{file}/content?offset={offset}"));
        assert_eq!((answer.status, answer.header("x-incomplete")), (200, "true"), "{}", answer.text);
        let found: Vec<Value> = answer.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(answer.header("x-last-line").parse::<u64>().unwrap(), offset + found.len() as u64);
        found
    };
    let mut seen = read(&server, 0);
    assert!(!seen.is_empty());
    // What was read stays where it was, also when another run goes on with it.
    server.restart();
    while server.batch(&batch["id"])["request_counts"]["completed"].as_u64().unwrap() < seen.len() as u64 + 8 {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(read(&server, 0)[..seen.len()], seen);
    seen.extend(read(&server, seen.len() as u64));
    server.act(&batch["id"], "cancel");
    let ended = server.ended(&batch["id"]);
    assert_eq!(ended["output_file_id"], file.as_str());
    let whole = server.results(&ended["output_file_id"]);
    assert!(seen.iter().all(|line| whole[line["custom_id"].as_str().unwrap()] == *line));
    assert_eq!(
        seen.iter().map(|line| line["custom_id"].as_str()).collect::<BTreeSet<_>>().len(),
        seen.len(),
        "a line came twice"
    );
    // The whole file is the whole file, wherever a reader was.
    let answer = server.get(&format!("/v1/files/{file}/content?offset={}", seen.len()));
    assert_eq!((answer.header("x-incomplete"), answer.text.lines().count()), ("", whole.len()));
    let shown = server.get(&format!("/v1/files/{file}")).json();
    assert_eq!((shown["bytes"].as_u64(), &shown["purpose"]), (Some(answer.text.len() as u64), &json!("batch_output")));
}

#[test]
fn results_outlast_a_file_that_was_deleted_while_they_came() {
    let server = Server::with("[engine]\nmax_running = 4\n", &["--api-key", KEY]);
    let batch = server.batch_of(&lines(300, 60).join("\n"));
    server.wait_for_journal(&batch["id"]);
    let path = format!("/v1/files/{}", server.batch(&batch["id"])["output_file_id"].as_str().unwrap());
    assert_eq!(server.send("DELETE", &path, &[("x-api-key", KEY)], "").status, 200);
    assert_eq!(server.get(&path).status, 404);
    server.act(&batch["id"], "cancel");
    let ended = server.ended(&batch["id"]);
    let whole = server.results(&ended["output_file_id"]);
    assert!(!whole.is_empty());
    assert_eq!(ended["request_counts"]["completed"], whole.len());
}
