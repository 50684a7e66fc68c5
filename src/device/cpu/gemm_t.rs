//! Products of tiles of bfloat16 for the panels and rows of a worker's share. Knows nothing of threads. Invariant: `tile.rs` says
//! in what order a value's products are added; whether a weight lies in memory as tiles or is unpacked on the way changes nothing.

use super::Scratch;
use super::buffer::{LINE, prefetch_far};
use super::gemm::{Epilogue, PAIR, Tile, columns_of, finish_row, seal};
use super::numerics::Layout;
use super::simd::Simd;
use super::tile::{self, Meanwhile, TILE, TILE_CELLS, TILE_K, Target, Tiles};
use super::unpack::{self, Unpacked, Unpacking};
use super::weights::PANEL;
use std::ops::Range;
use std::slice::Chunks;

/// All panels of a share.
#[inline(always)]
pub(super) fn panels<S: Simd>(s: S, tile: &Tile<'_>, scratch: &mut Scratch) {
    tile.product.isa.unit().prepare();
    for panel in tile.panels.clone() {
        one_panel(s, tile, panel, scratch);
    }
    seal(s, tile);
}

/// One panel of tiles for all of the tile's rows, two tiles of rows at a time. What is to be done with two tiles' results
/// is done while the next two are multiplied: the unit for tiles and the lanes work side by side.
#[inline(always)]
fn one_panel<S: Simd>(s: S, tile: &Tile<'_>, panel: usize, scratch: &mut Scratch) {
    const STRIDE: usize = TILE_K * size_of::<u16>();
    let (product, columns) = (tile.product, columns_of(tile, panel));
    let act = product.act;
    let n_k = act.k.div_ceil(TILE_K);
    assert!(tile.rows.start.is_multiple_of(TILE));
    let n_steps = tile.rows.len().div_ceil(PAIR) * n_k;
    let (weights, ahead) = weights(s, tile, panel, n_steps, &mut scratch.unpacked);
    assert_eq!(weights.len(), n_k * 2 * TILE_CELLS);
    let weights = weights.as_ptr();
    let b = Tiles { start: [weights, weights.wrapping_add(TILE_CELLS)], stride: STRIDE, step: 2 * TILE_CELLS * size_of::<u16>() };
    scratch.sums.reserve(2 * PAIR * PANEL);
    let (mut sums, mut done) = scratch.sums[..2 * PAIR * PANEL].split_at_mut(PAIR * PANEL);
    let at_once = PAIR.div_ceil(n_k);
    let mut finish = Finish { s, tile, columns: &columns, rows: 0..0, sums: &[], to_come: 0..0, ahead, at_once };
    for row in tile.rows.clone().step_by(PAIR) {
        let rows = row..tile.rows.end.min(row + PAIR);
        finish.to_come = rows.clone();
        // Whole tiles whose products need nothing more go where they belong.
        let direct = product.epilogue == Epilogue::Store && rows.len() == PAIR && columns.len() == PANEL;
        let (start, stride) = if direct { product.out.block(&rows, &columns) } else { (sums.as_mut_ptr(), PANEL) };
        let target = Target { start, stride, n_rows: rows.len(), add: false };
        let first = &act.tiles[act.tile_row(rows.start)..][..n_k * TILE_CELLS];
        let step = TILE_CELLS * size_of::<u16>();
        // SAFETY: the slices hold `n_k` tiles of each operand; the target is 32 rows of 32, `sums` or (each (row, panel)
        // belongs to one tile, and panels share no columns) a block that was asserted to be there.
        unsafe {
            if rows.len() > TILE {
                let second = &act.tiles[act.tile_row(rows.start + TILE)..][..n_k * TILE_CELLS];
                let a = Tiles { start: [first.as_ptr(), second.as_ptr()], stride: STRIDE, step };
                tile::multiply(s, product.isa.unit(), (&a, &b), n_k, target, &mut finish);
            } else {
                let a = Tiles { start: [first.as_ptr()], stride: STRIDE, step };
                tile::multiply(s, product.isa.unit(), (&a, &b), n_k, target, &mut finish);
            }
        }
        finish.all();
        if !direct {
            let ahead = finish.ahead;
            std::mem::swap(&mut sums, &mut done);
            finish = Finish { s, tile, columns: &columns, rows, sums: done.as_chunks().0, to_come: 0..0, ahead, at_once };
        }
    }
    finish.all();
}

/// A panel as tiles, and what is to be done for those that this thread takes next, as far as one can tell, in so many steps.
/// What is read once per step of the model comes from far away, and many requests at once would hold up what is needed now:
/// it is asked for line by line.
#[inline(always)]
fn weights<'a, S: Simd>(
    s: S,
    tile: &Tile<'a>,
    panel: usize,
    n_steps: usize,
    unpacked: &'a mut Unpacked,
) -> (&'a [u16], Ahead<'a>) {
    let part = tile.part;
    let end = if tile.rows.end == tile.product.n_rows { part.n_panels } else { tile.panels.end };
    let later = |n: usize| Some(panel + n).filter(|&later| later < end);
    let lines = |later: Option<usize>| {
        let bytes = later.map_or(&[][..], |later| part.panel(later));
        bytes.chunks(bytes.len().div_ceil(n_steps).next_multiple_of(LINE).max(LINE))
    };
    let Layout::PackedTiles(dtype) = part.layout else {
        let bytes = part.panel(panel);
        // SAFETY: all of the panel's bytes; any two are a bfloat16, and panels begin at lines.
        let tiles = unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<u16>()) };
        return (tiles, Ahead { lines: lines(later(1)), unpacking: None, at_once: 0 });
    };
    let is_kept = tile.rows.len() < tile.product.n_rows;
    let n_places = if is_kept { tile.panels.len().min(unpack::kept_panels(part)) + 1 } else { unpack::FEW };
    let (tiles, unpacking) = unpacked.panels(s, (part, dtype), panel, (later(1), n_places));
    let at_once = unpacking.as_ref().map_or(0, |unpacking| unpacking.n_left().div_ceil(n_steps));
    (tiles, Ahead { lines: lines(later(2)), unpacking, at_once })
}

/// What is done for later panels while one is multiplied, some of it with each k-tile.
struct Ahead<'a> {
    /// Of one that is to be read, what is asked for.
    lines: Chunks<'a, u8>,
    /// The next one, if it must be.
    unpacking: Option<Unpacking<'a>>,
    /// Pieces of that for each k-tile.
    at_once: usize,
}

impl Ahead<'_> {
    #[inline(always)]
    fn some<S: Simd>(&mut self, s: S) {
        prefetch_far(self.lines.next().unwrap_or_default());
        if let Some(unpacking) = &mut self.unpacking
            && unpacking.n_left() > 0
        {
            unpacking.some(s, self.at_once);
        }
    }
}

/// What is done while two tiles of rows are multiplied, some of it with each k-tile: the products before them are brought to
/// memory, that which theirs need is asked for, and later weights are made ready.
struct Finish<'t, 'a, S> {
    s: S,
    tile: &'t Tile<'t>,
    columns: &'t Range<usize>,
    /// The rows still to be brought.
    rows: Range<usize>,
    /// Theirs.
    sums: &'a [[f32; PANEL]],
    /// The rows being multiplied for whose results no memory was asked yet.
    to_come: Range<usize>,
    ahead: Ahead<'t>,
    /// Rows for each k-tile.
    at_once: usize,
}

impl<S: Simd> Finish<'_, '_, S> {
    #[inline(always)]
    fn rows(&mut self, n: usize) {
        for _ in 0..n.min(self.rows.len()) {
            finish_row(self.s, self.tile.product, self.columns, self.rows.start, &self.sums[0]);
            self.rows.start += 1;
            self.sums = &self.sums[1..];
        }
    }

    #[inline(always)]
    fn all(&mut self) {
        self.rows(self.rows.len());
    }
}

impl<S: Simd> Meanwhile for Finish<'_, '_, S> {
    #[inline(always)]
    fn some(&mut self) {
        self.ahead.some(self.s);
        let middle = self.to_come.end.min(self.to_come.start + self.at_once);
        if self.to_come.start < middle {
            self.tile.product.out.prefetch(&(self.to_come.start..middle), self.columns);
            self.to_come.start = middle;
        }
        self.rows(self.at_once);
    }
}
