//! Families as GGUF files say them: the tiny models of `tests/golden/models` written as GGUF, with the tensor names, row
//! order and metadata of llama.cpp's converter, give what `transformers` says of them.

use crate::families::{REFERENCE_TOLERANCE, difference, expected, open, reference};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device as CandleDevice, Tensor};
use std::collections::BTreeMap;
use valar::device::RopeStyle;
use valar::gguf::Gguf;
use valar::model::{ModelFile, ModelSpec};
use valar::tensor::{DType, Tensor as FileTensor};

/// A folder's model as the parts of a GGUF file.
struct Conversion {
    arch: &'static str,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Tensor>,
}

fn values(tensor: &FileTensor<'_>) -> Vec<f32> {
    let bytes = &tensor.bytes;
    match tensor.dtype {
        DType::F16 => bytes.chunks(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::Bf16 => bytes.chunks(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}

impl Conversion {
    /// What the converter writes for every family. `interleaved`: q and k rows are put in the order of the llama family.
    fn new(name: &str, arch: &'static str, interleaved: bool) -> Self {
        let file = open(name);
        let spec = file.spec().unwrap();
        let attention = &spec.attention[0];
        let mut tensors = BTreeMap::new();
        for tensor in file.tensor_names().into_iter().map(|name| file.tensor(name).unwrap()) {
            let mut matrix = Tensor::from_vec(values(&tensor), tensor.shape.as_slice(), &CandleDevice::Cpu).unwrap();
            let n_heads = [("attn_q.", attention.n_heads), ("attn_k.", attention.n_kv_heads)];
            if let Some((_, n)) = n_heads.iter().find(|(part, _)| interleaved && tensor.name.contains(part)) {
                let (rows, k) = matrix.dims2().unwrap();
                let halves = matrix.reshape((*n, 2, rows / n / 2, k)).unwrap();
                matrix = halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, k)).unwrap();
            }
            tensors.insert(tensor.name.to_owned(), matrix);
        }
        let mut conversion = Self { arch, metadata: BTreeMap::new(), tensors };
        conversion.metadata.insert("general.architecture".to_owned(), Value::String(arch.into()));
        for (key, value) in [
            ("block_count", spec.n_layers()),
            ("context_length", spec.max_context),
            ("embedding_length", spec.width),
            ("feed_forward_length", spec.ffn_width),
            ("attention.head_count", attention.n_heads),
            ("attention.head_count_kv", attention.n_kv_heads),
            ("attention.key_length", attention.head_dim),
            ("attention.value_length", attention.head_dim),
            ("rope.dimension_count", 2 * attention.rope_freqs.len()),
        ] {
            conversion.set(key, Value::U32(value as u32));
        }
        conversion.set("attention.layer_norm_rms_epsilon", Value::F32(spec.norm_eps));
        if let Some(experts) = spec.experts {
            conversion.set("expert_count", Value::U32(experts.sizes.n_experts as u32));
            conversion.set("expert_used_count", Value::U32(experts.sizes.n_used as u32));
            conversion.stack_experts(&spec);
        }
        conversion
    }

    fn set(&mut self, key: &str, value: Value) -> &mut Self {
        self.metadata.insert(format!("{}.{key}", self.arch), value);
        self
    }

    fn add(&mut self, name: &str, values: &[f32]) -> &mut Self {
        self.tensors.insert(name.to_owned(), Tensor::new(values, &CandleDevice::Cpu).unwrap());
        self
    }

    /// Puts the experts of a layer into one tensor.
    fn stack_experts(&mut self, spec: &ModelSpec) {
        for layer in 0..spec.n_layers() {
            for part in ["ffn_gate", "ffn_up", "ffn_down"] {
                let name = |e| format!("blk.{layer}.{part}.{e}.weight");
                let n_experts = spec.experts.unwrap().sizes.n_experts;
                let experts: Vec<_> = (0..n_experts).map(|e| self.tensors.remove(&name(e)).unwrap()).collect();
                self.tensors.insert(format!("blk.{layer}.{part}_exps.weight"), Tensor::stack(&experts, 0).unwrap());
            }
        }
    }

    fn write(&self) -> Gguf {
        let file = tempfile::NamedTempFile::new().unwrap();
        let tensors = self.tensors.iter().map(|(name, tensor)| (name, QTensor::quantize(tensor, GgmlDType::F32).unwrap()));
        let tensors: Vec<_> = tensors.collect();
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut file.as_file(), &metadata, &tensors).unwrap();
        Gguf::open(file.path()).unwrap()
    }

    #[track_caller]
    fn check(&self, name: &str) {
        let gguf = self.write();
        let worst = difference(reference(&gguf), &expected(name));
        assert!(worst <= REFERENCE_TOLERANCE, "{name} as {}: {worst} nats off", self.arch);
    }
}

#[test]
fn llama_with_divided_frequencies() {
    let mut file = Conversion::new("llama3-rope", "llama", true);
    // The converter lists what each frequency is divided by.
    let freqs = &open("llama3-rope").spec().unwrap().attention[0].rope_freqs;
    let divisors: Vec<f32> = freqs.iter().enumerate().map(|(i, freq)| 500_000f32.powf(-(i as f32) / 8.0) / freq).collect();
    file.set("rope.freq_base", Value::F32(500_000.0)).add("rope_freqs.weight", &divisors).check("llama3-rope");
}

#[test]
fn llama_with_linear_scaling() {
    let mut file = Conversion::new("llama-linear-rope", "llama", true);
    file.set("rope.scaling.factor", Value::F32(4.0)).check("llama-linear-rope");
    file.set("rope.scaling.type", Value::String("linear".into())).check("llama-linear-rope");
    file.set("rope.scaling.type", Value::String("none".into()));
    assert!(difference(reference(&file.write()), &expected("llama-linear-rope")) > 0.1, "a factor that is switched off");
}

#[test]
fn mistral_and_mixtral_are_llama() {
    Conversion::new("mistral", "llama", true).set("attention.sliding_window", Value::U32(20)).check("mistral");
    let mut mixtral = Conversion::new("mixtral", "llama", true);
    mixtral.set("rope.freq_base", Value::F32(1e6)).check("mixtral");
    let halves = Conversion::new("mistral", "llama", false);
    assert!(difference(reference(&halves.write()), &expected("mistral")) > 0.1, "rows in another order");
}

#[test]
fn qwen() {
    let listed = Value::Array(vec![Value::Bool(false), Value::Bool(true)]);
    let mut qwen2 = Conversion::new("qwen2", "qwen2", false);
    qwen2.set("attention.sliding_window", Value::U32(16)).set("attention.sliding_window_pattern", listed).check("qwen2");
    Conversion::new("qwen3", "qwen3", false).check("qwen3");
    let mut moe = Conversion::new("qwen3-moe", "qwen3moe", false);
    // The dense layers' size, which the family has no such layers for.
    moe.set("expert_feed_forward_length", Value::U32(16)).set("feed_forward_length", Value::U32(48)).check("qwen3-moe");
    let mut moe = Conversion::new("qwen3-moe-unnormalised", "qwen3moe", false);
    moe.set("expert_weights_norm", Value::Bool(false)).check("qwen3-moe-unnormalised");
}

#[test]
fn gemma() {
    let listed = || Value::Array([true, false, true].map(Value::Bool).to_vec());
    let scale = || Value::F32(1.0 / 24f32.sqrt());
    let mut gemma2 = Conversion::new("gemma2", "gemma2", false);
    // Every second layer sees all: the family's own pattern is that of the file.
    gemma2.set("attention.sliding_window", Value::U32(12)).set("attention.scale", scale());
    gemma2.set("attn_logit_softcapping", Value::F32(4.0)).set("final_logit_softcapping", Value::F32(5.0)).check("gemma2");
    let mut gemma3 = Conversion::new("gemma3", "gemma3", false);
    gemma3.set("attention.sliding_window", Value::U32(12)).set("attention.scale", scale());
    gemma3.set("rope.freq_base", Value::F32(1e6)).set("rope.scaling.type", Value::String("linear".into()));
    gemma3.set("rope.scaling.factor", Value::F32(8.0));
    // Without a list every sixth layer sees all: none of three.
    let windows: Vec<_> = gemma3.write().spec().unwrap().attention.iter().map(|a| a.window).collect();
    assert_eq!(windows, [Some(12); 3]);
    gemma3.set("attention.sliding_window_pattern", listed()).check("gemma3");
}

#[test]
fn phi3() {
    let mut phi3 = Conversion::new("phi3", "phi3", false);
    phi3.set("attention.sliding_window", Value::U32(24)).set("rope.scaling.original_context_length", Value::U32(32));
    // sqrt(1 + ln(128 / 32) / ln(32)), as the converter computes it.
    phi3.set("rope.scaling.attn_factor", Value::F32((1.0 + 4f32.ln() / 32f32.ln()).sqrt()));
    phi3.add("rope_factors_short.weight", &[1.0, 1.1, 1.2, 1.3]).add("rope_factors_long.weight", &[1.0, 1.7, 3.1, 5.9]);
    phi3.check("phi3");
    // Under the context that the model was first trained for, the other factors count.
    let mut partial = Conversion::new("phi3-partial", "phi3", false);
    partial.set("rope.scaling.original_context_length", Value::U32(128));
    partial.add("rope_factors_short.weight", &[1.0, 1.1, 1.2, 1.3, 1.4, 1.5]);
    partial.add("rope_factors_long.weight", &[1.0, 1.7, 3.1, 5.9, 7.1, 9.0]);
    partial.check("phi3-partial");
}

#[test]
fn what_a_file_may_not_say() {
    let error = |file: &Conversion| format!("{:#}", file.write().spec().unwrap_err());
    let with = |name, arch: &'static str, key: &str, value: Value| {
        let mut file = Conversion::new(name, arch, false);
        file.set(key, value);
        error(&file)
    };
    let short = Value::Array(vec![Value::Bool(true)]);
    for (error, fragments) in [
        (with("qwen2", "qwen2", "attention.sliding_window_pattern", short), &["sliding_window_pattern", "1 entries"][..]),
        (with("qwen3", "qwen3", "expert_count", Value::U32(4)), &["expert_used_count"]),
        (with("qwen3-moe", "qwen3moe", "expert_used_count", Value::U32(7)), &["7 of 6 experts"]),
        (with("qwen3-moe", "qwen3moe", "expert_shared_count", Value::U32(1)), &["expert_shared_count", "1 shared experts"]),
        (with("qwen3-moe", "qwen3moe", "expert_gating_func", Value::U32(2)), &["expert_gating_func", "softmax"]),
        (with("gemma2", "gemma2", "attention.sliding_window", Value::U32(12)), &["attn_logit_softcapping", "missing"]),
        (with("gemma3", "gemma3", "attention.sliding_window", Value::U32(0)), &["gemma3.attention.sliding_window"]),
        (with("qwen3", "llama", "rope.freq_base", Value::F32(1e4)), &["attn_k_norm", "no place"]),
        (with("qwen3", "qwen2", "rope.freq_base", Value::F32(1e4)), &["attn_k.bias", "missing"]),
    ] {
        assert!(fragments.iter().all(|part| error.contains(part)), "{error}");
    }
    let mut divided = Conversion::new("mistral", "llama", true);
    divided.add("rope_freqs.weight", &[1.0; 7]);
    assert!(error(&divided).contains("7 rotary factors for 8 rotated pairs"), "{}", error(&divided));
}

#[test]
fn files_of_llama_cpp_keep_their_pairs_side_by_side() {
    let style =
        |name, arch, interleaved| Conversion::new(name, arch, interleaved).write().spec().unwrap().attention[0].rope_style;
    assert_eq!(style("mistral", "llama", true), RopeStyle::Interleaved);
    assert_eq!(style("qwen3", "qwen3", false), RopeStyle::Halves);
}
