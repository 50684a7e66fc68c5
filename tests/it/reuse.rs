//! The cache of results that jobs share: it changes how much is computed, never what is written.

use crate::common::{Sandbox, chat_line, golden, root, splitmix64};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use valar::device::batch::{Draw, HeadRow, LogitEdit, Shaping, Want};
use valar::device::sample::{Scratch, draw};
use valar::engine::RESULT_VERSION;

/// Rows of which `changed` says which are others than the usual ones.
fn rows(changed: impl Fn(usize) -> bool) -> String {
    let row = |i: usize| {
        let text = if changed(i) { format!("Another question, {i}.") } else { format!("A question, {i}.") };
        // Drawn with a seed, drawn with a derived one, greedy.
        let extra = match i % 3 {
            0 => json!({"temperature": 1.0, "seed": i, "max_tokens": 3}),
            1 => json!({"temperature": 1.0, "max_tokens": 3, "logprobs": true, "top_logprobs": 2}),
            _ => json!({"max_tokens": 3}),
        };
        chat_line(&format!("row-{i}"), &text, extra) + "\n"
    };
    (0..100).map(row).collect()
}

fn command(sandbox: &Sandbox, output: &str, engine: &str, more: &[&str]) -> Command {
    let args = ["run", "-i", "in.jsonl", "-o", output, "--quiet", "--engine", engine, "--set", "job.window_rows=32"];
    let mut command = sandbox.command(&[&args[..], more].concat());
    command.env("VALAR_CACHE", sandbox.path("cache/valar"));
    command
}

/// Runs a job; its report.
#[track_caller]
fn run(sandbox: &Sandbox, output: &str, engine: &str, more: &[&str]) -> Value {
    let ended = command(sandbox, output, engine, more).output().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{}", String::from_utf8_lossy(&ended.stderr));
    serde_json::from_str(&sandbox.read(&output.replace(".jsonl", ".report.json"))).unwrap()
}

fn n_reused(report: &Value) -> u64 {
    report["rows"]["reused"].as_u64().unwrap()
}

/// A sandbox with a cache of its own, where the model is.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    let models = valar::config::cache_folder().unwrap().join("models");
    fs::create_dir_all(sandbox.path("cache/valar")).unwrap();
    std::os::unix::fs::symlink(models, sandbox.path("cache/valar/models")).unwrap();
    sandbox
}

fn cache(sandbox: &Sandbox, action: &str) -> String {
    let mut command = sandbox.command(&["cache", action]);
    let output = command.env("VALAR_CACHE", sandbox.path("cache/valar")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn cache_file(sandbox: &Sandbox) -> PathBuf {
    sandbox.path("cache/valar/results/results-1.sqlite")
}

#[test]
fn what_did_not_change_is_not_computed_again() {
    let sandbox = sandbox();
    sandbox.write("in.jsonl", rows(|_| false));
    assert_eq!(n_reused(&run(&sandbox, "first.jsonl", "null", &["--cache"])), 0);
    assert!(cache(&sandbox, "stats").starts_with("100 results, "), "{}", cache(&sandbox, "stats"));
    sandbox.write("in.jsonl", rows(|i| [3, 50, 98].contains(&i)));
    let second = run(&sandbox, "second.jsonl", "null", &["--cache"]);
    let without = run(&sandbox, "without.jsonl", "null", &[]);
    assert_eq!((n_reused(&second), n_reused(&without)), (97, 0));
    assert_eq!(sandbox.read("second.jsonl"), sandbox.read("without.jsonl"));
    let prefilled = |report: &Value| report["tokens"]["prefilled"].as_u64().unwrap();
    assert!(5 * prefilled(&second) < prefilled(&without), "{second:#} {without:#}");
    // Other seeds, other results: where the row gives its own, or none is drawn, they are the same.
    assert_eq!(n_reused(&run(&sandbox, "third.jsonl", "null", &["--cache", "--set", "job.seed=9"])), 67);
    // What is found is free.
    let free = run(&sandbox, "free.jsonl", "null", &["--cache", "--max-tokens", "1"]);
    assert_eq!((n_reused(&free), prefilled(&free)), (100, 0));
    cache(&sandbox, "clear");
    assert_eq!(n_reused(&run(&sandbox, "fourth.jsonl", "null", &["--cache"])), 0);
}

#[test]
fn the_models_own_answers_come_back_as_they_were() {
    let sandbox = sandbox();
    sandbox.write("in.jsonl", rows(|_| false).lines().take(12).collect::<Vec<_>>().join("\n"));
    assert_eq!(n_reused(&run(&sandbox, "first.jsonl", "model", &["--cache"])), 0);
    assert_eq!(n_reused(&run(&sandbox, "second.jsonl", "model", &["--cache"])), 12);
    assert_eq!(sandbox.read("first.jsonl"), sandbox.read("second.jsonl"));
}

#[test]
fn later_steps_and_several_choices_are_found_too() {
    let sandbox = sandbox();
    sandbox.write("in.jsonl", (0..20).map(|i| json!({"q": format!("Question {i}?")}).to_string() + "\n").collect::<String>());
    sandbox.write(
        "steps.toml",
        "[[step]]\nname = \"first\"\nprompt.user = \"{{ q }}\"\n\
         [[step]]\nname = \"second\"\nprompt.user = \"{{ steps.first.completion }} {{ q }}\"\nsampling.n = 2\n\
         [input]\nfiles = [\"in.jsonl\"]\n[output]\nfile = \"out.jsonl\"\n[sampling]\nmax_tokens = 4\n",
    );
    let run = |output: &str, more: &[&str]| {
        let args = [&["run", "steps.toml", "-o", output, "--quiet", "--engine", "null"], more].concat();
        let mut command = sandbox.command(&args);
        let ended = command.env("VALAR_CACHE", sandbox.path("cache/valar")).output().unwrap();
        assert_eq!(ended.status.code(), Some(0), "{}", String::from_utf8_lossy(&ended.stderr));
        n_reused(&serde_json::from_str(&sandbox.read(&output.replace(".jsonl", ".report.json"))).unwrap())
    };
    assert_eq!(run("first.jsonl", &["--cache"]), 0);
    assert_eq!(run("second.jsonl", &["--cache"]), 60);
    assert_eq!(run("without.jsonl", &[]), 0);
    assert_eq!(sandbox.read("second.jsonl"), sandbox.read("without.jsonl"));
    assert_eq!(sandbox.read("first.jsonl"), sandbox.read("without.jsonl"));
}

#[test]
fn jobs_use_it_at_once_and_damage_costs_nothing_but_work() {
    let sandbox = sandbox();
    sandbox.write("in.jsonl", rows(|_| false));
    run(&sandbox, "alone.jsonl", "null", &[]);
    let outputs: Vec<String> = (0..4).map(|i| format!("at-once-{i}.jsonl")).collect();
    let start = |output: &String| command(&sandbox, output, "null", &["--cache"]).stderr(Stdio::piped()).spawn().unwrap();
    let children: Vec<_> = outputs.iter().map(start).collect();
    for (child, output) in children.into_iter().zip(&outputs) {
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.code() == Some(0) && !said.contains("without the cache"), "{said}");
        assert_eq!(sandbox.read(output), sandbox.read("alone.jsonl"));
    }
    assert!(cache(&sandbox, "stats").starts_with("100 results, "));
    // Somebody who never lets go of it.
    let other = rusqlite::Connection::open(cache_file(&sandbox)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let report = run(&sandbox, "locked.jsonl", "null", &["--cache", "--set", "job.seed=7"]);
    assert_eq!(n_reused(&report), 67);
    other.execute_batch("ROLLBACK").unwrap();
    drop(other);
    for damage in [b"damaged ".repeat(1000), damaged_inside(&fs::read(cache_file(&sandbox)).unwrap())] {
        for end in ["", "-wal", "-shm"] {
            fs::remove_file(cache_file(&sandbox).with_extension(format!("sqlite{end}"))).ok();
        }
        fs::write(cache_file(&sandbox), damage).unwrap();
        let ended = command(&sandbox, "after.jsonl", "null", &["--cache", "--restart"]).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.code() == Some(0) && said.contains("without the cache"), "{said}");
        assert_eq!(sandbox.read("after.jsonl"), sandbox.read("alone.jsonl"));
    }
    cache(&sandbox, "clear");
    assert_eq!(n_reused(&run(&sandbox, "anew.jsonl", "null", &["--cache"])), 0);
}

/// A database whose first page is whole and whose others are not.
fn damaged_inside(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    file[4096..].fill(0x55);
    file
}

#[test]
fn a_size_that_is_none_is_refused() {
    let sandbox = sandbox();
    sandbox.write("in.jsonl", rows(|_| false));
    for size in ["1KiB", "much"] {
        let ended = command(&sandbox, "out.jsonl", "null", &["--cache", "--cache-size", size]).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.code() == Some(2) && said.contains("--cache-size"), "{said}");
    }
}

/// Draws as they are now; the golden file is this test's own. Where it fails because draws have changed on purpose, results of
/// before must not be found any more: raise `RESULT_VERSION`, and write the new line into the file.
#[test]
fn other_draws_are_another_version() {
    let mut state = 1;
    let logits: Vec<f32> = (0..3000).map(|_| (splitmix64(&mut state) >> 40) as f32 / (1 << 20) as f32).collect();
    let mut hasher = blake3::Hasher::new();
    let mut scratch = Scratch::new(logits.len());
    let edits = [LogitEdit { token: 7, bias: 3.0, penalty: 1.3 }, LogitEdit { token: 2000, bias: -5.0, penalty: 1.0 }];
    let mask: Vec<u32> = (0..logits.len().div_ceil(32)).map(|_| splitmix64(&mut state) as u32).collect();
    let shapings = [Shaping::default(), Shaping { edits: &edits, mask: None }, Shaping { edits: &edits, mask: Some(&mask) }];
    for position in 0..300 {
        let (temperature, seed) = ([0.0, 0.7, 1.0, 1.5][position as usize % 4], u64::from(position) << 33);
        let (top_p, top_k) = ([1.0, 0.9, 0.5][position as usize % 3], [0, 40][position as usize % 2]);
        let min_p = [0.0, 0.0, 0.0, 0.0, 0.02][position as usize % 5];
        let want = Want::Draw(Draw { temperature, top_p, top_k, min_p, seed, choice: position % 2, position, logprob: true });
        for shaping in shapings {
            let out = draw(&mut logits.clone(), &HeadRow::new(0, want, 2), shaping, &mut scratch);
            hasher.update(&out.token.to_le_bytes()).update(&out.logprob.to_bits().to_le_bytes());
        }
    }
    let found = format!("{RESULT_VERSION} {}\n", hasher.finalize().to_hex());
    assert_eq!(found, fs::read_to_string(golden("draws.txt")).unwrap());
}

/// The compiler's version is part of what completions in a format are kept by.
#[test]
fn another_compiler_is_another_version() {
    let lock: toml::Table = fs::read_to_string(root().join("Cargo.lock")).unwrap().parse().unwrap();
    let packages = lock["package"].as_array().unwrap();
    let compiler = packages.iter().find(|package| package["name"].as_str() == Some("llguidance")).unwrap();
    let source = fs::read_to_string(root().join("src/grammar.rs")).unwrap();
    let version = format!(", llguidance {}\"", compiler["version"].as_str().unwrap());
    assert!(source.contains(&version), "grammar.rs names another version than{version}");
}
