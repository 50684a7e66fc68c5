//! Sixteen lanes of f32 and the integer dot products of quantised weights, as a trait that every instruction set
//! implements; and the portable implementation, which is the truth. Knows nothing of layers or tensors.
//!
//! Invariant: every operation is one IEEE operation per lane (or exact in integers) in one fixed order, so that all
//! implementations give the same bits. A kernel generic over [`Simd`] is therefore the same function on each of them.

use super::dots::{self, Left, Right, Target};
use super::unpack;
use half::{bf16, f16};
use std::ops::Range;

/// Lanes of a vector; also the columns that one group of weight bytes covers.
pub(super) const LANES: usize = 16;

/// How the 32 integers of a quantised block give its values.
pub(super) trait Format {
    /// 4 bits per weight; else 8 (unsigned, after adding 128).
    const NIBBLES: bool;
    /// What to subtract from a stored integer.
    const ZERO: i32;
    /// Whether a minimum is added: d·q + m.
    const MIN: bool;
    /// Whether weights lie in memory with f32 scales and 8-bit integers, so that nothing is left to unpack.
    const SPREAD: bool;
    /// Whether the halves of a block have scales (and minimums) of their own.
    const HALVES: bool;
}

/// d·(q − 8), q of 4 bits.
pub(super) struct Q40;
/// d·q + m, q of 4 bits.
pub(super) struct Q41;
/// d·(q − 128), q of 8 bits.
pub(super) struct Q80;
/// d·(q − 128), + m if `MIN`, q of 8 bits; one (d, m) per half of a block if `HALVES`.
pub(super) struct Spread<const MIN: bool, const HALVES: bool>;

impl Format for Q40 {
    const NIBBLES: bool = true;
    const ZERO: i32 = 8;
    const MIN: bool = false;
    const SPREAD: bool = false;
    const HALVES: bool = false;
}
impl Format for Q41 {
    const NIBBLES: bool = true;
    const ZERO: i32 = 0;
    const MIN: bool = true;
    const SPREAD: bool = false;
    const HALVES: bool = false;
}
impl Format for Q80 {
    const NIBBLES: bool = false;
    const ZERO: i32 = 128;
    const MIN: bool = false;
    const SPREAD: bool = false;
    const HALVES: bool = false;
}
impl<const WITH_MIN: bool, const BY_HALF: bool> Format for Spread<WITH_MIN, BY_HALF> {
    const NIBBLES: bool = false;
    const ZERO: i32 = 128;
    const MIN: bool = WITH_MIN;
    const SPREAD: bool = true;
    const HALVES: bool = BY_HALF;
}

/// One instruction set. A value of an implementing type is the proof that its instructions may be used.
///
/// Implementations are `#[inline(always)]`: they are compiled inside functions that enable the instructions. Kernels must
/// not call them from closures (nor through `array::from_fn` and the like): what is not inlined before the instructions
/// are known becomes a call per instruction, 10 to 50 times slower.
pub(super) trait Simd: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// 64 weight bytes: for each of 16 columns, 4 consecutive elements of k.
    type U: Copy;
    /// The running integer sums of 16 columns.
    type I: Copy;
    /// Whether 32 registers of 16 lanes are there (register blocks are sized by it).
    const WIDE: bool;
    /// Rows that a matrix kernel takes at once.
    const ROWS: usize;

    /// All lanes x.
    fn splat(self, x: f32) -> Self::V;
    /// Reads 16 f32.
    ///
    /// # Safety
    /// `p` must be valid for reads of 16 f32; no alignment is needed.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// Writes 16 f32.
    ///
    /// # Safety
    /// `p` must be valid for writes of 16 f32; no alignment is needed.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Up to 16 f32, with zeros after them.
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::V {
        // A copy of unknown length is a call: for whole vectors it would cost more than what is done with them.
        if x.len() == LANES {
            // SAFETY: 16 values.
            return unsafe { self.load(x.as_ptr()) };
        }
        let mut part = [0.0; LANES];
        part[..x.len()].copy_from_slice(x);
        // SAFETY: 16 values.
        unsafe { self.load(part.as_ptr()) }
    }
    /// Reads 16 IEEE halves.
    ///
    /// # Safety
    /// `p` must be valid for reads of 16 u16.
    unsafe fn load_f16(self, p: *const u16) -> Self::V;
    /// Reads 16 bfloat16.
    ///
    /// # Safety
    /// `p` must be valid for reads of 16 u16.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// Writes 16 IEEE halves, rounded to nearest even.
    ///
    /// # Safety
    /// `p` must be valid for writes of 16 u16.
    unsafe fn store_f16(self, p: *mut u16, v: Self::V);
    /// Rounds 16 f32 to bfloat16, to nearest even; magnitudes under 2^-126 become 0 and a NaN becomes a quiet one, as
    /// `VCVTNEPS2BF16` has it.
    ///
    /// # Safety
    /// `from` must be valid for reads of 16 f32, `to` for writes of 16 u16.
    unsafe fn round_bf16(self, from: *const f32, to: *mut u16);
    /// Reads 16 pairs of bfloat16: the first of each, and the second.
    ///
    /// # Safety
    /// `p` must be valid for reads of 32 u16.
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::V, Self::V);
    /// A pair of bfloat16 in all lanes: the first of it, and the second.
    ///
    /// # Safety
    /// `p` must be valid for reads of 2 u16.
    #[inline(always)]
    unsafe fn splat_bf16_pair(self, p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: the caller promises two u16.
        let [even, odd] = unsafe { [p.read(), p.add(1).read()] };
        (self.splat(f32::from_bits(u32::from(even) << 16)), self.splat(f32::from_bits(u32::from(odd) << 16)))
    }
    /// R rows by C vectors of dot products of bfloat16.
    ///
    /// # Safety
    /// As [`dots::multiply`].
    #[inline(always)]
    unsafe fn dots<const R: usize, const C: usize>(self, left: Left, right: Right<'_, C>, target: Target) {
        // SAFETY: passed on.
        unsafe { dots::chains::<Self, R, C>(self, left, right, target) };
    }
    /// a + b.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a − b.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// a > b ? a : b, so b where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// a < b ? a : b, so b where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The first n lanes of a, the others of b.
    fn first(self, n: usize, a: Self::V, b: Self::V) -> Self::V;
    /// The sum of the lanes: lanes i and i + 8 are added, then i and i + 4, i and i + 2, i and i + 1.
    fn sum(self, v: Self::V) -> f32;
    /// The largest lane, by the same tree as [`Simd::sum`].
    fn largest(self, v: Self::V) -> f32;
    /// (2^⌊n/2⌋, 2^⌈n/2⌉) for the integer n that `shifted` = 1.5·2^23 + n carries.
    fn powers_of_two(self, shifted: Self::V) -> (Self::V, Self::V);
    /// 2^n, −126 <= n <= 127, for the integer n that `shifted` = 1.5·2^23 + 127 + n carries; anything for a NaN.
    fn power_of_two(self, shifted: Self::V) -> Self::V;

    /// Reads 64 weight bytes.
    ///
    /// # Safety
    /// `p` must be valid for reads of 64 bytes.
    unsafe fn load_bytes(self, p: *const u8) -> Self::U;
    /// Writes 64 weight bytes.
    ///
    /// # Safety
    /// `p` must be valid for writes of 64 bytes.
    unsafe fn store_bytes(self, p: *mut u8, v: Self::U);
    /// The low four bits of each byte.
    fn low(self, u: Self::U) -> Self::U;
    /// The high four bits of each byte.
    fn high(self, u: Self::U) -> Self::U;
    /// An empty integer sum of a block whose activations sum to `total`.
    fn start<F: Format>(self, total: i32) -> Self::I;
    /// Adds w · a over 4 elements of k, for each column. `a` is 4 signed bytes, none of them −128; at most 8 calls
    /// between `start` and `finish`.
    fn dot<F: Format>(self, acc: Self::I, w: Self::U, a: i32) -> Self::I;
    /// Σ (q − ZERO) · a as f32 (exact: it is under 2^20).
    fn finish<F: Format>(self, acc: Self::I, total: i32) -> Self::V;

    /// Makes some pieces of a panel in packed blocks tiles (`unpack.rs`).
    #[inline(always)]
    fn unpack<F: Format>(self, packed: &[u8], pieces: Range<usize>, tiles: &mut [u16]) {
        unpack::plainly::<Self, F>(self, packed, pieces, tiles);
    }

    /// e^x: the polynomial, the constants and the order of operations of the scalar `exp` of host-side kernels.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        const SHIFT: f32 = 12_582_912.0;
        const LN2_HI: f32 = 0.693_145_75;
        const LN2_LO: f32 = 1.428_606_8e-6;
        const C: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_393, 0.008_368_781, 0.001_381_446_7];
        let x = self.min(self.splat(89.0), self.max(self.splat(-104.0), x));
        let shifted = self.fma(x, self.splat(std::f32::consts::LOG2_E), self.splat(SHIFT));
        let n = self.sub(shifted, self.splat(SHIFT));
        let r = self.fma(n, self.splat(-LN2_LO), self.fma(n, self.splat(-LN2_HI), x));
        let mut q = self.splat(C[4]);
        q = self.fma(q, r, self.splat(C[3]));
        q = self.fma(q, r, self.splat(C[2]));
        q = self.fma(q, r, self.splat(C[1]));
        q = self.fma(q, r, self.splat(C[0]));
        let y = self.add(self.fma(q, self.mul(r, r), r), self.splat(1.0));
        let (a, b) = self.powers_of_two(shifted);
        self.mul(self.mul(y, a), b)
    }

    /// 2^x, to within 1.3 · 2^-23 of it; x counts as −126 below that and as 127 above, and 2^0 is exactly 1.
    #[inline(always)]
    fn exp2(self, x: Self::V) -> Self::V {
        self.exp2_below(self.min(self.splat(127.0), x))
    }

    /// [`Simd::exp2`] of what is at most 127.
    #[inline(always)]
    fn exp2_below(self, x: Self::V) -> Self::V {
        const SHIFT: f32 = 12_583_039.0;
        // (2^r − 1) / r on |r| <= 1/2: fitted for least largest relative error of 2^r.
        const C: [f32; 5] = [0.693_146_94, 0.240_222_48, 0.055_507_686, 0.009_671_233, 0.001_325_593_9];
        let x = self.max(self.splat(-126.0), x);
        let shifted = self.add(x, self.splat(SHIFT));
        let r = self.sub(x, self.sub(shifted, self.splat(SHIFT)));
        let mut q = self.splat(C[4]);
        q = self.fma(q, r, self.splat(C[3]));
        q = self.fma(q, r, self.splat(C[2]));
        q = self.fma(q, r, self.splat(C[1]));
        q = self.fma(q, r, self.splat(C[0]));
        self.mul(self.fma(q, r, self.splat(1.0)), self.power_of_two(shifted))
    }

    /// 1 − 2 / (e^2x + 1): tanh to within a few 2^-24 (absolute, so small results have fewer correct digits).
    #[inline(always)]
    fn tanh(self, x: Self::V) -> Self::V {
        let one = self.splat(1.0);
        let e = self.exp(self.add(x, x));
        self.sub(one, self.div(self.splat(2.0), self.add(e, one)))
    }

    /// cap · tanh(x / cap).
    #[inline(always)]
    fn soft_cap(self, x: Self::V, cap: f32) -> Self::V {
        self.mul(self.tanh(self.div(x, self.splat(cap))), self.splat(cap))
    }
}

/// Plain loops over arrays: the truth that the other instruction sets must equal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

/// The bits of a bfloat16, as [`Simd::round_bf16`] rounds.
#[inline(always)]
pub(super) fn to_bf16(x: f32) -> u16 {
    if x.is_subnormal() { bf16::from_f32(0.0f32.copysign(x)).to_bits() } else { bf16::from_f32(x).to_bits() }
}

/// f(i) for each lane.
#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

/// The fixed reduction tree.
#[inline(always)]
fn tree(mut v: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            v[i] = f(v[i], v[i + half]);
        }
    }
    v[0]
}

impl Simd for Portable {
    type V = [f32; LANES];
    type U = [u8; 64];
    type I = [i32; LANES];
    const WIDE: bool = false;
    const ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller promises 16 readable f32.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller promises 16 writable f32.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        // SAFETY: the caller promises 16 readable u16.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        lanes(|i| f16::from_bits(bits[i]).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        // SAFETY: the caller promises 16 readable u16.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        lanes(|i| bf16::from_bits(bits[i]).to_f32())
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::V) {
        let bits: [u16; LANES] = std::array::from_fn(|i| f16::from_f32(v[i]).to_bits());
        // SAFETY: the caller promises 16 writable u16.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn round_bf16(self, from: *const f32, to: *mut u16) {
        // SAFETY: the caller promises 16 readable f32 and 16 writable u16.
        unsafe {
            let v = self.load(from);
            to.cast::<[u16; LANES]>().write_unaligned(std::array::from_fn(|i| to_bf16(v[i])));
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: the caller promises 32 readable u16.
        let bits = unsafe { p.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        (lanes(|i| bf16::from_bits(bits[i][0]).to_f32()), lanes(|i| bf16::from_bits(bits[i][1]).to_f32()))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn first(self, n: usize, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if i < n { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        tree(v, |a, b| a + b)
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        tree(v, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn powers_of_two(self, shifted: Self::V) -> (Self::V, Self::V) {
        let n = |i: usize| (shifted[i].to_bits() as i32).wrapping_sub(0x4b40_0000);
        let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
        (lanes(|i| power(n(i) >> 1)), lanes(|i| power(n(i).wrapping_sub(n(i) >> 1))))
    }
    #[inline(always)]
    fn power_of_two(self, shifted: Self::V) -> Self::V {
        lanes(|i| f32::from_bits(shifted[i].to_bits() << 23))
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> Self::U {
        // SAFETY: the caller promises 64 readable bytes.
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: Self::U) {
        // SAFETY: the caller promises 64 writable bytes.
        unsafe { p.cast::<[u8; 64]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn low(self, u: Self::U) -> Self::U {
        u.map(|b| b & 15)
    }
    #[inline(always)]
    fn high(self, u: Self::U) -> Self::U {
        u.map(|b| b >> 4)
    }
    #[inline(always)]
    fn start<F: Format>(self, total: i32) -> Self::I {
        [-F::ZERO * total; LANES]
    }
    #[inline(always)]
    fn dot<F: Format>(self, mut acc: Self::I, w: Self::U, a: i32) -> Self::I {
        let a = a.to_le_bytes();
        for (acc, w) in acc.iter_mut().zip(w.chunks_exact(4)) {
            *acc += (0..4).map(|i| i32::from(w[i]) * i32::from(a[i] as i8)).sum::<i32>();
        }
        acc
    }
    #[inline(always)]
    fn finish<F: Format>(self, acc: Self::I, _total: i32) -> Self::V {
        lanes(|i| acc[i] as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::isa::{Isa, per_isa};

    per_isa! {
        fn exp2(x: &[f32; LANES]) -> [f32; LANES] = exp2_body;
    }

    #[inline(always)]
    fn exp2_body<S: Simd>(s: S, x: &[f32; LANES]) -> [f32; LANES] {
        let mut y = [0.0; LANES];
        // SAFETY: both have 16 elements.
        unsafe { s.store(y.as_mut_ptr(), s.exp2(s.load(x.as_ptr()))) };
        y
    }

    #[test]
    fn exp2_is_within_its_bound_and_the_same_on_every_instruction_set() {
        let mut worst = 0.0f64;
        for start in (0..u32::MAX - 16 * 65_521).step_by(16 * 65_521) {
            let x: [f32; LANES] = std::array::from_fn(|i| f32::from_bits(start + 65_521 * i as u32));
            let truth = exp2(Isa::PORTABLE, &x);
            for isa in Isa::available() {
                let same =
                    exp2(isa, &x).iter().zip(&truth).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
                assert!(same, "{}: {x:?}", isa.name());
            }
            for (x, y) in x.into_iter().zip(truth) {
                let want = f64::from(x.clamp(-126.0, 127.0)).exp2();
                assert_eq!(x.is_nan(), y.is_nan());
                worst = worst.max(((f64::from(y) - want) / want).abs());
            }
        }
        let units = worst * f64::from(1 << 23);
        assert!((0.5..1.3).contains(&units), "largest relative error {units} · 2^-23");
        assert_eq!(exp2(Isa::PORTABLE, &[0.0; LANES])[0].to_bits(), 1.0f32.to_bits());
    }
}
