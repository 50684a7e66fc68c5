//! Causal attention over the paged cache, prefill and decode rows alike. Knows nothing of weights or of how a step was
//! put together.
//!
//! Invariant: a row (one query of one head) is a left fold over tiles of 64 keys at absolute positions, each tile one
//! fixed sequence of operations on (largest score, sum of 16 lanes, output). Rows that share a load of keys, the chunk a
//! token came in, and the thread change nothing. Masked keys enter neither score nor sum, and their values, which may
//! never have been written, are not multiplied.

use super::buffer::Aligned;
use super::cache::Cache;
use super::isa::{Isa, per_isa};
use super::quant::ActWriter;
use super::simd::{LANES, Simd};
use super::team::Team;
use crate::device::batch::{Batch, BatchSeq};
use crate::device::{AttentionSpec, BLOCK_TOKENS};

/// Keys of a tile: one step of the fold. Part of the fingerprint: another value gives other bits.
pub(super) const TILE_KEYS: usize = 64;
/// Blocks of a tile.
const TILE_BLOCKS: usize = TILE_KEYS / BLOCK_TOKENS;
/// Rows of a work item: enough that turning a tile's halves into floats costs little, few enough to stay in the cache.
const ITEM_ROWS: usize = 48;
/// Rows that a kernel takes at once.
const GROUP: usize = 6;

const _: () = assert!(BLOCK_TOKENS == LANES, "a block's slots are the lanes of a vector");

/// The attention of one layer in one step.
pub(super) struct Attention<'a> {
    pub(super) isa: Isa,
    pub(super) spec: &'a AttentionSpec,
    pub(super) batch: &'a Batch,
    pub(super) cache: &'a Cache,
    /// `[tokens][q heads, k heads, v heads]`
    pub(super) qkv: &'a [f32],
    pub(super) qkv_width: usize,
    /// Where outputs go, `[tokens, n_heads · head_dim]`.
    pub(super) act: ActWriter<'a>,
}

/// Rows of one sequence and one key/value head: row r is query token r / group, head r % group of the heads that share
/// these keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    seq: u32,
    kv_head: u32,
    row_start: u32,
    n_rows: u32,
}

/// A worker's memory for attention.
#[derive(Default)]
pub(super) struct AttentionScratch {
    /// The tile's keys, `[block][head_dim][16]`
    k: Aligned<f32>,
    /// The tile's values, `[64][padded head_dim]`
    v: Aligned<f32>,
    /// `[ITEM_ROWS][head_dim]`
    q: Aligned<f32>,
    /// `[ITEM_ROWS][padded head_dim]`
    out: Aligned<f32>,
    /// Largest score so far, `[ITEM_ROWS]`
    largest: Aligned<f32>,
    /// Sums of exponentials, `[ITEM_ROWS][16]`
    sum: Aligned<f32>,
}

impl AttentionScratch {
    pub(super) fn reserve(&mut self, head_dim: usize) {
        let padded = head_dim.next_multiple_of(LANES);
        self.k.reserve(TILE_KEYS * head_dim);
        self.v.reserve(TILE_KEYS * padded);
        self.q.reserve(ITEM_ROWS * head_dim);
        self.out.reserve(ITEM_ROWS * padded);
        self.largest.reserve(ITEM_ROWS);
        self.sum.reserve(ITEM_ROWS * LANES);
    }
}

/// Most items that a step of `max_tokens` tokens makes: as many as if each were a sequence of its own.
pub(super) fn max_items(spec: &AttentionSpec, max_tokens: usize) -> usize {
    max_tokens * spec.n_kv_heads * (spec.n_heads / spec.n_kv_heads).div_ceil(ITEM_ROWS)
}

/// Computes the attention of all tokens. `items` is the caller's memory for the work list.
pub(super) fn attend(team: &Team, attention: &Attention<'_>, items: &mut Vec<Item>) {
    let Attention { spec, batch, act, .. } = attention;
    let group = spec.n_heads / spec.n_kv_heads;
    items.clear();
    for (s, seq) in batch.seqs.iter().enumerate() {
        let n_rows = seq.n_tokens as usize * group;
        for kv_head in 0..spec.n_kv_heads as u32 {
            for row in (0..n_rows).step_by(ITEM_ROWS) {
                let n_rows = ITEM_ROWS.min(n_rows - row) as u32;
                items.push(Item { seq: s as u32, kv_head, row_start: row as u32, n_rows });
            }
        }
    }
    team.run(items.len(), &|scratch, i| run_item(attention.isa, attention, items[i], &mut scratch.attention));
    if !act.takes(spec.head_dim) {
        let width = spec.n_heads * spec.head_dim;
        team.run_rows(batch.tokens.len(), &|_, tokens| {
            for token in tokens {
                // SAFETY: each token is in one range, and all items are done.
                unsafe { act.seal(token, 0, width) };
            }
        });
    }
}

per_isa! {
    /// Computes one item.
    fn run_item(attention: &Attention<'_>, item: Item, scratch: &mut AttentionScratch) = item_body;
}

#[inline(always)]
fn item_body<S: Simd>(s: S, attention: &Attention<'_>, item: Item, scratch: &mut AttentionScratch) {
    let Attention { spec, batch, .. } = *attention;
    let group = spec.n_heads / spec.n_kv_heads;
    let seq = &batch.seqs[item.seq as usize];
    let (row_start, n_rows) = (item.row_start as usize, item.n_rows as usize);
    let first_head = item.kv_head as usize * group;
    let place = |r: usize| (seq.token_start as usize + (row_start + r) / group, first_head + (row_start + r) % group);
    let position = |r: usize| seq.first_position as usize + (row_start + r) / group;

    scratch.reserve(spec.head_dim);
    for r in 0..n_rows {
        let (token, head) = place(r);
        let q = &attention.qkv[token * attention.qkv_width + head * spec.head_dim..][..spec.head_dim];
        scratch.q[r * spec.head_dim..][..spec.head_dim].copy_from_slice(q);
    }
    scratch.out[..n_rows * spec.head_dim.next_multiple_of(LANES)].fill(0.0);
    scratch.sum[..n_rows * LANES].fill(0.0);
    scratch.largest[..n_rows].fill(f32::NEG_INFINITY);

    // The first key that a position sees.
    let first_key = |position: usize| spec.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let n_keys = position(n_rows - 1) + 1;
    for start in (first_key(position(0)) / TILE_KEYS * TILE_KEYS..n_keys).step_by(TILE_KEYS) {
        let tile_keys = TILE_KEYS.min(n_keys - start);
        load_tile(s, attention, seq, (item.kv_head as usize, start, tile_keys), scratch);
        for row in (0..n_rows).step_by(GROUP) {
            let rows = GROUP.min(n_rows - row);
            let mut seen = [Seen::default(); GROUP];
            for (r, seen) in seen[..rows].iter_mut().enumerate() {
                let position = position(row + r);
                seen.first = first_key(position).saturating_sub(start).min(TILE_KEYS);
                seen.end = (position + 1).saturating_sub(start).min(TILE_KEYS);
            }
            if seen[..rows].iter().any(Seen::any) {
                fold_tile(s, spec, row, &seen[..rows], scratch);
            }
        }
    }
    for r in 0..n_rows {
        write_row(s, attention, place(r), r, scratch);
    }
}

/// The keys of a tile that a row sees: `first..end`.
#[derive(Clone, Copy, Default)]
struct Seen {
    first: usize,
    end: usize,
}

impl Seen {
    /// Whether there are any.
    fn any(&self) -> bool {
        self.first < self.end
    }
}

/// Turns a tile's keys and its first `n_keys` values into floats.
#[inline(always)]
fn load_tile<S: Simd>(
    s: S,
    attention: &Attention<'_>,
    seq: &BatchSeq,
    (kv_head, start, n_keys): (usize, usize, usize),
    scratch: &mut AttentionScratch,
) {
    let head_dim = attention.spec.head_dim;
    let padded = head_dim.next_multiple_of(LANES);
    let table = &attention.batch.block_table(seq)[start / BLOCK_TOKENS..];
    for (b, &block) in table[..n_keys.div_ceil(BLOCK_TOKENS)].iter().enumerate() {
        let out = &mut scratch.k[b * BLOCK_TOKENS * head_dim..][..BLOCK_TOKENS * head_dim];
        for (out, k) in out.chunks_exact_mut(LANES).zip(attention.cache.keys(block, kv_head).chunks_exact(LANES)) {
            // SAFETY: both chunks have 16 elements.
            unsafe { s.store(out.as_mut_ptr(), s.load_f16(k.as_ptr())) };
        }
        let n_slots = BLOCK_TOKENS.min(n_keys - b * BLOCK_TOKENS);
        let out = &mut scratch.v[b * BLOCK_TOKENS * padded..][..n_slots * padded];
        for (out, v) in out.chunks_exact_mut(padded).zip(attention.cache.values(block, kv_head).chunks_exact(head_dim)) {
            for (out, v) in out.chunks_exact_mut(LANES).zip(v.chunks(LANES)) {
                let mut halves = [0; LANES];
                halves[..v.len()].copy_from_slice(v);
                // SAFETY: both have 16 elements.
                unsafe { s.store(out.as_mut_ptr(), s.load_f16(halves.as_ptr())) };
            }
        }
    }
}

/// Folds the loaded tile into rows `row..`, of which row r sees the keys `seen[r]` (both ends not decreasing).
#[inline(always)]
fn fold_tile<S: Simd>(s: S, spec: &AttentionSpec, row: usize, seen: &[Seen], scratch: &mut AttentionScratch) {
    let n_blocks = seen[seen.len() - 1].end.div_ceil(BLOCK_TOKENS);
    let mut p = [[0.0; TILE_KEYS]; GROUP];
    let q = &scratch.q[row * spec.head_dim..][..seen.len() * spec.head_dim];
    scores(s, spec.head_dim, q, &scratch.k, n_blocks, &mut p[..seen.len()]);
    let padded = spec.head_dim.next_multiple_of(LANES);
    for (r, &seen) in seen.iter().enumerate().filter(|(_, seen)| seen.any()) {
        let sum = &mut scratch.sum[(row + r) * LANES..][..LANES];
        let decay = softmax_step(s, spec, seen, &mut p[r], &mut scratch.largest[row + r], sum);
        let out = &mut scratch.out[(row + r) * padded..][..padded];
        for out in out.chunks_exact_mut(LANES) {
            // SAFETY: a chunk has 16 elements.
            unsafe { s.store(out.as_mut_ptr(), s.mul(s.load(out.as_ptr()), s.splat(decay))) };
        }
    }
    let out = &mut scratch.out[row * padded..][..seen.len() * padded];
    // What all rows see is added for all at once, the rest row by row: each row's sum runs over its keys in order.
    let windowed = seen[seen.len() - 1].first > 0;
    let common = if windowed { 0 } else { seen[0].end };
    if common > 0 {
        weighted_sum(s, padded, &p[..seen.len()], 0..common, &scratch.v, out);
    }
    for (r, seen) in seen.iter().enumerate().filter(|(_, seen)| seen.any() && seen.end > common) {
        weighted_sum(s, padded, &p[r..=r], seen.first.max(common)..seen.end, &scratch.v, &mut out[r * padded..][..padded]);
    }
}

/// Turns a row's scores of a tile into exponentials over the keys it sees (0 for the rest), updates the largest score and
/// the sums, and gives the factor for what was summed before.
#[inline(always)]
fn softmax_step<S: Simd>(
    s: S,
    spec: &AttentionSpec,
    seen: Seen,
    p: &mut [f32; TILE_KEYS],
    largest: &mut f32,
    sum: &mut [f32],
) -> f32 {
    assert_eq!(sum.len(), LANES);
    let minus_infinity = s.splat(f32::NEG_INFINITY);
    let zero = s.splat(0.0);
    // SAFETY: p is 4 vectors and sum is one.
    unsafe {
        let mut x = [minus_infinity; TILE_BLOCKS];
        for (b, x) in x.iter_mut().enumerate() {
            let mut score = s.mul(s.load(p.as_ptr().add(b * LANES)), s.splat(spec.scale));
            if let Some(cap) = spec.soft_cap {
                score = s.soft_cap(score, cap);
            }
            *x = s.first(seen.end.saturating_sub(b * LANES), score, minus_infinity);
            if seen.first > 0 {
                *x = s.first(seen.first.saturating_sub(b * LANES), minus_infinity, *x);
            }
        }
        let here = s.largest(s.max(s.max(x[0], x[1]), s.max(x[2], x[3])));
        let before = *largest;
        *largest = if here > before { here } else { before };
        let most = s.splat(*largest);
        let mut decay = [0.0; LANES];
        s.store(decay.as_mut_ptr(), s.exp(s.sub(s.splat(before), most)));
        let mut e = [zero; TILE_BLOCKS];
        for (b, e) in e.iter_mut().enumerate() {
            *e = s.first(seen.end.saturating_sub(b * LANES), s.exp(s.sub(x[b], most)), zero);
            if seen.first > 0 {
                *e = s.first(seen.first.saturating_sub(b * LANES), zero, *e);
            }
            s.store(p.as_mut_ptr().add(b * LANES), *e);
        }
        let total = s.add(s.add(e[0], e[1]), s.add(e[2], e[3]));
        s.store(sum.as_mut_ptr(), s.fma(s.load(sum.as_ptr()), s.splat(decay[0]), total));
        decay[0]
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
fn weighted_sum<S: Simd>(s: S, padded: usize, p: &[[f32; TILE_KEYS]], keys: std::ops::Range<usize>, v: &[f32], out: &mut [f32]) {
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
    keys: std::ops::Range<usize>,
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
    keys: std::ops::Range<usize>,
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

/// Divides a row's output by its sum and writes it.
#[inline(always)]
fn write_row<S: Simd>(s: S, attention: &Attention<'_>, (token, head): (usize, usize), r: usize, scratch: &AttentionScratch) {
    let Attention { spec, act, .. } = attention;
    let head_dim = spec.head_dim;
    // SAFETY: `sum` has 16 lanes per row, and each (token, head) belongs to one item.
    let (sum, out) =
        unsafe { (s.sum(s.load(scratch.sum[r * LANES..][..LANES].as_ptr())), act.values(token, head * head_dim, head_dim)) };
    let inverse = 1.0 / sum;
    let row = &scratch.out[r * head_dim.next_multiple_of(LANES)..][..head_dim];
    out.iter_mut().zip(row).for_each(|(out, x)| *out = x * inverse);
    if act.takes(head_dim) {
        // SAFETY: each (token, head) belongs to one item.
        unsafe { act.seal(token, head * head_dim, head_dim) };
    }
}
