//! Reading models from GGUF files: what is understood, what is refused. Small random models, written on the spot.

#![expect(clippy::unwrap_used, reason = "tests panic on purpose")]

use crate::common::model_path;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device as CandleDevice, Tensor};
use std::collections::BTreeMap;
use valar::device::BLOCK_TOKENS;
use valar::device::batch::{Batch, BatchSeq, Draw, HeadOut, HeadRow, StepOutput, Want};
use valar::device::reference::Reference;
use valar::gguf::Gguf;
use valar::model::{ModelRunner, ModelSpec, Runner, RunnerLimits, sizing};

/// A GGUF file in the making: edit it, then [`TinyModel::write`] it.
pub(crate) struct TinyModel {
    pub(crate) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: BTreeMap<String, QTensor>,
}

/// Random weights, the same for the same name.
pub(crate) fn random_tensor(name: &str, shape: &[usize], dtype: GgmlDType) -> QTensor {
    let mut state = name.bytes().fold(1u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.6
        })
        .collect();
    QTensor::quantize(&Tensor::from_vec(values, shape, &CandleDevice::Cpu).unwrap(), dtype).unwrap()
}

impl TinyModel {
    /// Two layers of 64 elements, four query heads on two key/value heads of 32 elements (not 64 / 4), 100 tokens.
    pub(crate) fn new(dtype: GgmlDType) -> Self {
        let metadata = [
            ("general.architecture", Value::String("llama".into())),
            ("llama.block_count", Value::U32(2)),
            ("llama.context_length", Value::U32(512)),
            ("llama.embedding_length", Value::U32(64)),
            ("llama.feed_forward_length", Value::U32(96)),
            ("llama.attention.head_count", Value::U32(4)),
            ("llama.attention.head_count_kv", Value::U32(2)),
            ("llama.attention.key_length", Value::U32(32)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.rope.freq_base", Value::F32(10_000.0)),
        ];
        let mut model = Self { metadata: metadata.map(|(k, v)| (k.to_owned(), v)).into(), tensors: BTreeMap::new() };
        model.add("token_embd.weight", &[100, 64], dtype);
        model.add("output_norm.weight", &[64], GgmlDType::F32);
        for layer in 0..2 {
            for (part, shape) in [
                ("attn_norm", &[64][..]),
                ("attn_q", &[128, 64]),
                ("attn_k", &[64, 64]),
                ("attn_v", &[64, 64]),
                ("attn_output", &[64, 128]),
                ("ffn_norm", &[64]),
                ("ffn_gate", &[96, 64]),
                ("ffn_up", &[96, 64]),
                ("ffn_down", &[64, 96]),
            ] {
                let dtype = if shape.len() == 1 { GgmlDType::F32 } else { dtype };
                model.add(&format!("blk.{layer}.{part}.weight"), shape, dtype);
            }
        }
        model
    }

    pub(crate) fn add(&mut self, name: &str, shape: &[usize], dtype: GgmlDType) {
        self.tensors.insert(name.to_owned(), random_tensor(name, shape, dtype));
    }

    pub(crate) fn set(&mut self, key: &str, value: Value) {
        self.metadata.insert(key.to_owned(), value);
    }

    /// Writes the file and opens it; the file is gone when the map is.
    pub(crate) fn write(&self) -> Gguf {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        gguf_file::write(&mut file.as_file(), &metadata, &tensors).unwrap();
        Gguf::open(file.path()).unwrap()
    }
}

/// The likeliest tokens after each token of some sequences, each run as one chunk of the same step.
pub(crate) fn run_side_by_side(runner: &mut dyn Runner, seqs: &[&[u32]]) -> Vec<HeadOut> {
    let want =
        Want::Draw(Draw { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0, choice: 0, position: 0, logprob: true });
    let mut batch = Batch::default();
    for tokens in seqs {
        let (token_start, table_start) = (batch.tokens.len() as u32, batch.block_tables.len() as u32);
        let (n_tokens, n_blocks) = (tokens.len() as u32, tokens.len().div_ceil(BLOCK_TOKENS) as u32);
        batch.seqs.push(BatchSeq { token_start, n_tokens, first_position: 0, table_start, n_blocks });
        batch.tokens.extend(*tokens);
        batch.positions.extend(0..n_tokens);
        batch.block_tables.extend(table_start..table_start + n_blocks);
        batch.heads.extend((0..n_tokens).map(|i| HeadRow::new(token_start + i, want, 20)));
    }
    let mut out = StepOutput::default();
    runner.run(&batch, &mut out).unwrap();
    out.rows
}

/// The reference device's answer to a fixed text of 40 tokens.
fn answer(model: &TinyModel) -> Vec<HeadOut> {
    let mut runner = ModelRunner::load(Reference, &model.write(), 8, 64).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| i * i % 100).collect();
    run_side_by_side(&mut runner, &[&tokens])
}

fn error(model: &TinyModel) -> String {
    format!("{:#}", ModelSpec::from_gguf(&model.write()).unwrap_err())
}

#[test]
fn reads_the_default_model() {
    let gguf = Gguf::open(&model_path()).unwrap();
    let spec = ModelSpec::from_gguf(&gguf).unwrap();
    assert_eq!((spec.n_layers(), spec.width, spec.ffn_width, spec.n_vocab, spec.max_context), (30, 576, 1536, 49152, 8192));
    let attention = &spec.attention[29];
    assert_eq!((attention.n_heads, attention.n_kv_heads, attention.head_dim), (9, 3, 64));
    assert_eq!((attention.scale, attention.rope_freqs.len(), spec.tied_head), (0.125, 32, true));
    let sizing = sizing(&Reference, &spec, &gguf, 256);
    assert_eq!(sizing.kv_block_bytes, 30 * 2 * 16 * 192 * 4);
    assert_eq!(sizing.workspace_bytes, 256 * (2 * 576 + 960 + 576 + 3 * 1536) * 4);
    assert_eq!(sizing.weights_bytes, 134_515_008 * 4, "the reference device holds f32");
}

#[test]
fn every_type_loads_and_gives_numbers() {
    let exact = answer(&TinyModel::new(GgmlDType::F32));
    for dtype in
        [GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q5_0, GgmlDType::Q5_1, GgmlDType::Q4_0, GgmlDType::Q4_1]
    {
        let rounded = answer(&TinyModel::new(dtype));
        let worst = exact.iter().zip(&rounded).map(|(a, b)| (a.logprob - b.logprob).abs()).fold(0.0, f32::max);
        let bound = if matches!(dtype, GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_0) { 0.1 } else { 1.0 };
        assert!(worst > 0.0 && worst < bound, "{dtype:?}: {worst}");
    }
}

#[test]
fn optional_tensors_mean_what_they_say() {
    let plain = TinyModel::new(GgmlDType::F32);
    let tied = answer(&plain);
    let with = |name: &str, tensor: QTensor| {
        let mut model = TinyModel::new(GgmlDType::F32);
        model.tensors.insert(name.to_owned(), tensor);
        answer(&model)
    };
    let dequantized = |name: &str| plain.tensors[name].dequantize(&CandleDevice::Cpu).unwrap();
    let vector = |values: Vec<f32>| QTensor::quantize(&Tensor::new(values, &CandleDevice::Cpu).unwrap(), GgmlDType::F32).unwrap();

    let same = QTensor::quantize(&dequantized("token_embd.weight"), GgmlDType::F32).unwrap();
    assert_eq!(with("output.weight", same), tied, "a head equal to the embedding table is the tied head");
    assert_ne!(with("output.weight", random_tensor("other", &[100, 64], GgmlDType::F32)), tied);

    assert_eq!(with("rope_freqs.weight", vector(vec![1.0; 16])), tied, "dividing frequencies by 1 changes nothing");
    let mut scaled_base = TinyModel::new(GgmlDType::F32);
    scaled_base.set("llama.rope.freq_base", Value::F32(40_000.0));
    let (a, b) = (answer(&scaled_base), with("rope_freqs.weight", vector((0..16).map(|i| 4f32.powf(i as f32 / 16.0)).collect())));
    let worst = a.iter().zip(&b).map(|(a, b)| (a.logprob - b.logprob).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4 && a != tied, "a larger base is the same as divided frequencies: {worst}");
}

#[test]
fn a_shorter_rotation_leaves_the_rest_of_a_head() {
    let mut model = TinyModel::new(GgmlDType::F32);
    model.set("llama.rope.dimension_count", Value::U32(8));
    let spec = ModelSpec::from_gguf(&model.write()).unwrap();
    assert_eq!(spec.attention[0].rope_freqs, [1.0, 0.1, 0.01, 0.001]);
    assert_ne!(answer(&model), answer(&TinyModel::new(GgmlDType::F32)));
}

#[test]
fn refuses_what_it_does_not_know() {
    let cases: [(&str, Value, &[&str]); 9] = [
        ("general.architecture", Value::String("mamba".into()), &["\"mamba\"", "supported: llama"]),
        ("llama.rope.scaling.type", Value::String("yarn".into()), &["llama.rope.scaling.type", "yarn"]),
        ("llama.rope.scaling.attn_factor", Value::F32(4.0), &["llama.rope.scaling.attn_factor", "without rotary factors"]),
        ("llama.expert_count", Value::U32(8), &["llama.expert_used_count", "missing"]),
        ("llama.logit_scale", Value::F32(2.0), &["llama.logit_scale", "2"]),
        ("llama.attention.head_count_kv", Value::U32(3), &["4 query heads", "3 key/value heads"]),
        ("llama.attention.value_length", Value::U32(16), &["values of 16", "keys of 32"]),
        ("llama.rope.dimension_count", Value::U32(40), &["40 of 32"]),
        ("llama.feed_forward_length", Value::U32(128), &["blk.0.ffn_down.weight", "[64, 128]", "[64, 96]"]),
    ];
    for (key, value, fragments) in cases {
        let mut model = TinyModel::new(GgmlDType::F32);
        model.set(key, value);
        let error = error(&model);
        assert!(fragments.iter().all(|part| error.contains(part)), "{key}: {error}");
    }
}

#[test]
fn refuses_missing_and_unknown_parts() {
    for key in ["general.architecture", "llama.block_count", "llama.attention.layer_norm_rms_epsilon"] {
        let mut model = TinyModel::new(GgmlDType::F32);
        model.metadata.remove(key);
        assert!(error(&model).contains(key), "{key}: {}", error(&model));
    }
    let mut model = TinyModel::new(GgmlDType::F32);
    model.metadata.insert("llama.block_count".into(), Value::U32(u32::MAX));
    assert!(error(&model).contains("block_count"), "{}", error(&model));
    let mut model = TinyModel::new(GgmlDType::F32);
    model.metadata.remove("llama.rope.freq_base");
    let spec = ModelSpec::from_gguf(&model.write()).unwrap();
    assert!((spec.attention[0].rope_freqs[8] - 0.01).abs() < 1e-9, "the specification's base is 10,000");
    for name in ["token_embd.weight", "blk.1.attn_v.weight", "output_norm.weight"] {
        let mut model = TinyModel::new(GgmlDType::F32);
        model.tensors.remove(name);
        assert!(error(&model).contains(name), "{name}: {}", error(&model));
    }
    let mut model = TinyModel::new(GgmlDType::F32);
    model.add("blk.0.attn_q.bias", &[128], GgmlDType::F32);
    assert!(error(&model).contains("blk.0.attn_q.bias"), "{}", error(&model));
}

#[test]
fn a_broken_sequence_does_not_break_its_neighbours() {
    let mut model = TinyModel::new(GgmlDType::F32);
    let mut table = model.tensors["token_embd.weight"].dequantize(&CandleDevice::Cpu).unwrap().to_vec2::<f32>().unwrap();
    table[99][7] = f32::NAN;
    let table = Tensor::new(table, &CandleDevice::Cpu).unwrap();
    model.tensors.insert("token_embd.weight".into(), QTensor::quantize(&table, GgmlDType::F32).unwrap());
    model.add("output.weight", &[100, 64], GgmlDType::F32); // keeps the damage out of the head
    let mut runner = ModelRunner::load(Reference, &model.write(), 8, 64).unwrap();
    let rows = run_side_by_side(&mut runner, &[&[1, 2, 3], &[4, 99], &[5, 6]]);
    let broken: Vec<bool> = rows.iter().map(HeadOut::is_broken).collect();
    assert_eq!([&broken[..3], &broken[4..]], [&[false, false, false][..], &[true, false, false]]);
}

#[test]
fn limits_are_what_was_asked_for() {
    let gguf = TinyModel::new(GgmlDType::Q8_0).write();
    let runner = ModelRunner::load(Reference, &gguf, 8, 64).unwrap();
    // The pool is smaller than the model's context of 512: a longer sequence could never finish.
    let want = RunnerLimits { n_blocks: 8, max_step_tokens: 64, max_step_seqs: 64, n_vocab: 100, max_context: 8 * 16 };
    assert_eq!(runner.limits(), want);
    assert!(ModelRunner::load(Reference, &gguf, 0, 64).is_err());
    assert!(ModelRunner::load(Reference, &gguf, 8, 0).is_err());
}
