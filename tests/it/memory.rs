//! The engine on the CPU device with a real, small model: a step allocates nothing, and rows that lose their memory and
//! get it back have the bits of rows that never did; what scoring a long prompt takes.

use crate::common::Sandbox;
use crate::fake::FakeTokens;
use crate::families;
use crate::model::TinyModel;
use candle_core::quantized::GgmlDType;
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use valar::device::cpu::{CpuDevice, Isa, Numerics};
use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, Finished, Submission};
use valar::model::{ModelFile, ModelRunner, Runner as _};
use valar::window::Class;

/// The system's allocator, counting each thread's calls.
struct Counting;

thread_local! {
    static N_ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator; counting touches no memory but a thread's own cell.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that ends has no cell any more.
        let _gone = N_ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Rows of all kinds: prompts that share a beginning, greedy and drawn, with alternatives.
fn submissions(logprobs: bool) -> Vec<Submission> {
    let prompt = |i: u32| (0..20 + 7 * i % 60).map(|t| if t < 9 + i % 5 { t * t % 61 } else { (t * 31 + i) % 61 }).collect();
    let params = |i: u32| SeqParams {
        max_tokens: 5 + 11 * i % 40,
        temperature: if i.is_multiple_of(3) { 0.0 } else { 0.9 },
        top_p: if i.is_multiple_of(2) { 1.0 } else { 0.8 },
        top_k: if i % 5 == 1 { 7 } else { 0 },
        seed: u64::from(i),
        ignore_eos: true,
        stop: vec!["never to be seen".to_owned()],
        // Every third prompt is scored, too, with and without alternatives.
        logprobs: if logprobs || i % 3 == 1 { Some([3, 0][i as usize % 2]) } else { None },
        score_from: (i % 3 == 1).then_some(1 + i % 4),
        ..SeqParams::default()
    };
    let submission = |i: u32| Submission {
        id: u64::from(i),
        prompt: prompt(i),
        params: params(i),
        class: Class::Batch,
        keep_tokens: 9,
        stream: 0,
        due: Due::NEVER,
    };
    (0..40).map(submission).collect()
}

fn engine(file: &dyn ModelFile, n_blocks: usize, cold_output_tokens: u32) -> Engine {
    let runner =
        ModelRunner::load(CpuDevice::new(Isa::detect(), Numerics::fastest(Isa::detect()), 1), file, n_blocks, 64).unwrap();
    let config = EngineConfig { max_running: 16, cold_output_tokens, ..EngineConfig::for_runner(&runner.limits()) };
    Engine::new(config, Box::new(runner), Arc::new(FakeTokens)).unwrap()
}

#[test]
fn a_step_allocates_nothing() {
    steps_allocate_nothing("tiny", &TinyModel::new(GgmlDType::Q4_0).write());
}

#[test]
fn a_step_of_any_family_allocates_nothing() {
    for name in families::MODELS {
        steps_allocate_nothing(name, &families::open(name));
    }
}

fn steps_allocate_nothing(name: &str, file: &dyn ModelFile) {
    let mut engine = engine(file, 200, 64);
    for submission in submissions(false) {
        engine.submit(submission).unwrap();
    }
    let mut finished = Vec::with_capacity(64);
    while engine.has_work() {
        let (before, n_finished) = (N_ALLOCATIONS.get(), finished.len());
        engine.step(&mut finished).unwrap();
        let n = N_ALLOCATIONS.get() - before;
        // The log-probabilities of a row that is done are put in the form that its caller gets.
        let gives = finished[n_finished..].iter().any(|row: &Finished| !row.logprobs.is_empty());
        assert!(n == 0 || gives, "{name}: {n} allocations in step {}, {} rows finished", engine.stats().steps, finished.len());
    }
    assert_eq!(finished.len(), 40);
    assert!(engine.stats().steps > 20);
}

#[test]
fn rows_that_were_preempted_have_the_same_bits() {
    let run = |n_blocks: usize| {
        // Rows are thought to be short, so that too many are let in.
        let mut engine = engine(&TinyModel::new(GgmlDType::Q4_0).write(), n_blocks, 1);
        for mut submission in submissions(true) {
            submission.params.ignore_eos = false;
            submission.params.max_tokens = 40 + submission.id as u32;
            submission.prompt = submission.prompt[..12 + submission.id as usize % 8].into();
            engine.submit(submission).unwrap();
        }
        let mut finished: Vec<Finished> = Vec::new();
        while engine.has_work() {
            engine.step(&mut finished).unwrap();
            engine.check();
        }
        finished.sort_by_key(|row| row.id);
        (finished, engine.stats().preemptions)
    };
    let (calm, none) = run(200);
    let (shaken, some) = run(12);
    assert_eq!((calm.len(), none), (40, 0));
    assert!(some >= 3, "only {some} preemptions");
    for (calm, shaken) in calm.iter().zip(&shaken) {
        assert_eq!(calm, shaken);
    }
}

/// All logits of a prompt of 2,000 tokens would be 393 MB.
#[test]
fn scoring_a_long_prompt_takes_no_more_memory_than_completing_it() {
    let sandbox = Sandbox::new();
    let prompt = "The river runs to the sea. ".repeat(285);
    let peak = |name: &str, body: Value| -> u64 {
        let line = json!({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body});
        sandbox.write(&format!("{name}.jsonl"), line.to_string());
        let (input, output) = (format!("{name}.jsonl"), format!("{name}.out.jsonl"));
        let settings = ["--set", "engine.budget_tokens=2048", "--set", "engine.memory=1GiB"];
        sandbox.expect(&[&["run", "-i", &input, "-o", &output, "--quiet"][..], &settings].concat(), 0);
        let rows = sandbox.rows(&output);
        let usage = &rows[0]["response"]["body"]["usage"];
        assert!(usage["prompt_tokens"].as_u64().unwrap() > 1900, "{usage}");
        if name == "scored" {
            let scores = &rows[0]["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"];
            assert!(scores.as_array().unwrap().len() > 1900);
        }
        let report: Value = serde_json::from_str(&sandbox.read(&format!("{name}.out.report.json"))).unwrap();
        report["peak_memory_bytes"].as_u64().unwrap()
    };
    let completed = peak("completed", json!({"prompt": prompt, "max_tokens": 1, "temperature": 0}));
    let scored = peak("scored", json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 1}));
    println!("{} MiB to score, {} MiB to complete", scored >> 20, completed >> 20);
    assert!(scored < completed + (48 << 20), "{scored} and {completed} bytes");
}
