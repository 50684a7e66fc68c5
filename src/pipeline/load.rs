//! The model of a job: opened and fingerprinted first (cheap), put into memory later (not cheap), so that a job that
//! can't run says so before it costs anything. Decides how memory is shared out.

use super::meter::{Meter, MeteredRunner};
use super::null::NullRunner;
use super::progress::say;
use super::spec::EngineKind;
use crate::config::{Config, ModelConfig};
use crate::device::cpu::{CpuDevice, Kv, Numerics};
use crate::device::cuda::{CudaDevice, driver_is_present};
use crate::device::reference::Reference;
use crate::device::{BLOCK_TOKENS, Device};
use crate::engine::TokenTable;
use crate::fingerprint::{Fingerprint, content_hash};
use crate::gguf::Gguf;
use crate::hf::HfFolder;
use crate::hub::{self, LocalModel};
use crate::model::{ModelFile, ModelRunner, ModelSpec, Runner, sizing};
use crate::plan::estimate::{Interval, Setting};
use crate::text::hf::HfFiles;
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::Tokenizer;
use anyhow::{Context, Result, bail, ensure};
use std::io::ErrorKind;
use std::sync::Arc;

/// A model that is known but not in memory yet.
pub struct OpenModel {
    /// Where it is, and what it is called.
    pub local: LocalModel,
    /// Its weights.
    pub file: Box<dyn ModelFile>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template.
    pub template: ChatTemplate,
    /// What its answers' bits depend on.
    pub fingerprint: Fingerprint,
    /// How memory will be shared out.
    pub memory: MemoryPlan,
    /// If that is a device's own memory: what the device is called, and what was free there, bytes.
    pub device_memory: Option<(String, u64)>,
    device: AnyDevice,
}

impl OpenModel {
    /// What computes it, and its weights.
    ///
    /// # Errors
    /// It is not the CPU.
    pub(super) fn into_cpu(self) -> Result<(CpuDevice, Box<dyn ModelFile>)> {
        match self.device {
            AnyDevice::Cpu(device) => Ok((*device, self.file)),
            _ => bail!("{} is not on the CPU", self.local.name),
        }
    }
}

enum AnyDevice {
    Cpu(Box<CpuDevice>),
    Cuda(Box<CudaDevice>),
    Reference(Reference),
    /// No device: see [`NullRunner`].
    Null(NullRunner),
}

/// How the memory is shared out; part of what a job is, as it limits how long a row can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Blocks of the KV cache.
    pub n_blocks: usize,
    /// Most tokens of prompt and completion together.
    pub max_context: usize,
    /// What sets that limit.
    pub max_context_reason: &'static str,
    /// KV memory of a token, bytes.
    pub kv_token_bytes: usize,
    /// All of it: weights, what a step needs, KV cache.
    pub n_bytes: u64,
}

impl MemoryPlan {
    /// Size of the KV cache, in tokens.
    pub fn kv_tokens(&self) -> u64 {
        (self.n_blocks * BLOCK_TOKENS) as u64
    }

    /// What an estimate must know of the engine.
    pub(super) fn setting(&self, config: &Config, output_share: Interval) -> Setting {
        let engine = &config.spec.engine;
        Setting {
            budget_tokens: engine.budget_tokens,
            max_running: engine.max_running,
            kv_tokens: self.kv_tokens(),
            max_context: self.max_context,
            output_share,
        }
    }
}

/// Finds and opens the job's model.
///
/// # Errors
/// No such model, a file that can't be used, or memory that does not hold the weights, the buffers of a step and a KV
/// cache that is of use.
pub fn open(config: &ModelConfig) -> Result<OpenModel> {
    let mut tell = |line: &str| {
        if !config.quiet {
            say(line);
        }
    };
    let mut local = hub::resolve(&config.name, &config.cache, config.hub.as_ref(), &mut tell)?;
    local.names.extend_from_slice(&config.served_names);
    let Opened { file, spec, tokenizer, mut template } = open_files(&local)?;
    if let Some(path) = &config.chat_template {
        let source = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        template = template.replaced(&source);
    }
    ensure!(
        tokenizer.n_vocab() == spec.n_vocab,
        "{}: the tokenizer has {} tokens, the embedding {}",
        local.path.display(),
        tokenizer.n_vocab(),
        spec.n_vocab
    );
    let (device, device_fingerprint, memory, device_memory) = if config.kind == EngineKind::Null {
        no_device(&spec, &tokenizer, config)
    } else {
        open_device(&*file, &spec, config, &mut tell)?
    };
    let fingerprint = Fingerprint {
        weights: content_hash(&file.content()),
        tokenizer: tokenizer.hash().to_owned(),
        template: template.hash().to_owned(),
        device: device_fingerprint,
    };
    file.release();
    Ok(OpenModel { local, file, tokenizer: Arc::new(tokenizer), template, fingerprint, memory, device_memory, device })
}

/// A device, its fingerprint, how its memory is shared out, and which that is, if not the machine's.
type OpenDevice = (AnyDevice, String, MemoryPlan, Option<(String, u64)>);

/// What is in a device's place where there is none.
fn no_device(spec: &ModelSpec, tokenizer: &Tokenizer, config: &ModelConfig) -> OpenDevice {
    let end = tokenizer.end_ids().first().copied();
    let runner = NullRunner::new(spec.n_vocab, spec.max_context, config.max_running, end);
    let n_blocks = runner.limits().n_blocks;
    let (max_context, max_context_reason) = (spec.max_context, "the model's context");
    let memory = MemoryPlan { n_blocks, max_context, max_context_reason, kv_token_bytes: 0, n_bytes: 0 };
    (AnyDevice::Null(runner), "null".to_owned(), memory, None)
}

/// The device of that name.
fn open_device(file: &dyn ModelFile, spec: &ModelSpec, config: &ModelConfig, tell: &mut dyn FnMut(&str)) -> Result<OpenDevice> {
    match config.device.as_str() {
        "cpu" => open_cpu(file, spec, config),
        "reference" => {
            ensure!(config.kv == "floats", "model.kv: \"int8\" is for the CPU; the reference device keeps f32");
            let allowed = Allowed { n_bytes: config.memory_bytes, advice: HOST_ADVICE.to_owned() };
            let (fingerprint, memory) = (Reference.fingerprint(), plan_memory(&Reference, file, spec, config, &allowed)?);
            Ok((AnyDevice::Reference(Reference), fingerprint, memory, None))
        }
        "auto" => match find_cuda(0, spec, config, tell) {
            Ok(device) => {
                tell("device: cuda:0");
                plan_cuda(device, file, spec, config)
            }
            Err(error) => {
                let notice = format!("device: cpu ({error:#})");
                // Where there is a GPU, it was expected to be used.
                if driver_is_present() {
                    say(&notice);
                } else {
                    tell(&notice);
                }
                open_cpu(file, spec, config)
            }
        },
        name => match name.strip_prefix("cuda") {
            Some("") => plan_cuda(find_cuda(0, spec, config, tell)?, file, spec, config),
            Some(number) if number.strip_prefix(':').is_some_and(|n| n.parse::<usize>().is_ok()) => {
                plan_cuda(find_cuda(number[1..].parse()?, spec, config, tell)?, file, spec, config)
            }
            _ => bail!("model.device: {name:?} is not one of cpu, cuda, cuda:1 and so on, auto, reference"),
        },
    }
}

/// A GPU, if it has what models of this kind need.
fn find_cuda(ordinal: usize, spec: &ModelSpec, config: &ModelConfig, tell: &mut dyn FnMut(&str)) -> Result<CudaDevice> {
    let numerics = &config.numerics;
    ensure!(numerics == "fast", "model.numerics: {numerics:?} is for the CPU; CUDA computes in bfloat16");
    ensure!(config.kv == "floats", "model.kv: \"int8\" is for the CPU; CUDA keeps bfloat16");
    let device = CudaDevice::open(ordinal, &config.kernels, tell)?.with_launching(config.launching);
    device.check(&spec.step_sizes(config.budget_tokens))?;
    Ok(device)
}

/// The memory of a GPU. Too little is an error for `auto`, too: it may be others' for the moment, and the CPU gives other bits.
fn plan_cuda(device: CudaDevice, file: &dyn ModelFile, spec: &ModelSpec, config: &ModelConfig) -> Result<OpenDevice> {
    let (ordinal, free) = (device.facts().ordinal, device.free_bytes()?);
    // Others may want a little of what is free now; the driver itself does.
    let n_bytes = if config.memory_is_given { config.memory_bytes.min(free) } else { free / 10 * 9 / config.n_sharing };
    let advice = format!("{} MiB of cuda:{ordinal} are free; choose a smaller engine.budget_tokens or model", free >> 20);
    let memory = plan_memory(&device, file, spec, config, &Allowed { n_bytes, advice })?;
    let fingerprint = device.fingerprint();
    Ok((AnyDevice::Cuda(Box::new(device)), fingerprint, memory, Some((format!("cuda:{ordinal}"), free))))
}

/// Most bytes of weights that `fast` takes with products in bfloat16. With more, a step of few rows is bound by reading them, and
/// unpacking would come on top of that.
const MAX_FAST_BF16_BYTES: usize = 4 << 30;

/// The CPU in the numbers asked for. What `fast` means depends on the model and the machine's instructions, never on free
/// memory: that must not change a result.
fn cpu(file: &dyn ModelFile, spec: &ModelSpec, config: &ModelConfig) -> Result<CpuDevice> {
    let isa = config.isa;
    let kv = Kv::named(&config.kv)?;
    let device = |numerics| CpuDevice::new(isa, numerics, config.n_threads).with_kv(kv);
    if config.numerics != "fast" {
        return Ok(device(Numerics::named(&config.numerics)?));
    }
    let fastest = device(Numerics::fastest(isa));
    let fits = sizing(&fastest, spec, file, config.budget_tokens).weights_bytes <= MAX_FAST_BF16_BYTES;
    Ok(if fastest.numerics() != Numerics::Bf16 || fits { fastest } else { device(Numerics::fastest_int8(isa)) })
}

fn open_cpu(file: &dyn ModelFile, spec: &ModelSpec, config: &ModelConfig) -> Result<OpenDevice> {
    let device = cpu(file, spec, config)?;
    let allowed = Allowed { n_bytes: config.memory_bytes, advice: HOST_ADVICE.to_owned() };
    let (fingerprint, memory) = (device.fingerprint(), plan_memory(&device, file, spec, config, &allowed)?);
    Ok((AnyDevice::Cpu(Box::new(device)), fingerprint, memory, None))
}

/// What a model's files say.
pub struct Opened {
    /// The weights.
    pub file: Box<dyn ModelFile>,
    /// What they mean.
    pub spec: ModelSpec,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template.
    pub template: ChatTemplate,
}

/// Opens a GGUF file, or a folder in Hugging Face's form.
///
/// # Errors
/// A file that is missing, damaged, or of a kind that is not supported.
pub fn open_files(local: &LocalModel) -> Result<Opened> {
    let path = local.path.display();
    if local.path.is_dir() {
        let folder = HfFolder::open(&local.path)?;
        let spec = folder.spec()?;
        let text = |name: &str| match std::fs::read_to_string(local.path.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {path}/{name}")),
        };
        let tokenizer = text("tokenizer.json")?.with_context(|| format!("model folder {path} has no tokenizer.json"))?;
        let (config, chat_template) = (text("tokenizer_config.json")?, text("chat_template.jinja")?);
        let generation_config = text("generation_config.json")?;
        let files = HfFiles {
            tokenizer: &tokenizer,
            tokenizer_config: config.as_deref(),
            chat_template: chat_template.as_deref(),
            generation_config: generation_config.as_deref(),
            n_vocab: spec.n_vocab,
        };
        let tokenizer = Tokenizer::from_hf(&files).with_context(|| format!("{path}"))?;
        let template = ChatTemplate::from_hf(&files).with_context(|| format!("{path}"))?;
        return Ok(Opened { file: Box::new(folder), spec, tokenizer, template });
    }
    let gguf = Gguf::open(&local.path)?;
    let spec = gguf.spec()?;
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    let template = ChatTemplate::from_gguf(&gguf).with_context(|| format!("chat template of {path}"))?;
    Ok(Opened { file: Box::new(gguf), spec, tokenizer, template })
}

/// Puts the model and its KV cache into memory. Steps are timed by `meter`.
///
/// # Errors
/// A tensor that the device can't take.
pub fn load(open: OpenModel, config: &ModelConfig, meter: &Arc<Meter>) -> Result<(Box<dyn Runner>, ChatTemplate)> {
    let OpenModel { file, device, template, memory, .. } = open;
    let budget_tokens = config.budget_tokens;
    if meter.counts() {
        meter.count_layers(&file.spec()?.attention);
    }
    let runner: Box<dyn Runner> = match device {
        AnyDevice::Cpu(device) => Box::new(ModelRunner::load(*device, &*file, memory.n_blocks, budget_tokens)?),
        AnyDevice::Cuda(device) => Box::new(ModelRunner::load(*device, &*file, memory.n_blocks, budget_tokens)?),
        AnyDevice::Reference(device) => Box::new(ModelRunner::load(device, &*file, memory.n_blocks, budget_tokens)?),
        AnyDevice::Null(runner) => Box::new(runner),
    };
    Ok((Box::new(MeteredRunner::new(runner, Arc::clone(meter))), template))
}

/// A KV cache of fewer tokens is not worth starting with.
const MIN_KV_TOKENS: usize = 256;

/// What may be used of a memory, and what to do if that is not enough.
struct Allowed {
    n_bytes: u64,
    advice: String,
}

/// For devices that use the machine's memory.
const HOST_ADVICE: &str = "raise --memory, or choose numbers that take less (--numerics int8)";

fn plan_memory<D: Device>(
    device: &D,
    file: &dyn ModelFile,
    spec: &ModelSpec,
    config: &ModelConfig,
    allowed: &Allowed,
) -> Result<MemoryPlan> {
    let sizes = sizing(device, spec, file, config.budget_tokens);
    // Logits of the rows of a step, made at the first one; a device that plans ahead has counted them.
    let logits_bytes = if sizes.reserve_bytes > 0 { 0 } else { config.max_running.min(64) * spec.n_vocab * size_of::<f32>() };
    let fixed_bytes = (sizes.fixed_bytes() + logits_bytes) as u64;
    let kv_bytes = allowed.n_bytes.saturating_sub(fixed_bytes);
    // More than every running row at full length can't be used.
    let useful = config.max_running * spec.max_context.div_ceil(BLOCK_TOKENS);
    let n_blocks = (kv_bytes / sizes.kv_block_bytes as u64).min(useful as u64) as usize;
    // A job that has begun goes on as it was, though more may be free by now.
    let begun = config.begun_context.filter(|begun| (MIN_KV_TOKENS..spec.max_context).contains(begun));
    let begun_blocks = begun.map(|begun| begun / BLOCK_TOKENS).filter(|&begun| begun <= n_blocks);
    let n_blocks = begun_blocks.unwrap_or(n_blocks);
    let pool_tokens = n_blocks * BLOCK_TOKENS;
    if pool_tokens < MIN_KV_TOKENS {
        let need = fixed_bytes + (MIN_KV_TOKENS / BLOCK_TOKENS * sizes.kv_block_bytes) as u64;
        bail!(
            "not enough memory for the model: {} MiB allowed, at least {} MiB needed (weights {}, a step {}, KV cache); {}",
            allowed.n_bytes >> 20,
            (need >> 20) + 1,
            sizes.weights_bytes >> 20,
            (sizes.fixed_bytes() - sizes.weights_bytes + logits_bytes) >> 20,
            allowed.advice,
        );
    }
    let (max_context, max_context_reason) = match spec.max_context {
        limit if limit <= pool_tokens => (limit, "the model's context"),
        _ if begun_blocks.is_some() => (pool_tokens, "the KV cache that the job began with"),
        _ => (pool_tokens, "the KV cache; raise --memory"),
    };
    let n_bytes = fixed_bytes + (n_blocks * sizes.kv_block_bytes) as u64;
    let kv_token_bytes = sizes.kv_block_bytes / BLOCK_TOKENS;
    Ok(MemoryPlan { n_blocks, max_context, max_context_reason, kv_token_bytes, n_bytes })
}

impl TokenTable for Tokenizer {
    fn token_bytes(&self, id: u32) -> &[u8] {
        Self::token_bytes(self, id)
    }

    fn is_end(&self, id: u32) -> bool {
        self.end_ids().contains(&id)
    }

    fn is_special(&self, id: u32) -> bool {
        Self::is_special(self, id)
    }

    fn end_ids(&self) -> &[u32] {
        Self::end_ids(self)
    }
}
