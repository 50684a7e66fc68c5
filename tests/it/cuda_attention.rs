//! The attention kernels in the PTX interpreter: against attention in f64, and prefill, decode and shared prefixes against
//! each other, bit for bit.

use crate::cuda_machine::{Machine, Noise, UNMAPPED, assert_near, bytes, module, module_for};
use half::bf16;
use ptx::{Arg, Module, TensorMap};
use std::sync::Arc;

const TILE: u32 = 64;
pub(crate) const SEGMENT: u32 = 1024;
pub(crate) const TO_PARTS: u32 = 1;
pub(crate) const RESUMES: u32 = 2;
pub(crate) const KV_HEADS: u32 = 2;
/// Outputs are rounded to bfloat16 (2^-9 of 1), as are weights of values between -1 and 1.
const TOLERANCE: f64 = 0.01;

/// A sequence: tokens of this step, tokens before them, and blocks that it shares with the first sequence.
#[derive(Clone, Copy)]
pub(crate) struct Seq {
    pub(crate) n: u32,
    pub(crate) first: u32,
    pub(crate) shared: u32,
}

pub(crate) const fn seq(n: u32, first: u32) -> Seq {
    Seq { n, first, shared: 0 }
}

/// A piece of work, as attention.cuh has it.
pub(crate) struct Item {
    pub(crate) kv_head: u32,
    pub(crate) token_start: u32,
    pub(crate) row_start: u32,
    pub(crate) n_rows: u32,
    pub(crate) table_start: u32,
    pub(crate) key_begin: u32,
    pub(crate) key_end: u32,
    pub(crate) flags: u32,
}

impl Item {
    /// Without rows.
    const NONE: Self =
        Self { kv_head: 0, token_start: 0, row_start: 0, n_rows: 0, table_start: 0, key_begin: 0, key_end: 0, flags: 0 };
}

/// One layer in one step.
pub(crate) struct Layer {
    pub(crate) dim: u32,
    group: u32,
    window: u32,
    cap: f32,
    seqs: Vec<Seq>,
    /// Of each sequence: its first token, and where its table starts.
    starts: Vec<(u32, u32)>,
    positions: Vec<u32>,
    tables: Vec<u32>,
    /// `[T][Hq][D]`
    q: Vec<bf16>,
    /// `[n_blocks][Hkv][16][D]`
    k: Vec<bf16>,
    v: Vec<bf16>,
}

impl Layer {
    /// Blocks in reverse order; slots that no token has hold NaN; a table ends with an entry that maps to nothing.
    pub(crate) fn new(dim: u32, group: u32, window: u32, cap: f32, seqs: &[Seq]) -> Self {
        let mut noise = Noise(dim + group);
        let (mut starts, mut positions, mut tables) = (Vec::new(), Vec::new(), Vec::<u32>::new());
        let n_blocks: u32 = seqs.iter().map(|s| (s.first + s.n).div_ceil(16) - s.shared).sum();
        let mut next = n_blocks;
        for seq in seqs {
            starts.push((positions.len() as u32, tables.len() as u32));
            positions.extend(seq.first..seq.first + seq.n);
            for i in 0..(seq.first + seq.n).div_ceil(16) {
                next -= u32::from(i >= seq.shared);
                tables.push(if i < seq.shared { tables[i as usize] } else { next });
            }
            tables.push(UNMAPPED);
        }
        let cells = (n_blocks * KV_HEADS * 16 * dim) as usize;
        let n_q = positions.len() * (KV_HEADS * group * dim) as usize;
        let (k, v) = (vec![bf16::NAN; cells], vec![bf16::NAN; cells]);
        let q = noise.bf16s(n_q);
        let mut layer = Self { dim, group, window, cap, seqs: seqs.to_vec(), starts, positions, tables, q, k, v };
        for (s, seq) in seqs.iter().enumerate() {
            let from = if s == 0 { 0 } else { seq.shared * 16 };
            for (key, head) in (from..seq.first + seq.n).flat_map(|key| (0..KV_HEADS).map(move |head| (key, head))) {
                let at = layer.cell(s, key, head);
                layer.k[at..at + dim as usize].fill_with(|| bf16::from_f32(3.0 * noise.next()));
                layer.v[at..at + dim as usize].fill_with(|| bf16::from_f32(noise.next()));
            }
        }
        layer
    }

    /// Where a key (or value) of a sequence stands.
    fn cell(&self, seq: usize, key: u32, kv_head: u32) -> usize {
        let block = self.tables[(self.starts[seq].1 + key / 16) as usize];
        (((block * KV_HEADS + kv_head) * 16 + key % 16) * self.dim) as usize
    }

    fn first_key(&self, position: u32) -> u32 {
        if self.window == 0 { 0 } else { (position + 1).saturating_sub(self.window) }
    }

    /// Attention in f64, `[T][Hq][D]`.
    fn reference(&self) -> Vec<f64> {
        let dim = self.dim as usize;
        let mut out = Vec::new();
        for (s, seq) in self.seqs.iter().enumerate() {
            for (token, head) in (0..seq.n).flat_map(|i| (0..KV_HEADS * self.group).map(move |head| (self.starts[s].0 + i, head)))
            {
                let q = &self.q[((token * KV_HEADS * self.group + head) * self.dim) as usize..][..dim];
                let position = self.positions[token as usize];
                let cells = (self.first_key(position)..=position).map(|key| self.cell(s, key, head / self.group));
                let cells: Vec<usize> = cells.collect();
                let scores: Vec<f64> = cells.iter().map(|&at| self.score(q, &self.k[at..at + dim])).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..dim).map(|i| {
                    cells.iter().zip(&weights).map(|(&at, weight)| weight * self.v[at + i].to_f64()).sum::<f64>() / total
                }));
            }
        }
        out
    }

    fn score(&self, q: &[bf16], k: &[bf16]) -> f64 {
        let product: f64 = q.iter().zip(k).map(|(q, k)| q.to_f64() * k.to_f64()).sum();
        let (score, cap) = (product / f64::from(self.dim).sqrt(), f64::from(self.cap));
        if cap > 0.0 { cap * (score / cap).tanh() } else { score }
    }

    /// The rows of a sequence, in pieces of at most so many.
    fn pieces(&self, most: u32) -> impl Iterator<Item = (usize, u32, u32)> {
        self.seqs.iter().enumerate().flat_map(move |(s, seq)| {
            let n = seq.n * self.group;
            (0..n).step_by(most as usize).map(move |row| (s, row, most.min(n - row)))
        })
    }

    /// Everything by prefill.
    pub(crate) fn prefill_items(&self, most: u32) -> Vec<Item> {
        let mut items = Vec::new();
        for (s, row_start, n_rows) in self.pieces(most) {
            let position = |row: u32| self.seqs[s].first + row / self.group;
            let key_begin = self.first_key(position(row_start)) / TILE * TILE;
            let key_end = position(row_start + n_rows - 1) + 1;
            let (token_start, table_start) = self.starts[s];
            items.extend((0..KV_HEADS).map(|kv_head| Item {
                kv_head,
                token_start,
                row_start,
                n_rows,
                table_start,
                key_begin,
                key_end,
                flags: 0,
            }));
        }
        items
    }

    /// What decode has to do from key `from` on: an item per segment.
    pub(crate) fn decode_items(&self, from: u32) -> Vec<Item> {
        let mut items = Vec::new();
        for whole in self.prefill_items(16) {
            let mut key_begin = whole.key_begin.max(from);
            while key_begin < whole.key_end {
                let key_end = whole.key_end.min((key_begin / SEGMENT + 1) * SEGMENT);
                let flags = TO_PARTS | if key_begin == from && !from.is_multiple_of(SEGMENT) { RESUMES } else { 0 };
                items.push(Item { key_begin, key_end, flags, ..whole });
                key_begin = key_end;
            }
        }
        items
    }

    /// The prefix that all sequences, of one token each, share: one item per head and segment.
    pub(crate) fn prefix_items(&self, n_keys: u32) -> Vec<Item> {
        let n_rows = self.positions.len() as u32 * self.group;
        let segments = (0..n_keys).step_by(SEGMENT as usize);
        let item = |kv_head, key_begin: u32| Item {
            kv_head,
            token_start: 0,
            row_start: 0,
            n_rows,
            table_start: 0,
            key_begin,
            key_end: n_keys.min(key_begin + SEGMENT),
            flags: TO_PARTS,
        };
        segments.flat_map(|key| (0..KV_HEADS).map(move |head| (head, key))).map(|(head, key)| item(head, key)).collect()
    }
}

/// A layer in the machine's memory.
pub(crate) struct Loaded<'a> {
    layer: &'a Layer,
    pub(crate) machine: Machine,
    out: u64,
    attention: Vec<u8>,
    /// Descriptions of keys and values.
    maps: [Vec<u8>; 2],
    prefill: Arc<Module>,
    prefill_sm90: Arc<Module>,
    decode: Arc<Module>,
    merge: Arc<Module>,
}

impl<'a> Loaded<'a> {
    fn new(layer: &'a Layer) -> Self {
        Self::on(Machine::new(), layer)
    }

    /// On that machine, of which nothing was used yet.
    pub(crate) fn on(mut m: Machine, layer: &'a Layer) -> Self {
        let n_heads = KV_HEADS * layer.group;
        let (mut part_starts, mut n_parts) = (Vec::new(), 0u32);
        for &position in &layer.positions {
            let first = layer.first_key(position) / SEGMENT;
            part_starts.push(n_parts.wrapping_sub(first));
            n_parts += position / SEGMENT - first + 1;
        }
        let out = m.room(2 * layer.q.len());
        let parts = (n_parts * n_heads) as usize;
        let pointers = [
            m.bf16s(&layer.q),
            m.bf16s(&layer.k),
            m.bf16s(&layer.v),
            out,
            m.u32s(&layer.tables),
            m.u32s(&layer.positions),
            m.u32s(&part_starts),
            m.room(parts * layer.dim as usize * 4),
            m.room(parts * 8),
        ];
        let scale = 1.0 / (layer.dim as f32).sqrt();
        let log2_e = std::f32::consts::LOG2_E;
        let floats = [if layer.cap > 0.0 { scale / layer.cap } else { scale * log2_e }, layer.cap * log2_e];
        let mut attention = bytes(pointers.map(u64::to_le_bytes));
        attention.extend(bytes([n_heads, KV_HEADS].map(u32::to_le_bytes)));
        attention.extend(bytes(floats.map(f32::to_le_bytes)));
        // With the padding that the struct has at its end.
        attention.extend(bytes([layer.window, 0].map(u32::to_le_bytes)));
        let columns = u64::from(layer.dim);
        let maps = [pointers[1], pointers[2]].map(|address| {
            let rows = layer.k.len() as u64 / columns;
            let map = TensorMap { address, columns, rows, stride: 2 * columns, box_columns: 64, box_rows: 16 };
            map.encode().unwrap().to_vec()
        });
        let [prefill, decode, merge] = ["prefill", "decode", "merge"].map(module);
        let prefill_sm90 = module_for("prefill_sm90", "compute_90a");
        Self { layer, machine: m, out, attention, maps, prefill, prefill_sm90, decode, merge }
    }

    fn items(&mut self, items: &[Item]) -> u64 {
        let fields = items
            .iter()
            .flat_map(|i| [i.kv_head, i.token_start, i.row_start, i.n_rows, i.table_start, i.key_begin, i.key_end, i.flags]);
        let fields: Vec<u32> = fields.collect();
        self.machine.u32s(&fields)
    }

    fn prefill(&mut self, items: &[Item], n_blocks: u32) {
        let dim = self.layer.dim;
        let tile = 64 * (2 * dim as usize + 16);
        let rows = if dim == 256 { 64 } else { 128 };
        let at = self.items(items);
        let totals = self.machine.room((n_blocks * rows * dim * 4) as usize);
        let states = self.machine.room((n_blocks * 128 * 8) as usize);
        let attention = Arg::Bytes(self.attention.clone());
        let args = [attention, Arg::U64(at), Arg::U32(items.len() as u32), Arg::U64(totals), Arg::U64(states)];
        let shared = if dim == 256 { 3 * tile } else { 2 * tile };
        self.machine.run(&self.prefill, &format!("prefill_{dim}"), ((n_blocks, 1), 256, shared), &args);
    }

    /// Items of prefill or decode by products of warpgroups.
    fn wide(&mut self, items: &[Item], n_blocks: u32) {
        let dim = self.layer.dim;
        let rows = if dim == 256 { 64 } else { 128 };
        let at = self.items(items);
        let totals = self.machine.room((n_blocks * rows * dim * 4) as usize);
        let states = self.machine.room((n_blocks * 128 * 8) as usize);
        let attention = Arg::Bytes(self.attention.clone());
        let mut args = vec![attention, Arg::U64(at), Arg::U32(items.len() as u32), Arg::U64(totals), Arg::U64(states)];
        args.extend(self.maps.clone().map(Arg::Bytes));
        let shared = 2 * dim * (rows + 4 * 64) + 32;
        self.machine.run(&self.prefill_sm90, &format!("prefill_sm90_{dim}"), ((n_blocks, 1), 256, shared as usize), &args);
    }

    fn decode(&mut self, items: &[Item]) {
        let dim = self.layer.dim;
        let row = 2 * dim as usize + 16;
        let at = self.items(items);
        let args = [Arg::Bytes(self.attention.clone()), Arg::U64(at)];
        let shared = 2 * 64 * row + 16 * row + 16 * 72 * 4;
        self.machine.run(&self.decode, &format!("decode_{dim}"), ((items.len() as u32, 1), 128, shared), &args);
    }

    /// Items of prefill, by products of warpgroups or not.
    pub(crate) fn many(&mut self, wide: bool, items: &[Item], n_blocks: u32) {
        if wide { self.wide(items, n_blocks) } else { self.prefill(items, n_blocks) }
    }

    /// Items of decode.
    pub(crate) fn few(&mut self, wide: bool, items: &[Item]) {
        if wide { self.wide(items, items.len() as u32) } else { self.decode(items) }
    }

    pub(crate) fn merge(&mut self) {
        let grid = (self.layer.positions.len() as u32, (KV_HEADS * self.layer.group).div_ceil(4));
        let args = [Arg::Bytes(self.attention.clone()), Arg::U32(self.layer.dim)];
        self.machine.run(&self.merge, "merge_parts", (grid, 128, 0), &args);
    }

    pub(crate) fn out(&mut self) -> Vec<bf16> {
        self.machine.read_bf16s(self.out, self.layer.q.len())
    }
}

/// Sizes of heads that products of warpgroups are for.
pub(crate) const WIDE_DIMS: [u32; 3] = [64, 128, 256];

fn bits(values: Vec<bf16>) -> Vec<u16> {
    values.into_iter().map(bf16::to_bits).collect()
}

/// Prefill is near the reference, decode the same bits, and so, here, are both by products of warpgroups: the interpreter rounds all
/// products alike. Each from the machine's memory as it is at first.
fn check(dim: u32, group: u32, window: u32, cap: f32, seqs: &[Seq]) {
    let layer = Layer::new(dim, group, window, cap, seqs);
    let what = format!("head size {dim}, group {group}, window {window}, cap {cap}");
    let mut loaded = Loaded::new(&layer);
    let mut many = layer.prefill_items(if dim == 256 { 64 } else { 128 });
    // What only fills up a step.
    many.push(Item::NONE);
    // Fewer blocks than items, so that a block takes several.
    let n_blocks = (many.len() as u32 / 2).max(1);
    loaded.prefill(&many, n_blocks);
    let prefilled = loaded.out();
    assert_near(prefilled.iter().map(|x| x.to_f64()), &layer.reference(), 0.0, TOLERANCE, &what);

    let mut loaded = Loaded::new(&layer);
    let mut few = layer.decode_items(0);
    few.insert(1, Item::NONE);
    loaded.decode(&few);
    loaded.merge();
    let prefilled = bits(prefilled);
    assert_eq!(bits(loaded.out()), prefilled, "decode and prefill: {what}");
    if !WIDE_DIMS.contains(&dim) {
        return;
    }
    let mut loaded = Loaded::new(&layer);
    loaded.wide(&many, n_blocks);
    assert_eq!(bits(loaded.out()), prefilled, "prefill by warpgroups: {what}");
    let mut loaded = Loaded::new(&layer);
    loaded.wide(&few, few.len() as u32);
    loaded.merge();
    assert_eq!(bits(loaded.out()), prefilled, "decode by warpgroups: {what}");
}

#[test]
fn groups_and_head_sizes() {
    for group in 1..=8 {
        for dim in [64, 80, 96, 128, 256] {
            check(dim, group, 0, 0.0, &[seq(3, 15), seq(1, 63), seq(1, 64)]);
        }
    }
}

/// Chunks of few tokens, which may have more rows than an item, and of which some see no key of a tile that others see.
#[test]
fn few_query_rows() {
    for (n, group) in (2..=8).zip([8, 1, 4, 3, 2, 5, 8]) {
        check(128, group, 0, 0.0, &[seq(n, 61), seq(n, 0), seq(n, 16)]);
        check(64, group, 20, 0.0, &[seq(n, 60)]);
    }
}

#[test]
fn borders_of_blocks_and_tiles() {
    check(64, 3, 0, 0.0, &[seq(1, 0), seq(1, 15), seq(1, 16), seq(1, 17), seq(1, 63), seq(1, 65), seq(70, 0)]);
}

#[test]
fn windows_and_caps() {
    for dim in [64, 256] {
        check(dim, 2, 50, 0.0, &[seq(2, 100), seq(9, 60)]);
        check(dim, 2, 0, 30.0, &[seq(2, 100), seq(9, 60)]);
    }
}

#[test]
fn segments_are_merged_from_left_to_right() {
    check(64, 2, 0, 0.0, &[seq(3, 1022), seq(1, 2100)]);
    check(64, 2, 1030, 0.0, &[seq(3, 2047)]);
}

/// Up to four sequences of whatever lengths, before and in the step.
#[test]
fn whatever_shapes() {
    let mut noise = Noise(90);
    let mut below = |n: u32| ((noise.next().midpoint(1.0) * n as f32) as u32).min(n - 1);
    for _ in 0..16 {
        let (dim, group) = ([64, 128, 256][below(3) as usize], 1 + below(8));
        let window = if below(2) == 0 { 0 } else { 1 + below(150) };
        let cap = if below(3) == 0 { 20.0 } else { 0.0 };
        let seqs: Vec<Seq> = (0..=below(4)).map(|_| seq(1 + below(40), below(200))).collect();
        check(dim, group, window, cap, &seqs);
    }
}

#[test]
fn a_shared_prefix_changes_no_bit() {
    let shared = 20;
    let seqs = [Seq { n: 1, first: 330, shared: 0 }, Seq { n: 1, first: 341, shared }, Seq { n: 1, first: 400, shared }];
    let layer = Layer::new(64, 2, 0, 0.0, &seqs);
    let mut alone = Loaded::new(&layer);
    alone.decode(&layer.decode_items(0));
    alone.merge();
    let alone = bits(alone.out());
    let n_keys = shared * 16 / TILE * TILE;
    let (prefix, rest) = (layer.prefix_items(n_keys), layer.decode_items(n_keys));
    for wide in [false, true] {
        let mut together = Loaded::new(&layer);
        together.many(wide, &prefix, prefix.len() as u32);
        together.few(wide, &rest);
        together.merge();
        assert_eq!(bits(together.out()), alone, "by warpgroups: {wide}");
    }
}
