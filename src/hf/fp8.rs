//! Linear layers of floats of 8 bits (e4m3): how fp8 folders give their scales, and which element type has their values. Knows nothing
//! of names or of how files are read.
//!
//! A layer's value for output n and input k is `weight[n][k] · scale`, in f32. Scales are one for the layer, one for each output, or one
//! for each block of outputs and inputs (`weight_block_size`, `block_structure`), the last blocks of which may be smaller. What folders
//! call `weight_scale_inv` is the same: the inverse of what the maker multiplied with.
//!
//! Scales of activations that were found once (`input_scale`, static schemes) are not used: a device that multiplies in fp8 finds one
//! for each token. Nor are those of a KV cache in fp8, which valar does not have.
//!
//! Invariant: the element type has the same values, bit for bit. It is E4M3 if a row has one scale and the model is made for activations
//! in fp8; else F32.

use super::layers::{Parts, SCALES, Span, scale_type};
use crate::tensor::{DType, GROUP, e4m3};
use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// What the tensors of a layer are called.
pub(super) const PARTS: [&str; 3] = ["weight", "weight_scale", "weight_scale_inv"];
/// What tensors are called that say nothing of weights.
pub(super) const IDLE: [&str; 6] = ["input_scale", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale"];

/// How all layers of a folder have their scales.
#[derive(Clone, Copy)]
pub(super) struct Scheme {
    /// Outputs and inputs of a block, where blocks have scales.
    block: Option<[usize; 2]>,
    /// Whether activations are to be fp8, too, where a device can do that.
    has_fp8_activations: bool,
}

/// `quantization_config` of `quant_method` fp8.
#[derive(Deserialize)]
struct Fp8Config {
    fmt: Option<String>,
    activation_scheme: Option<String>,
    weight_block_size: Option<[usize; 2]>,
}

/// `quantization_config` of compressed-tensors.
#[derive(Deserialize)]
struct CompressedTensors {
    format: Option<String>,
    config_groups: BTreeMap<String, Group>,
    transform_config: Option<BTreeMap<String, Value>>,
}

/// Layers of one scheme.
#[derive(Deserialize)]
struct Group {
    weights: Option<Weights>,
    input_activations: Option<Activations>,
}

#[derive(Deserialize)]
struct Weights {
    num_bits: usize,
    r#type: String,
    symmetric: Option<bool>,
    strategy: Option<String>,
    block_structure: Option<[usize; 2]>,
}

#[derive(Deserialize)]
struct Activations {
    num_bits: usize,
    r#type: String,
}

impl Scheme {
    /// Of `quant_method` fp8.
    ///
    /// # Errors
    /// A kind of float or of activations that is not supported; a block of no size.
    pub(super) fn of_fp8(config: &Value) -> Result<Self> {
        let config = Fp8Config::deserialize(config)?;
        let kind = config.fmt.as_deref().unwrap_or("e4m3");
        ensure!(matches!(kind, "e4m3" | "float8_e4m3fn"), "fmt {kind:?} is not supported (e4m3 is)");
        let activations = config.activation_scheme.as_deref().unwrap_or("dynamic");
        ensure!(matches!(activations, "dynamic" | "static"), "activation_scheme {activations:?} is not supported");
        let block = config.weight_block_size;
        ensure!(block.is_none_or(|block| !block.contains(&0)), "weight_block_size is {block:?}");
        Ok(Self { block, has_fp8_activations: true })
    }

    /// Of compressed-tensors, all groups of which must be alike.
    ///
    /// # Errors
    /// Weights that are no floats of 8 bits with scales per tensor, channel or block.
    pub(super) fn of_compressed_tensors(config: &Value) -> Result<Self> {
        let config = CompressedTensors::deserialize(config)?;
        let format = config.format.as_deref().unwrap_or_default();
        ensure!(
            matches!(format, "float-quantized" | "naive-quantized"),
            "format {format:?} is not supported (float-quantized is)"
        );
        ensure!(config.transform_config.is_none_or(|all| all.is_empty()), "transform_config is not supported");
        let mut found: Option<Self> = None;
        for (name, group) in &config.config_groups {
            let scheme = group.scheme().with_context(|| format!("config_groups: {name}"))?;
            let is_alike = found.is_none_or(|found| found.block == scheme.block);
            ensure!(is_alike, "config_groups: {name} has blocks of another size than those before it");
            // What is true of some is done to none.
            let all_have = found.is_none_or(|found| found.has_fp8_activations) && scheme.has_fp8_activations;
            found = Some(Self { has_fp8_activations: all_have, ..scheme });
        }
        found.context("config_groups has none")
    }
}

impl Group {
    fn scheme(&self) -> Result<Scheme> {
        let weights = self.weights.as_ref().context("weights is missing")?;
        let Weights { num_bits, r#type, .. } = weights;
        ensure!(*num_bits == 8 && r#type == "float", "weights of {num_bits} bits of type {type:?} are not supported (8, float)");
        ensure!(weights.symmetric != Some(false), "weights that are not symmetric are not supported");
        let block = match weights.strategy.as_deref().unwrap_or("tensor") {
            "tensor" | "channel" => None,
            "block" => Some(weights.block_structure.context("block_structure is missing")?),
            other => bail!("strategy {other:?} of weights is not supported (tensor, channel and block are)"),
        };
        ensure!(block.is_none_or(|block| !block.contains(&0)), "block_structure is {block:?}");
        let is_fp8 = |activations: &Activations| activations.num_bits == 8 && activations.r#type == "float";
        Ok(Scheme { block, has_fp8_activations: self.input_activations.as_ref().is_some_and(is_fp8) })
    }
}

/// A layer that was checked.
pub(super) struct Fp8 {
    n: usize,
    k: usize,
    /// Outputs and inputs that have one scale.
    block: [usize; 2],
    weight: Span,
    /// Of each block: `[n / block[0]][k / block[1]]`, rounded up.
    scales: Vec<f32>,
    dtype: DType,
}

impl Fp8 {
    /// Checks types, shapes and scales.
    ///
    /// # Errors
    /// A tensor that is missing, or of the wrong type or shape; a scale that is not finite.
    pub(super) fn new(scheme: Scheme, parts: &Parts, files: &[Mmap]) -> Result<Self> {
        let layer = parts.layer();
        let is_there = parts.get("weight").is_some();
        ensure!(is_there, "tensor {layer}.weight is missing, or not of type F8_E4M3, but has scales");
        let (weight, [n, k]) = parts.matrix("weight", &[Dtype::F8_E4M3])?;
        ensure!(n > 0 && k > 0, "tensor {layer}.weight has shape {:?}", weight.shape);
        let has = |part: &str| parts.get(part).is_some();
        ensure!(!(has("weight_scale") && has("weight_scale_inv")), "tensor {layer}.weight has weight_scale and weight_scale_inv");
        let part = if has("weight_scale_inv") { "weight_scale_inv" } else { "weight_scale" };
        let raw = parts.tensor(part, &SCALES)?;
        let block = match (scheme.block, &raw.shape[..]) {
            (Some([rows, columns]), shape) => {
                let expected = [n.div_ceil(rows), k.div_ceil(columns)];
                let found = format!("found {shape:?} (blocks of {rows} outputs, {columns} inputs)");
                ensure!(shape == expected, "tensor {layer}.{part}: expected shape {expected:?}, {found}");
                [rows, columns]
            }
            (None, [] | [1] | [1, 1]) => [n, k],
            (None, &[rows] | &[rows, 1]) if rows == n => [1, k],
            (None, shape) => bail!("tensor {layer}.{part}: expected shape [], [1], [{n}] or [{n}, 1], found {shape:?}"),
        };
        let dtype = scale_type(raw.dtype);
        let mut scales = vec![0.0; raw.shape.iter().product()];
        dtype.dequantise(raw.span.of(files), &mut scales);
        let wrong = scales.iter().find(|scale| !scale.is_finite());
        ensure!(wrong.is_none(), "tensor {layer}.{part}: a scale is {}", wrong.copied().unwrap_or_default());
        let has_one = k.is_multiple_of(GROUP) && block[1] >= k;
        let dtype = if scheme.has_fp8_activations && has_one { DType::E4m3 } else { DType::F32 };
        Ok(Self { n, k, block, weight: weight.span, scales, dtype })
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[n, k]`
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.n, self.k]
    }

    /// The values, as the element type has them.
    pub(super) fn bytes(&self, files: &[Mmap]) -> Vec<u8> {
        let Self { n, k, block, .. } = *self;
        let row_bytes = k / self.dtype.block_elements() * self.dtype.block_bytes();
        let of_row = k.div_ceil(block[1]);
        let mut out = vec![0; n * row_bytes];
        let rows = out.par_chunks_exact_mut(row_bytes).zip(self.weight.of(files).par_chunks_exact(k));
        rows.enumerate().for_each(|(row, (out, weights))| {
            let scales = &self.scales[row / block[0] * of_row..][..of_row];
            if self.dtype == DType::F32 {
                for (i, (out, &weight)) in out.chunks_exact_mut(4).zip(weights).enumerate() {
                    out.copy_from_slice(&(scales[i / block[1]] * e4m3(weight)).to_le_bytes());
                }
                return;
            }
            for (out, weights) in out.chunks_exact_mut(self.dtype.block_bytes()).zip(weights.chunks_exact(GROUP)) {
                let (scale, floats) = out.split_at_mut(size_of::<f32>());
                scale.copy_from_slice(&scales[0].to_le_bytes());
                floats.copy_from_slice(weights);
            }
        });
        out
    }
}
