//! Keys and values that are kept as integers, as the floats that attention takes: q · scale, rounded once to f32, and once
//! more where bfloat16 is taken. See the parent's invariant: an element depends on its token's key or value alone.

use super::super::cache::Ints;
use super::super::simd::{LANES, Simd};
use super::lanes;
use super::{Keys, Rows, padded};
use crate::device::BLOCK_TOKENS;

/// With scales under it all elements are numbers, as bfloat16, too. (False for NaN.)
const MOST_SCALE: f32 = 2e36;

/// A tile's keys `[block][head_dim][16]` and values `[64][padded head_dim]` as f32.
#[inline(always)]
pub(super) fn load_floats(rows: &Rows<'_>, keys: &Keys<'_>, k: &mut [f32], v: &mut [f32]) {
    let (head_dim, kv_head) = (rows.attention.spec.head_dim, rows.item.kv_head as usize);
    let width = lanes::padded(head_dim);
    for (b, &block) in keys.blocks.iter().enumerate() {
        let Ints { q, scales } = rows.attention.cache.int_keys(block, kv_head);
        for (out, q) in k[b * BLOCK_TOKENS * head_dim..].as_chunks_mut().0.iter_mut().zip(q.as_chunks().0) {
            *out = scaled(q, scales);
        }
        let n_slots = BLOCK_TOKENS.min(keys.n - b * BLOCK_TOKENS);
        let Ints { q, scales } = rows.attention.cache.int_values(block, kv_head);
        let out = v[b * BLOCK_TOKENS * width..].chunks_exact_mut(width);
        for ((out, q), &scale) in out.zip(q.chunks_exact(head_dim)).zip(scales).take(n_slots) {
            for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                *out = vector_of(q, i * LANES, scale);
            }
        }
    }
}

/// A tile's keys as they lie as bfloat16, `[block][padded head_dim / 2][16 slots][2]`.
#[inline(always)]
pub(super) fn load_pair_keys<S: Simd>(s: S, rows: &Rows<'_>, keys: &Keys<'_>, k: &mut [u16]) {
    let n_cells = padded(rows.attention.spec.head_dim) * BLOCK_TOKENS;
    for (&block, out) in keys.blocks.iter().zip(k.chunks_exact_mut(n_cells)) {
        let Ints { q, scales } = rows.attention.cache.int_keys(block, rows.item.kv_head as usize);
        let pairs = q.as_chunks::<{ 2 * LANES }>().0;
        let (out, padding) = out.as_chunks_mut().0.split_at_mut(pairs.len());
        for (out, pair) in out.iter_mut().zip(pairs) {
            let [even, odd] = pair.as_chunks::<LANES>().0 else { continue };
            interleave(s, &scaled(even, scales), &scaled(odd, scales), out);
        }
        padding.as_flattened_mut().fill(0);
    }
}

/// A tile's values as they lie as bfloat16, `[32 pairs of keys][padded head_dim][2]`, with zeros after those of its last key;
/// says whether all are numbers.
#[inline(always)]
pub(super) fn load_pair_values<S: Simd>(s: S, rows: &Rows<'_>, keys: &Keys<'_>, v: &mut [u16]) -> bool {
    let head_dim = rows.attention.spec.head_dim;
    let width = padded(head_dim);
    let mut healthy = true;
    for (pair, out) in v.chunks_exact_mut(2 * width).enumerate() {
        let slot = 2 * pair;
        if slot >= keys.n {
            out.fill(0);
            continue;
        }
        let Ints { q, scales } = rows.attention.cache.int_values(keys.blocks[slot / BLOCK_TOKENS], rows.item.kv_head as usize);
        let slot_in_block = slot % BLOCK_TOKENS;
        let q = &q[slot_in_block * head_dim..];
        let has_odd = slot + 1 < keys.n;
        // A slot that was never written may have any scale.
        let (even_scale, odd_scale) = (scales[slot_in_block], if has_odd { scales[slot_in_block + 1] } else { 0.0 });
        healthy &= even_scale < MOST_SCALE && odd_scale < MOST_SCALE;
        for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let even = vector_of(&q[..head_dim], i * LANES, even_scale);
            let odd = if has_odd { vector_of(&q[head_dim..2 * head_dim], i * LANES, odd_scale) } else { [0.0; LANES] };
            interleave(s, &even, &odd, out);
        }
    }
    healthy
}

/// Integers with a scale each.
#[inline(always)]
fn scaled(q: &[i8; LANES], scales: &[f32; LANES]) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for j in 0..LANES {
        out[j] = f32::from(q[j]) * scales[j];
    }
    out
}

/// The vector that begins at element `start` of a value; 0 where the value has ended.
#[inline(always)]
fn vector_of(q: &[i8], start: usize, scale: f32) -> [f32; LANES] {
    let Some(rest) = q.get(start..) else { return [0.0; LANES] };
    if let Some(q) = rest.first_chunk::<LANES>() {
        return scaled(q, &[scale; LANES]);
    }
    let mut out = [0.0; LANES];
    out.iter_mut().zip(rest).for_each(|(out, &q)| *out = f32::from(q) * scale);
    out
}

/// Pairs of two vectors' elements, rounded to bfloat16.
#[inline(always)]
fn interleave<S: Simd>(s: S, even: &[f32; LANES], odd: &[f32; LANES], out: &mut [u16; 2 * LANES]) {
    let (mut evens, mut odds) = ([0; LANES], [0; LANES]);
    // SAFETY: all have 16 elements.
    unsafe {
        s.round_bf16(even.as_ptr(), evens.as_mut_ptr());
        s.round_bf16(odd.as_ptr(), odds.as_mut_ptr());
    }
    for j in 0..LANES {
        out[2 * j] = evens[j];
        out[2 * j + 1] = odds[j];
    }
}
