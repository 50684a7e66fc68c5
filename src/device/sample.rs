//! Draws or scores one token from one row of logits. Knows nothing of weights, batches or text.
//!
//! Invariant (exactness.md R2, R7): the result is a function of (logits, head row) alone, the same bits on every
//! instruction set: sums run over fixed pieces of the vocabulary in a fixed tree of lanes, equal logits are ordered by
//! token id, and randomness comes from a counter keyed by (seed, choice, position).

#![expect(
    clippy::inline_always,
    reason = "the loops vectorise only if their bodies are compiled into the function that has the features"
)]
#![expect(clippy::float_cmp, reason = "the largest logit is found again by its bits")]

pub mod pieces;

use super::batch::{Draw, HeadOut, HeadRow, Shaping, Want};
use super::math;
use crate::request::MAX_TOP_LOGPROBS;
use pieces::{PIECE, log_total, pieces_of};

/// Logits per partial maximum. The k largest maxima bound the k likeliest tokens from below, so only few groups are read
/// again.
const GROUP: usize = 64;
/// Accumulators per partial result; part of what the bits depend on.
const LANES: usize = 16;

/// Working memory of [`draw`]: one per thread, made once; drawing then allocates nothing.
#[derive(Debug)]
pub struct Scratch {
    /// Largest logit of each group, `[vocab / GROUP]`, in order of the vocabulary.
    group_max: Vec<f32>,
    /// The same, reordered by selection.
    group_order: Vec<f32>,
    /// Sum of exp((logit - max) / temperature) over each piece, `[vocab / PIECE]`.
    piece_sums: Vec<f32>,
    /// Selected tokens as sort keys (see [`key`]), likeliest first.
    likeliest: Vec<u64>,
    /// Running sum of the selected tokens' weights.
    cumulative: Vec<f64>,
    /// Logits before they were edited, by token.
    originals: Vec<(u32, f32)>,
}

impl Scratch {
    /// Makes the buffers for a vocabulary.
    pub fn new(n_vocab: usize) -> Self {
        Self {
            group_max: Vec::with_capacity(n_vocab.div_ceil(GROUP)),
            group_order: Vec::with_capacity(n_vocab.div_ceil(GROUP)),
            piece_sums: Vec::with_capacity(n_vocab.div_ceil(PIECE)),
            likeliest: Vec::with_capacity(n_vocab),
            cumulative: Vec::with_capacity(n_vocab),
            originals: Vec::with_capacity(1024.min(n_vocab)),
        }
    }
}

/// Draws or scores a token from `logits`, `[vocab]`, as `row.want` says; a draw changes them first, as `shaping` says.
///
/// Drawing: `shaping`, temperature, then `min_p`, `top_k` and `top_p` (each over what is left), then the inverse of the
/// cumulative distribution. Log-probabilities are of the model's own distribution, before all of these.
///
/// A NaN or +infinity among the logits, or no finite logit at all, gives [`HeadOut::BROKEN`]: nothing can be said about
/// such a row, and only that row.
pub fn draw(logits: &mut [f32], row: &HeadRow, shaping: Shaping<'_>, scratch: &mut Scratch) -> HeadOut {
    let Some(max) = largest(logits, scratch) else { return HeadOut::BROKEN };
    let mut out = HeadOut { token: 0, logprob: f32::NAN, top: [(0, f32::NAN); MAX_TOP_LOGPROBS], n_top: 0 };
    let wants_logprob = match row.want {
        Want::Score { .. } => true,
        Want::Draw(draw) => draw.logprob,
    };
    let mut row_total = f32::NAN;
    if wants_logprob || row.n_top > 0 {
        row_total = log_total(pieces_of(logits, &scratch.group_max), max);
        select_likeliest(logits, row.n_top.into(), scratch);
        for (entry, &key) in out.top.iter_mut().zip(&scratch.likeliest) {
            *entry = (token_of(key), log_probability(logit_of(key), max, row_total));
            out.n_top += 1;
        }
    }
    let mut own_logit = None;
    out.token = match row.want {
        Want::Score { token } => token,
        Want::Draw(draw) if shaping.edits.is_empty() && shaping.mask.is_none() => pick(logits, max, &draw, scratch),
        Want::Draw(draw) => {
            shape(logits, shaping, &mut scratch.originals);
            let Some(max) = largest(logits, scratch) else { return HeadOut::BROKEN };
            let token = pick(logits, max, &draw, scratch);
            own_logit = scratch.originals.iter().find(|(edited, _)| *edited == token).map(|&(_, logit)| logit);
            token
        }
    };
    if wants_logprob {
        out.logprob = log_probability(own_logit.unwrap_or(logits[out.token as usize]), max, row_total);
    }
    out
}

/// Of a logit in a row whose weights' sum has that logarithm. (The last sum makes −0 a 0, wherever it came from.)
fn log_probability(logit: f32, max: f32, log_total: f32) -> f32 {
    (logit - max) - log_total + 0.0
}

/// The largest logit; `None` if a logit is NaN or +infinity, or none is finite. Fills `group_max`.
fn largest(logits: &[f32], scratch: &mut Scratch) -> Option<f32> {
    let all_usable = group_maxima(logits, &mut scratch.group_max);
    let max = scratch.group_max.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (all_usable && max > f32::NEG_INFINITY).then_some(max)
}

/// Applies edits and mask; what edited logits were before goes to `originals`.
fn shape(logits: &mut [f32], shaping: Shaping<'_>, originals: &mut Vec<(u32, f32)>) {
    originals.clear();
    for edit in shaping.edits {
        let logit = &mut logits[edit.token as usize];
        originals.push((edit.token, *logit));
        *logit = if *logit > 0.0 { *logit / edit.penalty } else { *logit * edit.penalty } + edit.bias;
    }
    let Some(mask) = shaping.mask else { return };
    for (logits, &word) in logits.chunks_mut(32).zip(mask) {
        if word != u32::MAX {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// The drawn token. Needs `group_max` of these logits.
fn pick(logits: &[f32], max: f32, draw: &Draw, scratch: &mut Scratch) -> u32 {
    if draw.temperature == 0.0 { greedy(logits, max, &scratch.group_max) } else { random(logits, max, draw, scratch) }
}

/// The lowest id among the largest logits.
fn greedy(logits: &[f32], max: f32, group_max: &[f32]) -> u32 {
    let group = group_max.iter().position(|&m| m == max).expect("max is one of the group maxima") * GROUP;
    let within = logits[group..].iter().position(|&x| x == max).expect("max is in the first group that has it");
    (group + within) as u32
}

/// A random token.
fn random(logits: &[f32], max: f32, draw: &Draw, scratch: &mut Scratch) -> u32 {
    let u = uniform(draw.seed, draw.choice, draw.position);
    let top_k = if draw.top_k == 0 { logits.len() } else { (draw.top_k as usize).min(logits.len()) };
    if draw.min_p > 0.0 {
        collect_from(max + draw.temperature * math::ln(draw.min_p), logits, scratch);
        scratch.likeliest.sort_unstable();
        scratch.likeliest.truncate(top_k);
        let total = accumulate(logits, max, draw.temperature, scratch);
        return invert(u, f64::from(draw.top_p) * total, scratch);
    }
    if top_k < logits.len() {
        select_likeliest(logits, top_k, scratch);
        let total = accumulate(logits, max, draw.temperature, scratch);
        return invert(u, f64::from(draw.top_p) * total, scratch);
    }
    scratch.piece_sums.clear();
    scratch.piece_sums.extend(logits.chunks(PIECE).map(|piece| weights_sum(piece, max, draw.temperature)));
    if draw.top_p >= 1.0 {
        return invert_whole(u, logits, max, draw.temperature, &scratch.piece_sums);
    }
    let total = total(&scratch.piece_sums);
    let mass = f64::from(draw.top_p) * total;
    // The nucleus is usually small.
    for n_selected in [64, 512] {
        select_likeliest(logits, n_selected, scratch);
        if accumulate(logits, max, draw.temperature, scratch) >= mass {
            return invert(u, mass, scratch);
        }
    }
    // All tokens whose weight is under (total - mass) / vocab weigh less than total - mass together, so none of them is
    // in the nucleus. The factor covers rounding.
    let least_weight = 0.99 * (total - mass) / logits.len() as f64;
    collect_from(max + draw.temperature * math::ln(least_weight as f32), logits, scratch);
    scratch.likeliest.sort_unstable();
    accumulate(logits, max, draw.temperature, scratch);
    invert(u, mass, scratch)
}

/// The un-normalised probability of a logit.
#[inline(always)]
fn weight(logit: f32, max: f32, temperature: f32) -> f32 {
    math::exp((logit - max) / temperature)
}

/// Fills `cumulative` for the selected tokens and returns the last sum.
fn accumulate(logits: &[f32], max: f32, temperature: f32, scratch: &mut Scratch) -> f64 {
    let mut sum = 0.0;
    scratch.cumulative.clear();
    scratch.cumulative.extend(scratch.likeliest.iter().map(|&key| {
        sum += f64::from(weight(logits[token_of(key) as usize], max, temperature));
        sum
    }));
    sum
}

/// Keeps the shortest run of selected tokens that holds `mass` and draws from it; `u` is in 0..1.
fn invert(u: f64, mass: f64, scratch: &Scratch) -> u32 {
    let sums = &scratch.cumulative;
    let n_kept = (sums.partition_point(|&sum| sum < mass) + 1).min(sums.len());
    // u < 1 - 2^-53 keeps the target under the last sum, so the index is in range; a token of weight 0 adds nothing to
    // the sum before it and is never the first above the target.
    let target = u * sums[n_kept - 1];
    token_of(scratch.likeliest[sums[..n_kept].partition_point(|&sum| sum <= target)])
}

/// Draws from the whole vocabulary, in order of ids: first the piece, then the token in it.
fn invert_whole(u: f64, logits: &[f32], max: f32, temperature: f32, piece_sums: &[f32]) -> u32 {
    let target = u * total(piece_sums);
    let mut sum = 0.0;
    let mut piece_idx = 0;
    for (idx, &piece_sum) in piece_sums.iter().enumerate() {
        if sum + f64::from(piece_sum) > target {
            piece_idx = idx;
            break;
        }
        sum += f64::from(piece_sum);
    }
    let first = piece_idx * PIECE;
    // The piece's sum was rounded differently from the sum below; if that sum ends a hair short of the target, the last
    // possible token of the piece is the one.
    let mut last_possible = first;
    for (idx, &logit) in logits.iter().enumerate().skip(first).take(PIECE) {
        let weight = f64::from(weight(logit, max, temperature));
        sum += weight;
        if weight > 0.0 {
            last_possible = idx;
        }
        if sum > target {
            return idx as u32;
        }
    }
    last_possible as u32
}

/// Sort key of a token: smaller is likelier, equal logits by id.
#[inline(always)]
fn key(logit: f32, token: usize) -> u64 {
    let bits = (logit + 0.0).to_bits(); // + 0.0 makes -0 and 0 equal, as they compare
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | token as u64
}

/// The token of a sort key.
fn token_of(key: u64) -> u32 {
    key as u32
}

/// The logit of a sort key; 0 for −0.
fn logit_of(key: u64) -> f32 {
    let ascending = !((key >> 32) as u32);
    f32::from_bits(if ascending >> 31 == 1 { ascending & !(1 << 31) } else { !ascending })
}

/// Keeps the `n` likeliest, likeliest first.
fn keep_likeliest(keys: &mut Vec<u64>, n: usize) {
    if n == 0 {
        return keys.clear();
    }
    if n < keys.len() {
        keys.select_nth_unstable(n - 1);
        keys.truncate(n);
    }
    keys.sort_unstable();
}

/// Selects the `n` likeliest tokens, likeliest first. Needs `group_max`.
fn select_likeliest(logits: &[f32], n: usize, scratch: &mut Scratch) {
    if n == 0 {
        return scratch.likeliest.clear();
    }
    let mut bound = f32::NEG_INFINITY;
    if n < scratch.group_max.len() {
        // n groups have a logit of at least the n-th largest maximum, so no token under that is among the n likeliest.
        scratch.group_order.clear();
        scratch.group_order.extend_from_slice(&scratch.group_max);
        bound = *scratch.group_order.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1;
    }
    collect_from(bound, logits, scratch);
    keep_likeliest(&mut scratch.likeliest, n);
}

/// Selects all tokens of at least a logit, in any order. Needs `group_max`.
fn collect_from(bound: f32, logits: &[f32], scratch: &mut Scratch) {
    scratch.likeliest.clear();
    for ((group_idx, group), &group_max) in logits.chunks(GROUP).enumerate().zip(&scratch.group_max) {
        if group_max >= bound {
            let keys = group.iter().enumerate().filter(|(_, logit)| **logit >= bound);
            scratch.likeliest.extend(keys.map(|(i, &logit)| key(logit, group_idx * GROUP + i)));
        }
    }
}

/// Adds the pieces' sums up, in order.
fn total(piece_sums: &[f32]) -> f64 {
    piece_sums.iter().map(|&sum| f64::from(sum)).sum()
}

/// The largest logit of each group; false if a logit is NaN or +infinity.
fn group_maxima(logits: &[f32], out: &mut Vec<f32>) -> bool {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the machine has the features that the function is compiled for.
        return unsafe { group_maxima_avx2(logits, out) };
    }
    group_maxima_body(logits, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn group_maxima_avx2(logits: &[f32], out: &mut Vec<f32>) -> bool {
    group_maxima_body(logits, out)
}

#[inline(always)]
fn group_maxima_body(logits: &[f32], out: &mut Vec<f32>) -> bool {
    let mut unusable = [0u32; LANES];
    out.clear();
    for group in logits.chunks(GROUP) {
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut take = |row: &[f32; LANES]| {
            for lane in 0..LANES {
                max[lane] = if row[lane] > max[lane] { row[lane] } else { max[lane] };
                unusable[lane] |= u32::from(row[lane].is_nan()) | u32::from(row[lane] == f32::INFINITY);
            }
        };
        let (rows, rest) = group.as_chunks::<LANES>();
        rows.iter().for_each(&mut take);
        take(&padded(rest));
        out.push(max.into_iter().fold(f32::NEG_INFINITY, f32::max));
    }
    unusable.iter().all(|&x| x == 0)
}

/// The sum of a piece's weights.
fn weights_sum(piece: &[f32], max: f32, temperature: f32) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the machine has the features that the function is compiled for.
        return unsafe { weights_sum_avx2(piece, max, temperature) };
    }
    weights_sum_body(piece, max, temperature)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn weights_sum_avx2(piece: &[f32], max: f32, temperature: f32) -> f32 {
    weights_sum_body(piece, max, temperature)
}

/// [`weights_sum`] at temperature 1: the same bits without the divisions.
fn piece_sum(piece: &[f32], max: f32) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has the features that the function is compiled for.
            return unsafe { piece_sum_avx512(piece, max) };
        }
        // SAFETY: as above.
        return unsafe { piece_sum_avx2(piece, max) };
    }
    weights_sum_body(piece, max, 1.0)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f")]
fn piece_sum_avx512(piece: &[f32], max: f32) -> f32 {
    weights_sum_body(piece, max, 1.0)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn piece_sum_avx2(piece: &[f32], max: f32) -> f32 {
    weights_sum_body(piece, max, 1.0)
}

#[inline(always)]
fn weights_sum_body(piece: &[f32], max: f32, temperature: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let mut take = |row: &[f32; LANES]| {
        for lane in 0..LANES {
            sums[lane] += weight(row[lane], max, temperature);
        }
    };
    let (rows, rest) = piece.as_chunks::<LANES>();
    rows.iter().for_each(&mut take);
    take(&padded(rest));
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0]
}

/// The rest of a row; the lanes past its end get a logit that is never the largest and weighs exactly 0.
#[inline(always)]
fn padded(rest: &[f32]) -> [f32; LANES] {
    let mut row = [f32::NEG_INFINITY; LANES];
    row[..rest.len()].copy_from_slice(rest);
    row
}

/// A number in 0..1 (a multiple of 2^-52) that depends on the key alone.
fn uniform(seed: u64, choice: u32, position: u32) -> f64 {
    let [a, b, ..] = philox4x32([position, choice, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(a) << 32 | u64::from(b);
    (bits >> 12) as f64 / (1u64 << 52) as f64
}

/// Philox4x32-10: ten rounds of multiply, swap and xor turn a counter and a key into 128 random bits (Salmon et al.,
/// "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let multiply = |a: u32, b: u32| (u64::from(a) * u64::from(b)) as u32;
    let high = |a: u32, b: u32| ((u64::from(a) * u64::from(b)) >> 32) as u32;
    for _ in 0..10 {
        let [a, b, c, d] = counter;
        counter = [
            high(0xcd9e_8d57, c) ^ b ^ key[0],
            multiply(0xcd9e_8d57, c),
            high(0xd251_1f53, a) ^ d ^ key[1],
            multiply(0xd251_1f53, a),
        ];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with their library Random123.
    #[test]
    fn philox_known_answers() {
        let ones = u32::MAX;
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn portable_and_vector_loops_have_the_same_bits() {
        for n in [1, 15, 16, 63, 64, 65, 1023, 1024, 1025, 5000] {
            let logits: Vec<f32> = (0..n).map(|i| (uniform(7, 0, i) * 40.0 - 20.0) as f32).collect();
            let (mut a, mut b) = (Vec::new(), Vec::new());
            assert_eq!(group_maxima(&logits, &mut a), group_maxima_body(&logits, &mut b));
            assert_eq!(a, b, "maxima of {n}");
            for piece in logits.chunks(PIECE) {
                assert_eq!(weights_sum(piece, 20.0, 0.7).to_bits(), weights_sum_body(piece, 20.0, 0.7).to_bits(), "sum of {n}");
                assert_eq!(piece_sum(piece, 20.0).to_bits(), weights_sum_body(piece, 20.0, 1.0).to_bits(), "sum of {n}");
            }
        }
    }
}
