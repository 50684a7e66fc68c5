//! `valar bench --busy`: what a run computed, counted, against closed forms of its rows and its model's sizes. Nothing here is
//! about how long it took.

use crate::common::{Sandbox, tiny_llama};
use serde_json::{Value, json};

/// Sizes of the tiny model, as its `config.json` has them.
const WIDTH: u64 = 32;
const FFN_WIDTH: u64 = 48;
const LAYERS: u64 = 2;
const HEADS: u64 = 4;
const KV_HEADS: u64 = 2;
const HEAD_DIM: u64 = 16;
const VOCABULARY: u64 = 64;

/// Rows of a prefix that all share and some tokens of their own, of so many tokens, each with so many generated.
const SHARED: u64 = 37;
const ROWS: [(u64, u64); 5] = [(40, 2), (44, 9), (47, 1), (52, 5), (60, 17)];

fn workload() -> String {
    let line = |(i, &(n_prompt, n_generated)): (usize, &(u64, u64))| {
        let own = |k: u64| 30 + (3 * i as u64 + k) % 14;
        let prompt: Vec<u64> = (0..n_prompt).map(|k| if k < SHARED { 3 + k % 27 } else { own(k - SHARED) }).collect();
        let body = json!({"prompt": prompt, "max_tokens": n_generated, "ignore_eos": true, "temperature": 0});
        json!({"custom_id": format!("{i}"), "method": "POST", "url": "/v1/completions", "body": body}).to_string()
    };
    ROWS.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
}

/// What `bench --busy --json` says of the workload.
fn report(sandbox: &Sandbox, more: &[&str]) -> Value {
    let bench = ["bench", "w.jsonl", "-m", "tiny-llama", "--busy", "--json"];
    let output = sandbox.run(&[&bench[..], more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Pairs of the tokens at these positions and those that they see.
fn pairs(positions: std::ops::Range<u64>) -> u64 {
    positions.map(|position| position + 1).sum()
}

/// Rows begin to share at different tokens, one with the next, in the order in which they are run.
fn beginnings() -> Vec<u64> {
    let lines: Vec<Value> = workload().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut prompts: Vec<Vec<u64>> = lines.iter().map(|l| serde_json::from_value(l["body"]["prompt"].clone()).unwrap()).collect();
    prompts.sort_unstable();
    let common = |a: &[u64], b: &[u64]| a.iter().zip(b).take_while(|(a, b)| a == b).count() as u64;
    let shared = prompts.windows(2).map(|pair| common(&pair[0], &pair[1]));
    let shared: Vec<u64> = std::iter::once(0).chain(shared).collect();
    assert!(shared[1..].iter().all(|&n| n == SHARED), "{shared:?}");
    shared
}

#[test]
fn what_is_counted_is_what_the_rows_make() {
    let sandbox = Sandbox::new();
    tiny_llama(&sandbox);
    sandbox.write("w.jsonl", workload());
    beginnings();
    let report = report(&sandbox, &["--numerics", "exact"]);
    let busy = &report["busy"];
    let counted = |name: &str| busy["counted"][name].as_u64().unwrap();
    // Whoever comes first computes what all share; the last token drawn is not computed.
    let prompt_tokens = SHARED + ROWS.iter().map(|(n_prompt, _)| n_prompt - SHARED).sum::<u64>();
    let decoded = ROWS.iter().map(|(_, n_generated)| n_generated - 1).sum::<u64>();
    let tokens = prompt_tokens + decoded;
    let prompt_pairs = pairs(0..SHARED) + ROWS.iter().map(|&(n_prompt, _)| pairs(SHARED..n_prompt)).sum::<u64>();
    let decode_pairs = ROWS.iter().map(|&(n_prompt, n)| pairs(n_prompt..n_prompt + n - 1)).sum::<u64>();
    let head_rows = ROWS.iter().map(|(_, n_generated)| n_generated).sum::<u64>();
    assert_eq!(counted("tokens"), tokens, "{busy}");
    assert_eq!(counted("prompt_pairs"), LAYERS * prompt_pairs, "{busy}");
    assert_eq!(counted("decode_pairs"), LAYERS * decode_pairs, "{busy}");
    assert_eq!(counted("head_rows"), head_rows, "{busy}");
    assert_eq!(report["estimate"]["actual"]["steps"], counted("steps"));
    // Two whole blocks are shared, by whoever decodes side by side: how many that are depends on when rows came.
    let keys = counted("decode_keys");
    let fewest = LAYERS * (decode_pairs - decoded * (SHARED / 16 * 16));
    assert!((fewest..=LAYERS * decode_pairs).contains(&keys), "{busy}");

    let heads = HEADS * HEAD_DIM;
    let qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
    let product = |n: u64, k: u64, rows: u64| 2 * n * k * rows;
    let expected = [
        ("product", format!("[{qkv}, {WIDTH}] F32"), LAYERS * product(qkv, WIDTH, tokens)),
        ("product, added", format!("[{WIDTH}, {heads}] F32"), LAYERS * product(WIDTH, heads, tokens)),
        ("product, added", format!("[{WIDTH}, {FFN_WIDTH}] F32"), LAYERS * product(WIDTH, FFN_WIDTH, tokens)),
        ("gate, up", format!("[{}, {WIDTH}] F32", 2 * FFN_WIDTH), LAYERS * product(2 * FFN_WIDTH, WIDTH, tokens)),
        ("head", format!("[{VOCABULARY}, {WIDTH}] F32"), product(VOCABULARY, WIDTH, head_rows)),
        // A product with the keys and one with the values.
        ("attention, prompts", String::new(), 4 * heads * LAYERS * prompt_pairs),
        // Halves.
        ("attention, decoding", String::new(), 2 * KV_HEADS * HEAD_DIM * 2 * keys),
        ("embed", format!("[{VOCABULARY}, {WIDTH}] F32"), 8 * WIDTH * tokens),
        ("norm", String::new(), 2 * LAYERS * 8 * WIDTH * tokens),
        ("rotate, store", String::new(), LAYERS * 8 * qkv * tokens),
    ];
    let mut found: Vec<(&str, String, u64)> = Vec::new();
    for share in busy["operations"].as_array().unwrap() {
        let text = |name: &str| share[name].as_str().unwrap();
        found.push((text("operation"), text("weight").to_owned(), share["amount"].as_u64().unwrap()));
        let in_bytes = ["attention, decoding", "embed", "norm", "rotate, store"].contains(&text("operation"));
        assert_eq!(text("unit"), if in_bytes { "bytes" } else { "operations" });
    }
    found.sort_unstable();
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    assert_eq!(found, expected);
}

/// The share is that of the times of the operations, whatever they are.
#[test]
fn shares_add_up() {
    let sandbox = Sandbox::new();
    tiny_llama(&sandbox);
    sandbox.write("w.jsonl", workload());
    for more in [&["--numerics", "int8"][..], &["--numerics", "bf16"], &["--kv", "int8"]] {
        let report = report(&sandbox, more);
        let (busy, total) = (&report["busy"], report["seconds"]["total"].as_f64().unwrap());
        let shares = busy["operations"].as_array().unwrap();
        let sum = |name: &str| shares.iter().map(|share| share[name].as_f64().unwrap()).sum::<f64>();
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
        assert!(shares.iter().all(|share| share["seconds"].as_f64().unwrap() > 0.0), "{busy}");
        assert!(near(sum("seconds"), busy["seconds"].as_f64().unwrap()), "{busy}");
        assert!(near(sum("share"), busy["share"].as_f64().unwrap()) && near(sum("seconds"), sum("share") * total), "{busy}");
    }
    let refused = sandbox.expect(&["bench", "w.jsonl", "--busy", "--engine", "null"], 2);
    assert!(refused.contains("--busy"), "{refused}");
    let output = sandbox.run(&["bench", "w.jsonl", "-m", "tiny-llama", "--busy"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("busy") && said.contains("attention, decoding"), "{said}");
    let output = sandbox.run(&["bench", "w.jsonl", "-m", "tiny-llama", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report.get("busy").is_none(), "only where it was asked for: {report}");
}
