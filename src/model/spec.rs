//! What a model is, as data: read from a GGUF file's metadata and checked against its tensors. Knows nothing of devices.
//!
//! Invariant: a [`ModelSpec`] that exists describes its file completely. Metadata or tensors with a meaning that the
//! forward pass does not have are refused by name, never ignored.

use crate::device::{Activation, AttentionSpec, RopeStyle};
use crate::gguf::Gguf;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;

/// Values of `general.architecture` that [`ModelSpec::from_gguf`] understands.
pub const ARCHITECTURES: [&str; 1] = ["llama"];

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The name that the file gives its model, for people.
    pub name: String,
    /// Decoder layers.
    pub n_layers: usize,
    /// Elements of the residual stream.
    pub width: usize,
    /// Elements between the feed-forward layer's projections.
    pub ffn_width: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Most positions of a sequence (prompt and completion).
    pub max_context: usize,
    /// Added to the mean square in every norm.
    pub norm_eps: f32,
    /// Attention, the same in every layer.
    pub attention: AttentionSpec,
    /// Of the feed-forward layer's gate.
    pub activation: Activation,
    /// Whether the vocabulary's logits come from the embedding table (no `output.weight` in the file).
    pub tied_head: bool,
}

impl ModelSpec {
    /// Reads the spec of a GGUF file and checks every tensor's name and shape.
    ///
    /// Metadata keys: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
    ///
    /// # Errors
    /// An architecture that is not supported, missing or contradictory metadata, a feature that the forward pass does not
    /// have, a tensor that is missing, unknown or of the wrong shape.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Self::read(gguf).with_context(|| format!("cannot use the model {}", gguf.path().display()))
    }

    fn read(gguf: &Gguf) -> Result<Self> {
        let arch = gguf.str("general.architecture").context("metadata key general.architecture is missing")?;
        ensure!(
            ARCHITECTURES.contains(&arch),
            "architecture {arch:?} is not supported (supported: {})",
            ARCHITECTURES.join(", ")
        );
        let keys = Keys { gguf, arch };
        refuse_unsupported(&keys)?;
        let width = keys.count("embedding_length")?;
        let embeddings = gguf.tensor("token_embd.weight")?;
        ensure!(embeddings.shape.len() == 2, "tensor token_embd.weight has {} dimensions, expected 2", embeddings.shape.len());
        let (n_layers, n_tensors) = (keys.count("block_count")?, gguf.tensor_names().len());
        ensure!(
            n_layers <= n_tensors,
            "metadata key {} is {n_layers}, but the file has only {n_tensors} tensors",
            keys.key("block_count")
        );
        let spec = Self {
            name: gguf.str("general.name").unwrap_or("unnamed").to_owned(),
            n_layers,
            width,
            ffn_width: keys.count("feed_forward_length")?,
            n_vocab: embeddings.shape[0],
            max_context: keys.count("context_length")?,
            norm_eps: keys.f32("attention.layer_norm_rms_epsilon")?,
            attention: attention(&keys, width)?,
            activation: Activation::Silu,
            tied_head: gguf.find_tensor("output.weight").is_none(),
        };
        check_tensors(gguf, &spec.tensor_shapes())?;
        Ok(spec)
    }

    /// Query, key and value elements of a token: what the first projection of a layer gives.
    pub fn qkv_width(&self) -> usize {
        (self.attention.n_heads + 2 * self.attention.n_kv_heads) * self.attention.head_dim
    }

    /// Query elements of a token: what attention gives.
    pub fn q_width(&self) -> usize {
        self.attention.n_heads * self.attention.head_dim
    }

    /// Every tensor that the file must have and its shape, outermost dimension first.
    fn tensor_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let (width, ffn_width, q_width) = (self.width, self.ffn_width, self.q_width());
        let kv_width = self.attention.n_kv_heads * self.attention.head_dim;
        let mut shapes = BTreeMap::from([
            ("token_embd.weight".to_owned(), vec![self.n_vocab, width]),
            ("output_norm.weight".to_owned(), vec![width]),
        ]);
        if !self.tied_head {
            shapes.insert("output.weight".to_owned(), vec![self.n_vocab, width]);
        }
        for layer in 0..self.n_layers {
            for (part, shape) in [
                ("attn_norm", vec![width]),
                ("attn_q", vec![q_width, width]),
                ("attn_k", vec![kv_width, width]),
                ("attn_v", vec![kv_width, width]),
                ("attn_output", vec![width, q_width]),
                ("ffn_norm", vec![width]),
                ("ffn_gate", vec![ffn_width, width]),
                ("ffn_up", vec![ffn_width, width]),
                ("ffn_down", vec![width, ffn_width]),
            ] {
                shapes.insert(layer_tensor(layer, part), shape);
            }
        }
        shapes
    }
}

/// The name of a layer's tensor.
pub(super) fn layer_tensor(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}.weight")
}

/// Optional: divides the rotary frequencies one by one (Llama 3's long-context scaling).
const ROPE_FREQS: &str = "rope_freqs.weight";

/// Metadata under the architecture's prefix.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    /// A count that may be absent, but not 0.
    fn find_count(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.gguf.u64(&self.key(name)) else { return Ok(None) };
        ensure!((1..=u64::from(u32::MAX)).contains(&value), "metadata key {} is {value}", self.key(name));
        Ok(Some(value as usize))
    }

    fn count(&self, name: &str) -> Result<usize> {
        self.find_count(name)?.with_context(|| format!("metadata key {} is missing or no integer", self.key(name)))
    }

    fn find_f32(&self, name: &str) -> Result<Option<f32>> {
        let Some(value) = self.gguf.f32(&self.key(name)) else { return Ok(None) };
        ensure!(value.is_finite() && value > 0.0, "metadata key {} is {value}", self.key(name));
        Ok(Some(value))
    }

    fn f32(&self, name: &str) -> Result<f32> {
        self.find_f32(name)?.with_context(|| format!("metadata key {} is missing or no float", self.key(name)))
    }
}

/// Fails on metadata that changes the arithmetic in a way the forward pass does not know.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<()> {
    let (gguf, key) = (keys.gguf, |name: &str| keys.key(name));
    let scaling = gguf.str(&key("rope.scaling.type")).unwrap_or("none");
    ensure!(scaling == "none", "{}: rope scaling {scaling:?} is not supported", key("rope.scaling.type"));
    for name in ["rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor"] {
        let factor = gguf.f32(&key(name)).unwrap_or(1.0);
        ensure!([0.0, 1.0].contains(&factor), "{}: rope scaling by {factor} is not supported", key(name));
    }
    let n_experts = gguf.u64(&key("expert_count")).unwrap_or(0);
    ensure!(n_experts == 0, "{}: mixture of {n_experts} experts is not supported", key("expert_count"));
    if let Some(window) = gguf.u64(&key("attention.sliding_window"))
        && window > 0
        && window < keys.count("context_length")? as u64
    {
        bail!("{}: a sliding window of {window} tokens is not supported", key("attention.sliding_window"));
    }
    for name in ["embedding_scale", "residual_scale", "logit_scale", "attention.scale"] {
        let factor = gguf.f32(&key(name)).unwrap_or(0.0);
        ensure!(factor == 0.0, "{}: scaling by {factor} is not supported", key(name));
    }
    Ok(())
}

fn attention(keys: &Keys<'_>, width: usize) -> Result<AttentionSpec> {
    let n_heads = keys.count("attention.head_count")?;
    let n_kv_heads = keys.find_count("attention.head_count_kv")?.unwrap_or(n_heads);
    ensure!(n_heads.is_multiple_of(n_kv_heads), "{n_heads} query heads can't share {n_kv_heads} key/value heads");
    let head_dim = match keys.find_count("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if width.is_multiple_of(n_heads) => width / n_heads,
        None => {
            bail!("{width} elements can't be split among {n_heads} heads, and {} is missing", keys.key("attention.key_length"))
        }
    };
    let value_dim = keys.find_count("attention.value_length")?.unwrap_or(head_dim);
    ensure!(value_dim == head_dim, "values of {value_dim} elements beside keys of {head_dim} are not supported");
    let rope_dim = keys.find_count("rope.dimension_count")?.unwrap_or(head_dim);
    ensure!(
        head_dim.is_multiple_of(2) && rope_dim.is_multiple_of(2) && rope_dim <= head_dim,
        "rotary embedding of {rope_dim} of {head_dim} elements: both must be even, the first not larger"
    );
    let mut rope_freqs = rope_frequencies(keys.find_f32("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_BASE), rope_dim);
    divide_by_file(keys.gguf, &mut rope_freqs)?;
    let scale = 1.0 / (head_dim as f32).sqrt();
    Ok(AttentionSpec { n_heads, n_kv_heads, head_dim, scale, rope_style: RopeStyle::Interleaved, rope_freqs })
}

/// The rotary base of a file that names none (GGUF specification).
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

/// base^(-2i / `rope_dim`) for each pair i, rounded once from f64 (not by the system's pow, whose last bits differ from
/// machine to machine).
fn rope_frequencies(base: f32, rope_dim: usize) -> Vec<f32> {
    (0..rope_dim / 2).map(|i| libm::pow(f64::from(base), -2.0 * i as f64 / rope_dim as f64) as f32).collect()
}

/// Applies [`ROPE_FREQS`], if the file has it.
fn divide_by_file(gguf: &Gguf, freqs: &mut [f32]) -> Result<()> {
    let Some(tensor) = gguf.find_tensor(ROPE_FREQS) else { return Ok(()) };
    let (factors, rest) = tensor.bytes.as_chunks::<4>();
    ensure!(
        tensor.dtype == crate::tensor::DType::F32 && rest.is_empty() && factors.len() == freqs.len(),
        "tensor {ROPE_FREQS} is {:?} {:?}, expected F32 [{}]",
        tensor.dtype,
        tensor.shape,
        freqs.len()
    );
    for (freq, factor) in freqs.iter_mut().zip(factors) {
        let factor = f32::from_le_bytes(*factor);
        ensure!(factor.is_finite() && factor > 0.0, "tensor {ROPE_FREQS} holds {factor}");
        *freq /= factor;
    }
    Ok(())
}

/// Fails unless the file has exactly these tensors (and perhaps [`ROPE_FREQS`]).
fn check_tensors(gguf: &Gguf, shapes: &BTreeMap<String, Vec<usize>>) -> Result<()> {
    for (name, shape) in shapes {
        let found = gguf.tensor(name)?.shape;
        ensure!(&found == shape, "tensor {name}: expected shape {shape:?}, found {found:?}");
    }
    for name in gguf.tensor_names() {
        ensure!(name == ROPE_FREQS || shapes.contains_key(name), "tensor {name} has no place in this architecture");
    }
    Ok(())
}
