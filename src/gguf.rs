//! Reads GGUF model files: metadata and the raw bytes of tensors, through a memory map. Knows the file format
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>) and nothing of models, devices or text.

use crate::tensor::{DType, Tensor};
use anyhow::{Context, Result, anyhow, bail};
use candle_core::quantized::{GgmlDType, gguf_file};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// An opened GGUF file.
pub struct Gguf {
    path: PathBuf,
    map: memmap2::Mmap,
    metadata: HashMap<String, gguf_file::Value>,
    tensors: HashMap<String, Entry>,
}

/// Where a tensor stands in the file; the range was checked against the file's length.
struct Entry {
    dtype: DType,
    shape: Vec<usize>,
    start: usize,
    n_bytes: usize,
}

impl Gguf {
    /// Opens a file and checks its header: every tensor must lie inside the file.
    ///
    /// # Errors
    /// Not a GGUF file, a damaged header, or a tensor that reaches past the end.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open model file {}", path.display()))?;
        // SAFETY: the map is read-only. A file that another process truncates while it is mapped would fault; model
        // files are written once and renamed into place (hub.rs), and the same holds for every engine that maps weights.
        let map = unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))?;
        // The reader divides by the file's alignment without looking at it.
        let read = || gguf_file::Content::read(&mut std::io::Cursor::new(&map[..]));
        let content = std::panic::catch_unwind(read)
            .map_err(|_| anyhow!("its header is damaged"))
            .and_then(|content| Ok(content?))
            .with_context(|| format!("{} is not a readable GGUF file", path.display()))?;
        let mut tensors = HashMap::new();
        for (name, info) in content.tensor_infos {
            let dtype = match info.ggml_dtype {
                GgmlDType::F32 => DType::F32,
                GgmlDType::F16 => DType::F16,
                GgmlDType::BF16 => DType::Bf16,
                GgmlDType::Q4_0 => DType::Q4_0,
                GgmlDType::Q4_1 => DType::Q4_1,
                GgmlDType::Q8_0 => DType::Q8_0,
                other => bail!("{}: tensor {name} has type {other:?}, which is not supported yet", path.display()),
            };
            let shape = info.shape.dims().to_vec();
            let row = shape.last().copied().unwrap_or(1);
            if row % dtype.block_elements() != 0 {
                bail!("{}: tensor {name}: rows of {row} elements are no whole number of {dtype:?} blocks", path.display());
            }
            let n_elements = shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
            let n_bytes = n_elements.and_then(|n| (n / dtype.block_elements()).checked_mul(dtype.block_bytes()));
            let start = (content.tensor_data_offset as usize).checked_add(info.offset as usize);
            match (start, n_bytes) {
                (Some(start), Some(n_bytes)) if start.checked_add(n_bytes).is_some_and(|end| end <= map.len()) => {
                    tensors.insert(name, Entry { dtype, shape, start, n_bytes });
                }
                _ => bail!("{}: tensor {name} {shape:?} reaches past the end of the file ({} bytes)", path.display(), map.len()),
            }
        }
        Ok(Self { path: path.to_owned(), map, metadata: content.metadata, tensors })
    }

    /// The file's path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file, for hashing.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// A tensor that the model cannot do without.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.find_tensor(name).with_context(|| format!("{}: tensor {name} is missing", self.path.display()))
    }

    /// A tensor that may be absent.
    pub fn find_tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        let bytes = &self.map[entry.start..entry.start + entry.n_bytes];
        Some(Tensor { name, dtype: entry.dtype, shape: entry.shape.clone(), bytes })
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// A string of the metadata.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(gguf_file::Value::String(s)) => Some(s),
            _ => None,
        }
    }

    /// An integer of the metadata, whatever its width.
    pub fn u64(&self, key: &str) -> Option<u64> {
        use gguf_file::Value as V;
        match *self.metadata.get(key)? {
            V::U8(v) => Some(v.into()),
            V::U16(v) => Some(v.into()),
            V::U32(v) => Some(v.into()),
            V::U64(v) => Some(v),
            V::I8(v) => v.try_into().ok(),
            V::I16(v) => v.try_into().ok(),
            V::I32(v) => v.try_into().ok(),
            V::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// A float of the metadata.
    pub fn f32(&self, key: &str) -> Option<f32> {
        match *self.metadata.get(key)? {
            gguf_file::Value::F32(v) => Some(v),
            gguf_file::Value::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// A boolean of the metadata.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match *self.metadata.get(key)? {
            gguf_file::Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// An array of strings of the metadata.
    pub fn str_array(&self, key: &str) -> Option<Vec<&str>> {
        let gguf_file::Value::Array(items) = self.metadata.get(key)? else { return None };
        items.iter().map(|v| if let gguf_file::Value::String(s) = v { Some(s.as_str()) } else { None }).collect()
    }

    /// An array of integers of the metadata.
    pub fn i32_array(&self, key: &str) -> Option<Vec<i32>> {
        use gguf_file::Value as V;
        let V::Array(items) = self.metadata.get(key)? else { return None };
        items
            .iter()
            .map(|v| match *v {
                V::I32(v) => Some(v),
                V::U32(v) => v.try_into().ok(),
                V::I8(v) => Some(v.into()),
                V::U8(v) => Some(v.into()),
                _ => None,
            })
            .collect()
    }
}
