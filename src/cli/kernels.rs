//! What the user typed after `valar kernels`.

use clap::Subcommand;
use std::path::PathBuf;

/// `valar kernels`
#[derive(Debug, Subcommand)]
pub enum KernelsAction {
    /// Compile them ahead of time with NVRTC; needs no GPU
    Build {
        /// For which architectures, such as `sm_90a` (machine code) or `compute_80` (PTX); all that are supported without it
        #[arg(long, value_name = "ARCH", value_delimiter = ',')]
        arch: Vec<String>,
        /// The folder that takes one file per program and architecture; what it has is not compiled again
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// The file of NVRTC (libnvrtc.so.12), if it is not where the system looks for libraries
        #[arg(long, value_name = "FILE")]
        nvrtc: Option<PathBuf>,
    },
}
