//! Jobs run in parts: whatever the cut, the merged files are those of the whole job, byte for byte. And what other machines
//! see of a job: its state, and how they stop it.

use crate::common::{Sandbox, chat_line};
use crate::s3::signal;
use serde_json::{Value, json};
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

/// Rows that know of each other across any cut: the same contents, a `custom_id` used twice; and broken ones.
fn requests(n: usize) -> String {
    let row = |i: usize| match i {
        _ if i % 17 == 11 => "broken".to_owned(),
        _ if i % 13 == 5 => chat_line(&format!("row-{}", i / 2), "Who was first?", json!({})),
        _ => {
            let said = if i.is_multiple_of(3) { i % 12 } else { i };
            chat_line(
                &format!("row-{i}"),
                &format!("A prefix that many rows share, then {said}."),
                json!({"max_tokens": 1 + i % 3}),
            )
        }
    };
    (0..n).map(|i| row(i) + "\n").collect()
}

const REQUESTS: [&str; 6] = ["-i", "in.jsonl", "--quiet", "--engine", "null", "--set=job.window_rows=16"];
const DATASET: [&str; 7] = [
    "-i",
    "rows.jsonl",
    "--quiet",
    "--engine=null",
    "--set=prompt.text={{ q }}",
    "--set=sampling.temperature=0",
    "--set=job.window_rows=10",
];

/// Runs a job as a whole and in parts, the last part first.
#[track_caller]
fn check_cut(sandbox: &Sandbox, args: &[&str], ending: &str, of: usize, code: i32) {
    let whole = format!("whole{ending}");
    let cut = format!("cut-{of}{ending}");
    let job = [&["run"], args, &["-o", &cut]].concat();
    for i in (0..of).rev() {
        let shard = format!("{i}/{of}");
        let output = sandbox.run(&[&job[..], &["--shard", &shard]].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(matches!(output.status.code(), Some(0 | 3)), "{shard}: {said}");
    }
    let merge = [&["merge"], args, &["-o", &cut]].concat();
    sandbox.expect(&merge, code);
    for ending in [ending, ".errors.jsonl"] {
        let read = |name: &str| std::fs::read(sandbox.path(&format!("{name}{ending}"))).unwrap();
        assert!(read("whole") == read(&format!("cut-{of}")), "{of} shards: *{ending} differs from {whole}");
    }
    assert!(!sandbox.path(&format!("cut-{of}.job")).exists(), "state is left");
    let report: Value = serde_json::from_str(&sandbox.read(&format!("cut-{of}.report.json"))).unwrap();
    let of_whole: Value = serde_json::from_str(&sandbox.read("whole.report.json")).unwrap();
    assert_eq!(
        (&report["rows"]["failed"], &report["tokens"]["cached"]),
        (&of_whole["rows"]["failed"], &of_whole["tokens"]["cached"])
    );
    // Again: nothing to do.
    sandbox.expect(&merge, code);
}

#[test]
fn merged_requests_are_those_of_the_whole_job() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", requests(75));
    sandbox.expect(&[&["run"], &REQUESTS[..], &["-o", "whole.jsonl"]].concat(), 3);
    assert!(sandbox.read("whole.errors.jsonl").contains("duplicate_custom_id"), "the input tests nothing");
    for of in [1, 2, 3, 8] {
        check_cut(&sandbox, &REQUESTS, ".jsonl", of, 3);
    }
}

#[test]
fn shards_of_one_job_begin_at_one_time() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", requests(30));
    let job = |command: &'static str, more: &[&'static str]| {
        let args = [&[command], &REQUESTS[..], &["-o", "out.jsonl"], more].concat();
        sandbox.command(&args).env_remove("SOURCE_DATE_EPOCH").status().unwrap();
    };
    // What another job has left says nothing.
    std::fs::create_dir(sandbox.path("out.job")).unwrap();
    sandbox.write("out.job/begun.json", "{\"job\": \"other\", \"created_unix_s\": 5}");
    job("run", &["--shard", "1/2"]);
    // Refused, and leaves the time alone.
    job("run", &[]);
    job("retry", &["--errors"]);
    sleep(Duration::from_millis(1100));
    job("run", &["--shard", "0/2"]);
    job("merge", &[]);
    let created = |row: &Value| row["response"]["body"]["created"].as_u64().unwrap();
    let rows = sandbox.rows("out.jsonl");
    let report: Value = serde_json::from_str(&sandbox.read("out.report.json")).unwrap();
    assert!(rows.len() > 20 && created(&rows[0]) > 1_700_000_000);
    assert!(rows.iter().all(|row| created(row) == report["created"].as_u64().unwrap()), "rows of one job began at two times");
    assert!(!sandbox.path("out.job").exists());

    // A date that the user sets is the date, also where the job was begun before.
    job("run", &["--shard", "1/2", "--restart"]);
    for shard in ["0/2", "1/2"] {
        sandbox.expect(&[&["run"], &REQUESTS[..], &["-o", "out.jsonl", "--restart", "--shard", shard]].concat(), 3);
    }
    job("merge", &[]);
    assert!(sandbox.rows("out.jsonl").iter().all(|row| created(row) == 1_700_000_000));
}

#[test]
fn a_shard_with_memory_for_shorter_rows_is_refused_before_it_computes() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", requests(4));
    let job = |shard: &'static str, memory: &'static str| {
        let args =
            ["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "--numerics=int8", "--shard", shard, "--memory", memory];
        let output = sandbox.run(&args);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(job("0/2", "1GiB").0, Some(0));
    let (code, said) = job("1/2", "300MiB");
    assert!(code == Some(1) && said.contains("shard 0/2 has begun with rows of up to 8192 tokens"), "{said}");
    assert!(!sandbox.path("out.job/shard-00001-of-00002").exists());
    assert_eq!(job("1/2", "1GiB").0, Some(0));
    sandbox.expect(&["merge", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "--numerics=int8", "--memory", "1GiB"], 0);
    assert_eq!(sandbox.rows("out.jsonl").len(), 4);

    // One that comes later with more memory keeps to what the first one had.
    std::fs::remove_file(sandbox.path("out.report.json")).unwrap();
    std::fs::remove_file(sandbox.path("out.jsonl")).unwrap();
    std::fs::remove_file(sandbox.path("out.errors.jsonl")).unwrap();
    for (shard, memory) in [("1/2", "300MiB"), ("0/2", "1GiB")] {
        assert_eq!(job(shard, memory).0, Some(0));
    }
    sandbox.expect(&["merge", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "--numerics=int8", "--memory", "1GiB"], 0);
}

#[test]
fn merged_columns_are_those_of_the_whole_job() {
    let sandbox = Sandbox::new();
    let rows: String = (0..45).map(|i| json!({"id": i, "q": format!("Row {}?", i % 20)}).to_string() + "\n").collect();
    sandbox.write("rows.jsonl", rows);
    sandbox.expect(&[&["run"], &DATASET[..], &["-o", "whole.parquet"]].concat(), 0);
    check_cut(&sandbox, &DATASET, ".parquet", 4, 0);
}

#[test]
fn a_cut_job_says_what_it_lacks() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", requests(30));
    let job = |command: &'static str, more: &[&'static str]| [&[command], &REQUESTS[..], &["-o", "out.jsonl"], more].concat();
    let state = || {
        let output = sandbox.run(&["status", "out.jsonl", "--json"]);
        (output.status.code(), serde_json::from_slice::<Value>(&output.stdout).unwrap())
    };
    let (code, shown) = state();
    assert!(code == Some(1) && shown["state"] == "none", "{shown}");
    assert!(sandbox.expect(&job("merge", &[]), 1).contains("no shard"));
    sandbox.expect(&job("run", &["--shard", "1/2"]), 3);
    let (code, shown) = state();
    assert!(code == Some(0) && shown["rows"] == 15 && shown["done"] == 15 && shown["failed"].as_u64() > Some(0), "{shown}");
    assert!(shown["parts"][1]["shard"] == "1/2" && shown["parts"][1]["state"] == "done", "{shown}");
    assert!(sandbox.expect(&job("merge", &[]), 1).contains("shard 0/2 has not begun"));
    for other in [&[][..], &["--shard", "0/3"]] {
        assert!(sandbox.expect(&job("run", other), 1).contains("cut in another way"));
    }
    sandbox.expect(&job("run", &["--shard", "0/2"]), 3);
    let changed = sandbox.expect(&job("merge", &["--set", "sampling.top_k=3"]), 1);
    assert!(changed.contains("sampling.top_k"), "{changed}");
    sandbox.expect(&job("merge", &[]), 3);
    let (_, shown) = state();
    assert!(shown["state"] == "finished" && shown["rows"] == 30, "{shown}");
    assert!(sandbox.expect(&job("merge", &["--shard", "0/2"]), 2).contains("whole job"));
    assert!(sandbox.expect(&job("plan", &["--shard", "0/2"]), 2).contains("whole job"));
}

#[test]
fn a_budget_pauses_a_run_that_goes_on_with_another() {
    let sandbox = Sandbox::new();
    let rows: String = (0..2000).map(|i| json!({"q": format!("Row {i}, and some more?")}).to_string() + "\n").collect();
    sandbox.write("rows.jsonl", rows);
    let job = |output: &'static str, more: &[&'static str]| [&["run"], &DATASET[..], &["-o", output], more].concat();
    sandbox.expect(&job("calm.jsonl", &[]), 0);
    let mut n_pauses = 0;
    loop {
        let output = sandbox.run(&job("out.jsonl", &["--max-tokens", "8000"]));
        if output.status.code() == Some(0) {
            break;
        }
        assert_eq!(output.status.code(), Some(6), "{}", String::from_utf8_lossy(&output.stderr));
        n_pauses += 1;
        assert!(n_pauses < 20, "it does not get on");
    }
    assert!(n_pauses >= 1, "nothing was paused");
    assert_eq!(sandbox.read("out.jsonl"), sandbox.read("calm.jsonl"));
    assert!(sandbox.expect(&job("other.jsonl", &["--max-cost", "1"]), 2).contains("prices"));
}

#[test]
fn what_an_older_valar_began_is_not_touched() {
    let sandbox = Sandbox::new();
    sandbox.write("in.jsonl", requests(5));
    std::fs::create_dir(sandbox.path("out.job")).unwrap();
    sandbox.write("out.job/manifest.json", "{\"format_version\": 2}");
    sandbox.write("out.job/seg-00000001.jsonl", "{}\n");
    let job = [&["run"], &REQUESTS[..], &["-o", "out.jsonl"]].concat();
    let said = sandbox.expect(&job, 1);
    assert!(said.contains("out.job was written by an older valar") && said.contains("--restart"), "{said}");
    assert_eq!(sandbox.read("out.job/seg-00000001.jsonl"), "{}\n");
    sandbox.expect(&[&job[..], &["--restart"]].concat(), 0);
    assert!(!sandbox.path("out.job").exists());
}

#[test]
fn a_run_is_cancelled_from_outside_and_goes_on_later() {
    let sandbox = Sandbox::new();
    let rows: Vec<String> = (0..60)
        .map(|i| chat_line(&format!("row-{i}"), &format!("Say {i}."), json!({"max_tokens": 24, "ignore_eos": true})))
        .collect();
    sandbox.write("in.jsonl", rows.join("\n"));
    let more = ["--set=engine.max_running=2", "--checkpoint-tokens=8"];
    let args = [&["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet"], &more[..]].concat();
    assert!(sandbox.expect(&["cancel", "out.jsonl"], 0).contains("no run"));
    let mut run = sandbox.command(&args).stderr(Stdio::piped()).spawn().unwrap();
    // Some rows are done, and the next ones are committed as far as they came.
    while !sandbox.path("out.job/seg-00001-00000004.jsonl").exists() {
        assert!(run.try_wait().unwrap().is_none(), "it ended before it was cancelled");
        sleep(Duration::from_millis(5));
    }
    // It gets no further while others look at it.
    signal(&run, "-STOP");
    let output = sandbox.run(&["status", "out.jsonl"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("running, ") && text.contains(" of 60 rows, 0 errors; process "), "{text}");
    let cancel = sandbox.command(&["cancel", "out.jsonl"]).stderr(Stdio::piped()).spawn().unwrap();
    while !sandbox.path("out.job/cancel").exists() {
        sleep(Duration::from_millis(5));
    }
    // Now it is time to look for such a wish, which comes every half second.
    sleep(Duration::from_secs(1));
    signal(&run, "-CONT");
    let said = cancel.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&said.stderr).contains("stopped") && said.status.success(), "{said:?}");
    let ended = run.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(5), "{}", String::from_utf8_lossy(&ended.stderr));
    let text = String::from_utf8_lossy(&sandbox.run(&["status", "out.jsonl"]).stdout).into_owned();
    assert!(text.contains("out.jsonl: stopped, ") && !text.contains(" 0 of 60"), "{text}");
    sandbox.expect(&args, 0);
    assert_eq!(sandbox.rows("out.jsonl").len(), 60);
    assert!(!sandbox.path("out.job").exists());
}
