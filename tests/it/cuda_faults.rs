//! A GPU that is not there, not right, too small, or fails in the middle of a job: a clear message each, and no row lost.

use crate::cuda::tools;
use crate::cuda_stage::{CONTEXT, Family, Stage, line, text};
use serde_json::{Value, json};
use std::fs;

/// Rows of which some are drawn.
fn lines() -> Vec<String> {
    let row = |i: u32| {
        let extra = json!({"temperature": if i.is_multiple_of(2) { 0.0 } else { 1.0 }, "seed": i, "max_tokens": 6});
        line(&format!("row-{i}"), &text(4 + 7 * i as usize, i), &extra)
    };
    (0..6).map(row).collect()
}

/// Few rows at a time, so that a job has many steps, committed often.
const SETTINGS: [&str; 2] = ["engine.max_running=2", "engine.checkpoint_tokens=2"];

/// The stand-in's error for a kernel that failed (`CUDA_ERROR_LAUNCH_FAILED`), and for memory that is used up.
const LAUNCH_FAILED: u32 = 719;
const OUT_OF_MEMORY: u32 = 2;

#[test]
fn a_gpu_that_fails_costs_no_row() {
    let (mut stage, lines) = (Stage::new(Family::Llama), lines());
    stage.job("cuda", &SETTINGS, &lines);
    let undisturbed = stage.sandbox.read("out.jsonl");
    // Early in the first step, in the middle, and late.
    for n in [1, 5, 40, 180, 400] {
        fs::remove_file(stage.sandbox.path("out.jsonl")).unwrap();
        stage.set("STANDIN_FAIL", &format!("launch:{n}:{LAUNCH_FAILED}"));
        let (code, said) = stage.run_anew("cuda", &SETTINGS, &lines);
        assert_eq!(code, Some(1), "launch {n}: {said}");
        assert!(said.contains("the device failed: cuda:0: ") && said.contains("719"), "launch {n}: {said}");
        assert!(!stage.sandbox.path("out.jsonl").exists(), "launch {n}: nothing is published");
        stage.set("STANDIN_FAIL", "");
        let (code, said) = stage.run("cuda", &SETTINGS);
        assert_eq!((code, &stage.sandbox.read("out.jsonl")), (Some(0), &undisturbed), "launch {n}: {said}");
    }
}

/// A step's end is the mark behind the copy of its results: each step of a job fails there once, prompts' and those that are graphs.
#[test]
fn a_gpu_that_fails_in_any_step_costs_no_row() {
    let (mut stage, lines) = (Stage::new(Family::Mixtral), &lines()[..3]);
    let file = stage.sandbox.path("counters.json");
    stage.set("STANDIN_COUNTERS", file.to_str().unwrap());
    stage.job("cuda", &SETTINGS, lines);
    let undisturbed = stage.sandbox.read("out.jsonl");
    let counts: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    stage.set("STANDIN_COUNTERS", "");
    let n_steps = counts["calls"]["cuEventRecord"].as_u64().unwrap();
    assert!(n_steps > 8 && counts["calls"]["cuGraphLaunch"].as_u64().unwrap() > 0, "{counts}");
    for step in 1..=n_steps {
        fs::remove_file(stage.sandbox.path("out.jsonl")).unwrap();
        stage.set("STANDIN_FAIL", &format!("cuEventRecord:{step}:{LAUNCH_FAILED}"));
        let (code, said) = stage.run_anew("cuda", &SETTINGS, lines);
        assert!(code == Some(1) && said.contains("the device failed: cuda:0: "), "step {step}: {said}");
        assert!(!stage.sandbox.path("out.jsonl").exists(), "step {step}: nothing is published");
        stage.set("STANDIN_FAIL", "");
        let (code, said) = stage.run("cuda", &SETTINGS);
        assert_eq!((code, &stage.sandbox.read("out.jsonl")), (Some(0), &undisturbed), "step {step}: {said}");
    }
}

#[test]
fn memory_that_is_used_up_is_told_before_a_row_runs() {
    let mut stage = Stage::new(Family::Llama);
    let lines = lines();
    stage.sandbox.write("in.jsonl", lines.join("\n"));
    let mut n = 1;
    // Every allocation: the arena, and pinned memory.
    loop {
        stage.set("STANDIN_FAIL", &format!("alloc:{n}:{OUT_OF_MEMORY}"));
        let (code, said) = stage.run("cuda", &[]);
        if code == Some(0) {
            break;
        }
        assert!(code == Some(1) && said.contains("cuda:0") && said.contains("out of memory"), "allocation {n}: {said}");
        n += 1;
    }
    assert!(n > 3, "{n} allocations");
    let after_faults = stage.choices();
    stage.set("STANDIN_FAIL", "");
    assert_eq!(after_faults, stage.job("cuda", &[], &lines));

    stage.set("STANDIN_MEMORY", "8M");
    let (code, said) = stage.run_anew("cuda", &[], &lines);
    assert!(code == Some(1) && said.contains("not enough memory") && said.contains("of cuda:0 are free"), "{said}");
}

#[test]
fn what_is_wrong_with_a_gpu_is_said() {
    let mut stage = Stage::new(Family::Qwen3);
    stage.sandbox.write("in.jsonl", lines().join("\n"));
    let mut check = |knob: (&str, &str), device: &str, words: &[&str]| {
        stage.set(knob.0, knob.1);
        let (code, said) = stage.run(device, &[]);
        assert_eq!(code, Some(1), "{knob:?}: {said}");
        assert!(words.iter().all(|words| said.contains(words)), "{knob:?}: {said}");
        stage.set(knob.0, "");
    };
    check(("STANDIN_DRIVER", "11040"), "cuda", &["driver is for CUDA 11.4", "525"]);
    check(("STANDIN_CC", "7.5"), "cuda", &["compute capability 7.5", "8.0"]);
    check(("STANDIN_DEVICES", "0"), "cuda", &["cuInit"]);
    check(("", ""), "cuda:1", &["there is no GPU 1", "has 1"]);
    check(("", ""), "cuda:x", &["\"cuda:x\" is not one of"]);
    check(("LD_LIBRARY_PATH", "/none"), "cuda", &["no NVIDIA driver is found", "libcuda.so"]);
    // No compiler, and nothing that one has made before.
    let empty = stage.sandbox.path("empty").display().to_string();
    stage.set("VALAR_CACHE", &empty);
    stage.set("VALAR_NVRTC", "/none/libnvrtc.so");
    let (code, said) = stage.run("cuda", &[]);
    assert!(code == Some(1) && said.contains("/none/libnvrtc.so") && said.contains("VALAR_NVRTC"), "{said}");
    let (code, said) = stage.run("auto", &[]);
    assert!(code == Some(0) && said.contains("device: cpu") && said.contains("/none/libnvrtc.so"), "{said}");
}

/// `auto` takes the CPU where no GPU can be used, and says so if there seems to be one; a GPU that is only too full is an error.
#[test]
fn the_cpu_takes_no_gpus_place_in_silence() {
    let mut stage = Stage::new(Family::Llama);
    let lines = &lines()[..1];
    let restart = |stage: &Stage, settings: &[&str]| stage.run_anew("auto", settings, lines);
    stage.set("STANDIN_CC", "7.5");
    let (code, said) = restart(&stage, &[]);
    assert!(code == Some(0) && said.contains("device: cpu") && said.contains("compute capability 7.5"), "{said}");
    stage.set("STANDIN_CC", "");
    let (code, said) = restart(&stage, &["model.numerics='exact'"]);
    assert!(code == Some(0) && said.contains("device: cpu") && said.contains("CUDA computes in bfloat16"), "{said}");
    stage.set("STANDIN_MEMORY", "8M");
    let (code, said) = restart(&stage, &[]);
    assert!(code == Some(1) && said.contains("not enough memory") && said.contains("of cuda:0 are free"), "{said}");
    // No driver: there is nothing to expect.
    stage.set("LD_LIBRARY_PATH", "/none");
    let (code, said) = restart(&stage, &[]);
    assert!(code == Some(0) && said.is_empty(), "{said}");
}

/// Machine code of ours has the same bits with every driver; of PTX, the driver makes it.
#[test]
fn a_driver_that_compiles_is_part_of_the_fingerprint() {
    let mut stage = Stage::new(Family::Llama);
    let lines = &lines()[..1];
    stage.job("cuda", &[], lines);
    let with = |stage: &Stage, version: &str| {
        let report: Value = serde_json::from_str(&stage.sandbox.read("out.report.json")).unwrap();
        let device = report["device"].as_str().unwrap();
        assert!(device.starts_with("cuda compute_80 ") && device.contains(&format!(" driver={version} ")), "{device}");
    };
    with(&stage, "12090");
    stage.set("STANDIN_DRIVER", "13000");
    let (code, said) = stage.run("cuda", &[]);
    assert!(code == Some(1) && said.contains("not this job's"), "{said}");
    stage.job("cuda", &[], lines);
    with(&stage, "13000");
}

/// How long rows can be, where the KV cache limits them, is as the job began: it goes on, and is known when it is done, whatever
/// memory is free by then.
#[test]
fn a_job_is_the_same_with_more_memory_than_it_began_with() {
    let (mut stage, lines) = (Stage::new(Family::Llama), lines());
    let small = ["engine.max_running=2", "engine.checkpoint_tokens=2", "engine.budget_tokens=64", "engine.memory='11MiB'"];
    let large = ["engine.max_running=2", "engine.checkpoint_tokens=2", "engine.budget_tokens=64", "engine.memory='32MiB'"];
    let kv_tokens = |stage: &Stage| {
        let report: Value = serde_json::from_str(&stage.sandbox.read("out.report.json")).unwrap();
        report["kv_tokens"].as_u64().unwrap() as usize
    };
    stage.job("cuda", &small, &lines[..1]);
    let context = kv_tokens(&stage);
    assert!(context < CONTEXT, "the KV cache does not limit rows: it holds {context} tokens");
    // A row that is too long, but would not be with more memory: an error, and one it stays.
    let long = line("long", &text(context, 77), &json!({"max_tokens": 8}));
    let lines = [&[long], &lines[..]].concat();
    let outputs = |stage: &Stage| ["out.jsonl", "out.errors.jsonl"].map(|name| stage.sandbox.read(name));
    let (code, said) = stage.run_anew("cuda", &small, &lines);
    assert_eq!(code, Some(3), "{said}");
    let expected = outputs(&stage);
    assert!(expected[1].contains("\"long\"") && expected[1].contains(&context.to_string()), "{}", expected[1]);
    let (code, said) = stage.run("cuda", &large);
    assert_eq!((code, &outputs(&stage)), (Some(3), &expected), "it is done: {said}");

    fs::remove_file(stage.sandbox.path("out.jsonl")).unwrap();
    stage.set("STANDIN_FAIL", &format!("launch:200:{LAUNCH_FAILED}"));
    let (code, said) = stage.run_anew("cuda", &small, &lines);
    assert_eq!(code, Some(1), "{said}");
    stage.set("STANDIN_FAIL", "");
    let (code, said) = stage.run("cuda", &large);
    assert_eq!((code, &outputs(&stage)), (Some(3), &expected), "{said}");
    // Begun anew, it has the memory that there is.
    stage.job("cuda", &large, &lines[1..2]);
    assert!(kv_tokens(&stage) > context);
}

/// With kernels that were compiled before, no compiler is needed; without, they are compiled once.
#[test]
fn kernels_are_compiled_once() {
    let mut stage = Stage::new(Family::Llama);
    let cache = stage.sandbox.path("own-cache");
    stage.set("VALAR_CACHE", cache.to_str().unwrap());
    let lines = &lines()[..1];
    let first = stage.job("cuda", &[], lines);
    let n_files = fs::read_dir(cache.join("kernels")).unwrap().count();
    stage.set("VALAR_NVRTC", "/none/libnvrtc.so");
    assert_eq!(stage.job("cuda", &[], lines), first);
    assert_eq!(fs::read_dir(cache.join("kernels")).unwrap().count(), n_files);
    // `auto` takes the GPU, and says so.
    let mut args = [&stage.args("auto", &[])[..], &["--restart"]].concat();
    args.retain(|arg| *arg != "--quiet");
    let output = stage.command(&args).env("VALAR_NVRTC", tools().nvrtc).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("device: cuda:0"), "{said}");
}

#[test]
fn models_that_the_kernels_are_not_for_are_refused() {
    let stage = Stage::new(Family::Llama);
    stage.sandbox.write("in.jsonl", lines().join("\n"));
    for (model, words) in [("llama3-rope", "heads of 16 elements"), ("mixtral", "heads of ")] {
        let folder = stage.sandbox.path(model);
        fs::create_dir(&folder).unwrap();
        for entry in fs::read_dir(crate::common::golden("models").join(model)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
        fs::copy(stage.sandbox.path("tiny/tokenizer.json"), folder.join("tokenizer.json")).unwrap();
        let output =
            stage.command(&["run", "-i", "in.jsonl", "-o", "out.jsonl", "-m", model, "--device", "cuda"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(words), "{model}: {said}");
    }
}
