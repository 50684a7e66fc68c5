//! Graphs of steps in which each row has one token: what is launched, the same bits as without, and what fails in making or launching
//! them. On the stand-in for NVIDIA's libraries.

use crate::cuda_stage::{Family, Stage, line, text};
use serde_json::{Value, json};
use std::fs;

/// What the stand-in has counted in a job.
struct Counts(Value);

impl Counts {
    fn of(&self, call: &str) -> u64 {
        self.0["calls"][call].as_u64().unwrap_or(0)
    }

    /// Kernels and products that no graph has launched.
    fn outside(&self) -> u64 {
        self.of("launch") - self.of("launch in a graph")
    }
}

/// A job of these lines; its choices, and what was counted.
fn counted(stage: &mut Stage, settings: &[&str], lines: &[String]) -> (Value, Counts) {
    let file = stage.sandbox.path("counters.json");
    stage.set("STANDIN_COUNTERS", file.to_str().unwrap());
    let choices = json!(stage.job("cuda", settings, lines));
    (choices, Counts(serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap()))
}

/// Rows of some tokens that answer with so many each.
fn answers(n_rows: u32, max_tokens: u32) -> Vec<String> {
    let extra = json!({"max_tokens": max_tokens, "logprobs": 1});
    (0..n_rows).map(|i| line(&format!("row-{i}"), &text(9 + i as usize, i), &extra)).collect()
}

#[test]
fn a_step_of_single_tokens_is_one_launch() {
    let mut stage = Stage::new(Family::Llama);
    for n_rows in [1, 3] {
        let (_, prompt) = counted(&mut stage, &[], &answers(n_rows, 1));
        assert_eq!((prompt.of("cuGraphLaunch"), prompt.of("launch in a graph")), (0, 0), "a prompt's step has none");
        let (_, two) = counted(&mut stage, &[], &answers(n_rows, 2));
        let of_step = two.outside() - prompt.outside();
        assert_eq!(two.of("cuGraphLaunch"), 0, "the first of its form is launched as it is");
        for max_tokens in [4, 14] {
            let (_, counts) = counted(&mut stage, &[], &answers(n_rows, max_tokens));
            // The prompts; a first step of one token; then graphs.
            let n_replayed = u64::from(max_tokens) - 2;
            assert_eq!(counts.of("cuGraphLaunch"), n_replayed, "{n_rows} rows of {max_tokens} tokens");
            assert_eq!(counts.outside(), two.outside());
            assert_eq!(counts.of("launch in a graph"), n_replayed * of_step);
            // It was captured once, and nothing else was made anew.
            assert_eq!(["cuStreamBeginCapture_v2", "cuGraphInstantiateWithFlags"].map(|call| counts.of(call)), [1, 1]);
            assert_eq!(["cuMemAlloc_v2", "cuMemHostAlloc", "alloc"].map(|call| counts.of(call) == prompt.of(call)), [true; 3]);
            // A copy to the device and one back for each step more.
            let n_steps = u64::from(max_tokens) - 1;
            for call in ["cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"] {
                assert_eq!(counts.of(call), prompt.of(call) + n_steps, "{call}");
            }
        }
        stage.set("VALAR_CUDA_GRAPHS", "0");
        let (choices, without) = counted(&mut stage, &[], &answers(n_rows, 14));
        assert_eq!((without.of("cuGraphLaunch"), without.of("cuStreamBeginCapture_v2")), (0, 0));
        assert_eq!(without.outside(), prompt.outside() + 13 * of_step);
        stage.set("VALAR_CUDA_GRAPHS", "");
        assert_eq!(counted(&mut stage, &[], &answers(n_rows, 14)).0, choices);
    }
}

/// Rows of all kinds: with prefixes in common, over the end of a segment of attention, with everything that changes logits, of
/// several lengths, so that there are fewer and fewer.
fn rows() -> Vec<String> {
    let (stem, long) = (text(150, 200), text(1017, 201));
    let prompt = |i: usize| match i % 4 {
        0 => format!("{stem}{}", text(1 + i, i as u32)),
        1 => text(5 + 9 * i, i as u32),
        2 => format!("{stem}{}", text(40, i as u32)),
        _ => text(3, i as u32),
    };
    let row = |i: usize| {
        let extra = json!({
            "max_tokens": 4 + i, "temperature": if i.is_multiple_of(2) { 0.0 } else { 1.1 }, "seed": i, "logprobs": if i.is_multiple_of(3) { 3 } else { 1 },
            "top_p": if i.is_multiple_of(3) { 0.9 } else { 1.0 }, "top_k": if i % 4 == 1 { 7 } else { 0 },
            "repetition_penalty": if i % 3 == 1 { 1.2 } else { 1.0 }, "logit_bias": if i % 5 == 2 { json!({"9": 3}) } else { json!({}) },
        });
        line(&format!("row-{i:02}"), &prompt(i), &extra)
    };
    let over = line("long", &long, &json!({"max_tokens": 12, "logprobs": 1}));
    (0..11).map(row).chain([over]).collect()
}

#[test]
fn a_row_has_the_same_bits_with_graphs_and_without() {
    for family in [Family::Llama, Family::Qwen3, Family::Mixtral] {
        let mut stage = Stage::new(family);
        stage.set("VALAR_CUDA_GRAPHS", "0");
        let lines = rows();
        let expected = json!(stage.job("cuda", &[], &lines));
        stage.set("VALAR_CUDA_GRAPHS", "");
        for settings in [&[][..], &["engine.max_running=5"], &["engine.max_running=1"]] {
            let (found, counts) = counted(&mut stage, settings, &lines);
            assert_eq!(found, expected, "{settings:?}");
            let n_captured = counts.of("cuStreamBeginCapture_v2");
            assert!(n_captured >= 2 && counts.of("cuGraphLaunch") > n_captured, "{settings:?}: {:?}", counts.0["calls"]);
        }
        // In another order of blocks and warps, and with work done early.
        stage.set("STANDIN_SEED", "7");
        assert_eq!(json!(stage.job("cuda", &[], &lines)), expected);
    }
}

/// Where little of the GPU is free, its driver is not asked for graphs, which take of it.
#[test]
fn no_graph_is_made_where_little_memory_is_free() {
    let mut stage = Stage::new(Family::Llama);
    let lines = answers(2, 8);
    let (expected, much) = counted(&mut stage, &[], &lines);
    assert!(much.of("cuGraphLaunch") > 0);
    stage.set("STANDIN_MEMORY", "80M");
    let (found, little) = counted(&mut stage, &[], &lines);
    assert_eq!((found, little.of("cuStreamBeginCapture_v2")), (expected, 0));
}

#[test]
fn a_graph_that_fails_costs_no_row() {
    let mut stage = Stage::new(Family::Llama);
    let (lines, settings) = (answers(6, 7), ["engine.max_running=2", "engine.checkpoint_tokens=2"]);
    // Steps that are launched as they are.
    let (_, first_two) = counted(&mut stage, &settings, &answers(2, 2));
    let (_, counts) = counted(&mut stage, &settings, &lines);
    let undisturbed = stage.sandbox.read("out.jsonl");
    let in_graph = counts.of("launch") - 5;
    let failures = [
        ("cuStreamBeginCapture_v2:1:900".to_owned(), "cuStreamBeginCapture"),
        ("cuStreamEndCapture:1:901".to_owned(), "cuStreamEndCapture"),
        ("cuGraphInstantiateWithFlags:1:2".to_owned(), "cuGraphInstantiate: out of memory"),
        ("cuGraphLaunch:1:700".to_owned(), "cuGraphLaunch"),
        ("cuGraphLaunch:5:719".to_owned(), "cuGraphLaunch"),
        // A kernel in a graph; whoever waits is told.
        (format!("launch:{in_graph}:719"), "cuEventSynchronize"),
        // While it is captured.
        (format!("cuLaunchKernel:{}:701", first_two.of("cuLaunchKernel") + 3), "cuLaunchKernel"),
    ];
    for (fault, words) in &failures {
        fs::remove_file(stage.sandbox.path("out.jsonl")).unwrap();
        stage.set("STANDIN_FAIL", fault);
        let (code, said) = stage.run_anew("cuda", &settings, &lines);
        assert_eq!(code, Some(1), "{fault}: {said}");
        assert!(said.contains("the device failed: cuda:0: ") && said.contains(words), "{fault}: {said}");
        assert!(!stage.sandbox.path("out.jsonl").exists(), "{fault}: nothing is published");
        stage.set("STANDIN_FAIL", "");
        let (code, said) = stage.run("cuda", &settings);
        assert_eq!((code, &stage.sandbox.read("out.jsonl")), (Some(0), &undisturbed), "{fault}: {said}");
    }
}
