//! Products of f32 activations and float weights, for a few rows and one panel of 32 columns. Knows nothing of tiles or
//! threads. Invariant: out = fma(a[k], w[k], out) over k in order, from 0.

use super::simd::{LANES, Simd};
use super::weights::PANEL;
use crate::tensor::DType;

/// out[r][column] for the rows of `act`, `[out.len()][k]` (at most `S::ROWS`).
#[inline(always)]
pub(super) fn rows<S: Simd>(s: S, dtype: DType, panel: &[u8], act: &[f32], out: &mut [[f32; PANEL]]) {
    match dtype {
        DType::F32 => sized::<S, F32>(s, panel, act, out),
        DType::F16 => sized::<S, F16>(s, panel, act, out),
        DType::Bf16 => sized::<S, Bf16>(s, panel, act, out),
        _ => unreachable!("{dtype} weights are integers"),
    }
}

/// How a type of float is read.
trait Float {
    /// Bytes of one.
    const SIZE: usize;
    /// Sixteen of them.
    ///
    /// # Safety
    /// `p` must be valid for reads of 16 elements.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V;
}

struct F32;
struct F16;
struct Bf16;

impl Float for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: passed on.
        unsafe { s.load(p.cast()) }
    }
}
impl Float for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: passed on.
        unsafe { s.load_f16(p.cast()) }
    }
}
impl Float for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: passed on.
        unsafe { s.load_bf16(p.cast()) }
    }
}

#[inline(always)]
fn sized<S: Simd, T: Float>(s: S, panel: &[u8], act: &[f32], out: &mut [[f32; PANEL]]) {
    match out.len() {
        1 => columns::<S, T, 1>(s, panel, act, out),
        2 => columns::<S, T, 2>(s, panel, act, out),
        3 if S::ROWS >= 3 => columns::<S, T, 3>(s, panel, act, out),
        4 if S::ROWS >= 4 => columns::<S, T, 4>(s, panel, act, out),
        5 if S::ROWS >= 5 => columns::<S, T, 5>(s, panel, act, out),
        6 if S::ROWS >= 6 => columns::<S, T, 6>(s, panel, act, out),
        n => unreachable!("{n} rows for a kernel of {}", S::ROWS),
    }
}

/// All 32 columns at once where there are registers for it, else in two passes.
#[inline(always)]
fn columns<S: Simd, T: Float, const R: usize>(s: S, panel: &[u8], act: &[f32], out: &mut [[f32; PANEL]]) {
    if S::WIDE {
        kernel::<S, T, R, 2>(s, panel, act, 0, out);
    } else {
        kernel::<S, T, R, 1>(s, panel, act, 0, out);
        kernel::<S, T, R, 1>(s, panel, act, 1, out);
    }
}

/// R rows by C vectors of columns, from vector `c0` of the panel on.
#[inline(always)]
fn kernel<S: Simd, T: Float, const R: usize, const C: usize>(
    s: S,
    panel: &[u8],
    act: &[f32],
    c0: usize,
    out: &mut [[f32; PANEL]],
) {
    let k = act.len() / R;
    assert!(panel.len() >= k * PANEL * T::SIZE && out.len() == R && c0 + C <= 2);
    let mut acc = [[s.splat(0.0); C]; R];
    for i in 0..k {
        // SAFETY: i < k, and the lengths were asserted just now.
        unsafe {
            let mut w = [s.splat(0.0); C];
            for (c, w) in w.iter_mut().enumerate() {
                *w = T::load(s, panel.as_ptr().add((i * PANEL + (c0 + c) * LANES) * T::SIZE));
            }
            for r in 0..R {
                let a = s.splat(act.as_ptr().add(r * k + i).read());
                for c in 0..C {
                    acc[r][c] = s.fma(a, w[c], acc[r][c]);
                }
            }
        }
    }
    for (out, acc) in out.iter_mut().zip(acc) {
        for (c, acc) in acc.into_iter().enumerate() {
            // SAFETY: c0 + c is 0 or 1, and a row of `out` is two vectors.
            unsafe { s.store(out.as_mut_ptr().add((c0 + c) * LANES), acc) };
        }
    }
}
