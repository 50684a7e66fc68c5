//! What interrupts a job on a GPU: kill -9 at any moment, and rows that lose their KV blocks to others and begin again. Neither
//! changes a byte. On the stand-in for NVIDIA's libraries.

use crate::cuda_stage::{Family, Stage, line, text};
use serde_json::{Value, json};
use std::fs;
use std::process::Stdio;

/// Few rows at a time, committed often: there are many moments to be killed in.
const SETTINGS: [&str; 2] = ["engine.max_running=2", "engine.checkpoint_tokens=4"];

fn n_segments(stage: &Stage) -> usize {
    let entries = fs::read_dir(stage.sandbox.path("out.job")).into_iter().flatten();
    entries.filter_map(Result::ok).filter(|entry| entry.file_name().to_string_lossy().starts_with("seg-")).count()
}

/// Starts the job, kills it when it has committed something, and says whether it was still at work then.
fn killed_at_work(stage: &Stage) -> bool {
    let before = n_segments(stage);
    let mut command = stage.command(&stage.args("cuda", &SETTINGS));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while n_segments(stage) == before && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    let at_work = child.try_wait().unwrap().is_none() && n_segments(stage) > before;
    child.kill().unwrap();
    child.wait().unwrap();
    at_work
}

#[test]
fn a_killed_job_on_a_gpu_ends_with_the_bytes_of_an_undisturbed_one() {
    let stage = Stage::new(Family::Qwen3);
    let row = |i: u32| {
        let extra = json!({"temperature": if i.is_multiple_of(2) { 0.0 } else { 1.0 }, "seed": i, "max_tokens": 12 + i});
        line(&format!("row-{i}"), &text(5 + 9 * i as usize, i), &extra)
    };
    let lines: Vec<String> = (0..10).map(row).collect();
    stage.job("cuda", &SETTINGS, &lines);
    let undisturbed = stage.sandbox.read("out.jsonl");
    for file in ["out.jsonl", "out.errors.jsonl", "out.report.json"] {
        fs::remove_file(stage.sandbox.path(file)).unwrap();
    }
    let kills = [(); 3].map(|()| killed_at_work(&stage));
    assert!(kills[0], "it has ended before it could be killed");
    let (code, said) = stage.run("cuda", &SETTINGS);
    assert_eq!((code, &stage.sandbox.read("out.jsonl")), (Some(0), &undisturbed), "{said}");
}

/// The first rows answer in one token; those that follow are taken to do so, too, and many begin. They go on to their limit, which
/// the KV cache does not hold: some are preempted, and computed again.
#[test]
fn preempted_rows_on_a_gpu_keep_their_bits() {
    let stage = Stage::new(Family::Llama);
    // It never ends by itself, but nobody can know that.
    let row = |i: u32, max_tokens: u32| {
        let extra = json!({
            "max_tokens": max_tokens, "ignore_eos": false, "logit_bias": {"2": -100}, "temperature": 0.8, "seed": i, "logprobs": 1,
        });
        line(&format!("row-{i:02}"), &text(40 + i as usize, i), &extra)
    };
    let lines: Vec<String> = (0..26).map(|i| row(i, if i < 12 { 1 } else { 75 })).collect();
    let expected = stage.job("cuda", &["engine.max_running=3"], &lines);
    let settings = ["engine.budget_tokens=64", "engine.max_running=16", "job.window_rows=12"];
    let memory = format!("engine.memory='{}MiB'", stage.least_memory(&settings, &lines));
    let found = stage.job("cuda", &[&settings[..], &[&memory]].concat(), &lines);
    let report: Value = serde_json::from_str(&stage.sandbox.read("out.report.json")).unwrap();
    assert!(report["tokens"]["recomputed"].as_u64().unwrap() > 0, "nobody was preempted: {report}");
    assert_eq!(found, expected);
}
