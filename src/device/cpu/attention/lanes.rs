//! Attention in 16 lanes of f32 over keys and values in IEEE halves or integers. See the parent's invariant.

use super::super::buffer::Aligned;
use super::super::simd::{LANES, Simd};
use super::softmax::{rescale, softmax};
use super::{Attention, AttentionScratch, ITEM_ROWS, Keys, Rows, Seen, TILE_BLOCKS, TILE_KEYS, ints};
use crate::device::{AttentionSpec, BLOCK_TOKENS};
use std::ops::Range;

/// Rows that a kernel takes at once.
const GROUP: usize = 6;

/// Elements of a row of values or outputs: whole vectors.
pub(super) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// A worker's memory.
#[derive(Default)]
pub(super) struct Scratch {
    /// The tile's keys, `[block][head_dim][16]`
    k: Aligned<f32>,
    /// The tile's values, `[64][padded head_dim]`
    v: Aligned<f32>,
    /// `[ITEM_ROWS][head_dim]`
    q: Aligned<f32>,
}

impl Scratch {
    pub(super) fn reserve(&mut self, head_dim: usize) {
        self.k.reserve(TILE_KEYS * head_dim);
        self.v.reserve(TILE_KEYS * padded(head_dim));
        self.q.reserve(ITEM_ROWS * head_dim);
    }
}

/// Copies the item's queries.
#[inline(always)]
pub(super) fn load_queries(rows: &Rows<'_>, scratch: &mut Scratch) {
    let head_dim = rows.attention.spec.head_dim;
    for r in 0..rows.len() {
        scratch.q[r * head_dim..][..head_dim].copy_from_slice(rows.query(r));
    }
}

/// Folds a tile's keys into some rows.
#[inline(always)]
pub(super) fn fold<S: Simd>(s: S, rows: &Rows<'_>, range: Range<usize>, keys: &Keys<'_>, scratch: &mut AttentionScratch) {
    load_tile(s, rows, keys, &mut scratch.lanes);
    for row in range.clone().step_by(GROUP) {
        let n = GROUP.min(range.end - row);
        let mut seen = [Seen::default(); GROUP];
        for (r, seen) in seen[..n].iter_mut().enumerate() {
            *seen = rows.seen(row + r, keys.start);
        }
        if seen[..n].iter().any(Seen::any) {
            fold_tile(s, rows.attention.spec, row, &seen[..n], scratch);
        }
    }
}

/// Turns a tile's keys and its first `n_keys` values into floats.
#[inline(always)]
fn load_tile<S: Simd>(s: S, rows: &Rows<'_>, keys: &Keys<'_>, scratch: &mut Scratch) {
    let Attention { spec, cache, .. } = *rows.attention;
    let (head_dim, kv_head) = (spec.head_dim, rows.item.kv_head as usize);
    let padded = padded(head_dim);
    if cache.layout.ints {
        return ints::load_floats(rows, keys, &mut scratch.k, &mut scratch.v);
    }
    for (b, &block) in keys.blocks.iter().enumerate() {
        let out = &mut scratch.k[b * BLOCK_TOKENS * head_dim..][..BLOCK_TOKENS * head_dim];
        for (out, k) in out.chunks_exact_mut(LANES).zip(cache.keys(block, kv_head).chunks_exact(LANES)) {
            // SAFETY: both chunks have 16 elements.
            unsafe { s.store(out.as_mut_ptr(), s.load_f16(k.as_ptr())) };
        }
        let n_slots = BLOCK_TOKENS.min(keys.n - b * BLOCK_TOKENS);
        let out = &mut scratch.v[b * BLOCK_TOKENS * padded..][..n_slots * padded];
        for (out, v) in out.chunks_exact_mut(padded).zip(cache.values(block, kv_head).chunks_exact(head_dim)) {
            for (out, v) in out.chunks_exact_mut(LANES).zip(v.chunks(LANES)) {
                let mut halves = [0; LANES];
                // A copy of unknown length is a call, which would cost more than all else here.
                let v = if v.len() == LANES {
                    v
                } else {
                    halves[..v.len()].copy_from_slice(v);
                    &halves
                };
                // SAFETY: both have 16 elements.
                unsafe { s.store(out.as_mut_ptr(), s.load_f16(v.as_ptr())) };
            }
        }
    }
}

/// Folds the loaded tile into rows `row..`, of which row r sees the keys `seen[r]` (both ends not decreasing).
#[inline(always)]
fn fold_tile<S: Simd>(s: S, spec: &AttentionSpec, row: usize, seen: &[Seen], scratch: &mut AttentionScratch) {
    let AttentionScratch { lanes: Scratch { k, v, q }, out, largest, sum, .. } = scratch;
    let n_blocks = seen[seen.len() - 1].end.div_ceil(BLOCK_TOKENS);
    let mut p = [[0.0; TILE_KEYS]; GROUP];
    let q = &q[row * spec.head_dim..][..seen.len() * spec.head_dim];
    scores(s, spec.head_dim, q, k, n_blocks, &mut p[..seen.len()]);
    let padded = padded(spec.head_dim);
    let state = (&mut largest[row..][..seen.len()], &mut sum[row * LANES..][..seen.len() * LANES]);
    let decay = softmax(s, spec, seen, (p.as_flattened_mut(), &mut []), state);
    let out = &mut out[row * padded..][..seen.len() * padded];
    rescale(s, seen, &decay, padded, out);
    // What all rows see is added for all at once, the rest row by row: each row's sum runs over its keys in order.
    let windowed = seen[seen.len() - 1].first > 0;
    let common = if windowed { 0 } else { seen[0].end };
    if common > 0 {
        weighted_sum(s, padded, &p[..seen.len()], 0..common, v, out);
    }
    for (r, seen) in seen.iter().enumerate().filter(|(_, seen)| seen.any() && seen.end > common) {
        weighted_sum(s, padded, &p[r..=r], seen.first.max(common)..seen.end, v, &mut out[r * padded..][..padded]);
    }
}

/// p[r][key] = q[r] · k[key] over `n_blocks` blocks: fma over the head's elements in order, from 0.
#[inline(always)]
fn scores<S: Simd>(s: S, head_dim: usize, q: &[f32], k: &[f32], n_blocks: usize, p: &mut [[f32; TILE_KEYS]]) {
    match p.len() {
        1 => scores_of::<S, 1>(s, head_dim, q, k, n_blocks, p),
        2 => scores_of::<S, 2>(s, head_dim, q, k, n_blocks, p),
        3 => scores_of::<S, 3>(s, head_dim, q, k, n_blocks, p),
        4 => scores_of::<S, 4>(s, head_dim, q, k, n_blocks, p),
        5 => scores_of::<S, 5>(s, head_dim, q, k, n_blocks, p),
        6 => scores_of::<S, 6>(s, head_dim, q, k, n_blocks, p),
        n => unreachable!("{n} rows in a group of {GROUP}"),
    }
}

/// [`scores`] for R rows: four blocks at once where there are registers for it.
#[inline(always)]
fn scores_of<S: Simd, const R: usize>(s: S, head_dim: usize, q: &[f32], k: &[f32], n_blocks: usize, p: &mut [[f32; TILE_KEYS]]) {
    if S::WIDE && n_blocks == TILE_BLOCKS {
        scores_kernel::<S, R, TILE_BLOCKS>(s, head_dim, q, k, 0, p);
    } else {
        for block in 0..n_blocks {
            scores_kernel::<S, R, 1>(s, head_dim, q, k, block, p);
        }
    }
}

/// R rows by B blocks of keys, from `block` on.
#[inline(always)]
fn scores_kernel<S: Simd, const R: usize, const B: usize>(
    s: S,
    head_dim: usize,
    q: &[f32],
    k: &[f32],
    block: usize,
    p: &mut [[f32; TILE_KEYS]],
) {
    assert!(q.len() == R * head_dim && p.len() == R && block + B <= TILE_BLOCKS);
    assert!(k.len() >= (block + B) * head_dim * LANES);
    let mut acc = [[s.splat(0.0); B]; R];
    for d in 0..head_dim {
        // SAFETY: d < head_dim, and the lengths were asserted just now.
        unsafe {
            let mut keys = [s.splat(0.0); B];
            for (b, keys) in keys.iter_mut().enumerate() {
                *keys = s.load(k.as_ptr().add(((block + b) * head_dim + d) * LANES));
            }
            for r in 0..R {
                let q = s.splat(q.as_ptr().add(r * head_dim + d).read());
                for b in 0..B {
                    acc[r][b] = s.fma(q, keys[b], acc[r][b]);
                }
            }
        }
    }
    for (p, acc) in p.iter_mut().zip(acc) {
        for (b, acc) in acc.into_iter().enumerate() {
            // SAFETY: block + b is under 4, and p is 4 vectors.
            unsafe { s.store(p.as_mut_ptr().add((block + b) * LANES), acc) };
        }
    }
}

/// out[r] = fma(p[r][key], v[key], out[r]) over the keys in order.
#[inline(always)]
fn weighted_sum<S: Simd>(s: S, padded: usize, p: &[[f32; TILE_KEYS]], keys: Range<usize>, v: &[f32], out: &mut [f32]) {
    match p.len() {
        1 => weighted_sum_of::<S, 1>(s, padded, p, keys, v, out),
        2 => weighted_sum_of::<S, 2>(s, padded, p, keys, v, out),
        3 => weighted_sum_of::<S, 3>(s, padded, p, keys, v, out),
        4 => weighted_sum_of::<S, 4>(s, padded, p, keys, v, out),
        5 => weighted_sum_of::<S, 5>(s, padded, p, keys, v, out),
        6 => weighted_sum_of::<S, 6>(s, padded, p, keys, v, out),
        n => unreachable!("{n} rows in a group of {GROUP}"),
    }
}

/// [`weighted_sum`] for R rows: four vectors of the head at once where there are registers for it.
#[inline(always)]
fn weighted_sum_of<S: Simd, const R: usize>(
    s: S,
    padded: usize,
    p: &[[f32; TILE_KEYS]],
    keys: Range<usize>,
    v: &[f32],
    out: &mut [f32],
) {
    let mut column = 0;
    while column < padded {
        if S::WIDE && column + 4 * LANES <= padded {
            weighted_sum_kernel::<S, R, 4>(s, (padded, column), p, keys.clone(), v, out);
            column += 4 * LANES;
        } else {
            weighted_sum_kernel::<S, R, 1>(s, (padded, column), p, keys.clone(), v, out);
            column += LANES;
        }
    }
}

/// R rows by C vectors of the head, from `column` on.
#[inline(always)]
fn weighted_sum_kernel<S: Simd, const R: usize, const C: usize>(
    s: S,
    (padded, column): (usize, usize),
    p: &[[f32; TILE_KEYS]],
    keys: Range<usize>,
    v: &[f32],
    out: &mut [f32],
) {
    assert!(p.len() == R && out.len() == R * padded && column + C * LANES <= padded);
    assert!(keys.end <= TILE_KEYS && v.len() >= keys.end * padded);
    // SAFETY: rows are under R, keys under the tile's, columns under the head's padded width: asserted just now.
    unsafe {
        // Where vector c of row r stands, in the outputs and in the values alike.
        let at = |r: usize, c: usize| r * padded + column + c * LANES;
        let mut acc = [[s.splat(0.0); C]; R];
        for r in 0..R {
            for c in 0..C {
                acc[r][c] = s.load(out.as_ptr().add(at(r, c)));
            }
        }
        for key in keys {
            let mut values = [s.splat(0.0); C];
            for (c, values) in values.iter_mut().enumerate() {
                *values = s.load(v.as_ptr().add(at(key, c)));
            }
            for r in 0..R {
                let p = s.splat(*p.get_unchecked(r).get_unchecked(key));
                for c in 0..C {
                    acc[r][c] = s.fma(p, values[c], acc[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                s.store(out.as_mut_ptr().add(at(r, c)), acc[r][c]);
            }
        }
    }
}
