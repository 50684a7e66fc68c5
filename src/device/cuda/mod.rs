//! What becomes of the CUDA sources in `kernels/`: they are part of the program, and NVRTC makes machine code of them for one
//! architecture at a time. Knows nothing of models, rows or devices that run it.
//!
//! Invariant: building the program needs nothing of CUDA; what is not needed is not opened.

mod cache;
mod nvrtc;
mod sources;

pub use cache::{Kept, build, check_arch};
pub use nvrtc::{Image, Nvrtc};
pub use sources::{ARCHS, PROGRAMS, Program};
