//! Conversations over HTTP: a turn begins where the last one ended, with the answer that it would have had from a server that
//! keeps nothing; what the turns came to adds up; no key finds or sees another's, whatever is killed.

use crate::serving::{KEY, MODEL, Server};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use valar::engine::Due;
use valar::server::trajectories::{Turn, credit_ms};
use valar::server::windows::{Table, Window};
use valar::store::trajectories::Trajectory;
use valar::window::Class;

const PRICES: &str = "[prices]\nasap = { input = 1.0, cached = 0.25, output = 3.0 }\n";
const OTHER: &str = "another";
/// Long enough for several blocks.
const TASK: &str = "You watch a river. Each turn you get a reading of its level in metres, and say in one sentence whether the \
                    town by its bank must be warned, and why. A level over nine metres is a flood.";

impl Server {
    fn two(config: &str) -> [Self; 2] {
        let flags = ["--api-key", KEY, "--api-key", OTHER];
        let off = format!("{config}[trajectories]\nkeep_percent = 0\n");
        [Self::with(config, &flags), Self::with(&off, &flags)]
    }

    /// A call of somebody else's, so that what is found is not what the last call happens to have left.
    fn disturb(&self) {
        let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
        assert_eq!(self.post("/v1/chat/completions", body).status, 200);
    }

    #[track_caller]
    fn answered(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    fn of_other(&self, path: &str) -> (u16, Value) {
        let answer = self.send("GET", path, &[("x-api-key", OTHER)], "");
        (answer.status, answer.json())
    }
}

fn chat(messages: &[Value], mut extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": messages, "max_tokens": 30, "temperature": 0, "logprobs": true,
                          "top_logprobs": 2, "ignore_eos": true});
    body.as_object_mut().unwrap().append(extra.as_object_mut().unwrap());
    body
}

fn cached(answer: &Value) -> u64 {
    let usage = &answer["usage"];
    let details = ["prompt_tokens_details", "input_tokens_details"].map(|name| &usage[name]["cached_tokens"]);
    details.into_iter().find_map(Value::as_u64).unwrap_or_else(|| panic!("{answer}"))
}

/// A cost, in units of the currency.
fn cost(value: &Value) -> f64 {
    value.as_str().unwrap_or_else(|| panic!("{value} is no amount")).parse().unwrap()
}

/// The one trajectory of our key, as usage.
#[track_caller]
fn assert_usage(on: &Server, shown: &Value) {
    let usage = on.get("/v1/usage?group_by=trajectory").json();
    let group = &usage["data"][0];
    assert_eq!(
        (usage["data"].as_array().unwrap().len(), &group["trajectory"], &group["n_requests"]),
        (1, &json!("river"), &json!(3))
    );
    for (key, value) in shown.as_object().unwrap() {
        assert_eq!(group[key], *value, "{key}");
    }
    for key in ["turns", "input_tokens", "cached_tokens", "output_tokens", "charge", "cached_share"] {
        assert_eq!(usage["total"][key], shown[key], "{key}");
    }
    assert_eq!((&usage["total"]["trajectories"], &usage["has_more"]), (&json!(1), &json!(false)));
    assert_eq!(on.get("/v1/usage?group_by=trajectory&end=2020-01-01").json()["data"], json!([]));
    let refused = on.get("/v1/usage?group_by=trajectory,day");
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("group_by")));
}

/// With another key's of the same name.
#[track_caller]
fn assert_usage_of_two(on: &Server) {
    assert_eq!(on.of_other("/v1/usage?group_by=trajectory").1["total"]["turns"], 1);
    let printed = on.sandbox.run(&["usage", "--data", "data", "--by", "trajectory", "--json"]).stdout;
    let printed: Value = serde_json::from_slice(&printed).unwrap();
    assert_eq!(json!([printed["total"]["trajectories"], printed["total"]["turns"]]), json!([2, 4]), "{printed}");
    let table = String::from_utf8(on.sandbox.run(&["usage", "--data", "data", "--by", "trajectory"]).stdout).unwrap();
    assert!(table.lines().nth(1).unwrap().starts_with("river ") && table.contains("wall_seconds"), "{table}");
}

#[test]
fn turns_begin_where_the_last_one_ended_with_the_answers_that_they_would_have_had() {
    let [on, off] = Server::two(PRICES);
    let mut messages = vec![json!({"role": "system", "content": TASK})];
    let (mut before, mut sums, mut charge) = (0, [0; 3], 0.0);
    for turn in 0..3 {
        messages.push(json!({"role": "user", "content": format!("The level is {} metres.", 8 + turn)}));
        let named =
            if turn == 1 { json!({"prompt_cache_key": "river"}) } else { json!({"metadata": {"trajectory_id": "river"}}) };
        let body = chat(&messages, named);
        let [found, computed] = [&on, &off].map(|server| {
            let answer = server.answered("/v1/chat/completions", body.clone());
            server.disturb();
            answer
        });
        assert_eq!(found["choices"], computed["choices"], "turn {turn}: every bit of it");
        // All full blocks of the prompt before, at the least.
        let n_cached = cached(&found);
        assert!(
            n_cached >= before / 16 * 16 && (turn == 0 || n_cached > cached(&computed)),
            "turn {turn}: {n_cached} of {before}"
        );
        assert_eq!(n_cached % 16, 0);
        let usage = &found["usage"];
        before = usage["prompt_tokens"].as_u64().unwrap();
        for (sum, n) in sums.iter_mut().zip([before, n_cached, usage["completion_tokens"].as_u64().unwrap()]) {
            *sum += n;
        }
        charge += cost(&usage["cost"]);
        messages.push(found["choices"][0]["message"].clone());
    }
    let [input, n_cached, output] = sums.map(|sum| sum as f64);
    assert!((charge * 1e6 - (input - n_cached + 0.25 * n_cached + 3.0 * output)).abs() < 1e-3, "cached tokens cost less");
    let shown = on.get("/v1/trajectories/river").json();
    assert_eq!(
        json!([shown["turns"], shown["input_tokens"], shown["cached_tokens"], shown["output_tokens"]]),
        json!([3, sums[0], sums[1], sums[2]])
    );
    assert!(
        (cost(&shown["charge"]) - charge).abs() < 1e-9
            && (shown["cached_share"].as_f64().unwrap() - n_cached / input).abs() < 1e-9
    );
    assert_eq!(off.get("/v1/trajectories/river").json()["turns"], 3);
    assert_usage(&on, &shown);

    // Another key finds nothing of it, and can't see it.
    let body = chat(&messages[..4], json!({"metadata": {"trajectory_id": "river"}})).to_string();
    let answer = on.send("POST", "/v1/chat/completions", &[("x-api-key", OTHER)], body);
    assert_eq!((answer.status, cached(&answer.json())), (200, 0), "{}", answer.text);
    assert_eq!(on.of_other("/v1/trajectories/river").1["turns"], 1, "its own, of the same name");
    assert_eq!(on.of_other("/v1/trajectories/lake").0, 404);
    assert_usage_of_two(&on);
    assert_eq!(on.get("/v1/trajectories").json()["data"], json!([shown]));

    // Nothing is in use any more; one keeps blocks, the other none.
    for server in [&on, &off] {
        server.wait_idle();
        assert!(server.metric("valar_kv_blocks_used{") <= 16, "{}", server.get("/metrics").text);
    }
    assert!(on.metric("valar_kv_blocks_kept{") > 0 && on.metric("valar_found_tokens_total{") >= sums[1]);
    assert_eq!((off.metric("valar_kv_blocks_kept{"), off.metric("valar_found_tokens_total{")), (0, 0));
}

/// What of a response is the model's.
fn output(response: &Value) -> Value {
    let content = &response["output"][0]["content"][0];
    json!([content["text"], content["logprobs"]])
}

#[test]
fn a_chain_of_responses_is_a_trajectory_also_over_a_kill() {
    let [mut on, off] = Server::two("");
    let mut previous = [Value::Null, Value::Null];
    let mut first = String::new();
    for turn in 0..4 {
        if turn == 3 {
            on.restart();
        }
        // In the third turn nobody waits.
        let is_background = turn == 2;
        let mut found = Vec::new();
        for (server, previous) in [&on, &off].into_iter().zip(&mut previous) {
            let mut body = json!({"model": MODEL, "input": format!("{TASK} The level is {} metres.", 8 + turn), "temperature": 0,
                "max_output_tokens": 20, "include": ["message.output_text.logprobs"], "background": is_background});
            if !previous.is_null() {
                body["previous_response_id"] = previous.clone();
            }
            let mut response = server.answered("/v1/responses", body);
            if is_background {
                let waited = server.answered("/v1/responses/wait", json!({"ids": [response["id"]], "timeout_s": 120}));
                response = waited["data"][0].clone();
            }
            *previous = response["id"].clone();
            server.disturb();
            found.push(response);
        }
        assert_eq!(output(&found[0]), output(&found[1]), "turn {turn}");
        let n_cached = [cached(&found[0]), cached(&found[1])];
        // What is kept is in memory, and a kill loses it, but for time.
        assert!(if [1, 2].contains(&turn) { n_cached[0] > n_cached[1] } else { n_cached[0] == 0 }, "turn {turn}: {n_cached:?}");
        if turn == 0 {
            first = found[0]["id"].as_str().unwrap().to_owned();
        }
    }
    let shown = on.get(&format!("/v1/trajectories/{first}")).json();
    assert_eq!((&shown["id"], &shown["turns"]), (&json!(first), &json!(4)), "{shown}");
    // Others go on from a response that names one.
    let named = on.answered(
        "/v1/responses",
        json!({"model": MODEL, "input": "Hi", "max_output_tokens": 2, "metadata": {"trajectory_id": "t/1"}}),
    );
    on.answered(
        "/v1/responses",
        json!({"model": MODEL, "input": "Hi", "max_output_tokens": 2, "previous_response_id": named["id"]}),
    );
    assert_eq!(on.get("/v1/trajectories/t%2F1").json()["turns"], 2);
    let page = on.get("/v1/trajectories?limit=1").json();
    assert_eq!((&page["data"][0]["id"], &page["has_more"]), (&json!("t/1"), &json!(true)));
    let rest = on.get("/v1/trajectories?after=t%2F1").json();
    assert_eq!((rest["data"].as_array().unwrap().len(), &rest["data"][0]["id"]), (1, &json!(first)));
    assert_eq!(on.get("/v1/trajectories?after=nobody").status, 404);
}

#[test]
fn what_nobody_asks_for_lapses_while_the_server_is_idle() {
    let server = Server::with("[trajectories]\nkeep_s = 1\n", &["--api-key", KEY]);
    let messages = [json!({"role": "user", "content": TASK})];
    for body in [chat(&messages, json!({})), chat(&messages, json!({"prompt_cache_key": "k"}))] {
        server.answered("/v1/chat/completions", body);
    }
    let start = Instant::now();
    while server.metric("valar_kept_blocks_lapsed_total{") == 0 || server.metric("valar_kv_blocks_kept{") > 0 {
        assert!(start.elapsed() < Duration::from_mins(2), "{}", server.get("/metrics").text);
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn turn(body: &Value, follows: Option<&str>, is_stored: bool) -> Turn {
    Turn::of(body.as_object().unwrap(), follows, is_stored)
}

#[test]
fn a_turn_belongs_to_what_it_names_then_to_what_it_follows_then_to_itself() {
    let id = |turn: &Turn| turn.entry("resp_1", 5, Window::Asap).map(|entry| entry.id);
    let both = json!({"metadata": {"trajectory_id": "t"}, "prompt_cache_key": "k"});
    assert_eq!(id(&turn(&both, Some("resp_0"), true)).as_deref(), Some("t"));
    let key = json!({"metadata": {"trajectory_id": ""}, "prompt_cache_key": "k"});
    assert_eq!(id(&turn(&key, Some("resp_0"), true)).as_deref(), Some("k"));
    assert_eq!(id(&turn(&json!({"metadata": null}), Some("resp_0"), true)).as_deref(), Some("resp_0"));
    assert_eq!(id(&turn(&json!({}), None, true)).as_deref(), Some("resp_1"));
    assert_eq!(id(&turn(&json!({"prompt_cache_key": 3}), None, false)), None);
}

#[test]
fn what_is_named_is_kept_longest_and_owners_are_told_apart() {
    let keep = |turn: &Turn, owner| turn.keep(owner, Duration::from_secs(100));
    let named = turn(&json!({"prompt_cache_key": "k"}), None, false);
    assert_eq!(keep(&named, "a").for_ms, 100_000);
    assert_eq!(keep(&turn(&json!({}), None, true), "a").for_ms, 25_000);
    assert_eq!(keep(&turn(&json!({}), None, false), "a").for_ms, 0);
    assert_eq!(keep(&named, "a").owner, keep(&Turn::default(), "a").owner);
    assert_ne!(keep(&named, "a").owner, keep(&named, "b").owner);
}

#[test]
fn a_trajectory_that_is_late_goes_before_one_that_is_early() {
    let before = |n_standard, standard_ms| Trajectory { n_standard, standard_ms, ..Trajectory::default() };
    let (target, ago) = (Duration::from_mins(5), Duration::from_secs(10));
    let due = |before: &Trajectory| Table::default().due(Class::Standard, 1_000_000, ago, credit_ms(before, target)).at_ms;
    // 0.6 of the target is aimed at.
    assert_eq!(due(&before(0, 0)), 1_000_000 + 180_000 - 10_000);
    assert_eq!(due(&before(1, 180_000)), due(&before(0, 0)));
    assert_eq!(due(&before(2, 310_000)), due(&before(0, 0)) + 50_000);
    assert_eq!(due(&before(2, 410_000)), due(&before(0, 0)) - 50_000);
    // Never more than the window's own time, so that the mean holds, and never less than none.
    assert_eq!(due(&before(9, 0)), 1_000_000 + 300_000 - 10_000);
    assert_eq!(due(&before(1, 9_000_000)), 1_000_000 - 10_000);
    assert_eq!(Table::default().due(Class::Asap, 1_000_000, ago, -5), Due::NEVER);
}
