//! Products of floats of 8 bits (e4m3) by cuBLASLt: activations are rounded with a scale for each row, weights have one for each output,
//! and a kernel of ours multiplies both in.
//!
//! Invariants: a row's floats and its scale come from its own values alone. What cuBLASLt multiplies are multiples of [`ROWS`] rows: those
//! that are too many are read as they are, and nobody reads what comes of them.

use super::blas::{Factors, Output, Product};
use super::device::{Act, CudaDevice, Vector};
use super::driver::{Function, arg};
use super::kernels::ROUNDS;
use super::step::Step;
use anyhow::{Context, Result};

/// All dimensions of a product of fp8 must be multiples of this (cuBLAS, cublasLtMatmul: 16-byte alignment of matrix dimensions).
pub(super) const ROWS: usize = 16;
/// The compute capability from which on there are such products, and the version of cuBLAS from which on it has them there: 12.1
/// update 1. Newer ones have them in any version of CUDA 12.
const LEAST: ((i32, i32), usize) = ((8, 9), 120_103);
/// Rows whose sums wait to be added to the residual stream, at most.
const SUM_ROWS: usize = 512;
/// What kernels that round rows are called by: rounds of 1024 elements.
const QUANT_ROUNDS: [usize; 2] = [16, 32];
/// The longest row that they take.
pub(super) const MAX_WIDTH: usize = 1024 * QUANT_ROUNDS[1];

/// Whether a GPU of that compute capability has such products with that version of cuBLAS.
pub(super) fn is_there(capability: (i32, i32), version: usize) -> bool {
    capability > LEAST.0 || (capability == LEAST.0 && version >= LEAST.1)
}

/// The kernels, on GPUs that have the instructions.
pub(super) struct Fp8Kernels {
    add_norm: [Function; ROUNDS.len()],
    quant_rows: [Function; QUANT_ROUNDS.len()],
    scale_bf16: Function,
    scale_f32: Function,
    scale_add: Function,
}

/// A weight `[n][k]`: its floats, and the scales of its outputs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fp8Weight {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) at: u64,
    pub(super) scales: u64,
}

impl Fp8Kernels {
    /// Finds the kernels. `of`: a program's.
    ///
    /// # Errors
    /// One is missing.
    pub(super) fn find(of: impl Fn(&str, &str) -> Result<Function>) -> Result<Self> {
        let each = |name: &str, rounds: &[usize]| -> Result<Vec<Function>> {
            rounds.iter().map(|rounds| of("norm", &format!("{name}_{rounds}"))).collect()
        };
        let (norms, quants) = (each("add_norm_e4m3", &ROUNDS)?, each("quant_rows_e4m3", &QUANT_ROUNDS)?);
        Ok(Self {
            add_norm: std::array::from_fn(|i| norms[i]),
            quant_rows: std::array::from_fn(|i| quants[i]),
            scale_bf16: of("scale", "scale_bf16")?,
            scale_f32: of("scale", "scale_f32")?,
            scale_add: of("scale", "scale_add")?,
        })
    }
}

/// Rows of the sums that wait to be added, for steps of so many tokens.
pub(super) fn sum_rows(max_tokens: usize) -> usize {
    max_tokens.next_multiple_of(ROWS).min(SUM_ROWS)
}

impl CudaDevice {
    fn fp8(&self) -> Result<&Fp8Kernels> {
        self.kernels.fp8.as_ref().context("weights are fp8 only where there are kernels for it")
    }

    /// As `norm_rows`, the result as fp8.
    pub(super) fn norm_rows_fp8(
        &self,
        (x, width): (u64, usize),
        (weight, eps): (&Vector, f32),
        n_rows: usize,
        out: &Act,
    ) -> Result<()> {
        let i = ROUNDS.iter().position(|rounds| width <= 1024 * rounds).context("the width was checked")?;
        let (nothing, width) = (0u64, width as u32);
        let args = [arg(&x), arg(&nothing), arg(&weight.at), arg(&out.narrow), arg(&out.scales), arg(&width), arg(&eps)];
        self.run(self.fp8()?.add_norm[i], (n_rows as u32, 1), 256, &args)
    }

    /// `out = weight · act`, in the form asked for.
    #[expect(clippy::too_many_arguments, reason = "one operation; its operands are distinct")]
    pub(super) fn multiply_fp8(
        &self,
        step: &Step,
        act: &Act,
        weight: &Fp8Weight,
        m: usize,
        output: Output,
        out: u64,
    ) -> Result<()> {
        let (kernels, Fp8Weight { n, k, at, scales }) = (self.fp8()?, *weight);
        if !act.is_fp8 {
            let f = kernels.quant_rows[usize::from(k > 1024 * QUANT_ROUNDS[0])];
            let width = k as u32;
            self.run(f, (m as u32, 1), 256, &[arg(&act.at), arg(&act.narrow), arg(&act.scales), arg(&width)])?;
        }
        let product = |first: usize, rows: usize, output: Output, out: u64| {
            let (sizes, x) = ((rows.next_multiple_of(ROWS), n, k), act.narrow + (first * k) as u64);
            let product = Product { sizes, factors: Factors::E4m3, x, weight: at, out, output };
            // SAFETY: as in `run`; buffers of activations and results have multiples of `ROWS` rows.
            unsafe { self.blas.multiply(self.gpu.stream(), &product) }
        };
        let grid = |rows: usize| (rows as u32, n.div_ceil(1024) as u32);
        let columns = n as u32;
        if output != Output::Sum {
            product(0, m, output, out)?;
            let f = if output == Output::Bf16 { kernels.scale_bf16 } else { kernels.scale_f32 };
            return self.run(f, grid(m), 256, &[arg(&out), arg(&act.scales), arg(&scales), arg(&columns)]);
        }
        for first in (0..m).step_by(SUM_ROWS) {
            let rows = (m - first).min(SUM_ROWS);
            product(first, rows, Output::F32, step.sums)?;
            let (to, row_scales) = (out + 4 * (first * n) as u64, act.scales + 4 * first as u64);
            let args = [arg(&to), arg(&step.sums), arg(&row_scales), arg(&scales), arg(&columns)];
            self.run(kernels.scale_add, grid(rows), 256, &args)?;
        }
        Ok(())
    }
}
