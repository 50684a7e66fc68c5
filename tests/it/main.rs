//! The integration tests: one binary, one module per subject.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod architecture;
mod cli;
mod columns;
mod common;
mod compressed;
mod conformance;
mod conformance_attention;
mod conformance_families;
mod dataset_rows;
mod dying;
mod explain;
mod fake;
mod families;
mod families_gguf;
mod faults;
mod formats;
mod grammar;
mod handle;
mod hub;
mod kill;
mod memory;
mod model;
mod oracle;
mod parameters;
mod policies;
mod requests;
mod resume;
mod s3;
mod same_bits;
mod sample;
mod simulation;
mod text;
mod tokenizers;
mod weights;
