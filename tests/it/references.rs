//! Files by reference: batches over objects that stay where they are, in a store and on this machine, read by ranges, with the
//! same answers as an upload; nothing outside the allowed places; a change is noticed; deleting the name deletes nothing else.

use crate::batches::{essence, line, lines};
use crate::faults::S3;
use crate::serving::{Answer, KEY, Server};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

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
    let endpoint = format!("http://127.0.0.1:{port}");
    let env = [
        ("AWS_ACCESS_KEY_ID", "AKIATEST"),
        ("AWS_SECRET_ACCESS_KEY", "a secret"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", &endpoint),
        ("AWS_ALLOW_HTTP", "true"),
        ("NO_PROXY", "127.0.0.1"),
    ];
    Server::with_env(&config(allow), &[], &env, |_| {})
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
    let outside = ["secret.jsonl", "in/../secret.jsonl", "in/%2e%2e/secret.jsonl", "in/link.jsonl", "nothing.jsonl"].map(named);
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
