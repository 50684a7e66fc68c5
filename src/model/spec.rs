//! What a model is, as data: made from what a file says and what its family means without saying it, and checked against
//! the file's tensors. Knows no file format and no device.
//!
//! Invariant: a [`ModelSpec`] that exists describes its file completely. Tensors with a meaning that the forward pass does
//! not have are refused by name, never ignored.

use super::family::Family;
use super::file::ModelFile;
use super::rope::{self, RopeScaling};
use crate::device::{Activation, AttentionSpec, ExpertSizes, RopeStyle, StepSizes};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a part that a model has or has not")]
pub struct ModelSpec {
    /// The name that the file gives its model, for people.
    pub name: String,
    /// The family's name, as the file has it.
    pub architecture: String,
    /// Elements of the residual stream.
    pub width: usize,
    /// Elements between the projections of the feed-forward layer, or of one expert.
    pub ffn_width: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Most positions of a sequence (prompt and completion).
    pub max_context: usize,
    /// Added to the mean square in every norm.
    pub norm_eps: f32,
    /// What embeddings are multiplied by.
    pub embed_scale: f32,
    /// Attention of each layer. Heads and their sizes are the same in all.
    pub attention: Vec<AttentionSpec>,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// Each head of q and of k is normed.
    pub head_norms: bool,
    /// The outputs of attention and of the feed-forward layer are normed before they are added.
    pub post_norms: bool,
    /// q, k and v are one tensor; gate and up are another.
    pub fused: bool,
    /// Of the feed-forward layer's gate.
    pub activation: Activation,
    /// Of layers that have experts in the place of one feed-forward layer.
    pub experts: Option<ExpertSpec>,
    /// Logits x become cap · tanh(x / cap).
    pub logit_cap: Option<f32>,
    /// Whether the vocabulary's logits come from the embedding table (no `output.weight` in the file).
    pub tied_head: bool,
}

/// The experts of every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertSpec {
    /// How many, how large.
    pub sizes: ExpertSizes,
    /// Whether the weights of the experts that a token uses are divided by their sum.
    pub renormalise: bool,
    /// Whether the file has all experts of a layer in one tensor, `[n_experts, n, k]`.
    pub stacked: bool,
}

/// What a file says of its model.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// As in [`ModelSpec`].
    pub name: String,
    /// As in [`ModelSpec`].
    pub architecture: String,
    /// Decoder layers.
    pub n_layers: usize,
    /// As in [`ModelSpec`].
    pub width: usize,
    /// As in [`ModelSpec`].
    pub ffn_width: usize,
    /// As in [`ModelSpec`].
    pub max_context: usize,
    /// As in [`ModelSpec`].
    pub norm_eps: f32,
    /// As in [`ModelSpec`].
    pub tied_head: bool,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Elements of a head; `width / n_heads` if the file does not say.
    pub head_dim: Option<usize>,
    /// Rotated elements of a head; all if the file does not say.
    pub rope_dim: Option<usize>,
    /// How the file orders the rows of q and k.
    pub rope_style: RopeStyle,
    /// Rotation in layers that see all.
    pub rope: Rope,
    /// Rotation in layers with a window, where it is another one.
    pub local_rope: Option<Rope>,
    /// Positions that a token sees in layers with a window, its own included.
    pub window: Option<usize>,
    /// Whether each layer has the window.
    pub windowed: Vec<bool>,
    /// Multiplier of q·k; `1/sqrt(head_dim)` if the file does not say.
    pub query_scale: Option<f32>,
    /// Cap of the attention's scores.
    pub score_cap: Option<f32>,
    /// As in [`ModelSpec`].
    pub logit_cap: Option<f32>,
    /// As in [`ModelSpec`].
    pub experts: Option<ExpertSpec>,
}

/// Rotary embedding of some layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// base^(-2i / n) is the angle of pair i of n/2 per position.
    pub base: f32,
    /// What is done to it.
    pub scaling: RopeScaling,
}

impl ModelSpec {
    /// Puts together what a file says and what its family means, and checks both against the file's tensors.
    ///
    /// # Errors
    /// Contradictory facts; experts in a family that has none; a tensor that is missing, unknown or of the wrong shape.
    pub fn new(family: &Family, facts: Facts, file: &dyn ModelFile) -> Result<Self> {
        let embeddings = file.tensor("token_embd.weight")?;
        ensure!(embeddings.shape.len() == 2, "tensor token_embd.weight has {} dimensions, expected 2", embeddings.shape.len());
        ensure!(facts.experts.is_none() || family.experts, "experts are not supported in architecture {}", facts.architecture);
        check_sizes(&facts, file.tensor_names().len())?;
        let spec = Self {
            attention: attention(&facts)?,
            name: facts.name,
            architecture: facts.architecture,
            width: facts.width,
            ffn_width: facts.ffn_width,
            n_vocab: embeddings.shape[0],
            max_context: facts.max_context,
            norm_eps: facts.norm_eps,
            embed_scale: if family.gemma { (facts.width as f32).sqrt() } else { 1.0 },
            qkv_bias: family.qkv_bias,
            head_norms: family.head_norms,
            post_norms: family.post_norms,
            fused: family.fused,
            activation: family.activation,
            experts: facts.experts,
            logit_cap: facts.logit_cap,
            tied_head: facts.tied_head,
        };
        spec.check_tensors(file)?;
        Ok(spec)
    }

    /// Decoder layers.
    pub fn n_layers(&self) -> usize {
        self.attention.len()
    }

    /// Query, key and value elements of a token: what the first projection of a layer gives.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }

    /// How large steps of that many tokens can get, with sequences as long as the model takes.
    pub fn step_sizes(&self, max_tokens: usize) -> StepSizes<'_> {
        StepSizes {
            max_tokens,
            max_seqs: max_tokens,
            max_context: self.max_context,
            n_vocab: self.n_vocab,
            width: self.width,
            attention: &self.attention,
            experts: self.experts.map(|experts| experts.sizes),
            ffn_width: (self.experts.is_none() && !self.post_norms).then_some(self.ffn_width),
        }
    }

    /// Query elements of a token: what attention gives.
    pub fn q_width(&self) -> usize {
        self.attention[0].n_heads * self.attention[0].head_dim
    }

    /// Key elements of a token.
    fn kv_width(&self) -> usize {
        self.attention[0].n_kv_heads * self.attention[0].head_dim
    }

    /// Every tensor that the file must have and its shape, outermost dimension first.
    fn tensor_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let mut shapes = BTreeMap::from([
            ("token_embd.weight".to_owned(), vec![self.n_vocab, self.width]),
            ("output_norm.weight".to_owned(), vec![self.width]),
        ]);
        if !self.tied_head {
            shapes.insert("output.weight".to_owned(), vec![self.n_vocab, self.width]);
        }
        let parts = [self.attention_shapes(), self.ffn_shapes()].concat();
        for layer in 0..self.n_layers() {
            shapes.extend(parts.iter().map(|(part, shape)| (layer_tensor(layer, part), shape.clone())));
        }
        shapes
    }

    /// Tensors of a layer's attention and all its norms.
    fn attention_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (width, q_width, kv_width, head_dim) = (self.width, self.q_width(), self.kv_width(), self.attention[0].head_dim);
        let mut shapes = vec![
            ("attn_norm.weight", vec![width]),
            ("attn_output.weight", vec![width, q_width]),
            ("ffn_norm.weight", vec![width]),
        ];
        if self.fused {
            shapes.push(("attn_qkv.weight", vec![self.qkv_width(), width]));
        } else {
            let parts = [("attn_q.weight", q_width), ("attn_k.weight", kv_width), ("attn_v.weight", kv_width)];
            shapes.extend(parts.map(|(part, n)| (part, vec![n, width])));
        }
        if self.qkv_bias {
            let parts = [("attn_q.bias", q_width), ("attn_k.bias", kv_width), ("attn_v.bias", kv_width)];
            shapes.extend(parts.map(|(part, n)| (part, vec![n])));
        }
        if self.head_norms {
            shapes.extend(["attn_q_norm.weight", "attn_k_norm.weight"].map(|part| (part, vec![head_dim])));
        }
        if self.post_norms {
            shapes.extend(["post_attention_norm.weight", "post_ffw_norm.weight"].map(|part| (part, vec![width])));
        }
        shapes.into_iter().map(|(part, shape)| (part.to_owned(), shape)).collect()
    }

    /// Tensors of a layer's feed-forward part.
    fn ffn_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (width, n) = (self.width, self.ffn_width);
        let parts = [("ffn_gate", vec![n, width]), ("ffn_up", vec![n, width]), ("ffn_down", vec![width, n])];
        let Some(experts) = self.experts else {
            let fused = vec![("ffn_up", vec![2 * n, width]), ("ffn_down", vec![width, n])];
            let parts = if self.fused { fused } else { parts.into() };
            return parts.into_iter().map(|(part, shape)| (format!("{part}.weight"), shape)).collect();
        };
        let n_experts = experts.sizes.n_experts;
        let mut shapes = vec![("ffn_gate_inp.weight".to_owned(), vec![n_experts, width])];
        for (part, shape) in parts {
            if experts.stacked {
                shapes.push((format!("{part}_exps.weight"), [vec![n_experts], shape].concat()));
            } else {
                shapes.extend((0..n_experts).map(|e| (format!("{part}.{e}.weight"), shape.clone())));
            }
        }
        shapes
    }

    /// Fails unless the file has exactly these tensors (and perhaps some of [`SIDE_TENSORS`]).
    fn check_tensors(&self, file: &dyn ModelFile) -> Result<()> {
        let shapes = self.tensor_shapes();
        for (name, shape) in &shapes {
            let found = file.tensor(name)?.shape;
            ensure!(&found == shape, "tensor {name}: expected shape {shape:?}, found {found:?}");
        }
        for name in file.tensor_names() {
            let known = SIDE_TENSORS.contains(&name) || shapes.contains_key(name);
            ensure!(known, "tensor {name} has no place in this architecture");
        }
        Ok(())
    }
}

/// Tensors that are read as facts, where a file has them.
const SIDE_TENSORS: [&str; 3] = ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// The name of a layer's tensor; `part` ends in `weight` or `bias`.
pub(super) fn layer_tensor(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}")
}

/// More layers than any model has; keeps a damaged file from costing memory.
pub(crate) const MAX_LAYERS: usize = 4096;
/// Larger heads than any model has; the same.
const MAX_HEAD_DIM: usize = 8192;

/// Fails on sizes that no model has, or whose tensors can't all be in the file: what is made of them next would cost memory.
fn check_sizes(facts: &Facts, n_tensors: usize) -> Result<()> {
    ensure!(facts.n_layers <= n_tensors, "{} layers, but only {n_tensors} tensors", facts.n_layers);
    ensure!(facts.n_layers <= MAX_LAYERS, "{} layers, the limit is {MAX_LAYERS}", facts.n_layers);
    if let Some(ExpertSpec { sizes: ExpertSizes { n_experts, n_used, .. }, stacked, .. }) = facts.experts {
        ensure!((1..=n_experts).contains(&n_used), "a token can't use {n_used} of {n_experts} experts");
        let n_apart = if stacked { 1 } else { n_experts };
        let fits = n_apart.checked_mul(facts.n_layers).is_some_and(|n| n <= n_tensors);
        ensure!(fits, "{n_experts} experts in each of {} layers, but only {n_tensors} tensors", facts.n_layers);
    }
    Ok(())
}

/// The attention of each layer.
fn attention(facts: &Facts) -> Result<Vec<AttentionSpec>> {
    let Facts { n_heads, n_kv_heads, width, .. } = *facts;
    ensure!(n_heads.is_multiple_of(n_kv_heads), "{n_heads} query heads can't share {n_kv_heads} key/value heads");
    let even = || width.is_multiple_of(n_heads).then_some(width / n_heads);
    let head_dim = facts.head_dim.or_else(even).with_context(|| {
        format!("{width} elements can't be split among {n_heads} heads, and the file does not say how large a head is")
    })?;
    let rope_dim = facts.rope_dim.unwrap_or(head_dim);
    ensure!(head_dim <= MAX_HEAD_DIM, "{n_heads} heads of {head_dim} elements, the limit is {MAX_HEAD_DIM}");
    ensure!(
        head_dim.is_multiple_of(2) && rope_dim.is_multiple_of(2) && rope_dim <= head_dim,
        "rotary embedding of {rope_dim} of {head_dim} elements: both must be even, the first not larger"
    );
    assert_eq!(facts.windowed.len(), facts.n_layers, "one entry per layer");
    // A window that no sequence outgrows is none.
    let window = facts.window.filter(|&window| window < facts.max_context);
    let layer = |&windowed: &bool| -> Result<AttentionSpec> {
        let rope = facts.local_rope.as_ref().filter(|_| windowed).unwrap_or(&facts.rope);
        if let RopeScaling::Divisors { divisors, .. } = &rope.scaling {
            let n = divisors.len();
            ensure!(n == rope_dim / 2, "{n} rotary factors for {} rotated pairs", rope_dim / 2);
        }
        let (rope_freqs, rope_scale) = rope::frequencies(rope.base, rope_dim, &rope.scaling);
        Ok(AttentionSpec {
            n_heads,
            n_kv_heads,
            head_dim,
            scale: facts.query_scale.unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt()),
            soft_cap: facts.score_cap,
            window: window.filter(|_| windowed),
            rope_style: facts.rope_style,
            rope_freqs,
            rope_scale,
        })
    };
    facts.windowed.iter().map(layer).collect()
}
