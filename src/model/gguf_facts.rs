//! Reads what a GGUF file says of its model. Knows GGUF's keys
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), nothing of devices.
//!
//! Invariant: metadata with a meaning that the forward pass does not have is refused by name, never ignored.

use super::family::{self, Family};
use super::file::ModelFile;
use super::rope::RopeScaling;
use super::spec::{ExpertSpec, Facts, ModelSpec, Rope};
use crate::device::ExpertSizes;
use crate::gguf::Gguf;
use crate::tensor::{DType, Tensor};
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;

impl ModelFile for Gguf {
    fn path(&self) -> &Path {
        self.path()
    }

    fn architecture(&self) -> String {
        self.str("general.architecture").unwrap_or_default().to_owned()
    }

    fn spec(&self) -> Result<ModelSpec> {
        ModelSpec::from_gguf(self)
    }

    fn find_tensor(&self, name: &str) -> Option<Tensor<'_>> {
        self.find_tensor(name)
    }

    fn tensor_names(&self) -> Vec<&str> {
        self.tensor_names()
    }

    fn content(&self) -> Vec<&[u8]> {
        vec![self.bytes()]
    }

    fn release(&self) {
        self.release();
    }
}

impl ModelSpec {
    /// Reads the spec of a GGUF file and checks every tensor's name and shape.
    ///
    /// # Errors
    /// An architecture that is not supported, missing or contradictory metadata, a feature that the forward pass does not
    /// have, a tensor that is missing, unknown or of the wrong shape.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let read = || {
            let arch = gguf.str("general.architecture").context("metadata key general.architecture is missing")?;
            let family = family::find(arch, |family| family.gguf)?;
            Self::new(family, facts(gguf, arch, family)?, gguf)
        };
        read().with_context(|| format!("cannot use the model {}", gguf.path().display()))
    }
}

fn facts(gguf: &Gguf, arch: &str, family: &Family) -> Result<Facts> {
    let keys = Keys { gguf, arch };
    refuse_unsupported(&keys)?;
    let (n_layers, n_heads, width) =
        (keys.count("block_count")?, keys.count("attention.head_count")?, keys.count("embedding_length")?);
    // The file holds at least one tensor per layer; more layers are damage, and would cost memory below.
    let n_tensors = gguf.tensor_names().len();
    ensure!(
        n_layers <= n_tensors,
        "metadata key {} is {n_layers}, but the file has only {n_tensors} tensors",
        keys.key("block_count")
    );
    let head_dim = keys.find_count("attention.key_length")?;
    let key_dim = head_dim.unwrap_or(width / n_heads);
    let value_dim = keys.find_count("attention.value_length")?.unwrap_or(key_dim);
    ensure!(value_dim == key_dim, "values of {value_dim} elements beside keys of {key_dim} are not supported");
    let base = keys.find_f32("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_BASE);
    let local_base = keys.find_f32("rope.freq_base_swa")?.or(family.local_rope_base);
    let experts = experts(&keys)?;
    let ffn_width = match experts {
        Some(experts) => experts.sizes.ffn_width,
        None => keys.count("feed_forward_length")?,
    };
    let window = keys.find_window()?;
    if family.full_layer_every > 0 && window.is_none() {
        keys.count("attention.sliding_window")?;
    }
    if family.capped {
        // Files of before these keys have the caps all the same; which they are, other programs guess.
        keys.f32("attn_logit_softcapping")?;
        keys.f32("final_logit_softcapping")?;
    }
    let by_width = family.scaled_by_width == Some(n_layers);
    Ok(Facts {
        name: gguf.str("general.name").unwrap_or("unnamed").to_owned(),
        architecture: arch.to_owned(),
        n_layers,
        width,
        ffn_width,
        max_context: keys.count("context_length")?,
        norm_eps: keys.f32("attention.layer_norm_rms_epsilon")?,
        tied_head: gguf.find_tensor("output.weight").is_none(),
        n_heads,
        n_kv_heads: keys.find_count("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        rope_dim: keys.find_count("rope.dimension_count")?,
        rope_style: family.gguf_rope,
        rope: Rope { base, scaling: scaling(&keys)? },
        local_rope: local_base.map(|base| Rope { base, scaling: RopeScaling::None }),
        window,
        windowed: windowed(&keys, n_layers, family)?,
        query_scale: keys.find_factor("attention.scale")?.or_else(|| by_width.then(|| 1.0 / ((width / n_heads) as f32).sqrt())),
        score_cap: keys.find_factor("attn_logit_softcapping")?,
        logit_cap: keys.find_factor("final_logit_softcapping")?,
        experts,
    })
}

/// The rotary base of a file that names none (GGUF specification).
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

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

    /// The window; 0 is none.
    fn find_window(&self) -> Result<Option<usize>> {
        match self.gguf.u64(&self.key("attention.sliding_window")) {
            None | Some(0) => Ok(None),
            Some(_) => self.find_count("attention.sliding_window"),
        }
    }

    fn find_f32(&self, name: &str) -> Result<Option<f32>> {
        let Some(value) = self.gguf.f32(&self.key(name)) else { return Ok(None) };
        ensure!(value.is_finite() && value > 0.0, "metadata key {} is {value}", self.key(name));
        Ok(Some(value))
    }

    /// A factor; 0 is none.
    fn find_factor(&self, name: &str) -> Result<Option<f32>> {
        if self.gguf.f32(&self.key(name)) == Some(0.0) { Ok(None) } else { self.find_f32(name) }
    }

    fn f32(&self, name: &str) -> Result<f32> {
        self.find_f32(name)?.with_context(|| format!("metadata key {} is missing or no float", self.key(name)))
    }
}

/// Fails on metadata that changes the arithmetic in a way the forward pass does not know.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<()> {
    let (gguf, key) = (keys.gguf, |name: &str| keys.key(name));
    for name in ["embedding_scale", "residual_scale", "logit_scale", "rope.scale_linear", "expert_weights_scale"] {
        let factor = gguf.f32(&key(name)).unwrap_or(0.0);
        ensure!([0.0, 1.0].contains(&factor), "{}: scaling by {factor} is not supported", key(name));
    }
    let n_shared = gguf.u64(&key("expert_shared_count")).unwrap_or(0);
    ensure!(n_shared == 0, "{}: {n_shared} shared experts are not supported", key("expert_shared_count"));
    let gating = gguf.u64(&key("expert_gating_func")).unwrap_or(1);
    ensure!(gating <= 1, "{}: function {gating} is not supported (supported: 1, softmax)", key("expert_gating_func"));
    Ok(())
}

/// Which layers have the window.
fn windowed(keys: &Keys<'_>, n_layers: usize, family: &Family) -> Result<Vec<bool>> {
    let name = "attention.sliding_window_pattern";
    if let Some(listed) = keys.gguf.bool_array(&keys.key(name)) {
        ensure!(listed.len() == n_layers, "metadata key {} has {} entries for {n_layers} layers", keys.key(name), listed.len());
        return Ok(listed);
    }
    let every = keys.find_count(name)?.unwrap_or(family.full_layer_every);
    Ok((1..=n_layers).map(|layer| every == 0 || !layer.is_multiple_of(every)).collect())
}

fn experts(keys: &Keys<'_>) -> Result<Option<ExpertSpec>> {
    if keys.gguf.u64(&keys.key("expert_count")).unwrap_or(0) == 0 {
        return Ok(None);
    }
    let ffn_width = keys.find_count("expert_feed_forward_length")?;
    let sizes = ExpertSizes {
        n_experts: keys.count("expert_count")?,
        n_used: keys.count("expert_used_count")?,
        ffn_width: ffn_width.map_or_else(|| keys.count("feed_forward_length"), Ok)?,
    };
    Ok(Some(ExpertSpec {
        sizes,
        renormalise: keys.gguf.bool(&keys.key("expert_weights_norm")).unwrap_or(true),
        stacked: keys.gguf.find_tensor("blk.0.ffn_gate_exps.weight").is_some(),
    }))
}

/// What is done to rotary frequencies. A factor without a type is a linear one, as files of before there were types mean it.
fn scaling(keys: &Keys<'_>) -> Result<RopeScaling> {
    let kind = keys.gguf.str(&keys.key("rope.scaling.type"));
    let factor = keys.find_factor("rope.scaling.factor")?;
    let scale = keys.find_factor("rope.scaling.attn_factor")?;
    if let Some(divisors) = long_factors(keys)? {
        return Ok(RopeScaling::Divisors { divisors, scale: scale.unwrap_or(1.0) });
    }
    ensure!(
        scale.is_none_or(|scale| scale.to_bits() == 1f32.to_bits()),
        "{}: not supported without rotary factors",
        keys.key("rope.scaling.attn_factor")
    );
    let factor = match kind {
        None | Some("linear") => factor.unwrap_or(1.0),
        Some("none") => 1.0,
        Some(other) => bail!("{}: rope scaling {other:?} is not supported", keys.key("rope.scaling.type")),
    };
    match floats(keys.gguf, "rope_freqs.weight")? {
        Some(divisors) => {
            let divisors = divisors.into_iter().map(|divisor| divisor * factor).collect();
            Ok(RopeScaling::Divisors { divisors, scale: 1.0 })
        }
        None if factor.to_bits() == 1f32.to_bits() => Ok(RopeScaling::None),
        None => Ok(RopeScaling::Linear { factor }),
    }
}

/// The rotary factors of a file that has two sets of them: one for contexts that the model was first trained for, one for
/// longer ones. The model's context decides, not a row's length: keys in the cache must not depend on what follows them.
fn long_factors(keys: &Keys<'_>) -> Result<Option<Vec<f32>>> {
    let Some(original) = keys.find_count("rope.scaling.original_context_length")? else { return Ok(None) };
    let is_long = keys.count("context_length")? > original;
    floats(keys.gguf, if is_long { "rope_factors_long.weight" } else { "rope_factors_short.weight" })
}

/// The values of a small F32 tensor, all above 0.
fn floats(gguf: &Gguf, name: &str) -> Result<Option<Vec<f32>>> {
    let Some(tensor) = gguf.find_tensor(name) else { return Ok(None) };
    let (values, rest) = tensor.bytes.as_chunks::<4>();
    ensure!(tensor.dtype == DType::F32 && rest.is_empty(), "tensor {name} is {:?}, expected F32", tensor.dtype);
    let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    if let Some(bad) = values.iter().find(|value| !(value.is_finite() && **value > 0.0)) {
        bail!("tensor {name} holds {bad}");
    }
    Ok(Some(values))
}
