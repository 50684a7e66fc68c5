//! Element types of weights and raw tensors, whatever file they come from. Knows no file format, model or device.

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
    /// Blocks of 32: f16 scale d, 32 signed bytes q; value d·q.
    Q8_0,
}

impl DType {
    /// Elements per block (1 for plain floats).
    pub fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 => 32,
        }
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q8_0 => 34,
        }
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
    pub bytes: &'a [u8],
}
