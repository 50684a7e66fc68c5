//! `valar inspect`: what a model file holds and what it needs, from its header alone. Knows nothing of jobs.

use super::load::{self, Opened};
use super::progress::say;
use crate::device::BLOCK_TOKENS;
use crate::device::cpu::{CpuDevice, Isa, Kv, Numerics};
use crate::hub;
use crate::hub::remote::Remote;
use crate::model::sizing;
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

/// Lines of the chat template that the table shows.
const TEMPLATE_LINES: usize = 5;
/// Most characters of such a line: templates are often one long one.
const TEMPLATE_LINE_CHARS: usize = 100;
/// Special tokens that the table names.
const SHOWN_SPECIALS: usize = 12;

/// A model file.
#[derive(Debug, Serialize)]
struct Description {
    /// What rows may call it.
    name: String,
    file: String,
    file_bytes: u64,
    /// The family of models, as the file names it.
    architecture: String,
    layers: usize,
    /// Elements of the residual stream.
    width: usize,
    ffn_width: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocabulary: usize,
    context: usize,
    parameters: u64,
    tied_head: bool,
    /// By element type.
    tensors: BTreeMap<String, TensorCount>,
    tokenizer: TokenizerDescription,
    /// As the model's authors wrote it.
    chat_template: Option<String>,
    /// By numerics.
    memory: BTreeMap<&'static str, Memory>,
}

/// Tensors of one element type.
#[derive(Debug, Default, Serialize)]
struct TensorCount {
    count: u64,
    bytes: u64,
}

/// The tokenizer, or why it can't be used.
#[derive(Debug, Serialize)]
struct TokenizerDescription {
    /// Its algorithm, and how it cuts text where the file names that.
    kind: String,
    tokens: usize,
    special: Vec<Token>,
    end: Vec<Token>,
}

#[derive(Debug, Serialize)]
struct Token {
    id: u32,
    text: String,
}

/// Memory on the CPU device, in certain numerics.
#[derive(Debug, Serialize)]
struct Memory {
    /// In the device's own layout.
    weights_bytes: u64,
    /// For 1000 tokens, in whole blocks.
    kv_bytes_per_1k_tokens: u64,
    /// The same with `model.kv = "int8"`.
    int8_kv_bytes_per_1k_tokens: u64,
}

/// Prints what a model is, as a table or as one JSON object.
///
/// # Errors
/// No such model, or one that can't be used: the same error as a job's.
pub fn show(model: &str, cache: &Path, hub: Option<&Remote>, json: bool) -> Result<()> {
    let local = hub::resolve(model, cache, hub, &mut say)?;
    let description = describe(local.name.clone(), &load::open_files(&local)?);
    let text = if json {
        serde_json::to_string(&description).context("cannot write down the description")? + "\n"
    } else {
        description.table()
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}

fn describe(name: String, opened: &Opened) -> Description {
    let Opened { file, spec, tokenizer, template } = opened;
    let memory = Numerics::ALL.map(|numerics| {
        let [sizes, int8] = Kv::ALL.map(|kv| {
            let device = CpuDevice::new(Isa::detect(), numerics, 1).with_kv(kv);
            sizing(&device, spec, &**file, 1)
        });
        let per_1k = |block_bytes: usize| (1000_usize.div_ceil(BLOCK_TOKENS) * block_bytes) as u64;
        let memory = Memory {
            weights_bytes: sizes.weights_bytes as u64,
            kv_bytes_per_1k_tokens: per_1k(sizes.kv_block_bytes),
            int8_kv_bytes_per_1k_tokens: per_1k(int8.kv_block_bytes),
        };
        (numerics.name(), memory)
    });
    let mut tensors: BTreeMap<String, TensorCount> = BTreeMap::new();
    let mut parameters = 0;
    for tensor in file.tensor_names().into_iter().filter_map(|name| file.find_tensor(name)) {
        parameters += tensor.shape.iter().product::<usize>() as u64;
        let of_type = tensors.entry(tensor.dtype.to_string()).or_default();
        of_type.count += 1;
        of_type.bytes += tensor.bytes.len() as u64;
    }
    let token = |&id: &u32| Token { id, text: String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned() };
    let special: Vec<u32> = (0..tokenizer.n_vocab() as u32).filter(|&id| tokenizer.is_special(id)).collect();
    let attention = &spec.attention[0];
    Description {
        name,
        file: file.path().display().to_string(),
        file_bytes: file.content().iter().map(|part| part.len() as u64).sum(),
        architecture: file.architecture(),
        layers: spec.n_layers(),
        width: spec.width,
        ffn_width: spec.ffn_width,
        heads: attention.n_heads,
        kv_heads: attention.n_kv_heads,
        head_dim: attention.head_dim,
        vocabulary: spec.n_vocab,
        context: spec.max_context,
        parameters,
        tied_head: spec.tied_head,
        tensors,
        tokenizer: TokenizerDescription {
            kind: tokenizer.kind().to_owned(),
            tokens: tokenizer.n_vocab(),
            special: special.iter().map(token).collect(),
            end: tokenizer.end_ids().iter().map(token).collect(),
        },
        chat_template: template.source().map(str::to_owned),
        memory: memory.into(),
    }
}

impl Description {
    fn table(&self) -> String {
        let mut table = String::new();
        let mut line = |name: &str, value: String| {
            let _memory_takes_it = writeln!(table, "{}", format!("{name:<18}{value}").trim_end());
        };
        line("model", self.name.clone());
        line("file", format!("{}, {} bytes", self.file, self.file_bytes));
        line("architecture", self.architecture.clone());
        line("layers", format!("{}, width {}, feed-forward {}", self.layers, self.width, self.ffn_width));
        line("heads", format!("{} query, {} key/value, of {} elements", self.heads, self.kv_heads, self.head_dim));
        line("context", format!("{} tokens", self.context));
        let head = if self.tied_head { "; the head is the embedding" } else { "" };
        line("parameters", format!("{:.1} M{head}", self.parameters as f64 / 1e6));
        for (i, (dtype, of_type)) in self.tensors.iter().enumerate() {
            let name = if i == 0 { "tensors" } else { "" };
            line(name, format!("{:>4} {dtype}, {}", of_type.count, mib(of_type.bytes)));
        }
        let tokenizer = &self.tokenizer;
        line("tokenizer", format!("{}, {} tokens, {} special", tokenizer.kind, tokenizer.tokens, tokenizer.special.len()));
        let names = |tokens: &[Token]| tokens.iter().take(SHOWN_SPECIALS).map(Token::to_string).collect::<Vec<_>>().join(" ");
        let more = if tokenizer.special.len() > SHOWN_SPECIALS { " …" } else { "" };
        line("special tokens", format!("{}{more}", names(&tokenizer.special)));
        line("end tokens", names(&tokenizer.end));
        for (numerics, memory) in &self.memory {
            let (weights, kv) = (mib(memory.weights_bytes), mib(memory.kv_bytes_per_1k_tokens));
            let int8 = mib(memory.int8_kv_bytes_per_1k_tokens);
            line(&format!("memory, {numerics}"), format!("{weights} for weights, {kv} per 1k tokens of KV ({int8} as int8)"));
        }
        let template = self.chat_template.as_deref().unwrap_or("none: give it raw prompts");
        for (i, text) in template.lines().take(TEMPLATE_LINES).enumerate() {
            let name = if i == 0 { "chat template" } else { "" };
            let start: String = text.chars().take(TEMPLATE_LINE_CHARS).collect();
            let more = if start.len() < text.len() { "…" } else { "" };
            line(name, format!("{start}{more}"));
        }
        table
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.text.escape_debug(), self.id)
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
