//! A stand-in for `libcublasLt.so`: what of cuBLASLt a product of matrices needs, computed on the CPU. It works with the
//! stand-in `libcuda.so` alone, which keeps the memory and executes products in their stream's order, in graphs, too.
//!
//! Matrices of bf16, f16, f32 or (from compute capability 8.9 on, with scales) e4m3; sums in f32; results in bf16, f16 or f32;
//! the epilogues bias, `ReLU` and GELU. All else is refused with `CUBLAS_STATUS_NOT_SUPPORTED`.
//!
//! As in the real library, the heuristics rank algorithms by the product's shape, the number of rows among it, and algorithms
//! add up in different orders: who does not keep to one algorithm gets other bits. Each is deterministic.

mod attributes;
mod driver;
mod entries;
mod matrix;
mod product;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// Puts the library into a folder under the names that programs look for, in place of what is there. Cargo built it beside the
/// test that calls this.
pub fn install(folder: &Path) -> io::Result<()> {
    static LINKS: AtomicU32 = AtomicU32::new(0);
    let library = std::env::current_exe()?.with_file_name("libstandin_blas.so");
    for name in ["libcublasLt.so", "libcublasLt.so.12"] {
        // Others may be at it at the same time.
        let own = format!(".{name}.{}.{}", std::process::id(), LINKS.fetch_add(1, Ordering::Relaxed));
        std::os::unix::fs::symlink(&library, folder.join(&own))?;
        std::fs::rename(folder.join(own), folder.join(name))?;
    }
    Ok(())
}
