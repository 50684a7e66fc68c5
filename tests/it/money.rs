//! Prices, usage and the ledger from outside: what is charged is what the tokens of the answers cost, once, whatever is
//! killed; however sums are told apart, they are the same whole.

use crate::common::chat_line;
use crate::serving::{Answer, FOREVER, KEY, MODEL, Server, read_until};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const PRICES: &str = "[prices]
hour = 3.6
asap = { input = 1.0, cached = 0.25, output = 3.0 }
standard = { input = 0.5, cached = 0.05, output = 1.5 }
batch = { input = 0.25, cached = 0.025, output = 0.75 }
";

/// An amount in millionths of millionths.
#[track_caller]
fn amount(value: &Value) -> i128 {
    let text = value.as_str().unwrap_or_else(|| panic!("{value} is no amount"));
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    assert!(part.len() <= 12, "{text}");
    format!("{whole}{part:0<12}").parse().unwrap()
}

/// What a usage costs at prices of input, cached and output in millionths, whatever dialect it is in.
fn expected(usage: &Value, [input, cached, output]: [i128; 3]) -> i128 {
    let number = |keys: &[&str]| {
        let found = keys.iter().find_map(|key| usage.pointer(key).and_then(Value::as_i64));
        i128::from(found.unwrap_or_else(|| panic!("{keys:?} in {usage}")))
    };
    let n_cached =
        number(&["/prompt_tokens_details/cached_tokens", "/input_tokens_details/cached_tokens", "/cache_read_input_tokens"]);
    let n_input = number(&["/prompt_tokens", "/input_tokens"]);
    // Anthropic's counts leave out what was cached.
    let n_computed = if usage.get("cache_read_input_tokens").is_some() { n_input } else { n_input - n_cached };
    n_computed * input + n_cached * cached + number(&["/completion_tokens", "/output_tokens"]) * output
}

const ASAP: [i128; 3] = [1_000_000, 250_000, 3_000_000];
const STANDARD: [i128; 3] = [500_000, 50_000, 1_500_000];
const BATCH: [i128; 3] = [250_000, 25_000, 750_000];

impl Server {
    fn usage(&self, group_by: &str) -> Value {
        let answer = self.get(&format!("/v1/usage?group_by={group_by}"));
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    /// A batch of chats, at its end.
    fn whole_batch(&self, n: usize) -> Value {
        let params = |i: usize| json!({"model": MODEL, "messages": [{"role": "user", "content": format!("Number {i}?")}], "max_tokens": 5});
        let requests: Vec<Value> = (0..n).map(|i| json!({"custom_id": format!("r{i}"), "params": params(i)})).collect();
        let made = self.post("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": requests})).json();
        self.end_of_batch(made["id"].as_str().unwrap())
    }

    fn end_of_batch(&self, id: &str) -> Value {
        loop {
            let batch = self.get(&format!("/v1/batches/{id}")).json();
            if ["completed", "failed", "expired", "cancelled"].contains(&batch["status"].as_str().unwrap()) {
                return batch;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn ends_of(&self, ids: &[String]) -> Vec<Value> {
        let (mut ended, mut pending) = (Vec::new(), json!(ids));
        while pending != json!([]) {
            let waited = self.post("/v1/responses/wait", json!({"ids": pending, "timeout_s": 60})).json();
            ended.extend(waited["data"].as_array().unwrap().iter().cloned());
            pending = waited["pending"].clone();
        }
        ended
    }
}

/// A call of each kind, streamed and not; the usage that its answer tells.
fn asap_usages(server: &Server) -> Vec<Value> {
    let hi = json!([{"role": "user", "content": "Say hello."}]);
    let chat = json!({"model": MODEL, "messages": hi, "max_tokens": 6});
    let mut asap = vec![server.post("/v1/chat/completions", chat.clone()).json()["usage"].clone()];
    let mut streamed = chat.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    asap.push(server.post("/v1/chat/completions", streamed).chunks().last().unwrap()["usage"].clone());
    let text = json!({"model": MODEL, "prompt": "The sea", "max_tokens": 4});
    asap.push(server.post("/v1/completions", text).json()["usage"].clone());
    asap.push(server.post("/v1/messages", chat.clone()).json()["usage"].clone());
    let mut streamed = chat.clone();
    streamed["stream"] = true.into();
    let events = server.post("/v1/messages", streamed).events();
    let delta = events.iter().find(|(name, _)| name == "message_delta").unwrap();
    let last: Value = serde_json::from_str(&delta.1).unwrap();
    asap.push(last["usage"].clone());
    for store in [true, false] {
        let body = json!({"model": MODEL, "input": "Say hello.", "max_output_tokens": 5, "store": store});
        let response = server.post("/v1/responses", body.clone()).json();
        asap.push(response["usage"].clone());
        if store {
            let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
            assert_eq!(server.get(&path).json()["usage"], response["usage"]);
        }
        let mut streamed = body;
        streamed["stream"] = true.into();
        asap.push(server.post("/v1/responses", streamed).chunks().last().unwrap()["response"]["usage"].clone());
    }
    asap
}

#[test]
fn every_answer_says_what_it_costs_and_the_ledger_adds_up() {
    let server = Server::with(PRICES, &["--api-key", KEY, "--api-key", "another"]);
    let model = server.get(&format!("/v1/models/{MODEL}")).json();
    assert_eq!(model["pricing"]["standard"], json!({"input": "0.5", "cached_input": "0.05", "output": "1.5"}));
    let asap = asap_usages(&server);
    let background = json!({"model": MODEL, "input": "Say hello.", "max_output_tokens": 7, "background": true});
    let id = server.post("/v1/responses", background).json()["id"].as_str().unwrap().to_owned();
    let standard: Vec<Value> = server.ends_of(&[id]).iter().map(|response| response["usage"].clone()).collect();
    let batch = server.whole_batch(4);
    let mut charges = Vec::new();
    for (usages, prices) in [(&asap, ASAP), (&standard, STANDARD), (&vec![batch["usage"].clone()], BATCH)] {
        for usage in usages {
            assert_eq!(amount(&usage["cost"]), expected(usage, prices), "{usage}");
        }
        charges.push(usages.iter().map(|usage| amount(&usage["cost"])).sum::<i128>());
    }
    let by_window = server.usage("window");
    let of = |name: &str| by_window["data"].as_array().unwrap().iter().find(|group| group["window"] == name).unwrap();
    for (name, charge, n) in [("asap", charges[0], asap.len()), ("standard", charges[1], 1), ("batch", charges[2], 4)] {
        assert_eq!((amount(&of(name)["charge"]), of(name)["n_requests"].as_u64()), (charge, Some(n as u64)), "{name}");
        assert!(amount(&of(name)["machine_cost"]) > 0, "{name}: {by_window}");
    }
    let by_batch = server.usage("batch");
    let own = by_batch["data"].as_array().unwrap().iter().find(|group| group["batch"] == batch["id"]).unwrap();
    assert_eq!(amount(&own["charge"]), charges[2]);
    // However they are told apart, groups are the whole.
    for by in ["", "day", "model", "window", "key", "batch", "day,model,window,key,batch"] {
        let report = server.usage(by);
        for key in ["charge", "machine_cost"] {
            let sum: i128 = report["data"].as_array().unwrap().iter().map(|group| amount(&group[key])).sum();
            assert_eq!(sum, amount(&report["total"][key]), "{key} by {by}");
        }
        assert_eq!(amount(&report["total"]["charge"]), charges.iter().sum::<i128>());
    }
    // Another key has used nothing; and what makes no sense is refused.
    let other = server.send("GET", "/v1/usage", &[("x-api-key", "another")], "").json();
    assert_eq!((&other["data"], &other["total"]["charge"]), (&json!([]), &json!("0")));
    for (query, param) in [("group_by=colour", "group_by"), ("start=yesterday", "start"), ("sum=1", "sum")] {
        let answer = server.get(&format!("/v1/usage?{query}"));
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)), "{}", answer.text);
    }
    assert_eq!(server.get("/v1/usage?end=2020-01-01").json()["data"], json!([]));
    // The command line reads the same, of all keys, with the time that nobody used.
    let output = server.sandbox.run(&["usage", "--data", "data", "--by", "window", "--json"]);
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let groups = printed["data"].as_array().unwrap();
    assert_eq!(amount(&printed["total"]["charge"]), charges.iter().sum::<i128>());
    assert!(groups.iter().any(|group| group["window"].is_null()), "{printed}");
    let seconds = printed["total"]["machine_seconds"].as_f64().unwrap();
    // 3.6 an hour is a thousandth a second.
    assert!((amount(&printed["total"]["machine_cost"]) as f64 / 1e9 - seconds).abs() < 1e-6, "{printed}");
    let table = String::from_utf8(server.sandbox.run(&["usage", "--data", "data"]).stdout).unwrap();
    assert!(table.lines().last().unwrap().starts_with("total"), "{table}");
    let offered = String::from_utf8(server.sandbox.run(&["models", "--config", "valar.toml"]).stdout).unwrap();
    assert!(offered.contains("standard  0.5 USD input, 0.05 cached, 1.5 output"), "{offered}");
}

#[test]
fn a_stream_that_is_broken_off_costs_what_was_told() {
    let server = Server::with(&format!("[engine]\nmax_running = 1\n{PRICES}"), &["--api-key", KEY]);
    let body =
        |stream: bool| json!({"model": MODEL, "prompt": "The sea", "max_tokens": 7000, "ignore_eos": true, "stream": stream});
    let until = |is_so: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < FOREVER, "{}", server.get("/metrics").text);
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let n_requests = || server.usage("")["total"]["n_requests"].as_u64().unwrap();
    let mut stream = server.open("/v1/completions", &body(true));
    read_until(&mut stream, "data: ");
    // Nothing was computed for this one.
    let waiting = server.open("/v1/completions", &body(false));
    until(&|| server.metric("valar_waiting{") + server.metric("valar_queued_calls{") > 0);
    drop(waiting);
    until(&|| server.metric("valar_waiting{") + server.metric("valar_queued_calls{") == 0);
    drop(stream);
    server.wait_idle();
    until(&|| n_requests() > 0);
    let first = server.usage("")["total"].clone();
    // Who hangs up while the answer is computed has had the prompt computed, which is cached now, and some of the answer.
    let before = server.metric("valar_generated_tokens_total{");
    let unstreamed = server.open("/v1/completions", &body(false));
    until(&|| server.metric("valar_generated_tokens_total{") > before + 1);
    drop(unstreamed);
    server.wait_idle();
    until(&|| n_requests() > 1);
    let total = server.usage("")["total"].clone();
    assert_eq!((&first["n_requests"], &total["n_requests"]), (&json!(1), &json!(2)));
    let second = |key: &str| total[key].as_u64().unwrap() - first[key].as_u64().unwrap();
    let usage = |total: &Value| {
        let [input, cached, output] = ["input_tokens", "cached_tokens", "output_tokens"].map(|key| total[key].clone());
        json!({"prompt_tokens": input, "completion_tokens": output, "prompt_tokens_details": {"cached_tokens": cached}})
    };
    assert_eq!(amount(&total["charge"]), expected(&usage(&total), ASAP));
    assert!(second("input_tokens") == first["input_tokens"] && (1..7000).contains(&second("output_tokens")), "{first} {total}");
    let output = first["output_tokens"].as_u64().unwrap();
    assert!((1..7000).contains(&output), "{first}");
    assert_eq!(amount(&first["charge"]), expected(&usage(&first), ASAP));
    // Without prices, an answer costs its share of the machine's time.
    drop(server);
    let server = Server::with("[prices]\nhour = 1.0\n", &[]);
    let answer = server.post("/v1/completions", json!({"model": MODEL, "prompt": "The sea", "max_tokens": 4})).json();
    let report = server.usage("model");
    let own = report["data"].as_array().unwrap().iter().find(|group| group["model"] == MODEL).unwrap();
    assert!(amount(&answer["usage"]["cost"]) > 0, "{answer}");
    assert!((amount(&answer["usage"]["cost"]) - amount(&own["machine_cost"])).abs() <= 1, "{answer} {report}");
    assert_eq!(own["charge"], "0");
    assert!(server.get(&format!("/v1/models/{MODEL}")).json()["pricing"].is_null());
}

#[test]
fn nothing_is_paid_twice_or_forgotten_whatever_is_killed() {
    let mut server = Server::with(PRICES, &["--api-key", KEY]);
    let rows: Vec<Value> = (0..60)
        .map(|i| {
            let line: Value = serde_json::from_str(&chat_line(
                &format!("r{i}"),
                &format!("Number {i}?"),
                json!({"model": MODEL, "max_tokens": 24, "ignore_eos": true}),
            ))
            .unwrap();
            json!({"custom_id": line["custom_id"], "params": line["body"]})
        })
        .collect();
    let batch = server.post("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": rows})).json();
    let batch = batch["id"].as_str().unwrap();
    let mut ids = Vec::new();
    for round in 0..4_u64 {
        for i in 0..6 {
            let body = json!({"model": MODEL, "input": format!("Number {i}?"), "background": true, "ignore_eos": true,
                              "max_output_tokens": 5 + 9 * i});
            ids.push(server.post("/v1/responses", body).json()["id"].as_str().unwrap().to_owned());
        }
        std::thread::sleep(Duration::from_millis(150 + 130 * round));
        server.restart();
    }
    let responses = server.ends_of(&ids);
    let batch = server.end_of_batch(batch);
    assert_eq!((responses.len(), &batch["status"]), (ids.len(), &json!("completed")));
    let report = server.usage("window");
    let of = |name: &str| report["data"].as_array().unwrap().iter().find(|group| group["window"] == name).unwrap().clone();
    let (standard, own) = (of("standard"), of("batch"));
    assert_eq!(standard["n_requests"], ids.len());
    let tokens: u64 = responses.iter().map(|response| response["usage"]["output_tokens"].as_u64().unwrap()).sum();
    assert_eq!(standard["output_tokens"], tokens);
    let costs: i128 = responses.iter().map(|response| amount(&response["usage"]["cost"])).sum();
    assert_eq!(amount(&standard["charge"]), costs);
    assert_eq!(
        json!([own["n_requests"], own["output_tokens"], own["charge"]]),
        json!([60, batch["usage"]["output_tokens"], batch["usage"]["cost"]])
    );
}

impl Server {
    /// A background response that has told some of its text.
    fn telling(&self) -> String {
        let body = json!({"model": MODEL, "input": "Tell me of the sea.", "background": true, "stream": true, "ignore_eos": true,
                          "max_output_tokens": 7000, "include": ["message.output_text.logprobs"]});
        let mut stream = self.open("/v1/responses", &body);
        let seen = read_until(&mut stream, "event: response.output_text.delta");
        let id = seen.split("\"id\":\"resp_").nth(1).unwrap().split('"').next().unwrap();
        format!("resp_{id}")
    }

    /// Tokens that its events tell.
    fn n_told(&self, id: &str) -> u64 {
        let events = self.get(&format!("/v1/responses/{id}?stream=true"));
        let deltas = events.events().into_iter().filter(|(name, _)| name == "response.output_text.delta");
        let count = |data: &str| serde_json::from_str::<Value>(data).unwrap()["logprobs"].as_array().unwrap().len() as u64;
        deltas.map(|(_, data)| count(&data)).sum()
    }
}

#[test]
fn a_response_that_is_cancelled_costs_what_its_events_tell() {
    let mut server = Server::with(&format!("[engine]\nmax_running = 4\n{PRICES}"), &["--api-key", KEY]);
    let mut charged = Vec::new();
    for restarts in [false, true] {
        let id = server.telling();
        if restarts {
            server.restart();
        }
        let cancelled = server.post(&format!("/v1/responses/{id}/cancel"), Value::Null).json();
        assert_eq!(json!([cancelled["status"], cancelled["output"]]), json!(["cancelled", []]));
        let usage = &cancelled["usage"];
        assert_eq!((usage["output_tokens"].as_u64(), usage["input_tokens"].as_u64() > Some(0)), (Some(server.n_told(&id)), true));
        assert!((1..7000).contains(&usage["output_tokens"].as_u64().unwrap()), "{cancelled}");
        assert_eq!(amount(&usage["cost"]), expected(usage, STANDARD));
        // Once, however often it is cancelled, and whoever asks.
        assert_eq!(server.post(&format!("/v1/responses/{id}/cancel"), Value::Null).json(), cancelled);
        assert_eq!(server.get(&format!("/v1/responses/{id}")).json(), cancelled);
        charged.push(amount(&usage["cost"]));
    }
    // Deleting cancels.
    let id = server.telling();
    assert_eq!(server.send("DELETE", &format!("/v1/responses/{id}"), &[("x-api-key", KEY)], "").status, 200);
    let total = server.usage("")["total"].clone();
    assert_eq!(total["n_requests"], 3);
    assert!(amount(&total["charge"]) > charged.iter().sum(), "{total}");
    // Of most of these nothing was told: few run at a time, and they are cancelled from the last to the first.
    server.wait_idle();
    let body = json!({"model": MODEL, "input": "Hi", "background": true, "ignore_eos": true, "max_output_tokens": 7000});
    let ids: Vec<Value> = (0..40).map(|_| server.post("/v1/responses", body.clone()).json()["id"].clone()).collect();
    let cancelled = |id: &Value| server.post(&format!("/v1/responses/{}/cancel", id.as_str().unwrap()), Value::Null).json();
    let usages: Vec<Value> = ids.iter().rev().map(|id| cancelled(id)["usage"].clone()).collect();
    let n_told = usages.iter().filter(|usage| !usage.is_null()).count();
    assert!(n_told < 40, "none was cancelled before its first token");
    assert_eq!(server.usage("")["total"]["n_requests"], 3 + n_told);
}

#[test]
fn a_batch_costs_what_it_did_when_it_was_accepted() {
    let offered = |id: &str| format!("[[model]]\nid = {id:?}\nweights = {MODEL:?}\n[engine]\nmax_running = 4\n");
    let mut server = Server::with(&format!("{}{PRICES}", offered("first")), &["--api-key", KEY]);
    let requests: Vec<Value> = (0..300)
        .map(|i| {
            let messages = json!([{"role": "user", "content": format!("Number {i}?")}]);
            let params = json!({"model": "first", "messages": messages, "max_tokens": 40, "ignore_eos": true});
            json!({"custom_id": format!("r{i}"), "params": params})
        })
        .collect();
    let made = server.post("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": requests})).json();
    let id = made["id"].as_str().unwrap();
    server.wait_for_journal(&made["id"]);
    // The model is offered no more, and the other one is free.
    server.sandbox.write("valar.toml", offered("second"));
    server.restart();
    let batch = server.end_of_batch(id);
    let usage = &batch["usage"];
    assert!(usage["output_tokens"].as_u64() > Some(0), "{batch}");
    assert_eq!(amount(&usage["cost"]), expected(usage, BATCH), "{batch}");
    assert_eq!(server.usage("batch")["total"]["charge"], usage["cost"]);
}

#[test]
fn a_batch_that_names_no_model_costs_what_the_first_one_does() {
    let server = Server::with(PRICES, &["--api-key", KEY]);
    let params = |i: usize| json!({"messages": [{"role": "user", "content": format!("Number {i}?")}], "max_tokens": 5});
    let requests: Vec<Value> = (0..3).map(|i| json!({"custom_id": format!("r{i}"), "params": params(i)})).collect();
    let made = server.post("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": requests})).json();
    let batch = server.end_of_batch(made["id"].as_str().unwrap());
    assert_eq!(batch["request_counts"]["completed"], 3, "{batch}");
    let usage = &batch["usage"];
    assert!(amount(&usage["cost"]) > 0, "{batch}");
    assert_eq!(amount(&usage["cost"]), expected(usage, BATCH), "{batch}");
}

#[test]
fn amounts_that_one_number_does_not_hold_are_told_whole() {
    let mut server = Server::with(PRICES, &["--api-key", KEY]);
    drop(server.child.kill());
    server.child.wait().unwrap();
    let database = rusqlite::Connection::open(server.sandbox.path("data/valar.db")).unwrap();
    let sql = "INSERT INTO ledger SELECT NULL, 1000000, NULL, '', '', 'm', 'asap', '', 1, 0, 0, 0, 0, 0, 0, 999999999999999999, 0, 0, 9";
    for _ in 0..20 {
        database.execute(sql, []).unwrap();
    }
    drop(database);
    let printed = server.sandbox.run(&["usage", "--data", "data", "--by", "model", "--json", "--until", "2000-01-01"]).stdout;
    let printed: Value = serde_json::from_slice(&printed).unwrap();
    assert_eq!(printed["data"][0]["charge"], "199999999.99999999998", "{printed}");
}

impl Server {
    fn long_batch(&self, n: usize, max_cost: &Value) -> Answer {
        let params = |i: usize| {
            let messages = json!([{"role": "user", "content": format!("Number {i}?")}]);
            json!({"model": MODEL, "messages": messages, "max_tokens": 40, "ignore_eos": true})
        };
        let requests: Vec<Value> = (0..n).map(|i| json!({"custom_id": format!("r{i}"), "params": params(i)})).collect();
        self.post("/v1/batches", json!({"endpoint": "/v1/chat/completions", "requests": requests, "max_cost": max_cost}))
    }

    fn lines(&self, file: &Value) -> Vec<Value> {
        let text = self.get(&format!("/v1/files/{}/content", file.as_str().unwrap())).text;
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

#[test]
fn a_batch_ends_when_it_has_cost_what_it_may() {
    const N: usize = 500;
    let server = Server::with(&format!("[engine]\nmax_running = 2\n{PRICES}"), &["--api-key", KEY]);
    // The answer of each alone is 30 millionths.
    let made = server.long_batch(N, &json!(0.0005)).json();
    assert_eq!(made["max_cost"], "0.0005", "{made}");
    let ended = server.end_of_batch(made["id"].as_str().unwrap());
    assert_eq!((&ended["status"], &ended["errors"]["data"][0]["code"]), (&json!("cancelled"), &json!("max_cost_reached")));
    let usage = &ended["usage"];
    let each = amount(&usage["cost"]) / i128::from(ended["request_counts"]["completed"].as_i64().unwrap());
    assert_eq!(amount(&usage["cost"]), expected(usage, BATCH), "{ended}");
    // What ended with the one that reached it is charged too, and no more was begun.
    let most = amount(&json!("0.0005"));
    assert!(amount(&usage["cost"]) >= most, "it ended too soon: {ended}");
    assert_eq!(server.usage("batch")["total"]["charge"], usage["cost"]);
    let (done, rest) = (server.lines(&ended["output_file_id"]), server.lines(&ended["error_file_id"]));
    assert!(done.len() < N / 2, "{} of {N} were run, at {each} each", done.len());
    assert!(rest.iter().all(|line| line["error"]["code"] == "max_cost_reached" && line["response"].is_null()), "{rest:?}");
    let ids: BTreeSet<&str> = done.iter().chain(&rest).map(|line| line["custom_id"].as_str().unwrap()).collect();
    assert_eq!((ids.len(), done.len() + rest.len()), (N, N), "each request ended once");
    // The rest may cost as much again.
    let again = server.post(&format!("/v1/batches/{}/retry", ended["id"].as_str().unwrap()), Value::Null).json();
    assert_eq!((&again["max_cost"], &again["status"]), (&ended["max_cost"], &json!("validating")), "{again}");
    let again = server.end_of_batch(again["id"].as_str().unwrap());
    assert_eq!(again["request_counts"]["total"], rest.len(), "{again}");
    assert!(again["usage"]["output_tokens"].as_u64() > Some(0), "{again}");
    // One that costs less than it may is as any other.
    let cheap = server.long_batch(2, &json!("98765432.123456")).json();
    let cheap = server.end_of_batch(cheap["id"].as_str().unwrap());
    let told = json!([cheap["status"], cheap["errors"], cheap["completed_with_errors"], cheap["max_cost"], cheap["progress"]]);
    assert_eq!(told, json!(["completed", null, false, "98765432.123456", null]), "{cheap}");
    for wrong in [json!(0), json!(-1), json!("free"), json!(1e-9), json!(2e8), json!(1e30), json!(true)] {
        let answer = server.long_batch(1, &wrong);
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("max_cost")), "{}", answer.text);
    }
    let free = Server::start();
    let answer = free.long_batch(1, &json!(1));
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("max_cost")), "{}", answer.text);
    assert_eq!(free.get("/v1/batches").json()["data"], json!([]));
}

#[test]
fn a_batch_tells_how_far_it_is() {
    let server = Server::with(&format!("[engine]\nmax_running = 2\n{PRICES}"), &["--api-key", KEY]);
    // It would take long, and is ended when it has told enough.
    let made = server.long_batch(3000, &Value::Null).json();
    let id = made["id"].as_str().unwrap();
    let batch = loop {
        let batch = server.get(&format!("/v1/batches/{id}")).json();
        if batch["progress"]["tokens_done"].as_i64() > Some(0) {
            break batch;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let (progress, counts) = (&batch["progress"], &batch["request_counts"]);
    let n_tokens = i128::from(progress["tokens_done"].as_i64().unwrap());
    assert!(n_tokens >= 40 * i128::from(counts["completed"].as_i64().unwrap().max(1)), "{batch}");
    assert!(progress["eta_s"].as_u64() > Some(0), "{batch}");
    let [_, cached, output] = BATCH;
    let cost = amount(&progress["cost"]);
    assert!(n_tokens * cached < cost && cost < n_tokens * output, "{batch}");
    server.post(&format!("/v1/batches/{id}/cancel"), Value::Null);
    let ended = server.end_of_batch(id);
    assert!(ended["progress"].is_null() && amount(&ended["usage"]["cost"]) >= cost, "{ended}");
}
