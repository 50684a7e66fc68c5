//! Who calls, from outside: keys that are kept as hashes, what they may ask for, and requests that come again because their
//! caller has heard no answer: they are done once.

use crate::serving::{Answer, KEY, MODEL, Server, read_until};
use serde_json::{Value, json};
use std::sync::mpsc::channel;
use std::time::Duration;

impl Server {
    #[expect(clippy::needless_pass_by_value, reason = "so that callers can write json!(..)")]
    fn again(&self, key: &str, path: &str, body: Value) -> Answer {
        self.send("POST", path, &[("x-api-key", KEY), ("idempotency-key", key)], body.to_string())
    }

    fn total(&self) -> Value {
        self.get("/v1/usage?group_by=").json()["total"].clone()
    }
}

fn chat(content: &str, mut extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 9});
    body.as_object_mut().unwrap().append(extra.as_object_mut().unwrap());
    body
}

#[test]
fn a_request_that_comes_again_is_done_once() {
    let mut server = Server::with("", &["--api-key", KEY, "--api-key", "another"]);
    let response = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 9});
    let unstored = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 9, "store": false});
    let background = json!({"model": MODEL, "input": "Hi", "max_output_tokens": 9, "background": true});
    let batch = json!({"endpoint": "/v1/chat/completions", "requests": [{"custom_id": "a", "params": chat("Hi", json!({}))}]});
    let requests = [
        ("/v1/chat/completions", chat("Hi", json!({"temperature": 1})), false),
        ("/v1/chat/completions", chat("Hi", json!({"stream": true, "temperature": 1})), false),
        ("/v1/completions", json!({"model": MODEL, "prompt": "The sea", "temperature": 1}), false),
        ("/v1/messages", chat("Hi", json!({"temperature": 1})), false),
        ("/v1/responses", response, false),
        ("/v1/responses", unstored, false),
        ("/v1/responses", background, true),
        ("/v1/batches", batch, true),
    ];
    let mut first = Vec::new();
    for (i, (path, body, _)) in requests.iter().enumerate() {
        let answer = server.again(&format!("key {i}"), path, body.clone());
        assert_eq!((answer.status, answer.header("idempotent-replayed")), (200, ""), "{path}: {}", answer.text);
        first.push(answer.text);
    }
    // Its work is done, too.
    let background: Value = serde_json::from_str(&first[6]).unwrap();
    let waited = server.post("/v1/responses/wait", json!({"ids": [background["id"]], "timeout_s": 60})).json();
    assert_eq!(waited["pending"], json!([]));
    let batch: Value = serde_json::from_str(&first[7]).unwrap();
    while server.get(&format!("/v1/batches/{}", batch["id"].as_str().unwrap())).json()["status"] != "completed" {
        std::thread::sleep(Duration::from_millis(50));
    }
    let total = server.total();
    assert_eq!(total["n_requests"], requests.len());
    server.restart();
    for (i, (path, body, is_live)) in requests.iter().enumerate() {
        let answer = server.again(&format!("key {i}"), path, body.clone());
        assert_eq!((answer.status, answer.header("idempotent-replayed")), (200, "true"), "{path}: {}", answer.text);
        if *is_live {
            // What has become of it, under the same name.
            let (now, then): (Value, Value) = (answer.json(), serde_json::from_str(&first[i]).unwrap());
            assert_eq!(now["id"], then["id"]);
            assert!(["completed", "incomplete"].contains(&now["status"].as_str().unwrap()), "{now}");
        } else {
            assert_eq!(answer.text, first[i], "{path}");
        }
        let mut other = body.clone();
        other["metadata"] = json!({"other": "yes"});
        let answer = server.again(&format!("key {i}"), path, other);
        assert_eq!((answer.status, answer.header("x-should-retry")), (400, "false"), "{path}: {}", answer.text);
    }
    let after = server.total();
    assert_eq!((&after["n_requests"], &after["output_tokens"]), (&total["n_requests"], &total["output_tokens"]), "paid twice");
    // Another caller's key is another key; a request that was refused is not remembered.
    let answer = server.send(
        "POST",
        "/v1/chat/completions",
        &[("x-api-key", "another"), ("idempotency-key", "key 0")],
        requests[0].1.to_string(),
    );
    assert_eq!((answer.status, answer.header("idempotent-replayed")), (200, ""), "{}", answer.text);
    assert_eq!(server.again("new", "/v1/chat/completions", chat("Hi", json!({"model": "nobody"}))).status, 404);
    assert_eq!(server.again("new", "/v1/chat/completions", chat("Hi", json!({}))).status, 200);
    assert_eq!(server.again(&"x".repeat(256), "/v1/chat/completions", chat("Hi", json!({}))).status, 400);
}

/// The answers to so many calls at the same time with one key.
fn at_once(server: &Server, n_calls: usize, body: &Value) -> Vec<Answer> {
    std::thread::scope(|scope| {
        let call = || server.again("one", "/v1/chat/completions", body.clone());
        let calls: Vec<_> = (0..n_calls).map(|_| scope.spawn(call)).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    })
}

#[test]
fn of_two_at_the_same_time_the_second_waits() {
    let server = Server::start();
    let body = chat("Count.", json!({"max_tokens": 60, "temperature": 1, "ignore_eos": true}));
    let answers = at_once(&server, 6, &body);
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.text == answers[0].text), "{answers:?}");
    assert_eq!(answers.iter().filter(|answer| answer.header("idempotent-replayed").is_empty()).count(), 1);
    assert_eq!(server.total()["n_requests"], 1);
}

#[test]
fn of_many_at_the_same_time_some_are_turned_away() {
    let server = Server::with("[engine]\nmax_running = 1\n", &["--api-key", KEY]);
    // The first of them does not end before others have been turned away: these do not let it begin.
    let long = chat("Go on.", json!({"max_tokens": 7000, "ignore_eos": true, "stream": true}));
    let mut running = server.open("/v1/chat/completions", &long);
    read_until(&mut running, "\"content\":\"");
    let others: Vec<_> = (0..4).map(|_| server.open("/v1/chat/completions", &long)).collect();
    while server.metric("valar_open_calls{") < 5 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let body = chat("Count.", json!({"max_tokens": 20, "temperature": 0, "ignore_eos": true}));
    let (send, arrived) = channel();
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        for _ in 0..40 {
            let (send, server, body) = (send.clone(), &server, &body);
            scope.spawn(move || send.send(server.again("one", "/v1/chat/completions", body.clone())).unwrap());
        }
        let first = arrived.recv().unwrap();
        drop((running, others));
        std::iter::once(first).chain(arrived.iter().take(39)).collect()
    });
    let (done, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 200);
    assert!(!done.is_empty() && done.iter().all(|answer| answer.text == done[0].text));
    assert!(!refused.is_empty() && refused.iter().all(|answer| answer.status == 429));
    let cost = |answer: &&Answer| answer.header("idempotent-replayed").is_empty();
    assert_eq!(done.iter().filter(|answer| cost(answer)).count(), 1, "it is done once");
}

#[test]
fn a_key_gets_what_it_may_ask_for_and_is_known_by_its_hash() {
    let sandbox = crate::common::Sandbox::new();
    let printed = String::from_utf8(sandbox.run(&["key"]).stdout).unwrap();
    let (boss, hash) = (printed.lines().next().unwrap(), printed.split("hash = \"").nth(1).unwrap().split('"').next().unwrap());
    let config = format!(
        "[[key]]\nname = \"boss\"\nhash = \"{hash}\"\nadmin = true\n\
         [[key]]\nname = \"one\"\nkey = \"one\"\nrequests_per_minute = 1\n\
         [[key]]\nname = \"few\"\nkey = \"few\"\ntokens_per_minute = 2\n"
    );
    let server = Server::with(&config, &[]);
    let call = |key: &str, body: Value| server.send("POST", "/v1/chat/completions", &[("x-api-key", key)], body.to_string());
    // The first is refused for another reason, and counts.
    let answer = call("one", json!({}));
    assert_eq!((answer.status, answer.header("x-ratelimit-limit-requests")), (400, "1"), "{}", answer.text);
    let answer = call("one", chat("Hi", json!({})));
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (429, &json!("rate_limit_exceeded")), "{}", answer.text);
    assert_eq!((answer.header("x-ratelimit-remaining-requests"), answer.header("x-should-retry")), ("0", "true"));
    assert!((1..=60).contains(&answer.header("retry-after").parse::<u64>().unwrap()));
    assert!(answer.header("anthropic-ratelimit-requests-reset").ends_with('Z'));
    assert_eq!(server.send("GET", "/v1/models", &[("x-api-key", "one")], "").status, 200, "only work is limited");
    // What was used beyond the limit is owed for minutes.
    let answer = call("few", chat("Hi", json!({})));
    assert_eq!((answer.status, answer.header("x-ratelimit-limit-tokens")), (200, "2"), "{}", answer.text);
    assert_eq!(call("few", chat("Hi", json!({}))).status, 429);
    let answer = call(boss, chat("Hi", json!({})));
    assert_eq!((answer.status, answer.header("x-ratelimit-limit-tokens")), (200, ""), "{}", answer.text);
    assert_eq!(call(hash, chat("Hi", json!({}))).status, 401);
    let usage = |key: &str| server.send("GET", "/v1/usage?group_by=key", &[("x-api-key", key)], "").json();
    let names =
        |report: &Value| -> Vec<Value> { report["data"].as_array().unwrap().iter().map(|group| group["key"].clone()).collect() };
    assert_eq!(names(&usage(boss)), [json!("boss"), json!("few")]);
    assert_eq!(names(&usage("few")), [json!("few")]);
    let database = std::fs::read(server.sandbox.path("data/valar.db")).unwrap();
    assert!(!database.windows(boss.len()).any(|part| part == boss.as_bytes()), "a key is kept as it is");
}

#[test]
fn a_burst_gets_no_more_than_its_key_may_have() {
    let config = "[[key]]\nname = \"few\"\nkey = \"few\"\ntokens_per_minute = 100\n";
    let server = Server::with(config, &[]);
    let body = chat("Count.", json!({"max_tokens": 400, "ignore_eos": true})).to_string();
    let call = || server.send("POST", "/v1/chat/completions", &[("x-api-key", "few")], body.clone());
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..12).map(|_| scope.spawn(call)).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    let refused = answers.iter().filter(|answer| answer.status == 429).count();
    assert_eq!(refused, 11, "{answers:?}");
    // Background responses are calls, and are refused when they are posted.
    let background = json!({"model": MODEL, "input": "Hi", "background": true}).to_string();
    assert_eq!(server.send("POST", "/v1/responses", &[("x-api-key", "few")], background).status, 429);
}

#[test]
fn what_a_call_did_not_use_is_given_back() {
    let config = "[[key]]\nname = \"few\"\nkey = \"few\"\ntokens_per_minute = 4000\n";
    let server = Server::with(config, &[]);
    let response =
        json!({"model": MODEL, "input": "Say hi.", "max_output_tokens": 5000, "stop": ["e", "a", "o", "i"], "background": true});
    for _ in 0..4 {
        let id = server.send("POST", "/v1/responses", &[("x-api-key", "few")], response.to_string());
        assert_eq!(id.status, 200, "{}", id.text);
        let wait = json!({"ids": [id.json()["id"]], "timeout_s": 60}).to_string();
        let waited = server.send("POST", "/v1/responses/wait", &[("x-api-key", "few")], wait).json();
        assert_eq!(waited["pending"], json!([]), "{waited}");
    }
}

#[test]
fn tokens_in_batches_are_limited_and_come_back() {
    let config = "[[key]]\nname = \"few\"\nkey = \"few\"\nbatch_tokens = 500\n";
    let server = Server::with(config, &[]);
    let post = |content: &str, max_tokens: u64| {
        let params = chat(content, json!({"max_tokens": max_tokens, "ignore_eos": true}));
        let body = json!({"endpoint": "/v1/chat/completions", "requests": [{"custom_id": "a", "params": params}]});
        server.send("POST", "/v1/batches", &[("x-api-key", "few")], body.to_string())
    };
    let ended = |batch: &Value| loop {
        let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
        let batch = server.send("GET", &path, &[("x-api-key", "few")], "").json();
        if ["completed", "failed"].contains(&batch["status"].as_str().unwrap()) {
            break batch;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let first = post("Hi", 300);
    assert_eq!(first.status, 200, "{}", first.text);
    let count = |folder: &str| std::fs::read_dir(server.sandbox.path(&format!("data/{folder}"))).unwrap().count();
    let before = (count("files"), count("batches"));
    let second = post("Hi", 250);
    let error = &second.json()["error"];
    assert_eq!((second.status, &error["code"]), (429, &json!("token_limit_exceeded")), "{}", second.text);
    assert_eq!(second.header("x-should-retry"), "false");
    assert!(error["message"].as_str().unwrap().contains("500 tokens"), "{error}");
    assert_eq!((count("files"), count("batches")), before, "something of it is left");
    assert_eq!(ended(&first.json())["status"], "completed");
    // What has ended holds nothing.
    let third = post("Hi", 400);
    assert_eq!((third.status, &ended(&third.json())["status"]), (200, &json!("completed")), "{}", third.text);
    // What looks short, and is not, is found by its check.
    let long = ended(&post(&"7,".repeat(350), 1).json());
    assert_eq!(json!([long["status"], long["errors"]["data"][0]["code"]]), json!(["failed", "token_limit_exceeded"]), "{long}");
}

/// Whose calls or batches of a window were charged, in that order.
fn turns(server: &Server, window: &str) -> Vec<String> {
    let database = rusqlite::Connection::open(server.sandbox.path("data/valar.db")).unwrap();
    let mut ended = database.prepare("SELECT key FROM ledger WHERE window = ?1 AND n_requests > 0 ORDER BY seq").unwrap();
    let keys = ended.query_map([window], |row| row.get(0)).unwrap();
    keys.collect::<rusqlite::Result<_>>().unwrap()
}

/// A server on which one call has a place in the engine, and two wait there; with two keys.
fn narrow() -> Server {
    let config = format!(
        "[engine]\nmax_running = 1\n[[key]]\nname = \"ours\"\nkey = {KEY:?}\n\
         [[key]]\nname = \"many\"\nkey = \"many\"\n[[key]]\nname = \"few\"\nkey = \"few\"\nweight = 3\n"
    );
    Server::with(&config, &[])
}

#[test]
fn keys_take_turns_in_the_background() {
    const MANY: usize = 12;
    const FEW: usize = 6;
    let mut server = narrow();
    let post = |server: &Server, key: &str, path: &str, body: &Value| {
        server.send("POST", path, &[("x-api-key", key)], body.to_string()).json()
    };
    let mut n_before = 0;
    for is_killed in [false, true] {
        // Nothing of them begins while this has the place.
        let long = chat("Go on.", json!({"max_tokens": 7000, "ignore_eos": true, "stream": true}));
        let mut running = server.open("/v1/chat/completions", &long);
        read_until(&mut running, "\"content\":\"");
        let body = json!({"model": MODEL, "input": "Hi", "background": true, "max_output_tokens": 1, "ignore_eos": true});
        let sent = |key: &str, n: usize| -> Vec<Value> {
            (0..n).map(|_| post(&server, key, "/v1/responses", &body)["id"].clone()).collect()
        };
        let sent = [("many", sent("many", MANY)), ("few", sent("few", FEW))];
        if is_killed {
            server.restart();
        }
        drop(running);
        for (key, ids) in sent {
            let mut left = json!(ids);
            while left != json!([]) {
                left = post(&server, key, "/v1/responses/wait", &json!({"ids": left}))["pending"].clone();
            }
        }
        let ended = turns(&server, "standard").split_off(n_before);
        n_before += ended.len();
        assert_eq!(ended.len(), MANY + FEW, "an order is all that is changed: {ended:?}");
        // Two of the first key may have gone before the second one came; then three of four turns are that one's. With equal
        // weights its last would be the thirteenth, and in the order of arrival the last of all.
        let last = 1 + ended.iter().rposition(|key| key == "few").unwrap();
        assert!(last <= 11, "one key's calls had to wait for another's: {ended:?}");
    }
}

#[test]
fn keys_take_turns_where_calls_wait() {
    let server = narrow();
    for window in ["asap", "standard"] {
        let long = chat("Go on.", json!({"max_tokens": 7000, "ignore_eos": true, "stream": true}));
        let mut running = server.open("/v1/chat/completions", &long);
        read_until(&mut running, "\"content\":\"");
        let body = chat("Hi", json!({"max_tokens": 1, "ignore_eos": true, "metadata": {"completion_window": window}}));
        let call = |key| server.send("POST", "/v1/chat/completions", &[("x-api-key", key)], body.to_string());
        std::thread::scope(|scope| {
            let mut calls = Vec::new();
            for (key, n) in [("many", 16), ("few", 6)] {
                calls.extend((0..n).map(|_| scope.spawn(move || call(key))));
                while (server.metric("valar_open_calls{") as usize) < 1 + calls.len() {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            drop(running);
            assert!(calls.into_iter().all(|call| call.join().unwrap().status == 200));
        });
        let mut ended = turns(&server, window);
        ended.retain(|key| key != "ours");
        // Of those of the first key that had been let into the engine's queue, some may have gone before; by arrival, the other
        // key's last but one would be the last but one of all. The last is not asked about: inside that queue slack decides between
        // standard calls, and the last to be let in may wait there for all that came before it.
        let place = ended.iter().enumerate().filter(|(_, key)| *key == "few").nth(4).unwrap().0;
        assert!(ended.len() == 22 && place < 15, "{window}: one key's calls had to wait for another's: {ended:?}");
    }
}

#[test]
fn batches_of_several_keys_take_turns() {
    let server = narrow();
    let post = |key: &str, n: usize, max_tokens: u32| {
        let params = |i: usize| chat(&format!("Hi {i}"), json!({"max_tokens": max_tokens, "ignore_eos": true}));
        let requests: Vec<Value> = (0..n).map(|i| json!({"custom_id": format!("a{i}"), "params": params(i)})).collect();
        let body = json!({"endpoint": "/v1/chat/completions", "requests": requests}).to_string();
        server.send("POST", "/v1/batches", &[("x-api-key", key)], body).json()
    };
    let state = |key: &str, batch: &Value| {
        let path = format!("/v1/batches/{}", batch["id"].as_str().unwrap());
        server.send("GET", &path, &[("x-api-key", key)], "").json()
    };
    let wait = |key: &str, batch: &Value, until: &str| {
        loop {
            let batch = state(key, batch);
            if batch["status"] == until {
                return;
            }
            assert_ne!(batch["status"], "completed", "it never was {until}: {batch}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    // Nothing of them begins while this has the place.
    let long = chat("Go on.", json!({"max_tokens": 7000, "ignore_eos": true, "stream": true}));
    let mut running = server.open("/v1/chat/completions", &long);
    read_until(&mut running, "\"content\":\"");
    let batches = loop {
        // Two of one key would have both places, but that the other key has a batch, too.
        let first = [post("many", 60, 3), post("many", 60, 3)];
        for batch in &first {
            wait("many", batch, "in_progress");
        }
        let second = post("few", 12, 3);
        wait("few", &second, "in_progress");
        // What the end of a part of the day falls between is not due together: a twentieth of it before it ends.
        let due = |batch: &Value| {
            let part = (batch["expires_at"].as_u64().unwrap() - batch["created_at"].as_u64().unwrap()) / 20;
            batch["expires_at"].as_u64().unwrap() / part
        };
        if due(&first[0]) == due(&second) && due(&first[1]) == due(&second) {
            break [("few", second), ("many", first[0].clone()), ("many", first[1].clone())];
        }
    };
    drop(running);
    for (key, batch) in &batches {
        wait(key, batch, "completed");
    }
    let ended = turns(&server, "batch");
    assert_eq!(ended[ended.len() - 3..], ["few", "many", "many"], "in the order of arrival it would be the last");
}
