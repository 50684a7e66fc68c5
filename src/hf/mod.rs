//! Reads models from folders in Hugging Face's form: `config.json` and safetensors files, in one piece or in shards.
//! Knows JSON field names and the names that families give their tensors there; nothing of devices or text.
//!
//! Invariant: every tensor of the folder has a place under GGUF's names or is refused by its own.

mod config;
mod names;

use crate::map;
use crate::model::family::{self, Family};
use crate::model::{ModelFile, ModelSpec};
use crate::tensor::{DType, Tensor};
use anyhow::{Context, Result, bail, ensure};
use config::Config;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

/// An opened folder.
pub struct HfFolder {
    path: PathBuf,
    config_bytes: Vec<u8>,
    config: Config,
    family: &'static Family,
    /// Files with tensors, in the order of their names.
    files: Vec<Mmap>,
    /// By GGUF's names.
    tensors: HashMap<String, Entry>,
}

/// A tensor and where its bytes are.
struct Entry {
    dtype: DType,
    shape: Vec<usize>,
    place: Place,
}

enum Place {
    /// In a file; the range was checked against the file's length.
    File { file: usize, start: usize, n_bytes: usize },
    /// Here, since its values are not those of the file.
    Own(Vec<u8>),
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// Tensor name to file name.
    weight_map: HashMap<String, String>,
}

impl HfFolder {
    /// Opens a folder: reads the configuration, maps the files and checks their headers.
    ///
    /// # Errors
    /// A missing or damaged file, an architecture that is not supported, a tensor without a place or of a type that can't
    /// be loaded.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path).with_context(|| format!("cannot use the model folder {}", path.display()))
    }

    fn read(path: &Path) -> Result<Self> {
        let config_bytes = read(&path.join("config.json"))?;
        let config: Config = serde_json::from_slice(&config_bytes).context("config.json")?;
        let family = family::find(&config.model_type, |family| family.hf).context("config.json: model_type")?;
        let mut folder = Self { path: path.to_owned(), config_bytes, config, family, files: Vec::new(), tensors: HashMap::new() };
        let index_path = path.join("model.safetensors.index.json");
        if !index_path.exists() {
            folder.add_file("model.safetensors")?;
            return Ok(folder);
        }
        let index: Index = serde_json::from_slice(&read(&index_path)?).context("model.safetensors.index.json")?;
        for file in index.weight_map.values().collect::<BTreeSet<_>>() {
            let is_plain = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
            ensure!(is_plain, "model.safetensors.index.json: {file:?} is no file name");
            folder.add_file(file)?;
        }
        for (name, file) in &index.weight_map {
            let Some(neutral) = names::neutral(name, family)? else { continue };
            let found = folder.tensors.contains_key(&neutral) || folder.is_unused(&neutral);
            ensure!(found, "tensor {name} is not in {file}, where model.safetensors.index.json has it");
        }
        Ok(folder)
    }

    /// Maps a file and takes its tensors in.
    fn add_file(&mut self, name: &str) -> Result<()> {
        let map = map::open(&self.path.join(name))?;
        let content = SafeTensors::deserialize(&map).with_context(|| format!("{name} is not a readable safetensors file"))?;
        for (tensor, view) in content.tensors() {
            let Some(neutral) = names::neutral(&tensor, self.family).with_context(|| name.to_owned())? else { continue };
            if self.is_unused(&neutral) {
                continue;
            }
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                other => bail!("{name}: tensor {tensor} has type {other:?}, which is not supported (F32, F16 and BF16 are)"),
            };
            let (shape, bytes) = (view.shape().to_vec(), view.data());
            let entry = if self.family.gemma && neutral.ends_with("_norm.weight") {
                Entry { dtype: DType::F32, shape, place: Place::Own(plus_one(dtype, bytes)) }
            } else {
                let start = bytes.as_ptr() as usize - map.as_ptr() as usize;
                Entry { dtype, shape, place: Place::File { file: self.files.len(), start, n_bytes: bytes.len() } }
            };
            ensure!(self.tensors.insert(neutral, entry).is_none(), "{name}: tensor {tensor} is there twice");
        }
        self.files.push(map);
        Ok(())
    }

    /// A head that the configuration says is the embedding table, whatever the file holds.
    fn is_unused(&self, neutral: &str) -> bool {
        neutral == "output.weight" && self.config.tied_head(self.family)
    }
}

impl ModelFile for HfFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn architecture(&self) -> String {
        self.config.model_type.clone()
    }

    fn spec(&self) -> Result<ModelSpec> {
        let read = || {
            let facts = self.config.facts(self.family).context("config.json")?;
            ModelSpec::new(self.family, facts, self)
        };
        read().with_context(|| format!("cannot use the model folder {}", self.path.display()))
    }

    fn find_tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        let bytes = match &entry.place {
            &Place::File { file, start, n_bytes } => &self.files[file][start..start + n_bytes],
            Place::Own(bytes) => bytes,
        };
        Some(Tensor { name, dtype: entry.dtype, shape: entry.shape.clone(), bytes })
    }

    fn tensor_names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    fn content(&self) -> Vec<&[u8]> {
        std::iter::once(&self.config_bytes[..]).chain(self.files.iter().map(|map| &map[..])).collect()
    }

    fn release(&self) {
        self.files.iter().for_each(map::release);
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The values plus 1, as the bytes of f32.
fn plus_one(dtype: DType, bytes: &[u8]) -> Vec<u8> {
    let value = |b: &[u8]| match dtype {
        DType::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
        DType::Bf16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
    };
    bytes.chunks_exact(dtype.block_bytes()).flat_map(|b| (1.0 + value(b)).to_le_bytes()).collect()
}
