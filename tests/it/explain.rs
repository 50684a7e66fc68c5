//! `valar plan`, `valar inspect`, the null engine, completions and the manual page, from outside.

use crate::common::{Sandbox, chat_line, model_path};
use serde_json::{Value, json};

/// A sandbox whose cache has the model and nothing else.
fn with_own_cache() -> Sandbox {
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.path("cache")).unwrap();
    std::os::unix::fs::symlink(model_path().parent().unwrap(), sandbox.path("cache/models")).unwrap();
    sandbox
}

fn run(sandbox: &Sandbox, args: &[&str], code: i32) -> String {
    let output = sandbox.command(args).env("VALAR_CACHE", sandbox.path("cache")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "valar {}: {said}", args.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

fn plan(sandbox: &Sandbox, args: &[&str]) -> Value {
    let text = run(sandbox, &[&["plan", "--json"][..], args].concat(), 0);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Prompts of known lengths, all ways to be invalid or the same as another.
fn requests() -> String {
    let row = |id: &str, tokens: Vec<u32>, max_tokens: u32| {
        let body = json!({"prompt": tokens, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true});
        json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body}).to_string() + "\n"
    };
    let beginning = |tail: u32| (100..140).chain([tail]).collect::<Vec<u32>>();
    [
        row("a", beginning(1), 4),
        row("b", beginning(2), 4),
        row("c", beginning(3), 4),
        row("same as a", beginning(1), 4),
        "not JSON\n".to_owned(),
        row("a", vec![5], 4),
        row("alone", vec![7; 20], 4),
        row("no such token", vec![99_999_999], 4),
    ]
    .concat()
}

#[test]
fn a_plan_says_what_a_run_then_does() {
    let sandbox = with_own_cache();
    sandbox.write("in.jsonl", requests());
    let planned = plan(&sandbox, &["-i", "in.jsonl", "--price-input", "2", "--price-output", "10"]);
    assert_eq!(planned["rows"]["total"], 8);
    assert_eq!(
        (&planned["rows"]["valid"], &planned["rows"]["invalid"], &planned["rows"]["duplicates"]),
        (&json!(5), &json!(3), &json!(1))
    );
    let invalid = &planned["rows"]["first_invalid"];
    let shown = |i: usize| (invalid[i]["line"].as_u64().unwrap(), invalid[i]["code"].as_str().unwrap());
    assert_eq!([shown(0), shown(1), shown(2)], [(5, "invalid_json_line"), (6, "duplicate_custom_id"), (8, "invalid_value")]);
    let tokens = &planned["prompt_tokens"];
    assert_eq!(
        (&tokens["total"], &tokens["p50"], &tokens["p95"], &tokens["max"]),
        (&json!(184), &json!(41), &json!(41), &json!(41))
    );
    // The copy costs nothing; three rows share forty tokens; one shares nothing.
    assert_eq!(planned["sharing"]["tree_tokens"], 40 + 3 + 20);
    assert_eq!(planned["sharing"]["saved_tokens"], json!(184 - planned["sharing"]["prefill_tokens"].as_u64().unwrap()));
    assert_eq!(planned["output_tokens"], json!({"low": 16.0, "high": 16.0}));
    assert_eq!(planned["seconds"], Value::Null, "nothing was measured");
    // 184 prompt tokens at 2 and 20 generated ones at 10 the million.
    let price = planned["price"]["tokens"]["high"].as_f64().unwrap();
    assert!((price - (184.0 * 2.0 + 20.0 * 10.0) / 1e6).abs() < 1e-12, "{price}");
    assert!(!sandbox.path("out.jsonl").exists() && !sandbox.path("out.job").exists(), "a plan writes nothing");

    run(&sandbox, &["run", "-i", "in.jsonl", "-o", "out.jsonl", "-q"], 3);
    let report: Value = serde_json::from_str(&sandbox.read("out.report.json")).unwrap();
    let estimate = &report["estimate"];
    assert_eq!(estimate["prefill_tokens"], planned["sharing"]["prefill_tokens"]);
    assert_eq!(estimate["prefill_tokens"], estimate["actual"]["prefill_tokens"]);
    assert_eq!(estimate["actual"]["output_tokens"], 16);
    assert_eq!(estimate["seconds"], Value::Null);
    let (low, high) = (estimate["steps"]["low"].as_f64().unwrap(), estimate["steps"]["high"].as_f64().unwrap());
    let steps = estimate["actual"]["steps"].as_f64().unwrap();
    assert!(low - 2.0 <= steps && steps <= high + 2.0, "{estimate}");
}

#[test]
fn a_calibrated_plan_knows_the_time_and_later_ones_remember() {
    let sandbox = with_own_cache();
    let rows: String = (0..20)
        .map(|i| chat_line(&format!("r{i}"), &format!("Count to {i}."), json!({"ignore_eos": true, "max_tokens": 20})) + "\n")
        .collect();
    sandbox.write("in.jsonl", rows);
    let args = ["-i", "in.jsonl", "--memory", "1GiB", "--price-hour", "3600"];
    let calibrated = plan(&sandbox, &[&args[..], &["--calibrate"]].concat());
    let (low, high) = (calibrated["seconds"]["low"].as_f64().unwrap(), calibrated["seconds"]["high"].as_f64().unwrap());
    assert!(0.0 < low && low < high, "{calibrated}");
    let price = calibrated["price"]["machine"]["high"].as_f64().unwrap();
    assert!((price / high - 1.0).abs() < 1e-12, "a second costs one: {price} for {high}");
    let remembered = plan(&sandbox, &args);
    assert_eq!(remembered["seconds"], calibrated["seconds"]);
    assert_eq!(remembered["speed"]["measurements"], 1);
    let table = run(&sandbox, &[&["plan"][..], &args].concat(), 0);
    for word in ["rows", "prompt tokens", "saved by sharing", "KV cache peak", "steps", "tokens/s: prefill", "price of hours"] {
        assert!(table.contains(word), "no {word} in\n{table}");
    }
    // The run sets the estimate against what it took.
    let output = sandbox
        .command(&["run", "-i", "in.jsonl", "--memory", "1GiB", "-o", "out.jsonl"])
        .env("VALAR_CACHE", sandbox.path("cache"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("were expected"), "{said}");
    let report: Value = serde_json::from_str(&sandbox.read("out.report.json")).unwrap();
    assert_eq!(report["estimate"]["seconds"], calibrated["seconds"]);
}

#[test]
fn a_plan_stops_where_a_run_would() {
    let sandbox = with_own_cache();
    sandbox.write("in.jsonl", requests());
    run(&sandbox, &["plan", "-i", "nowhere.jsonl"], 1);
    run(&sandbox, &["plan"], 2);
    run(&sandbox, &["plan", "-i", "in.jsonl", "--price-hour", "-1"], 2);
    run(&sandbox, &["plan", "-i", "in.jsonl", "--set", "prompt.user={{ oops"], 1);
    sandbox.write("empty.jsonl", "");
    assert_eq!(plan(&sandbox, &["-i", "empty.jsonl"])["rows"]["total"], 0);
}

#[test]
fn a_model_can_be_inspected() {
    let sandbox = with_own_cache();
    let found: Value = serde_json::from_str(&run(&sandbox, &["inspect", "smollm2", "--json"], 0)).unwrap();
    for (key, wanted) in [
        ("architecture", json!("llama")),
        ("layers", json!(30)),
        ("width", json!(576)),
        ("heads", json!(9)),
        ("kv_heads", json!(3)),
        ("context", json!(8192)),
        ("vocabulary", json!(49152)),
        ("file_bytes", json!(98_362_432)),
        ("parameters", json!(134_515_008)),
    ] {
        assert_eq!(found[key], wanted, "{key}");
    }
    let n_bytes: u64 = found["tensors"].as_object().unwrap().values().map(|t| t["bytes"].as_u64().unwrap()).sum();
    assert_eq!(found["memory"]["int8"]["weights_bytes"], n_bytes);
    assert_eq!(found["tensors"]["F32"]["count"], 61, "two norms a layer and the last one");
    assert_eq!(found["tokenizer"]["end"][0]["text"], "<|im_end|>");
    // Keys and values of 30 layers, 3 heads of 64, for 1008 tokens: at least a byte each.
    for numerics in ["int8", "int8-bf16", "bf16", "exact"] {
        let memory = &found["memory"][numerics];
        assert!(memory["kv_bytes_per_1k_tokens"].as_u64().unwrap() >= 30 * 2 * 3 * 64 * 1008, "{numerics}");
        // A byte an element, and a scale of 4 bytes for each key and value of a head.
        assert_eq!(memory["int8_kv_bytes_per_1k_tokens"], 30 * 2 * 3 * (64 + 4) * 1008, "{numerics}");
        assert!(memory["weights_bytes"].as_u64().unwrap() >= n_bytes, "{numerics}");
    }
    let table = run(&sandbox, &["inspect", model_path().to_str().unwrap()], 0);
    for word in ["llama", "134.5 M", "Q4_1", "byte-level BPE", "<|im_end|>", "chat template", "per 1k tokens of KV"] {
        assert!(table.contains(word), "no {word} in\n{table}");
    }
    run(&sandbox, &["inspect", "no-such-model"], 1);
}

/// Every row gets its own last prompt token back: nothing is lost, doubled or mixed up between the windows.
#[test]
fn the_null_engine_echoes_every_row() {
    let sandbox = with_own_cache();
    let n_rows = 5000_u32;
    let id = |i: u32| 1000 + i * 7 % 30_000;
    let rows: String = (0..n_rows)
        .map(|i| {
            let body = json!({"prompt": [i % 97 + 500, i / 97 + 300, id(i)], "max_tokens": 5, "temperature": 0});
            json!({"custom_id": format!("r{i}"), "method": "POST", "url": "/v1/completions", "body": body}).to_string() + "\n"
        })
        .collect();
    sandbox.write("in.jsonl", rows);
    run(&sandbox, &["run", "--engine", "null", "-i", "in.jsonl", "-o", "out.jsonl", "-q", "--set", "job.window_rows=700"], 0);
    let gguf = valar::gguf::Gguf::open(&model_path()).unwrap();
    let tokenizer = valar::text::tokenizer::Tokenizer::from_gguf(&gguf).unwrap();
    let results = sandbox.rows("out.jsonl");
    assert_eq!(results.len(), n_rows as usize);
    for (i, row) in (0..).zip(&results) {
        assert_eq!(row["custom_id"], format!("r{i}"));
        let body = &row["response"]["body"];
        assert_eq!(body["choices"][0]["text"], tokenizer.decode(&[id(i)]), "row {i}");
        assert_eq!(body["usage"]["completion_tokens"], 2, "the echo and the end token");
    }
    let report: Value = serde_json::from_str(&sandbox.read("out.report.json")).unwrap();
    assert_eq!((&report["device"], &report["rows"]["completed"]), (&json!("null"), &json!(n_rows)));
    for phase in ["read", "prepare", "index", "plan", "answer", "journal", "finalise"] {
        assert!(report["seconds"][phase].as_f64().unwrap() > 0.0, "{phase} took no time");
    }
    // The answers of nothing are not mixed with a model's.
    run(&sandbox, &["run", "-i", "in.jsonl", "-o", "out.jsonl", "-q"], 1);
}

#[test]
fn shells_and_man_know_the_commands() {
    let sandbox = Sandbox::new();
    for (shell, word) in [("bash", "complete -F"), ("zsh", "#compdef valar"), ("fish", "complete -c valar")] {
        let script = run(&sandbox, &["completions", shell], 0);
        assert!(script.contains(word) && script.contains("inspect") && script.contains("calibrate"), "{shell}");
    }
    run(&sandbox, &["completions", "tcl"], 2);
    let page = run(&sandbox, &["man"], 0);
    assert!(page.contains(".TH valar 1"), "{}", &page[..200]);
    for word in ["VALAR RUN", "VALAR PLAN", "Exit codes"] {
        assert!(page.contains(word), "no {word} in the manual page");
    }
    // A script that bash itself takes.
    sandbox.write("c.bash", run(&sandbox, &["completions", "bash"], 0));
    let path = sandbox.path("c.bash");
    let bash =
        std::process::Command::new("bash").arg("-c").arg(format!(". {} && complete -p valar", path.display())).output().unwrap();
    assert!(bash.status.success(), "{}", String::from_utf8_lossy(&bash.stderr));
}
