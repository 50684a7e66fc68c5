//! A model's weights in another element type, in memory: what a file of that type would hold. Knows nothing of devices.

use super::iq4;
use crate::model::{ModelFile, ModelSpec};
use crate::tensor::{DType, Tensor};
use anyhow::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor as CandleTensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A model's weights, made again from the values that its file has.
pub(super) struct Requantised {
    path: PathBuf,
    architecture: String,
    spec: ModelSpec,
    tensors: BTreeMap<String, Owned>,
}

struct Owned {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Requantised {
    /// All matrices of a file in a type; norms and biases stay f32. Rows that are no whole blocks of it take the type that
    /// llama.cpp's quantiser falls back on: of 256 elements, that with blocks of 32 and the next more bits.
    ///
    /// # Errors
    /// As [`ModelFile::spec`].
    pub(super) fn new(file: &dyn ModelFile, dtype: DType) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for name in file.tensor_names() {
            let Some(tensor) = file.find_tensor(name) else { continue };
            let n_columns = tensor.shape.last().copied().unwrap_or(1);
            let dtype = if tensor.shape.len() < 2 { DType::F32 } else { fitting(dtype, n_columns) };
            let mut values = vec![0.0; tensor.shape.iter().product()];
            tensor.dtype.dequantise(&tensor.bytes, &mut values);
            let bytes = rounded(values, &tensor.shape, dtype)?;
            tensors.insert(name.to_owned(), Owned { dtype, shape: tensor.shape.clone(), bytes });
        }
        let (path, architecture, spec) = (file.path().to_owned(), file.architecture(), file.spec()?);
        Ok(Self { path, architecture, spec, tensors })
    }
}

impl ModelFile for Requantised {
    fn path(&self) -> &Path {
        &self.path
    }

    fn architecture(&self) -> String {
        self.architecture.clone()
    }

    fn spec(&self) -> Result<ModelSpec> {
        Ok(self.spec.clone())
    }

    fn find_tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, tensor) = self.tensors.get_key_value(name)?;
        Some(Tensor { name, dtype: tensor.dtype, shape: tensor.shape.clone(), bytes: (&tensor.bytes).into() })
    }

    fn tensor_names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn content(&self) -> Vec<&[u8]> {
        self.tensors.values().map(|tensor| tensor.bytes.as_slice()).collect()
    }

    /// Nothing of it is in a file.
    fn release(&self) {}
}

/// The type of rows of so many elements.
fn fitting(dtype: DType, n_columns: usize) -> DType {
    if n_columns.is_multiple_of(dtype.block_elements()) {
        return dtype;
    }
    let next = match dtype {
        DType::Q2K | DType::Q3K => DType::Q4_0,
        DType::Q4K => DType::Q5_0,
        DType::Q5K => DType::Q5_1,
        DType::Q6K => DType::Q8_0,
        DType::Iq4Xs => DType::Iq4Nl,
        _ => DType::F16,
    };
    fitting(next, n_columns)
}

/// Values in a type, as a file has them.
fn rounded(values: Vec<f32>, shape: &[usize], dtype: DType) -> Result<Vec<u8>> {
    let quantiser = match dtype {
        DType::F32 => GgmlDType::F32,
        DType::F16 => GgmlDType::F16,
        DType::Bf16 => GgmlDType::BF16,
        DType::Q4_0 => GgmlDType::Q4_0,
        DType::Q4_1 => GgmlDType::Q4_1,
        DType::Q5_0 => GgmlDType::Q5_0,
        DType::Q5_1 => GgmlDType::Q5_1,
        DType::Q8_0 => GgmlDType::Q8_0,
        DType::Q2K => GgmlDType::Q2K,
        DType::Q3K => GgmlDType::Q3K,
        DType::Q4K => GgmlDType::Q4K,
        DType::Q5K => GgmlDType::Q5K,
        DType::Q6K => GgmlDType::Q6K,
        DType::Iq4Nl => return Ok(iq4::nl(&values)),
        DType::Iq4Xs => return Ok(iq4::xs(&values)),
        DType::Q4Z | DType::E4m3 => anyhow::bail!("weights can't be rounded to {dtype}"),
    };
    let values = CandleTensor::from_vec(values, shape, &Device::Cpu)?;
    Ok(QTensor::quantize(&values, quantiser)?.data()?.into_owned())
}
