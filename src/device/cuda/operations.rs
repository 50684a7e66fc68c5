//! The operations of a step as launches on the device's stream. Each kernel's parameters, shapes and grid are in its source's head
//! comment.

use super::blas::{Factors, Output, Product};
use super::device::{Act, Cache, CudaDevice, Hidden, Place, Vector, Weight, Wide};
use super::driver::{Arg, Function, Param, arg};
use super::graphs::{Form, Turn, has_room};
use super::staging::{self, DRAWN_WORDS, HEAD_ROWS};
use super::step::{Step, window};
use crate::device::batch::{Batch, HeadOut, StepOutput};
use crate::device::{Activation, AttentionSpec, HeadSpec, QkvExtra, RopeStyle};
use anyhow::{Context, Result};
use std::ops::Range;

/// struct Attention
#[repr(C)]
struct AttentionParam {
    q: u64,
    keys: u64,
    values: u64,
    out: u64,
    tables: u64,
    positions: u64,
    part_starts: u64,
    part_out: u64,
    part_state: u64,
    n_heads: u32,
    n_kv_heads: u32,
    scale: f32,
    cap: f32,
    window: u32,
    padding: u32,
}

// SAFETY: the fields of struct Attention in attention.cuh, its padding written.
unsafe impl Param for AttentionParam {}

/// struct `QkvSizes`
#[repr(C)]
struct QkvSizes {
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    n_pairs: u32,
    interleaved: u32,
    eps: f32,
}

// SAFETY: the fields of struct QkvSizes in qkv.cu.
unsafe impl Param for QkvSizes {}

/// struct Sizes of `linear_q.cu`
#[repr(C)]
struct LinearSizes {
    m: u32,
    n: u32,
    k: u32,
}

// SAFETY: the fields of struct Sizes in linear_q.cu.
unsafe impl Param for LinearSizes {}

impl CudaDevice {
    /// Launches one of our kernels.
    pub(super) fn run(&self, f: Function, grid: (u32, u32), threads: u32, args: &[Arg<'_>]) -> Result<()> {
        // SAFETY: every call below passes what the kernel's source declares; addresses are the arena's, of pieces whose sizes
        // were asked for by the same numbers; the arena lives as long as the device, which waits before it goes.
        unsafe { self.gpu.launch(f, grid, threads, args) }
    }

    /// Plans a step, and has it copied to the GPU. What is to be done with it, which is more than launching it only where `has_form`
    /// says that it may be given one.
    pub(super) fn begin(&self, step: &mut Step, batch: &Batch, has_form: bool) -> Result<Turn> {
        self.gpu.enter()?;
        if step.capturing.take().is_some() {
            // The step before was not ended.
            self.gpu.give_up_capture();
        }
        step.take_slot()?;
        let Step { works, staged, n_vocab, graphs, max_rows, .. } = step;
        for (attended, work) in works.iter_mut() {
            work.plan(attended, batch);
        }
        staged.cut_heads(batch, *n_vocab);
        let graphs = graphs.as_mut().filter(|_| has_form && staged.groups.len() == 1);
        let form = graphs.as_ref().and_then(|_| Form::of(batch, works, *max_rows));
        let mut turn = match (form, graphs) {
            (Some(form), Some(graphs)) => graphs.turn(form),
            _ => Turn::Launch,
        };
        step.write(batch, form.as_ref());
        if matches!(turn, Turn::Capture(_)) && !has_room(self.gpu.memory()?.0) {
            turn = Turn::Launch;
        }
        let (at, n_words) = (step.plan, step.staged.n_words);
        self.gpu.upload_later(at, &step.slot().plan[..n_words])?;
        self.shape(step, batch, 0)?;
        Ok(turn)
    }

    /// Has masks and edits of a group of head rows copied to the GPU.
    fn shape(&self, step: &mut Step, batch: &Batch, group: usize) -> Result<()> {
        let Some(group) = step.staged.groups.get(group).cloned() else { return Ok(()) };
        let (n_vocab, at) = (step.n_vocab, step.shaping);
        let words = &mut step.slot().shaping;
        let (n_mask_words, n_edit_words) = staging::shaping(batch, &group, n_vocab, words);
        let edits = staging::edits_at(n_vocab);
        self.gpu.upload_later(at, &words[..n_mask_words])?;
        self.gpu.upload_later(at + 4 * edits as u64, &words[edits..edits + n_edit_words])
    }

    pub(super) fn embed_rows(&self, step: &Step, table: &Weight, scale: f32, x: &Hidden) -> Result<()> {
        let Place::Bf16(table_at) = table.place else { unreachable!("load_table makes no other") };
        let (ids, width, drawn_words) = (step.at(step.staged.ids), x.width as u32, DRAWN_WORDS as u32);
        let args = [arg(&ids), arg(&step.drawn), arg(&drawn_words), arg(&table_at), arg(&x.at), arg(&width), arg(&scale)];
        self.run(self.kernels.embed, (step.staged.n_rows as u32, 1), 128, &args)
    }

    /// `out[r] = x[r] / rms(x[r]) · weight`, f32 to bfloat16, or to what `out` says.
    pub(super) fn norm_rows(&self, (x, width): (u64, usize), norm: (&Vector, f32), n_rows: usize, out: &Act) -> Result<()> {
        if out.is_fp8 {
            return self.norm_rows_fp8((x, width), norm, n_rows, out);
        }
        let (weight, eps) = norm;
        let (add_norm, _) = self.kernels.norms(width);
        let (nothing, width) = (0u64, width as u32);
        let args = [arg(&x), arg(&nothing), arg(&weight.at), arg(&out.at), arg(&nothing), arg(&width), arg(&eps)];
        self.run(add_norm, (n_rows as u32, 1), 256, &args)
    }

    pub(super) fn norm_add_rows(&self, y: &Hidden, weight: &Vector, eps: f32, n_rows: usize, x: &Hidden) -> Result<()> {
        let (_, norm_add) = self.kernels.norms(x.width);
        let width = x.width as u32;
        self.run(norm_add, (n_rows as u32, 1), 256, &[arg(&y.at), arg(&weight.at), arg(&x.at), arg(&width), arg(&eps)])
    }

    /// `out = weight · act`, in the form asked for.
    #[expect(clippy::too_many_arguments, reason = "one operation; its operands are distinct")]
    pub(super) fn multiply(&self, step: &Step, act: &Act, weight: &Weight, m: usize, output: Output, out: u64) -> Result<()> {
        let Weight { n, k, .. } = *weight;
        let dense = |factors: Factors, x: u64, weight: u64| {
            let product = Product { sizes: (m, n, k), factors, x, weight, out, output };
            // SAFETY: as in `run`.
            unsafe { self.blas.multiply(self.gpu.stream(), &product) }
        };
        match weight.place {
            Place::Bf16(at) => dense(Factors::Bf16, act.at, at),
            Place::F16(at) => {
                self.cast(self.kernels.to_f16, act.at, act.narrow, m * k)?;
                dense(Factors::F16, act.narrow, at)?;
                if output == Output::Bf16 {
                    self.cast(self.kernels.from_f16, out, out, m * n)?;
                }
                Ok(())
            }
            Place::Fp8(weight) => self.multiply_fp8(step, act, &weight, m, output, out),
            Place::Packed { bits, q, scales } => {
                if output == Output::F32 {
                    self.gpu.clear_later(out, 4 * m * n)?;
                }
                let (f, rows) = self.kernels.linear_q(bits, output != Output::Bf16, m);
                let sizes = LinearSizes { m: m as u32, n: n as u32, k: k as u32 };
                let grid = (n.div_ceil(64) as u32, m.div_ceil(rows) as u32);
                self.run(f, grid, 128, &[arg(&act.at), arg(&q), arg(&scales), arg(&out), arg(&sizes)])
            }
        }
    }

    /// Between bfloat16 and f16. (All rows that are cast are of multiples of 8 elements.)
    fn cast(&self, f: Function, from: u64, to: u64, n: usize) -> Result<()> {
        let n = n as u32;
        self.run(f, (n.div_ceil(2048), 1), 256, &[arg(&from), arg(&to), arg(&n)])
    }

    #[expect(clippy::too_many_arguments, reason = "one fused operation; its operands are distinct")]
    pub(super) fn finish_rows(
        &self,
        step: &Step,
        qkv: &Hidden,
        extra: &QkvExtra<Vector>,
        spec: &AttentionSpec,
        batch: &Batch,
        cache: &Cache,
    ) -> Result<()> {
        let turns = step.turns.iter().find(|turns| turns.is_of(spec)).expect("all layers were known when memory was made").at;
        let (staged, zero) = (&step.staged, 0u64);
        let bias = extra.bias.as_ref().map_or(zero, |bias| bias.at);
        let (q_norm, k_norm, eps) = extra.norms.as_ref().map_or((zero, zero, 0.0), |norms| (norms.q.at, norms.k.at, norms.eps));
        let (positions, slots, q) = (step.at(staged.positions), step.at(staged.slots), qkv.queries());
        let sizes = QkvSizes {
            n_heads: spec.n_heads as u32,
            n_kv_heads: spec.n_kv_heads as u32,
            head_dim: spec.head_dim as u32,
            n_pairs: spec.rope_freqs.len() as u32,
            interleaved: u32::from(spec.rope_style == RopeStyle::Interleaved),
            eps,
        };
        let args = [
            arg(&qkv.at),
            arg(&bias),
            arg(&q_norm),
            arg(&k_norm),
            arg(&turns),
            arg(&positions),
            arg(&slots),
            arg(&q),
            arg(&cache.keys),
            arg(&cache.values),
            arg(&sizes),
        ];
        let n_heads = sizes.n_heads + 2 * sizes.n_kv_heads;
        self.run(self.kernels.finish_qkv, (staged.n_rows as u32, n_heads.div_ceil(4)), 128, &args)?;
        let n_copies = batch.copies.len() as u32;
        if n_copies == 0 {
            return Ok(());
        }
        let copies = step.at(staged.copies);
        let args = [arg(&cache.keys), arg(&cache.values), arg(&copies), arg(&n_copies), arg(&sizes.head_dim)];
        self.run(self.kernels.copy_blocks, (sizes.n_kv_heads, 2), 256, &args)
    }

    pub(super) fn attend(&self, step: &Step, qkv: &Hidden, spec: &AttentionSpec, cache: &Cache, out: &Act) -> Result<()> {
        let i = step.work_of(spec);
        let (work, staged) = (&step.works[i].1, &step.staged.work[i]);
        let log2_e = std::f32::consts::LOG2_E;
        let attention = AttentionParam {
            q: qkv.queries(),
            keys: cache.keys,
            values: cache.values,
            out: out.at,
            tables: step.at(step.staged.tables),
            positions: step.at(step.staged.positions),
            part_starts: step.at(staged.part_starts),
            part_out: step.parts.0,
            part_state: step.parts.1,
            n_heads: spec.n_heads as u32,
            n_kv_heads: spec.n_kv_heads as u32,
            scale: spec.soft_cap.map_or(spec.scale * log2_e, |cap| spec.scale / cap),
            cap: spec.soft_cap.map_or(0.0, |cap| cap * log2_e),
            window: window(spec),
            padding: 0,
        };
        let (prefill, decode) = self.kernels.attention(spec.head_dim);
        let (n_many, n_few) = (work.prefill.len() as u32, work.decode.len() as u32);
        let (many, few) = (step.at(staged.prefill), step.at(staged.decode));
        let (totals, states) = step.totals;
        let wide = |wide: &Wide, items: u64, n_items: u32, n_blocks: u32| {
            let args =
                [arg(&attention), arg(&items), arg(&n_items), arg(&totals), arg(&states), arg(&wide.keys), arg(&wide.values)];
            self.run(wide.f, (n_blocks, 1), 256, &args)
        };
        if n_many > 0 {
            let n_blocks = n_many.min(step.n_blocks);
            let args = [arg(&attention), arg(&many), arg(&n_many), arg(&totals), arg(&states)];
            match &cache.wide {
                Some(of) => wide(of, many, n_many, n_blocks)?,
                None => self.run(prefill, (n_blocks, 1), 256, &args)?,
            }
        }
        if n_few > 0 {
            match &cache.wide {
                Some(of) => wide(of, few, n_few, n_few)?,
                None => self.run(decode, (n_few, 1), 128, &[arg(&attention), arg(&few)])?,
            }
        }
        if !work.merges {
            return Ok(());
        }
        let (n_tokens, head_dim) = (work.part_starts.len() as u32, spec.head_dim as u32);
        let grid = (n_tokens, attention.n_heads.div_ceil(4));
        self.run(self.kernels.merge, grid, 128, &[arg(&attention), arg(&head_dim)])
    }

    /// `out[t] = f(gate) · up` of rows that are both.
    pub(super) fn gate(&self, gate_up: u64, width: usize, f: Activation, n_rows: usize, out: u64) -> Result<()> {
        let width = width as u32;
        let grid = (n_rows as u32, width.div_ceil(2048));
        self.run(self.kernels.gate(f), grid, 256, &[arg(&gate_up), arg(&out), arg(&width)])
    }

    /// Head rows: gathered, normed, multiplied, drawn; their results are on their way back then. What was captured is launched.
    pub(super) fn draw(&self, step: &mut Step, head: (&Hidden, &Vector, &Weight), spec: &HeadSpec, batch: &Batch) -> Result<()> {
        for i in 0..step.staged.groups.len() {
            if i > 0 {
                // The group before may still be on its way from these words.
                self.gpu.wait()?;
                self.shape(step, batch, i)?;
            }
            let group = &step.staged.groups;
            let (start, end) = (group[i].rows.start, group.get(i + 1).map_or(step.staged.n_heads, |next| next.rows.start));
            for first in (start..end).step_by(HEAD_ROWS) {
                self.draw_rows(step, head, spec, first..end.min(first + HEAD_ROWS))?;
            }
        }
        if let Some(form) = step.capturing.take() {
            let (graph, n_bytes) = self.gpu.end_capture()?;
            self.gpu.replay(&graph)?;
            step.graphs.as_mut().context("only where there are graphs, something is captured")?.keep(form, graph, n_bytes);
        }
        self.fetch(step, batch)
    }

    /// Launches a step of a form that was captured.
    pub(super) fn draw_again(&self, step: &mut Step, form: Form, batch: &Batch) -> Result<()> {
        let graph = step.graphs.as_ref().and_then(|graphs| graphs.get(form)).context("it was there just now")?;
        self.gpu.replay(graph)?;
        self.fetch(step, batch)
    }

    /// Has the results of the head rows copied back.
    fn fetch(&self, step: &mut Step, batch: &Batch) -> Result<()> {
        let at = step.drawn;
        let slot = step.slot();
        self.gpu.download_later(at, &mut slot.drawn[..batch.heads.len() * DRAWN_WORDS])?;
        self.gpu.put_mark(&slot.done)?;
        step.note_under_way();
        Ok(())
    }

    /// Waits for the results of the head rows of the step that began first, and for nothing after them.
    pub(super) fn read_drawn(step: &mut Step, out: &mut StepOutput) -> Result<()> {
        let slot = step.first_under_way().context("no step is under way")?;
        slot.done.wait()?;
        for (out, words) in out.rows.iter_mut().zip(slot.drawn.chunks_exact(DRAWN_WORDS)) {
            *out = staging::drawn(words);
        }
        Ok(())
    }

    /// Head rows that there is memory for at once.
    fn draw_rows(
        &self,
        step: &Step,
        (x, norm, weight): (&Hidden, &Vector, &Weight),
        spec: &HeadSpec,
        rows: Range<usize>,
    ) -> Result<()> {
        let (n_rows, first) = (rows.len(), rows.start);
        let (indexes, width) = (step.at(step.staged.head_rows + first), x.width as u32);
        let args = [arg(&indexes), arg(&x.at), arg(&step.rows), arg(&width)];
        self.run(self.kernels.gather, (n_rows as u32, 1), 128, &args)?;
        let narrow = step.normed + (2 * HEAD_ROWS * x.width) as u64;
        let scales = narrow + (HEAD_ROWS * x.width) as u64;
        let normed = Act { at: step.normed, narrow, scales, is_fp8: matches!(weight.place, Place::Fp8(_)) };
        self.norm_rows((step.rows, x.width), (norm, spec.eps), n_rows, &normed)?;
        self.multiply(step, &normed, weight, n_rows, Output::F32, step.logits)?;
        let (n_vocab, cap) = (weight.n as u32, spec.soft_cap.unwrap_or(0.0));
        let wants = step.at(step.staged.wants + first * staging::WANT_WORDS);
        let masks = step.shaping;
        let edits = masks + 4 * staging::edits_at(step.n_vocab) as u64;
        let results = step.drawn + 4 * (first * DRAWN_WORDS) as u64;
        let args =
            [arg(&step.logits), arg(&n_vocab), arg(&cap), arg(&wants), arg(&edits), arg(&masks), arg(&step.kept), arg(&results)];
        self.run(self.kernels.sample, (n_rows as u32, 1), 512, &args)
    }
}

/// As many rows that can't be computed as the step has head rows.
pub(super) fn broken(batch: &Batch, out: &mut StepOutput) {
    out.rows.clear();
    out.rows.resize(batch.heads.len(), HeadOut::BROKEN);
}
