//! As much as a server is made for: many calls that wait, and a batch of as many lines as one may have.

use crate::batches::line;
use crate::common::tiny_llama;
use crate::serving::{KEY, MODEL, Server};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

/// Side by side.
const N_CALLERS: usize = 8;

/// What came of each, by several callers.
fn by_many<T: Sync, R: Send>(of: &[T], each: impl Fn(&T) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let parts: Vec<_> = of.chunks(of.len().div_ceil(N_CALLERS)).collect();
        let callers: Vec<_> = parts.iter().map(|part| scope.spawn(|| part.iter().map(&each).collect::<Vec<R>>())).collect();
        callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect()
    })
}

impl Server {
    /// The states of all stored responses, by id.
    fn states(&self) -> BTreeMap<String, String> {
        let (mut found, mut after) = (BTreeMap::new(), String::new());
        loop {
            let page = self.get(&format!("/v1/responses?limit=100{after}")).json();
            for response in page["data"].as_array().unwrap() {
                let [id, status] = ["id", "status"].map(|key| response[key].as_str().unwrap().to_owned());
                assert!(found.insert(id, status).is_none(), "{response} is listed twice");
            }
            if page["has_more"] != true {
                return found;
            }
            after = format!("&after={}", page["last_id"].as_str().unwrap());
        }
    }

    /// A number of `/proc/PID/status`, MiB.
    fn mib(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }
}

#[test]
fn ten_thousand_calls_wait_and_none_is_lost() {
    const N: u64 = 10_000;
    // There is no room for the tiny model as long as the other one is in use, which it is for hours, on any machine.
    let config = format!(
        "[server]\nmin_loaded_s = 0\n[windows.standard]\ntarget_s = 2000000\nceiling_s = 2000000\n\
         [[model]]\nid = \"large\"\nweights = {MODEL:?}\nmemory = \"1016MiB\"\n\
         [[model]]\nid = \"tiny\"\nweights = \"tiny-llama\"\nmemory = \"20MiB\"\nload = \"on_demand\"\n"
    );
    let mut server = Server::with_files(&config, &["--api-key", KEY], |sandbox| drop(tiny_llama(sandbox)));
    let post = |body: Value| {
        let accepted = server.post("/v1/responses", body);
        assert_eq!(accepted.status, 200, "{}", accepted.text);
        accepted.json()["id"].as_str().unwrap().to_owned()
    };
    let long = json!({"model": "large", "input": "Go on.", "background": true, "ignore_eos": true, "max_output_tokens": 8000});
    let in_use: Vec<String> = (0..200).map(|_| post(long.clone())).collect();
    while !server.states().values().any(|state| state == "in_progress") {
        std::thread::sleep(Duration::from_millis(20));
    }
    let body = |i: &u64| json!({"model": "tiny", "input": "so?", "background": true, "seed": i, "ignore_eos": true, "max_output_tokens": 100});
    let numbers: Vec<u64> = (0..N).collect();
    let ids = by_many(&numbers, |i| post(body(i)));
    let all = |states: &BTreeMap<String, String>| {
        states.len() == ids.len() + in_use.len() && ids.iter().all(|id| states.contains_key(id))
    };
    let before = server.states();
    assert!(all(&before) && ids.iter().all(|id| before[id] == "queued"), "{} wait", before.len());
    server.restart();
    assert!(all(&server.states()));
    by_many(&in_use, |id| assert_eq!(server.post(&format!("/v1/responses/{id}/cancel"), Value::Null).status, 200));
    let (mut pending, mut ended) = (json!(ids), BTreeSet::new());
    while pending != json!([]) {
        let waited = server.post("/v1/responses/wait", json!({"ids": pending, "timeout_s": 60})).json();
        for response in waited["data"].as_array().unwrap() {
            assert!(ended.insert(response["id"].as_str().unwrap().to_owned()), "{response} ended twice");
        }
        pending = waited["pending"].clone();
    }
    let states = server.states();
    assert!(all(&states) && ids.iter().all(|id| ended.contains(id) && states[id] == "incomplete"), "they go on to their limit");
    assert!(in_use.iter().all(|id| states[id] == "cancelled"));
    server.wait_idle();
}

#[test]
#[ignore = "takes a minute"]
fn a_batch_of_fifty_thousand_lines_costs_windows_of_rows() {
    /// As many as a server holds at a time, a little more.
    const N_HELD: usize = 25_000;
    let server = Server::with("", &["--api-key", KEY, "--engine", "null"]);
    let sizes = [N_HELD, 2 * N_HELD];
    let idle = server.mib("VmRSS:");
    let peaks = sizes.map(|n| {
        let mut content = String::new();
        for i in 0..n {
            let text = format!("Tell me about the number {i}. {}", "It is a number like any other, and yet. ".repeat(8));
            writeln!(content, "{}", line(&format!("row-{i}"), &text, json!({}))).unwrap();
        }
        let batch = server.batch_of(&content);
        let ended = server.ended(&batch["id"]);
        assert_eq!(ended["request_counts"], json!({"total": n, "completed": n, "failed": 0}), "{ended}");
        assert_eq!(server.results(&ended["output_file_id"]).len(), n);
        server.mib("VmHWM:")
    });
    let [held, twice] = peaks;
    // What is held does not depend on the length of the file; the allocator's habits are allowed for.
    assert!(twice - held < (held - idle) / 2 + 32, "{idle} MiB, then {held} MiB, then {twice} MiB");
    assert!(held - idle < 600, "{idle} MiB, then {held} MiB: {MODEL} with no weights");
}
