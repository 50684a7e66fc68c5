//! Reads models from folders in Hugging Face's form: `config.json` and safetensors files, in one piece or in shards.
//! Knows JSON field names and the names that families give their tensors there; nothing of devices or text.
//!
//! Invariant: every tensor of the folder has a place under GGUF's names or is refused by its own.

mod config;
mod fp8;
mod layers;
mod names;
mod packed;

use crate::map;
use crate::model::family::{self, Family};
use crate::model::{ModelFile, ModelSpec};
use crate::tensor::{Bytes, DType, Tensor};
use anyhow::{Context, Result, bail, ensure};
use config::Config;
use layers::{Layer, Parts, Raw, Scheme, Span};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
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
    /// How linear layers are quantised, if they are.
    scheme: Option<Scheme>,
    /// By GGUF's names.
    tensors: HashMap<String, Entry>,
    /// Quantised layers whose files are being read, by GGUF's names.
    parts: BTreeMap<String, Parts>,
    /// Tensors of the folder that say nothing.
    idle: HashSet<String>,
}

/// A tensor and where its bytes are.
struct Entry {
    dtype: DType,
    shape: Vec<usize>,
    place: Place,
}

enum Place {
    /// In a file.
    File(Span),
    /// In several tensors; made when it is read.
    Made(Layer),
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
        let scheme = config.scheme().context("config.json")?;
        let mut folder = Self {
            path: path.to_owned(),
            config_bytes,
            config,
            family,
            files: Vec::new(),
            scheme,
            tensors: HashMap::new(),
            parts: BTreeMap::new(),
            idle: HashSet::new(),
        };
        let index_path = path.join("model.safetensors.index.json");
        if !index_path.exists() {
            folder.add_file("model.safetensors")?;
            folder.join_parts()?;
            return Ok(folder);
        }
        let index: Index = serde_json::from_slice(&read(&index_path)?).context("model.safetensors.index.json")?;
        for file in index.weight_map.values().collect::<BTreeSet<_>>() {
            let is_plain = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
            ensure!(is_plain, "model.safetensors.index.json: {file:?} is no file name");
            folder.add_file(file)?;
        }
        folder.join_parts()?;
        for (name, file) in &index.weight_map {
            if folder.idle.contains(name) {
                continue;
            }
            let name_there = folder.part(name, None).map(|(layer, _)| format!("{layer}.weight"));
            let Some(neutral) = names::neutral(name_there.as_deref().unwrap_or(name), family)? else { continue };
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
            let (shape, bytes) = (view.shape().to_vec(), view.data());
            let start = bytes.as_ptr() as usize - map.as_ptr() as usize;
            let span = Span { file: self.files.len(), start, n_bytes: bytes.len() };
            if let Some((layer, part)) = self.part(&tensor, Some(view.dtype())) {
                let neutral = names::neutral(&format!("{layer}.weight"), self.family).with_context(|| name.to_owned())?;
                let Some(neutral) = neutral.filter(|neutral| !self.is_unused(neutral)) else { continue };
                let raw = Raw { dtype: view.dtype(), shape, span };
                self.parts.entry(neutral).or_default().put(layer, part, raw).with_context(|| name.to_owned())?;
                continue;
            }
            if self.is_idle_bias(&tensor, bytes) || self.scheme.is_some_and(|scheme| scheme.is_idle(&tensor)) {
                self.idle.insert(tensor);
                continue;
            }
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
            let entry = if self.family.gemma && neutral.ends_with("_norm.weight") {
                Entry { dtype: DType::F32, shape, place: Place::Own(plus_one(dtype, bytes)) }
            } else {
                Entry { dtype, shape, place: Place::File(span) }
            };
            ensure!(self.tensors.insert(neutral, entry).is_none(), "{name}: tensor {tensor} is there twice");
        }
        self.files.push(map);
        Ok(())
    }

    /// The quantised layer that a tensor is a part of, and which part, where layers are.
    fn part<'n>(&self, name: &'n str, dtype: Option<Dtype>) -> Option<(&'n str, &'static str)> {
        self.scheme?.part(name, dtype)
    }

    /// Makes tensors of the quantised layers, whose parts may stand in several files.
    fn join_parts(&mut self) -> Result<()> {
        let Some(scheme) = self.scheme else { return Ok(()) };
        for (neutral, parts) in std::mem::take(&mut self.parts) {
            let layer = scheme.join(&parts, &self.files)?;
            let entry = Entry { dtype: layer.dtype(), shape: layer.shape().to_vec(), place: Place::Made(layer) };
            let is_new = self.tensors.insert(neutral, entry).is_none();
            ensure!(is_new, "tensor {}.weight is there, and packed, too", parts.layer());
        }
        Ok(())
    }

    /// Whether a tensor is a bias of zeros that packers give layers which have none.
    fn is_idle_bias(&self, name: &str, bytes: &[u8]) -> bool {
        let has_bias =
            self.family.qkv_bias && [".q_proj.bias", ".k_proj.bias", ".v_proj.bias"].iter().any(|part| name.ends_with(part));
        self.scheme.is_some()
            && name.rsplit_once('.').is_some_and(|(_, last)| last == "bias")
            && !has_bias
            && bytes.iter().all(|&byte| byte == 0)
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
            Place::File(span) => span.of(&self.files).into(),
            Place::Made(layer) => Bytes::made(layer.n_bytes(), || layer.bytes(&self.files)),
            Place::Own(bytes) => bytes.into(),
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
