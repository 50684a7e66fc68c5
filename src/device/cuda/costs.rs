//! What each family of kernels moves and computes, as functions of its shapes: the bounds that the head comments in `kernels/` state.
//! Tests hold the kernels to them (`tests/it/cuda_laws.rs`), and `valar bench kernels --device cuda --model-only` reckons with them.
//! Knows nothing of GPUs' speeds.
//!
//! Invariant: bytes are those of the 32-byte sectors that warps ask for (a word that a warp reads alone counts as one), operations
//! those of whole warps, masked lanes among them.

use super::kernels::ROUNDS;
use crate::device::Activation;

/// What a launch costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that must come from memory: each once.
    pub read: u64,
    /// Bytes that are written.
    pub written: u64,
    /// Bytes that are asked for again, or by everybody alike (a norm's weights, places, tables): caches have them.
    pub cached: u64,
    /// Multiplications and additions of tensor cores.
    pub tensor: u64,
    /// Arithmetic and conversions of f32 and f64 outside of tensor cores; a product with a sum that is fused with it is one.
    pub scalar: u64,
    /// Passes over the banks of shared memory, beyond those that accesses without conflicts would take.
    pub conflicts: u64,
}

impl Cost {
    /// So many launches of it.
    #[must_use]
    pub fn times(self, n: u64) -> Self {
        let Self { read, written, cached, tensor, scalar, conflicts } = self;
        Self {
            read: n * read,
            written: n * written,
            cached: n * cached,
            tensor: n * tensor,
            scalar: n * scalar,
            conflicts: n * conflicts,
        }
    }

    /// The same if what is read is only so many different bytes: the rest is asked for again.
    #[must_use]
    pub fn of_distinct(self, read: u64) -> Self {
        let read = self.read.min(read);
        Self { read, cached: self.cached + self.read - read, ..self }
    }

    /// Bytes that warps ask for and write.
    pub fn traffic(&self) -> u64 {
        self.read + self.written + self.cached
    }
}

impl std::ops::Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            read: self.read + other.read,
            written: self.written + other.written,
            cached: self.cached + other.cached,
            tensor: self.tensor + other.tensor,
            scalar: self.scalar + other.scalar,
            conflicts: self.conflicts + other.conflicts,
        }
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), std::ops::Add::add)
    }
}

/// Bytes of a sector, the least that is moved.
const SECTOR: u64 = 32;
/// Bytes of a bfloat16, and of an f32.
const BF16: u64 = 2;
const F32: u64 = 4;
/// Keys of a tile of attention, and of a block of the cache.
const TILE: u64 = 64;
const BLOCK: u64 = 16;

/// What kernels write rows as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// bfloat16.
    Bf16,
    /// Integers of 8 bits, with a scale.
    Int8,
    /// Floats of 8 bits, with a scale.
    E4m3,
}

impl Rows {
    /// Bytes of rows and their scales.
    fn bytes(self, rows: u64, width: u64) -> u64 {
        if self == Self::Bf16 { BF16 * rows * width } else { rows * width + SECTOR * rows }
    }

    /// Operations that make a row of so many elements: those that there are, and those that a block goes through.
    fn operations(self, lanes: u64, elements: u64) -> u64 {
        match self {
            Self::Bf16 => lanes / 2,
            // Two floats are converted at once.
            Self::Int8 => 2 * lanes + elements + BLOCK_MAX,
            Self::E4m3 => 3 * lanes / 2 + elements + BLOCK_MAX,
        }
    }
}

/// Threads of a norm's block, and elements of a round of them.
const NORM_THREADS: u64 = 256;
const NORM_ROUND: u64 = 1024;

/// Elements that a norm's kernel goes through for a row: as many rounds as the kernel for its width has.
fn norm_elements(width: u64) -> u64 {
    let rounds = ROUNDS.iter().map(|&rounds| rounds as u64 * NORM_ROUND).find(|&elements| width <= elements);
    rounds.unwrap_or(width.next_multiple_of(NORM_ROUND))
}

/// Operations of a block's sum (with what makes a scale of it), and of its maximum.
const BLOCK_SUM: u64 = 17 * NORM_THREADS;
const BLOCK_MAX: u64 = 13 * NORM_THREADS + 32;

/// `embed_bf16`: rows of `width`.
pub fn embed(rows: u64, width: u64) -> Cost {
    let n = rows * width;
    let scalar = rows * width.next_multiple_of(128);
    Cost { read: BF16 * n, written: F32 * n, cached: 4 * SECTOR * rows, scalar, ..Cost::default() }
}

/// `gather_rows`.
pub fn gather(rows: u64, width: u64) -> Cost {
    let n = rows * width;
    Cost { read: F32 * n, written: F32 * n, cached: 4 * SECTOR * rows, ..Cost::default() }
}

/// `add_norm`: with a sum before or not, and what rows become.
pub fn add_norm(rows: u64, width: u64, summed: bool, out: Rows) -> Cost {
    let (n, elements, lanes) = (rows * width, norm_elements(width), width.next_multiple_of(128));
    let sum = if summed { n } else { 0 };
    let result = 2 * lanes + out.operations(lanes, elements);
    Cost {
        read: F32 * n + BF16 * sum,
        written: F32 * sum + out.bytes(rows, width),
        cached: F32 * n,
        scalar: rows * (elements * (1 + u64::from(summed)) + BLOCK_SUM + result),
        ..Cost::default()
    }
}

/// `norm_add`.
pub fn norm_add(rows: u64, width: u64) -> Cost {
    let n = rows * width;
    Cost {
        read: (F32 + BF16) * n,
        written: F32 * n,
        cached: F32 * n,
        scalar: rows * (norm_elements(width) + 3 * width.next_multiple_of(128) + BLOCK_SUM),
        ..Cost::default()
    }
}

/// `quant_rows`, whose kernels have 16 or 32 rounds.
pub fn quant_rows(rows: u64, width: u64, out: Rows) -> Cost {
    let (n, elements) = (rows * width, NORM_ROUND * if width <= 16 * NORM_ROUND { 16 } else { 32 });
    Cost {
        read: BF16 * n,
        written: out.bytes(rows, width),
        scalar: rows * out.operations(width.next_multiple_of(128), elements),
        ..Cost::default()
    }
}

/// `gate_silu` and `gate_gelu`: rows of `width` results.
pub fn gate(f: Activation, rows: u64, width: u64) -> Cost {
    let n = rows * width;
    let twice_each = if f == Activation::Silu { 13 } else { 27 };
    let scalar = rows * width.next_multiple_of(256) * twice_each / 2;
    Cost { read: 2 * BF16 * n, written: BF16 * n, scalar, ..Cost::default() }
}

/// `bf16_to_f16`, or `f16_to_bf16`: `n` elements.
pub fn cast(n: u64, to_f16: bool) -> Cost {
    let scalar = n.next_multiple_of(256) * if to_f16 { 1 } else { 3 } / 2;
    Cost { read: BF16 * n, written: BF16 * n, scalar, ..Cost::default() }
}

/// `scale_bf16`, `scale_f32`, or `scale_add`: bytes of an element of the product, and whether it is added to what is there.
pub fn scale(rows: u64, width: u64, bytes: u64, adds: bool) -> Cost {
    let (n, lanes) = (rows * width, rows * width.next_multiple_of(128));
    let sum = if adds { F32 * n } else { 0 };
    Cost {
        read: bytes * n + sum,
        written: if adds { sum } else { bytes * n },
        cached: F32 * n + SECTOR * lanes / 128,
        scalar: if bytes == BF16 { 5 * lanes / 2 } else { 2 * lanes },
        ..Cost::default()
    }
}

/// The heads of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Of queries.
    pub heads: u64,
    /// Of keys and values.
    pub kv_heads: u64,
    /// Elements of one.
    pub dim: u64,
}

/// `finish_qkv`: pairs of a head that are turned; with a bias and norms of heads or not.
pub fn finish_qkv(tokens: u64, of: Heads, pairs: u64, bias: bool, norms: bool) -> Cost {
    let (all, turned) = (of.heads + 2 * of.kv_heads, of.heads + of.kv_heads);
    let n = tokens * all * of.dim;
    let biased = if bias { n } else { 0 };
    let normed = if norms { tokens * turned * of.dim } else { 0 };
    let (turned_pairs, warp) = (pairs, 32);
    let pairs = tokens * turned * pairs;
    Cost {
        read: BF16 * n,
        written: BF16 * n,
        // Turns; halves of sectors of bias and norms; a position, and a slot, of each warp that needs one.
        cached: 8 * pairs + 2 * F32 * (biased + normed) + SECTOR * tokens * (turned + 2 * of.kv_heads),
        scalar: tokens
            * (all * warp * if bias { 12 } else { 4 }
                + turned * (4 * turned_pairs.next_multiple_of(warp) + if norms { 34 * warp } else { 0 })),
        ..Cost::default()
    }
}

/// `copy_blocks`: copies of so many slots each.
pub fn copy_blocks(slots: &[u64], of: Heads) -> Cost {
    let (blocks, warps) = (2 * of.kv_heads, 8);
    let bytes = blocks * slots.iter().sum::<u64>() * of.dim * BF16;
    // All warps read how many slots there are, those with pieces where from and where to.
    let words = slots.iter().map(|slots| warps + 2 * (slots * of.dim / 8).div_ceil(32).min(warps)).sum::<u64>();
    Cost { read: bytes, written: bytes, cached: blocks * words * SECTOR, ..Cost::default() }
}

/// An item of attention's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Rows: heads of tokens.
    pub rows: u64,
    /// Keys, from a multiple of a tile on.
    pub keys: u64,
    /// Segments that these keys are of.
    pub segments: u64,
    /// Whether states are left for a merge.
    pub to_parts: bool,
    /// Whether the fold goes on from a state that was left.
    pub resumes: bool,
}

impl Piece {
    /// Queries, keys and values, states before; outputs or states.
    fn moved(&self, dim: u64) -> Cost {
        let state = F32 * dim + 8;
        Cost {
            read: 2 * BF16 * dim * self.keys + BF16 * dim * self.rows + if self.resumes { state * self.rows } else { 0 },
            written: self.rows * if self.to_parts { state } else { BF16 * dim },
            ..Cost::default()
        }
    }

    /// Conflicts of copies to rows of shared memory: eight 16-byte pieces that go on in the next row skip 16 bytes, and meet.
    fn conflicts(&self, dim: u64, query_rows: u64) -> u64 {
        let rows = query_rows + 2 * TILE * self.keys.div_ceil(TILE);
        // Of the groups of eight of a row's pieces that begin in another one: 3 in 5, 1 in 3.
        match dim {
            80 => rows * 10 / 8 * 3 / 5,
            96 => rows * 12 / 8 / 3,
            _ => 0,
        }
    }
}

/// `decode_D`.
pub fn decode(dim: u64, piece: Piece) -> Cost {
    let (tiles, warps) = (piece.keys.div_ceil(TILE), 4);
    let scores = 16 * TILE * tiles;
    Cost {
        // The item, its rows' positions and parts; the table's entries of each tile.
        cached: SECTOR * warps * (if piece.to_parts { 6 } else { 4 } + 2 * tiles),
        tensor: 4 * scores * dim,
        // Every warp folds all scores.
        scalar: warps * 6 * scores + 16 * dim * tiles,
        conflicts: piece.conflicts(dim, 16),
        ..piece.moved(dim)
    }
}

/// Warps of a block of many rows.
const WARPS: u64 = 8;

/// Rows of an item of many rows, and warps that have the same ones: of heads of 256 two, with half of the columns each.
fn rows_of_item(dim: u64) -> (u64, u64) {
    if dim == 256 { (64, 2) } else { (128, 1) }
}

/// What folding so many rows asks of GPUs, but for copies.
fn folded(dim: u64, piece: &Piece, rows: u64) -> Cost {
    let (tiles, (_, scores_of_row)) = (piece.keys.div_ceil(TILE), rows_of_item(dim));
    let scores = rows * TILE * tiles;
    let merged = if piece.to_parts { 0 } else { 2 * (piece.segments - 1) * rows * (F32 * dim + 8 * scores_of_row) };
    Cost {
        // The item, and its rows' positions.
        cached: SECTOR * WARPS * 4 + merged,
        tensor: 2 * scores * dim * (1 + scores_of_row),
        scalar: 6 * scores * scores_of_row + rows * dim * tiles + if piece.to_parts { 0 } else { rows * dim * 3 / 2 },
        ..Cost::default()
    }
}

/// `prefill_D`.
pub fn prefill(dim: u64, piece: Piece) -> Cost {
    let rows = rows_of_item(dim).0;
    let tables = Cost { cached: SECTOR * WARPS * 2 * piece.keys.div_ceil(TILE), ..Cost::default() };
    let copied = Cost { conflicts: piece.conflicts(dim, 2 * rows), ..piece.moved(dim) };
    folded(dim, &piece, rows) + tables + copied
}

/// `prefill_sm90_D`: whole blocks of keys and values are copied, and warpgroups without rows do nothing.
pub fn prefill_sm90(dim: u64, piece: Piece) -> Cost {
    let rows = piece.rows.next_multiple_of(64).min(rows_of_item(dim).0);
    let blocks = piece.keys.div_ceil(BLOCK);
    let tables = Cost { cached: SECTOR * blocks, ..Cost::default() };
    folded(dim, &piece, rows) + tables + Piece { keys: BLOCK * blocks, ..piece }.moved(dim)
}

/// `merge_parts`: rows (a token's heads) of so many parts each.
pub fn merge(rows: u64, parts: u64, dim: u64) -> Cost {
    Cost {
        read: F32 * dim * rows * parts,
        written: BF16 * dim * rows,
        cached: SECTOR * rows * (2 + parts),
        scalar: 32 * rows * (dim.div_ceil(64) * (4 * parts - 1) + 7 * parts + 1),
        ..Cost::default()
    }
}

/// `linear_qB`: `B` bits of a weight; rows, columns, elements that are added up; tiles of 16 rows in a block; whether results are added
/// to what is there.
pub fn linear_q(bits: u64, (m, n, k): (u64, u64, u64), tiles: u64, adds: bool) -> Cost {
    let (panels, blocks, k_padded) = (n.div_ceil(64), m.div_ceil(16 * tiles), k.next_multiple_of(64));
    let n_weights = 64 * panels * k_padded;
    let weights = n_weights * bits / 8 + n_weights / 4;
    Cost {
        read: weights + BF16 * m * k + if adds { F32 * m * n } else { 0 },
        written: m * n * if adds { F32 } else { BF16 },
        cached: weights * (blocks - 1) + BF16 * m * k * (panels - 1),
        tensor: 2 * 16 * tiles * blocks * n_weights,
        scalar: 5 * n_weights * blocks / 2 + m.next_multiple_of(8) * 64 * panels * if adds { 2 } else { 1 } / 2,
        ..Cost::default()
    }
}

/// `linear_experts`: `bits` of a weight; columns, elements that are added up; rows of each expert; tiles of 16 rows of an item; items
/// that blocks are launched for.
pub fn linear_experts(bits: u64, (n, k): (u64, u64), rows: &[u64], tiles: u64, items: u64) -> Cost {
    let (panels, n_weights, uses) = (n.div_ceil(64), n.next_multiple_of(64) * k.next_multiple_of(64), rows.iter().sum::<u64>());
    let of_expert = if bits == 16 { BF16 * n * k } else { n_weights * bits / 8 + n_weights / 4 };
    let (warps, item_rows) = (4, 16 * tiles);
    let n_items: u64 = rows.iter().map(|rows| rows.div_ceil(item_rows)).sum();
    let n_used = rows.iter().filter(|rows| **rows > 0).count() as u64;
    // Counts are looked through up to the expert, 32 of them at a time; and its list.
    let sectors = |n_counts: u64| n_counts.min(rows.len() as u64).div_ceil(8);
    let pieces = (0..)
        .zip(rows)
        .flat_map(|(expert, &rows)| (0..rows.div_ceil(item_rows)).map(move |i| (expert, (rows - i * item_rows).min(item_rows))));
    let found = pieces.clone().map(|(expert, rows): (u64, u64)| {
        warps * (sectors((expert / 32 + 1) * 32) + 1) + rows.div_ceil(4) + warps * rows.div_ceil(8)
    });
    let looked = found.sum::<u64>() + (items - n_items) * warps * sectors(u64::MAX);
    let stored = pieces.map(|(_, rows)| rows.next_multiple_of(8)).sum::<u64>();
    Cost {
        read: n_used * of_expert + BF16 * uses * k,
        written: BF16 * uses * n,
        cached: of_expert * (n_items - n_used) + BF16 * uses * k * (panels - 1) + SECTOR * panels * looked,
        tensor: 2 * item_rows * n_items * n_weights,
        scalar: stored * 64 * panels / 2 + if bits == 16 { 0 } else { 5 * n_weights * n_items / 2 },
        ..Cost::default()
    }
}

/// `choose_experts`.
pub fn choose_experts(rows: u64, experts: u64, used: u64, renormalise: bool) -> Cost {
    Cost {
        read: F32 * rows * experts,
        written: 2 * SECTOR * rows * used.div_ceil(8),
        scalar: 32 * rows * (16 * experts.div_ceil(32) + 10 + 2 * used + u64::from(renormalise)),
        ..Cost::default()
    }
}

/// `list_uses`, of so many pairs of an expert and 32 uses among which are some of it.
pub fn list_uses(uses: u64, experts: u64, pairs: u64) -> Cost {
    let read = 4 * uses;
    Cost { read, written: SECTOR * (pairs + experts), cached: read * (experts - 1), ..Cost::default() }
}

/// `add_experts`: rows of `width`, each of so many experts' results.
pub fn add_experts(rows: u64, width: u64, used: u64) -> Cost {
    let n = rows * width;
    Cost {
        read: BF16 * n * used + F32 * n,
        written: F32 * n,
        cached: SECTOR * rows * used * width.div_ceil(128),
        scalar: rows * used * width.next_multiple_of(128),
        ..Cost::default()
    }
}

/// A dense product by cuBLASLt, bfloat16: at best, everything once.
pub fn product((m, n, k): (u64, u64, u64), out_bytes: u64) -> Cost {
    Cost { read: BF16 * (m * k + n * k), written: out_bytes * m * n, tensor: 2 * m * n * k, ..Cost::default() }
}

/// What is asked of `sample`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a part that is asked for or not")]
pub struct Asked {
    /// A log-probability, or the likeliest tokens with theirs.
    pub logprob: bool,
    /// The likeliest tokens.
    pub top: bool,
    /// A draw at random.
    pub drawn: bool,
    /// From the likeliest so many; those that make up a probability; those of at least one.
    pub top_k: bool,
    /// See `top_k`.
    pub top_p: bool,
    /// See `top_k`.
    pub min_p: bool,
}

/// Passes over the logits to find a place in the order of likelihood, digit by digit; in the order of tokens.
const BY_LIKELIHOOD: u64 = 5;
const BY_TOKEN: u64 = 3;

impl Asked {
    /// How often a place is looked for in the order of likelihood.
    fn searches(self) -> u64 {
        let filtered = self.top_k || self.top_p || self.min_p;
        u64::from(self.top) + u64::from(self.drawn) * (u64::from(self.top_k) + u64::from(self.top_p) + u64::from(filtered))
    }

    /// Passes over a row: the largest; the sum of all; the likeliest, once they are found; how many are left by min-p; what those
    /// that are kept weigh.
    pub fn passes(self) -> u64 {
        let filtered = self.top_k || self.top_p || self.min_p;
        let draw = u64::from(self.drawn) * (1 + u64::from(self.top_k) + if filtered { 0 } else { BY_TOKEN });
        1 + u64::from(self.logprob || self.top) + u64::from(self.top) + draw + BY_LIKELIHOOD * self.searches()
    }
}

impl Asked {
    /// Operations for a logit, at most: most are of exponentials, which searches take of what they have not left behind.
    fn operations(self) -> u64 {
        let of = |what: bool, n: u64| if what { n } else { 0 };
        let last = if self.top_k || self.top_p || self.min_p { 40 } else { 36 };
        let draw = 22 + of(self.top_k, 7) + of(self.top_p, 40) + last;
        1 + of(self.logprob || self.top, 22) + of(self.top, 6) + of(self.drawn, draw)
    }
}

/// `sample`, without edits and masks.
pub fn sample(rows: u64, vocab: u64, asked: Asked) -> Cost {
    let (n, passes, warps) = (rows * vocab, asked.passes(), 16);
    // What is asked is read by every warp.
    let words = 8 * warps + 8 + if asked.drawn { 6 * warps } else { 0 };
    Cost {
        read: F32 * n,
        written: 3 * SECTOR * rows,
        cached: F32 * n * (passes - 1) + SECTOR * rows * words,
        scalar: n * asked.operations(),
        // Of digits that are added to at the same time; it depends on the logits.
        conflicts: asked.searches() * n / 8,
        ..Cost::default()
    }
}
