//! A GPU as a [`Device`]: what it holds, how it is loaded, and how failures of the driver are told. The residual stream is f32;
//! activations, keys and values are bfloat16.
//!
//! Invariants: all memory is one arena, made before anything is loaded; a step allocates nothing on the GPU (a graph that is made has
//! the driver do so, see `graphs`). The first error of the driver is kept: nothing is launched after it, and `finish` tells it.

use super::blas::{Blas, Factors, Output};
use super::driver::{Facts, Function, Gpu, TensorMap};
use super::experts;
use super::fp8::{Fp8Weight, ROWS};
use super::graphs::Turn;
use super::images::{Images, KernelPlace};
use super::kernels::{BOX_COLUMNS, HEAD_DIMS, Kernels, check_width};
use super::memory::{Arena, aligned};
use super::operations::broken;
use super::step::{self, Step};
use super::weights::{self, Form};
use crate::device::batch::{Batch, StepOutput};
use crate::device::{Activation, AttentionSpec, BLOCK_TOKENS, Device, Expert, Experts, HeadSpec, Lost, QkvExtra, StepSizes};
use crate::tensor::Tensor;
use anyhow::{Context, Result, bail, ensure};
use std::borrow::Cow;
use std::cell::RefCell;

/// Tokens that a vocabulary may have: keys of the sampling kernel have so many bits for them.
const MAX_VOCAB: usize = 1 << 18;

/// An NVIDIA GPU.
pub struct CudaDevice {
    step: RefCell<Option<Step>>,
    failure: RefCell<Option<String>>,
    arena: Arena,
    pub(super) kernels: Kernels,
    pub(super) blas: Blas,
    fingerprint: String,
    launching: Launching,
    // The last one to go: the others are parts of it.
    pub(super) gpu: Gpu,
}

/// How steps are launched. It changes no bit of what they compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launching {
    /// Whether steps in which each row has one token may be graphs; if not, their operations are launched one by one.
    pub has_graphs: bool,
    /// Whether a step may be launched while the one before is under way; if not, each is waited for as soon as it is launched.
    pub goes_ahead: bool,
}

/// A linear layer's weights.
pub struct Weight {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) place: Place,
}

/// Where weights are, and how.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    /// `[n][k]` bfloat16.
    Bf16(u64),
    /// `[n][k]` f16. No expert's.
    F16(u64),
    /// As floats of 8 bits. No expert's.
    Fp8(Fp8Weight),
    /// As `linear_q.cu` says.
    Packed { bits: usize, q: u64, scales: u64 },
}

/// An f32 vector.
pub struct Vector {
    pub(super) at: u64,
}

/// `[max_tokens][width]`, with room for f32. The residual stream is f32; what a projection gives, bfloat16.
pub struct Hidden {
    pub(super) at: u64,
    max_tokens: usize,
    pub(super) width: usize,
}

impl Hidden {
    /// Where queries go when q, k and v are finished: `[T][n_heads][head_dim]` bfloat16, behind the projection's bfloat16.
    pub(super) fn queries(&self) -> u64 {
        self.at + (2 * self.max_tokens * self.width) as u64
    }
}

/// Activations, `[max_tokens][k]` bfloat16.
pub struct Act {
    pub(super) at: u64,
    /// Where there is room for them as f16 or as fp8, for a weight that is; and for the scales of fp8.
    pub(super) narrow: u64,
    pub(super) scales: u64,
    /// Whether they are there as fp8 alone.
    pub(super) is_fp8: bool,
}

/// One layer's keys and values, `[n_blocks][n_kv_heads][16][head_dim]` bfloat16 each.
pub struct Cache {
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) wide: Option<Wide>,
}

/// The kernel of attention that copies boxes of keys and values, and these as it takes them.
pub(super) struct Wide {
    pub(super) f: Function,
    pub(super) keys: TensorMap,
    pub(super) values: TensorMap,
}

impl CudaDevice {
    /// Opens a GPU by its number and loads the kernels, which are compiled if they have not been before.
    ///
    /// # Errors
    /// No driver, an old one, no such GPU, one that the kernels are not for, no way to get the kernels, no cuBLASLt.
    pub fn open(ordinal: usize, place: &KernelPlace, tell: &mut dyn FnMut(&str)) -> Result<Self> {
        let mut open = || -> Result<Self> {
            let gpu = Gpu::open(ordinal)?;
            let blas = Blas::open()?;
            let images = Images::load(&gpu, place, tell)?;
            let kernels = Kernels::find(&gpu, &images)?;
            let fingerprint = fingerprint(gpu.facts(), &images);
            let (step, failure, arena) = (RefCell::default(), RefCell::default(), Arena::default());
            let launching = Launching { has_graphs: true, goes_ahead: true };
            Ok(Self { step, failure, arena, kernels, blas, fingerprint, launching, gpu })
        };
        open().with_context(|| format!("device cuda:{ordinal}"))
    }

    /// The same, but steps are launched in that way.
    #[must_use]
    pub fn with_launching(mut self, launching: Launching) -> Self {
        self.launching = launching;
        self
    }

    /// What the GPU is.
    pub fn facts(&self) -> &Facts {
        self.gpu.facts()
    }

    /// Memory of the GPU that nobody uses, bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn free_bytes(&self) -> Result<u64> {
        Ok(self.gpu.memory()?.0)
    }

    /// Does something unless something has failed before; keeps the first failure.
    fn attempt<T>(&self, done: impl FnOnce() -> Result<T>) -> Option<T> {
        if self.failure.borrow().is_some() {
            return None;
        }
        match done() {
            Ok(value) => Some(value),
            Err(error) => {
                *self.failure.borrow_mut() = Some(format!("cuda:{}: {error:#}", self.facts().ordinal));
                None
            }
        }
    }

    /// The same with the memory of steps.
    fn attempt_step(&self, done: impl FnOnce(&mut Step) -> Result<()>) {
        self.attempt(|| done(self.step.borrow_mut().as_mut().context("`reserve` comes before the first step")?));
    }

    /// Room in the arena, with these bytes.
    fn put(&self, bytes: &[u8]) -> Result<u64> {
        let at = self.arena.take(bytes.len())?;
        self.gpu.upload(at, bytes)?;
        Ok(at)
    }

    /// Room in the arena; a failure is kept.
    fn room(&self, n_bytes: usize) -> u64 {
        self.attempt(|| self.arena.take(n_bytes)).unwrap_or(0)
    }

    /// Tensors as one weight of that form.
    fn load(&self, parts: &[Tensor<'_>], form: Form) -> Result<Weight> {
        let (n, k) = weights::shape(parts)?;
        let place = match form {
            Form::Packed(bits) => {
                let (q, scales) = weights::pack(parts, bits)?;
                Place::Packed { bits, q: self.put(&q)?, scales: self.put(&scales)? }
            }
            Form::Fp8 => {
                let at = self.arena.take(n * k)?;
                let (mut to, mut scales) = (at, Vec::new());
                for part in parts {
                    let (floats, of_part) = weights::fp8_bytes(part);
                    self.gpu.upload(to, &floats)?;
                    to += floats.len() as u64;
                    scales.extend(of_part);
                }
                for output in [Output::Bf16, Output::F32] {
                    self.blas.prepare((n, k), Factors::E4m3, output)?;
                }
                Place::Fp8(Fp8Weight { n, k, at, scales: self.put(&scales)? })
            }
            Form::F16 if !parts.iter().all(weights::fits_bf16) => Place::F16(self.put_dense(parts, (n, k), Factors::F16)?),
            Form::Bf16 | Form::F16 => Place::Bf16(self.put_dense(parts, (n, k), Factors::Bf16)?),
        };
        Ok(Weight { n, k, place })
    }

    /// Room in the arena, with all values of these tensors of f16, or as bfloat16. The products with them are prepared.
    fn put_dense(&self, parts: &[Tensor<'_>], (n, k): (usize, usize), factors: Factors) -> Result<u64> {
        let at = self.arena.take(2 * n * k)?;
        let mut to = at;
        for part in parts {
            let bytes = if factors == Factors::F16 { Cow::from(&part.bytes[..]) } else { Cow::from(weights::bf16_bytes(part)) };
            self.gpu.upload(to, &bytes)?;
            to += bytes.len() as u64;
        }
        for output in [Output::Bf16, Output::F32, Output::Sum] {
            self.blas.prepare((n, k), factors, output)?;
        }
        Ok(at)
    }
}

/// Whether the gate's kernel takes so many columns.
fn check_gate(gate: &Tensor<'_>) -> Result<()> {
    let n = gate.shape[0];
    ensure!(n.is_multiple_of(8), "{}: {n} rows are not supported on CUDA, only multiples of 8", gate.name);
    Ok(())
}

/// Everything that bits depend on besides the model.
fn fingerprint(facts: &Facts, images: &Images) -> String {
    let (major, minor) = images.compiler;
    // PTX is made into machine code by the driver.
    let driver = if images.are_ptx() { format!(" driver={}", facts.driver) } else { String::new() };
    format!(
        "cuda {} ({}) kernels={} nvrtc={major}.{minor}{driver} cublaslt={} algorithms={} kv=bf16",
        images.arch,
        facts.name,
        images.hash(),
        Blas::version(),
        Blas::rule()
    )
}

impl Device for CudaDevice {
    type Weight = Weight;
    type Vector = Vector;
    type Hidden = Hidden;
    type Act = Act;
    type Cache = Cache;

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    fn check(&self, sizes: &StepSizes<'_>) -> Result<()> {
        if let Some(sizes) = &sizes.experts {
            experts::check(sizes)?;
        }
        check_width(sizes.width)?;
        ensure!(sizes.n_vocab <= MAX_VOCAB, "{} tokens are more than CUDA's kernels take, {MAX_VOCAB}", sizes.n_vocab);
        for spec in sizes.attention {
            let dim = spec.head_dim;
            ensure!(HEAD_DIMS.contains(&dim), "heads of {dim} elements are not supported on CUDA, only of {HEAD_DIMS:?}");
        }
        Ok(())
    }

    fn make_room(&mut self, n_bytes: usize) -> Result<()> {
        let (free, total) = self.gpu.memory()?;
        let memory = self.gpu.allocate(n_bytes).with_context(|| {
            let [needed, free, total] = [n_bytes as u64, free, total].map(|n| n >> 20);
            format!("too little memory on cuda:{}: {needed} MiB are needed, {free} of {total} MiB are free", self.facts().ordinal)
        })?;
        self.arena = Arena::new(memory);
        Ok(())
    }

    fn load_weight(&self, parts: &[Tensor<'_>]) -> Result<Weight> {
        self.load(parts, weights::form(parts, self.kernels.fp8.is_some()))
    }

    fn load_table(&self, table: &Tensor<'_>) -> Result<Weight> {
        self.load(std::slice::from_ref(table), Form::Bf16)
    }

    fn load_gate_up(&self, gate: &Tensor<'_>, up: &Tensor<'_>) -> Result<Weight> {
        check_gate(gate)?;
        self.load_weight(&[gate.clone(), up.clone()])
    }

    /// The kernels of experts have no form for f16, nor for fp8.
    fn load_expert(&self, gate: &Tensor<'_>, up: &Tensor<'_>, down: &Tensor<'_>) -> Result<Expert<Weight>> {
        check_gate(gate)?;
        let load = |parts: &[Tensor<'_>]| match weights::form(parts, false) {
            Form::F16 => self.load(parts, Form::Bf16),
            form => self.load(parts, form),
        };
        Ok(Expert { gate_up: load(&[gate.clone(), up.clone()])?, down: load(std::slice::from_ref(down))? })
    }

    fn check_experts(&self, experts: &Experts<Weight>) -> Result<()> {
        experts::check_alike(&experts.experts)
    }

    fn load_vector(&self, parts: &[Tensor<'_>]) -> Result<Vector> {
        Ok(Vector { at: self.put(&weights::f32_bytes(parts))? })
    }

    fn tensor_bytes(&self, tensor: &Tensor<'_>) -> usize {
        match tensor.shape[..] {
            [n] => aligned(n * size_of::<f32>()),
            _ => self.stack_bytes(std::slice::from_ref(tensor)),
        }
    }

    fn stack_bytes(&self, parts: &[Tensor<'_>]) -> usize {
        weights::stack_bytes(parts, self.kernels.fp8.is_some())
    }

    fn expert_bytes(&self, parts: &[Tensor<'_>]) -> usize {
        weights::stack_bytes(parts, false)
    }

    fn table_bytes(&self, table: &Tensor<'_>) -> usize {
        aligned(2 * table.shape.iter().product::<usize>())
    }

    fn cache_block_bytes(&self, spec: &AttentionSpec) -> usize {
        2 * 2 * BLOCK_TOKENS * spec.n_kv_heads * spec.head_dim
    }

    fn reserve_bytes(&self, sizes: &StepSizes<'_>) -> usize {
        step::bytes(sizes, self.facts().n_multiprocessors)
    }

    fn new_cache(&self, spec: &AttentionSpec, n_blocks: usize) -> Cache {
        let half = n_blocks * self.cache_block_bytes(spec) / 2;
        let (keys, values) = (self.room(half), self.room(half));
        let wide = self.kernels.wide(spec.head_dim).and_then(|f| {
            self.attempt(|| {
                let shape = (n_blocks * spec.n_kv_heads * BLOCK_TOKENS, spec.head_dim);
                let map = |at| self.gpu.tensor_map(at, shape, (BLOCK_TOKENS as u32, BOX_COLUMNS as u32));
                Ok(Wide { f, keys: map(keys)?, values: map(values)? })
            })
        });
        Cache { keys, values, wide }
    }

    fn rows(&self, max_tokens: usize) -> usize {
        max_tokens.next_multiple_of(ROWS)
    }

    fn new_hidden(&self, max_tokens: usize, width: usize) -> Hidden {
        let max_tokens = self.rows(max_tokens);
        Hidden { at: self.room(max_tokens * width * size_of::<f32>()), max_tokens, width }
    }

    fn new_act(&self, max_tokens: usize, width: usize) -> Act {
        let max_tokens = self.rows(max_tokens);
        let n_bytes = aligned(2 * max_tokens * width);
        let at = self.room(2 * n_bytes);
        // Rows that only fill up a step are read as they are.
        self.attempt(|| {
            self.gpu.enter()?;
            self.gpu.clear_later(at, 2 * n_bytes)?;
            self.gpu.wait()
        });
        let narrow = at + n_bytes as u64;
        Act { at, narrow, scales: narrow + aligned(max_tokens * width) as u64, is_fp8: false }
    }

    fn reserve(&mut self, sizes: &StepSizes<'_>) {
        let step = self.attempt(|| Step::new(&self.gpu, &self.arena, sizes, self.launching.has_graphs));
        *self.step.get_mut() = step;
    }

    fn finish(&self) -> Result<()> {
        match &*self.failure.borrow() {
            None => Ok(()),
            Some(failure) => bail!(Lost(failure.clone())),
        }
    }

    fn runs_alone(&self) -> bool {
        self.launching.goes_ahead
    }

    fn replay(&self, batch: &Batch) -> bool {
        let mut is_done = false;
        self.attempt_step(|step| {
            match self.begin(step, batch, true)? {
                Turn::Launch => {}
                Turn::Capture(form) => {
                    self.gpu.begin_capture()?;
                    step.capturing = Some(form);
                }
                Turn::Replay(form) => {
                    self.draw_again(step, form, batch)?;
                    is_done = true;
                }
            }
            step.is_planned = !is_done;
            Ok(())
        });
        is_done
    }

    /// Also plans the step, for all its operations, if `replay` has not.
    fn embed(&self, table: &Weight, scale: f32, batch: &Batch, x: &mut Hidden) {
        self.attempt_step(|step| {
            if !std::mem::take(&mut step.is_planned) {
                self.begin(step, batch, false)?;
            }
            self.embed_rows(step, table, scale, x)
        });
    }

    fn norm(&self, x: &Hidden, weight: &Vector, eps: f32, next: &Weight, _batch: &Batch, act: &mut Act) {
        act.is_fp8 = matches!(next.place, Place::Fp8(_));
        self.attempt_step(|step| self.norm_rows((x.at, x.width), (weight, eps), step.staged.n_rows, act));
    }

    fn norm_add(&self, y: &Hidden, weight: &Vector, eps: f32, _batch: &Batch, x: &mut Hidden) {
        self.attempt_step(|step| self.norm_add_rows(y, weight, eps, step.staged.n_rows, x));
    }

    fn linear(&self, act: &Act, weight: &Weight, _batch: &Batch, out: &mut Hidden) {
        self.attempt_step(|step| self.multiply(step, act, weight, step.staged.n_rows, Output::Bf16, out.at));
    }

    fn linear_add(&self, act: &Act, weight: &Weight, _batch: &Batch, x: &mut Hidden) {
        self.attempt_step(|step| self.multiply(step, act, weight, step.staged.n_rows, Output::Sum, x.at));
    }

    fn finish_qkv(&self, qkv: &mut Hidden, extra: &QkvExtra<Vector>, spec: &AttentionSpec, batch: &Batch, cache: &mut Cache) {
        self.attempt_step(|step| self.finish_rows(step, qkv, extra, spec, batch, cache));
    }

    fn attention(&self, qkv: &Hidden, spec: &AttentionSpec, cache: &Cache, _next: &Weight, _batch: &Batch, act: &mut Act) {
        act.is_fp8 = false;
        self.attempt_step(|step| self.attend(step, qkv, spec, cache, act));
    }

    fn gate_up(
        &self,
        act: &Act,
        weight: &Weight,
        f: Activation,
        _next: &Weight,
        _batch: &Batch,
        scratch: &mut Hidden,
        out: &mut Act,
    ) {
        out.is_fp8 = false;
        self.attempt_step(|step| {
            self.multiply(step, act, weight, step.staged.n_rows, Output::Bf16, scratch.at)?;
            self.gate(scratch.at, weight.n / 2, f, step.staged.n_rows, out.at)
        });
    }

    fn experts(&self, act: &Act, experts: &Experts<Weight>, f: Activation, _batch: &Batch, x: &mut Hidden) {
        self.attempt_step(|step| self.add_experts(step, act, experts, f, x));
    }

    fn head(&self, x: &Hidden, norm: &Vector, weight: &Weight, spec: &HeadSpec, batch: &Batch, _out: &mut StepOutput) {
        self.attempt_step(|step| self.draw(step, (x, norm, weight), spec, batch));
    }

    fn collect(&self, batch: &Batch, out: &mut StepOutput) {
        broken(batch, out);
        self.attempt_step(|step| Self::read_drawn(step, out));
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Nothing may be under way when memory goes, and memory goes in its own context.
        let _of_no_use_any_more = self.gpu.enter().and_then(|()| {
            if self.step.get_mut().as_ref().is_some_and(|step| step.capturing.is_some()) {
                self.gpu.give_up_capture();
            }
            self.gpu.wait()
        });
    }
}
