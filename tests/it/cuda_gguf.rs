//! A GGUF file with packed experts on the CUDA device, on the stand-in for NVIDIA's libraries: the experts of a layer are one tensor in
//! the file, and one weight each on the GPU.

use crate::cuda_device::{SPARED, compare_scores, scored};
use crate::cuda_machine::Noise;
use crate::cuda_stage::{CONTEXT, FFN_WIDTH, Family, HEAD_DIM, HEADS, KV_HEADS, LAYERS, Stage, WIDTH, letters, tensors};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

/// Names of Hugging Face's and of GGUF's, in this order: the longer first.
const NAMES: [(&str, &str); 12] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("block_sparse_moe.experts", "experts"),
];

/// Projections of an expert.
const PARTS: [(&str, &str); 3] = [("w1", "ffn_gate_exps"), ("w3", "ffn_up_exps"), ("w2", "ffn_down_exps")];

/// The tensors of a tiny Mixtral, a layer's experts in one.
fn stacked() -> BTreeMap<String, Tensor> {
    let (mut all, mut experts) = (BTreeMap::new(), BTreeMap::<String, Vec<Tensor>>::new());
    let mut noise = Noise(11);
    for (name, shape, largest) in tensors(Family::Mixtral) {
        let n = shape.iter().product();
        let values = (0..n).map(|_| if largest == 0.0 { 1.0 + 0.3 * noise.next() } else { largest * noise.next() });
        let tensor = Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap();
        let name = NAMES.iter().fold(name, |name, (theirs, own)| name.replace(theirs, own));
        let Some((layer, rest)) = name.split_once("experts.") else {
            all.insert(name, tensor);
            continue;
        };
        let (_, own) = PARTS.iter().find(|(theirs, _)| rest.contains(&format!(".{theirs}."))).unwrap();
        experts.entry(format!("{layer}{own}.weight")).or_default().push(tensor);
    }
    all.extend(experts.into_iter().map(|(name, parts)| (name, Tensor::stack(&parts, 0).unwrap())));
    all
}

/// Writes it: gates and ups in 4 bits, downs in 8, what follows attention (whose rows are whole blocks of it) in 6.
fn write(path: &Path) {
    let tensors: Vec<(String, QTensor)> = stacked()
        .into_iter()
        .map(|(name, tensor)| {
            let kind = match &name {
                name if name.contains("ffn_down_exps") => GgmlDType::Q8_0,
                name if name.contains("_exps") || name.contains("attn_q.") => GgmlDType::Q4_0,
                name if name.contains("attn_output.") => GgmlDType::Q6K,
                _ => GgmlDType::F32,
            };
            (name, QTensor::quantize(&tensor, kind).unwrap())
        })
        .collect();
    let text = |text: &str| Value::String(text.to_owned());
    let number = |n: usize| Value::U32(n as u32);
    // With a merge: a list of none has no type.
    let mut letters = letters();
    "ab".clone_into(letters.last_mut().unwrap());
    let kinds = (0..letters.len()).map(|i| Value::I32(if i < 3 { 3 } else { 1 })).collect();
    let metadata = [
        ("general.architecture", text("llama")),
        ("llama.block_count", number(LAYERS)),
        ("llama.context_length", number(CONTEXT)),
        ("llama.embedding_length", number(WIDTH)),
        ("llama.feed_forward_length", number(FFN_WIDTH)),
        ("llama.attention.head_count", number(HEADS)),
        ("llama.attention.head_count_kv", number(KV_HEADS)),
        ("llama.attention.key_length", number(HEAD_DIM)),
        ("llama.attention.value_length", number(HEAD_DIM)),
        ("llama.rope.dimension_count", number(HEAD_DIM)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.expert_count", number(5)),
        ("llama.expert_used_count", number(2)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        ("tokenizer.ggml.tokens", Value::Array(letters.iter().map(|letter| text(letter)).collect())),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.merges", Value::Array(vec![text("a b")])),
        ("tokenizer.ggml.bos_token_id", number(1)),
        ("tokenizer.ggml.eos_token_id", number(2)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(name, value)| (*name, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn packed_experts_are_what_the_reference_device_says() {
    let mut stage = Stage::with_gguf(write);
    let lines = scored();
    let counters = stage.sandbox.path("counters.json");
    stage.set("STANDIN_COUNTERS", counters.to_str().unwrap());
    let on_gpu = stage.job("cuda", &[], &lines);
    if std::env::var_os("VALAR_TEST_GPU").is_none() {
        let counters = stage.sandbox.read("counters.json");
        assert!(counters.contains("linear_q6_add") && counters.contains("linear_experts_q8"), "{counters}");
    }
    compare_scores(&on_gpu, &stage.job("reference", &[], &lines), SPARED);
}
