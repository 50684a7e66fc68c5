//! Weights as the kernels take them: integers with scales, packed as `kernels/linear_q.cu` says, bfloat16, f16, or fp8. Made on the host;
//! knows nothing of the GPU.
//!
//! Invariant: a packed weight's value is the file's, `scale · q + minimum`, rounded to bfloat16 by the kernel; what has no exact
//! place in that form (minimums per 16 elements) is expanded and rounded here.

use super::fp8::{MAX_WIDTH, ROWS};
use super::memory::aligned;
use crate::tensor::{DType, GROUP, Group, Tensor};
use anyhow::{Result, ensure};
use half::{bf16, f16};
use rayon::prelude::*;

/// Rows of a panel: what a warp multiplies with.
const PANEL: usize = 16;
/// Bytes that a lane loads at once.
const PIECE: usize = 16;
/// Packed weights have multiples of so many rows and elements of a row.
const PAD: usize = 64;

/// How a weight is kept on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `[n][k]`, two bytes each.
    Bf16,
    /// The same; bfloat16 where that has the same values.
    F16,
    /// Floats of 8 bits (e4m3) `[n][k]`, an f32 scale for each of n.
    Fp8,
    /// Integers of 4 or 8 bits, a scale and a minimum per 32 elements; or, if 6, of up to 8 bits, a scale per 16 elements.
    Packed(usize),
}

/// The form of tensors that become one weight, on a GPU that has products of fp8 or not.
pub(super) fn form(parts: &[Tensor<'_>], has_fp8: bool) -> Form {
    let bits = |part: &Tensor<'_>| match part.dtype {
        DType::Q4_0 | DType::Q4_1 | DType::Q4K | DType::Q4Z => Some(4),
        dtype if dtype.has_half_scales() => (!dtype.has_minimum()).then_some(6),
        dtype => dtype.is_quantised().then_some(8),
    };
    if parts.iter().all(|part| part.dtype == DType::F16) {
        return Form::F16;
    }
    let is_narrow = |part: &Tensor<'_>| part.dtype == DType::E4m3 && part.shape.get(1).is_some_and(|&k| k <= MAX_WIDTH);
    let n_rows = parts.iter().map(|part| part.shape[0]).sum::<usize>();
    if has_fp8 && parts.iter().all(is_narrow) && n_rows.is_multiple_of(ROWS) {
        return Form::Fp8;
    }
    match parts.iter().map(bits).collect::<Option<Vec<usize>>>() {
        None => Form::Bf16,
        Some(all) if !all.contains(&6) => Form::Packed(all.into_iter().max().unwrap_or(4)),
        // Where a scale per 16 is, there is no place for a minimum.
        Some(_) if parts.iter().any(|part| part.dtype.has_minimum()) => Form::Bf16,
        Some(_) => Form::Packed(6),
    }
}

/// Rows and elements of a row of tensors that become one weight.
///
/// # Errors
/// Rows of different lengths, or of one that the kernels do not take.
pub(super) fn shape(parts: &[Tensor<'_>]) -> Result<(usize, usize)> {
    let (name, k) = (parts[0].name, parts[0].shape[1]);
    ensure!(parts.iter().all(|part| part.shape.len() == 2 && part.shape[1] == k), "{name}: rows of different lengths");
    ensure!(k.is_multiple_of(8), "{name}: rows of {k} elements are not supported on CUDA, only multiples of 8");
    Ok((parts.iter().map(|part| part.shape[0]).sum(), k))
}

/// Bits that an integer takes.
fn stored(bits: usize) -> usize {
    if bits == 4 { 4 } else { 8 }
}

/// Bytes of the integers, and of the scales, of a packed weight.
pub(super) fn packed_bytes(bits: usize, n: usize, k: usize) -> (usize, usize) {
    let elements = n.next_multiple_of(PAD) * k.next_multiple_of(PAD);
    (elements * stored(bits) / 8, elements / GROUP * 2 * size_of::<f32>())
}

/// Bytes of the arena that a weight made of these tensors takes.
pub(super) fn stack_bytes(parts: &[Tensor<'_>], has_fp8: bool) -> usize {
    let elements = |part: &Tensor<'_>| part.shape.iter().product::<usize>();
    match form(parts, has_fp8) {
        Form::Fp8 => {
            let n: usize = parts.iter().map(|part| part.shape[0]).sum();
            aligned(parts.iter().map(elements).sum()) + aligned(n * size_of::<f32>())
        }
        Form::Bf16 | Form::F16 => aligned(2 * parts.iter().map(elements).sum::<usize>()),
        Form::Packed(bits) => {
            let k = parts[0].shape.last().copied().unwrap_or(0);
            let n = parts.iter().map(elements).sum::<usize>().checked_div(k).unwrap_or(0);
            let (q, scales) = packed_bytes(bits, n, k);
            aligned(q) + aligned(scales)
        }
    }
}

/// All values as bfloat16, in their order.
pub(super) fn bf16_bytes(part: &Tensor<'_>) -> Vec<u8> {
    if part.dtype == DType::Bf16 {
        return part.bytes.to_vec();
    }
    let mut out = vec![0; 2 * part.shape.iter().product::<usize>()];
    // As many blocks as are worth a task.
    let n_blocks = 4096 / part.dtype.block_elements();
    let (from, to) = (n_blocks * part.dtype.block_bytes(), n_blocks * part.dtype.block_elements());
    out.par_chunks_mut(2 * to).zip(part.bytes.par_chunks(from)).for_each(|(out, bytes)| {
        let mut values = [0.0; 4096];
        let values = &mut values[..out.len() / 2];
        part.dtype.dequantise(bytes, values);
        for (out, value) in out.chunks_exact_mut(2).zip(values) {
            out.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
        }
    });
    out
}

/// The floats of a tensor of fp8, and the scales of its rows.
pub(super) fn fp8_bytes(part: &Tensor<'_>) -> (Vec<u8>, Vec<u8>) {
    let (n, k) = (part.shape[0], part.shape[1]);
    let (mut floats, mut scales) = (Vec::with_capacity(n * k), Vec::with_capacity(n * size_of::<f32>()));
    for row in part.bytes.chunks_exact(k / part.dtype.block_elements() * part.dtype.block_bytes()) {
        scales.extend_from_slice(&row[..size_of::<f32>()]);
        row.chunks_exact(part.dtype.block_bytes()).for_each(|block| floats.extend_from_slice(&block[size_of::<f32>()..]));
    }
    (floats, scales)
}

/// Whether all values of f16 are ones of bfloat16, too: as those are that were made of it. Products in bfloat16 then lose nothing, and
/// can have larger activations.
pub(super) fn fits_bf16(part: &Tensor<'_>) -> bool {
    let fits = |bytes: &[u8; 2]| {
        let value = f16::from_le_bytes(*bytes).to_f32();
        value.to_bits().trailing_zeros() >= 16
    };
    part.bytes.as_chunks().0.par_chunks(1 << 16).all(|values| values.iter().all(fits))
}

/// All values of some tensors as f32, one after the other.
pub(super) fn f32_bytes(parts: &[Tensor<'_>]) -> Vec<u8> {
    let values = parts.iter().flat_map(|part| {
        let mut values = vec![0.0f32; part.shape.iter().product()];
        part.dtype.dequantise(&part.bytes, &mut values);
        values
    });
    values.flat_map(f32::to_le_bytes).collect()
}

/// The integers and the scales of a weight, each in the kernel's order.
pub(super) fn pack(parts: &[Tensor<'_>], bits: usize) -> Result<(Vec<u8>, Vec<u8>)> {
    let (n, k) = shape(parts)?;
    let (n_q, n_scales) = packed_bytes(bits, n, k);
    let (mut q, mut scales) = (vec![0u8; n_q], vec![0u8; n_scales]);
    for part in parts {
        part.bytes.make();
    }
    let n_panels = n.next_multiple_of(PAD) / PANEL;
    let panels = q.par_chunks_mut(n_q / n_panels).zip(scales.par_chunks_mut(n_scales / n_panels));
    panels.enumerate().for_each(|(panel, (q, scales))| {
        for row in panel * PANEL..n.min((panel + 1) * PANEL) {
            let (part, row_of_part) = part_of(parts, row);
            for group in 0..k / GROUP {
                let values = group_of(part, row_of_part, group, bits);
                put_group(q, stored(bits), row % PANEL, group, &values);
                let at = (group * PANEL + row % PANEL) * 8;
                scales[at..at + 4].copy_from_slice(&values.d[0].to_le_bytes());
                let second = if bits == 6 { values.d[1] } else { values.m[0] };
                scales[at + 4..at + 8].copy_from_slice(&second.to_le_bytes());
            }
        }
    });
    Ok((q, scales))
}

/// The tensor that a row of the weight stands in, and which of its rows it is.
fn part_of<'p, 'a>(parts: &'p [Tensor<'a>], mut row: usize) -> (&'p Tensor<'a>, usize) {
    for part in parts {
        if row < part.shape[0] {
            return (part, row);
        }
        row -= part.shape[0];
    }
    unreachable!("the weight has no such row")
}

/// 32 elements of a row, as integers of so many bits: unsigned if 4, signed if 8.
fn group_of(part: &Tensor<'_>, row: usize, group: usize, bits: usize) -> Group {
    let dtype = part.dtype;
    let (groups, row_bytes) = (dtype.block_elements() / GROUP, part.shape[1] / dtype.block_elements() * dtype.block_bytes());
    let block = &part.bytes[row * row_bytes + group / groups * dtype.block_bytes()..][..dtype.block_bytes()];
    let mut values = dtype.group(block, group % groups);
    let zero = dtype.zero(block);
    if bits == 4 && zero > 0 {
        values.q = values.q.map(|q| q + zero as i8);
        // Of scales of f16 or bfloat16 exact: four bits more than theirs.
        values.m = values.d.map(|d| -f32::from(zero) * d);
    }
    values
}

/// Puts 32 elements of a panel's row where lanes look for them.
fn put_group(panel: &mut [u8], bits: usize, row: usize, group: usize, values: &Group) {
    for (i, &value) in values.q.iter().enumerate() {
        let column = group * GROUP + i;
        let within = column % 16;
        let lane = 4 * (row % 8) + within % 8 / 2;
        let place = 8 * (column % PAD / 16) + 4 * (row / 8) + within % 2 + within / 8 * 2;
        let byte = place * bits / 8;
        let at = (column / PAD * (bits / 4) + byte / PIECE) * 32 * PIECE + lane * PIECE + byte % PIECE;
        panel[at] |= (value as u8) << (if bits == 4 { place % 2 * 4 } else { 0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Bytes;

    #[test]
    fn forms() {
        let of = |dtypes: &[DType]| {
            let tensor = |&dtype| Tensor { name: "", dtype, shape: vec![8, 256], bytes: Bytes::from(&[][..]) };
            form(&dtypes.iter().map(tensor).collect::<Vec<_>>(), true)
        };
        assert_eq!(of(&[DType::Q4K, DType::Q4_0]), Form::Packed(4));
        assert_eq!(of(&[DType::Q4K, DType::Q5K]), Form::Packed(8));
        assert_eq!(of(&[DType::Iq4Nl]), Form::Packed(8), "its integers are no line");
        assert_eq!(of(&[DType::Q6K, DType::Q3K]), Form::Packed(6));
        assert_eq!(of(&[DType::Q6K, DType::Q8_0, DType::Q4_0]), Form::Packed(6));
        // A minimum has no place beside a scale per 16 elements.
        assert_eq!(of(&[DType::Q4K, DType::Q6K]), Form::Bf16);
        assert_eq!(of(&[DType::Q2K]), Form::Bf16);
        assert_eq!(of(&[DType::Q8_0, DType::F16]), Form::Bf16);
        assert_eq!(of(&[DType::F16, DType::F16]), Form::F16);
        assert_eq!(of(&[DType::F16, DType::Bf16]), Form::Bf16);
        assert_eq!(of(&[DType::E4m3, DType::E4m3]), Form::Fp8);
        assert_eq!(of(&[DType::E4m3, DType::Bf16]), Form::Bf16);
        // Of no multiple of 16 outputs, or longer than kernels round rows.
        assert_eq!(of(&[DType::E4m3]), Form::Bf16);
        let long = |k| Tensor { name: "", dtype: DType::E4m3, shape: vec![16, k], bytes: Bytes::from(&[][..]) };
        assert_eq!((form(&[long(32768)], true), form(&[long(32800)], true)), (Form::Fp8, Form::Bf16));
        assert_eq!(form(&[long(64)], false), Form::Bf16);
    }

    #[test]
    fn fp8_is_as_in_the_file() {
        let block = |scale: f32, first: u8| [&scale.to_le_bytes()[..], &(first..first + 32).collect::<Vec<_>>()].concat();
        let bytes = [block(0.5, 0), block(0.5, 32), block(3.0, 64), block(3.0, 90)].concat();
        let tensor = Tensor { name: "", dtype: DType::E4m3, shape: vec![2, 64], bytes: (&bytes).into() };
        let (floats, scales) = fp8_bytes(&tensor);
        assert_eq!(floats, (0..96).chain(90..122).collect::<Vec<u8>>());
        assert_eq!(scales, [0.5f32, 3.0].map(f32::to_le_bytes).concat());
    }

    #[test]
    fn values_of_f16_that_are_ones_of_bfloat16() {
        let fits = |values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
            fits_bf16(&Tensor { name: "", dtype: DType::F16, shape: vec![1, values.len()], bytes: (&bytes).into() })
        };
        // Eight bits from the first to the last; also where f16 is subnormal.
        assert!(fits(&[0.0, -1.0, 255.0 / 256.0, 65280.0, f32::exp2(-24.0), 255.0 * f32::exp2(-24.0)]));
        for value in [257.0 / 256.0, 65504.0, 257.0 * f32::exp2(-24.0)] {
            assert!(!fits(&[0.5, value, 0.5]), "{value}");
        }
    }

    /// Value of row n, column k as a lane of the kernel finds it, by the words of `linear_q.cu`.
    fn unpacked(bits: usize, (q, scales): &(Vec<u8>, Vec<u8>), k_padded: usize, (n, k): (usize, usize)) -> f32 {
        let (panel, column, e) = (n / 16, n % 16, k % 16);
        // Value 8 s + 4 c + j of lane 4 g + t: column 8 c + g, element 16 s + 2 t + {0, 1, 8, 9}[j].
        let (g, c, t) = (column % 8, column / 8, e % 8 / 2);
        let j = [0, 1, 8, 9].iter().position(|at| at + 2 * t == e).unwrap();
        let (step, lane, value) = (panel * (k_padded / 64) + k / 64, 4 * g + t, 8 * (k % 64 / 16) + 4 * c + j);
        let integer = if bits == 4 {
            f32::from(q[(step * 32 + lane) * 16 + value / 2] >> (value % 2 * 4) & 15)
        } else {
            f32::from(q[((step * 2 + value / 16) * 32 + lane) * 16 + value % 16].cast_signed())
        };
        let at = ((panel * (k_padded / 32) + k / 32) * 16 + column) * 8;
        let float = |at: usize| f32::from_le_bytes(*scales[at..].first_chunk().unwrap());
        if bits == 6 {
            return integer * float(at + k % 32 / 16 * 4);
        }
        integer * float(at) + float(at + 4)
    }

    #[test]
    fn packed_weights_have_the_files_values() {
        let packed = crate::tensor::DTYPES.into_iter().filter(|dtype| dtype.is_quantised() && *dtype != DType::Q2K);
        for dtype in packed {
            // Where blocks allow it, with padding.
            let k = if dtype.block_elements() == 32 { 96 } else { 256 };
            let row_bytes = k / dtype.block_elements() * dtype.block_bytes();
            let mut state = 1u32;
            let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Exponents of f16 that are no infinity.
                (state >> 24) as u8 & 0x7b
            })
            .take(20 * row_bytes)
            .collect();
            if dtype == DType::Q4Z {
                // Scales as files have them: of 8 bits, not near the end of the range.
                bytes.chunks_exact_mut(dtype.block_bytes()).for_each(|block| (block[0], block[1], block[3]) = (0, 0, 0x3b));
            }
            let parts = [(0, 7), (7, 13)].map(|(first, n)| Tensor {
                name: "",
                dtype,
                shape: vec![n, k],
                bytes: bytes[first * row_bytes..(first + n) * row_bytes][..].into(),
            });
            let Form::Packed(bits) = form(&parts, true) else { panic!("{dtype}") };
            let packed = pack(&parts, bits).unwrap();
            let mut values = vec![0.0; 20 * k];
            dtype.dequantise(&bytes, &mut values);
            for (i, want) in values.into_iter().enumerate() {
                let got = unpacked(bits, &packed, k.next_multiple_of(64), (i / k, i % k));
                assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{dtype}: {got}, not {want}");
            }
        }
    }
}
