//! The CPU device and what it stands on, without the rest of valar, and the tests of it that need no model: little enough to be
//! compiled for another processor and run in an emulator.

#[path = "../../src/device/mod.rs"]
pub mod device;
#[path = "../../src/request.rs"]
pub mod request;
#[path = "../../src/tensor.rs"]
pub mod tensor;

// The tests call this crate by the name of the one that they are written for.
#[cfg(test)]
extern crate self as valar;

#[cfg(test)]
#[path = "../it/conformance.rs"]
mod conformance;
#[cfg(test)]
#[path = "../it/conformance_attention.rs"]
mod conformance_attention;
#[cfg(test)]
#[path = "../it/conformance_families.rs"]
mod conformance_families;
#[cfg(test)]
#[path = "../it/head.rs"]
mod head;
#[cfg(test)]
#[path = "../it/sample.rs"]
mod sample;

/// Whether the emulated processor's paths are those that `VALAR_NEON_PATHS` says: one that was not found would not be tested.
#[test]
fn the_processors_paths_are_found() {
    use device::cpu::Isa;
    let found: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
    assert_eq!(found.join(" "), std::env::var("VALAR_NEON_PATHS").expect("run.sh sets it"));
}
