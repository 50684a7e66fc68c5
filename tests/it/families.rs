//! Model families against `transformers`: tiny models of random weights (`tests/golden/make_model_golden.py`) on both
//! devices, from Hugging Face folders and from GGUF files made of them; and the same models with one mistake planted.

use crate::common::{golden, root};
use crate::model::run_side_by_side;
use crate::oracle;
use serde::Deserialize;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use valar::device::Device;
use valar::device::cpu::{CpuDevice, Isa, Numerics};
use valar::device::reference::Reference;
use valar::hf::HfFolder;
use valar::model::{ModelFile, ModelRunner, ModelSpec, Runner};
use valar::tensor::Tensor;

/// All models of `tests/golden/models`.
pub(crate) const MODELS: [&str; 12] = [
    "llama3-rope",
    "llama-linear-rope",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "qwen3-moe-unnormalised",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3-partial",
];

/// Nats that the reference device may be off: both compute in f32, but in another order.
pub(crate) const REFERENCE_TOLERANCE: f32 = 1e-4;
/// The CPU device keeps keys and values as halves. The worst of the 480 values of a model is 0.002 (gemma2) to 0.045
/// (qwen2) off; these are models of large random weights, where a rounding grows more than in trained ones.
pub(crate) const CPU_TOLERANCE: f32 = 0.05;

/// What `transformers` says of a text.
#[derive(Deserialize)]
pub(crate) struct Expected {
    tokens: Vec<u32>,
    /// Per position, likely next tokens and their log-probabilities.
    top: Vec<Vec<(u32, f32)>>,
}

pub(crate) fn open(name: &str) -> HfFolder {
    HfFolder::open(&golden("models").join(name)).unwrap()
}

pub(crate) fn expected(name: &str) -> Expected {
    let path = golden("models").join(name).join("expected.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

pub(crate) fn reference(file: &dyn ModelFile) -> Box<dyn Runner> {
    Box::new(ModelRunner::load(Reference, file, 20, 256).unwrap())
}

pub(crate) fn cpu(file: &dyn ModelFile) -> Box<dyn Runner> {
    Box::new(ModelRunner::load(CpuDevice::new(Isa::detect(), Numerics::F32, 2), file, 20, 256).unwrap())
}

/// The largest difference of a log-probability from the expected one, in nats. A token that is not among the 20 likeliest
/// counts with the 20th's.
pub(crate) fn difference(mut runner: Box<dyn Runner>, expected: &Expected) -> f32 {
    let rows = run_side_by_side(&mut *runner, &[&expected.tokens]);
    assert_eq!(rows.len(), expected.top.len());
    let mut worst = 0.0f32;
    for (row, top) in rows.iter().zip(&expected.top) {
        assert!(!row.is_broken());
        for &(token, want) in top {
            let found = row.top.iter().find(|entry| entry.0 == token).unwrap_or(&row.top[19]);
            worst = worst.max((found.1 - want).abs());
        }
    }
    worst
}

#[test]
fn every_family_is_what_transformers_says() {
    let mut worst = [0.0f32; 2];
    for name in MODELS {
        let (folder, expected) = (open(name), expected(name));
        let (f32, f16_kv) = (difference(reference(&folder), &expected), difference(cpu(&folder), &expected));
        println!("{name}: reference {f32:.6}, cpu {f16_kv:.6}");
        worst = [worst[0].max(f32), worst[1].max(f16_kv)];
    }
    assert!(worst[0] <= REFERENCE_TOLERANCE, "on the reference device: {} nats off", worst[0]);
    assert!(worst[1] <= CPU_TOLERANCE, "on the CPU device: {} nats off", worst[1]);
}

#[test]
fn every_fixture_is_used_and_small() {
    let mut n_bytes = 0;
    for entry in fs::read_dir(golden("models")).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(MODELS.contains(&name.as_str()), "no test uses {name}");
        n_bytes += fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>();
    }
    assert!(n_bytes < 1_500_000, "{n_bytes} bytes");
}

/// A model with something changed after it was read.
struct Changed {
    folder: HfFolder,
    change: fn(&mut ModelSpec),
}

impl ModelFile for Changed {
    fn path(&self) -> &Path {
        self.folder.path()
    }
    fn architecture(&self) -> String {
        self.folder.architecture()
    }

    fn spec(&self) -> anyhow::Result<ModelSpec> {
        let mut spec = self.folder.spec()?;
        (self.change)(&mut spec);
        Ok(spec)
    }
    fn find_tensor(&self, name: &str) -> Option<Tensor<'_>> {
        self.folder.find_tensor(name)
    }
    fn tensor_names(&self) -> Vec<&str> {
        self.folder.tensor_names()
    }
    fn content(&self) -> Vec<&[u8]> {
        self.folder.content()
    }
    fn release(&self) {
        self.folder.release();
    }
}

/// Changes the window of every layer that has one.
fn windows(spec: &mut ModelSpec, change: fn(usize) -> usize) {
    spec.attention.iter_mut().filter_map(|layer| layer.window.as_mut()).for_each(|window| *window = change(*window));
}

/// Each mistake is one that a reader of files could make. All must be seen on both devices, and clearly.
#[test]
fn a_planted_mistake_is_seen() {
    type Mistake = (&'static str, &'static str, fn(&mut ModelSpec));
    let mistakes: [Mistake; 22] = [
        ("llama3-rope", "frequencies not scaled", |s| {
            let n = s.attention[0].rope_freqs.len();
            let plain: Vec<f32> = (0..n).map(|i| 500_000f32.powf(-(i as f32) / n as f32)).collect();
            s.attention.iter_mut().for_each(|a| a.rope_freqs.clone_from(&plain));
        }),
        ("llama-linear-rope", "factor 3 for 4", |s| {
            s.attention.iter_mut().flat_map(|a| &mut a.rope_freqs).for_each(|f| *f *= 4.0 / 3.0);
        }),
        ("mistral", "no window", |s| s.attention.iter_mut().for_each(|a| a.window = None)),
        ("mistral", "window too long by one", |s| windows(s, |w| w + 1)),
        ("mistral", "window too short by one", |s| windows(s, |w| w - 1)),
        ("mixtral", "weights not normalised", |s| s.experts.as_mut().unwrap().renormalise = false),
        ("mixtral", "one expert for two", |s| s.experts.as_mut().unwrap().sizes.n_used = 1),
        ("qwen2", "no biases", |s| s.qkv_bias = false),
        ("qwen2", "all layers windowed", |s| {
            let window = s.attention[1].window;
            s.attention[0].window = window;
        }),
        ("qwen3", "heads not normed", |s| s.head_norms = false),
        ("qwen3", "another epsilon", |s| s.norm_eps = 1e-2),
        ("qwen3-moe", "weights not normalised", |s| s.experts.as_mut().unwrap().renormalise = false),
        ("qwen3-moe-unnormalised", "weights normalised", |s| s.experts.as_mut().unwrap().renormalise = true),
        ("gemma2", "no cap of scores", |s| s.attention.iter_mut().for_each(|a| a.soft_cap = None)),
        ("gemma2", "no cap of logits", |s| s.logit_cap = None),
        ("gemma2", "window too long by one", |s| windows(s, |w| w + 1)),
        ("gemma3", "one rotary base for all layers", |s| {
            let freqs = s.attention[1].rope_freqs.clone();
            s.attention[0].rope_freqs.clone_from(&freqs);
        }),
        ("gemma3", "embeddings not scaled", |s| s.embed_scale = 1.0),
        ("gemma3", "outputs not normed", |s| s.post_norms = false),
        ("gemma3", "queries scaled by the head's elements", |s| s.attention.iter_mut().for_each(|a| a.scale = 0.25)),
        ("phi3", "rotation not scaled", |s| s.attention.iter_mut().for_each(|a| a.rope_scale = 1.0)),
        ("phi3-partial", "all of a head rotated", |s| {
            s.attention.iter_mut().for_each(|a| a.rope_freqs = vec![1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]);
        }),
    ];
    for (name, mistake, change) in mistakes {
        let (changed, expected) = (Changed { folder: open(name), change }, expected(name));
        let (f32, f16_kv) = (difference(reference(&changed), &expected), difference(cpu(&changed), &expected));
        println!("{name}, {mistake}: reference {f32:.3}, cpu {f16_kv:.3}");
        assert!(f32.min(f16_kv) > 2.0 * CPU_TOLERANCE, "{name}, {mistake}: only {f32} and {f16_kv} nats off");
    }
}

/// Same row, same bits, with all that the families bring: windows, caps, norms, biases, experts.
#[test]
fn bits_do_not_depend_on_chunks_threads_or_copies() {
    for name in MODELS {
        let folder = open(name);
        for (seed, n_threads) in [1, 2, 5].into_iter().enumerate() {
            let numerics = if n_threads == 2 { Numerics::F32 } else { Numerics::Bf16 };
            let dev = CpuDevice::new(Isa::detect(), numerics, n_threads);
            let mut runner = ModelRunner::load(dev, &folder, 60, 256).unwrap();
            let worst = oracle::chunking_difference(&mut runner, &[1, 2, 17, 33, 70, 128], seed as u64);
            assert_eq!(worst.to_bits(), 0, "{name}, {n_threads} threads: {worst}");
            let worst = oracle::copied_prefix_difference(&mut runner, 7);
            assert_eq!(worst.to_bits(), 0, "{name}, {n_threads} threads, a copied block: {worst}");
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for name in MODELS {
        let (folder, expected) = (open(name), expected(name));
        for numerics in [Numerics::Int8, Numerics::Int8Bf16, Numerics::Bf16] {
            // A machine whose dot products are its own says so in its fingerprint.
            let mut answers = HashMap::new();
            for dev in Isa::available().into_iter().map(|isa| CpuDevice::new(isa, numerics, 1)) {
                let (fingerprint, isa) = (dev.fingerprint(), dev.isa());
                let mut runner = ModelRunner::load(dev, &folder, 20, 256).unwrap();
                let answer = format!("{:?}", run_side_by_side(&mut runner, &[&expected.tokens]));
                let first = answers.entry(fingerprint).or_insert_with(|| answer.clone());
                assert!(*first == answer, "{name}, {numerics:?}, {}", isa.name());
            }
        }
    }
}

/// A folder of that model with its configuration's text changed.
fn edited(name: &str, edits: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden("models").join(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut text = fs::read_to_string(&path).unwrap();
    for (from, to) in edits {
        assert!(text.contains(from), "{name}: no {from}");
        text = text.replace(from, to);
    }
    fs::write(path, text).unwrap();
    folder
}

/// `rope_theta` and `rope_scaling` of before transformers 5 mean what `rope_parameters` means.
#[test]
fn old_and_new_spellings_mean_the_same() {
    for (name, old) in [
        (
            "llama3-rope",
            r#""rope_theta": 500000.0, "rope_scaling": {"type": "llama3", "rope_type": "llama3", "factor": 8.0,
              "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}"#,
        ),
        ("llama-linear-rope", r#""rope_scaling": {"type": "linear", "factor": 4.0}"#),
        (
            "gemma3",
            r#""rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
              "rope_scaling": {"rope_type": "linear", "factor": 8.0}"#,
        ),
        (
            "phi3",
            r#""rope_theta": 10000.0, "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3],
              "long_factor": [1.0, 1.7, 3.1, 5.9]}"#,
        ),
    ] {
        let folder = edited(name, &[("\"rope_parameters\"", &format!("{old}, \"unused\""))]);
        let old = HfFolder::open(folder.path()).unwrap().spec().unwrap();
        assert_eq!(old, open(name).spec().unwrap(), "{name}");
    }
}

#[test]
fn folders_that_cannot_be_used_say_why() {
    let error = |folder: &Path| match HfFolder::open(folder).and_then(|folder| folder.spec()) {
        Ok(_) => panic!("{} was accepted", folder.display()),
        Err(error) => format!("{error:#}"),
    };
    for (name, from, to, fragments) in [
        ("qwen2", "\"qwen2\"", "\"mamba2\"", &["model_type", "\"mamba2\"", "gemma3_text"][..]),
        ("llama3-rope", "\"llama3\"", "\"yarn\"", &["rope scaling \"yarn\"", "longrope"]),
        ("llama3-rope", "\"factor\": 8.0,", "", &["factor is missing"]),
        ("llama3-rope", "\"silu\"", "\"relu\"", &["hidden_act", "\"relu\""]),
        ("llama3-rope", "\"attention_bias\": false", "\"attention_bias\": true", &["attention_bias"]),
        ("llama3-rope", "\"hidden_size\": 32", "\"hidden_size\": 64", &["blk.0.attn_", "expected shape", "found"]),
        ("llama3-rope", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 0", &["num_key_value_heads is 0"]),
        ("llama3-rope", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", &["blk.2.", "is missing"]),
        ("llama3-rope", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", &["blk.1.", "no place"]),
        ("qwen3-moe", "\"num_experts_per_tok\": 3", "\"num_experts_per_tok\": 7", &["7 of 6 experts"]),
        ("qwen3-moe", "\"mlp_only_layers\": []", "\"mlp_only_layers\": [1]", &["mlp_only_layers"]),
        ("phi3", "5.9\n", "5.9, 7.0\n", &["5 rotary factors", "4 rotated pairs"]),
        ("gemma3", "\"sliding_window\": 12", "\"sliding_window\": null", &["sliding_window is missing"]),
        ("gemma2", "\"full_attention\"", "\"chunked_attention\"", &["layer_types", "chunked_attention"]),
    ] {
        let error = error(edited(name, &[(from, to)]).path());
        assert!(fragments.iter().all(|part| error.contains(part)), "{name}, {to}: {error}");
    }
    let folder = edited("mistral", &[]);
    fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert!(error(folder.path()).contains("model-00002-of-00003.safetensors"), "{}", error(folder.path()));
    let folder = edited("mistral", &[]);
    let index = folder.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("model-00002", "../model-00002")).unwrap();
    assert!(error(folder.path()).contains("no file name"), "{}", error(folder.path()));
    let folder = edited("qwen2", &[]);
    let weights = folder.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    assert!(error(folder.path()).contains("model.safetensors is not a readable"), "{}", error(folder.path()));
    fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(error(folder.path()).contains("config.json"), "{}", error(folder.path()));
    assert!(error(&root().join("src")).contains("config.json"));
}
