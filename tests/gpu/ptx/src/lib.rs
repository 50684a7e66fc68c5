//! Executes PTX, as NVRTC emits it, on the CPU, and checks what it does: for tests of CUDA kernels on machines without a GPU.
//!
//! Whole warps are executed, one instruction for 32 lanes; warps and blocks take turns in an order drawn from a seed. What no
//! opcode of this crate describes is refused when the module is parsed. A launch ends with counters, or with a `Fault`: a
//! race between warps, lanes or blocks, an access out of bounds or misaligned, shared memory that nobody wrote, an
//! asynchronous copy that was not waited for, a barrier that not all of a warp reach, a deadlock.

mod block;
mod body;
mod clocks;
mod counters;
mod decode;
mod exec;
mod fault;
mod float;
mod gpu;
mod inst;
mod lanes;
mod lex;
mod memory;
mod module;
mod operand;
mod products;
mod registers;
mod shadow;
mod shared;
mod tensor_map;
mod warp;

pub use counters::{Counters, Line};
pub use fault::{Fault, FaultKind, ParseError};
pub use gpu::{Arg, Dim3, Gpu, Options};
pub use module::{KernelShape, Module};
pub use tensor_map::TensorMap;
