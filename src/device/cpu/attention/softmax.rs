//! Softmax of a tile's scores, online: what was summed before is made smaller where a larger score is found. Knows nothing of keys.

use super::super::simd::{LANES, Simd};
use super::{Seen, TILE_BLOCKS, TILE_KEYS};
use crate::device::AttentionSpec;

/// Turns rows' scores of a tile, `[rows][64]`, into exponentials over the keys that each row sees (0 for the rest), updates
/// the largest scores (as exponents of 2) and the sums, `[rows][16]`, and gives the factors for what was summed before. At
/// most 16 rows. Pass by pass over all rows: one row's steps wait for each other, those of several do not. `rounded` takes
/// the exponentials as bfloat16, `[rows][64]`, if it is not empty.
#[inline(always)]
pub(super) fn softmax<S: Simd>(
    s: S,
    spec: &AttentionSpec,
    seen: &[Seen],
    p: (&mut [f32], &mut [u16]),
    state: (&mut [f32], &mut [f32]),
) -> [f32; LANES] {
    // Most rows see whole tiles: of those nothing is asked vector by vector.
    if spec.soft_cap.is_none() && seen.iter().all(Seen::all) {
        softmax_of::<S, true>(s, spec, seen, p, state)
    } else {
        softmax_of::<S, false>(s, spec, seen, p, state)
    }
}

/// [`softmax`]; with `WHOLE`, of rows that see all keys, and without a cap.
#[inline(always)]
fn softmax_of<S: Simd, const WHOLE: bool>(
    s: S,
    spec: &AttentionSpec,
    seen: &[Seen],
    (p, rounded): (&mut [f32], &mut [u16]),
    (largest, sum): (&mut [f32], &mut [f32]),
) -> [f32; LANES] {
    let n = seen.len();
    assert!(n <= LANES && p.len() >= n * TILE_KEYS && largest.len() == n && sum.len() == n * LANES);
    assert!(rounded.is_empty() || rounded.len() >= n * TILE_KEYS);
    // e^(scale · score) = 2^(factor · score)
    let factor = spec.soft_cap.map_or(spec.scale, |_| 1.0) * std::f32::consts::LOG2_E;
    let (mut before, mut most) = ([0.0; LANES], [0.0; LANES]);
    for (r, seen) in seen.iter().enumerate().filter(|(_, seen)| WHOLE || seen.any()) {
        before[r] = largest[r];
        // SAFETY: `p` has four vectors for each row.
        let here = factor * unsafe { largest_score::<S, WHOLE>(s, spec, *seen, p.as_mut_ptr().add(r * TILE_KEYS)) };
        largest[r] = if here > before[r] { here } else { before[r] };
        most[r] = largest[r];
    }
    let mut decay = [0.0; LANES];
    // SAFETY: the arrays are vectors.
    unsafe { s.store(decay.as_mut_ptr(), s.exp2(s.sub(s.load(before.as_ptr()), s.load(most.as_ptr())))) };
    for (r, seen) in seen.iter().enumerate() {
        if !WHOLE && !seen.any() {
            rounded.iter_mut().skip(r * TILE_KEYS).take(TILE_KEYS).for_each(|weight| *weight = 0);
            continue;
        }
        // SAFETY: `p` and `rounded` have four vectors for each row, `sum` one.
        unsafe {
            let (p, sum) = (p.as_mut_ptr().add(r * TILE_KEYS), sum.as_mut_ptr().add(r * LANES));
            let total = exponentials::<S, WHOLE>(s, *seen, (s.splat(factor), s.splat(-most[r])), p);
            s.store(sum, s.fma(s.load(sum), s.splat(decay[r]), total));
            if !rounded.is_empty() {
                let rounded = rounded.as_mut_ptr().add(r * TILE_KEYS);
                for b in 0..TILE_BLOCKS {
                    s.round_bf16(p.add(b * LANES), rounded.add(b * LANES));
                }
            }
        }
    }
    decay
}

/// The largest of a row's scores; caps them, and makes those of keys that it does not see −infinity.
///
/// # Safety
/// `p` must be valid for 64 f32.
#[inline(always)]
unsafe fn largest_score<S: Simd, const WHOLE: bool>(s: S, spec: &AttentionSpec, seen: Seen, p: *mut f32) -> f32 {
    let minus_infinity = s.splat(f32::NEG_INFINITY);
    let mut x = [minus_infinity; TILE_BLOCKS];
    for (b, x) in x.iter_mut().enumerate() {
        // SAFETY: four vectors, the caller's promise.
        unsafe {
            let p = p.add(b * LANES);
            *x = s.load(p);
            if WHOLE {
                continue;
            }
            if let Some(cap) = spec.soft_cap {
                *x = s.soft_cap(s.mul(*x, s.splat(spec.scale)), cap);
            }
            if !seen.all() {
                *x = s.first(seen.end.saturating_sub(b * LANES), *x, minus_infinity);
                *x = s.first(seen.first.saturating_sub(b * LANES), minus_infinity, *x);
            }
            if !seen.all() || spec.soft_cap.is_some() {
                s.store(p, *x);
            }
        }
    }
    s.largest(s.max(s.max(x[0], x[1]), s.max(x[2], x[3])))
}

/// Turns a row's scores x into 2^(factor · x + offset), 0 for keys that it does not see, and gives their sums by lane.
///
/// # Safety
/// `p` must be valid for 64 f32.
#[inline(always)]
unsafe fn exponentials<S: Simd, const WHOLE: bool>(s: S, seen: Seen, (factor, offset): (S::V, S::V), p: *mut f32) -> S::V {
    let zero = s.splat(0.0);
    let mut e = [zero; TILE_BLOCKS];
    for (b, e) in e.iter_mut().enumerate() {
        // SAFETY: four vectors, the caller's promise.
        unsafe {
            let p = p.add(b * LANES);
            *e = s.exp2_below(s.fma(s.load(p), factor, offset));
            if !WHOLE && !seen.all() {
                *e = s.first(seen.end.saturating_sub(b * LANES), *e, zero);
                *e = s.first(seen.first.saturating_sub(b * LANES), zero, *e);
            }
            s.store(p, *e);
        }
    }
    s.add(s.add(e[0], e[1]), s.add(e[2], e[3]))
}

/// Multiplies rows of outputs, `[rows][width]`, by their factors, where there is anything to do.
#[inline(always)]
pub(super) fn rescale<S: Simd>(s: S, seen: &[Seen], decay: &[f32; LANES], width: usize, out: &mut [f32]) {
    for ((out, seen), &decay) in out.chunks_exact_mut(width).zip(seen).zip(decay) {
        if seen.any() && decay.to_bits() != 1.0f32.to_bits() {
            for out in out.chunks_exact_mut(LANES) {
                // SAFETY: a chunk has 16 elements.
                unsafe { s.store(out.as_mut_ptr(), s.mul(s.load(out.as_ptr()), s.splat(decay))) };
            }
        }
    }
}
