//! The memory of steps: made once, for the largest. Knows where things are, nothing of what is computed in them.

use super::driver::{Gpu, Graph, Mark};
use super::experts::ExpertRoom;
use super::fp8::sum_rows;
use super::graphs::{Form, Graphs};
use super::kernels::prefill_rows;
use super::memory::{Arena, Pinned, aligned};
use super::staging::{self, DRAWN_WORDS, HEAD_ROWS, Staged};
use super::work::{Attended, Work};
use crate::device::batch::Batch;
use crate::device::{AttentionSpec, StepSizes};
use anyhow::{Result, ensure};
use std::collections::VecDeque;

/// Parts of attention that there is memory for; rows that would need more are given to a kernel that needs none.
const MAX_PARTS: usize = 2048;
/// Blocks of the prefill kernel for each multiprocessor.
const PREFILL_BLOCKS: usize = 2;
/// Rows whose states a block of the prefill kernel keeps.
const STATES: usize = 128;

/// What the host writes for a step, and reads of it.
pub(super) struct Slot {
    /// As on the GPU: the step as words; masks and edits of a group of head rows; results of the head rows.
    pub(super) plan: Pinned,
    pub(super) shaping: Pinned,
    pub(super) drawn: Pinned,
    /// Behind the copy of the results.
    pub(super) done: Mark,
}

/// What steps need besides weights, caches and the model's buffers.
pub(super) struct Step {
    /// On the GPU: the step as words; masks and edits of a group of head rows; results of the head rows. One of each is enough: the
    /// GPU does one step after the other.
    pub(super) plan: u64,
    pub(super) shaping: u64,
    pub(super) drawn: u64,
    /// Of two steps that may be under way at once.
    slots: [Slot; 2],
    /// The slot of the step that began last.
    current: usize,
    /// The slots of steps whose results are on their way.
    under_way: VecDeque<usize>,
    /// What edited logits were before.
    pub(super) kept: u64,
    /// Of a chunk of head rows: residual streams, normed, and logits.
    pub(super) rows: u64,
    pub(super) normed: u64,
    pub(super) logits: u64,
    /// Sums of products of fp8 that wait for their scales: `[sum_rows][width]` f32.
    pub(super) sums: u64,
    /// Parts of attention: outputs and states.
    pub(super) parts: (u64, u64),
    /// What blocks of the prefill kernel merge: the same.
    pub(super) totals: (u64, u64),
    /// Blocks that `totals` has room for.
    pub(super) n_blocks: u32,
    /// Of each set of rotary frequencies, cosines and sines of all positions.
    pub(super) turns: Vec<Turns>,
    /// The work of attention, by window.
    pub(super) works: Vec<(Attended, Work)>,
    /// Of layers of experts.
    pub(super) experts: Option<ExpertRoom>,
    pub(super) staged: Staged,
    pub(super) n_vocab: usize,
    /// Rows that there is memory for.
    pub(super) max_rows: usize,
    /// Whether it was planned before its first operation.
    pub(super) is_planned: bool,
    /// What is captured at the moment.
    pub(super) capturing: Option<Form>,
    /// What was, if anything is to be.
    pub(super) graphs: Option<Graphs<Graph>>,
}

/// Cosines and sines, `[max_context][pairs]`.
pub(super) struct Turns {
    freqs: Vec<f32>,
    scale: f32,
    pub(super) at: u64,
}

impl Turns {
    /// Whether these are that layer's.
    pub(super) fn is_of(&self, spec: &AttentionSpec) -> bool {
        self.freqs == spec.rope_freqs && self.scale.to_bits() == spec.rope_scale.to_bits()
    }
}

/// Bytes of everything.
struct Sizes {
    attended: Vec<Attended>,
    plan_words: usize,
    shaping_words: usize,
    drawn_words: usize,
    kept: usize,
    rows: usize,
    normed: usize,
    logits: usize,
    sums: usize,
    parts: (usize, usize),
    totals: (usize, usize),
    n_blocks: usize,
    /// Of each distinct set of frequencies, the layer that has it first.
    ropes: Vec<usize>,
    /// Of the tables of one: per pair of elements.
    turn_bytes: usize,
}

impl Sizes {
    fn of(sizes: &StepSizes<'_>, n_multiprocessors: u32) -> Self {
        let attention = &sizes.attention[0];
        let segments = sizes.max_context.div_ceil(super::kernels::SEGMENT as usize);
        let max_parts = (sizes.max_tokens * segments).min(MAX_PARTS);
        let prefill_rows = prefill_rows(attention.head_dim);
        let mut attended: Vec<Attended> = Vec::new();
        for spec in sizes.attention {
            let one = Attended {
                group: (spec.n_heads / spec.n_kv_heads) as u32,
                n_kv_heads: spec.n_kv_heads as u32,
                prefill_rows: prefill_rows as u32,
                window: window(spec),
                max_parts: max_parts as u32,
            };
            if !attended.contains(&one) {
                attended.push(one);
            }
        }
        let is_same = |a: &AttentionSpec, b: &AttentionSpec| {
            a.rope_freqs == b.rope_freqs && a.rope_scale.to_bits() == b.rope_scale.to_bits()
        };
        let is_new = |&i: &usize| !sizes.attention[..i].iter().any(|spec| is_same(spec, &sizes.attention[i]));
        let n_blocks = PREFILL_BLOCKS * n_multiprocessors.max(1) as usize;
        Self {
            plan_words: staging::max_words(sizes, &attended),
            shaping_words: staging::shaping_words(sizes.n_vocab),
            drawn_words: sizes.max_seqs * DRAWN_WORDS,
            kept: 4 * staging::kept_words(sizes.n_vocab),
            rows: 4 * HEAD_ROWS * sizes.width,
            // As bfloat16, and perhaps as f16 or fp8.
            normed: 2 * 2 * HEAD_ROWS * sizes.width,
            logits: 4 * HEAD_ROWS * sizes.n_vocab,
            sums: 4 * sum_rows(sizes.max_tokens) * sizes.width,
            parts: (4 * max_parts * attention.n_heads * attention.head_dim, 8 * max_parts * attention.n_heads),
            totals: (4 * n_blocks * prefill_rows * attention.head_dim, 8 * n_blocks * STATES),
            n_blocks,
            ropes: (0..sizes.attention.len()).filter(is_new).collect(),
            turn_bytes: 8 * sizes.max_context,
            attended,
        }
    }
}

/// A layer's window as kernels have it.
pub(super) fn window(spec: &AttentionSpec) -> u32 {
    spec.window.map_or(0, |window| window as u32)
}

/// Bytes of the arena that steps of that size need besides weights, caches and the model's buffers; with what these lose to
/// alignment.
pub(super) fn bytes(sizes: &StepSizes<'_>, n_multiprocessors: u32) -> usize {
    let of = Sizes::of(sizes, n_multiprocessors);
    let turns = of.ropes.iter().map(|&i| aligned(of.turn_bytes * sizes.attention[i].rope_freqs.len()));
    let plain = [
        4 * of.plan_words,
        4 * of.shaping_words,
        4 * of.drawn_words,
        of.kept,
        of.rows,
        of.normed,
        of.logits,
        of.sums,
        of.parts.0,
        of.parts.1,
        of.totals.0,
        of.totals.1,
    ];
    // Two caches of each layer, and a few buffers.
    let lost = aligned(1) * (2 * sizes.attention.len() + 16);
    let experts = sizes.experts.map_or(0, |experts| ExpertRoom::bytes(&experts, sizes.width, sizes.max_tokens));
    plain.into_iter().map(aligned).sum::<usize>() + turns.sum::<usize>() + experts + lost
}

impl Step {
    /// Makes the memory of steps.
    ///
    /// # Errors
    /// The driver's; too little room.
    pub(super) fn new(gpu: &Gpu, arena: &Arena, sizes: &StepSizes<'_>, has_graphs: bool) -> Result<Self> {
        let of = Sizes::of(sizes, gpu.facts().n_multiprocessors);
        let slot = || {
            let [plan, shaping, drawn] = [of.plan_words, of.shaping_words, of.drawn_words].map(|n_words| gpu.pinned(n_words));
            Ok::<_, anyhow::Error>(Slot { plan: plan?, shaping: shaping?, drawn: drawn?, done: gpu.new_mark()? })
        };
        let two = |(a, b): (usize, usize)| Ok::<_, anyhow::Error>((arena.take(a)?, arena.take(b)?));
        let turns = of.ropes.iter().map(|&i| {
            let spec = &sizes.attention[i];
            let at = arena.take(of.turn_bytes * spec.rope_freqs.len())?;
            gpu.upload(at, &turns(spec, sizes.max_context))?;
            Ok(Turns { freqs: spec.rope_freqs.clone(), scale: spec.rope_scale, at })
        });
        let turns = turns.collect::<Result<_>>()?;
        let works = of.attended.iter().map(|attended| {
            let mut work = Work::default();
            work.reserve(attended, sizes.max_tokens, sizes.max_seqs);
            (*attended, work)
        });
        Ok(Self {
            plan: arena.take(4 * of.plan_words)?,
            shaping: arena.take(4 * of.shaping_words)?,
            drawn: arena.take(4 * of.drawn_words)?,
            slots: [slot()?, slot()?],
            current: 0,
            under_way: VecDeque::with_capacity(2),
            kept: arena.take(of.kept)?,
            rows: arena.take(of.rows)?,
            normed: arena.take(of.normed)?,
            logits: arena.take(of.logits)?,
            sums: arena.take(of.sums)?,
            parts: two(of.parts)?,
            totals: two(of.totals)?,
            n_blocks: of.n_blocks as u32,
            turns,
            works: works.collect(),
            experts: sizes.experts.map(|of| ExpertRoom::new(arena, &of, sizes.width, sizes.max_tokens)).transpose()?,
            staged: Staged::default(),
            n_vocab: sizes.n_vocab,
            max_rows: sizes.max_tokens.min(sizes.max_seqs),
            is_planned: false,
            capturing: None,
            graphs: has_graphs.then(|| Ok::<_, anyhow::Error>(Graphs::new(gpu.memory()?.1))).transpose()?,
        })
    }

    /// The work of a layer's attention: its place in `works` and `staged.work`.
    pub(super) fn work_of(&self, spec: &AttentionSpec) -> usize {
        let found = self.works.iter().position(|(attended, _)| attended.window == window(spec));
        found.expect("all layers' windows were known when memory was made")
    }

    /// The address of a place in the step's words.
    pub(super) fn at(&self, word: usize) -> u64 {
        self.plan + 4 * word as u64
    }

    /// Takes a slot for the step that begins.
    ///
    /// # Errors
    /// Two are under way.
    pub(super) fn take_slot(&mut self) -> Result<()> {
        self.current = 1 - self.current;
        ensure!(!self.under_way.contains(&self.current), "a third step begins while two are under way");
        Ok(())
    }

    /// Writes the step that begins down: its head rows were cut, and its works are planned.
    pub(super) fn write(&mut self, batch: &Batch, form: Option<&Form>) {
        self.staged.fill(batch, &mut self.works, form, &mut self.slots[self.current].plan);
    }

    /// The slot of the step that began last.
    pub(super) fn slot(&mut self) -> &mut Slot {
        &mut self.slots[self.current]
    }

    /// The results of that step are on their way.
    pub(super) fn note_under_way(&mut self) {
        self.under_way.push_back(self.current);
    }

    /// The slot of the step under way that began first, which is to end.
    pub(super) fn first_under_way(&mut self) -> Option<&Slot> {
        Some(&self.slots[self.under_way.pop_front()?])
    }
}

/// Cosines and sines of all positions' angles, `[max_context][pairs]`, with the functions and in the order of the CPU device.
fn turns(spec: &AttentionSpec, max_context: usize) -> Vec<u8> {
    let angles = (0..max_context).flat_map(|position| spec.rope_freqs.iter().map(move |&freq| position as f64 * f64::from(freq)));
    let scale = f64::from(spec.rope_scale);
    let turns = angles.flat_map(|angle| {
        let (sin, cos) = libm::sincos(angle);
        [(cos * scale) as f32, (sin * scale) as f32]
    });
    turns.flat_map(f32::to_le_bytes).collect()
}
