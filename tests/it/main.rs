//! The integration tests: one binary, one module per subject.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod architecture;
mod cli;
mod common;
mod conformance;
mod conformance_attention;
mod dying;
mod fake;
mod formats;
mod handle;
mod kill;
mod memory;
mod model;
mod oracle;
mod parameters;
mod policies;
mod requests;
mod resume;
mod same_bits;
mod sample;
mod simulation;
mod text;
