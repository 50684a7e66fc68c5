//! The entry points.

mod error;
mod event;
mod graph;
mod launch;
mod memory;
mod module;
mod start;
mod stream;
mod transfer;
