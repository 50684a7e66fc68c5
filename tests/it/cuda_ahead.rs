//! Steps that are launched before what the step before has drawn was read: in which order the driver is called, the same bytes as one
//! step after the other, and what a fault in the middle costs. On the stand-in for NVIDIA's libraries.

use crate::cuda_stage::{Family, Stage, line, text};
use serde_json::{Value, json};
use std::fs;

/// What a job did, step by step, as its driver saw it.
#[derive(Debug, PartialEq, Eq)]
struct Steps {
    /// Steps that had been launched to their end (their results' copy included) each time that the results of one were waited for.
    launched: Vec<usize>,
    /// Calls of the driver from the end of each such wait to the first launch, or to the next wait if that came first.
    between: Vec<usize>,
}

impl Steps {
    fn of(order: &str) -> Self {
        let (mut steps, mut n_launched) = (Self { launched: Vec::new(), between: Vec::new() }, 0);
        let mut calls = None;
        for call in order.lines().filter(|call| call.starts_with("cu")) {
            match call {
                "cuEventSynchronize" => {
                    steps.between.extend(calls.replace(0));
                    steps.launched.push(n_launched);
                }
                "cuGraphLaunch" | "cuLaunchKernel" => steps.between.extend(calls.take()),
                _ => {
                    n_launched += usize::from(call == "cuEventRecord");
                    calls = calls.map(|n| n + 1);
                }
            }
        }
        steps
    }
}

/// Runs a job of these lines; its output, and what it did.
fn ordered(stage: &mut Stage, settings: &[&str], lines: &[String]) -> (String, Steps) {
    let file = stage.sandbox.path("order.txt");
    stage.set("STANDIN_ORDER", file.to_str().unwrap());
    stage.job("cuda", settings, lines);
    let order = fs::read_to_string(&file).unwrap();
    stage.set("STANDIN_ORDER", "");
    (stage.sandbox.read("out.jsonl"), Steps::of(&order))
}

#[test]
fn a_step_is_launched_before_the_one_before_was_waited_for() {
    let mut stage = Stage::new(Family::Llama);
    let rows = |extra: &Value| (0..3).map(|i| line(&format!("row-{i}"), &text(9 + i as usize, i), extra)).collect::<Vec<_>>();
    let plain = rows(&json!({"max_tokens": 12}));
    let (output, steps) = ordered(&mut stage, &[], &plain);
    // All are known to end with the twelfth.
    let ahead: Vec<usize> = (2..=12).chain([12]).collect();
    assert_eq!(steps.launched, ahead);
    stage.set("VALAR_CUDA_AHEAD", "0");
    let (waited, steps) = ordered(&mut stage, &[], &plain);
    assert_eq!((&waited, steps.launched), (&output, (1..=12).collect()));
    // What the host has to do before the GPU is at work again: it needs its context, and its words.
    assert!(steps.between.iter().all(|&n| n >= 2), "{:?}", steps.between);
    stage.set("VALAR_CUDA_AHEAD", "");
    // Edits of what was drawn, and masks, are the host's.
    for extra in [json!({"max_tokens": 12, "frequency_penalty": 0.5}), json!({"max_tokens": 12, "logit_bias": {"9": 1}})] {
        let (_, steps) = ordered(&mut stage, &[], &rows(&extra));
        assert_eq!(steps.launched, (1..=12).collect::<Vec<_>>(), "{extra}");
    }
}

/// Rows of many lengths that end in all ways: by themselves, at stop strings and tokens, at their most tokens; some with what only the
/// host can do between steps, all gone early.
fn rows() -> Vec<String> {
    let stem = text(70, 300);
    let row = |i: u32| {
        let prompt = if i.is_multiple_of(3) { format!("{stem}{}", text(2 + i as usize, i)) } else { text(4 + 5 * i as usize, i) };
        let mut extra = json!({
            "ignore_eos": i.is_multiple_of(4), "max_tokens": 20 + 3 * i, "temperature": if i % 4 == 1 { 0.0 } else { 1.5 },
            "seed": i, "min_tokens": if i % 5 == 1 { 6 } else { 0 },
        });
        if i % 3 == 1 {
            extra["stop"] = json!(["e", "ab", "9"]);
        }
        if i % 3 == 2 {
            extra["stop_token_ids"] = json!([5, 9, 14, 20, 23, 30, 36, 41, 47, 50, 55, 60]);
        }
        if i % 6 == 5 {
            extra["logprobs"] = json!(2);
        }
        if i == 4 {
            extra["repetition_penalty"] = json!(1.3);
            extra["max_tokens"] = json!(9);
        }
        line(&format!("row-{i:02}"), &prompt, &extra)
    };
    (0..16).map(row).collect()
}

#[test]
fn a_job_is_the_same_bytes_as_one_step_after_the_other() {
    let mut stage = Stage::new(Family::Llama);
    let all = rows();
    let lines = [2, 4, 7, 8, 10].map(|i| all[i].clone());
    stage.set("VALAR_CUDA_AHEAD", "0");
    let (expected, one_by_one) = ordered(&mut stage, &[], &lines);
    let ends: Vec<Value> = stage.choices().values().map(|choices| choices[0]["finish_reason"].clone()).collect();
    assert!(["stop", "length"].iter().all(|end| ends.iter().any(|found| found == end)), "{ends:?}");
    stage.set("VALAR_CUDA_AHEAD", "");
    let mut n_steps = Vec::new();
    for settings in [&[][..], &["engine.max_running=2", "engine.checkpoint_tokens=2"]] {
        let (found, steps) = ordered(&mut stage, settings, &lines);
        assert_eq!(found, expected, "{settings:?}");
        let n_ahead = (1..).zip(&steps.launched).filter(|&(n, &launched)| launched > n).count();
        assert!(2 * n_ahead > steps.launched.len(), "{settings:?}: {:?}", steps.launched);
        n_steps.push(steps.launched.len());
    }
    // One more at its end at most.
    assert!(n_steps[0] <= one_by_one.launched.len() + 1, "{n_steps:?}");
    // With work done early, in another order of warps, and without graphs.
    stage.set("STANDIN_SEED", "11");
    stage.set("VALAR_CUDA_GRAPHS", "0");
    assert_eq!(ordered(&mut stage, &["engine.max_running=3"], &lines).0, expected);
}

#[test]
fn a_fault_at_any_launch_costs_no_row() {
    let mut stage = Stage::new(Family::Llama);
    let (lines, settings) = (&rows()[..7], ["engine.max_running=3", "engine.checkpoint_tokens=2"]);
    let file = stage.sandbox.path("counters.json");
    stage.set("STANDIN_COUNTERS", file.to_str().unwrap());
    stage.job("cuda", &settings, lines);
    let (undisturbed, counts) = (stage.sandbox.read("out.jsonl"), fs::read_to_string(&file).unwrap());
    let counts: Value = serde_json::from_str(&counts).unwrap();
    let n_of = |what: &str| counts["calls"][what].as_u64().unwrap();
    stage.set("STANDIN_COUNTERS", "");
    let mut faults: Vec<String> = (0..8).map(|i| format!("launch:{}:719", 1 + i * n_of("launch") / 8)).collect();
    for call in ["cuEventRecord", "cuEventSynchronize", "cuMemcpyDtoHAsync_v2", "cuGraphLaunch"] {
        faults.extend([1, n_of(call) / 2, n_of(call) - 3].map(|n| format!("{call}:{n}:700")));
    }
    // The first ones are of weights.
    faults.push(format!("cuMemcpyHtoDAsync_v2:{}:700", n_of("cuMemcpyHtoDAsync_v2") - 5));
    for fault in faults {
        fs::remove_file(stage.sandbox.path("out.jsonl")).unwrap();
        stage.set("STANDIN_FAIL", &fault);
        let (code, said) = stage.run_anew("cuda", &settings, lines);
        assert!(code == Some(1) && said.contains("the device failed: cuda:0: "), "{fault}: {said}");
        stage.set("STANDIN_FAIL", "");
        let (code, said) = stage.run("cuda", &settings);
        assert_eq!((code, &stage.sandbox.read("out.jsonl")), (Some(0), &undisturbed), "{fault}: {said}");
    }
}
