//! Reads GGUF model files: metadata and the raw bytes of tensors, through a memory map. Knows the file format
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>) and nothing of models, devices or text.

mod header;

use crate::map;
use crate::tensor::Tensor;
use anyhow::{Context, Result};
use header::{Entry, Value};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// An opened GGUF file.
pub struct Gguf {
    path: PathBuf,
    map: memmap2::Mmap,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Entry>,
}

impl Gguf {
    /// Opens a file and checks its header: every tensor must lie inside the file.
    ///
    /// # Errors
    /// Not a GGUF file, a damaged header, a tensor of an unsupported type, or one that reaches past the end.
    pub fn open(path: &Path) -> Result<Self> {
        let map = map::open(path)?;
        let (metadata, tensors) =
            header::read(&map).with_context(|| format!("{} is not a readable GGUF file", path.display()))?;
        Ok(Self { path: path.to_owned(), map, metadata, tensors })
    }

    /// The file's path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file, for hashing.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Frees the memory that holds what was read of the file so far. It may be read again.
    pub fn release(&self) {
        map::release(&self.map);
    }

    /// A tensor that the model cannot do without.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.find_tensor(name).with_context(|| format!("{}: tensor {name} is missing", self.path.display()))
    }

    /// A tensor that may be absent.
    pub fn find_tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        let bytes = &self.map[entry.start..entry.start + entry.n_bytes];
        Some(Tensor { name, dtype: entry.dtype, shape: entry.shape.clone(), bytes: bytes.into() })
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// A string of the metadata.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// An integer of the metadata, whatever its width.
    pub fn u64(&self, key: &str) -> Option<u64> {
        match *self.metadata.get(key)? {
            Value::Int(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// A float of the metadata.
    pub fn f32(&self, key: &str) -> Option<f32> {
        match *self.metadata.get(key)? {
            Value::Float(v) => Some(v as f32),
            _ => None,
        }
    }

    /// A boolean of the metadata.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match *self.metadata.get(key)? {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// An array of booleans of the metadata.
    pub fn bool_array(&self, key: &str) -> Option<Vec<bool>> {
        Some(self.i32_array(key)?.into_iter().map(|item| item != 0).collect())
    }

    /// An array of strings of the metadata.
    pub fn str_array(&self, key: &str) -> Option<Vec<&str>> {
        match self.metadata.get(key)? {
            Value::Strings(items) => Some(items.iter().map(String::as_str).collect()),
            Value::Empty => Some(Vec::new()),
            _ => None,
        }
    }

    /// An array of integers (or booleans) of the metadata that fit into an `i32`.
    pub fn i32_array(&self, key: &str) -> Option<Vec<i32>> {
        match self.metadata.get(key)? {
            Value::Ints(items) => items.iter().map(|&v| v.try_into().ok()).collect(),
            Value::Empty => Some(Vec::new()),
            _ => None,
        }
    }

    /// An array of floats of the metadata.
    pub fn f64_array(&self, key: &str) -> Option<&[f64]> {
        match self.metadata.get(key)? {
            Value::Floats(items) => Some(items),
            Value::Empty => Some(&[]),
            _ => None,
        }
    }
}
