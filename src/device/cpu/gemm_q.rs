//! Products of 8-bit activations and quantised weights, for a few rows and one panel of 32 columns. Knows nothing of
//! tiles or threads.
//!
//! Invariant: for each output, over the blocks of k in order, acc = fma(Σ w·a, d·s, acc) with w and a the integers, then
//! for formats with a minimum acc = fma(m, s·Σ a, acc). The integer sums are exact, so nothing else about the order matters.

use super::buffer::Aligned;
use super::quant::Act;
use super::simd::{Format, LANES, Simd};
use super::weights::{BLOCK, PANEL};
use std::ops::Range;

/// Bytes of a block whose integers are bytes and whose scales and minimums are f32.
pub(super) const UNPACKED_BLOCK: usize = 2 * 4 * PANEL + BLOCK * PANEL;

/// Where a kernel reads weights from.
#[derive(Clone, Copy)]
pub(super) enum Panel<'a> {
    /// As they lie in memory (`weights.rs`).
    Packed(&'a [u8]),
    /// As [`unpack`] leaves them.
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
            sum: &act.ints.sum[all],
            n,
            stride,
            blocks,
        }
    }
}

/// Bytes of a packed block.
const fn packed_block<F: Format>() -> usize {
    let header = if F::MIN { 4 * PANEL } else { 2 * PANEL };
    header + if F::NIBBLES { BLOCK * PANEL / 2 } else { BLOCK * PANEL }
}

/// Spreads a panel for several row groups: per block `d: [32] f32`, `m: [32] f32`, then for each pair p and nibble h the
/// bytes of group p + 4 h for both vectors of columns.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "vectors need no alignment")]
pub(super) fn unpack<'a, S: Simd, F: Format>(s: S, packed: &[u8], n_blocks: usize, out: &'a mut Aligned<u8>) -> &'a [u8] {
    assert_eq!(packed.len(), n_blocks * packed_block::<F>());
    out.reserve(n_blocks * UNPACKED_BLOCK);
    let out = &mut out[..n_blocks * UNPACKED_BLOCK];
    for (from, to) in packed.chunks_exact(packed_block::<F>()).zip(out.chunks_exact_mut(UNPACKED_BLOCK)) {
        let (from, to) = (from.as_ptr(), to.as_mut_ptr());
        // SAFETY: both layouts are `packed_block` and `UNPACKED_BLOCK` bytes long by their definitions.
        unsafe {
            for c in 0..2 {
                s.store(to.cast::<f32>().add(c * LANES), s.load_f16(from.cast::<u16>().add(c * LANES)));
                if F::MIN {
                    let m = s.load_f16(from.cast::<u16>().add(PANEL + c * LANES));
                    s.store(to.cast::<f32>().add(PANEL + c * LANES), m);
                }
            }
            let from = from.add(if F::MIN { 4 * PANEL } else { 2 * PANEL });
            let to = to.add(8 * PANEL);
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
        Panel::Packed(bytes) => (bytes, packed_block::<F>()),
        Panel::Unpacked(bytes) => (bytes, UNPACKED_BLOCK),
    };
    // What the kernel's pointers rely on.
    assert!(rows.blocks.end <= rows.stride && bytes.len() == rows.blocks.len() * block_bytes);
    assert!(rows.n == R && out.len() == R && rows.q.len() == R * rows.stride * BLOCK);
    assert!(
        rows.scale.len() == R * rows.stride && rows.scaled_sum.len() == rows.scale.len() && rows.sum.len() == rows.scale.len()
    );
    // Read four at a time, and aligned: `read_unaligned` costs a factor of three in builds with debug assertions.
    assert!(rows.q.as_ptr().cast::<i32>().is_aligned());
    let bytes = bytes.as_ptr();
    // SAFETY: the lengths were asserted just now; vectors 0 and 1 are a panel's two.
    unsafe {
        match (panel, S::WIDE) {
            (Panel::Packed(_), true) => kernel::<S, F, R, 2, true>(s, bytes, rows, 0, out),
            (Panel::Unpacked(_), true) => kernel::<S, F, R, 2, false>(s, bytes, rows, 0, out),
            (Panel::Packed(_), false) => {
                kernel::<S, F, R, 1, true>(s, bytes, rows, 0, out);
                kernel::<S, F, R, 1, true>(s, bytes, rows, 1, out);
            }
            (Panel::Unpacked(_), false) => {
                kernel::<S, F, R, 1, false>(s, bytes, rows, 0, out);
                kernel::<S, F, R, 1, false>(s, bytes, rows, 1, out);
            }
        }
    }
}

/// Scales and minimums (0 where the format has none) of a vector of columns.
///
/// # Safety
/// `block` must be the start of a block in the layout that `PACKED` names, and `column` 0 or `LANES`.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "vectors need no alignment")]
unsafe fn scales<S: Simd, F: Format, const PACKED: bool>(s: S, block: *const u8, column: usize) -> (S::V, S::V) {
    // SAFETY: a block begins with `PANEL` scales and, if the format has them or it is unpacked, as many minimums.
    unsafe {
        if PACKED {
            let header = block.cast::<u16>().add(column);
            (s.load_f16(header), if F::MIN { s.load_f16(header.add(PANEL)) } else { s.splat(0.0) })
        } else {
            let header = block.cast::<f32>().add(column);
            (s.load(header), if F::MIN { s.load(header.add(PANEL)) } else { s.splat(0.0) })
        }
    }
}

/// R rows by C vectors of columns, from vector `c0` of the panel on.
///
/// # Safety
/// `panel` must hold the blocks `rows.blocks` in the layout that `PACKED` names, `rows` and `out` R rows, and c0 + C be at
/// most 2, and `rows.q` be aligned to 4 bytes.
#[inline(always)]
#[expect(clippy::cast_ptr_alignment, reason = "vectors need no alignment, and that of the activations is asserted")]
unsafe fn kernel<S: Simd, F: Format, const R: usize, const C: usize, const PACKED: bool>(
    s: S,
    panel: *const u8,
    rows: &QuantRows<'_>,
    c0: usize,
    out: &mut [[f32; PANEL]],
) {
    let stride = rows.stride;
    let (q, scale) = (rows.q.as_ptr(), rows.scale.as_ptr());
    let (scaled_sum, sum) = (rows.scaled_sum.as_ptr(), rows.sum.as_ptr());
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
            let block = panel.add((b - rows.blocks.start) * if PACKED { packed_block::<F>() } else { UNPACKED_BLOCK });
            let n_scales = if F::MIN || !PACKED { 2 } else { 1 };
            let integers = block.add(n_scales * PANEL * if PACKED { size_of::<u16>() } else { size_of::<f32>() });
            let mut isum = [[s.start::<F>(0); C]; R];
            if F::ZERO != 0 {
                for (r, isum) in isum.iter_mut().enumerate() {
                    *isum = [s.start::<F>(sum.add(r * stride + b).read()); C];
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
                for half in 0..2 {
                    for r in 0..R {
                        let a = q.add((r * stride + b) * BLOCK + 4 * (p + 4 * half)).cast::<i32>().read();
                        for c in 0..C {
                            isum[r][c] = s.dot::<F>(isum[r][c], w[c][half], a);
                        }
                    }
                }
            }
            for c in 0..C {
                let column = (c0 + c) * LANES;
                let (d, m) = scales::<S, F, PACKED>(s, block, column);
                for r in 0..R {
                    let i = r * stride + b;
                    let y = s.finish::<F>(isum[r][c], sum.add(i).read());
                    acc[r][c] = s.fma(y, s.mul(d, s.splat(scale.add(i).read())), acc[r][c]);
                    if F::MIN {
                        acc[r][c] = s.fma(m, s.splat(scaled_sum.add(i).read()), acc[r][c]);
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
