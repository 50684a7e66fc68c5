//! What describes a tensor to copies of its boxes. A driver's form is its own secret, and so is this one.

/// A tensor of two dimensions of 2-byte elements, whose boxes are copied with 128-byte swizzle and zeros for what lies outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap {
    /// Of its first element: a multiple of 16.
    pub address: u64,
    /// Elements of a row, and rows.
    pub columns: u64,
    /// See `columns`.
    pub rows: u64,
    /// Bytes from row to row: a multiple of 16.
    pub stride: u64,
    /// Elements of a box's row, of at most 128 bytes; rows of a box, at most 256.
    pub box_columns: u64,
    /// See `box_columns`.
    pub box_rows: u64,
}

/// What its bytes begin with.
const MAGIC: u64 = 0x7661_6c61_725f_7432;

impl TensorMap {
    /// The 128 bytes that a kernel gets, if there can be such a tensor.
    pub fn encode(&self) -> Option<[u8; 128]> {
        let Self { address, columns, rows, stride, box_columns, box_rows } = *self;
        let in_rows = columns > 0 && rows > 0 && rows <= 1 << 32 && 2 * columns <= stride && stride < 1 << 40;
        let in_box = (8..=64).contains(&box_columns) && box_columns.is_multiple_of(8) && (1..=256).contains(&box_rows);
        if !in_rows || !in_box || !address.is_multiple_of(16) || !stride.is_multiple_of(16) {
            return None;
        }
        let mut bytes = [0; 128];
        for (to, word) in bytes.chunks_mut(8).zip([MAGIC, address, columns, rows, stride, box_columns, box_rows]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        Some(bytes)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |i: usize| bytes[8 * i..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let [address, columns, rows, stride, box_columns, box_rows] = [1, 2, 3, 4, 5, 6].map(word);
        (word(0) == MAGIC).then_some(Self { address, columns, rows, stride, box_columns, box_rows })
    }
}
