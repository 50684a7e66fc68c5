//! The model of a job: opened and fingerprinted first (cheap), put into memory later (not cheap), so that a job that
//! can't run says so before it costs anything. Decides how memory is shared out.

use super::meter::{Meter, MeteredRunner};
use super::progress::say;
use crate::config::Config;
use crate::device::cpu::{CpuDevice, Isa};
use crate::device::reference::Reference;
use crate::device::{BLOCK_TOKENS, Device};
use crate::engine::TokenTable;
use crate::fingerprint::{Fingerprint, content_hash};
use crate::gguf::Gguf;
use crate::hub::{self, LocalModel};
use crate::model::{ModelRunner, ModelSpec, Runner, sizing};
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::Tokenizer;
use anyhow::{Context, Result, bail, ensure};
use std::sync::Arc;

/// A model that is known but not in memory yet.
pub(super) struct OpenModel {
    pub(super) local: LocalModel,
    pub(super) gguf: Gguf,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) template: ChatTemplate,
    pub(super) fingerprint: Fingerprint,
    pub(super) memory: MemoryPlan,
    device: AnyDevice,
}

enum AnyDevice {
    Cpu(Box<CpuDevice>),
    Reference(Reference),
}

/// How the memory is shared out; part of what a job is, as it limits how long a row can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MemoryPlan {
    pub(super) n_blocks: usize,
    /// Most tokens of prompt and completion together.
    pub(super) max_context: usize,
    /// What sets that limit.
    pub(super) max_context_reason: &'static str,
}

impl MemoryPlan {
    /// Size of the KV cache, in tokens.
    pub(super) fn kv_tokens(&self) -> u64 {
        (self.n_blocks * BLOCK_TOKENS) as u64
    }
}

/// Finds and opens the job's model.
///
/// # Errors
/// No such model, a file that can't be used, or memory that does not hold the weights, the buffers of a step and a KV
/// cache that is of use.
pub(super) fn open(config: &Config) -> Result<OpenModel> {
    let mut tell = |line: &str| {
        if !config.quiet {
            say(line);
        }
    };
    let local = hub::resolve(&config.spec.model.name, &config.cache, &mut tell)?;
    let gguf = Gguf::open(&local.path)?;
    let spec = ModelSpec::from_gguf(&gguf)?;
    let tokenizer = Tokenizer::from_gguf(&gguf).with_context(|| format!("tokenizer of {}", local.path.display()))?;
    let template = ChatTemplate::from_gguf(&gguf).with_context(|| format!("chat template of {}", local.path.display()))?;
    ensure!(
        tokenizer.n_vocab() == spec.n_vocab,
        "{}: the tokenizer has {} tokens, the embedding {}",
        local.path.display(),
        tokenizer.n_vocab(),
        spec.n_vocab
    );
    let (device, device_fingerprint, memory) = match config.spec.model.device.as_str() {
        "cpu" => {
            let device = CpuDevice::new(Isa::detect(), config.n_threads);
            let (fingerprint, memory) = (device.fingerprint(), plan_memory(&device, &gguf, &spec, config)?);
            (AnyDevice::Cpu(Box::new(device)), fingerprint, memory)
        }
        "reference" => {
            let device = Reference;
            let (fingerprint, memory) = (device.fingerprint(), plan_memory(&device, &gguf, &spec, config)?);
            (AnyDevice::Reference(device), fingerprint, memory)
        }
        other => bail!("model.device: {other:?} is not one of cpu, reference"),
    };
    let fingerprint = Fingerprint {
        weights: content_hash(gguf.bytes()),
        tokenizer: tokenizer.hash().to_owned(),
        template: template.hash().to_owned(),
        device: device_fingerprint,
    };
    Ok(OpenModel { local, gguf, tokenizer: Arc::new(tokenizer), template, fingerprint, memory, device })
}

/// Puts the model and its KV cache into memory. Steps are timed by `meter`.
pub(super) fn load(open: OpenModel, config: &Config, meter: &Arc<Meter>) -> Result<(Box<dyn Runner>, ChatTemplate)> {
    let OpenModel { gguf, device, template, memory, .. } = open;
    let budget_tokens = config.spec.engine.budget_tokens;
    let runner: Box<dyn Runner> = match device {
        AnyDevice::Cpu(device) => Box::new(ModelRunner::load(*device, &gguf, memory.n_blocks, budget_tokens)?),
        AnyDevice::Reference(device) => Box::new(ModelRunner::load(device, &gguf, memory.n_blocks, budget_tokens)?),
    };
    Ok((Box::new(MeteredRunner::new(runner, Arc::clone(meter))), template))
}

/// A KV cache of fewer tokens is not worth starting with.
const MIN_KV_TOKENS: usize = 256;

fn plan_memory<D: Device>(device: &D, gguf: &Gguf, spec: &ModelSpec, config: &Config) -> Result<MemoryPlan> {
    let sizes = sizing(device, spec, gguf, config.spec.engine.budget_tokens);
    // Logits of the rows of a step, made at the first one.
    let logits_bytes = config.spec.engine.max_running.min(64) * spec.n_vocab * size_of::<f32>();
    let fixed_bytes = (sizes.weights_file_bytes + sizes.workspace_bytes + logits_bytes) as u64;
    let kv_bytes = config.memory_bytes.saturating_sub(fixed_bytes);
    // More than every running row at full length can't be used.
    let useful = config.spec.engine.max_running * spec.max_context.div_ceil(BLOCK_TOKENS);
    let n_blocks = (kv_bytes / sizes.kv_block_bytes as u64).min(useful as u64) as usize;
    let pool_tokens = n_blocks * BLOCK_TOKENS;
    if pool_tokens < MIN_KV_TOKENS {
        let need = fixed_bytes + (MIN_KV_TOKENS / BLOCK_TOKENS * sizes.kv_block_bytes) as u64;
        bail!(
            "not enough memory for the model: {} MiB allowed, at least {} MiB needed (weights {}, a step {}, KV cache); raise --memory",
            config.memory_bytes >> 20,
            (need >> 20) + 1,
            sizes.weights_file_bytes >> 20,
            (sizes.workspace_bytes + logits_bytes) >> 20,
        );
    }
    let (max_context, max_context_reason) = match spec.max_context {
        limit if limit <= pool_tokens => (limit, "the model's context"),
        _ => (pool_tokens, "the KV cache; raise --memory"),
    };
    Ok(MemoryPlan { n_blocks, max_context, max_context_reason })
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
