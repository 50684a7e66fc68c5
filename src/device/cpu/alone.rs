//! Each operation of a step by itself: a CPU device that does some operations of a step, with the clock in hand, and leaves out
//! the others. Knows nothing of where steps come from. What a run's operations would take at that speed is what it should take;
//! the rest is everything else (`pipeline::busy`).
//!
//! A step of which one operation alone is done goes through all layers, so that weights and caches come from as far away as in
//! a run; its other operands are what the last step left. Values are of no account, but they are numbers: a whole step goes first.

use super::{Act, Cache, CpuDevice, Hidden, Vector, Weight, numerics};
use crate::device::batch::{Batch, HeadOut, StepOutput};
use crate::device::{Activation, AttentionSpec, Device, Experts, HeadSpec, QkvExtra, StepSizes};
use crate::tensor::Tensor;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// [`Device::linear`]
    Linear,
    /// [`Device::linear_add`]
    LinearAdd,
    /// [`Device::gate_up`]
    GateUp,
    /// [`Device::experts`]
    Experts,
    /// [`Device::attention`]
    Attention,
    /// [`Device::head`]
    Head,
    /// [`Device::finish_qkv`]
    FinishQkv,
    /// [`Device::norm`]
    Norm,
    /// [`Device::norm_add`]
    NormAdd,
    /// [`Device::embed`]
    Embed,
}

/// An operation on operands of one shape.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Operation {
    /// What it is.
    pub kind: Kind,
    /// Its weight's shape and types, such as `[960, 576] bf16 tiles`; empty where it has none that is a matrix.
    pub weight: String,
    /// A call's work for each token (of the head: each row): of products additions and multiplications, of attention nothing
    /// that a token could say by itself, of others bytes: each f32 that comes or goes, once.
    pub per_row: u64,
}

/// Which operations are done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Wanted {
    /// All.
    #[default]
    All,
    /// None.
    Nothing,
    /// Those.
    Only(Operation),
}

/// What there is to do, and what was done.
#[derive(Debug, Default)]
pub struct Log {
    /// Which operations are done.
    pub wanted: Wanted,
    /// Operations that were called, done or not.
    pub called: Vec<Operation>,
    /// Seconds of each call that was done.
    pub seconds: Vec<f64>,
}

/// See the module.
pub struct Alone {
    dev: CpuDevice,
    log: Arc<Mutex<Log>>,
}

impl Alone {
    /// Does what `log` wants.
    pub fn new(dev: CpuDevice, log: Arc<Mutex<Log>>) -> Self {
        Self { dev, log }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls an operation, if it is wanted.
    fn time(&self, kind: Kind, weight: Option<&Weight>, per_row: usize, call: impl FnOnce()) {
        let operation = Operation { kind, weight: weight.map_or(String::new(), describe), per_row: per_row as u64 };
        let is_wanted = {
            let mut log = self.log();
            let is_wanted = match &log.wanted {
                Wanted::All => true,
                Wanted::Nothing => false,
                Wanted::Only(only) => *only == operation,
            };
            log.called.push(operation);
            is_wanted
        };
        if is_wanted {
            let start = Instant::now();
            call();
            let seconds = start.elapsed().as_secs_f64();
            self.log().seconds.push(seconds);
        }
    }
}

/// A weight's shape and types.
fn describe(weight: &Weight) -> String {
    let mut types: Vec<String> = Vec::new();
    for part in &weight.parts {
        let name = match part.layout {
            numerics::Layout::Blocks(dtype) | numerics::Layout::Floats(dtype) => dtype.to_string(),
            numerics::Layout::Tiles => "bf16 tiles".to_owned(),
            numerics::Layout::PackedTiles(dtype) => format!("{dtype} as bf16 tiles"),
        };
        if !types.contains(&name) {
            types.push(name);
        }
    }
    format!("[{}, {}] {}", columns(weight), weight.k, types.join(", "))
}

/// Rows of the file's tensors.
fn columns(weight: &Weight) -> usize {
    if weight.gated { 2 * weight.n } else { weight.n }
}

/// Operations of a product for each row.
fn products(weight: &Weight) -> usize {
    2 * columns(weight) * weight.k
}

impl Device for Alone {
    type Weight = Weight;
    type Vector = Vector;
    type Hidden = Hidden;
    type Act = Act;
    type Cache = Cache;

    fn fingerprint(&self) -> String {
        self.dev.fingerprint()
    }

    fn load_weight(&self, parts: &[Tensor<'_>]) -> anyhow::Result<Weight> {
        self.dev.load_weight(parts)
    }

    fn load_gate_up(&self, gate: &Tensor<'_>, up: &Tensor<'_>) -> anyhow::Result<Weight> {
        self.dev.load_gate_up(gate, up)
    }

    fn load_vector(&self, parts: &[Tensor<'_>]) -> anyhow::Result<Vector> {
        self.dev.load_vector(parts)
    }

    fn tensor_bytes(&self, tensor: &Tensor<'_>) -> usize {
        self.dev.tensor_bytes(tensor)
    }

    fn cache_block_bytes(&self, spec: &AttentionSpec) -> usize {
        self.dev.cache_block_bytes(spec)
    }

    fn new_cache(&self, spec: &AttentionSpec, n_blocks: usize) -> Cache {
        let mut cache = self.dev.new_cache(spec, n_blocks);
        cache.touch();
        cache
    }

    fn new_hidden(&self, max_tokens: usize, width: usize) -> Hidden {
        self.dev.new_hidden(max_tokens, width)
    }

    fn new_act(&self, max_tokens: usize, width: usize) -> Act {
        self.dev.new_act(max_tokens, width)
    }

    fn reserve(&mut self, sizes: &StepSizes<'_>) {
        self.dev.reserve(sizes);
    }

    fn embed(&self, table: &Weight, scale: f32, batch: &Batch, x: &mut Hidden) {
        self.time(Kind::Embed, Some(table), 2 * 4 * x.width, || self.dev.embed(table, scale, batch, x));
    }

    fn norm(&self, x: &Hidden, weight: &Vector, eps: f32, next: &Weight, batch: &Batch, act: &mut Act) {
        self.time(Kind::Norm, None, 2 * 4 * x.width, || self.dev.norm(x, weight, eps, next, batch, act));
    }

    fn norm_add(&self, y: &Hidden, weight: &Vector, eps: f32, batch: &Batch, x: &mut Hidden) {
        self.time(Kind::NormAdd, None, 3 * 4 * x.width, || self.dev.norm_add(y, weight, eps, batch, x));
    }

    fn linear(&self, act: &Act, weight: &Weight, batch: &Batch, out: &mut Hidden) {
        self.time(Kind::Linear, Some(weight), products(weight), || self.dev.linear(act, weight, batch, out));
    }

    fn linear_add(&self, act: &Act, weight: &Weight, batch: &Batch, x: &mut Hidden) {
        self.time(Kind::LinearAdd, Some(weight), products(weight), || self.dev.linear_add(act, weight, batch, x));
    }

    fn finish_qkv(&self, qkv: &mut Hidden, extra: &QkvExtra<Vector>, spec: &AttentionSpec, batch: &Batch, cache: &mut Cache) {
        let width = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim;
        self.time(Kind::FinishQkv, None, 2 * 4 * width, || self.dev.finish_qkv(qkv, extra, spec, batch, cache));
    }

    fn attention(&self, qkv: &Hidden, spec: &AttentionSpec, cache: &Cache, next: &Weight, batch: &Batch, act: &mut Act) {
        self.time(Kind::Attention, None, 0, || self.dev.attention(qkv, spec, cache, next, batch, act));
    }

    fn gate_up(
        &self,
        act: &Act,
        weight: &Weight,
        f: Activation,
        next: &Weight,
        batch: &Batch,
        scratch: &mut Hidden,
        out: &mut Act,
    ) {
        let call = || self.dev.gate_up(act, weight, f, next, batch, scratch, out);
        self.time(Kind::GateUp, Some(weight), products(weight), call);
    }

    fn experts(&self, act: &Act, experts: &Experts<Weight>, f: Activation, batch: &Batch, x: &mut Hidden) {
        let one = &experts.experts[0];
        let per_row = products(&experts.router) + experts.n_used * (products(&one.gate_up) + products(&one.down));
        self.time(Kind::Experts, Some(&one.gate_up), per_row, || self.dev.experts(act, experts, f, batch, x));
    }

    fn head(&self, x: &Hidden, norm: &Vector, weight: &Weight, spec: &HeadSpec, batch: &Batch, out: &mut StepOutput) {
        out.rows.clear();
        out.rows.resize(batch.heads.len(), HeadOut::BROKEN);
        self.time(Kind::Head, Some(weight), products(weight), || self.dev.head(x, norm, weight, spec, batch, out));
    }
}
