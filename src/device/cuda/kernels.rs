//! The kernels of the programs in `kernels/`, by what they are for. Their shapes are in the sources' head comments.

use super::blas::Blas;
use super::driver::{Function, Gpu};
use super::fp8::{self, Fp8Kernels};
use super::images::Images;
use super::sources::PROGRAMS;
use crate::device::Activation;
use anyhow::{Context, Result, ensure};

/// Sizes of heads that attention has kernels for.
pub(super) const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];
/// Those of them for which there are products of warpgroups, on GPUs that have these.
pub(super) const WIDE_DIMS: [usize; 3] = [64, 128, 256];
/// The compute capability that has them.
const WIDE_CAPABILITY: (i32, i32) = (9, 0);
/// Elements of a row of the boxes in which their keys and values are copied.
pub(super) const BOX_COLUMNS: usize = 64;
/// What a norm's kernel is called by: rounds of 1024 elements.
pub(super) const ROUNDS: [usize; 4] = [1, 4, 8, 16];
/// Rows of a block of `linear_q`, in tiles of 16.
const TILES: [usize; 2] = [1, 4];

/// Bits of experts' weights, and what their kernels are called by.
const EXPERT_FORMS: [(usize, &str); 4] = [(4, "q4"), (8, "q8"), (6, "q6"), (16, "bf16")];
/// Bits of packed weights (`weights::Form`).
const PACKED: [usize; 3] = [4, 8, 6];

/// Keys of a tile of attention.
pub(super) const TILE: u32 = 64;
/// Keys of a segment, whose states are merged from left to right.
pub(super) const SEGMENT: u32 = 1024;

/// All kernels.
pub(super) struct Kernels {
    pub(super) embed: Function,
    pub(super) gather: Function,
    pub(super) finish_qkv: Function,
    pub(super) copy_blocks: Function,
    pub(super) to_f16: Function,
    pub(super) from_f16: Function,
    /// If the GPU has products of fp8.
    pub(super) fp8: Option<Fp8Kernels>,
    pub(super) merge: Function,
    pub(super) sample: Function,
    gate_silu: Function,
    gate_gelu: Function,
    add_norm: [Function; ROUNDS.len()],
    norm_add: [Function; ROUNDS.len()],
    prefill: [Function; HEAD_DIMS.len()],
    decode: [Function; HEAD_DIMS.len()],
    /// If the GPU has products of warpgroups.
    wide: Option<[Function; WIDE_DIMS.len()]>,
    /// By bits (`PACKED`), whether results are added to f32 or stored as bfloat16, tiles.
    linear_q: [[[Function; TILES.len()]; 2]; PACKED.len()],
    pub(super) choose_experts: Function,
    pub(super) list_uses: Function,
    pub(super) add_experts: Function,
    /// By bits (`EXPERT_FORMS`), tiles.
    linear_experts: [[Function; TILES.len()]; EXPERT_FORMS.len()],
}

/// One of each of a list.
fn each<const N: usize>(list: [usize; N], f: impl Fn(usize) -> Result<Function>) -> Result<[Function; N]> {
    let found: Vec<Function> = list.into_iter().map(f).collect::<Result<_>>()?;
    Ok(std::array::from_fn(|i| found[i]))
}

/// Bytes from row to row of keys in shared memory.
fn stride(head_dim: usize) -> usize {
    2 * head_dim + 16
}

impl Kernels {
    /// Finds every kernel in the loaded programs.
    ///
    /// # Errors
    /// One is missing, or needs more shared memory than the GPU has.
    pub(super) fn find(gpu: &Gpu, images: &Images) -> Result<Self> {
        let of = |program: &str, kernel: &str, shared: usize| {
            let i = PROGRAMS.iter().position(|p| p.name == program).with_context(|| format!("no program {program}"))?;
            gpu.function(images.modules[i], kernel, shared as u32)
        };
        let keys = TILE as usize;
        let prefill = |dim: usize| {
            // Of the largest heads, queries do not stay in registers.
            let n_tiles = if dim == 256 { 3 } else { 2 };
            of("prefill", &format!("prefill_{dim}"), n_tiles * keys * stride(dim))
        };
        let decode = |dim: usize| of("decode", &format!("decode_{dim}"), (2 * keys + 16) * stride(dim) + 16 * 72 * 4);
        let wide = |dim: usize| {
            // Queries, two stages of keys and values, mbarriers.
            let n_bytes = 2 * dim * (prefill_rows(dim) + 4 * keys) + 32;
            of("prefill_sm90", &format!("prefill_sm90_{dim}"), n_bytes)
        };
        let has_wide = gpu.facts().capability == WIDE_CAPABILITY;
        let has_fp8 = fp8::is_there(gpu.facts().capability, Blas::version());
        let linear_q =
            |bits: usize, result: &str| each(TILES, |tiles| of("linear_q", &format!("linear_q{bits}_{result}_{tiles}"), 0));
        let of_bits = |bits: usize| Ok::<_, anyhow::Error>([linear_q(bits, "bf16")?, linear_q(bits, "add")?]);
        let of_experts = |form: &str| each(TILES, |tiles| of("linear_experts", &format!("linear_experts_{form}_{tiles}"), 0));
        let [q4, q8, q6, bf16] = EXPERT_FORMS.map(|(_, form)| of_experts(form));
        Ok(Self {
            embed: of("embed", "embed_bf16", 0)?,
            gather: of("embed", "gather_rows", 0)?,
            finish_qkv: of("qkv", "finish_qkv", 0)?,
            copy_blocks: of("copy", "copy_blocks", 0)?,
            to_f16: of("cast", "bf16_to_f16", 0)?,
            from_f16: of("cast", "f16_to_bf16", 0)?,
            fp8: has_fp8.then(|| Fp8Kernels::find(|program, kernel| of(program, kernel, 0))).transpose()?,
            merge: of("merge", "merge_parts", 0)?,
            sample: of("sample", "sample", 0)?,
            gate_silu: of("gate", "gate_silu", 0)?,
            gate_gelu: of("gate", "gate_gelu", 0)?,
            add_norm: each(ROUNDS, |rounds| of("norm", &format!("add_norm_bf16_{rounds}"), 0))?,
            norm_add: each(ROUNDS, |rounds| of("norm", &format!("norm_add_{rounds}"), 0))?,
            prefill: each(HEAD_DIMS, prefill)?,
            decode: each(HEAD_DIMS, decode)?,
            wide: has_wide.then(|| each(WIDE_DIMS, wide)).transpose()?,
            linear_q: [of_bits(PACKED[0])?, of_bits(PACKED[1])?, of_bits(PACKED[2])?],
            choose_experts: of("experts", "choose_experts", 0)?,
            list_uses: of("experts", "list_uses", 0)?,
            add_experts: of("experts", "add_experts", 0)?,
            linear_experts: [q4?, q8?, q6?, bf16?],
        })
    }

    /// `add_norm_bf16` and `norm_add` for rows of that width; by the width alone, so that bits do not depend on more.
    pub(super) fn norms(&self, width: usize) -> (Function, Function) {
        let i = rounds(width).expect("the width was checked when the model was loaded");
        (self.add_norm[i], self.norm_add[i])
    }

    /// The gate's kernel.
    pub(super) fn gate(&self, f: Activation) -> Function {
        match f {
            Activation::Silu => self.gate_silu,
            Activation::GeluTanh => self.gate_gelu,
        }
    }

    /// Attention of chunks, and of few rows.
    pub(super) fn attention(&self, head_dim: usize) -> (Function, Function) {
        let i = HEAD_DIMS.iter().position(|&dim| dim == head_dim).expect("the head's size was checked when the model was loaded");
        (self.prefill[i], self.decode[i])
    }

    /// Attention of both kinds by products of warpgroups. If there is one, it is all that this size of heads gets: whether it gives the
    /// bits of the others is for the hardware to say.
    pub(super) fn wide(&self, head_dim: usize) -> Option<Function> {
        let i = WIDE_DIMS.iter().position(|&dim| dim == head_dim)?;
        Some(self.wide?[i])
    }

    /// A quantised linear layer over so many rows, whose results are added to f32 or stored as bfloat16, and how many rows a block
    /// has. The bits do not depend on it.
    pub(super) fn linear_q(&self, bits: usize, adds: bool, n_rows: usize) -> (Function, usize) {
        let tiles = tiles(n_rows);
        let wide = usize::from(tiles != TILES[0]);
        let form = PACKED.iter().position(|&of| of == bits).expect("weights have no other forms");
        (self.linear_q[form][usize::from(adds)][wide], 16 * tiles)
    }

    /// A linear layer of experts whose weights have so many bits, where an expert has so many rows or so on average, and how many rows a
    /// block has. The bits do not depend on it.
    pub(super) fn linear_experts(&self, bits: usize, n_rows: usize) -> (Function, usize) {
        let form = EXPERT_FORMS.iter().position(|&(of, _)| of == bits).expect("weights have no other forms");
        let tiles = tiles(n_rows);
        (self.linear_experts[form][usize::from(tiles != TILES[0])], 16 * tiles)
    }
}

/// Rows of an item of prefill.
pub(super) fn prefill_rows(head_dim: usize) -> usize {
    if head_dim == 256 { 64 } else { 128 }
}

/// Tiles of 16 rows that a block of `linear_q` has, for so many rows.
pub(super) fn tiles(n_rows: usize) -> usize {
    if n_rows > 16 * TILES[0] { TILES[1] } else { TILES[0] }
}

fn rounds(width: usize) -> Option<usize> {
    ROUNDS.iter().position(|rounds| width <= rounds * 1024)
}

/// Whether there are norms for rows of that width.
pub(super) fn check_width(width: usize) -> Result<()> {
    ensure!(
        width.is_multiple_of(8) && rounds(width).is_some(),
        "a model of width {width} is not supported on CUDA: it must be a multiple of 8, at most {}",
        1024 * ROUNDS[ROUNDS.len() - 1]
    );
    Ok(())
}
