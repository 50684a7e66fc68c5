//! The x86-64 implementations of [`Simd`]: AVX-512 with VNNI, and AVX2. Knows nothing of layers or tensors.
//! Invariant: bit for bit the portable implementation (`simd.rs` says why; the conformance tests hold it to that).

use super::dots::{self, Left, Right, Target};
use super::dots_x86;
use super::simd::{Format, LANES, Simd};
use super::{unpack, unpack_x86};
use std::arch::asm;
use std::arch::x86_64::{
    __m256, __m256i, __m512, __m512i, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32,
    _mm_loadu_si128, _mm_max_ps, _mm_max_ss, _mm_movehdup_ps, _mm_movehl_ps, _mm_storeu_si128, _mm256_abs_epi8, _mm256_add_epi16,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_blendv_epi8, _mm256_blendv_ps, _mm256_castps_si256,
    _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cmpgt_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps,
    _mm256_cvtps_ph, _mm256_div_ps, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_or_si256, _mm256_packus_epi32,
    _mm256_permute4x64_epi64, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi32,
    _mm256_setzero_si256, _mm256_sign_epi8, _mm256_slli_epi32, _mm256_srai_epi32, _mm256_srli_epi16, _mm256_srli_epi32,
    _mm256_storeu_ps, _mm256_storeu_si256, _mm256_sub_epi32, _mm256_sub_ps, _mm256_xor_si256, _mm512_add_epi32, _mm512_add_ps,
    _mm512_and_si512, _mm512_castps_si512, _mm512_castps512_ps256, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_cmplt_epu32_mask, _mm512_cvtepi32_epi16, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_cvtps_ph,
    _mm512_div_ps, _mm512_dpbusd_epi32, _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mask_andnot_epi32, _mm512_mask_blend_ps, _mm512_mask_or_epi32, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
    _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_srai_epi32, _mm512_srli_epi16,
    _mm512_srli_epi32, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_epi32, _mm512_sub_ps,
};
use std::ops::Range;

/// AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512 {
    /// Whether the machine has AVX-512 BF16 too.
    bf16: bool,
}

/// AVX2, FMA and F16C; a vector of 16 lanes is two registers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

impl Avx512 {
    /// The proof that the instructions may be used.
    ///
    /// # Safety
    /// The machine must have AVX-512 F, BW, DQ, VL and VNNI, and AVX2, FMA and F16C; AVX-512 BF16 if `bf16`, which rounds as documented.
    #[inline(always)]
    pub(super) unsafe fn new(bf16: bool) -> Self {
        Self { bf16 }
    }
}

impl Avx2 {
    /// The proof that the instructions may be used.
    ///
    /// # Safety
    /// The machine must have AVX2, FMA and F16C.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// One instruction: register in, register out.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: `self` is the proof that the machine has the instruction; it touches no memory.
        unsafe { $e }
    };
}

/// One load or store.
macro_rules! mem {
    ($e:expr) => {
        // SAFETY: `self` is the proof that the machine has the instruction; the caller promises the memory.
        unsafe { $e }
    };
}

/// The last steps of the fixed reduction tree, from 8 lanes.
macro_rules! tree {
    ($v:expr, $op128:ident, $op1:ident) => {{
        let eight = $v;
        let four = $op128(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = $op128(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32($op1(two, _mm_movehdup_ps(two)))
    }};
}

impl Simd for Avx512 {
    type V = __m512;
    type U = __m512i;
    type I = __m512i;
    const WIDE: bool = true;
    const ROWS: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        mem!(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        mem!(_mm512_storeu_ps(p, v));
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        mem!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        mem!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: __m512) {
        mem!(_mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v)));
    }
    #[inline(always)]
    unsafe fn round_bf16(self, from: *const f32, to: *mut u16) {
        if self.bf16 {
            // The intrinsic could only be inlined where its feature is enabled.
            mem!(asm!("vcvtneps2bf16 ymm0, zmmword ptr [{from}]", "vmovdqu ymmword ptr [{to}], ymm0",
                from = in(reg) from, to = in(reg) to, out("xmm0") _, options(nostack, preserves_flags)));
            return;
        }
        mem!({
            let v = _mm512_loadu_ps(from);
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            let no_number = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let rounded = _mm512_mask_or_epi32(rounded, no_number, bits, _mm512_set1_epi32(0x40_0000));
            let magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fff_ffff));
            let tiny = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x80_0000));
            let rounded = _mm512_mask_andnot_epi32(rounded, tiny, _mm512_set1_epi32(0x7fff_ffff), bits);
            let halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
            _mm256_storeu_si256(to.cast(), halves);
        });
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (__m512, __m512) {
        let pairs = mem!(_mm512_loadu_si512(p.cast()));
        op!((
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
        ))
    }
    #[inline(always)]
    unsafe fn dots<const R: usize, const C: usize>(self, left: Left, right: Right<'_, C>, target: Target) {
        // SAFETY: passed on, on a machine that has the instructions.
        unsafe {
            if self.bf16 {
                dots_x86::dots::<R, C>(left, right, target);
            } else {
                dots::chains::<Self, R, C>(self, left, right, target);
            }
        }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn first(self, n: usize, a: __m512, b: __m512) -> __m512 {
        let mask = if n >= 16 { u16::MAX } else { (1 << n) - 1 };
        op!(_mm512_mask_blend_ps(mask, b, a))
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        op!(tree!(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)), _mm_add_ps, _mm_add_ss))
    }
    #[inline(always)]
    fn largest(self, v: __m512) -> f32 {
        op!(tree!(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)), _mm_max_ps, _mm_max_ss))
    }
    #[inline(always)]
    fn powers_of_two(self, shifted: __m512) -> (__m512, __m512) {
        op!({
            let n = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x4b40_0000));
            let half = _mm512_srai_epi32::<1>(n);
            let bias = _mm512_set1_epi32(127);
            let a = _mm512_slli_epi32::<23>(_mm512_add_epi32(half, bias));
            let b = _mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_sub_epi32(n, half), bias));
            (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b))
        })
    }
    #[inline(always)]
    fn power_of_two(self, shifted: __m512) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(shifted))))
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> __m512i {
        mem!(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: __m512i) {
        mem!(_mm512_storeu_si512(p.cast(), v));
    }
    #[inline(always)]
    fn low(self, u: __m512i) -> __m512i {
        op!(_mm512_and_si512(u, _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn high(self, u: __m512i) -> __m512i {
        op!(_mm512_and_si512(_mm512_srli_epi16::<4>(u), _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn start<F: Format>(self, total: i32) -> __m512i {
        op!(_mm512_set1_epi32(-F::ZERO * total))
    }
    #[inline(always)]
    fn dot<F: Format>(self, acc: __m512i, w: __m512i, a: i32) -> __m512i {
        op!(_mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a)))
    }
    #[inline(always)]
    fn finish<F: Format>(self, acc: __m512i, _total: i32) -> __m512 {
        op!(_mm512_cvtepi32_ps(acc))
    }
    #[inline(always)]
    fn unpack<F: Format>(self, packed: &[u8], pieces: Range<usize>, tiles: &mut [u16]) {
        if self.bf16 {
            // SAFETY: `self` is the proof that the machine has the instructions.
            unsafe { unpack_x86::pieces::<F>(packed, pieces, tiles) };
        } else {
            unpack::plainly::<Self, F>(self, packed, pieces, tiles);
        }
    }
}

/// The same instruction on both halves.
macro_rules! both {
    ($f:ident, $($a:expr),+) => {
        // SAFETY: `self` is the proof that the machine has the instruction; it touches no memory.
        unsafe { [$f($($a[0]),+), $f($($a[1]),+)] }
    };
}

impl Simd for Avx2 {
    type V = [__m256; 2];
    type U = [__m256i; 2];
    type I = [__m256i; 2];
    const WIDE: bool = false;
    const ROWS: usize = 3;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        op!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        mem!([_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))])
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        mem!({
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        });
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        mem!([_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))])
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        mem!({
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        })
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Self::V) {
        mem!({
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v[0]));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v[1]));
        });
    }
    #[inline(always)]
    unsafe fn round_bf16(self, from: *const f32, to: *mut u16) {
        mem!({
            let (low, high) = (self.half_bf16(_mm256_loadu_ps(from)), self.half_bf16(_mm256_loadu_ps(from.add(8))));
            // Packing takes the low four of both, then the high four.
            let halves = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            _mm256_storeu_si256(to.cast(), halves);
        });
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::V, Self::V) {
        let (low, high) = mem!((_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(LANES).cast())));
        op!({
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let even = [_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high)];
            let odd = [_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)];
            (
                [_mm256_castsi256_ps(even[0]), _mm256_castsi256_ps(even[1])],
                [_mm256_castsi256_ps(odd[0]), _mm256_castsi256_ps(odd[1])],
            )
        })
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        both!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn first(self, n: usize, a: Self::V, b: Self::V) -> Self::V {
        op!({
            let n = _mm256_set1_epi32(n.min(16) as i32);
            let low = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            let high = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
            [_mm256_blendv_ps(b[0], a[0], _mm256_castsi256_ps(low)), _mm256_blendv_ps(b[1], a[1], _mm256_castsi256_ps(high))]
        })
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        op!(tree!(_mm256_add_ps(v[0], v[1]), _mm_add_ps, _mm_add_ss))
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        op!(tree!(_mm256_max_ps(v[0], v[1]), _mm_max_ps, _mm_max_ss))
    }
    #[inline(always)]
    fn powers_of_two(self, shifted: Self::V) -> (Self::V, Self::V) {
        let (a, b) = (self.half_powers(shifted[0]), self.half_powers(shifted[1]));
        ([a[0], b[0]], [a[1], b[1]])
    }
    #[inline(always)]
    fn power_of_two(self, shifted: Self::V) -> Self::V {
        op!([
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(shifted[0]))),
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(shifted[1])))
        ])
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> Self::U {
        mem!([_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())])
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: Self::U) {
        mem!({
            _mm256_storeu_si256(p.cast(), v[0]);
            _mm256_storeu_si256(p.add(32).cast(), v[1]);
        });
    }
    #[inline(always)]
    fn low(self, u: Self::U) -> Self::U {
        let mask = op!([_mm256_set1_epi8(15); 2]);
        both!(_mm256_and_si256, u, mask)
    }
    #[inline(always)]
    fn high(self, u: Self::U) -> Self::U {
        self.low(op!([_mm256_srli_epi16::<4>(u[0]), _mm256_srli_epi16::<4>(u[1])]))
    }
    #[inline(always)]
    fn start<F: Format>(self, _total: i32) -> Self::I {
        op!([_mm256_setzero_si256(); 2])
    }
    #[inline(always)]
    fn dot<F: Format>(self, acc: Self::I, w: Self::U, a: i32) -> Self::I {
        [self.half_dot::<F>(acc[0], w[0], a), self.half_dot::<F>(acc[1], w[1], a)]
    }
    #[inline(always)]
    fn finish<F: Format>(self, acc: Self::I, total: i32) -> Self::V {
        [self.half_finish::<F>(acc[0], total), self.half_finish::<F>(acc[1], total)]
    }
}

/// One register's share of what takes several instructions. (Methods and not closures: a closure can't be made
/// `#[inline(always)]`, and compiled outside the function that enables the instructions it calls each one.)
#[expect(clippy::unused_self, reason = "it is the proof that the machine has the instructions")]
impl Avx2 {
    /// Eight f32 rounded to bfloat16, in the low halves of their lanes.
    #[inline(always)]
    fn half_bf16(self, v: __m256) -> __m256i {
        op!({
            let bits = _mm256_castps_si256(v);
            let sign = _mm256_and_si256(bits, _mm256_set1_epi32(i32::MIN));
            let magnitude = _mm256_xor_si256(bits, sign);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            let no_number = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f80_0000));
            let rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000)), no_number);
            let tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x80_0000), magnitude);
            _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, sign, tiny))
        })
    }

    #[inline(always)]
    fn half_powers(self, shifted: __m256) -> [__m256; 2] {
        op!({
            let n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x4b40_0000));
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let a = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let b = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            [_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)]
        })
    }

    #[inline(always)]
    fn half_dot<F: Format>(self, acc: __m256i, w: __m256i, a: i32) -> __m256i {
        op!({
            let a = _mm256_set1_epi32(a);
            if F::NIBBLES {
                // Pairs of products stay in 16 bits over a whole block: 8 · 2 · 15 · 127 = 30480.
                _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, a))
            } else {
                // |w| · (a with w's sign): no pair passes 2 · 128 · 127 = 32512, so nothing saturates; a is never −128.
                let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
                _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            }
        })
    }

    #[inline(always)]
    fn half_finish<F: Format>(self, acc: __m256i, total: i32) -> __m256 {
        op!(if F::NIBBLES {
            let sum = _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
            _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(F::ZERO * total)))
        } else {
            _mm256_cvtepi32_ps(acc)
        })
    }
}
