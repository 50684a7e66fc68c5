//! [`super::unpack::plainly`] with AVX-512 BF16. Invariant: the same bits; instructions round to nearest even, and take what is under
//! 2^-126 for 0.

use super::simd::{Format, LANES};
use super::tile::TILE_CELLS;
use super::unpack::{PIECES, header_bytes, n_scales, packed_bytes};
use super::weights::PANEL;
use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm256_loadu_si256, _mm512_add_ps, _mm512_cvtepi32_ps, _mm512_cvtne2ps_pbh, _mm512_cvtph_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_permutexvar_epi16, _mm512_permutexvar_ps,
    _mm512_set1_epi8, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srai_epi32, _mm512_srli_epi32, _mm512_storeu_si512,
    _mm512_xor_si512,
};
use std::mem::transmute;
use std::ops::Range;

/// Where the words of two vectors, the second's after the first's, go if they are to alternate.
static ALTERNATE: [u16; 2 * LANES] = {
    let mut order = [0; 2 * LANES];
    let mut i = 0;
    while i < 2 * LANES {
        order[i] = (i / 2 + i % 2 * LANES) as u16;
        i += 1;
    }
    order
};

/// What 4 bits mean, but for the scale.
const fn nibbles<F: Format>() -> [f32; LANES] {
    let mut values = [0.0; LANES];
    let mut q = 0;
    while q < LANES {
        values[q] = (q as i32 - F::ZERO) as f32;
        q += 1;
    }
    values
}

/// See [`super::unpack::plainly`].
///
/// # Safety
/// On a machine with AVX-512 F, BW and BF16, which rounds as documented.
///
/// # Panics
/// If there are fewer pieces in `packed`, or less room in `tiles`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn pieces<F: Format>(packed: &[u8], pieces: Range<usize>, tiles: &mut [u16]) {
    assert!(pieces.end.div_ceil(2 * PIECES) * packed_bytes::<F>() <= packed.len());
    assert!(pieces.end.div_ceil(PIECES) * TILE_CELLS <= tiles.len());
    // SAFETY: the pieces are within the slices, as was asserted just now.
    unsafe {
        let (values, order) = (_mm512_loadu_ps(nibbles::<F>().as_ptr()), _mm512_loadu_si512(ALTERNATE.as_ptr().cast()));
        let mut scale = [[_mm512_setzero_ps(); 2]; 2];
        let start = pieces.start;
        for piece in pieces {
            let (tile, p) = (piece / PIECES, piece % PIECES);
            let c = tile % 2;
            let block = packed.as_ptr().add(tile / 2 * packed_bytes::<F>());
            if p == 0 || piece == start {
                scale = scales::<F>(block, c);
            }
            let integers = block.add(header_bytes::<F>());
            let rows = tiles.as_mut_ptr().add(tile * TILE_CELLS + 2 * p * 2 * LANES);
            let (low, high) = if F::NIBBLES {
                let line = _mm512_loadu_si512(integers.add((2 * p + c) * 64).cast());
                let of = |even: __m512i, odd: __m512i, h: usize| {
                    alternate(
                        weigh::<F>(_mm512_permutexvar_ps(even, values), scale[h]),
                        weigh::<F>(_mm512_permutexvar_ps(odd, values), scale[h]),
                        order,
                    )
                };
                (
                    [
                        of(line, _mm512_srli_epi32::<8>(line), 0),
                        of(_mm512_srli_epi32::<16>(line), _mm512_srli_epi32::<24>(line), 0),
                    ],
                    [
                        of(_mm512_srli_epi32::<4>(line), _mm512_srli_epi32::<12>(line), 1),
                        of(_mm512_srli_epi32::<20>(line), _mm512_srli_epi32::<28>(line), 1),
                    ],
                )
            } else {
                let half = |h: usize| {
                    let line = _mm512_loadu_si512(integers.add((4 * p + 2 * h + c) * 64).cast());
                    let line = _mm512_xor_si512(line, _mm512_set1_epi8(-128));
                    let of = |q: __m512i| weigh::<F>(_mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(q)), scale[h]);
                    [
                        alternate(of(_mm512_slli_epi32::<24>(line)), of(_mm512_slli_epi32::<16>(line)), order),
                        alternate(of(_mm512_slli_epi32::<8>(line)), of(line), order),
                    ]
                };
                (half(0), half(1))
            };
            for j in 0..2 {
                _mm512_storeu_si512(rows.add(j * 2 * LANES).cast(), low[j]);
                _mm512_storeu_si512(rows.add((8 + j) * 2 * LANES).cast(), high[j]);
            }
        }
    }
}

/// (scales, minimums) of half `c` of a block's columns, for each half of its elements.
///
/// # Safety
/// `block` must be the start of a packed block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
#[expect(clippy::cast_ptr_alignment, reason = "vectors need no alignment")]
unsafe fn scales<F: Format>(block: *const u8, c: usize) -> [[__m512; 2]; 2] {
    let of = |vector: usize| {
        let i = vector * PANEL + c * LANES;
        // SAFETY: a block begins with `n_scales` vectors of scales for 32 columns, and as many minimums where the format has them.
        unsafe {
            if F::SPREAD {
                _mm512_loadu_ps(block.cast::<f32>().add(i))
            } else {
                _mm512_cvtph_ps(_mm256_loadu_si256(block.cast::<u16>().add(i).cast()))
            }
        }
    };
    let n = n_scales::<F>();
    let half = |h: usize| [of(h), if F::MIN { of(n + h) } else { _mm512_setzero_ps() }];
    let first = half(0);
    [first, if F::HALVES { half(1) } else { first }]
}

/// d·q, then + m where the format has minimums. With f16 scales d·q is exact, so that both are one operation.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn weigh<F: Format>(q: __m512, [d, m]: [__m512; 2]) -> __m512 {
    match (F::MIN, F::SPREAD) {
        (true, false) => _mm512_fmadd_ps(d, q, m),
        (true, true) => _mm512_add_ps(_mm512_mul_ps(d, q), m),
        (false, _) => _mm512_mul_ps(d, q),
    }
}

/// A tile's row: two elements of k, rounded, by turns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn alternate(even: __m512, odd: __m512, order: __m512i) -> __m512i {
    // SAFETY: both are 512 bits of anything.
    let words = unsafe { transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even)) };
    _mm512_permutexvar_epi16(order, words)
}
