//! The program from outside: files, exit codes and messages.

use crate::common::{Sandbox, chat_line, golden, root};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs;
use valar::device::cpu::Isa;

#[test]
fn a_job_of_requests_writes_one_outcome_per_row() {
    let sandbox = Sandbox::new();
    let lines = [
        chat_line("good", "Say hello.", json!({})),
        "{ this is not JSON".to_owned(),
        chat_line("good", "Say it again.", json!({})),
        chat_line("other-model", "x", json!({"model": "gpt-9"})),
        chat_line("by-alias", "Say hello.", json!({"model": "smollm2-135m-instruct"})),
        chat_line("penalty", "x", json!({"modalities": ["audio"]})),
        chat_line("too-long", &"word ".repeat(9000), json!({})),
        chat_line("over", "x", json!({"max_tokens": 8192})),
    ];
    let mut input = lines.join("\n").into_bytes();
    input.extend_from_slice(b"\n{\"custom_id\": \"bad-utf8 \xff\"}\n");
    input.extend_from_slice(&vec![b'x'; 20 << 20]);
    input.extend_from_slice(b"\n");
    input.extend_from_slice(chat_line("last", "Say hello.", json!({})).as_bytes());
    sandbox.write("in.jsonl", input);

    sandbox.expect(&["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet"], 3);
    let results = sandbox.rows("out.jsonl");
    let ids: Vec<_> = results.iter().map(|row| row["custom_id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["good", "by-alias", "last"]);
    // Identical rows have identical answers, computed once.
    let text = |row: &Value| row["response"]["body"]["choices"][0]["message"]["content"].clone();
    assert_eq!(text(&results[0]), text(&results[1]));
    assert_eq!(results[0]["response"]["status_code"], 200);
    assert_eq!(results[0]["response"]["body"]["created"], 1_700_000_000);
    let errors: Vec<_> = sandbox
        .rows("out.errors.jsonl")
        .iter()
        .map(|row| {
            let error = &row["response"]["body"]["error"];
            (
                row["line"].as_u64().unwrap(),
                error["code"].as_str().unwrap().to_owned(),
                error["param"].as_str().map(str::to_owned),
            )
        })
        .collect();
    let error = |line: u64, code: &str, param: Option<&str>| (line, code.to_owned(), param.map(str::to_owned));
    let expected = [
        error(2, "invalid_json_line", None),
        error(3, "duplicate_custom_id", Some("custom_id")),
        error(4, "model_mismatch", Some("body.model")),
        error(6, "unsupported_parameter", Some("body.modalities")),
        error(7, "context_length_exceeded", Some("body.messages")),
        error(8, "context_length_exceeded", Some("body.max_tokens")),
        error(9, "invalid_utf8", None),
        error(10, "line_too_long", None),
    ];
    assert_eq!(errors, expected);
    let report: Value = serde_json::from_str(&sandbox.read("out.report.json")).unwrap();
    assert_eq!(
        (&report["rows"]["total"], &report["rows"]["completed"], &report["rows"]["deduplicated"]),
        (&json!(11), &json!(3), &json!(2))
    );
    assert!(!sandbox.path("out.job").exists(), "the journal is removed at the end");
}

#[test]
fn rows_may_call_the_model_by_names_that_the_job_gives_it() {
    let sandbox = Sandbox::new();
    let row = |name: &str| chat_line(name, "Say hello.", json!({"model": name, "max_tokens": 2}));
    sandbox.write("in.jsonl", [row("gpt-x"), row("org/other"), row("smollm2"), row("gpt-y")].join("\n"));
    let names = "model.served_names=[\"gpt-x\", \"org/other\"]";
    sandbox.expect(&["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "--set", names], 3);
    let ids = |file: &str| sandbox.rows(file).iter().map(|row| row["custom_id"].clone()).collect::<Vec<_>>();
    assert_eq!(ids("out.jsonl"), ["gpt-x", "org/other", "smollm2"]);
    assert_eq!(ids("out.errors.jsonl"), ["gpt-y"]);
}

/// A model's own template can do the same; steps do not bound it, since each doubles what there is.
#[test]
fn a_template_that_takes_all_memory_ends_the_program_with_a_message() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", "{\"q\": \"x\"}");
    let doubling =
        "prompt.text={% set n = namespace(t=q) %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t | length }}";
    let args = ["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "--engine", "null", "--set", doubling];
    let message = sandbox.expect(&args, 1);
    assert!(message.contains("error: a template takes more memory than it may"), "{message}");
}

#[test]
fn unusable_jobs_stop_before_any_work_with_one_message() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", chat_line("a", "x", json!({})));
    sandbox.write("bad.toml", "[input]\nfiles = [\"in.jsonl\"]\n[output]\nfile = \"o.jsonl\"\n[sampling]\ntemprature = 0\n");
    let check = |args: &[&str], code: i32, word: &str| {
        let said = sandbox.expect(args, code);
        assert!(said.contains(word), "{args:?} said: {said}");
        assert!(!sandbox.path("o.jsonl").exists() && !sandbox.path("o.report.json").exists(), "{args:?} wrote something");
    };
    check(&["run", "bad.toml"], 2, "temprature");
    check(&["run", "-i", "in.jsonl"], 2, "output");
    check(&["run", "-i", "in.jsonl", "-o", "o.jsonl", "--set", "sampling.temperature=5"], 2, "sampling.temperature");
    check(&["run", "--no-such-flag"], 2, "--no-such-flag");
    check(&["run", "-i", "nowhere.jsonl", "-o", "o.jsonl"], 1, "nowhere.jsonl");
    check(&["run", "-i", "no*thing.jsonl", "-o", "o.jsonl"], 1, "no*thing.jsonl");
    check(&["run", "-i", "in.jsonl", "-o", "o.txt"], 1, "o.txt");
    check(&["run", "-i", "in.jsonl", "-o", "in.jsonl/o.jsonl"], 1, "in.jsonl/o");
    check(&["run", "-i", "in.jsonl", "-o", "in.jsonl", "--restart"], 1, "is an input");
    check(&["bench", "in.jsonl", "--threads", "0"], 2, "engine.threads");
    check(&["run", "-i", "in.jsonl", "-o", "o.jsonl", "-m", "gpt-9"], 1, "gpt-9");
    check(&["run", "-i", "in.jsonl", "-o", "o.jsonl", "-m", "nowhere.gguf"], 1, "nowhere.gguf");
    check(&["run", "-i", "in.jsonl", "-o", "o.jsonl", "--memory", "8MiB"], 1, "memory");
    check(&["run", "-i", "in.jsonl", "-o", "o.jsonl", "--device", "tpu"], 1, "tpu");
    check(&["pull", "gpt-9"], 2, "SmolLM2-135M-Instruct");
}

#[test]
fn a_finished_job_is_not_run_again_and_not_overwritten() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", chat_line("a", "Say hello.", json!({})));
    let run = ["run", "-i", "in.jsonl", "-o", "out.jsonl"];
    sandbox.expect(&run, 0);
    let (first, report) = (sandbox.read("out.jsonl"), sandbox.read("out.report.json"));
    sandbox.expect(&run, 0);
    assert_eq!((sandbox.read("out.jsonl"), sandbox.read("out.report.json")), (first.clone(), report), "nothing was done again");
    sandbox.write("in.jsonl", chat_line("b", "Say hello.", json!({})));
    // What is there is not touched by a job that can't replace it, nor by one that asks to but can't run.
    for refused in [&run[..], &["run", "-i", "in.jsonl", "-o", "out.parquet"], &["bench", "in.jsonl", "-o", "out.jsonl"]] {
        let said = sandbox.expect(refused, 1);
        assert!(said.contains("--restart"), "{said}");
    }
    sandbox.expect(&["run", "-i", "in.jsonl", "-o", "out.jsonl", "--restart", "--memory", "8MiB"], 1);
    assert_eq!(sandbox.read("out.jsonl"), first);
    assert!(!sandbox.path("out.job").exists());
    sandbox.expect(&["run", "-i", "in.jsonl", "-o", "out.jsonl", "--restart"], 0);
    assert_eq!(sandbox.rows("out.jsonl")[0]["custom_id"], "b");
}

#[test]
fn parameters_do_what_they_say() {
    let sandbox = Sandbox::new();
    let question = "Count from one to ten in English words.";
    let lines = [
        chat_line("plain", question, json!({"max_tokens": 24})),
        chat_line("stop", question, json!({"max_tokens": 24, "stop": ["3.", "zzz"]})),
        chat_line("logprobs", question, json!({"max_tokens": 3, "logprobs": true, "top_logprobs": 2})),
        chat_line("seed-a", question, json!({"max_tokens": 16, "temperature": 1.5, "seed": 1})),
        chat_line("seed-b", question, json!({"max_tokens": 16, "temperature": 1.5, "seed": 1})),
        chat_line("seed-c", question, json!({"max_tokens": 16, "temperature": 1.5, "seed": 2})),
        chat_line("no-seed", question, json!({"max_tokens": 16, "temperature": 1.5})),
        chat_line("top-k-1", question, json!({"max_tokens": 24, "temperature": 1.5, "top_k": 1})),
        chat_line("eos", "Reply with the single word: yes", json!({"max_tokens": 40, "ignore_eos": true})),
        json!({"custom_id": "text", "method": "POST", "url": "/v1/completions",
               "body": {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 4, "logprobs": 1}})
        .to_string(),
    ];
    sandbox.write("in.jsonl", lines.join("\r\n"));
    sandbox.expect(&["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet"], 0);
    let rows = sandbox.rows("out.jsonl");
    let body = |id: &str| rows.iter().find(|r| r["custom_id"] == id).unwrap()["response"]["body"].clone();
    let text = |id: &str| body(id)["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert!(text("plain").contains("3."), "{}", text("plain"));
    assert_eq!(text("plain").split("3.").next(), Some(text("stop").as_str()));
    assert_eq!(body("stop")["choices"][0]["finish_reason"], "stop");
    assert_eq!(text("top-k-1"), text("plain"));
    assert_eq!(text("seed-a"), text("seed-b"));
    assert_ne!(text("seed-a"), text("seed-c"));
    assert!(body("no-seed")["seed"].is_u64(), "a derived seed is written with the row");
    assert_eq!(body("eos")["usage"]["completion_tokens"], 40);
    let entries = body("logprobs")["choices"][0]["logprobs"]["content"].clone();
    assert_eq!(entries.as_array().unwrap().len(), 3);
    for entry in entries.as_array().unwrap() {
        assert_eq!(entry["top_logprobs"][0]["token"], entry["token"], "a greedy token is the likeliest");
        assert_eq!(entry["top_logprobs"][0]["logprob"], entry["logprob"]);
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
    }
    let completion = &body("text")["choices"][0];
    assert_eq!(completion["text"].as_str().unwrap().trim_start().split([' ', '.', ',']).next(), Some("Paris"));
    assert_eq!(completion["logprobs"]["tokens"].as_array().unwrap().len(), 4);
}

/// Every pipeline of the repository runs, to both kinds of output.
#[test]
fn every_pipeline_runs() {
    for entry in fs::read_dir(root().join("pipelines")).unwrap() {
        let path = entry.unwrap().path();
        let sandbox = Sandbox::new();
        std::os::unix::fs::symlink(root().join("datasets"), sandbox.path("datasets")).unwrap();
        for output in ["out/short.jsonl", "out/short.parquet"] {
            let pipeline = path.to_str().unwrap();
            let args = ["run", pipeline, "--limit", "3", "-o", output, "--set", "sampling.max_tokens=4", "--quiet"];
            sandbox.expect(&args, 0);
            let report: Value = serde_json::from_str(&sandbox.read("out/short.report.json")).unwrap();
            assert_eq!(report["rows"]["completed"], 3, "{pipeline}");
            fs::remove_dir_all(sandbox.path("out")).unwrap();
        }
    }
}

#[test]
fn help_teaches() {
    let sandbox = Sandbox::new();
    let output = sandbox.run(&["run", "--help"]);
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in ["--set", "--input", "--output", "--restart", "out.errors.jsonl", "Examples"] {
        assert!(help.contains(word), "{word} is not in:\n{help}");
    }
    let output = sandbox.run(&["models"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("SmolLM2-135M-Instruct"));
}

#[test]
fn bench_prints_what_it_measured() {
    let sandbox = Sandbox::new();
    sandbox.write("w.jsonl", [chat_line("a", "x", json!({})), chat_line("b", "x", json!({}))].join("\n"));
    let output = sandbox.run(&["bench", "w.jsonl", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["rows"]["completed"], 2);
    assert_eq!(report["rows"]["deduplicated"], 0, "a benchmark computes every row");
    for field in ["prefill_tokens_per_s", "decode_tokens_per_s", "busy_share"] {
        assert!(report["rates"][field].as_f64().unwrap() > 0.0, "{field}");
    }
    assert!((0.0..=1.0).contains(&report["rates"]["tail_share"].as_f64().unwrap()), "{report}");
    assert!(report["peak_memory_bytes"].as_u64().unwrap() > 0);
}

/// Groups of rows with long common beginnings, in an order that shares nothing by chance, over several windows, with KV
/// memory for a fraction of them: what is prefilled is what an independent count of the prompts' trie says, and little more.
#[test]
fn bench_plan_counts_what_the_order_is_worth() {
    let sandbox = Sandbox::new();
    let prompt = |i: u32| -> Vec<u32> {
        let (group, row) = (i % 23, i / 23);
        (0..150 + group).map(|k| 100 + (group * 31 + k * 7) % 900).chain((0..5 + i % 40).map(|k| 2000 + row * 50 + k)).collect()
    };
    let line = |i: u32| {
        let body = json!({"prompt": prompt(i), "max_tokens": 3 + i % 50, "ignore_eos": true, "temperature": 0});
        json!({"custom_id": format!("{i}"), "method": "POST", "url": "/v1/completions", "body": body}).to_string()
    };
    let rows: Vec<u32> = (0..920).collect();
    sandbox.write("w.jsonl", rows.iter().map(|&i| line(i)).collect::<Vec<_>>().join("\n"));
    let output = sandbox.run(&["bench", "plan", "w.jsonl", "--json", "--prompts", "prompts.jsonl", "--kv-share", "0.1"]);
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    let prompts: Vec<Vec<u32>> = sandbox.read("prompts.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (mut found, mut wanted) = (prompts.clone(), rows.iter().map(|&i| prompt(i)).collect::<Vec<_>>());
    found.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
    let nodes: HashSet<&[u32]> = prompts.iter().flat_map(|prompt| (1..=prompt.len()).map(|n| &prompt[..n])).collect();
    assert_eq!(outcome["minimum"], nodes.len());
    assert_eq!(outcome["prompt_tokens"], prompts.iter().map(Vec::len).sum::<usize>());
    let ratio = outcome["prefilled"].as_f64().unwrap() / nodes.len() as f64;
    assert!((1.0..=1.02).contains(&ratio), "{outcome}");
    assert!(outcome["time_by_parts"].is_null() && (0.0..0.1).contains(&outcome["tail"].as_f64().unwrap()), "{outcome}");
    // Groups cut in two: as one job each group's beginning is computed once, and steps are fuller.
    for (name, rows) in [("a.jsonl", &rows[..400]), ("b.jsonl", &rows[400..])] {
        sandbox.write(name, rows.iter().map(|&i| line(i)).collect::<Vec<_>>().join("\n"));
    }
    let both = sandbox.run(&["bench", "plan", "a.jsonl", "b.jsonl", "--json", "--kv-share", "0.1"]);
    let both: Value = serde_json::from_slice(&both.stdout).unwrap();
    assert_eq!((&both["minimum"], &both["prefilled"]), (&outcome["minimum"], &outcome["prefilled"]));
    assert!((0.8..1.0).contains(&both["time_by_parts"].as_f64().unwrap()), "{both}");
}

/// What is lost is next to nothing in f32, a little in keys and values of 8 bits, more in activations of 8 bits.
#[test]
fn bench_quality_tells_what_numbers_cost() {
    let sandbox = Sandbox::new();
    let text = golden("ppl_sherlock_20k.ids.json");
    let choices = ["--chunks", "1", "--numerics", "exact,int8", "--types", "file,Q8_0", "--json"];
    let output = sandbox.run(&[&["bench", "quality", text.to_str().unwrap()][..], &choices].concat());
    let said = String::from_utf8(output.stdout).unwrap();
    let found: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kl = |weights: &str, numerics: &str, kv: &str| {
        let row = found
            .iter()
            .find(|row| (&row["weights"], &row["numerics"], &row["kv"]) == (&json!(weights), &json!(numerics), &json!(kv)));
        row.unwrap()["kl_mean"].as_f64().unwrap()
    };
    assert_eq!(found.len(), 8, "{said}");
    assert!((0.0..1e-5).contains(&kl("file", "exact", "floats")), "{said}");
    assert!((1e-5..1e-2).contains(&kl("file", "exact", "int8")), "{said}");
    assert!((1e-4..2e-2).contains(&kl("file", "int8", "floats")), "{said}");
    assert!((1e-5..1e-2).contains(&kl("Q8_0", "exact", "floats")), "{said}");
    assert!(
        found
            .iter()
            .all(|row| (row["perplexity"].as_f64().unwrap() / found[0]["perplexity"].as_f64().unwrap() - 1.0).abs() < 0.02),
        "{said}"
    );
    let wrong = sandbox.expect(&["bench", "quality", text.to_str().unwrap(), "--types", "Q9"], 2);
    assert!(wrong.contains("Q9"), "{wrong}");
}

/// Rows by the hundred thousand, each with an id to remember and an error to write: memory stays where it was.
#[test]
fn memory_does_not_grow_with_the_input() {
    let peak_bytes = |n_rows: usize| {
        let sandbox = Sandbox::new();
        let line = |i: usize| {
            format!(r#"{{"custom_id": "a-row-with-a-name-of-its-own-{i}", "method": "POST", "url": "/v1/embeddings"}}"#)
        };
        sandbox.write("in.jsonl", (0..n_rows).map(line).collect::<Vec<_>>().join("\n"));
        // The same for both, whatever other processes leave free.
        let memory = ["--memory", "1GiB"];
        let args = ["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "--set", "job.window_rows=1000"];
        sandbox.expect(&[&args[..], &memory].concat(), 3);
        let report: Value = serde_json::from_str(&sandbox.read("out.report.json")).unwrap();
        assert_eq!(report["rows"]["errors"], json!({"url_mismatch": n_rows}));
        report["peak_memory_bytes"].as_u64().unwrap()
    };
    // The smaller one fills what is held at a time: windows, segments, buffers. The larger input has 19 MB, its errors 87 MB.
    let (small, large) = (peak_bytes(30_000), peak_bytes(200_000));
    assert!(large < small + (40 << 20), "{} MiB with 30,000 rows, {} MiB with 200,000", small >> 20, large >> 20);
}

#[test]
fn every_path_of_the_cpu_writes_the_same_files() {
    let sandbox = Sandbox::new();
    let lines: Vec<_> = (0..3).map(|i| chat_line(&format!("row-{i}"), &"so ".repeat(i + 1), json!({"max_tokens": 3}))).collect();
    sandbox.write("in.jsonl", lines.join("\n"));
    let run = |path: &str| {
        let args = ["run", "-i", "in.jsonl", "-o", "out.jsonl", "--numerics", "int8", "--restart", "--quiet"];
        sandbox.command(&args).env("VALAR_CPU", path).output().unwrap()
    };
    let mut truth = None;
    for isa in Isa::available() {
        let output = run(isa.name());
        assert!(output.status.success(), "{}: {}", isa.name(), String::from_utf8_lossy(&output.stderr));
        let written = sandbox.read("out.jsonl");
        assert_eq!(truth.get_or_insert_with(|| written.clone()), &written, "{}", isa.name());
    }
    let output = run("sse9");
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("VALAR_CPU") && said.contains("\"sse9\"") && said.contains("portable"), "{said}");
}
