//! The reference device: f32 on the CPU with candle-core. Slow and obviously right: the oracle that other devices are
//! tested against. It shares no arithmetic with them but the draw from the logits (`sample`).
//!
//! Invariant: one operation here is the textbook formula of its namesake in [`Device`]. Its matrix products choose their
//! order of summation by shape, so "same row, same bits" does not hold on this device; equality up to rounding does.

use super::batch::{Batch, BatchSeq, StepOutput};
use super::sample::{self, Scratch};
use super::{Activation, AttentionSpec, BLOCK_TOKENS, Device, Experts, HeadSpec, QkvExtra, RopeStyle, StepSizes};
use crate::tensor::Tensor as FileTensor;
use candle_core::{D, DType as CandleType, Device as CandleDevice, Result, Tensor};

/// Why a candle operation can't fail where [`done`] is used.
const SHAPES_HOLD: &str = "shapes were checked when the model was loaded, and the batch by Batch::check";

/// The reference device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference;

/// One layer's keys and values, each `[n_blocks, BLOCK_TOKENS, n_kv_heads · head_dim]`.
#[derive(Debug)]
pub struct Cache {
    k: Vec<f32>,
    v: Vec<f32>,
    /// Elements per slot.
    width: usize,
}

impl Cache {
    /// Where a position's slot starts in `k` and `v`.
    fn at(&self, table: &[u32], position: usize) -> usize {
        (table[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS) * self.width
    }

    /// Positions 0..n of a sequence in order, `[n, width]`.
    fn gather(&self, values: &[f32], table: &[u32], n: usize) -> Result<Tensor> {
        let rows: Vec<f32> = (0..n).flat_map(|p| &values[self.at(table, p)..][..self.width]).copied().collect();
        Tensor::from_vec(rows, (n, self.width), &CandleDevice::Cpu)
    }
}

impl Device for Reference {
    /// `[n, k]`
    type Weight = Tensor;
    /// `[n]`
    type Vector = Tensor;
    /// `[T, width]`: an operation puts a new tensor in its place.
    type Hidden = Tensor;
    /// `[T, k]`
    type Act = Tensor;
    type Cache = Cache;

    fn fingerprint(&self) -> String {
        format!("reference candle-core-0.11 f32 kv=f32 {}", std::env::consts::ARCH)
    }

    fn load_weight(&self, parts: &[FileTensor<'_>]) -> anyhow::Result<Tensor> {
        let parts = parts.iter().map(load).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn load_gate_up(&self, gate: &FileTensor<'_>, up: &FileTensor<'_>) -> anyhow::Result<Tensor> {
        self.load_weight(&[gate.clone(), up.clone()])
    }

    fn load_vector(&self, parts: &[FileTensor<'_>]) -> anyhow::Result<Tensor> {
        self.load_weight(parts)
    }

    fn tensor_bytes(&self, tensor: &FileTensor<'_>) -> usize {
        tensor.shape.iter().product::<usize>() * size_of::<f32>()
    }

    fn cache_block_bytes(&self, spec: &AttentionSpec) -> usize {
        2 * BLOCK_TOKENS * spec.n_kv_heads * spec.head_dim * size_of::<f32>()
    }

    fn new_cache(&self, spec: &AttentionSpec, n_blocks: usize) -> Cache {
        let width = spec.n_kv_heads * spec.head_dim;
        // NaN, so that a read of a slot that nothing was stored in can't go unnoticed.
        let empty = vec![f32::NAN; n_blocks * BLOCK_TOKENS * width];
        Cache { k: empty.clone(), v: empty, width }
    }

    fn new_hidden(&self, _max_tokens: usize, width: usize) -> Tensor {
        done(Tensor::zeros((0, width), CandleType::F32, &CandleDevice::Cpu))
    }

    fn new_act(&self, max_tokens: usize, width: usize) -> Tensor {
        self.new_hidden(max_tokens, width)
    }

    fn reserve(&mut self, _sizes: &StepSizes<'_>) {}

    fn embed(&self, table: &Tensor, scale: f32, batch: &Batch, x: &mut Tensor) {
        *x = done(select_rows(table, batch.tokens.iter().copied()).and_then(|rows| rows * f64::from(scale)));
    }

    fn norm(&self, x: &Tensor, weight: &Tensor, eps: f32, _next: &Tensor, _batch: &Batch, act: &mut Tensor) {
        *act = done(rms_norm(x, weight, eps));
    }

    fn norm_add(&self, y: &Tensor, weight: &Tensor, eps: f32, _batch: &Batch, x: &mut Tensor) {
        *x = done(rms_norm(y, weight, eps).and_then(|y| &*x + y));
    }

    fn linear(&self, act: &Tensor, weight: &Tensor, _batch: &Batch, out: &mut Tensor) {
        *out = done(product(act, weight));
    }

    fn linear_add(&self, act: &Tensor, weight: &Tensor, _batch: &Batch, x: &mut Tensor) {
        *x = done(product(act, weight).and_then(|y| &*x + y));
    }

    fn finish_qkv(&self, qkv: &mut Tensor, extra: &QkvExtra<Tensor>, spec: &AttentionSpec, batch: &Batch, cache: &mut Cache) {
        let mut rows = done(finished(qkv, extra, spec).and_then(|qkv| qkv.to_vec2::<f32>()));
        let q_width = spec.n_heads * spec.head_dim;
        for (row, &position) in rows.iter_mut().zip(&batch.positions) {
            for head in row[..q_width + cache.width].chunks_mut(spec.head_dim) {
                rotate(head, position, spec);
            }
        }
        for seq in &batch.seqs {
            let table = batch.block_table(seq);
            for i in 0..seq.n_tokens as usize {
                let (k, v) = rows[seq.token_start as usize + i][q_width..].split_at(cache.width);
                let at = cache.at(table, seq.first_position as usize + i);
                cache.k[at..at + cache.width].copy_from_slice(k);
                cache.v[at..at + cache.width].copy_from_slice(v);
            }
        }
        for copy in &batch.copies {
            let (src, dst) = (cache.at(&[copy.src], 0), cache.at(&[copy.dst], 0));
            let len = copy.n_slots as usize * cache.width;
            cache.k.copy_within(src..src + len, dst);
            cache.v.copy_within(src..src + len, dst);
        }
        *qkv = done(Tensor::new(rows, &CandleDevice::Cpu));
    }

    fn attention(&self, qkv: &Tensor, spec: &AttentionSpec, cache: &Cache, _next: &Tensor, batch: &Batch, act: &mut Tensor) {
        let per_seq = batch.seqs.iter().map(|seq| attend(qkv, spec, cache, batch, seq)).collect::<Result<Vec<_>>>();
        *act = done(per_seq.and_then(|outs| Tensor::cat(&outs, 0)));
    }

    fn gate_up(
        &self,
        act: &Tensor,
        weight: &Tensor,
        f: Activation,
        _next: &Tensor,
        _batch: &Batch,
        scratch: &mut Tensor,
        out: &mut Tensor,
    ) {
        *scratch = done(product(act, weight));
        *out = done(gated(scratch, f));
    }

    fn experts(&self, act: &Tensor, experts: &Experts<Tensor>, f: Activation, _batch: &Batch, x: &mut Tensor) {
        *x = done(add_experts(act, experts, f, x));
    }

    fn head(&self, x: &Tensor, norm: &Tensor, weight: &Tensor, spec: &HeadSpec, batch: &Batch, out: &mut StepOutput) {
        out.rows.clear();
        if batch.heads.is_empty() {
            return;
        }
        let rows = select_rows(x, batch.heads.iter().map(|row| row.token_idx));
        let logits = rows.and_then(|x| product(&rms_norm(&x, norm, spec.eps)?, weight));
        let mut logits = done(logits.and_then(|logits| soft_capped(logits, spec.soft_cap)?.to_vec2::<f32>()));
        let mut scratch = Scratch::new(weight.dims()[0]);
        out.rows.extend(logits.iter_mut().zip(&batch.heads).map(|(logits, row)| {
            let shaping = batch.shaping(row, logits.len());
            sample::draw(logits, row, shaping, &mut scratch)
        }));
    }
}

/// The value of an operation whose shapes were checked before.
fn done<T>(result: Result<T>) -> T {
    result.expect(SHAPES_HOLD)
}

/// Dequantises a tensor of the file.
fn load(tensor: &FileTensor<'_>) -> Result<Tensor> {
    let mut values = vec![0.0; tensor.shape.iter().product()];
    tensor.dtype.dequantise(&tensor.bytes, &mut values);
    Tensor::from_vec(values, tensor.shape.as_slice(), &CandleDevice::Cpu)
}

/// The rows of `table` that `indexes` name.
fn select_rows(table: &Tensor, indexes: impl Iterator<Item = u32>) -> Result<Tensor> {
    table.index_select(&Tensor::from_iter(indexes, &CandleDevice::Cpu)?, 0)
}

/// x · weightᵀ
fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

/// x / sqrt(mean(x²) + eps) · weight, row by row.
fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(weight)
}

/// cap · tanh(x / cap), if there is a cap.
fn soft_capped(x: Tensor, cap: Option<f32>) -> Result<Tensor> {
    cap.map_or(Ok(x.clone()), |cap| (x / f64::from(cap))?.tanh()? * f64::from(cap))
}

/// activation(gate) · up of rows that are both.
fn gated(gate_up: &Tensor, f: Activation) -> Result<Tensor> {
    let halves = gate_up.chunk(2, 1)?;
    let gate = match f {
        Activation::Silu => halves[0].silu()?,
        Activation::GeluTanh => halves[0].gelu()?,
    };
    gate * &halves[1]
}

/// q, k and v with their bias, the heads of q and k normed.
fn finished(qkv: &Tensor, extra: &QkvExtra<Tensor>, spec: &AttentionSpec) -> Result<Tensor> {
    let qkv = extra.bias.as_ref().map_or(Ok(qkv.clone()), |bias| qkv.broadcast_add(bias))?;
    let Some(norms) = &extra.norms else { return Ok(qkv) };
    let heads = qkv.reshape(((), spec.n_heads + 2 * spec.n_kv_heads, spec.head_dim))?;
    let q = rms_norm(&heads.narrow(1, 0, spec.n_heads)?, &norms.q, norms.eps)?;
    let k = rms_norm(&heads.narrow(1, spec.n_heads, spec.n_kv_heads)?, &norms.k, norms.eps)?;
    let v = heads.narrow(1, spec.n_heads + spec.n_kv_heads, spec.n_kv_heads)?;
    Tensor::cat(&[q, k, v], 1)?.flatten_from(1)
}

/// x + Σ weight · expert(act) over all experts, those that a token does not use with weight 0.
fn add_experts(act: &Tensor, experts: &Experts<Tensor>, f: Activation, x: &Tensor) -> Result<Tensor> {
    let logits = product(act, &experts.router)?;
    let p = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
    let mut weights = p.broadcast_div(&p.sum_keepdim(D::Minus1)?)?.to_vec2::<f32>()?;
    for row in &mut weights {
        let mut order: Vec<usize> = (0..row.len()).collect();
        // A stable sort: ties stay in the order of the experts' numbers.
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let (used, unused) = order.split_at(experts.n_used);
        let total: f32 = if experts.renormalise { used.iter().map(|&e| row[e]).sum() } else { 1.0 };
        for &e in used {
            row[e] /= total;
        }
        for &e in unused {
            row[e] = 0.0;
        }
    }
    let weights = Tensor::new(weights, &CandleDevice::Cpu)?;
    let mut x = x.clone();
    for (e, expert) in experts.experts.iter().enumerate() {
        let y = product(&gated(&product(act, &expert.gate_up)?, f)?, &expert.down)?;
        x = (x + y.broadcast_mul(&weights.narrow(1, e, 1)?)?)?;
    }
    Ok(x)
}

/// Rotary embedding of one head: each pair turns by position · frequency. Elements past the last pair stay.
fn rotate(head: &mut [f32], position: u32, spec: &AttentionSpec) {
    let n_pairs = spec.rope_freqs.len();
    for (i, &freq) in spec.rope_freqs.iter().enumerate() {
        let (a, b) = match spec.rope_style {
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            RopeStyle::Halves => (i, i + n_pairs),
        };
        let (sin, cos) = f64::from(position as f32 * freq).sin_cos();
        let (sin, cos) = (sin * f64::from(spec.rope_scale), cos * f64::from(spec.rope_scale));
        let (x, y) = (f64::from(head[a]), f64::from(head[b]));
        head[a] = (x * cos - y * sin) as f32;
        head[b] = (x * sin + y * cos) as f32;
    }
}

/// Attention of one sequence's tokens of this step, `[n_tokens, n_heads · head_dim]`. Masked values are multiplied by 0,
/// so a NaN in one token's values reaches the tokens before it in the chunk, but no other sequence.
fn attend(qkv: &Tensor, spec: &AttentionSpec, cache: &Cache, batch: &Batch, seq: &BatchSeq) -> Result<Tensor> {
    let (n, first) = (seq.n_tokens as usize, seq.first_position as usize);
    let (n_kv, dim, group) = (spec.n_kv_heads, spec.head_dim, spec.n_heads / spec.n_kv_heads);
    let n_keys = first + n;
    let heads = |values: Tensor| values.reshape((n_keys, n_kv, dim))?.transpose(0, 1)?.contiguous();
    let k = heads(cache.gather(&cache.k, batch.block_table(seq), n_keys)?)?; // [n_kv, n_keys, dim]
    let v = heads(cache.gather(&cache.v, batch.block_table(seq), n_keys)?)?;
    let q = qkv.narrow(0, seq.token_start as usize, n)?.narrow(1, 0, spec.n_heads * dim)?;
    let q = q.reshape((n, n_kv, group, dim))?.permute((1, 2, 0, 3))?.reshape((n_kv, group * n, dim))?;
    let scores = (q.matmul(&k.t()?)? * f64::from(spec.scale))?.reshape((n_kv, group, n, n_keys))?;
    let scores = soft_capped(scores, spec.soft_cap)?;
    let sees = |position: usize, key: usize| key <= position && spec.window.is_none_or(|window| position - key < window);
    let mask = |i| (0..n_keys).map(move |key| if sees(first + i, key) { 0.0 } else { f32::NEG_INFINITY });
    let mask: Vec<f32> = (0..n).flat_map(mask).collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (n, n_keys), &CandleDevice::Cpu)?)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let out = weights.reshape((n_kv, group * n, n_keys))?.matmul(&v)?;
    out.reshape((n_kv, group, n, dim))?.permute((2, 0, 1, 3))?.reshape((n, spec.n_heads * dim))
}
