//! `config.json`: what a model says of itself in Hugging Face's form, old and new spellings alike. Knows its field names.
//!
//! Invariant: a field that changes the arithmetic in a way the forward pass does not know is refused by name.

use super::layers::Scheme;
use crate::device::{Activation, ExpertSizes, RopeStyle};
use crate::model::family::Family;
use crate::model::rope::{self, RopeScaling};
use crate::model::{ExpertSpec, Facts, MAX_LAYERS, Rope};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

/// The fields that are read. Others describe training, or name things for people.
#[derive(Deserialize)]
#[expect(clippy::struct_field_names, reason = "fields have the names of the file")]
pub(super) struct Config {
    pub(super) model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    quantization_config: Option<Value>,
    use_bidirectional_attention: Option<bool>,
    // Rotation.
    rope_theta: Option<f32>,
    rope_local_base_freq: Option<f32>,
    rope_scaling: Option<RopeConfig>,
    rope_parameters: Option<RopeParameters>,
    original_max_position_embeddings: Option<usize>,
    partial_rotary_factor: Option<f32>,
    // Windows.
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    sliding_window_pattern: Option<usize>,
    #[serde(rename = "_sliding_window_pattern")]
    new_sliding_window_pattern: Option<usize>,
    // Gemma.
    query_pre_attn_scalar: Option<f32>,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
    // Experts.
    num_experts: Option<usize>,
    num_local_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    moe_intermediate_size: Option<usize>,
    norm_topk_prob: Option<bool>,
    mlp_only_layers: Option<Vec<usize>>,
    decoder_sparse_step: Option<usize>,
}

/// `rope_parameters`: one for all layers, or one per kind of layer.
#[derive(Deserialize)]
#[serde(untagged)]
enum RopeParameters {
    PerKind { full_attention: RopeConfig, sliding_attention: RopeConfig },
    One(RopeConfig),
}

/// `rope_scaling`, or an entry of `rope_parameters`.
#[derive(Deserialize, Default, Clone)]
struct RopeConfig {
    rope_type: Option<String>,
    /// The old name of `rope_type`.
    r#type: Option<String>,
    rope_theta: Option<f32>,
    partial_rotary_factor: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<usize>,
    attention_factor: Option<f32>,
    short_factor: Option<Vec<f32>>,
    long_factor: Option<Vec<f32>>,
}

impl Config {
    /// Whether the head is the embedding table. Gemma's files leave it out, as all its models tie them.
    pub(super) fn tied_head(&self, family: &Family) -> bool {
        self.tie_word_embeddings.unwrap_or(family.gemma)
    }

    /// How linear layers are quantised, if they are.
    pub(super) fn scheme(&self) -> Result<Option<Scheme>> {
        self.quantization_config.as_ref().map(|config| Scheme::new(config).context("quantization_config")).transpose()
    }

    /// What the file says, checked.
    pub(super) fn facts(&self, family: &Family) -> Result<Facts> {
        self.refuse_unsupported(family)?;
        let n_layers = self.num_hidden_layers;
        for (field, count) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", n_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads.unwrap_or(1)),
            ("head_dim", self.head_dim.unwrap_or(1)),
            ("max_position_embeddings", self.max_position_embeddings),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ] {
            ensure!((1..=u32::MAX as usize).contains(&count), "{field} is {count}");
        }
        ensure!(n_layers <= MAX_LAYERS, "num_hidden_layers is {n_layers}, the limit is {MAX_LAYERS}");
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads);
        let (full, local) = self.ropes(family);
        let rotated = self.partial_rotary_factor.or(full.partial_rotary_factor);
        ensure!(rotated.is_none_or(|part| part > 0.0 && part <= 1.0), "partial_rotary_factor is {}", rotated.unwrap_or_default());
        let rope_dim = rotated.map_or(head_dim, |part| (head_dim as f32 * part) as usize);
        let windowed = self.windowed(family)?;
        ensure!(self.sliding_window.is_some() || !family.gemma, "sliding_window is missing");
        let positive = |field: &str, value: Option<f32>| -> Result<Option<f32>> {
            ensure!(value.is_none_or(|value| value.is_finite() && value > 0.0), "{field} is {}", value.unwrap_or_default());
            Ok(value)
        };
        Ok(Facts {
            name: self.model_type.clone(),
            architecture: self.model_type.clone(),
            n_layers,
            width: self.hidden_size,
            ffn_width: self.expert_width().unwrap_or(self.intermediate_size),
            max_context: self.max_position_embeddings,
            norm_eps: positive("rms_norm_eps", Some(self.rms_norm_eps))?.context("rms_norm_eps is missing")?,
            tied_head: self.tied_head(family),
            n_heads: self.num_attention_heads,
            n_kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self.head_dim,
            rope_dim: Some(rope_dim),
            rope_style: RopeStyle::Halves,
            rope: self.rope(&full)?,
            local_rope: local.map(|local| self.rope(&local)).transpose()?,
            window: self.sliding_window,
            windowed,
            query_scale: positive("query_pre_attn_scalar", self.query_pre_attn_scalar)?.map(|scalar| 1.0 / scalar.sqrt()),
            score_cap: positive("attn_logit_softcapping", self.attn_logit_softcapping)?,
            logit_cap: positive("final_logit_softcapping", self.final_logit_softcapping)?,
            experts: self.experts()?,
        })
    }

    fn refuse_unsupported(&self, family: &Family) -> Result<()> {
        ensure!(self.attention_bias != Some(true), "attention_bias is not supported in {}", self.model_type);
        ensure!(self.mlp_bias != Some(true), "mlp_bias is not supported");
        ensure!(self.use_bidirectional_attention != Some(true), "use_bidirectional_attention is not supported");
        let name = self.hidden_activation.as_ref().or(self.hidden_act.as_ref());
        let known = match family.activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        };
        if let Some(name) = name {
            ensure!(name == known, "hidden_act: {name:?} is not supported in {} ({known:?} is)", self.model_type);
        }
        Ok(())
    }

    /// Rotation in layers that see all, and in those with a window where it is another one.
    fn ropes(&self, family: &Family) -> (RopeConfig, Option<RopeConfig>) {
        let default = |base| RopeConfig { rope_theta: Some(base), ..RopeConfig::default() };
        let local = self.rope_local_base_freq.or(family.local_rope_base).map(default);
        match &self.rope_parameters {
            Some(RopeParameters::PerKind { full_attention, sliding_attention }) => {
                (full_attention.clone(), Some(sliding_attention.clone()))
            }
            Some(RopeParameters::One(all)) => (all.clone(), local),
            None => {
                let mut full = self.rope_scaling.clone().unwrap_or_default();
                full.rope_theta = full.rope_theta.or(self.rope_theta).or((self.model_type == "llama").then_some(10_000.0));
                (full, local)
            }
        }
    }

    fn rope(&self, config: &RopeConfig) -> Result<Rope> {
        let base = config.rope_theta.context("rope_theta is missing")?;
        ensure!(base.is_finite() && base > 0.0, "rope_theta is {base}");
        let kind = config.rope_type.as_ref().or(config.r#type.as_ref()).map_or("default", String::as_str);
        let factor = |field: &str, value: Option<f32>| -> Result<f32> {
            let value = value.with_context(|| format!("rope scaling {kind:?}: {field} is missing"))?;
            ensure!(value.is_finite() && value > 0.0, "rope scaling {kind:?}: {field} is {value}");
            Ok(value)
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: factor("factor", config.factor)? },
            "llama3" => {
                let (low_turns, high_turns) =
                    (factor("low_freq_factor", config.low_freq_factor)?, factor("high_freq_factor", config.high_freq_factor)?);
                ensure!(low_turns < high_turns, "rope scaling {kind:?}: low_freq_factor is not below high_freq_factor");
                let factor = factor("factor", config.factor)?;
                RopeScaling::Llama3 { factor, low_turns, high_turns, original_context: self.original_context(config)? }
            }
            "longrope" | "su" => {
                let original = self.original_context(config)?;
                let stretch = config.factor.unwrap_or(self.max_position_embeddings as f32 / original as f32);
                let scale = config.attention_factor.unwrap_or_else(|| rope::long_rope_scale(stretch, original));
                // The model's context decides, not a row's length: keys in the cache must not depend on what follows them.
                let is_long = self.max_position_embeddings > original;
                let divisors = if is_long { &config.long_factor } else { &config.short_factor };
                let divisors = divisors.clone().context("rope scaling \"longrope\": long_factor or short_factor is missing")?;
                ensure!(divisors.iter().all(|d| d.is_finite() && *d > 0.0), "rope scaling {kind:?}: factors must be above 0");
                RopeScaling::Divisors { divisors, scale }
            }
            other => bail!("rope scaling {other:?} is not supported (supported: linear, llama3, longrope)"),
        };
        Ok(Rope { base, scaling })
    }

    fn original_context(&self, config: &RopeConfig) -> Result<usize> {
        let original = config.original_max_position_embeddings.or(self.original_max_position_embeddings);
        let original = original.context("rope scaling: original_max_position_embeddings is missing")?;
        ensure!(original > 1, "original_max_position_embeddings is {original}");
        Ok(original)
    }

    /// Which layers have the window.
    fn windowed(&self, family: &Family) -> Result<Vec<bool>> {
        let n_layers = self.num_hidden_layers;
        if let Some(types) = &self.layer_types {
            ensure!(types.len() == n_layers, "layer_types has {} entries for {n_layers} layers", types.len());
            let known = self.sliding_window.is_some() || types.iter().all(|kind| kind == "full_attention");
            ensure!(known, "layer_types has layers with a window, but sliding_window is missing");
            let windowed = |kind: &String| match kind.as_str() {
                "sliding_attention" => Ok(true),
                "full_attention" => Ok(false),
                other => bail!("layer_types: {other:?} is not supported"),
            };
            return types.iter().map(windowed).collect();
        }
        // Qwen's files name a window and say here that it is not used.
        if self.use_sliding_window == Some(false) || (self.model_type.starts_with("qwen") && self.use_sliding_window.is_none()) {
            return Ok(vec![false; n_layers]);
        }
        let every = self.sliding_window_pattern.or(self.new_sliding_window_pattern).unwrap_or(family.full_layer_every);
        let first = self.max_window_layers.unwrap_or(0);
        Ok((0..n_layers).map(|layer| layer >= first && (every == 0 || !(layer + 1).is_multiple_of(every))).collect())
    }

    fn n_experts(&self) -> Option<usize> {
        self.num_experts.or(self.num_local_experts).filter(|&n| n > 0)
    }

    /// Elements between an expert's projections.
    fn expert_width(&self) -> Option<usize> {
        self.n_experts().and(self.moe_intermediate_size)
    }

    fn experts(&self) -> Result<Option<ExpertSpec>> {
        let Some(n_experts) = self.n_experts() else { return Ok(None) };
        let dense = self.mlp_only_layers.as_ref().is_some_and(|layers| !layers.is_empty());
        ensure!(
            !dense && self.decoder_sparse_step.unwrap_or(1) == 1,
            "mlp_only_layers and decoder_sparse_step are not supported"
        );
        let sizes = ExpertSizes {
            n_experts,
            n_used: self.num_experts_per_tok.context("num_experts_per_tok is missing")?,
            ffn_width: self.expert_width().unwrap_or(self.intermediate_size),
        };
        // Mixtral always does it and does not say so; qwen3-moe does it where it says so.
        let renormalise = self.norm_topk_prob.unwrap_or(self.model_type == "mixtral");
        Ok(Some(ExpertSpec { sizes, renormalise, stacked: false }))
    }
}
