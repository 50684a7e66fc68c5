//! Tensor names: Hugging Face's to GGUF's. Knows nothing of what tensors hold.

use crate::model::family::Family;
use anyhow::{Result, bail};

/// The parts of a layer whose name is the same in every family.
const PARTS: [(&str, &str); 18] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.q_proj.bias", "attn_q.bias"),
    ("self_attn.k_proj.bias", "attn_k.bias"),
    ("self_attn.v_proj.bias", "attn_v.bias"),
    ("self_attn.qkv_proj.weight", "attn_qkv.weight"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.gate_up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
    ("mlp.gate.weight", "ffn_gate_inp.weight"),
    ("block_sparse_moe.gate.weight", "ffn_gate_inp.weight"),
    ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
];

/// The projections of an expert.
const EXPERT_PARTS: [(&str, &str); 6] = [
    ("gate_proj.weight", "ffn_gate"),
    ("up_proj.weight", "ffn_up"),
    ("down_proj.weight", "ffn_down"),
    ("w1.weight", "ffn_gate"),
    ("w3.weight", "ffn_up"),
    ("w2.weight", "ffn_down"),
];

/// The name that GGUF has for a tensor; `None` for one that says nothing which the configuration does not.
///
/// # Errors
/// A name without a place.
pub(super) fn neutral(name: &str, family: &Family) -> Result<Option<String>> {
    let found = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight".to_owned()),
        "model.norm.weight" => Some("output_norm.weight".to_owned()),
        "lm_head.weight" => Some("output.weight".to_owned()),
        // Old files carry the rotary frequencies that everybody computes.
        _ if name.ends_with(".rotary_emb.inv_freq") => return Ok(None),
        _ => name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')).and_then(|(layer, part)| {
            let layer: usize = layer.parse().ok()?;
            Some(format!("blk.{layer}.{}", layer_part(part, family)?))
        }),
    };
    match found {
        Some(neutral) => Ok(Some(neutral)),
        None => bail!("tensor {name} has no place in a model of type {}", family.hf.unwrap_or_default()),
    }
}

fn layer_part(part: &str, family: &Family) -> Option<String> {
    // The one name with two meanings: where outputs are normed, it is the attention's own.
    match part {
        "post_attention_layernorm.weight" if family.post_norms => return Some("post_attention_norm.weight".to_owned()),
        "post_attention_layernorm.weight" => return Some("ffn_norm.weight".to_owned()),
        "post_feedforward_layernorm.weight" => return Some("post_ffw_norm.weight".to_owned()),
        _ => {}
    }
    let expert = part.strip_prefix("mlp.experts.").or_else(|| part.strip_prefix("block_sparse_moe.experts."));
    if let Some((expert, part)) = expert.and_then(|rest| rest.split_once('.')) {
        let expert: usize = expert.parse().ok()?;
        let (_, neutral) = EXPERT_PARTS.iter().find(|(theirs, _)| *theirs == part)?;
        return Some(format!("{neutral}.{expert}.weight"));
    }
    PARTS.iter().find(|(theirs, _)| *theirs == part).map(|(_, neutral)| (*neutral).to_owned())
}
