//! The seam between the model and the hardware: a dozen fused operations of a decoder, with caller-owned outputs.
//!
//! A device knows weights, activations and the paged KV cache; it knows nothing of rows, requests, text or scheduling.
//! The model (`crate::model`) is written once over [`Device`]. Every operation obeys the "same row, same bits" rules:
//! the bits of one token's values depend on that sequence's tokens and on the device's fingerprint only, never on what
//! else is in the batch, how a prefill was chunked, or how many threads ran (see `ARCHITECTURE.md`, Exactness).

pub mod batch;
pub mod cpu;
#[cfg(not(cpu_alone))]
pub mod cuda;
pub mod math;
#[cfg(not(cpu_alone))]
pub mod reference;
pub mod sample;

use crate::tensor::Tensor;
use batch::{Batch, StepOutput};

/// Tokens per KV block.
pub const BLOCK_TOKENS: usize = 16;

/// How rotary embeddings pair the elements of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Elements 2i and 2i+1 (GGUF files of the llama family, whose q and k rows were permuted for it).
    Interleaved,
    /// Elements i and i + n, n being the number of rotated pairs (Hugging Face's layout).
    Halves,
}

/// Shape of the attention of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements per head; even.
    pub head_dim: usize,
    /// Multiplier of q·k before softmax (`1/sqrt(head_dim)` in most models).
    pub scale: f32,
    /// Scaled scores s become cap · tanh(s / cap) before they are masked.
    pub soft_cap: Option<f32>,
    /// Positions that a token sees, its own included (at least 1); `None` sees all before it.
    pub window: Option<usize>,
    /// How rotary embeddings pair elements.
    pub rope_style: RopeStyle,
    /// Angle per position of each rotated pair: `[rope_dim / 2]`, in radians (theta^(-2i/rope_dim), scaling included).
    pub rope_freqs: Vec<f32>,
    /// Multiplier of the rotated elements (1 in most models).
    pub rope_scale: f32,
}

/// What happens to a token's q, k and v between their projection and their rotation.
#[derive(Debug, Clone, PartialEq)]
pub struct QkvExtra<V> {
    /// Added to q, k and v, `[(n_heads + 2 · n_kv_heads) · head_dim]`.
    pub bias: Option<V>,
    /// Then applied to each head of q and of k.
    pub norms: Option<HeadNorms<V>>,
}

/// Root-mean-square norms of single heads, each `[head_dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadNorms<V> {
    /// Of the query heads.
    pub q: V,
    /// Of the key heads.
    pub k: V,
    /// Added to the mean square.
    pub eps: f32,
}

/// Elementwise function of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x)
    Silu,
    /// x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))
    GeluTanh,
}

/// How the head makes logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadSpec {
    /// Added to the mean square in the final norm.
    pub eps: f32,
    /// Logits x become cap · tanh(x / cap).
    pub soft_cap: Option<f32>,
}

/// A feed-forward layer of which each token uses a few parts.
#[derive(Debug)]
pub struct Experts<W> {
    /// `[n_experts, width]`, of a float type.
    pub router: W,
    /// All experts.
    pub experts: Vec<Expert<W>>,
    /// Experts that a token uses: those with the largest softmax of its router logits, ties to the lower number.
    pub n_used: usize,
    /// Whether the weights of the experts used are divided by their sum.
    pub renormalise: bool,
}

/// One expert.
#[derive(Debug)]
pub struct Expert<W> {
    /// As [`Device::load_gate_up`] makes it.
    pub gate_up: W,
    /// `[width, n]`
    pub down: W,
}

/// Sizes of a model's [`Experts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertSizes {
    /// Experts of a layer.
    pub n_experts: usize,
    /// Experts that a token uses.
    pub n_used: usize,
    /// Elements between an expert's projections.
    pub ffn_width: usize,
}

/// What a layer does before attention to each row by itself.
#[derive(Debug)]
pub struct BeforeAttention<'a, W, V> {
    /// `[width]`
    pub norm: &'a V,
    /// Added to the mean square.
    pub eps: f32,
    /// `[(n_heads + 2 · n_kv_heads) · head_dim, width]`
    pub qkv: &'a W,
    /// What happens to q, k and v then.
    pub extra: &'a QkvExtra<V>,
}

/// What a layer does after attention to each row by itself.
#[derive(Debug)]
pub struct AfterAttention<'a, W, V> {
    /// `[width, n_heads · head_dim]`
    pub attn_output: &'a W,
    /// `[width]`
    pub norm: &'a V,
    /// Added to the mean square.
    pub eps: f32,
    /// As [`Device::load_gate_up`] makes it.
    pub gate_up: &'a W,
    /// Of the gate.
    pub activation: Activation,
    /// `[width, ffn_width]`
    pub down: &'a W,
}

/// How large a step can get: what working memory is made for.
#[derive(Debug, Clone, Copy)]
pub struct StepSizes<'a> {
    /// Most tokens.
    pub max_tokens: usize,
    /// Most sequences, and most head rows.
    pub max_seqs: usize,
    /// Positions are below this.
    pub max_context: usize,
    /// Rows of the head's weight.
    pub n_vocab: usize,
    /// Elements of the residual stream.
    pub width: usize,
    /// The attention of each layer.
    pub attention: &'a [AttentionSpec],
    /// Of layers that have them.
    pub experts: Option<ExpertSizes>,
    /// Elements between the projections of [`Device::after_attention`], where layers have that.
    pub ffn_width: Option<usize>,
}

/// The device can do nothing any more: whatever was to be computed, no row is at fault. (What an error of [`Device::finish`] is of.)
#[derive(Debug, thiserror::Error)]
#[error("the device failed: {0}")]
pub struct Lost(pub String);

/// A device: where weights and the KV cache live and the arithmetic is done.
///
/// Shapes: `T` is the number of tokens of the step (`batch.tokens.len()`), at most the `max_tokens` that buffers were
/// made for. Buffers keep their contents between operations of one step and may be reused by the next.
pub trait Device: Send {
    /// A linear layer's weights, `[n, k]`, in the layout the device likes.
    type Weight: Send;
    /// A small f32 vector (a norm's weights).
    type Vector: Send;
    /// f32 values, `[max_tokens, width]`.
    type Hidden: Send;
    /// Activations in the form that the weight consuming them wants, `[max_tokens, k]`.
    type Act: Send;
    /// One layer's paged KV cache: `n_blocks` blocks of [`BLOCK_TOKENS`] slots.
    type Cache: Send;

    /// What the bits depend on besides the model: device, kernel version, numerics, KV type (and
    /// the instruction-set path, where paths differ in their bits).
    fn fingerprint(&self) -> String;

    /// Whether models of these sizes can run. (Devices that can run any leave it as it is.)
    ///
    /// # Errors
    /// What of it the device does not have.
    fn check(&self, _sizes: &StepSizes<'_>) -> anyhow::Result<()> {
        Ok(())
    }
    /// Told before anything is loaded what all will take: weights, caches, buffers, `reserve`. (Devices that allocate as they go
    /// leave it as it is.)
    ///
    /// # Errors
    /// There is not so much memory.
    fn make_room(&mut self, _n_bytes: usize) -> anyhow::Result<()> {
        Ok(())
    }
    /// Told after loading and after each step's last operation: operations return nothing, so a device keeps its first failure
    /// for this.
    ///
    /// # Errors
    /// [`Lost`]: something has failed since the device was made; it is of no use any more.
    fn finish(&self) -> anyhow::Result<()> {
        Ok(())
    }

    /// Loads a linear layer; several tensors are stacked along n (q, k and v become one weight). All have the same k;
    /// their types may differ.
    fn load_weight(&self, parts: &[Tensor<'_>]) -> anyhow::Result<Self::Weight>;
    /// Loads a table of embeddings, which may serve as the head's weight, too.
    fn load_table(&self, table: &Tensor<'_>) -> anyhow::Result<Self::Weight> {
        self.load_weight(std::slice::from_ref(table))
    }
    /// Loads the gate and up projections, each `[n, k]`, for [`Device::gate_up`].
    fn load_gate_up(&self, gate: &Tensor<'_>, up: &Tensor<'_>) -> anyhow::Result<Self::Weight>;
    /// Loads one of a layer's experts, by the gate, up and down projections.
    fn load_expert(&self, gate: &Tensor<'_>, up: &Tensor<'_>, down: &Tensor<'_>) -> anyhow::Result<Expert<Self::Weight>> {
        Ok(Expert { gate_up: self.load_gate_up(gate, up)?, down: self.load_weight(std::slice::from_ref(down))? })
    }
    /// Told of a layer's experts when they are loaded. (Devices that can use any leave it as it is.)
    ///
    /// # Errors
    /// They are of a form that the device does not have.
    fn check_experts(&self, _experts: &Experts<Self::Weight>) -> anyhow::Result<()> {
        Ok(())
    }
    /// Loads a vector; several tensors are put one after the other.
    fn load_vector(&self, parts: &[Tensor<'_>]) -> anyhow::Result<Self::Vector>;
    /// Bytes that a tensor takes once it is loaded.
    fn tensor_bytes(&self, tensor: &Tensor<'_>) -> usize;
    /// Bytes that tensors take that are loaded as one weight.
    fn stack_bytes(&self, parts: &[Tensor<'_>]) -> usize {
        parts.iter().map(|part| self.tensor_bytes(part)).sum()
    }
    /// Bytes that tensors take that are loaded as one weight of an expert.
    fn expert_bytes(&self, parts: &[Tensor<'_>]) -> usize {
        self.stack_bytes(parts)
    }
    /// Bytes that a table of embeddings takes.
    fn table_bytes(&self, table: &Tensor<'_>) -> usize {
        self.tensor_bytes(table)
    }
    /// Bytes that [`Device::reserve`] takes, where memory is planned for it.
    fn reserve_bytes(&self, _sizes: &StepSizes<'_>) -> usize {
        0
    }
    /// Bytes that one layer's cache takes per block.
    fn cache_block_bytes(&self, spec: &AttentionSpec) -> usize;
    /// Makes one layer's cache.
    fn new_cache(&self, spec: &AttentionSpec, n_blocks: usize) -> Self::Cache;
    /// Rows that buffers for so many tokens have.
    fn rows(&self, max_tokens: usize) -> usize {
        max_tokens
    }
    /// Makes an f32 buffer.
    fn new_hidden(&self, max_tokens: usize, width: usize) -> Self::Hidden;
    /// Makes an activation buffer that any weight with `k = width` can consume.
    fn new_act(&self, max_tokens: usize, width: usize) -> Self::Act;

    /// Makes the memory that operations need for themselves. After it, no operation on steps within `sizes` allocates;
    /// without it, they do so at first use. (The reference device, which is no production device, always allocates.)
    fn reserve(&mut self, sizes: &StepSizes<'_>);

    /// Whether operations return before what they compute is there: a step is under way then until `collect` has waited for it. The
    /// operations of the next one may be called before that, but of no other; it may take tokens that the first one draws
    /// (`batch.drawn`, which is empty for other devices).
    fn runs_alone(&self) -> bool {
        false
    }
    /// Told before a step's first operation: whether it is done already, for the device has done another of the same form before.
    /// Only for whoever calls the same operations in every step, with the same weights, caches and buffers.
    fn replay(&self, _batch: &Batch) -> bool {
        false
    }
    /// Told after a step's last operation, or instead of all: `out.rows` is there after it. Of two steps under way, it is told of the
    /// first. (Devices that compute while an operation
    /// is called leave it as it is.)
    fn collect(&self, _batch: &Batch, _out: &mut StepOutput) {}

    /// x[t] = scale · row `batch.tokens[t]` of the table (or of what `batch.drawn` says). `table` is `[vocab, width]`.
    fn embed(&self, table: &Self::Weight, scale: f32, batch: &Batch, x: &mut Self::Hidden);
    /// act[t] = x[t] / rms(x[t]) · weight, in the form `next` wants.
    #[expect(clippy::too_many_arguments, reason = "one fused operation; its operands are distinct")]
    fn norm(&self, x: &Self::Hidden, weight: &Self::Vector, eps: f32, next: &Self::Weight, batch: &Batch, act: &mut Self::Act);
    /// x[t] += y[t] / rms(y[t]) · weight.
    fn norm_add(&self, y: &Self::Hidden, weight: &Self::Vector, eps: f32, batch: &Batch, x: &mut Self::Hidden);
    /// out[t] = weight · act[t].
    fn linear(&self, act: &Self::Act, weight: &Self::Weight, batch: &Batch, out: &mut Self::Hidden);
    /// x[t] += weight · act[t].
    fn linear_add(&self, act: &Self::Act, weight: &Self::Weight, batch: &Batch, x: &mut Self::Hidden);
    /// For `qkv[t]` = (q heads, k heads, v heads): adds the bias, norms the heads of q and k, rotates them by the token's
    /// position, stores k and v in the cache slots the block tables name, then does `batch.copies` in order (after all
    /// stores: a copy may read what this step has stored).
    fn finish_qkv(
        &self,
        qkv: &mut Self::Hidden,
        extra: &QkvExtra<Self::Vector>,
        spec: &AttentionSpec,
        batch: &Batch,
        cache: &mut Self::Cache,
    );
    /// Causal attention of each token's rotated q over the positions that it sees of its sequence, from the cache: those
    /// up to its own, and no more of them than the window has; act[t] = `[n_heads · head_dim]` in the form `next` wants.
    #[expect(clippy::too_many_arguments, reason = "one fused operation; its operands are distinct")]
    fn attention(
        &self,
        qkv: &Self::Hidden,
        spec: &AttentionSpec,
        cache: &Self::Cache,
        next: &Self::Weight,
        batch: &Batch,
        act: &mut Self::Act,
    );
    /// out[t] = activation(gate · act[t]) · (up · act[t]), in the form `next` wants. `scratch` is `[T, 2 · n]`.
    #[expect(clippy::too_many_arguments, reason = "one fused operation; its operands are distinct")]
    fn gate_up(
        &self,
        act: &Self::Act,
        weight: &Self::Weight,
        f: Activation,
        next: &Self::Weight,
        batch: &Batch,
        scratch: &mut Self::Hidden,
        out: &mut Self::Act,
    );
    /// x[t] += Σ weight · down(activation(gate · act[t]) · (up · act[t])) over the experts that the token uses, in the order
    /// of their numbers. `act` has the form that the first expert's `gate_up` wants. No token is dropped.
    fn experts(&self, act: &Self::Act, experts: &Experts<Self::Weight>, f: Activation, batch: &Batch, x: &mut Self::Hidden);
    /// [`Device::norm`], [`Device::linear`] and [`Device::finish_qkv`]; `normed` may be left as it was.
    #[expect(clippy::too_many_arguments, reason = "one fused operation; its operands are distinct")]
    fn before_attention(
        &self,
        layer: &BeforeAttention<'_, Self::Weight, Self::Vector>,
        spec: &AttentionSpec,
        batch: &Batch,
        x: &Self::Hidden,
        normed: &mut Self::Act,
        qkv: &mut Self::Hidden,
        cache: &mut Self::Cache,
    ) {
        before_attention_in_turn(self, layer, spec, batch, x, normed, qkv, cache);
    }
    /// [`Device::linear_add`] of what attention gave, [`Device::norm`], [`Device::gate_up`] and `linear_add`; `normed`, `scratch`
    /// (`[T, 2 · ffn_width]`) and `gated` may be left as they were.
    #[expect(clippy::too_many_arguments, reason = "one fused operation; its operands are distinct")]
    fn after_attention(
        &self,
        layer: &AfterAttention<'_, Self::Weight, Self::Vector>,
        attended: &Self::Act,
        batch: &Batch,
        x: &mut Self::Hidden,
        normed: &mut Self::Act,
        scratch: &mut Self::Hidden,
        gated: &mut Self::Act,
    ) {
        after_attention_in_turn(self, layer, attended, batch, x, normed, scratch, gated);
    }
    /// For each of `batch.heads`: final norm, vocabulary logits, then the draw or the score it asks for
    /// (`sample::draw`), written to `out.rows` in the same order, at the latest by `collect`. The head weight is `[vocab, width]`.
    #[expect(clippy::too_many_arguments, reason = "one fused operation; its operands are distinct")]
    fn head(
        &self,
        x: &Self::Hidden,
        norm: &Self::Vector,
        weight: &Self::Weight,
        spec: &HeadSpec,
        batch: &Batch,
        out: &mut StepOutput,
    );
}

/// [`Device::before_attention`], one operation after the other.
#[expect(clippy::too_many_arguments, reason = "the operation's own")]
fn before_attention_in_turn<D: Device + ?Sized>(
    dev: &D,
    layer: &BeforeAttention<'_, D::Weight, D::Vector>,
    spec: &AttentionSpec,
    batch: &Batch,
    x: &D::Hidden,
    normed: &mut D::Act,
    qkv: &mut D::Hidden,
    cache: &mut D::Cache,
) {
    dev.norm(x, layer.norm, layer.eps, layer.qkv, batch, normed);
    dev.linear(normed, layer.qkv, batch, qkv);
    dev.finish_qkv(qkv, layer.extra, spec, batch, cache);
}

/// [`Device::after_attention`], one operation after the other.
#[expect(clippy::too_many_arguments, reason = "the operation's own")]
fn after_attention_in_turn<D: Device + ?Sized>(
    dev: &D,
    layer: &AfterAttention<'_, D::Weight, D::Vector>,
    attended: &D::Act,
    batch: &Batch,
    x: &mut D::Hidden,
    normed: &mut D::Act,
    scratch: &mut D::Hidden,
    gated: &mut D::Act,
) {
    dev.linear_add(attended, layer.attn_output, batch, x);
    dev.norm(x, layer.norm, layer.eps, layer.gate_up, batch, normed);
    dev.gate_up(normed, layer.gate_up, layer.activation, layer.down, batch, scratch, gated);
    dev.linear_add(gated, layer.down, batch, x);
}
