//! `valar bench roof` and `valar bench kernels`: what this machine can do at most, and the share of it that the kernels
//! reach, both measured in one run. Knows nothing of jobs.
//!
//! A product of m rows with an [n, k] matrix is 2·m·n·k operations; its share is of what the unit that multiplies does on
//! registers. With few rows it reads each weight once and does little else: its share is of reading memory. Attention of a
//! query over n keys is 4·n·(elements of its heads) operations, of the unit that its numbers take; when decoding it reads the
//! keys and values of each sequence once, 2 bytes an element.

use crate::device::batch::{Batch, BatchSeq};
use crate::device::cpu::roof::{Peak, peaks};
use crate::device::cpu::{CpuDevice, Isa, Numerics, Weight};
use crate::device::{AttentionSpec, BLOCK_TOKENS, Device, RopeStyle};
use crate::tensor::{DType, Tensor};
use anyhow::Result;
use std::io::Write;
use std::time::Instant;

/// Bytes of weights that a measurement goes through, so that none is in a cache when it is used again.
const WEIGHT_BYTES: usize = 256 << 20;
/// Rounds of a measurement; the best counts.
const ROUNDS: usize = 3;

/// A model's sizes: width, feed-forward width, heads, key/value heads, elements per head.
const SHAPES: [(&str, usize, usize, usize, usize, usize); 4] = [
    ("135M (SmolLM2)", 576, 1536, 9, 3, 64),
    ("1B (Llama 3.2)", 2048, 8192, 32, 8, 64),
    ("3B (Llama 3.2)", 3072, 8192, 24, 8, 128),
    ("8B (Llama 3.1)", 4096, 14336, 32, 8, 128),
];

/// Prints what the machine can do.
///
/// # Errors
/// The output can't be written.
pub fn show_roof(isa: Isa, n_threads: usize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} threads, {} path", n_threads, isa.name())?;
    for peak in peaks(isa, n_threads) {
        let per_cycle = peak.per_cycle.map_or(String::new(), |n| format!("  {n:.2} instructions per cycle and thread"));
        writeln!(out, "{:<28}{:>9.1} G{}{per_cycle}", peak.name, peak.per_second / 1e9, peak.unit())?;
    }
    Ok(())
}

/// Prints the share of it that products and attention reach, on random weights.
///
/// # Errors
/// The output can't be written.
pub fn show_kernels(isa: Isa, numerics: Option<Numerics>, n_threads: usize) -> Result<()> {
    let numerics = numerics.unwrap_or(Numerics::fastest(isa));
    let dev = CpuDevice::new(isa, numerics, n_threads);
    let peaks = peaks(isa, n_threads);
    let memory = peaks.iter().rfind(|peak| peak.per_cycle.is_none());
    let (Some(unit), Some(attention_unit), Some(memory)) =
        (unit_of(numerics, &peaks), attention_unit_of(numerics, &peaks), memory)
    else {
        anyhow::bail!("the limits of the {} path are not measured: there is nothing to compare with", isa.name());
    };
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{}, {n_threads} threads, {} path; shares of {}, in attention of {}, and for up to 4 rows and decoding of {}",
        dev.fingerprint(),
        isa.name(),
        unit.name,
        attention_unit.name,
        memory.name
    )?;
    for (name, width, ffn_width, heads, kv_heads, head_dim) in SHAPES {
        writeln!(out, "{name}")?;
        let qkv = (heads + 2 * kv_heads) * head_dim;
        let products = [
            ("qkv", qkv, width),
            ("attn_output", width, heads * head_dim),
            ("gate, up", 2 * ffn_width, width),
            ("down", width, ffn_width),
        ];
        for (what, n, k) in products {
            let weights = weights(&dev, n, k)?;
            write!(out, "  {what:<12}[{n:>6},{k:>6}]")?;
            for m in [1, 4, 64, 256, 1024] {
                let seconds = product_seconds(&dev, &weights, (m, n, k))?;
                let (operations, bytes) = ((2 * m * n * k) as f64, (n * k) as f64 * weight_bytes(numerics));
                let share = if m <= 4 { bytes / seconds / memory.per_second } else { operations / seconds / unit.per_second };
                write!(out, "  {m} rows {:>3.0} %", 100.0 * share)?;
            }
            writeln!(out)?;
        }
        let spec = attention_spec(heads, kv_heads, head_dim);
        for (what, n_seqs, n_tokens) in [("prefill", 4, 512), ("decode", 64, 1)] {
            let (seconds, operations, bytes) = attention_seconds(&dev, &spec, (n_seqs, 512, n_tokens))?;
            let rate = if n_tokens == 1 { bytes / memory.per_second } else { operations / attention_unit.per_second };
            let share = rate / seconds;
            writeln!(out, "  attention   {what}, {n_seqs} sequences of 512 tokens {:>3.0} %", 100.0 * share)?;
        }
    }
    Ok(())
}

/// What multiplies weights.
fn unit_of(numerics: Numerics, peaks: &[Peak]) -> Option<&Peak> {
    first_of(
        peaks,
        match numerics {
            Numerics::Int8 | Numerics::Int8Bf16 => "int8",
            Numerics::Bf16 => "bf16 tiles",
            Numerics::F32 => "f32",
        },
    )
}

/// What multiplies queries, keys and values.
fn attention_unit_of(numerics: Numerics, peaks: &[Peak]) -> Option<&Peak> {
    first_of(
        peaks,
        match numerics {
            Numerics::Int8Bf16 => "bf16 dot",
            Numerics::Bf16 => "bf16 tiles",
            Numerics::Int8 | Numerics::F32 => "f32",
        },
    )
}

/// The limit whose name begins like that; where the path has no such instruction, that of f32.
fn first_of<'a>(peaks: &'a [Peak], name: &str) -> Option<&'a Peak> {
    peaks.iter().find(|peak| peak.name.starts_with(name)).or(peaks.iter().find(|peak| peak.name.starts_with("f32")))
}

/// Of `Q4_1`, in the layout of these numerics.
fn weight_bytes(numerics: Numerics) -> f64 {
    match numerics {
        Numerics::Int8 | Numerics::Int8Bf16 => 0.625,
        Numerics::Bf16 => 2.0,
        Numerics::F32 => 4.0,
    }
}

/// Matrices of random weights, of [`WEIGHT_BYTES`] together.
fn weights(dev: &CpuDevice, n: usize, k: usize) -> Result<Vec<Weight>> {
    let dtype = DType::Q4_1;
    let mut bytes = vec![0; n * k / dtype.block_elements() * dtype.block_bytes()];
    let mut state = 1u64;
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        for byte in &mut *block {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
        // Scale and minimum are halves of about 0.01.
        (block[1], block[3]) = (0x20, 0xa0);
    }
    let tensor = || Tensor { name: "random", dtype, shape: vec![n, k], bytes: (&bytes).into() };
    let copies = WEIGHT_BYTES.div_ceil(dev.tensor_bytes(&tensor()));
    (0..copies).map(|_| dev.load_weight(&[tensor()])).collect()
}

/// A batch of one token each of `m` sequences.
fn rows(m: usize) -> Batch {
    Batch { tokens: vec![0; m], positions: vec![0; m], ..Batch::default() }
}

/// Something between −1 and 1.
fn fill(values: &mut [f32]) {
    values.iter_mut().enumerate().for_each(|(i, x)| *x = (i * 7919 % 1000) as f32 / 500.0 - 1.0);
}

/// Seconds of one product.
fn product_seconds(dev: &CpuDevice, weights: &[Weight], (m, n, k): (usize, usize, usize)) -> Result<f64> {
    let batch = rows(m);
    let ones = 1.0f32.to_le_bytes().repeat(k);
    let norm = dev.load_vector(&[Tensor { name: "ones", dtype: DType::F32, shape: vec![k], bytes: (&ones).into() }])?;
    let (mut x, mut act, mut out) = (dev.new_hidden(m, k), dev.new_act(m, k), dev.new_hidden(m, n));
    fill(x.values_mut());
    dev.norm(&x, &norm, 1e-5, &weights[0], &batch, &mut act);
    Ok(best(weights, |weight| dev.linear(&act, weight, &batch, &mut out)))
}

/// Seconds of the fastest of several calls, for some rounds over things that are together in no cache. (A mean would be that
/// of the machine's other programs.)
fn best<T>(things: &[T], mut call: impl FnMut(&T)) -> f64 {
    let mut least = f64::INFINITY;
    for thing in std::iter::repeat_n(things, ROUNDS).flatten() {
        let start = Instant::now();
        call(thing);
        least = least.min(start.elapsed().as_secs_f64());
    }
    least
}

fn attention_spec(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> AttentionSpec {
    AttentionSpec {
        n_heads,
        n_kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        soft_cap: None,
        window: None,
        rope_style: RopeStyle::Halves,
        rope_freqs: vec![0.0; head_dim / 2],
        rope_scale: 1.0,
    }
}

/// Seconds of one layer's attention, its operations, and the bytes of keys and values that it must read. Each sequence has
/// `length` tokens, the last `n_tokens` of them in the step.
fn attention_seconds(
    dev: &CpuDevice,
    spec: &AttentionSpec,
    (n_seqs, length, n_tokens): (usize, usize, usize),
) -> Result<(f64, f64, f64)> {
    let n_blocks = length.div_ceil(BLOCK_TOKENS);
    let mut batch = Batch::default();
    for seq in 0..n_seqs {
        let first_position = (length - n_tokens) as u32;
        batch.seqs.push(BatchSeq {
            token_start: batch.tokens.len() as u32,
            n_tokens: n_tokens as u32,
            first_position,
            table_start: batch.block_tables.len() as u32,
            n_blocks: n_blocks as u32,
        });
        batch.block_tables.extend((0..n_blocks).map(|i| (seq * n_blocks + i) as u32));
        batch.positions.extend(first_position..length as u32);
        batch.tokens.resize(batch.positions.len(), 0);
    }
    let (n_rows, q_width) = (batch.tokens.len(), spec.n_heads * spec.head_dim);
    let mut qkv = dev.new_hidden(n_rows, q_width + 2 * spec.n_kv_heads * spec.head_dim);
    fill(qkv.values_mut());
    // Several layers, so that the last one's keys are not in a cache.
    let layer_bytes = n_seqs * n_blocks * dev.cache_block_bytes(spec);
    let mut caches: Vec<_> =
        (0..(WEIGHT_BYTES / 4).div_ceil(layer_bytes)).map(|_| dev.new_cache(spec, n_seqs * n_blocks)).collect();
    for cache in &mut caches {
        cache.cells_mut().fill(0x3c00);
    }
    let next_bytes = vec![0; q_width * 32];
    let next =
        dev.load_weight(&[Tensor { name: "next", dtype: DType::F32, shape: vec![8, q_width], bytes: (&next_bytes).into() }])?;
    let mut act = dev.new_act(n_rows, q_width);
    let seconds = best(&caches, |cache| dev.attention(&qkv, spec, cache, &next, &batch, &mut act));
    let keys: usize = batch.positions.iter().map(|&position| position as usize + 1).sum();
    Ok((seconds, (4 * keys * q_width) as f64, (n_seqs * length * spec.n_kv_heads * spec.head_dim * 4) as f64))
}
