//! The head: final norm, vocabulary logits, and what is wanted of them. Knows nothing of layers.
//!
//! Rows that are scored or take the likeliest token go through the vocabulary piece by piece: a worker multiplies a piece of
//! the weight with some rows, takes in what they want of it (`sample::pieces`) while it is in the cache, and forgets it. Their
//! logits are never there all at once: of 2,000 rows over 49,152 tokens they would be 393 MB, a worker's piece is 576 KiB.
//! What is drawn at random, or after its logits were changed, has its logits made, for [`DRAWN_ROWS`] rows at a time.
//!
//! Invariant: a row's logits are products of its own, and both ways take them in by the same pieces: with whom a row goes
//! changes nothing.

use super::buffer::{Aligned, Shared};
use super::gemm::{self, Epilogue, Out, Product};
use super::numerics::Numerics;
use super::quant::Act;
use super::team::Team;
use super::weights::{PANEL, Weight};
use super::{Hidden, Isa, Scratch, Vector, cap, norm};
use crate::device::HeadSpec;
use crate::device::batch::{Batch, HeadOut, HeadRow, Want};
use crate::device::sample;
use crate::device::sample::pieces::{self, PIECE, Piece, Wish};
use crate::request::MAX_TOP_LOGPROBS;
use std::ops::Range;

/// Rows that share a pass over the weight. Of what is kept of pieces there are so many rows.
const PASS_ROWS: usize = 288;
/// Rows whose logits are made at once: bounds the memory for logits.
const DRAWN_ROWS: usize = 64;
/// Rows of a worker's piece: few enough that its logits stay in the L2 cache.
const PIECE_ROWS: usize = 144;
/// Rows of pieces are multiples of what any kernel takes at once.
const ROWS_STEP: usize = 48;
/// Logits of a worker's piece.
pub(super) const PIECE_LOGITS: usize = PIECE_ROWS * PIECE;

const _: () = assert!(PIECE.is_multiple_of(PANEL) && PASS_ROWS.is_multiple_of(PIECE_ROWS));

/// What the head is of.
pub(super) struct Head<'a> {
    pub(super) isa: Isa,
    pub(super) team: &'a Team,
    pub(super) x: &'a Hidden,
    pub(super) norm: &'a Vector,
    /// `[vocab, width]`
    pub(super) weight: &'a Weight,
    pub(super) spec: &'a HeadSpec,
    pub(super) batch: &'a Batch,
}

/// What the head needs between its passes.
pub(super) struct HeadMemory {
    /// `[PASS_ROWS, width]`
    act: Act,
    /// `[DRAWN_ROWS, vocab]`
    logits: Aligned<f32>,
    /// Which head rows: those that go piece by piece, then the others.
    order: Vec<u32>,
    /// `[PASS_ROWS, vocab / PIECE]`
    pieces: Vec<Piece>,
    /// Likeliest tokens of each piece, `[PASS_ROWS, vocab / PIECE · MAX_TOP_LOGPROBS]`, of which a row uses as many as it wants.
    candidates: Vec<u64>,
    /// Logits of the tokens to score, `[PASS_ROWS]`
    targets: Vec<f32>,
}

impl HeadMemory {
    pub(super) fn new(numerics: Numerics, width: usize, (n_vocab, max_rows): (usize, usize)) -> Self {
        let n_pieces = PASS_ROWS * n_vocab.div_ceil(PIECE);
        Self {
            act: Act::new(numerics, PASS_ROWS, width),
            logits: Aligned::zeroed(DRAWN_ROWS * n_vocab),
            order: Vec::with_capacity(max_rows),
            pieces: vec![Piece::EMPTY; n_pieces],
            candidates: vec![0; n_pieces * MAX_TOP_LOGPROBS],
            targets: vec![0.0; PASS_ROWS],
        }
    }
}

/// Computes what is wanted of each head row.
pub(super) fn run(head: &Head<'_>, memory: &mut HeadMemory, out: &mut Vec<HeadOut>) {
    let heads = &head.batch.heads;
    out.clear();
    out.resize(heads.len(), HeadOut::BROKEN);
    let mut order = std::mem::take(&mut memory.order);
    order.clear();
    // A few rows share one pass over the weight, cut as finely as threads wish, whatever they want: both ways give the same bits.
    let is_in_pieces = |i: u32| heads.len() > DRAWN_ROWS && Wish::of(&heads[i as usize]).is_some();
    order.extend((0..heads.len() as u32).filter(|&i| is_in_pieces(i)));
    let n_in_pieces = order.len();
    order.extend((0..heads.len() as u32).filter(|&i| !is_in_pieces(i)));
    let out = Shared::new(out);
    for rows in order[..n_in_pieces].chunks(PASS_ROWS) {
        in_pieces(head, memory, rows, &out);
    }
    for rows in order[n_in_pieces..].chunks(DRAWN_ROWS) {
        drawn(head, memory, rows, &out);
    }
    memory.order = order;
}

impl Head<'_> {
    /// The head row at a place of a pass.
    fn row(&self, rows: &[u32], place: usize) -> &HeadRow {
        &self.batch.heads[rows[place] as usize]
    }

    /// Norms a pass's rows, in the form that the weight reads.
    fn norm_rows(&self, rows: &[u32], act: &mut Act) {
        let (isa, width) = (self.isa, self.x.width);
        let act = act.writer(isa, self.weight);
        self.team.run_rows(rows.len(), &|scratch, places| {
            scratch.row.reserve(width);
            for place in places {
                let x = &self.x.values[self.row(rows, place).token_idx as usize * width..][..width];
                // Each row is in one range.
                norm::rms_norm(isa, x, &self.norm.0, self.spec.eps, &mut scratch.row[..width], (&act, place));
            }
        });
    }

    fn cap(&self, logits: &mut [f32]) {
        if let Some(cap) = self.spec.soft_cap {
            cap::soft_cap(self.isa, logits, cap);
        }
    }
}

/// Rows whose logits are made.
fn drawn(head: &Head<'_>, memory: &mut HeadMemory, rows: &[u32], out: &Shared<'_, HeadOut>) {
    let (n_vocab, n_rows) = (head.weight.n, rows.len());
    head.norm_rows(rows, &mut memory.act);
    let logits = Out::Values(Shared::new(&mut memory.logits), n_vocab);
    let (isa, weight, act) = (head.isa, head.weight, &memory.act);
    gemm::multiply(head.team, &Product { isa, act, weight, n_rows, epilogue: Epilogue::Store, out: logits });
    let logits = Shared::new(&mut memory.logits);
    head.team.run(n_rows, &|scratch, place| {
        let draw = scratch.draw.get_or_insert_with(|| sample::Scratch::new(n_vocab));
        // SAFETY: each row is one tile.
        let logits = unsafe { logits.part(place * n_vocab, n_vocab) };
        head.cap(logits);
        let row = head.row(rows, place);
        let result = sample::draw(logits, row, head.batch.shaping(row, n_vocab), draw);
        // SAFETY: each row is one tile, and in one pass.
        unsafe { out.write(rows[place] as usize, result) };
    });
}

/// What workers take in of pieces.
struct Taken<'a> {
    n_pieces: usize,
    pieces: Shared<'a, Piece>,
    candidates: Shared<'a, u64>,
    targets: Shared<'a, f32>,
}

/// Rows that go through the vocabulary piece by piece.
fn in_pieces(head: &Head<'_>, memory: &mut HeadMemory, rows: &[u32], out: &Shared<'_, HeadOut>) {
    head.norm_rows(rows, &mut memory.act);
    let (act, n_pieces) = (&memory.act, head.weight.n.div_ceil(PIECE));
    let taken = Taken {
        n_pieces,
        pieces: Shared::new(&mut memory.pieces),
        candidates: Shared::new(&mut memory.candidates),
        targets: Shared::new(&mut memory.targets),
    };
    // Rows as many as the cache bears, fewer if threads would have nothing to do.
    let row_tiles = rows.len().div_ceil(PIECE_ROWS).max((4 * head.team.n_threads()).div_ceil(n_pieces));
    let step = rows.len().div_ceil(row_tiles).next_multiple_of(ROWS_STEP);
    let row_tiles = rows.len().div_ceil(step);
    head.team.run(n_pieces * row_tiles, &|scratch, tile| {
        let (piece, start) = (tile / row_tiles, tile % row_tiles * step);
        take_piece(head, act, (rows, start..rows.len().min(start + step)), piece, &taken, scratch);
    });
    let (pieces, candidates, targets) = (&memory.pieces, &memory.candidates, &memory.targets);
    head.team.run(rows.len(), &|scratch, place| {
        let draw = scratch.draw.get_or_insert_with(|| sample::Scratch::new(head.weight.n));
        let row = head.row(rows, place);
        let n_candidates = n_pieces * Wish::of(row).map_or(0, |wish| wish.n_candidates);
        let candidates = &candidates[place * n_pieces * MAX_TOP_LOGPROBS..][..n_candidates];
        let result = pieces::draw(row, &pieces[place * n_pieces..][..n_pieces], targets[place], candidates, draw);
        // SAFETY: each row is one tile, and in one pass.
        unsafe { out.write(rows[place] as usize, result) };
    });
}

/// Multiplies a piece of the weight with the rows at some places, and takes in what they want of it.
fn take_piece(
    head: &Head<'_>,
    act: &Act,
    (rows, places): (&[u32], Range<usize>),
    piece: usize,
    taken: &Taken<'_>,
    scratch: &mut Scratch,
) {
    let tokens = piece * PIECE..head.weight.n.min((piece + 1) * PIECE);
    let mut logits = scratch.logits.take().unwrap_or_default();
    logits.reserve(PIECE_LOGITS);
    let window = Out::Window { values: Shared::new(&mut logits), width: PIECE, first: (places.start, tokens.start) };
    let (isa, weight, n_rows) = (head.isa, head.weight, rows.len());
    let product = Product { isa, act, weight, n_rows, epilogue: Epilogue::Store, out: window };
    gemm::multiply_window(&product, &tokens, places.clone(), scratch);
    let draw = scratch.draw.get_or_insert_with(|| sample::Scratch::new(head.weight.n));
    for (place, logits) in places.zip(logits.chunks_exact_mut(PIECE)) {
        let row = head.row(rows, place);
        let Some(wish) = Wish::of(row) else { continue };
        let logits = &mut logits[..tokens.len()];
        head.cap(logits);
        let at = place * taken.n_pieces;
        // SAFETY: each (row, piece) is in one tile; a row's candidates have room for the most that can be wanted.
        unsafe {
            let candidates = at * MAX_TOP_LOGPROBS + piece * wish.n_candidates;
            let candidates = taken.candidates.part(candidates, wish.n_candidates);
            taken.pieces.write(at + piece, pieces::take(logits, tokens.start, wish, candidates, draw));
        }
        if let Want::Score { token } = row.want
            && tokens.contains(&(token as usize))
        {
            // SAFETY: one piece has the token.
            unsafe { taken.targets.write(place, logits[token as usize - tokens.start]) };
        }
    }
    scratch.logits = Some(logits);
}
