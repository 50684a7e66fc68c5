//! The stand-in libraries as a program sees them through cudarc: known answers, the driver's rules, and each knob. What a
//! test says of the driver holds on a device, too; each runs in a process of its own, for knobs are read once and a
//! context that failed stays so.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod blas;
mod common;
mod faults;
mod knobs;
mod rules;
mod work;
