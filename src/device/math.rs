//! The one exponential and the one logarithm of every host-side kernel. Knows nothing of models or batches.
//!
//! Both use IEEE operations in a fixed order only, so that the same input has the same bits on every machine, in scalar
//! and in vector code: the C library's `expf` and `logf` promise neither.

#![expect(clippy::inline_always, reason = "callers vectorise only if the body is compiled into their loop")]

/// e^x, branch-free so that loops over it vectorise (compile them with FMA enabled: see `sample.rs`).
///
/// Largest relative error against f64 over all normal results: 0.68 · 2^-23 (so under one unit in the last place; measured by
/// `tests::exp_is_within_one_unit`). Results under 2^-126 are rounded to subnormals, under about 2^-149 to 0; x > 88.73
/// gives infinity; NaN stays NaN. exp(0) is exactly 1.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2^23 leaves the nearest integer in the low bits of the mantissa.
    const SHIFT: f32 = 12_582_912.0;
    // ln 2 in two parts; the high one has 9 trailing zero bits, so that n · LN2_HI is exact for |n| < 512.
    const LN2_HI: f32 = 0.693_145_75;
    const LN2_LO: f32 = 1.428_606_8e-6;
    // (e^r - 1 - r) / r^2 on |r| <= ln(2)/2: fitted for least largest relative error of e^r, 0.07 · 2^-24.
    const C: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_393, 0.008_368_781, 0.001_381_446_7];

    let x = x.clamp(-104.0, 89.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let mut q = C[4];
    q = q.mul_add(r, C[3]);
    q = q.mul_add(r, C[2]);
    q = q.mul_add(r, C[1]);
    q = q.mul_add(r, C[0]);
    let y = q.mul_add(r * r, r) + 1.0;
    // 2^n in two factors: n reaches from -150 to 128, one exponent field only from -126 to 127.
    let n = (shifted.to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// 2^n for -126 <= n <= 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// The natural logarithm of a positive normal f32, computed in f64 and rounded once; within one unit in the last place.
/// Not for inner loops.
pub fn ln(x: f32) -> f32 {
    debug_assert!(x.is_normal() && x > 0.0, "ln({x})");
    // x = m · 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172.
    let bits = x.to_bits();
    let e = (bits.wrapping_sub(0x3f35_04f3) as i32) >> 23;
    let m = f64::from(f32::from_bits(bits.wrapping_sub((e as u32) << 23)));
    let s = (m - 1.0) / (m + 1.0);
    let s2 = s * s;
    // The series is cut after s^19: the rest is under 2^-53.
    let mut series = 0.0;
    for k in (0..10).rev() {
        series = series * s2 + 1.0 / f64::from(2 * k + 1);
    }
    (f64::from(e) * std::f64::consts::LN_2 + 2.0 * s * series) as f32
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "exact values are what is promised")]
mod tests {
    use super::*;

    /// Every `step`-th bit pattern from `from` to `to`, both of the same sign.
    fn bit_patterns(from: f32, to: f32, step: usize) -> impl Iterator<Item = f32> {
        (from.to_bits()..=to.to_bits()).step_by(step).map(f32::from_bits)
    }

    #[test]
    fn exp_is_within_one_unit() {
        let mut worst = 0.0f64;
        for x in bit_patterns(-0.0, -87.3, 1009).chain(bit_patterns(0.0, 88.7, 1009)) {
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        let units = worst * f64::from(1 << 23);
        assert!(units < 0.7, "largest relative error {units} · 2^-23");
        assert!(units > 0.4, "the measurement itself is broken: {units}");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(88.72).is_finite());
        assert_eq!(exp(88.73), f32::INFINITY);
        for x in bit_patterns(-87.4, -103.0, 9973) {
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - want).abs() <= want * 1e-7 + f64::from(f32::from_bits(1)), "exp({x}) = {got}, not {want}");
        }
    }

    #[test]
    fn ln_is_within_one_unit() {
        assert_eq!(ln(1.0), 0.0);
        for x in bit_patterns(f32::MIN_POSITIVE, f32::MAX, 9973) {
            let want = f64::from(x).ln();
            let unit = f64::from(f32::from_bits((want as f32).abs().to_bits() + 1) - (want as f32).abs());
            assert!((f64::from(ln(x)) - want).abs() <= unit, "ln({x}) = {}, not {want}", ln(x));
        }
    }
}
