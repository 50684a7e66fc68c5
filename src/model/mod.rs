//! The model: weights, the forward pass, and the one call that the engine makes per step. Written once over
//! [`Device`]; differences between model families are data ([`ModelSpec`]). Knows nothing of rows, text or scheduling.
//!
//! Invariant: all memory is made at load; [`Runner::run`] adds none of its own.

pub mod family;
mod file;
mod gguf_facts;
mod layer;
pub mod rope;
mod spec;
mod workspace;

pub use file::ModelFile;
pub(crate) use spec::MAX_LAYERS;
pub use spec::{ExpertSpec, Facts, ModelSpec, Rope};
pub use workspace::{Sizing, Workspace, sizing};

use crate::device::batch::{Batch, StepOutput};
use crate::device::{BLOCK_TOKENS, Device, HeadSpec, StepSizes};
use anyhow::{Context, Result, ensure};
use layer::Layer;

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

    /// Begins a step, if the device then goes on by itself: true, and whoever called may do something else before [`Runner::run`]
    /// of the same batch, which ends it; the next step may begin before that, too, but no other. Otherwise `run` does all.
    ///
    /// # Errors
    /// As of `run`, which is not to be called then.
    fn start(&mut self, _batch: &Batch, _out: &mut StepOutput) -> Result<bool> {
        Ok(false)
    }

    /// Runs one step, or the rest of the one that began first: stores the tokens' keys and values in the blocks that the batch names and fills `out.rows`, one per
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

impl<D: Device> Model<D> {
    /// Loads the weights onto a device. Of the file no more than a layer is in memory at once.
    ///
    /// # Errors
    /// As [`ModelFile::spec`]; a tensor that the device can't take.
    pub fn load(dev: &D, file: &dyn ModelFile) -> Result<Self> {
        let spec = file.spec()?;
        let load = |layer| {
            let loaded = Layer::load(dev, &spec, file, layer).with_context(|| format!("cannot load layer {layer}"));
            file.release();
            loaded
        };
        let layers = (0..spec.n_layers()).map(load).collect::<Result<_>>()?;
        let head = if spec.tied_head { None } else { Some(dev.load_weight(&[file.tensor("output.weight")?])?) };
        let embed = dev.load_table(&file.tensor("token_embd.weight")?)?;
        let norm = dev.load_vector(&[file.tensor("output_norm.weight")?])?;
        file.release();
        Ok(Self { spec, embed, layers, norm, head })
    }

    /// One step, up to its last operation ([`Device::collect`] is still to come). `caches` are one per layer.
    pub fn forward(&self, dev: &D, batch: &Batch, caches: &mut [D::Cache], ws: &mut Workspace<D>, out: &mut StepOutput) {
        self.run_layers(dev, batch, caches, ws);
        let head = HeadSpec { eps: self.spec.norm_eps, soft_cap: self.spec.logit_cap };
        dev.head(&ws.x, &self.norm, self.head.as_ref().unwrap_or(&self.embed), &head, batch, out);
    }

    /// A step's residual stream, to `ws.x`.
    fn run_layers(&self, dev: &D, batch: &Batch, caches: &mut [D::Cache], ws: &mut Workspace<D>) {
        let spec = &self.spec;
        dev.embed(&self.embed, spec.embed_scale, batch, &mut ws.x);
        for ((layer, attention), cache) in self.layers.iter().zip(&spec.attention).zip(caches) {
            layer.forward(dev, spec, attention, batch, cache, ws);
        }
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
    /// Steps that have begun and not ended.
    n_under_way: usize,
}

impl<D: Device> ModelRunner<D> {
    /// Loads a model and makes its KV pool of `n_blocks` blocks and its buffers for steps of `max_step_tokens` tokens.
    ///
    /// # Errors
    /// As [`Model::load`]; a pool or a step of size 0.
    pub fn load(mut dev: D, file: &dyn ModelFile, n_blocks: usize, max_step_tokens: usize) -> Result<Self> {
        ensure!(
            n_blocks > 0 && max_step_tokens > 0,
            "{n_blocks} KV blocks, steps of {max_step_tokens} tokens: both must be at least 1"
        );
        let spec = file.spec()?;
        let limits = RunnerLimits {
            n_blocks,
            max_step_tokens,
            max_step_seqs: max_step_tokens,
            n_vocab: spec.n_vocab,
            // A longer sequence could never finish: one alone must fit the pool.
            max_context: spec.max_context.min(n_blocks * BLOCK_TOKENS),
        };
        let sizes = StepSizes { max_context: limits.max_context, ..spec.step_sizes(max_step_tokens) };
        dev.check(&sizes)?;
        let needs = sizing(&dev, &spec, file, max_step_tokens);
        dev.make_room(needs.fixed_bytes() + n_blocks * needs.kv_block_bytes)?;
        let model = Model::load(&dev, file)?;
        dev.reserve(&sizes);
        let caches = spec.attention.iter().map(|attention| dev.new_cache(attention, n_blocks)).collect();
        let workspace = Workspace::new(&dev, &spec, max_step_tokens);
        dev.finish()?;
        Ok(Self { dev, model, caches, workspace, limits, n_under_way: 0 })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.model.spec
    }

    /// Memory for [`ModelRunner::logits`].
    pub fn new_logits(&self) -> D::Hidden {
        self.dev.new_hidden(self.limits.max_step_tokens, self.limits.n_vocab)
    }

    /// Runs a step and gives all logits of all its tokens, `[T, vocab]`, without a soft cap: what measurements of quality
    /// compare, and nobody else needs.
    pub fn logits(&mut self, batch: &Batch, out: &mut D::Hidden) {
        let (dev, model, ws) = (&self.dev, &self.model, &mut self.workspace);
        model.run_layers(dev, batch, &mut self.caches, ws);
        let head = model.head.as_ref().unwrap_or(&model.embed);
        dev.norm(&ws.x, &model.norm, model.spec.norm_eps, head, batch, &mut ws.normed);
        dev.linear(&ws.normed, head, batch, out);
    }

    /// Has a step's operations done, or begun.
    fn launch(&mut self, batch: &Batch, out: &mut StepOutput) {
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
        if !self.dev.replay(batch) {
            self.model.forward(&self.dev, batch, &mut self.caches, &mut self.workspace, out);
        }
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

    fn start(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<bool> {
        let has_begun = self.dev.runs_alone() && !batch.tokens.is_empty();
        if has_begun {
            self.launch(batch, out);
            self.n_under_way += 1;
        }
        Ok(has_begun)
    }

    fn run(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<()> {
        if batch.tokens.is_empty() {
            out.rows.clear();
            return Ok(());
        }
        if self.n_under_way == 0 {
            self.launch(batch, out);
        } else {
            self.n_under_way -= 1;
        }
        self.dev.collect(batch, out);
        self.dev.finish()?;
        assert_eq!(out.rows.len(), batch.heads.len(), "one result per head row");
        Ok(())
    }
}
