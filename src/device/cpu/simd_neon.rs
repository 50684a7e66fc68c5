//! The AArch64 implementations of [`Simd`]: NEON, with dot products of integers where the processor has them. Knows nothing
//! of layers or tensors. Invariant: bit for bit the portable implementation (`simd.rs` says why; the conformance tests hold it
//! to that). So dot products of bfloat16 are chains in f32 (`dots.rs`): `BFDOT` rounds to odd, which gives other sums.

use super::simd::{Format, LANES, Simd};
use std::arch::aarch64::{
    float32x4_t, int32x4_t, uint8x16_t, uint32x4_t, vadd_f32, vaddq_f32, vaddq_s32, vaddq_u32, vandq_u8, vandq_u32, vbsl_f32,
    vbslq_f32, vbslq_u32, vceqq_f32, vcgt_f32, vcgtq_f32, vcgtq_s32, vcltq_f32, vcltq_u32, vcvtq_f32_s32, vdivq_f32, vdupq_n_f32,
    vdupq_n_s32, vdupq_n_u8, vdupq_n_u32, veorq_u8, vfmaq_f32, vget_high_f32, vget_lane_f32, vget_low_f32, vget_low_s8, vld1_u16,
    vld1q_f32, vld1q_s32, vld1q_u8, vld1q_u32, vmovl_u16, vmovn_u32, vmull_high_s8, vmull_s8, vmulq_f32, vorrq_u32, vpadalq_s16,
    vpaddq_s16, vreinterpretq_f32_s32, vreinterpretq_f32_u32, vreinterpretq_s8_s32, vreinterpretq_s8_u8, vreinterpretq_s32_f32,
    vreinterpretq_u32_f32, vshlq_n_s32, vshlq_n_u32, vshrq_n_s32, vshrq_n_u8, vshrq_n_u32, vst1_u16, vst1q_f32, vst1q_u8,
    vsubq_f32, vsubq_s32,
};
use std::arch::asm;

/// Products of bytes are added up in several instructions.
pub(super) const PLAIN: u8 = 0;
/// `SDOT` multiplies signed bytes and adds them up.
pub(super) const DOTPROD: u8 = 1;
/// `USDOT` does so with unsigned and signed ones.
pub(super) const I8MM: u8 = 2;

/// NEON, with the dot products that `DOT` names; a vector of 16 lanes is four registers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Neon<const DOT: u8>(());

impl<const DOT: u8> Neon<DOT> {
    /// The proof that the instructions may be used.
    ///
    /// # Safety
    /// The machine must have NEON (as every one has that this is compiled for), and the instruction that `DOT` names.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }

    /// Whether stored bytes are made signed ones, less 128, before they are multiplied.
    const fn makes_signed<F: Format>() -> bool {
        DOT != I8MM && !F::NIBBLES
    }
}

/// Instructions on registers.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: every machine that this is compiled for has NEON, and `self` is the proof of what is more than that.
        unsafe { $e }
    };
}

/// The same on all four registers.
macro_rules! all {
    ($f:ident $(::<$n:literal>)?, $a:expr) => {{
        let a = $a;
        op!([$f$(::<$n>)?(a[0]), $f$(::<$n>)?(a[1]), $f$(::<$n>)?(a[2]), $f$(::<$n>)?(a[3])])
    }};
    ($f:ident, $a:expr, $b:expr) => {{
        let (a, b) = ($a, $b);
        op!([$f(a[0], b[0]), $f(a[1], b[1]), $f(a[2], b[2]), $f(a[3], b[3])])
    }};
    ($f:ident, $a:expr, $b:expr, $c:expr) => {{
        let (a, b, c) = ($a, $b, $c);
        op!([$f(a[0], b[0], c[0]), $f(a[1], b[1], c[1]), $f(a[2], b[2], c[2]), $f(a[3], b[3], c[3])])
    }};
}

/// Four loads, `$step` elements apart.
macro_rules! load {
    ($f:ident, $p:expr, $step:literal) => {{
        let p = $p;
        // SAFETY: as in `op`; the caller promises the memory.
        unsafe { [$f(p), $f(p.add($step)), $f(p.add(2 * $step)), $f(p.add(3 * $step))] }
    }};
}

/// Four stores, `$step` elements apart.
macro_rules! store {
    ($f:ident, $p:expr, $v:expr, $step:literal) => {{
        let (p, v) = ($p, $v);
        // SAFETY: as in `op`; the caller promises the memory.
        unsafe {
            $f(p, v[0]);
            $f(p.add($step), v[1]);
            $f(p.add(2 * $step), v[2]);
            $f(p.add(3 * $step), v[3]);
        }
    }};
}

impl<const DOT: u8> Simd for Neon<DOT> {
    type V = [float32x4_t; 4];
    type U = [uint8x16_t; 4];
    type I = [int32x4_t; 4];
    const WIDE: bool = false;
    const ROWS: usize = 3;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [op!(vdupq_n_f32(x)); 4]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        load!(vld1q_f32, p, 4)
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        store!(vst1q_f32, p, v, 4);
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        load!(load_halves, p, 4)
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        let wide = all!(vmovl_u16, load!(vld1_u16, p, 4));
        all!(vreinterpretq_f32_u32, all!(vshlq_n_u32::<16>, wide))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::V) {
        store!(store_halves, p, v, 4);
    }
    #[inline(always)]
    unsafe fn round_bf16(self, from: *const f32, to: *mut u16) {
        let rounded = all!(rounded_bf16, load!(vld1q_f32, from, 4));
        store!(vst1_u16, to, all!(vmovn_u32, rounded), 4);
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::V, Self::V) {
        let pairs = load!(vld1q_u32, p.cast::<u32>(), 4);
        let odd = all!(vandq_u32, pairs, [op!(vdupq_n_u32(0xffff_0000)); 4]);
        (all!(vreinterpretq_f32_u32, all!(vshlq_n_u32::<16>, pairs)), all!(vreinterpretq_f32_u32, odd))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        all!(vaddq_f32, a, b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        all!(vsubq_f32, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        all!(vmulq_f32, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        all!(vdivq_f32, a, b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        all!(vfmaq_f32, c, a, b)
    }
    // `FMAX` and `FMIN` would give NaN where either is.
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        all!(vbslq_f32, all!(vcgtq_f32, a, b), a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        all!(vbslq_f32, all!(vcltq_f32, a, b), a, b)
    }
    #[inline(always)]
    fn first(self, n: usize, a: Self::V, b: Self::V) -> Self::V {
        const NUMBERS: [i32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        let n = [op!(vdupq_n_s32(n.min(LANES) as i32)); 4];
        all!(vbslq_f32, all!(vcgtq_s32, n, load!(vld1q_s32, NUMBERS.as_ptr(), 4)), a, b)
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        op!({
            let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        })
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        op!({
            let four = larger(larger(v[0], v[2]), larger(v[1], v[3]));
            let (a, b) = (vget_low_f32(four), vget_high_f32(four));
            let two = vbsl_f32(vcgt_f32(a, b), a, b);
            let (a, b) = (vget_lane_f32::<0>(two), vget_lane_f32::<1>(two));
            if a > b { a } else { b }
        })
    }
    #[inline(always)]
    fn powers_of_two(self, shifted: Self::V) -> (Self::V, Self::V) {
        let n = all!(vsubq_s32, all!(vreinterpretq_s32_f32, shifted), [op!(vdupq_n_s32(0x4b40_0000)); 4]);
        let half = all!(vshrq_n_s32::<1>, n);
        (all!(power, half), all!(power, all!(vsubq_s32, n, half)))
    }
    #[inline(always)]
    fn power_of_two(self, shifted: Self::V) -> Self::V {
        all!(vreinterpretq_f32_s32, all!(vshlq_n_s32::<23>, all!(vreinterpretq_s32_f32, shifted)))
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> Self::U {
        load!(vld1q_u8, p, 16)
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: Self::U) {
        store!(vst1q_u8, p, v, 16);
    }
    #[inline(always)]
    fn low(self, u: Self::U) -> Self::U {
        all!(vandq_u8, u, [op!(vdupq_n_u8(15)); 4])
    }
    #[inline(always)]
    fn high(self, u: Self::U) -> Self::U {
        all!(vshrq_n_u8::<4>, u)
    }
    #[inline(always)]
    fn start<F: Format>(self, total: i32) -> Self::I {
        const { assert!(F::NIBBLES || F::ZERO == 128) };
        let start = if Self::makes_signed::<F>() { 0 } else { -F::ZERO * total };
        [op!(vdupq_n_s32(start)); 4]
    }
    #[inline(always)]
    fn dot<F: Format>(self, acc: Self::I, w: Self::U, a: i32) -> Self::I {
        let w = if Self::makes_signed::<F>() { all!(veorq_u8, w, [op!(vdupq_n_u8(128)); 4]) } else { w };
        let a = [op!(vdupq_n_s32(a)); 4];
        // `self` is the proof that the machine has the instruction.
        match DOT {
            PLAIN => all!(widened_dot, acc, w, a),
            DOTPROD => all!(sdot, acc, w, a),
            _ => all!(usdot, acc, w, a),
        }
    }
    #[inline(always)]
    fn finish<F: Format>(self, acc: Self::I, _total: i32) -> Self::V {
        all!(vcvtq_f32_s32, acc)
    }
}

/// Reads 4 IEEE halves. (Assembly, for the intrinsic's type is not stable.)
///
/// # Safety
/// `p` must be valid for reads of 4 u16.
#[inline(always)]
unsafe fn load_halves(p: *const u16) -> float32x4_t {
    let v;
    // SAFETY: every machine has the instruction; the caller promises the memory.
    unsafe {
        asm!("fcvtl {v:v}.4s, {h:v}.4h", h = in(vreg) vld1_u16(p), v = lateout(vreg) v,
            options(pure, nomem, nostack, preserves_flags));
    }
    v
}

/// Writes 4 IEEE halves, rounded to nearest even.
///
/// # Safety
/// `p` must be valid for writes of 4 u16.
#[inline(always)]
unsafe fn store_halves(p: *mut u16, v: float32x4_t) {
    let h;
    // SAFETY: every machine has the instruction, and the mode of rounding is the one that Rust knows; the caller promises the
    // memory.
    unsafe {
        asm!("fcvtn {h:v}.4h, {v:v}.4s", v = in(vreg) v, h = lateout(vreg) h, options(pure, nomem, nostack, preserves_flags));
        vst1_u16(p, h);
    }
}

/// Four f32 rounded to bfloat16, in the low halves of their lanes.
#[inline]
#[target_feature(enable = "neon")]
fn rounded_bf16(v: float32x4_t) -> uint32x4_t {
    let bits = vreinterpretq_u32_f32(v);
    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    let rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    let rounded = vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(bits, vdupq_n_u32(0x40_0000)));
    let tiny = vcltq_u32(vandq_u32(bits, vdupq_n_u32(0x7fff_ffff)), vdupq_n_u32(0x80_0000));
    vshrq_n_u32::<16>(vbslq_u32(tiny, vandq_u32(bits, vdupq_n_u32(0x8000_0000)), rounded))
}

/// a > b ? a : b
#[inline]
#[target_feature(enable = "neon")]
fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcgtq_f32(a, b), a, b)
}

/// 2^n, −126 <= n <= 127.
#[inline]
#[target_feature(enable = "neon")]
fn power(n: int32x4_t) -> float32x4_t {
    vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))))
}

/// acc + w · a of signed bytes, four to a lane.
#[inline]
#[target_feature(enable = "neon")]
fn widened_dot(acc: int32x4_t, w: uint8x16_t, a: int32x4_t) -> int32x4_t {
    let (w, a) = (vreinterpretq_s8_u8(w), vreinterpretq_s8_s32(a));
    // A pair of products fits 16 bits: 2 · 128 · 127 = 32512; a is never −128.
    vpadalq_s16(acc, vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a)))
}

/// [`widened_dot`] in one instruction. (Assembly, for the intrinsic is not stable.)
///
/// # Safety
/// The machine must have it (`FEAT_DotProd`).
#[inline(always)]
unsafe fn sdot(mut acc: int32x4_t, w: uint8x16_t, a: int32x4_t) -> int32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(".arch_extension dotprod", "sdot {acc:v}.4s, {w:v}.16b, {a:v}.16b", acc = inout(vreg) acc, w = in(vreg) w,
            a = in(vreg) a, options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// The same of unsigned bytes w.
///
/// # Safety
/// The machine must have it (`FEAT_I8MM`).
#[inline(always)]
unsafe fn usdot(mut acc: int32x4_t, w: uint8x16_t, a: int32x4_t) -> int32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(".arch_extension i8mm", "usdot {acc:v}.4s, {w:v}.16b, {a:v}.16b", acc = inout(vreg) acc, w = in(vreg) w,
            a = in(vreg) a, options(pure, nomem, nostack, preserves_flags));
    }
    acc
}
