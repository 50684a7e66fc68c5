//! Webhooks from outside: what has ended is told, signed, until it is heard, whatever is killed meanwhile.

use crate::serving::{KEY, MODEL, Server};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// What came: headers and body.
#[derive(Debug)]
struct Heard {
    id: String,
    timestamp: u64,
    signature: String,
    authorization: String,
    /// As it came, and what it says.
    text: String,
    body: Value,
}

/// Listens on a port of its own, and answers with these statuses, one after the other; the last stays.
fn receiver(statuses: &'static [u16]) -> (String, Receiver<Heard>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let (sender, heard) = channel();
    std::thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            hear(stream.unwrap(), statuses[i.min(statuses.len() - 1)], &sender);
        }
    });
    (url, heard)
}

fn hear(stream: TcpStream, status: u16, heard: &Sender<Heard>) {
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_owned());
    }
    let header = |name: &str| {
        let mut fields = head.iter().filter_map(|line| line.split_once(": "));
        fields.find(|(key, _)| key.eq_ignore_ascii_case(name)).map_or(String::new(), |(_, value)| value.to_owned())
    };
    let mut body = vec![0; header("content-length").parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    assert_eq!(header("content-type"), "application/json");
    let (id, signature, authorization) = (header("webhook-id"), header("webhook-signature"), header("authorization"));
    let text = String::from_utf8(body).unwrap();
    let timestamp = header("webhook-timestamp").parse().unwrap();
    // Somebody may have heard enough.
    let body = serde_json::from_str(&text).unwrap();
    drop(heard.send(Heard { id, timestamp, signature, authorization, text, body }));
    let answer =
        format!("HTTP/1.1 {status} x\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    // Whoever told it may have been killed meanwhile.
    drop(reader.get_mut().write_all(answer.as_bytes()));
}

const ALLOWED: &str = "[server]\nwebhook_private_addresses = true\n";

impl Server {
    fn endpoint(&self, url: &str, event_types: &[&str]) -> Value {
        let answer = self.post("/v1/webhook_endpoints", json!({"name": "ours", "url": url, "event_types": event_types}));
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    fn background(&self, max_output_tokens: u64) -> String {
        let body = json!({"model": MODEL, "input": "Hi", "background": true, "max_output_tokens": max_output_tokens, "ignore_eos": true});
        self.post("/v1/responses", body).json()["id"].as_str().unwrap().to_owned()
    }
}

/// The next message; the limit is for one that never comes.
fn next(heard: &Receiver<Heard>) -> Heard {
    heard.recv_timeout(Duration::from_mins(10)).unwrap()
}

#[test]
fn what_ends_is_told_until_it_is_heard() {
    let mut server = Server::with(ALLOWED, &["--api-key", KEY, "--api-key", "another"]);
    // A fault, a redirection that is not followed, then it is heard.
    let (url, heard) = receiver(&[500, 302, 200]);
    let made = server.endpoint(&url, &["response.incomplete", "response.cancelled", "batch.failed"]);
    assert!(made["signing_secret"].as_str().unwrap().starts_with("whsec_"));
    let path = format!("/v1/webhook_endpoints/{}", made["id"].as_str().unwrap());
    let shown = server.get(&path).json();
    assert!(shown["signing_secret"].is_null() && shown["name"] == "ours", "{shown}");
    assert_eq!(server.send("GET", &path, &[("x-api-key", "another")], "").status, 404);
    let id = server.background(3);
    let first = next(&heard);
    assert_eq!(
        first.body,
        json!({"id": first.id, "object": "event", "created_at": first.body["created_at"], "type": "response.incomplete", "data": {"id": id}})
    );
    assert_eq!(server.get(&format!("/v1/responses/{id}")).json()["status"], "incomplete");
    // What was not heard is told again, by the server after it too: at once, if the first was killed before it had noted the
    // answer. Each try is signed with its own time.
    server.restart();
    let second = next(&heard);
    assert_eq!((&second.id, &second.body), (&first.id, &first.body));
    assert_eq!(second.signature == first.signature, second.timestamp == first.timestamp);
    // Other events wait for nobody but their turn; what is not wanted is not told.
    let server = server;
    let long = server.background(4000);
    server.post(&format!("/v1/responses/{long}/cancel"), Value::Null);
    server.post("/v1/responses", json!({"model": MODEL, "input": "Hi", "max_output_tokens": 2}));
    let told: Vec<Value> =
        (0..2).map(|_| next(&heard)).map(|heard| json!([heard.body["type"], heard.body["data"]["id"]])).collect();
    assert!(
        told.contains(&json!(["response.cancelled", long])) && told.contains(&json!(["response.incomplete", id])),
        "{told:?}"
    );
    // What was told can be told again.
    let answer = server.post(&format!("{path}/redeliver"), json!({"event_id": first.id}));
    assert_eq!(answer.json()["n_events"], 1, "{}", answer.text);
    assert_eq!(next(&heard).id, first.id);
    // After a change of secrets both sign.
    let rotated = server.post(&format!("{path}/rotate_secret"), json!({"keep_old_secret_active_for_24_hours": true})).json();
    assert_ne!(rotated["signing_secret"], made["signing_secret"]);
    let tested = server.post(&format!("{path}/test"), json!({"event_type": "batch.failed"})).json();
    assert_eq!((&tested["status_code"], &tested["success"]), (&json!(200), &json!(true)));
    assert_eq!(next(&heard).signature.split(' ').count(), 2);
    let failed = server
        .post("/v1/batches", json!({"endpoint": "/v1/responses", "requests": [{"custom_id": "a", "params": {"model": MODEL}}]}))
        .json();
    assert_eq!(next(&heard).body["data"]["id"], failed["id"]);
    server.send("DELETE", &path, &[("x-api-key", KEY)], "");
    assert_eq!(server.get(&path).status, 404);
    assert_eq!(server.get("/v1/webhook_event_types").json().as_array().unwrap().len(), 8);
}

#[test]
fn webhooks_go_to_no_private_address_unless_that_is_allowed() {
    let server = Server::start();
    for url in ["http://127.0.0.1:9/", "http://169.254.169.254/latest", "http://[::1]/", "file:///etc/passwd", "http://10.0.0.1/"]
    {
        let answer = server.post("/v1/webhook_endpoints", json!({"name": "x", "url": url, "event_types": ["batch.failed"]}));
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("url")), "{}", answer.text);
    }
    // A name that leads there is found out when it is looked up.
    let (url, heard) = receiver(&[200]);
    let made = server.endpoint(&url.replace("127.0.0.1", "localhost"), &["batch.failed"]);
    let path = format!("/v1/webhook_endpoints/{}/test", made["id"].as_str().unwrap());
    assert_eq!(server.post(&path, json!({"event_type": "batch.failed"})).json()["error"]["code"], "webhook_unreachable");
    assert!(heard.try_recv().is_err());
}

/// What a message should be signed with.
fn signature(secret: &str, heard: &Heard) -> String {
    let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
    mac.update(format!("{}.{}.{}", heard.id, heard.timestamp, heard.text).as_bytes());
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

#[test]
fn a_response_or_batch_names_who_is_to_be_told_of_it() {
    let mut server = Server::with(ALLOWED, &["--api-key", KEY, "--api-key", "another"]);
    let rotate = |server: &Server, body: Value| -> String {
        let answer = server.post("/v1/webhook_endpoints/completion/rotate_secret", body);
        assert_eq!(answer.json()["id"], "completion", "{}", answer.text);
        answer.json()["signing_secret"].as_str().unwrap().to_owned()
    };
    let first_secret = rotate(&server, json!({}));
    let (url, heard) = receiver(&[500, 200]);
    let metadata = json!({"completion_webhook": url, "webhook_token": "a.token-of/ours=", "other": "x"});
    let response = |max_output_tokens: u64| {
        json!({"model": MODEL, "input": "Hi", "background": true, "max_output_tokens": max_output_tokens, "ignore_eos": true,
               "metadata": metadata})
    };
    let created = server.post("/v1/responses", response(3));
    let (status, id) = (created.status, created.json()["id"].as_str().unwrap_or_default().to_owned());
    assert_eq!(status, 200, "{}", created.text);
    let first = next(&heard);
    assert_eq!(first.authorization, "Bearer a.token-of/ours=");
    assert_eq!(first.signature, signature(&first_secret, &first));
    assert_eq!(first.text, server.get(&format!("/v1/responses/{id}")).text, "what is told is what is fetched");
    assert_eq!((&first.body["status"], &first.body["metadata"]), (&json!("incomplete"), &metadata));
    // Until it is heard, by the server after it too.
    server.restart();
    let second = next(&heard);
    assert_eq!((&second.id, &second.text), (&first.id, &first.text));
    // One that is deleted is told to nobody; one that is cancelled is.
    let deleted = server.post("/v1/responses", response(4000)).json()["id"].as_str().unwrap().to_owned();
    assert_eq!(server.send("DELETE", &format!("/v1/responses/{deleted}"), &[("x-api-key", KEY)], "").status, 200);
    let cancelled = server.post("/v1/responses", response(4000)).json()["id"].as_str().unwrap().to_owned();
    server.post(&format!("/v1/responses/{cancelled}/cancel"), Value::Null);
    let told = next(&heard);
    assert_eq!((&told.body["id"], &told.body["status"]), (&json!(cancelled), &json!("cancelled")));
    // A batch, and those of its requests that are run again.
    let new_secret = rotate(&server, json!({"keep_old_secret_active_for_24_hours": true}));
    let requests = json!([{"custom_id": "a", "params": {"model": MODEL, "input": "Hi", "max_output_tokens": 2}}]);
    let batch = server.post("/v1/batches", json!({"endpoint": "/v1/responses", "requests": requests, "metadata": metadata}));
    assert_eq!(batch.status, 200, "{}", batch.text);
    let told = next(&heard);
    assert_eq!((&told.body["id"], &told.body["status"]), (&batch.json()["id"], &json!("completed")));
    assert_eq!(told.text, server.get(&format!("/v1/batches/{}", told.body["id"].as_str().unwrap())).text);
    assert_eq!(told.signature, format!("{} {}", signature(&new_secret, &told), signature(&first_secret, &told)));
    // Nobody lists it, and nothing stays of what was told.
    assert_eq!(server.get("/v1/webhook_endpoints").json()["data"], json!([]));
    let database = rusqlite::Connection::open(server.sandbox.path("data/valar.db")).unwrap();
    let n_left = || -> u64 { database.query_row("SELECT count(*) FROM delivery", [], |row| row.get(0)).unwrap() };
    while n_left() > 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(heard.try_recv().is_err(), "something was told twice");
}

#[test]
fn who_can_not_be_told_is_refused() {
    let server = Server::start();
    let refused = |path: &str, mut body: Value, metadata: Value, param: &str| {
        body["metadata"] = metadata;
        let answer = server.post(path, body);
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)), "{}", answer.text);
    };
    let (url, token) = ("metadata.completion_webhook", "metadata.webhook_token");
    let response = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 1});
    let chat = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
    let mut background = response.clone();
    background["background"] = true.into();
    let requests = json!([{"custom_id": "a", "params": response}]);
    let batch = json!({"endpoint": "/v1/responses", "requests": requests});
    let there = "https://hooks.example.com/x";
    for (path, body) in [("/v1/responses", &background), ("/v1/batches", &batch)] {
        for wrong in
            ["http://127.0.0.1:9/", "https://[::1]/", "ftp://hooks.example.com/", "https://a:b@hooks.example.com/", "here"]
        {
            refused(path, body.clone(), json!({"completion_webhook": wrong}), url);
        }
        for wrong in ["", "two words", "line\nline", "t\u{f6}ken"] {
            refused(path, body.clone(), json!({"completion_webhook": there, "webhook_token": wrong}), token);
        }
        refused(path, body.clone(), json!({"webhook_token": "alone"}), token);
    }
    // Their callers wait for these.
    for (path, body) in [("/v1/responses", &response), ("/v1/chat/completions", &chat)] {
        refused(path, body.clone(), json!({"completion_webhook": there}), url);
    }
    let mut message = chat;
    message["metadata"] = json!({"completion_webhook": there});
    let answer = server.post("/v1/messages", message);
    assert!(answer.status == 400 && answer.text.contains(url), "{}", answer.text);
    assert_eq!(server.get("/v1/responses").json()["data"], json!([]));
    assert_eq!(server.get("/v1/batches").json()["data"], json!([]));
}
