//! CUDA: NVIDIA GPUs. The sources in `kernels/` are part of the program; NVRTC makes machine code of them for one architecture at a
//! time, `device` drives it. Knows nothing of rows, requests or text.
//!
//! Invariant: building the program needs nothing of CUDA; what is not needed is not opened.

mod blas;
mod cache;
pub mod costs;
mod device;
mod driver;
mod experts;
mod fp8;
mod graphs;
mod images;
mod kernels;
mod memory;
pub mod modelled;
mod nvrtc;
mod operations;
mod sources;
mod staging;
mod step;
mod weights;
mod work;

pub use cache::{Kept, build, check_arch};
pub use device::{Act, Cache, CudaDevice, Hidden, Launching, Vector, Weight};
pub use driver::{Facts, driver_is_present};
pub use images::KernelPlace;
pub use nvrtc::{Image, Nvrtc};
pub use sources::{ARCHS, PROGRAMS, Program};
