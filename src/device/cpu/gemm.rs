//! Matrix products: out[token, column] = Σ over k of activation · weight, cut into tiles for the team. Knows nothing of
//! decoders. Invariant: a value is one fixed sequence of operations over k, made of its token's activations and its
//! column's weights alone; tiles, row groups and instruction sets only choose what is computed when.

use super::buffer::{Aligned, Shared};
use super::gemm_q::{Panel, QuantRows};
use super::isa::{Isa, per_isa};
use super::quant::{Act, ActWriter};
use super::simd::{Format, LANES, Q40, Q41, Q80, Simd, Spread};
use super::team::Team;
use super::weights::{BLOCK, PANEL, Part, Weight};
use super::{Scratch, gemm_f, gemm_q};
use crate::device::Activation;
use crate::tensor::DType;
use std::ops::Range;

/// Most rows a kernel takes at once: tiles have a multiple of it.
const MAX_ROWS: usize = 6;

/// Most blocks of k that are unpacked at once: 12 · 1280 bytes, a third of a 48 KB L1 cache.
const PIECE_BLOCKS: usize = 12;

/// Bytes of activations that a tile's rows may take: they are read once per panel, so they should stay in the L2 cache.
const TILE_ACT_BYTES: usize = 256 << 10;

/// What becomes of the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Epilogue {
    /// out = y
    Store,
    /// out += y
    Add,
    /// out = activation(gate) · up, for a gated weight.
    Gate(Activation),
}

/// One matrix product.
pub(super) struct Product<'a> {
    pub(super) isa: Isa,
    pub(super) act: &'a Act,
    pub(super) weight: &'a Weight,
    pub(super) n_rows: usize,
    pub(super) epilogue: Epilogue,
    pub(super) out: Out<'a>,
}

/// Where the results of a product go.
pub(super) enum Out<'a> {
    /// To f32 values, `[n_rows, width]`.
    Values(Shared<'a, f32>, usize),
    /// To the next weight's activations.
    Act(ActWriter<'a>),
}

impl Out<'_> {
    /// Columns `columns` of a row.
    ///
    /// # Safety
    /// While the result lives, nobody else may touch these values.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    unsafe fn part(&self, row: usize, columns: &Range<usize>) -> &mut [f32] {
        // SAFETY: passed on.
        unsafe {
            match self {
                Self::Values(values, width) => values.part(row * width + columns.start, columns.len()),
                Self::Act(act) => act.values(row, columns.start, columns.len()),
            }
        }
    }
}

/// A worker's share: some panels of a part, for some rows.
struct Tile<'a> {
    product: &'a Product<'a>,
    part: &'a Part,
    panels: Range<usize>,
    rows: Range<usize>,
}

/// Makes a worker's memory for products of up to `max_rows` rows.
pub(super) fn reserve(scratch: &mut Scratch, max_rows: usize) {
    scratch.panel.reserve(PIECE_BLOCKS * gemm_q::MAX_UNPACKED_BLOCK);
    scratch.sums.reserve(max_rows.next_multiple_of(MAX_ROWS) * PANEL);
}

/// Computes a product.
pub(super) fn multiply(team: &Team, product: &Product<'_>) {
    let Product { act, weight, n_rows, .. } = *product;
    assert_eq!(act.k, weight.k, "activations of width {} for a weight of {}", act.k, weight.k);
    assert_eq!(weight.gated, matches!(product.epilogue, Epilogue::Gate(_)));
    for part in &weight.parts {
        let (rows_step, panels_step) = tile_shape(team.n_threads(), n_rows, act.k, part.n_panels);
        let row_tiles = n_rows.div_ceil(rows_step);
        team.run(part.n_panels.div_ceil(panels_step) * row_tiles, &|scratch, tile| {
            let (panel, row) = (tile / row_tiles * panels_step, tile % row_tiles * rows_step);
            let panels = panel..(panel + panels_step).min(part.n_panels);
            let rows = row..(row + rows_step).min(n_rows);
            run_tile(product.isa, &Tile { product, part, panels, rows }, scratch);
        });
    }
}

/// Rows and panels of a tile: rows as many as the cache bears, since they share a panel's unpacking; then as many panels
/// (an even number: the two of a gated pair's 32 columns stay together) as leave every thread several tiles.
fn tile_shape(n_threads: usize, n_rows: usize, k: usize, n_panels: usize) -> (usize, usize) {
    let in_cache = (TILE_ACT_BYTES / k).max(4 * MAX_ROWS);
    let row_tiles =
        n_rows.div_ceil(in_cache).max((4 * n_threads).div_ceil(n_panels.div_ceil(2)).min(n_rows.div_ceil(4 * MAX_ROWS)));
    let rows = n_rows.div_ceil(row_tiles.max(1)).next_multiple_of(MAX_ROWS);
    let panels = (n_panels * row_tiles / (8 * n_threads)).clamp(2, 16) & !1;
    (rows, panels)
}

per_isa! {
    /// Computes one tile.
    fn run_tile(tile: &Tile<'_>, scratch: &mut Scratch) = tile_body;
}

#[inline(always)]
fn tile_body<S: Simd>(s: S, tile: &Tile<'_>, scratch: &mut Scratch) {
    for panel in tile.panels.clone() {
        match tile.part.dtype {
            DType::Q4_0 => quantised::<S, Q40>(s, tile, panel, scratch),
            DType::Q4_1 => quantised::<S, Q41>(s, tile, panel, scratch),
            DType::Q8_0 => quantised::<S, Q80>(s, tile, panel, scratch),
            DType::Q5_0 | DType::Iq4Nl | DType::Iq4Xs => quantised::<S, Spread<false, false>>(s, tile, panel, scratch),
            DType::Q5_1 | DType::Q4K | DType::Q5K => quantised::<S, Spread<true, false>>(s, tile, panel, scratch),
            DType::Q3K | DType::Q6K => quantised::<S, Spread<false, true>>(s, tile, panel, scratch),
            DType::Q2K => quantised::<S, Spread<true, true>>(s, tile, panel, scratch),
            dtype @ (DType::F32 | DType::F16 | DType::Bf16) => floats(s, tile, panel, dtype, scratch),
        }
    }
    if let Out::Act(act) = &tile.product.out {
        let columns = columns_of(tile, tile.panels.start).start..columns_of(tile, tile.panels.end - 1).end;
        for row in tile.rows.clone() {
            // SAFETY: this tile has written these values just now and is alone with them.
            unsafe { act.seal(row, columns.start, columns.len()) };
        }
    }
}

/// One panel of integers for all of the tile's rows. From three row groups on they share one unpacking, and k is taken in
/// pieces so that what was unpacked stays in the L1 cache; the running sums of a row wait in `sums` meanwhile.
#[inline(always)]
fn quantised<S: Simd, F: Format>(s: S, tile: &Tile<'_>, panel: usize, scratch: &mut Scratch) {
    let act = &tile.product.act;
    let n_blocks = act.k / BLOCK;
    let in_pieces = tile.rows.len() > 2 * S::ROWS;
    let piece = if in_pieces { n_blocks.div_ceil(n_blocks.div_ceil(PIECE_BLOCKS)) } else { n_blocks };
    let sums = sums_of(&mut scratch.sums, tile.rows.len());
    let packed = tile.part.panel(panel).chunks(piece * tile.part.panel(panel).len() / n_blocks);
    for (i, packed) in packed.enumerate() {
        let blocks = i * piece..n_blocks.min((i + 1) * piece);
        let source = if F::SPREAD {
            Panel::Unpacked(packed)
        } else if in_pieces {
            Panel::Unpacked(gemm_q::unpack::<S, F>(s, packed, blocks.len(), &mut scratch.panel))
        } else {
            Panel::Packed(packed)
        };
        for (group, sums) in sums.chunks_mut(S::ROWS).enumerate() {
            let rows = QuantRows::new(act, tile.rows.start + group * S::ROWS, sums.len(), &blocks);
            gemm_q::add_rows::<S, F>(s, &source, &rows, sums);
        }
    }
    finish(s, tile, panel, sums);
}

/// One panel of floats for all of the tile's rows.
#[inline(always)]
fn floats<S: Simd>(s: S, tile: &Tile<'_>, panel: usize, dtype: DType, scratch: &mut Scratch) {
    let act = &tile.product.act;
    let sums = sums_of(&mut scratch.sums, tile.rows.len());
    for (group, sums) in sums.chunks_mut(S::ROWS).enumerate() {
        let rows = &act.f[(tile.rows.start + group * S::ROWS) * act.k..][..sums.len() * act.k];
        gemm_f::rows(s, dtype, tile.part.panel(panel), rows, sums);
    }
    finish(s, tile, panel, sums);
}

/// Zeros for the sums of a panel's columns, `[n_rows][32]`.
#[inline(always)]
fn sums_of(memory: &mut Aligned<f32>, n_rows: usize) -> &mut [[f32; PANEL]] {
    memory.reserve(n_rows * PANEL);
    let sums = &mut memory.as_chunks_mut().0[..n_rows];
    sums.fill([0.0; PANEL]);
    sums
}

/// The columns of the output that a panel makes.
#[inline(always)]
fn columns_of(tile: &Tile<'_>, panel: usize) -> Range<usize> {
    let width = if tile.product.weight.gated { PANEL / 2 } else { PANEL };
    let start = panel * width;
    tile.part.n_start + start..tile.part.n_start + tile.part.n.min(start + width)
}

/// Brings a panel's products to memory.
#[inline(always)]
fn finish<S: Simd>(s: S, tile: &Tile<'_>, panel: usize, sums: &[[f32; PANEL]]) {
    let product = tile.product;
    let columns = columns_of(tile, panel);
    for (row, y) in tile.rows.clone().zip(sums) {
        // SAFETY: each (row, panel) belongs to one tile, and panels do not share columns.
        let out = unsafe { product.out.part(row, &columns) };
        match product.epilogue {
            Epilogue::Store => out.copy_from_slice(&y[..out.len()]),
            Epilogue::Add => out.iter_mut().zip(y).for_each(|(out, y)| *out += y),
            Epilogue::Gate(f) => {
                let mut values = [0.0; LANES];
                // SAFETY: a panel's row is 32 values; `values` holds 16.
                unsafe {
                    let (gate, up) = (s.load(y.as_ptr()), s.load(y.as_ptr().add(LANES)));
                    let gate = match f {
                        Activation::Silu => silu(s, gate),
                        Activation::GeluTanh => gelu(s, gate),
                    };
                    s.store(values.as_mut_ptr(), s.mul(gate, up));
                }
                out.copy_from_slice(&values[..out.len()]);
            }
        }
    }
}

/// x / (1 + e^−x)
#[inline(always)]
fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    divided_by_logistic(s, x, x)
}

/// x/2 · (1 + tanh(u)) with u = √(2/π) · (x + 0.044715 x³): the same as x / (1 + e^−2u).
#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    // 2 · √(2/π)
    const SCALE: f32 = 1.595_769_2;
    let cubed = s.mul(s.mul(x, x), x);
    divided_by_logistic(s, x, s.mul(s.splat(SCALE), s.fma(s.splat(0.044_715), cubed, x)))
}

/// x / (1 + e^−u)
#[inline(always)]
fn divided_by_logistic<S: Simd>(s: S, x: S::V, u: S::V) -> S::V {
    s.div(x, s.add(s.splat(1.0), s.exp(s.sub(s.splat(0.0), u))))
}
