//! Products of tiles of bfloat16 for the panels and rows of a worker's share. Knows nothing of threads. Invariant: `tile.rs` says
//! in what order a value's products are added; whether a weight lies in memory as tiles or is unpacked on the way changes nothing.

use super::Scratch;
use super::buffer::{LINE, Shared, prefetch_far};
use super::gemm::{Epilogue, Out, PAIR, Tile, columns_of, finish_row, gate, put, seal};
use super::numerics::Layout;
use super::simd::{LANES, Simd};
use super::tile::{self, Meanwhile, TILE, TILE_CELLS, TILE_K, Target, Tiles};
use super::unpack::{PIECES, Packed, Unpacked, Unpacking};
use super::weights::{PANEL, Part};
use crate::device::Activation;
use std::ops::Range;
use std::slice::Chunks;

/// Most k-tiles of a block: a panel's take 2 KiB each, and should stay in the L1 cache (48 KiB) while rows pass by it.
const BLOCK_K: usize = 18;

/// With so few rows the time goes into unpacking the next block, which should stay there, too.
const FEW_ROWS: usize = 192;
const BLOCK_K_OF_FEW_ROWS: usize = 9;

/// Elements of activations that stay in the L2 cache (of 2 MB).
const CACHED_ELEMENTS: usize = 512 << 10;

/// Sums that wait for their next blocks.
const MAX_SUMS: usize = 128 << 10;

/// Most rows of a share.
pub(super) const MAX_ROWS: usize = 512;

const _: () = assert!(MAX_ROWS * PANEL <= MAX_SUMS);

/// A block of k of a panel: k-tiles `k.0..k.1`.
#[derive(Clone, Copy)]
struct Block {
    panel: usize,
    k: (usize, usize),
}

/// In which order a thread takes blocks. Where the activations of a share's rows are too many for the L2 cache, a block of k of
/// theirs is multiplied with some panels before the next one is, while the panels' sums wait.
#[derive(Clone, Copy)]
struct Order {
    /// K-tiles.
    n_k: usize,
    /// K-tiles of a block, less in the last.
    length: usize,
    /// Panels of the share that are taken together, less at its end.
    group: usize,
    /// The share's panels.
    panels: (usize, usize),
    /// Up to which panel this thread goes on, as far as one can tell.
    to_come: usize,
}

impl Order {
    fn new(n_rows: usize, k: usize, panels: &Range<usize>, to_come: usize) -> Self {
        let n_rows = n_rows.next_multiple_of(PAIR);
        assert!(n_rows <= MAX_ROWS && !panels.is_empty() && panels.end <= to_come);
        let n_k = k.div_ceil(TILE_K);
        let all_cached = n_rows * k <= CACHED_ELEMENTS;
        let most_k = if n_rows <= FEW_ROWS { BLOCK_K_OF_FEW_ROWS } else { BLOCK_K };
        let n_groups = panels.len().div_ceil(MAX_SUMS / PANEL / n_rows);
        Self {
            n_k,
            length: n_k.div_ceil(n_k.div_ceil(most_k)),
            group: if all_cached { 1 } else { panels.len().div_ceil(n_groups) },
            panels: (panels.start, panels.end),
            to_come,
        }
    }

    /// A panel's block that begins there.
    fn block(&self, panel: usize, start: usize) -> Block {
        Block { panel, k: (start, self.n_k.min(start + self.length)) }
    }

    /// The block after one. No group goes over the share's end: what comes then is another share, of which this is but a guess.
    fn after(&self, block: Block) -> Option<Block> {
        let (start, end) = if block.panel < self.panels.1 { self.panels } else { (self.panels.1, self.to_come) };
        let first = block.panel - (block.panel - start) % self.group;
        let end = end.min(first + self.group);
        if block.panel + 1 < end {
            Some(self.block(block.panel + 1, block.k.0))
        } else if block.k.1 < self.n_k {
            Some(self.block(first, block.k.1))
        } else {
            (end < self.to_come).then(|| self.block(end, 0))
        }
    }
}

/// Makes a worker's memory.
pub(super) fn reserve(scratch: &mut Scratch) {
    scratch.sums.reserve(MAX_SUMS);
    scratch.unpacked.reserve(BLOCK_K);
}

/// All panels of a share.
#[inline(always)]
pub(super) fn panels<S: Simd>(s: S, tile: &Tile<'_>, scratch: &mut Scratch) {
    tile.product.isa.unit().prepare();
    let order = Order::new(tile.rows.len(), tile.product.act.k, &tile.panels, tile.to_come);
    let mut next = Some(order.block(tile.panels.start, 0));
    while let Some(block) = next.filter(|block| block.panel < tile.panels.end) {
        one_block(s, tile, (&order, block), scratch);
        next = order.after(block);
    }
    seal(s, tile);
}

/// One block for all of the tile's rows, two tiles of rows at a time. What is to be done with two tiles' results is done while
/// the next two are multiplied: the unit for tiles and the lanes work side by side.
#[inline(always)]
fn one_block<S: Simd>(s: S, tile: &Tile<'_>, (order, block): (&Order, Block), scratch: &mut Scratch) {
    const STRIDE: usize = TILE_K * size_of::<u16>();
    const STEP: usize = TILE_CELLS * size_of::<u16>();
    let (product, columns) = (tile.product, columns_of(tile, block.panel));
    let act = product.act;
    let (start, n_k) = (block.k.0, block.k.1 - block.k.0);
    assert!(tile.rows.start.is_multiple_of(TILE));
    let n_rows = tile.rows.len().next_multiple_of(PAIR);
    let (weights, ahead) = weights(s, tile.part, (order, block), n_rows / PAIR * n_k, &mut scratch.unpacked);
    assert_eq!(weights.len(), n_k * 2 * TILE_CELLS);
    let (is_all, is_last) = (n_k == order.n_k, block.k.1 == order.n_k);
    // Of all of k two pairs' sums are enough, of which one is brought to memory while the other is made.
    let (n_kept, n_sums) = if is_all { (2 * PAIR, 1) } else { (n_rows, order.group) };
    scratch.sums.reserve(n_kept * n_sums * PANEL);
    let sums = Shared::new(&mut scratch.sums[..n_kept * n_sums * PANEL]);
    let first = (block.panel - order.panels.0) % n_sums * n_kept * PANEL;
    let at_once = PAIR.div_ceil(n_k);
    let mut finish =
        Finish { s, tile, columns: &columns, rows: 0..0, sums: &[], n_done: 0, place: Place::Anywhere, ahead, at_once };
    for row in tile.rows.clone().step_by(PAIR) {
        let rows = row..tile.rows.end.min(row + PAIR);
        // Whole tiles whose products need nothing more go where they belong.
        let direct = product.epilogue == Epilogue::Store && is_all && rows.len() == PAIR && columns.len() == PANEL;
        let place = first + (row - tile.rows.start) % n_kept * PANEL;
        let (to, stride) = if direct { product.out.block(&rows, &columns) } else { (sums.at(place, PAIR * PANEL), PANEL) };
        let target = Target { start: to, stride, n_rows: rows.len(), add: start > 0 };
        let left = |row: usize| act.tiles[act.tile_row(row) + start * TILE_CELLS..][..n_k * TILE_CELLS].as_ptr();
        let b = Tiles { start: [weights.as_ptr(), weights[TILE_CELLS..].as_ptr()], stride: STRIDE, step: 2 * STEP };
        // SAFETY: the slices hold `n_k` tiles of each operand; the target is 32 rows of 32, in `sums` or (each (row, panel)
        // belongs to one tile, and panels share no columns) a block that was asserted to be there.
        unsafe {
            if rows.len() > TILE {
                let a = Tiles { start: [left(row), left(row + TILE)], stride: STRIDE, step: STEP };
                tile::multiply::<_, 2, true>(s, product.isa.unit(), (&a, &b), n_k, target, &mut finish);
            } else {
                let a = Tiles { start: [left(row)], stride: STRIDE, step: STEP };
                tile::multiply::<_, 1, true>(s, product.isa.unit(), (&a, &b), n_k, target, &mut finish);
            }
        }
        finish.all();
        if is_last && !direct {
            // SAFETY: they are written again only after the next pair's are made, and these are in memory by then.
            let sums = unsafe { sums.part(place, rows.len() * PANEL) };
            finish.take(rows, sums.as_chunks().0);
        }
    }
    finish.all();
}

/// A block's tiles, and what is to be done for those that this thread takes next, as far as one can tell, in so many steps.
/// What is read once per step of the model comes from far away, and many requests at once would hold up what is needed now:
/// it is asked for line by line.
#[inline(always)]
fn weights<'a, S: Simd>(
    s: S,
    part: &'a Part,
    (order, block): (&Order, Block),
    n_steps: usize,
    unpacked: &'a mut Unpacked,
) -> (&'a [u16], Ahead<'a>) {
    let bytes_of = |block: Block| {
        let k_bytes = part.panel_bytes() / order.n_k;
        &part.panel(block.panel)[block.k.0 * k_bytes..block.k.1 * k_bytes]
    };
    let next = order.after(block);
    let Layout::PackedTiles(dtype) = part.layout else {
        let bytes = bytes_of(block);
        // SAFETY: all of the block's bytes; any two are a bfloat16, and panels begin at lines.
        let tiles = unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<u16>()) };
        return (tiles, Ahead::new(n_steps, next.map_or(&[][..], bytes_of), None));
    };
    let packed = |block: Block| Packed { part: part.number, panel: block.panel, k: block.k, dtype, bytes: bytes_of(block) };
    let (tiles, unpacking) = unpacked.block(s, packed(block), next.map(packed));
    let later = next.and_then(|next| order.after(next));
    (tiles, Ahead::new(n_steps, later.map_or(&[][..], bytes_of), unpacking))
}

/// What is done for later blocks while one is multiplied, some of it every few k-tiles.
struct Ahead<'a> {
    /// Of one that is to be read, what is asked for.
    lines: Chunks<'a, u8>,
    /// The next one, if it must be.
    unpacking: Option<Unpacking<'a>>,
    /// Pieces of that that are made together.
    at_once: usize,
    /// K-tiles from one time to the next, and until the next.
    every: usize,
    wait: usize,
}

impl<'a> Ahead<'a> {
    /// For so many k-tiles.
    fn new(n_steps: usize, lines: &'a [u8], unpacking: Option<Unpacking<'a>>) -> Self {
        let n_pieces = unpacking.as_ref().map_or(0, Unpacking::n_left);
        // A whole tile at once: what its pieces need is made once.
        let n_times = if n_pieces == 0 { n_steps.div_ceil(4) } else { n_steps.min(n_pieces.div_ceil(PIECES)) };
        let every = n_steps / n_times;
        let lines = lines.chunks(lines.len().div_ceil(n_times).next_multiple_of(LINE).max(LINE));
        Self { lines, unpacking, at_once: n_pieces.div_ceil(n_times), every, wait: 0 }
    }

    #[inline(always)]
    fn some<S: Simd>(&mut self, s: S) {
        if self.wait > 0 {
            self.wait -= 1;
            return;
        }
        self.wait = self.every - 1;
        prefetch_far(self.lines.next().unwrap_or_default());
        if let Some(unpacking) = &mut self.unpacking
            && unpacking.n_left() > 0
        {
            unpacking.some(s, self.at_once);
        }
    }
}

/// What is done while two tiles of rows are multiplied, some of it with each k-tile: the products before them are brought to
/// memory, and later weights are made ready.
struct Finish<'t, 'a, S> {
    s: S,
    tile: &'t Tile<'t>,
    columns: &'t Range<usize>,
    /// Two tiles' rows.
    rows: Range<usize>,
    /// Theirs.
    sums: &'a [[f32; PANEL]],
    /// Those that were brought.
    n_done: usize,
    place: Place,
    ahead: Ahead<'t>,
    /// Rows for each k-tile.
    at_once: usize,
}

/// Where two tiles' products go. What most of them need is found out once for all their rows.
#[derive(Clone, Copy)]
enum Place {
    /// Whole rows of a panel, so many elements apart, are stored, or added to what is there.
    Values { start: *mut f32, stride: usize, add: bool },
    /// Whole gated vectors, rounded, into tiles of rows that are so many elements apart.
    Gated { start: *mut u16, stride: usize, f: Activation },
    /// See [`finish_row`].
    Anywhere,
}

impl<'a, S: Simd> Finish<'_, 'a, S> {
    /// Takes two tiles' rows; those before are brought.
    #[inline(always)]
    fn take(&mut self, rows: Range<usize>, sums: &'a [[f32; PANEL]]) {
        assert_eq!(rows.len(), sums.len());
        let (product, columns) = (self.tile.product, self.columns);
        self.place = match (&product.out, product.epilogue) {
            (Out::Act(act), Epilogue::Gate(f)) if act.is_tiles() && columns.len() == LANES => {
                let (start, stride) = act.vectors(&rows, columns.start);
                Place::Gated { start, stride, f }
            }
            (out, Epilogue::Store | Epilogue::Add) if columns.len() == PANEL => {
                let (start, stride) = out.block(&rows, columns);
                Place::Values { start, stride, add: product.epilogue == Epilogue::Add }
            }
            _ => Place::Anywhere,
        };
        (self.rows, self.sums, self.n_done) = (rows, sums, 0);
    }

    #[inline(always)]
    fn rows(&mut self, n: usize) {
        let (s, first) = (self.s, self.n_done);
        self.n_done = self.sums.len().min(first + n);
        for (i, sums) in self.sums.iter().enumerate().take(self.n_done).skip(first) {
            match self.place {
                // SAFETY: the rows are there, asserted when they were taken; each (row, panel) belongs to one tile, and panels
                // share no columns.
                Place::Values { start, stride, add } => unsafe {
                    put(
                        s,
                        [s.load(sums.as_ptr()), s.load(sums.as_ptr().add(LANES))],
                        add,
                        std::slice::from_raw_parts_mut(start.add(i * stride), PANEL),
                    );
                },
                // SAFETY: as above.
                Place::Gated { start, stride, f } => unsafe {
                    let mut gated = [0.0; LANES];
                    s.store(gated.as_mut_ptr(), gate(s, f, s.load(sums.as_ptr()), s.load(sums.as_ptr().add(LANES))));
                    s.round_bf16(gated.as_ptr(), start.add(i / TILE * stride + i % TILE * TILE_K));
                },
                Place::Anywhere => finish_row(s, self.tile.product, self.columns, self.rows.start + i, sums),
            }
        }
    }

    #[inline(always)]
    fn all(&mut self) {
        self.rows(self.sums.len());
    }
}

impl<S: Simd> Meanwhile for Finish<'_, '_, S> {
    #[inline(always)]
    fn some(&mut self) {
        self.ahead.some(self.s);
        self.rows(self.at_once);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group that went on into the next share would leave its own last panels without their last blocks.
    #[test]
    fn a_share_takes_every_block_once_and_each_panels_in_order() {
        for n_rows in (PAIR..=MAX_ROWS).step_by(PAIR) {
            for k in [32, 576, 608, 1536, 2048, 4096, 14_336] {
                for (n_panels, to_come) in (1..=34).flat_map(|n| [(n, n), (n, n + 1), (n, 3 * n)]) {
                    let (start, n_k) = (5, k / TILE_K);
                    let order = Order::new(n_rows, k, &(start..start + n_panels), start + to_come);
                    assert!(order.group == 1 || order.group * n_rows * PANEL <= MAX_SUMS);
                    let mut done = vec![0; n_panels];
                    let mut next = Some(order.block(start, 0));
                    while let Some(block) = next.filter(|block| block.panel < start + n_panels) {
                        assert_eq!(done[block.panel - start], block.k.0, "{n_rows} rows, k {k}, {n_panels} panels");
                        done[block.panel - start] = block.k.1;
                        next = order.after(block);
                    }
                    assert!(
                        done.iter().all(|&done| done == n_k),
                        "{n_rows} rows, k {k}, {n_panels} of {to_come} panels: {done:?}"
                    );
                    assert_eq!(next.is_some(), to_come > n_panels);
                }
            }
        }
    }
}
