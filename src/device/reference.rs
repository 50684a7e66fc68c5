//! The reference device: f32 on the CPU with candle-core. Slow and obviously right: the oracle that other devices are
//! tested against. It shares no arithmetic with them but the draw from the logits (`sample`).
//!
//! Invariant: one operation here is the textbook formula of its namesake in [`Device`]. Its matrix products choose their
//! order of summation by shape, so "same row, same bits" does not hold on this device; equality up to rounding does.

use super::batch::{Batch, BatchSeq, StepOutput};
use super::sample::{self, Scratch};
use super::{Activation, AttentionSpec, BLOCK_TOKENS, Device, RopeStyle, StepSizes};
use crate::tensor::{DType, Tensor as FileTensor};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{D, DType as CandleType, Device as CandleDevice, Result, Tensor};
use std::borrow::Cow;

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

    fn load_vector(&self, tensor: &FileTensor<'_>) -> anyhow::Result<Tensor> {
        Ok(load(tensor)?)
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

    fn embed(&self, table: &Tensor, batch: &Batch, x: &mut Tensor) {
        *x = done(select_rows(table, batch.tokens.iter().copied()));
    }

    fn norm(&self, x: &Tensor, weight: &Tensor, eps: f32, _next: &Tensor, _batch: &Batch, act: &mut Tensor) {
        *act = done(rms_norm(x, weight, eps));
    }

    fn linear(&self, act: &Tensor, weight: &Tensor, _batch: &Batch, out: &mut Tensor) {
        *out = done(product(act, weight));
    }

    fn linear_add(&self, act: &Tensor, weight: &Tensor, _batch: &Batch, x: &mut Tensor) {
        *x = done(product(act, weight).and_then(|y| &*x + y));
    }

    fn finish_qkv(&self, qkv: &mut Tensor, spec: &AttentionSpec, batch: &Batch, cache: &mut Cache) {
        let mut rows = done(qkv.to_vec2::<f32>());
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
        let halves = done(scratch.chunk(2, 1));
        let gate = match f {
            Activation::Silu => halves[0].silu(),
        };
        *out = done(gate.and_then(|gate| gate * &halves[1]));
    }

    fn head(&self, x: &Tensor, norm: &Tensor, eps: f32, weight: &Tensor, batch: &Batch, out: &mut StepOutput) {
        out.rows.clear();
        if batch.heads.is_empty() {
            return;
        }
        let rows = select_rows(x, batch.heads.iter().map(|row| row.token_idx));
        let mut logits = done(rows.and_then(|x| product(&rms_norm(&x, norm, eps)?, weight)?.to_vec2::<f32>()));
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
    let dtype = match tensor.dtype {
        DType::F32 => GgmlDType::F32,
        DType::F16 => GgmlDType::F16,
        DType::Bf16 => GgmlDType::BF16,
        DType::Q4_0 => GgmlDType::Q4_0,
        DType::Q4_1 => GgmlDType::Q4_1,
        DType::Q8_0 => GgmlDType::Q8_0,
    };
    let storage = QStorage::from_data(Cow::Borrowed(tensor.bytes), &CandleDevice::Cpu, dtype)?;
    QTensor::new(storage, tensor.shape.as_slice())?.dequantize(&CandleDevice::Cpu)
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

/// Rotary embedding of one head: each pair turns by position · frequency. Elements past the last pair stay.
fn rotate(head: &mut [f32], position: u32, spec: &AttentionSpec) {
    let n_pairs = spec.rope_freqs.len();
    for (i, &freq) in spec.rope_freqs.iter().enumerate() {
        let (a, b) = match spec.rope_style {
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            RopeStyle::Halves => (i, i + n_pairs),
        };
        let (sin, cos) = f64::from(position as f32 * freq).sin_cos();
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
    let mask: Vec<f32> =
        (0..n).flat_map(|i| (0..n_keys).map(move |key| if key <= first + i { 0.0 } else { f32::NEG_INFINITY })).collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (n, n_keys), &CandleDevice::Cpu)?)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let out = weights.reshape((n_kv, group * n, n_keys))?.matmul(&v)?;
    out.reshape((n_kv, group, n, dim))?.permute((2, 0, 1, 3))?.reshape((n, spec.n_heads * dim))
}
