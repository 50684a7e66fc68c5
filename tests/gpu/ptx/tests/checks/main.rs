//! The interpreter's own tests: answers worked out by hand from the PTX ISA, and kernels with a bug that it must find, each
//! with a twin without the bug that it must pass.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod asynchronous;
mod boxes;
mod common;
mod compiled;
mod control;
mod conversions;
mod counting;
mod floats;
mod integers;
mod memory;
mod planted;
mod planted_global;
mod product;
mod registers;
mod tensor;
mod text;
mod warp;
