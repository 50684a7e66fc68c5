//! Files by reference: batches over objects that stay where they are, in a store and on this machine, read by ranges, with the
//! same answers as an upload; nothing outside the allowed places; a change is noticed; deleting the name deletes nothing else.

use crate::batches::{essence, line, lines};
use crate::faults::{Fault, S3, proxy};
use crate::serving::{Answer, FOREVER, KEY, Server};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

impl Server {
    fn reference(&self, uri: &str) -> Answer {
        self.post("/v1/files", json!({"purpose": "batch", "uri": uri}))
    }

    fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, &[("x-api-key", KEY)], "")
    }

    fn start_batch(&self, file: &Value) -> Answer {
        let body = json!({"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"});
        self.post("/v1/batches", body)
    }
}

fn config(allow: &[String]) -> String {
    format!("[server]\napi_keys = [\"{KEY}\"]\n[files]\nallow = {}\n", json!(allow))
}

/// A server that may read these, with the environment of somebody who uses that store.
fn server(allow: &[String], port: u16) -> Server {
    server_with(allow, port, "")
}

fn server_with(allow: &[String], port: u16, more: &str) -> Server {
    let endpoint = format!("http://127.0.0.1:{port}");
    let env = [
        ("AWS_ACCESS_KEY_ID", "AKIATEST"),
        ("AWS_SECRET_ACCESS_KEY", "a secret"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", &endpoint),
        ("AWS_ALLOW_HTTP", "true"),
        ("NO_PROXY", "127.0.0.1"),
    ];
    Server::with_env(&format!("{}{more}", config(allow)), &[], &env, |_| {})
}

/// Bytes of all files under a folder.
fn n_bytes_under(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries.map(|entry| if entry.path().is_dir() { n_bytes_under(&entry.path()) } else { entry.metadata().unwrap().len() }).sum()
}

#[test]
fn a_batch_over_an_object_has_the_answers_of_an_upload() {
    let s3 = S3::start();
    let server = server(&["s3://bucket/in/".into()], s3.port);
    let content = format!("\u{feff}{}", lines(24, 6).join("\r\n\r\n"));
    s3.put("in/a.jsonl", content.as_bytes());
    let file = server.reference("s3://bucket/in/a.jsonl");
    assert_eq!(file.status, 200, "{}", file.text);
    let file = file.json();
    assert_eq!((&file["bytes"], &file["filename"]), (&json!(content.len()), &json!("a.jsonl")));
    assert_eq!((&file["uri"], &file["purpose"]), (&json!("s3://bucket/in/a.jsonl"), &json!("batch")));
    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    assert_eq!(server.get(&path).json(), file);
    assert_eq!(server.get("/v1/files").json()["data"], json!([file]));
    let whole = server.get(&format!("{path}/content"));
    assert_eq!((whole.header("content-length"), whole.text == content), (content.len().to_string().as_str(), true));

    let by_reference = server.start_batch(&file["id"]).json();
    // The batch needs the name no more.
    assert_eq!(server.delete(&path).json()["deleted"], true);
    assert_eq!(server.get(&format!("{path}/content")).status, 404);
    let uploaded = server.batch_of(&content);
    let [ended, other] = [&by_reference, &uploaded].map(|batch| server.ended(&batch["id"]));
    assert_eq!((&ended["status"], &ended["request_counts"]["completed"]), (&json!("completed"), &json!(24)), "{ended}");
    let essences = |batch: &Value| {
        let results = server.results(&batch["output_file_id"]);
        results.into_values().map(|line| essence(&line)).collect::<Vec<_>>()
    };
    assert_eq!(essences(&ended), essences(&other));
    // The name is forgotten, the object is not, and nothing of it lies here.
    assert_eq!(s3.get("in/a.jsonl"), content.as_bytes());
    let folder = server.sandbox.path("data/batches").join(ended["id"].as_str().unwrap());
    assert!(!folder.join("input.jsonl").exists());
    assert_eq!(n_bytes_under(&server.sandbox.path("data/files")), content.len() as u64, "the upload alone");
}

#[test]
fn lines_of_an_object_are_checked_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let place = format!("file://{}/", folder.path().display());
    let server = server(&[place.clone(), "s3://bucket/".into()], 1);
    let faults = |batch: &Value| {
        let ended = server.ended(&batch["id"]);
        assert_eq!(ended["status"], "failed", "{ended}");
        let errors = ended["errors"]["data"].as_array().unwrap();
        errors.iter().map(|fault| json!([fault["code"], fault["line"]])).collect::<Vec<_>>()
    };
    let content = [line("a", "x", json!({})), "{".into(), String::new(), line("a", "y", json!({}))].join("\n");
    let uploaded = faults(&server.batch_of(&content));
    assert_eq!(uploaded, [json!(["invalid_json_line", 2]), json!(["duplicate_custom_id", 4])]);
    fs::write(folder.path().join("a.jsonl"), &content).unwrap();
    let file = server.reference(&(place + "a.jsonl")).json();
    assert_eq!(faults(&server.start_batch(&file["id"]).json()), uploaded);
    // A store that can't be reached is not the caller's fault, and is not waited for long.
    let refused = server.reference("s3://bucket/a.jsonl");
    assert_eq!((refused.status, refused.header("retry-after")), (503, "5"), "{}", refused.text);
    assert!(!refused.text.contains("a secret"), "{}", refused.text);
}

#[test]
fn nothing_outside_the_allowed_places_is_read() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    let named = |name: &str| format!("file://{}", path(name).display());
    fs::create_dir(path("in")).unwrap();
    fs::write(path("in/a.jsonl"), line("a", "x", json!({"max_tokens": 2})) + "\n").unwrap();
    fs::write(path("in/empty.jsonl"), "").unwrap();
    fs::write(path("secret.jsonl"), "{\"secret\": true}\n").unwrap();
    symlink(path("secret.jsonl"), path("in/link.jsonl")).unwrap();
    let server = Server::with(&config(&[named("in/")]), &[]);
    assert_eq!(server.reference(&named("in/a.jsonl")).status, 200);
    let outside = ["secret.jsonl", "in/../secret.jsonl", "in/%2e%2e/secret.jsonl", "nothing.jsonl"].map(named);
    for uri in outside.iter().map(String::as_str).chain(["file:///etc/passwd", "s3://bucket/a.jsonl"]) {
        let refused = server.reference(uri);
        assert_eq!(
            (refused.status, &refused.json()["error"]["code"]),
            (403, &json!("uri_not_allowed")),
            "{uri}: {}",
            refused.text
        );
    }
    for uri in ["http://127.0.0.1/a.jsonl", "in/a.jsonl", "", "file:///a\u{0}", &named("in"), &named("in/none.jsonl")] {
        let refused = server.reference(uri);
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("uri")), "{uri}: {}", refused.text);
    }
    // Whether there is something where a link leads out is not told.
    symlink(root.path(), path("in/linked")).unwrap();
    let answer = |name: &str| {
        let refused = server.reference(&named(name));
        (refused.status, refused.json())
    };
    let absent = answer("in/none.jsonl");
    for by_link in ["in/link.jsonl", "in/linked/secret.jsonl", "in/linked/none.jsonl"] {
        assert_eq!(answer(by_link), absent, "{by_link}");
    }
    assert_eq!(server.reference(&named("in/empty.jsonl")).json()["error"]["message"], "uri: is empty");
    let uri = named("in/a.jsonl");
    for (body, code) in [
        (json!({"uri": uri}), "missing_required_parameter"),
        (json!({"purpose": "batch"}), "missing_required_parameter"),
        (json!({"purpose": "user_data", "uri": uri}), "invalid_value"),
        (json!({"purpose": "batch", "uri": 5}), "invalid_type"),
        (json!({"purpose": "batch", "uri": uri, "format": "parquet"}), "unsupported_value"),
        (json!({"purpose": "batch", "uri": uri, "bytes": 5}), "unsupported_parameter"),
        (json!({"purpose": "batch", "uri": uri, "expires_after": {"anchor": "created_at", "seconds": 5}}), "invalid_value"),
        (json!({"purpose": "batch", "uri": uri, "expires_after": {"anchor": "now", "seconds": 3600}}), "invalid_value"),
        (json!({"purpose": "batch", "uri": uri, "expires_after": {"anchor": "created_at"}}), "missing_required_parameter"),
    ] {
        let refused = server.post("/v1/files", body);
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!(code)), "{}", refused.text);
    }
    // Where nothing is allowed, nothing is.
    let none = Server::start();
    assert_eq!(none.reference(&named("in/a.jsonl")).status, 403);
}

#[test]
fn an_object_that_changes_is_not_taken_for_what_it_was() {
    let s3 = S3::start();
    let server = server(&["s3://bucket/".into()], s3.port);
    let content = lines(4, 2).join("\n");
    s3.put("a.jsonl", content.as_bytes());
    let file = server.reference("s3://bucket/a.jsonl").json();
    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    // The same length, so that the tag alone tells.
    s3.put("a.jsonl", content.replace("number 1", "number 7").as_bytes());
    let code = |answer: &Answer| (answer.status, answer.json()["error"]["code"].clone());
    assert_eq!(code(&server.get(&format!("{path}/content"))), (400, json!("file_changed")));
    assert_eq!(code(&server.start_batch(&file["id"])), (400, json!("file_changed")));
    // While a batch waits for its turn, too.
    let file = server.reference("s3://bucket/a.jsonl").json();
    let mut long = lines(200, 4).join("\n");
    s3.put("b.jsonl", long.as_bytes());
    let other = server.reference("s3://bucket/b.jsonl").json();
    let batch = server.start_batch(&other["id"]).json();
    long.push('\n');
    s3.put("b.jsonl", long.as_bytes());
    let ended = server.ended(&batch["id"]);
    assert_eq!((&ended["status"], &ended["errors"]["data"][0]["code"]), (&json!("failed"), &json!("file_changed")), "{ended}");
    assert_eq!(ended["output_file_id"], Value::Null);
    let batch = server.start_batch(&file["id"]).json();
    assert_eq!(server.ended(&batch["id"])["status"], "completed");
    s3.delete("a.jsonl");
    assert_eq!(server.start_batch(&file["id"]).json()["error"]["param"], "input_file_id");
}

/// Few rows at a time, and prices.
pub(crate) const SLOW: &str = "[engine]
max_running = 4
[prices]
asap = { input = 4.0, cached = 2.0, output = 8.0 }
standard = { input = 2.0, cached = 1.0, output = 4.0 }
batch = { input = 1.0, cached = 0.5, output = 2.0 }
";

/// What was done of a batch that ended too early is there, and charged.
#[track_caller]
fn assert_kept(server: &Server, ended: &Value) {
    let results = server.results(&ended["output_file_id"]);
    let n_tokens = |line: &Value| line["response"]["body"]["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(!results.is_empty() && results.len() < 400, "{ended}");
    assert_eq!(ended["request_counts"]["completed"], results.len());
    assert_eq!(ended["usage"]["output_tokens"], results.values().map(n_tokens).sum::<u64>());
    let by_batch = server.get("/v1/usage?group_by=batch").json();
    let own = by_batch["data"].as_array().unwrap().iter().find(|group| group["batch"] == ended["id"]);
    let own = own.unwrap_or_else(|| panic!("no bill: {by_batch}"));
    assert_eq!((&own["charge"], &own["output_tokens"]), (&ended["usage"]["cost"], &ended["usage"]["output_tokens"]));
    assert_ne!(own["charge"], "0");
    let folder = server.sandbox.path("data/batches").join(ended["id"].as_str().unwrap());
    let start = Instant::now();
    while folder.join("output.job").exists() {
        assert!(start.elapsed() < FOREVER, "its journal is left behind");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_was_done_before_an_object_changed_is_kept_and_charged() {
    let s3 = S3::start();
    let mut server = server_with(&["s3://bucket/".into()], s3.port, SLOW);
    let content = lines(400, 1000).join("\n");
    s3.put("a.jsonl", content.as_bytes());
    let file = server.reference("s3://bucket/a.jsonl").json();
    let batch = server.start_batch(&file["id"]).json();
    server.wait_for_journal(&batch["id"]);
    let partial = server.batch(&batch["id"])["output_file_id"].clone();
    let seen = server.results(&partial);
    s3.put("a.jsonl", content.replace("number 1", "number 7").as_bytes());
    server.restart();
    let ended = server.ended(&batch["id"]);
    assert_eq!((&ended["status"], &ended["errors"]["data"][0]["code"]), (&json!("failed"), &json!("file_changed")), "{ended}");
    // What was read while it ran stays what it was.
    assert_eq!(ended["output_file_id"], partial);
    let results = server.results(&partial);
    assert!(seen.iter().all(|(id, line)| results[id] == *line));
    assert_kept(&server, &ended);
}

#[test]
fn a_store_that_is_out_is_waited_for() {
    let (s3, is_out) = (S3::start(), Arc::new(AtomicBool::new(false)));
    let out = Arc::clone(&is_out);
    // Refused at once: what is tried again by itself would take minutes.
    let (port, _) = proxy(s3.port, Box::new(move |_| if out.load(SeqCst) { Fault::Forbidden } else { Fault::None }));
    let mut server = server_with(&["s3://bucket/".into()], port, SLOW);
    s3.put("long.jsonl", lines(400, 1000).join("\n").as_bytes());
    s3.put("short.jsonl", lines(60, 30).join("\n").as_bytes());
    let [long, short] = ["long", "short"].map(|name| {
        let file = server.reference(&format!("s3://bucket/{name}.jsonl")).json();
        server.start_batch(&file["id"]).json()["id"].clone()
    });
    server.wait_for_journal(&long);
    is_out.store(true, SeqCst);
    server.restart();
    // More often than a batch is tried that fails by a fault of ours.
    let said = format!("batch {}: ", long.as_str().unwrap());
    let start = Instant::now();
    while server.said.lock().unwrap().matches(&said).count() < 4 {
        assert!(start.elapsed() < FOREVER && server.batch(&long)["status"] == "in_progress", "{}", server.batch(&long));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(server.batch(&long)["status"], "in_progress");
    // It can be cancelled meanwhile; the names of what did not run are not to be had.
    server.post(&format!("/v1/batches/{}/cancel", long.as_str().unwrap()), Value::Null);
    let ended = server.ended(&long);
    assert_eq!(
        (&ended["status"], &ended["errors"]["data"][0]["code"]),
        (&json!("cancelled"), &json!("batch_cancelled")),
        "{ended}"
    );
    assert_kept(&server, &ended);
    is_out.store(false, SeqCst);
    let ended = server.ended(&short);
    assert_eq!((&ended["status"], &ended["request_counts"]["completed"]), (&json!("completed"), &json!(60)), "{ended}");
}

#[test]
fn a_file_that_the_server_may_not_read_is_its_callers_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    fs::write(&path, lines(2, 2).join("\n")).unwrap();
    let server = server(&[format!("file://{}/", folder.path().display())], 9);
    let uri = format!("file://{}", path.display());
    let made = server.reference(&uri).json();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
    if fs::read(&path).is_ok() {
        eprintln!("skipped: who runs this may read everything");
        return;
    }
    for (refused, param) in [(server.reference(&uri), "uri"), (server.start_batch(&made["id"]), "input_file_id")] {
        let error = &refused.json()["error"];
        assert_eq!((refused.status, &error["param"]), (400, &json!(param)), "{}", refused.text);
        assert!(error["message"].as_str().unwrap().contains("may not read"), "{error}");
    }
}
