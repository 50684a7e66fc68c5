//! `valar retry --errors`: what completed keeps its lines and costs nothing, what failed is run again, and nothing is lost
//! whatever kills it.

use crate::common::{Sandbox, chat_line};
use serde_json::{Value, json};
use std::fs;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;
use valar::format::Records;
use valar::storage::{Location, Storage};

/// Rows that are too long for a small limit, rows that are always wrong, and some that share ids and contents.
fn requests(n: usize) -> String {
    let short = |i: usize, said: usize| {
        chat_line(&format!("row-{i}"), &format!("Short {said}."), json!({"max_tokens": 2, "temperature": i % 2}))
    };
    let row = |i: usize| match i % 10 {
        3 => chat_line(&format!("row-{i}"), &format!("Long {i}. {}", "la ".repeat(700)), json!({"max_tokens": 3})),
        7 if i % 20 == 7 => "broken".to_owned(),
        8 => chat_line("row-0", &format!("Used {i}."), json!({})),
        // Another row's content, in a line that is too long.
        6 if i % 20 == 16 => short(i, 0) + &" ".repeat(2000),
        _ => short(i, i / 3),
    };
    (0..n).map(|i| row(i) + "\n").collect()
}

const SMALL: &str = "--set=input.max_line_bytes=1024";
const LARGE: &str = "--set=input.max_line_bytes=1000000";

fn job<'a>(command: &[&'a str], output: &'a str, limit: &'a str) -> Vec<&'a str> {
    [command, &["-i", "in.jsonl", "-o", output, "--quiet", "--engine=null", "--set=job.window_rows=16", limit]].concat()
}

const RETRY: [&str; 2] = ["retry", "--errors"];

fn report(sandbox: &Sandbox, name: &str) -> Value {
    serde_json::from_str(&sandbox.read(name)).unwrap()
}

fn ids(sandbox: &Sandbox, name: &str) -> Vec<Value> {
    sandbox.rows(name).iter().map(|row| row["custom_id"].clone()).collect()
}

#[test]
fn errors_are_run_again_and_the_rest_is_kept() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", requests(90));
    assert!(sandbox.expect(&job(&RETRY, "out.jsonl", SMALL), 1).contains("there is no finished job"));
    assert!(!sandbox.path("out.job").exists());
    sandbox.expect(&job(&["run"], "out.jsonl", SMALL), 3);
    let (results, errors) = (sandbox.read("out.jsonl"), sandbox.read("out.errors.jsonl"));
    let before = report(&sandbox, "out.report.json");

    // As it was: all that failed fails again.
    sandbox.expect(&job(&RETRY, "out.jsonl", SMALL), 3);
    assert_eq!((sandbox.read("out.jsonl"), sandbox.read("out.errors.jsonl")), (results.clone(), errors.clone()));
    let after = report(&sandbox, "out.report.json");
    assert_eq!((&after["rows"]["retried"], &after["rows"]["failed"]), (&before["rows"]["failed"], &before["rows"]["failed"]));
    assert_eq!((&after["rows"]["errors"], &after["tokens"]["prompt"]), (&before["rows"]["errors"], &before["tokens"]["prompt"]));
    assert_eq!(after["tokens"]["prefilled"], 0, "something was computed");

    // With room for long rows: ten of them are computed, one of which was made before with other settings, and three are what
    // another of these is.
    sandbox.expect(&job(&RETRY, "out.jsonl", LARGE), 3);
    let after = report(&sandbox, "out.report.json");
    assert_eq!(after["rows"]["resumed"], before["rows"]["completed"]);
    assert_eq!(after["rows"]["completed"].as_u64(), before["rows"]["completed"].as_u64().map(|n| n + 13));
    assert_eq!(after["estimate"]["actual"]["output_tokens"], 20);
    let text = sandbox.read("out.jsonl");
    let is_new = |line: &str| {
        line.contains("3\",\"response") || ["16", "36", "56", "76"].iter().any(|i| line.contains(&format!("row-{i}\"")))
    };
    let kept: String = text.lines().filter(|line| !is_new(line)).map(|line| line.to_owned() + "\n").collect();
    assert!(kept == results, "a line that was there has changed");
    sandbox.expect(&job(&["run"], "whole.jsonl", LARGE), 3);
    for (ours, whole) in [("out.jsonl", "whole.jsonl"), ("out.errors.jsonl", "whole.errors.jsonl")] {
        assert_eq!(ids(&sandbox, ours), ids(&sandbox, whole), "{ours}");
    }
    assert!(!sandbox.path("out.job").exists());
    // It is the same job still.
    sandbox.expect(&job(&["run"], "out.jsonl", SMALL), 3);
    assert!(sandbox.read("out.jsonl") == text);

    let changed = requests(90).replace("Short 7.", "Other 7.");
    sandbox.write("in.jsonl", changed);
    assert!(sandbox.expect(&job(&RETRY, "out.jsonl", SMALL), 1).contains("other inputs"));
    sandbox.write("in.jsonl", chat_line("only", "Hi", json!({})));
    sandbox.expect(&job(&["run"], "good.jsonl", SMALL), 0);
    let (first, written) =
        (sandbox.read("good.report.json"), fs::metadata(sandbox.path("good.jsonl")).unwrap().modified().unwrap());
    sandbox.expect(&job(&RETRY, "good.jsonl", SMALL), 0);
    assert_eq!(sandbox.read("good.report.json"), first);
    assert_eq!(fs::metadata(sandbox.path("good.jsonl")).unwrap().modified().unwrap(), written);
    assert!(sandbox.expect(&[&job(&RETRY, "good.jsonl", SMALL)[..], &["--restart"]].concat(), 2).contains("--restart"));
    sandbox.expect(&job(&["retry"], "good.jsonl", SMALL), 2);
}

#[test]
fn shards_run_their_errors_again() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", requests(90));
    sandbox.expect(&job(&["run"], "whole.jsonl", SMALL), 3);
    sandbox.expect(&job(&RETRY, "whole.jsonl", LARGE), 3);
    // Merged, then retried in a cut; and retried before the merge, in the shards' own journals.
    for (output, is_merged_first) in [("merged.jsonl", true), ("open.jsonl", false)] {
        let part = |command: &[&str], shard: &str, limit: &str, code: i32| {
            sandbox.expect(&[&job(command, output, limit)[..], &["--shard", shard]].concat(), code);
        };
        for shard in ["0/2", "1/2"] {
            part(&["run"], shard, SMALL, 3);
        }
        if !is_merged_first {
            // Other settings are refused while the job is open; its own change nothing.
            part(&RETRY, "1/2", LARGE, 1);
            part(&RETRY, "1/2", SMALL, 3);
        }
        sandbox.expect(&job(&["merge"], output, SMALL), 3);
        for shard in ["0/2", "1/2"] {
            part(&RETRY, shard, LARGE, 3);
            // A shard that is done does them once more.
            part(&RETRY, shard, LARGE, 3);
        }
        sandbox.expect(&job(&["merge"], output, LARGE), 3);
        let errors = output.replace(".jsonl", ".errors.jsonl");
        for (ours, whole) in [(output, "whole.jsonl"), (&errors, "whole.errors.jsonl")] {
            assert!(sandbox.read(ours) == sandbox.read(whole), "{ours} differs from {whole}");
        }
        sandbox.expect(&job(&["merge"], output, LARGE), 3);
    }
}

#[test]
fn columns_are_kept_as_they_were() {
    let sandbox = Sandbox::new();
    let row = |i: usize| match i % 5 {
        0 => json!({"q": format!("Row {i}"), "mixed": {"a": i}, "deep": [{"x": 1.5}, null]}),
        1 => json!({"q": format!("Row {i}"), "mixed": format!("text {i}"), "big": u64::MAX}),
        2 => json!({"q": format!("Row {i} {}", "la ".repeat(700)), "mixed": [i], "only_here": true}),
        _ => json!({"q": format!("Row {i}"), "mixed": i, "deep": []}),
    };
    sandbox.write("in.jsonl", (0..60).map(|i| row(i).to_string() + "\n").collect::<String>());
    let sets = ["--set=prompt.text={{ q }}", "--set=sampling.max_tokens=2", "--set=output.prefix=r_"];
    let with = |command: &[&'static str], limit| [&job(command, "out.parquet", limit)[..], &sets].concat();
    sandbox.expect(&with(&["run"], SMALL), 3);
    let storage = Storage::new().unwrap();
    let at = Location::parse(sandbox.path("out.parquet").to_str().unwrap()).unwrap();
    let records = || {
        let (mut source, mut records) = (Records::open(&storage, std::slice::from_ref(&at), None).unwrap(), Vec::<Value>::new());
        while let Some(chunk) = source.next_chunk().unwrap() {
            records.extend(chunk.iter().map(|text| serde_json::from_slice::<Value>(text).unwrap()));
        }
        records
    };
    let (bytes, before) = (fs::read(sandbox.path("out.parquet")).unwrap(), records());
    sandbox.expect(&with(&RETRY, SMALL), 3);
    assert!(fs::read(sandbox.path("out.parquet")).unwrap() == bytes, "nothing was to change");
    sandbox.expect(&with(&RETRY, LARGE), 0);
    let after = records();
    assert_eq!((before.len(), after.len()), (48, 60));
    let old: Vec<&Value> = after.iter().enumerate().filter(|(i, _)| i % 5 != 2).map(|(_, record)| record).collect();
    for (before, after) in before.iter().zip(old) {
        for (name, value) in before.as_object().unwrap() {
            assert_eq!(&after[name], value, "{name}");
        }
    }
    assert!(after[2]["only_here"] == true && after[2]["r_usage"]["completion_tokens"] == 2, "{}", after[2]);
}

#[test]
fn a_paused_job_goes_on_without_its_errors() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", requests(2000));
    sandbox.expect(&job(&["run"], "calm.jsonl", SMALL), 3);
    let paused = |command: &[&'static str]| [&job(command, "out.jsonl", SMALL)[..], &["--max-tokens=4000"]].concat();
    sandbox.expect(&paused(&["run"]), 6);
    let state = |name: &str| {
        let shown: Value = serde_json::from_slice(&sandbox.run(&["status", "out.jsonl", "--json"]).stdout).unwrap();
        shown[name].as_u64().unwrap()
    };
    assert!(state("failed") > 0 && state("done") < 2000);
    sandbox.expect(&paused(&RETRY), 6);
    let said = sandbox.expect(&job(&RETRY, "out.jsonl", SMALL), 3);
    assert!(said.contains("became errors since it began stay errors"), "{said}");
    for (ours, calm) in [("out.jsonl", "calm.jsonl"), ("out.errors.jsonl", "calm.errors.jsonl")] {
        assert!(sandbox.read(ours) == sandbox.read(calm), "{ours} differs");
    }
}

#[test]
fn a_killed_retry_goes_on() {
    let sandbox = Sandbox::new();
    let line = |i: usize| {
        let text = if i % 4 == 1 { format!("Say {i}. {}", "la ".repeat(400)) } else { format!("Say {i}.") };
        chat_line(&format!("row-{i}"), &text, json!({"max_tokens": if i % 4 == 1 { 30 } else { 1 }, "ignore_eos": true}))
    };
    sandbox.write("in.jsonl", (0..48).map(|i| line(i) + "\n").collect::<String>());
    let args = |command: &[&'static str], output, limit| {
        let set = ["-i", "in.jsonl", "-o", output, "--quiet", "--set=engine.max_running=2", "--set=job.window_rows=16", limit];
        [command, &set].concat()
    };
    sandbox.expect(&args(&["run"], "calm.jsonl", SMALL), 3);
    for ending in ["jsonl", "errors.jsonl", "report.json"] {
        fs::copy(sandbox.path(&format!("calm.{ending}")), sandbox.path(&format!("out.{ending}"))).unwrap();
    }
    let before = sandbox.read("out.jsonl");
    sandbox.expect(&args(&RETRY, "calm.jsonl", LARGE), 0);
    let (after, again) = (sandbox.read("calm.jsonl"), args(&RETRY, "out.jsonl", LARGE));
    let segments = || {
        let names = fs::read_dir(sandbox.path("out.job")).into_iter().flatten().filter_map(Result::ok);
        names.filter(|entry| entry.file_name().to_string_lossy().starts_with("seg-")).count()
    };
    // While rows are taken over, then while they are computed.
    for wait_ms in [0, 1, 3, 10, 600, 600, 600] {
        let mut child = sandbox.command(&again).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let n_before = segments();
        while (if wait_ms < 100 { !sandbox.path("out.job/lease.json").exists() } else { segments() == n_before })
            && child.try_wait().unwrap().is_none()
        {
            sleep(Duration::from_micros(300));
        }
        sleep(Duration::from_millis(wait_ms));
        child.kill().unwrap();
        child.wait().unwrap();
        let results = sandbox.read("out.jsonl");
        assert!(results == before || results == after, "the old results are there until the new ones are");
    }
    if sandbox.path("out.job").exists() {
        let said = sandbox.expect(&args(&["run"], "out.jsonl", LARGE), 1);
        assert!(said.contains("valar retry --errors goes on with it"), "{said}");
    }
    sandbox.expect(&again, 0);
    assert!(sandbox.read("out.jsonl") == after, "the results differ");
    assert!(!sandbox.path("out.job").exists());
}

#[test]
fn an_id_that_is_read_later_is_not_used_twice() {
    let sandbox = Sandbox::new();
    let long = "la ".repeat(700);
    let line = |i: usize| match i {
        // Rows 2 and 12 can't be read at first; their ids are those of later rows, in this shard and in the next one.
        2 => chat_line("row-5", &long, json!({"max_tokens": 2})),
        4 => chat_line("row-15", &long, json!({"max_tokens": 2})),
        12 => chat_line("row-1", &long, json!({"max_tokens": 2})),
        7 => chat_line("row-7", &long, json!({"max_tokens": 2})),
        _ => chat_line(&format!("row-{i}"), &format!("Short {i}."), json!({"max_tokens": 2})),
    };
    sandbox.write("in.jsonl", (0..20).map(|i| line(i) + "\n").collect::<String>());
    for (output, shards) in [("out.jsonl", &[][..]), ("cut.jsonl", &["1/2", "0/2"][..])] {
        sandbox.expect(&job(&["run"], output, SMALL), 3);
        for shard in shards {
            sandbox.expect(&[&job(&RETRY, output, LARGE)[..], &["--shard", shard]].concat(), 3);
        }
        let last = if shards.is_empty() { job(&RETRY, output, LARGE) } else { job(&["merge"], output, LARGE) };
        sandbox.expect(&last, 3);
        let mut found: Vec<String> = ids(&sandbox, output).iter().map(|id| id.as_str().unwrap().to_owned()).collect();
        let errors = sandbox.rows(&output.replace(".jsonl", ".errors.jsonl"));
        assert_eq!(errors.iter().map(|row| row["line"].as_u64().unwrap()).collect::<Vec<_>>(), [3, 5, 13], "{output}");
        let error = &errors[0]["response"]["body"]["error"];
        let said = error["message"].as_str().unwrap();
        assert!(error["code"] == "duplicate_custom_id" && said.contains("row 5, counted from 0"), "{errors:?}");
        found.sort();
        found.dedup();
        assert_eq!((found.len(), sandbox.rows(output).len()), (17, 17), "an id stands there twice");
    }
}

#[test]
fn other_settings_count_for_the_rows_that_are_run_again() {
    let sandbox = Sandbox::new();
    let row = |i: usize, pad: usize| {
        let body = json!({"messages": [{"role": "user", "content": format!("Say {}.", i % 4)}], "temperature": 0});
        let line = json!({"custom_id": format!("row-{i}"), "method": "POST", "url": "/v1/chat/completions", "body": body});
        line.to_string() + &" ".repeat(pad) + "\n"
    };
    // Rows 4 to 7 and 12 to 15 are too long at first, by nothing that counts; their contents are those of others.
    sandbox.write("in.jsonl", (0..16).map(|i| row(i, if i % 8 > 3 { 2000 } else { 0 })).collect::<String>());
    let with =
        |command: &[&'static str], limit, tokens: &'static str| [&job(command, "out.jsonl", limit)[..], &[tokens]].concat();
    let (one, two) = ("--set=sampling.max_tokens=1", "--set=sampling.max_tokens=2");
    sandbox.expect(&with(&["run"], SMALL, one), 3);
    let before = report(&sandbox, "out.report.json");
    sandbox.expect(&with(&RETRY, LARGE, two), 0);
    let drawn = |row: &Value| row["response"]["body"]["usage"]["completion_tokens"].as_u64().unwrap();
    let rows = sandbox.rows("out.jsonl");
    for (i, row) in rows.iter().enumerate() {
        assert_eq!((row["custom_id"].as_str().unwrap(), drawn(row)), (&*format!("row-{i}"), if i % 8 > 3 { 2 } else { 1 }));
    }
    let after = report(&sandbox, "out.report.json");
    // Those that are run share what they have in common.
    assert_eq!(after["estimate"]["actual"]["output_tokens"], 8);
    assert_eq!(after["earlier"][0]["settings"], before["job_fingerprint"]);
    assert!(after["job_fingerprint"] == before["job_fingerprint"] && after["settings"] != before["settings"], "{after}");
    assert_eq!((&after["earlier"][0]["model"], after["earlier"].as_array().unwrap().len()), (&before["model"], 1));
}

#[test]
fn results_that_are_not_those_of_the_job_are_not_taken_over() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", requests(40));
    sandbox.expect(&job(&["run"], "out.jsonl", SMALL), 3);
    let text = sandbox.read("out.jsonl");
    let mut lines: Vec<&str> = text.lines().collect();
    lines.swap(1, 2);
    sandbox.write("out.jsonl", lines.join("\n") + "\n");
    let said = sandbox.expect(&job(&RETRY, "out.jsonl", LARGE), 1);
    assert!(said.contains("out.jsonl is not what out.report.json tells of"), "{said}");
    sandbox.write("out.jsonl", &text);
    sandbox.expect(&job(&RETRY, "out.jsonl", LARGE), 3);

    // Rows of another form beside those that stay.
    let rows: String = (0..20).map(|i| json!({"q": "Row ".repeat(1 + 400 * (i % 3 / 2))}).to_string() + "\n").collect();
    sandbox.write("in.jsonl", rows);
    for output in ["rows.jsonl", "rows.parquet"] {
        let with = |command: &[&'static str], limit, more: &[&'static str]| {
            [&job(command, output, limit)[..], &["--set=prompt.text={{ q }}", "--set=sampling.max_tokens=2"], more].concat()
        };
        sandbox.expect(&with(&["run"], SMALL, &["--restart"]), 3);
        for other in ["--set=output.prefix=r_", "--set=output.columns=[]", "--set=sampling.n=2"] {
            let said = sandbox.expect(&with(&RETRY, LARGE, &[other]), 1);
            assert!(said.contains("has rows of another form"), "{other}: {said}");
            assert!(!sandbox.path("rows.job").exists(), "{other} leaves something behind");
        }
        sandbox.expect(&with(&RETRY, LARGE, &["--set=sampling.temperature=0"]), 0);
    }
}
