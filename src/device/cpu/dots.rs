//! Dot products of bfloat16: some rows of pairs against columns of pairs, `[pair][16 columns][2]`, as keys and values lie in
//! the cache. Knows nothing of either.
//!
//! Invariant: an output is a chain over the pairs in order, from 0 or from what is there: acc = fma(odd, odd, acc), then
//! acc = fma(even, even, acc). That is what `VDPBF16PS` does (Intel SDM, volume 2; results under 2^-126 aside, which it takes
//! for 0), and what [`chains`] does in f32 where there is no such instruction. Rows and columns that are computed together
//! change nothing.

use super::simd::{LANES, Simd};

/// Rows that a kernel takes at once.
pub(super) const ROWS: usize = 6;
/// Vectors of columns that it takes at once.
pub(super) const COLUMNS: usize = 4;

/// Rows of pairs.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) start: *const u16,
    /// Elements from row to row.
    pub(super) stride: usize,
}

/// Columns of pairs: pieces of `n` pairs each, one after the other over k.
#[derive(Clone, Copy)]
pub(super) struct Right<'a, const C: usize> {
    /// Where the vectors of each piece begin.
    pub(super) pieces: &'a [[*const u16; C]],
    /// Pairs of a piece.
    pub(super) n: usize,
    /// Elements from pair to pair.
    pub(super) step: usize,
}

/// Where results go: rows of vectors side by side.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) start: *mut f32,
    /// Elements from row to row.
    pub(super) stride: usize,
    /// Whether chains begin with what is there.
    pub(super) add: bool,
}

/// `n_rows` rows by C vectors of columns.
///
/// # Safety
/// The pointers must be valid for all rows, pieces, and vectors of the target.
#[inline(always)]
pub(super) unsafe fn multiply<S: Simd, const C: usize>(s: S, left: Left, n_rows: usize, right: Right<'_, C>, target: Target) {
    let mut row = 0;
    while row < n_rows {
        let n = ROWS.min(n_rows - row);
        // SAFETY: rows under `n_rows`: the caller's promise.
        unsafe {
            let left = Left { start: left.start.add(row * left.stride), ..left };
            let target = Target { start: target.start.add(row * target.stride), ..target };
            match n {
                1 => s.dots::<1, C>(left, right, target),
                2 => s.dots::<2, C>(left, right, target),
                3 => s.dots::<3, C>(left, right, target),
                4 => s.dots::<4, C>(left, right, target),
                5 => s.dots::<5, C>(left, right, target),
                _ => s.dots::<6, C>(left, right, target),
            }
        }
        row += n;
    }
}

/// R rows by C vectors in f32, for [`Simd::dots`]: vector by vector where registers are few.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
pub(super) unsafe fn chains<S: Simd, const R: usize, const C: usize>(s: S, left: Left, right: Right<'_, C>, target: Target) {
    // SAFETY: the caller's promise.
    unsafe {
        if S::WIDE {
            chains_of::<S, R, C, C>(s, left, right, 0, target);
        } else {
            for column in 0..C {
                chains_of::<S, R, 1, C>(s, left, right, column, target);
            }
        }
    }
}

/// N of the C vectors, from `column` on.
///
/// # Safety
/// As [`multiply`]; `column + N` must be at most C.
#[inline(always)]
unsafe fn chains_of<S: Simd, const R: usize, const N: usize, const C: usize>(
    s: S,
    left: Left,
    right: Right<'_, C>,
    column: usize,
    target: Target,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let out = |r: usize, c: usize| target.start.add(r * target.stride + (column + c) * LANES);
        let mut acc = [[s.splat(0.0); N]; R];
        if target.add {
            for r in 0..R {
                for c in 0..N {
                    acc[r][c] = s.load(out(r, c));
                }
            }
        }
        let mut left_start = left.start;
        for piece in right.pieces {
            for pair in 0..right.n {
                let mut w = [(s.splat(0.0), s.splat(0.0)); N];
                for c in 0..N {
                    w[c] = s.load_bf16_pairs(piece[column + c].add(pair * right.step));
                }
                for r in 0..R {
                    let (even, odd) = s.splat_bf16_pair(left_start.add(r * left.stride));
                    for c in 0..N {
                        acc[r][c] = s.fma(even, w[c].0, s.fma(odd, w[c].1, acc[r][c]));
                    }
                }
                left_start = left_start.add(2);
            }
        }
        for r in 0..R {
            for c in 0..N {
                s.store(out(r, c), acc[r][c]);
            }
        }
    }
}
