//! What a layer does to each row by itself, one operation after the other for some rows at a time: what one of them writes, the next one
//! finds in the caches of the thread's core, and no thread waits for another between them. Knows nothing of attention.
//!
//! Invariant: a row's operations are those of [`super::CpuDevice`]'s, in their order; which rows are together changes nothing.

use super::buffer::{Shared, prefetch};
use super::gemm::{self, Epilogue, Out, Product};
use super::gemm_t::MAX_ROWS;
use super::isa::Isa;
use super::numerics::Numerics;
use super::quant::{Act, ActWriter};
use super::tile::TILE;
use super::weights::Weight;
use super::{Scratch, Vector, norm};
use crate::device::{AfterAttention, BeforeAttention, StepSizes};
use std::ops::Range;

/// Fewer rows would share too little of the unpacking of weights.
const LEAST_ROWS: usize = 128;
/// Every thread reads all weights: where there are more of them, rows must be as many for each.
const LEAST_ROWS_OF_THREADS: usize = 64;

/// How a step's rows are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pieces {
    n_rows: usize,
    /// Rows of a piece, less in the last; whole tiles.
    length: usize,
}

impl Pieces {
    /// As many for each thread; `None` where the threads had better share each operation's weights.
    pub(super) fn new(n_threads: usize, n_rows: usize) -> Option<Self> {
        (n_rows / n_threads >= LEAST_ROWS.max(LEAST_ROWS_OF_THREADS * n_threads)).then(|| {
            let n = n_threads * n_rows.div_ceil(n_threads).div_ceil(MAX_ROWS);
            Self { n_rows, length: n_rows.div_ceil(n).next_multiple_of(TILE) }
        })
    }

    pub(super) fn n(self) -> usize {
        self.n_rows.div_ceil(self.length)
    }

    pub(super) fn rows(self, piece: usize) -> Range<usize> {
        piece * self.length..self.n_rows.min((piece + 1) * self.length)
    }
}

/// A thread's activations between operations on some rows.
pub(super) struct OwnActs {
    max_rows: usize,
    normed: Act,
    gated: Option<Act>,
}

impl OwnActs {
    fn new(numerics: Numerics, max_rows: usize, width: usize, ffn_width: Option<usize>) -> Self {
        let act = |width| Act::new(numerics, max_rows, width);
        Self { max_rows, normed: act(width), gated: ffn_width.map(act) }
    }

    /// Makes a worker's, for steps of up to `max_tokens` tokens, if these are ever cut.
    pub(super) fn reserve(scratch: &mut Scratch, numerics: Numerics, sizes: &StepSizes<'_>, n_threads: usize) {
        if Pieces::new(n_threads, sizes.max_tokens).is_some() {
            let max_rows = MAX_ROWS.min(sizes.max_tokens.div_ceil(n_threads).next_multiple_of(TILE));
            scratch.own_acts = Some(Self::new(numerics, max_rows, sizes.width, sizes.ffn_width));
        }
    }

    /// A worker's, taken from it; made if it has none for that.
    fn take(scratch: &mut Scratch, numerics: Numerics, n_rows: usize, width: usize, ffn_width: Option<usize>) -> Self {
        let fits = |own: &Self| {
            let gated = own.gated.as_ref().map(|gated| gated.k);
            own.max_rows >= n_rows && own.normed.k == width && (ffn_width.is_none() || gated == ffn_width)
        };
        let own = scratch.own_acts.take().filter(fits);
        own.unwrap_or_else(|| Self::new(numerics, MAX_ROWS, width, ffn_width))
    }
}

/// Norms rows of x: row `rows.start` becomes row `first` of the activations.
pub(super) fn normed(
    isa: Isa,
    (x, width): (&[f32], usize),
    rows: Range<usize>,
    (weight, eps): (&Vector, f32),
    (act, first): (&ActWriter<'_>, usize),
    scratch: &mut Scratch,
) {
    scratch.row.reserve(width);
    for (i, row) in rows.enumerate() {
        let (x, next) = x[row * width..].split_at(width);
        prefetch(&next[..width.min(next.len())]);
        // Each row is in one range.
        norm::rms_norm(isa, x, &weight.0, eps, &mut scratch.row[..width], (act, first + i));
    }
}

/// Norm and product of a piece's rows of x, `[rows, width]`, to `out`, `[rows, out_width]`.
pub(super) fn before_attention(
    (isa, numerics): (Isa, Numerics),
    layer: &BeforeAttention<'_, Weight, Vector>,
    (x, width): (&[f32], usize),
    (out, out_width): (&mut [f32], usize),
    scratch: &mut Scratch,
) {
    let n_rows = x.len() / width;
    let mut own = OwnActs::take(scratch, numerics, n_rows, width, None);
    normed(isa, (x, width), 0..n_rows, (layer.norm, layer.eps), (&own.normed.writer(isa, layer.qkv), 0), scratch);
    let out = Out::Values(Shared::new(out), out_width);
    let product = Product { isa, act: &own.normed, weight: layer.qkv, n_rows, epilogue: Epilogue::Store, out };
    gemm::multiply_rows(&product, 0..n_rows, scratch);
    scratch.own_acts = Some(own);
}

/// All that comes after attention for a piece's rows: `rows` of what attention gave are added to x, `[rows, width]`, and what the
/// feed-forward layer makes of that.
pub(super) fn after_attention(
    (isa, numerics): (Isa, Numerics),
    layer: &AfterAttention<'_, Weight, Vector>,
    (attended, rows): (&Act, Range<usize>),
    (x, width): (&mut [f32], usize),
    scratch: &mut Scratch,
) {
    let n_rows = rows.len();
    let mut own = OwnActs::take(scratch, numerics, n_rows, width, Some(layer.down.k));
    let gated = own.gated.as_mut().expect("asked for just now");
    let out = Out::Window { values: Shared::new(x), width, first: (rows.start, 0) };
    let weight = layer.attn_output;
    gemm::multiply_rows(&Product { isa, act: attended, weight, n_rows: rows.end, epilogue: Epilogue::Add, out }, rows, scratch);
    normed(isa, (x, width), 0..n_rows, (layer.norm, layer.eps), (&own.normed.writer(isa, layer.gate_up), 0), scratch);
    let (epilogue, out) = (Epilogue::Gate(layer.activation), Out::Act(gated.writer(isa, layer.down)));
    gemm::multiply_rows(&Product { isa, act: &own.normed, weight: layer.gate_up, n_rows, epilogue, out }, 0..n_rows, scratch);
    let out = Out::Values(Shared::new(x), width);
    gemm::multiply_rows(
        &Product { isa, act: gated, weight: layer.down, n_rows, epilogue: Epilogue::Add, out },
        0..n_rows,
        scratch,
    );
    scratch.own_acts = Some(own);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_rows_once_in_whole_tiles_and_as_many_for_each_thread() {
        for n_threads in 1..=16 {
            for n_rows in 1..5000 {
                let Some(pieces) = Pieces::new(n_threads, n_rows) else {
                    assert!(n_rows < 128 * n_threads || n_rows < 64 * n_threads * n_threads);
                    continue;
                };
                let mut end = 0;
                for piece in 0..pieces.n() {
                    let rows = pieces.rows(piece);
                    assert!(rows.start == end && rows.start.is_multiple_of(TILE) && !rows.is_empty() && rows.len() <= MAX_ROWS);
                    end = rows.end;
                }
                assert_eq!(end, n_rows);
                assert!(pieces.n() <= n_threads * n_rows.div_ceil(n_threads).div_ceil(MAX_ROWS));
            }
        }
    }
}
