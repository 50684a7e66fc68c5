//! Clients that mean no good, or know no better: slow ones, ones that break off, ones that never read, bodies and heads of
//! every wrong kind. Never a fault of the server, never one that hangs, and afterwards nothing is left of them.

use crate::serving::{FOREVER, KEY, MODEL, Server, read_until};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

/// As many as like may wait.
const PATIENT: &str = "[windows.asap]\nceiling_s = 1000000\n";

/// What a server holds when nobody wants anything of it.
struct Rest {
    connections: u64,
    tasks: u64,
}

impl Rest {
    /// Of a server that has just started.
    fn of(server: &Server) -> Self {
        let connections = server.metric("valar_connections");
        Self { connections, tasks: server.metric("valar_tasks") }
    }

    /// Waits until it is so again.
    #[track_caller]
    fn comes_back(&self, server: &Server) {
        server.wait_idle();
        let start = Instant::now();
        // What is left in the cache is what the last prompt leaves for the next.
        while server.metric("valar_connections") > self.connections
            || server.metric("valar_tasks") > self.tasks
            || server.metric("valar_kv_blocks_used{") > 4
            || server.metric("valar_background_responses") > 0
        {
            assert!(start.elapsed() < FOREVER, "something is left behind: {}", server.get("/metrics").text);
            thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(server.metric("valar_http_responses_total{status=\"5xx\"}"), 0);
    }
}

/// Sends something byte by byte until the server has had enough; what it said.
fn dribble(server: &Server, begin: &str, byte: u8) -> String {
    let mut stream = server.raw(begin.as_bytes());
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let (mut said, mut buffer, start) = (Vec::new(), [0; 4096], Instant::now());
    loop {
        assert!(start.elapsed() < FOREVER, "the server is patient with {begin:?}");
        // Whether it is still heard is seen by reading.
        drop(stream.write_all(&[byte]));
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => said.extend_from_slice(&buffer[..n]),
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {}
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&said).into_owned()
}

fn head(path: &str, more: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n{more}\r\n")
}

#[test]
fn slow_clients_are_cut_off() {
    let config = "[server]\nheader_timeout_s = 3\nbody_timeout_s = 3\nwrite_timeout_s = 3\n";
    let server = Server::with(config, &["--api-key", KEY]);
    let rest = Rest::of(&server);
    let form = "content-type: multipart/form-data; boundary=x\r\ncontent-length: 1000000\r\n";
    let part = "--x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n";
    let plain = "content-length: 1000000\r\n";
    let chunked = "transfer-encoding: chunked\r\n";
    let begins = [
        (String::new(), b'G', None),
        ("GET /health HTTP/1.1\r\n".to_owned(), b'x', None),
        ("GET /health HTTP/1.1\r\nx: ".to_owned(), b'x', None),
        // One that was served, and asks for nothing more.
        ("GET /health HTTP/1.1\r\nhost: x\r\n\r\n".to_owned(), b'G', Some("200 OK")),
        (head("/v1/chat/completions", plain), b' ', Some("408")),
        (head("/v1/responses", plain) + "{", b' ', Some("408")),
        (head("/v1/messages", chunked), b'0', None),
        (head("/v1/responses", &format!("idempotency-key: k\r\n{plain}")), b' ', Some("408")),
        (head("/v1/webhook_endpoints/we_1/rotate_secret", plain), b' ', Some("408")),
        (head("/v1/webhook_endpoints/we_1/redeliver", plain), b' ', Some("408")),
        (head("/v1/files", form), b'x', None),
        (head("/v1/files", form) + part, b'x', None),
        // Their bodies are of no interest.
        (head("/v1/batches/batch_1/cancel", plain), b' ', Some("404")),
        (head("/nowhere", plain), b' ', Some("404")),
    ];
    thread::scope(|scope| {
        for (begin, byte, expected) in &begins {
            let server = &server;
            scope.spawn(move || {
                let said = dribble(server, begin, *byte);
                // A connection that is closed while it is written to may lose what was said last.
                let is_right = said.is_empty() || expected.is_none_or(|expected| said.contains(expected));
                assert!(is_right, "{begin:?}: {said:?}");
            });
        }
    });
    rest.comes_back(&server);
    assert_eq!(std::fs::read_dir(server.sandbox.path("data/files")).unwrap().count(), 0, "an upload is left behind");
}

#[test]
fn a_client_that_reads_nothing_is_cut_off() {
    let server = Server::with("[server]\nwrite_timeout_s = 3\nheader_timeout_s = 4\n", &["--api-key", KEY]);
    let content = vec![b'x'; 32 << 20];
    let mut form = b"--x\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nuser_data\r\n--x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n".to_vec();
    form.extend(&content);
    form.extend(b"\r\n--x--\r\n");
    let file = server.send("POST", "/v1/files", &[("x-api-key", KEY), ("content-type", "multipart/form-data; boundary=x")], form);
    assert_eq!(file.status, 200, "{}", file.text);
    let path = format!("/v1/files/{}/content", file.json()["id"].as_str().unwrap());
    let rest = Rest::of(&server);
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n\r\n");
    let mut held: Vec<TcpStream> = (0..8).map(|_| server.raw(request.as_bytes())).collect();
    rest.comes_back(&server);
    for stream in &mut held {
        let mut got = Vec::new();
        drop(stream.read_to_end(&mut got));
        assert!(got.starts_with(b"HTTP/1.1 200 OK") && got.len() < content.len(), "{} bytes", got.len());
    }
    assert_eq!(server.get(&path).text.len(), content.len());
}

/// Streamed calls of every dialect, and what their first event holds.
fn streamed(max_tokens: u64) -> Vec<(&'static str, Value, &'static str)> {
    let messages = json!([{"role": "user", "content": "Tell me a story."}]);
    vec![
        (
            "/v1/chat/completions",
            json!({"model": MODEL, "messages": messages, "max_tokens": max_tokens, "ignore_eos": true, "n": 2, "stream": true}),
            "data: ",
        ),
        (
            "/v1/completions",
            json!({"model": MODEL, "prompt": ["The sea", "The sky"], "max_tokens": max_tokens, "ignore_eos": true, "stream": true}),
            "data: ",
        ),
        (
            "/v1/responses",
            json!({"model": MODEL, "input": "Tell me.", "max_output_tokens": max_tokens, "stream": true}),
            "response.created",
        ),
        (
            "/v1/messages",
            json!({"model": MODEL, "messages": messages, "max_tokens": max_tokens, "stream": true}),
            "message_start",
        ),
    ]
}

#[test]
fn a_call_may_be_broken_off_in_every_phase() {
    let server = Server::with(PATIENT, &["--api-key", KEY]);
    let rest = Rest::of(&server);
    let calls = streamed(3000);
    thread::scope(|scope| {
        for (path, body, first) in &calls {
            let server = &server;
            scope.spawn(move || {
                let body = body.to_string();
                let head = head(path, &format!("content-length: {}\r\n", body.len()));
                let whole = format!("{head}{body}");
                let at_cuts = [1, head.len() / 2, head.len() - 1, head.len(), head.len() + 1, whole.len() - 1, whole.len()];
                for cut in at_cuts {
                    drop(server.raw(&whole.as_bytes()[..cut]));
                }
                // Nothing more will be said, and nothing is read.
                let quiet = server.raw(whole.as_bytes());
                quiet.shutdown(std::net::Shutdown::Write).unwrap();
                for until in ["HTTP/1.1 200", "\r\n\r\n", first] {
                    read_until(&mut server.raw(whole.as_bytes()), until);
                }
                // In the middle, with what has come unread; then at the end.
                let mut stream = server.raw(whole.as_bytes());
                for _ in 0..3 {
                    read_until(&mut stream, "\n\n");
                }
                drop((stream, quiet));
            });
        }
    });
    rest.comes_back(&server);
    // Whoever watches a background response may go, and the response goes on.
    let body = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 30, "background": true, "stream": true});
    let seen = read_until(&mut server.open("/v1/responses", &body), "response.created");
    let id = seen.split("\"id\":\"").nth(1).unwrap().split('"').next().unwrap().to_owned();
    let waited = server.post("/v1/responses/wait", json!({"ids": [id], "timeout_s": 60})).json();
    assert_eq!(waited["data"][0]["usage"]["output_tokens"].as_u64().map(|n| n > 0), Some(true), "{waited}");
    rest.comes_back(&server);
}

/// So many streams at the same time, each read a few bytes at a time; on the engine without a model.
fn slow_readers(n: usize) {
    let config = format!("[server]\nmax_queued = 10000\n{PATIENT}");
    let server = Server::with(&config, &["--api-key", KEY, "--engine", "null"]);
    let rest = Rest::of(&server);
    let calls = streamed(60);
    let mut streams: Vec<(TcpStream, Vec<u8>)> = (0..n)
        .map(|i| {
            let (path, body, _) = &calls[i % calls.len()];
            (server.open(path, body), Vec::new())
        })
        .collect();
    assert!(server.metric("valar_connections") > n as u64 / 2);
    // Some go away meanwhile.
    let (mut buffer, mut n_whole) = ([0; 509], 0);
    for round in 0.. {
        let mut i = 0;
        streams.retain_mut(|(stream, got)| {
            i += 1;
            if round == 2 && i % 10 == 0 {
                return false;
            }
            let n = stream.read(&mut buffer).unwrap();
            got.extend_from_slice(&buffer[..n]);
            // The last chunk of an answer, which says that it is whole.
            let is_whole = got.ends_with(b"0\r\n\r\n");
            n_whole += usize::from(is_whole);
            assert!(n > 0 || is_whole, "{}", String::from_utf8_lossy(got));
            !is_whole
        });
        if streams.is_empty() {
            break;
        }
    }
    assert_eq!(n_whole, n - n / 10);
    rest.comes_back(&server);
}

#[test]
fn hundreds_read_slowly() {
    slow_readers(300);
}

#[test]
#[ignore = "takes minutes, and thousands of open files"]
fn thousands_read_slowly() {
    slow_readers(2000);
}

/// Background responses are accepted while none can run; then each runs to its end. For more of them, see `sizes`.
#[test]
fn hundreds_wait_in_the_background() {
    const N: usize = 300;
    let config = format!("[engine]\nmax_running = 1\n{PATIENT}[windows.standard]\nceiling_s = 2592000\n");
    let server = Server::with(&config, &["--api-key", KEY]);
    let rest = Rest::of(&server);
    let long = json!({"model": MODEL, "prompt": "Go on", "max_tokens": 7000, "ignore_eos": true, "stream": true});
    let mut running = server.open("/v1/completions", &long);
    read_until(&mut running, "\"text\":\"");
    let body = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 1, "background": true});
    let post = |_| {
        let answer = server.post("/v1/responses", body.clone());
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()["id"].as_str().unwrap().to_owned()
    };
    let ids: Vec<String> = thread::scope(|scope| {
        let posters: Vec<_> = (0..8).map(|i| scope.spawn(move || (0..N).skip(i).step_by(8).map(post).collect())).collect();
        posters.into_iter().flat_map(|poster| -> Vec<String> { poster.join().unwrap() }).collect()
    });
    assert_eq!(server.metric("valar_background_responses"), N as u64, "all of them wait");
    drop(running);
    let (mut pending, mut ended) = (json!(ids), std::collections::BTreeSet::new());
    while pending != json!([]) {
        let waited = server.post("/v1/responses/wait", json!({"ids": pending, "timeout_s": 60})).json();
        for response in waited["data"].as_array().unwrap() {
            assert_eq!(response["usage"]["output_tokens"], 1, "{response}");
            assert!(ended.insert(response["id"].as_str().unwrap().to_owned()), "{response} ended twice");
        }
        pending = waited["pending"].clone();
    }
    assert_eq!(ended.len(), N);
    rest.comes_back(&server);
}

#[test]
fn bodies_at_and_over_the_limit() {
    const LIMIT: usize = 100_000;
    let server = Server::with("[server]\nmax_body = \"100kB\"\nbody_timeout_s = 60\n", &["--api-key", KEY]);
    let rest = Rest::of(&server);
    let call = json!({"model": MODEL, "prompt": "Hi", "max_tokens": 1}).to_string();
    let of_length = |n: usize| format!("{call}{}", " ".repeat(n - call.len()));
    for (n, status) in [(LIMIT - 1, 200), (LIMIT, 200), (LIMIT + 1, 413), (2 * LIMIT, 413), (20 * LIMIT, 413)] {
        let body = of_length(n);
        let answer = server.send("POST", "/v1/completions", &[("x-api-key", KEY)], body.clone());
        assert_eq!(answer.status, status, "{n}: {}", answer.text);
        // The same without saying how long it will be.
        let mut chunked = head("/v1/completions", "transfer-encoding: chunked\r\nconnection: close\r\n");
        for piece in body.as_bytes().chunks(7000) {
            write!(chunked, "{:x}\r\n{}\r\n", piece.len(), std::str::from_utf8(piece).unwrap()).unwrap();
        }
        chunked += "0\r\n\r\n";
        let mut stream = server.raw(&[]);
        stream.write_all(chunked.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{n}: {answer}");
    }
    rest.comes_back(&server);
}

/// Bodies that are no request.
fn wrong_bodies() -> Vec<Vec<u8>> {
    let nested = |n: usize| format!("{{\"model\": {}{}}}", "[".repeat(n), "]".repeat(n));
    let mut bodies: Vec<Vec<u8>> = [
        "",
        "{",
        "}",
        "[]",
        "null",
        "\"x\"",
        "{\"a\": 1e999}",
        "{\"model\": \"\\ud800\"}",
        "{\"model\": \"\\u0000\"}",
        "{} {}",
        "\u{feff}{}",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    bodies.extend([127, 128, 10_000].map(|n| nested(n).into_bytes()));
    bodies.push(format!("{}{}", "{\"a\":".repeat(50_000), "}".repeat(50_000)).into_bytes());
    bodies.push(b"{\"model\": \"\xc3\x28\", \"input\": \"\xff\xfe\"}".to_vec());
    bodies.push(
        format!("{{\"model\": {MODEL:?}, \"input\": \"\\u0000\", \"prompt\": [{}]}}", "0,".repeat(3000) + "0").into_bytes(),
    );
    let everything = ["messages", "input", "prompt", "ids", "tokens", "requests", "event_types", "metadata", "name", "url"];
    for value in [json!({}), json!([[]]), json!([null]), json!(-1), json!(1e300), json!("\u{0}"), json!({"": {"": []}})] {
        let mut body = json!({"model": MODEL, "endpoint": "/v1/responses"});
        for name in everything {
            body[name] = value.clone();
        }
        bodies.push(body.to_string().into_bytes());
    }
    bodies
}

/// Questions that mean nothing.
const QUERIES: [&str; 16] = [
    "limit=%ff",
    "limit=99999999999999999999",
    "limit=-1",
    "after=%00",
    "order=%ff",
    "stream=%00",
    "starting_after=-1",
    "start=9e99",
    "start=99999999999999999999",
    "start=18446744073709551615",
    "end=-1",
    "group_by=%00",
    "purpose=%ff%00",
    "status=%00",
    "&&&===",
    "after=a&after=b",
];

#[test]
fn nothing_that_is_sent_is_the_servers_fault() {
    let server = Server::start();
    let rest = Rest::of(&server);
    let document = server.get("/openapi.json").json();
    let check = |method: &str, path: &str, headers: &[(&str, &str)], body: Vec<u8>| {
        let said: String = String::from_utf8_lossy(&body).chars().take(80).collect();
        let headers: Vec<(&str, &str)> = [("x-api-key", KEY)].iter().chain(headers).copied().collect();
        let answer = server.send(method, path, &headers, body);
        assert!(answer.status < 500, "{method} {path} {said:?}: {} {}", answer.status, answer.text);
        if answer.status >= 400 {
            let message = answer.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
            assert!(!message.is_empty(), "{method} {path} {said:?}: {}", answer.text);
        }
        answer.status
    };
    let long = "x".repeat(3000);
    let ids = ["%00", "%ff", "..%2f..%2fvalar.db", "%2e%2e", "%20", "'%20OR%201=1--", "resp_%F0%9F%99%82", &long];
    let mut n_wrong = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap().iter().filter(|(key, _)| *key != "parameters") {
            let method = method.to_uppercase();
            // A long body that is of no interest is not read to its end: whoever sends it may find the connection closed.
            let reads_json = operation["requestBody"]["content"]["application/json"].is_object();
            for id in ids {
                check(&method, &path.replace("{id}", id).replace("{custom_id}", id), &[], Vec::new());
            }
            let path = path.replace(['{', '}'], "");
            if method == "GET" {
                for query in QUERIES {
                    check(&method, &format!("{path}?{query}"), &[], Vec::new());
                }
            }
            if method == "POST" {
                for body in wrong_bodies().into_iter().filter(|body| reads_json || body.len() < 10_000) {
                    n_wrong += usize::from(check(&method, &path, &[], body) >= 400);
                }
                for headers in [
                    [("content-type", "multipart/form-data")],
                    [("content-type", "multipart/form-data; boundary=x")],
                    [("idempotency-key", &*long)],
                ] {
                    check(
                        &method,
                        &path,
                        &headers,
                        b"--x\r\ncontent-disposition: form-data; name=\"\xff\"\r\n\r\n\xff\r\n--x--".to_vec(),
                    );
                }
            }
        }
    }
    assert!(n_wrong > 400, "{n_wrong}");
    rest.comes_back(&server);
}

#[test]
fn heads_of_every_wrong_kind() {
    let server = Server::with("[server]\nheader_timeout_s = 1\n", &["--api-key", KEY]);
    let rest = Rest::of(&server);
    let many = "x-many: 1\r\n".repeat(500);
    let long = format!("x: {}\r\n", "x".repeat(1 << 20));
    let path = "x".repeat(100_000);
    let heads = [
        format!("GET /health HTTP/1.1\r\n{many}\r\n"),
        format!("GET /health HTTP/1.1\r\n{long}\r\n"),
        format!("GET /{path} HTTP/1.1\r\nhost: x\r\n\r\n"),
        "GET /health\r\n\r\n".into(),
        "GET  HTTP/1.1\r\n\r\n".into(),
        "G\0T / HTTP/1.1\r\n\r\n".into(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(),
        "GET http://[::1 HTTP/1.1\r\nhost: x\r\n\r\n".into(),
        "OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n".into(),
        "CONNECT a:1 HTTP/1.1\r\nhost: x\r\n\r\n".into(),
        "GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n".into(),
        "GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx".into(),
        head("/tokenize", "content-length: 3\r\ntransfer-encoding: chunked\r\n") + "0\r\n\r\n",
        head("/tokenize", "transfer-encoding: chunked\r\n") + "zz\r\n\r\n",
        head("/tokenize", "transfer-encoding: chunked\r\n") + "ffffffffffffffffff\r\n",
        head("/tokenize", "transfer-encoding: gzip\r\n") + "x",
        head("/tokenize", "content-length: 18446744073709551615\r\n") + "{}",
        head("/tokenize", "expect: 100-continue\r\ncontent-length: 2\r\n") + "{}",
        head("/tokenize", "upgrade: websocket\r\nconnection: upgrade\r\ncontent-length: 2\r\n") + "{}",
        "\r\n".repeat(1000),
        " ".repeat(100_000),
    ];
    thread::scope(|scope| {
        for request in &heads {
            let server = &server;
            scope.spawn(move || {
                let mut stream = server.raw(&[]);
                drop(stream.write_all(request.as_bytes()));
                // So that nothing more is waited for.
                drop(stream.shutdown(std::net::Shutdown::Write));
                let mut answer = Vec::new();
                if let Err(error) = stream.read_to_end(&mut answer) {
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{request:.80?}");
                }
                let answer = String::from_utf8_lossy(&answer);
                assert!(!answer.contains("HTTP/1.1 5"), "{request:.80?}: {answer}");
            });
        }
    });
    rest.comes_back(&server);
}

#[test]
fn connections_beyond_the_limit_wait() {
    let server = Server::with("[server]\nmax_connections = 4\nheader_timeout_s = 1\n", &[]);
    // They say nothing, and are cut off one after the other.
    let held: Vec<TcpStream> = (0..12).map(|_| server.raw(b"GET ")).collect();
    let answers: Vec<u16> = (0..4).map(|_| server.get("/health").status).collect();
    assert_eq!(answers, [200; 4]);
    assert!(server.metric("valar_connections") <= 4);
    drop(held);
}
