//! As much as a server is made for: many calls that wait, and a batch of as many lines as one may have.

use crate::batches::line;
use crate::common::tiny_llama;
use crate::serving::{FOREVER, KEY, MODEL, Server};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

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

fn is_open(state: &str) -> bool {
    ["queued", "in_progress"].contains(&state)
}

#[test]
#[ignore = "takes a minute"]
fn ten_thousand_calls_wait_and_none_is_lost() {
    const N: u64 = 10_000;
    const N_LEFT: usize = 50;
    let config = "[[model]]\nid = \"tiny\"\nweights = \"tiny-llama\"\n[windows.standard]\nceiling_s = 2000000\n[engine]\nmax_running = 2\n";
    let mut server = Server::with_files(config, &["--api-key", KEY], |sandbox| drop(tiny_llama(sandbox)));
    let body = |i: &u64| json!({"model": "tiny", "input": "so?", "background": true, "seed": i, "ignore_eos": true, "max_output_tokens": 100});
    let numbers: Vec<u64> = (0..N).collect();
    let ids = by_many(&numbers, |i| {
        let accepted = server.post("/v1/responses", body(i));
        assert_eq!(accepted.status, 200, "{}", accepted.text);
        accepted.json()["id"].as_str().unwrap().to_owned()
    });
    let all = |states: &BTreeMap<String, String>| states.len() == ids.len() && ids.iter().all(|id| states.contains_key(id));
    let before = server.states();
    let n_open = before.values().filter(|state| is_open(state)).count();
    assert!(all(&before) && n_open > ids.len() / 2, "{n_open} of {} wait", before.len());
    server.restart();
    let after = server.states();
    assert!(all(&after));
    for (id, state) in before.iter().filter(|(_, state)| !is_open(state)) {
        assert_eq!(&after[id], state, "it had ended");
    }
    // All but the last.
    let (cancelled, left) = ids.split_at(ids.len() - N_LEFT);
    let n_cancelled: usize = by_many(cancelled, |id| {
        let answer = server.post(&format!("/v1/responses/{id}/cancel"), Value::Null);
        // One that has ended stays as it is.
        assert!(answer.status == 200 || (answer.status == 400 && answer.text.contains("Cannot cancel")), "{}", answer.text);
        usize::from(answer.status == 200)
    })
    .into_iter()
    .sum();
    let start = Instant::now();
    while server.post("/v1/responses/wait", json!({"ids": left, "timeout_s": 30})).json()["pending"] != json!([]) {
        assert!(start.elapsed() < FOREVER, "{:?}", server.states());
    }
    let ended = server.states();
    assert!(all(&ended) && ended.values().all(|state| !is_open(state)));
    assert_eq!(ended.values().filter(|state| *state == "cancelled").count(), n_cancelled);
    assert!(left.iter().all(|id| ended[id] == "incomplete"), "they go on to their limit");
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
