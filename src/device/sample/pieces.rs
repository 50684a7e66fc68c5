//! A row of logits seen piece by piece, for rows that are scored or take the likeliest token: what is kept of a piece (a
//! largest logit, a sum, a few candidates), and what a row's pieces come to. So the logits of a row need never be there all at
//! once. Knows nothing of how logits are made.
//!
//! Invariant: a piece is a function of its logits alone, pieces are joined in the order of the vocabulary, and [`super::draw`]
//! adds up by the same pieces: the bits are those that it gives for the whole row.

use super::{
    GROUP, Scratch, greedy, group_maxima, keep_likeliest, key, log_probability, logit_of, piece_sum, select_likeliest, token_of,
};
use crate::device::batch::{HeadOut, HeadRow, Want};
use crate::device::math;
use crate::request::MAX_TOP_LOGPROBS;

/// Logits of a piece; part of what the bits depend on.
pub const PIECE: usize = 1024;

/// In the place of a candidate that there is none for.
const NONE: u64 = u64::MAX;

/// What is kept of a piece.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// The largest logit.
    max: f32,
    /// Sum of exp(logit - max); NaN if a logit is NaN or +infinity.
    sum: f32,
}

impl Piece {
    /// Of no logits.
    pub const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Of logits that are all usable.
    fn of(logits: &[f32], max: f32) -> Self {
        // Of logits that are all −infinity the sum is 0.
        Self { max, sum: piece_sum(logits, max.max(f32::MIN)) }
    }
}

/// The pieces of a row of usable logits with the maxima of its groups.
pub(super) fn pieces_of<'a>(logits: &'a [f32], group_max: &'a [f32]) -> impl Iterator<Item = Piece> + 'a {
    let pieces = logits.chunks(PIECE).zip(group_max.chunks(PIECE / GROUP));
    pieces.map(|(logits, group_max)| Piece::of(logits, group_max.iter().copied().fold(f32::NEG_INFINITY, f32::max)))
}

/// The logarithm of the sum of exp(logit - max) over all pieces.
pub(super) fn log_total(pieces: impl Iterator<Item = Piece>, max: f32) -> f32 {
    let total: f64 = pieces.map(|piece| f64::from(piece.sum) * f64::from(math::exp(piece.max - max))).sum();
    math::ln(total as f32)
}

/// What a row wants of each piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// Its likeliest tokens, so many.
    pub n_candidates: usize,
    /// Whether probabilities are wanted, for which logits must be summed.
    pub sum: bool,
}

impl Wish {
    /// `None` if the row's logits must be there all at once.
    pub fn of(row: &HeadRow) -> Option<Self> {
        let n_top = usize::from(row.n_top);
        match row.want {
            Want::Score { .. } => Some(Self { n_candidates: n_top, sum: true }),
            Want::Draw(draw) if draw.temperature == 0.0 && row.n_edits == 0 && row.mask.is_none() => {
                Some(Self { n_candidates: n_top.max(1), sum: draw.logprob || n_top > 0 })
            }
            Want::Draw(_) => None,
        }
    }
}

/// Takes in the logits of a piece that begins with token `first`; its likeliest tokens go to `candidates`, as many as
/// are wanted.
pub fn take(logits: &[f32], first: usize, wish: Wish, candidates: &mut [u64], scratch: &mut Scratch) -> Piece {
    assert_eq!(candidates.len(), wish.n_candidates);
    candidates.fill(NONE);
    if !group_maxima(logits, &mut scratch.group_max) {
        return Piece { max: 0.0, sum: f32::NAN };
    }
    let max = scratch.group_max.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if let [only] = candidates {
        let token = greedy(logits, max, &scratch.group_max) as usize;
        *only = key(logits[token], first + token);
    } else if !candidates.is_empty() {
        select_likeliest(logits, candidates.len(), scratch);
        candidates.iter_mut().zip(&scratch.likeliest).for_each(|(candidate, key)| *candidate = key + first as u64);
    }
    if wish.sum { Piece::of(logits, max) } else { Piece { max, sum: 0.0 } }
}

/// What [`super::draw`] gives for the whole row. `target` is the logit of the token to score, `candidates` are those of all
/// pieces, as many of each as its [`Wish`] says.
pub fn draw(row: &HeadRow, pieces: &[Piece], target: f32, candidates: &[u64], scratch: &mut Scratch) -> HeadOut {
    let max = pieces.iter().fold(f32::NEG_INFINITY, |max, piece| max.max(piece.max));
    if max == f32::NEG_INFINITY || pieces.iter().any(|piece| piece.sum.is_nan()) {
        return HeadOut::BROKEN;
    }
    scratch.likeliest.clear();
    scratch.likeliest.extend(candidates.iter().filter(|&&candidate| candidate != NONE));
    keep_likeliest(&mut scratch.likeliest, Wish::of(row).map_or(0, |wish| wish.n_candidates));
    let mut out = HeadOut { token: 0, logprob: f32::NAN, top: [(0, f32::NAN); MAX_TOP_LOGPROBS], n_top: 0 };
    let (token, logit, wants_logprob) = match row.want {
        Want::Score { token } => (token, target, true),
        Want::Draw(draw) => (token_of(scratch.likeliest[0]), max, draw.logprob),
    };
    out.token = token;
    if wants_logprob || row.n_top > 0 {
        let log_total = log_total(pieces.iter().copied(), max);
        for (entry, &key) in out.top.iter_mut().zip(&scratch.likeliest).take(row.n_top.into()) {
            *entry = (token_of(key), log_probability(logit_of(key), max, log_total));
            out.n_top += 1;
        }
        if wants_logprob {
            out.logprob = log_probability(logit, max, log_total);
        }
    }
    out
}
