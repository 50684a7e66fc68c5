//! Attention in tiles of bfloat16 over keys and values that lie as right operands. See the parent's invariant; what a
//! tile product is, `tile.rs` says. Probabilities are rounded to bfloat16 before they are multiplied with values, and summed
//! before that.

use super::super::buffer::{Aligned, prefetch};
use super::super::simd::{LANES, Simd};
use super::super::tile::{self, Meanwhile, TILE, TILE_CELLS, TILE_K, Target, Tiles};
use super::ahead::{Ahead, Next};
use super::softmax::{rescale, softmax};
use super::{AttentionScratch, ITEM_ROWS, Keys, Rows, Seen, TILE_BLOCKS, TILE_KEYS, ints, padded};
use crate::device::BLOCK_TOKENS;
use std::ops::Range;

/// Bytes of a row of a tile that lies in one piece.
const STRIDE: usize = TILE_K * size_of::<u16>();

/// A worker's memory.
#[derive(Default)]
pub(super) struct Scratch {
    /// The tile's keys where the cache has integers, `[block]` as they lie in it as bfloat16
    pub(super) k: Aligned<u16>,
    /// The tile's values, `[pair of keys][padded head_dim][2]`
    pub(super) v: Aligned<u16>,
    /// `[ITEM_ROWS + 15][padded head_dim]`: a product reads 16 rows from any row on.
    pub(super) q: Aligned<u16>,
    /// Scores, then exponentials, `[2][16][64]`: of some rows, and of those after them
    pub(super) p: Aligned<f32>,
    /// The exponentials rounded, `[16][64]`
    pub(super) weights: Aligned<u16>,
    /// Outputs of a few rows, `[16][padded head_dim]`
    sums: Aligned<f32>,
    /// The values that one row sees, as `v`.
    pub(super) masked: Aligned<u16>,
}

impl Scratch {
    pub(super) fn reserve(&mut self, head_dim: usize) {
        self.k.reserve(TILE_KEYS * padded(head_dim));
        self.v.reserve(TILE_KEYS * padded(head_dim));
        self.q.reserve((ITEM_ROWS + TILE - 1) * padded(head_dim));
        self.p.reserve(2 * TILE * TILE_KEYS);
        self.weights.reserve(TILE * TILE_KEYS);
        self.sums.reserve(TILE * padded(head_dim));
        self.masked.reserve(TILE_KEYS * padded(head_dim));
    }
}

/// Rounds the item's queries.
#[inline(always)]
pub(super) fn load_queries<S: Simd>(s: S, rows: &Rows<'_>, scratch: &mut Scratch) {
    let head_dim = rows.attention.spec.head_dim;
    let width = padded(head_dim);
    for r in 0..rows.len() {
        prefetch(rows.query(r));
    }
    for r in 0..rows.len() {
        for (i, x) in rows.query(r).chunks(LANES).enumerate() {
            let mut values = [0.0; LANES];
            let x = if let Ok(x) = <&[f32; LANES]>::try_from(x) {
                x
            } else {
                values[..x.len()].copy_from_slice(x);
                &values
            };
            let out = &mut scratch.q[r * width + i * LANES..][..LANES];
            // SAFETY: both have 16 elements.
            unsafe { s.round_bf16(x.as_ptr(), out.as_mut_ptr()) };
        }
        if head_dim.div_ceil(LANES) % 2 == 1 {
            scratch.q[(r + 1) * width - LANES..][..LANES].fill(0);
        }
    }
}

/// Folds a tile's keys into some rows.
#[inline(always)]
pub(super) fn fold<S: Simd>(s: S, rows: &Rows<'_>, range: Range<usize>, keys: &Keys<'_>, scratch: &mut AttentionScratch) {
    let spec = rows.attention.spec;
    // Decoding. With more rows a tile takes so long that its loads do not matter.
    let next = if range.len() < TILE { keys.next } else { Next::default() };
    // A piece with each block of values, each product of tiles, and each half of the softmax.
    let mut ahead = Ahead::new(rows.attention.cache, next, TILE_BLOCKS + 4 * padded(spec.head_dim) / TILE_K + 2);
    load_keys(s, rows, keys, &mut scratch.tiles.k);
    let healthy = load_values(s, rows, keys, &mut scratch.tiles.v, &mut ahead);
    // The next rows' scores are asked of the unit before these rows' exponentials are made: the unit and the lanes work side by side.
    let mut before: Option<Group> = None;
    for row in range.clone().step_by(TILE) {
        let n = TILE.min(range.end - row);
        let mut seen = [Seen::default(); TILE];
        for (r, seen) in seen[..n].iter_mut().enumerate() {
            *seen = rows.seen(row + r, keys.start);
        }
        if seen[..n].iter().any(Seen::any) {
            let end = seen[..n].iter().fold(0, |end, seen| end.max(seen.end));
            let group = Group { row, n, seen, end, place: before.as_ref().map_or(0, |before| TILE * TILE_KEYS - before.place) };
            let Scratch { k, q, p, .. } = &mut scratch.tiles;
            let blocks = &keys.blocks[..end.div_ceil(BLOCK_TOKENS)];
            scores(s, rows, (blocks, k), &q[row * padded(spec.head_dim)..], (&mut p[group.place..], n), &mut ahead);
            if let Some(before) = before.replace(group) {
                fold_group(s, rows, &before, (healthy, &mut ahead), scratch);
            }
        }
    }
    if let Some(last) = before {
        fold_group(s, rows, &last, (healthy, &mut ahead), scratch);
    }
    ahead.rest();
}

/// Some rows, what they see of a tile, and where their scores are.
struct Group {
    row: usize,
    n: usize,
    /// The first `n`.
    seen: [Seen; TILE],
    /// The most that one of them sees.
    end: usize,
    place: usize,
}

/// Makes a tile's keys ready, if they do not lie in the cache as they are taken.
#[inline(always)]
pub(super) fn load_keys<S: Simd>(s: S, rows: &Rows<'_>, keys: &Keys<'_>, k: &mut [u16]) {
    if rows.attention.cache.layout.ints {
        ints::load_pair_keys(s, rows, keys, k);
    }
}

/// Where the keys of a block of a tile, the `b`-th, are.
#[inline(always)]
pub(super) fn keys_of(rows: &Rows<'_>, k: &[u16], b: usize, block: u32) -> *const u16 {
    let cache = rows.attention.cache;
    if cache.layout.ints {
        let n_cells = padded(rows.attention.spec.head_dim) * BLOCK_TOKENS;
        return k[b * n_cells..][..n_cells].as_ptr();
    }
    cache.keys(block, rows.item.kv_head as usize).as_ptr()
}

/// Copies a tile's values, with zeros after those of its last key; says whether all are numbers.
#[inline(always)]
pub(super) fn load_values<S: Simd>(s: S, rows: &Rows<'_>, keys: &Keys<'_>, v: &mut [u16], ahead: &mut Ahead<'_>) -> bool {
    let (width, cache) = (padded(rows.attention.spec.head_dim), rows.attention.cache);
    if cache.layout.ints {
        return ints::load_pair_values(s, rows, keys, &mut v[..TILE_KEYS * width]);
    }
    let n_cells = keys.n.next_multiple_of(2) * width;
    let mut most = 0;
    for (b, &block) in keys.blocks.iter().enumerate() {
        ahead.piece();
        let from = cache.values(block, rows.item.kv_head as usize);
        let (start, end) = (b * BLOCK_TOKENS * width, n_cells.min((b + 1) * BLOCK_TOKENS * width));
        let (to, from) = (&mut v[start..end], &from[..end - start]);
        // A plain loop: an iterator's `fold` would not be compiled for the instructions that are there.
        for i in 0..to.len() {
            to[i] = from[i];
            most = most.max(from[i] & 0x7fff);
        }
    }
    v[n_cells..TILE_KEYS * width].fill(0);
    if keys.n % 2 == 1 {
        // What the last pair's other slot holds may never have been written.
        most = 0;
        for i in 0..n_cells - 2 * width {
            most = most.max(v[i] & 0x7fff);
        }
        for pair in v[n_cells - 2 * width..n_cells].chunks_exact_mut(2) {
            most = most.max(pair[0] & 0x7fff);
            pair[1] = 0;
        }
    }
    most < 0x7f80
}

/// Folds the loaded tile into rows whose scores are there.
#[inline(always)]
fn fold_group<S: Simd>(
    s: S,
    rows: &Rows<'_>,
    group: &Group,
    (healthy, ahead): (bool, &mut Ahead<'_>),
    scratch: &mut AttentionScratch,
) {
    let AttentionScratch { tiles: Scratch { v, p, weights, sums, masked, .. }, out, largest, sum, .. } = scratch;
    let spec = rows.attention.spec;
    let width = padded(spec.head_dim);
    let (row, end, seen) = (group.row, group.end, &group.seen[..group.n]);
    let p = &mut p[group.place..];
    ahead.piece();
    let state = (&mut largest[row..][..seen.len()], &mut sum[row * LANES..][..seen.len() * LANES]);
    let decay = softmax(s, spec, seen, (p, weights), state);
    ahead.piece();
    let out = &mut out[row * width..][..seen.len() * width];
    rescale(s, seen, &decay, width, out);
    if !healthy {
        masked_sums(s, rows, (weights, v), seen, (out, sums, masked));
    } else if seen.len() == TILE {
        weighted_sum(s, rows, (weights, v), end, (out, TILE), ahead);
    } else {
        // A unit writes 16 rows; the rows after these are others'.
        sums[..out.len()].copy_from_slice(out);
        weighted_sum(s, rows, (weights, v), end, (sums, seen.len()), ahead);
        out.copy_from_slice(&sums[..out.len()]);
    }
}

/// Scores of `n_rows` rows against the keys of some blocks, to `p`, `[16][64]`. `q` begins with the first row.
#[inline(always)]
fn scores<S: Simd>(
    s: S,
    rows: &Rows<'_>,
    (blocks, k): (&[u32], &[u16]),
    q: &[u16],
    (p, n_rows): (&mut [f32], usize),
    meanwhile: &mut impl Meanwhile,
) {
    let width = padded(rows.attention.spec.head_dim);
    assert!(q.len() >= TILE * width && p.len() >= TILE * TILE_KEYS);
    let a = Tiles { start: [q.as_ptr()], stride: width * size_of::<u16>(), step: STRIDE };
    for (pair, blocks) in blocks.chunks(2).enumerate() {
        let keys = |i: usize| {
            let i = i.min(blocks.len() - 1);
            keys_of(rows, k, 2 * pair + i, blocks[i])
        };
        let b = Tiles { start: [keys(0), keys(1)], stride: STRIDE, step: TILE_CELLS * size_of::<u16>() };
        let p = &mut p[pair * 2 * BLOCK_TOKENS..];
        let target = Target { start: p.as_mut_ptr(), stride: TILE_KEYS, n_rows, add: false };
        // SAFETY: a head's keys in a block are `width / 32` tiles, as are 16 queries; `p` has 16 rows of 64.
        unsafe { tile::multiply::<_, 1, false>(s, rows.attention.isa.unit(), (&a, &b), width / TILE_K, target, meanwhile) };
    }
}

/// Adds the weighted values of a tile's first `end` keys to outputs, `[rows][padded head_dim]`.
#[inline(always)]
fn weighted_sum<S: Simd>(
    s: S,
    rows: &Rows<'_>,
    (weights, v): (&[u16], &[u16]),
    end: usize,
    (out, n_rows): (&mut [f32], usize),
    meanwhile: &mut impl Meanwhile,
) {
    let width = padded(rows.attention.spec.head_dim);
    // Bytes of a pair of keys.
    let stride = 2 * width * size_of::<u16>();
    assert!(weights.len() >= TILE * TILE_KEYS && v.len() >= TILE_KEYS * width);
    let a = Tiles { start: [weights.as_ptr()], stride: TILE_KEYS * size_of::<u16>(), step: STRIDE };
    for column in (0..width).step_by(2 * TILE) {
        let v = v[2 * column..].as_ptr();
        let b = Tiles { start: [v, v.wrapping_add(2 * TILE)], stride, step: TILE * stride };
        assert!(out.len() >= (TILE - 1) * width + column + 2 * TILE);
        let target = Target { start: out[column..].as_mut_ptr(), stride: width, n_rows, add: true };
        // SAFETY: weights and values hold 64 keys, of which the tiles of the first `end` are read; `out` has 16 rows.
        unsafe { tile::multiply::<_, 1, false>(s, rows.attention.isa.unit(), (&a, &b), end.div_ceil(TILE_K), target, meanwhile) };
    }
}

/// [`weighted_sum`] where a value is no number, which 0 would not silence: each row by itself, with zeros for the values
/// that it does not see.
#[inline(always)]
fn masked_sums<S: Simd>(
    s: S,
    rows: &Rows<'_>,
    (weights, v): (&[u16], &[u16]),
    seen: &[Seen],
    (out, sums, masked): (&mut [f32], &mut [f32], &mut [u16]),
) {
    let width = padded(rows.attention.spec.head_dim);
    for (r, seen) in seen.iter().enumerate().filter(|(_, seen)| seen.any()) {
        mask_values(width, v, *seen, masked);
        sums[r * width..][..width].copy_from_slice(&out[r * width..][..width]);
        weighted_sum(s, rows, (weights, masked), seen.end, (sums, TILE), &mut ());
        out[r * width..][..width].copy_from_slice(&sums[r * width..][..width]);
    }
}

/// Copies a tile's values, with zeros for those that are not seen.
pub(super) fn mask_values(width: usize, v: &[u16], seen: Seen, masked: &mut [u16]) {
    masked[..TILE_KEYS * width].copy_from_slice(&v[..TILE_KEYS * width]);
    for key in (0..TILE_KEYS).filter(|key| !(seen.first..seen.end).contains(key)) {
        let pair = &mut masked[key / 2 * 2 * width..][..2 * width];
        pair.iter_mut().skip(key % 2).step_by(2).for_each(|cell| *cell = 0);
    }
}
