//! The entry points.

mod error;
mod event;
mod graph;
mod launch;
mod memory;
mod module;
mod native;
mod start;
mod stream;
mod tensor;
mod transfer;
