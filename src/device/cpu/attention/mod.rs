//! Causal attention over the paged cache, prefill and decode rows alike. Knows nothing of weights or of how a step was
//! put together.
//!
//! Invariant: a row (one query of one head) is a left fold over tiles of 64 keys at absolute positions, each tile one
//! fixed sequence of operations on (largest score, sum of 16 lanes, output). Rows that share a load of keys, the chunk a
//! token came in, and the thread change nothing. Masked keys enter neither score nor sum, and their values, which may
//! never have been written, are not multiplied.

mod ahead;
mod ints;
mod lanes;
mod pairs;
mod softmax;
mod tiles;

use super::buffer::Aligned;
use super::cache::Cache;
use super::isa::{Isa, per_isa};
use super::numerics::Numerics;
use super::quant::ActWriter;
use super::simd::{LANES, Simd};
use super::team::Team;
use crate::device::batch::{Batch, BatchSeq};
use crate::device::{AttentionSpec, BLOCK_TOKENS};
use ahead::Next;
use std::ops::Range;

/// Keys of a tile: one step of the fold. Part of the fingerprint: another value gives other bits.
pub(super) const TILE_KEYS: usize = 64;
/// Blocks of a tile.
const TILE_BLOCKS: usize = TILE_KEYS / BLOCK_TOKENS;
/// Rows of a work item: enough that making a tile ready costs little, few enough to stay in the cache.
const ITEM_ROWS: usize = 96;

const _: () = assert!(BLOCK_TOKENS == LANES, "a block's slots are the lanes of a vector");

/// The attention of one layer in one step.
pub(super) struct Attention<'a> {
    pub(super) isa: Isa,
    pub(super) numerics: Numerics,
    pub(super) spec: &'a AttentionSpec,
    pub(super) batch: &'a Batch,
    pub(super) cache: &'a Cache,
    /// `[tokens][q heads, k heads, v heads]`
    pub(super) qkv: &'a [f32],
    pub(super) qkv_width: usize,
    /// Where outputs go, `[tokens, n_heads · head_dim]`.
    pub(super) act: ActWriter<'a>,
}

/// Rows of one key/value head: some of one sequence, or all of several that decode. Row r of a sequence is query token
/// r / group, head r % group of the heads that share these keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    kv_head: u32,
    /// The first sequence.
    seq: u32,
    n_seqs: u32,
    /// The first row; 0 where there are several sequences.
    row_start: u32,
    n_rows: u32,
    /// Tiles at the beginning whose blocks all sequences share: they are folded into all rows at once.
    n_shared: u32,
}

/// A worker's memory for attention.
#[derive(Default)]
pub(super) struct AttentionScratch {
    lanes: lanes::Scratch,
    tiles: tiles::Scratch,
    /// `[ITEM_ROWS][padded head_dim]`
    out: Aligned<f32>,
    /// Largest score so far, `[ITEM_ROWS]`
    largest: Aligned<f32>,
    /// Sums of exponentials, `[ITEM_ROWS][16]`
    sum: Aligned<f32>,
}

impl AttentionScratch {
    pub(super) fn reserve(&mut self, numerics: Numerics, head_dim: usize) {
        if numerics.has_bf16_cache() {
            self.tiles.reserve(head_dim);
        } else {
            self.lanes.reserve(head_dim);
        }
        self.out.reserve(ITEM_ROWS * padded(head_dim));
        self.largest.reserve(ITEM_ROWS);
        self.sum.reserve(ITEM_ROWS * LANES);
    }
}

/// Elements of a row of outputs in tiles (in lanes they are fewer): whole tiles.
fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(2 * LANES)
}

/// Most items that a step of `max_tokens` tokens makes: as many as if each were a sequence of its own.
pub(super) fn max_items(spec: &AttentionSpec, max_tokens: usize) -> usize {
    max_tokens * spec.n_kv_heads * (spec.n_heads / spec.n_kv_heads).div_ceil(ITEM_ROWS)
}

/// Computes the attention of all tokens. `items` is the caller's memory for the work list.
pub(super) fn attend(team: &Team, attention: &Attention<'_>, items: &mut Vec<Item>) {
    let Attention { spec, batch, act, .. } = attention;
    list_items(attention, team.n_threads(), items);
    let run = |scratch: &mut super::Scratch, i: usize| {
        run_item(attention.isa, attention, (items[i], items.get(i + 1)), &mut scratch.attention);
    };
    team.run(items.len(), &run);
    if !act.takes(spec.head_dim) {
        let width = spec.n_heads * spec.head_dim;
        // Each token is in one range, and all items are done.
        team.run_rows(batch.tokens.len(), &|_, tokens| seal_rows(attention.isa, act, tokens, width));
    }
}

/// Makes the work list. Heads are outermost, so that what sequences share stays in the cache from one to the next.
fn list_items(attention: &Attention<'_>, n_threads: usize, items: &mut Vec<Item>) {
    let Attention { spec, batch, .. } = attention;
    let group = spec.n_heads / spec.n_kv_heads;
    let n_decoding = batch.seqs.iter().filter(|seq| seq.n_tokens == 1).count();
    // As many as an item holds, but several items for every thread.
    let most_seqs = (n_decoding * spec.n_kv_heads / (8 * n_threads)).min(ITEM_ROWS / group).max(1);
    items.clear();
    let mut s = 0;
    while s < batch.seqs.len() {
        let (n_seqs, n_shared) = decoding_group(attention, &batch.seqs[s..], most_seqs);
        let n_rows = (n_seqs * batch.seqs[s].n_tokens as usize) * group;
        for row in (0..n_rows).step_by(ITEM_ROWS) {
            let n_rows = ITEM_ROWS.min(n_rows - row) as u32;
            let (seq, n_seqs, n_shared) = (s as u32, n_seqs as u32, n_shared as u32);
            items.push(Item { kv_head: 0, seq, n_seqs, row_start: row as u32, n_rows, n_shared });
        }
        s += n_seqs;
    }
    let n_of_head = items.len();
    for kv_head in 1..spec.n_kv_heads as u32 {
        items.extend_from_within(..n_of_head);
        items[kv_head as usize * n_of_head..].iter_mut().for_each(|item| item.kv_head = kv_head);
    }
}

/// How many of the sequences, from the first on, make one item, and the tiles they share. Only such as decode go together,
/// and none joins that would halve what is shared.
fn decoding_group(attention: &Attention<'_>, seqs: &[BatchSeq], most: usize) -> (usize, usize) {
    let decodes = |seq: &&BatchSeq| seq.n_tokens == 1;
    let candidates = seqs.iter().take(most).take_while(decodes).count();
    let mut shared = None;
    for n in 1..candidates {
        let tiles = if attention.spec.window.is_none() { shared_tiles(attention.batch, &seqs[0], &seqs[n]) } else { 0 };
        if shared.is_some_and(|shared| tiles < shared / 2 || (shared == 0 && tiles > 0)) {
            return (n, shared.unwrap_or(0));
        }
        shared = Some(shared.map_or(tiles, |shared: usize| shared.min(tiles)));
    }
    (candidates.max(1), shared.unwrap_or(0))
}

/// Tiles at the beginning of two sequences that lie in the same blocks and that both see whole.
fn shared_tiles(batch: &Batch, a: &BatchSeq, b: &BatchSeq) -> usize {
    let blocks = batch.block_table(a).iter().zip(batch.block_table(b)).take_while(|(a, b)| a == b).count();
    (blocks / TILE_BLOCKS).min(a.first_position.min(b.first_position) as usize / TILE_KEYS)
}

/// The rows of an item.
struct Rows<'a> {
    attention: &'a Attention<'a>,
    item: Item,
    /// Heads that share keys.
    group: usize,
    /// Where each row's token is in its sequence.
    positions: [u32; ITEM_ROWS],
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn new(attention: &'a Attention<'a>, item: Item) -> Self {
        let group = attention.spec.n_heads / attention.spec.n_kv_heads;
        let mut rows = Rows { attention, item, group, positions: [0; ITEM_ROWS] };
        for r in 0..rows.len() {
            let (seq, row) = rows.of_seq(r);
            rows.positions[r] = seq.first_position + (row / group) as u32;
        }
        rows
    }

    fn len(&self) -> usize {
        self.item.n_rows as usize
    }

    /// A row's sequence, and which of that sequence's rows it is.
    fn of_seq(&self, r: usize) -> (&'a BatchSeq, usize) {
        let seqs = &self.attention.batch.seqs[self.item.seq as usize..];
        if self.item.n_seqs == 1 { (&seqs[0], self.item.row_start as usize + r) } else { (&seqs[r / self.group], r % self.group) }
    }

    /// Token of the step, and head.
    fn place(&self, r: usize) -> (usize, usize) {
        let (seq, row) = self.of_seq(r);
        (seq.token_start as usize + row / self.group, self.item.kv_head as usize * self.group + row % self.group)
    }

    /// Position in the sequence.
    fn position(&self, r: usize) -> usize {
        self.positions[r] as usize
    }

    /// The first key that a row sees.
    fn first_key(&self, r: usize) -> usize {
        self.attention.spec.window.map_or(0, |window| (self.position(r) + 1).saturating_sub(window))
    }

    /// The keys that a row sees of the tile that begins at `start`.
    #[inline(always)]
    fn seen(&self, r: usize, start: usize) -> Seen {
        Seen {
            first: self.first_key(r).saturating_sub(start).min(TILE_KEYS),
            end: (self.position(r) + 1).saturating_sub(start).min(TILE_KEYS),
        }
    }

    /// A row's query, `[head_dim]`.
    fn query(&self, r: usize) -> &[f32] {
        let (token, head) = self.place(r);
        let head_dim = self.attention.spec.head_dim;
        &self.attention.qkv[token * self.attention.qkv_width + head * head_dim..][..head_dim]
    }

    /// Where the first tile begins that a row sees.
    fn first_tile(&self, r: usize) -> usize {
        self.first_key(r) / TILE_KEYS * TILE_KEYS
    }

    /// A tile's keys, as those rows see them: all of one sequence, or sharing these blocks.
    fn keys(&self, rows: Range<usize>, start: usize, next: Next<'a>) -> Keys<'a> {
        let end = (self.position(rows.end - 1) + 1).min(start + TILE_KEYS);
        let (seq, _) = self.of_seq(rows.start);
        let table = &self.attention.batch.block_table(seq)[start / BLOCK_TOKENS..];
        let n = end - start;
        Keys { start, n, blocks: &table[..n.div_ceil(BLOCK_TOKENS)], next }
    }

    /// The tile of a row's sequence that begins at `start`.
    fn tile(&self, r: usize, start: usize) -> Next<'a> {
        let table = &self.attention.batch.block_table(self.of_seq(r).0)[start / BLOCK_TOKENS..];
        Next { blocks: &table[..TILE_BLOCKS.min(table.len())], kv_head: self.item.kv_head }
    }
}

/// The keys of a tile that somebody sees.
struct Keys<'a> {
    /// Position of the first.
    start: usize,
    n: usize,
    /// Where they are.
    blocks: &'a [u32],
    /// What this thread folds after it, as far as one can tell.
    next: Next<'a>,
}

per_isa! {
    /// Computes one item; the other comes after it.
    fn run_item(attention: &Attention<'_>, items: (Item, Option<&Item>), scratch: &mut AttentionScratch) = item_body;
}

#[inline(always)]
fn item_body<S: Simd>(s: S, attention: &Attention<'_>, (item, after): (Item, Option<&Item>), scratch: &mut AttentionScratch) {
    let spec = attention.spec;
    let rows = Rows::new(attention, item);
    scratch.reserve(attention.numerics, spec.head_dim);
    scratch.out[..rows.len() * padded(spec.head_dim)].fill(0.0);
    scratch.sum[..rows.len() * LANES].fill(0.0);
    scratch.largest[..rows.len()].fill(f32::NEG_INFINITY);
    if attention.numerics == Numerics::Bf16 {
        attention.isa.unit().prepare();
    }
    if attention.numerics.has_bf16_cache() {
        tiles::load_queries(s, &rows, &mut scratch.tiles);
    } else {
        lanes::load_queries(&rows, &mut scratch.lanes);
    }
    let shared_end = item.n_shared as usize * TILE_KEYS;
    let first = rows.tile(0, rows.first_tile(0).max(shared_end));
    fold_tiles(s, &rows, 0..rows.len(), (0..shared_end, first), scratch);
    let rows_per_seq = rows.len() / item.n_seqs as usize;
    for seq in 0..item.n_seqs as usize {
        let range = seq * rows_per_seq..(seq + 1) * rows_per_seq;
        let start = rows.first_tile(range.start).max(shared_end);
        let end = rows.position(range.end - 1) + 1;
        let next = if range.end < rows.len() {
            rows.tile(range.end, rows.first_tile(range.end).max(shared_end))
        } else {
            after.map_or(Next::default(), |&item| first_of(attention, item))
        };
        fold_tiles(s, &rows, range, (start..end, next), scratch);
    }
    for r in 0..rows.len() {
        write_row(s, attention, rows.place(r), r, scratch);
    }
}

/// The first tile of an item.
fn first_of<'a>(attention: &'a Attention<'a>, item: Item) -> Next<'a> {
    let group = attention.spec.n_heads / attention.spec.n_kv_heads;
    let rows = Rows { attention, item, group, positions: [0; ITEM_ROWS] };
    let (seq, row) = rows.of_seq(0);
    let position = seq.first_position as usize + row / group;
    let first_key = attention.spec.window.map_or(0, |window| (position + 1).saturating_sub(window));
    rows.tile(0, first_key / TILE_KEYS * TILE_KEYS)
}

/// Folds the tiles that begin at `starts` into some rows; `next` comes after them.
#[inline(always)]
fn fold_tiles<'a, S: Simd>(
    s: S,
    rows: &Rows<'a>,
    range: Range<usize>,
    (starts, next): (Range<usize>, Next<'a>),
    scratch: &mut AttentionScratch,
) {
    let end = starts.end;
    for start in starts.step_by(TILE_KEYS) {
        let next = if start + TILE_KEYS < end { rows.tile(range.start, start + TILE_KEYS) } else { next };
        let keys = rows.keys(range.clone(), start, next);
        match rows.attention.numerics {
            Numerics::Bf16 => tiles::fold(s, rows, range.clone(), &keys, scratch),
            Numerics::Int8Bf16 => pairs::fold(s, rows, range.clone(), &keys, scratch),
            Numerics::Int8 | Numerics::F32 => lanes::fold(s, rows, range.clone(), &keys, scratch),
        }
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

    /// Whether all keys of the tile are among them.
    fn all(&self) -> bool {
        self.first == 0 && self.end == TILE_KEYS
    }
}

/// Divides a row's output by its sum and writes it.
#[inline(always)]
fn write_row<S: Simd>(s: S, attention: &Attention<'_>, (token, head): (usize, usize), r: usize, scratch: &mut AttentionScratch) {
    let Attention { spec, act, .. } = attention;
    let head_dim = spec.head_dim;
    // SAFETY: `sum` has 16 lanes per row.
    let inverse = 1.0 / unsafe { s.sum(s.load(scratch.sum[r * LANES..][..LANES].as_ptr())) };
    let width = if attention.numerics.has_bf16_cache() { padded(head_dim) } else { lanes::padded(head_dim) };
    let row = &mut scratch.out[r * width..][..head_dim];
    for x in row.iter_mut() {
        *x *= inverse;
    }
    // SAFETY: each (token, head) belongs to one item.
    unsafe { act.write(s, token, head * head_dim, row) };
}

per_isa! {
    /// Seals tokens whose values are all written; nobody else may touch them.
    fn seal_rows(act: &ActWriter<'_>, tokens: Range<usize>, width: usize) = seal_rows_body;
}

#[inline(always)]
fn seal_rows_body<S: Simd>(s: S, act: &ActWriter<'_>, tokens: Range<usize>, width: usize) {
    for token in tokens {
        // SAFETY: the caller's promise.
        unsafe { act.seal(s, token, 0, width) };
    }
}
