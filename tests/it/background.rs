//! Stored and background responses from outside: what was accepted ends exactly once whatever is killed, what has ended
//! never changes, a stream can be taken up anywhere, a chain is the conversation sent at once.

use crate::serving::{FOREVER, KEY, MODEL, Server, read_until};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap_or_else(|| panic!("{response}"))
}

fn is_open(response: &Value) -> bool {
    ["queued", "in_progress"].contains(&response["status"].as_str().unwrap())
}

impl Server {
    #[track_caller]
    fn ok(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    fn response(&self, id: &str) -> Value {
        let answer = self.get(&format!("/v1/responses/{id}"));
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    /// Waits until it has ended.
    fn end_of(&self, id: &str) -> Value {
        let start = Instant::now();
        loop {
            let waited = self.ok("/v1/responses/wait", json!({"ids": [id], "timeout_s": 60}));
            if waited["pending"] == json!([]) {
                return waited["data"][0].clone();
            }
            assert!(start.elapsed() < FOREVER, "{waited}");
        }
    }

    fn events_of(&self, id: &str, query: &str) -> Vec<Value> {
        let answer = self.get(&format!("/v1/responses/{id}?stream=true{query}"));
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.events().iter().filter(|(_, data)| data != "[DONE]").map(|(_, data)| serde_json::from_str(data).unwrap()).collect()
    }
}

/// A request whose answer does not depend on when it runs.
#[expect(clippy::needless_pass_by_value, reason = "so that callers can write json!(..)")]
fn request(i: u64, extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "input": format!("Tell me about the number {i}."), "max_output_tokens": 8 + i % 17,
                          "seed": i, "ignore_eos": true});
    if i.is_multiple_of(3) {
        body["temperature"] = 0.into();
    }
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[test]
fn what_is_stored_can_be_fetched_followed_and_deleted_by_its_owner_alone() {
    let server = Server::with("", &["--api-key", KEY, "--api-key", "another"]);
    let first = server.ok(
        "/v1/responses",
        json!({"model": MODEL, "input": "My name is Ann.", "temperature": 0, "max_output_tokens": 9,
                                                  "instructions": "Be brief."}),
    );
    assert_eq!((&first["store"], &first["background"]), (&json!(true), &json!(false)));
    let id = first["id"].as_str().unwrap().to_owned();
    assert_eq!(server.response(&id), first);
    let second = json!({"model": MODEL, "input": [{"role": "user", "content": "What is my name?"}, {"role": "user", "content": [{"type": "input_text", "text": "Say it."}], "id": "msg_mine"}],
                        "temperature": 0, "max_output_tokens": 9, "previous_response_id": id});
    let chained = server.ok("/v1/responses", second.clone());
    // The same as the whole conversation at once, without the instructions; also streamed, and in the background.
    let mut whole = second.clone();
    whole["previous_response_id"] = Value::Null;
    whole["input"] =
        json!([{"role": "user", "content": "My name is Ann."}, first["output"][0], second["input"][0], second["input"][1]]);
    whole["store"] = false.into();
    let at_once = server.ok("/v1/responses", whole);
    assert_eq!((text(&chained), &chained["usage"]["input_tokens"]), (text(&at_once), &at_once["usage"]["input_tokens"]));
    assert_eq!(chained["previous_response_id"], id);
    let mut third = second.clone();
    third["background"] = true.into();
    let third = server.end_of(server.ok("/v1/responses", third)["id"].as_str().unwrap());
    assert_eq!(text(&third), text(&at_once));
    assert_eq!(server.get(&format!("/v1/responses/{}", at_once["id"].as_str().unwrap())).status, 404, "store: false");

    let items = server.get(&format!("/v1/responses/{}/input_items?limit=1&order=asc", chained["id"].as_str().unwrap())).json();
    assert_eq!((&items["data"][0]["content"][0]["text"], &items["has_more"]), (&json!("What is my name?"), &json!(true)));
    let after = items["last_id"].as_str().unwrap();
    let items =
        server.get(&format!("/v1/responses/{}/input_items?after={after}&order=asc", chained["id"].as_str().unwrap())).json();
    assert_eq!((&items["data"][0]["id"], &items["has_more"]), (&json!("msg_mine"), &json!(false)));

    for (method, path) in [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")] {
        let answer = server.send(method, &format!("/v1/responses/{id}{path}"), &[("x-api-key", "another")], "");
        assert_eq!(answer.status, 404, "{method} {path}: {}", answer.text);
    }
    let answer = server.post(&format!("/v1/responses/{id}/cancel"), Value::Null);
    assert_eq!((answer.status, &answer.json()["error"]["message"]), (400, &json!("Cannot cancel a synchronous response.")));
    assert_eq!(server.get(&format!("/v1/responses/{id}?stream=true")).status, 400);
    let delete =
        || server.send("DELETE", &format!("/v1/responses/{id}"), &[("x-api-key", KEY), ("content-type", "application/json")], "");
    for _ in 0..2 {
        assert_eq!(delete().json(), json!({"id": id, "object": "response", "deleted": true}));
    }
    assert_eq!(server.get(&format!("/v1/responses/{id}")).status, 404);
    let answer = server.post("/v1/responses", second);
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (404, &json!("previous_response_not_found")));
}

#[test]
fn items_are_referred_to_by_their_names() {
    let server = Server::with("", &["--api-key", KEY, "--api-key", "another"]);
    let body = |input: Value| json!({"model": MODEL, "input": input, "temperature": 0, "max_output_tokens": 9});
    let first = server.ok("/v1/responses", body(json!([{"role": "user", "content": "My name is Ann."}])));
    let own_items = |response: &Value| {
        server.get(&format!("/v1/responses/{}/input_items?order=asc", response["id"].as_str().unwrap())).json()["data"].clone()
    };
    let (asked, told) = (own_items(&first)[0].clone(), first["output"][0].clone());
    let why = json!({"role": "user", "content": "What is my name?", "id": "msg_mine"});
    let at_once = server.ok("/v1/responses", body(json!([asked, told, why])));
    let references = json!([{"type": "item_reference", "id": asked["id"]}, {"id": told["id"]}, why]);
    let referring = server.ok("/v1/responses", body(references.clone()));
    let usage = |response: &Value| response["usage"]["input_tokens"].clone();
    assert_eq!((text(&referring), usage(&referring)), (text(&at_once), usage(&at_once)));
    assert_eq!(own_items(&referring), own_items(&at_once), "they are its own from then on");
    let counted = server.ok("/v1/responses/input_tokens", json!({"model": MODEL, "input": references}));
    assert_eq!(counted["input_tokens"], usage(&at_once));
    let mut later = body(references.clone());
    later["background"] = true.into();
    let later = server.end_of(server.ok("/v1/responses", later)["id"].as_str().unwrap());
    assert_eq!(text(&later), text(&at_once));
    // What the caller has named is known where its response is followed.
    let follow = |input: Value| {
        let mut body = body(input);
        body["previous_response_id"] = at_once["id"].clone();
        server.post("/v1/responses", body)
    };
    let (named, given) = (follow(json!([{"type": "item_reference", "id": "msg_mine"}])), follow(json!([why])));
    assert_eq!((named.status, text(&named.json()), usage(&named.json())), (200, text(&given.json()), usage(&given.json())));

    let passing = server.ok("/v1/responses", {
        let mut body = body(json!("Hi"));
        body["store"] = false.into();
        body
    });
    let refused = |key: &str, id: &Value, param: &str| {
        let body = body(json!([{"type": "item_reference", "id": id}, why])).to_string();
        let answer = server.send("POST", "/v1/responses", &[("x-api-key", key)], body);
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (404, &json!(param)), "{}", answer.text);
        assert!(error["message"].as_str().unwrap().contains(&format!("Item with id '{}'", id.as_str().unwrap())), "{error}");
    };
    refused(KEY, &json!("msg_nobody"), "input");
    refused(KEY, &json!(""), "input");
    refused(KEY, &passing["output"][0]["id"], "input");
    refused("another", &told["id"], "input");
    server.send("DELETE", &format!("/v1/responses/{}", first["id"].as_str().unwrap()), &[("x-api-key", KEY)], "");
    refused(KEY, &told["id"], "input");
    refused(KEY, &asked["id"], "input");
    // Those who took it over have it still.
    assert_eq!(own_items(&referring), own_items(&at_once));
    let many: Vec<Value> = (0..1025).map(|i| json!({"type": "item_reference", "id": format!("msg_{i}")})).collect();
    for (input, param) in [(json!([{"type": "item_reference"}]), "input[0].id"), (Value::from(many), "input")] {
        let answer = server.post("/v1/responses", body(input));
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)), "{}", answer.text);
    }
}

#[test]
fn a_background_response_is_polled_watched_and_cancelled() {
    let server = Server::start();
    let plain = server.ok("/v1/responses", request(3, json!({})));
    let started = server.ok("/v1/responses", request(3, json!({"background": true})));
    assert_eq!(
        (&started["status"], &started["completion_window"], &started["metadata"]),
        (&json!("queued"), &json!("standard"), &json!({}))
    );
    let id = started["id"].as_str().unwrap();
    let ended = server.end_of(id);
    assert_eq!(ended["status"], plain["status"]);
    assert_eq!(text(&ended), text(&plain));
    assert_eq!(server.response(id), ended);
    // Watched from the beginning, from the middle, from beyond the end.
    let events = server.events_of(id, "");
    let names: Vec<&str> = events[..3].iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(names, ["response.created", "response.queued", "response.in_progress"]);
    assert_eq!(events.last().unwrap()["response"], ended);
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
    assert_eq!(server.events_of(id, "&starting_after=3"), events[4..]);
    assert_eq!(server.events_of(id, "&starting_after=9999"), [] as [Value; 0]);

    // Cancelled while it runs and while it is watched: the stream and the response agree.
    let long = json!({"background": true, "stream": true, "max_output_tokens": 6000});
    let mut stream = server.open("/v1/responses", &request(5, long));
    let seen = read_until(&mut stream, "output_text.delta");
    let id = seen.split("\"id\":\"resp_").nth(1).unwrap().split('"').next().unwrap();
    let id = format!("resp_{id}");
    let cancelled = server.ok(&format!("/v1/responses/{id}/cancel"), Value::Null);
    assert_eq!(
        json!([cancelled["status"], cancelled["output"], cancelled["error"], cancelled["completed_at"]]),
        json!(["cancelled", [], null, null])
    );
    assert!(read_until(&mut stream, "[DONE]").contains("response.failed"));
    assert_eq!(server.events_of(&id, "").last().unwrap()["response"], cancelled);
    assert_eq!(server.ok(&format!("/v1/responses/{id}/cancel"), Value::Null), cancelled);
    server.wait_idle();
    let answer = server.post(&format!("/v1/responses/{}/cancel", started["id"].as_str().unwrap()), Value::Null);
    assert_eq!((answer.status, &answer.json()["error"]["message"]), (400, &json!("Cannot cancel an incomplete response.")));
    let listed = server.get("/v1/responses?status=cancelled").json();
    assert_eq!((listed["data"].as_array().unwrap().len(), &listed["data"][0]), (1, &cancelled));
}

#[test]
fn what_is_wrong_with_a_background_response_is_said_at_once() {
    let server = Server::start();
    for (extra, param) in [
        (json!({"store": false}), "background"),
        (json!({"max_output_tokens": 100_000}), "max_output_tokens"),
        (json!({"metadata": {"completion_window": "never"}}), "metadata.completion_window"),
        (json!({"background_options": {"completion_window": "1h"}}), "background_options.completion_window"),
        (
            json!({"background_options": {"completion_window": "8h"}, "metadata": {"completion_window": "asap"}}),
            "background_options.completion_window",
        ),
    ] {
        let mut body = request(1, json!({"background": true}));
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let answer = server.post("/v1/responses", body);
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)), "{}", answer.text);
    }
    let soonest = server
        .ok("/v1/responses", request(1, json!({"background": true, "background_options": {"completion_window": "soonest"}})));
    assert_eq!(soonest["completion_window"], "asap");
    for (body, param) in [
        (json!({}), "ids"),
        (json!({"ids": []}), "ids"),
        (json!({"ids": ["resp_x"], "timeout_s": "1"}), "timeout_s"),
        (json!({"ids": ["resp_x"]}), "response_id"),
    ] {
        let answer = server.post("/v1/responses/wait", body);
        assert_eq!(answer.json()["error"]["param"], param, "{}", answer.text);
    }
}

/// What was seen of each response that had ended.
type Ended = BTreeMap<String, Value>;

/// Looks at all of them; what had ended before must be as it was.
fn look(server: &Server, accepted: &BTreeMap<String, u64>, ended: &mut Ended) {
    for id in accepted.keys() {
        let response = server.response(id);
        match ended.get(id) {
            Some(before) => assert_eq!(&response, before, "it changed after its end"),
            None if is_open(&response) => {}
            None => drop(ended.insert(id.clone(), response)),
        }
    }
}

/// Different requests.
const N_DIFFERENT: u64 = 8;

#[test]
fn what_was_accepted_ends_once_whatever_is_killed() {
    // Few at a time, so that kills find some queued and some running.
    let mut server = Server::with("[engine]\nmax_running = 3\n", &["--api-key", KEY]);
    let (mut accepted, mut ended) = (BTreeMap::new(), Ended::new());
    let mut told: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    let mut next = 0;
    let (mut n_open_at_kills, mut n_begun_at_kills) = (0, 0);
    for round in 0..6_u64 {
        for _ in 0..9 {
            // Few different ones, so that what is expected of them is soon known.
            let i = next % N_DIFFERENT;
            let extra = json!({"background": true, "stream": false, "max_output_tokens": 12 + i});
            let started = server.ok("/v1/responses", request(i, extra));
            accepted.insert(started["id"].as_str().unwrap().to_owned(), i);
            next += 1;
        }
        // When so many more have ended, and others are running.
        let wanted = (ended.len() as u64 + round % 4, Instant::now());
        let running = loop {
            look(&server, &accepted, &mut ended);
            let mut open = accepted.keys().filter(|id| !ended.contains_key(*id));
            let running = open.find(|id| server.response(id)["status"] == "in_progress");
            if let Some(running) = running.filter(|_| ended.len() as u64 >= wanted.0) {
                break running;
            }
            assert!(wanted.1.elapsed() < FOREVER && ended.len() < accepted.len(), "none runs");
            std::thread::sleep(Duration::from_millis(2));
        };
        // What a client has seen of a stream must be there after the kill.
        for id in accepted.keys().filter(|id| !ended.contains_key(*id)) {
            let seen = told.entry(id.clone()).or_default();
            let mut stream = server
                .raw(format!("GET /v1/responses/{id}?stream=true HTTP/1.0\r\nauthorization: Bearer {KEY}\r\n\r\n").as_bytes());
            let so_far = read_until(&mut stream, if id == running { "output_text.delta" } else { "response.queued" });
            let events = so_far.lines().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
            *seen = events.collect();
            n_begun_at_kills += usize::from(seen.len() > 3);
        }
        server.restart();
        look(&server, &accepted, &mut ended);
        n_open_at_kills += accepted.len() - ended.len();
    }
    assert!(n_open_at_kills > 20 && n_begun_at_kills > 5, "{n_open_at_kills} were open at kills, {n_begun_at_kills} had begun");
    let start = Instant::now();
    while ended.len() < accepted.len() {
        assert!(start.elapsed() < FOREVER, "{} of {} ended", ended.len(), accepted.len());
        let ids: Vec<&String> = accepted.keys().filter(|id| !ended.contains_key(*id)).collect();
        server.ok("/v1/responses/wait", json!({"ids": ids, "timeout_s": 60}));
        look(&server, &accepted, &mut ended);
    }
    let mut texts = BTreeMap::new();
    for (id, &i) in &accepted {
        let response = &ended[id];
        let expected = texts.entry(i).or_insert_with(|| {
            let plain = server.ok("/v1/responses", request(i, json!({"max_output_tokens": 12 + i, "store": false})));
            text(&plain).to_owned()
        });
        assert_eq!((response["status"].as_str(), text(response)), (Some("incomplete"), expected.as_str()));
        // The events tell the same, once, and nothing that was seen before a kill is gone or another.
        let events = server.events_of(id, "");
        let deltas: String =
            events.iter().filter(|e| e["type"] == "response.output_text.delta").map(|e| e["delta"].as_str().unwrap()).collect();
        assert_eq!(&deltas, expected);
        assert!(events.iter().enumerate().all(|(i, event)| event["sequence_number"] == i));
        assert_eq!(&events.last().unwrap()["response"], response);
        let seen = told.get(id).map_or(&[][..], Vec::as_slice);
        assert_eq!(seen, &events[..seen.len()]);
    }
    server.wait_idle();
}

#[test]
fn a_signal_leaves_background_responses_for_the_next_start() {
    let mut server = Server::start();
    let started = server.ok("/v1/responses", request(7, json!({"background": true, "max_output_tokens": 300})));
    let id = started["id"].as_str().unwrap().to_owned();
    std::process::Command::new("kill").args(["-TERM", &server.child.id().to_string()]).status().unwrap();
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    server.restart();
    assert_eq!(server.end_of(&id)["status"], "incomplete");
}
