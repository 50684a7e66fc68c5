//! The buffers of a forward pass and the KV caches: made once, before the first step. Knows their sizes, nothing of what
//! is computed in them.

use super::{ExpertSpec, ModelFile, ModelSpec};
use crate::device::Device;

/// Every buffer that a step writes, for up to `max_step_tokens` tokens.
pub struct Workspace<D: Device> {
    /// Residual stream, `[T, width]`.
    pub x: D::Hidden,
    /// Queries, keys and values, `[T, (n_heads + 2 · n_kv_heads) · head_dim]`.
    pub qkv: D::Hidden,
    /// Gate and up projections, `[T, 2 · ffn_width]`.
    pub gate_up: D::Hidden,
    /// What a norm gives, `[T, width]`.
    pub normed: D::Act,
    /// What attention gives, `[T, n_heads · head_dim]`.
    pub attended: D::Act,
    /// What the gate gives, `[T, ffn_width]`.
    pub gated: D::Act,
    /// What is normed before it is added to `x`, `[T, width]`; `[T, 0]` in models that do not do so.
    pub branch: D::Hidden,
}

impl<D: Device> Workspace<D> {
    /// Makes the buffers.
    pub fn new(dev: &D, spec: &ModelSpec, max_step_tokens: usize) -> Self {
        // Experts have memory of their own (`Device::reserve`).
        let ffn_width = if spec.experts.is_some() { 0 } else { spec.ffn_width };
        Self {
            x: dev.new_hidden(max_step_tokens, spec.width),
            qkv: dev.new_hidden(max_step_tokens, spec.qkv_width()),
            gate_up: dev.new_hidden(max_step_tokens, 2 * ffn_width),
            normed: dev.new_act(max_step_tokens, spec.width),
            attended: dev.new_act(max_step_tokens, spec.q_width()),
            gated: dev.new_act(max_step_tokens, ffn_width),
            branch: dev.new_hidden(max_step_tokens, if spec.post_norms { spec.width } else { 0 }),
        }
    }
}

/// How much memory a model needs; what `n_blocks` is derived from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizing {
    /// Bytes of one KV block over all layers (it holds `BLOCK_TOKENS` tokens).
    pub kv_block_bytes: usize,
    /// Bytes of a [`Workspace`] if every element is an f32 and no buffer is left out: what a device needs is near this.
    pub workspace_bytes: usize,
    /// Bytes of the weights in the device's own layout.
    pub weights_bytes: usize,
    /// Bytes of the device's own memory for steps, where it plans that ahead.
    pub reserve_bytes: usize,
}

impl Sizing {
    /// Everything but the KV cache.
    pub fn fixed_bytes(&self) -> usize {
        self.weights_bytes + self.workspace_bytes + self.reserve_bytes
    }
}

/// Sizes a model on a device, before anything is allocated.
pub fn sizing<D: Device>(dev: &D, spec: &ModelSpec, file: &dyn ModelFile, max_step_tokens: usize) -> Sizing {
    let ffn_elements = match spec.experts {
        None => 3 * spec.ffn_width,
        // A use is (expert, token, weight).
        Some(ExpertSpec { sizes, .. }) => sizes.n_experts + 3 * sizes.n_used + 2 * spec.width + sizes.ffn_width,
    };
    let branch_elements = if spec.post_norms { spec.width } else { 0 };
    let row_elements = 2 * spec.width + spec.qkv_width() + spec.q_width() + ffn_elements + branch_elements;
    Sizing {
        kv_block_bytes: spec.attention.iter().map(|attention| dev.cache_block_bytes(attention)).sum(),
        workspace_bytes: dev.rows(max_step_tokens) * row_elements * size_of::<f32>(),
        weights_bytes: weights_bytes(dev, file),
        reserve_bytes: dev.reserve_bytes(&spec.step_sizes(max_step_tokens)),
    }
}

/// The parts of a layer that become one weight with that one, in their order.
fn stack_of(part: &str) -> Vec<String> {
    let qkv = ["attn_q.weight", "attn_k.weight", "attn_v.weight"];
    if qkv.contains(&part) {
        return qkv.map(String::from).to_vec();
    }
    // Of a dense layer, of all experts, of one of them.
    match part.strip_prefix("ffn_gate").or_else(|| part.strip_prefix("ffn_up")) {
        Some(of) => ["ffn_gate", "ffn_up"].map(|part| format!("{part}{of}")).to_vec(),
        None => vec![part.to_owned()],
    }
}

/// All tensors as they are loaded: some as one weight, those of experts one by one, the embeddings as a table.
fn weights_bytes<D: Device>(dev: &D, file: &dyn ModelFile) -> usize {
    let bytes = |name: &str| -> usize {
        let Some(tensor) = file.find_tensor(name) else { return 0 };
        if name == "token_embd.weight" {
            return dev.table_bytes(&tensor);
        }
        let Some((layer, part)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            return dev.tensor_bytes(&tensor);
        };
        let mut parts: Vec<_> =
            stack_of(part).iter().filter_map(|part| file.find_tensor(&format!("blk.{layer}.{part}"))).collect();
        // Counted with its first part.
        if parts.first().is_none_or(|first| first.name != tensor.name) {
            return 0;
        }
        let mut n_weights = 1;
        if tensor.shape.len() == 3 {
            n_weights = tensor.shape[0];
            parts = parts.iter().map(|part| part.entry(0)).collect();
        }
        // `ffn_up.3.weight`: where experts are not stacked.
        if tensor.shape.len() == 3 || part.matches('.').count() == 2 {
            return n_weights * dev.expert_bytes(&parts);
        }
        n_weights * if parts.len() == 1 { dev.tensor_bytes(&parts[0]) } else { dev.stack_bytes(&parts) }
    };
    file.tensor_names().into_iter().map(bytes).sum()
}
