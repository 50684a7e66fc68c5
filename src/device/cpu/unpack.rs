//! Quantised weights made tiles of bfloat16 by and by, while other tiles are multiplied: 4 or 8 bits a weight come from
//! memory, not 16. Knows nothing of products.
//!
//! Invariant: a weight is what its file means, rounded to bfloat16 once, as in [`Layout::Tiles`].

use super::buffer::Aligned;
use super::simd::{Format, LANES, Q40, Q41, Q80, Simd, Spread};
use super::tile::TILE_CELLS;
use super::weights::{BLOCK, PANEL};
use crate::tensor::DType;
use std::ops::Range;

/// Pieces of a tile: groups p and p + 4 of its elements of k make one.
pub(super) const PIECES: usize = 4;

/// Elements of a tile's row: a pair of elements of k for 16 columns.
const ROW: usize = 2 * LANES;

/// A block of k of a panel of packed weights.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a> {
    /// The part's number.
    pub(super) part: u64,
    pub(super) panel: usize,
    /// K-tiles, the first and the one after the last.
    pub(super) k: (usize, usize),
    pub(super) dtype: DType,
    pub(super) bytes: &'a [u8],
}

impl Packed<'_> {
    fn name(&self) -> Name {
        (self.part, self.panel, self.k)
    }

    /// Elements.
    fn n_cells(&self) -> usize {
        (self.k.1 - self.k.0) * 2 * TILE_CELLS
    }
}

/// What tells a block from all others.
type Name = (u64, usize, (usize, usize));

/// A thread's blocks as tiles: the one that is multiplied, and the one that comes after it.
#[derive(Default)]
pub(super) struct Unpacked {
    places: [Place; 2],
}

/// Room for a block.
#[derive(Default)]
struct Place {
    tiles: Aligned<u16>,
    holds: Option<Name>,
}

/// A block that is being unpacked.
pub(super) struct Unpacking<'a> {
    packed: Packed<'a>,
    /// The pieces still to do.
    pieces: Range<usize>,
    place: &'a mut Place,
}

impl Unpacked {
    /// Makes room for blocks of up to `n_k` k-tiles.
    pub(super) fn reserve(&mut self, n_k: usize) {
        self.places.iter_mut().for_each(|place| place.tiles.reserve(n_k * 2 * TILE_CELLS));
    }

    /// A block's tiles, unpacked now if they are not yet, and the unpacking of the block after it, if that is to come.
    #[inline(always)]
    pub(super) fn block<'a, S: Simd>(
        &'a mut self,
        s: S,
        now: Packed<'a>,
        next: Option<Packed<'a>>,
    ) -> (&'a [u16], Option<Unpacking<'a>>) {
        let [here, there] = &mut self.places;
        let (here, there) = if there.holds == Some(now.name()) { (there, here) } else { (here, there) };
        if here.holds != Some(now.name()) {
            Unpacking::new(now, here).some(s, usize::MAX);
        }
        let next = next.filter(|next| there.holds != Some(next.name())).map(|next| Unpacking::new(next, there));
        (&here.tiles[..now.n_cells()], next)
    }
}

impl<'a> Unpacking<'a> {
    #[inline(always)]
    fn new(packed: Packed<'a>, place: &'a mut Place) -> Self {
        place.holds = None;
        place.tiles.reserve(packed.n_cells());
        Self { packed, pieces: 0..packed.n_cells() / TILE_CELLS * PIECES, place }
    }

    /// Pieces still to do.
    #[inline(always)]
    pub(super) fn n_left(&self) -> usize {
        self.pieces.len()
    }

    /// Unpacks up to `n` pieces.
    #[inline(always)]
    pub(super) fn some<S: Simd>(&mut self, s: S, n: usize) {
        let end = self.pieces.end.min(self.pieces.start.saturating_add(n));
        let (packed, pieces, tiles) = (self.packed.bytes, self.pieces.start..end, &mut *self.place.tiles);
        match self.packed.dtype {
            DType::Q4_0 => s.unpack::<Q40>(packed, pieces, tiles),
            DType::Q4_1 => s.unpack::<Q41>(packed, pieces, tiles),
            DType::Q8_0 => s.unpack::<Q80>(packed, pieces, tiles),
            DType::Q5_0 | DType::Iq4Nl | DType::Iq4Xs | DType::Q4Z => s.unpack::<Spread<false, false>>(packed, pieces, tiles),
            DType::Q5_1 | DType::Q4K | DType::Q5K => s.unpack::<Spread<true, false>>(packed, pieces, tiles),
            DType::Q3K | DType::Q6K => s.unpack::<Spread<false, true>>(packed, pieces, tiles),
            DType::Q2K => s.unpack::<Spread<true, true>>(packed, pieces, tiles),
            DType::F32 | DType::F16 | DType::Bf16 | DType::E4m3 => unreachable!("{} has no integers", self.packed.dtype),
        }
        self.pieces.start = end;
        if end == self.pieces.end {
            self.place.holds = Some(self.packed.name());
        }
    }
}

/// Some pieces of a panel in packed blocks (`weights.rs`), in plain steps.
#[inline(always)]
pub(super) fn plainly<S: Simd, F: Format>(s: S, packed: &[u8], pieces: Range<usize>, tiles: &mut [u16]) {
    for piece in pieces {
        let (tile, p) = (piece / PIECES, piece % PIECES);
        let (block, c) = (tile / 2, tile % 2);
        let (header, integers) = packed[block * packed_bytes::<F>()..][..packed_bytes::<F>()].split_at(header_bytes::<F>());
        for h in 0..2 {
            let (d, m) = scales::<S, F>(s, header, c, h);
            for j in 0..2 {
                let row = &mut tiles[tile * TILE_CELLS + (2 * (p + 4 * h) + j) * ROW..][..ROW];
                for odd in 0..2 {
                    let (mut values, mut rounded) = ([0.0f32; LANES], [0u16; LANES]);
                    for lane in 0..LANES {
                        let byte = 4 * lane + 2 * j + odd;
                        let q = if F::NIBBLES {
                            integers[(2 * p + c) * 64 + byte] >> (4 * h) & 15
                        } else {
                            integers[(4 * p + 2 * h + c) * 64 + byte]
                        };
                        values[lane] = (i32::from(q) - F::ZERO) as f32;
                    }
                    // SAFETY: arrays of 16.
                    unsafe {
                        let product = s.mul(d, s.load(values.as_ptr()));
                        s.store(values.as_mut_ptr(), if F::MIN { s.add(product, m) } else { product });
                        s.round_bf16(values.as_ptr(), rounded.as_mut_ptr());
                    }
                    for lane in 0..LANES {
                        row[2 * lane + odd] = rounded[lane];
                    }
                }
            }
        }
    }
}

/// Scales of a column and block.
pub(super) const fn n_scales<F: Format>() -> usize {
    if F::HALVES { 2 } else { 1 }
}

/// Bytes before the integers of a packed block.
pub(super) const fn header_bytes<F: Format>() -> usize {
    let scale_bytes = if F::SPREAD { size_of::<f32>() } else { size_of::<u16>() };
    n_scales::<F>() * (if F::MIN { 2 } else { 1 }) * scale_bytes * PANEL
}

/// Bytes of a packed block.
pub(super) const fn packed_bytes<F: Format>() -> usize {
    header_bytes::<F>() + if F::NIBBLES { BLOCK * PANEL / 2 } else { BLOCK * PANEL }
}

/// Scales and minimums (0 where the format has none) of half `c` of a block's columns, for half `h` of its elements.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "vectors need no alignment")]
fn scales<S: Simd, F: Format>(s: S, header: &[u8], c: usize, h: usize) -> (S::V, S::V) {
    assert_eq!(header.len(), header_bytes::<F>());
    let first = c * LANES + if F::HALVES { h * PANEL } else { 0 };
    let min = first + n_scales::<F>() * PANEL;
    // SAFETY: a header is scales for all columns (of each half) and as many minimums, if the format has them.
    unsafe {
        if F::SPREAD {
            let header = header.as_ptr().cast::<f32>();
            (s.load(header.add(first)), if F::MIN { s.load(header.add(min)) } else { s.splat(0.0) })
        } else {
            let header = header.as_ptr().cast::<u16>();
            (s.load_f16(header.add(first)), if F::MIN { s.load_f16(header.add(min)) } else { s.splat(0.0) })
        }
    }
}
