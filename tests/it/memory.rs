//! The engine on the CPU device with a real, small model: a step allocates nothing, and rows that lose their memory and
//! get it back have the bits of rows that never did; what scoring a long prompt takes; that weights and KV take what was said.

use crate::common::{Sandbox, model_path};
use crate::fake::FakeTokens;
use crate::families;
use crate::model::TinyModel;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file;
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use valar::device::BLOCK_TOKENS;
use valar::device::batch::{Batch, BatchSeq, StepOutput};
use valar::device::cpu::{CpuDevice, Isa, Kv, Numerics};
use valar::engine::sampling::SeqParams;
use valar::engine::{Due, Engine, EngineConfig, Finished, Submission};
use valar::gguf::Gguf;
use valar::model::{Model, ModelFile, ModelRunner, Runner as _, sizing};
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

fn engine(file: &dyn ModelFile, (n_blocks, max_step_tokens): (usize, usize), cold_output_tokens: u32) -> Engine {
    let runner =
        ModelRunner::load(CpuDevice::new(Isa::detect(), Numerics::fastest(Isa::detect()), 1), file, n_blocks, max_step_tokens)
            .unwrap();
    let config = EngineConfig { max_running: 16, cold_output_tokens, ..EngineConfig::for_runner(&runner.limits()) };
    Engine::new(config, Box::new(runner), Arc::new(FakeTokens)).unwrap()
}

#[test]
fn a_step_allocates_nothing() {
    for sizes in [(200, 64), (200, 256)] {
        steps_allocate_nothing("tiny", &TinyModel::new(GgmlDType::Q4_0).write(), sizes);
    }
}

#[test]
fn a_step_of_any_family_allocates_nothing() {
    for name in families::MODELS {
        steps_allocate_nothing(name, &families::open(name), (200, 256));
    }
}

fn steps_allocate_nothing(name: &str, file: &dyn ModelFile, sizes: (usize, usize)) {
    let mut engine = engine(file, sizes, 64);
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
        let mut engine = engine(&TinyModel::new(GgmlDType::Q4_0).write(), (n_blocks, 64), 1);
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

/// Tokens of a step of `a_process_of_its_own`.
const STEP: usize = 64;
/// Says to `a_process_of_its_own` which file it loads, numerics, form of keys and values, and how many blocks of them.
const LOADS: &str = "VALAR_TEST_LOADS";

/// A number of `/proc/self/status`, bytes.
fn own_bytes(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Loads a model's weights, or, if there is to be a cache, all of it, and stores a key and a value in every block: that touches all
/// pages. Says what was predicted and what was taken, bytes; `most` is with what of the file was held then.
#[test]
#[ignore = "what weights_and_kv_take_what_was_predicted runs in processes of their own"]
fn a_process_of_its_own() {
    let loads = std::env::var(LOADS).unwrap();
    let [numerics, kv, n_blocks, path] = *loads.splitn(4, ' ').collect::<Vec<_>>() else { panic!("{loads}") };
    let file = Gguf::open(Path::new(path)).unwrap();
    let spec = file.spec().unwrap();
    let n_blocks: usize = n_blocks.parse().unwrap();
    let device = CpuDevice::new(Isa::detect(), Numerics::named(numerics).unwrap(), 1).with_kv(Kv::named(kv).unwrap());
    let sizes = sizing(&device, &spec, &file, STEP);
    file.release();
    let (before, resident_before) = (own_bytes("RssAnon:"), own_bytes("VmRSS:"));
    let (mut model, mut runner) = (None, None);
    if n_blocks == 0 {
        model.replace(Model::load(&device, &file).unwrap());
    } else {
        let runner = runner.insert(ModelRunner::load(device, &file, n_blocks, STEP).unwrap());
        for first in (0..n_blocks).step_by(STEP) {
            let mut batch = Batch::default();
            for block in first..n_blocks.min(first + STEP) {
                let (token_start, table_start) = (batch.tokens.len() as u32, batch.block_tables.len() as u32);
                batch.seqs.push(BatchSeq { token_start, n_tokens: 1, first_position: 0, table_start, n_blocks: 1 });
                batch.tokens.push(1);
                batch.positions.push(0);
                batch.block_tables.push(block as u32);
            }
            runner.run(&batch, &mut StepOutput::default()).unwrap();
        }
    }
    let (taken, most) = (own_bytes("RssAnon:") - before, own_bytes("VmHWM:") - resident_before);
    let found = json!({"weights": sizes.weights_bytes, "kv_block": sizes.kv_block_bytes, "taken": taken, "most": most});
    println!("{found}");
}

/// What a process says that loads a model.
fn taken(path: &Path, (numerics, kv): (Numerics, Kv), n_blocks: usize) -> BTreeMap<String, u64> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "memory::a_process_of_its_own", "--ignored", "--nocapture"]);
    let loads = format!("{} {} {n_blocks} {}", numerics.name(), kv.name(), path.display());
    let output = command.env(LOADS, loads).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(said.lines().find(|line| line.starts_with('{')).unwrap()).unwrap()
}

/// How far what a model takes is from what was predicted.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn check(&mut self, what: &str, (numerics, kv): (Numerics, Kv), (taken, predicted): (u64, u64)) {
        const BOUND: f64 = 0.05;
        let off = taken as f64 / predicted as f64 - 1.0;
        if off.abs() > BOUND {
            let (numerics, kv) = (numerics.name(), kv.name());
            self.0.push(format!("{what}, {numerics}, {kv}: {taken} bytes, predicted {predicted}, {:+.2} %", 100.0 * off));
        }
    }

    /// Weights alone. What the process says.
    fn weights(&mut self, path: &Path, name: &str, numerics: Numerics) -> BTreeMap<String, u64> {
        let found = taken(path, (numerics, Kv::Floats), 0);
        self.check(&format!("{name}: weights"), (numerics, Kv::Floats), (found["taken"], found["weights"]));
        found
    }

    /// The cache: what more blocks take, besides what a step needs. Bytes of a block as predicted.
    fn kv(&mut self, path: &Path, name: &str, (numerics, kv): (Numerics, Kv)) -> u64 {
        let [few, many] = [1, 9].map(|n| taken(path, (numerics, kv), n * STEP));
        let predicted = 8 * STEP as u64 * few["kv_block"];
        self.check(&format!("{name}: KV"), (numerics, kv), (many["taken"] - few["taken"], predicted));
        few["kv_block"]
    }
}

/// A llama of some ten million random weights.
fn middle_model(dtype: GgmlDType) -> TinyModel {
    const WIDTH: usize = 512;
    const FFN: usize = 1536;
    let mut model = TinyModel { tensors: BTreeMap::new(), ..TinyModel::new(GgmlDType::F32) };
    let numbers = [("block_count", 4), ("embedding_length", WIDTH), ("feed_forward_length", FFN), ("attention.head_count", 8)];
    for (key, number) in [&numbers[..], &[("attention.head_count_kv", 4), ("attention.key_length", 64)]].concat() {
        model.set(&format!("llama.{key}"), gguf_file::Value::U32(number as u32));
    }
    model.add("token_embd.weight", &[4096, WIDTH], dtype);
    model.add("output_norm.weight", &[WIDTH], GgmlDType::F32);
    for layer in 0..4 {
        for part in ["attn_norm", "ffn_norm"] {
            model.add(&format!("blk.{layer}.{part}.weight"), &[WIDTH], GgmlDType::F32);
        }
        for (part, rows, columns) in [
            ("attn_q", 512, WIDTH),
            ("attn_k", 256, WIDTH),
            ("attn_v", 256, WIDTH),
            ("attn_output", WIDTH, 512),
            ("ffn_gate", FFN, WIDTH),
            ("ffn_up", FFN, WIDTH),
            ("ffn_down", WIDTH, FFN),
        ] {
            model.add(&format!("blk.{layer}.{part}.weight"), &[rows, columns], dtype);
        }
    }
    model
}

/// What a user plans a machine by: weights and KV cache take what `valar inspect` says, within 5 %, in each type of weights,
/// numerics and form of keys and values; and while they are loaded, most of the file is not held.
#[test]
#[cfg(target_os = "linux")]
fn weights_and_kv_take_what_was_predicted() {
    let (sandbox, mut faults) = (Sandbox::new(), Faults::default());
    for dtype in [GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q8_0, GgmlDType::BF16, GgmlDType::F32] {
        let (path, model) = (sandbox.path("model.gguf"), middle_model(dtype));
        let metadata: Vec<_> = model.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = model.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &tensors).unwrap();
        for numerics in Numerics::ALL {
            faults.weights(&path, &format!("{dtype:?}"), numerics);
            if dtype == GgmlDType::Q4_0 {
                for kv in Kv::ALL {
                    faults.kv(&path, &format!("{dtype:?}"), (numerics, kv));
                }
            }
        }
    }
    // The default model, and inspect itself.
    let output = sandbox.run(&["inspect", model_path().to_str().unwrap(), "--json"]);
    let inspected: Value = serde_json::from_slice(&output.stdout).unwrap();
    let file_bytes = std::fs::metadata(model_path()).unwrap().len();
    for numerics in Numerics::ALL {
        let found = faults.weights(&model_path(), "the default model", numerics);
        let memory = &inspected["memory"][numerics.name()];
        assert_eq!(memory["weights_bytes"], found["weights"]);
        let held = found["most"].saturating_sub(found["taken"]);
        assert!(held < file_bytes / 2, "{held} of {file_bytes} bytes of the file");
    }
    for (kv, name) in [(Kv::Floats, "kv_bytes_per_1k_tokens"), (Kv::Int8, "int8_kv_bytes_per_1k_tokens")] {
        let of_block = faults.kv(&model_path(), "the default model", (Numerics::Int8, kv));
        assert_eq!(inspected["memory"]["int8"][name], of_block * 1000_u64.div_ceil(BLOCK_TOKENS as u64));
    }
    assert!(faults.0.is_empty(), "{}", faults.0.join("\n"));
}
