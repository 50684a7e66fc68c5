//! Linear layers whose values stand in several tensors of a folder: which tensors, by the method that made them, and what they become.
//! Knows nothing of how files are read.

use super::fp8::{self, Fp8};
use super::packed::{self, Packed};
use crate::tensor::DType;
use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;

/// How all such layers of a folder were made.
#[derive(Clone, Copy)]
pub(super) enum Scheme {
    /// By GPTQ or AWQ.
    Packed(packed::Scheme),
    /// Floats of 8 bits.
    Fp8(fp8::Scheme),
}

impl Scheme {
    /// What `quantization_config` says.
    ///
    /// # Errors
    /// A method, or a form of it, that is not supported.
    pub(super) fn new(config: &Value) -> Result<Self> {
        match config["quant_method"].as_str().unwrap_or_default() {
            method @ ("gptq" | "awq") => packed::Scheme::new(method, config).map(Self::Packed),
            "fp8" => fp8::Scheme::of_fp8(config).map(Self::Fp8),
            "compressed-tensors" => fp8::Scheme::of_compressed_tensors(config).map(Self::Fp8),
            method => bail!("quant_method {method:?} is not supported (gptq, awq, fp8 and compressed-tensors are)"),
        }
    }

    /// The layer that a tensor is a part of, and which part. `dtype`: the tensor's type, where it is known; some parts are called as
    /// tensors are that are no parts.
    pub(super) fn part(self, name: &str, dtype: Option<Dtype>) -> Option<(&str, &'static str)> {
        let (layer, suffix) = name.rsplit_once('.')?;
        let parts = match self {
            Self::Packed(_) => &packed::PARTS[..],
            Self::Fp8(_) => &fp8::PARTS,
        };
        let part = parts.iter().find(|part| **part == suffix)?;
        (*part != "weight" || dtype == Some(Dtype::F8_E4M3)).then_some((layer, part))
    }

    /// Whether a tensor says nothing of the weights' values.
    pub(super) fn is_idle(self, name: &str) -> bool {
        let suffix = name.rsplit_once('.').map_or("", |(_, suffix)| suffix);
        matches!(self, Self::Fp8(_)) && fp8::IDLE.contains(&suffix)
    }

    /// A layer of its parts.
    ///
    /// # Errors
    /// Parts that are missing, or do not fit.
    pub(super) fn join(self, parts: &Parts, files: &[Mmap]) -> Result<Layer> {
        match self {
            Self::Packed(scheme) => Packed::new(scheme, parts, files).map(Layer::Packed),
            Self::Fp8(scheme) => Fp8::new(scheme, parts, files).map(Layer::Fp8),
        }
    }
}

/// A layer that was checked.
pub(super) enum Layer {
    Packed(Packed),
    Fp8(Fp8),
}

impl Layer {
    /// The element type of its values.
    pub(super) fn dtype(&self) -> DType {
        match self {
            Self::Packed(layer) => layer.dtype(),
            Self::Fp8(layer) => layer.dtype(),
        }
    }

    /// `[n, k]`
    pub(super) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Packed(layer) => layer.shape(),
            Self::Fp8(layer) => layer.shape(),
        }
    }

    /// Bytes of the element type.
    pub(super) fn n_bytes(&self) -> usize {
        let ([n, k], dtype) = (self.shape(), self.dtype());
        n * k / dtype.block_elements() * dtype.block_bytes()
    }

    /// The values, as the element type has them.
    pub(super) fn bytes(&self, files: &[Mmap]) -> Vec<u8> {
        match self {
            Self::Packed(layer) => layer.bytes(files),
            Self::Fp8(layer) => layer.bytes(files),
        }
    }
}

/// Where a tensor's bytes are; checked against the file's length.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) file: usize,
    pub(super) start: usize,
    pub(super) n_bytes: usize,
}

impl Span {
    pub(super) fn of(self, files: &[Mmap]) -> &[u8] {
        &files[self.file][self.start..self.start + self.n_bytes]
    }
}

/// A tensor, as the file has it.
pub(super) struct Raw {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) span: Span,
}

/// The tensors of a layer, by what they are called behind its name.
#[derive(Default)]
pub(super) struct Parts {
    /// The file's name of the layer.
    layer: String,
    tensors: BTreeMap<&'static str, Raw>,
}

impl Parts {
    /// The file's name of the layer.
    pub(super) fn layer(&self) -> &str {
        &self.layer
    }

    /// Takes a tensor in.
    ///
    /// # Errors
    /// There is one already.
    pub(super) fn put(&mut self, layer: &str, part: &'static str, raw: Raw) -> Result<()> {
        layer.clone_into(&mut self.layer);
        ensure!(self.tensors.insert(part, raw).is_none(), "tensor {layer}.{part} is there twice");
        Ok(())
    }

    /// A tensor, if it is there.
    pub(super) fn get(&self, part: &str) -> Option<&Raw> {
        self.tensors.get(part)
    }

    /// A tensor that must be there, of one of these types.
    pub(super) fn tensor(&self, part: &str, dtypes: &[Dtype]) -> Result<&Raw> {
        let raw = self.get(part).with_context(|| format!("tensor {}.{part} is missing", self.layer))?;
        let is_known = dtypes.contains(&raw.dtype);
        ensure!(is_known, "tensor {}.{part} has type {:?}, expected one of {dtypes:?}", self.layer, raw.dtype);
        Ok(raw)
    }

    /// The same, of two dimensions.
    pub(super) fn matrix(&self, part: &str, dtypes: &[Dtype]) -> Result<(&Raw, [usize; 2])> {
        let raw = self.tensor(part, dtypes)?;
        let (layer, shape) = (&self.layer, <[usize; 2]>::try_from(raw.shape.as_slice()));
        let shape =
            shape.map_err(|_| anyhow::anyhow!("tensor {layer}.{part} has shape {:?}, expected two dimensions", raw.shape))?;
        Ok((raw, shape))
    }
}

/// Types that scales may have.
pub(super) const SCALES: [Dtype; 3] = [Dtype::F16, Dtype::BF16, Dtype::F32];

/// One of these as an element type.
pub(super) fn scale_type(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::Bf16,
        _ => DType::F32,
    }
}
