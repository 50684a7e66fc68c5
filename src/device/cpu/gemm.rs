//! Matrix products: out[token, column] = Σ over k of activation · weight, cut into tiles for the team. Knows nothing of
//! decoders. Invariant: a value is one fixed sequence of operations over k, made of its token's activations and its
//! column's weights alone; tiles, row groups and instruction sets only choose what is computed when.

use super::buffer::{Aligned, Shared};
use super::gemm_q::{Panel, QuantRows};
use super::isa::{Isa, per_isa};
use super::numerics::{Layout, Numerics};
use super::quant::{Act, ActWriter};
use super::simd::{Format, LANES, Q40, Q41, Q80, Simd, Spread};
use super::team::Team;
use super::tile::TILE;
use super::weights::{BLOCK, PANEL, Part, Weight};
use super::{Scratch, gemm_f, gemm_q, gemm_t};
use crate::device::Activation;
use crate::tensor::DType;
use std::ops::Range;

/// Most rows a kernel takes at once: tiles have a multiple of it.
const MAX_ROWS: usize = 6;

/// Most blocks of k that are unpacked at once: 12 · 1280 bytes, a third of a 48 KB L1 cache.
const PIECE_BLOCKS: usize = 12;

/// Elements of activations that a tile's rows may take where they are integers or floats: they are read once per panel, so they
/// (256 KiB of integers) should stay in the L2 cache. Products of tiles take k in blocks.
const TILE_ACT_ELEMENTS: usize = 256 << 10;

/// Most panels of a worker's share of a product (a head's logits come by larger pieces).
const MAX_PANELS: usize = 16;

/// Rows of a pair of tiles.
pub(super) const PAIR: usize = 2 * TILE;

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
    /// To f32 values, `[rows, width]`, of which the first is that of row and column `first`.
    Window { values: Shared<'a, f32>, width: usize, first: (usize, usize) },
    /// To the next weight's activations.
    Act(ActWriter<'a>),
}

impl Out<'_> {
    /// The first of the results in `columns` of some rows, and the elements from row to row.
    #[inline(always)]
    pub(super) fn block(&self, rows: &Range<usize>, columns: &Range<usize>) -> (*mut f32, usize) {
        match self {
            Self::Values(values, width) => {
                assert!(columns.end <= *width);
                (values.at(rows.start * width + columns.start, (rows.len() - 1) * width + columns.len()), *width)
            }
            Self::Window { values, width, first } => {
                let (row, column) = (rows.start - first.0, columns.start - first.1);
                assert!(column + columns.len() <= *width);
                (values.at(row * width + column, (rows.len() - 1) * width + columns.len()), *width)
            }
            Self::Act(act) => act.block(rows, columns),
        }
    }
}

/// A worker's share: some panels of a part, for some rows.
pub(super) struct Tile<'a> {
    pub(super) product: &'a Product<'a>,
    pub(super) part: &'a Part,
    pub(super) panels: Range<usize>,
    pub(super) rows: Range<usize>,
    /// Up to which panel the worker goes on then, with the same rows, unless others take its shares.
    pub(super) to_come: usize,
}

/// Makes a worker's memory for products of up to `max_rows` rows.
pub(super) fn reserve(scratch: &mut Scratch, numerics: Numerics, max_rows: usize) {
    scratch.panel.reserve(PIECE_BLOCKS * gemm_q::MAX_UNPACKED_BLOCK);
    scratch.sums.reserve(max_rows.next_multiple_of(MAX_ROWS) * PANEL);
    if numerics == Numerics::Bf16 {
        gemm_t::reserve(scratch);
    }
}

/// Computes a product.
pub(super) fn multiply(team: &Team, product: &Product<'_>) {
    let Product { act, weight, n_rows, .. } = *product;
    assert_eq!(act.k, weight.k, "activations of width {} for a weight of {}", act.k, weight.k);
    assert_eq!(weight.gated, matches!(product.epilogue, Epilogue::Gate(_)));
    for part in &weight.parts {
        let (rows_step, panels_step) = tile_shape(team.n_threads(), n_rows, act.k, part);
        let row_tiles = n_rows.div_ceil(rows_step);
        let panel_tiles = part.n_panels.div_ceil(panels_step);
        // A worker keeps its rows as long as it can: activations take more room than weights.
        team.run(panel_tiles * row_tiles, &|scratch, tile| {
            let (panel, row) = (tile % panel_tiles * panels_step, tile / panel_tiles * rows_step);
            let panels = panel..(panel + panels_step).min(part.n_panels);
            let rows = row..(row + rows_step).min(n_rows);
            run_tile(product.isa, &Tile { product, part, panels, rows, to_come: part.n_panels }, scratch);
        });
    }
}

/// Computes a product for some rows, in the caller's thread. The first one begins a tile.
pub(super) fn multiply_rows(product: &Product<'_>, rows: Range<usize>, scratch: &mut Scratch) {
    let Product { act, weight, .. } = *product;
    assert!(act.k == weight.k && weight.gated == matches!(product.epilogue, Epilogue::Gate(_)));
    for part in &weight.parts {
        let step = rows_in_cache(act.k, part);
        for start in rows.clone().step_by(step) {
            let (panels, rows) = (0..part.n_panels, start..rows.end.min(start + step));
            run_tile(product.isa, &Tile { product, part, panels, rows, to_come: part.n_panels }, scratch);
        }
    }
}

/// Computes some columns of a product for some rows, in the caller's thread. The weight is one part, not gated; columns and
/// rows begin at whole panels and at what every kernel takes at once (tiles of 16 rows).
pub(super) fn multiply_window(product: &Product<'_>, columns: &Range<usize>, rows: Range<usize>, scratch: &mut Scratch) {
    let Product { act, weight, .. } = *product;
    assert!(act.k == weight.k && !weight.gated && columns.start.is_multiple_of(PANEL) && rows.start.is_multiple_of(TILE));
    let [part] = weight.parts.as_slice() else { unreachable!("a head's weight is one tensor") };
    let panels = columns.start / PANEL..columns.end.div_ceil(PANEL);
    let to_come = if rows.end == product.n_rows { part.n_panels } else { panels.end };
    run_tile(product.isa, &Tile { product, part, panels, rows, to_come }, scratch);
}

/// Rows and panels of a tile: rows as many as the cache bears, since they share a panel's unpacking; then as many panels
/// (an even number: the two of a gated pair's 32 columns stay together) as leave every thread several tiles.
fn tile_shape(n_threads: usize, n_rows: usize, k: usize, part: &Part) -> (usize, usize) {
    let multiple = if is_tiles(part) { PAIR } else { MAX_ROWS };
    let least = n_rows.div_ceil(rows_in_cache(k, part));
    let wanted = (4 * n_threads).div_ceil(part.n_panels.div_ceil(2)).min(n_rows.div_ceil(4 * multiple));
    let row_tiles = least.max(wanted).max(1);
    let rows = n_rows.div_ceil(row_tiles).next_multiple_of(multiple);
    let panels = (part.n_panels * row_tiles / (8 * n_threads)).clamp(2, MAX_PANELS) & !1;
    (rows, panels)
}

/// Most rows of a tile.
fn rows_in_cache(k: usize, part: &Part) -> usize {
    if is_tiles(part) { gemm_t::MAX_ROWS } else { (TILE_ACT_ELEMENTS / k).max(4 * MAX_ROWS) }
}

fn is_tiles(part: &Part) -> bool {
    matches!(part.layout, Layout::Tiles | Layout::PackedTiles(_))
}

/// Computes one tile.
fn run_tile(isa: Isa, tile: &Tile<'_>, scratch: &mut Scratch) {
    match tile.part.layout {
        Layout::Blocks(dtype) => match dtype {
            DType::Q4_0 => q40(isa, tile, scratch),
            DType::Q4_1 => q41(isa, tile, scratch),
            DType::Q8_0 => q80(isa, tile, scratch),
            DType::Q5_0 | DType::Iq4Nl | DType::Iq4Xs | DType::Q4Z => spread(isa, tile, scratch),
            DType::Q5_1 | DType::Q4K | DType::Q5K => spread_min(isa, tile, scratch),
            DType::Q3K | DType::Q6K => spread_halves(isa, tile, scratch),
            DType::Q2K => spread_min_halves(isa, tile, scratch),
            DType::F32 | DType::F16 | DType::Bf16 | DType::E4m3 => unreachable!("{dtype} has no integers"),
        },
        Layout::Floats(dtype) => floats(isa, dtype, tile, scratch),
        Layout::Tiles | Layout::PackedTiles(_) => bf16(isa, tile, scratch),
    }
}

// A function for each format (and instruction set): one for all of them would keep the compiler busy for minutes.
per_isa! {
    fn q40(tile: &Tile<'_>, scratch: &mut Scratch) = quantised::<_, Q40>;
}
per_isa! {
    fn q41(tile: &Tile<'_>, scratch: &mut Scratch) = quantised::<_, Q41>;
}
per_isa! {
    fn q80(tile: &Tile<'_>, scratch: &mut Scratch) = quantised::<_, Q80>;
}
per_isa! {
    fn spread(tile: &Tile<'_>, scratch: &mut Scratch) = quantised::<_, Spread<false, false>>;
}
per_isa! {
    fn spread_min(tile: &Tile<'_>, scratch: &mut Scratch) = quantised::<_, Spread<true, false>>;
}
per_isa! {
    fn spread_halves(tile: &Tile<'_>, scratch: &mut Scratch) = quantised::<_, Spread<false, true>>;
}
per_isa! {
    fn spread_min_halves(tile: &Tile<'_>, scratch: &mut Scratch) = quantised::<_, Spread<true, true>>;
}
per_isa! {
    fn floats(dtype: DType, tile: &Tile<'_>, scratch: &mut Scratch) = float_panels;
}
per_isa! {
    fn bf16(tile: &Tile<'_>, scratch: &mut Scratch) = gemm_t::panels;
}

#[inline(always)]
fn quantised<S: Simd, F: Format>(s: S, tile: &Tile<'_>, scratch: &mut Scratch) {
    for panel in tile.panels.clone() {
        quantised_panel::<S, F>(s, tile, panel, scratch);
    }
    seal(s, tile);
}

#[inline(always)]
fn float_panels<S: Simd>(s: S, dtype: DType, tile: &Tile<'_>, scratch: &mut Scratch) {
    for panel in tile.panels.clone() {
        float_panel(s, tile, panel, dtype, scratch);
    }
    seal(s, tile);
}

/// Puts activations that the tile has made into the form that the next weight reads, if they are not yet.
#[inline(always)]
pub(super) fn seal<S: Simd>(s: S, tile: &Tile<'_>) {
    if let Out::Act(act) = &tile.product.out
        && !act.is_tiles()
    {
        let columns = columns_of(tile, tile.panels.start).start..columns_of(tile, tile.panels.end - 1).end;
        for row in tile.rows.clone() {
            // SAFETY: this tile has written these values just now and is alone with them.
            unsafe { act.seal(s, row, columns.start, columns.len()) };
        }
    }
}

/// One panel of integers for all of the tile's rows. From three row groups on they share one unpacking, and k is taken in
/// pieces so that what was unpacked stays in the L1 cache; the running sums of a row wait in `sums` meanwhile.
#[inline(always)]
fn quantised_panel<S: Simd, F: Format>(s: S, tile: &Tile<'_>, panel: usize, scratch: &mut Scratch) {
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
    finish(s, tile, panel, &tile.rows, sums);
}

/// One panel of floats for all of the tile's rows.
#[inline(always)]
fn float_panel<S: Simd>(s: S, tile: &Tile<'_>, panel: usize, dtype: DType, scratch: &mut Scratch) {
    let act = &tile.product.act;
    let sums = sums_of(&mut scratch.sums, tile.rows.len());
    for (group, sums) in sums.chunks_mut(S::ROWS).enumerate() {
        let rows = &act.f[(tile.rows.start + group * S::ROWS) * act.k..][..sums.len() * act.k];
        gemm_f::rows(s, dtype, tile.part.panel(panel), rows, sums);
    }
    finish(s, tile, panel, &tile.rows, sums);
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
pub(super) fn columns_of(tile: &Tile<'_>, panel: usize) -> Range<usize> {
    let width = if tile.product.weight.gated { PANEL / 2 } else { PANEL };
    let start = panel * width;
    tile.part.n_start + start..tile.part.n_start + tile.part.n.min(start + width)
}

/// Brings a panel's products for some rows to memory.
#[inline(always)]
fn finish<S: Simd>(s: S, tile: &Tile<'_>, panel: usize, rows: &Range<usize>, sums: &[[f32; PANEL]]) {
    let columns = columns_of(tile, panel);
    for (row, y) in rows.clone().zip(sums) {
        finish_row(s, tile.product, &columns, row, y);
    }
}

/// Brings a panel's products for a row to memory.
#[inline(always)]
pub(super) fn finish_row<S: Simd>(s: S, product: &Product<'_>, columns: &Range<usize>, row: usize, y: &[f32; PANEL]) {
    // SAFETY: a panel's row is two vectors.
    let (low, high) = unsafe { (s.load(y.as_ptr()), s.load(y.as_ptr().add(LANES))) };
    if let (Out::Act(act), Epilogue::Gate(f)) = (&product.out, product.epilogue)
        && act.is_tiles()
    {
        let mut gated = [0.0; LANES];
        // SAFETY: 16 values; each (row, panel) belongs to one tile, and panels share no columns.
        unsafe {
            s.store(gated.as_mut_ptr(), gate(s, f, low, high));
            act.write(s, row, columns.start, &gated[..columns.len()]);
        }
        return;
    }
    let (out, _) = product.out.block(&(row..row + 1), columns);
    // SAFETY: the block was asserted to be there; each (row, panel) belongs to one tile, and panels share no columns.
    let out = unsafe { std::slice::from_raw_parts_mut(out, columns.len()) };
    match product.epilogue {
        Epilogue::Store => put(s, [low, high], false, out),
        Epilogue::Add => put(s, [low, high], true, out),
        Epilogue::Gate(f) => put(s, [gate(s, f, low, high)], false, out),
    }
}

/// Stores values, or adds them to what is there; the last of them may find no place.
#[inline(always)]
pub(super) fn put<S: Simd, const N: usize>(s: S, values: [S::V; N], add: bool, out: &mut [f32]) {
    if out.len() == N * LANES {
        for (i, value) in values.into_iter().enumerate() {
            // SAFETY: N vectors, asked just now.
            unsafe {
                let out = out.as_mut_ptr().add(i * LANES);
                s.store(out, if add { s.add(s.load(out), value) } else { value });
            }
        }
        return;
    }
    let mut buffer = [[0.0; LANES]; N];
    for (buffer, value) in buffer.iter_mut().zip(values) {
        // SAFETY: 16 values.
        unsafe { s.store(buffer.as_mut_ptr(), value) };
    }
    out.iter_mut().zip(buffer.as_flattened()).for_each(|(out, x)| *out = if add { *out + x } else { *x });
}

/// f(gate) · up
#[inline(always)]
pub(super) fn gate<S: Simd>(s: S, f: Activation, gate: S::V, up: S::V) -> S::V {
    match f {
        Activation::Silu => s.mul(silu(s, gate), up),
        Activation::GeluTanh => s.mul(gelu(s, gate), up),
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
    s.div(x, s.add(s.splat(1.0), s.exp2(s.mul(u, s.splat(-std::f32::consts::LOG2_E)))))
}
