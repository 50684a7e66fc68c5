//! Model families as data: what the files of a family mean without saying it. Knows no file format beyond the names that
//! files give their family.
//!
//! Sources: the families' implementations in the Python package `transformers` 5 and in llama.cpp (`src/llama-model.cpp`).

use crate::device::{Activation, RopeStyle};

/// What the models of a family have in common.
#[derive(Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a part that a family has or has not")]
pub struct Family {
    /// `general.architecture` of its GGUF files, if it has one of its own there.
    pub gguf: Option<&'static str>,
    /// `model_type` of its configurations in Hugging Face's form.
    pub hf: Option<&'static str>,
    /// How GGUF files order the rows of q and k (Hugging Face's are always `Halves`).
    pub gguf_rope: RopeStyle,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// Each head of q and of k is normed.
    pub head_norms: bool,
    /// The outputs of attention and of the feed-forward layer are normed before they are added.
    pub post_norms: bool,
    /// q, k, v are one tensor, gate and up another.
    pub fused: bool,
    /// Experts may take the place of the feed-forward layer: those of a file that counts some.
    pub experts: bool,
    /// Of the gate.
    pub activation: Activation,
    /// Embeddings are multiplied by sqrt(width); norms in Hugging Face's files hold weight − 1.
    pub gemma: bool,
    /// Scores and logits are capped, in GGUF files by what these say.
    pub capped: bool,
    /// A file that has a window but does not list its layers means: every n-th layer sees all (0: none does).
    pub full_layer_every: usize,
    /// Rotary base of layers with a window, where it differs from that of the others and the file does not say.
    pub local_rope_base: Option<f32>,
    /// A file of this many layers that does not say it scales queries by width / heads (not by the head's elements).
    pub scaled_by_width: Option<usize>,
}

const LLAMA: Family = Family {
    gguf: None,
    hf: None,
    gguf_rope: RopeStyle::Interleaved,
    qkv_bias: false,
    head_norms: false,
    post_norms: false,
    fused: false,
    experts: false,
    activation: Activation::Silu,
    gemma: false,
    capped: false,
    full_layer_every: 0,
    local_rope_base: None,
    scaled_by_width: None,
};

const QWEN: Family = Family { gguf_rope: RopeStyle::Halves, ..LLAMA };

const GEMMA: Family = Family { post_norms: true, activation: Activation::GeluTanh, gemma: true, ..QWEN };

/// All families. GGUF files of mistral and mixtral call themselves llama.
pub const FAMILIES: &[Family] = &[
    Family { gguf: Some("llama"), hf: Some("llama"), experts: true, ..LLAMA },
    Family { hf: Some("mistral"), ..LLAMA },
    Family { hf: Some("mixtral"), experts: true, ..LLAMA },
    Family { gguf: Some("qwen2"), hf: Some("qwen2"), qkv_bias: true, ..QWEN },
    Family { gguf: Some("qwen3"), hf: Some("qwen3"), head_norms: true, ..QWEN },
    Family { gguf: Some("qwen3moe"), hf: Some("qwen3_moe"), head_norms: true, experts: true, ..QWEN },
    Family { gguf: Some("gemma2"), hf: Some("gemma2"), capped: true, full_layer_every: 2, scaled_by_width: Some(46), ..GEMMA },
    Family {
        gguf: Some("gemma3"),
        hf: Some("gemma3_text"),
        head_norms: true,
        full_layer_every: 6,
        local_rope_base: Some(10_000.0),
        scaled_by_width: Some(62),
        ..GEMMA
    },
    Family { gguf: Some("phi3"), hf: Some("phi3"), fused: true, ..QWEN },
];

/// The family of that name, names being one of the two kinds.
///
/// # Errors
/// An unknown name; the message lists the known ones.
pub fn find(name: &str, kind: fn(&Family) -> Option<&'static str>) -> anyhow::Result<&'static Family> {
    FAMILIES.iter().find(|family| kind(family) == Some(name)).ok_or_else(|| {
        let known: Vec<_> = FAMILIES.iter().filter_map(kind).collect();
        anyhow::anyhow!("architecture {name:?} is not supported (supported: {})", known.join(", "))
    })
}
