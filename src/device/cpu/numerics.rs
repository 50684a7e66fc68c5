//! In which numbers products are computed. Knows nothing of how. Invariant: each choice gives the same bits on every
//! instruction set; two choices differ in their bits.

use super::isa::Isa;
use super::weights::{BLOCK, Weight};
use crate::tensor::DType;
use anyhow::Context;

/// In which numbers products are computed; sums are f32 in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numerics {
    /// Activations of 8 bits per token and block of 32 against quantised weights as they are in the file, f32 against float
    /// weights; keys and values are IEEE halves.
    Int8,
    /// Products as in `Int8`; queries, keys, values and attention's probabilities rounded to bfloat16.
    Int8Bf16,
    /// Weights, activations, keys, values and attention's probabilities rounded to bfloat16.
    Bf16,
    /// f32 activations and weights; keys and values are IEEE halves.
    F32,
}

impl Numerics {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Int8, Self::Int8Bf16, Self::Bf16, Self::F32];

    /// The fastest of a machine: bfloat16 where it has a unit for that, else 8 bits, with bfloat16 in attention where it has
    /// fast instructions for that.
    pub fn fastest(isa: Isa) -> Self {
        if isa.has_tiles() { Self::Bf16 } else { Self::fastest_int8(isa) }
    }

    /// The fastest with weights as they are in the file.
    pub fn fastest_int8(isa: Isa) -> Self {
        if isa.has_fast_dots() { Self::Int8Bf16 } else { Self::Int8 }
    }

    /// Whether quantised weights are multiplied with 8-bit activations.
    pub fn has_int8_products(self) -> bool {
        matches!(self, Self::Int8 | Self::Int8Bf16)
    }

    /// Whether attention takes keys and values as bfloat16.
    pub fn has_bf16_cache(self) -> bool {
        matches!(self, Self::Int8Bf16 | Self::Bf16)
    }

    /// By the name that pipelines use.
    ///
    /// # Errors
    /// A name that is none of `int8`, `int8-bf16`, `bf16`, `exact`.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        let named = Self::ALL.into_iter().find(|numerics| numerics.name() == name);
        named.with_context(|| format!("{name:?} is not one of fast, int8, int8-bf16, bf16, exact"))
    }

    /// As in [`Numerics::named`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int8Bf16 => "int8-bf16",
            Self::Bf16 => "bf16",
            Self::F32 => "exact",
        }
    }

    /// What the fingerprint says.
    pub(super) fn describe(self, kv: Kv) -> String {
        let (act, own) = match self {
            Self::Int8 => ("i8/32", "f16"),
            Self::Int8Bf16 => ("i8/32", "bf16"),
            Self::Bf16 => ("bf16", "bf16"),
            Self::F32 => ("f32", "f16"),
        };
        match kv {
            Kv::Floats => format!("act={act} kv={own}"),
            // As what attention takes them.
            Kv::Int8 => format!("act={act} kv=i8/head as {own}"),
        }
    }

    /// The layout of weights of a type.
    pub(super) fn layout(self, dtype: DType) -> Layout {
        match self {
            Self::Bf16 if dtype.is_quantised() => Layout::PackedTiles(dtype),
            Self::Bf16 => Layout::Tiles,
            Self::F32 if dtype.is_quantised() => Layout::Floats(DType::F32),
            // Their values, which no float of 16 bits has in general.
            _ if dtype == DType::E4m3 => Layout::Floats(DType::F32),
            Self::Int8 | Self::Int8Bf16 if dtype.is_quantised() => Layout::Blocks(dtype),
            _ => Layout::Floats(dtype),
        }
    }
}

/// How keys and values are kept. Part of what the bits depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kv {
    /// As floats of 16 bits: IEEE halves, or bfloat16 where attention computes in that.
    #[default]
    Floats,
    /// As integers of 8 bits with a scale per token and head, of keys and of values.
    Int8,
}

impl Kv {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Floats, Self::Int8];

    /// By the name that pipelines use.
    ///
    /// # Errors
    /// A name that is neither `floats` nor `int8`.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        let named = Self::ALL.into_iter().find(|kv| kv.name() == name);
        named.with_context(|| format!("{name:?} is not one of floats, int8"))
    }

    /// As in [`Kv::named`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Floats => "floats",
            Self::Int8 => "int8",
        }
    }
}

/// How weights lie in memory (`weights.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Blocks of integers.
    Blocks(DType),
    /// Plain floats of a type.
    Floats(DType),
    /// Tiles of bfloat16.
    Tiles,
    /// Blocks of integers that become tiles where they are multiplied.
    PackedTiles(DType),
}

/// The form of activations that a weight reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Floats,
    Integers,
    Tiles,
}

impl Form {
    /// What a weight reads (parts of floats read the floats, which are always there).
    pub(super) fn of(weight: &Weight) -> Self {
        let mut form = Self::Floats;
        for part in &weight.parts {
            match part.layout {
                Layout::Tiles | Layout::PackedTiles(_) => form = Self::Tiles,
                Layout::Blocks(_) => form = Self::Integers,
                Layout::Floats(_) => {}
            }
        }
        form
    }

    /// Whether a token's values can be sealed `n` columns at a time: integers need whole blocks.
    pub(super) fn takes(self, n: usize) -> bool {
        self != Self::Integers || n.is_multiple_of(BLOCK)
    }
}
