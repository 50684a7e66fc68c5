//! The work of attention in a step, as the kernels take it: which rows see which keys, by which kernel. Pure: no GPU.
//!
//! Invariant: every query head of every token of the step gets its output exactly once, whatever kernel gives it; the kernels fold
//! the same tiles and segments alike, so nothing here changes a bit.

use super::graphs::Form;
use super::kernels::{SEGMENT, TILE};
use crate::device::BLOCK_TOKENS;
use crate::device::batch::{Batch, BatchSeq};

/// What is not there: a token without parts.
pub(super) const UNMAPPED: u32 = u32::MAX;
/// Rows of an item of the decode kernel.
const DECODE_ROWS: u32 = 16;
/// Sequences share the reading of a prefix of at least so many tiles.
const MIN_SHARED_TILES: u32 = 2;
const BLOCKS_OF_TILE: u32 = TILE / BLOCK_TOKENS as u32;
/// The states of an item's rows go to parts, which are merged later.
pub(super) const TO_PARTS: u32 = 1;
/// An item goes on from the state that stands in a part.
pub(super) const RESUMES: u32 = 2;

/// Words of an [`Item`].
pub(super) const ITEM_WORDS: usize = 8;

/// A piece of work (`kernels/attention.cuh`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) kv_head: u32,
    pub(super) token_start: u32,
    pub(super) row_start: u32,
    pub(super) n_rows: u32,
    pub(super) table_start: u32,
    pub(super) key_begin: u32,
    pub(super) key_end: u32,
    pub(super) flags: u32,
}

impl Item {
    /// Without rows: nothing is done.
    const NONE: Self =
        Self { kv_head: 0, token_start: 0, row_start: 0, n_rows: 0, table_start: 0, key_begin: 0, key_end: 0, flags: 0 };

    /// As it stands in memory.
    pub(super) fn words(&self) -> [u32; ITEM_WORDS] {
        let Self { kv_head, token_start, row_start, n_rows, table_start, key_begin, key_end, flags } = *self;
        [kv_head, token_start, row_start, n_rows, table_start, key_begin, key_end, flags]
    }
}

/// The attention that work is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attended {
    /// Query heads of a key/value head.
    pub(super) group: u32,
    pub(super) n_kv_heads: u32,
    /// Rows of an item of the prefill kernel.
    pub(super) prefill_rows: u32,
    /// Positions that a token sees, its own included; 0: all before it.
    pub(super) window: u32,
    /// Parts that there is memory for.
    pub(super) max_parts: u32,
}

impl Attended {
    fn first_key(&self, position: u32) -> u32 {
        if self.window == 0 { 0 } else { (position + 1).saturating_sub(self.window) }
    }

    /// The first segment that a token sees something of, and how many it does.
    fn segments(&self, position: u32) -> (u32, u32) {
        let first = self.first_key(position) / SEGMENT;
        (first, position / SEGMENT + 1 - first)
    }

    /// Parts that a token takes: with a window, one may have to be left out for each.
    fn parts(&self, position: u32) -> u32 {
        self.segments(position).1 + u32::from(self.window != 0)
    }

    /// Most items of a step, by kernel: prefill, decode.
    pub(super) fn max_items(&self, max_tokens: usize, max_seqs: usize) -> (usize, usize) {
        let (tokens, heads, parts) = (max_tokens, self.n_kv_heads as usize, self.max_parts as usize);
        let prefill = tokens * self.group as usize / self.prefill_rows as usize + max_seqs + parts;
        (heads * prefill, heads * (max_seqs + parts))
    }
}

/// The work of one step, for one window.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Chunks, and shared prefixes.
    pub(super) prefill: Vec<Item>,
    /// Few rows.
    pub(super) decode: Vec<Item>,
    /// Per token, where its parts start, less its first segment; [`UNMAPPED`] if it has none.
    pub(super) part_starts: Vec<u32>,
    /// Parts in use.
    pub(super) n_parts: u32,
    /// Whether the merge is launched: there are parts, or there may be in steps of that form.
    pub(super) merges: bool,
    /// Most items, by kernel.
    most: (usize, usize),
}

impl Work {
    /// Memory for steps of that size.
    pub(super) fn reserve(&mut self, attended: &Attended, max_tokens: usize, max_seqs: usize) {
        self.most = attended.max_items(max_tokens, max_seqs);
        self.prefill.reserve(self.most.0);
        self.decode.reserve(self.most.1);
        self.part_starts.reserve(max_tokens);
    }

    /// Makes the work of a step.
    pub(super) fn plan(&mut self, attended: &Attended, batch: &Batch) {
        self.prefill.clear();
        self.decode.clear();
        self.part_starts.clear();
        self.part_starts.resize(batch.tokens.len(), UNMAPPED);
        self.n_parts = 0;
        let mut seqs = &batch.seqs[..];
        while let Some(seq) = seqs.first() {
            let (n_seqs, n_tiles) = self.sharers(attended, batch, seqs);
            if n_seqs > 1 {
                self.share(attended, &seqs[..n_seqs], n_tiles * TILE);
            } else if seq.n_tokens * attended.group > DECODE_ROWS || !self.decode(attended, seq, 0) {
                self.chunk(attended, seq);
            }
            seqs = &seqs[n_seqs..];
        }
        // A device is not kept waiting by what begins last.
        self.prefill.sort_by_key(|item| std::cmp::Reverse(item.key_end - item.key_begin));
        self.merges = self.n_parts > 0;
    }

    /// Fills lists up to what steps of that form have: with tokens without parts, and items without rows.
    pub(super) fn fill_up(&mut self, form: &Form) {
        self.part_starts.resize(form.rows, UNMAPPED);
        self.prefill.resize(form.prefill.min(self.most.0), Item::NONE);
        self.decode.resize(form.decode.min(self.most.1), Item::NONE);
        self.merges = form.merges;
    }

    /// Calls with items alike for all key/value heads.
    fn push(items: &mut Vec<Item>, attended: &Attended, item: Item) {
        items.extend((0..attended.n_kv_heads).map(|kv_head| Item { kv_head, ..item }));
    }

    /// How many of the first sequences draw a token each after a prefix that they have in common, and tiles of it. Whoever
    /// shares, shares as much as the first two do.
    fn sharers(&self, attended: &Attended, batch: &Batch, seqs: &[BatchSeq]) -> (usize, u32) {
        let fits =
            |seq: &BatchSeq| seq.n_tokens == 1 && attended.group <= DECODE_ROWS && attended.first_key(seq.first_position) == 0;
        let first = &seqs[0];
        if !fits(first) {
            return (1, 0);
        }
        let mut n_parts = self.n_parts + attended.parts(first.first_position);
        let (mut n_seqs, mut n_tiles) = (1, u32::MAX);
        for seq in &seqs[1..] {
            if !fits(seq) {
                break;
            }
            let tables = batch.block_table(first).iter().zip(batch.block_table(seq));
            let n_blocks = tables.take_while(|(a, b)| a == b).count() as u32;
            // Before the tokens' own.
            let n_keys = (n_blocks / BLOCKS_OF_TILE * TILE).min(first.first_position).min(seq.first_position);
            let shared = n_keys / TILE;
            n_parts += attended.parts(seq.first_position);
            if shared < MIN_SHARED_TILES || (n_seqs > 1 && shared < n_tiles) || n_parts > attended.max_parts {
                break;
            }
            n_tiles = n_tiles.min(shared);
            n_seqs += 1;
        }
        (n_seqs, n_tiles)
    }

    /// Sequences of one token each read `n_keys` keys together, then each its own.
    fn share(&mut self, attended: &Attended, seqs: &[BatchSeq], n_keys: u32) {
        let n_rows = seqs.len() as u32 * attended.group;
        for row_start in (0..n_rows).step_by(attended.prefill_rows as usize) {
            for key_begin in (0..n_keys).step_by(SEGMENT as usize) {
                let item = Item {
                    kv_head: 0,
                    token_start: seqs[0].token_start,
                    row_start,
                    n_rows: attended.prefill_rows.min(n_rows - row_start),
                    table_start: seqs[0].table_start,
                    key_begin,
                    key_end: n_keys.min(key_begin + SEGMENT),
                    flags: TO_PARTS,
                };
                Self::push(&mut self.prefill, attended, item);
            }
        }
        for seq in seqs {
            let has_parts = self.decode(attended, seq, n_keys);
            assert!(has_parts, "they were counted");
        }
    }

    /// A sequence of few rows, from key `from` on (which parts hold the keys before). False if there are too few parts.
    fn decode(&mut self, attended: &Attended, seq: &BatchSeq, from: u32) -> bool {
        let key_end = seq.first_position + seq.n_tokens;
        let key_start = from.max(attended.first_key(seq.first_position) / TILE * TILE);
        let is_whole = from == 0 && key_start / SEGMENT == (key_end - 1) / SEGMENT;
        if !is_whole {
            let positions = seq.first_position..key_end;
            let n_parts: u32 = positions.clone().map(|position| attended.parts(position)).sum();
            if self.n_parts + n_parts > attended.max_parts {
                return false;
            }
            for (token, position) in (seq.token_start..).zip(positions) {
                let (first, n) = attended.segments(position);
                // The start that would say that there are none.
                self.n_parts += u32::from(self.n_parts.wrapping_sub(first) == UNMAPPED);
                self.part_starts[token as usize] = self.n_parts.wrapping_sub(first);
                self.n_parts += n;
            }
        }
        let mut key_begin = key_start;
        while key_begin < key_end {
            let segment_end = (key_begin / SEGMENT + 1) * SEGMENT;
            let resumes = from > 0 && key_begin == from && !from.is_multiple_of(SEGMENT);
            let flags = if is_whole { 0 } else { TO_PARTS | if resumes { RESUMES } else { 0 } };
            let item = Item {
                kv_head: 0,
                token_start: seq.token_start,
                row_start: 0,
                n_rows: seq.n_tokens * attended.group,
                table_start: seq.table_start,
                key_begin,
                key_end: key_end.min(segment_end),
                flags,
            };
            Self::push(&mut self.decode, attended, item);
            key_begin = item.key_end;
        }
        true
    }

    /// A sequence by the prefill kernel.
    fn chunk(&mut self, attended: &Attended, seq: &BatchSeq) {
        let n_rows = seq.n_tokens * attended.group;
        for row_start in (0..n_rows).step_by(attended.prefill_rows as usize) {
            let rows = attended.prefill_rows.min(n_rows - row_start);
            let position = |row: u32| seq.first_position + row / attended.group;
            let item = Item {
                kv_head: 0,
                token_start: seq.token_start,
                row_start,
                n_rows: rows,
                table_start: seq.table_start,
                key_begin: attended.first_key(position(row_start)) / TILE * TILE,
                key_end: position(row_start + rows - 1) + 1,
                flags: 0,
            };
            Self::push(&mut self.prefill, attended, item);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// A sequence: tokens of the step, tokens before them, blocks in common with the one before it.
    type Seq = (u32, u32, u32);

    fn batch(seqs: &[Seq]) -> Batch {
        let (mut batch, mut n_blocks) = (Batch::default(), 0);
        for &(n_tokens, first_position, shared) in seqs {
            let (token_start, table_start) = (batch.tokens.len() as u32, batch.block_tables.len() as u32);
            let before = batch.seqs.last().map_or(Vec::new(), |seq| batch.block_table(seq).to_vec());
            let n = (first_position + n_tokens).div_ceil(BLOCK_TOKENS as u32);
            batch.block_tables.extend_from_slice(&before[..shared as usize]);
            batch.block_tables.extend((shared..n).map(|i| n_blocks + i - shared));
            n_blocks += n - shared;
            batch.seqs.push(BatchSeq { token_start, n_tokens, first_position, table_start, n_blocks: n });
            batch.tokens.extend((0..n_tokens).map(|_| 0));
            batch.positions.extend(first_position..first_position + n_tokens);
        }
        batch
    }

    /// Where a row's item begins and ends, whether it resumes, leaves a part, and is of the decode kernel.
    type Piece = (u32, u32, u32, bool);

    /// Every row's keys are taken once and in order, from its own blocks; every part is one row's.
    fn check(attended: &Attended, seqs: &[Seq]) -> Work {
        let (batch, mut work) = (batch(seqs), Work::default());
        work.plan(attended, &batch);
        let mut parts = BTreeSet::new();
        for seq in &batch.seqs {
            for (token, position) in (seq.token_start..).zip(seq.first_position..seq.first_position + seq.n_tokens) {
                let start = work.part_starts[token as usize];
                let (first, n) = attended.segments(position);
                if start != UNMAPPED {
                    for segment in first..first + n {
                        let part = start.wrapping_add(segment);
                        assert!(part < attended.max_parts.min(work.n_parts) && parts.insert(part), "part {part}");
                    }
                }
                for (kv_head, row) in (0..attended.n_kv_heads).flat_map(|head| (0..attended.group).map(move |row| (head, row))) {
                    let pieces = pieces(attended, &batch, &work, seq, (token, kv_head, row));
                    check_row(attended, position, start != UNMAPPED, &pieces);
                }
            }
        }
        assert!(work.n_parts <= attended.max_parts);
        work
    }

    fn pieces(
        attended: &Attended,
        batch: &Batch,
        work: &Work,
        seq: &BatchSeq,
        (token, kv_head, row): (u32, u32, u32),
    ) -> Vec<Piece> {
        let mut found = Vec::new();
        for (item, is_decode) in work.prefill.iter().map(|i| (i, false)).chain(work.decode.iter().map(|i| (i, true))) {
            let rows = item.row_start..item.row_start + item.n_rows;
            let Some(at) = token.checked_sub(item.token_start).map(|t| t * attended.group + row) else { continue };
            if item.kv_head != kv_head || !rows.contains(&at) {
                continue;
            }
            assert!(!is_decode || item.n_rows <= DECODE_ROWS);
            assert!(item.n_rows <= attended.prefill_rows && item.key_begin < item.key_end && item.key_begin.is_multiple_of(TILE));
            for key in (item.key_begin..item.key_end).step_by(BLOCK_TOKENS) {
                let block = key / BLOCK_TOKENS as u32;
                let theirs = batch.block_tables[(item.table_start + block) as usize];
                assert_eq!(theirs, batch.block_table(seq)[block as usize], "another sequence's keys");
            }
            found.push((item.key_begin, item.key_end, item.flags, is_decode));
        }
        found.sort_unstable();
        found
    }

    fn check_row(attended: &Attended, position: u32, has_parts: bool, pieces: &[Piece]) {
        let (first, last) = (pieces[0].0, pieces[pieces.len() - 1].1);
        assert!(first <= attended.first_key(position) && last > position, "keys {first} to {last} of position {position}");
        if !has_parts {
            assert!(pieces.len() == 1 && pieces[0].2 == 0, "{pieces:?}");
            // The decode kernel merges nothing.
            assert!(!pieces[0].3 || first / SEGMENT == (last - 1) / SEGMENT);
            return;
        }
        for (i, &(begin, end, flags, is_decode)) in pieces.iter().enumerate() {
            assert!(flags & TO_PARTS != 0 && begin / SEGMENT == (end - 1) / SEGMENT, "{pieces:?}");
            let goes_on = i > 0 && !begin.is_multiple_of(SEGMENT);
            assert_eq!(flags & RESUMES != 0, goes_on, "{pieces:?}");
            assert!(i == 0 || pieces[i - 1].1 == begin, "{pieces:?}");
            assert!(!goes_on || (is_decode && !pieces[i - 1].3), "what is gone on with was launched before: {pieces:?}");
        }
    }

    fn attended(group: u32, window: u32, max_parts: u32) -> Attended {
        Attended { group, n_kv_heads: 2, prefill_rows: 128, window, max_parts }
    }

    #[test]
    fn every_row_sees_its_keys_once() {
        for group in [1, 3, 4, 8, 20] {
            for window in [0, 1, 50, 1500] {
                for max_parts in [0, 3, 100] {
                    let of = attended(group, window, max_parts);
                    check(&of, &[(1, 0, 0), (5, 0, 0), (1, 1023, 0), (1, 1024, 0), (2, 2047, 0), (200, 1000, 0), (1, 63, 0)]);
                    check(&of, &[(1, 700, 0), (1, 710, 40), (1, 690, 40), (1, 3000, 12), (1, 3001, 180), (7, 300, 8)]);
                }
            }
        }
    }

    #[test]
    fn neighbours_read_a_prefix_together() {
        let seqs = [(1, 700, 0), (1, 710, 40), (1, 690, 41), (1, 100, 3)];
        let work = check(&attended(4, 0, 100), &seqs);
        let shared: Vec<_> = work.prefill.iter().map(|item| (item.n_rows, item.key_begin, item.key_end)).collect();
        assert_eq!(shared, [(12, 0, 640); 2], "of three sequences, for both heads");
        // With a window that some have outgrown, each for itself.
        assert!(check(&attended(4, 600, 100), &seqs).prefill.is_empty());
        // So without memory for parts.
        assert!(check(&attended(4, 0, 1), &seqs).prefill.is_empty());
    }
}
