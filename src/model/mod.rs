//! The model: weights, the forward pass, and the one call that the engine makes per step. Written once over
//! [`Device`]; differences between model families are data ([`ModelSpec`]). Knows nothing of rows, text or scheduling.
//!
//! Invariant: all memory is made at load; [`Runner::run`] adds none of its own.

mod spec;
mod workspace;

pub use spec::{ARCHITECTURES, ModelSpec};
pub use workspace::{Sizing, Workspace, sizing};

use crate::device::batch::{Batch, StepOutput};
use crate::device::{BLOCK_TOKENS, Device, StepSizes};
use crate::gguf::Gguf;
use anyhow::{Context, Result, ensure};
use spec::layer_tensor;

/// What a runner can take; the engine builds its batches within this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunnerLimits {
    /// KV blocks of the pool; block ids are below this.
    pub n_blocks: usize,
    /// Most tokens of a step.
    pub max_step_tokens: usize,
    /// Most sequences of a step, and most head rows.
    pub max_step_seqs: usize,
    /// Token ids are below this.
    pub n_vocab: usize,
    /// Most positions of a sequence.
    pub max_context: usize,
}

/// A model on a device, its types erased: what the engine drives.
pub trait Runner: Send {
    /// What the runner can take.
    fn limits(&self) -> RunnerLimits;

    /// Runs one step: stores the tokens' keys and values in the blocks that the batch names and fills `out.rows`, one per
    /// head row, in order. A row that can't be computed comes back as `HeadOut::BROKEN`.
    ///
    /// # Errors
    /// The device failed; nothing of the step may be used.
    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<()>;
}

/// Weights of a decoder.
pub struct Model<D: Device> {
    /// What the weights mean.
    pub spec: ModelSpec,
    /// `[vocab, width]`
    embed: D::Weight,
    layers: Vec<Layer<D>>,
    /// `[width]`
    norm: D::Vector,
    /// `[vocab, width]`; `None` if tied to `embed`.
    head: Option<D::Weight>,
}

/// Weights of one layer.
struct Layer<D: Device> {
    /// `[width]`
    attn_norm: D::Vector,
    /// `[(n_heads + 2 · n_kv_heads) · head_dim, width]`
    qkv: D::Weight,
    /// `[width, n_heads · head_dim]`
    attn_output: D::Weight,
    /// `[width]`
    ffn_norm: D::Vector,
    /// `[2 · ffn_width, width]`, in the device's order
    gate_up: D::Weight,
    /// `[width, ffn_width]`
    down: D::Weight,
}

impl<D: Device> Model<D> {
    /// Loads the weights onto a device.
    ///
    /// # Errors
    /// As [`ModelSpec::from_gguf`]; a tensor that the device can't take.
    pub fn load(dev: &D, gguf: &Gguf) -> Result<Self> {
        let spec = ModelSpec::from_gguf(gguf)?;
        let layers = (0..spec.n_layers)
            .map(|layer| Layer::load(dev, gguf, layer).with_context(|| format!("cannot load layer {layer}")))
            .collect::<Result<_>>()?;
        let head = if spec.tied_head { None } else { Some(dev.load_weight(&[gguf.tensor("output.weight")?])?) };
        Ok(Self {
            embed: dev.load_weight(&[gguf.tensor("token_embd.weight")?])?,
            layers,
            norm: dev.load_vector(&gguf.tensor("output_norm.weight")?)?,
            head,
            spec,
        })
    }

    /// One step. `caches` are one per layer.
    pub fn forward(&self, dev: &D, batch: &Batch, caches: &mut [D::Cache], ws: &mut Workspace<D>, out: &mut StepOutput) {
        let spec = &self.spec;
        let (eps, attention) = (spec.norm_eps, &spec.attention);
        dev.embed(&self.embed, batch, &mut ws.x);
        for (layer, cache) in self.layers.iter().zip(caches) {
            dev.norm(&ws.x, &layer.attn_norm, eps, &layer.qkv, batch, &mut ws.normed);
            dev.linear(&ws.normed, &layer.qkv, batch, &mut ws.qkv);
            dev.finish_qkv(&mut ws.qkv, attention, batch, cache);
            dev.attention(&ws.qkv, attention, cache, &layer.attn_output, batch, &mut ws.attended);
            dev.linear_add(&ws.attended, &layer.attn_output, batch, &mut ws.x);
            dev.norm(&ws.x, &layer.ffn_norm, eps, &layer.gate_up, batch, &mut ws.normed);
            dev.gate_up(&ws.normed, &layer.gate_up, spec.activation, &layer.down, batch, &mut ws.gate_up, &mut ws.gated);
            dev.linear_add(&ws.gated, &layer.down, batch, &mut ws.x);
        }
        dev.head(&ws.x, &self.norm, eps, self.head.as_ref().unwrap_or(&self.embed), batch, out);
    }
}

impl<D: Device> Layer<D> {
    fn load(dev: &D, gguf: &Gguf, layer: usize) -> Result<Self> {
        let tensor = |part| gguf.tensor(&layer_tensor(layer, part));
        Ok(Self {
            attn_norm: dev.load_vector(&tensor("attn_norm")?)?,
            qkv: dev.load_weight(&[tensor("attn_q")?, tensor("attn_k")?, tensor("attn_v")?])?,
            attn_output: dev.load_weight(&[tensor("attn_output")?])?,
            ffn_norm: dev.load_vector(&tensor("ffn_norm")?)?,
            gate_up: dev.load_gate_up(&tensor("ffn_gate")?, &tensor("ffn_up")?)?,
            down: dev.load_weight(&[tensor("ffn_down")?])?,
        })
    }
}

/// A model, its device and all the memory of its steps.
pub struct ModelRunner<D: Device> {
    dev: D,
    model: Model<D>,
    /// One per layer.
    caches: Vec<D::Cache>,
    workspace: Workspace<D>,
    limits: RunnerLimits,
}

impl<D: Device> ModelRunner<D> {
    /// Loads a model and makes its KV pool of `n_blocks` blocks and its buffers for steps of `max_step_tokens` tokens.
    ///
    /// # Errors
    /// As [`Model::load`]; a pool or a step of size 0.
    pub fn load(mut dev: D, gguf: &Gguf, n_blocks: usize, max_step_tokens: usize) -> Result<Self> {
        ensure!(
            n_blocks > 0 && max_step_tokens > 0,
            "{n_blocks} KV blocks, steps of {max_step_tokens} tokens: both must be at least 1"
        );
        let model = Model::load(&dev, gguf)?;
        let spec = &model.spec;
        let limits = RunnerLimits {
            n_blocks,
            max_step_tokens,
            max_step_seqs: max_step_tokens,
            n_vocab: spec.n_vocab,
            // A longer sequence could never finish: one alone must fit the pool.
            max_context: spec.max_context.min(n_blocks * BLOCK_TOKENS),
        };
        dev.reserve(&StepSizes {
            max_tokens: max_step_tokens,
            max_seqs: limits.max_step_seqs,
            max_context: limits.max_context,
            n_vocab: spec.n_vocab,
            width: spec.width,
            attention: &spec.attention,
        });
        let caches = (0..spec.n_layers).map(|_| dev.new_cache(&spec.attention, n_blocks)).collect();
        let workspace = Workspace::new(&dev, spec, max_step_tokens);
        Ok(Self { dev, model, caches, workspace, limits })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.model.spec
    }

    /// What the bits depend on besides the model's file ([`Device::fingerprint`]).
    pub fn device_fingerprint(&self) -> String {
        self.dev.fingerprint()
    }
}

impl<D: Device> Runner for ModelRunner<D> {
    fn limits(&self) -> RunnerLimits {
        self.limits
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<()> {
        let limits = &self.limits;
        assert!(
            batch.tokens.len() <= limits.max_step_tokens && batch.heads.len() <= limits.max_step_seqs,
            "a step of {} tokens and {} head rows, made for {} and {}",
            batch.tokens.len(),
            batch.heads.len(),
            limits.max_step_tokens,
            limits.max_step_seqs
        );
        if cfg!(debug_assertions) {
            batch.check(limits.n_blocks, limits.n_vocab);
        }
        if batch.tokens.is_empty() {
            out.rows.clear();
            return Ok(());
        }
        self.model.forward(&self.dev, batch, &mut self.caches, &mut self.workspace, out);
        assert_eq!(out.rows.len(), batch.heads.len(), "one result per head row");
        Ok(())
    }
}
