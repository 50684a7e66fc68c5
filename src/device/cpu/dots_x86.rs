//! `VDPBF16PS` of AVX-512 BF16: the kernel, and whether the machine's does what is documented. Knows nothing of attention.

use super::dots::{Left, Right, Target};
use super::simd::{LANES, to_bf16};
use std::arch::x86_64::{
    __cpuid, __m256bh, __m512, __m512bh, __m512i, _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::mem::transmute;
use std::sync::OnceLock;

/// R rows by C vectors of columns (see `dots.rs`).
///
/// # Safety
/// As [`super::dots::multiply`], on a machine with AVX-512 BF16.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn dots<const R: usize, const C: usize>(left: Left, right: Right<'_, C>, target: Target) {
    // SAFETY: the caller's promise.
    unsafe {
        let out = |r: usize, c: usize| target.start.add(r * target.stride + c * LANES);
        let mut acc = [[_mm512_setzero_ps(); C]; R];
        if target.add {
            for r in 0..R {
                for c in 0..C {
                    acc[r][c] = _mm512_loadu_ps(out(r, c));
                }
            }
        }
        let mut left_start = left.start;
        for piece in right.pieces {
            let mut piece = *piece;
            for _ in 0..right.n {
                let mut w = [_mm512_set1_epi32(0); C];
                for c in 0..C {
                    w[c] = _mm512_loadu_si512(piece[c].cast());
                    piece[c] = piece[c].add(right.step);
                }
                for r in 0..R {
                    let x = _mm512_set1_epi32(left_start.add(r * left.stride).cast::<i32>().read_unaligned());
                    for c in 0..C {
                        acc[r][c] = _mm512_dpbf16_ps(acc[r][c], as_bf16(x), as_bf16(w[c]));
                    }
                }
                left_start = left_start.add(2);
            }
        }
        for r in 0..R {
            for c in 0..C {
                _mm512_storeu_ps(out(r, c), acc[r][c]);
            }
        }
    }
}

#[inline(always)]
fn as_bf16(x: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of anything.
    unsafe { transmute::<__m512i, __m512bh>(x) }
}

/// Whether the processor is AMD's.
pub(super) fn is_amd() -> bool {
    let leaf = __cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

/// Whether the machine has AVX-512 BF16 and rounds to bfloat16 as documented; asked once.
pub(super) fn rounds_as_documented() -> bool {
    static ROUNDS: OnceLock<bool> = OnceLock::new();
    *ROUNDS.get_or_init(|| {
        is_x86_feature_detected!("avx512bf16") && {
            // SAFETY: the machine has the instruction.
            (0..256).all(|i| unsafe { rounds(&std::array::from_fn(|lane| f32::from_bits(mixed(i * 16 + lane as u32)))) })
        }
    })
}

/// What the fingerprint says of this machine's products: nothing if each is two multiplications and additions rounded one
/// after the other, the odd elements' first, as documented; else a name for what they are.
pub(super) fn own() -> &'static str {
    static OWN: OnceLock<String> = OnceLock::new();
    OWN.get_or_init(|| {
        let (mut as_documented, mut hash) = (true, 0xcbf2_9ce4_8422_2325_u64);
        for i in 0..PROBES {
            let (acc, a, b) = probe(i);
            // SAFETY: asked only of machines that have the instruction.
            let got = unsafe { product(&acc, &a, &b) };
            for lane in 0..LANES {
                as_documented &= got[lane].to_bits() == documented(acc[lane], a[lane], b[lane]).to_bits();
                hash = (hash ^ u64::from(got[lane].to_bits())).wrapping_mul(0x0100_0000_01b3);
            }
        }
        if as_documented { String::new() } else { format!(" dot={:08x}", hash >> 32) }
    })
}

/// Products that [`own`] looks at.
const PROBES: u32 = 1024;

/// What one of them is made of: sums and pairs of numbers of about one size, so that what is lost in rounding differs with
/// the order.
fn probe(i: u32) -> ([f32; LANES], [u32; LANES], [u32; LANES]) {
    let bits = |j: usize| mixed(i * 128 + j as u32);
    let pair = |j: usize| (bits(j) & 0x81ff_81ff) | 0x3f00_3f00;
    let acc = std::array::from_fn(|lane| f32::from_bits((bits(lane) & 0x80ff_ffff) | 0x3f80_0000));
    (acc, std::array::from_fn(|lane| pair(LANES + lane)), std::array::from_fn(|lane| pair(2 * LANES + lane)))
}

/// A fixed jumble of bits.
fn mixed(i: u32) -> u32 {
    let x = (i ^ i >> 16).wrapping_mul(0x7feb_352d);
    let x = (x ^ x >> 15).wrapping_mul(0x846c_a68b);
    x ^ x >> 16
}

/// acc + a · b over a pair of bfloat16, as the manual has it.
fn documented(acc: f32, a: u32, b: u32) -> f32 {
    let [even, odd] = [|x: u32| f32::from_bits(x << 16), |x: u32| f32::from_bits(x & 0xffff_0000)];
    even(a).mul_add(even(b), odd(a).mul_add(odd(b), acc))
}

/// Whether 16 numbers are rounded as `to_bf16` rounds them.
///
/// # Safety
/// The machine must have AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn rounds(x: &[f32; LANES]) -> bool {
    // SAFETY: 16 values, and as many bits.
    let got = unsafe { transmute::<__m256bh, [u16; LANES]>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr()))) };
    got.iter().zip(x).all(|(&got, &x)| got == to_bf16(x))
}

/// One instruction.
///
/// # Safety
/// The machine must have AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn product(acc: &[f32; LANES], a: &[u32; LANES], b: &[u32; LANES]) -> [f32; LANES] {
    // SAFETY: all are 16 values of 32 bits.
    unsafe {
        let [a, b] = [a, b].map(|x| as_bf16(_mm512_loadu_si512(x.as_ptr().cast())));
        transmute::<__m512, [f32; LANES]>(_mm512_dpbf16_ps(_mm512_loadu_ps(acc.as_ptr()), a, b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_tells_other_ways_to_round_from_the_documented_one() {
        let even = |x: u32| f32::from_bits(x << 16);
        let odd = |x: u32| f32::from_bits(x & 0xffff_0000);
        let others: [fn(f32, [f32; 4]) -> f32; 3] = [
            // Even elements first; both products summed first; all rounded once.
            |acc, [a0, b0, a1, b1]| a1.mul_add(b1, a0.mul_add(b0, acc)),
            |acc, [a0, b0, a1, b1]| acc + a0.mul_add(b0, a1 * b1),
            |acc, [a0, b0, a1, b1]| {
                [(a0, b0), (a1, b1)].iter().fold(f64::from(acc), |sum, &(a, b)| sum + f64::from(a) * f64::from(b)) as f32
            },
        ];
        for (i, other) in others.into_iter().enumerate() {
            let differ = (0..PROBES).map(probe).any(|(acc, a, b)| {
                let lane = |lane: usize| {
                    let got = other(acc[lane], [even(a[lane]), even(b[lane]), odd(a[lane]), odd(b[lane])]);
                    got.to_bits() != documented(acc[lane], a[lane], b[lane]).to_bits()
                };
                (0..LANES).any(lane)
            });
            assert!(differ, "way {i}");
        }
    }
}
