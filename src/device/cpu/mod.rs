//! The CPU device: weights repacked at load, products in the numbers asked for ([`Numerics`]), a paged cache of 16-bit
//! floats or 8-bit integers ([`Kv`]), a team of threads. Knows nothing of models, rows or text.
//!
//! Invariant: in the same numerics, the same bits on every instruction set, for any number of threads and any batch (each
//! file says why for its part).
//!
//! What numbers cost: `valar bench quality tests/golden/ppl_sherlock_20k.ids.json` (4 chunks of 512 tokens, the second half of each
//! scored), the default model's file (`Q4_1`). Mean KL divergence per token from the same weights in f32, in nats; perplexity in f32
//! is 28.3408:
//!
//! | numerics | KV floats: KL, perplexity, same likeliest token | KV int8 |
//! |---|---|---|
//! | `exact` | 0.00000, 28.3408, 100 % | 0.00063, 28.3604, 98.6 % |
//! | `bf16` | 0.00017, 28.3262, 99.8 % | 0.00081, 28.3259, 97.7 % |
//! | `int8` | 0.00261, 28.3551, 96.5 % | 0.00333, 28.4465, 95.6 % |
//! | `int8-bf16` | 0.00271, 28.4726, 96.5 % | 0.00331, 28.4262, 95.9 % |
//!
//! The same with all matrices (embeddings and head too, which other quantisers spare) made another type first, by the plain
//! rounding of candle-core (`--types Q8_0,…`); `_K` where rows are whole blocks of 256 (a third of the weights), else what has blocks
//! of 32 (of `Q2_K` and `Q3_K` that is `Q4_0`). KL with KV as floats, then as int8; `-`: not measured:
//!
//! | weights | perplexity, `exact` | `exact` | `bf16` | `int8` | `int8-bf16` |
//! |---|---|---|---|---|---|
//! | `F16` | 28.3466 | 0.00000, - | - | 0.00000, - | - |
//! | `BF16` | 28.3233 | 0.00005, 0.00068 | 0.00017, 0.00081 | 0.00005, 0.00068 | 0.00009, 0.00071 |
//! | `Q8_0` | 28.4673 | 0.00116, 0.00181 | 0.00133, 0.00191 | 0.00376, 0.00419 | 0.00374, 0.00432 |
//! | `Q6_K` | 28.6783 | 0.00499, - | 0.00525, - | 0.00747, - | 0.00775, - |
//! | `Q4_1` | 29.8154 | 0.06912, 0.07005 | 0.06909, 0.06969 | 0.07243, 0.07256 | 0.07213, 0.07256 |
//! | `Q4_K` | 30.6800 | 0.07514, 0.07592 | 0.07536, 0.07599 | 0.07843, 0.07881 | 0.07824, 0.07849 |
//! | `Q5_0` | 30.8255 | 0.09017, - | 0.09032, - | 0.09321, - | 0.09376, - |
//! | `Q5_K` | 32.3868 | 0.10636, - | 0.10677, - | 0.10897, - | 0.10896, - |
//! | `Q5_1` | 33.0072 | 0.12548, - | 0.12530, - | 0.12849, - | 0.12735, - |
//! | `Q4_0` | 40.7740 | 0.39496, 0.39573 | 0.39510, 0.39647 | 0.39751, 0.39789 | 0.39794, 0.39704 |
//! | `Q3_K` | 44.0595 | 0.49612, 0.49830 | 0.49662, 0.49860 | 0.50196, 0.50070 | 0.49962, 0.50172 |
//! | `Q2_K` | 112.4072 | 1.39731, 1.40091 | 1.39836, 1.40054 | 1.40433, 1.40756 | 1.40087, 1.40149 |
//!
//! What is lost is the rounding of the weights: numerics and KV add 0.004 at most to types that lose less than 0.01 by it, and 0.011
//! to any. The weights that are rounded here have been rounded once, to `Q4_1`: what files made of the original lose is not measured.

#![expect(
    clippy::inline_always,
    clippy::needless_range_loop,
    reason = "a kernel's parts must be inlined where its instructions are enabled (isa.rs), and its loops run over registers"
)]

pub mod alone;
mod attention;
mod buffer;
mod cache;
mod cap;
mod dots;
#[cfg(target_arch = "x86_64")]
mod dots_x86;
mod experts;
mod gemm;
mod gemm_f;
mod gemm_q;
mod gemm_t;
mod head;
mod isa;
mod norm;
mod numerics;
mod qkv;
mod quant;
pub mod roof;
mod rows;
mod simd;
#[cfg(target_arch = "aarch64")]
mod simd_neon;
#[cfg(target_arch = "x86_64")]
mod simd_x86;
mod team;
mod tile;
mod topology;
mod unpack;
#[cfg(target_arch = "x86_64")]
mod unpack_x86;
mod weights;

pub use cache::Cache;
pub use isa::Isa;
pub use numerics::{Kv, Numerics};
pub use quant::Act;
pub use topology::default_threads;
pub use weights::Weight;

use super::batch::{Batch, StepOutput};
use super::{
    Activation, AfterAttention, AttentionSpec, BeforeAttention, Device, ExpertSizes, Experts, HeadSpec, QkvExtra, StepSizes,
    after_attention_in_turn, before_attention_in_turn, sample,
};
use crate::tensor::Tensor;
use attention::{Attention, AttentionScratch, Item};
use buffer::{Aligned, Shared};
use cache::{Layout, RopeTable};
use experts::ExpertMemory;
use gemm::{Epilogue, Out, Product};
use head::HeadMemory;
use qkv::FinishQkv;
use rows::{OwnActs, Pieces};
use std::cell::RefCell;
use team::Team;

/// A CPU.
pub struct CpuDevice {
    isa: Isa,
    numerics: Numerics,
    kv: Kv,
    team: Team,
    memory: RefCell<Memory>,
}

/// What the leader needs between operations; made by `reserve`, or at first use, and kept.
#[derive(Default)]
struct Memory {
    /// One table per distinct set of frequencies.
    rope: Vec<RopeTable>,
    /// The work list of attention.
    items: Vec<Item>,
    head: Option<HeadMemory>,
    experts: Option<ExpertMemory>,
}

/// A worker's memory.
#[derive(Default)]
struct Scratch {
    /// A piece of a panel of weights, unpacked.
    panel: Aligned<u8>,
    /// Blocks of weights as tiles.
    unpacked: unpack::Unpacked,
    /// The sums of a panel's columns, `[rows of a tile][32]`
    sums: Aligned<f32>,
    /// A token's values.
    row: Aligned<f32>,
    /// Some rows' logits of a piece of the vocabulary; gone while they are made.
    logits: Option<Aligned<f32>>,
    attention: AttentionScratch,
    draw: Option<sample::Scratch>,
    /// Activations of some rows; gone while they are used.
    own_acts: Option<OwnActs>,
}

impl Scratch {
    fn reserve(&mut self, numerics: Numerics, sizes: &StepSizes<'_>, n_threads: usize) {
        OwnActs::reserve(self, numerics, sizes, n_threads);
        gemm::reserve(self, numerics, sizes.max_tokens);
        self.row.reserve(sizes.width);
        self.logits.get_or_insert_default().reserve(head::PIECE_LOGITS);
        sizes.attention.iter().for_each(|spec| self.attention.reserve(numerics, spec.head_dim));
        self.draw.get_or_insert_with(|| sample::Scratch::new(sizes.n_vocab));
    }
}

/// f32 values, `[max_tokens, width]`.
pub struct Hidden {
    values: Aligned<f32>,
    width: usize,
}

impl Hidden {
    /// All values, row after row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All values, row after row, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// The first `n_rows` rows.
    fn rows(&self, n_rows: usize) -> &[f32] {
        &self.values[..n_rows * self.width]
    }

    /// The first `n_rows` rows, for writing by many.
    fn shared(&mut self, n_rows: usize) -> Shared<'_, f32> {
        Shared::new(&mut self.values[..n_rows * self.width])
    }
}

/// A small f32 vector.
pub struct Vector(Vec<f32>);

impl CpuDevice {
    /// A device of `n_threads` threads (the caller's is one of them) that uses the instructions of `isa`.
    pub fn new(isa: Isa, numerics: Numerics, n_threads: usize) -> Self {
        Self { isa, numerics, kv: Kv::default(), team: Team::new(n_threads), memory: RefCell::default() }
    }

    /// The same with keys and values kept in that way.
    #[must_use]
    pub fn with_kv(self, kv: Kv) -> Self {
        Self { kv, ..self }
    }

    /// Threads that share an operation.
    pub fn n_threads(&self) -> usize {
        self.team.n_threads()
    }

    /// In which numbers products are computed.
    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// The instructions in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// out = weight · act, or added to what is there.
    fn product(&self, act: &Act, weight: &Weight, batch: &Batch, epilogue: Epilogue, out: &mut Hidden) {
        let n_rows = batch.tokens.len();
        let width = out.width;
        assert!(weight.n <= width, "a weight of {} columns for rows of {width}", weight.n);
        let out = Out::Values(out.shared(n_rows), width);
        gemm::multiply(&self.team, &Product { isa: self.isa, act, weight, n_rows, epilogue, out });
    }
}

impl Device for CpuDevice {
    type Weight = Weight;
    type Vector = Vector;
    type Hidden = Hidden;
    type Act = Act;
    type Cache = Cache;

    /// The instruction set is not in it: all give the same bits, so a job may go on on another machine. What gives others
    /// (`dots_x86.rs`) is.
    fn fingerprint(&self) -> String {
        let own = if self.numerics == Numerics::Int8Bf16 { self.isa.own_dots() } else { "" };
        format!("cpu kernels=3 {} tile={}{own}", self.numerics.describe(self.kv), attention::TILE_KEYS)
    }

    fn load_weight(&self, parts: &[Tensor<'_>]) -> anyhow::Result<Weight> {
        Weight::stacked(&self.team, self.numerics, parts)
    }

    fn load_gate_up(&self, gate: &Tensor<'_>, up: &Tensor<'_>) -> anyhow::Result<Weight> {
        Weight::gated(&self.team, self.numerics, gate, up)
    }

    fn load_vector(&self, parts: &[Tensor<'_>]) -> anyhow::Result<Vector> {
        weights::vectors(parts).map(Vector)
    }

    fn tensor_bytes(&self, tensor: &Tensor<'_>) -> usize {
        weights::tensor_bytes(self.numerics, tensor)
    }

    fn cache_block_bytes(&self, spec: &AttentionSpec) -> usize {
        Layout::new(self.numerics, self.kv, spec).block_bytes()
    }

    fn new_cache(&self, spec: &AttentionSpec, n_blocks: usize) -> Cache {
        assert_eq!(spec.n_heads % spec.n_kv_heads, 0);
        let mut cache = Cache::new(Layout::new(self.numerics, self.kv, spec), n_blocks);
        cache.spread_over(&self.team.plan().cache_nodes);
        cache
    }

    fn new_hidden(&self, max_tokens: usize, width: usize) -> Hidden {
        Hidden { values: Aligned::zeroed(max_tokens * width), width }
    }

    fn new_act(&self, max_tokens: usize, width: usize) -> Act {
        Act::new(self.numerics, max_tokens, width)
    }

    fn reserve(&mut self, sizes: &StepSizes<'_>) {
        let memory = self.memory.get_mut();
        for spec in sizes.attention {
            qkv::rope_table(&mut memory.rope, spec, sizes.max_context);
            memory.items.reserve(attention::max_items(spec, sizes.max_tokens));
        }
        memory.head.get_or_insert_with(|| HeadMemory::new(self.numerics, sizes.width, (sizes.n_vocab, sizes.max_seqs)));
        memory.experts = sizes.experts.map(|experts| ExpertMemory::new(self.numerics, experts, sizes.width, sizes.max_tokens));
        let (numerics, n_threads) = (self.numerics, self.n_threads());
        self.team.each_scratch(|scratch| scratch.reserve(numerics, sizes, n_threads));
    }

    fn embed(&self, table: &Weight, scale: f32, batch: &Batch, x: &mut Hidden) {
        let width = x.width;
        assert!(table.k == width && !table.gated);
        let x = x.shared(batch.tokens.len());
        self.team.run_rows(batch.tokens.len(), &|_, rows| {
            for row in rows {
                // SAFETY: each row is in one range.
                let x = unsafe { x.part(row * width, width) };
                table.row(batch.tokens[row] as usize, x);
                for x in x {
                    *x *= scale;
                }
            }
        });
    }

    fn norm(&self, x: &Hidden, weight: &Vector, eps: f32, next: &Weight, batch: &Batch, act: &mut Act) {
        let (isa, width) = (self.isa, x.width);
        let act = act.writer(isa, next);
        self.team.run_rows(batch.tokens.len(), &|scratch, rows| {
            let first = rows.start;
            rows::normed(isa, (&x.values, width), rows, (weight, eps), (&act, first), scratch);
        });
    }

    fn norm_add(&self, y: &Hidden, weight: &Vector, eps: f32, batch: &Batch, x: &mut Hidden) {
        let (isa, width, n_tokens) = (self.isa, x.width, batch.tokens.len());
        let (y, x) = (y.rows(n_tokens), x.shared(n_tokens));
        self.team.run_rows(n_tokens, &|_, rows| {
            for row in rows {
                // SAFETY: each row is in one range.
                let x = unsafe { x.part(row * width, width) };
                norm::rms_norm_add(isa, &y[row * width..][..width], &weight.0, eps, x);
            }
        });
    }

    fn linear(&self, act: &Act, weight: &Weight, batch: &Batch, out: &mut Hidden) {
        self.product(act, weight, batch, Epilogue::Store, out);
    }

    fn linear_add(&self, act: &Act, weight: &Weight, batch: &Batch, x: &mut Hidden) {
        self.product(act, weight, batch, Epilogue::Add, x);
    }

    fn finish_qkv(&self, qkv: &mut Hidden, extra: &QkvExtra<Vector>, spec: &AttentionSpec, batch: &Batch, cache: &mut Cache) {
        let memory = &mut *self.memory.borrow_mut();
        let (width, n_tokens) = (qkv.width, batch.tokens.len());
        let finish = FinishQkv::new((self.isa, &mut memory.rope), extra, spec, batch, cache.writer());
        let qkv = qkv.shared(n_tokens);
        self.team.run_rows(n_tokens, &|_, tokens| {
            // SAFETY: each token is in one range.
            finish.tokens(tokens.clone(), (unsafe { qkv.part(tokens.start * width, tokens.len() * width) }, width));
        });
        for copy in &batch.copies {
            cache.copy(copy);
        }
    }

    fn before_attention(
        &self,
        layer: &BeforeAttention<'_, Weight, Vector>,
        spec: &AttentionSpec,
        batch: &Batch,
        x: &Hidden,
        normed: &mut Act,
        qkv: &mut Hidden,
        cache: &mut Cache,
    ) {
        let n_rows = batch.tokens.len();
        let Some(pieces) = Pieces::new(self.n_threads(), n_rows) else {
            return before_attention_in_turn(self, layer, spec, batch, x, normed, qkv, cache);
        };
        let memory = &mut *self.memory.borrow_mut();
        let finish = FinishQkv::new((self.isa, &mut memory.rope), layer.extra, spec, batch, cache.writer());
        let (units, width, out_width, qkv) = ((self.isa, self.numerics), x.width, qkv.width, qkv.shared(n_rows));
        let values = x.rows(n_rows);
        self.team.run(pieces.n(), &|scratch, piece| {
            let rows = pieces.rows(piece);
            // SAFETY: each row is in one piece.
            let out = unsafe { qkv.part(rows.start * out_width, rows.len() * out_width) };
            let x = &values[rows.start * width..rows.end * width];
            rows::before_attention(units, layer, (x, width), (out, out_width), scratch);
            finish.tokens(rows, (out, out_width));
        });
        for copy in &batch.copies {
            cache.copy(copy);
        }
    }

    fn after_attention(
        &self,
        layer: &AfterAttention<'_, Weight, Vector>,
        attended: &Act,
        batch: &Batch,
        x: &mut Hidden,
        normed: &mut Act,
        scratch: &mut Hidden,
        gated: &mut Act,
    ) {
        let (n_rows, width) = (batch.tokens.len(), x.width);
        let Some(pieces) = Pieces::new(self.n_threads(), n_rows) else {
            return after_attention_in_turn(self, layer, attended, batch, x, normed, scratch, gated);
        };
        let (units, x) = ((self.isa, self.numerics), x.shared(n_rows));
        self.team.run(pieces.n(), &|scratch, piece| {
            let rows = pieces.rows(piece);
            // SAFETY: each row is in one piece.
            let x = unsafe { x.part(rows.start * width, rows.len() * width) };
            rows::after_attention(units, layer, (attended, rows), (x, width), scratch);
        });
    }

    fn attention(&self, qkv: &Hidden, spec: &AttentionSpec, cache: &Cache, next: &Weight, batch: &Batch, act: &mut Act) {
        assert_eq!(next.k, spec.n_heads * spec.head_dim);
        let act = act.writer(self.isa, next);
        let rows = qkv.rows(batch.tokens.len());
        let (isa, numerics) = (self.isa, self.numerics);
        let attention = Attention { isa, numerics, spec, batch, cache, qkv: rows, qkv_width: qkv.width, act };
        attention::attend(&self.team, &attention, &mut self.memory.borrow_mut().items);
    }

    fn gate_up(
        &self,
        act: &Act,
        weight: &Weight,
        f: Activation,
        next: &Weight,
        batch: &Batch,
        _scratch: &mut Hidden,
        out: &mut Act,
    ) {
        let (n_rows, epilogue) = (batch.tokens.len(), Epilogue::Gate(f));
        let out = Out::Act(out.writer(self.isa, next));
        gemm::multiply(&self.team, &Product { isa: self.isa, act, weight, n_rows, epilogue, out });
    }

    fn experts(&self, act: &Act, experts: &Experts<Weight>, f: Activation, batch: &Batch, x: &mut Hidden) {
        let n_tokens = batch.tokens.len();
        let ffn_width = experts.experts[0].down.k;
        let sizes = ExpertSizes { n_experts: experts.experts.len(), n_used: experts.n_used, ffn_width };
        let memory = &mut self.memory.borrow_mut().experts;
        if memory.as_ref().is_none_or(|memory| !memory.is_for(sizes, n_tokens)) {
            *memory = Some(ExpertMemory::new(self.numerics, sizes, x.width, n_tokens));
        }
        let memory = memory.as_mut().expect("made just now if it was not there");
        experts::add((&self.team, self.isa), memory, (act, n_tokens), experts, f, &mut x.values);
    }

    fn head(&self, x: &Hidden, norm: &Vector, weight: &Weight, spec: &HeadSpec, batch: &Batch, out: &mut StepOutput) {
        let memory = &mut self.memory.borrow_mut().head;
        let sizes = (weight.n, batch.heads.len());
        let memory = memory.get_or_insert_with(|| HeadMemory::new(self.numerics, x.width, sizes));
        head::run(&head::Head { isa: self.isa, team: &self.team, x, norm, weight, spec, batch }, memory, &mut out.rows);
    }
}
