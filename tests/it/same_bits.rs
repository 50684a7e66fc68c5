//! Same row, same bits: whatever a job does with its rows, each row's tokens and log-probabilities stay the same to the
//! last bit. The real program, model and CPU device; `conformance` does the same below, operation by operation.

use crate::common::{Sandbox, chat_line};
use serde_json::{Value, json};
use std::collections::BTreeMap;

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
    check("in little memory", &choices(&["engine.memory=150MB"], &lines));
    check("in small windows", &choices(&["job.window_rows=3", "engine.budget_tokens=100"], &lines));
}
