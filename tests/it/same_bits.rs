//! Same row, same bits: whatever a job does with its rows, each row's tokens and log-probabilities stay the same to the
//! last bit. The real program, model and CPU device; `conformance` does the same below, operation by operation.

use crate::common::{Sandbox, chat_line};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use valar::device::cpu::Isa;

/// Rows that share prefixes of all kinds: whole blocks, ends inside a block, nothing.
fn lines() -> Vec<String> {
    let stem = "You are given a list of facts about rivers, seas and mountains. Read it well before you answer. ";
    let prompts = [
        "Hi".to_owned(),
        stem.to_owned(),
        format!("{stem}The Nile is long."),
        format!("{stem}The Nile is longer than the Rhine."),
        format!("{stem}{stem}Which is the longest?"),
        format!("{stem}{stem}Which is the shortest?"),
        format!("{}What is this?", stem.repeat(14)),
        "Write a word.".to_owned(),
    ];
    prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| {
            let extra = json!({"max_tokens": 6 + i, "temperature": if i % 2 == 0 { 0.0 } else { 1.2 }, "seed": i,
                               "top_p": if i % 3 == 0 { 0.9 } else { 1.0 }, "ignore_eos": true, "logprobs": true, "top_logprobs": 4});
            chat_line(&format!("row-{i}"), prompt, extra)
        })
        .collect()
}

/// Each row's choice, as text: JSON writes floats so that they come back to the same bits.
fn choices(settings: &[&str], lines: &[String]) -> BTreeMap<String, String> {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", lines.join("\n"));
    let mut args = vec!["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet"];
    args.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    sandbox.expect(&args, 0);
    let choice = |row: &Value| row["response"]["body"]["choices"][0].to_string();
    sandbox.rows("out.jsonl").iter().map(|row| (row["custom_id"].to_string(), choice(row))).collect()
}

#[test]
fn a_row_has_the_same_bits_however_the_job_runs() {
    let lines = lines();
    let expected = choices(&[], &lines);
    assert_eq!(expected.len(), lines.len());
    let mut reversed = lines.clone();
    reversed.reverse();
    let check = |what: &str, found: &BTreeMap<String, String>| {
        for (id, choice) in found {
            assert_eq!(choice, &expected[id], "row {id}, {what}");
        }
    };
    check("alone", &choices(&[], &lines[3..4]));
    check("in another order", &choices(&["engine.threads=1"], &reversed));
    check("one after the other", &choices(&["engine.max_running=1", "engine.threads=3"], &lines));
    check("in small chunks", &choices(&["engine.budget_tokens=23", "engine.threads=2"], &lines));
    // Weights take 16 bits instead of 5 where bfloat16 is the fastest.
    let little = if Isa::detect().has_tiles() { "engine.memory=325MB" } else { "engine.memory=150MB" };
    check("in little memory", &choices(&[little], &lines));
    check("in small windows", &choices(&["job.window_rows=3", "engine.budget_tokens=100"], &lines));
}

/// Whatever was identical before, in whatever window, is computed once; its answer is as if it were computed again.
#[test]
fn identical_rows_are_computed_once_over_the_whole_job() {
    let prompts = ["What is rain?", "What is snow?", "What is rain?", "Say hi.", "What is rain?", "What is snow?", "Say hi."];
    let requests = |i: usize, prompt: &&str| {
        let extra = json!({"max_tokens": 4, "logprobs": true, "top_logprobs": 2, "seed": 7, "temperature": 0.5});
        let mut line: Value = serde_json::from_str(&chat_line(&format!("row-{i}"), prompt, extra)).expect("JSON");
        if i == 4 {
            // The same tokens for another endpoint: an answer of another form.
            line["url"] = "/v1/completions".into();
            let prompt = "<|im_start|>user\nWhat is rain?<|im_end|>\n<|im_start|>assistant\n";
            let body = json!({"prompt": prompt, "max_tokens": 4, "logprobs": 2, "seed": 7, "temperature": 0.5});
            line["body"] = body;
        }
        line.to_string()
    };
    let columns = |i: usize, prompt: &&str| json!({"i": i, "prompt": prompt}).to_string();
    let lines = |line: &dyn Fn(usize, &&str) -> String| {
        prompts.iter().enumerate().map(|(i, prompt)| line(i, prompt)).collect::<Vec<_>>().join("\n")
    };
    for (name, input) in [("requests", lines(&requests)), ("columns", lines(&columns))] {
        let sandbox = Sandbox::new();
        sandbox.write("in.jsonl", input);
        sandbox.write("x.toml", "[input]\nfiles = [\"in.jsonl\"]\n[output]\nfile = \"out.jsonl\"\n[prompt]\ntext = \"{{ prompt }}\"\n[sampling]\ntemperature = 0\nmax_tokens = 4\nlogprobs = 2\n");
        let run = |settings: &[&str]| {
            let mut args =
                if name == "columns" { vec!["run", "x.toml"] } else { vec!["run", "-i", "in.jsonl", "-o", "out.jsonl"] };
            args.extend(["--quiet", "--restart"]);
            args.extend(settings.iter().flat_map(|setting| ["--set", setting]));
            sandbox.expect(&args, 0);
            let report: Value = serde_json::from_str(&sandbox.read("out.report.json")).expect("a report");
            // What windows share with the one before is in the minimum too: no engine could beat it.
            assert!(report["tokens"]["prefill_ratio"].as_f64().expect("a ratio") >= 1.0, "{}", report["tokens"]);
            (sandbox.rows("out.jsonl"), report["rows"]["deduplicated"].as_u64().expect("a count"))
        };
        let without_counts = |mut rows: Vec<Value>| {
            for row in &mut rows {
                for path in [
                    "/response/body/usage/prompt_tokens_details/cached_tokens",
                    "/usage/cached_tokens",
                    "/response/body/system_fingerprint",
                ] {
                    row.pointer_mut(path).map(Value::take);
                }
                for path in ["/id", "/response/request_id", "/response/body/id"] {
                    if let Some(id) = row.pointer_mut(path) {
                        // Ids are derived from the job, and whether it deduplicates is part of what it is.
                        *id = id.as_str().expect("an id").trim_end_matches(|c: char| c.is_ascii_hexdigit()).into();
                    }
                }
            }
            rows
        };
        let (plain, none) = run(&["job.dedup=false"]);
        let (rows, some) = run(&["job.window_rows=2"]);
        assert_eq!((none, some), (0, if name == "columns" { 4 } else { 3 }), "{name}");
        for row in &rows {
            let id = row["id"].as_str().unwrap_or_default();
            assert!(rows.iter().filter(|other| other["id"] == id).count() <= 1, "{name}: an id twice");
        }
        assert_eq!(without_counts(rows), without_counts(plain), "{name}");
    }
}
