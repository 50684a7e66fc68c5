//! The paged key/value cache of one layer, in IEEE halves, bfloat16 or integers, and rotary embeddings. Knows nothing of
//! attention.
//! Invariant: what a slot holds is a function of its token's k and v and its position; storing touches that slot only.

use super::buffer::{Aligned, Shared, prefetch_far};
use super::isa::per_isa;
use super::numerics::{Kv, Numerics};
use super::quant;
use super::simd::{LANES, Simd};
use super::tile::TILE_K;
use crate::device::batch::BlockCopy;
use crate::device::{AttentionSpec, BLOCK_TOKENS, RopeStyle};
use std::ops::Range;

/// One layer's cache. A block is, for each key/value head, its keys, then its values. As IEEE halves: keys
/// `[head_dim][16 slots]` (so that 16 keys are the lanes of a vector), values `[16 slots][head_dim]`. As bfloat16, both are
/// right operands of tile products: keys `[padded head_dim / 2][16 slots][2]`, values `[8 pairs of slots][padded head_dim][2]`;
/// a key's padding is 0. As integers they lie as halves do, with a scale for each key and each value of a head, made of its
/// own elements alone: x ≈ scale · q with scale = amax / 127.
pub struct Cache {
    /// Floats; none where there are integers.
    cells: Aligned<u16>,
    /// −127 to 127.
    ints: Aligned<i8>,
    /// `[blocks][n_kv_heads]`, of each the keys' `[16 slots]`, then the values'.
    scales: Aligned<f32>,
    pub(super) layout: Layout,
}

/// One head's keys or values in a block.
#[derive(Clone, Copy)]
pub(super) struct Ints<'a> {
    /// `[head_dim][16 slots]` of keys, `[16 slots][head_dim]` of values.
    pub(super) q: &'a [i8],
    /// Of each slot.
    pub(super) scales: &'a [f32; BLOCK_TOKENS],
}

/// Where things are in a cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) n_kv_heads: usize,
    pub(super) head_dim: usize,
    /// Elements that a head takes: whole tiles.
    pub(super) padded: usize,
    /// Whether it holds bfloat16.
    pub(super) tiles: bool,
    /// Whether it holds integers.
    pub(super) ints: bool,
}

impl Layout {
    pub(super) fn new(numerics: Numerics, kv: Kv, spec: &AttentionSpec) -> Self {
        let ints = kv == Kv::Int8;
        let tiles = numerics.has_bf16_cache() && !ints;
        let padded = if tiles { spec.head_dim.next_multiple_of(TILE_K) } else { spec.head_dim };
        Self { n_kv_heads: spec.n_kv_heads, head_dim: spec.head_dim, padded, tiles, ints }
    }

    /// Bytes of a block.
    pub(super) fn block_bytes(self) -> usize {
        if self.ints {
            self.block_cells() * size_of::<i8>() + self.block_scales() * size_of::<f32>()
        } else {
            self.block_cells() * size_of::<u16>()
        }
    }

    /// Scales of a block, where there are integers.
    fn block_scales(self) -> usize {
        2 * self.n_kv_heads * BLOCK_TOKENS
    }

    /// The scale of the first key of a head in a block; those of the values come after those of the keys.
    #[inline(always)]
    fn scales(self, block: u32, kv_head: usize) -> usize {
        block as usize * self.block_scales() + 2 * kv_head * BLOCK_TOKENS
    }

    /// Cells of one head's keys (or values) in a block.
    #[inline(always)]
    fn head_cells(self) -> usize {
        self.padded * BLOCK_TOKENS
    }

    /// Bytes of one head's keys and values in a block.
    #[inline(always)]
    pub(super) fn head_bytes(self) -> usize {
        2 * self.head_cells() * if self.ints { size_of::<i8>() } else { size_of::<u16>() }
    }

    /// Cells of a block.
    fn block_cells(self) -> usize {
        2 * self.n_kv_heads * self.head_cells()
    }

    /// The first cell of a head's keys in a block.
    #[inline(always)]
    fn keys(self, block: u32, kv_head: usize) -> usize {
        block as usize * self.block_cells() + 2 * kv_head * self.head_cells()
    }

    /// The first cell of a head's values in a block.
    #[inline(always)]
    fn values(self, block: u32, kv_head: usize) -> usize {
        self.keys(block, kv_head) + self.head_cells()
    }

    /// Among a head's cells, where element `i` of a slot's key stands.
    #[inline(always)]
    fn key(self, slot: usize, i: usize) -> usize {
        if self.tiles { i / 2 * 2 * BLOCK_TOKENS + 2 * slot + i % 2 } else { i * BLOCK_TOKENS + slot }
    }

    /// Among a head's cells, where element `i` of a slot's value stands.
    #[inline(always)]
    fn value(self, slot: usize, i: usize) -> usize {
        if self.tiles { slot / 2 * 2 * self.padded + 2 * i + slot % 2 } else { slot * self.padded + i }
    }
}

impl Cache {
    pub(super) fn new(layout: Layout, n_blocks: usize) -> Self {
        let n_cells = n_blocks * layout.block_cells();
        let (n_ints, n_scales) = if layout.ints { (n_cells, n_blocks * layout.block_scales()) } else { (0, 0) };
        let cells = Aligned::zeroed(n_cells - n_ints);
        Self { cells, ints: Aligned::zeroed(n_ints), scales: Aligned::zeroed(n_scales), layout }
    }

    /// Lets its pages, none of which was touched yet, go round some nodes of memory.
    pub(super) fn spread_over(&mut self, nodes: &[usize]) {
        self.cells.spread_over(nodes);
        self.ints.spread_over(nodes);
        self.scales.spread_over(nodes);
    }

    /// Writes all of it once: what is read before it was ever written comes from one page of zeros, and faster.
    pub(super) fn touch(&mut self) {
        self.cells.fill(0x3c00);
        self.ints.fill(1);
        self.scales.fill(0.01);
    }

    /// All cells, as bits (none where there are integers): for tests, which plant garbage in slots not yet written.
    pub fn cells_mut(&mut self) -> &mut [u16] {
        &mut self.cells
    }

    /// All scales of integers: for tests, as [`Cache::cells_mut`].
    pub fn scales_mut(&mut self) -> &mut [f32] {
        &mut self.scales
    }

    /// What a slot of a block holds, as bits: one head's key and value, with their scales if they have any. For tests.
    pub fn slot(&self, block: u32, slot: usize, kv_head: usize) -> (Vec<u16>, Vec<u16>) {
        let Layout { head_dim, .. } = self.layout;
        if self.layout.ints {
            let of = |Ints { q, scales }: Ints<'_>, index: &dyn Fn(usize) -> usize| {
                let scale = scales[slot].to_bits();
                (0..head_dim).map(|i| q[index(i)] as u16).chain([scale as u16, (scale >> 16) as u16]).collect()
            };
            let key = of(self.int_keys(block, kv_head), &|i| self.layout.key(slot, i));
            return (key, of(self.int_values(block, kv_head), &|i| self.layout.value(slot, i)));
        }
        let (keys, values) = (self.keys(block, kv_head), self.values(block, kv_head));
        let key = (0..head_dim).map(|i| keys[self.layout.key(slot, i)]).collect();
        (key, (0..head_dim).map(|i| values[self.layout.value(slot, i)]).collect())
    }

    /// A head's keys in a block.
    pub(super) fn keys(&self, block: u32, kv_head: usize) -> &[u16] {
        &self.cells[self.layout.keys(block, kv_head)..][..self.layout.head_cells()]
    }

    /// A head's values in a block.
    pub(super) fn values(&self, block: u32, kv_head: usize) -> &[u16] {
        &self.cells[self.layout.values(block, kv_head)..][..self.layout.head_cells()]
    }

    /// A head's keys in a block, as integers.
    #[inline(always)]
    pub(super) fn int_keys(&self, block: u32, kv_head: usize) -> Ints<'_> {
        self.ints_at(self.layout.keys(block, kv_head), self.layout.scales(block, kv_head))
    }

    /// A head's values in a block, as integers.
    #[inline(always)]
    pub(super) fn int_values(&self, block: u32, kv_head: usize) -> Ints<'_> {
        self.ints_at(self.layout.values(block, kv_head), self.layout.scales(block, kv_head) + BLOCK_TOKENS)
    }

    #[inline(always)]
    fn ints_at(&self, first: usize, first_scale: usize) -> Ints<'_> {
        let scales = self.scales[first_scale..].first_chunk().expect("a block has as many scales as slots");
        Ints { q: &self.ints[first..][..self.layout.head_cells()], scales }
    }

    /// Asks for some bytes of a head's keys and values in a block, which lie behind each other.
    #[inline(always)]
    pub(super) fn prefetch(&self, block: u32, kv_head: usize, bytes: Range<usize>) {
        let (first, n_cells) = (self.layout.keys(block, kv_head), 2 * self.layout.head_cells());
        if self.layout.ints {
            prefetch_far(&self.ints[first..][bytes.start..bytes.end.min(n_cells)]);
        } else {
            let cells = bytes.start / size_of::<u16>()..(bytes.end / size_of::<u16>()).min(n_cells);
            prefetch_far(&self.cells[first..][cells]);
        }
    }

    /// Shared writing to slots.
    pub(super) fn writer(&mut self) -> CacheWriter<'_> {
        CacheWriter {
            layout: self.layout,
            cells: Shared::new(&mut self.cells),
            ints: Shared::new(&mut self.ints),
            scales: Shared::new(&mut self.scales),
        }
    }

    /// Copies the first slots of a block to another.
    pub(super) fn copy(&mut self, copy: &BlockCopy) {
        let layout = self.layout;
        for kv_head in 0..layout.n_kv_heads {
            let (from_keys, to_keys) = (layout.keys(copy.src, kv_head), layout.keys(copy.dst, kv_head));
            let (from_values, to_values) = (layout.values(copy.src, kv_head), layout.values(copy.dst, kv_head));
            for slot in 0..copy.n_slots as usize {
                for i in 0..layout.padded {
                    let (key, value) = (layout.key(slot, i), layout.value(slot, i));
                    let moves = [(from_keys + key, to_keys + key), (from_values + value, to_values + value)];
                    for (from, to) in moves {
                        if layout.ints {
                            self.ints[to] = self.ints[from];
                        } else {
                            self.cells[to] = self.cells[from];
                        }
                    }
                }
            }
            if layout.ints {
                let (from, to) = (layout.scales(copy.src, kv_head), layout.scales(copy.dst, kv_head));
                for (from, to) in [(from, to), (from + BLOCK_TOKENS, to + BLOCK_TOKENS)] {
                    self.scales.copy_within(from..from + copy.n_slots as usize, to);
                }
            }
        }
    }
}

/// Writes slots of a cache from several workers at once.
pub(super) struct CacheWriter<'a> {
    layout: Layout,
    cells: Shared<'a, u16>,
    ints: Shared<'a, i8>,
    scales: Shared<'a, f32>,
}

impl CacheWriter<'_> {
    /// Stores one head's k and v, `[head_dim]`, in a slot of a block.
    ///
    /// # Safety
    /// Nobody else may write this head's slot at the same time.
    pub(super) unsafe fn store(&self, isa: super::Isa, (block, slot): (u32, usize), kv_head: usize, k: &[f32], v: &[f32]) {
        let layout = self.layout;
        assert!(slot < BLOCK_TOKENS && k.len() == layout.head_dim && v.len() == layout.head_dim);
        if layout.ints {
            let scale = layout.scales(block, kv_head) + slot;
            // SAFETY: passed on.
            unsafe {
                self.store_ints(isa, k, (layout.keys(block, kv_head) + layout.key(slot, 0), BLOCK_TOKENS), scale);
                let values = layout.values(block, kv_head) + layout.value(slot, 0);
                self.store_ints(isa, v, (values, 1), scale + BLOCK_TOKENS);
            }
            return;
        }
        let keys = self.cells.at(layout.keys(block, kv_head), layout.head_cells());
        let values = self.cells.at(layout.values(block, kv_head), layout.head_cells());
        for (k, v, i) in k.chunks(LANES).zip(v.chunks(LANES)).enumerate().map(|(i, (k, v))| (k, v, i * LANES)) {
            let (mut key, mut value) = ([0; LANES], [0; LANES]);
            if layout.tiles {
                to_bf16s(isa, k, &mut key);
                to_bf16s(isa, v, &mut value);
            } else {
                to_halves(isa, k, &mut key);
                to_halves(isa, v, &mut value);
            }
            // Elements lie evenly: the compiler need not be told of layouts.
            let (key_start, key_odd) = (layout.key(slot, i), layout.key(slot, 1) - layout.key(slot, 0));
            let (value_start, value_step) = (layout.value(slot, i), layout.value(slot, 1) - layout.value(slot, 0));
            for (j, (key, value)) in key.into_iter().zip(value).take(k.len()).enumerate() {
                // SAFETY: element i + j of a slot is among the head's cells, and they belong to this slot and head (the
                // caller's promise).
                unsafe {
                    keys.add(key_start + j / 2 * 2 * BLOCK_TOKENS + j % 2 * key_odd).write(key);
                    values.add(value_start + j * value_step).write(value);
                }
            }
        }
        for i in layout.head_dim..layout.padded {
            // SAFETY: as above.
            unsafe { keys.add(layout.key(slot, i)).write(0) };
        }
    }
}

impl CacheWriter<'_> {
    /// Stores a head's key or value as integers that lie evenly, `(first, step)`, and its scale.
    ///
    /// # Safety
    /// As [`CacheWriter::store`].
    unsafe fn store_ints(&self, isa: super::Isa, x: &[f32], (first, step): (usize, usize), scale: usize) {
        let amax = magnitude(isa, x);
        let inverse = quant::inverse(amax);
        let out = self.ints.at(first, (x.len() - 1) * step + 1);
        for (i, x) in x.chunks(LANES).enumerate() {
            let mut q = [0; LANES];
            to_ints(isa, x, inverse, &mut q);
            for (j, q) in q.into_iter().take(x.len()).enumerate() {
                // SAFETY: elements up to the last were asserted to be there; they belong to this slot and head.
                unsafe { out.add((i * LANES + j) * step).write(q) };
            }
        }
        // SAFETY: the slot's own.
        unsafe { self.scales.write(scale, amax / 127.0) };
    }
}

per_isa! {
    /// The largest magnitude; infinity or NaN if there is one.
    fn magnitude(x: &[f32]) -> f32 = magnitude_body;
}

#[inline(always)]
fn magnitude_body<S: Simd>(_: S, x: &[f32]) -> f32 {
    quant::magnitude(x)
}

per_isa! {
    /// Rounds up to 16 values, multiplied by a factor, to integers, to nearest even.
    fn to_ints(x: &[f32], factor: f32, out: &mut [i8; LANES]) = to_ints_body;
}

#[inline(always)]
fn to_ints_body<S: Simd>(_: S, x: &[f32], factor: f32, out: &mut [i8; LANES]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = quant::to_int(x, factor);
    }
}

per_isa! {
    /// Rounds up to 16 values to IEEE halves, to nearest even.
    fn to_halves(x: &[f32], out: &mut [u16; LANES]) = to_halves_body;
}

#[inline(always)]
fn to_halves_body<S: Simd>(s: S, x: &[f32], out: &mut [u16; LANES]) {
    // SAFETY: `out` has 16 elements.
    unsafe { s.store_f16(out.as_mut_ptr(), s.load_part(x)) };
}

per_isa! {
    /// Rounds up to 16 values to bfloat16, to nearest even.
    fn to_bf16s(x: &[f32], out: &mut [u16; LANES]) = to_bf16s_body;
}

#[inline(always)]
fn to_bf16s_body<S: Simd>(s: S, x: &[f32], out: &mut [u16; LANES]) {
    let mut values = [0.0; LANES];
    // SAFETY: both arrays have 16 elements.
    unsafe {
        s.store(values.as_mut_ptr(), s.load_part(x));
        s.round_bf16(values.as_ptr(), out.as_mut_ptr());
    }
}

/// Cosines and sines of the angles of positions; grows as they are needed.
pub(super) struct RopeTable {
    /// Angle per position of each pair.
    freqs: Vec<f32>,
    /// What cosines and sines are multiplied by.
    scale: f32,
    /// `[positions][pairs]` of (cos, sin)
    turns: Vec<(f32, f32)>,
}

impl RopeTable {
    /// An empty table.
    pub(super) fn new(spec: &AttentionSpec) -> Self {
        Self { freqs: spec.rope_freqs.clone(), scale: spec.rope_scale, turns: Vec::new() }
    }

    /// Whether these are the turns of that layer.
    pub(super) fn is_of(&self, spec: &AttentionSpec) -> bool {
        self.freqs == spec.rope_freqs && self.scale.to_bits() == spec.rope_scale.to_bits()
    }

    /// Makes the table reach positions 0..n.
    pub(super) fn reach(&mut self, n: usize) {
        let have = self.turns.len() / self.freqs.len().max(1);
        if have >= n {
            return;
        }
        for position in have..n {
            self.turns.extend(self.freqs.iter().map(|&freq| {
                // Not the system's functions, whose last bits differ from machine to machine. In f64 and rounded once: an
                // f32 angle of thousands of radians has few correct digits left.
                let (sin, cos) = libm::sincos(position as f64 * f64::from(freq));
                ((cos * f64::from(self.scale)) as f32, (sin * f64::from(self.scale)) as f32)
            }));
        }
    }

    /// (cos, sin) of each pair at a position.
    pub(super) fn at(&self, position: usize) -> &[(f32, f32)] {
        &self.turns[position * self.freqs.len()..][..self.freqs.len()]
    }
}

per_isa! {
    /// Rotates a head's pairs: (a, b) -> (a·cos − b·sin, b·cos + a·sin).
    pub(super) fn rotate(head: &mut [f32], turns: &[(f32, f32)], style: RopeStyle) = rotate_body;
}

#[inline(always)]
fn rotate_body<S: Simd>(_: S, head: &mut [f32], turns: &[(f32, f32)], style: RopeStyle) {
    let turn = |a: f32, b: f32, (cos, sin): (f32, f32)| (a.mul_add(cos, -(b * sin)), b.mul_add(cos, a * sin));
    match style {
        RopeStyle::Interleaved => {
            for (pair, &t) in head.chunks_exact_mut(2).zip(turns) {
                (pair[0], pair[1]) = turn(pair[0], pair[1], t);
            }
        }
        RopeStyle::Halves => {
            let (low, high) = head[..2 * turns.len()].split_at_mut(turns.len());
            for ((a, b), &t) in low.iter_mut().zip(high).zip(turns) {
                (*a, *b) = turn(*a, *b, t);
            }
        }
    }
}
