//! Activations in the forms that weights read: f32, integers (per token and block of 32, i8 with an f32 scale), tiles of
//! bfloat16. Knows nothing of weights but which of these they want. Invariant: a block's integers and scale depend on its 32 values alone.

use super::buffer::{Aligned, Shared};
use super::isa::{Isa, per_isa};
use super::numerics::{Form, Numerics};
use super::simd::{LANES, Simd, to_bf16};
use super::team::Team;
use super::tile::{TILE, TILE_CELLS, TILE_K};
use super::weights::{BLOCK, Weight};
use std::ops::Range;

/// Activations of up to `max_tokens` tokens, `[max_tokens, k]`: as f32, and in the form that the consumer wants.
pub struct Act {
    pub(super) k: usize,
    /// `[max_tokens, k]`
    pub(super) f: Aligned<f32>,
    pub(super) ints: Integers<Aligned<i8>, Aligned<f32>, Aligned<i32>>,
    /// As bfloat16, `[max_tokens / 16][k / 32]` tiles of 16 rows by 32 elements; what lies beyond k is 0.
    pub(super) tiles: Aligned<u16>,
    /// Whether `f` is written where nobody reads it but tests.
    keeps_values: bool,
}

/// Quantised activations: x ≈ scale · q.
#[derive(Clone, Copy)]
pub(super) struct Integers<Q, S, T> {
    /// `[tokens, k]`, −127 to 127.
    pub(super) q: Q,
    /// `[tokens, k / 32]`
    pub(super) scale: S,
    /// scale · Σ q over the block: what a weight block's minimum is multiplied by. `[tokens, k / 32]`
    pub(super) scaled_sum: S,
    /// Σ q over the block. `[tokens, k / 32]`
    pub(super) sum: T,
    /// Σ q over the first half of the block. `[tokens, k / 32]`
    pub(super) first_sum: T,
}

impl Act {
    pub(super) fn new(numerics: Numerics, max_tokens: usize, k: usize) -> Self {
        let n_blocks = if numerics.has_int8_products() { max_tokens * (k / BLOCK) } else { 0 };
        let ints = Integers {
            q: Aligned::zeroed(n_blocks * BLOCK),
            scale: Aligned::zeroed(n_blocks),
            scaled_sum: Aligned::zeroed(n_blocks),
            sum: Aligned::zeroed(n_blocks),
            first_sum: Aligned::zeroed(n_blocks),
        };
        // Whole pairs of tiles, as kernels read them.
        let n_tiles =
            if numerics == Numerics::Bf16 { max_tokens.next_multiple_of(2 * TILE) / TILE * k.div_ceil(TILE_K) } else { 0 };
        let tiles = Aligned::zeroed(n_tiles * TILE_CELLS);
        Self { k, f: Aligned::zeroed(max_tokens * k), ints, tiles, keeps_values: false }
    }

    /// Where a row's first tile stands, and its row there.
    pub(super) fn tile_row(&self, row: usize) -> usize {
        row / TILE * self.k.div_ceil(TILE_K) * TILE_CELLS + row % TILE * TILE_K
    }

    /// The values before they were put into another form, row after row. Where weights read tiles they are there only after
    /// [`Act::keep_values`].
    pub fn values(&self) -> &[f32] {
        &self.f
    }

    /// Has the values written even where no weight reads them: for tests.
    pub fn keep_values(&mut self) {
        self.keeps_values = true;
    }

    /// Takes rows of another one, in every form they have there: row i becomes its row `rows(i)`.
    pub(super) fn gather(&mut self, team: &Team, from: &Self, n_rows: usize, rows: &(dyn Fn(usize) -> usize + Sync)) {
        assert_eq!(self.k, from.k);
        if !self.tiles.is_empty() {
            self.gather_tiles(from, n_rows, rows);
        }
        let n_blocks = if self.ints.q.is_empty() { 0 } else { self.k / BLOCK };
        let Integers { q, scale, scaled_sum, sum, first_sum } = &mut self.ints;
        let f = (Shared::new(&mut self.f), self.k);
        let (q, scale) = ((Shared::new(q), n_blocks * BLOCK), (Shared::new(scale), n_blocks));
        let (scaled_sum, sum) = ((Shared::new(scaled_sum), n_blocks), (Shared::new(sum), n_blocks));
        let first_sum = (Shared::new(first_sum), n_blocks);
        team.run_rows(n_rows, &|_, range| {
            for i in range {
                let row = rows(i);
                // SAFETY: each row is in one range.
                unsafe {
                    copy_row(&f, i, &from.f, row);
                    copy_row(&q, i, &from.ints.q, row);
                    copy_row(&scale, i, &from.ints.scale, row);
                    copy_row(&scaled_sum, i, &from.ints.scaled_sum, row);
                    copy_row(&sum, i, &from.ints.sum, row);
                    copy_row(&first_sum, i, &from.ints.first_sum, row);
                }
            }
        });
    }

    /// [`Act::gather`] for the tiles: a row's share of each.
    fn gather_tiles(&mut self, from: &Self, n_rows: usize, rows: &dyn Fn(usize) -> usize) {
        for i in 0..n_rows {
            let (to, row) = (self.tile_row(i), from.tile_row(rows(i)));
            for tile in (0..self.k.div_ceil(TILE_K)).map(|tile| tile * TILE_CELLS) {
                self.tiles[to + tile..][..TILE_K].copy_from_slice(&from.tiles[row + tile..][..TILE_K]);
            }
        }
    }

    /// Shared writing in the form that `next` reads.
    pub(super) fn writer(&mut self, isa: Isa, next: &Weight) -> ActWriter<'_> {
        assert_eq!(self.k, next.k, "the activations' width and the next weight's");
        let Integers { q, scale, scaled_sum, sum, first_sum } = &mut self.ints;
        let form = Form::of(next);
        ActWriter {
            isa,
            k: self.k,
            form,
            has_floats: form != Form::Tiles || self.keeps_values,
            f: Shared::new(&mut self.f),
            tiles: Shared::new(&mut self.tiles),
            ints: Integers {
                q: Shared::new(q),
                scale: Shared::new(scale),
                scaled_sum: Shared::new(scaled_sum),
                sum: Shared::new(sum),
                first_sum: Shared::new(first_sum),
            },
        }
    }
}

/// Copies row `row` of `from` to row `i`, rows being as long as the pair says.
///
/// # Safety
/// Nobody else may touch that row of the target at the same time.
unsafe fn copy_row<T: Copy>((to, len): &(Shared<'_, T>, usize), i: usize, from: &[T], row: usize) {
    // SAFETY: passed on.
    unsafe { to.part(i * len, *len) }.copy_from_slice(&from[row * len..][..*len]);
}

/// Writes an [`Act`] from several workers at once.
pub(super) struct ActWriter<'a> {
    isa: Isa,
    k: usize,
    /// What the next weight reads.
    form: Form,
    /// Whether the values are wanted as they are too.
    has_floats: bool,
    f: Shared<'a, f32>,
    tiles: Shared<'a, u16>,
    ints: Integers<Shared<'a, i8>, Shared<'a, f32>, Shared<'a, i32>>,
}

impl ActWriter<'_> {
    /// Whether a token's values can be written `n` columns at a time: integers need whole blocks.
    pub(super) fn takes(&self, n: usize) -> bool {
        self.form.takes(n)
    }

    /// Whether results are rounded into tiles, and read from nowhere else.
    pub(super) fn is_tiles(&self) -> bool {
        !self.has_floats
    }

    /// Writes elements `start..` of a token. Integers are made of whole blocks only; see [`ActWriter::takes`].
    ///
    /// # Safety
    /// Nobody else may touch these elements at the same time.
    #[inline(always)]
    pub(super) unsafe fn write<S: Simd>(&self, s: S, token: usize, start: usize, x: &[f32]) {
        if self.has_floats {
            // SAFETY: passed on.
            unsafe { self.f.part(token * self.k + start, x.len()) }.copy_from_slice(x);
        }
        match self.form {
            // SAFETY: passed on.
            Form::Integers if self.takes(x.len()) => unsafe { self.quantise(token, start, x) },
            Form::Floats | Form::Integers => {}
            Form::Tiles => round(s, x, start, &self.tile_row(token)),
        }
    }

    /// Where the vector of elements from `start` on stands in the tiles of some tokens, of which the first begins a tile: the first
    /// token's, and the elements from a tile's tokens to the next one's. Whoever writes there must be alone with them.
    pub(super) fn vectors(&self, tokens: &Range<usize>, start: usize) -> (*mut u16, usize) {
        assert!(start.is_multiple_of(LANES) && start + LANES <= self.k && tokens.start.is_multiple_of(TILE));
        let at = |token: usize| self.tile_row(token).first + start / TILE_K * TILE_CELLS + start % TILE_K;
        let (first, last) = (at(tokens.start), at(tokens.end - 1));
        (self.tiles.at(first, last + LANES - first), self.k.div_ceil(TILE_K) * TILE_CELLS)
    }

    /// Where the values in `columns` of some tokens begin, and the elements from token to token. Whoever writes there must be
    /// alone with them, and call [`ActWriter::seal`] then.
    pub(super) fn block(&self, tokens: &Range<usize>, columns: &Range<usize>) -> (*mut f32, usize) {
        assert!(columns.end <= self.k && self.has_floats);
        let len = (tokens.len() - 1) * self.k + columns.len();
        (self.f.at(tokens.start * self.k + columns.start, len), self.k)
    }

    /// Puts `n` values that were written where they are kept into the form that the next weight wants. Integers need whole
    /// blocks.
    ///
    /// # Safety
    /// Nobody else may touch these values at the same time.
    #[inline(always)]
    pub(super) unsafe fn seal<S: Simd>(&self, s: S, token: usize, start: usize, n: usize) {
        assert!(self.has_floats);
        // SAFETY: passed on.
        let x = unsafe { self.f.part(token * self.k + start, n) };
        match self.form {
            Form::Floats => {}
            // SAFETY: passed on.
            Form::Integers => unsafe { self.quantise(token, start, x) },
            Form::Tiles => round(s, x, start, &self.tile_row(token)),
        }
    }

    /// Quantises elements `start..` of a token.
    ///
    /// # Safety
    /// As [`ActWriter::write`].
    unsafe fn quantise(&self, token: usize, start: usize, x: &[f32]) {
        let n = x.len();
        assert!(start.is_multiple_of(BLOCK) && n.is_multiple_of(BLOCK), "columns {start}+{n} are no whole blocks");
        let (first, n_blocks) = ((token * self.k + start) / BLOCK, n / BLOCK);
        // SAFETY: passed on.
        let mut out = unsafe {
            Integers {
                q: self.ints.q.part(first * BLOCK, n),
                scale: self.ints.scale.part(first, n_blocks),
                scaled_sum: self.ints.scaled_sum.part(first, n_blocks),
                sum: self.ints.sum.part(first, n_blocks),
                first_sum: self.ints.first_sum.part(first, n_blocks),
            }
        };
        quantise(self.isa, x, &mut out);
    }

    /// Where a token's elements go in the tiles.
    fn tile_row(&self, token: usize) -> TileRow<'_> {
        let first = token / TILE * self.k.div_ceil(TILE_K) * TILE_CELLS + token % TILE * TILE_K;
        TileRow { tiles: &self.tiles, first }
    }
}

/// A token's row in its tiles.
struct TileRow<'a> {
    tiles: &'a Shared<'a, u16>,
    first: usize,
}

/// Rounds elements `start..` of a token to bfloat16. Nobody else may touch them at the same time.
#[inline(always)]
fn round<S: Simd>(s: S, mut x: &[f32], mut start: usize, row: &TileRow<'_>) {
    while x.len() >= TILE_K && start.is_multiple_of(TILE_K) {
        // SAFETY: the caller is alone with these elements.
        let out = unsafe { row.tiles.part(row.first + start / TILE_K * TILE_CELLS, TILE_K) };
        // SAFETY: both have 32 elements.
        unsafe {
            s.round_bf16(x.as_ptr(), out.as_mut_ptr());
            s.round_bf16(x.as_ptr().add(LANES), out.as_mut_ptr().add(LANES));
        }
        (x, start) = (&x[TILE_K..], start + TILE_K);
    }
    while !x.is_empty() {
        // To the end of this half of a tile.
        let n = (LANES - start % LANES).min(x.len());
        let at = row.first + start / TILE_K * TILE_CELLS + start % TILE_K;
        // SAFETY: the caller is alone with these elements.
        let out = unsafe { row.tiles.part(at, n) };
        if n == LANES {
            // SAFETY: both have 16 elements.
            unsafe { s.round_bf16(x.as_ptr(), out.as_mut_ptr()) };
        } else {
            out.iter_mut().zip(x).for_each(|(out, &x)| *out = to_bf16(x));
        }
        (x, start) = (&x[n..], start + n);
    }
}

/// The largest magnitude; infinity or NaN if there is one.
#[inline(always)]
pub(super) fn magnitude(x: &[f32]) -> f32 {
    // As integers, magnitudes order like floats, infinity above all numbers and NaN above infinity.
    f32::from_bits(x.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff)))
}

/// What values are multiplied by, whose largest magnitude that is.
#[inline(always)]
pub(super) fn inverse(amax: f32) -> f32 {
    // Below that (and for NaN) it would be no number; such values count as zeros (or NaN, by their scale).
    if amax > 1e-30 { 127.0 / amax } else { 0.0 }
}

/// A value as an integer, rounded to nearest even.
#[inline(always)]
pub(super) fn to_int(x: f32, inverse: f32) -> i8 {
    // Adding 1.5 · 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    ((x * inverse + SHIFT).to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32) as i8
}

per_isa! {
    /// Quantises whole blocks of 32: scale = amax / 127, q = x · (127 / amax) rounded to nearest even. A block with a
    /// NaN or an infinity gets a scale that is none, so that what is computed from it is NaN and not a plausible number.
    pub(super) fn quantise(x: &[f32], out: &mut Integers<&mut [i8], &mut [f32], &mut [i32]>) = quantise_body;
}

#[inline(always)]
fn quantise_body<S: Simd>(_: S, x: &[f32], out: &mut Integers<&mut [i8], &mut [f32], &mut [i32]>) {
    let blocks = x.chunks_exact(BLOCK).zip(out.q.chunks_exact_mut(BLOCK));
    let scales = out.scale.iter_mut().zip(out.scaled_sum.iter_mut()).zip(out.sum.iter_mut()).zip(out.first_sum.iter_mut());
    for ((x, q), (((scale, scaled_sum), sum), first_sum)) in blocks.zip(scales) {
        let amax = magnitude(x);
        let inverse = inverse(amax);
        let mut total = 0;
        for (q, &x) in q.iter_mut().zip(x) {
            *q = to_int(x, inverse);
            total += i32::from(*q);
        }
        *scale = amax / 127.0;
        *sum = total;
        *first_sum = q[..BLOCK / 2].iter().map(|&q| i32::from(q)).sum();
        *scaled_sum = *scale * total as f32;
    }
}
