//! Activations, and their quantisation: per token and block of 32, i8 with an f32 scale. Knows nothing of weights but
//! whether they want integers or floats. Invariant: a block's integers and scale depend on its 32 values alone.

use super::buffer::{Aligned, Shared};
use super::isa::{Isa, per_isa};
use super::simd::Simd;
use super::team::Team;
use super::weights::{BLOCK, Weight};

/// Activations of up to `max_tokens` tokens, `[max_tokens, k]`: as f32, and as integers where the consumer wants them.
pub struct Act {
    pub(super) k: usize,
    /// `[max_tokens, k]`
    pub(super) f: Aligned<f32>,
    pub(super) ints: Integers<Aligned<i8>, Aligned<f32>, Aligned<i32>>,
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
    pub(super) fn new(max_tokens: usize, k: usize) -> Self {
        let n_blocks = max_tokens * (k / BLOCK);
        let ints = Integers {
            q: Aligned::zeroed(n_blocks * BLOCK),
            scale: Aligned::zeroed(n_blocks),
            scaled_sum: Aligned::zeroed(n_blocks),
            sum: Aligned::zeroed(n_blocks),
            first_sum: Aligned::zeroed(n_blocks),
        };
        Self { k, f: Aligned::zeroed(max_tokens * k), ints }
    }

    /// The values before quantisation, row after row.
    pub fn values(&self) -> &[f32] {
        &self.f
    }

    /// Takes rows of another one, in every form they have there: row i becomes its row `rows(i)`.
    pub(super) fn gather(&mut self, team: &Team, from: &Self, n_rows: usize, rows: &(dyn Fn(usize) -> usize + Sync)) {
        assert_eq!(self.k, from.k);
        let n_blocks = self.k / BLOCK;
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

    /// Shared writing in the form that `next` reads.
    pub(super) fn writer(&mut self, isa: Isa, next: &Weight) -> ActWriter<'_> {
        assert_eq!(self.k, next.k, "the activations' width and the next weight's");
        let Integers { q, scale, scaled_sum, sum, first_sum } = &mut self.ints;
        ActWriter {
            isa,
            k: self.k,
            integers: next.wants_integers(),
            f: Shared::new(&mut self.f),
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
    /// Whether the next weight reads integers.
    integers: bool,
    f: Shared<'a, f32>,
    ints: Integers<Shared<'a, i8>, Shared<'a, f32>, Shared<'a, i32>>,
}

impl ActWriter<'_> {
    /// Whether a token's values can be sealed `n` columns at a time: integers need whole blocks.
    pub(super) fn takes(&self, n: usize) -> bool {
        !self.integers || n.is_multiple_of(BLOCK)
    }

    /// `n` values of a token from column `start` on, to be written before they are sealed.
    ///
    /// # Safety
    /// While the result lives, nobody else may touch these values.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    pub(super) unsafe fn values(&self, token: usize, start: usize, n: usize) -> &mut [f32] {
        // SAFETY: passed on.
        unsafe { self.f.part(token * self.k + start, n) }
    }

    /// Puts values that were written into the form the next weight wants. Integers need whole blocks.
    ///
    /// # Safety
    /// Nobody else may touch these values at the same time.
    pub(super) unsafe fn seal(&self, token: usize, start: usize, n: usize) {
        if self.integers {
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
            // SAFETY: passed on.
            quantise(self.isa, unsafe { self.values(token, start, n) }, &mut out);
        }
    }
}

per_isa! {
    /// Quantises whole blocks of 32: scale = amax / 127, q = x · (127 / amax) rounded to nearest even. A block with a
    /// NaN or an infinity gets a scale that is none, so that what is computed from it is NaN and not a plausible number.
    pub(super) fn quantise(x: &[f32], out: &mut Integers<&mut [i8], &mut [f32], &mut [i32]>) = quantise_body;
}

#[inline(always)]
fn quantise_body<S: Simd>(_: S, x: &[f32], out: &mut Integers<&mut [i8], &mut [f32], &mut [i32]>) {
    // Adding 1.5 · 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    let blocks = x.chunks_exact(BLOCK).zip(out.q.chunks_exact_mut(BLOCK));
    let scales = out.scale.iter_mut().zip(out.scaled_sum.iter_mut()).zip(out.sum.iter_mut()).zip(out.first_sum.iter_mut());
    for ((x, q), (((scale, scaled_sum), sum), first_sum)) in blocks.zip(scales) {
        // As integers, magnitudes order like floats, infinity above all numbers and NaN above infinity.
        let amax = f32::from_bits(x.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff)));
        // Below that (and for NaN) the inverse would be no number; such a block counts as zeros (or NaN, by its scale).
        let inverse = if amax > 1e-30 { 127.0 / amax } else { 0.0 };
        let mut total = 0;
        for (q, x) in q.iter_mut().zip(x) {
            let rounded = ((x * inverse + SHIFT).to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
            *q = rounded as i8;
            total += i32::from(rounded as i8);
        }
        *scale = amax / 127.0;
        *sum = total;
        *first_sum = q[..BLOCK / 2].iter().map(|&q| i32::from(q)).sum();
        *scaled_sum = *scale * total as f32;
    }
}
