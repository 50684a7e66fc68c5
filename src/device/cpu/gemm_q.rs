//! Products of 8-bit activations and quantised weights, for a few rows and one panel of 32 columns. Knows nothing of
//! tiles or threads.
//!
//! Invariant: for each output, over the blocks of k in order, acc = fma(Σ w·a, d·s, acc) with w and a the integers, then
//! for formats with a minimum acc = fma(m, s·Σ a, acc); formats with scales per half block do both for the first half,
//! then both for the second. The integer sums are exact, so nothing else about the order matters.

use super::buffer::Aligned;
use super::quant::Act;
use super::simd::{Format, LANES, Simd};
use super::unpack::{n_scales, packed_bytes};
use super::weights::{BLOCK, PANEL};
use std::ops::Range;

/// Most bytes of a block that [`unpack`] makes.
pub(super) const MAX_UNPACKED_BLOCK: usize = 2 * 4 * PANEL + BLOCK * PANEL;

/// Where a kernel reads weights from.
#[derive(Clone, Copy)]
pub(super) enum Panel<'a> {
    /// As they lie in memory (`weights.rs`), of a format that is not spread.
    Packed(&'a [u8]),
    /// As [`unpack`] leaves them, and as spread formats lie in memory.
    Unpacked(&'a [u8]),
}

/// Quantised activations of the rows and blocks of one kernel call.
pub(super) struct QuantRows<'a> {
    /// `[n][stride · 32]`
    q: &'a [i8],
    /// `[n][stride]`
    scale: &'a [f32],
    /// `[n][stride]`
    scaled_sum: &'a [f32],
    /// `[n][stride]`
    sum: &'a [i32],
    /// `[n][stride]`
    first_sum: &'a [i32],
    n: usize,
    /// Blocks of a whole row.
    stride: usize,
    /// The blocks to compute.
    blocks: &'a Range<usize>,
}

impl<'a> QuantRows<'a> {
    /// Some blocks of rows `row..row + n`.
    #[inline(always)]
    pub(super) fn new(act: &'a Act, row: usize, n: usize, blocks: &'a Range<usize>) -> Self {
        let stride = act.k / BLOCK;
        let all = row * stride..(row + n) * stride;
        Self {
            q: &act.ints.q[all.start * BLOCK..all.end * BLOCK],
            scale: &act.ints.scale[all.clone()],
            scaled_sum: &act.ints.scaled_sum[all.clone()],
            sum: &act.ints.sum[all.clone()],
            first_sum: &act.ints.first_sum[all],
            n,
            stride,
            blocks,
        }
    }
}

/// (d, m) pairs of an unpacked block and column; bytes of its header and of all of it.
const fn unpacked_block<F: Format>() -> (usize, usize, usize) {
    let n_scales = n_scales::<F>();
    let header = n_scales * if F::MIN { 8 * PANEL } else { 4 * PANEL };
    (n_scales, header, header + BLOCK * PANEL)
}

/// Spreads a panel for several row groups: per block `d: [32] f32`, `m: [32] f32` if the format has minimums, then for
/// each pair p and nibble h the bytes of group p + 4 h for both vectors of columns.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "vectors need no alignment")]
pub(super) fn unpack<'a, S: Simd, F: Format>(s: S, packed: &[u8], n_blocks: usize, out: &'a mut Aligned<u8>) -> &'a [u8] {
    assert_eq!(packed.len(), n_blocks * packed_bytes::<F>());
    let (_, header, block_bytes) = unpacked_block::<F>();
    out.reserve(n_blocks * block_bytes);
    let out = &mut out[..n_blocks * block_bytes];
    for (from, to) in packed.chunks_exact(packed_bytes::<F>()).zip(out.chunks_exact_mut(block_bytes)) {
        let (from, to) = (from.as_ptr(), to.as_mut_ptr());
        // SAFETY: both layouts are `packed_bytes` and `unpacked_block` bytes long by their definitions.
        unsafe {
            for c in 0..2 {
                s.store(to.cast::<f32>().add(c * LANES), s.load_f16(from.cast::<u16>().add(c * LANES)));
                if F::MIN {
                    let m = s.load_f16(from.cast::<u16>().add(PANEL + c * LANES));
                    s.store(to.cast::<f32>().add(PANEL + c * LANES), m);
                }
            }
            let from = from.add(if F::MIN { 4 * PANEL } else { 2 * PANEL });
            let to = to.add(header);
            for p in 0..4 {
                for c in 0..2 {
                    let (w0, w1) = if F::NIBBLES {
                        let w = s.load_bytes(from.add((p * 2 + c) * 64));
                        (s.low(w), s.high(w))
                    } else {
                        (s.load_bytes(from.add((p * 4 + c) * 64)), s.load_bytes(from.wrapping_add((p * 4 + 2 + c) * 64)))
                    };
                    s.store_bytes(to.add((p * 4 + c) * 64), w0);
                    s.store_bytes(to.add((p * 4 + 2 + c) * 64), w1);
                }
            }
        }
    }
    out
}

/// Adds to out[r][column] for the rows given (at most `S::ROWS`).
#[inline(always)]
pub(super) fn add_rows<S: Simd, F: Format>(s: S, panel: &Panel<'_>, rows: &QuantRows<'_>, out: &mut [[f32; PANEL]]) {
    match rows.n {
        1 => columns::<S, F, 1>(s, panel, rows, out),
        2 => columns::<S, F, 2>(s, panel, rows, out),
        3 if S::ROWS >= 3 => columns::<S, F, 3>(s, panel, rows, out),
        4 if S::ROWS >= 4 => columns::<S, F, 4>(s, panel, rows, out),
        5 if S::ROWS >= 5 => columns::<S, F, 5>(s, panel, rows, out),
        6 if S::ROWS >= 6 => columns::<S, F, 6>(s, panel, rows, out),
        n => unreachable!("{n} rows for a kernel of {}", S::ROWS),
    }
}

/// All 32 columns at once where there are registers for it, else in two passes.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "that it is aligned is what is asserted")]
fn columns<S: Simd, F: Format, const R: usize>(s: S, panel: &Panel<'_>, rows: &QuantRows<'_>, out: &mut [[f32; PANEL]]) {
    let (bytes, block_bytes) = match panel {
        Panel::Packed(bytes) => (bytes, packed_bytes::<F>()),
        Panel::Unpacked(bytes) => (bytes, unpacked_block::<F>().2),
    };
    // What the kernel's pointers rely on.
    assert!(rows.blocks.end <= rows.stride && bytes.len() == rows.blocks.len() * block_bytes);
    assert!(rows.n == R && out.len() == R && rows.q.len() == R * rows.stride * BLOCK);
    assert!(
        rows.scale.len() == R * rows.stride && rows.scaled_sum.len() == rows.scale.len() && rows.sum.len() == rows.scale.len()
    );
    assert!(rows.first_sum.len() == rows.sum.len() && !(F::SPREAD && matches!(panel, Panel::Packed(_))));
    // Read four at a time, and aligned: `read_unaligned` costs a factor of three in builds with debug assertions.
    assert!(rows.q.as_ptr().cast::<i32>().is_aligned());
    let bytes = bytes.as_ptr();
    // SAFETY: the lengths were asserted just now; vectors 0 and 1 are a panel's two.
    unsafe {
        match (panel, S::WIDE) {
            (Panel::Packed(_), true) if !F::SPREAD => kernel::<S, F, R, 2, true>(s, bytes, rows, 0, out),
            (Panel::Packed(_), false) if !F::SPREAD => {
                kernel::<S, F, R, 1, true>(s, bytes, rows, 0, out);
                kernel::<S, F, R, 1, true>(s, bytes, rows, 1, out);
            }
            (_, true) => kernel::<S, F, R, 2, false>(s, bytes, rows, 0, out),
            (_, false) => {
                kernel::<S, F, R, 1, false>(s, bytes, rows, 0, out);
                kernel::<S, F, R, 1, false>(s, bytes, rows, 1, out);
            }
        }
    }
}

/// Scales and minimums (0 where the format has none) of a vector of columns, for half `h` of a block.
///
/// # Safety
/// `block` must be the start of a block in the layout that `PACKED` names, `column` 0 or `LANES`, and `h` 0, or 1 where
/// the format has scales per half.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "vectors need no alignment")]
unsafe fn scales<S: Simd, F: Format, const PACKED: bool>(s: S, block: *const u8, column: usize, h: usize) -> (S::V, S::V) {
    // SAFETY: a block begins with `PANEL` scales per half and, if the format has them, as many minimums.
    unsafe {
        if PACKED {
            let header = block.cast::<u16>().add(column);
            (s.load_f16(header), if F::MIN { s.load_f16(header.add(PANEL)) } else { s.splat(0.0) })
        } else {
            let header = block.cast::<f32>().add(column + h * PANEL);
            let n_scales = unpacked_block::<F>().0;
            (s.load(header), if F::MIN { s.load(header.add(n_scales * PANEL)) } else { s.splat(0.0) })
        }
    }
}

/// Sums of one block for R rows by C vectors of columns, over both halves or (`HALF` 0 or 1) one of them.
///
/// # Safety
/// As [`kernel`]; `integers` must be those of block `b`.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "that of the activations is asserted")]
unsafe fn dots<S: Simd, F: Format, const R: usize, const C: usize, const PACKED: bool>(
    s: S,
    integers: *const u8,
    rows: &QuantRows<'_>,
    (b, c0, half): (usize, usize, Option<usize>),
) -> [[S::I; C]; R] {
    let (stride, q) = (rows.stride, rows.q.as_ptr());
    let mut isum = [[s.start::<F>(0); C]; R];
    // SAFETY: the caller's promise covers every offset below; they follow the layouts of `weights.rs` and `unpack`.
    unsafe {
        if F::ZERO != 0 {
            for (r, isum) in isum.iter_mut().enumerate() {
                *isum = [s.start::<F>(total(rows, r * stride + b, half)); C];
            }
        }
        for p in 0..4 {
            let mut w = [[s.load_bytes(integers); 2]; C];
            for (c, w) in w.iter_mut().enumerate() {
                let c = c0 + c;
                *w = if PACKED && F::NIBBLES {
                    let w = s.load_bytes(integers.add((p * 2 + c) * 64));
                    [s.low(w), s.high(w)]
                } else {
                    [s.load_bytes(integers.add((p * 4 + c) * 64)), s.load_bytes(integers.add((p * 4 + 2 + c) * 64))]
                };
            }
            for h in 0..2 {
                if half.is_some_and(|half| half != h) {
                    continue;
                }
                for r in 0..R {
                    let a = q.add((r * stride + b) * BLOCK + 4 * (p + 4 * h)).cast::<i32>().read();
                    for c in 0..C {
                        isum[r][c] = s.dot::<F>(isum[r][c], w[c][h], a);
                    }
                }
            }
        }
    }
    isum
}

/// Σ a over block `i` of the activations, or over one half of it.
///
/// # Safety
/// `i` must be a block of the activations.
#[inline(always)]
unsafe fn total(rows: &QuantRows<'_>, i: usize, half: Option<usize>) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        let sum = *rows.sum.get_unchecked(i);
        match half {
            None => sum,
            Some(0) => *rows.first_sum.get_unchecked(i),
            Some(_) => sum - *rows.first_sum.get_unchecked(i),
        }
    }
}

/// R rows by C vectors of columns, from vector `c0` of the panel on.
///
/// # Safety
/// `panel` must hold the blocks `rows.blocks` in the layout that `PACKED` names, `rows` and `out` R rows, and c0 + C be at
/// most 2, and `rows.q` be aligned to 4 bytes.
#[inline(always)]
unsafe fn kernel<S: Simd, F: Format, const R: usize, const C: usize, const PACKED: bool>(
    s: S,
    panel: *const u8,
    rows: &QuantRows<'_>,
    c0: usize,
    out: &mut [[f32; PANEL]],
) {
    let (stride, scale, scaled_sum) = (rows.stride, rows.scale.as_ptr(), rows.scaled_sum.as_ptr());
    let mut acc = [[s.splat(0.0); C]; R];
    for (out, acc) in out.iter().zip(&mut acc) {
        for (c, acc) in acc.iter_mut().enumerate() {
            // SAFETY: c0 + c is 0 or 1, and a row of `out` is two vectors.
            *acc = unsafe { s.load(out.as_ptr().add((c0 + c) * LANES)) };
        }
    }
    for b in rows.blocks.clone() {
        // SAFETY: the caller's promise covers every offset below; they follow the layouts of `weights.rs` and `unpack`.
        unsafe {
            let (n_scales, header, block_bytes) = unpacked_block::<F>();
            let block = panel.add((b - rows.blocks.start) * if PACKED { packed_bytes::<F>() } else { block_bytes });
            let integers = block.add(if PACKED { header / 2 } else { header });
            for h in 0..n_scales {
                let half = if F::HALVES { Some(h) } else { None };
                let isum = dots::<S, F, R, C, PACKED>(s, integers, rows, (b, c0, half));
                for c in 0..C {
                    let (d, m) = scales::<S, F, PACKED>(s, block, (c0 + c) * LANES, h);
                    for r in 0..R {
                        let i = r * stride + b;
                        let y = s.finish::<F>(isum[r][c], total(rows, i, half));
                        let a_scale = scale.add(i).read();
                        acc[r][c] = s.fma(y, s.mul(d, s.splat(a_scale)), acc[r][c]);
                        if F::MIN {
                            let sum = if F::HALVES { a_scale * total(rows, i, half) as f32 } else { scaled_sum.add(i).read() };
                            acc[r][c] = s.fma(m, s.splat(sum), acc[r][c]);
                        }
                    }
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
