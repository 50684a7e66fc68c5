//! Root-mean-square norm of one row. Knows nothing of tokens or layers. Invariant: squares are summed in 16 lanes and
//! these in the fixed tree of `simd.rs`, whatever the instruction set.

use super::isa::per_isa;
use super::quant::ActWriter;
use super::simd::{LANES, Simd};

per_isa! {
    /// A row of the activations = x / sqrt(mean(x²) + eps) · weight. Nobody else may touch it at the same time. `normed`
    /// is the caller's memory for as many values.
    pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, normed: &mut [f32], act: (&ActWriter<'_>, usize)) = rms_norm_body;
}

per_isa! {
    /// x = x / sqrt(mean(x²) + eps) · weight
    pub(super) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) = in_place_body;
}

per_isa! {
    /// out += x / sqrt(mean(x²) + eps) · weight
    pub(super) fn rms_norm_add(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = add_body;
}

#[inline(always)]
fn rms_norm_body<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, normed: &mut [f32], (act, row): (&ActWriter<'_>, usize)) {
    let inverse = inverse_rms(s, x, weight, eps);
    assert_eq!(normed.len(), x.len());
    for ((normed, x), weight) in normed.iter_mut().zip(x).zip(weight) {
        *normed = x * inverse * weight;
    }
    // SAFETY: the caller is alone with the row.
    unsafe { act.write(s, row, 0, normed) };
}

#[inline(always)]
fn in_place_body<S: Simd>(s: S, x: &mut [f32], weight: &[f32], eps: f32) {
    let inverse = inverse_rms(s, x, weight, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * inverse * weight;
    }
}

#[inline(always)]
fn add_body<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let inverse = inverse_rms(s, x, weight, eps);
    assert_eq!(out.len(), x.len());
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out += x * inverse * weight;
    }
}

/// 1 / sqrt(mean(x²) + eps)
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32) -> f32 {
    assert_eq!(weight.len(), x.len(), "a norm of {} weights over {} values", weight.len(), x.len());
    let mut squares = s.splat(0.0);
    for chunk in x.chunks(LANES) {
        let values = s.load_part(chunk);
        squares = s.fma(values, values, squares);
    }
    1.0 / (s.sum(squares) / x.len() as f32 + eps).sqrt()
}
