//! Products of matrices in bfloat16, f16 or floats of 8 bits by NVIDIA's cuBLASLt. Knows nothing of what the matrices mean.
//!
//! Invariant (exactness.md R1): the algorithm of a weight is chosen once, by its shape and result alone, and used for any number
//! of rows; algorithms that split k, and so add partial sums in another order, are never among those to choose from.

use anyhow::{Result, anyhow, ensure};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;

/// The number of rows that algorithms are chosen for: a step's, between one token each of a few sequences and a chunk of a prompt.
const CHOSEN_FOR: usize = 128;

/// `CUBLAS_OP_T` of `cublasOperation_t`.
const TRANSPOSED: i32 = 1;

/// The type of what is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Factors {
    Bf16,
    F16,
    /// Floats of 8 bits; what is added up is in f32, and scaled by nobody here. All sizes are multiples of 16.
    E4m3,
}

/// The type of a result, and whether it is added to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Output {
    /// `[m][n]` bfloat16, stored. (The library gives f16 where the factors are.)
    Bf16,
    /// `[m][n]` f32, stored.
    F32,
    /// `[m][n]` f32, added to.
    Sum,
}

/// A product `out[m][n] = x[m][k] · weight[n][k]`ᵀ.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    /// Rows, columns, elements that are added up.
    pub(super) sizes: (usize, usize, usize),
    pub(super) factors: Factors,
    /// Addresses on the GPU.
    pub(super) x: u64,
    pub(super) weight: u64,
    pub(super) out: u64,
    pub(super) output: Output,
}

/// The library, with the algorithms chosen so far.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    description: sys::cublasLtMatmulDesc_t,
    algorithms: RefCell<HashMap<(usize, usize, Factors, Output), sys::cublasLtMatmulAlgo_t>>,
}

// SAFETY: the handles may be used by any thread, one at a time; whoever owns a `Blas` is the only one that uses it.
unsafe impl Send for Blas {}

fn said<T>(call: &str, result: Result<T, CublasError>) -> Result<T> {
    result.map_err(|error| anyhow!("{call}: {error}"))
}

/// A matrix's layout; destroyed when dropped.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// Of a matrix whose columns stand one after the other, as cuBLASLt sees matrices: our rows.
    fn new(kind: sys::cudaDataType, rows: usize, columns: usize) -> Result<Self> {
        let layout = result::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64);
        Ok(Self(said("cublasLtMatrixLayoutCreate", layout)?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was created once.
        let _destroyed = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// Layouts of weight, activations, and result.
struct Layouts {
    weight: Layout,
    x: Layout,
    out: Layout,
}

impl Layouts {
    fn new((m, n, k): (usize, usize, usize), factors: Factors, output: Output) -> Result<Self> {
        let (factor, stored) = match factors {
            Factors::Bf16 => (sys::cudaDataType_t::CUDA_R_16BF, sys::cudaDataType_t::CUDA_R_16BF),
            Factors::F16 => (sys::cudaDataType_t::CUDA_R_16F, sys::cudaDataType_t::CUDA_R_16F),
            Factors::E4m3 => (sys::cudaDataType_t::CUDA_R_8F_E4M3, sys::cudaDataType_t::CUDA_R_16BF),
        };
        let kind = if output == Output::Bf16 { stored } else { sys::cudaDataType_t::CUDA_R_32F };
        Ok(Self { weight: Layout::new(factor, k, n)?, x: Layout::new(factor, k, m)?, out: Layout::new(kind, n, m)? })
    }
}

impl Blas {
    /// Opens the library. A context must be current.
    ///
    /// # Errors
    /// It is not found, or says why it does not work.
    pub(super) fn open() -> Result<Self> {
        // SAFETY: loads the library by its name; its initialisers have no preconditions.
        let is_there = unsafe { sys::is_culib_present() };
        ensure!(
            is_there,
            "cuBLASLt is not found (libcublasLt.so.12): it is part of CUDA 12, and multiplies what is not quantised"
        );
        let handle = said("cublasLtCreate", result::create_handle())?;
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let description = said("cublasLtMatmulDescCreate", result::create_matmul_desc(compute, scale))?;
        let transposed = TRANSPOSED;
        // SAFETY: the description was created just now; the value is what the attribute takes.
        let set = unsafe {
            result::set_matmul_desc_attribute(
                description,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast::<c_void>(),
                size_of_val(&transposed),
            )
        };
        said("cublasLtMatmulDescSetAttribute", set)?;
        Ok(Self { handle, description, algorithms: RefCell::default() })
    }

    /// The library's version: 120805 is 12.8.5.
    pub(super) fn version() -> usize {
        // SAFETY: takes nothing.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// How algorithms are chosen, for the fingerprint: the same words and version choose the same on one kind of GPU.
    pub(super) fn rule() -> String {
        format!("first-of-heuristics,rows={CHOSEN_FOR},workspace=0,no-reduction")
    }

    /// Chooses the algorithm of a weight.
    ///
    /// # Errors
    /// The library has none for this shape.
    pub(super) fn prepare(&self, (n, k): (usize, usize), factors: Factors, output: Output) -> Result<()> {
        if self.algorithms.borrow().contains_key(&(n, k, factors, output)) {
            return Ok(());
        }
        let layouts = Layouts::new((CHOSEN_FOR, n, k), factors, output)?;
        let preference = said("cublasLtMatmulPreferenceCreate", result::create_matmul_pref())?;
        let chosen = self.choose(&layouts, preference);
        // SAFETY: it was created just now.
        let _destroyed = unsafe { result::destroy_matmul_pref(preference) };
        let algorithm = chosen.map_err(|error| error.context(format!("a weight of {n} rows of {k} elements, {factors:?}")))?;
        self.algorithms.borrow_mut().insert((n, k, factors, output), algorithm);
        Ok(())
    }

    fn choose(&self, layouts: &Layouts, preference: sys::cublasLtMatmulPreference_t) -> Result<sys::cublasLtMatmulAlgo_t> {
        let (workspace, no_reduction) = (0u64, 0u32);
        let attributes = [
            (
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast::<c_void>(),
                size_of_val(&workspace),
            ),
            (
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                (&raw const no_reduction).cast::<c_void>(),
                size_of_val(&no_reduction),
            ),
        ];
        for (attribute, value, size) in attributes {
            // SAFETY: the preference exists; the values are what the attributes take.
            let set = unsafe { result::set_matmul_pref_attribute(preference, attribute, value, size) };
            said("cublasLtMatmulPreferenceSetAttribute", set)?;
        }
        let Layouts { weight, x, out } = layouts;
        // SAFETY: everything that is named exists.
        let found =
            unsafe { result::get_matmul_algo_heuristic(self.handle, self.description, weight.0, x.0, out.0, out.0, preference) };
        Ok(said("cublasLtMatmulAlgoGetHeuristic", found)?.algo)
    }

    /// Has a product computed.
    ///
    /// # Safety
    /// The addresses are of memory of these sizes on the stream's GPU, which lives until the stream has been waited for.
    pub(super) unsafe fn multiply(&self, stream: CUstream, product: &Product) -> Result<()> {
        let Product { sizes, factors, x, weight, out, output } = *product;
        let key = (sizes.1, sizes.2, factors, output);
        self.prepare((sizes.1, sizes.2), factors, output)?;
        let algorithm = self.algorithms.borrow()[&key];
        let layouts = Layouts::new(sizes, factors, output)?;
        let (alpha, beta) = (1.0f32, if output == Output::Sum { 1.0f32 } else { 0.0 });
        // SAFETY: the layouts are those of the matrices (the caller's promise); both scales are f32, as the description says;
        // no workspace is asked for, as the algorithm was chosen for none.
        let done = unsafe {
            result::matmul(
                self.handle,
                self.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                weight as *const c_void,
                layouts.weight.0,
                x as *const c_void,
                layouts.x.0,
                out as *const c_void,
                layouts.out.0,
                out as *mut c_void,
                layouts.out.0,
                &raw const algorithm,
                null_mut(),
                0,
                stream.cast(),
            )
        };
        said("cublasLtMatmul", done)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: both were created once, by `open`.
        unsafe {
            let _destroyed = result::destroy_matmul_desc(self.description);
            let _destroyed = result::destroy_handle(self.handle);
        }
    }
}
