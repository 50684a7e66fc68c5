//! Webhooks from outside: what has ended is told, signed, until it is heard, whatever is killed meanwhile.

use crate::serving::{KEY, MODEL, Server};
use serde_json::{Value, json};
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
    let (id, signature) = (header("webhook-id"), header("webhook-signature"));
    let timestamp = header("webhook-timestamp").parse().unwrap();
    // Somebody may have heard enough.
    drop(heard.send(Heard { id, timestamp, signature, body: serde_json::from_slice(&body).unwrap() }));
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
