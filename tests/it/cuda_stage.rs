//! What the tests of the CUDA device share: tiny models of random weights whose heads the kernels know, and the program, unchanged,
//! on the stand-in for NVIDIA's libraries.

use crate::common::{Sandbox, model_path};
use crate::cuda::tools;
use crate::cuda_machine::Noise;
use half::f16;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Elements of the residual stream, between the projections, of a head; heads; layers; tokens; positions.
pub(crate) const WIDTH: usize = 128;
pub(crate) const FFN_WIDTH: usize = 192;
pub(crate) const HEAD_DIM: usize = 64;
pub(crate) const HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const LAYERS: usize = 2;
const N_VOCAB: usize = 64;
pub(crate) const CONTEXT: usize = 2048;

/// The families of the tiny models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Llama,
    Qwen3,
    Mixtral,
    Qwen3Moe,
}

impl Family {
    /// Whether the heads of q and k are normed.
    fn norms_heads(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Qwen3Moe)
    }

    /// Experts, of which a token uses so many, and elements between their projections.
    fn experts(self) -> Option<(usize, usize, usize)> {
        match self {
            Self::Llama | Self::Qwen3 => None,
            Self::Mixtral => Some((5, 2, FFN_WIDTH)),
            Self::Qwen3Moe => Some((9, 3, 72)),
        }
    }

    /// Names of an expert's gate, up and down, before and behind its number, and of the router.
    fn expert_names(self) -> (&'static str, [&'static str; 3], &'static str) {
        if self == Self::Mixtral {
            ("block_sparse_moe.experts", ["w1", "w3", "w2"], "block_sparse_moe.gate")
        } else {
            ("mlp.experts", ["gate_proj", "up_proj", "down_proj"], "mlp.gate")
        }
    }

    /// Names, shapes and largest absolute values of the tensors between a layer's second norm and its end.
    fn feed_forward(self, scale: impl Fn(usize) -> f32) -> Vec<(String, Vec<usize>, f32)> {
        let parts = |width: usize| {
            [(vec![width, WIDTH], scale(WIDTH)), (vec![width, WIDTH], scale(WIDTH)), (vec![WIDTH, width], scale(width))]
        };
        let Some((n_experts, _, width)) = self.experts() else {
            let names = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"].map(str::to_owned);
            return names.into_iter().zip(parts(FFN_WIDTH)).map(|(name, (shape, scale))| (name, shape, scale)).collect();
        };
        let (expert, names, router) = self.expert_names();
        let of = |e: usize| {
            let part = move |(name, (shape, scale)): (&str, _)| (format!("{expert}.{e}.{name}"), shape, scale);
            names.into_iter().zip(parts(width)).map(part).collect::<Vec<_>>()
        };
        let router = (router.to_owned(), vec![n_experts, WIDTH], scale(WIDTH));
        (0..n_experts).flat_map(of).chain([router]).collect()
    }
}

/// A letter per token: marks, letters, digits, punctuation.
pub(crate) fn letters() -> Vec<String> {
    let letters = "\u{120}abcdefghijklmnopqrstuvwxyz.,?!0123456789".chars().map(String::from);
    let mut all: Vec<String> = ["<pad>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(letters).collect();
    let fill: Vec<String> = ('A'..='Z').map(String::from).take(N_VOCAB - all.len()).collect();
    all.extend(fill);
    assert_eq!(all.len(), N_VOCAB);
    all
}

fn tokenizer() -> Value {
    let letters = letters();
    let vocab: serde_json::Map<String, Value> = letters.iter().enumerate().map(|(i, c)| (c.clone(), json!(i))).collect();
    let special = |id: usize| json!({"id": id, "content": letters[id], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    json!({
        "version": "1.0",
        "added_tokens": [special(0), special(1), special(2)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// Names, shapes and largest absolute values of a model's tensors. A norm's are around 1.
pub(crate) fn tensors(family: Family) -> Vec<(String, Vec<usize>, f32)> {
    let scale = |k: usize| (3.0 / k as f32).sqrt();
    let (q_width, kv_width) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![N_VOCAB, WIDTH], if family.norms_heads() { 0.4 } else { 1.0 }),
        ("model.norm.weight".to_owned(), vec![WIDTH], 0.0),
    ];
    if !family.norms_heads() {
        all.push(("lm_head.weight".to_owned(), vec![N_VOCAB, WIDTH], 3.0 * scale(WIDTH)));
    }
    for layer in 0..LAYERS {
        let parts = [
            ("input_layernorm", vec![WIDTH], 0.0),
            ("post_attention_layernorm", vec![WIDTH], 0.0),
            ("self_attn.q_proj", vec![q_width, WIDTH], scale(WIDTH)),
            ("self_attn.k_proj", vec![kv_width, WIDTH], scale(WIDTH)),
            ("self_attn.v_proj", vec![kv_width, WIDTH], scale(WIDTH)),
            ("self_attn.o_proj", vec![WIDTH, q_width], scale(q_width)),
        ];
        let norms = [("self_attn.q_norm", vec![HEAD_DIM], 0.0), ("self_attn.k_norm", vec![HEAD_DIM], 0.0)];
        let norms = norms.into_iter().filter(|_| family.norms_heads());
        let parts = parts.into_iter().chain(norms).map(|(part, shape, scale)| (part.to_owned(), shape, scale));
        let parts = parts.chain(family.feed_forward(scale));
        all.extend(parts.map(|(part, shape, scale)| (format!("model.layers.{layer}.{part}.weight"), shape, scale)));
    }
    all
}

/// Writes a model's folder: values in f32, or in f16.
pub(crate) fn write_model(folder: &Path, family: Family, in_f16: bool) {
    fs::create_dir(folder).unwrap();
    let mut noise = Noise(7);
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, shape, largest) in tensors(family) {
        let start = data.len();
        let values =
            (0..shape.iter().product()).map(|_| if largest == 0.0 { 1.0 + 0.3 * noise.next() } else { largest * noise.next() });
        if in_f16 {
            data.extend(values.flat_map(|value| f16::from_f32(value).to_le_bytes()));
        } else {
            data.extend(values.flat_map(f32::to_le_bytes));
        }
        let kind = if in_f16 { "F16" } else { "F32" };
        header.insert(name, json!({"dtype": kind, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(folder.join("model.safetensors"), file).unwrap();
    let (architecture, model_type) = match family {
        Family::Llama => ("LlamaForCausalLM", "llama"),
        Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        Family::Mixtral => ("MixtralForCausalLM", "mixtral"),
        Family::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe"),
    };
    let mut config = json!({
        "architectures": [architecture], "model_type": model_type, "vocab_size": N_VOCAB, "hidden_size": WIDTH,
        "intermediate_size": FFN_WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "hidden_act": "silu", "attention_bias": false,
        "tie_word_embeddings": family.norms_heads(), "bos_token_id": 1, "eos_token_id": 2,
    });
    if let Some((n_experts, n_used, width)) = family.experts() {
        let number = if family == Family::Mixtral { "num_local_experts" } else { "num_experts" };
        let own = json!({number: n_experts, "num_experts_per_tok": n_used, "norm_topk_prob": true});
        config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        if family == Family::Qwen3Moe {
            config["moe_intermediate_size"] = json!(width);
        }
    }
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
}

/// Compiled kernels, which the tests of a build share.
fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-device")
}

/// The stand-in's libraries in a folder of the sandbox.
fn install(sandbox: &Sandbox) -> PathBuf {
    let libraries = sandbox.path("libraries");
    fs::create_dir(&libraries).unwrap();
    standin::install(&libraries).unwrap();
    standin_blas::install(&libraries).unwrap();
    // NVRTC looks by this name for what a real driver tells it on the quiet; programs ask for libcuda.so first.
    fs::remove_file(libraries.join("libcuda.so.1")).unwrap();
    libraries
}

/// The program in a sandbox with the stand-in's GPU.
pub(crate) struct Stage {
    pub(crate) sandbox: Sandbox,
    /// The stand-in's.
    libraries: PathBuf,
    /// What runs.
    model: String,
    /// What the stand-in is told.
    knobs: Vec<(String, String)>,
}

impl Stage {
    /// With a model of that family in the folder `tiny`.
    pub(crate) fn new(family: Family) -> Self {
        Self::with_values(family, false)
    }

    /// The same, with values in f32, or in f16.
    pub(crate) fn with_values(family: Family, in_f16: bool) -> Self {
        let sandbox = Sandbox::new();
        write_model(&sandbox.path("tiny"), family, in_f16);
        Self { libraries: install(&sandbox), sandbox, model: "tiny".to_owned(), knobs: Vec::new() }
    }

    /// With a model that is written to the folder `tiny`.
    pub(crate) fn with_folder(write: impl FnOnce(&Path)) -> Self {
        let sandbox = Sandbox::new();
        write(&sandbox.path("tiny"));
        Self { libraries: install(&sandbox), sandbox, model: "tiny".to_owned(), knobs: Vec::new() }
    }

    /// With a model in the file `tiny.gguf`.
    pub(crate) fn with_gguf(write: impl FnOnce(&Path)) -> Self {
        let sandbox = Sandbox::new();
        write(&sandbox.path("tiny.gguf"));
        Self { libraries: install(&sandbox), sandbox, model: "tiny.gguf".to_owned(), knobs: Vec::new() }
    }

    /// With the default model.
    pub(crate) fn with_default_model() -> Self {
        let sandbox = Sandbox::new();
        Self { libraries: install(&sandbox), sandbox, model: model_path().display().to_string(), knobs: Vec::new() }
    }

    /// Sets one of the stand-in's knobs for what runs from now on; nothing unsets it.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.knobs.retain(|(known, _)| known != name);
        self.knobs.extend((!value.is_empty()).then(|| (name.to_owned(), value.to_owned())));
    }

    /// The program with arguments, on the stand-in; on the machine's own GPU if `VALAR_TEST_GPU` is set (`tests/gpu/on-device.sh`).
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = self.sandbox.command(args);
        if std::env::var_os("VALAR_TEST_GPU").is_some() {
            return command;
        }
        command.env("LD_LIBRARY_PATH", &self.libraries).env("VALAR_CACHE", cache()).env("VALAR_NVRTC", tools().nvrtc);
        command.envs(self.knobs.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs a job of request rows `in.jsonl` into `out.jsonl`; its exit code and what it said.
    pub(crate) fn run(&self, device: &str, settings: &[&str]) -> (Option<i32>, String) {
        let output = self.command(&self.args(device, settings)).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Arguments of a job.
    pub(crate) fn args<'a>(&'a self, device: &'a str, settings: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["run", "-i", "in.jsonl", "-o", "out.jsonl", "--quiet", "-m", &self.model, "--device", device];
        if self.model.starts_with("tiny") && !settings.iter().any(|setting| setting.starts_with("engine.memory")) {
            // Little of it: the stand-in watches every byte.
            args.extend(["--memory", "32MiB"]);
        }
        args.extend(settings.iter().flat_map(|setting| ["--set", setting]));
        args
    }

    /// The choices of `out.jsonl` by row, as text, in which floats are written so that they come back to the same bits.
    pub(crate) fn choices(&self) -> BTreeMap<String, Value> {
        let choice = |row: &Value| row["response"]["body"]["choices"].clone();
        self.sandbox.rows("out.jsonl").iter().map(|row| (row["custom_id"].as_str().unwrap().to_owned(), choice(row))).collect()
    }

    /// A job of these lines from its beginning, with that device; its exit code and what it said.
    pub(crate) fn run_anew(&self, device: &str, settings: &[&str], lines: &[String]) -> (Option<i32>, String) {
        self.sandbox.write("in.jsonl", lines.join("\n"));
        let args = [&self.args(device, settings)[..], &["--restart"]].concat();
        let output = self.command(&args).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The least memory that the program says it needs, in MiB.
    pub(crate) fn least_memory(&self, settings: &[&str], lines: &[String]) -> u64 {
        let (_, said) = self.run_anew("cuda", &[settings, &["engine.memory='1MiB'"]].concat(), lines);
        let words = said.split("at least ").nth(1).unwrap_or_else(|| panic!("{said}"));
        words.split(' ').next().unwrap().parse().unwrap()
    }

    /// A job of these lines from its beginning, with that device; the choices of its rows.
    pub(crate) fn job(&self, device: &str, settings: &[&str], lines: &[String]) -> BTreeMap<String, Value> {
        let (code, said) = self.run_anew(device, settings, lines);
        assert_eq!(code, Some(0), "{said}");
        self.choices()
    }
}

/// A row for `/v1/completions`.
pub(crate) fn line(id: &str, prompt: &str, extra: &Value) -> String {
    let mut body = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body}).to_string()
}

/// A text of so many tokens, another for each number.
pub(crate) fn text(n: usize, number: u32) -> String {
    let mut noise = Noise(number);
    let letters = b"abcdefghijklmnopqrstuvwxyz 0123456789.,";
    (0..n).map(|_| char::from(letters[((noise.next() + 1.0) * 19.49) as usize])).collect()
}
