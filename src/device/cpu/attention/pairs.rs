//! Attention in dot products of pairs of bfloat16 (`dots.rs`) over keys and values as in `tiles.rs`. See the parent's
//! invariant. Probabilities are rounded to bfloat16 before they are multiplied with values, and summed before that.

use super::super::dots::{self, COLUMNS, Left, Right, Target};
use super::super::simd::{LANES, Simd};
use super::ahead::{Ahead, Next};
use super::softmax::{rescale, softmax};
use super::tiles::{Scratch, keys_of, load_keys, load_values, mask_values};
use super::{AttentionScratch, Keys, Rows, Seen, TILE_BLOCKS, TILE_KEYS, padded};
use crate::device::BLOCK_TOKENS;
use std::ops::Range;

/// Rows that are folded at once: whole kernels.
const GROUP: usize = 2 * dots::ROWS;

const _: () = assert!(GROUP <= LANES, "softmax takes as many");

/// Where a tile's values are.
#[derive(Clone, Copy)]
enum Values<'a> {
    /// In the cache: all rows see all keys.
    Cached,
    /// Copied; so many keys of them.
    Copied(&'a [u16], usize),
}

/// Folds a tile's keys into some rows.
#[inline(always)]
pub(super) fn fold<S: Simd>(s: S, rows: &Rows<'_>, range: Range<usize>, keys: &Keys<'_>, scratch: &mut AttentionScratch) {
    // Decoding. With more rows a tile takes so long that its loads do not matter.
    let next = if range.len() < GROUP { keys.next } else { Next::default() };
    let mut ahead = Ahead::new(rows.attention.cache, next, 4);
    load_keys(s, rows, keys, &mut scratch.tiles.k);
    // Integers are never taken as they are.
    let mut all = !rows.attention.cache.layout.ints;
    for row in range.clone() {
        all &= rows.seen(row, keys.start).all();
    }
    let healthy = all || load_values(s, rows, keys, &mut scratch.tiles.v, &mut ahead);
    for row in range.clone().step_by(GROUP) {
        let n = GROUP.min(range.end - row);
        let mut seen = [Seen::default(); GROUP];
        for (r, seen) in seen[..n].iter_mut().enumerate() {
            *seen = rows.seen(row + r, keys.start);
        }
        if seen[..n].iter().any(Seen::any) {
            fold_group(s, rows, (row, keys), &seen[..n], ((all, healthy), &mut ahead), scratch);
        }
    }
    ahead.rest();
}

/// Folds a tile into rows `row..`, of which row r sees the keys `seen[r]`.
#[inline(always)]
fn fold_group<S: Simd>(
    s: S,
    rows: &Rows<'_>,
    (row, keys): (usize, &Keys<'_>),
    seen: &[Seen],
    ((all, healthy), ahead): ((bool, bool), &mut Ahead<'_>),
    scratch: &mut AttentionScratch,
) {
    let AttentionScratch { tiles: Scratch { k, v, q, p, weights, masked, .. }, out, largest, sum, .. } = scratch;
    let spec = rows.attention.spec;
    let width = padded(spec.head_dim);
    let end = seen.iter().fold(0, |end, seen| end.max(seen.end));
    ahead.piece();
    scores(s, rows, (&keys.blocks[..end.div_ceil(BLOCK_TOKENS)], k), &q[row * width..], p, seen.len());
    ahead.piece();
    let state = (&mut largest[row..][..seen.len()], &mut sum[row * LANES..][..seen.len() * LANES]);
    let decay = softmax(s, spec, seen, (p, weights), state);
    ahead.piece();
    let out = &mut out[row * width..][..seen.len() * width];
    rescale(s, seen, &decay, width, out);
    if healthy {
        let values = if all { Values::Cached } else { Values::Copied(v, end) };
        weighted_sum(s, rows, keys, (weights, values), out);
        return;
    }
    // A value is no number, which 0 would not silence: each row by itself, with zeros for the values that it does not see.
    for (r, seen) in seen.iter().enumerate().filter(|(_, seen)| seen.any()) {
        mask_values(width, v, *seen, masked);
        let (weights, values) = (&weights[r * TILE_KEYS..][..TILE_KEYS], Values::Copied(masked, seen.end));
        weighted_sum(s, rows, keys, (weights, values), &mut out[r * width..][..width]);
    }
}

/// Scores of `n_rows` rows against the keys of some blocks, to `p`, `[n_rows][64]`. `q` begins with the first row.
#[inline(always)]
fn scores<S: Simd>(s: S, rows: &Rows<'_>, (blocks, k): (&[u32], &[u16]), q: &[u16], p: &mut [f32], n_rows: usize) {
    let width = padded(rows.attention.spec.head_dim);
    assert!(q.len() >= n_rows * width && p.len() >= n_rows * TILE_KEYS && blocks.len() <= TILE_BLOCKS);
    let mut keys = [std::ptr::null(); TILE_BLOCKS];
    for (b, (key, &block)) in keys.iter_mut().zip(blocks).enumerate() {
        *key = keys_of(rows, k, b, block);
    }
    let left = Left { start: q.as_ptr(), stride: width };
    let (n, step) = (width / 2, 2 * LANES);
    let target = Target { start: p.as_mut_ptr(), stride: TILE_KEYS, add: false };
    // SAFETY: a head's keys in a block are `width / 2` vectors of pairs; `q` has `n_rows` rows of as many pairs, `p` rows of
    // four vectors.
    unsafe {
        match blocks.len() {
            1 => dots::multiply(s, left, n_rows, Right { pieces: &[[keys[0]]], n, step }, target),
            2 => dots::multiply(s, left, n_rows, Right { pieces: &[[keys[0], keys[1]]], n, step }, target),
            3 => dots::multiply(s, left, n_rows, Right { pieces: &[[keys[0], keys[1], keys[2]]], n, step }, target),
            _ => dots::multiply(s, left, n_rows, Right { pieces: &[keys], n, step }, target),
        }
    }
}

/// Adds weighted values to outputs, `[rows][padded head_dim]`.
#[inline(always)]
fn weighted_sum<S: Simd>(s: S, rows: &Rows<'_>, keys: &Keys<'_>, (weights, values): (&[u16], Values<'_>), out: &mut [f32]) {
    let width = padded(rows.attention.spec.head_dim);
    let n_rows = out.len() / width;
    assert!(weights.len() >= n_rows * TILE_KEYS);
    let mut pieces = [std::ptr::null(); TILE_BLOCKS];
    let (n_pieces, n) = match values {
        Values::Cached => {
            assert_eq!(keys.blocks.len(), TILE_BLOCKS);
            for (piece, &block) in pieces.iter_mut().zip(keys.blocks) {
                *piece = rows.attention.cache.values(block, rows.item.kv_head as usize).as_ptr();
            }
            (TILE_BLOCKS, BLOCK_TOKENS / 2)
        }
        Values::Copied(v, end) => {
            assert!(end <= TILE_KEYS && v.len() >= TILE_KEYS * width);
            pieces[0] = v.as_ptr();
            (1, end.div_ceil(2))
        }
    };
    let left = Left { start: weights.as_ptr(), stride: TILE_KEYS };
    let mut column = 0;
    while column < width {
        let target = Target { start: out[column..].as_mut_ptr(), stride: width, add: true };
        // SAFETY: each piece holds `n` pairs of keys' values, `width` columns of them; weights are 32 pairs a row.
        unsafe {
            if column + COLUMNS * LANES <= width {
                let pieces = pieces.map(|piece| columns_of::<COLUMNS>(piece, column));
                dots::multiply(s, left, n_rows, Right { pieces: &pieces[..n_pieces], n, step: 2 * width }, target);
                column += COLUMNS * LANES;
            } else {
                let pieces = pieces.map(|piece| columns_of::<2>(piece, column));
                dots::multiply(s, left, n_rows, Right { pieces: &pieces[..n_pieces], n, step: 2 * width }, target);
                column += 2 * LANES;
            }
        }
    }
}

/// The vectors of a piece from a column on.
#[inline(always)]
fn columns_of<const C: usize>(piece: *const u16, column: usize) -> [*const u16; C] {
    std::array::from_fn(|c| piece.wrapping_add(2 * (column + c * LANES)))
}
