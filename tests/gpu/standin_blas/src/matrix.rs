//! Elements of matrices, and rows of them as f32.

use crate::attributes::{Done, Layout, NOT_SUPPORTED};
use half::{bf16, f16};

/// The type of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    F16,
    Bf16,
    E4m3,
}

impl Kind {
    /// By `cudaDataType_t`.
    pub(crate) fn of(number: u32) -> Done<Self> {
        match number {
            0 => Ok(Self::F32),
            2 => Ok(Self::F16),
            14 => Ok(Self::Bf16),
            28 => Ok(Self::E4m3),
            _ => Err(NOT_SUPPORTED),
        }
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E4m3 => 1,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::E4m3 => "e4m3",
        }
    }

    /// The element at so many elements from the beginning.
    pub(crate) fn get(self, bytes: &[u8], at: usize) -> f32 {
        match self {
            Self::F32 => f32::from_le_bytes([bytes[4 * at], bytes[4 * at + 1], bytes[4 * at + 2], bytes[4 * at + 3]]),
            Self::F16 => f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
            Self::Bf16 => bf16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
            Self::E4m3 => e4m3(bytes[at]),
        }
    }

    /// Rounded to the nearest, ties to even. No result is e4m3.
    pub(crate) fn put(self, bytes: &mut [u8], at: usize, value: f32) {
        match self {
            Self::F32 => bytes[4 * at..][..4].copy_from_slice(&value.to_le_bytes()),
            Self::F16 => bytes[2 * at..][..2].copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            Self::Bf16 | Self::E4m3 => bytes[2 * at..][..2].copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        }
    }
}

/// Sign, four bits of exponent with a bias of 7, three of mantissa; no infinities, and NaN where all but the sign are ones.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * (exponent as f32 - 7.0).exp2(),
    };
    if byte >> 7 == 1 { -size } else { size }
}

impl Layout {
    /// Bytes from the first element to the end of the last one of a matrix.
    pub(crate) fn span(&self) -> usize {
        let (inner, outer) = if self.by_rows { (self.columns, self.rows) } else { (self.rows, self.columns) };
        if inner == 0 || outer == 0 { 0 } else { ((outer - 1) * self.leading + inner) * self.kind.bytes() }
    }

    /// Elements from the first one to that at a row and a column.
    pub(crate) fn at(&self, row: usize, column: usize) -> usize {
        if self.by_rows { row * self.leading + column } else { column * self.leading + row }
    }

    /// A row, or a column, as f32.
    pub(crate) fn line(&self, bytes: &[u8], index: usize, is_row: bool, line: &mut [f32]) {
        let (start, next) = if is_row { (self.at(index, 0), self.at(0, 1)) } else { (self.at(0, index), self.at(1, 0)) };
        let kind = self.kind;
        if next == 1 && kind != Kind::E4m3 {
            let size = kind.bytes();
            let bytes = &bytes[start * size..][..line.len() * size];
            match kind {
                Kind::F32 => fill(line, bytes, |b: [u8; 4]| f32::from_le_bytes(b)),
                Kind::F16 => fill(line, bytes, |b: [u8; 2]| f16::from_le_bytes(b).to_f32()),
                Kind::Bf16 | Kind::E4m3 => {
                    fill(line, bytes, |b: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16));
                }
            }
            return;
        }
        for (i, x) in line.iter_mut().enumerate() {
            *x = kind.get(bytes, start + i * next);
        }
    }
}

fn fill<const N: usize>(line: &mut [f32], bytes: &[u8], convert: impl Fn([u8; N]) -> f32) {
    for (x, bytes) in line.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *x = convert(*bytes);
    }
}
