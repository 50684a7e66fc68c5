//! Element types of weights and raw tensors, whatever file they come from. Knows no file format, model or device.
//!
//! Invariant: a quantised element's value is what the format's own arithmetic gives, in f32 and in its order (gguf-py's
//! `dequantize`, bit for bit): the scale of a group is rounded once, then d·q, then the minimum.

mod bytes;

pub use bytes::Bytes;

use half::{bf16, f16};
use std::fmt;

/// Element types that can be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32: f16 scale d, 16 bytes of 4-bit q (low nibbles are elements 0..16); value d·(q − 8).
    Q4_0,
    /// Blocks of 32: f16 scale d, f16 minimum m, 16 bytes of 4-bit q as in `Q4_0`; value d·q + m.
    Q4_1,
    /// Blocks of 32: f16 scale d, 4 bytes of fifth bits, 16 bytes of 4-bit q as in `Q4_0`; value d·(q − 16).
    Q5_0,
    /// Blocks of 32: f16 scale d, f16 minimum m, then as `Q5_0`; value d·q + m.
    Q5_1,
    /// Blocks of 32: f16 scale d, 32 signed bytes q; value d·q.
    Q8_0,
    /// Blocks of 256, 2 bits, a 4-bit scale and a 4-bit minimum per 16.
    Q2K,
    /// Blocks of 256, 3 bits, a signed 6-bit scale per 16.
    Q3K,
    /// Blocks of 256, 4 bits, a 6-bit scale and a 6-bit minimum per 32.
    Q4K,
    /// Blocks of 256, 5 bits, a 6-bit scale and a 6-bit minimum per 32.
    Q5K,
    /// Blocks of 256, 6 bits, a signed 8-bit scale per 16.
    Q6K,
    /// Blocks of 32: f16 scale d, 16 bytes of 4-bit indexes into a fixed table of 16 signed bytes.
    Iq4Nl,
    /// Blocks of 256: as `Iq4Nl` with a signed 6-bit scale per 32.
    Iq4Xs,
    /// Blocks of 32: f32 scale d, a byte with the 4-bit zero z, 16 bytes of 4-bit q as in `Q4_0`; value d·(q − z). No type of a file:
    /// what the linear layers of GPTQ and AWQ folders become whose zeros are not all 8.
    Q4Z,
    /// Blocks of 32: f32 scale d, 32 bytes of floats of 8 bits (e4m3: sign, 4 bits of exponent with a bias of 7, 3 of mantissa, no
    /// infinities); value d·x, rounded to f32. All blocks of a row have the same scale. No type of a file: what linear layers of fp8
    /// folders become.
    E4m3,
}

/// All element types.
pub const DTYPES: [DType; 17] = [
    DType::F32,
    DType::F16,
    DType::Bf16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q2K,
    DType::Q3K,
    DType::Q4K,
    DType::Q5K,
    DType::Q6K,
    DType::Iq4Nl,
    DType::Iq4Xs,
    DType::Q4Z,
    DType::E4m3,
];

/// Elements that [`DType::group`] gives at once.
pub const GROUP: usize = 32;

/// 32 consecutive elements of a quantised row: element i is d\[i / 16\] · q\[i\], plus m\[i / 16\] where
/// [`DType::has_minimum`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// The integers.
    pub q: [i8; GROUP],
    /// Scales of the first and of the last 16 elements.
    pub d: [f32; 2],
    /// What is added to the first and to the last 16 elements.
    pub m: [f32; 2],
}

/// The values that 4-bit indexes of `Iq4Nl` and `Iq4Xs` stand for.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl DType {
    /// Elements per block (1 for plain floats).
    pub fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Iq4Nl | Self::Q4Z | Self::E4m3 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::Iq4Xs => 256,
        }
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Iq4Xs => 136,
            Self::Q4Z => 21,
            Self::E4m3 => 36,
        }
    }

    /// Whether elements are integers with scales.
    pub fn is_quantised(self) -> bool {
        self.block_elements() > 1 && self != Self::E4m3
    }

    /// Whether something is added to d·q.
    pub fn has_minimum(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q2K | Self::Q4K | Self::Q5K)
    }

    /// Whether the two halves of a [`Group`] have scales of their own.
    pub fn has_half_scales(self) -> bool {
        matches!(self, Self::Q2K | Self::Q3K | Self::Q6K)
    }

    /// Elements `32 · part ..` of a block of a quantised type.
    ///
    /// # Panics
    /// A type of floats, a `block` shorter than [`DType::block_bytes`], or a `part` past its end.
    pub fn group(self, block: &[u8], part: usize) -> Group {
        assert!(part * GROUP < self.block_elements(), "group {part} of a block of {self}");
        let half = |i: usize| f16::from_le_bytes([block[i], block[i + 1]]).to_f32();
        let (d, m) = match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::E4m3 => unreachable!("{self} has no integers"),
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 | Self::Iq4Nl => ([half(0); 2], [0.0; 2]),
            Self::Q4_1 | Self::Q5_1 => ([half(0); 2], [half(2); 2]),
            Self::Q2K => {
                let (d, min) = (half(80), half(82));
                let scales = [block[2 * part], block[2 * part + 1]];
                (scales.map(|s| d * f32::from(s & 15)), scales.map(|s| -(min * f32::from(s >> 4))))
            }
            Self::Q3K => {
                let d = half(108);
                ([2 * part, 2 * part + 1].map(|i| d * f32::from(q3k_scale(&block[96..108], i))), [0.0; 2])
            }
            Self::Q4K | Self::Q5K => {
                let (scale, minimum) = k_scale(&block[4..16], part);
                ([half(0) * f32::from(scale); 2], [-(half(2) * f32::from(minimum)); 2])
            }
            Self::Q6K => {
                let d = half(208);
                ([192 + 2 * part, 193 + 2 * part].map(|i| d * f32::from(block[i] as i8)), [0.0; 2])
            }
            Self::Iq4Xs => {
                let low = block[4 + part / 2] >> (4 * (part % 2)) & 15;
                let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * part) & 3;
                ([half(0) * f32::from((low | (high as u8) << 4) as i8 - 32); 2], [0.0; 2])
            }
            Self::Q4Z => ([f32::from_le_bytes([block[0], block[1], block[2], block[3]]); 2], [0.0; 2]),
        };
        Group { q: self.integers(block, part), d, m }
    }

    /// What was taken off the integers that stand in a block; 0 where a type has none.
    pub fn zero(self, block: &[u8]) -> u8 {
        match self {
            Self::Q4_0 => 8,
            Self::Q4Z => block[4] & 15,
            _ => 0,
        }
    }

    /// The integers of a group.
    fn integers(self, block: &[u8], part: usize) -> [i8; GROUP] {
        // Low nibbles of 16 bytes, then their high nibbles; or, in the larger blocks, one nibble of 32 bytes.
        let nibble = |start: usize, i: usize| block[start + i % 16] >> (i / 16 * 4) & 15;
        let wide_nibble = |start: usize, i: usize| block[start + part / 2 * 32 + i] >> (4 * (part % 2)) & 15;
        // 2 bits of 32 bytes, which 4 groups share.
        let pair = |start: usize, i: usize| block[start + part / 4 * 32 + i] >> (2 * (part % 4)) & 3;
        let fifth = |start: usize, i: usize| (block[start + i / 8] >> (i % 8) & 1) << 4;
        std::array::from_fn(|i| match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::E4m3 => unreachable!("{self} has no integers"),
            Self::Q4_0 => nibble(2, i) as i8 - 8,
            Self::Q4_1 => nibble(4, i) as i8,
            Self::Q5_0 => (nibble(6, i) | fifth(2, i)) as i8 - 16,
            Self::Q5_1 => (nibble(8, i) | fifth(4, i)) as i8,
            Self::Q8_0 => block[2 + i] as i8,
            Self::Q2K => pair(16, i) as i8,
            // A set bit of the mask takes nothing off.
            Self::Q3K => pair(32, i) as i8 - if block[i] >> part & 1 == 1 { 0 } else { 4 },
            Self::Q4K => wide_nibble(16, i) as i8,
            Self::Q5K => (wide_nibble(48, i) | (block[16 + i] >> part & 1) << 4) as i8,
            Self::Q6K => {
                let low = block[part / 4 * 64 + part % 2 * 32 + i] >> (part % 4 / 2 * 4) & 15;
                (low | pair(128, i) << 4) as i8 - 32
            }
            Self::Iq4Nl => IQ4_VALUES[usize::from(nibble(2, i))],
            Self::Iq4Xs => IQ4_VALUES[usize::from(nibble(8 + 16 * part, i))],
            Self::Q4Z => nibble(5, i) as i8 - self.zero(block) as i8,
        })
    }

    /// The values of whole blocks (or plain floats) as f32.
    ///
    /// # Panics
    /// `bytes` do not hold exactly `out.len()` elements in whole blocks.
    pub fn dequantise(self, bytes: &[u8], out: &mut [f32]) {
        let n_blocks = bytes.len() / self.block_bytes();
        assert_eq!(
            (bytes.len(), out.len()),
            (n_blocks * self.block_bytes(), n_blocks * self.block_elements()),
            "bytes and elements of {self}"
        );
        for (block, out) in bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_elements())) {
            match self {
                Self::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
                Self::F16 => out[0] = f16::from_le_bytes([block[0], block[1]]).to_f32(),
                Self::Bf16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
                Self::E4m3 => {
                    let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
                    out.iter_mut().zip(&block[4..]).for_each(|(out, &byte)| *out = scale * e4m3(byte));
                }
                _ => {
                    for (part, out) in out.chunks_exact_mut(GROUP).enumerate() {
                        let group = self.group(block, part);
                        for (i, out) in out.iter_mut().enumerate() {
                            *out = group.d[i / 16] * f32::from(group.q[i]);
                            if self.has_minimum() {
                                *out += group.m[i / 16];
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The value of a float of 8 bits (e4m3). Its exponent and mantissa are the highest of f16's, whose bias is larger by 8.
pub fn e4m3(byte: u8) -> f32 {
    if byte & 0x7f == 0x7f {
        return f32::NAN;
    }
    let bits = u16::from(byte & 0x80) << 8 | u16::from(byte & 0x7f) << 7;
    256.0 * f16::from_bits(bits).to_f32()
}

/// Scale `i` of 16 of `Q3K`: the low 4 bits stand in 8 bytes, the high 2 in the next 4.
fn q3k_scale(bytes: &[u8], i: usize) -> i8 {
    let low = bytes[i % 8] >> (i / 8 * 4) & 15;
    let high = bytes[8 + i % 4] >> (i / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// Scale and minimum `i` of 8 of `Q4K` and `Q5K`, 6 bits each in 12 bytes.
fn k_scale(bytes: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (bytes[i] & 63, bytes[4 + i] & 63);
    }
    let rest = bytes[4 + i];
    ((rest & 15) | (bytes[i - 4] >> 6 << 4), (rest >> 4) | (bytes[i] >> 6 << 4))
}

/// The names that GGUF files and their makers use, where they have the type.
impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
            Self::Iq4Xs => "IQ4_XS",
            Self::Q4Z => "Q4_Z",
            Self::E4m3 => "E4M3",
        })
    }
}

/// A tensor's shape, type and raw bytes.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// The tensor's name in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    /// Row-major, outermost first: `[n, k]` for a linear layer (the reverse of GGUF's own order).
    pub shape: Vec<usize>,
    /// `shape.product() / block_elements · block_bytes` bytes.
    pub bytes: Bytes<'a>,
}

impl Tensor<'_> {
    /// Entries `range` of the outermost dimension: rows of a matrix.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn rows(&self, range: std::ops::Range<usize>) -> Self {
        let row_bytes = self.bytes.len() / self.shape[0];
        let mut shape = self.shape.clone();
        shape[0] = range.len();
        Self { shape, bytes: self.bytes.slice(range.start * row_bytes..range.end * row_bytes), ..*self }
    }

    /// Entry `i` of the outermost dimension, without that dimension: one matrix of a stack.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn entry(&self, i: usize) -> Self {
        let mut entry = self.rows(i..i + 1);
        entry.shape.remove(0);
        entry
    }
}
