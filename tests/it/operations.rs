//! A server at work as those see it who run it: what it says, what it measures, how it begins and ends, and what it refuses
//! because it could not be done in time.

use crate::common::Sandbox;
use crate::serving::{FOREVER, KEY, MODEL, Server, read_until};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Looks until something is there.
#[track_caller]
fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < FOREVER, "it never came");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn chat(content: &str, max_tokens: usize, stream: bool) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "ignore_eos": true, "stream": stream})
}

/// A request as it stands on the wire.
fn wire(path: &str, headers: &str, body: &Value) -> String {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// The text of an answer to a request on a connection of its own, which may not come.
fn ask(address: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(FOREVER)).ok()?;
    stream
        .write_all(
            format!("GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n\r\n").as_bytes(),
        )
        .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn lines_are_objects_with_the_ids_of_requests_and_nothing_of_prompts() {
    const MARKER: &str = "xylophone-48151623";
    let server = Server::with("", &["--api-key", KEY, "--log-format", "json"]);
    let response = json!({"model": MODEL, "input": MARKER, "max_output_tokens": 3, "background": true});
    let broken = json!({"model": MODEL, "messages": [{"role": MARKER, "content": MARKER}], "max_tokens": 1});
    let embedded = json!({"custom_id": "a", "params": chat(MARKER, 2, false)});
    let batch = json!({"endpoint": "/v1/chat/completions", "requests": [embedded]});
    let mut asked = Vec::new();
    for (path, body) in [
        ("/v1/chat/completions", chat(MARKER, 3, false)),
        ("/v1/chat/completions", chat(MARKER, 3, true)),
        ("/v1/completions", json!({"model": MODEL, "prompt": MARKER, "max_tokens": 2})),
        ("/v1/chat/completions", broken.clone()),
        ("/v1/messages", broken),
        ("/v1/responses", response),
        ("/v1/batches", batch),
        ("/v1/files", json!(MARKER)),
        ("/tokenize", json!({"model": MODEL, "prompt": MARKER})),
    ] {
        let answer = server.post(path, body);
        asked.push((answer.header("x-request-id").to_owned(), path, answer.status));
    }
    let answer = server.get(&format!("/v1/models/none?prompt={MARKER}"));
    asked.push((answer.header("x-request-id").to_owned(), "/v1/models/none", answer.status));
    server.wait_idle();
    let lines = || -> Vec<Value> {
        let said = server.said.lock().unwrap().clone();
        said.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    };
    for (id, path, status) in &asked {
        let line = eventually(|| lines().into_iter().find(|line| line["message"] == "request" && line["request_id"] == **id));
        assert_eq!((&line["path"], &line["status"]), (&json!(path), &json!(status)));
        assert!(line["duration_ms"].is_number() && line["time"].is_string() && line["level"] == "info", "{line}");
    }
    // The calls that ran, those of the background among them.
    let calls = eventually(|| {
        let calls: Vec<Value> = lines().into_iter().filter(|line| line["message"] == "call").collect();
        (calls.len() >= 4).then_some(calls)
    });
    let call = calls.iter().find(|call| call["request_id"] == *asked[1].0).unwrap();
    assert_eq!((&call["output_tokens"], &call["window"], &call["is_whole"]), (&json!(3), &json!("asap"), &json!(true)));
    assert!(!server.said.lock().unwrap().contains(MARKER));
}

/// The families of an exposition, checked: each begins with its help and kind, and its samples are what the kind says.
fn families(text: &str) -> BTreeMap<String, (String, Vec<(String, f64)>)> {
    let mut families = BTreeMap::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let (name, help) = line.strip_prefix("# HELP ").unwrap_or_else(|| panic!("{line}")).split_once(' ').unwrap();
        assert!(!help.is_empty());
        let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {name} ")).unwrap().to_owned();
        let mut samples = Vec::new();
        while let Some(sample) = lines.next_if(|line| !line.starts_with('#')) {
            let (id, value) = sample.rsplit_once(' ').unwrap();
            let base = id.split('{').next().unwrap();
            let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.iter().any(|suffix| base == format!("{name}{suffix}")), "{sample} is not of {name}");
            assert!(kind != "counter" || name.ends_with("_total"), "{name}");
            samples.push((id.to_owned(), value.parse::<f64>().unwrap()));
        }
        let ids: std::collections::HashSet<&String> = samples.iter().map(|(id, _)| id).collect();
        assert_eq!(ids.len(), samples.len(), "{name}: a sample stands there twice");
        assert!(families.insert(name.to_owned(), (kind, samples)).is_none(), "{name} stands there twice");
    }
    families
}

#[test]
fn metrics_say_how_calls_of_each_window_fared() {
    let server = Server::start();
    for _ in 0..3 {
        assert_eq!(server.post("/v1/chat/completions", chat("Hi", 4, true)).status, 200);
    }
    let waits = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 3, "metadata": {"completion_window": "standard"}});
    assert_eq!(server.post("/v1/responses", waits).status, 200);
    server.wait_idle();
    let text = server.get("/metrics").text;
    let families = families(&text);
    let samples = |name: &str| &families.get(name).unwrap_or_else(|| panic!("{name} is not there")).1;
    let of = |name: &str, window: &str| -> Vec<f64> {
        let window = format!("window=\"{window}\"");
        samples(name).iter().filter(|(id, _)| id.contains(&window)).map(|(_, value)| *value).collect()
    };
    assert_eq!((of("valar_calls_total", "asap"), of("valar_calls_total", "standard")), (vec![3.0], vec![1.0]));
    assert_eq!((of("valar_turn_target_seconds", "asap"), of("valar_turn_target_seconds", "standard")), (vec![], vec![300.0]));
    assert_eq!((of("valar_turn_mean_seconds", "asap").len(), of("valar_slack_seconds", "asap").len()), (1, 0));
    let in_time = of("valar_turns_in_time_total", "standard")[0];
    assert!(in_time <= 1.0 && in_time + of("valar_turns_over_twice_target_total", "standard")[0] <= 1.0);
    for (name, window, n) in [
        ("valar_turn_seconds", "asap", 3.0),
        ("valar_turn_seconds", "standard", 1.0),
        ("valar_time_to_first_token_seconds", "asap", 3.0),
        ("valar_slack_seconds", "standard", 1.0),
    ] {
        let seen = of(name, window);
        let [buckets @ .., sum, count] = &seen[..] else { panic!("{name}: {seen:?}") };
        assert!(buckets.is_sorted() && buckets.len() > 5 && sum.is_finite(), "{name}: {seen:?}");
        assert_eq!((*count, *buckets.last().unwrap()), (n, n), "{name}");
        let mut ends = samples(name).iter().filter(|(id, _)| id.contains("le=\"+Inf\"") && id.contains(window));
        assert!(ends.next().is_some());
    }
    let one = |name: &str| samples(name)[0].1;
    assert!((0.0..=1.0).contains(&one("valar_recompute_ratio")) && (0.0..=1.0).contains(&one("valar_engine_idle_ratio")));
    assert!(one("valar_engine_busy_seconds_total") > 0.0 && one("valar_asap_interference_seconds_total") >= 0.0);
    assert_eq!(samples("valar_class_preemptions_total").len(), 3);
    assert!(samples("valar_backlog_tokens").iter().all(|(_, tokens)| *tokens < 1.0), "{text}");
    assert!(!text.lines().any(|line| line.ends_with(" -0")), "{text}");
}

#[test]
fn a_batch_that_could_not_be_done_in_time_is_refused() {
    let server = Server::with("[engine]\nmax_running = 2\n", &["--api-key", KEY]);
    let request = |i: usize, max_tokens: usize, n: usize| {
        let mut params = chat(&format!("Say something of {i}."), max_tokens, false);
        (params["n"], params["stream"]) = (n.into(), Value::Null);
        json!({"custom_id": format!("row-{i}"), "params": params})
    };
    let batch = |requests: Vec<Value>, hours: &str| {
        let body = json!({"endpoint": "/v1/chat/completions", "completion_window": hours, "requests": requests});
        server.post("/v1/batches", body)
    };
    // While this one runs others wait for the engine: then its speed is known.
    let first = batch((0..80).map(|i| request(i, 40, 1)).collect(), "24h").json();
    server.ended(&first["id"]);
    // Hundreds of millions of tokens in an hour: more than such a model has on any machine that this runs on.
    let huge = || (0..20_000).map(|i| request(i, 4000, 1024)).collect();
    let refused = batch(huge(), "1h");
    let error = &refused.json()["error"];
    assert_eq!((refused.status, &error["code"]), (429, &json!("capacity_exceeded")), "{error}");
    assert!(refused.header("retry-after").parse::<u64>().unwrap() > 0, "{:?}", refused.headers);
    let listed = server.get("/v1/batches").json();
    assert_eq!(listed["data"].as_array().unwrap().len(), 1, "nothing is left of it: {listed}");
    assert_eq!(server.get("/v1/files?purpose=batch").json()["data"].as_array().unwrap().len(), 1);
    let small = batch(vec![request(0, 3, 1)], "1h");
    assert_eq!(small.status, 200, "{}", small.text);
    assert_eq!(server.ended(&small.json()["id"])["status"], "completed");
}

#[test]
fn work_that_was_open_before_a_restart_is_open_after_it() {
    let mut server = Server::with("[engine]\nmax_running = 1\n", &["--api-key", KEY]);
    let background =
        json!({"model": MODEL, "input": "Go on.", "max_output_tokens": 2000, "ignore_eos": true, "background": true});
    for _ in 0..6 {
        assert_eq!(server.post("/v1/responses", background.clone()).status, 200);
    }
    let row = |i: usize| json!({"custom_id": format!("row-{i}"), "params": chat("Go on.", 2000, false)});
    let rows: Vec<Value> = (0..20)
        .map(|i| {
            let mut row = row(i);
            row["params"]["stream"] = Value::Null;
            row
        })
        .collect();
    let batch = json!({"endpoint": "/v1/chat/completions", "requests": rows});
    assert_eq!(server.post("/v1/batches", batch).status, 200);
    server.restart();
    let open = |class: &str| {
        let families = families(&server.get("/metrics").text);
        let class = format!("class=\"{class}\"");
        families["valar_backlog_tokens"].1.iter().find(|(id, _)| id.contains(&class)).unwrap().1
    };
    // One of each may be running; all others are as long as they were.
    assert!(open("standard") > 5.0 * 200.0, "{}", open("standard"));
    eventually(|| (open("batch") > 18.0 * 200.0).then_some(()));
}

#[test]
fn bodies_of_batches_may_be_as_long_as_files() {
    let server = Server::with("[server]\nmax_body = \"20kB\"\n", &["--api-key", KEY]);
    let params = json!({"model": MODEL, "messages": [{"role": "user", "content": "x".repeat(500)}], "max_tokens": 1});
    let requests: Vec<Value> = (0..100).map(|i| json!({"custom_id": format!("r{i}"), "params": params})).collect();
    let messages = server.post("/v1/messages/batches", json!({"requests": requests}));
    assert_eq!((messages.status, &messages.json()["request_counts"]["processing"]), (200, &json!(100)), "{}", messages.text);
    // Also where the requests stand before what they are for.
    let batch = server.post("/v1/batches", json!({"requests": requests, "endpoint": "/v1/chat/completions"}));
    assert_eq!(batch.status, 200, "{}", batch.text);
    let again = server.send(
        "POST",
        "/v1/messages/batches",
        &[("x-api-key", KEY), ("idempotency-key", "k")],
        json!({"requests": requests}).to_string(),
    );
    assert_eq!(again.status, 200, "{}", again.text);
    assert_eq!(server.post("/v1/chat/completions", json!({"requests": requests})).status, 413);
    for (body, path, message) in [
        ("", "/v1/batches", "the body is empty"),
        ("[]", "/v1/batches", "must be a JSON object"),
        ("{\"requests\": [}", "/v1/batches", "not valid JSON"),
        ("{\"requests\": []} x", "/v1/messages/batches", "not valid JSON"),
        ("{\"requests\": 7}", "/v1/messages/batches", "must be one array"),
        ("{\"requests\": []}", "/v1/messages/batches", "must hold 1 to 100000 requests"),
        ("{\"requests\": [7]}", "/v1/messages/batches", "must be an object"),
    ] {
        let answer = server.send("POST", path, &[("x-api-key", KEY)], body);
        let error = answer.json();
        assert_eq!(answer.status, 400, "{body}: {error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(message), "{body}: {error}");
    }
    // Nothing of what was refused is left.
    let names = std::fs::read_dir(server.sandbox.path("data/files")).unwrap();
    let names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names.len(), 1, "the file of the one batch that has one: {names:?}");
}

#[test]
fn a_stream_with_a_key_that_broke_off_is_charged_once() {
    let server = Server::start();
    let body = chat("Count to a hundred.", 60, true);
    let mut stream = server.raw(wire("/v1/chat/completions", "idempotency-key: k\r\n", &body).as_bytes());
    read_until(&mut stream, "\"content\":\"");
    drop(stream);
    let headers = [("x-api-key", KEY), ("idempotency-key", "k")];
    // It waits for the end of the first, and gets what that has come to.
    let answer = server.send("POST", "/v1/chat/completions", &headers, body.to_string());
    assert_eq!((answer.status, answer.header("idempotent-replayed")), (200, "true"), "{}", answer.text);
    assert_eq!(answer.chunks().last().unwrap()["choices"][0]["finish_reason"], "length");
    server.wait_idle();
    let total = &server.get("/v1/usage?group_by=").json()["total"];
    assert_eq!((&total["n_requests"], &total["output_tokens"]), (&json!(1), &json!(60)), "{total}");
}

#[test]
fn whoever_comes_while_models_are_loaded_is_told_to_come_again() {
    // A hub that takes a connection and says nothing: the model is being fetched.
    let hub = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let sandbox = Sandbox::new();
    let mut command: Command = sandbox.command(&["serve", "--port", &port.to_string(), "--data", "data", "-m", "acme/slow"]);
    let hub_url = format!("http://{}", hub.local_addr().unwrap());
    let mut child = command.env("HF_ENDPOINT", hub_url).stderr(Stdio::null()).spawn().unwrap();
    let address = format!("127.0.0.1:{port}");
    let mut answers = HashMap::new();
    for path in ["/health", "/ready", "/v1/models", "/v1/messages/batches"] {
        let answer = eventually(|| {
            assert!(child.try_wait().unwrap().is_none(), "the server has ended");
            ask(&address, path)
        });
        answers.insert(path, answer.to_lowercase());
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(answers["/health"].starts_with("http/1.1 200"), "{answers:?}");
    for (path, status) in [("/ready", 503), ("/v1/models", 503), ("/v1/messages/batches", 529)] {
        let answer = &answers[path];
        assert!(answer.starts_with(&format!("http/1.1 {status}")) && answer.contains("retry-after: 1"), "{answer}");
        assert!(answer.contains("x-request-id: req_") && answer.contains("x-should-retry: true"), "{answer}");
    }
}

#[test]
fn at_the_end_new_calls_are_sent_away_and_what_was_told_is_charged() {
    let mut server = Server::with("[server]\ndrain_s = 600\n", &["--api-key", KEY]);
    let mut stream = server.open("/v1/chat/completions", &chat("Count to a million.", 8000, true));
    read_until(&mut stream, "\"delta\":{\"content\":\"");
    let pid = server.child.id().to_string();
    let terminate = || assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    terminate();
    let refused = eventually(|| {
        let answer = ask(&server.address, "/v1/models").expect("connections are taken until the end");
        answer.starts_with("HTTP/1.1 503").then_some(answer.to_lowercase())
    });
    assert!(refused.contains("retry-after: 1") && refused.contains("shutting down"), "{refused}");
    assert!(ask(&server.address, "/health").is_some_and(|answer| answer.starts_with("HTTP/1.1 200")));
    // A second signal cuts the stream off.
    terminate();
    assert!(server.child.wait().unwrap().success());
    server.restart();
    let total = &server.get("/v1/usage?group_by=").json()["total"];
    assert_eq!(total["n_requests"], 1, "{total}");
    assert!(total["output_tokens"].as_u64().unwrap() > 0, "{total}");
}
